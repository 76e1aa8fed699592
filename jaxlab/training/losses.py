"""Next-token cross-entropy, with the logits made a slice at a time."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require
from jaxlab.models import LanguageModel

_SLICE_BYTES = 2**29  # float32 logits made at once on a device


# (model, hidden states as `model.logits` reads them, int32 targets (batch, time)) -> a loss for each of the targets.
TokenLosses = Callable[..., Float[Array, "batch time"]]


def token_losses(
  model: LanguageModel,
  hidden: tuple[Array, Array | None],
  targets: Int[Array, "batch time"],
  *,
  keep_logits: bool = False,
) -> Float[Array, "batch time"]:
  """-log p(target) in nats, float32; 0 where the target is -1.

  The float32 logits of the whole batch would be the largest array of a training step: they are computed for slices of
  the time axis, and again for the gradient, either from the hidden states or, with `keep_logits`, from the head's
  products kept in the computing dtype (one matrix product less, batch * time * vocab numbers more).
  """
  batch, time = targets.shape
  slices = _slices(batch, time, model.config.vocab_size)
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if keep_logits else None

  @functools.partial(jax.checkpoint, policy=policy, prevent_cse=slices == 1 or keep_logits)
  def one(model, hidden, targets):
    logits = model.logits(*hidden)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0)

  if slices == 1:
    return one(model, hidden, targets)
  parts = jax.tree.map(functools.partial(_cut, slices=slices), (hidden, targets))
  if keep_logits:  # written out: what a loop keeps is copied into one array
    losses = jnp.stack([one(model, *jax.tree.map(lambda a: a[i], parts)) for i in range(slices)])  # noqa: B023
  else:
    losses = jax.lax.map(lambda part: one(model, *part), parts)
  return jnp.moveaxis(losses, 0, 1).reshape(batch, time)


def divergences(
  teacher: LanguageModel,
  target: tuple[Array, Array | None],
  model: LanguageModel,
  students: Sequence[tuple[Array, Array | None]],
) -> Float[Array, "students batch time"]:
  """KL(teacher || student) of the next token's distribution in nats, float32, of every student.

  sum_v p(v) (log p(v) - log q(v)); p by `teacher` from hidden states `target`, q by `model` from each of `students`.
  The logits are made for slices of the time axis, and again for the gradient, as in `token_losses`.
  """
  batch, time = target[0].shape[:2]
  slices = _slices((1 + len(students)) * batch, time, model.config.vocab_size)

  @functools.partial(jax.checkpoint, prevent_cse=slices == 1)
  def one(teacher, model, target, students):
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.logits(*target)))
    log_q = (jax.nn.log_softmax(model.logits(*hidden)) for hidden in students)
    return jnp.stack([(jnp.exp(log_p) * (log_p - q)).sum(axis=-1) for q in log_q])

  if slices == 1:
    return one(teacher, model, target, students)
  parts = jax.tree.map(functools.partial(_cut, slices=slices), (target, tuple(students)))
  found = jax.lax.map(lambda part: one(teacher, model, *part), parts)
  return jnp.moveaxis(found, 0, 2).reshape(len(students), batch, time)


def _slices(rows: int, time: int, vocab: int) -> int:
  """How many equal slices of the time axis keep a device's float32 logits of `rows` rows within _SLICE_BYTES."""
  devices = meshes.split_over("batch", rows) * meshes.split_over("vocab", vocab)
  wanted = max(1, rows * time * vocab * 4 // devices // _SLICE_BYTES)
  return next(n for n in range(wanted, time + 1) if time % n == 0)


def _cut(a: Shaped[Array, "batch time *rest"], slices: int) -> Shaped[Array, "slices batch part *rest"]:
  return jnp.moveaxis(a.reshape(a.shape[0], slices, a.shape[1] // slices, *a.shape[2:]), 1, 0)


def mean_loss(losses: Float[Array, "batch time"], targets: Int[Array, "batch time"], total=None) -> Float[Array, ""]:
  """Mean over the targets that count, those that are not -1; `total`: their number where these are a part of them."""
  total = jnp.maximum((targets >= 0).sum(), 1) if total is None else total
  return jnp.where(targets >= 0, losses, 0).sum() / total


def language_model_loss(
  model: LanguageModel, batch, *, remat: str = "none", unroll: bool = False, keep_logits: bool = False
) -> tuple[Array, dict[str, Array]]:
  """Cross-entropy of the sequential network: (loss, {}). `batch` has int32 `inputs` and `targets`.

  The options trade compilation time and memory for speed: see `transformer.sequential` and `token_losses`.
  """
  hidden = model.hidden(batch["inputs"], remat=remat, unroll=unroll)
  losses = token_losses(model, hidden, batch["targets"], keep_logits=keep_logits)
  return mean_loss(losses, batch["targets"]), {}


def evaluator(forward, token_bytes: Int[ArrayLike, "vocab"] | None = None):
  """A function `(model, batches) -> {"loss": nats, "perplexity", "tokens"[, "bits_per_byte"]}`.

  Args:
    forward: `forward(model, inputs) -> (final state, backout state or None)`, what `model.logits` reads; jitted, as
      only the losses after it are compiled here, once for all evaluators.
    token_bytes: bytes each token stands for. Special tokens (0 bytes) count neither their loss nor their bytes.

  Raises:
    InputError: `evaluate` got a model with fewer ids than token_bytes.
  """

  def evaluate(model: LanguageModel, batches) -> dict[str, float]:
    total = [0.0] * 4
    sizes = np.ones(model.config.vocab_size, np.int32) if token_bytes is None else np.asarray(token_bytes)
    vocabulary = model.config.vocab_size
    require(len(sizes) <= vocabulary, f"token_bytes has {len(sizes)} ids, the model {vocabulary}; use its tokenizer")
    for batch in batches:
      sums = _sums(model, forward(model, batch["inputs"]), batch["targets"], sizes)
      total = [a + float(b) for a, b in zip(total, sums, strict=True)]
    loss = total[0] / total[1]
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": total[1]}
    if token_bytes is not None:
      result["bits_per_byte"] = total[2] / total[3] / math.log(2)
    return result

  return evaluate


@jax.jit
def _sums(model, states, targets, sizes):
  """(loss, counted targets, loss of those that stand for bytes, their bytes)."""
  losses = token_losses(model, states, targets)
  counted = targets >= 0
  sizes = jnp.where(counted, sizes[jnp.maximum(targets, 0)], 0)
  return losses.sum(), counted.sum(), (losses * (sizes > 0)).sum(), sizes.sum()
