"""The kernels by Pallas' Triton lowering: sums over stretches of the cache, then their combination with the new keys.

A program of the first takes one key head and one stretch of the cache for all queries that read them, and keeps the
running maximum m, denominator l and unnormalised sum o of online softmax. The second weighs the stretches' sums by
exp(m - max m), adds the new keys and values, and writes those into the cache.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxlab.core.checks import require
from jaxlab.models.attention import window_kinds

_KEYS = 64  # of a block, at most
_STRETCHES = 64  # of a head, at most: one program combines them
_QUERIES = 16  # that share a key head, at most: they are taken one after the other
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that the difference of two is no NaN


def supports(q, k) -> bool:
  """Triton's blocks have powers of two as sides; 64-bit numbers are not worth a kernel."""
  time, heads, size = q.shape[2:]
  return size & (size - 1) == 0 and time * (heads // k.shape[3]) <= _QUERIES and q.dtype.itemsize <= 4


def decode_attention(q, k, v, pairs, *, windows, start, layer, interpret=False):
  """As `jaxlab.kernels.decode_attention.decode_attention`; products, softmax and sums are float32."""
  layers, batch, time, heads, size = q.shape
  kv_heads = k.shape[3]
  require(
    supports(q, k),
    f"{time} queries of {heads} heads over {kv_heads} key heads of {size} {q.dtype}: the Triton kernel needs at most "
    f"{_QUERIES} queries a key head, a head_dim that is a power of two, and at most 32 bits",
  )
  start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,))
  fold = lambda a: a.reshape(-1, *a.shape[2:])
  q = q.reshape(layers * batch, time, kv_heads, -1, size)
  out, written = None, []
  for (window, index), pair in zip(window_kinds(windows).items(), pairs, strict=True):
    # Which of the new tokens' rows belong to the rows of this pair.
    rows = jnp.array([j * batch + i for j in index for i in range(batch)], jnp.int32)
    new = [fold(a).astype(pair[0].dtype) for a in (k, v)]
    stored = [fold(a) for a in pair]
    starts = jnp.tile(start, len(index))
    out, *stored = _one_kind(rows, starts, q, *new, *stored, out, layer * batch, window, interpret)
    written.append(tuple(a.reshape(store.shape) for a, store in zip(stored, pair, strict=True)))
  return out.reshape(layers, batch, time, heads, size), tuple(written)


