import inspect
import math

import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.ssumm import get_config
from experiments.ssumm import baselines as ssumm_baselines
from jaxlab.core.checks import InputError
from jaxlab.graphs import common, ssumm, ssumm_host, summary
from jaxlab.graphs import ssumm_blocks as blocks
from jaxlab.graphs.summary import Summary, from_labels, graph_bits
from tests.common import run_and_continue

GRAPH = common.load("sbm", nodes=60, degree=4, blocks=6, mixing=0.2, seed=1)


@pytest.fixture(autouse=True)
def wide_integers():
  with jax.enable_x64(True):
    yield


def adjacency(graph):
  a = np.zeros((graph.nodes, graph.nodes))
  a[tuple(graph.edges.T)] = 1
  return a + a.T


def reconstruct(s: Summary):
  """Ahat entry by entry, from the definition."""
  weight = {(a, b): w for a, b, w in zip(s.first.tolist(), s.second.tolist(), s.weight.tolist(), strict=True)}
  size = np.bincount(s.labels)
  out = np.zeros((s.nodes, s.nodes))
  for u in range(s.nodes):
    for v in range(s.nodes):
      a, b = sorted((int(s.labels[u]), int(s.labels[v])))
      if u != v and (a, b) in weight:
        out[u, v] = weight[a, b] / (size[a] * (size[a] - 1) / 2 if a == b else size[a] * size[b])
  return out


def random_summary(seed, supernodes=9, keep=0.5):
  rng = np.random.default_rng(seed)
  whole = from_labels(GRAPH, rng.integers(0, supernodes, GRAPH.nodes))
  kept = np.flatnonzero(rng.random(len(whole.weight)) < keep)
  return Summary(GRAPH.nodes, whole.labels, whole.first[kept], whole.second[kept], whole.weight[kept])


def brute_cost(graph, groups, a, *, keep=None, supernodes, w_max, error):
  """Cost(A) by counting edges in the adjacency matrix; `keep[a, b]` the flags, None to decide now."""
  matrix, total = adjacency(graph), 0.0
  for b in groups:
    count = matrix[np.ix_(groups[a], groups[b])].sum() / (2 if a == b else 1)
    if count == 0:
      continue
    n = len(groups[a])
    pairs = n * (n - 1) / 2 if a == b else n * len(groups[b])
    p = count / pairs
    entropy = 0.0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    dense = 2 * math.log2(supernodes) + math.log2(w_max) + pairs * entropy
    sparse = 2 * math.log2(graph.nodes) * count
    flag = keep[a, b] if keep is not None else dense <= sparse and (error == "re2" or p >= 0.5)
    total += dense if flag else sparse
  return total


def merged_state(error, merges=25, seed=0):
  """The same random merges on the host and in the list of blocks."""
  rng = np.random.default_rng(seed)
  host, state = ssumm_host.Partition(GRAPH, error=error), blocks.initial_state(GRAPH, error=error)
  step = jax.jit(blocks.merge)
  for _ in range(merges):
    a, b = (int(x) for x in rng.choice(list(host.members), 2, replace=False))
    host.merge(a, b)
    state = step(state, jnp.arange(GRAPH.nodes, dtype=jnp.int32).at[b].set(a))
  return host, state


def blocks_of(state):
  rows = zip(*(np.asarray(x).tolist() for x in (state.source, state.target, state.count, state.keep)), strict=True)
  return {(a, b): (count, keep) for a, b, count, keep in rows if a < state.nodes}


def test_nothing_merged_is_lossless_and_larger_than_the_graph():
  """Size = |V| log2|V| + 2|E| log2|V| > Size(G), RE = 0."""
  state = blocks.initial_state(GRAPH)
  start = from_labels(GRAPH, np.arange(GRAPH.nodes))
  expected = (GRAPH.nodes + 2 * len(GRAPH.edges)) * math.log2(GRAPH.nodes)
  assert float(blocks.state_bits(state)) == pytest.approx(expected) == start.bits()
  assert start.bits() > graph_bits(GRAPH)
  assert start.errors(edges=len(GRAPH.edges)) == (0.0, 0.0)
  assert ssumm.summarise(GRAPH, jax.random.key(0), budget=graph_bits(GRAPH)).bits() <= graph_bits(GRAPH)


