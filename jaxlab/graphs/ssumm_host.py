"""SSumM one group and one merge after the other, in dictionaries: the oracle of `ssumm`, and the published order.

Equations as in `ssumm`. A supernode holds its neighbours as {neighbour: [E, keep]}, the block inside it under itself.

  summary = ssumm_host.summarise(graph, seed=0, budget=0.2 * graph_bits(graph))
"""

import dataclasses
import math

import numpy as np

from jaxlab.core.checks import require, require_choice
from jaxlab.graphs import ssumm, ssumm_blocks
from jaxlab.graphs import summary as summaries
from jaxlab.graphs.common import Graph
from jaxlab.graphs.summary import Summary


class Partition:
  """The mutable summary while it is built. `superedges`, `w_max` and the members are kept up to date by `merge`."""

  def __init__(self, graph: Graph, *, error: str = "re1"):
    require_choice("error", error, ssumm_blocks.ERRORS)
    ssumm_blocks.check_graph(graph)
    self.nodes, self.error = graph.nodes, error
    self.blocks = {v: {} for v in range(graph.nodes)}
    for u, v in graph.edges.tolist():
      self.blocks[u][v] = self.blocks[v][u] = [1, True]
    self.members = {v: [v] for v in range(graph.nodes)}
    self.superedges, self.w_max = len(graph.edges), 1

  def superedge_bits(self) -> float:
    """C_e = 2 log2|S| + log2 w_max."""
    return 2 * math.log2(len(self.members)) + math.log2(self.w_max)

  def bits(self) -> float:
    """Size of the summary as it stands."""
    return summaries.size_bits(self.nodes, len(self.members), self.superedges, self.w_max)

  def pairs(self, a: int, b: int) -> float:
    """Pi(A, B)."""
    size = len(self.members[a])
    return size * (size - 1) / 2 if a == b else size * len(self.members[b])

  def decide(self, count: int, pairs: float, superedge: float) -> tuple[float, bool]:
    """(cost, keep) of a block decided now."""
    dense = superedge + _entropy_bits(count, pairs)
    sparse = 2 * math.log2(self.nodes) * count
    keep = dense <= sparse and (self.error == "re2" or 2 * count >= pairs)
    return (dense, True) if keep else (sparse, False)

  def block_cost(self, a: int, b: int) -> float:
    """Cost of {A, B} under its present flag, 0 if empty."""
    if b not in self.blocks[a]:
      return 0.0
    count, keep = self.blocks[a][b]
    if keep:
      return self.superedge_bits() + _entropy_bits(count, self.pairs(a, b))
    return 2 * math.log2(self.nodes) * count

  def cost(self, a: int) -> float:
    """Cost(A) = sum over the blocks of A."""
    return sum(self.block_cost(a, b) for b in self.blocks[a])

  def merged_blocks(self, a: int, b: int) -> dict[int, int]:
    """{X: E} of A u B; the block inside it under a."""
    counts = {}
    for end in (a, b):
      for other, (count, _) in self.blocks[end].items():
        if other not in (a, b):
          counts[other] = counts.get(other, 0) + count
    inside = sum(self.blocks[x].get(y, (0,))[0] for x, y in ((a, a), (b, b), (a, b)))
    return counts | ({a: inside} if inside else {})

  def reduction(self, a: int, b: int) -> float:
    """1 - Cost(A u B) / (Cost(A) + Cost(B) - cost{A, B}); -inf if neither has an edge."""
    apart = self.cost(a) + self.cost(b) - self.block_cost(a, b)
    if apart <= 0:
      return -math.inf
    size = len(self.members[a]) + len(self.members[b])
    superedge, together = self.superedge_bits(), 0.0
    for other, count in self.merged_blocks(a, b).items():
      pairs = size * (size - 1) / 2 if other == a else size * len(self.members[other])
      together += self.decide(count, pairs, superedge)[0]
    return 1 - together / apart

  def merge(self, a: int, b: int) -> None:
    """Merges B into A. Decisions use |S| and w_max from before."""
    counts, superedge = self.merged_blocks(a, b), self.superedge_bits()
    for end in (b, a):
      for other, (_, keep) in self.blocks.pop(end).items():
        self.superedges -= keep
        if other != end:
          del self.blocks[other][end]
    self.members[a] += self.members[b]
    supernodes = len(self.members)
    self.blocks[a] = {}
    for other, count in counts.items():
      keep = self.decide(count, self.pairs(a, other), superedge)[1]
      self.blocks[a][other] = self.blocks[other][a] = [count, keep]
      self.superedges += keep
      self.w_max = max(self.w_max, 2 * count if other == a else count)
    del self.members[b]
    assert len(self.members) == supernodes - 1

  def to_summary(self) -> Summary:
    """The kept superedges, with all supernodes that have none made one."""
    position = {a: i for i, a in enumerate(self.members)}
    labels = np.empty(self.nodes, np.int64)
    for a, members in self.members.items():
      labels[members] = position[a]
    rows = [
      (min(position[a], position[b]), max(position[a], position[b]), count)
      for a, blocks in self.blocks.items()
      for b, (count, keep) in blocks.items()
      if keep and a <= b
    ]
    rows = np.array(rows, np.int64).reshape(-1, 3)
    whole = Summary(self.nodes, labels, *rows.T, w_max=float(self.w_max))
    return summaries.select(whole, np.arange(len(rows)))


