"""Rooted trees with weights as flat arrays: sums, leaf order, binary trees whose height no weight can change.

A tree is `parents`, with parents[0] = -1 and every parent before its children. What the methods do with a node's
children is always the same: sort them, cut the sorted list in two, go on with both halves. So a piece of work is a
range of one sorted array, and a whole generation of ranges is handled at once in NumPy.
"""

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxlab.core.checks import InputError, require
from jaxlab.core.foreign import foreign, lines

# Smallest weight over the total. Polygons keep relative precision far below it, but their areas must not underflow.
_SMALLEST_SHARE = 1e-100


class Tree(NamedTuple):
  """`weights` of all nodes: positive at the leaves, sums above."""

  parents: Int[np.ndarray, "nodes"]
  weights: Float[np.ndarray, "nodes"]


class Level(NamedTuple):
  """The cuts of one level of a binary tree: polygon `slots[i]` of the level becomes polygons 2i, 2i + 1 of the next."""

  slots: Int[np.ndarray, "cuts"]
  shares: Float[np.ndarray, "cuts 2"]


class BinTree(NamedTuple):
  """Levels of cuts, and where each node of the tree lies: (level_of, slot_of). The height H is len(levels)."""

  levels: tuple[Level, ...]
  level_of: Int[np.ndarray, "nodes"]
  slot_of: Int[np.ndarray, "nodes"]


def weighted_tree(parents: Sequence[int], weights: Sequence[float]) -> Tree:
  """Checks a tree and sums its weights upwards; `weights` is read at the leaves alone.

  Raises:
    InputError: no numbers; parents that are fractions, out of order or out of range; a leaf whose weight is not
      positive and finite, or below 1e-100 of the total.
  """
  parents, weights = _numbers("parents", parents), _numbers("weights", weights)
  whole = np.isfinite(parents) & (parents == np.round(parents))
  require(
    bool(whole.all()),
    f"node {int(np.argmin(whole))} has parent {parents.flat[int(np.argmin(whole))]}; parents are numbers of nodes, "
    "the root's -1",
  )
  parents = parents.astype(np.int64)
  check_parents(parents)
  require(
    weights.shape == parents.shape, f"{len(weights)} weights for {len(parents)} nodes; give one per node (0 for inner)"
  )
  leaf = is_leaf(parents)
  bad = leaf & ~((weights > 0) & np.isfinite(weights))
  if bad.any():
    at = int(np.argmax(bad))
    require(False, f"leaf {at} has weight {weights[at]:g}; weights must be positive and finite: drop or mend that leaf")
  weights = sum_upwards(parents, np.where(leaf, weights, 0.0))
  least = weights[leaf].min()
  require(
    bool(np.isfinite(weights[0]) and least >= _SMALLEST_SHARE * weights[0]),
    f"weights span {least:g} to a total of {weights[0]:g}; the ratio must stay above {_SMALLEST_SHARE:g}: rescale them",
  )
  return Tree(parents, weights)


def _numbers(name: str, values: Sequence) -> Float[np.ndarray, "nodes"]:
  try:
    return np.array(values, np.float64)
  except (TypeError, ValueError) as error:
    raise InputError(f"{name} are no numbers ({error}); give one for each node") from None


def tree_from_sizes(sizes: Mapping, *, drop_empty: bool = False) -> tuple[Tree, list[str]]:
  """The tree of paths with the sizes of its leaves, and each node's path "a/b/c" ("" is the root).

  Args:
    sizes: {path: size}, a path being "a/b/c", a pathlib path or a tuple of names; or nested, {"a": {"b": {"c": size}}}.
      A folder's size is the sum of what is in it: it has none of its own.
    drop_empty: leave out leaves of size 0, and folders with nothing else in them; without it they are an error.

  Raises:
    InputError: no mapping; a size that is no positive, finite number; a path that is empty, comes twice, or is a leaf
      and a folder; nothing left.
  """
  require(hasattr(sizes, "items"), f"sizes are a {type(sizes).__name__}; give {{path: size}}, e.g. dict(pairs)")
  index, parents, names, weights = {"": 0}, [-1], [""], [0.0]
  for parts, size in _leaves(sizes, ()):
    real = isinstance(size, numbers.Real)
    if drop_empty and real and size == 0:
      continue
    if not (real and 0 < size < math.inf and parts):
      raise InputError(_unfit("/".join(parts), size, real))
    at, name = 0, ""
    for part in parts:
      name = f"{name}/{part}" if name else part
      if name not in index:
        # Leaves alone have a weight yet: their folders get the sum.
        if weights[at] > 0:
          raise InputError(_both(names[at]))
        index[name] = len(parents)
        parents.append(at), names.append(name), weights.append(0.0)
      at = index[name]
    if weights[at] > 0:
      raise InputError(f"{name!r:.80} has two sizes; add them, or name one of them otherwise")
    if at < len(parents) - 1:
      raise InputError(_both(name))
    weights[at] = float(size)
  require(len(parents) > 1, "no sizes given, or none above 0; name at least one path and its size")
  return weighted_tree(parents, weights), names


