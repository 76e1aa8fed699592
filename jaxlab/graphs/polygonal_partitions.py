"""Fat polygonal partitions: treemaps of convex polygons (de Berg, Onak, Sidiropoulos 2013, arXiv 1009.1866).

Every node v of a weighted tree becomes a convex polygon P(v) inside its parent's, with area weight(v) / weight(root),
and none is long and thin, whatever the weights. The tree is made binary by leaf count (height H), then each polygon is
cut by one line into the areas of its two children. Only the angle between a cut and the edges it meets matters: if it
is at least phi <= pi/6 for every cut, then for diameter, width and aspect ratio of all polygons

  rho(P) = diam(P) / width(P) <= max(sqrt 2, 5 / tan(phi/2)),     asp(P) = diam(P)^2 / area(P) <= 10 / tan(phi/2).

"greedy" and "gap" cut in the middle of a wide gap between the polygon's edge directions (phi >= pi / (2 (H + 1)));
"angular" gives each level its own direction (phi >= pi / (2N), N the even number >= H). The constants are those of
this construction, not the paper's. Usage:

  tree = weighted_tree(parents, weights)
  binary = binarise(tree)
  polygons = partition(binary, method="greedy").of_nodes(binary)
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.graphs.weighted_trees import BinTree

METHODS = ("greedy", "gap", "angular", "random", "axes")
ROOTS = ("square", "circle")

# Polygons handled by one call; also the largest of the few batch sizes that are ever compiled.
_CHUNK = 4096


class Polygon(NamedTuple):
  """Convex, counterclockwise; slots from `count` on repeat vertex 0.

  Vertices are relative to `origin`, which is vertex 0: a corner 1e-20 wide keeps its shape to rounding, where absolute
  coordinates would lose it. Edges carry their direction, inherited from the line that made them, so that a short
  edge's direction is never rounding noise.
  """

  origin: Float[Array, "*batch 2"]
  vertices: Float[Array, "*batch V 2"]
  angles: Float[Array, "*batch V"]
  count: Int[Array, "*batch"]


class Metrics(NamedTuple):
  """area; diam; width, the least distance of two parallel supporting lines; aspect = diam^2 / area (2 for a square)."""

  area: Float[Array, "*batch"]
  diam: Float[Array, "*batch"]
  width: Float[Array, "*batch"]
  aspect: Float[Array, "*batch"]


class Partition(NamedTuple):
  """The polygons of every level of the binary tree, and of every cut its angle to the nearest edge direction."""

  levels: tuple[Polygon, ...]
  separations: tuple[Float[np.ndarray, "cuts"], ...]

  def of_nodes(self, binary: BinTree) -> Polygon:
    """One polygon per node of the tree, on the host."""
    size = max(level.vertices.shape[1] for level in self.levels)
    count = len(binary.level_of)
    every = Polygon(*(np.empty((count, *part.shape[1:]), part.dtype) for part in _widen(self.levels[0], size)))
    for depth, level in enumerate(self.levels):
      nodes = np.flatnonzero(binary.level_of == depth)
      chosen = Polygon(*(part[binary.slot_of[nodes]] for part in level))
      for whole, part in zip(every, _widen(chosen, size), strict=True):
        whole[nodes] = part
    return every


def partition(binary: BinTree, *, method: str = "greedy", root: str = "square", seed: int = 0) -> Partition:
  """Cuts the unit-area root polygon down the levels of a binary tree, one batched call per level.

  Runs in float64 whatever the default: areas reach 1e-12 and less.

  Args:
    method: "greedy" tries the middle of every gap of edge directions >= pi / (2 + level) and both orders of the two
      children, and keeps the one with the least worst aspect ratio; "gap" takes the largest gap; "angular" one
      direction a level. Without a bound, for comparison: "axes", greedy over the two axis directions; "random".
    root: "square", or "circle", a regular polygon of N sides.
    seed: of "random".

  Raises:
    InputError: unknown method or root.
  """
  require_choice("method", method, METHODS)
  require_choice("root", root, ROOTS)
  height = len(binary.levels)
  palette = level_directions(height)
  randomness = np.random.default_rng(seed)
  with jax.enable_x64(True):
    levels, separations = [_batch(root_polygon(root, height))], []
    for depth, level in enumerate(binary.levels):
      polygons = Polygon(*(part[level.slots] for part in levels[-1]))
      polygons = _widen(polygons, _round_up(int(polygons.count.max()) + 1))
      cuts = len(level.slots)
      theta = {"random": randomness.uniform(0, math.pi, cuts)}.get(method, np.full(cuts, palette[depth]))
      chooser = method if method in ("greedy", "gap", "axes") else "given"
      cut_some = functools.partial(_cut_batch, method=chooser, depth=np.float64(depth))
      left, right, separation = _in_chunks(cut_some, polygons, theta, level.shares)
      woven = [np.stack(pair, 1).reshape(2 * cuts, *pair[0].shape[1:]) for pair in zip(left, right, strict=True)]
      levels.append(Polygon(*woven))
      separations.append(separation)
  return Partition(tuple(levels), tuple(separations))


def separation_bound(height: int, *, method: str, root: str = "square") -> float:
  """phi, the least angle between a cut and an edge of the polygon it cuts, for a binary tree of that height."""
  require_choice("method with a bound", method, ("greedy", "gap", "angular"))
  sides = palette_size(height)
  if method == "angular":
    return math.pi / (2 * sides)
  return math.pi / (2 * (height + 1 if root == "square" else height - 1 + sides // 2))


def aspect_bound(height: int, *, method: str, root: str = "square") -> float:
  """10 / tan(phi / 2), which no polygon's aspect ratio exceeds; phi is capped at pi / 6."""
  return 10 / math.tan(min(separation_bound(height, method=method, root=root), math.pi / 6) / 2)


