"""The suffix SNLP solves: n layers as they are, or fused into wide layers.

`plain` takes the last layers of a stacked network. `fuse` makes one wide layer of every M consecutive ones: the heads
of all M side by side, their outputs summed and added once, then one MLP M times as wide,

  y = x + sum_i Attention_i(norm(x)),   F(x) = y + sum_i MLP_i(norm(y)).

Every MLP sees the other layers' attention, so a fused chunk is not one IDN step on its layers. The residual lambdas
become their means over the chunk, the mixing matrices of hyper-connections too; value embeddings are dropped.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.core.checks import require, require_divides
from jaxlab.models import Transformer
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.block import (
  Block,
  Side,
  attend_layers,
  evaluate_blocks,
  join_heads,
  layer_slice,
  layer_values,
  split_heads,
)
from jaxlab.models.layers import MLP, RMSNorm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Suffix:
  """Layers start .. start + layers - 1 of a network as `units` unknowns of `chunk` layers each.

  `blocks` is stacked over units. A fused suffix is used with the model it was made from.
  """

  blocks: Block
  start: int = dataclasses.field(metadata=dict(static=True))
  layers: int = dataclasses.field(metadata=dict(static=True))
  chunk: int = dataclasses.field(metadata=dict(static=True))
  fused: bool = dataclasses.field(metadata=dict(static=True))

  @property
  def units(self) -> int:
    return self.layers // self.chunk

  @property
  def stop(self) -> int:
    return self.start + self.layers

  def unit_of(self, layer: int) -> int:
    """The unit that contains a layer of the network."""
    return (layer - self.start) // self.chunk


def plain(model: Transformer, layers: int, *, stop: int | None = None) -> Suffix:
  """The `layers` layers that end at `stop` (default: the last), one unit each.

  Raises:
    InputError: not a stacked transformer, or layers outside 1..stop.
  """
  require_transformer(model)
  stop = model.depth if stop is None else stop
  require(1 <= layers <= stop, f"layers (n_par) is {layers}; it must lie in 1..{stop}, the model's depth")
  return Suffix(layer_slice(model.blocks, stop - layers, stop), stop - layers, layers, chunk=1, fused=False)


def parts(model: Transformer, layers: int, *, groups: int = 1, tail: int = 0) -> tuple[Suffix, ...]:
  """The `layers` layers before the last `tail` ones in `groups` parts, then each layer of the tail as its own part.

  Parts are solved one after the other, the last state of one the exact input of the next. A part of one layer is exact
  after one step: the tail is the network itself.

  Raises:
    InputError: as `plain`; a negative tail; groups that do not divide the layers.
  """
  require_transformer(model)
  require(0 <= tail < model.depth, f"tail is {tail}; it must leave layers of the model's {model.depth}")
  require_divides("groups", groups, "layers (n_par)", layers)
  size, stop = layers // groups, model.depth - tail
  solved = plain(model, layers, stop=stop).start
  return (
    *(plain(model, size, stop=solved + (g + 1) * size) for g in range(groups)),
    *(plain(model, 1, stop=layer + 1) for layer in range(stop, model.depth)),
  )


def fuse(model: Transformer, layers: int, *, chunk: int, average: bool = False) -> Suffix:
  """The last `layers` layers as layers / chunk wide ones: `1xFM` with chunk = layers, `CxFM` with C of them.

  An offline transform: do it once, outside the compiled step.

  Args:
    chunk: M, layers a wide layer is made of.
    average: divide both sums by M.

  Raises:
    InputError: as `plain`; a chunk that does not divide; experts or dynamic hyper-connections.
  """
  suffix = plain(model, layers)
  c = model.config
  require(chunk >= 1, f"chunk is {chunk}; a wide layer is made of at least one layer")
  require_divides("chunk", chunk, "layers (n_par)", layers)
  require(c.experts is None, "experts cannot be fused: their routers choose per layer; use plain layers")
  require(not (c.hyper and c.hyper.dynamic), "dynamic hyper-connections cannot be fused: each layer mixes by itself")
  require(suffix.blocks.qkv is None, "fuse layers before for_inference, not after")
  block = jax.tree.map(lambda a: a, suffix.blocks)
  attention_gain = _taken(block.attention_norm)
  for linear in (block.q, block.k, block.v):
    linear.weight = _like(linear.weight, _side_by_side(linear.weight[...], chunk, attention_gain))
  mlp: MLP = block.mlp
  mlp_gain = _taken(block.mlp_norm)
  for linear in (mlp.up,) if mlp.gate is None else (mlp.gate, mlp.up):
    linear.weight = _like(linear.weight, _side_by_side(linear.weight[...], chunk, mlp_gain))
  for linear in (block.o, mlp.down):
    stacked = jnp.concatenate(_members(linear.weight[...], chunk), axis=-2)
    linear.weight = _like(linear.weight, stacked / chunk if average else stacked)
  for norm, heads in ((block.q_norm, c.q_heads), (block.k_norm, c.kv_heads)):
    if norm is not None and norm.gain is not None:
      norm.gain = _like(norm.gain, jnp.repeat(_groups(norm.gain[...], chunk), heads, axis=1))
  # What a layer has one of is the mean over its layers.
  for name in ("residual_lambda", "x0_lambda") * c.residual_lambdas + ("value_gate",) * c.value_embeddings:
    own = getattr(block, name)
    setattr(block, name, _like(own, _groups(own[...], chunk).mean(axis=1).astype(own.dtype)))
  if c.hyper:
    # Unused: the maps come averaged through `mixing`; one layer's logits keep the tree's shape.
    first = lambda a: _groups(a, chunk)[:, 0]
    block.attention_mixing = jax.tree.map(first, block.attention_mixing)
    block.mlp_mixing = jax.tree.map(first, block.mlp_mixing)
  sizes = dict(q_heads=chunk * c.q_heads, kv_heads=chunk * c.kv_heads, mlp_width=chunk * c.mlp_width)
  block.config = dataclasses.replace(c, **sizes, depth=layers // chunk)
  return dataclasses.replace(suffix, blocks=block, chunk=chunk, fused=True)


def _groups(a: Array, chunk: int) -> Array:
  """(units, chunk, ...) of stacked layers."""
  return a.reshape(-1, chunk, *a.shape[1:])


def _members(a: Array, chunk: int) -> list[Array]:
  """The first, second, ... layer of every unit, (units, ...) each."""
  return [_groups(a, chunk)[:, i] for i in range(chunk)]


def _side_by_side(weight: Array, chunk: int, gain: Array | None) -> Array:
  """(units, inputs, chunk * outputs): outputs side by side; the norm's gain before it goes into the weight."""
  weight = weight if gain is None else (weight * gain[:, :, None]).astype(weight.dtype)
  return jnp.concatenate(_members(weight, chunk), axis=-1)