def _leaves(sizes: Mapping, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
  """(names of the way from the root, size) of what lies below; an empty folder has size 0."""
  for key, size in sizes.items():
    steps = key if isinstance(key, tuple) else (key.as_posix() if isinstance(key, PurePath) else key,)
    parts = *above, *(part for part in "/".join(map(str, steps)).split("/") if part not in ("", "."))
    if isinstance(size, Mapping) and size:
      yield from _leaves(size, parts)
    else:
      yield parts, 0 if isinstance(size, Mapping) else size


def _unfit(path: str, size: object, real: bool) -> str:
  if not real:
    return f"the size of {path!r:.80} is {size!r:.40}; give a number or a nested dict"
  if not path:
    return f"a size {size:g} has an empty path; name what it is the size of"
  if size == 0:
    return f"{path!r:.80} has size 0, which has no area; drop_empty=True leaves such leaves out"
  return f"{path!r:.80} has size {size:g}; sizes must be positive and finite: drop or mend it"


def _both(path: str) -> str:
  return f"{path!r:.80} has a size and paths below it; a folder is the sum of them: name the rest, '{path:.60}/other'"


def tree_from_wordnet(path: str | Path) -> tuple[Tree, list[str]]:
  """The nouns of WordNet's data.noun, each under its first hypernym, weight 1 a leaf; names as `tree_from_sizes`.

  A line is "offset file type words(hex) word id ... pointers symbol offset pos ends ... | gloss"; indented ones are the
  licence. "@" points to a hypernym, "@i" to what the noun is an instance of.

  Raises:
    InputError: no such file, a line of another form, or hypernyms that go round in a circle.
  """
  path = Path(path)
  require(path.is_file(), f"no file {str(path)!r}; give the path of WordNet's data.noun (Debian: wordnet-base)")
  words, below, number = {}, {}, 0
  with foreign(path, "it is no entry of data.noun: fetch the file again", place=lambda: f"line {number}"):
    for number, line in lines(path):
      if line.startswith(" "):
        continue
      fields = line.split("|")[0].split()
      pointers = fields[5 + 2 * int(fields[3], 16) :]
      require(fields[0] not in words, f"{path}, line {number}: a second entry {fields[0]!r}; fetch the file again")
      words[fields[0]] = fields[4]
      above = (target for symbol, target in zip(pointers[::4], pointers[1::4], strict=False) if symbol in ("@", "@i"))
      below.setdefault(next(above, ""), []).append(fields[0])
  parents, names, queue = [-1], [""], [""]
  for at, offset in enumerate(queue):
    for child in below.get(offset, ()):
      queue.append(child), parents.append(at), names.append(f"{names[at]}/{words[child]}".strip("/"))
  require(len(queue) == len(words) + 1, f"{path}: hypernyms of {len(words) + 1 - len(queue)} nouns lead to no root")
  return weighted_tree(parents, np.ones(len(parents))), names


def check_parents(parents: Int[np.ndarray, "nodes"]) -> None:
  """Raises InputError unless parents[0] = -1 and 0 <= parents[i] < i for all others."""
  require(parents.ndim == 1 and len(parents) > 0, f"parents has shape {parents.shape}; give one parent per node")
  wrong = parents[1:] - np.arange(1, len(parents)) >= 0
  wrong |= parents[1:] < 0
  at = int(np.argmax(wrong)) + 1 if wrong.any() else 0
  require(
    parents[0] == -1 and at == 0,
    f"node {at} has parent {parents[at]}; node 0 is the root (-1) and parents come before their children: reorder them",
  )


def is_leaf(parents: Int[np.ndarray, "nodes"]) -> Bool[np.ndarray, "nodes"]:
  return np.bincount(parents[1:], minlength=len(parents)) == 0


def node_depths(parents: Int[np.ndarray, "nodes"]) -> Int[np.ndarray, "nodes"]:
  """Edges to the root, by pointer doubling: O(n log depth)."""
  depth, up = (parents >= 0).astype(np.int64), parents.copy()
  while (up >= 0).any():
    depth += np.where(up >= 0, depth[up], 0)
    up = np.where(up >= 0, up[up], -1)
  return depth


def generations(parents: Int[np.ndarray, "nodes"]) -> list[Int[np.ndarray, "some"]]:
  """The nodes of depth 0, 1, 2, ..."""
  depth = node_depths(parents)
  order = np.argsort(depth, kind="stable")
  return np.split(order, np.cumsum(np.bincount(depth))[:-1])


def sum_upwards(parents: Int[np.ndarray, "nodes"], values: np.ndarray) -> np.ndarray:
  """values[v] plus the values of everything below v; sums of positive numbers stay precise however uneven they are."""
  total = values.copy()
  for nodes in reversed(generations(parents)[1:]):
    np.add.at(total, parents[nodes], total[nodes])
  return total


class Children(NamedTuple):
  """Children of v, by falling key: order[first[v]:last[v]]. The root alone is the range that ends `order`."""

  order: Int[np.ndarray, "nodes"]
  first: Int[np.ndarray, "nodes"]
  last: Int[np.ndarray, "nodes"]


def sorted_children(parents: Int[np.ndarray, "nodes"], key: np.ndarray) -> Children:
  """All child lists in one array, each by falling `key`, ties by node number."""
  order = 1 + np.lexsort((-key[1:], parents[1:]))
  bounds = np.searchsorted(parents[order], np.arange(len(parents) + 1))
  return Children(np.concatenate([order, [0]]), bounds[:-1], bounds[1:])


def range_positions(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The positions of all ranges [start, stop) one after the other, and where each begins there."""
  length = stop - start
  begin = np.cumsum(length) - length
  return np.repeat(start - begin, length) + np.arange(length.sum()), begin


def range_sums(values: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
  """sum(values[start:stop]) for every non-empty range, each added on its own: no difference of prefix sums."""
  positions, begin = range_positions(start, stop)
  return np.add.reduceat(values[positions], begin) if len(begin) else np.zeros(0)


def first_third(values: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
  """The end of the shortest prefix of each range (length >= 2) that holds a third of its sum.

  With values falling, either the first entry alone holds a third, or both parts hold at most two thirds.
  """
  positions, begin = range_positions(start, stop)
  sums = np.repeat(np.add.reduceat(values[positions], begin), stop - start)
  # Every range is scaled to 1, so that range k covers [k, k + 1] of one running sum and small ranges stay precise.
  running = np.cumsum(values[positions] / sums)
  cut = start + 1 + np.searchsorted(running, np.arange(len(start)) + 1 / 3 - 1e-12) - begin
  return np.clip(cut, start + 1, stop - 1)


def binarise(tree: Tree) -> BinTree:
  """Replaces every node of many children by a binary tree over them that is balanced by LEAF COUNT.

  A child list, by falling number of leaves, is cut after the shortest prefix that holds a third of the leaves. Every
  step down then either enters a dominating child or leaves at most 2/3 of the leaves, so for n leaves

    H <= depth(T) + log_{1.5} n   whatever the weights.

  A node with one child shares that child's place. Work O(n H) in NumPy, no recursion.
  """
  parents, weights = tree
  leaves = sum_upwards(parents, is_leaf(parents).astype(np.float64))
  order, first, last = sorted_children(parents, leaves)
  level_of, slot_of = np.zeros(len(parents), np.int64), np.zeros(len(parents), np.int64)
  start, stop = np.array([len(parents) - 1]), np.array([len(parents)])
  levels: list[Level] = []
  while True:
    pending = np.flatnonzero(stop - start == 1)
    while len(pending):
      node = order[start[pending]]
      level_of[node], slot_of[node] = len(levels), pending
      start[pending], stop[pending] = first[node], last[node]
      pending = pending[last[node] - first[node] == 1]
    slots = np.flatnonzero(stop - start >= 2)
    if not len(slots):
      return BinTree(tuple(levels), level_of, slot_of)
    start, stop = start[slots], stop[slots]
    cut = first_third(leaves[order], start, stop)
    parts = np.stack([range_sums(weights[order], start, cut), range_sums(weights[order], cut, stop)], axis=1)
    levels.append(Level(slots, parts / parts.sum(axis=1, keepdims=True)))
    start, stop = np.stack([start, cut], 1).ravel(), np.stack([cut, stop], 1).ravel()