def palette_size(height: int) -> int:
  """N: the least even integer >= max(H, 2), 4 at least. An odd N would contain pi/2, a direction of the square."""
  return max(4, height + height % 2)


def level_directions(height: int) -> Float[np.ndarray, "height"]:
  """theta of each level: pi (i + 1/2) / N at i = (level s) mod N, s ~ 0.618 N coprime to N.

  No direction returns on a way from the root to a leaf, and neighbours in the tree are far apart in angle.
  """
  size = palette_size(height)
  golden = (math.sqrt(5) - 1) / 2 * size
  step = min((s for s in range(1, size) if math.gcd(s, size) == 1), key=lambda s: abs(s - golden))
  return math.pi * (np.arange(height) * step % size + 0.5) / size


def root_polygon(root: str, height: int) -> Polygon:
  """Unit area, centred at (1/2, 1/2): the square, or the regular N-gon, whose edge directions miss the palette."""
  sides = 4 if root == "square" else palette_size(height)
  radius = math.sqrt(2 / (sides * math.sin(2 * math.pi / sides)))
  turn = 2 * math.pi / sides
  corner = turn * np.arange(sides) - (math.pi + turn) / 2
  vertices = 0.5 + radius * np.stack([np.cos(corner), np.sin(corner)], -1)
  angles = np.mod(turn * np.arange(sides), math.pi)
  # A direction that is pi up to rounding is the direction 0.
  angles[np.isclose(angles, math.pi)] = 0.0
  return Polygon(vertices[0], vertices - vertices[0], angles, np.int32(sides))


def cut(polygon: Polygon, theta: Float[Array, ""], shares: Float[Array, "2"]) -> tuple[Polygon, Polygon]:
  """Cuts one polygon by a line of direction theta into areas in proportion to `shares`.

  The first part is the one to the left of the line's direction reversed: its points have the lower coordinate along
  (sin theta, -cos theta). theta + pi swaps the sides. The area left of the line is a piecewise quadratic of the line's
  place with breaks at the vertices; the piece is found by its prefix sums and solved in closed form, measured from the
  side of the smaller part, so that even a part of 1e-20 has its area to a relative 1e-12.
  """
  normal = jnp.stack([jnp.sin(theta), -jnp.cos(theta)])
  mirrored = shares[0] > shares[1]
  low, high = _cut_low(polygon, theta, jnp.where(mirrored, -normal, normal), jnp.min(shares) / jnp.sum(shares))
  pick = lambda a, b: jax.tree.map(lambda x, y: jnp.where(mirrored, y, x), a, b)
  return pick(low, high), pick(high, low)


