"""nanochat's optimizer: Muon for the matrices of the blocks, AdamW groups for the rest, and its scaling rules.

Beside it AdamW with learning rates by the names of parameters.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxlab.models import LanguageModel, LanguageModelConfig
from jaxlab.training.muon import muon


@dataclasses.dataclass(frozen=True)
class Group:
  """An AdamW group; `scaled` learning rates grow with sqrt(batch tokens / 2^19)."""

  rate: float
  betas: tuple[float, float]
  decay: float = 0.0
  scaled: bool = True


def groups(config: LanguageModelConfig) -> dict[str, Group]:
  """The AdamW groups. What nanochat lacks takes its lambdas' rate (gains, recurrences) or its head's (tied tables)."""
  d = (config.width / 768) ** -0.5
  tied = config.tied_embeddings
  return {
    "head": Group(0.008 * d, (0.8, 0.96), 0.01),
    "embedding": Group(0.008 * d if tied else 0.3 * d, (0.8, 0.995), 0.001),
    "value_embeddings": Group(0.15 * d, (0.8, 0.995), 0.01),
    "residual_lambda": Group(0.005, (0.8, 0.95), 0.05),
    "x0_lambda": Group(0.5, (0.96, 0.95)),
    "smear_backout": Group(0.2, (0.8, 0.95), scaled=False),
    "mixing": Group(0.01, (0.9, 0.999), scaled=False),
    "gain": Group(0.005, (0.8, 0.95)),
    "recurrence": Group(0.005, (0.9, 0.95)),
  }


def label(name: str) -> str:
  """The group of a parameter, by its dotted name; "muon" for every matrix inside the blocks."""
  parts = name.split(".")
  if "smear" in name or "backout" in name:
    return "smear_backout"
  if any(part.endswith("_mixing") for part in parts):
    return "mixing"
  if "chunker" in parts or "pad" in parts:
    return "gain"
  for group in ("head", "embedding", "value_embeddings", "residual_lambda", "x0_lambda", "gain", "recurrence"):
    if group in parts:
      return group
  return "muon"


def labels(model: LanguageModel):
  """`label` of every parameter, in the structure of the model."""
  return by_name(label, model)


def by_name(function: Callable[[str], object], tree):
  """`function` of every parameter's dotted name, in the structure of the tree."""
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
  return jax.tree_util.tree_map_with_path(lambda path, _: function(name(path)), tree)


def muon_adamw(
  config: LanguageModelConfig,
  *,
  steps: int,
  batch_tokens: int,
  scale: float = 1.0,
  weight_decay: float | None = None,
  warmup: int = 40,
  warmdown: float = 0.65,
  final: float = 0.05,
) -> optax.GradientTransformation:
  """The optimizer of a model of this config for a run of `steps` steps of `batch_tokens` tokens.

  Learning rates rise linearly over `warmup` steps, stay, and fall linearly to `final` of their peak over the last
  `warmdown` of the run (0: they stay). Muon's momentum goes 0.85 -> 0.97 over 400 steps and to 0.90 during the fall;
  its weight decay (default: nanochat's rule, 0.28 at depth 12) falls as a cosine.

  Args:
    scale: factor on every learning rate.
  """
  down = warmdown * steps
  warmup = max(1, min(warmup, steps // 4))

  def shape(count):
    fall = final + (1 - final) * (steps - count) / down if down else 1.0
    return jnp.clip(jnp.minimum((count + 1) / warmup, fall), 0.0, 1.0)

  def momentum(count):
    rise = 0.85 + 0.12 * jnp.clip(count / 400, 0, 1)
    fall = 0.90 + 0.07 * jnp.clip((steps - count) / down, 0, 1) if down else 0.97
    return jnp.minimum(rise, fall)

  batch = math.sqrt(batch_tokens / 2**19)
  decay = default_weight_decay(config, batch_tokens) if weight_decay is None else weight_decay
  transforms = {
    "muon": muon(
      lambda count: scale * batch * 0.02 * shape(count),
      momentum=momentum,
      weight_decay=lambda count: decay * 0.5 * (1 + jnp.cos(jnp.pi * count / steps)),
    )
  }
  for name, group in groups(config).items():
    peak = scale * group.rate * (batch if group.scaled else 1.0)
    transforms[name] = optax.adamw(
      lambda count, peak=peak: peak * shape(count),
      b1=group.betas[0],
      b2=group.betas[1],
      eps=1e-10,
      weight_decay=group.decay,
    )
  return optax.partition(transforms, labels)


def default_weight_decay(config: LanguageModelConfig, batch_tokens: int) -> float:
  """0.28 sqrt(batch / 2^19) P12 / P, nanochat's rule.

  P counts the matrix parameters of blocks and head, P12 those of the 12-layer model of the same aspect ratio and head
  size.
  """
  head = config.width * config.vocab_size
  blocks = config.matmul_parameters - head
  width = math.ceil(12 * config.width / config.depth / config.head_dim) * config.head_dim
  reference = blocks * 12 / config.depth * (width / config.width) ** 2 + width * config.vocab_size
  return 0.28 * math.sqrt(batch_tokens / 2**19) * reference / (blocks + head)


def adamw(
  rate: float,
  *,
  steps: int,
  factor: Callable[[str], float] = lambda name: 1.0,
  decayed: Callable[[str], bool] = lambda name: True,
  weight_decay: float = 0.1,
  warmup: float = 0.1,
  cooldown: float = 0.2,
) -> optax.GradientTransformation:
  """AdamW, gradients clipped to norm 1, betas (0.9, 0.95): a parameter's rate is `rate` times the factor of its name.

  Rates rise linearly over the first `warmup` of the steps, stay, and fall as 1 - sqrt(share of the cooldown that is
  over) during the last `cooldown` of them (Haegele et al. 2024, arXiv 2405.18392). Weights decay by their rate.

  Args:
    factor, decayed: of a dotted name ("stage.inner.pad"); parameters of the latter decay.
  """
  rising, falling = (jnp.maximum(1, jnp.round(share * steps)) for share in (warmup, cooldown))

  def schedule(count):
    fall = 1 - jnp.sqrt(jnp.clip((count - steps + falling) / falling, 0.0, 1.0))
    return -rate * jnp.minimum((count + 1) / rising, fall)

  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.95),
    optax.add_decayed_weights(weight_decay, mask=lambda tree: by_name(decayed, tree)),
    _scaled(factor),
    optax.scale_by_schedule(schedule),
  )


def adam(
  rate: float, *, steps: int, warmup: int = 40, factor: Callable[[str], float] = lambda name: 1.0
) -> optax.GradientTransformation:
  """Adam without decay, for changing a trained network: gradients clipped to norm 1, betas (0.9, 0.95).

  The rate rises linearly over `warmup` steps and falls linearly to 0 at the last of `steps`; a parameter's is that
  times the factor of its dotted name.
  """
  shape = lambda count: jnp.minimum((count + 1) / max(warmup, 1), 1 - count / steps)
  schedule = lambda count: rate * shape(count)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1=0.9, b2=0.95), _scaled(factor))


def _scaled(factor: Callable[[str], float]) -> optax.GradientTransformation:
  return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, by_name(factor, updates)))
