"""The one training loop: mixed precision, accumulation, sharding, checkpoints, guards.

Master parameters are float32; a step computes in `compute_dtype` on a cast copy. One step is one jitted function with
donated state. A run that was killed continues with the same losses it would have had.
"""

import contextlib
import dataclasses
import functools
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError, require, require_divides
from jaxlab.models import LanguageModel
from jaxlab.models.layers import cast
from jaxlab.training.checkpoints import Checkpoints
from jaxlab.training.metrics import MetricsWriter, peak_flops

LossFn = Callable[..., tuple[jax.Array, dict]]  # (model, batch, step, key[, frozen])
GradientFn = Callable[..., tuple[tuple[jax.Array, dict], Any]]  # the same -> (what the loss gives, gradient)

_SPIKE_WINDOW = 50
_SPIKE_NATS = 2.0


class Diverged(InputError):
  """The loss became NaN or jumped."""


class Interrupted(Exception):
  """Ctrl-C or SIGTERM: the state is saved; the same command goes on from `step`."""

  def __init__(self, step: int):
    super().__init__(f"stopped after step {step}, which is saved; the same command continues from there")
    self.step = step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that changes: float32 model, optimizer state, steps done, key (raw bits); or shapes; or shardings."""

  model: LanguageModel
  optimizer: optax.OptState
  step: jax.Array | Any
  key: jax.Array | Any


def train(
  model: LanguageModel,
  data: Iterable,
  loss_fn: LossFn | None,
  optimizer: optax.GradientTransformation,
  *,
  steps: int,
  workdir: Path,
  seed: int = 0,
  accumulate: int = 1,
  compute_dtype="bfloat16",
  checkpoint_every: int = 500,
  mesh: Mesh | None = None,
  frozen=None,
  gradient_fn: GradientFn | None = None,
  progress: Callable[[dict], None] = lambda metrics: None,
) -> LanguageModel:
  """Trains a model and returns it (float32); resumes from `workdir` if it holds a checkpoint of this run.

  Args:
    model: initial parameters, or any tree with the model's `config`; used as they are only when there is nothing to
      resume.
    data: batches {"inputs", "targets"} of int32 (batch, time); `iter(data)` has get_state and set_state.
    loss_fn: `(model in compute_dtype, batch, step, key) -> (loss, {name: scalar})`, or `(..., key, frozen)`.
    accumulate: microbatches a batch is split into, gradients averaged.
    mesh: devices; the model is placed by its axis names, the batch over data and fsdp. None: all devices, data only.
    frozen: a model that the loss reads and nothing trains (a teacher, the weights under adapters), as it is.
    gradient_fn: in the place of `jax.value_and_grad(loss_fn, has_aux=True)`, for gradients that are worked out another
      way (a sequence in parts, say); `loss_fn` is then None.
    progress: called once a step with that step's metrics.

  Returns:
    The trained model. `workdir` then holds metrics.jsonl (a line a step), TensorBoard events, and checkpoints.

  Raises:
    Diverged: NaN, or a jump of 2 nats over the median of the last 50 steps.
    Interrupted: on Ctrl-C or SIGTERM, after saving.
    InputError: a batch that does not divide, a checkpoint of another config, a full disk, no or two ways to a gradient.
  """
  require((loss_fn is None) != (gradient_fn is None), "give a loss_fn or a gradient_fn, and not both")
  mesh = mesh or meshes.make_mesh()
  state = initial_state(model, optimizer, mesh, seed)
  step_fn = make_step(
    loss_fn,
    optimizer,
    meshes.shardings(state, mesh),
    accumulate=accumulate,
    compute_dtype=compute_dtype,
    gradient_fn=gradient_fn,
  )
  constant = () if frozen is None else (jax.device_put(frozen, meshes.shardings(frozen, mesh)),)
  iterator = iter(data)
  with Checkpoints(workdir / "checkpoints") as checkpoints, _signals() as stop:
    if (latest := checkpoints.latest()) is not None:
      state, position = checkpoints.restore(latest, state)
      iterator.set_state(position)
    done = latest or 0
    with MetricsWriter(workdir, resume_after=done) as writer:
      guard, pending = _Guard(), None
      speed = _Speed(model, mesh)
      for step in range(done, steps):
        batch = next(iterator)
        require_divides("accumulate", accumulate, "batch", len(batch["inputs"]))
        batch = meshes.place_batch(batch, mesh)
        state, metrics = step_fn(state, batch, *constant)
        # Reading the metrics of the step before keeps the device one step ahead.
        if pending:
          _record(pending, guard, writer, progress)
        pending = {"step": step + 1, "steps": steps} | metrics | speed(batch["inputs"].shape)
        last = step + 1 == steps or bool(stop)
        if last or (step + 1) % checkpoint_every == 0:
          _record(pending, guard, writer, progress)
          pending = None
          checkpoints.save(step + 1, state, iterator.get_state())
        if last:
          checkpoints.wait(step + 1)
        if stop and step + 1 < steps:
          raise Interrupted(step + 1)
  return state.model


def initial_state(model: LanguageModel, optimizer, mesh: Mesh, seed: int) -> TrainState:
  """The state of step 0, placed on the mesh."""
  model = jax.tree.map(lambda a: a.astype(jnp.float32), model)
  make = lambda m: TrainState(m, optimizer.init(m), jnp.int32(0), jax.random.key_data(jax.random.key(seed)))
  placed = meshes.shardings(jax.eval_shape(make, model), mesh)
  return jax.jit(make, out_shardings=placed)(model)


def make_step(
  loss_fn: LossFn | None,
  optimizer,
  shardings,
  *,
  accumulate: int = 1,
  compute_dtype="bfloat16",
  gradient_fn: GradientFn | None = None,
):
  """The jitted training step `(state, batch[, frozen]) -> (state, metrics)`; the state is donated."""
  mesh = jax.tree.leaves(shardings)[0].mesh
  differentiated = gradient_fn or jax.value_and_grad(loss_fn, has_aux=True)

  def gradient(model, *args):
    used, back = jax.vjp(lambda model: meshes.gathered(cast(model, compute_dtype)), model)
    value, grads = differentiated(used, *args)
    (grads,) = back(grads)
    return value, jax.lax.with_sharding_constraint(grads, shardings.model)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
  def step_fn(state: TrainState, batch, *frozen):
    with meshes.using(mesh):
      key, use = jax.random.split(jax.random.wrap_key_data(state.key))
      if accumulate == 1:
        (value, extra), grads = gradient(state.model, batch, state.step, use, *frozen)
      else:
        # Strided, so that every microbatch stays spread over the devices.
        parts = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, accumulate, *a.shape[1:]), 1, 0), batch)
        once = jax.jit(gradient)  # traced once, for the shapes and for the loop

        def add(total, part):
          return jax.tree.map(jnp.add, total, once(state.model, part, state.step, use, *frozen)), None

        first = jax.tree.map(lambda a: a[0], parts)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(once, state.model, first, state.step, use, *frozen))
        total, _ = jax.lax.scan(add, zeros, parts)
        (value, extra), grads = jax.tree.map(lambda a: a / accumulate, total)
      updates, optimizer_state = optimizer.update(grads, state.optimizer, state.model)
      model = optax.apply_updates(state.model, updates)
      metrics = {"loss": value, "gradient_norm": optax.tree.norm(grads)} | extra
      return TrainState(model, optimizer_state, state.step + 1, jax.random.key_data(key)), metrics

  return step_fn


def _record(metrics: dict, guard, writer, progress) -> None:
  metrics = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
  guard(metrics)
  writer(metrics)
  progress(metrics)


class _Guard:
  """Stops a run whose loss is no number or has jumped."""

  def __init__(self):
    self._losses = deque(maxlen=_SPIKE_WINDOW)

  def __call__(self, metrics):
    loss, step = metrics["loss"], metrics["step"]
    usual = statistics.median(self._losses) if self._losses else loss
    full = len(self._losses) == _SPIKE_WINDOW
    if not math.isfinite(loss) or (full and loss > usual + _SPIKE_NATS):
      raise Diverged(
        f"the loss is {loss:.4g} at step {step} (median of the steps before: {usual:.4g}); lower the learning "
        "rate, or look at the data of that step, and go on from the last checkpoint, which is kept"
      )
    self._losses.append(loss)


class _Speed:
  """Tokens per second and model FLOPs utilisation, over the time since the step before."""

  def __init__(self, model, mesh):
    self._config, self._peak, self._then = model.config, peak_flops() * mesh.size, None

  def __call__(self, shape) -> dict:
    now, then = time.perf_counter(), self._then
    self._then = now
    if then is None:
      return {}
    rate = shape[0] * shape[1] / (now - then)
    used = self._config.flops_per_token(shape[1]) * rate
    return {"tokens_per_second": rate} | ({"mfu": used / self._peak} if self._peak else {})


@contextlib.contextmanager
def _signals():
  """A list that is non-empty once SIGINT or SIGTERM has come; a second one interrupts at once."""
  caught = []

  def handler(number, frame):
    if caught:
      raise KeyboardInterrupt
    caught.append(number)

  try:
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
  except ValueError:  # not the main thread: signals are somebody else's
    before = {}
  try:
    yield caught
  finally:
    for number, old in before.items():
      signal.signal(number, old)
