"""One decoder-only transformer: nanochat, Llama, Qwen3, Qwen3-MoE, with or without hyper-connections.

The blocks are ONE module whose parameters carry a leading layer axis. `sequential` scans over it; `layer_parallel`
evaluates many layers at once, each on its own input. Both take a slice of the layers, so a method can split the depth
where it likes.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require, require_choice
from jaxlab.models.attention import AttentionFn, Cache, dot_product_attention, write_cache
from jaxlab.models.block import (
  Block,
  Side,
  attend_layers,
  evaluate_blocks,
  heads_divide,
  layer_slice,
  layer_values,
  static_mixing,
  unstack_layers,
)
from jaxlab.models.config import TransformerConfig
from jaxlab.models.layers import Linear, RMSNorm, lookup, rms_norm, rope_table, wide

_SMEAR_CHANNELS = 24


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
    x = meshes.to_rows(lookup(self.embedding[...], tokens))
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
      values = jax.vmap(lookup, (0, None))(self.value_embeddings[...], tokens).astype(x.dtype)
      rows = "batch" if heads_divide(c) else "rows"
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


def _keep_products(primitive, *args, **params) -> bool:
  """Checkpoint policy: keep the results of weight products and of cuDNN's flash attention."""
  flash = primitive.name.startswith("dot_product_attention_fwd")
  return flash or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
