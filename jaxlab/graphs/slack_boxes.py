"""Boxes with slack in any dimension, and ultrametrics placed in R^d by them (de Berg, Onak, Sidiropoulos 2013).

A node's box is shared out to its children so that for each child, with share = w_child / sum w,

  (1 - eps) share <= vol(child) / vol(box) <= share,    aspect <= max(aspect(root), 3, 1 / eps):

a dominant child leaves the others the most cubical box of their volume in a corner, and wastes the rest of that end
slab. The waste is relative per level: vol(v) lies in [(1 - eps)^depth(v), 1] weight(v) / weight(root).

An ultrametric, given as a tree whose inner nodes carry the diameter l(v) of their leaves, is placed by giving every
child u of v the volume W(u) that its points need together with half the distance to the others:

  A(leaf) = 0,   W(u) = (A(u)^{1/d} + omega_d^{1/d} (l(v) - l(u)) / 2)^d,   A(v) = sum_u W(u).

No embedding has less distortion than LB = max(1, max_v [2 (A(v) / omega_d)^{1/d} / l(v) - 1]). Usage:

  lows, sides = slack_boxes(weighted_tree(parents, weights), eps=0.1, root_sides=(1.0, 1.0, 1.0))
  points, bound = embed_ultrametric(Ultrametric(parents, labels), dimensions=2)
  print(distortion(points, tree) / bound)
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.graphs.weighted_trees import (
  Tree,
  check_parents,
  first_third,
  generations,
  is_leaf,
  node_depths,
  range_sums,
  sorted_children,
  sum_upwards,
)

# Rows of the distance matrix that `distortion` holds at a time.
_TILE = 256


class Ultrametric(NamedTuple):
  """A tree whose leaves are points; labels[v] is the distance of points that meet at v, 0 at the leaves."""

  parents: Int[np.ndarray, "nodes"]
  labels: Float[np.ndarray, "nodes"]


def slack_boxes(
  tree: Tree, *, eps: float = 0.1, root_sides: Sequence[float] = (1.0, 1.0)
) -> tuple[Float[np.ndarray, "nodes d"], Float[np.ndarray, "nodes d"]]:
  """(low corner, sides) of every node's box inside its parent's; eps = 0 gives exact volumes and no aspect bound.

  Raises:
    InputError: eps outside [0, 1/2]; sides that are not positive.
  """
  return _place(tree.parents, tree.weights, np.ones(len(tree.parents)), eps, root_sides)


def box_aspect(sides: Float[np.ndarray, "*boxes d"]) -> Float[np.ndarray, "*boxes"]:
  """Longest over shortest side."""
  return sides.max(axis=-1) / sides.min(axis=-1)


def embed_ultrametric(
  tree: Ultrametric, *, dimensions: int = 2, eps: float | None = None
) -> tuple[Float[np.ndarray, "points d"], float]:
  """(a point for every leaf, in the order of leaf numbers; LB, a lower bound of every embedding's distortion).

  The root's box is a cube of volume A(root). Children get boxes by W; a child's box shrinks about its centre by
  (A(u) / W(u))^{1/d} before its own children are placed in it, so that points of different children keep apart by a
  constant part of l(v). A leaf's point is the centre of its box. A deep tree is better after `round_labels`.

  Args:
    eps: slack; 1 / max(3, depth) if None, so that the loss over all levels stays below a constant.

  Raises:
    InputError: labels that do not fall towards the leaves, leaves that are not 0, dimensions < 1, bad eps.
  """
  need, share, bound = embedding_volumes(tree, dimensions)
  eps = 1 / max(3, int(node_depths(tree.parents).max())) if eps is None else eps
  shrink = (need / share) ** (1 / dimensions)
  # The root's share is what it needs: its cube is not shrunk.
  side = need[0] ** (1 / dimensions) if len(tree.parents) > 1 else 1.0
  low, sides = _place(tree.parents, share, shrink, eps, (side,) * dimensions)
  leaf = is_leaf(tree.parents)
  return low[leaf] + sides[leaf] / 2, bound


def embedding_volumes(
  tree: Ultrametric, dimensions: int
) -> tuple[Float[np.ndarray, "nodes"], Float[np.ndarray, "nodes"], float]:
  """(A, W, LB); W of the root is A of the root, 1 where that is 0.

  LB holds by Brunn-Minkowski (balls of radius l / 2 around the images of two parts are disjoint once an embedding does
  not contract) and the isodiametric inequality (a set of diameter D has volume <= omega_d (D / 2)^d).
  """
  _check_ultrametric(tree, dimensions)
  parents, labels = tree
  omega = ball_volume(dimensions)
  need, share = np.zeros(len(parents)), np.zeros(len(parents))
  for nodes in reversed(generations(parents)):
    gap = (labels[parents[nodes]] - labels[nodes]) / 2 if parents[nodes[0]] >= 0 else 0.0
    share[nodes] = (need[nodes] ** (1 / dimensions) + omega ** (1 / dimensions) * gap) ** dimensions
    if parents[nodes[0]] >= 0:
      np.add.at(need, parents[nodes], share[nodes])
  share[0] = share[0] or 1.0
  inner = labels > 0
  bounds = 2 * (need[inner] / omega) ** (1 / dimensions) / labels[inner] - 1
  return need, share, float(max(1.0, bounds.max(initial=1.0)))


def ball_volume(dimensions: int) -> float:
  """omega_d, the volume of the unit ball."""
  return math.pi ** (dimensions / 2) / math.gamma(dimensions / 2 + 1)


def round_labels(tree: Ultrametric) -> Ultrametric:
  """Labels rounded up to powers of two and edges between equal labels contracted: depth <= log2(spread) + 2.

  Distances grow by a factor below 2. Leaves keep their order.
  """
  parents, labels = tree
  rounded = np.where(labels > 0, np.exp2(np.ceil(np.log2(np.where(labels > 0, labels, 1.0)) - 1e-12)), 0.0)
  gone = np.zeros(len(parents), bool)
  gone[1:] = (rounded[1:] == rounded[parents[1:]]) & ~is_leaf(parents)[1:]
  up = parents.copy()
  for nodes in generations(parents)[1:]:
    above = up[nodes]
    up[nodes] = np.where(gone[above], up[above], above)
  number = np.cumsum(~gone) - 1
  kept = np.flatnonzero(~gone)
  return Ultrametric(np.where(up[kept] >= 0, number[up[kept]], -1), rounded[kept])


def from_linkage(merges: Float[np.ndarray, "merges 4"]) -> Ultrametric:
  """The tree of a scipy linkage matrix of n points; points are the last n nodes, in order.

  Raises:
    InputError: heights that fall or are zero (coincident points: merge them first).
  """
  merges = np.asarray(merges, np.float64)
  points = len(merges) + 1
  require(
    bool((merges[:, 2] > 0).all()), "the linkage joins coincident points (height 0); drop duplicates before linking"
  )
  parents = np.full(2 * points - 1, -1)
  # scipy's node points + i is made by merge i and the last one is the root: reversed, parents come first.
  place = np.concatenate([points - 1 + np.arange(points), np.arange(points - 1)[::-1]])
  for i, (a, b) in enumerate(merges[:, :2].astype(np.int64)):
    parents[place[[a, b]]] = place[points + i]
  return Ultrametric(parents, np.concatenate([merges[::-1, 2], np.zeros(points)]))


def distortion(points: Float[np.ndarray, "points d"], tree: Ultrametric) -> float:
  """(max over pairs of ||f(x) - f(y)|| / delta(x, y)) / (min over pairs of the same); inf if two points coincide.

  Exact over all n^2 pairs, in tiles of rows, in float64. In depth-first order delta(i, j) is the largest label met
  between neighbours i, i + 1, ..., j, so a row of distances is one running maximum.
  """
  order, between = leaf_order(tree)
  require(len(points) == len(order), f"{len(points)} points for {len(order)} leaves; give one per leaf")
  if len(order) < 2:
    return 1.0
  with jax.enable_x64(True):
    n = len(order)
    size = -(-n // _TILE) * _TILE
    rows = np.pad(np.asarray(points, np.float64)[order], ((0, size - n), (0, 0)))
    gaps = np.pad(between, (1, size - n))
    low, high = _ratio_range(jnp.asarray(rows), jnp.asarray(gaps), n)
    return float(high / low) if low > 0 else math.inf


def leaf_order(tree: Ultrametric) -> tuple[Int[np.ndarray, "points"], Float[np.ndarray, "points-1"]]:
  """(positions among the leaves in depth-first order, delta between neighbours in that order)."""
  parents, labels = tree
  leaf = is_leaf(parents)
  count = sum_upwards(parents, leaf.astype(np.int64))
  order, first, _ = sorted_children(parents, np.zeros(len(parents)))
  start = np.zeros(len(parents), np.int64)
  between = np.zeros(int(leaf.sum()) - 1)
  # The leaves of earlier siblings: a running count over all child lists, less its value where the list begins.
  running = np.concatenate([[0], np.cumsum(count[order[:-1]])])
  before = np.zeros(len(parents), np.int64)
  listed = order[:-1]
  before[listed] = running[:-1] - running[first[parents[listed]]]
  for nodes in generations(parents)[1:]:
    start[nodes] = start[parents[nodes]] + before[nodes]
    later = nodes[before[nodes] > 0]
    between[start[later] - 1] = labels[parents[later]]
  inverse = np.empty(len(between) + 1, np.int64)
  inverse[start[leaf]] = np.arange(len(inverse))
  return inverse, between


def distance_matrix(tree: Ultrametric) -> Float[np.ndarray, "points points"]:
  """delta of all pairs, in the order of leaf numbers; for small n."""
  order, between = leaf_order(tree)
  delta = np.zeros((len(order), len(order)))
  for i in range(len(order) - 1):
    delta[order[i], order[i + 1 :]] = np.maximum.accumulate(between[i:])
  return np.maximum(delta, delta.T)


def _place(parents, weights, shrink, eps, root_sides):
  """Low corners and sides of all nodes' boxes; a node's box shrinks by `shrink` before it is shared out and recorded.

  All pending child lists of the whole tree are cut together, a round at a time.
  """
  root_sides = np.asarray(root_sides, np.float64)
  require(0 <= eps <= 0.5, f"eps is {eps}; it must lie in 0..0.5: 0.1 is usual, 0 exact")
  require(
    root_sides.ndim == 1 and len(root_sides) > 0 and bool((root_sides > 0).all() and np.isfinite(root_sides).all()),
    f"root_sides is {root_sides.tolist()}; give one positive number per dimension",
  )
  order, first, last = sorted_children(parents, weights)
  ranked = weights[order]
  nodes, dimensions = len(parents), len(root_sides)
  low, sides = np.zeros((nodes, dimensions)), np.zeros((nodes, dimensions))
  start, stop = np.array([nodes - 1]), np.array([nodes])
  corner, side = np.zeros((1, dimensions)), root_sides[None]
  while len(start):
    single = stop - start == 1
    node = order[start[single]]
    keep = side[single] * shrink[node, None]
    low[node], sides[node] = corner[single] + (side[single] - keep) / 2, keep
    inner = node[first[node] < last[node]]
    many = ~single
    cut, parts = _cut_ranges(ranked, start[many], stop[many], corner[many], side[many], eps)
    start = np.concatenate([start[many], cut, first[inner]])
    stop = np.concatenate([cut, stop[many], last[inner]])
    corner = np.concatenate([parts[0], parts[2], low[inner]])
    side = np.concatenate([parts[1], parts[3], sides[inner]])
  return low, sides


def _cut_ranges(ranked, start, stop, corner, side, eps):
  """Cuts lists of >= 2 children and their boxes in two; (where, (corner A, side A, corner B, side B))."""
  if not len(start):
    return start, (corner, side, corner, side)
  total = range_sums(ranked, start, stop)
  dominant = ranked[start] > 2 / 3 * total
  cut = np.where(dominant, start + 1, first_third(ranked, start, stop))
  share_b = range_sums(ranked, cut, stop) / total
  share_a = range_sums(ranked, start, cut) / total
  longest = np.eye(side.shape[1], dtype=bool)[np.argmax(side, axis=1)]
  side_a, side_b = np.where(longest, side * share_a[:, None], side), np.where(longest, side * share_b[:, None], side)
  slack = np.flatnonzero(dominant & (share_b < eps))
  if len(slack):
    box = _corner_box(side[slack], longest[slack], share_b[slack], eps)
    side_b[slack] = box
    side_a[slack] = np.where(longest[slack], side[slack] - box, side[slack])
  corner_b = np.where(longest, corner + side - side_b, corner)
  return cut, (corner, side_a, corner_b, side_b)


def _corner_box(side, longest, share, eps):
  """The most cubical box of `share` of the volume whose extent along the longest side is at most eps of it."""
  volume = share * side.prod(axis=1)
  box = np.minimum(side, _cubical_size(side, volume)[:, None])
  limit = eps * side[longest]
  flat = np.flatnonzero(box[longest] > limit)
  if len(flat):
    others = side[flat][~longest[flat]].reshape(len(flat), -1)
    size = _cubical_size(others, volume[flat] / limit[flat])
    box[flat] = np.where(longest[flat], limit[flat, None], np.minimum(side[flat], size[:, None]))
  return box


def _cubical_size(side: Float[np.ndarray, "boxes d"], volume: Float[np.ndarray, "boxes"]) -> Float[np.ndarray, "boxes"]:
  """c with prod_i min(side_i, c) = volume <= prod side, in closed form.

  With sides ascending and the first j of them below c: c = (volume / (s_1 .. s_j))^{1 / (d - j)}; the first j for
  which c <= s_{j+1} is the one.
  """
  ascending = np.sort(side, axis=1)
  d = side.shape[1]
  below = np.concatenate([np.ones((len(side), 1)), np.cumprod(ascending[:, :-1], axis=1)], axis=1)
  size = (volume[:, None] / below) ** (1 / (d - np.arange(d)))
  fits = size <= ascending
  # At volume = prod side rounding may leave none: all sides count.
  fits[:, -1] = True
  return np.minimum(size[np.arange(len(side)), np.argmax(fits, axis=1)], ascending[:, -1])


@functools.partial(jax.jit, static_argnames="n")
def _ratio_range(points: Float[Array, "size d"], gaps: Float[Array, "size"], n: int):
  """(least, largest) distance over delta of all pairs of the first n points; gaps[j] is delta(j - 1, j)."""
  columns = jnp.arange(len(points))

  def tile(at):
    rows = at + jnp.arange(_TILE)
    pair = (columns > rows[:, None]) & (columns < n)
    delta = jax.lax.cummax(jnp.where(pair, gaps, 0.0), axis=1)
    here = jax.lax.dynamic_slice_in_dim(points, at, _TILE)
    far = jnp.sqrt(jnp.sum((here[:, None] - points[None]) ** 2, axis=-1))
    ratio = far / jnp.where(pair, delta, 1.0)
    return jnp.min(jnp.where(pair, ratio, jnp.inf)), jnp.max(jnp.where(pair, ratio, 0.0))

  low, high = jax.lax.map(tile, jnp.arange(0, len(points), _TILE))
  return low.min(), high.max()


def _check_ultrametric(tree: Ultrametric, dimensions: int) -> None:
  parents, labels = np.asarray(tree.parents), np.asarray(tree.labels)
  check_parents(parents)
  require(dimensions >= 1, f"dimensions is {dimensions}; it must be at least 1")
  require(
    labels.shape == parents.shape and bool(np.isfinite(labels).all()),
    f"{labels.size} labels for {parents.size} nodes; give one finite number per node",
  )
  leaf = is_leaf(parents)
  at = int(np.argmax(leaf & (labels != 0)))
  require(not leaf[at] or labels[at] == 0, f"leaf {at} has label {labels[at]:g}; a point's label is 0")
  rising = np.flatnonzero(labels[1:] > labels[parents[1:]])
  require(
    len(rising) == 0,
    f"node {rising[0] + 1 if len(rising) else 0} has a larger label than its parent; labels fall towards the leaves",
  )
  require(
    bool((labels[~leaf] > 0).all()), "an inner node has label 0, so points coincide; merge them and label it above 0"
  )
