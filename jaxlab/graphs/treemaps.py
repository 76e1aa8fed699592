"""What fat partitions are measured against: slice-and-dice and squarified treemaps; MDS, stress and projections.

Rectangles are (low corner, sides) of every node, areas exactly in proportion to the weights of `weighted_trees.Tree`.

  low, sides = squarified(tree)
  points = classical_mds(distance_matrix(tree), 2)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxlab.graphs.weighted_trees import Tree, generations, node_depths, sorted_children

Rectangles = tuple[Float[np.ndarray, "nodes 2"], Float[np.ndarray, "nodes 2"]]


def slice_and_dice(tree: Tree) -> Rectangles:
  """Children side by side, along x at even depths and along y at odd ones (Shneiderman 1992)."""
  parents, weights = tree
  low, sides = np.zeros((len(parents), 2)), np.ones((len(parents), 2))
  order, first, _ = sorted_children(parents, weights)
  listed = order[:-1]
  running = np.concatenate([[0.0], np.cumsum(weights[listed] / weights[parents[listed]])])
  before = np.zeros(len(parents))
  before[listed] = running[:-1] - running[first[parents[listed]]]
  for depth, nodes in enumerate(generations(parents)[1:]):
    up, axis = parents[nodes], depth % 2
    low[nodes], sides[nodes] = low[up], sides[up]
    low[nodes, axis] += before[nodes] * sides[up, axis]
    sides[nodes, axis] *= weights[nodes] / weights[up]
  return low, sides


def squarified(tree: Tree) -> Rectangles:
  """Rows along the shorter side, filled while the worst side ratio improves (Bruls, Huizing, van Wijk 2000)."""
  parents, weights = tree
  low, sides = np.zeros((len(parents), 2)), np.ones((len(parents), 2))
  order, first, last = sorted_children(parents, weights)
  for node in np.argsort(node_depths(parents), kind="stable").tolist():
    if first[node] < last[node]:
      children = order[first[node] : last[node]]
      areas = weights[children] * (sides[node].prod() / weights[node])
      low[children], sides[children] = squarify_row_by_row(areas.tolist(), *low[node].tolist(), *sides[node].tolist())
  return low, sides


def squarify_row_by_row(areas: list[float], x: float, y: float, width: float, height: float):
  """(low corners, sides) of rectangles with the given falling areas that fill the given one; O(n).

  The worst side ratio of a row of areas r with sum s along a side w is max(w^2 max r / s^2, s^2 / (w^2 min r)).
  """
  lows, sizes = [], []
  # What is left is known from the areas: differences of sides would leave slivers of rounding noise.
  rest = np.append(np.cumsum(areas[::-1])[::-1], 0.0).tolist()
  at = 0
  while at < len(areas):
    short = min(width, height)
    total, worst, end = 0.0, np.inf, at
    while end < len(areas):
      longer = total + areas[end]
      scale = (longer / short) ** 2
      ratio = max(areas[at] / scale, scale / areas[end])
      if ratio > worst:
        break
      total, worst, end = longer, ratio, end + 1
    thick = total / short
    along = y if width >= height else x
    for area in areas[at:end]:
      length = area / thick
      if width >= height:
        lows.append((x, along)), sizes.append((thick, length))
      else:
        lows.append((along, y)), sizes.append((length, thick))
      along += length
    if width >= height:
      x, width = x + thick, rest[end] / height
    else:
      y, height = y + thick, rest[end] / width
    at = end
  return np.array(lows), np.array(sizes)


def rectangle_aspect(sides: Float[np.ndarray, "nodes 2"]) -> Float[np.ndarray, "nodes"]:
  """diam^2 / area, the measure of the polygons: 2 for a square, r + 1/r for sides in the ratio r."""
  ratio = sides[:, 0] / sides[:, 1]
  return ratio + 1 / ratio


def classical_mds(delta: Float[np.ndarray, "n n"], dimensions: int) -> Float[np.ndarray, "n d"]:
  """Top eigenvectors of -J delta^2 J / 2, scaled: with n - 1 dimensions an isometry of an ultrametric."""
  square = delta**2
  centred = square - square.mean(0) - square.mean(1)[:, None] + square.mean()
  values, vectors = np.linalg.eigh(-centred / 2)
  values, vectors = values[::-1][:dimensions], vectors[:, ::-1][:, :dimensions]
  return vectors * np.sqrt(np.maximum(values, 0.0))


def random_projection(delta: Float[np.ndarray, "n n"], dimensions: int, seed: int) -> Float[np.ndarray, "n d"]:
  """The isometric embedding of an ultrametric in R^{n-1}, projected on random directions."""
  isometric = classical_mds(delta, len(delta) - 1)
  return isometric @ np.random.default_rng(seed).normal(size=(isometric.shape[1], dimensions)) / np.sqrt(dimensions)


def stress_descent(
  delta: Float[np.ndarray, "n n"], dimensions: int, *, steps: int = 500, rate: float = 0.02
) -> Float[np.ndarray, "n d"]:
  """Adam on the mean of (||x_i - x_j|| / delta_ij - 1)^2 from the classical MDS solution.

  The relative stress weighs near pairs as much as far ones, as distortion does.
  """
  with jax.enable_x64(True):
    start = classical_mds(delta, dimensions)
    # Points that MDS puts on one another would have no gradient apart.
    start = start + 1e-3 * delta.max() * np.random.default_rng(0).normal(size=start.shape)
    return np.asarray(_descend(jnp.asarray(start / delta.max()), jnp.asarray(delta / delta.max()), steps, rate))


@functools.partial(jax.jit, static_argnames="steps")
def _descend(points: Float[Array, "n d"], delta: Float[Array, "n n"], steps: int, rate: float):
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
  pair = ~jnp.eye(len(points), dtype=bool)

  def stress(x):
    square = jnp.sum((x[:, None] - x[None]) ** 2, axis=-1)
    ratio = jnp.sqrt(jnp.where(pair, square, 1.0) + 1e-18) / jnp.where(pair, delta, 1.0)
    return jnp.sum(jnp.where(pair, (ratio - 1) ** 2, 0.0)) / jnp.sum(pair)

  def step(carry, _):
    x, state = carry
    updates, state = optimizer.update(jax.grad(stress)(x), state)
    return (optax.apply_updates(x, updates), state), None

  (points, _), _ = jax.lax.scan(step, (points, optimizer.init(points)), length=steps)
  return points