def directions(polygon: Polygon) -> tuple[Float[Array, "V"], Bool[Array, "V"]]:
  """Sorted edge directions in [0, pi), and which slots hold one; the valid ones come first."""
  valid = jnp.arange(polygon.angles.shape[0]) < polygon.count
  return jnp.sort(jnp.where(valid, polygon.angles, jnp.inf)), valid


def candidate_thetas(angles: Float[Array, "V"], valid: Bool[Array, "V"]) -> tuple[Float[Array, "V"], Float[Array, "V"]]:
  """The middle of every gap between neighbouring directions on the circle mod pi, and the gap (0 in unused slots)."""
  after = jnp.concatenate([angles[1:], angles[:1]])
  last = jnp.arange(len(angles)) == jnp.sum(valid) - 1
  after = jnp.where(last, angles[0] + jnp.pi, after)
  gap = jnp.where(valid, after - angles, 0.0)
  return jnp.mod(jnp.where(valid, angles + gap / 2, 0.0), jnp.pi), gap


def separation(polygon: Polygon, theta: Float[Array, ""]) -> Float[Array, ""]:
  """The least angle, mod pi, between theta and the polygon's edge directions."""
  apart = jnp.mod(theta - polygon.angles, jnp.pi)
  valid = jnp.arange(polygon.angles.shape[0]) < polygon.count
  return jnp.min(jnp.where(valid, jnp.minimum(apart, jnp.pi - apart), jnp.inf))


def polygon_metrics(polygon: Polygon) -> Metrics:
  """Area by the shoelace formula, diameter over all pairs, width over all edge directions; one polygon."""
  v = polygon.vertices
  after = jnp.roll(v, -1, axis=0)
  area = jnp.sum(v[:, 0] * after[:, 1] - v[:, 1] * after[:, 0]) / 2
  diam = jnp.sqrt(jnp.max(jnp.sum((v[:, None] - v[None]) ** 2, axis=-1)))
  normals = jnp.stack([jnp.sin(polygon.angles), -jnp.cos(polygon.angles)], axis=-1)
  extent = jnp.ptp(v @ normals.T, axis=0)
  width = jnp.min(jnp.where(jnp.arange(len(v)) < polygon.count, extent, jnp.inf))
  return Metrics(area, diam, width, diam**2 / area)


def measure(polygons: Polygon) -> Metrics:
  """`polygon_metrics` of a batch, in float64, on the host; a few thousand at a time, each has V^2 distances.

  Raises:
    InputError: no polygons.
  """
  require(len(polygons.count) > 0, "there are no polygons to measure; give at least one")
  with jax.enable_x64(True):
    return _in_chunks(_measure, polygons)


def svg(polygons: Polygon, colours: list[str], *, size: int = 800) -> str:
  """The polygons as an SVG picture of the unit square, in the order given, with thin white outlines."""
  shapes = []
  for origin, vertices, count, colour in zip(polygons.origin, polygons.vertices, polygons.count, colours, strict=True):
    points = (origin + vertices[: int(count)]) * [1, -1] + [0, 1]
    text = " ".join(f"{x:.3f},{y:.3f}" for x, y in points * size)
    shapes.append(f'<polygon points="{text}" fill="{colour}"/>')
  head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-size / 10} {-size / 10} {1.2 * size} {1.2 * size}"'
  return f'{head} stroke="white" stroke-width="0.4">\n' + "\n".join(shapes) + "\n</svg>\n"


