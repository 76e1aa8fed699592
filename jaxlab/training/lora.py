"""LoRA (Hu et al. 2021, arXiv 2106.09685): a change of low rank for every linear map, on weights that stay.

  W' = W + scale A B,   A: (inputs, rank) random,   B: (rank, outputs) zero at first,   scale = alpha / rank.

The adapters are a tree of their own: a loss merges them into the model it is given, an optimizer and a checkpoint see
nothing else, and the merged model is an ordinary one. Beside a map that is not one matrix (`models.map_forms`) they
stay as they are: in few bits that is QLoRA (Dettmers et al. 2023, arXiv 2305.14314), on maps of low rank one adapter
for both factors.

  lora = init(model, key, rank=16)
  loss = lambda lora, batch: language_model_loss(merge(model, lora), batch)
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.core.checks import require
from jaxlab.models import LanguageModel, LanguageModelConfig
from jaxlab.models.layers import Linear, wide
from jaxlab.models.map_forms import FORMS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
  """A and B of every adapted map by its dotted name; those of stacked maps are of their last layers, stacked."""

  a: dict[str, Float[Array, "*stack inputs rank"]]
  b: dict[str, Float[Array, "*stack rank outputs"]]
  scale: float = dataclasses.field(metadata=dict(static=True))
  config: LanguageModelConfig = dataclasses.field(metadata=dict(static=True))


def init(
  model: LanguageModel,
  key: jax.Array,
  *,
  rank: int,
  alpha: float | None = None,
  start: int = 0,
  where: Callable[[str], bool] = lambda name: True,
) -> Lora:
  """Adapters that change nothing yet: A ~ N(0, 1 / inputs), B = 0, float32.

  Args:
    alpha: scale times rank; None: the rank, so that scale = 1.
    start: of stacked maps (the blocks') only the layers from this one on are adapted.
    where: picks maps by their dotted name, such as "blocks.mlp.down".

  Raises:
    InputError: a rank below 1 or above what a map can have, or no map picked.
  """
  a, b = {}, {}
  for name, one in _linear_maps(model):
    if not where(name):
      continue
    *stack, inputs, outputs = one.weight.shape if isinstance(one, Linear) else one.shape
    require(1 <= rank <= min(inputs, outputs), f"lora rank is {rank}; {name} takes 1..{min(inputs, outputs)}")
    stack = [size - start for size in stack]
    require(all(size >= 1 for size in stack), f"lora starts at layer {start}; {name} has layers up to {start - 1}")
    key, use = jax.random.split(key)
    a[name] = jax.random.normal(use, (*stack, inputs, rank)) / jnp.sqrt(inputs)
    b[name] = jnp.zeros((*stack, rank, outputs))
  require(bool(a), "no linear map of this model was picked for lora; see `where`")
  return Lora(a, b, (rank if alpha is None else alpha) / rank, model.config)


def merge(model: LanguageModel, lora: Lora) -> LanguageModel:
  """The model with W + scale A B in the place of every adapted W, added in float32 or better, in the dtype of W;
  `Adapted` maps where there is no W."""

  def one(path, linear):
    name = _name(path)
    if name not in lora.a:
      return linear
    a, b = (wide(part[name]) for part in (lora.a, lora.b))
    if not isinstance(linear, Linear):
      skipped = linear.shape[0] - a.shape[0] if a.ndim > 2 else 0
      late = lambda part: jnp.pad(part, [(skipped, 0)] + [(0, 0)] * (part.ndim - 1))
      return Adapted(linear, late(lora.scale * a), late(b))
    leaves, structure = jax.tree.flatten(linear)
    (weight,) = leaves
    change = lora.scale * (a @ b)
    skipped = weight.shape[0] - change.shape[0] if weight.ndim > 2 else 0
    change = jnp.pad(change, [(skipped, 0)] + [(0, 0)] * (change.ndim - 1))
    return jax.tree.unflatten(structure, [(weight + change).astype(weight.dtype)])

  return jax.tree_util.tree_map_with_path(one, model, is_leaf=_is_linear)


class Adapted(nnx.Module):
  """y = map(x) + (x A) B."""

  def __init__(self, inner: nnx.Module, a: Float[Array, "*stack inputs rank"], b: Float[Array, "*stack rank outputs"]):
    self.inner, self.a, self.b = inner, nnx.Param(a), nnx.Param(b)

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    return self.inner(x) + (x @ self.a[...].astype(x.dtype)) @ self.b[...].astype(x.dtype)


def _linear_maps(model) -> list[tuple[str, nnx.Module]]:
  leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_linear)
  return [(_name(path), leaf) for path, leaf in leaves if _is_linear(leaf)]


def _is_linear(node) -> bool:
  return isinstance(node, (Linear, *FORMS.values()))


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator=".")