@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0, 1))
def test_fast_errors_are_those_of_the_matrices(seed, supernodes, keep):
  """n = 60, random partitions and random kept blocks."""
  s = random_summary(seed, supernodes, keep)
  difference = adjacency(GRAPH) - reconstruct(s)
  total = GRAPH.nodes * (GRAPH.nodes - 1)
  expected = np.abs(difference).sum() / total, math.sqrt((difference**2).sum()) / total
  np.testing.assert_allclose(s.errors(edges=len(GRAPH.edges)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("error", blocks.ERRORS)
def test_bookkeeping_equals_recomputation_after_every_merge(error):
  """Counts, |P|, w_max, the partition and Cost(A), 2 x 100 merges."""
  matrix = adjacency(GRAPH)
  for seed in range(2):
    rng, host = np.random.default_rng(seed), ssumm_host.Partition(GRAPH, error=error)
    for step in range(50):
      a, b = (int(x) for x in rng.choice(list(host.members), 2, replace=False))
      host.merge(a, b)
      assert sorted(v for members in host.members.values() for v in members) == list(range(GRAPH.nodes))
      ids = list(host.members)
      member = np.zeros((GRAPH.nodes, len(ids)))
      for i, x in enumerate(ids):
        member[host.members[x], i] = 1
      ordered = member.T @ matrix @ member  # a block inside a supernode twice
      mine = np.array([[host.blocks[x].get(y, [0])[0] for y in ids] for x in ids])
      np.testing.assert_array_equal(mine + np.diag(np.diag(mine)), ordered)
      flags = {(x, y): block[1] for x, row in host.blocks.items() for y, block in row.items()}
      assert host.superedges == sum(keep for (x, y), keep in flags.items() if x <= y)
      assert all(flags[x, y] == flags[y, x] for x, y in flags)
      assert host.w_max >= ordered.max()
      if step % 10 == 9:
        now = dict(keep=flags, supernodes=len(ids), w_max=host.w_max, error=error)
        for x in ids[:8]:
          assert host.cost(x) == pytest.approx(brute_cost(GRAPH, host.members, x, **now))


@pytest.mark.parametrize("error", blocks.ERRORS)
def test_list_of_blocks_agrees_with_the_host_on_the_same_pairs(error):
  """Labels, counts, flags, |P|, |S|, w_max and Size."""
  host, state = merged_state(error)
  expected = {(x, y): tuple(block) for x, row in host.blocks.items() for y, block in row.items()}
  assert blocks_of(state) == expected
  assert (int(state.supernodes), int(state.w_max)) == (len(host.members), host.w_max)
  assert int(blocks.superedges(state)) == host.superedges
  assert float(blocks.state_bits(state)) == pytest.approx(host.bits())
  for a, members in host.members.items():
    assert (np.asarray(state.labels)[members] == a).all()


@pytest.mark.parametrize("error", blocks.ERRORS)
def test_reduction_is_the_saving_in_cost(error):
  """Against counts in the adjacency matrix, and the two implementations against each other."""
  host, state = merged_state(error)
  ids = sorted(host.members)
  rng = np.random.default_rng(3)
  n = GRAPH.nodes
  reductions = jax.jit(blocks.reductions)
  for _ in range(3):
    ring = rng.permutation(ids)
    after, before = (np.arange(n, dtype=np.int32) for _ in range(2))
    after[ring], before[ring] = np.roll(ring, -1), np.roll(ring, 1)
    values = np.asarray(reductions(state, jnp.asarray(after), jnp.asarray(before)))
    assert np.isneginf(np.delete(values, ids)).all()
    flags = {(x, y): block[1] for x, row in host.blocks.items() for y, block in row.items()}
    now = dict(supernodes=len(host.members), w_max=host.w_max, error=error)
    for a, b, value in zip(ring.tolist(), after[ring].tolist(), values[ring].tolist(), strict=True):
      together = {k: v for k, v in host.members.items() if k not in (a, b)} | {a: host.members[a] + host.members[b]}
      shared = brute_cost(GRAPH, {k: host.members[k] for k in (a, b)}, a, keep=flags, **now)
      shared -= brute_cost(GRAPH, {a: host.members[a]}, a, keep=flags, **now)
      apart = sum(brute_cost(GRAPH, host.members, x, keep=flags, **now) for x in (a, b)) - shared
      expected = 1 - brute_cost(GRAPH, together, a, **now) / apart
      assert host.reduction(a, b) == pytest.approx(expected, abs=1e-9)
      assert value == pytest.approx(expected, abs=1e-9)


def test_two_supernodes_without_edges_are_never_a_pair():
  """A zero denominator is skipped."""
  graph = common.make(60, np.array([[0, 1]]))
  host = ssumm_host.Partition(graph)
  assert host.reduction(3, 4) == -math.inf
  for groups in ssumm.GROUPS:  # at random all vertices without edges are in one, and give up
    found = ssumm.summarise(graph, jax.random.key(0), budget=graph_bits(graph) + 10, max_group=5, groups=groups)
    assert len(set(found.labels[2:].tolist())) == 1


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("error", blocks.ERRORS)
def test_the_budget_is_met_by_a_partition(error, ratio):
  """Size <= k; labels cover V; kept counts are at most |E| and are the true counts."""
  budget = ratio * graph_bits(GRAPH)
  sequential = ssumm_host.summarise(GRAPH, 0, budget=budget, error=error)
  parallel = [
    ssumm.summarise(GRAPH, jax.random.key(1), budget=budget, error=error, share=share, max_group=20)
    for share in (0.0, 0.1)
  ]
  for s in (sequential, *parallel):
    assert s.bits(recorded=False) <= s.bits() <= budget
    assert s.labels.shape == (GRAPH.nodes,) and sorted(set(s.labels.tolist())) == list(range(len(s.sizes)))
    assert s.weight.sum() <= len(GRAPH.edges) and (s.first <= s.second).all()
    whole = from_labels(GRAPH, s.labels)
    true = dict(zip(zip(whole.first.tolist(), whole.second.tolist(), strict=True), whole.weight.tolist(), strict=True))
    mine = dict(zip(zip(s.first.tolist(), s.second.tolist(), strict=True), s.weight.tolist(), strict=True))
    assert mine.items() <= true.items()


def test_an_infeasible_budget_is_named():
  """Without dropping superedges no partition in two supernodes or more fits 3 bits."""
  with pytest.raises(InputError, match="infeasible"):
    ssumm.finish(blocks.initial_state(GRAPH, drop=False), 3.0, sparsify=False)
  assert ssumm.finish(blocks.initial_state(GRAPH), 3.0).bits() == 0


TWINS = common.make(
  60, np.array([(10 * block + u, 10 * block + 5 + v) for block in range(6) for u in range(5) for v in range(5)])
)


@pytest.mark.parametrize("theta", [0.0, 0.1])
def test_a_group_goes_on_while_it_merges_and_stops_at_the_budget(theta):
  """Twelve groups of five twins, one merge a round: four rounds, more than a group may fail in; then none is left."""
  state, group = blocks.initial_state(TWINS), jnp.arange(60, dtype=jnp.int32) // 5
  limit = jnp.full(61, int(ssumm.fail_limit(np.array(5))), jnp.int32)
  progress = ssumm.Progress(group, jnp.zeros(61, jnp.int32), limit, jnp.int32(0))
  run = lambda budget: ssumm._merge_rounds(state, progress, jax.random.key(0), theta, budget, 0.0, 0)
  whole, _, _, _, met = run(0.0)
  assert not met and limit[0] < 4 and int(whole.supernodes) == 12 == int((whole.size > 0).sum())
  budget = 0.6 * float(blocks.state_bits(state))
  before, _, parent, score, met = run(budget)
  after = jax.jit(blocks.merge)(before, parent)
  assert met and float(blocks.state_bits(before)) > budget >= float(blocks.state_bits(after))
  assert ((np.asarray(score) > -np.inf) == (np.asarray(parent) != np.arange(60))).all()


STAR = common.make(2001, np.stack([np.zeros(2000, int), np.arange(1, 2001)], axis=1))


def test_the_hub_of_a_star_merges_with_no_leaf():
  """A hub and a leaf can be a group of two, which may not fail and so proposes nothing; leaves merge without loss."""
  for found in (
    ssumm.summarise(STAR, jax.random.key(0), budget=0.3 * graph_bits(STAR)),
    ssumm_host.summarise(STAR, 0, budget=0.3 * graph_bits(STAR)),
  ):
    assert found.errors(edges=2000)[0] == 0 and found.sizes[found.labels[0]] == 1
  pair = np.full(2001, 2001, np.int32)
  pair[:2] = 0
  same = ssumm._rounds(blocks.initial_state(STAR), pair, jax.random.key(0), -1.0, 1.0, 0.0, "code")
  assert int(same.supernodes) == 2001
  pair[2:3] = 0
  other = ssumm._rounds(blocks.initial_state(STAR), pair, jax.random.key(0), -1.0, 1.0, 0.0, "code")
  assert int(other.supernodes) == 1999


def test_a_ring_of_equal_twins_merges_in_parallel():
  """All pairs of leaves are worth the same: lots decide, not places, so about a third beat both their neighbours."""
  group = jnp.zeros(2001, jnp.int32).at[0].set(2001)
  parent, *_ = blocks.propose(blocks.initial_state(STAR), group, jax.random.key(0), 0.0, 1.0)
  assert 500 < int((parent != jnp.arange(2001)).sum()) < 800


@pytest.mark.parametrize("error", blocks.ERRORS)
def test_merges_in_a_part_of_the_rows_are_merges_of_the_whole(error):
  """Two extractions, one in the other, and back; blocks, labels, sizes and Size as if merged in the whole."""
  host, state = merged_state(error)
  ids = np.array(sorted(host.members))
  active = np.isin(np.arange(GRAPH.nodes), ids[::2])
  small, nodes = blocks.extract(state, jnp.asarray(active), nodes=64, blocks=512)
  count, most, few = (int(x) for x in blocks.sizes(state, jnp.asarray(active)))
  assert (count, few) == (len(ids[::2]), int((small.source < 64).sum())) and most == int((nodes < 60).sum())
  inner = jnp.arange(64) % 2 < (jnp.arange(64) < count)
  smaller, places = blocks.extract(small, inner, nodes=48, blocks=256)
  back = blocks.absorb(state, blocks.absorb(small, smaller, places, inner), nodes, jnp.asarray(active))
  assert blocks_of(back) == blocks_of(state)
  merged = jax.jit(blocks.merge)(smaller, jnp.arange(8, dtype=jnp.int32).at[3].set(1).at[jnp.array([5, 6])].set(0))
  back = blocks.absorb(state, blocks.absorb(small, merged, places, inner), nodes, jnp.asarray(active))
  at = lambda place: np.asarray(nodes)[np.asarray(places)[place]]
  parent = np.arange(GRAPH.nodes, dtype=np.int32)
  parent[at([3, 5, 6])] = at([1, 0, 0])
  whole = jax.jit(blocks.merge)(state, jnp.asarray(parent))
  assert blocks_of(back) == blocks_of(whole)
  for name in ("labels", "size", "supernodes", "w_max"):
    np.testing.assert_array_equal(getattr(back, name), getattr(whole, name))
  assert float(blocks.state_bits(whole)) == float(blocks.state_bits(back)) == float(blocks.state_bits(merged))


def test_summaries_made_in_ever_smaller_parts_count_right(monkeypatch):
  monkeypatch.setattr(ssumm, "_SMALLEST", 64)
  graph = common.load("sbm", nodes=300, degree=5, blocks=12, mixing=0.2, seed=1)
  for budget in (0.3, 0.05):
    found = ssumm.summarise(graph, jax.random.key(0), budget=budget * graph_bits(graph), iterations=4)
    assert found.bits() <= budget * graph_bits(graph)
    whole = from_labels(graph, found.labels)
    true = dict(zip(zip(whole.first.tolist(), whole.second.tolist(), strict=True), whole.weight.tolist(), strict=True))
    mine = zip(zip(found.first.tolist(), found.second.tolist(), strict=True), found.weight.tolist(), strict=True)
    assert all(true[ends] == weight for ends, weight in mine)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_twins_merge_without_loss(share):
  """Disjoint complete bipartite blocks: twins share shingles, RE = 0 at small size."""
  graph = TWINS
  found = ssumm.summarise(graph, jax.random.key(0), budget=0.2 * graph_bits(graph), share=share)
  assert found.errors(edges=len(graph.edges)) == (0.0, 0.0)
  host = ssumm_host.summarise(graph, 0, budget=0.2 * graph_bits(graph))
  assert host.errors(edges=len(graph.edges)) == (0.0, 0.0)
  assert found.bits() < 0.2 * graph_bits(graph)
  side = lambda s: all(len(set(s.labels[5 * i : 5 * i + 5].tolist())) <= 3 for i in range(12))
  assert side(found) and side(host)


def test_shingles_of_twins_agree_and_groups_are_split_to_size():
  graph = common.make(6, np.array([(0, 2), (0, 3), (1, 2), (1, 3), (4, 5)]))
  state = blocks.initial_state(graph)
  columns = np.asarray(ssumm.shingles(jax.random.key(0), state, state.source, state.target, count=50))
  closed = [{0, 2, 3}, {1, 2, 3}, {0, 1, 2}, {0, 1, 3}, {4, 5}, {4, 5}]
  assert (columns[:, 4] == columns[:, 5]).all() and not (columns[:, 0] == columns[:, 4]).any()
  agree = lambda a, b: (columns[:, a] == columns[:, b]).mean()
  jaccard = len(closed[0] & closed[1]) / len(closed[0] | closed[1])
  assert abs(agree(0, 1) - jaccard) < 0.25
  rng = np.random.default_rng(0)
  columns = np.stack([np.zeros(100, int), np.arange(100) // 40, np.zeros(100, int)])
  group = ssumm.candidate_groups(columns, max_size=25, rng=rng)
  assert np.bincount(group).max() <= 25
  assert all(len(set((np.flatnonzero(group == g) // 40).tolist())) == 1 for g in set(group.tolist()))


def test_both_ways_of_sorting_blocks_agree():
  """Keys and places in one integer where they fit, side by side where |V| is too large for that."""
  rng = np.random.default_rng(0)
  source, target = (jnp.asarray(rng.permutation(500).astype(np.int32)) for _ in range(2))
  few, many = blocks._sorted_blocks(source, target, 500), blocks._sorted_blocks(source, target, 2**30)
  for a, b in zip(few, many, strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(few[0], source[few[2]])
  np.testing.assert_array_equal(few[1], target[few[2]])


def test_the_number_of_failures_allowed():
  """bitlen(bitlen(g - 1) - 1) in the code, log2 g in the text."""
  sizes = [2, 3, 5, 17, 500]
  expected = [((g - 1).bit_length() - 1).bit_length() for g in sizes]
  assert ssumm.fail_limit(np.array(sizes)).tolist() == expected
  assert ssumm.fail_limit(np.array(sizes), "paper").tolist() == [1, 1, 2, 4, 8]


@pytest.mark.parametrize("error, index", [("re1", 0), ("re2", 1)])
def test_sparsification_drops_the_least_harmful_superedge(error, index):
  """Dropping any one block raises the error by its harm; the first to go is the one that raises it least."""
  s = random_summary(5, supernodes=12, keep=1.0)
  edges = len(GRAPH.edges)
  fewer = lambda i: summary.select(s, np.delete(np.arange(len(s.weight)), i)).errors(edges=edges)[index]
  after = [fewer(i) for i in range(len(s.weight))]
  slack = 1e-6
  dropped = ssumm.further_sparsify(s, s.bits() - slack, error=error)
  assert len(dropped.weight) == len(s.weight) - 1
  assert dropped.errors(edges=edges)[index] == pytest.approx(min(after))


def test_a_summary_answers_queries_without_the_matrix():
  s = random_summary(11, supernodes=10, keep=0.7)
  dense = reconstruct(s)
  for v in range(0, GRAPH.nodes, 7):
    nodes, weights = s.neighbours(v)
    np.testing.assert_array_equal(nodes, np.flatnonzero(dense[v]))
    np.testing.assert_allclose(weights, dense[v][nodes])
  x = np.random.default_rng(0).normal(size=(GRAPH.nodes, 3))
  np.testing.assert_allclose(s.matvec(jnp.asarray(x)), dense @ x, atol=1e-10)
  with pytest.raises(InputError, match="no vertex is named 60"):
    s.neighbours(60)


def test_a_summary_answers_in_the_names_of_the_graph():
  """Two cliques of five with one friendship between them."""
  names = ["ann", "bob", "cat", "dan", "eve"], ["Rome", "Oslo", "Bern", "Kyiv", "Bonn"]
  pairs = [(u, v) for part in names for i, u in enumerate(part) for v in part[:i]]
  graph = common.from_edges([*pairs, ("eve", "Rome")])
  budget = 0.5 * graph_bits(graph)
  for found in (
    ssumm.summarise(graph, jax.random.key(0), budget=budget),
    ssumm_host.summarise(graph, 0, budget=budget),
  ):
    assert sorted(name for part in found.supernodes() for name in part) == sorted(graph.names)
    assert (found.labels[found.index(found.supernodes()[0])] == 0).all()
  whole = from_labels(graph, np.arange(10))
  assert set(whole.neighbours("eve")[0].tolist()) == {"ann", "bob", "cat", "dan", "Rome"}


def test_a_packed_summary_comes_back_and_has_the_promised_size():
  s = ssumm.summarise(GRAPH, jax.random.key(0), budget=0.5 * graph_bits(GRAPH))
  data = s.pack()
  back = summary.unpack(data)
  for name in ("labels", "first", "second", "weight"):
    np.testing.assert_array_equal(getattr(back, name), getattr(s, name))
  whole = lambda x: math.ceil(math.log2(x))
  widths = whole(len(s.sizes)) * (s.nodes + 2 * len(s.weight)) + int(s.weight.max()).bit_length() * len(s.weight)
  assert 8 * (len(data) - 32) <= widths + 4 * 8
  with pytest.raises(InputError, match="was cut"):
    summary.unpack(data[:-5])
  lone = Summary(3, np.zeros(3, int), np.zeros(1, int), np.zeros(1, int), np.array([2]))
  np.testing.assert_array_equal(summary.unpack(lone.pack()).labels, lone.labels)


@pytest.mark.parametrize("rule", ssumm_baselines.RULES)
def test_baselines_merge_the_pair_that_adds_least_error(rule):
  """Every choice of k-GraSS is the best of its draws; replayed merges reach the asked |S| and known error."""
  merges = ssumm_baselines.merge_order(GRAPH, jax.random.key(0), rule=rule, stop=10, samples=4.0)
  assert len(set(merges[:, 1].tolist())) == 50
  previous = 0.0
  for supernodes in (59, 40, 20, 10):
    s = from_labels(GRAPH, ssumm_baselines.labels_after(merges, 60, supernodes=supernodes))
    assert len(s.sizes) == supernodes and s.weight.sum() == len(GRAPH.edges)
    error = s.errors(edges=len(GRAPH.edges))[0]
    assert error >= previous - 1e-12
    previous = error
  shuffled = from_labels(GRAPH, np.random.default_rng(0).permutation(s.labels))
  assert s.errors(edges=len(GRAPH.edges))[0] < shuffled.errors(edges=len(GRAPH.edges))[0]


def test_the_score_of_the_baselines_is_the_rise_in_error():
  host, _ = merged_state("re2", merges=30)
  ids = list(host.members)
  labels = np.empty(60, int)
  for a, members in host.members.items():
    labels[members] = a
  total = 60 * 59
  error = lambda labels: from_labels(GRAPH, labels).errors(edges=len(GRAPH.edges))[0] * total / 2
  w = np.zeros((60, 60))
  for a in ids:
    for b, (count, _) in host.blocks[a].items():
      w[a, b] = count
  own, w = np.diag(w).copy(), w - np.diag(np.diag(w))
  size = np.array([len(host.members.get(a, ())) for a in range(60)], float)
  safe = np.maximum(size, 1)
  norm = (w**2 / safe).sum(1)
  for a, b in [(ids[0], ids[1]), (ids[3], ids[7]), (ids[5], ids[2])]:
    dot = (w[a] * w[b] / safe).sum()
    rise = ssumm_baselines._increase(dot, w[a, b], norm[a], norm[b], own[a], own[b], size[a], size[b])
    assert float(rise) == pytest.approx(error(np.where(labels == b, a, labels)) - error(labels), abs=1e-6)


def test_k_means_finds_disjoint_cliques():
  edges = [(6 * c + u, 6 * c + v) for c in range(3) for u in range(6) for v in range(u)]
  graph = common.make(18, np.array(edges))
  best = min(
    from_labels(graph, ssumm_baselines.s2l(graph, jax.random.key(k), supernodes=3)).errors(edges=45)[0]
    for k in range(6)
  )
  assert best == 0.0


def test_sparsification_alone_meets_the_budget():
  s = ssumm_baselines.sparsify_only(GRAPH, budget=0.4 * graph_bits(GRAPH), seed=0)
  assert s.bits() <= 0.4 * graph_bits(GRAPH) and (s.weight == 1).all()
  lost = 2 * (len(GRAPH.edges) - len(s.weight)) / (60 * 59)
  assert s.errors(edges=len(GRAPH.edges))[0] == pytest.approx(lost)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: ssumm.summarise(GRAPH, jax.random.key(0), budget=0), r"0 bits; for a share .* give share \* graph_bits"),
    (lambda: ssumm.summarise(GRAPH, jax.random.key(0), budget=0.3), "the budget is 0.3 bits"),
    (lambda: ssumm_host.summarise(GRAPH, 0, budget=0.3), "the budget is 0.3 bits"),
    (lambda: ssumm.summarise(GRAPH, 0, budget=9), r"key is 0; give jax.random.key\(0\)"),
    (lambda: ssumm.summarise(networkx.path_graph(3), jax.random.key(0), budget=9), r"is a networkx\.\S+; make a Graph"),
    (lambda: graph_bits(networkx.path_graph(3)), r"is a networkx\.\S+; make a Graph of it, .*from_networkx"),
    (lambda: ssumm.summarise(GRAPH, jax.random.key(0), budget=9, error="re3"), "error is 're3'"),
    (lambda: ssumm.summarise(GRAPH, jax.random.key(0), budget=9, groups="all"), "groups is 'all'"),
    (lambda: ssumm.summarise(GRAPH, jax.random.key(0), budget=9, share=2.0), "share is 2.0"),
    (lambda: ssumm.summarise(GRAPH, jax.random.key(0), budget=9, iterations=0), "iterations=0"),
    (lambda: blocks.initial_state(common.load("karate", directed=True)), "undirected"),
    (lambda: blocks.initial_state(common.make(3, np.zeros((0, 2)))), "at least one edge"),
    (lambda: from_labels(GRAPH, np.zeros(3)), "give one a node"),
    (lambda: ssumm_baselines.s2l(GRAPH, jax.random.key(0), supernodes=61), "supernodes is 61"),
    (lambda: ssumm_baselines.merge_order(GRAPH, jax.random.key(0), rule="x", stop=3), "rule is 'x'"),
    (lambda: ssumm_baselines.labels_after(np.zeros((0, 2), int), 5, supernodes=4), "need 1 merges"),
  ],
)
def test_impossible_requests_are_named(call, message):
  with pytest.raises(InputError, match=message):
    call()


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_errors_and_seconds_are_of_the_same_settings(scale):
  """Of the defaults: seconds are of them by construction."""
  defaults = {name: p.default for name, p in inspect.signature(ssumm.summarise).parameters.items()}
  options = get_config(scale).summary.options.to_dict()
  assert options == {name: defaults[name] for name in options}


def test_the_experiment_runs_and_continues(tmp_path, monkeypatch):
  run_and_continue("ssumm", tmp_path, monkeypatch, "measure_curve", "measure_host", "measure_size")
