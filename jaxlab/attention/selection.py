"""Which blocks of keys a chunk of queries needs: published selectors, as one kind of function.

  chosen = flash_prefill(q, means, past=past, block=128)      # bool[batch, q_heads, query blocks, key blocks]

`chosen[..., i, j]`: some query of block i is to see keys of block j. Queries are those of the chunk at positions past,
past + 1, ...; keys are given for a whole cache, and those past the chunk may hold anything. past is a multiple of the
block. `real`, int[batch], says how many queries of every row count, None that all do: those after them, and their keys,
are padding. They have no part in any choice, and what is chosen for blocks of nothing else means nothing. Layout:
queries (batch, q_heads, queries, head_dim), keys (batch, kv_heads, positions, head_dim), after RoPE; query head h reads
key head h // (q_heads / kv_heads). Scores are float32.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_counts, require_divides, require_none_negative
from jaxlab.kernels.block_mass import block_mass

Selection = Bool[Array, "batch q_heads query_blocks key_blocks"]


def block_means(k: Float[Array, "batch heads positions head_dim"], block: int, real: Int[Array, "batch"] | None = None):
  """Mean of every block, float32[batch, heads, positions / block, head_dim].

  Of a row its first `real` entries count, all with None; a block without any has zeros.

  Raises:
    InputError: a block that does not divide the positions.
  """
  blocks = in_blocks(k, block)
  if real is None:
    return blocks.mean(axis=3)
  counts = in_blocks(first_ones(real, k.shape[2]), block)
  return jnp.where(counts, blocks, 0).sum(axis=3) / jnp.maximum(counts.sum(axis=3), 1)


def in_blocks(a: Array, block: int) -> Float[Array, "batch heads blocks block size"]:
  """float32 entries (batch, heads, positions, size), or flags, by block."""
  require_divides("block", block, "positions", a.shape[2])
  wide = a if a.dtype == bool else a.astype(jnp.float32)
  return wide.reshape(*a.shape[:2], -1, block, a.shape[3])


def first_ones(count: Int[Array, "batch"], positions: int) -> Bool[Array, "batch 1 positions 1"]:
  """Which positions are among the first `count` of their row."""
  return jnp.arange(positions)[:, None] < count[:, None, None, None]


def all_if_none(real: Int[Array, "batch"] | None, q) -> Int[Array, "batch"]:
  return jnp.full(q.shape[0], q.shape[2]) if real is None else real


def flash_prefill(
  q: Float[Array, "batch q_heads queries head_dim"],
  means: Float[Array, "batch kv_heads key_blocks head_dim"],
  *,
  past: Int[Array, ""] | int,
  block: int,
  real: Int[Array, "batch"] | None = None,
  alpha: float = 0.06,
  sink: int = 2,
  window: int = 4,
) -> Selection:
  """FlashPrefill's rule (as published with CompactAttention, arXiv 2605.16839): blocks near the best one of the row.

    s[i, j] = sum_t exp(z[t, j]) / sum_j' sum_t exp(z[t, j']),  z[t, j] = q[t] . means[j] / sqrt(d),

  over queries t of block i that stand at or past the last key of block j. Kept: s[i, j] >= alpha max_j s[i, j], the
  first `sink` blocks, and the `window` blocks that end with the query's own.

  Raises:
    InputError: a negative alpha, sink or window.
  """
  require_none_negative(alpha=alpha, sink=sink, window=window)
  mass = block_mass(q, means, past=past, block=block, real=real)
  mass = jnp.where(jnp.isnan(mass), jnp.inf, mass)  # what is no number is read, and seen in the answer
  behind = blocks_behind(past, mass.shape[2], means.shape[2], block)
  near = (behind < window) | (jnp.arange(means.shape[2]) < sink)
  # What the row's sum divides by is the same on both sides.
  return ((mass >= jnp.log(alpha) + mass.max(axis=-1, keepdims=True)) | near) & (behind >= 0)


def x_attention(q, k, *, past, block: int, real=None, stride: int = 8, threshold: float = 0.9) -> Selection:
  """XAttention (arXiv 2503.16428): the mass of a block is the sum over its antidiagonals, `stride` apart.

  Kept in every row: block 0 and the diagonal, then the heaviest blocks until they hold `threshold` of the row's mass.
  Antidiagonals that padding cuts are sums of the products that are left.

  Raises:
    InputError: a block that does not divide queries and keys, a stride that does not divide the block, or a threshold
      outside 0 <= threshold <= 1.
  """
  _require_whole_blocks(q, k, block)
  require(stride > 0 and block % stride == 0, f"stride is {stride}; it must divide block={block}")
  require(0 <= threshold <= 1, f"threshold is {threshold}; it must lie in 0 <= threshold <= 1")
  real = all_if_none(real, q)
  folded = lambda x, count: in_blocks(jnp.where(first_ones(count, x.shape[2]), x, 0), stride)
  rows, columns = folded(q, real)[..., ::-1, :], folded(k, past + real)
  flat = lambda x: x.reshape(*x.shape[:3], -1)
  z = grouped_products(flat(rows), flat(columns)) / (math.sqrt(q.shape[3]) * stride)
  row = past // stride + jnp.arange(z.shape[2])
  z = jnp.where(row[:, None] >= jnp.arange(z.shape[3]), z, -jnp.inf)
  weight = jnp.where(first_ones(-(-real // stride), z.shape[2]), jax.nn.softmax(z, axis=-1), 0)
  each = block // stride
  mass = weight.reshape(*z.shape[:2], z.shape[2] // each, each, z.shape[3] // each, each).sum(axis=(3, 5))
  behind = blocks_behind(past, mass.shape[2], mass.shape[3], block)
  forced = (behind == 0) | ((jnp.arange(mass.shape[3]) == 0) & (behind >= 0))
  return _cover(mass, (1 - threshold) * mass.sum(axis=-1, keepdims=True), forced) & (behind >= 0)


PATTERNS = ("vertical_slash", "a_shape", "blocks")


def minference(
  q,
  k,
  *,
  past,
  block: int,
  real=None,
  vertical: int = 1000,
  slash: int = 6096,
  last: int = 64,
  sink: int = 30,
  first: int = 128,
  local: int = 4096,
  blocks: int = 100,
  patterns: tuple[str, ...] = (),
) -> Selection:
  """MInference (arXiv 2407.02490): every head by a pattern of its own, found beforehand (`minference_patterns`).

    vertical_slash  the `vertical` columns and `slash` diagonals of the largest attention of the chunk's `last` queries,
                    the first `sink` columns and the main diagonal, each in the blocks that it crosses
    a_shape         the first `first` tokens and the `local` ones before each query
    blocks          the `blocks` of the largest product of mean query and mean key, and the own one

  Args:
    patterns: of every head; none: vertical_slash for all.

  Raises:
    InputError: an unknown pattern, or not one for each head; a negative count, or no last query; a block that does not
      divide queries and keys.
  """
  _require_whole_blocks(q, k, block)
  require_none_negative(vertical=vertical, slash=slash, sink=sink, first=first, local=local, blocks=blocks)
  require_counts(last=last)
  require(len(patterns) in (0, q.shape[1]), f"{len(patterns)} patterns for {q.shape[1]} query heads; give one for each")
  require(set(patterns) <= set(PATTERNS), f"patterns are {patterns}; each must be one of {', '.join(PATTERNS)}")
  behind = blocks_behind(past, q.shape[2] // block, k.shape[2] // block, block)
  made = {
    "vertical_slash": lambda: _crossed(q, k, past, block, all_if_none(real, q), vertical, slash, last, sink),
    "a_shape": lambda: (jnp.arange(behind.shape[1]) * block < first) | (behind * block < local + block),
    "blocks": lambda: _best_means(q, k, past, block, all_if_none(real, q), behind, blocks),
  }
  shape = (*q.shape[:2], *behind.shape)
  wanted = {name: jnp.broadcast_to(made[name](), shape) for name in dict.fromkeys(patterns or PATTERNS[:1])}
  heads = [wanted[name][:, h] for h, name in enumerate(patterns)]
  return (jnp.stack(heads, axis=1) if heads else wanted["vertical_slash"]) & (behind >= 0)


def minference_patterns(q, k, *, block: int, past: int, **options) -> tuple[str, ...]:
  """The pattern of every head that holds most of the attention of these queries, of equal ones the first.

  Args:
    q, k: of a prompt to judge by, as `minference`, whose options say what each pattern may read: give those of as many
      blocks. Known where the function runs: not under jit.

  Raises:
    InputError: as `minference`.
  """
  _require_whole_blocks(q, k, block)
  score = grouped_products(q, k) / math.sqrt(q.shape[3])
  see = jnp.arange(k.shape[2]) <= past + jnp.arange(q.shape[2])[:, None]
  weight = jax.nn.softmax(jnp.where(see, score, -jnp.inf), axis=-1)
  mass = weight.reshape(*q.shape[:2], -1, block, k.shape[2] // block, block).sum(axis=(3, 5))

  def held(name):
    chosen = minference(q, k, past=past, block=block, patterns=(name,) * q.shape[1], **options)
    return jnp.where(chosen, mass, 0).sum(axis=(0, 2, 3))

  best = jnp.argmax(jnp.stack([held(name) for name in PATTERNS]), axis=0)
  return tuple(PATTERNS[i] for i in best.tolist())


def _best_means(q, k, past, block: int, real, behind, count: int):
  """The `count` blocks of the largest product of mean query and mean key, and the own one."""
  score = grouped_products(block_means(q, block, real), block_means(k, block, past + real))
  return largest(jnp.where(behind >= 0, score, -jnp.inf), count) | (behind == 0)


def _crossed(q, k, past, block: int, real, vertical: int, slash: int, last: int, sink: int):
  """The blocks that the columns and diagonals of the most attention cross."""
  columns, diagonals, _ = _vertical_slash(*_last_queries(q, last, real), k, past)
  position = jnp.arange(k.shape[2])
  columns = largest(columns, vertical) | (position < sink)
  diagonals = largest(diagonals, slash) | (position == 0)
  grouped = lambda a: a.reshape(*a.shape[:2], -1, block)
  any_column = grouped(columns).any(axis=-1)
  # Diagonal offsets d block - (block - 1) .. d block + block - 1 cross the block d blocks behind the query's.
  inside = grouped(diagonals)
  before = jnp.pad(inside[..., 1:].any(axis=-1), ((0, 0), (0, 0), (1, 0)))[..., :-1]
  crossed = inside.any(axis=-1) | before
  behind = blocks_behind(past, q.shape[2] // block, crossed.shape[2], block)
  return any_column[:, :, None] | crossed[:, :, jnp.maximum(behind, 0)]


def flex_prefill(
  q, k, *, past, block: int, real=None, gamma: float = 0.9, tau: float = 0.1, budget: int = 1024
) -> Selection:
  """FlexPrefill (arXiv 2502.20766): heads whose block means predict attention choose blocks by them, others by
  columns and diagonals; either until `gamma` of the attention is covered, with at least `budget` tokens.

  A head is of the first kind where sqrt(JSD) of the last `block` queries' attention, true and by means, is below `tau`.

  Raises:
    InputError: a gamma outside 0 < gamma <= 1, a negative tau or budget; a block that does not divide queries and keys.
  """
  _require_whole_blocks(q, k, block)
  require(0 < gamma <= 1, f"gamma is {gamma}; it must lie in 0 < gamma <= 1")
  require_none_negative(tau=tau, budget=budget)
  real = all_if_none(real, q)
  tail, place = _last_queries(q, block, real)
  columns, diagonals, weight = _vertical_slash(tail, place, k, past)
  blocks, filled = k.shape[2] // block, -(-(past + real) // block)
  counts = (place >= 0)[:, None, :, None]
  mean = lambda a: jnp.where(counts, a, 0).sum(axis=2) / jnp.maximum(counts.sum(axis=2), 1)
  per_block = lambda a: a.reshape(*a.shape[:-1], blocks, block).sum(axis=-1)
  true = mean(per_block(weight))
  means = block_means(k, block, past + real)
  known = jnp.arange(blocks) < filled[:, None, None]
  guess = grouped_products(mean(tail.astype(jnp.float32))[:, :, None], means)[:, :, 0] / math.sqrt(q.shape[3])
  guess = jax.nn.softmax(jnp.where(known, guess, -jnp.inf), axis=-1)
  aware = jnp.sqrt(_divergence(true, guess)) < tau
  behind = blocks_behind(past, q.shape[2] // block, blocks, block)
  least = max(1, budget // block)

  def kept(mass, at_least: int | None):
    """The heaviest blocks of columns or diagonals, as many as the tokens that cover gamma fill; or `at_least`."""
    ordered = jnp.sort(mass, axis=-1, descending=True)
    tokens = (jnp.cumsum(ordered, axis=-1) < gamma * mass.sum(axis=-1, keepdims=True)).sum(axis=-1) + 1
    count = jnp.maximum(tokens // block + 1, least) if at_least is None else at_least
    heavy = per_block(mass)
    return largest(heavy, jnp.broadcast_to(count, heavy.shape[:2])[..., None])

  def vertical_slash(at_least=None):
    across, along = kept(columns, at_least), kept(diagonals, at_least)
    forced = (jnp.arange(blocks) == 0) | (behind == 0)
    return across[:, :, None] | along[:, :, jnp.maximum(behind, 0)] | forced

  score = grouped_products(block_means(q, block, real), means) / math.sqrt(q.shape[3])
  weight = jax.nn.softmax(jnp.where(behind >= 0, score, -jnp.inf), axis=-1)
  weight = jnp.where(first_ones(-(-real // block), weight.shape[2]), weight, 0)
  flat = weight.reshape(*weight.shape[:2], 1, -1)
  left = (1 - gamma) * flat.sum(axis=-1, keepdims=True)
  by_mass = _cover(flat, left, jnp.zeros(flat.shape[2:], bool)).reshape(weight.shape) | vertical_slash(least)
  return jnp.where(aware[..., None, None], by_mass, vertical_slash()) & (behind >= 0)


def _require_whole_blocks(q, k, block: int):
  require_divides("block", block, "queries", q.shape[2])
  require_divides("block", block, "keys", k.shape[2])


def grouped_products(q, k):
  """q . k of every query head with its key head, float32[batch, q_heads, queries, keys]."""
  batch, heads, queries, size = q.shape
  grouped = q.astype(jnp.float32).reshape(batch, k.shape[1], -1, queries, size)
  score = jnp.einsum("bgrqd,bgkd->bgrqk", grouped, k.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
  return score.reshape(batch, heads, queries, k.shape[2])


def blocks_behind(past, query_blocks: int, key_blocks: int, block: int):
  """How many blocks a key block lies behind the query's own; negative where it lies ahead."""
  return past // block + jnp.arange(query_blocks)[:, None] - jnp.arange(key_blocks)


