"""What is trained: deep memories and networks without, of as many parameters, each at a learning rate of its own."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

from experiments.text import Text
from experiments.tnt.windowed import WindowedConfig, windowed
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require
from jaxlab.data import packing
from jaxlab.models import HNet, HNetConfig
from jaxlab.sequence.hnet import decays
from jaxlab.sequence.tnt import MemoryConfig, titans, ttt
from jaxlab.sequence.tnt_model import MemoryModel, MemoryModelConfig
from jaxlab.training import loop, losses, optimizers

TNT, SMALL = "TNT", "TNT, small chunks from the start"
WITHOUT = {"global memory": dict(global_chunk=None), "projection": dict(projection=None), "resets": dict(shard=None)}
COUNTS = {"1 local memory": 1, "3 local memories": 3, "4 local memories": 4}
TITANS, COARSE, TTT = "Titans", "Titans, large chunks", ("TTT-Linear", "TTT-MLP")
ATTENTION = {
  "Transformer": dict(),
  "Transformer, gated": dict(gated=True),
  "Transformer, sliding window": dict(window=True),
}
PLAIN = "plain Titans"  # without momentum and forgetting, as TNT; timed, not trained
MAMBA, WINDOWED = "Mamba-2", "TNT, attention in a window for local memories"
ARMS = (TNT, SMALL, WINDOWED, TITANS, COARSE, *TTT, MAMBA, *ATTENTION)
ABLATIONS = (*(f"without {part}" for part in WITHOUT), *COUNTS)

Shape = MemoryModelConfig | HNetConfig


def memory_of(config, name: str) -> MemoryConfig | None:
  """The layer of an arm; None: it has no deep memory."""
  m, c = config.model, config.chunks
  sizes = dict(heads=m.heads, head_dim=m.head_dim, expansion=m.expansion)
  local = tuple(c.local)
  ours = lambda **fields: MemoryConfig(
    m.width,
    **(sizes | dict(global_chunk=c.whole, shard=c.shard, local_chunks=local, local_step=c.inner.tnt) | fields),
  )
  more = {1: local[:1], 3: (local[0] // 2, *local), 4: (local[0] // 2, *local, 2 * local[-1])}
  # Gradients of a chunk add up: past as many tokens as a head has channels the largest step is divided by them.
  coarse = min(1.0, m.head_dim / c.coarse)
  made = {
    TNT: ours,
    SMALL: lambda: ours(local_chunks=tuple(c.small)),
    WINDOWED: lambda: ours(local_chunks=(), shard=None),
    TITANS: lambda: titans(m.width, chunk=c.titans, local_step=c.inner.titans, **sizes),
    PLAIN: lambda: titans(m.width, chunk=c.titans, momentum=False, decay=False, **sizes),
    COARSE: lambda: titans(m.width, chunk=c.coarse, local_step=coarse * c.inner.titans, **sizes),
    **{f"without {part}": functools.partial(ours, **fields) for part, fields in WITHOUT.items()},
    **{name: functools.partial(ours, local_chunks=more[count]) for name, count in COUNTS.items()},
    **{name: functools.partial(ttt, m.width, chunk=c.titans, layers=n + 1, **sizes) for n, name in enumerate(TTT)},
  }
  require(name in made or name in (*ATTENTION, MAMBA), f"no arm is called {name!r}; there are {ARMS + ABLATIONS}")
  return made[name]() if name in made else None


@functools.lru_cache
def parameters(shape: Shape) -> int:
  return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda: fresh(shape, 0))))


@functools.partial(jax.jit, static_argnums=0)
def fresh(shape: Shape, seed: int):
  kinds = {MemoryModelConfig: MemoryModel, WindowedConfig: windowed, HNetConfig: HNet}
  return kinds[type(shape)](shape, jax.random.key(seed))


def shape_of(config, name: str, vocabulary: int) -> Shape:
  """An arm's network, its SwiGLUs so wide that it has as many parameters as TNT with those of the config."""
  target = parameters(_shape(config, TNT, vocabulary, config.model.mlp_width))
  width = config.model.mlp_width
  more = (target - parameters(_shape(config, name, vocabulary, width))) / (3 * config.model.width * config.model.depth)
  return _shape(config, name, vocabulary, max(8, width + 8 * round(more / 8)))


