import itertools
import math
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.cluster.hierarchy
import scipy.optimize
import scipy.spatial
from hypothesis import given
from hypothesis import strategies as st

from experiments.polygonal_partitions import embedding, files
from experiments.polygonal_partitions import polygons as polygon_part
from experiments.polygonal_partitions import trees as tree_part
from jaxlab.core.checks import InputError
from jaxlab.graphs import polygonal_partitions as polygons
from jaxlab.graphs import slack_boxes as boxes
from jaxlab.graphs import treemaps
from jaxlab.graphs.weighted_trees import (
  binarise,
  first_third,
  is_leaf,
  node_depths,
  tree_from_sizes,
  tree_from_wordnet,
  weighted_tree,
)
from tests.common import run_and_continue

BOUNDED = ("greedy", "gap", "angular")


@st.composite
def trees(draw, most=24):
  """Stars, chains and anything between, with weights over up to 24 orders of magnitude."""
  n = draw(st.integers(2, most))
  reach = draw(st.sampled_from([1, 2, 5, most]))
  parents = [-1] + [draw(st.integers(max(0, k - reach), k - 1)) for k in range(1, n)]
  span = draw(st.sampled_from([0.0, 3.0, 12.0]))
  weights = [10 ** draw(st.floats(-span, span)) for _ in range(n)]
  return weighted_tree(parents, weights)


def vertices(polygon, i):
  """Absolute vertices of polygon i of a batch."""
  return polygon.origin[i] + polygon.vertices[i, : polygon.count[i]]


def cross(a, b):
  return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


@pytest.mark.parametrize("method", BOUNDED)
@pytest.mark.parametrize("root", polygons.ROOTS)
@given(tree=trees())
def test_polygons_keep_areas_convexity_angles_and_the_aspect_bound(method, root, tree):
  """Areas to 1e-9, convex, every cut at phi or more, asp <= 10 / tan(phi/2)."""
  binary = binarise(tree)
  height = len(binary.levels)
  partition = polygons.partition(binary, method=method, root=root)
  phi = polygons.separation_bound(height, method=method, root=root)
  for separation in partition.separations:
    assert separation.min() >= phi - 1e-9
  corners = 4 if root == "square" else polygons.palette_size(height)
  for depth, level in enumerate(partition.levels):
    assert level.count.max() <= corners + depth
    metrics = polygons.measure(level)
    assert metrics.aspect.max() <= polygons.aspect_bound(height, method=method, root=root)
    assert (metrics.aspect <= 2 * metrics.diam / metrics.width * (1 + 1e-9)).all()
    rho = 5 / math.tan(min(phi, math.pi / 6) / 2)
    assert (metrics.diam / metrics.width).max() <= max(math.sqrt(2), rho)
    edges = np.roll(level.vertices, -1, axis=1) - level.vertices
    for edge, count, diam in zip(edges, level.count, metrics.diam, strict=True):
      edge = edge[:count] / diam
      assert cross(edge, np.roll(edge, -1, axis=0)).min() > -1e-9
  areas = polygons.measure(partition.of_nodes(binary)).area
  np.testing.assert_allclose(areas, tree.weights / tree.weights[0], rtol=1e-9)


def test_a_thousand_random_trees_keep_the_bounds():
  """Methods and roots in turn; weights over up to 24 orders of magnitude."""
  random = np.random.default_rng(0)
  kinds = list(itertools.product(BOUNDED, polygons.ROOTS))
  for i in range(1000):
    method, root = kinds[i % len(kinds)]
    n, reach = int(random.integers(2, 14)), int(random.integers(1, 14))
    parents = [-1, *(int(random.integers(max(0, k - reach), k)) for k in range(1, n))]
    binary = binarise(weighted_tree(parents, 10 ** random.uniform(-12, 12, n)))
    partition = polygons.partition(binary, method=method, root=root)
    kind = dict(method=method, root=root)
    phi, bound = (f(len(binary.levels), **kind) for f in (polygons.separation_bound, polygons.aspect_bound))
    assert all(separation.min() >= phi - 1e-9 for separation in partition.separations)
    assert all(polygons.measure(level).aspect.max() <= bound for level in partition.levels)


