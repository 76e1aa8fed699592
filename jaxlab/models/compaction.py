"""How a method makes a sequence's cache smaller where it lies in pages: what the serving engine needs to know of it.

Entries of a sequence lie in its pages in the order of time. At certain numbers of computed tokens some of them, the
same in every layer and head, give way to fewer; those behind them move up, and whole pages become free. Which these are
is known beforehand, from the length of the prompt alone, so that one table of pages serves all layers and nothing has
to be read back. An entry may stand for several tokens: its weight in the softmax is multiplied by its size.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Compaction(NamedTuple):
  """`kept` entries take the place of `count`, those from `first` on, as soon as `at` tokens are computed.

  `room` is what the program is compiled for, at least `count`; few of them, few programs.
  """

  at: int
  first: int
  count: int
  kept: int
  room: int


class Compactor(NamedTuple):
  """A cache in pages that becomes smaller; hashable, as it is compiled into programs.

  Attributes:
    plan: tokens of a prompt, the first entries of its sequence -> an iterator over the `Compaction`s of the sequence,
      however many tokens follow, in their order. None comes before the prompt has been read.
    compact: keys and values (room, head_dim) and sizes float32[room] of a head, those past `count` zeros -> the same of
      as many entries or fewer, the first `kept` of which stay.
  """

  plan: Callable
  compact: Callable


def compact_pages(pools, table, target, numbers, *, room: int, how: Callable) -> tuple[Array, ...]:
  """The keys, values and sizes of one layer with a sequence's entries made fewer, in the pages of `target`.

  Args:
    pools: (kv_heads, pages, page, ...) each.
    table, target: int32[width], pages of the sequence before and after, page 0 where there is none: either all, or
      those from the same one on, to whose beginning `numbers` then counts.
    numbers: int32[3], (first, count, kept) of a `Compaction`; room and how: its room, and what its `Compactor` does.
  """
  first, count, kept = numbers
  rows = tuple(pool[:, table].reshape(pool.shape[0], -1, *pool.shape[3:]) for pool in pools)
  place, part = jnp.arange(rows[0].shape[1]), jnp.arange(room)
  shaped = lambda mask, a: mask.reshape(1, -1, *[1] * (a.ndim - 2))
  # What lies past the end may be no number.
  taken = (jnp.where(shaped(part < count, a), jnp.take(a, first + part, axis=1, mode="clip"), 0) for a in rows)
  made = jax.vmap(how)(*taken)

  def written(pool, row, new):
    behind = jnp.take(row, place + count - kept, axis=1, mode="clip")
    fresh = jnp.take(new.astype(row.dtype), place - first, axis=1, mode="clip")
    row = jnp.where(shaped(place < first, row), row, jnp.where(shaped(place < first + kept, row), fresh, behind))
    return pool.at[:, target].set(row.reshape(pool.shape[0], len(target), *pool.shape[2:]))

  return tuple(map(written, pools, rows, made))
