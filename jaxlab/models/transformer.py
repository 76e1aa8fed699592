"""One decoder-only transformer: nanochat, Llama, Qwen3, Qwen3-MoE, with or without hyper-connections.

The blocks are ONE module whose parameters carry a leading layer axis. `sequential` scans over it; `layer_parallel`
evaluates many layers at once, each on its own input. Both take a slice of the layers, so a method can split the depth
where it likes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require, require_choice
from jaxlab.models.attention import (
  AttentionFn,
  Cache,
  dot_product_attention,
  take_layers,
  window_kinds,
  write_cache,
)
from jaxlab.models.config import TransformerConfig
from jaxlab.models.layers import (
  MLP,
  Linear,
  Mixing,
  MoE,
  RMSNorm,
  Steps,
  StreamMaps,
  TransposedLinear,
  rms_norm,
  rope_table,
  turn,
  wide,
)

_SMEAR_CHANNELS = 24
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

  x0: Array
  cos: Array
  sin: Array
  start: Array | int
  values: Array | None
  mixing: StreamMaps | None


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
    a = meshes.to_batch(a) if _heads_divide(c) else a
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
    x = _write(x, mixing, meshes.to_rows(branch) if _heads_divide(self.config) else branch)
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


def _heads_divide(config: TransformerConfig) -> bool:
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


class Transformer(nnx.Module):
  """`model(tokens: int32[batch, seq]) -> float32[batch, seq, vocab]`."""

  def __init__(self, config: TransformerConfig, key: jax.Array):
    """Random weights: nanochat's initialisation where the config has its parts, 1/sqrt(fan in) elsewhere."""
    c = config
    keys = jax.random.split(key, 5)
    layers = jnp.arange(c.depth)
    self.config = c
    self.embedding = nnx.Param(
      jax.random.normal(keys[0], (c.vocab_size, c.width)) * (0.8 if c.embed_norm else 0.02), axes=("vocab", "embed")
    )
    self.blocks = jax.vmap(lambda layer, k: Block(c, layer, k))(layers, jax.random.split(keys[1], c.depth))
    self.mixing = nnx.data(None)  # static mixing matrices, where they were worked out before
    self.norm = RMSNorm(c.width, c.norm_eps, c.norm_gain)
    if not c.tied_embeddings:
      self.head = Linear(jax.random.normal(keys[2], (c.width, c.vocab_size)) * 0.001, ("embed", "vocab"))
    if c.value_embeddings:
      bound = math.sqrt(3 / c.width)
      shape = (len(c.value_layers), c.vocab_size, c.kv_heads * c.head_dim)
      table = jax.random.uniform(keys[3], shape, minval=-bound, maxval=bound)
      self.value_embeddings = nnx.Param(table, axes=(None, "vocab", "embed"))
    if c.smear:
      require(c.width >= _SMEAR_CHANNELS, f"smear reads {_SMEAR_CHANNELS} channels; model.width is {c.width}")
      self.smear_gate = nnx.Param(jax.random.uniform(keys[4], (_SMEAR_CHANNELS, 1), maxval=0.02), axes=(None, None))
      self.smear_lambda = nnx.Param(jnp.zeros(()), axes=())
    if c.backout:
      self.backout_lambda = nnx.Param(jnp.full((), 0.2, jnp.float32), axes=())

  @property
  def depth(self) -> int:
    return self.config.depth

  @property
  def dtype(self):
    return self.embedding.dtype

  def __call__(
    self,
    tokens: Int[Array, "batch seq"],
    *,
    attention: AttentionFn = dot_product_attention,
    remat: str = "none",
    unroll: bool = False,
  ) -> Float[Array, "batch seq vocab"]:
    return self.logits(*self.hidden(tokens, attention=attention, remat=remat, unroll=unroll))

  def hidden(self, tokens, *, attention=dot_product_attention, remat="none", unroll=False):
    """(final state, backout state or None): what `logits` reads."""
    x, side, _ = self.embed(tokens)
    x, backout, _, _ = sequential(self, x, side, attention=attention, remat=remat, unroll=unroll)
    return x, backout

  def trace(self, tokens, *, attention=dot_product_attention, remat="none"):
    """(start state h_0, outputs h_1..h_L stacked (L, ...), side): the sequential forward with every layer's output."""
    x, side, _ = self.embed(tokens)
    _, _, trace, _ = sequential(self, x, side, attention=attention, remat=remat, keep_trace=True)
    return x, trace, side

  def embed(self, tokens: Int[Array, "batch time"], cache=None):
    """(state of layer 0, side, pre-smear embedding of the last token).

    Positions continue the cache's: a `Cache`, or anything with its `length` and `previous`.
    """
    c = self.config
    batch, time = tokens.shape
    start = 0 if cache is None else cache.length
    x = meshes.to_rows(jnp.take(self.embedding[...], tokens, axis=0))
    if c.embed_norm:
      x = rms_norm(x, c.norm_eps)
    last = x[:, -1:]
    if c.smear:
      before = jnp.zeros_like(last) if cache is None else cache.previous.astype(x.dtype)
      shifted = jnp.concatenate([before, x[:, :-1]], axis=1)
      gate = jax.nn.sigmoid(x[..., :_SMEAR_CHANNELS] @ self.smear_gate[...].astype(x.dtype))
      x = (x + self.smear_lambda[...] * gate * shifted).astype(x.dtype)
    values = None
    if c.value_embeddings:
      values = jnp.take(self.value_embeddings[...], tokens, axis=1).astype(x.dtype)
      rows = "batch" if _heads_divide(c) else "rows"
      values = meshes.constrain(values, None, rows, "sequence", gradient=(None, "batch", "sequence"))
      values = values.reshape(-1, batch, time, c.kv_heads, c.head_dim)
    mixing = self.mixing
    if mixing is None and c.hyper and not c.hyper.dynamic:
      mixing = static_mixing(self.blocks)
    cos, sin = rope_table(c, jnp.asarray(start)[..., None] + jnp.arange(time), x.dtype)
    side = Side(x, cos, sin, start, values, mixing)
    state = jnp.repeat(x[..., None, :], c.hyper.streams, axis=-2) if c.hyper else x
    return state, side, last

  def logits(self, x, backout=None) -> Float[Array, "batch time vocab"]:
    """Head: streams are summed, the backout state subtracted, then norm, projection and softcap, in float32."""
    c = self.config
    x, backout = (y.sum(axis=-2) if c.hyper and y is not None else y for y in (x, backout))
    if c.backout:
      x = (x - self.backout_lambda[...] * backout).astype(x.dtype)
    x = meshes.to_batch(self.norm(x))
    logits = x @ self.embedding[...].T.astype(x.dtype) if c.tied_embeddings else self.head(x)
    logits = wide(logits)
    return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

  def empty_cache(self, batch: int, capacity: int, dtype=None) -> Cache:
    """A cache with room for `capacity` tokens."""
    c = self.config
    dtype = dtype or self.dtype
    shape = (c.depth, batch, capacity, c.kv_heads, c.head_dim)
    previous = jnp.zeros((batch, 1, c.width), dtype) if c.smear else None
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.int32(0), previous)

  def extend(
    self,
    tokens: Int[Array, "batch time"],
    cache: Cache,
    *,
    attention: AttentionFn = dot_product_attention,
    unroll=False,
  ) -> tuple[Float[Array, "batch time vocab"], Cache]:
    """Logits of the next `time` tokens and the cache with them; the caller sees to it that they fit its capacity."""
    x, side, last = self.embed(tokens, cache)
    x, backout, _, (keys, values) = sequential(
      self, x, side, attention=attention, cache=(cache.keys, cache.values), unroll=unroll
    )
    previous = last if self.config.smear else None
    return self.logits(x, backout), Cache(keys, values, cache.length + tokens.shape[1], previous)