def _entropy_bits(count: float, pairs: float) -> float:
  """Pi H(E / Pi)."""
  if count <= 0 or count >= pairs:
    return 0.0
  p = count / pairs
  return -pairs * (p * math.log2(p) + (1 - p) * math.log2(1 - p))


def summarise(
  graph: Graph,
  seed: int,
  *,
  budget: float,
  error: str = "re1",
  iterations: int = 20,
  hashes: int = 10,
  max_group: int = 500,
  fail_rule: str = "code",
) -> Summary:
  """A summary of at most `budget` bits, group after group; arguments as in `ssumm.summarise`.

  Raises:
    InputError: as `ssumm.summarise`.
  """
  require_choice("fail_rule", fail_rule, ssumm.FAIL_RULES)
  ssumm.check_budget(budget)
  rng = np.random.default_rng(seed)
  state = Partition(graph, error=error)
  _merge_until(state, graph, rng, budget, iterations, hashes, max_group, fail_rule)
  summary = state.to_summary()
  if summary.bits() > budget:
    summary = ssumm.further_sparsify(summary, budget, error=error)
  require(
    summary.bits() <= budget, f"the budget of {budget:.0f} bits is infeasible: the supernodes need {summary.bits():.0f}"
  )
  return dataclasses.replace(summary, names=graph.names)


def _merge_until(state, graph, rng, budget, iterations, hashes, max_group, fail_rule):
  for t in range(1, iterations + 1):
    if state.bits() <= budget:
      return
    theta = 1 / (1 + t) if t < iterations else 0.0
    for group in _groups(state, graph, rng, hashes, max_group):
      limit, fails = int(ssumm.fail_limit(np.int64(len(group)), fail_rule)), 0
      while fails < limit and len(group) >= 2:
        drawn = rng.integers(0, len(group), (len(group), 2))
        pairs = {(i, j) for i, j in drawn.tolist() if i != j}
        scored = [(state.reduction(group[i], group[j]), i, j) for i, j in pairs]
        best, i, j = max(scored, default=(-math.inf, 0, 0))
        if best < theta:
          fails += 1
          continue
        fails = 0
        state.merge(group[i], group[j])
        group[j] = group[-1]
        group.pop()
        if state.bits() <= budget:
          return


def _groups(state, graph, rng, hashes, max_group):
  """Candidate sets: lists of representatives, singles left out."""
  alive = list(state.members)
  labels = np.empty(state.nodes, np.int64)
  for i, a in enumerate(alive):
    labels[state.members[a]] = i
  columns = np.full((hashes, len(alive)), state.nodes)
  for column in columns:
    rank = rng.permutation(state.nodes)
    node = rank.copy()
    u, v = graph.arcs()
    np.minimum.at(node, u, rank[v])
    np.minimum.at(column, labels, node)
  found = ssumm.candidate_groups(columns, max_size=max_group, rng=rng)
  parts = np.split(np.argsort(found, kind="stable"), np.cumsum(np.bincount(found))[:-1])
  return [[alive[i] for i in part] for part in parts if len(part) > 1]