def _taken(norm: RMSNorm) -> Array | None:
  """The gain of a norm, which a fused layer has in its weights: the norm itself loses it."""
  gain, norm.gain = norm.gain, None
  return None if gain is None else gain[...]


def _like(parameter: nnx.Param, value: Array) -> nnx.Param:
  """A parameter with the other's axes."""
  return nnx.Param(value, axes=parameter.axes)


def evaluate(
  model: Transformer,
  suffix: Suffix,
  states: Float[Array, "units batch time *state"],
  side: Side,
  *,
  attention: AttentionFn = dot_product_attention,
  attend=None,
):
  """F_j = f_j(states[j]) for all units at once, as `block.evaluate_blocks` returns it.

  Attention runs layer by layer under each layer's own window whether fused or not: keys and values come out as
  (layers, batch, time, kv_heads, head_dim). `attend` replaces it (cached decoding).
  """
  c, start, stop, chunk = model.config, suffix.start, suffix.stop, suffix.chunk
  if attend is None:
    attend = lambda q, k, v: attend_layers(
      q, k, v, windows=c.windows[start:stop], attention=attention, start=side.start
    )
  mixing = jax.tree.map(lambda m: m[start:stop], side.mixing)
  if suffix.fused:
    mixing = jax.tree.map(lambda m: m.reshape(-1, chunk, *m.shape[1:]).mean(axis=1), mixing)
  values = None if suffix.fused else layer_values(c, side, start, stop)

  def by_layer(q, k, v):
    q, k, v = (split_heads(a, chunk) for a in (q, k, v))
    return join_heads(attend(q, k, v), chunk)

  outputs, (k, v), mixes = evaluate_blocks(suffix.blocks, states, side, values=values, mixing=mixing, attend=by_layer)
  return outputs, (split_heads(k, chunk), split_heads(v, chunk)), mixes


def require_transformer(model) -> None:
  require(
    isinstance(model, Transformer), f"SNLP needs a Transformer with stacked blocks, not {type(model).__name__}; see hub"
  )
