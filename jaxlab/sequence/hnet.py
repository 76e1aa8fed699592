"""Training an H-Net (`models.hnet`): the loss on how much is cut, rates by stage, capacities, other rules to cut by.

  L = cross-entropy + 0.03 sum_s N/(N-1) ((N-1) F G + (1-F)(1-G)),   F = mean b, G = mean p of stage s

is least where a share 1/N of the positions begin a chunk. Text needs nothing but its bytes:

  model = HNet(HNetConfig("m2 [T4] m2", (256, 512), (0, 1024), (4, 8)), key)
  rows = packing.training_rows(byte_level.tokens_of(texts), row=2048, seed=0)
  loss, steps = hnet.loss_of(model.config, 2048), 4000
  train(model, packing.batches(rows, 16), loss, hnet.optimizer(model.config, 1e-3, steps=steps), steps=steps, ...)

Reference: Hwang, Wang and Gu 2025, arXiv 2507.07955.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_counts
from jaxlab.data.byte_level import BOS
from jaxlab.models.hnet import HNet
from jaxlab.models.hnet_config import HNetConfig, stage_of
from jaxlab.training import losses
from jaxlab.training.loop import LossFn
from jaxlab.training.optimizers import adamw

WEIGHT = 0.03  # of the ratio loss
_BYTES_A_TOKEN = 4.6  # of GPT-2's tokenizer: rates are tuned for it
_DECAYING = ("weight", "conv", "embedding", "q", "k", "residual", "router")

Cutter = Callable[[Int[Array, "batch time"]], Bool[Array, "batch time"]]


def ratio_loss(
  probability: Float[Array, "batch time"],
  cut: Bool[Array, "batch time"],
  ratio: float,
  valid: Bool[Array, "batch time"] | None = None,
) -> Float[Array, ""]:
  """N/(N-1) ((N-1) F G + (1-F)(1-G)): 1 at F = G = 1/N, below it only where F and G lie on two sides of 1/N.

  Args:
    probability, cut: p and b of a stage; ratio: N; valid: positions that are no padding, None all.

  Raises:
    InputError: a ratio of at most 1.
  """
  require(ratio > 1, f"ratio is {ratio}; chunks have more than 1 position")
  valid = jnp.ones_like(cut) if valid is None else valid
  mean = lambda a: jnp.sum(jnp.where(valid, a, 0.0)) / jnp.maximum(valid.sum(), 1)
  f, g = mean(cut.astype(probability.dtype)), mean(probability)
  return ratio / (ratio - 1) * ((ratio - 1) * f * g + (1 - f) * (1 - g))


def multipliers(config: HNetConfig) -> tuple[float, ...]:
  """lambda_s = sqrt(4.6 prod_{i>=s} N^i / prod_i N^i D^S / D^s): outer stages see more positions and are narrower."""
  compression = [math.prod(config.ratios[:stage]) for stage in range(len(config.widths))]
  ratio = lambda stage: _BYTES_A_TOKEN / compression[stage] * config.widths[-1] / config.widths[stage]
  return tuple(math.sqrt(ratio(stage)) for stage in range(len(config.widths)))


def optimizer(
  config: HNetConfig, rate: float, *, steps: int, factors: tuple[float, ...] | None = None, **options
) -> optax.GradientTransformation:
  """AdamW whose rate in stage s is `rate` times factors[s] (None: `multipliers`); vectors do not decay.

  Args:
    options: of `training.optimizers.adamw`.

  Raises:
    InputError: not one factor for each stage.
  """
  factors = multipliers(config) if factors is None else factors
  stages = len(config.widths)
  require(len(factors) == stages, f"factors is {factors}; the model has {stages} stages: give one for each")
  return adamw(rate, steps=steps, factor=lambda name: factors[stage_of(name)], decayed=decays, **options)


def decays(name: str) -> bool:
  """Whether a parameter decays: matrices do; gains, biases, pads and a recurrence's decays and step sizes do not."""
  return name.rpartition(".")[2] in _DECAYING


