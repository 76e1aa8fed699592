"""What SSumM is compared with: k-GraSS, SAA-Gs and S2L summaries, and sparsification alone.

The first three choose the number of supernodes and keep every non-empty block; the sum of absolute errors of a block is
2 E (1 - E / Pi), so a merge raises the error by 2 (sum of E^2 / Pi before - after) over the blocks of its ends.

  merges = baselines.merge_order(graph, key, rule="kgs", stop=400)      # one run serves every size
  summary = from_labels(graph, baselines.labels_after(merges, graph.nodes, supernodes=800))
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.graphs import summary as summaries
from jaxlab.graphs.common import Graph
from jaxlab.graphs.summary import Summary

RULES = ("kgs", "saags")


def merge_order(
  graph: Graph, key: jax.Array, *, rule: str, stop: int, samples: float = 1.0
) -> Int[np.ndarray, "merges 2"]:
  """Merges (into, from) of representatives until `stop` supernodes are left.

  Each step draws pairs and merges the one that raises the absolute error least. "kgs": k-GraSS, SamplePairs (LeFevre
  and Terzi 2010), `samples` * |S| uniform pairs. "saags": SAA-Gs (Beg et al. 2018), log2 |S| pairs whose ends are drawn
  in proportion to 1 / (error of the supernode's blocks), scored exactly (the published code uses a sketch). Dense |V|^2
  memory: for graphs of some thousand nodes.

  Raises:
    InputError: an unknown rule, a directed graph, or `stop` outside 1..|V|.
  """
  require_choice("rule", rule, RULES)
  require(not graph.directed, "a summary is of an undirected graph; load it with directed=False")
  require(1 <= stop <= graph.nodes, f"stop is {stop}; it must lie in 1..{graph.nodes}, the number of nodes")
  state = _Dense(graph)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
  merges = np.empty((graph.nodes - stop, 2), np.int64)
  for merge in merges:
    alive = np.flatnonzero(state.size)
    if rule == "kgs":
      x, y = alive[rng.integers(0, len(alive), (2, max(round(samples * len(alive)), 1)))]
    else:
      cumulative = np.cumsum(1 / (1 + np.maximum(state.row_errors()[alive], 0)))
      draws = rng.random((2, max(math.ceil(math.log2(len(alive))), 1)))
      x, y = alive[np.minimum(np.searchsorted(cumulative, draws * cumulative[-1]), len(alive) - 1)]
    different = x != y
    x, y = (x[different], y[different]) if different.any() else rng.choice(alive, (2, 1), replace=False)
    best = np.argmin(state.increase(x, y))
    merge[:] = x[best], y[best]
    state.merge(*merge)
  return merges


class _Dense:
  """Block counts and their scaled Gram matrix, both kept up to date, so that scoring a pair is a few look-ups.

  Attributes:
    w: E(A, B), zero on the diagonal; own: E(A, A); size: |A|, 0 once merged away.
    gram: sum_X E(A, X) E(B, X) / |X| over X other than A (in row A) and B.
  """

  def __init__(self, graph: Graph):
    n = graph.nodes
    self.w = np.zeros((n, n))
    u, v = graph.edges.T
    self.w[u, v] = self.w[v, u] = 1
    self.own, self.size, self.degree = np.zeros(n), np.ones(n), self.w.sum(axis=1)
    edges = scipy.sparse.csr_array(self.w)
    self.gram = (edges @ edges.T).toarray()

  def increase(self, a, b):
    """Rise of the sum of absolute errors (unordered pairs) if A and B merge; arrays of pairs."""
    g, own, size = self.gram, self.own, self.size
    return _increase(g[a, b], self.w[a, b], g[a, a], g[b, b], own[a], own[b], size[a], size[b])

  def row_errors(self):
    """sum_X 2 E(A, X) (1 - E / Pi) of every supernode."""
    pairs = np.maximum(self.size * (self.size - 1) / 2, 1)
    across = self.degree - np.diagonal(self.gram) / np.maximum(self.size, 1)
    return 2 * across + 2 * self.own * (1 - self.own / pairs)

  def merge(self, a: int, b: int) -> None:
    """Merges B into A."""
    w, gram, size = self.w, self.gram, self.size
    for x in (a, b):
      rows = np.flatnonzero(w[:, x])
      gram[np.ix_(rows, rows)] -= np.outer(w[rows, x], w[rows, x]) / size[x]
    row = gram[a] + gram[b]
    row[a] = gram[a, a] + gram[b, b] + 2 * gram[a, b]
    row[b] = 0
    gram[a, :] = gram[:, a] = row
    gram[b, :] = gram[:, b] = 0
    self.degree[a] += self.degree[b] - 2 * w[a, b]
    self.own[a] += self.own[b] + w[a, b]
    size[a] += size[b]
    self.degree[b] = self.own[b] = size[b] = 0
    column = w[a] + w[b]
    column[a] = column[b] = 0
    w[a, :] = w[:, a] = column
    w[b, :] = w[:, b] = 0
    rows = np.flatnonzero(column)
    gram[np.ix_(rows, rows)] += np.outer(column[rows], column[rows]) / size[a]


def _increase(dot, between, norm_a, norm_b, own_a, own_b, a, b):
  """2 (sum E^2 / Pi before - after) of merging supernodes of sizes a, b; dot = sum_X E(A, X) E(B, X) / |X|."""
  inside = lambda e, s: np.where(s > 1, e**2 / np.maximum(s * (s - 1) / 2, 1), 0)
  rest_a, rest_b = norm_a - between**2 / b, norm_b - between**2 / a
  before = rest_a / a + rest_b / b + between**2 / (a * b) + inside(own_a, a) + inside(own_b, b)
  after = (rest_a + rest_b + 2 * dot) / (a + b) + inside(own_a + own_b + between, a + b)
  return 2 * (before - after)


def labels_after(merges: Int[np.ndarray, "merges 2"], nodes: int, *, supernodes: int) -> Int[np.ndarray, "nodes"]:
  """Representatives after the first |V| - `supernodes` merges.

  Raises:
    InputError: the list of merges stops earlier.
  """
  count = nodes - supernodes
  require(
    0 <= count <= len(merges), f"{supernodes} supernodes need {count} merges of {nodes} nodes; {len(merges)} are known"
  )
  parent = np.arange(nodes)
  for into, source in merges[:count]:
    parent[source] = into
  while not np.array_equal(parent, parent[parent]):
    parent = parent[parent]
  return parent


def s2l(
  graph: Graph, key: jax.Array, *, supernodes: int, dimensions: int = 128, steps: int = 20
) -> Int[np.ndarray, "nodes"]:
  """S2L (Riondato et al. 2014): k-means of adjacency rows, sketched to `dimensions` by a Gaussian projection.

  Raises:
    InputError: a directed graph, or `supernodes` outside 1..|V|.
  """
  require(not graph.directed, "a summary is of an undirected graph; load it with directed=False")
  require(1 <= supernodes <= graph.nodes, f"supernodes is {supernodes}; it must lie in 1..{graph.nodes}")
  u, v = graph.edges.T
  project, start = jax.random.split(key)
  random = jax.random.normal(project, (graph.nodes, dimensions)) / np.sqrt(dimensions)
  rows = jnp.zeros((graph.nodes, dimensions)).at[u].add(random[v]).at[v].add(random[u])
  return np.asarray(_k_means(rows, start, supernodes=supernodes, steps=steps))


@functools.partial(jax.jit, static_argnames=("supernodes", "steps"))
def _k_means(
  rows: Float[Array, "nodes dimensions"], key: jax.Array, *, supernodes: int, steps: int
) -> Int[Array, "nodes"]:
  """Lloyd's algorithm from distinct random rows; an empty cluster keeps its centre."""
  n = len(rows)

  def assign(centres):
    score = lambda r: jnp.argmin(jnp.sum(centres**2, axis=1) - 2 * centres @ r)
    return jax.lax.map(score, rows, batch_size=512)

  def step(_, centres):
    labels = assign(centres)
    count = jax.ops.segment_sum(jnp.ones(n), labels, num_segments=supernodes)[:, None]
    total = jax.ops.segment_sum(rows, labels, num_segments=supernodes)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), centres)

  centres = rows[jax.random.permutation(key, n)[:supernodes]]
  return assign(jax.lax.fori_loop(0, steps, step, centres))


def sparsify_only(graph: Graph, *, budget: float, seed: int) -> Summary:
  """No merging: singletons, and random edges of the graph dropped until Size <= budget."""
  whole = summaries.from_labels(graph, np.arange(graph.nodes))
  order = np.random.default_rng(seed).permutation(len(graph.edges))
  low, high = 0, len(order) + 1
  while high - low > 1:
    middle = (low + high) // 2
    fits = summaries.select(whole, order[:middle]).bits() <= budget
    low, high = (middle, high) if fits else (low, middle)
  return summaries.select(whole, order[:low])