@pytest.mark.parametrize("method", polygons.METHODS)
def test_children_tile_their_parent(method):
  """The two parts of every cut lie in the parent, on two sides of a line, and their areas add up."""
  random = np.random.default_rng(0)
  parents = [-1, *(int(random.integers(max(0, k - 5), k)) for k in range(1, 24))]
  tree = weighted_tree(parents, random.lognormal(0, 3, 24))
  binary = binarise(tree)
  partition = polygons.partition(binary, method=method)
  checked = 0
  for level, parents, children in zip(binary.levels, partition.levels[:-1], partition.levels[1:], strict=True):
    area = polygons.measure(children).area
    np.testing.assert_allclose(area[::2] + area[1::2], polygons.measure(parents).area[level.slots], rtol=1e-12)
    for i, slot in enumerate(level.slots):
      whole, left, right = vertices(parents, slot), vertices(children, 2 * i), vertices(children, 2 * i + 1)
      edge = np.roll(whole, -1, axis=0) - whole
      for part in (left, right):
        assert cross(edge[:, None], part[None] - whole[:, None]).min() > -1e-14
      # The separating line: an edge of one part with the whole other part outside.
      edges = np.roll(left, -1, axis=0) - left
      outside = cross(edges[:, None], right[None] - left[:, None]).max(axis=1)
      assert outside.min() < 1e-14
      checked += 1
  assert checked == is_leaf(tree.parents).sum() - 1 > 5


def exact_low_area(corners, theta, point):
  """Area of a polygon's part whose coordinate along (sin theta, -cos theta) is at most the point's, in fractions."""
  normal = (Fraction(math.sin(theta)), Fraction(-math.cos(theta)))
  along = lambda p: normal[0] * p[0] + normal[1] * p[1]
  limit, kept = along(point), []
  for a, b in zip(corners, corners[1:] + corners[:1], strict=True):
    if along(a) <= limit:
      kept.append(a)
    if (along(a) - limit) * (along(b) - limit) < 0:
      t = (limit - along(a)) / (along(b) - along(a))
      kept.append(tuple(u + t * (v - u) for u, v in zip(a, b, strict=True)))
  twice = sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(kept, kept[1:] + kept[:1], strict=True))
  return twice / 2


@pytest.mark.parametrize("share", [0.5, 0.03, 1e-6, 1 - 1e-6, 1e-12])
@pytest.mark.parametrize("theta", [0.3, 1.2, 2.9, 0.3 + math.pi])
def test_a_cut_agrees_with_exact_arithmetic(theta, share):
  """The line found in float64 cuts off the stated area, computed in rational numbers, on the stated side."""
  corner = np.array([[0, 0], [3, -1], [4, 0.5], [3.5, 2], [1, 2.5], [-0.5, 1]])
  edges = np.roll(corner, -1, axis=0) - corner
  pad = lambda a: np.pad(a, ((0, 2),) + ((0, 0),) * (a.ndim - 1))
  with jax.enable_x64(True):
    whole = polygons.Polygon(
      np.zeros(2), pad(corner), pad(np.mod(np.arctan2(edges[:, 1], edges[:, 0]), np.pi)), np.int32(6)
    )
    left, right = jax.jit(polygons.cut)(whole, theta, np.array([share, 1 - share]))
  rational = [tuple(map(Fraction, map(float, p))) for p in corner]
  area = exact_low_area(
    rational, theta, (Fraction(100) * Fraction(math.sin(theta)), Fraction(-100) * Fraction(math.cos(theta)))
  )
  normal = np.array([math.sin(theta), -math.cos(theta)])
  small, sign = (left, 1) if share < 0.5 else (right, -1)
  points = np.asarray(small.origin + small.vertices)[: small.count]
  # Both ends of the cut are the points farthest along the normal; the middle one's line is the cut.
  end = points[np.argsort(-sign * (points @ normal))[:2]].mean(axis=0)
  cut_off = exact_low_area(rational, theta if sign > 0 else theta + math.pi, tuple(map(Fraction, map(float, end))))
  wanted = min(share, 1 - share)
  # The ends are rounded to 1e-16 of the whole: an area of s^2 keeps 1e-15 / s of its digits there.
  np.testing.assert_allclose(float(cut_off / area), wanted, rtol=1e-9 + 1e-15 / math.sqrt(wanted) * 10)
  measured = polygons.measure(jax.tree.map(lambda a: np.asarray(a)[None], small)).area[0]
  np.testing.assert_allclose(measured, wanted * float(area), rtol=1e-9)
  other = polygons.measure(jax.tree.map(lambda a: np.asarray(a)[None], right if share < 0.5 else left)).area[0]
  np.testing.assert_allclose(measured + other, float(area), rtol=1e-12)