def capacities(config: HNetConfig, length: int, *, slack: float = 1.5, multiple: int = 64) -> tuple[int, ...]:
  """Chunks that rows of `length` have room for, by stage: slack length / N, rounded up to a multiple, at most length.

  Raises:
    InputError: a slack of 0 or less, a length or a multiple below 1.
  """
  require_counts(length=length, multiple=multiple)
  require(slack > 0, f"slack is {slack}; give at least 1, the room for what training aims at")
  found, expected = [], length
  for ratio in config.ratios:
    before, expected = (found[-1] if found else length), expected / ratio
    found.append(min(before, math.ceil(slack * expected / multiple) * multiple))
  return tuple(found)


def loss_of(
  config: HNetConfig,
  length: int,
  *,
  slack: float | None = 1.5,
  weight: float = WEIGHT,
  cutter: Cutter | None = None,
  remat: str = "none",
  token_losses: losses.TokenLosses = losses.token_losses,
) -> LossFn:
  """The loss of `training.loop.train` for rows of `length`.

  Its metrics are `nats` (cross-entropy, or what is in its place) and, of stage s, `share_s` (F), `probability_s` (G)
  and `overflow_s` (the share of the cuts that capacity demoted).

  Args:
    slack: of `capacities`; None: no position is left out, and nothing is saved.
    weight: of the ratio losses.
    cutter: tokens -> where the outermost stage is cut, in the place of its router, whose ratio loss then has no part.
    token_losses: as of `chunkflow.gradient`.
  """
  room = None if slack is None else capacities(config, length, slack=slack)

  def loss(model: HNet, batch, step, key):
    targets = batch["targets"]
    place = jnp.arange(1, targets.shape[1] + 1)
    lengths = jnp.max(jnp.where(targets >= 0, place, 1), axis=1)
    given = cutter(batch["inputs"]) if cutter else None
    x, chunks = model.chunked(batch["inputs"], capacities=room, lengths=lengths, boundaries=given, remat=remat)
    nats = losses.mean_loss(token_losses(model, (x, None), targets), targets)
    total, metrics = nats, {"nats": nats}
    for stage, (one, ratio) in enumerate(zip(chunks, config.ratios, strict=True)):
      if stage or cutter is None:
        total = total + weight * ratio_loss(one.probability, one.cut, ratio, one.valid)
      count = jnp.maximum(one.valid.sum(), 1)
      metrics |= {
        f"share_{stage}": one.cut.sum() / count,
        f"probability_{stage}": jnp.where(one.valid, one.probability, 0.0).sum() / count,
        f"overflow_{stage}": 1 - one.cut.sum() / jnp.maximum(one.wanted.sum(), 1),
      }
    return total, metrics

  return loss


def every(size: int) -> Cutter:
  """Cuts rows into pieces of `size`: H-Net (pool)."""
  require_counts(size=size)
  return lambda tokens: jnp.broadcast_to(jnp.arange(tokens.shape[1]) % size == 0, tokens.shape)


def at_spaces(tokens: Int[Array, "batch time"]) -> Bool[Array, "batch time"]:
  """Cuts at the first of consecutive space-like bytes and at BOS: H-Net (space), the rule of SpaceByte.

  What the inner stages make of a word is then there when the next one's first byte, the hardest, is predicted.
  Reference: Slagle 2024, arXiv 2404.14408.
  """
  like = spacelike(tokens)
  before = jnp.concatenate([jnp.zeros_like(like[:, :1]), like[:, :-1]], axis=1)
  return (like & ~before) | (tokens == BOS)


def spacelike(tokens: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
  """Bytes that are no ASCII letter or digit and do not continue a UTF-8 character."""
  within = lambda low, high: (tokens >= low) & (tokens <= high)
  letters = within(ord("a"), ord("z")) | within(ord("A"), ord("Z"))
  return ~(letters | within(ord("0"), ord("9")) | within(0x80, 0xBF))
