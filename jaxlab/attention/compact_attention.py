"""CompactAttention: dense attention over the union of the blocks that a sparse selector wants (arXiv 2605.16839).

  method = compact(functools.partial(flash_prefill, alpha=0.06))
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(method, chunk=1024, page=128))

A prompt is read chunk by chunk. A selector says which blocks of the past every block of queries needs; the blocks that
any query block of the chunk and any head of a group needs are one table of pages, over which the kernel runs dense
attention where the pages lie: few long rows instead of many short ones, and nothing copied. Softmax is over the union.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.attention.dhsa_blocks import top_blocks, vertical_slash_means
from jaxlab.attention.seer_gate import pooled_keys, seer
from jaxlab.attention.selection import Selection, block_means, blocks_behind, first_ones, flash_prefill
from jaxlab.core.checks import require, require_divides
from jaxlab.kernels.paged_attention import paged_attention
from jaxlab.models import paged


def block_union(
  chosen: Selection, *, kv_heads: int, past: Int[Array, ""] | int, share: int | None = None
) -> Bool[Array, "batch groups key_blocks"]:
  """What any query block and any head of a group needs, and the whole chunk.

  Args:
    past: blocks before the chunk.
    share: heads of a group, a divisor of those that share a key head; None: all of these.

  Raises:
    InputError: a share that does not divide.
  """
  batch, heads, _, blocks = chosen.shape
  share = share or heads // kv_heads
  require_divides("share", share, "query heads a key head", heads // kv_heads)
  wanted = chosen.any(axis=2).reshape(batch, heads // share, share, blocks).any(axis=2)
  return wanted | (jnp.arange(blocks) >= past)


def page_table(
  wanted: Bool[Array, "rows key_blocks"], past: Int[Array, ""] | int, end: Int[Array, ""] | int
) -> tuple[Int[Array, "rows key_blocks"], Int[Array, "rows 2"]]:
  """(the wanted blocks of every row, in order; counts (before `past`, before `end`)).

  Entries past the count repeat the last one that counts.
  """
  blocks = wanted.shape[1]
  index = jnp.arange(blocks)
  wanted &= index < end
  place = jnp.where(wanted, jnp.cumsum(wanted, axis=1) - 1, blocks)  # a sort would take a GPU longer
  table = jax.vmap(lambda place: jnp.zeros(blocks, jnp.int32).at[place].set(index, mode="drop"))(place)
  count = jnp.stack([(wanted & (index < past)).sum(axis=1), wanted.sum(axis=1)], axis=1).astype(jnp.int32)
  last = jnp.max(jnp.where(wanted, index, 0), axis=1, keepdims=True)
  return jnp.where(index < count[:, 1:], table, last), count


def attend_union(
  q, view: paged.View, wanted, *, copy: bool = False, capacity: int | None = None, implementation: str | None = None
):
  """Dense causal attention of a chunk over the wanted blocks of each group, in place.

  Args:
    q: (batch, time, q_heads, head_dim) at positions from view.start on, a multiple of the page.
    wanted: bool[batch, groups, key_blocks], the chunk's own blocks among them (`block_union`).
    copy: gather the pages first instead of reading them where they lie (a comparison: the same numbers).
    capacity: pages that a row wants at most, which its table has room for; None: all of the cache.

  Returns:
    (attention like q, log-sum-exp float32[batch, time, q_heads]).
  """
  batch, time = q.shape[:2]
  kv_heads, _, page, size = view.keys.shape
  groups, past = wanted.shape[1], view.start // page
  table, count = page_table(wanted.reshape(batch * groups, -1), past, past + -(-time // page))
  table, count = table[:, :capacity].reshape(batch, groups, -1), count.reshape(batch, groups, 2)
  physical = jnp.take_along_axis(jnp.repeat(view.table[:, None], groups, axis=1), table, axis=2)
  keys, values = view.keys, view.values
  if copy:
    head = jnp.arange(groups)[:, None] // (groups // kv_heads)
    # The copies of a group are a pool of its own, and every group reads one key head.
    keys, values = (jnp.moveaxis(pool[head, physical], 1, 0).reshape(groups, -1, page, size) for pool in (keys, values))
    capacity = physical.shape[2]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * capacity + jnp.arange(capacity, dtype=jnp.int32)
    physical = jnp.broadcast_to(rows, physical.shape)
  return paged.attend_tables(q, keys, values, physical, count, view.start, implementation=implementation)


def attend_blocks(q, view: paged.View, chosen: Selection, *, implementation: str | None = None):
  """Block-sparse attention: every head and query block over its own blocks, with the same kernel.

  What CompactAttention is compared with: softmax is over `chosen` alone, which must hold the diagonal.

  Returns:
    (attention like q, log-sum-exp float32[batch, time, q_heads]).
  """
  batch, time, heads, size = q.shape
  kv_heads, pages, page, _ = view.keys.shape
  tiles = chosen.shape[2]
  own = view.start // page + jnp.tile(jnp.arange(tiles), batch * heads)
  table, count = page_table(chosen.reshape(batch * heads * tiles, -1), own[:, None], own[:, None] + 1)
  mine = jnp.repeat(view.table, heads * tiles, axis=0)
  head = jnp.tile(jnp.repeat(jnp.arange(heads) // (heads // kv_heads), tiles), batch)[:, None]
  physical = head * pages + jnp.take_along_axis(mine, table, axis=1)
  rows = jnp.moveaxis(q, 2, 1).reshape(batch * heads * tiles, time // tiles, size)
  flat = lambda pool: pool.reshape(kv_heads * pages, page, size)
  out, total = paged_attention(
    rows, flat(view.keys), flat(view.values), physical, count, own * page, implementation=implementation
  )
  back = lambda a: jnp.moveaxis(a.reshape(batch, heads, time, *a.shape[2:]), 1, 2)
  return back(out), back(total)


def density(taken: Bool[Array, "*rows query_blocks key_blocks"], past: Int[Array, ""] | int) -> Float[Array, ""]:
  """The share of all causal (query block, key block) pairs that is taken; a union counts for every query block."""
  behind = past + jnp.arange(taken.shape[-2])[:, None] - jnp.arange(taken.shape[-1])
  causal = jnp.broadcast_to(behind >= 0, taken.shape)
  return (taken & causal).sum() / causal.sum()


# What a selector reads of a block of keys where that is not the keys: kept from chunk to chunk, as if a page.
SUMMARIES = {
  flash_prefill: block_means,
  seer: pooled_keys,
  top_blocks: block_means,
  vertical_slash_means: block_means,
}


def compact(
  select: Callable | tuple[Callable, ...] = flash_prefill,
  *,
  share: int | None = None,
  union: bool = True,
  last: int = 0,
  implementation: str | None = None,
) -> paged.Method:
  """The method for a paged cache; decoding, the first chunk and layers that look back a window are dense.

  Args:
    select: one of `selection`, `dhsa_blocks` or `seer_gate.seer`, its options bound, for all layers or one for each;
      it is given q, the keys or their `SUMMARIES`, past=, block=, the page, and real=, the queries that count. Whatever
      it chooses, blocks of queries see themselves, and the blocks before them with a key that is no number.
    share: heads that share a table (`block_union`).
    union: False runs every query block on its own blocks instead (`attend_blocks`).
    last: blocks of queries at the end of a prompt, in the chunk that holds it, that see everything and have no part in
      the union; with SeerAttention's gate 2 of 64 as published.

  Raises:
    InputError: last is negative; selectors of layers read different `SUMMARIES`; or, once the layers are known, there
      is not one for each.
  """
  require(last >= 0, f"last is {last}; the number of dense query blocks at a prompt's end cannot be negative")
  per_layer = isinstance(select, tuple)
  of_layer = lambda layer: select[layer] if per_layer else select
  kinds = {summary_of(one) for one in (select if per_layer else (select,))}
  require(len(kinds) == 1, "the selectors of the layers must all read keys, or all the same summary of them")
  (summary,) = kinds

  def empty(config, *, batch, capacity, page, dtype):
    if per_layer:
      require(len(select) == config.depth, f"{len(select)} selectors for {config.depth} layers; give one for each")
    if summary is None:
      return ()
    keys = jax.ShapeDtypeStruct((batch, config.kv_heads, capacity, config.head_dim), dtype)
    shape = jax.eval_shape(lambda k: summary(k, page), keys)
    return tuple(jnp.zeros(shape.shape, shape.dtype) for _ in range(config.depth))

  def attend(q, k, v, view: paged.View, memory):
    time, page = q.shape[1], view.keys.shape[2]
    if time == 1 or view.window is not None:  # a window is few blocks already
      return paged.attend_densely(q, k, v, view, memory)
    require_divides("the page", page, "the chunk", time)
    require(jnp.ndim(view.start) == 0, "chunks of rows that start at positions of their own cannot be selected for")
    rows, real = jnp.moveaxis(q, 2, 1), real_queries(view, time)
    if summary:
      keys = memory[view.layer]
      new = summary(jnp.moveaxis(k, 2, 1), page, real)
      keys = jax.lax.dynamic_update_slice(keys, new.astype(keys.dtype), (0, 0, view.start // page, 0))
      memory = (*memory[: view.layer], keys, *memory[view.layer + 1 :])
    else:
      keys = paged.rows(view.keys, view.table)
    chosen = of_layer(view.layer)(rows, keys, past=view.start, block=page, real=real)
    first = _first_dense(view, time, page, last)
    behind = blocks_behind(view.start, *chosen.shape[2:], page)
    chosen |= _no_numbers(keys, *chosen.shape[1::2]) & (behind >= 0)
    chosen = chosen & (jnp.arange(time // page)[:, None] < first[:, None, None, None]) | (behind == 0)
    if union:
      wanted = block_union(chosen, kv_heads=k.shape[2], past=view.start // page, share=share)
      out, _ = attend_union(q, view, wanted, implementation=implementation)
    else:
      out, _ = attend_blocks(q, view, chosen, implementation=implementation)
    return _attend_last(out, q, view, first * page, min(last * page, time)), memory

  return paged.Method(attend, empty)


def _no_numbers(keys, heads: int, blocks: int) -> Bool[Array, "batch q_heads 1 key_blocks"]:
  """Blocks with a key, or a summary, that is no number: they are read, and seen in the answer, whatever is chosen."""
  wrong = jnp.isnan(keys).reshape(*keys.shape[:2], blocks, -1).any(axis=3)
  return jnp.repeat(wrong, heads // keys.shape[1], axis=1)[:, :, None]


def real_queries(view: paged.View, time: int) -> Int[Array, "batch"]:
  """How many of the `time` new tokens of every row are no padding: the first ones."""
  return jnp.clip(view.lengths - view.start, 0, time)


def _first_dense(view: paged.View, time: int, page: int, last: int) -> Int[Array, "batch"]:
  """The first query block of every row that sees everything, or is padding: one of the `last` of a prompt that ends in
  the chunk."""
  end = view.lengths - view.start
  first = jnp.maximum(-(-end // page) - last, 0)
  return jnp.where((end > 0) & (end <= time), first, time // page)


def _attend_last(out, q, view: paged.View, start: Int[Array, "batch"], count: int):
  """`out` with dense attention in the queries from `start` on, at most `count` of them; in no row, nothing is done."""
  if not count:
    return out
  time = q.shape[1]
  first = jnp.minimum(start, time - count)

  def some(out):
    cut = jax.vmap(lambda a, at: jax.lax.dynamic_slice_in_dim(a, at, count))
    dense, _ = paged.attend_pages(
      cut(q, first), view.keys, view.values, view.table, start=view.start + first, window=view.window
    )
    mine = (first[:, None] + jnp.arange(count) >= start[:, None])[..., None, None]
    new = jnp.where(mine, dense, cut(out, first))
    return jax.vmap(lambda a, b, at: jax.lax.dynamic_update_slice_in_dim(a, b, at, 0))(out, new, first)

  return jax.lax.cond((start < time).any(), some, lambda out: out, out)


def summary_of(select: Callable) -> Callable | None:
  """(keys, block) -> what this selector reads in their place, or None."""
  return summary_of(select.func) if isinstance(select, functools.partial) else SUMMARIES.get(select)


def quoka(*, queries: float = 0.25, budget: float = 0.25) -> paged.Method:
  """QUOKA (arXiv 2602.08722): single past tokens, chosen by the queries that are least like their mean, and copied.

  c[h, t] = cos(q[h, t], mean_t q[h]);  the share `queries` with the lowest c stays
  S[g, t] = max over those of mean over the group of q / |q| . k[g, t] / |k[g, t]|;  the best `budget` of the past stays

  t are a row's queries that are no padding.

  Raises:
    InputError: a share outside 0 < queries <= 1 or 0 <= budget <= 1.
  """
  require(0 < queries <= 1, f"queries is {queries}; the share of queries that choose must lie in 0 < queries <= 1")
  require(0 <= budget <= 1, f"budget is {budget}; the share of the past must lie in 0 <= budget <= 1")

  def attend(q, k, v, view: paged.View, memory):
    time = q.shape[1]
    if time == 1 or view.window is not None:
      return paged.attend_densely(q, k, v, view, memory)
    keys, values = (paged.rows(pool, view.table) for pool in (view.keys, view.values))
    capacity = keys.shape[2]
    score = quoka_scores(jnp.moveaxis(q, 2, 1), keys, queries, real_queries(view, time))
    position = jnp.arange(capacity)
    past = position < view.start
    # The chunk itself always, then the best of the past; as many as `budget` of the past are.
    score = jnp.where(jnp.isnan(score), jnp.inf, score)  # what is no number is read, and seen in the answer
    rank = jnp.argsort(jnp.argsort(jnp.where(past, -score, jnp.inf), axis=-1, stable=True), axis=-1)
    kept = past & (rank < jnp.ceil(budget * view.start))
    see = kept[:, :, None] | ((position >= view.start) & (position <= view.start + jnp.arange(time)[:, None]))
    group = q.shape[2] // k.shape[2]
    mask = jnp.repeat(see, group, axis=1)
    values = jnp.where((position < view.start + time)[:, None], values, 0)  # what is not a number, too, lies past them
    back = lambda a: jnp.moveaxis(a, 1, 2)
    out = jax.nn.dot_product_attention(q, back(keys), back(values), mask=mask, implementation="xla")
    return out, memory

  return paged.Method(attend)


def quoka_scores(q, k, share: float, real: Int[Array, "batch"]) -> Float[Array, "batch kv_heads positions"]:
  """S[g, t] of `quoka`, from the `share` of every head's first `real` queries that is least like their mean."""
  q, k = (a.astype(jnp.float32) for a in (q, k))
  unit = lambda a: a / jnp.maximum(jnp.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
  alike = (unit(q) * unit(block_means(q, q.shape[2], real))).sum(axis=-1)
  alike = jnp.where(first_ones(real, q.shape[2])[..., 0], alike, jnp.inf)
  count = jnp.maximum(1, jnp.round(share * real)).astype(jnp.int32)[:, None, None]
  most = max(1, round(share * q.shape[2]))
  _, index = jax.lax.top_k(-alike, most)
  kept = jnp.arange(most) < count
  # In the order of the chunk, which is how a head's queries meet those of its group; after them what does not count.
  index = jnp.sort(jnp.where(kept, index, q.shape[2]), axis=-1)[..., None]
  picked = jnp.take_along_axis(unit(q), jnp.minimum(index, q.shape[2] - 1), axis=2)
  picked = picked.reshape(q.shape[0], k.shape[1], -1, most, q.shape[3]).mean(axis=2)
  score = jnp.einsum("bgnd,bgtd->bgnt", picked, unit(k), precision=jax.lax.Precision.HIGHEST)
  return jnp.where(kept[..., None], score, -jnp.inf).max(axis=2)