def _last_queries(q, count: int, real: Int[Array, "batch"]):
  """(the last `count` queries of every row that count, their places in the chunk: below 0 where there are fewer)."""
  count = min(count, q.shape[2])
  place = real[:, None] - count + jnp.arange(count)
  return jnp.take_along_axis(q, jnp.maximum(place, 0)[:, None, :, None], axis=2), place


def _vertical_slash(q, place, k, past):
  """(mass of every column, mass of every diagonal by its distance from the main one, attention) of `_last_queries`."""
  z = grouped_products(q, k) / math.sqrt(q.shape[3])
  offset = past + jnp.maximum(place, 0)[:, None, :, None] - jnp.arange(k.shape[2])
  weight = jax.nn.softmax(jnp.where(offset >= 0, z, -jnp.inf), axis=-1)
  weight = jnp.where((place >= 0)[:, None, :, None], weight, 0)
  along = jnp.take_along_axis(weight, jnp.broadcast_to(jnp.maximum(offset, 0), weight.shape), axis=-1)
  return weight.sum(axis=2), jnp.where(offset >= 0, along, 0).sum(axis=2), weight


def largest(mass, count: Int[Array, "*rows"] | int):
  """The `count` largest entries of the last axis; of equal ones the first."""
  return jnp.argsort(jnp.argsort(-mass, axis=-1), axis=-1) < count


def _cover(mass, left, forced):
  """Forced entries, then the largest ones, until the others hold no more than `left`.

  What is left is summed from its least entry: with left = 0 all that has any mass is kept, whatever the rounding.
  """
  order = jnp.argsort(jnp.where(forced, -jnp.inf, -mass), axis=-1)
  ordered = jnp.take_along_axis(mass, order, axis=-1)
  rest = jax.lax.cumsum(ordered, axis=ordered.ndim - 1, reverse=True)
  kept = jnp.take_along_axis(rest > left, jnp.argsort(order, axis=-1), axis=-1)
  return kept | forced


def _divergence(p, q):
  """Jensen-Shannon divergence of distributions over the last axis, in nats."""
  middle = (p + q) / 2
  relative = lambda a: jnp.where(a > 0, a * (jnp.log(jnp.where(a > 0, a, 1)) - jnp.log(middle)), 0).sum(axis=-1)
  return jnp.maximum((relative(p) + relative(q)) / 2, 0)