def _cut_low(polygon: Polygon, theta, normal, fraction) -> tuple[Polygon, Polygon]:
  """(the part lowest along `normal` with that fraction <= 1/2 of the area, the other part)."""
  size = polygon.angles.shape[0]
  valid = jnp.arange(size) < polygon.count
  start = jnp.argmin(jnp.where(valid, polygon.vertices @ normal, jnp.inf))
  # From here on relative to the lowest vertex: what happens near it is exact to rounding of its own size.
  points = polygon.vertices - polygon.vertices[start]
  x = jnp.maximum(points @ normal, 0.0)
  y = points @ jnp.stack([-normal[1], normal[0]])
  following = jnp.where(jnp.arange(size) + 1 < polygon.count, jnp.arange(size) + 1, 0)
  place = _area_quantile(x, y, following, valid, fraction)

  inside = x <= place
  crosses = valid & (inside != inside[following])
  nearer = jnp.where(inside, jnp.arange(size), following)
  farther = jnp.where(inside, following, jnp.arange(size))
  run = jnp.where(crosses, x[farther] - x[nearer], 1.0)
  crossing = points[nearer] + (jnp.clip((place - x[nearer]) / run, 0, 1))[:, None] * (points[farther] - points[nearer])
  line = jnp.mod(theta, jnp.pi)
  shift = polygon.origin + polygon.vertices[start]

  def part(member):
    kept = jnp.stack([valid & member, crosses], 1).ravel()
    corners = jnp.stack([points, crossing], 1).reshape(-1, 2)
    # Leaving the part, the new edge runs along the cut; entering it, along the rest of the old edge.
    bearing = jnp.stack([polygon.angles, jnp.where(member, line, polygon.angles)], 1).ravel()
    running = jnp.cumsum(kept)
    chosen = jnp.sum(running[None, :] <= jnp.arange(size)[:, None], axis=1)
    count = running[-1]
    chosen = jnp.where(jnp.arange(size) < count, chosen, chosen[0])
    corners, first = corners[chosen], corners[chosen[0]]
    return Polygon(shift + first, corners - first, bearing[chosen], count.astype(polygon.count.dtype))

  return part(inside), part(~inside)


def _area_quantile(x, y, following, valid, fraction):
  """The x left of which lies that fraction of the area; x >= 0 with minimum 0."""
  rise, run = y[following] - y, x[following] - x
  lower, upper = valid & (run > 0), valid & (run < 0)
  slope = rise / jnp.where(run == 0, 1.0, run)
  # Edges are read from their low end, where coordinates are small and exact.
  low_x, low_y = jnp.minimum(x, x[following]), jnp.where(run > 0, y, y[following])
  high_x = jnp.maximum(x, x[following])
  breaks = jnp.sort(jnp.where(valid, x, jnp.max(jnp.where(valid, x, 0.0))))
  at = breaks[:, None]
  height = low_y + (at - low_x) * slope
  covers = (low_x <= at) & (at <= high_x)
  top = jnp.max(jnp.where(covers & upper, height, -jnp.inf), axis=1)
  bottom = jnp.min(jnp.where(covers & lower, height, jnp.inf), axis=1)
  chord = jnp.maximum(top - bottom, 0.0)
  steps = jnp.diff(breaks)
  prefix = jnp.concatenate([jnp.zeros(1), jnp.cumsum((chord[1:] + chord[:-1]) / 2 * steps)])
  target = fraction * prefix[-1]
  k = jnp.minimum(jnp.sum(prefix[1:] <= target), len(x) - 2)
  rest = target - prefix[k]
  growth = (chord[k + 1] - chord[k]) / jnp.where(steps[k] > 0, steps[k], 1.0)
  # chord t + growth t^2 / 2 = rest, by the root that does not cancel.
  denominator = chord[k] + jnp.sqrt(jnp.maximum(chord[k] ** 2 + 2 * growth * rest, 0.0))
  t = 2 * rest / jnp.where(denominator > 0, denominator, 1.0)
  return breaks[k] + jnp.clip(t, 0.0, steps[k])