def _one_kind(rows, start, q, k, v, keys, values, out, first: int, window: int | None, interpret: bool):
  """(attended, keys, values) for new tokens `rows`, each at its `start`, and cache rows first, first + 1, ...

  Attended rows of other kinds are those of `out`, and undefined while that is None.
  """
  count, time, kv_heads, group, size = q.shape
  capacity = keys.shape[1]
  queries = time * group
  block = min(_KEYS, 1 << (capacity.bit_length() - 1))
  blocks = max(1, -(-(capacity if window is None else min(capacity, window)) // block))
  stretches = pl.next_power_of_2(min(blocks, _STRETCHES))
  row = pl.BlockSpec((1,), lambda b, *_: (b,))
  store = pl.BlockSpec((None, capacity, None, size), lambda b, h, _: (first + b, 0, h, 0))
  attended = pl.BlockSpec((count, time, None, group, size), lambda b, h, _: (0, 0, h, 0, 0))
  new = pl.BlockSpec((count, time, None, size), lambda b, h, _: (0, 0, h, 0))
  partial = lambda *tail: jax.ShapeDtypeStruct((len(rows), kv_heads, queries, stretches, *tail), jnp.float32)
  written = lambda *tail: pl.BlockSpec(
    (None, None, queries, None, *tail), lambda b, h, s: (b, h, 0, s, *[0] * len(tail))
  )
  sums = pl.pallas_call(
    functools.partial(_stretch, window=window, block=block, blocks=-(-blocks // stretches)),
    grid=(len(rows), kv_heads, stretches),
    in_specs=[row, row, attended, store, store],
    out_specs=[written(size), written(), written()],
    out_shape=[partial(size), partial(), partial()],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name="decode_attention",
  )(rows, start, q, keys, values)
  read = lambda *tail: pl.BlockSpec(
    (None, None, None, stretches, *tail), lambda b, h, i: (b, h, i, *[0] * (1 + len(tail)))
  )
  like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
  before = [] if out is None else [out]
  return pl.pallas_call(
    functools.partial(_combine, window=window),
    grid=(len(rows), kv_heads, queries),
    in_specs=[row, row, attended, new, new, read(size), read(), read(), store, store, *[attended for _ in before]],
    out_specs=[attended, store, store],
    out_shape=[like(q), like(keys), like(values)],
    input_output_aliases={8: 1, 9: 2} | ({10: 0} if before else {}),
    compiler_params=triton.CompilerParams(num_warps=max(1, min(8, stretches * size // 1024)), num_stages=1),
    interpret=interpret,
    name="decode_attention_combine",
  )(rows, start, q, k, v, *sums, keys, values, *before)


def _stretch(row, start, q, keys, values, o, m, l, *, window, block, blocks):  # noqa: E741 (the field's name)
  _, time, group, size = q.shape
  capacity = keys.shape[0]
  mine, length = row[0], start[0]
  low = 0 if window is None else jnp.maximum(length - window, 0)
  begin = low + pl.program_id(2) * blocks * block
  queries = [(t, g) for t in range(time) for g in range(group)]
  scaled = [q[mine, t, g].astype(jnp.float32) / math.sqrt(size) for t, g in queries]

  def one(i, carry):
    wanted = begin + i * block
    # The last block of a cache is read from where it fits; what it shares with the block before it is masked.
    at = jnp.minimum(wanted, capacity - block)
    position = at + jnp.arange(block)
    filled = (position >= wanted) & (position < length)
    key = keys[pl.ds(at, block)].astype(jnp.float32)
    # A cache may hold anything past its length, also what is not a number.
    value = jnp.where(filled[:, None], values[pl.ds(at, block)].astype(jnp.float32), 0.0)
    new = []
    for (t, _), query, (o, m, l) in zip(queries, scaled, carry, strict=True):  # noqa: E741
      see = filled if window is None else filled & (position >= length + t - window)
      score = jnp.where(see, jnp.sum(key * query[None], axis=1), _LOWEST)
      top = jnp.maximum(m, jnp.max(score))
      weight = jnp.where(see, jnp.exp(score - top), 0.0)
      fade = jnp.exp(m - top)
      new.append((fade * o + jnp.sum(weight[:, None] * value, axis=0), top, fade * l + jnp.sum(weight)))
    return tuple(new)

  empty = tuple((jnp.zeros((size,), jnp.float32), jnp.float32(_LOWEST), jnp.float32(0.0)) for _ in queries)
  steps = jnp.clip((length - begin + block - 1) // block, 0, blocks)
  for i, sums in enumerate(jax.lax.fori_loop(0, steps, one, empty)):
    for ref, value in zip((o, m, l), sums, strict=True):
      ref[i] = value


def _combine(row, start, q, k, v, o, m, l, *rest, window):  # noqa: E741
  out, keys, values = rest[-3:]
  _, time, group, size = q.shape
  mine, i = row[0], pl.program_id(2)
  t, g = i // group, i % group
  query = q[mine, t, g].astype(jnp.float32) / math.sqrt(size)
  scores = []
  for j in range(time):
    see = j <= t if window is None else (j <= t) & (j >= t - window)
    scores.append(jnp.where(see, jnp.sum(query * k[mine, j].astype(jnp.float32)), _LOWEST))
  top = functools.reduce(jnp.maximum, scores, jnp.max(m[...]))
  weight = jnp.exp(m[...] - top)
  total, denominator = jnp.sum(weight[:, None] * o[...], axis=0), jnp.sum(weight * l[...])
  for j, score in enumerate(scores):
    share = jnp.exp(score - top)
    total, denominator = total + share * v[mine, j].astype(jnp.float32), denominator + share
  out[mine, t, g] = (total / denominator).astype(out.dtype)

  @pl.when(g == 0)
  def _():
    # As `dynamic_update_slice` would: never past the end.
    place = jnp.minimum(start[0], keys.shape[0] - time) + t
    keys[place] = k[mine, t]
    values[place] = v[mine, t]
