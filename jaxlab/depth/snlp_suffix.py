"""The suffix SNLP solves: n layers as they are, or fused into wide layers (snlp.md M7 to M9).

`plain` takes the last layers of a stacked network. `fuse` makes one wide layer of every M consecutive ones: the heads
of all M side by side, their outputs summed and added once, then one MLP M times as wide,

  y = x + sum_i Attention_i(norm(x)),   F(x) = y + sum_i MLP_i(norm(y)).

Every MLP sees the other layers' attention, so a fused chunk is not one IDN step on its layers. The residual lambdas
become their means over the chunk, the mixing matrices of hyper-connections too; value embeddings are dropped.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.core.checks import require, require_divides
from jaxlab.models import Transformer
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.layers import MLP
from jaxlab.models.transformer import Block, Side, attend_layers, evaluate_blocks, layer_slice, layer_values


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
  _require_transformer(model)
  stop = model.depth if stop is None else stop
  require(1 <= layers <= stop, f"layers (n_par) is {layers}; it must lie in 1..{stop}, the model's depth")
  return Suffix(layer_slice(model.blocks, stop - layers, stop), stop - layers, layers, chunk=1, fused=False)


def fuse(model: Transformer, layers: int, *, chunk: int, average: bool = False) -> Suffix:
  """The last `layers` layers as layers / chunk wide ones: `1xFM` with chunk = layers, `CxFM` with C of them (M8, M9).

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
  units, scale = layers // chunk, 1 / chunk if average else 1.0
  groups = lambda a: a.reshape(units, chunk, *a.shape[1:])
  mean = lambda param: param.set_value(groups(param[...]).mean(axis=1).astype(param.dtype))

  def beside(linear, gain=None):
    """(units, inputs, chunk * outputs): outputs side by side; the norm's gain before it goes into the weight."""
    w = linear.weight[...]
    w = w if gain is None else (w * gain[...][:, :, None]).astype(w.dtype)
    linear.weight.set_value(jnp.concatenate(_list(groups(w)), axis=-1))

  def below(linear):
    """(units, chunk * inputs, outputs): the product with inputs side by side is the sum of the products."""
    linear.weight.set_value(jnp.concatenate(_list(groups(linear.weight[...])), axis=-2) * scale)

  block = jax.tree.map(lambda a: a, suffix.blocks)
  mlp: MLP = block.mlp
  for linear in (block.q, block.k, block.v):
    beside(linear, block.attention_norm.gain)
  for linear in (mlp.up,) if mlp.gate is None else (mlp.gate, mlp.up):
    beside(linear, block.mlp_norm.gain)
  below(block.o), below(mlp.down)
  for norm in (block.attention_norm, block.mlp_norm):
    if norm.gain is not None:
      norm.gain.set_value(jnp.ones((units, c.width), norm.gain.dtype))
  for norm, heads in ((block.q_norm, c.q_heads), (block.k_norm, c.kv_heads)):
    if norm is not None and norm.gain is not None:
      gain = jnp.repeat(groups(norm.gain[...]), heads, axis=1)
      norm.gain.set_value(gain)
  if c.residual_lambdas:
    mean(block.residual_lambda), mean(block.x0_lambda)
  if c.value_embeddings:
    mean(block.value_gate)
  if c.hyper:
    # Unused: the matrices come averaged through `mixing`; one layer's logits keep the tree's shape.
    block.attention_mixing, block.mlp_mixing = (
      jax.tree.map(lambda a: groups(a)[:, 0], m) for m in (block.attention_mixing, block.mlp_mixing)
    )
  sizes = dict(q_heads=chunk * c.q_heads, kv_heads=chunk * c.kv_heads, mlp_width=chunk * c.mlp_width, depth=units)
  block.config = dataclasses.replace(c, **sizes)
  return dataclasses.replace(suffix, blocks=block, chunk=chunk, fused=True)


def evaluate(
  model: Transformer,
  suffix: Suffix,
  states: Float[Array, "units batch time *state"],
  side: Side,
  *,
  attention: AttentionFn = dot_product_attention,
  attend=None,
):
  """F_j = f_j(states[j]) for all units at once, as `transformer.evaluate_blocks` returns it.

  Attention runs layer by layer under each layer's own window whether fused or not: keys and values come out as
  (layers, batch, time, kv_heads, head_dim). `attend` replaces it (cached decoding).
  """
  c, start, stop, chunk = model.config, suffix.start, suffix.stop, suffix.chunk
  if attend is None:
    attend = lambda q, k, v: attend_layers(
      q, k, v, windows=c.windows[start:stop], attention=attention, start=side.start
    )
  mixing = side.mixing
  if mixing is not None:
    mixing = tuple(m[start:stop] for m in mixing)
    if suffix.fused:
      mixing = tuple(m.reshape(-1, chunk, *m.shape[1:]).mean(axis=1) for m in mixing)
  values = None if suffix.fused else layer_values(c, side, start, stop)

  def by_layer(q, k, v):
    q, k, v = (split_heads(a, chunk) for a in (q, k, v))
    return _join_heads(attend(q, k, v), chunk)

  outputs, (k, v), mixes = evaluate_blocks(suffix.blocks, states, side, values=values, mixing=mixing, attend=by_layer)
  return outputs, (split_heads(k, chunk), split_heads(v, chunk)), mixes


def split_heads(a: Float[Array, "units batch time chunk_heads head_dim"], chunk: int):
  """(layers, batch, time, heads, head_dim): the heads of every layer apart."""
  if chunk == 1:
    return a
  units, batch, time, heads, size = a.shape
  a = a.reshape(units, batch, time, chunk, heads // chunk, size)
  return jnp.moveaxis(a, 3, 1).reshape(units * chunk, batch, time, heads // chunk, size)


def _join_heads(a, chunk: int):
  if chunk == 1:
    return a
  layers, batch, time, heads, size = a.shape
  a = a.reshape(layers // chunk, chunk, batch, time, heads, size)
  return jnp.moveaxis(a, 1, 3).reshape(layers // chunk, batch, time, chunk * heads, size)


def _list(grouped) -> list:
  """Members of every unit: (units, chunk, ...) as chunk arrays (units, ...)."""
  return [grouped[:, i] for i in range(grouped.shape[1])]


def _require_transformer(model) -> None:
  require(
    isinstance(model, Transformer), f"SNLP needs a Transformer with stacked blocks, not {type(model).__name__}; see hub"
  )