def _shape(config, name: str, vocabulary: int, mlp_width: int) -> Shape:
  m, memory = config.model, memory_of(config, name)
  if name == WINDOWED:
    return WindowedConfig(vocabulary, m.depth, mlp_width, memory, window=config.chunks.window)
  if memory is not None:
    return MemoryModelConfig(vocabulary, m.depth, mlp_width, memory)
  how = ATTENTION.get(name, {})
  return HNetConfig(
    f"{'M' if name == MAMBA else 'T'}{m.depth}",
    (m.width,),
    (mlp_width,),
    (m.width // m.head_dim,),
    windows=(config.chunks.window - 1 if "window" in how else None,),
    ratios=(),
    vocab_size=vocabulary,
    gated="gated" in how,
    head_dim=m.head_dim,
    state=m.state,
  )


def loss_of(config, chunks: tuple[int, ...] | None = None) -> Callable:
  """`(model, batch, step, key) -> (loss, {})`, local memories at other chunks than the model's if these are given."""

  def loss(model, batch, step, key):
    if chunks is None:
      return losses.language_model_loss(model, batch, remat=config.train.remat)
    hidden = model.hidden(batch["inputs"], remat=config.train.remat, local_chunks=chunks)
    return losses.mean_loss(losses.token_losses(model, hidden, batch["targets"]), batch["targets"]), {}

  return loss


def optimizer(rate: float, *, steps: int, factor: Callable[[str], float] = lambda name: 1.0):
  """AdamW with rate and steps in its state, so that runs of other ones share their compiled programs."""
  make = optax.inject_hyperparams(
    optimizers.adamw, static_args=("factor", "decayed", "weight_decay", "warmup", "cooldown")
  )
  return make(rate, steps=steps, factor=factor, decayed=decays)


@dataclasses.dataclass(frozen=True, eq=False)
class Lab:
  """What every run needs: the config, its texts, where runs are kept."""

  config: object
  text: Text
  workdir: Path
  console: object

  @property
  def vocabulary(self) -> int:
    return self.text.bpe.get_vocab_size()

  def train(
    self, model, folder: str, *, rate: float, steps: int, seed: int, chunks=None, factor=lambda name: 1.0
  ) -> MemoryModel | HNet:
    """The model after so many steps, in float32; resumes from `folder`."""
    t = self.config.train
    with self.console.training(folder) as progress:
      return loop.train(
        model,
        packing.batches(self.text.rows(t.length, seed=seed), t.batch // jax.process_count()),
        loss_of(self.config, chunks),
        optimizer(rate, steps=steps, factor=factor),
        steps=steps,
        workdir=self.workdir / "runs" / folder,
        seed=seed,
        compute_dtype=t.dtype,
        checkpoint_every=max(steps, 1),
        mesh=meshes.make_mesh(self.config.mesh.to_dict()),
        progress=progress,
      )

  def arm(self, name: str, *, rate: float, steps: int, seed: int) -> MemoryModel | HNet:
    shape = shape_of(self.config, name, self.vocabulary)
    model = fresh(shape, seed)
    return self.train(model, f"{name} {rate:g} {steps} {seed}", rate=rate, steps=steps, seed=seed)

  def loss(self, model, split: str, chunks: tuple[int, ...] | None = None) -> float:
    """Nats a token of held-out text, every piece of it from its beginning on."""
    t, e = self.config.train, self.config.eval
    batches = packing.evaluation_batches(self.text.split(split), row=t.length, batch=e.batch, limit=e.tokens)
    return losses.evaluator(_hidden(chunks))(loop.cast(model, t.dtype), batches)["loss"]

  def measured(self, name: str, seeds) -> dict:
    """`at_rate` with the best of the rates, chosen by validation text after runs of config.train.trial steps.

    Returns:
      What it returns, and {trials: {rate: validation loss}}.
    """
    t, trials = self.config.train, {}
    for rate in t.rates:
      model = self.arm(name, rate=rate, steps=t.trial, seed=seeds[0])
      trials[rate] = self.loss(model, "validation")
    found = self.at_rate(name, min(trials, key=trials.get), seeds)
    return found | {"trials": {f"{tried:g}": loss for tried, loss in trials.items()}}

  def at_rate(self, name: str, rate: float, seeds) -> dict:
    """{rate, losses (of test text, one a seed), loss (their mean), parameters} of whole runs of an arm."""
    steps = self.config.train.steps
    found = [self.loss(self.arm(name, rate=rate, steps=steps, seed=seed), "test") for seed in seeds]
    shape = shape_of(self.config, name, self.vocabulary)
    return {"rate": rate, "losses": found, "loss": float(np.mean(found)), "parameters": parameters(shape)}


@functools.cache
def _hidden(chunks: tuple[int, ...] | None):
  """As `losses.evaluator` wants it."""
  how = {} if chunks is None else {"local_chunks": chunks}
  return jax.jit(lambda model, tokens: model.hidden(tokens, **how))
