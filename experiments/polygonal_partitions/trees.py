"""Trees of the experiment: adversarial ones, skewed ones, bushy ones."""

import numpy as np

from jaxlab.graphs.weighted_trees import Tree, weighted_tree


def random_trees(count: int, leaves: int, seed: int):
  """Adversarial trees in turn: lognormal stars, geometric stars, caterpillars of tiny sides, random recursive trees."""
  random = np.random.default_rng(seed)
  for i in range(count):
    n = int(random.integers(2, leaves + 1))
    if i % 4 == 0:
      yield star(random.lognormal(0, random.choice([0, 2, 6]), n))
    elif i % 4 == 1:
      yield star(random.uniform(0.02, 0.98) ** np.arange(min(n, 40)))
    elif i % 4 == 2:
      yield caterpillar(10 ** -random.uniform(0, random.choice([0.5, 3, 12]), n))
    else:
      reach = int(random.integers(1, 8))
      parents = [-1, *(int(random.integers(max(0, k - reach), k)) for k in range(1, n))]
      yield weighted_tree(parents, random.lognormal(0, random.choice([0, 3, 8]), n))


def star(weights) -> Tree:
  return weighted_tree([-1] + [0] * len(weights), [0.0, *weights])


def caterpillar(sides) -> Tree:
  """A path of inner nodes with a leaf of weight sides[i] at node i and a leaf of weight 1 at its end."""
  parents, weights, at = [-1], [0.0], 0
  for side in sides:
    parents += [at, at]
    weights += [float(side), 0.0]
    at = len(parents) - 1
  weights[-1] = 1.0
  return weighted_tree(parents, weights)


def bushy_tree(leaves: int, seed: int) -> Tree:
  random = np.random.default_rng(seed)
  parents, frontier, total = [np.array([-1])], np.array([0]), 1
  while len(frontier) < leaves:
    count = random.integers(1, 11, len(frontier))
    count = count[: int(np.searchsorted(np.cumsum(count), leaves, side="right")) + 1]
    new = np.repeat(frontier[: len(count)], count)[: leaves - (len(frontier) - len(count))]
    parents.append(new)
    frontier = np.concatenate([frontier[len(count) :], total + np.arange(len(new))])
    total += len(new)
  return weighted_tree(np.concatenate(parents), random.lognormal(0, 4, total))
