"""DHSA: a prompt's blocks of queries attend to the tokens of the chunks they score highest (arXiv 2510.24606).

  method = dhsa(predictor.score, budget=2048)
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(method, chunk=8192))

Keys are cut into chunks where their content changes (`dhsa_boundaries`), queries into blocks of equal size. A chunk and
a block are scored by their mean key and mean query, every token has its chunk's score, and a block, all heads of it
alike, sees its `budget` best tokens of those before its end, nearby and first ones always. The last `instruction`
queries of a prompt, and all tokens after it, see everything. Static rules that spend the same budget are beside it.

A prompt is read as one chunk. Which tokens a query sees depends on tokens behind it too (its block's mean, where chunks
end): losses at positions of the prompt are not those of a causal model, unlike all that comes after the prompt.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.attention.dhsa_boundaries import map_query_blocks, select_boundaries
from jaxlab.core.checks import require, require_choice, require_counts, require_divides
from jaxlab.models import paged
from jaxlab.models.attention import dot_product_attention

POOLING = ("sqrt", "mean", "max")


def chunk_means(
  x: Float[Array, "time head_dim"], bounds: Int[Array, "chunks_plus_1"], *, pooling: str = "sqrt"
) -> Float[Array, "chunks head_dim"]:
  """What stands for the rows bounds[n] .. bounds[n + 1] - 1 of x: float32, zeros for chunks without a row.

    "sqrt": sqrt(length) mean, as the noise of a mean of n shrinks by sqrt(n);  "mean";  "max": the largest entries.

  Raises:
    InputError: another pooling.
  """
  require_choice("pooling", pooling, POOLING)
  x = x.astype(jnp.float32)
  length = jnp.diff(bounds)[:, None]
  if pooling == "max":
    chunk = jnp.searchsorted(bounds, jnp.arange(len(x)), side="right") - 1  # past the last bound: of no chunk
    top = jax.ops.segment_max(x, chunk, num_segments=len(bounds) - 1, indices_are_sorted=True)
    return jnp.where(length > 0, top, 0)
  # Sums of what is left of the row's mean stay small, and their differences precise.
  inside = jnp.arange(len(x))[:, None] < bounds[-1]
  middle = jnp.where(inside, x, 0).sum(axis=0) / jnp.maximum(bounds[-1], 1)
  total = jnp.pad(jnp.cumsum(x - middle, axis=0), ((1, 0), (0, 0)))
  mean = (total[bounds[1:]] - total[bounds[:-1]]) / jnp.maximum(length, 1) + middle
  return jnp.where(length > 0, mean * (jnp.sqrt(length) if pooling == "sqrt" else 1), 0)


def chunk_scores(q, k, edges, bounds, *, pooling: str = "sqrt") -> Float[Array, "blocks chunks"]:
  """Sc = Qc Kc^T of one row: blocks of queries (`edges`) with chunks of keys (`bounds`), float32.

  Args:
    q, k: (time, heads, head_dim), averaged over their heads before all else; bounds and edges as in `chunk_means`.
  """
  pooled = lambda a, bounds: chunk_means(a.astype(jnp.float32).mean(axis=1), bounds, pooling=pooling)
  return jnp.einsum("md,nd->mn", pooled(q, edges), pooled(k, bounds), precision=jax.lax.Precision.HIGHEST)


def select_keys(
  scores: Float[Array, "blocks chunks"],
  bounds: Int[Array, "chunks_plus_1"],
  first: Int[Array, "blocks"],
  end: Int[Array, "blocks"],
  *,
  budget: int,
  local: int,
  sink: int,
) -> tuple[Int[Array, "blocks budget"], Bool[Array, "blocks budget"]]:
  """(positions that every block sees, ascending; which of them count), of those allowed: first <= j < end.

  The last `local` allowed are taken, then those of the highest score, a token having that of its chunk; of equal ones
  the first. The `sink` earliest of all that is taken then give way to the first `sink` allowed. Whole chunks are taken
  in the order of their scores and the last one is cut: no score of every token is made.
  """
  slot = jnp.arange(budget)

  def one(score, first, end):
    split = jnp.maximum(end - local, first)  # what follows is taken anyway
    inside = jnp.clip(bounds, first, split)
    start, length = inside[:-1], jnp.diff(inside)
    order = jnp.argsort(-score, stable=True)
    before = jnp.cumsum(length[order]) - length[order]
    taken = jnp.zeros_like(length).at[order].set(jnp.clip(budget - local - before, 0, length[order]))
    upto = jnp.cumsum(taken)
    chunk = jnp.searchsorted(upto, slot, side="right")
    chosen = (start - upto + taken)[chunk] + slot
    index = jnp.where(slot < upto[-1], chosen, split + slot - upto[-1])
    index = jnp.where(slot < sink, first + slot, index)
    counts = slot < upto[-1] + end - split
    return jnp.where(counts, index, 0), counts

  return jax.vmap(one)(scores, first, jnp.maximum(end, first))


def attend_gathered(q, k, v, index, counts, *, block: int, window: int | None = None, groups: int = 4):
  """Causal attention of every block of queries over its own keys, which are copied for one group of blocks at a time.

  Args:
    q, k, v: (batch, time, heads, head_dim), all of the same positions; blocks are of `block` queries, in order.
    index, counts: (batch, blocks, budget) each, from `select_keys`; window: as in `AttentionFn`.
    groups: more of them take less memory.

  Returns:
    Attention like q; of queries that see none of their keys it means nothing.
  """
  batch, time, heads, size = q.shape
  blocks, budget = index.shape[1:]
  groups = min(groups, blocks)
  each = -(-blocks // groups)
  pad = lambda a, count: jnp.pad(a, ((0, 0), (0, count - a.shape[1]), *[(0, 0)] * (a.ndim - 2)))
  split = lambda a: jnp.moveaxis(pad(a, groups * each).reshape(batch, groups, each, *a.shape[2:]), 1, 0)
  tiles = pad(q, blocks * block).reshape(batch, blocks, block, heads, size)

  def one(group):
    q, index, counts, first = group
    take = lambda a: jnp.take_along_axis(a, index.reshape(batch, -1)[..., None, None], axis=1).reshape(
      batch * each, budget, *a.shape[2:]
    )
    at = (first[..., None] + jnp.arange(block))[..., None]
    see = counts[:, :, None] & (index[:, :, None] <= at)
    if window is not None:
      see &= index[:, :, None] >= at - window
    mask = see.reshape(batch * each, 1, block, budget)
    rows = q.reshape(batch * each, block, heads, size)
    return jax.nn.dot_product_attention(rows, take(k), take(v), mask=mask, implementation="xla")

  first = jnp.broadcast_to(block * jnp.arange(blocks), (batch, blocks))
  out = jax.lax.map(one, jax.tree.map(split, (tiles, index, counts, first)))
  out = jnp.moveaxis(out.reshape(groups, batch, each, block, heads, size), 0, 1)
  return out.reshape(batch, -1, heads, size)[:, :time]


class Plan(NamedTuple):
  """What the rules of this module have in common, static; checked by `_method`.

  Attributes:
    budget: keys of a block of `block` queries; local, sink: as in `select_keys`.
    instruction: last tokens of a prompt whose queries see everything; groups: as in `attend_gathered`.
  """

  budget: int
  block: int
  local: int
  sink: int
  instruction: int
  groups: int


def dhsa(
  boundaries: Callable,
  *,
  budget: int = 2048,
  block: int = 128,
  beta: int = 8,
  theta: float = 1.1,
  apart: int = 8,
  local: int = 128,
  sink: int = 128,
  instruction: int = 64,
  pooling: str = "sqrt",
  share: bool = True,
  share_masks: bool = False,
  per_head: bool = False,
  groups: int = 4,
) -> paged.Method:
  """The method for a paged cache whose chunk holds the whole prompt; decoding is dense.

  On layers with a window a block may take what any of its queries sees.

  Args:
    boundaries: the score of `dhsa_boundaries`: `BoundaryPredictor.score`, `attention_ratio` (labels as an oracle),
      `evenly` or `randomly`.
    beta: chunks a block at most: length // block * beta in a row.
    theta, apart: as in `select_boundaries`.
    budget, block, local, sink, instruction, groups: as in `Plan`; pooling: as in `chunk_means`.
    share: the first layer's boundaries serve all layers.
    share_masks: what the first of two layers chooses serves the second, too: of those with a window and of those
      without, each by themselves.
    per_head: every key head chooses by its own queries and keys, which is not the published method: heads of different
      phase may cancel in the mean over all of them.

  Raises:
    InputError: sizes that do not fit each other: local < block (queries would not see themselves) or
      local + sink > budget.
  """
  require_choice("pooling", pooling, POOLING)
  require_counts(beta=beta)
  plan = Plan(budget, block, local, sink, instruction, groups)
  most = lambda time: max(1, time // block * beta)

  def empty(config, *, batch, capacity, page, dtype):
    return jnp.zeros((batch, most(capacity) + 2), jnp.int32) if share else ()

  def chunks(q, k, view: paged.View):
    score = boundaries(q, k, view.lengths, view.window)
    how = dict(most=most(q.shape[1]), theta=theta, apart=apart, instruction=instruction)
    one = lambda score, length: select_boundaries(score, length, limit=length // block * beta, **how)
    return jax.vmap(one)(score, view.lengths)

  def score(q, k, edges, view: paged.View, memory):
    count = most(q.shape[1]) + 2
    bounds = memory[:, :count] if share and view.layer else chunks(q, k, view)
    if share and not view.layer:
      memory = memory.at[:, :count].set(bounds)
    if per_head:
      q, k = _fold(q, k.shape[2]), _fold(k, k.shape[2])
      edges, bounds = (jnp.repeat(a, len(q) // len(a), axis=0) for a in (edges, bounds))
    return bounds, jax.vmap(lambda *row: chunk_scores(*row, pooling=pooling))(q, k, edges, bounds), memory

  return _method(plan, score, empty, share_masks, per_head)


def sliding_window(
  *, budget: int = 2048, sink: int = 0, block: int = 128, instruction: int = 64, groups: int = 4
) -> paged.Method:
  """Every block sees the last tokens before its end and the first `sink` (StreamingLLM, arXiv 2309.17453).

  Raises:
    InputError: as `dhsa`.
  """

  def score(q, k, edges, view: paged.View, memory):
    bounds = jnp.stack([jnp.zeros_like(view.lengths), view.lengths], axis=1)
    return bounds, jnp.zeros((*edges[:, 1:].shape, 1)), memory

  return _method(Plan(budget, block, budget - sink, sink, instruction, groups), score)


def block_sparse(
  *,
  oracle: bool = False,
  size: int | None = None,
  budget: int = 2048,
  block: int = 128,
  instruction: int = 64,
  groups: int = 4,
) -> paged.Method:
  """Chunks of one size, by default that of the blocks of queries; the block itself is always seen.

  Args:
    oracle: score a chunk by the attention that the block really pays to it, mean over the heads, instead of by the
      product of their means. With size=1 that is the token oracle.

  Raises:
    InputError: a size that does not divide the block; as `dhsa`.
  """
  size = block if size is None else size
  require_divides("size", size, "block", block)

  def score(q, k, edges, view: paged.View, memory):
    count = -(-q.shape[1] // size)
    bounds = jnp.minimum(jnp.arange(count + 1) * size, view.lengths[:, None])
    if not oracle:
      return bounds, jax.vmap(lambda *row: chunk_scores(*row, pooling="mean"))(q, k, edges, bounds), memory
    return bounds, attention_mass(q, k, edges[:, -1], block=block, size=size, window=view.window), memory

  return _method(Plan(budget, block, block, 0, instruction, groups), score)


def attention_mass(
  q, k, end: Int[Array, "batch"], *, block: int, size: int, window: int | None = None
) -> Float[Array, "batch blocks chunks"]:
  """Attention that every block of queries pays to every `size` keys, mean over the heads; of queries before `end`."""
  batch, time = q.shape[:2]
  rest = -(-time // size) * size - time

  def mass(weight, at):
    total = jnp.where((at < end[:, None])[..., None], weight, 0).sum(axis=1)
    return jnp.pad(total, ((0, 0), (0, rest))).reshape(batch, -1, size).sum(axis=2)

  return jnp.moveaxis(map_query_blocks(mass, q, k, block=block, window=window), 0, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
  """The memory of a rule, and what layers choose for those after them.

  Attributes:
    rule: the rule's own.
    index, counts: (kinds of window, rows, blocks, budget) each, of `select_keys`.
    places: of every layer its kind of window, and whether it is the second of a pair; static.
  """

  rule: object
  index: Int[Array, "kinds rows blocks budget"]
  counts: Bool[Array, "kinds rows blocks budget"]
  places: tuple[tuple[int, bool], ...] = dataclasses.field(metadata=dict(static=True))


def _shared(plan: Plan, rule, config, *, rows: int, capacity: int) -> Shared:
  kinds = list(dict.fromkeys(config.windows))
  before = lambda layer: config.windows[:layer].count(config.windows[layer])
  places = tuple((kinds.index(window), before(layer) % 2 == 1) for layer, window in enumerate(config.windows))
  shape = (len(kinds), rows, -(-capacity // plan.block), min(plan.budget, capacity))
  return Shared(rule, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), places)


def _method(
  plan: Plan, score: Callable, empty: Callable = paged.DENSE.empty, share: bool = False, per_head: bool = False
) -> paged.Method:
  """A method from its score(q, k, edges, view, memory): (bounds (rows, chunks + 1), scores (rows, blocks, chunks),
  memory), where block m of a row has the queries edges[m] .. edges[m + 1] - 1. rows: the batch, or batch * kv_heads.
  share: as `dhsa`'s share_masks; per_head: there are batch * kv_heads rows.
  """
  require_counts(budget=plan.budget, block=plan.block, groups=plan.groups)
  require(
    min(plan.sink, plan.instruction) >= 0,
    f"sink is {plan.sink} and instruction {plan.instruction}; neither may be negative",
  )
  require(
    plan.local + plan.sink <= plan.budget,
    f"local={plan.local} and sink={plan.sink} exceed budget={plan.budget}; raise the budget",
  )
  require(
    plan.local >= plan.block,
    f"{plan.local} nearby keys and blocks of {plan.block} queries: some would not see themselves; "
    "raise local or the budget, or take smaller blocks",
  )

  def memory_of(config, *, batch, capacity, page, dtype):
    rule = empty(config, batch=batch, capacity=capacity, page=page, dtype=dtype)
    rows = batch * (config.kv_heads if per_head else 1)
    return _shared(plan, rule, config, rows=rows, capacity=capacity) if share else rule

  def chosen(q, k, edges, view: paged.View, memory):
    time = q.shape[1]
    bounds, scores, memory = score(q, k, edges, view, memory)
    oldest = edges[:, :-1] - (time if view.window is None else view.window)
    how = dict(budget=min(plan.budget, time), local=min(plan.local, time), sink=min(plan.sink, time))
    choose = jax.vmap(lambda *row: select_keys(*row, **how))
    heads = len(scores) // len(q)
    first, end = (jnp.repeat(a, heads, axis=0) for a in (jnp.maximum(oldest, 0), edges[:, 1:]))
    # Scores that are no numbers say nothing about which keys matter: what is attended to is no number either.
    return *choose(scores, bounds, first, end), jnp.isnan(scores).any(axis=2), memory

  def chosen_for_two(q, k, edges, view: paged.View, memory):
    kind, second = memory.places[view.layer]
    at = (slice(edges.shape[1] - 1), slice(min(plan.budget, q.shape[1])))
    if second:
      index, counts = memory.index[kind, :, *at], memory.counts[kind, :, *at]
      return index, counts, jnp.zeros(index.shape[:2], bool), memory
    index, counts, lost, rule = chosen(q, k, edges, view, memory.rule)
    keep = lambda store, new: store.at[kind, :, *at].set(new)
    stored = dict(index=keep(memory.index, index), counts=keep(memory.counts, counts))
    return index, counts, lost, dataclasses.replace(memory, rule=rule, **stored)

  def attend(q, k, v, view: paged.View, memory):
    if q.shape[1] == 1 or jnp.ndim(view.start):  # behind the prompt
      return paged.attend_densely(q, k, v, view, memory)
    time = q.shape[1]
    start = jnp.maximum(view.lengths - plan.instruction, 0)
    blocks = -(-time // plan.block)
    edges = jnp.minimum(jnp.arange(blocks + 1) * plan.block, start[:, None])
    index, counts, lost, memory = (chosen_for_two if share else chosen)(q, k, edges, view, memory)
    heads = len(index) // len(q)
    rows = (_fold(a, heads) for a in (q, k, v))
    out = attend_gathered(*rows, index, counts, block=plan.block, window=view.window, groups=plan.groups)
    out = jnp.where(jnp.repeat(lost, plan.block, axis=1)[:, :time, None, None], jnp.nan, out)
    out = jnp.swapaxes(out.reshape(len(q), heads, time, -1, q.shape[3]), 1, 2).reshape(q.shape)
    return _attend_last(out, q, k, v, view, start, min(plan.instruction, time)), memory

  return paged.Method(attend, memory_of, whole=True)


def _fold(a: Float[Array, "batch time heads head_dim"], rows: int):
  """(batch * rows, time, heads / rows, head_dim): the heads of every row as `rows` rows of their own."""
  batch, time, _, size = a.shape
  return jnp.swapaxes(a.reshape(batch, time, rows, -1, size), 1, 2).reshape(batch * rows, time, -1, size)


def _attend_last(out, q, k, v, view: paged.View, start: Int[Array, "batch"], count: int):
  """`out` with dense attention in the rows from `start` on, `count` of them."""
  if not count:
    return out
  rows = jax.vmap(lambda a, at: jax.lax.dynamic_slice_in_dim(a, at, count))(q, start)
  dense = dot_product_attention(rows, k, v, window=view.window, start=start)
  return jax.vmap(lambda a, b, at: jax.lax.dynamic_update_slice_in_dim(a, b, at, 0))(out, dense, start)
