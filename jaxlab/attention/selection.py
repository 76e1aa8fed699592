"""Which blocks of keys a chunk of queries needs: published selectors, as one kind of function.

  chosen = flash_prefill(q, means, past=past, block=128)      # bool[batch, q_heads, query blocks, key blocks]

`chosen[..., i, j]`: some query of block i is to see keys of block j. Queries are those of the chunk at positions past,
past + 1, ...; keys are given for a whole cache, and those past the chunk may hold anything. past is a multiple of the
block. Layout: queries (batch, q_heads, queries, head_dim), keys (batch, kv_heads, positions, head_dim), after RoPE;
query head h reads key head h // (q_heads / kv_heads). Scores are float32.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require
from jaxlab.kernels.block_mass import block_mass

Selection = Bool[Array, "batch q_heads query_blocks key_blocks"]


def block_means(k: Float[Array, "batch kv_heads positions head_dim"], block: int):
  """Mean key of every block, float32[batch, kv_heads, positions / block, head_dim]."""
  return k.astype(jnp.float32).reshape(*k.shape[:2], -1, block, k.shape[3]).mean(axis=3)


def flash_prefill(
  q: Float[Array, "batch q_heads queries head_dim"],
  means: Float[Array, "batch kv_heads key_blocks head_dim"],
  *,
  past: Int[Array, ""] | int,
  block: int,
  alpha: float = 0.06,
  sink: int = 2,
  window: int = 4,
) -> Selection:
  """FlashPrefill's rule (as published with CompactAttention, arXiv 2605.16839): blocks near the best one of the row.

    s[i, j] = sum_t exp(z[t, j]) / sum_j' sum_t exp(z[t, j']),  z[t, j] = q[t] . means[j] / sqrt(d),

  over queries t of block i that stand at or past the last key of block j. Kept: s[i, j] >= alpha max_j s[i, j], the
  first `sink` blocks, and the `window` blocks that end with the query's own.
  """
  mass = block_mass(q, means, past=past, block=block)
  mass = jnp.where(jnp.isnan(mass), jnp.inf, mass)  # what is no number is read, and seen in the answer
  behind = blocks_behind(past, mass.shape[2], means.shape[2], block)
  near = (behind < window) | (jnp.arange(means.shape[2]) < sink)
  # What the row's sum divides by is the same on both sides.
  return ((mass >= jnp.log(alpha) + mass.max(axis=-1, keepdims=True)) | near) & (behind >= 0)


def x_attention(q, k, *, past, block: int, stride: int = 8, threshold: float = 0.9) -> Selection:
  """XAttention (arXiv 2503.16428): the mass of a block is the sum over its antidiagonals, `stride` apart.

  Kept in every row: block 0 and the diagonal, then the heaviest blocks until they hold `threshold` of the row's mass.
  """
  require(block % stride == 0, f"stride is {stride}; it must divide block={block}")
  folded = lambda x: x.astype(jnp.float32).reshape(*x.shape[:2], -1, stride, x.shape[3])
  rows, columns = folded(q)[..., ::-1, :], folded(k)
  flat = lambda x: x.reshape(*x.shape[:3], -1)
  z = grouped_products(flat(rows), flat(columns)) / (math.sqrt(q.shape[3]) * stride)
  row = past // stride + jnp.arange(z.shape[2])
  z = jnp.where(row[:, None] >= jnp.arange(z.shape[3]), z, -jnp.inf)
  weight = jax.nn.softmax(z, axis=-1)
  each = block // stride
  mass = weight.reshape(*z.shape[:2], z.shape[2] // each, each, z.shape[3] // each, each).sum(axis=(3, 5))
  behind = blocks_behind(past, mass.shape[2], mass.shape[3], block)
  forced = (behind == 0) | ((jnp.arange(mass.shape[3]) == 0) & (behind >= 0))
  return _cover(mass, threshold * mass.sum(axis=-1, keepdims=True), forced) & (behind >= 0)


PATTERNS = ("vertical_slash", "a_shape", "blocks")


def minference(
  q,
  k,
  *,
  past,
  block: int,
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
    InputError: an unknown pattern, or not one for each head.
  """
  require(len(patterns) in (0, q.shape[1]), f"{len(patterns)} patterns for {q.shape[1]} query heads; give one for each")
  require(set(patterns) <= set(PATTERNS), f"patterns are {patterns}; each must be one of {', '.join(PATTERNS)}")
  behind = blocks_behind(past, q.shape[2] // block, k.shape[2] // block, block)
  made = {
    "vertical_slash": lambda: _crossed(q, k, past, block, vertical, slash, last, sink),
    "a_shape": lambda: (jnp.arange(behind.shape[1]) * block < first) | (behind * block < local + block),
    "blocks": lambda: _best_means(q, k, block, behind, blocks),
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
  """
  score = grouped_products(q, k) / math.sqrt(q.shape[3])
  see = jnp.arange(k.shape[2]) <= past + jnp.arange(q.shape[2])[:, None]
  weight = jax.nn.softmax(jnp.where(see, score, -jnp.inf), axis=-1)
  mass = weight.reshape(*q.shape[:2], -1, block, k.shape[2] // block, block).sum(axis=(3, 5))

  def held(name):
    chosen = minference(q, k, past=past, block=block, patterns=(name,) * q.shape[1], **options)
    return jnp.where(chosen, mass, 0).sum(axis=(0, 2, 3))

  best = jnp.argmax(jnp.stack([held(name) for name in PATTERNS]), axis=0)
  return tuple(PATTERNS[i] for i in best.tolist())


def _best_means(q, k, block: int, behind, count: int):
  """The `count` blocks of the largest product of mean query and mean key, and the own one."""
  score = grouped_products(block_means(q, block), block_means(k, block))
  return largest(jnp.where(behind >= 0, score, -jnp.inf), count) | (behind == 0)


def _crossed(q, k, past, block: int, vertical: int, slash: int, last: int, sink: int):
  """The blocks that the columns and diagonals of the most attention cross."""
  columns, diagonals = _vertical_slash(q[:, :, -last:], k, past + q.shape[2] - min(last, q.shape[2]))
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


def flex_prefill(q, k, *, past, block: int, gamma: float = 0.9, tau: float = 0.1, budget: int = 1024) -> Selection:
  """FlexPrefill (arXiv 2502.20766): heads whose block means predict attention choose blocks by them, others by
  columns and diagonals; either until `gamma` of the attention is covered, with at least `budget` tokens.

  A head is of the first kind where sqrt(JSD) of the last query block's attention, true and from means, is under `tau`.
  """
  tail = q[:, :, -block:]
  columns, diagonals, weight = _vertical_slash(tail, k, past + q.shape[2] - block, weights=True)
  blocks, filled = k.shape[2] // block, (past + q.shape[2]) // block
  per_block = lambda a: a.reshape(*a.shape[:-1], blocks, block).sum(axis=-1)
  true = per_block(weight).mean(axis=2)
  means = block_means(k, block)
  known = jnp.arange(blocks) < filled
  guess = grouped_products(block_means(tail, tail.shape[2]), means)[:, :, 0] / math.sqrt(q.shape[3])
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

  pooled = block_means(q, block)
  score = grouped_products(pooled, means) / math.sqrt(q.shape[3])
  weight = jax.nn.softmax(jnp.where(behind >= 0, score, -jnp.inf), axis=-1) / score.shape[2]
  flat = weight.reshape(*weight.shape[:2], 1, -1)
  by_mass = _cover(flat, gamma, jnp.zeros(flat.shape[2:], bool)).reshape(weight.shape) | vertical_slash(least)
  return jnp.where(aware[..., None, None], by_mass, vertical_slash()) & (behind >= 0)


def grouped_products(q, k):
  """q . k of every query head with its key head, float32[batch, q_heads, queries, keys]."""
  batch, heads, queries, size = q.shape
  grouped = q.astype(jnp.float32).reshape(batch, k.shape[1], -1, queries, size)
  score = jnp.einsum("bgrqd,bgkd->bgrqk", grouped, k.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
  return score.reshape(batch, heads, queries, k.shape[2])


def blocks_behind(past, query_blocks: int, key_blocks: int, block: int):
  """How many blocks a key block lies behind the query's own; negative where it lies ahead."""
  return past // block + jnp.arange(query_blocks)[:, None] - jnp.arange(key_blocks)


def _vertical_slash(q, k, start, weights: bool = False):
  """(mass of every column, mass of every diagonal by its distance from the main one[, attention]) of these queries."""
  z, query = grouped_products(q, k) / math.sqrt(q.shape[3]), start + jnp.arange(q.shape[2])
  weight = jax.nn.softmax(jnp.where(query[:, None] >= jnp.arange(k.shape[2]), z, -jnp.inf), axis=-1)
  place = query[:, None] - jnp.arange(k.shape[2])
  along = jnp.take_along_axis(weight, jnp.broadcast_to(jnp.maximum(place, 0), weight.shape), axis=-1)
  found = weight.sum(axis=2), jnp.where(place >= 0, along, 0).sum(axis=2)
  return (*found, weight) if weights else found


def largest(mass, count: Int[Array, "*rows"] | int):
  """The `count` largest entries of the last axis; of equal ones the first."""
  return jnp.argsort(jnp.argsort(-mass, axis=-1), axis=-1) < count


def _cover(mass, enough, forced):
  """Forced entries, then the largest ones, until their sum is `enough`."""
  order = jnp.argsort(jnp.where(forced, -jnp.inf, -mass), axis=-1)
  ordered = jnp.take_along_axis(mass, order, axis=-1)
  before = jnp.cumsum(ordered, axis=-1) - ordered
  kept = jnp.take_along_axis(before < enough, jnp.argsort(order, axis=-1), axis=-1)
  return kept | forced


def _divergence(p, q):
  """Jensen-Shannon divergence of distributions over the last axis, in nats."""
  middle = (p + q) / 2
  relative = lambda a: jnp.where(a > 0, a * (jnp.log(jnp.where(a > 0, a, 1)) - jnp.log(middle)), 0).sum(axis=-1)
  return jnp.maximum((relative(p) + relative(q)) / 2, 0)
