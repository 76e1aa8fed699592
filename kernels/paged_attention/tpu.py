"""The kernel by Pallas' Mosaic lowering for TPUs: the table is read ahead of the pages, which are copied meanwhile."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

NEEDS = "takes pages of 8 positions or more in eights, a head_dim in 128s, of 16 or 32 bits"
_QUERIES = 256  # of a grid step, at most
_LANES = 128
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that the difference of two is no NaN


def supports(q, keys, *_) -> bool:
  return keys.shape[1] % 8 == 0 and keys.shape[2] % _LANES == 0 and q.dtype == keys.dtype and q.dtype.itemsize in (2, 4)


def paged_attention(q, keys, values, table, count, start, sizes, *, heads: int, interpret: bool = False):
  """As `jaxlab.kernels.paged_attention.paged_attention`; softmax and sums are float32."""
  rows, queries, size = q.shape
  page, capacity = keys.shape[1], table.shape[1]
  block = min(_QUERIES, -(-queries // 16) * 16)
  tiles = pl.cdiv(queries, block)
  # Past a row's last page its index stands still, so that nothing is copied.
  last = jnp.maximum(count[:, 1:] - 1, 0)
  table = jnp.take_along_axis(table, jnp.minimum(jnp.arange(capacity), last), axis=1)
  tile = pl.BlockSpec((None, block, size), lambda r, i, j, *_: (r, i, 0))
  pages = pl.BlockSpec((None, page, size), lambda r, i, j, table, *_: (table[r, j], 0, 0))
  line = pl.BlockSpec((None, 1, page), lambda r, i, j, table, *_: (table[r, j], 0, 0))
  weighted = [] if sizes is None else [sizes[:, None]]
  lanes = pl.BlockSpec((None, block, _LANES), lambda r, i, j, *_: (r, i, 0))
  out, total = pl.pallas_call(
    functools.partial(_kernel, heads=heads, capacity=capacity, tokens=queries // heads),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(rows, tiles, capacity),
      in_specs=[tile, pages, pages, *[line for _ in weighted]],
      out_specs=[tile, lanes],
      scratch_shapes=[pltpu.VMEM((block, n), jnp.float32) for n in (size, _LANES, _LANES)],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((rows, tiles * block, size), q.dtype),
      jax.ShapeDtypeStruct((rows, tiles * block, _LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name="paged_attention",
  )(table, count, start, jnp.pad(q, ((0, 0), (0, tiles * block - queries), (0, 0))), keys, values, *weighted)
  return out[:, :queries], total[:, :queries, 0]


def _kernel(table, count, start, q, keys, values, *rest, heads: int, capacity: int, tokens: int):
  *sizes, out, total, o, m, l = rest  # noqa: E741 (the field's name)
  r, i, j = (pl.program_id(axis) for axis in range(3))
  block, size = q.shape
  page = keys.shape[0]
  opened, pages, begin = count[r, 0], count[r, 1], start[r]

  @pl.when(j == 0)
  def _():
    o[...] = jnp.zeros_like(o)
    m[...] = jnp.full_like(m, _LOWEST)
    l[...] = jnp.zeros_like(l)

  @pl.when(j < pages)
  def _():
    token = jax.lax.broadcasted_iota(jnp.int32, (block, page), 0) + i * block
    # Queries that fill up the last block see what the last token sees.
    at = begin + jnp.minimum(jax.lax.div(token, heads), tokens - 1)
    first = (jax.lax.div(begin, page) + j - opened) * page
    place = first + jax.lax.broadcasted_iota(jnp.int32, (block, page), 1)
    see = (place <= at) | (j < opened)
    latest = begin + jnp.minimum(jax.lax.div((i + 1) * block - 1, heads), tokens - 1)
    here = first + jax.lax.broadcasted_iota(jnp.int32, (page, size), 0)
    # A page may hold anything past the last token, also what is not a number.
    value = jnp.where((here <= latest) | (j < opened), values[...], jnp.zeros((), values.dtype))
    across = (((1,), (1,)), ((), ()))
    score = jax.lax.dot_general(q[...], keys[...], across, preferred_element_type=jnp.float32) / math.sqrt(size)
    for tokens_of in sizes:  # an empty entry's score must not be the largest
      see &= tokens_of[...] > 0
    score = jnp.where(see, score, _LOWEST)
    top = jnp.maximum(m[:, :1], jnp.max(score, axis=1, keepdims=True))
    weight = jnp.where(see, jnp.exp(score - top), 0.0)
    for tokens_of in sizes:
      weight = weight * tokens_of[...]
    fade = jnp.exp(m[:, :1] - top)
    sums = jax.lax.dot_general(
      weight.astype(value.dtype), value, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    o[...] = fade * o[...] + sums
    l[...] = jnp.broadcast_to(fade * l[:, :1] + jnp.sum(weight, axis=1, keepdims=True), l.shape)
    m[...] = jnp.broadcast_to(top, m.shape)

  @pl.when(j == capacity - 1)
  def _():
    some = l[...] != 0  # also of keys that are no numbers
    safe = jnp.where(some, l[...], 1.0)
    out[...] = (o[...] / safe[:, :1]).astype(out.dtype)
    total[...] = jnp.where(some, m[...] + jnp.log(safe), -jnp.inf)