def test_tiny_corners_keep_their_shape():
  """A chain of 20 cuts of 1e-4 each: areas of 1e-80, where absolute coordinates keep nothing."""
  tree = weighted_tree([-1, *(2 * (i // 2) for i in range(40))], [1e4 ** -(i // 2 + i % 2) for i in range(41)])
  binary = binarise(tree)
  areas = polygons.measure(polygons.partition(binary).of_nodes(binary)).area
  assert areas.min() < 1e-70
  np.testing.assert_allclose(areas, tree.weights / tree.weights[0], rtol=1e-9)


def test_metrics_of_known_polygons():
  """A square has aspect ratio 2 and width 1; a 3-4-5 triangle is as wide as its height on the 5."""
  triangle = np.array([[0, 0], [4, 0], [0, 3.0]])
  edges = np.roll(triangle, -1, axis=0) - triangle
  angles = np.mod(np.arctan2(edges[:, 1], edges[:, 0]), np.pi)
  square = polygons.root_polygon("square", 4)
  np.testing.assert_allclose(polygons.measure(polygons._batch(square)), [[1], [math.sqrt(2)], [1], [2]])
  measured = polygons.measure(polygons._batch(polygons.Polygon(np.zeros(2), triangle, angles, np.int32(3))))
  np.testing.assert_allclose(measured, [[6], [5], [2.4], [25 / 6]])


@pytest.mark.parametrize("height", [1, 2, 3, 7, 30, 61])
def test_the_palette_avoids_the_square_and_itself(height):
  """Distinct directions, each at pi / (2N) from 0 and pi/2 at least, N even (an odd palette contains pi/2)."""
  size, theta = polygons.palette_size(height), polygons.level_directions(height)
  assert size % 2 == 0 and size >= height == len(np.unique(theta))
  away = np.abs(np.mod(theta + np.pi / 4, np.pi / 2) - np.pi / 4)
  assert away.min() >= np.pi / (2 * size) - 1e-12


def test_candidates_are_the_middles_of_the_gaps():
  square = polygons.root_polygon("square", 4)
  middle, gap = polygons.candidate_thetas(*polygons.directions(jax.tree.map(np.asarray, square)))
  wide = np.asarray(gap) > 1e-6
  np.testing.assert_allclose(np.sort(np.asarray(middle)[wide]), [np.pi / 4, 3 * np.pi / 4], rtol=1e-6)
  np.testing.assert_allclose(np.asarray(gap).sum(), np.pi, rtol=1e-6)


def middles_of_gaps(polygon, i):
  """Of polygon i: the middle of every gap between its edge directions mod pi, and the gap."""
  angles = np.sort(polygon.angles[i, : polygon.count[i]])
  gaps = np.diff(angles, append=angles[0] + np.pi)
  apart = gaps > 1e-9  # parallel edges have one direction
  return (angles + gaps / 2)[apart], gaps[apart]


def test_greedy_takes_the_best_middle_of_the_gaps_that_are_wide_enough():
  """Gaps >= pi / (2 + level), both orders, least worst aspect.

  The threshold decides: a narrower gap often looks better, and the widest is often not the best of those allowed.
  """
  worst = jax.jit(jax.vmap(polygons._worst_aspect, (None, 0, None)))
  narrower, wider = 0, 0
  for tree in tree_part.random_trees(8, 30, 3):
    binary = binarise(tree)
    partition = polygons.partition(binary)
    for depth, (level, parents) in enumerate(zip(binary.levels, partition.levels[:-1], strict=True)):
      found = polygons.measure(partition.levels[depth + 1]).aspect.reshape(-1, 2).max(axis=1)
      parents = polygons._widen(parents, 32)
      for i, slot in enumerate(level.slots):
        middle, gap = middles_of_gaps(parents, slot)
        theta, gaps = np.resize([middle, middle + np.pi], 64), np.resize(gap, 64)
        with jax.enable_x64(True):
          score = np.asarray(worst(polygons.Polygon(*(part[slot] for part in parents)), theta, level.shares[i]))
        best = score[gaps >= np.pi / (2 + depth) - 1e-9].min()
        np.testing.assert_allclose(found[i], best, rtol=1e-6)
        narrower += score.min() < 0.999 * best
        wider += score[gaps == gap.max()].min() > 1.001 * best
  assert narrower > 5 and wider > 5


@pytest.mark.parametrize("root", polygons.ROOTS)
def test_every_cut_keeps_half_a_gap_from_all_edges(root):
  """Of a polygon of level d at least pi / (2 (2 + d)) with "greedy", half the widest gap with "gap".

  A circle has more directions than 2 + d: where no gap is as wide, "greedy" takes the widest too.
  """
  scarce = 0
  for tree in tree_part.random_trees(8, 40, 1):
    binary = binarise(tree)
    for method in ("greedy", "gap"):
      partition = polygons.partition(binary, method=method, root=root)
      for depth, level in enumerate(binary.levels):
        widest = np.array([middles_of_gaps(partition.levels[depth], slot)[1].max() for slot in level.slots])
        scarce += (widest < np.pi / (2 + depth) - 1e-9).sum()
        if method == "gap":
          np.testing.assert_allclose(partition.separations[depth], widest / 2, rtol=1e-9)
        else:
          assert (partition.separations[depth] >= np.minimum(np.pi / (2 + depth), widest) / 2 - 1e-9).all()
  assert (scarce > 0) == (root == "circle")


def test_the_height_of_the_binary_tree_ignores_weights():
  """H <= depth + log_1.5(leaves), and reweighting changes no cut's place."""
  random = np.random.default_rng(0)
  for tree in tree_part.random_trees(40, 200, 2):
    binary = binarise(tree)
    leaves = int(is_leaf(tree.parents).sum())
    assert len(binary.levels) <= node_depths(tree.parents).max() + math.log(leaves, 1.5) + 1e-9
    other = binarise(weighted_tree(tree.parents, random.lognormal(0, 6, len(tree.parents))))
    np.testing.assert_array_equal(binary.level_of, other.level_of)
    np.testing.assert_array_equal(binary.slot_of, other.slot_of)


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=9))
def test_the_shorter_prefix_with_a_third(values):
  values = np.sort(values)[::-1]
  cut = int(first_third(values, np.array([0]), np.array([len(values)]))[0])
  total = values.sum()
  assert cut == 1 or values[: cut - 1].sum() < total / 3 * (1 + 1e-9)
  assert values[:cut].sum() >= total / 3 * (1 - 1e-9) or cut == len(values) - 1
  assert values[0] > 2 / 3 * total or max(values[:cut].sum(), values[cut:].sum()) <= 2 / 3 * total * (1 + 1e-9)


def test_the_order_of_siblings_does_not_change_areas_or_the_order_of_sizes():
  """Permuting siblings leaves every node's area as it is."""
  weights = np.random.default_rng(0).lognormal(0, 4, 12)
  shuffle = np.random.default_rng(1).permutation(12)
  area = lambda w: polygons.measure(polygons.partition(b := binarise(tree_part.star(w))).of_nodes(b)).area[1:]
  np.testing.assert_allclose(area(weights)[shuffle], area(weights[shuffle]), rtol=1e-12)


def test_nodes_of_one_child_share_its_polygon():
  tree = weighted_tree([-1, 0, 1, 2, 2], [0, 0, 0, 1, 3])
  binary = binarise(tree)
  nodes = polygons.partition(binary).of_nodes(binary)
  np.testing.assert_allclose(nodes.vertices[0], nodes.vertices[2])
  assert len(binary.levels) == 1
  single = weighted_tree([-1], [2.0])
  assert polygons.partition(binarise(single)).of_nodes(binarise(single)).count.tolist() == [4]


def test_polygons_stay_fat_where_axis_parallel_cuts_do_not():
  """The sheet's caterpillar with sides 1e-3 .. 1e-9: tens for the bounded methods, 1e6 and more for axis cuts."""
  tree = tree_part.caterpillar(10 ** -np.random.default_rng(0).uniform(3, 9, 14))
  aspect = polygon_part.worst_aspects(tree)
  assert max(aspect[m] for m in BOUNDED) < 80 and aspect["greedy"] < 30
  assert min(aspect[m] for m in ("axes", "slice-and-dice", "squarified", "exact split")) > 1e6


def test_angular_grows_linearly_on_caterpillars():
  """Worst aspect in proportion to H, at 1.27 H or less."""
  worst = {}
  for n in (30, 60, 120):
    partition = polygons.partition(binarise(tree_part.caterpillar(np.full(n, 0.3))), method="angular")
    worst[n] = float(polygon_part.level_metrics(partition).aspect.max()) / n
  assert max(worst.values()) <= 1.28 and max(worst.values()) / min(worst.values()) < 1.1


@pytest.mark.parametrize("eps", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_slack_boxes_keep_aspect_volume_and_place(eps, dimensions):
  """The slack theorem: aspect <= max(root, 3, 1/eps), (1 - eps)^depth <= volume / share <= 1, disjoint and inside."""
  for k, tree in enumerate(tree_part.random_trees(60, 30, dimensions)):
    root = np.random.default_rng(k).uniform(1, 1 / eps, dimensions)
    low, sides = boxes.slack_boxes(tree, eps=eps, root_sides=root)
    limit = max(boxes.box_aspect(root), 3, 1 / eps)
    assert boxes.box_aspect(sides).max() <= limit * (1 + 1e-9)
    ratio = sides.prod(axis=1) / root.prod() / (tree.weights / tree.weights[0])
    assert ratio.max() <= 1 + 1e-9
    assert (ratio >= (1 - eps) ** node_depths(tree.parents) * (1 - 1e-9)).all()
    up = tree.parents[1:]
    assert (low[1:] >= low[up] - 1e-12).all() and (low[1:] + sides[1:] <= (low[up] + sides[up]) * (1 + 1e-12)).all()
    for node in range(len(tree.parents)):
      children = np.flatnonzero(tree.parents == node)
      a, b = low[children], low[children] + sides[children]
      apart = (b[:, None] <= a[None] + 1e-12) | (b[None] <= a[:, None] + 1e-12)
      assert (apart.any(axis=-1) | np.eye(len(children), dtype=bool)).all()


def test_no_slack_is_exact():
  tree = tree_part.star(np.random.default_rng(0).lognormal(0, 5, 30))
  _, sides = boxes.slack_boxes(tree, eps=0.0)
  np.testing.assert_allclose(sides.prod(axis=1), tree.weights / tree.weights[0], rtol=1e-12)
  assert boxes.box_aspect(sides).max() > 10 >= boxes.box_aspect(boxes.slack_boxes(tree, eps=0.1)[1]).max()


def test_the_cubical_size_solves_its_equation():
  side = np.random.default_rng(0).lognormal(0, 2, (200, 4))
  volume = side.prod(axis=1) * np.random.default_rng(1).uniform(1e-9, 1, 200)
  size = boxes._cubical_size(side, volume)
  np.testing.assert_allclose(np.minimum(side, size[:, None]).prod(axis=1), volume, rtol=1e-12)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("spread", [2, 9, 16])
def test_no_embedding_beats_the_lower_bound(dimensions, spread):
  """LB <= distortion, of boxes and of any other placement."""
  tree = embedding.random_ultrametric(60, spread, np.random.default_rng(dimensions))
  points, bound = boxes.embed_ultrametric(tree, dimensions=dimensions)
  found = boxes.distortion(points, tree)
  assert bound * (1 - 1e-6) <= found <= 20 * bound
  anything = np.random.default_rng(0).normal(size=points.shape)
  assert boxes.distortion(anything, tree) >= bound
  if dimensions == 1:  # on the line the boxes are optimal
    np.testing.assert_allclose(found, bound, rtol=1e-6)


def test_tiled_distortion_is_the_ratio_over_all_pairs():
  """More points than a tile; distances from each pair's lowest common ancestor."""
  tree = embedding.random_ultrametric(300, 8, np.random.default_rng(3))
  points = np.random.default_rng(0).normal(size=(300, 2))
  leaves = np.flatnonzero(is_leaf(tree.parents))
  above = {}
  for leaf in leaves.tolist():
    chain = [leaf]
    while tree.parents[chain[-1]] >= 0:
      chain.append(int(tree.parents[chain[-1]]))
    above[leaf] = chain
  delta = np.zeros((300, 300))
  for i, a in enumerate(leaves.tolist()):
    seen = set(above[a])
    for j, b in enumerate(leaves.tolist()):
      delta[i, j] = 0 if i == j else tree.labels[next(v for v in above[b] if v in seen)]
  np.testing.assert_array_equal(boxes.distance_matrix(tree), delta)
  pairs = np.triu_indices(300, 1)
  ratio = np.linalg.norm(points[:, None] - points[None], axis=-1)[pairs] / delta[pairs]
  np.testing.assert_allclose(boxes.distortion(points, tree), ratio.max() / ratio.min(), rtol=1e-10)


def equilateral(n):
  return boxes.Ultrametric(np.array([-1] + [0] * n), np.array([2.0] + [0.0] * n))


def test_small_ultrametrics_against_brute_force():
  """Two points: distortion 1. n equidistant points on a line: n - 1, attained. Four in the plane: sqrt 2 (search)."""
  for dimensions in (1, 2, 3):
    points, bound = boxes.embed_ultrametric(equilateral(2), dimensions=dimensions)
    assert bound == 1 and boxes.distortion(points, equilateral(2)) == pytest.approx(1)
  for n in (3, 5):
    points, bound = boxes.embed_ultrametric(equilateral(n), dimensions=1)
    assert bound == pytest.approx(n - 1) == boxes.distortion(points, equilateral(n))
  tree, random = equilateral(4), np.random.default_rng(0)
  starts = [random.normal(size=8) for _ in range(3)]
  value = lambda x: (lambda far: far.max() / far.min())(scipy.spatial.distance.pdist(x.reshape(4, 2)))
  best = min(scipy.optimize.minimize(value, x, method="Nelder-Mead").fun for x in starts)
  points, bound = boxes.embed_ultrametric(tree, dimensions=2)
  assert best == pytest.approx(math.sqrt(2), rel=1e-2)
  assert bound <= best and boxes.distortion(points, tree) >= best * (1 - 1e-2)


def test_slack_helps_a_star_with_outliers():
  """Outliers of volume 1/N: exact rectangles push them into slivers."""
  tree = embedding.star_with_outliers(200)
  slack, bound = boxes.embed_ultrametric(tree, dimensions=2, eps=0.1)
  exact, _ = boxes.embed_ultrametric(tree, dimensions=2, eps=0.0)
  assert bound == pytest.approx(math.sqrt(200) - 1, rel=0.05)
  assert bound < boxes.distortion(slack, tree) < 0.7 * boxes.distortion(exact, tree)


def test_rounded_labels_stay_within_a_factor_of_two_and_make_the_tree_shallow():
  parents = np.arange(-1, 40)
  deep = boxes.Ultrametric(
    np.concatenate([parents, np.arange(40)]), np.concatenate([1.1 ** -np.arange(41.0), [0.0] * 40])
  )
  deep.labels[40] = 0.0
  rounded = boxes.round_labels(deep)
  spread = math.log2(1.1**39)
  assert node_depths(rounded.parents).max() <= spread + 2 < node_depths(deep.parents).max()
  before, after = boxes.distance_matrix(deep), boxes.distance_matrix(rounded)
  pairs = ~np.eye(len(before), dtype=bool)
  assert (after[pairs] >= before[pairs] * (1 - 1e-9)).all() and (after[pairs] < 2 * before[pairs]).all()


def test_a_linkage_becomes_its_cophenetic_distances():
  points = np.random.default_rng(0).normal(size=(25, 3))
  merges = scipy.cluster.hierarchy.linkage(points, "single")
  delta = boxes.distance_matrix(boxes.from_linkage(merges))
  np.testing.assert_allclose(delta[np.triu_indices(25, 1)], scipy.cluster.hierarchy.cophenet(merges))


def test_squarified_is_the_published_example():
  """Areas 6 6 4 3 2 2 1 in a 6 x 4 rectangle (Bruls et al. 2000, figure 4)."""
  _, sides = treemaps.squarify_row_by_row([6, 6, 4, 3, 2, 2, 1], 0, 0, 6, 4)
  expected = [(3, 2), (3, 2), (12 / 7, 7 / 3), (9 / 7, 7 / 3), (6 / 5, 5 / 3), (6 / 5, 5 / 3), (3 / 5, 5 / 3)]
  np.testing.assert_allclose(sides, expected)


def test_slices_turn_at_every_depth():
  low, sides = treemaps.slice_and_dice(weighted_tree([-1, 0, 0, 1, 1], [0, 0, 1, 2, 1]))
  np.testing.assert_allclose(low, [[0, 0], [0, 0], [0.75, 0], [0, 0], [0, 2 / 3]])
  np.testing.assert_allclose(sides, [[1, 1], [0.75, 1], [0.25, 1], [0.75, 2 / 3], [0.75, 1 / 3]])


@pytest.mark.parametrize("treemap", [treemaps.slice_and_dice, treemaps.squarified])
def test_rectangular_baselines_have_exact_areas_inside_their_parents(treemap):
  for tree in tree_part.random_trees(12, 30, 5):
    low, sides = treemap(tree)
    np.testing.assert_allclose(sides.prod(axis=1), tree.weights / tree.weights[0], rtol=1e-6)
    up = tree.parents[1:]
    assert (low[1:] >= low[up] - 1e-9).all() and (low[1:] + sides[1:] <= low[up] + sides[up] + 1e-9).all()


def test_mds_is_isometric_in_enough_dimensions_and_stress_descent_improves_on_it():
  tree = embedding.random_ultrametric(20, 3, np.random.default_rng(0))
  delta = boxes.distance_matrix(tree)
  assert boxes.distortion(treemaps.classical_mds(delta, 19), tree) == pytest.approx(1, abs=1e-6)
  flat = boxes.distortion(treemaps.classical_mds(delta, 2), tree)
  assert boxes.distortion(treemaps.stress_descent(delta, 2, steps=200), tree) < flat
  assert treemaps.random_projection(delta, 2, 0).shape == (20, 2)


def test_paths_make_a_tree():
  tree, names = tree_from_sizes({"a/x": 1, "a/y": 2, "b": 4})
  assert dict(zip(names, tree.weights.tolist(), strict=True)) == {"": 7, "a": 3, "a/x": 1, "a/y": 2, "b": 4}
  binary = binarise(tree)
  picture = polygons.svg(polygons.partition(binary).of_nodes(binary), ["#123456"] * 5)
  assert picture.startswith("<svg") and picture.count("<polygon") == 5


@pytest.mark.parametrize(
  "sizes",
  [
    {"a/x/1": 1, "a/y": 2, "b": 4},
    {"/a/x/1": 1, "a//y/": 2, "./b": 4},
    {Path("a/x/1"): 1, Path("/a/y"): np.int64(2), Path("b"): np.float32(4)},
    {("a", "x", 1): 1, ("a", "y"): 2, ("b",): 4},
    {"a": {"x": {1: 1}, "y": 2}, "b": 4},
    {"a": {Path("x/1"): 1}, Path("a"): {"y": 2}, "b": 4},
    pd.Series([1, 2, 4], index=["a/x/1", "a/y", "b"]),
  ],
)
def test_paths_come_in_many_forms(sizes):
  tree, names = tree_from_sizes(sizes)
  weights = {"": 7, "a": 3, "a/x": 1, "a/x/1": 1, "a/y": 2, "b": 4}
  assert dict(zip(names, tree.weights.tolist(), strict=True)) == weights


def test_empty_leaves_are_left_out_where_asked_for():
  """With folders that hold nothing else, and names that are folders as well."""
  sizes = {"a": 0, "a/x": 3, "b/c/d": 0.0, "e": {}, "f": {"g": {"h": 0}, "i": 1}}
  tree, names = tree_from_sizes(sizes, drop_empty=True)
  assert dict(zip(names, tree.weights.tolist(), strict=True)) == {"": 4, "a": 3, "a/x": 3, "f": 1, "f/i": 1}


def test_an_empty_file_in_a_folder_has_no_polygon(tmp_path):
  (tmp_path / "a").mkdir()
  for name, text in (("a/b", "x"), ("a/c", ""), ("d", "yy"), ("e", "")):
    (tmp_path / name).write_text(text)
  assert files.file_sizes("directory", str(tmp_path)) == ({"a/b": 1.0, "d": 2.0}, tmp_path)
  sizes = {p: p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()}
  with pytest.raises(InputError, match="has size 0, which has no area; drop_empty=True"):
    tree_from_sizes(sizes)
  assert len(tree_from_sizes(sizes, drop_empty=True)[1]) == 3 + len(tmp_path.parts)


def test_polygons_are_measured_a_few_at_a_time(monkeypatch):
  """10,000 leaves: no call sees more than a chunk, and the numbers are those of each polygon alone."""
  seen, measure = [], polygons._measure
  monkeypatch.setattr(polygons, "_measure", lambda p: (seen.append(len(p.count)), measure(p))[1])
  tree = weighted_tree([-1, *range(99), *np.repeat(np.arange(100), 100)], np.arange(1, 10_101))
  binary = binarise(tree)
  shapes = polygons.partition(binary, method="angular").of_nodes(binary)
  metrics = polygons.measure(shapes)
  assert max(seen) == polygons._CHUNK and sum(seen) < 2 * polygons._CHUNK + 10_100
  np.testing.assert_allclose(metrics.area, tree.weights / tree.weights[0], rtol=1e-9)
  for at in (0, 99, 4096, 10_099):
    alone = polygons.measure(polygons.Polygon(*(part[at : at + 1] for part in shapes)))
    np.testing.assert_allclose([m[at] for m in metrics], np.ravel(alone), rtol=1e-12)


@pytest.mark.slow
def test_a_tree_of_a_million_leaves_is_drawn_and_measured():
  """10^4 folders, from paths to right areas within the bound; its boxes too. Distances of all vertices were 4 GB."""
  weights = np.random.default_rng(0).lognormal(0, 3, 10**6).tolist()
  tree, names = tree_from_sizes({f"{i // 100}/{i}": weight for i, weight in enumerate(weights)})
  assert len(names) == 1 + 10**4 + 10**6
  binary = binarise(tree)
  measured = polygons.measure(polygons.partition(binary, method="angular").of_nodes(binary))
  np.testing.assert_allclose(measured.area, tree.weights / tree.weights[0], rtol=1e-9)
  assert measured.aspect.max() <= polygons.aspect_bound(len(binary.levels), method="angular")
  sides = boxes.slack_boxes(tree, eps=0.1)[1]
  assert boxes.box_aspect(sides).max() <= 10 * (1 + 1e-9)


def test_nouns_hang_under_their_first_hypernym(tmp_path):
  """Two hypernyms: the first; an instance; two words, the first; a pointer to a verb; the licence's lines."""
  file = tmp_path / "data.noun"
  file.write_text(
    "  1 This is the licence.\n"
    "00000001 03 n 01 entity 0 001 ~ 00000002 n 0000 | all\n"
    "00000002 03 n 02 thing 0 item 1 002 + 00000009 v 0101 @ 00000001 n 0000 | a | thing\n"
    "00000003 03 n 01 place 0 001 @ 00000001 n 0000 | where\n"
    "00000004 15 n 01 Rome 0 002 @i 00000003 n 0000 @ 00000002 n 0000 | a city\n"
    "00000005 06 n 01 stone 0 002 @ 00000002 n 0000 @ 00000003 n 0000 | hard\n"
  )
  tree, names = tree_from_wordnet(file)
  weights = dict(zip(names, tree.weights.tolist(), strict=True))
  assert weights == {
    "": 2, "entity": 2, "entity/thing": 1, "entity/place": 1, "entity/thing/stone": 1, "entity/place/Rome": 1
  }  # fmt: skip
  file.write_text("00000001 03 n 01 hen 0 001 @ 00000002 n 0000 |\n00000002 03 n 01 egg 0 001 @ 00000001 n 0000 |\n")
  with pytest.raises(InputError, match="of 2 nouns lead to no root"):
    tree_from_wordnet(file)
  file.write_text("words\n")
  with pytest.raises(InputError, match=r"line 1: .* is no entry of data\.noun"):
    tree_from_wordnet(file)


def test_the_experiment_runs_and_continues(tmp_path, monkeypatch):
  measures = [f"embedding.{name}" for name in ("check_slack", "check_embeddings", "embed_files")]
  measures += ["polygons.check_bounds", "polygons.compare_skewed", "files.measure", "speed.measure"]
  report = run_and_continue("polygonal_partitions", tmp_path, monkeypatch, *measures)
  assert len(report.claims) > 10 and len(report.figures) == 4
  assert "<polygon" in (tmp_path / "treemap.svg").read_text()
  bounds = [c for c in report.claims if "over its" in c.name and "bound" in c.name]
  assert len(bounds) == 3 and all(c.holds for c in bounds)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: weighted_tree([-1, 0, 0], [0, 1, 0]), "leaf 2 has weight 0; weights must be positive"),
    (lambda: weighted_tree([-1, 0, 0], [0, 1, -3]), "leaf 2 has weight -3"),
    (lambda: weighted_tree([-1, 0], [0, math.nan]), "leaf 1 has weight nan"),
    (lambda: weighted_tree([-1, 0, 0], [0, 1, 1e-200]), "ratio must stay above"),
    (lambda: weighted_tree([-1, 2, 0], [0, 1, 1]), "node 1 has parent 2; node 0 is the root"),
    (lambda: weighted_tree([0, 0], [1, 1]), "node 0 has parent 0"),
    (lambda: weighted_tree([-1, 0], [1]), "1 weights for 2 nodes"),
    (lambda: weighted_tree([-1, 0.5, 0], [0, 1, 1]), "node 1 has parent 0.5; parents are numbers of nodes"),
    (lambda: weighted_tree([math.nan, 0], [0, 1]), "node 0 has parent nan; .* the root's -1"),
    (lambda: weighted_tree([None, "a"], [0, 1]), "parents are no numbers"),
    (lambda: weighted_tree([-1, 0], [0, "big"]), "weights are no numbers .*big"),
    (lambda: tree_from_sizes([("a", 1)]), r"sizes are a list; give \{path: size\}"),
    (lambda: polygons.partition(binarise(tree_part.star([1, 2])), method="magic"), "method is 'magic'"),
    (lambda: polygons.partition(binarise(tree_part.star([1, 2])), root="cube"), "root is 'cube'"),
    (lambda: polygons.aspect_bound(5, method="random"), "method with a bound is 'random'"),
    (lambda: boxes.slack_boxes(tree_part.star([1, 2]), eps=0.7), "eps is 0.7; it must lie in 0..0.5"),
    (lambda: boxes.slack_boxes(tree_part.star([1, 2]), root_sides=(1, 0)), "one positive number per dimension"),
    (lambda: boxes.embed_ultrametric(equilateral(3), dimensions=0), "dimensions is 0"),
    (
      lambda: boxes.embed_ultrametric(boxes.Ultrametric(np.array([-1, 0, 1, 1]), np.array([1.0, 2, 0, 0]))),
      "node 1 has a larger label than its parent",
    ),
    (lambda: boxes.embed_ultrametric(boxes.Ultrametric(np.array([-1, 0]), np.array([1.0, 1]))), "leaf 1 has label 1"),
    (lambda: boxes.distortion(np.zeros((2, 2)), equilateral(3)), "2 points for 3 leaves"),
    (lambda: boxes.from_linkage(np.array([[0, 1, 0.0, 2]])), "coincident points"),
    (lambda: files.file_sizes("package", "no_such_package"), "not an installed package"),
    (lambda: files.file_sizes("directory", "/no/such"), "is not a folder"),
    (lambda: tree_from_sizes({}), "no sizes given"),
    (lambda: tree_from_sizes({"a": 0, "b": {}}, drop_empty=True), "none above 0"),
    (lambda: tree_from_sizes({"a": 5, "a/b": 3}), "'a' has a size and paths below it; .*'a/other'"),
    (lambda: tree_from_sizes({"a/b/c": 3, "a/b": 5, "d": 1}), "'a/b' has a size and paths below it"),
    (lambda: tree_from_sizes({"a/b": 3, "/a/b": 5}), "'a/b' has two sizes"),
    (lambda: tree_from_sizes({"": 3, "a": 5}), "has an empty path"),
    (lambda: tree_from_sizes({"a": {"b": 0}}), "'a/b' has size 0, which has no area; drop_empty=True"),
    (lambda: tree_from_sizes({"a": {}}), "'a' has size 0"),
    (lambda: tree_from_sizes({"a": -1.0}, drop_empty=True), "'a' has size -1; sizes must be positive"),
    (lambda: tree_from_sizes({"a": math.nan}, drop_empty=True), "'a' has size nan"),
    (lambda: tree_from_sizes({"a": "12"}), "the size of 'a' is '12'; give a number"),
    (lambda: polygons.measure(polygons.Polygon(*np.zeros((4, 0)))), "no polygons"),
    (lambda: tree_from_wordnet("/no/such"), "give the path of WordNet's data.noun"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(InputError, match=message):
    make()