def _worst_aspect(polygon, theta, shares):
  return jnp.max(jnp.stack([polygon_metrics(part).aspect for part in cut(polygon, theta, shares)]))


def _best_direction(polygons, middle, allowed, shares):
  """The allowed direction, either way round, with the least worst aspect ratio, for every polygon of a batch."""
  first = jnp.argsort(~allowed, axis=1)
  middle, allowed = jnp.take_along_axis(middle, first, 1), jnp.take_along_axis(allowed, first, 1)

  def attempt(i, best):
    score, theta = best
    # Both orders of the two children: the line turned by pi.
    turned = middle[:, i // 2] + (i % 2) * jnp.pi
    tried = jnp.where(allowed[:, i // 2], jax.vmap(_worst_aspect)(polygons, turned, shares), jnp.inf)
    return jnp.minimum(score, tried), jnp.where(tried < score, turned, theta)

  # Few gaps are wide, so the loop ends with the batch's longest list, long before V.
  most = jnp.max(jnp.sum(allowed, axis=1))
  start = jnp.full(len(middle), jnp.inf), middle[:, 0]
  return jax.lax.fori_loop(0, 2 * most, attempt, start)[1]


@functools.partial(jax.jit, static_argnames="method")
def _cut_batch(polygons, theta, shares, *, depth, method):
  """Cuts every polygon, along `theta` if the method is "given"; (left, right, separation)."""
  gaps = lambda p: candidate_thetas(*directions(p))
  if method == "gap":
    middle, gap = jax.vmap(gaps)(polygons)
    theta = jnp.take_along_axis(middle, jnp.argmax(gap, axis=1)[:, None], 1)[:, 0]
  if method in ("greedy", "axes"):
    if method == "greedy":
      middle, gap = jax.vmap(gaps)(polygons)
      allowed = gap >= jnp.pi / (2 + depth) - 1e-9
      # A circle has more directions than 2 + depth: its largest gap always counts.
      allowed |= gap >= jnp.max(gap, axis=1, keepdims=True)
    else:
      middle = jnp.broadcast_to(jnp.array([0.0, jnp.pi / 2]), (len(theta), 2))
      allowed = jnp.ones_like(middle, bool)
    theta = _best_direction(polygons, middle, allowed, shares)
  left, right = jax.vmap(cut)(polygons, theta, shares)
  return left, right, jax.vmap(separation)(polygons, theta)


_measure = jax.jit(jax.vmap(polygon_metrics))


def _in_chunks(call, polygons: Polygon, *others):
  """call(polygons, *others) in chunks whose sizes come from a short list, so that few shapes are compiled."""
  pieces = []
  for at in range(0, len(polygons.count), _CHUNK):
    length = min(_CHUNK, len(polygons.count) - at)
    padded = next(size for size in (8, 64, 256, 1024, _CHUNK) if size >= length)
    place = np.minimum(np.arange(at, at + padded), at + length - 1)
    result = call(*jax.tree.map(lambda a, place=place: np.asarray(a)[place], (polygons, *others)))
    # Cut on the host: a slice of every length would be compiled.
    pieces.append(jax.tree.map(lambda a, n=length: np.asarray(a)[:n], result))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


def _batch(polygon: Polygon) -> Polygon:
  return Polygon(*(np.asarray(part)[None] for part in polygon))


def _widen(polygons: Polygon, size: int) -> Polygon:
  """The same polygons in `size` slots; unused slots hold vertex 0, which is the zero vector."""
  now = polygons.vertices.shape[1]
  if now >= size:
    return Polygon(polygons.origin, polygons.vertices[:, :size], polygons.angles[:, :size], polygons.count)
  vertices = np.pad(polygons.vertices, ((0, 0), (0, size - now), (0, 0)))
  return Polygon(polygons.origin, vertices, np.pad(polygons.angles, ((0, 0), (0, size - now))), polygons.count)


def _round_up(value: int) -> int:
  """The next of 8, 16, 32, ...: few shapes to compile."""
  return max(8, 1 << (value - 1).bit_length())
