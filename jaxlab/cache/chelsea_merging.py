"""How Chelsea merges a head's entries: pairs of similar keys within chunks, a round at a time (arXiv 2506.11418)."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.cache.entries import Entries
from jaxlab.core.checks import require, require_choice

PARTITIONS = ("alternating", "halves", "random")
LIKENESS = ("cosine", "neighbours", "chance")


def schedule(entries: int, keep: float, chunk: int, rounds: int | None = None) -> list[tuple[int, int]]:
  """(entries of a chunk, how many of them go) of every round that leaves the share `keep` of `entries`.

  A round removes at most half: ceil(log2(1 / keep)) rounds of the same ratio, each on chunks of what is left.

  Args:
    rounds: more than these; with few of them every entry that proposes is merged, however unlike its partner is.

  Raises:
    InputError: keep outside 0 < keep <= 1, a chunk under 2, or fewer rounds than it takes.
  """
  rounds, ratio = _rounds(keep, chunk, rounds)
  made = []
  for _ in range(rounds):
    size = min(chunk, entries) // 2 * 2
    if size == 0:
      break
    removed = _removed(size, ratio)
    made.append((size, removed))
    entries -= entries // size * removed
  return made


def _rounds(keep: float, chunk: int, rounds: int | None) -> tuple[int, float]:
  """(how many rounds, the share that each leaves)."""
  require(0 < keep <= 1, f"keep is {keep}; it must lie in 0 < keep <= 1")
  require(chunk >= 2, f"chunk is {chunk}; entries are paired, so it must be at least 2")
  least = math.ceil(math.log2(1 / keep) - 1e-9)
  rounds = least if rounds is None else rounds
  require(
    rounds >= least, f"rounds is {rounds}; to keep {keep} it takes at least {least}, as each removes half at most"
  )
  return rounds, keep ** (1 / max(rounds, 1))


def _removed(size: int, ratio: float) -> int:
  return min(round((1 - ratio) * size), size // 2)


def kept(entries: int, keep: float, chunk: int, rounds: int | None = None) -> int:
  """Entries that `compress` leaves."""
  for size, removed in schedule(entries, keep, chunk, rounds):
    entries -= entries // size * removed
  return entries


def soft_match(
  keys: Float[Array, "c head_dim"],
  size: Float[Array, "c"],
  removed: int | Int[Array, ""],
  *,
  count: int | Int[Array, ""] | None = None,
  partition: str = "alternating",
  likeness: str = "cosine",
) -> Int[Array, "c"]:
  """Where every entry of a chunk goes: rows 0 .. c - removed - 1, in the order of time.

  Each entry at an even offset proposes to the one at an odd offset whose key has the largest cosine with its own; the
  `removed` best proposals are accepted. Of equal ones the first. Empty places pair among themselves, before all others.

  Args:
    count: the first entries, an even number of them, that take part; the others stay. None: all pairs.
    partition: "alternating", or for comparison "halves": the first half proposes to the second, "random": one half
      drawn by chance to the other.
    likeness: "cosine", or for comparison "neighbours": of the entries that lie as near as any, "chance": any.
  """
  c, half = len(keys), len(keys) // 2
  pairs = half if count is None else count // 2
  order = jnp.arange(c)
  if partition == "random":
    order = jnp.argsort(jnp.where(order < 2 * pairs, jax.random.uniform(jax.random.key(0), (c,)), 2.0))
  if partition == "alternating":
    a, b = order[0 : 2 * half : 2], order[1::2]
  else:
    a, b = order[:half], jnp.roll(order, -pairs)[:half]
  unit = keys.astype(jnp.float32)
  unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
  alike = jnp.matmul(unit[a], unit[b].T, precision=jax.lax.Precision.HIGHEST)
  if likeness == "neighbours":
    away = jnp.abs(a[:, None] - b)
    alike = jnp.where(away == away.min(axis=1, keepdims=True), alike, -1.5)
  elif likeness == "chance":
    # Numbers by row, so that those of the first pairs are the same in a longer chunk.
    drawn = lambda i: jax.random.uniform(jax.random.fold_in(jax.random.key(0), i), (half,))
    alike = jax.vmap(drawn)(jnp.arange(half))
  full = size > 0
  alike = jnp.where(full[a][:, None] == full[b], jnp.where(full[a][:, None], alike, 2.0), -jnp.inf)
  inside = jnp.arange(half) < pairs
  alike = jnp.where(inside[:, None] & inside, alike, -jnp.inf)
  best = jnp.argmax(alike, axis=1)
  _, ranked = jax.lax.top_k(jnp.max(alike, axis=1), half)
  gone = jnp.zeros(c, bool).at[a[ranked]].set(jnp.arange(half) < removed)
  row = jnp.cumsum(~gone) - 1
  return jnp.where(gone, row[jnp.zeros(c, jnp.int32).at[a].set(b[best])], row)


def merge(entries: Entries, row: Int[Array, "c"], count: int, *, rescale: bool = False) -> Entries:
  """The means of the entries that go to the same of `count` rows, weighted by their sizes; sizes add up.

  Args:
    rescale: keys get the mean length of those they stand for; a mean is shorter. Values stay means.
  """
  weight = jnp.where(row == jnp.arange(count)[:, None], entries.size, 0.0)
  total = weight.sum(axis=1)
  share = weight / jnp.maximum(total, 1e-30)[:, None]
  # An empty place may hold what is not a number.
  full = (entries.size > 0)[:, None]
  mean = lambda a: jnp.matmul(share, jnp.where(full, a, 0).astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
  keys = mean(entries.keys)
  if rescale:
    length = lambda a: jnp.linalg.norm(a.astype(jnp.float32), axis=1, keepdims=True)
    keys = keys * mean(length(entries.keys)) / jnp.maximum(length(keys), 1e-12)
  return Entries(keys.astype(entries.keys.dtype), mean(entries.values).astype(entries.values.dtype), total)


def error_bound(q: Float[Array, "queries head_dim"], before: Entries, after: Entries, row: Int[Array, "n"]):
  """The most that merging moves the attention of every query, float32[queries].

    |o' - o| <= (exp(2 eps) - 1) max_i |v_i|,   eps = max_i |q . (k_i - k'_row(i))| / sqrt(d),

  as every entry's weight changes by a factor between exp(-2 eps) and exp(2 eps). It holds for one head, attention by
  `attend_entries`, and centroids that are means: of entries before that stand for one token each.

  Args:
    row: where in `after` every entry of `before` went, as `soft_match` says.
  """
  moved = jnp.einsum("qd,nd->qn", q, before.keys - after.keys[row], precision=jax.lax.Precision.HIGHEST)
  eps = jnp.abs(moved).max(axis=1) / math.sqrt(q.shape[1])
  return jnp.expm1(2 * eps) * jnp.linalg.norm(before.values, axis=1).max()


def compress(
  entries: Entries,
  *,
  keep: float,
  chunk: int,
  rounds: int | None = None,
  count: Int[Array, ""] | None = None,
  partition: str = "alternating",
  likeness: str = "cosine",
  rescale: bool = False,
) -> Entries:
  """`kept(n, keep, chunk, rounds)` entries in the place of n, for one head: every round merges within chunks.

  Entries that fill no chunk pass through a round. The options are those of `soft_match` and of `merge`.

  Args:
    count: only the first of the n places hold entries, and their rounds are those of so many:
      `kept(count, keep, chunk, rounds)` come back, with empty places behind them. None: all n.

  Raises:
    InputError: an unknown option; and what `schedule` raises.
  """
  require_choice("partition", partition, PARTITIONS)
  require_choice("likeness", likeness, LIKENESS)
  match = functools.partial(soft_match, partition=partition, likeness=likeness)
  mean = functools.partial(merge, rescale=rescale)
  rounds, ratio = _rounds(keep, chunk, rounds)
  for _ in range(rounds):
    size = min(chunk, len(entries.size)) // 2 * 2
    if size == 0:
      break
    whole, removed = len(entries.size) // size * size, _removed(size, ratio)
    parts = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), entries)  # noqa: B023 (used at once)
    rows = jax.vmap(functools.partial(match, removed=removed))(parts.keys, parts.size)
    merged = jax.vmap(functools.partial(mean, count=size - removed))(parts, rows)
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), merged)
    if count is None:
      entries = jax.tree.map(lambda a, b: jnp.concatenate([a, b[whole:]]), flat, entries)  # noqa: B023
    else:
      entries, count = _with_rest(entries, flat, count, size, ratio, match, mean)
  return entries


def _with_rest(entries: Entries, merged: Entries, count, size: int, ratio: float, match: Callable, mean: Callable):
  """(entries after a round of the first `count` ones alone, how many these are), from those of all chunks of `size`.

  What follows the last whole chunk passes through, unless it is all there is: then its pairs are the chunk.
  """
  places, removed = len(entries.size), _removed(size, ratio)
  longer = lambda a: jnp.pad(a, ((0, size), *[(0, 0)] * (a.ndim - 1)))
  chunks = count // size
  pairing = jnp.where(chunks > 0, 0, count // 2 * 2)
  gone = jnp.array([_removed(n, ratio) for n in range(size + 1)])[pairing]
  rest = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(longer(a), chunks * size, size), entries)
  rest = mean(rest, match(rest.keys, rest.size, gone, count=pairing), size)
  at = chunks * (size - removed)
  left = at + count - chunks * size - gone
  # The most that any number of entries up to `places` leaves: all of them, or one short of a whole chunk.
  most = max(places - places // size * removed, (places // size - 1) * (size - removed) + size - 1)
  put = lambda a, b: jax.lax.dynamic_update_slice_in_dim(longer(a), b, at, 0)[:most]
  entries = jax.tree.map(put, merged, rest)
  return entries._replace(size=jnp.where(jnp.arange(most) < left, entries.size, 0)), left