def static_mixing(blocks: Block) -> StreamMaps:
  """The maps of every layer and sublayer, leading axes (L, 2)."""
  of = lambda name: jax.vmap(lambda block: getattr(block, name).matrices())(blocks)
  return jax.tree.map(lambda *pair: jnp.stack(pair, axis=1), of("attention_mixing"), of("mlp_mixing"))


def layer_slice(blocks: Block, start: int, stop: int | None = None) -> Block:
  """Layers start..stop of stacked blocks."""
  return jax.tree.map(lambda a: a[start:stop], blocks)


def _period(kinds: list) -> int:
  """The shortest p that divides the length and after which the list repeats itself; 1 of an empty one."""
  repeats = (p for p in range(1, len(kinds)) if len(kinds) % p == 0 and kinds == kinds[:p] * (len(kinds) // p))
  return next(repeats, max(len(kinds), 1))


def sequential(
  model: Transformer,
  x,
  side: Side,
  *,
  start: int = 0,
  stop: int | None = None,
  attention: AttentionFn = dot_product_attention,
  cache: tuple[Array, Array] | None = None,
  keep_trace: bool = False,
  remat: str = "none",
  unroll: bool = False,
  rewrite: Callable[[Array | int, Array], Array] | None = None,
):
  """Runs layers start..stop one after the other.

  `lax.scan` over groups of layers: a group is the shortest period of the window and value-embedding pattern, so that
  windows stay static. `unroll` writes every layer out instead (longer to compile, no slicing of stacked weights).

  Args:
    cache: (keys, values) of all layers of the model, (L, batch, capacity, kv_heads, head_dim); the new positions are
      written at `side.start` and attention reads the cache.
    keep_trace: also return every layer's output.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix products and flash attention: norms,
      rotations and activations cost less to redo than to keep) or "full" (whole blocks).
    rewrite: (layer, its output) -> what is passed on in its place.

  Returns:
    (output, backout state or None, trace (layers, ...) or None, cache or None).
  """
  c = model.config
  stop = c.depth if stop is None else stop
  layers = stop - start
  kinds = [(c.windows[i], i in c.value_layers) for i in range(start, stop)]
  period = layers if unroll else _period(kinds)

  def block(carry, parts, window, has_value, layer):
    x, backout, cache = carry
    weights, value, mixing = parts
    weights = meshes.gathered(weights)
    inner, mix, q, k, v = weights.project(x, side, value if has_value else None, mixing)
    if cache is not None:
      place = (layer, 0, side.start)
      cache = tuple(write_cache(store, new[None], place) for store, new in zip(cache, (k, v), strict=True))
      k, v = (jax.lax.dynamic_index_in_dim(store, layer, keepdims=False) for store in cache)
    x, _ = weights.finish(inner, mix, attention(q, k, v, window=window, start=side.start), mixing)
    x = x if rewrite is None else rewrite(layer, x)
    if backout is not None:
      here = layer == c.depth // 2
      backout = jax.lax.select(here, x, backout) if not isinstance(here, bool) else (x if here else backout)
    return x, backout, cache

  require_choice("remat", remat, ("none", "dots", "full"))
  if remat != "none":
    policy = _keep_products if remat == "dots" else None
    # Inside a scan nothing can be merged with the forward pass, so the barriers against that would only cost time.
    block = jax.checkpoint(block, static_argnums=(2, 3), policy=policy, prevent_cse=period == layers)

  def group(carry, parts):
    weights, values, mixing, first = parts
    outputs, taken = [], 0
    for i, (layer, mix) in enumerate(zip(unstack_layers(weights, period), unstack_layers(mixing, period), strict=True)):
      value = values[taken] if kinds[i][1] else None
      taken += kinds[i][1]
      carry = block(carry, (layer, value, mix), *kinds[i], first + i)
      outputs.append(carry[0])
    return carry, jnp.stack(outputs) if keep_trace else None

  grouped = lambda tree: jax.tree.map(
    lambda a: a.reshape(layers // period, a.shape[0] * period // layers, *a.shape[1:]), tree
  )
  weights = layer_slice(model.blocks, start, stop)
  mixing = jax.tree.map(lambda m: m[start:stop], side.mixing)
  before = sum(i < start for i in c.value_layers)
  values = None if side.values is None else side.values[before : before + sum(kind[1] for kind in kinds)]
  carry = (x, jnp.zeros_like(x) if c.backout else None, cache)
  if layers == 0:
    return (*carry[:2], jnp.zeros((0, *x.shape), x.dtype) if keep_trace else None, cache)
  if period == layers:
    carry, trace = group(carry, (weights, values, mixing, start))
  else:
    firsts = start + period * jnp.arange(layers // period)
    carry, trace = jax.lax.scan(group, carry, (*map(grouped, (weights, values, mixing)), firsts))
    trace = trace.reshape(layers, *x.shape) if keep_trace else None
  x, backout, cache = carry
  return x, backout, trace, cache


def layer_parallel(
  model: Transformer, states, side: Side, *, start: int = 0, attention: AttentionFn = dot_product_attention
):
  """Outputs of layers start .. start + n - 1, layer start + j evaluated on `states[j]`."""
  c = model.config
  stop = start + states.shape[0]
  attend = functools.partial(attend_layers, windows=c.windows[start:stop], attention=attention, start=side.start)
  blocks, values = layer_slice(model.blocks, start, stop), layer_values(c, side, start, stop)
  mixing = jax.tree.map(lambda m: m[start:stop], side.mixing)
  return evaluate_blocks(blocks, states, side, values=values, mixing=mixing, attend=attend)[0]


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
  """Attention of n layers at once: once per kind of window, with the layers folded into the batch."""
  layers, batch = q.shape[:2]
  attended = [None] * layers
  for window, index in window_kinds(windows).items():
    fold = lambda a: take_layers(a, index).reshape(-1, *a.shape[2:])  # noqa: B023 (used at once)
    out = attention(fold(q), fold(k), fold(v), window=window, start=start)
    for j, y in zip(index, out.reshape(len(index), batch, *out.shape[1:]), strict=True):
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
  weights lie transposed.

  Args:
    steps: what stands between the products and attention.
  """
  blocks = jax.tree.map(lambda a: a, blocks)
  c, mlp = blocks.config, blocks.mlp
  beside = lambda *maps: Linear(jnp.concatenate([m.weight[...] for m in maps], axis=-1), maps[0].weight.axes)
  blocks.qkv = beside(blocks.q, blocks.k, blocks.v)
  blocks.q = blocks.k = blocks.v = None
  blocks.steps = steps
  if blocks.q_norm is not None and blocks.q_norm.gain is not None:
    gains = []
    for norm, heads in ((blocks.q_norm, c.q_heads), (blocks.k_norm, c.kv_heads)):
      gain = norm.gain[...]  # one a layer, or already one a head
      gains.append(gain if gain.ndim == 3 else jnp.repeat(gain[:, None], heads, axis=1))
    blocks.q_norm.gain = nnx.Param(jnp.concatenate(gains, axis=1), axes=(None, None))
  if isinstance(mlp, MLP) and mlp.gate is not None:
    mlp.gate_up = beside(mlp.gate, mlp.up)
    mlp.gate = mlp.up = None
  for owner, names in ((blocks, ("qkv", "o")), (mlp, ("gate_up", "up", "down"))):
    for name in names:
      if isinstance(linear := getattr(owner, name, None), Linear):
        setattr(owner, name, TransposedLinear(linear))
  return blocks


def _keep_products(primitive, *args, **params) -> bool:
  """Checkpoint policy: keep the results of weight products and of cuDNN's flash attention."""
  flash = primitive.name.startswith("dot_product_attention_fwd")
  return flash or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)


def unstack_layers(tree, layers: int) -> list:
  """Per-layer trees of a stacked one. The gradient of one split is one concatenation, that of slices a sum of pads."""
  leaves, rest = jax.tree.flatten(tree)
  split = [jax.lax.split(a, (1,) * layers) for a in leaves]
  return [jax.tree.unflatten(rest, [jnp.squeeze(a[i], 0) for a in split]) for i in range(layers)]
