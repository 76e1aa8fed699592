"""A block of the transformer, one or many stacked: attention and MLP, split where attention happens.

Parameters of stacked blocks carry a leading layer axis. `evaluate_blocks` runs them all at once, each on its own input;
`transformer.sequential` runs them in a row.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core import mesh as meshes
from jaxlab.models.attention import AttentionFn, take_layers, window_kinds
from jaxlab.models.config import TransformerConfig
from jaxlab.models.layers import MLP, Linear, Mixing, MoE, RMSNorm, Steps, StreamMaps, TransposedLinear, turn, wide
from jaxlab.models.maps import all_plain

_GATE_CHANNELS = 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Side:
  """What the blocks read besides their state, the same for every layer or stacked over layers.

  x0: (batch, time, width) embeddings; cos, sin: (time, head_dim / 2); start: position of the first token, or one a row
  (then cos and sin have a leading batch axis);
  values: (value layers, batch, time, kv_heads, head_dim) gathered value embeddings or None;
  mixing: static hyper-connections of every layer and sublayer, leading axes (L, 2), or None.
  """

  # Any: trees of axes and of shardings have this form too.
  x0: Array | Any
  cos: Array | Any
  sin: Array | Any
  start: Array | int | Any
  values: Array | Any | None
  mixing: StreamMaps | Any | None


class Block(nnx.Module):
  """Attention and MLP around a residual state: (batch, time, width), or (batch, time, s, width) with hyper-connections.

  Split where attention happens, so that one layer and many layers at once share the code: `project` then attention
  then `finish`.
  """

  def __init__(self, config: TransformerConfig, layer: Int[Array, ""], key: jax.Array):
    d, h, g, n = config.width, config.q_heads, config.kv_heads, config.head_dim
    keys = jax.random.split(key, 6)
    bound = math.sqrt(3 / d)
    uniform = lambda k, shape: jax.random.uniform(k, shape, minval=-bound, maxval=bound)
    self.config = config
    self.attention_norm = RMSNorm(d, config.norm_eps, config.norm_gain)
    queries, keys_values = ("heads", h // g * n), ("heads", n)  # queries stay with the keys they read
    self.q = Linear(uniform(keys[0], (d, h * n)), ("embed", queries))
    self.k = Linear(uniform(keys[1], (d, g * n)), ("embed", keys_values))
    self.v = Linear(uniform(keys[2], (d, g * n)), ("embed", keys_values))
    self.qkv = nnx.data(None)  # `for_inference` puts q, k and v side by side here
    self.steps = Steps()
    zero_out = config.mlp == "relu2"
    out = (
      jnp.zeros((h * n, d))
      if zero_out
      else jax.random.normal(keys[3], (h * n, d)) / math.sqrt(h * n * 2 * config.depth)
    )
    self.o = Linear(out, (queries, "embed"))
    self.q_norm = RMSNorm(n, config.norm_eps, config.norm_gain) if config.qk_norm else None
    self.k_norm = RMSNorm(n, config.norm_eps, config.norm_gain) if config.qk_norm else None
    self.mlp_norm = RMSNorm(d, config.norm_eps, config.norm_gain)
    self.mlp = MoE(config, keys[4]) if config.experts else MLP(config, keys[4])
    if config.value_embeddings:
      gate = jax.random.uniform(keys[5], (_GATE_CHANNELS, g), maxval=0.02)
      self.value_gate = nnx.Param(gate, axes=(None, None))
    if config.residual_lambdas:
      depth = layer / max(config.depth - 1, 1)
      self.residual_lambda = nnx.Param(1.15 - 0.10 * depth, axes=())
      self.x0_lambda = nnx.Param(0.20 - 0.15 * depth, axes=())
    if config.hyper:
      self.attention_mixing = Mixing(config, 2 * layer)
      self.mlp_mixing = Mixing(config, 2 * layer + 1)

  def project(self, x, side: Side, value, mixing):
    """(input to the residual sum, mixing, q, k, v) of this layer; `value` is its gathered value embedding or None."""
    c = self.config
    if c.residual_lambdas and not c.hyper:
      gain = None if self.attention_norm.gain is None else self.attention_norm.gain[...]
      scales = self.residual_lambda[...], self.x0_lambda[...]
      (x, a), mixing = self.steps.residual_norm(x, side.x0, *scales, gain, eps=c.norm_eps), None
    else:
      if c.residual_lambdas:
        x = (self.residual_lambda[...] * x + self.x0_lambda[...] * side.x0).astype(x.dtype)
      mixing = self._mixing(self.attention_mixing, x, 0, mixing) if c.hyper else None
      a = self.attention_norm(_read(x, mixing))
    a = meshes.to_batch(a) if heads_divide(c) else a
    split = lambda y: y.reshape(*y.shape[:-1], -1, c.head_dim)
    gate = None
    if value is not None:
      read, weight = a[..., :_GATE_CHANNELS], self.value_gate[...].astype(a.dtype)
      # So small a product is a kernel of its own as a matrix product; as a sum it joins the kernel that uses it.
      score = read @ weight if self.qkv is None else (read[..., None] * weight).sum(axis=-2)
      gate = 3 * jax.nn.sigmoid(score)
    if self.qkv is not None:
      gain = None if self.q_norm is None or self.q_norm.gain is None else self.q_norm.gain[...]
      sizes = dict(q_heads=c.q_heads, kv_heads=c.kv_heads, norm=c.qk_norm, gain=gain, eps=c.norm_eps, scale=c.qk_scale)
      return x, mixing, *self.steps.rotary_qkv(split(self.qkv(a)), side.cos, side.sin, value, gate, **sizes)
    v = split(self.v(a))
    if value is not None:
      v = v + gate[..., None] * value.astype(v.dtype)
    how = dict(norm=c.qk_norm, scale=c.qk_scale)
    q = turn(split(self.q(a)), side.cos, side.sin, self.q_norm, **how)
    k = turn(split(self.k(a)), side.cos, side.sin, self.k_norm, **how)
    return x, mixing, q, k, v

  def finish(self, x, mixing, attended, all_mixing):
    """(the block's output, the MLP's mixing) from its input and (batch, time, q_heads, head_dim) attention."""
    read = x
    attended = attended.reshape(*attended.shape[:-2], -1)
    branch = self.o(attended)
    x = _write(x, mixing, meshes.to_rows(branch) if heads_divide(self.config) else branch)
    if self.config.parallel_sublayers:
      return x + self._mlp(self.mlp_norm(read)), None
    mixing = self._mixing(self.mlp_mixing, x, 1, all_mixing) if self.config.hyper else None
    return _write(x, mixing, self._mlp(self.mlp_norm(_read(x, mixing)))), mixing

  def _mlp(self, a):
    return meshes.to_rows(self.mlp(meshes.to_batch(a)))

  def _mixing(self, mixing: Mixing, x, sublayer: int, static):
    if self.config.hyper.dynamic:
      return mixing.dynamic_matrices(x)
    return jax.tree.map(lambda m: m[sublayer], static)


def heads_divide(config: TransformerConfig) -> bool:
  """Heads that divide over `tensor` read the rows of the whole group, others those of their device alone."""
  return meshes.split_over("heads", config.kv_heads) > 1


def _read(x, mixing):
  """What a branch reads: the state, or the streams weighted by Hpre."""
  if mixing is None:
    return x
  return _weighted(mixing.read, x).astype(x.dtype)


def _write(x, mixing, branch):
  """x + branch, or Hres X + Hpost branch on the streams."""
  if mixing is None:
    return x + branch
  mixed = _weighted(mixing.residual, x[..., None, :, :])
  return (mixed + mixing.write[..., None] * wide(branch)[..., None, :]).astype(x.dtype)


def _weighted(weights, x):
  """sum_s weights[..., s] x[..., s, :] in float32.

  As a product with so small a matrix it would be a kernel of its own, and its output one that recomputation keeps.
  """
  return (weights[..., None] * wide(x)).sum(axis=-2)


def static_mixing(blocks: Block) -> StreamMaps:
  """The maps of every layer and sublayer, leading axes (L, 2)."""
  of = lambda name: jax.vmap(lambda block: getattr(block, name).matrices())(blocks)
  return jax.tree.map(lambda *pair: jnp.stack(pair, axis=1), of("attention_mixing"), of("mlp_mixing"))


def layer_slice(blocks: Block, start: int, stop: int | None = None) -> Block:
  """Layers start..stop of stacked blocks."""
  return jax.tree.map(lambda a: a[start:stop], blocks)


def evaluate_blocks(blocks: Block, states, side: Side, *, values, mixing, attend):
  """Stacked blocks, each on its own state: projections and MLPs are products batched over the layers.

  Args:
    values: gathered value embeddings (n, ...) or None; mixing: static matrices of these blocks or None.
    attend: (q, k, v), each (n, batch, time, heads, head_dim) -> attention of every layer.

  Returns:
    (outputs like `states`, (k, v), (attention mixing, MLP mixing) or (None, None)).
  """
  project = lambda w, x, value, mix: w.project(x, side, value, mix)
  inner, mix, q, k, v = jax.vmap(project)(blocks, states, values, mixing)
  attended = attend(q, k, v)
  outputs, mlp_mix = jax.vmap(lambda w, x, m, y, s: w.finish(x, m, y, s))(blocks, inner, mix, attended, mixing)
  return outputs, (k, v), (mix, mlp_mix)


def attend_layers(q, k, v, *, windows, attention: AttentionFn, start):
  """Attention of n layers at once: once per kind of window, with the layers folded into the batch.

  Where devices split the batch the rows come first: rows inside of layers would be gathered, and every device attend
  for all of them.
  """
  layers, batch = q.shape[:2]
  split = meshes.split_over("batch", batch) > 1
  turn = lambda a: a.swapaxes(0, 1) if split else a
  attended = [None] * layers
  for window, index in window_kinds(windows).items():
    fold = lambda a: turn(take_layers(a, index)).reshape(-1, *a.shape[2:])  # noqa: B023 (used at once)
    out = attention(fold(q), fold(k), fold(v), window=window, start=start)
    shape = (batch, len(index)) if split else (len(index), batch)
    for j, y in zip(index, turn(out.reshape(*shape, *out.shape[1:])), strict=True):
      attended[j] = y
  return jnp.stack(attended)


def split_heads(a: Float[Array, "units batch time chunk_heads head_dim"], chunk: int):
  """(layers, batch, time, heads, head_dim) of units that are layers side by side: the heads of every layer apart."""
  if chunk == 1:
    return a
  units, batch, time, heads, size = a.shape
  a = a.reshape(units, batch, time, chunk, heads // chunk, size)
  return jnp.moveaxis(a, 3, 1).reshape(units * chunk, batch, time, heads // chunk, size)


def join_heads(a, chunk: int):
  """The inverse of `split_heads`."""
  if chunk == 1:
    return a
  layers, batch, time, heads, size = a.shape
  a = a.reshape(layers // chunk, chunk, batch, time, heads, size)
  return jnp.moveaxis(a, 1, 3).reshape(layers // chunk, batch, time, chunk * heads, size)


def layer_values(config: TransformerConfig, side: Side, start: int, stop: int):
  """Value embeddings of layers start..stop (n, batch, time, kv_heads, head_dim), zeros where a layer has none; None
  for models without."""
  if side.values is None:
    return None
  row = {layer: i for i, layer in enumerate(config.value_layers)}
  empty = jnp.zeros_like(side.values[0])
  return jnp.stack([side.values[row[i]] if i in row else empty for i in range(start, stop)])


def for_inference(blocks: Block, steps: Steps = Steps()) -> Block:
  """Stacked blocks as the same functions in fewer and faster kernels.

  q, k, v (and SwiGLU's gate, up) become one product each, queries and keys are normalised and rotated together, and
  weights lie transposed. Maps of other forms (`maps`) stay as they are.

  Args:
    steps: what stands between the products and attention.
  """
  blocks = jax.tree.map(lambda a: a, blocks)
  c, mlp = blocks.config, blocks.mlp
  plain = lambda *maps: all(isinstance(one, Linear) for one in maps)
  beside = lambda *maps: Linear(jnp.concatenate([m.weight[...] for m in maps], axis=-1), maps[0].weight.axes)
  whole = steps.whole if all_plain(blocks) else None
  blocks.steps = steps._replace(whole=whole)
  if plain(blocks.q, blocks.k, blocks.v):
    blocks.qkv = beside(blocks.q, blocks.k, blocks.v)
    blocks.q = blocks.k = blocks.v = None
  if blocks.qkv is not None and blocks.q_norm is not None and blocks.q_norm.gain is not None:
    gains = []
    for norm, heads in ((blocks.q_norm, c.q_heads), (blocks.k_norm, c.kv_heads)):
      gain = norm.gain[...]  # one a layer, or already one a head
      gains.append(gain if gain.ndim == 3 else jnp.repeat(gain[:, None], heads, axis=1))
    blocks.q_norm.gain = nnx.Param(jnp.concatenate(gains, axis=1), axes=(None, None))
  if isinstance(mlp, MLP) and plain(mlp.gate, mlp.up):
    mlp.gate_up = beside(mlp.gate, mlp.up)
    mlp.gate = mlp.up = None
  for owner, names in ((blocks, ("qkv", "q", "k", "v", "o")), (mlp, ("gate_up", "gate", "up", "down"))):
    for name in names:
      if isinstance(linear := getattr(owner, name, None), Linear):
        setattr(owner, name, TransposedLinear(linear))
  return blocks


def unstack_layers(tree, layers: int) -> list:
  """Per-layer trees of a stacked one. The gradient of one split is one concatenation, that of slices a sum of pads."""
  leaves, rest = jax.tree.flatten(tree)
  split = [jax.lax.split(a, (1,) * layers) for a in leaves]
  return [jax.tree.unflatten(rest, [jnp.squeeze(a[i], 0) for a in split]) for i in range(layers)]
