"""The kernel by Pallas' Triton lowering: a program takes some queries of a row and walks through the row's pages."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

NEEDS = "takes pages and head_dim that are powers of two from 16 on, of 16 or 32 bits"
_QUERIES = 128  # of a program, at most
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that the difference of two is no NaN


def supports(q, keys, *_) -> bool:
  power = lambda size: size >= 16 and size & (size - 1) == 0
  return power(keys.shape[1]) and power(keys.shape[2]) and q.dtype == keys.dtype and q.dtype.itemsize in (2, 4)


def paged_attention(q, keys, values, table, count, start, sizes, *, heads: int, interpret: bool = False):
  """As `jaxlab.kernels.paged_attention.paged_attention`; softmax and sums are float32."""
  rows, queries, size = q.shape
  block = min(_QUERIES, max(16, pl.next_power_of_2(queries)))
  tiles = pl.cdiv(queries, block)
  tile = pl.BlockSpec((None, block, size), lambda r, i: (r, i, 0))
  row = lambda *tail: pl.BlockSpec((None, *tail), lambda r, i: (r, *[0] * len(tail)))
  pad = lambda a: jnp.pad(a, ((0, 0), (0, tiles * block - queries), (0, 0)))
  weighted = [] if sizes is None else [sizes]
  out, total = pl.pallas_call(
    functools.partial(_kernel, heads=heads, block=block, tokens=queries // heads),
    grid=(rows, tiles),
    in_specs=[
      *[tile, pl.BlockSpec(), pl.BlockSpec(), row(table.shape[1]), row(2), pl.BlockSpec((1,), lambda r, i: (r,))],
      *[pl.BlockSpec() for _ in weighted],
    ],
    out_specs=[tile, pl.BlockSpec((None, block), lambda r, i: (r, i))],
    out_shape=[
      jax.ShapeDtypeStruct((rows, tiles * block, size), q.dtype),
      jax.ShapeDtypeStruct((rows, tiles * block), jnp.float32),
    ],
    compiler_params=triton.CompilerParams(num_warps=4 if block * size <= 64 * 128 else 8, num_stages=2),
    interpret=interpret,
    name="paged_attention",
  )(pad(q), keys, values, table, count, start, *weighted)
  return out[:, :queries], total[:, :queries]


def _kernel(q, keys, values, table, count, start, *rest, heads: int, block: int, tokens: int):
  *sizes, out, total = rest
  page, size = keys.shape[1:]
  opened, pages = count[0], count[1]
  # In powers of two, as the kernel computes exp2.
  scale = math.log2(math.e) / math.sqrt(size)
  precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  dot = functools.partial(triton.dot, precision=precision)
  query = q[...]
  begin = start[0]
  # Queries that fill up the last block see what the last token sees.
  at = begin + jnp.minimum((pl.program_id(1) * block + jnp.arange(block)) // heads, tokens - 1)
  first = begin // page - opened

  def one(masked, i, carry):
    o, m, l = carry  # noqa: E741 (the field's name)
    where = table[i]
    value = values[where]
    score = dot(query, keys[where], trans_b=True) * scale
    if masked:
      place = (first + i) * page + jnp.arange(page)
      see = place[None] <= at[:, None]
      score = jnp.where(see, score, _LOWEST)
      # A page may hold anything past the last token, also what is not a number.
      value = jnp.where((place <= jnp.max(at))[:, None], value, jnp.zeros((), value.dtype))
    counts = [tokens_of[where] for tokens_of in sizes]
    for count_of in counts:  # an empty entry's score must not be the largest
      score = jnp.where(count_of[None] > 0, score, _LOWEST)
    top = jnp.maximum(m, jnp.max(score, axis=1))
    weight = jnp.exp2(score - top[:, None])
    weight = jnp.where(see, weight, 0.0) if masked else weight
    for count_of in counts:
      weight = weight * count_of[None]
    fade = jnp.exp2(m - top)
    return fade[:, None] * o + dot(weight.astype(value.dtype), value), top, fade * l + jnp.sum(weight, axis=1)

  carry = jnp.zeros((block, size), jnp.float32), jnp.full((block,), _LOWEST), jnp.zeros((block,), jnp.float32)
  carry = jax.lax.fori_loop(0, opened, functools.partial(one, False), carry)
  # Pages that begin past the last query of this program are not read.
  seen = jnp.minimum(pages, jnp.max(at) // page - first + 1)
  o, m, l = jax.lax.fori_loop(opened, seen, functools.partial(one, True), carry)  # noqa: E741
  some = l != 0  # also of keys that are no numbers
  safe = jnp.where(some, l, 1.0)
  out[...] = (o / safe[:, None]).astype(out.dtype)
  total[...] = jnp.where(some, (m + jnp.log2(safe)) * math.log(2), -jnp.inf)
