"""The kernel by Pallas' Mosaic lowering for GPUs, Hopper's: TMA brings the pages and wgmma multiplies them in place.

A program takes some queries of a row, 64 for every warpgroup that computes, and walks through its pages in blocks.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlab.core.checks import require

NEEDS = "takes bfloat16 or float16, head_dim 64 or 128, pages in 64s, no sizes, and a Hopper GPU"
_GROUPS = 2  # warpgroups that compute, at most, beside one that copies
_STAGES = 2  # blocks, each its keys and its values, in shared memory at a time
_QUERIES = 64  # of a warpgroup: rows of a wgmma
_BLOCK = 128  # keys at a time, at most
_TRANSFORMS = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # as TMA writes and wgmma reads
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that the difference of two is no NaN


def supports(q, keys, values, table, count, start, sizes) -> bool:
  return (
    q.dtype == keys.dtype == values.dtype
    and q.dtype in (jnp.bfloat16, jnp.float16)
    and keys.shape[2] in (64, 128)
    and keys.shape[1] % 64 == 0
    and sizes is None
    and _hopper()
  )


def _hopper() -> bool:
  """Of the device that a program is made for: an abstract one has a name only."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None:
    return device.device_kind.startswith(("NVIDIA H100", "NVIDIA H200"))
  return jax.default_backend() == "gpu" and getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def paged_attention(q, keys, values, table, count, start, sizes, *, heads: int, interpret: bool = False):
  """As `jaxlab.kernels.paged_attention.paged_attention`; softmax and sums are float32."""
  require(not interpret, "the mosaic_gpu kernel has no interpreter; use implementation='reference'")
  rows, queries, size = q.shape
  page = keys.shape[1]
  block = _BLOCK if page % _BLOCK == 0 else 64
  groups = min(_GROUPS, pl.cdiv(queries, _QUERIES))
  tiles = pl.cdiv(queries, groups * _QUERIES)
  length = tiles * groups * _QUERIES
  out, total = plgpu.kernel(
    functools.partial(_program, heads=heads, queries=queries, page=page, block=block),
    out_type=[
      jax.ShapeDtypeStruct((rows, length, size), q.dtype),
      jax.ShapeDtypeStruct((rows, length), jnp.float32),
    ],
    scratch_types=_scratch(q.dtype, size, block, groups),
    grid=(rows, tiles),
    grid_names=("row", "tile"),
    num_threads=groups + 1,
    thread_name="group",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(
    jnp.pad(q, ((0, 0), (0, length - queries), (0, 0))),
    *(pool.reshape(-1, size) for pool in (keys, values)),
    table,
    count,
    start,
  )
  return out[:, :queries], total[:, :queries]


def _scratch(dtype, size: int, block: int, groups: int):
  """The queries, which their output replaces, and its log-sum-exp; the copier's rings, and barriers between groups."""
  tiled = lambda *shape: plgpu.SMEM((*shape, size), dtype, transforms=_TRANSFORMS)
  barrier = plgpu.Barrier
  query = [tiled(groups, _QUERIES), plgpu.SMEM((groups, _QUERIES), jnp.float32), barrier(num_barriers=groups)]
  ring = [tiled(_STAGES, block)] * 2
  ready = [barrier(num_barriers=_STAGES)] * 2
  free = [barrier(num_arrivals=groups, num_barriers=_STAGES)] * 2
  return [*query, *ring, *ready, *free, barrier(num_barriers=groups), barrier()]


class _Walk(NamedTuple):
  """A program's way through its row, in blocks: all queries see those before `clear`, and none those from `end` on."""

  row: jax.Array
  begin: jax.Array  # position of the first new token
  origin: jax.Array  # block i, if not open, begins at origin + i * block
  clear: jax.Array
  end: jax.Array


def _walk(count, start, first, length: int, *, heads: int, queries: int, page: int, block: int) -> _Walk:
  """Of `length` queries from `first` on."""
  row = jax.lax.axis_index("row")
  begin = start[row]
  opened, total = (count[row, i] * (page // block) for i in range(2))
  origin = jax.lax.div(begin, page) * page - opened * block
  earliest = begin + jax.lax.div(first, heads)
  latest = begin + jax.lax.div(jnp.minimum(first + length, queries) - 1, heads)
  clear = jnp.minimum(jax.lax.div(earliest + 1 - origin, block), total)
  return _Walk(row, begin, origin, clear, jnp.minimum(jax.lax.div(latest - origin, block) + 1, total))


def _at(walk: _Walk, table, i, page: int, block: int):
  """Where block i of the row lies in the pools."""
  parts = page // block
  return table[walk.row, jax.lax.div(i, parts)] * parts + jax.lax.rem(i, parts)


def _empty(size: int):
  """(sums, maximum, denominator) of a warpgroup's queries over nothing."""
  line = lambda value: plgpu.layout_cast(jnp.full((_QUERIES,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
  sums = plgpu.layout_cast(jnp.zeros((_QUERIES, size), jnp.float32), plgpu.Layout.WGMMA)
  return sums, line(_LOWEST), line(0.0)


def _over(lines, shape):
  return jax.lax.broadcast_in_dim(lines, shape, [0])


def _score(query, key):
  def multiply(acc):
    plgpu.wgmma(acc, query, key.T)
    return acc[...]

  return pl.run_scoped(multiply, plgpu.ACC((_QUERIES, key.shape[0]), jnp.float32))


def _weigh(score, carry, dtype, see=None):
  """Softmax's weights of a block, and the carry faded to their maximum; in powers of two, as the hardware computes."""
  sums, m, l = carry  # noqa: E741 (the field's name)
  scale = math.log2(math.e) / math.sqrt(sums.shape[1])
  if see is not None:
    score = jnp.where(see, score, _LOWEST)
  top = jnp.maximum(m, score.max(axis=1) * scale)
  weight = jnp.exp2(score * scale - _over(top, score.shape))
  if see is not None:
    weight = jnp.where(see, weight, 0.0)
  fade = jnp.exp2(m - top)
  return weight.astype(dtype), (sums * _over(fade, sums.shape), top, l * fade + weight.sum(axis=1))


def _add(weight, value, carry):
  """The carry with weight @ value added to its sums."""
  sums, *rest = carry
  return pl.run_state(lambda acc: plgpu.wgmma(acc, weight, value))(plgpu.ACC.init(sums)), *rest


def _see(walk: _Walk, i, first, *, heads: int, queries: int, block: int):
  """Which keys of block i are seen; those of open pages lie before all queries. Position p of query q: p <= q // heads.

  Queries that fill up the last tile see what the last one sees.
  """
  iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, (_QUERIES, block), axis, layout=plgpu.Layout.WGMMA)
  place = (walk.origin - walk.begin + i * block) + iota(1)
  return place * heads <= jnp.minimum(first + iota(0), queries - 1)


def _valid(walk: _Walk, i, *, heads: int, queries: int, block: int):
  """How many of block i's positions are up to the last token, if it is not open."""
  return walk.begin + queries // heads - walk.origin - i * block


def _clean(value, valid):
  """A page may hold anything past the last token, also what is not a number: zeros in its place."""
  numbers = plgpu.layout_cast(value[...], plgpu.Layout.WGMMA)
  here = plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=plgpu.Layout.WGMMA)
  value[...] = jnp.where(here < valid, numbers, jnp.zeros_like(numbers))
  plgpu.commit_smem()


def _finish(carry, out, total, out_smem, total_smem):
  """Writes attention, in the queries' place, and its log-sum-exp; zeros and -inf of nothing."""
  sums, m, l = carry  # noqa: E741 (the field's name)
  some = l != 0  # also of keys that are no numbers
  safe = jnp.where(some, l, 1.0)
  out_smem[...] = (sums * _over(1 / safe, sums.shape)).astype(out_smem.dtype)
  total_smem[...] = jnp.where(some, m * math.log(2) + jnp.log(safe), -jnp.inf)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(out_smem, out)
  plgpu.copy_smem_to_gmem(total_smem, total)
  plgpu.wait_smem_to_gmem(0)


def _program(
  q,
  keys,
  values,
  table,
  count,
  start,
  out,
  total,
  query,
  lse,
  arrived,
  key_ring,
  value_ring,
  key_ready,
  value_ready,
  key_free,
  value_free,
  turns,
  cleaned,
  *,
  heads: int,
  queries: int,
  page: int,
  block: int,
):
  """The last warpgroup copies blocks into a ring; the others compute, each its own 64 queries with the same blocks. Two
  take turns: one multiplies while the other is at its softmax."""
  size, groups = q.shape[2], query.shape[0]
  group = jax.lax.axis_index("group")
  tile = jax.lax.axis_index("tile") * (groups * _QUERIES)
  walk = _walk(count, start, tile, groups * _QUERIES, heads=heads, queries=queries, page=page, block=block)
  turn = lambda i: jax.lax.rem(i, _STAGES)

  @pl.when(group == groups)
  def _():
    if groups > 1:
      plgpu.set_max_registers(40, action="decrease")

    pools = (keys, key_ring, key_ready, key_free), (values, value_ring, value_ready, value_free)

    def turn_by_turn(i, _, wait: bool, copy: bool):
      slot = turn(i)
      for pool, ring, ready, free in pools:
        if wait:
          plgpu.barrier_wait(free.at[slot])
        if copy:
          at = pl.ds(_at(walk, table, i, page, block) * block, block)
          plgpu.copy_gmem_to_smem(pool.at[at], ring.at[slot], ready.at[slot])

    full = jnp.minimum(walk.end, _STAGES)
    loop = lambda begin, end, **how: jax.lax.fori_loop(begin, end, functools.partial(turn_by_turn, **how), None)
    loop(0, full, wait=False, copy=True)
    loop(full, walk.end, wait=True, copy=True)
    loop(walk.end - full, walk.end, wait=True, copy=False)  # none is left on its way

  @pl.when(group < groups)
  def _():
    if groups > 1:  # two of 232 and one of 40 fill the register file; fewer have the most there is
      plgpu.set_max_registers(232, action="increase")
    first = tile + group * _QUERIES
    mine, my_query, my_lse = pl.ds(first, _QUERIES), query.at[group], lse.at[group]
    plgpu.copy_gmem_to_smem(q.at[walk.row, mine], my_query, arrived.at[group])
    plgpu.barrier_wait(arrived.at[group])
    in_turn = groups == 2
    take_turn = lambda: plgpu.barrier_wait(turns.at[group])
    pass_turn = lambda: plgpu.barrier_arrive(turns.at[1 - group])

    def clean(slot, valid):
      @pl.when(valid < block)  # at most once, in the block of the last token
      def _():
        @pl.when(group == 0)
        def _():
          _clean(value_ring.at[slot], valid)
          plgpu.barrier_arrive(cleaned)

        plgpu.barrier_wait(cleaned)

    def one(i, carry, masked: bool):
      slot = turn(i)
      plgpu.barrier_wait(key_ready.at[slot])
      score = _score(my_query, key_ring.at[slot])
      plgpu.barrier_arrive(key_free.at[slot])
      if in_turn:
        pass_turn()
      see = _see(walk, i, first, heads=heads, queries=queries, block=block) if masked else None
      weight, carry = _weigh(score, carry, q.dtype, see)
      plgpu.barrier_wait(value_ready.at[slot])
      if masked:
        clean(slot, _valid(walk, i, heads=heads, queries=queries, block=block))
      if in_turn:  # this product and the next block's are one turn, which no part of the softmax may drift into
        weight, carry = jax.lax.optimization_barrier((weight, carry))
        take_turn()
      carry = _add(weight, value_ring.at[slot], carry)
      plgpu.barrier_arrive(value_free.at[slot])
      return carry

    if in_turn:  # the first one begins
      pl.when(group == 1)(pass_turn)
      take_turn()
    carry = jax.lax.fori_loop(0, walk.clear, functools.partial(one, masked=False), _empty(size))
    carry = jax.lax.fori_loop(walk.clear, walk.end, functools.partial(one, masked=True), carry)
    if in_turn:
      pl.when(group == 0)(pass_turn)
    _finish(carry, out.at[walk.row, mine], total.at[walk.row, mine], my_query, my_lse)
