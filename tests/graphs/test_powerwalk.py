import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from experiments.powerwalk import baselines as powerwalk_baselines
from jaxlab.core.checks import InputError
from jaxlab.core.mesh import make_mesh
from jaxlab.graphs import common, fingerprints, powerwalk, powerwalk_sharded
from tests.common import run_and_continue

C = fingerprints.RESET
# 50 vertices, some of them dangling.
RAW = common.load("sbm", nodes=50, degree=3, blocks=5, mixing=0.3, directed=True, seed=2)
GRAPH = fingerprints.walk_graph(RAW)
SOURCES = np.arange(0, 48, 6)


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


def matrix(graph):
  """P from the definition."""
  p = np.zeros((graph.nodes, graph.nodes))
  for v in range(graph.nodes):
    for w in np.asarray(graph.targets)[int(graph.offsets[v]) : int(graph.offsets[v + 1])]:
      p[v, w] += 1 / int(graph.degree[v])
  return p


PPR = C * np.linalg.inv(np.eye(50) - (1 - C) * matrix(GRAPH))


def exact_index(dtype=jnp.float64):
  origin, vertex = np.nonzero(PPR)
  return fingerprints.make_index(50, origin, vertex, PPR[origin, vertex], dtype)


def test_dangling_vertices_loop_and_rows_sum_to_one():
  out = np.bincount(RAW.edges[:, 0], minlength=50)
  assert (out == 0).any()
  p = matrix(GRAPH)
  np.testing.assert_allclose(p.sum(1), 1)
  np.testing.assert_array_equal(np.diag(p)[out == 0], 1)
  both = fingerprints.walk_graph(common.load("karate"))
  assert len(both.targets) == 2 * 78


def test_power_iteration_is_the_dense_solve():
  """c (I - (1 - c) P)^-1 on n = 50; and scipy's products."""
  actual = powerwalk.exact(jnp.arange(50), GRAPH, dtype=jnp.float64)
  np.testing.assert_allclose(actual, PPR.T, atol=1e-10)
  transposed = powerwalk_baselines.transition(GRAPH).T.tocsr()
  scipy_rows = powerwalk_baselines.scipy_power(SOURCES, transposed, iterations=150)
  np.testing.assert_allclose(scipy_rows, PPR[SOURCES].T, atol=1e-10)
  s, f, _, _ = powerwalk.decompose(jnp.asarray(SOURCES), GRAPH, steps=3, dtype=jnp.float64)
  few = powerwalk.exact(jnp.asarray(SOURCES), GRAPH, iterations=3, dtype=jnp.float64)
  np.testing.assert_allclose(few, s + f, atol=1e-12)
  np.testing.assert_allclose(powerwalk_baselines.scipy_power(SOURCES, transposed, iterations=3), s + f, atol=1e-12)


def test_networkx_agrees_where_no_vertex_dangles():
  karate = networkx.karate_club_graph()
  graph = fingerprints.walk_graph(common.load("karate"))
  expected = networkx.pagerank(karate, alpha=1 - C, personalization={5: 1}, tol=1e-10, max_iter=300, weight=None)
  actual = powerwalk.exact(jnp.array([5]), graph)[:, 0]
  np.testing.assert_allclose(actual, [expected[v] for v in range(34)], atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
def test_with_exact_fingerprints_the_answer_is_exact_for_every_number_of_steps(steps):
  """The decomposition theorem, to 1e-10; without an index L1 is (1 - c)^T."""
  answer = powerwalk.query(jnp.asarray(SOURCES), GRAPH, exact_index(), steps=steps, dtype=jnp.float64)
  np.testing.assert_allclose(answer, PPR[SOURCES].T, atol=1e-10)
  short = powerwalk.query(jnp.asarray(SOURCES), GRAPH, None, steps=steps, dtype=jnp.float64)
  np.testing.assert_allclose(np.abs(short - PPR[SOURCES].T).sum(0), (1 - C) ** steps, atol=1e-10)


@pytest.mark.parametrize("prune", powerwalk.PRUNE)
@pytest.mark.parametrize("steps", [3, 5])
def test_mass_is_conserved_or_accounted_for(prune, steps):
  """|S| + |F| + |H| = 1, less what "drop" reports."""
  s, f, h, dropped = powerwalk.decompose(
    jnp.asarray(SOURCES), GRAPH, steps=steps, eps=0.02, prune=prune, dtype=jnp.float64
  )
  np.testing.assert_allclose(s.sum(0) + f.sum(0) + h.sum(0) + dropped, 1, atol=1e-12)
  assert (float(dropped.sum()) > 0) == (prune == "drop")
  assert (float(h.sum()) > 0) == (prune == "hold")


def test_dropping_is_that_of_the_published_code():
  """S gains c F where that is eps or more; flow of less than eps an edge, (1 - c) F / d, goes no further."""
  eps, p, degree = 0.02, matrix(GRAPH), np.asarray(GRAPH.degree)[:, None]
  flow, s = np.eye(50)[:, SOURCES], 0.0
  for _ in range(4):
    s = s + np.where(C * flow >= eps, C * flow, 0)
    flow = p.T @ np.where((1 - C) * flow / degree >= eps, (1 - C) * flow, 0)
  options = dict(steps=4, eps=eps, prune="drop", dtype=jnp.float64)
  ours = powerwalk.decompose(jnp.asarray(SOURCES), GRAPH, **options)
  np.testing.assert_allclose(ours[0], s, atol=1e-12)
  np.testing.assert_allclose(ours[1], flow, atol=1e-12)


@given(st.floats(1e-4, 0.2), st.integers(0, 5))
def test_dropping_never_exceeds_the_truth_and_holding_stays_exact(eps, steps):
  """With exact fingerprints: drop <= p_u, its error is the missing mass; hold is exact."""
  options = dict(steps=steps, eps=eps, dtype=jnp.float64)
  less = np.asarray(powerwalk.query(jnp.asarray(SOURCES), GRAPH, exact_index(), prune="drop", **options))
  held = powerwalk.query(jnp.asarray(SOURCES), GRAPH, exact_index(), prune="hold", **options)
  truth = PPR[SOURCES].T
  assert (less <= truth + 1e-12).all()
  np.testing.assert_allclose(np.abs(less - truth).sum(0), 1 - less.sum(0), atol=1e-10)
  np.testing.assert_allclose(held, truth, atol=1e-10)


@pytest.mark.parametrize("prune", powerwalk.PRUNE)
def test_the_error_is_at_most_dropped_mass_plus_that_of_the_fingerprints(prune):
  """With a real index."""
  index = fingerprints.build_index(GRAPH, jax.random.key(0), walks=20)
  rows = np.zeros((50, 50))
  np.add.at(rows, (np.asarray(index.origins), np.asarray(index.visited)), np.asarray(index.values))
  s, f, h, dropped = (
    np.asarray(x)
    for x in powerwalk.decompose(jnp.asarray(SOURCES), GRAPH, steps=2, eps=0.01, prune=prune, dtype=jnp.float64)
  )
  estimate = np.asarray(powerwalk.combine(jnp.asarray(s), jnp.asarray(f), jnp.asarray(h), index))
  bound = dropped + (f + h).T @ np.abs(rows - PPR).sum(1)
  error = np.abs(estimate - PPR[SOURCES].T).sum(0)
  assert (error <= bound + 1e-5).all() and (error > 0.01).sum() >= 6


def visits(key, graph, origins, **options):
  """`count_visits` as a matrix."""
  row, vertex, count = fingerprints.count_visits(key, graph, np.asarray(origins, np.int32), **options)
  assert (count > 0).all() and len(np.unique(row * graph.nodes + vertex)) == len(row)
  matrix = np.zeros((len(origins), graph.nodes))
  matrix[row, vertex] = count
  return matrix


def equal(ours, theirs):
  assert ours.nodes == theirs.nodes
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def occupation(length, restart=False):
  """Expected visits of one walker in `length` visits, from the definition: rows by origin."""
  p, alive, total = (1 - C) * matrix(GRAPH), np.eye(50), np.zeros((50, 50))
  for _ in range(length):
    total += alive
    back = C * alive.sum(1)
    alive = alive @ p + (np.diag(back) if restart else 0)
  return total


@pytest.mark.parametrize("moves", fingerprints.MOVES)
def test_visits_are_unbiased(moves):
  """z-test over 200 groups of 20 walkers, every entry, Bonferroni, in all three ways to move.

  Expectations are those of walks cut at 100 visits, 30 on long paths: c / R times them is p to 1e-7 for the first.
  """
  length = 30 if moves == "long_path" else 100
  truth = occupation(length, restart=moves == "long_path")[SOURCES]
  if moves != "long_path":
    np.testing.assert_allclose(C * truth, PPR[SOURCES], atol=1e-6)
  origins = np.tile(SOURCES, 200)
  samples = visits(jax.random.key(0), GRAPH, origins, per_origin=20, length=length, moves=moves).reshape(200, 8, 50)
  seen = truth * 200 * 20 > 20 / C  # enough visits for the normal limit
  # A long path at a vertex that only loops does not vary at all.
  deviation = np.maximum(samples.std(0, ddof=1), 1e-9)
  z = (samples.mean(0) - 20 * truth)[seen] / (deviation[seen] / np.sqrt(200))
  assert seen.sum() > 50
  assert np.abs(z).max() < scipy.stats.t(199).isf(0.005 / seen.sum())


def test_only_rounding_loses_the_number_of_walkers():
  """Long paths make every visit they may; rounding keeps the number right on average alone."""
  options = dict(per_origin=10, length=6)
  long = visits(jax.random.key(0), GRAPH, SOURCES, moves="long_path", **options)
  np.testing.assert_array_equal(long.sum(1), 60)
  star = common.make(101, np.stack([np.zeros(100, int), np.arange(1, 101)], 1), directed=True)
  one = visits(
    jax.random.key(1), fingerprints.walk_graph(star), np.zeros(2000), per_origin=1, length=2, moves="rounded"
  )
  moved = one[:, 1:].sum(1)
  assert abs(moved.mean() - (1 - C)) < 0.06 and moved.max() > 1
  np.testing.assert_allclose(moved.var(), (1 - C) * 0.99 + C * (1 - C), rtol=0.15)


def test_the_variance_of_full_paths_is_that_of_returns_on_a_cycle():
  """p c (1 + r)/(1 - r) - p^2 with r = (1 - c)^3 on a 3-cycle; ends have p (1 - p)."""
  graph = fingerprints.walk_graph(common.make(3, np.array([[0, 1], [1, 2], [2, 0]]), directed=True))
  p = C * (1 - C) ** np.arange(3) / (1 - (1 - C) ** 3)
  walkers = jnp.zeros(40_000, jnp.int32)
  full = C * visits(jax.random.key(1), graph, walkers, per_origin=1, length=100)
  r = (1 - C) ** 3
  np.testing.assert_allclose(full.mean(0), p, rtol=0.02)
  np.testing.assert_allclose(full.var(0), p * C * (1 + r) / (1 - r) - p**2, rtol=0.05)
  position, _ = fingerprints.walks(jax.random.key(2), graph, walkers, length=100)
  ends = np.asarray(position[-1])[:, None] == np.arange(3)
  np.testing.assert_allclose(ends.var(0), p * (1 - p), rtol=0.05)
  assert (full.var(0) < ends.var(0)).all()


def test_walkers_are_conserved_follow_edges_and_stop_for_good():
  """Every walk has one start, lives on a share 1 - c a step, and its visits are counted once."""
  origins = jnp.repeat(jnp.arange(50), 400)
  position, alive = (np.asarray(x) for x in fingerprints.walks(jax.random.key(0), GRAPH, origins, length=12))
  assert alive[0].all() and (np.diff(alive.astype(int), axis=0) <= 0).all()
  np.testing.assert_allclose(alive.mean(1), (1 - C) ** np.arange(12), atol=0.012)
  chosen = np.arange(7, 20_000, 997)
  alone = fingerprints.walks(jax.random.key(0), GRAPH, origins[chosen], length=12, numbers=jnp.asarray(chosen))
  np.testing.assert_array_equal(alone[0], position[:, chosen])
  moved = alive[1:]
  assert (matrix(GRAPH)[position[:-1], position[1:]][moved] > 0).all()
  assert (position[1:] == position[:-1])[~moved].all()
  counts = visits(jax.random.key(0), GRAPH, np.arange(50), per_origin=400, length=12)
  again = np.zeros((50, 50))
  np.add.at(again, (np.broadcast_to(origins, alive.shape)[alive], position[alive]), 1)
  np.testing.assert_array_equal(counts, again)


def test_visits_sorted_on_a_device_are_those_sorted_on_the_host(monkeypatch):
  """Beside a CPU the keys are sorted before they are fetched, and only as many as there are, of one device or eight."""
  options = dict(walks=40, length=20, block=1)  # about 256 visits a source: fetched as 256 of some, 512 of others
  programs = fingerprints._visits, powerwalk_sharded._by_rows
  forget = lambda: [program.clear_cache() for program in programs]
  host = fingerprints.build_index(GRAPH, jax.random.key(3), **options)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  forget()
  equal(fingerprints.build_index(GRAPH, jax.random.key(3), **options), host)
  equal(powerwalk_sharded.build_index(GRAPH, jax.random.key(3), make_mesh(), axis="data", **options), host)
  forget()


def test_an_index_keeps_the_largest_entries():
  whole = fingerprints.build_index(GRAPH, jax.random.key(0), walks=50, block=16)
  small = fingerprints.build_index(GRAPH, jax.random.key(0), walks=50, block=16, cap=5)
  raw = fingerprints.build_index(GRAPH, jax.random.key(0), walks=50, block=16, cap=5, norm="unbiased")
  dense = lambda i: np.asarray(jnp.zeros((50, 50)).at[i.origins, i.visited].add(i.values))
  np.testing.assert_allclose(dense(whole).sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(dense(small).sum(1), 1, rtol=1e-5)
  assert ((dense(small) > 0).sum(1) <= 5).all()
  entries = (dense(whole) > 0).sum()
  assert 12 * entries <= whole.bytes < 1.2 * 12 * entries + 12 * 256
  assert whole.bytes == sum(part.nbytes for part in jax.tree.leaves(whole))
  assert (dense(raw).sum(1) < 1.5).all()
  for v, row in enumerate(dense(whole)):
    best = np.argsort(-row, kind="stable")[:5]  # of equal counts the smaller id
    assert set(np.flatnonzero(dense(small)[v])) == set(best[row[best] > 0])


def test_a_batch_answers_as_one_by_one_and_in_chunks(monkeypatch):
  """Ties go to the smaller id."""
  index = fingerprints.build_index(GRAPH, jax.random.key(0), walks=10)
  batch = powerwalk.query(jnp.asarray(SOURCES), GRAPH, index, steps=2)
  one = [powerwalk.query(jnp.asarray([u]), GRAPH, index, steps=2)[:, 0] for u in SOURCES]
  np.testing.assert_allclose(batch, jnp.stack(one, 1), atol=1e-6)
  ids, scores = powerwalk.top_k(SOURCES, GRAPH, index, k=7, batch=3, steps=2)
  expected = np.argsort(-np.asarray(batch).T, axis=1, kind="stable")[:, :7]
  np.testing.assert_array_equal(ids, expected)
  np.testing.assert_allclose(scores, np.take_along_axis(np.asarray(batch).T, expected, 1), atol=1e-6)
  ids, scores = powerwalk.exact_top_k(SOURCES, GRAPH, k=3, iterations=2, batch=5)
  few = np.asarray(powerwalk.exact(jnp.asarray(SOURCES), GRAPH, iterations=2)).T
  np.testing.assert_array_equal(ids, np.argsort(-few, axis=1, kind="stable")[:, :3])
  monkeypatch.setattr(powerwalk, "_MESSAGES", 8 * 13)
  np.testing.assert_allclose(powerwalk.step(batch, GRAPH), matrix(GRAPH).T @ np.asarray(batch), atol=1e-6)


@pytest.mark.parametrize("nodes, k", [(50, 7), (700, 3), (1024, 8), (1024, 5)])
def test_the_largest_of_groups_are_the_largest(nodes, k):
  """Ties included: few distinct values, in groups of 128 ids whose maxima differ."""
  x = jnp.asarray(np.floor(np.random.default_rng(nodes).exponential(2, (nodes, 30))), jnp.float32)
  for ours, theirs in zip(powerwalk.largest(x, k=k), jax.lax.top_k(x.T, k), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_vertices_are_told_by_their_names():
  """Integers with gaps, as wiki-Vote has, and text: sources and answers are those of the positions, renamed."""
  index = fingerprints.build_index(GRAPH, jax.random.key(0), walks=10)
  ids, scores = powerwalk.top_k([6, 0], GRAPH, index, k=5, steps=2)
  best, _ = powerwalk.exact_top_k([6, 0], GRAPH, k=5)
  for name in (lambda v: 3 * v + 7, lambda v: f"page {v}"):
    pairs = [(name(u), name(v)) for u, v in RAW.edges.tolist()]
    named = fingerprints.walk_graph(common.from_edges(pairs, directed=True, vertices=map(name, range(50))))
    assert named.digest == GRAPH.digest
    names, same = powerwalk.top_k([name(6), name(0)], named, index, k=5, steps=2)
    assert names.tolist() == [[name(v) for v in row] for row in ids.tolist()]
    np.testing.assert_array_equal(same, scores)
    names, _ = powerwalk.exact_top_k([name(6), name(0)], named, k=5)
    assert names.tolist() == [[name(v) for v in row] for row in best.tolist()]
    with pytest.raises(InputError, match="no vertex is named -1"):
      powerwalk.top_k([-1], named, index, k=5, steps=2)


def test_an_index_serves_the_graph_and_the_reset_it_was_built_with_alone():
  """Of as many vertices and edges but one edge elsewhere, whole and sharded; what it was built with is told."""
  index = fingerprints.build_index(GRAPH, jax.random.key(0), walks=3, length=9, cap=7, reset=0.3)
  assert index.built == (GRAPH.digest, 0.3, 3, 9, 7)
  edges = RAW.edges.copy()
  free = next(v for v in range(1, 50) if v not in edges[edges[:, 0] == edges[0, 0], 1])
  edges[0, 1] = free
  other = fingerprints.walk_graph(common.make(50, edges, directed=True))
  mesh = make_mesh({"data": 8})
  parts = powerwalk_sharded.shard(GRAPH, index, mesh, axis="data")
  refused = {
    "graph of other edges": [
      lambda: powerwalk.query([0], other, index, steps=1, reset=0.3),
      lambda: powerwalk.backward(jnp.array([0]), other, index, steps=1, reset=0.3),
      lambda: powerwalk_sharded.shard(other, index, mesh, axis="data"),
    ],
    "reset is 0.15; .* give reset=0.3": [
      lambda: powerwalk.top_k([0], GRAPH, index, k=1, steps=1),
      lambda: powerwalk_sharded.query([0], parts, mesh, axis="data", steps=1),
    ],
    "index has 50 vertices, the graph 34": [
      lambda: powerwalk.query([0], fingerprints.walk_graph(common.load("karate")), index, steps=1, reset=0.3)
    ],
  }
  for message, calls in refused.items():
    for call in calls:
      with pytest.raises(InputError, match=message):
        call()
  whole = powerwalk.query(SOURCES, GRAPH, index, steps=2, reset=0.3)
  sharded = powerwalk_sharded.query(SOURCES, parts, mesh, axis="data", steps=2, reset=0.3)
  np.testing.assert_allclose(sharded, whole, atol=1e-6)


def test_backward_sweeps_are_the_forward_estimate():
  index = fingerprints.build_index(GRAPH, jax.random.key(0), walks=10)
  targets = jnp.array([0, 3, 44])
  columns = powerwalk.backward(targets, GRAPH, index, steps=3)
  forward = powerwalk.query(jnp.arange(50), GRAPH, index, steps=3)
  np.testing.assert_allclose(columns, np.asarray(forward)[np.asarray(targets)].T, atol=1e-5)


def test_eight_devices_answer_as_one():
  """Vertices by range over a mesh axis, 50 of them on 8 devices."""
  assert jax.device_count() == 8
  index = fingerprints.build_index(GRAPH, jax.random.key(0), walks=10)
  mesh = make_mesh({"data": 8})
  parts = powerwalk_sharded.shard(GRAPH, index, mesh, axis="data")
  assert len(parts.edges[0].sharding.device_set) == 8
  for steps in (0, 3):
    whole = powerwalk.query(jnp.asarray(SOURCES), GRAPH, index, steps=steps)
    sharded = powerwalk_sharded.query(jnp.asarray(SOURCES), parts, mesh, axis="data", steps=steps)
    np.testing.assert_allclose(sharded, whole, atol=1e-6)


@pytest.mark.parametrize("moves", fingerprints.MOVES)
@pytest.mark.parametrize("block", [1, 4, 19])
def test_an_index_does_not_depend_on_blocks_or_devices(moves, block):
  """50 sources, some dangling, on 8 devices: full rounds, a short last one, and blocks larger than the sources fill."""
  mesh = make_mesh({"data": 8})
  options = dict(walks=7, length=15, moves=moves, cap=6)
  whole = fingerprints.build_index(GRAPH, jax.random.key(3), **options)
  equal(fingerprints.build_index(GRAPH, jax.random.key(3), block=block, **options), whole)
  equal(powerwalk_sharded.build_index(GRAPH, jax.random.key(3), mesh, axis="data", block=block, **options), whole)
  assert not np.array_equal(whole.values, fingerprints.build_index(GRAPH, jax.random.key(4), **options).values)


@pytest.mark.parametrize("count", [1, 8, 13])
def test_devices_index_any_number_of_hubs(count):
  """Fewer sources than devices, as many, and more; over one axis of two; and the online part answers the same."""
  origins = np.random.default_rng(count).permutation(50)[:count]
  options = dict(walks=9, norm="unbiased", origins=origins)
  mesh = make_mesh({"data": 4, "tensor": 2})
  index = powerwalk_sharded.build_index(GRAPH, jax.random.key(0), mesh, axis="data", **options)
  whole = fingerprints.build_index(GRAPH, jax.random.key(0), **options)
  equal(index, whole)
  parts = powerwalk_sharded.shard(GRAPH, index, mesh, axis="data")
  answer = powerwalk_sharded.query(jnp.asarray(SOURCES), parts, mesh, axis="data", steps=2)
  np.testing.assert_allclose(answer, powerwalk.query(jnp.asarray(SOURCES), GRAPH, whole, steps=2), atol=1e-6)


def test_hubs_hold_the_flow_and_need_no_other_rows():
  """All vertices hubs: the fingerprint of the source; none: S + F; always mass one, exact with exact rows of hubs."""
  hubs = np.asarray(GRAPH.degree) >= 4
  assert 0 < hubs.sum() < 50
  rows = exact_index()
  kept = hubs[np.asarray(rows.origins)]
  index = fingerprints.make_index(50, *(np.asarray(x)[kept] for x in (rows.origins, rows.visited, rows.values)))
  answer = lambda t: np.asarray(powerwalk.query(jnp.asarray(SOURCES), GRAPH, index, steps=t, hubs=jnp.asarray(hubs)))
  np.testing.assert_allclose(answer(3).sum(0), 1, atol=1e-5)
  np.testing.assert_allclose(answer(100), PPR[SOURCES].T, atol=1e-5)
  np.testing.assert_allclose(answer(0)[:, hubs[SOURCES]], PPR[SOURCES].T[:, hubs[SOURCES]], atol=1e-5)


def test_forward_push_keeps_its_invariant_and_stops_below_r_max():
  """p_u = reserve + sum_v residual(v) p_v, residual < r_max d; FORA and ends of walks estimate p_u."""
  reserve, residual, edges = powerwalk_baselines.forward_push(jnp.asarray(SOURCES), GRAPH, r_max=1e-3)
  np.testing.assert_allclose(reserve + PPR.T @ np.asarray(residual), PPR[SOURCES].T, atol=1e-5)
  assert (np.asarray(residual) < 1e-3 * np.asarray(GRAPH.degree)[:, None]).all() and (np.asarray(edges) > 0).all()
  assert (np.asarray(residual) >= 1e-3).any()  # a vertex of many edges may keep more
  estimate = powerwalk_baselines.fora(jax.random.key(0), GRAPH, jnp.asarray(SOURCES), r_max=1e-2)
  assert float(np.abs(estimate - PPR[SOURCES].T).sum(0).max()) < 0.1
  ends = powerwalk_baselines.end_point(jax.random.key(0), GRAPH, jnp.asarray(SOURCES), per_source=20_000)
  assert float(np.abs(ends - PPR[SOURCES].T).sum(0).max()) < 0.06


def test_measures_of_quality():
  truth = jnp.array([[0.5, 0.3, 0.15, 0.05]]).T
  perfect = powerwalk.quality(truth, truth, k=2)
  assert {name: float(v[0]) for name, v in perfect.items()} == {"l1": 0, "precision": 1, "rag": 1, "ndcg": 1}
  wrong = powerwalk.quality(jnp.array([[0.5, 0.1, 0.35, 0.05]]).T, truth, k=2)
  assert float(wrong["precision"][0]) == 0.5 and float(wrong["rag"][0]) == pytest.approx(0.65 / 0.8)
  assert float(wrong["l1"][0]) == pytest.approx(0.4)
  assert float(wrong["ndcg"][0]) == pytest.approx((0.5 + 0.15 / np.log2(3)) / (0.5 + 0.3 / np.log2(3)))


def test_work_counts_edges_and_entries():
  chain = fingerprints.walk_graph(common.make(4, np.array([[0, 1], [0, 2], [1, 3], [2, 3]]), directed=True))
  index = fingerprints.make_index(4, np.array([3, 3, 1]), np.array([0, 3, 1]), np.ones(3))
  found = powerwalk.work(jnp.array([0]), chain, index, steps=2)
  assert found == {"edges": 4.0, "entries": 2.0, "active": 1.0}


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: powerwalk.top_k([50], GRAPH, None, k=3, steps=1), "vertices are 0..49"),
    (lambda: powerwalk.top_k([], GRAPH, None, k=3, steps=1), "non-empty"),
    (lambda: powerwalk.top_k(["ann"], GRAPH, None, k=3, steps=1), r"not integers; .* graph\.index"),
    (lambda: powerwalk.query([-1], GRAPH, None, steps=1), "sources lie in -1..-1; vertices are 0..49"),
    (lambda: powerwalk.query([3, 999_999], GRAPH, None, steps=1), "sources lie in 3..999999"),
    (lambda: powerwalk.query([2**32], GRAPH, None, steps=1), "sources lie in 4294967296"),
    (lambda: powerwalk.query([0.7], GRAPH, None, steps=1), "sources hold float64"),
    (lambda: powerwalk.query(0, GRAPH, None, steps=1), r"shape \(\); give a non-empty list"),
    (lambda: powerwalk.query([0], GRAPH, None, steps=0.5), "steps is 0.5; it must be an integer"),
    (lambda: powerwalk.query([0], GRAPH, None, steps=-1), "steps is -1"),
    (lambda: powerwalk.exact_top_k([0], GRAPH, k=2, iterations=2.5), "iterations is 2.5"),
    (lambda: powerwalk.exact_top_k([50], GRAPH, k=2), "vertices are 0..49"),
    (lambda: powerwalk.top_k([0], GRAPH, None, k=2.0, steps=1), "k is 2.0"),
    (lambda: powerwalk.top_k([0], GRAPH, None, k=0, steps=1), "k is 0"),
    (lambda: powerwalk.top_k([0], GRAPH, None, k=51, steps=1), "k is 51"),
    (lambda: powerwalk.top_k([0], GRAPH, None, k=5, batch=0, steps=1), "batch is 0"),
    (lambda: powerwalk.decompose(jnp.array([0]), GRAPH, steps=-1), "steps is -1"),
    (lambda: powerwalk.decompose(jnp.array([-1]), GRAPH, steps=1), "sources lie in -1..-1"),
    (lambda: powerwalk.exact([-1], GRAPH), "sources lie in -1..-1"),
    (lambda: powerwalk.exact([0], GRAPH, iterations=2.5), "iterations is 2.5"),
    (lambda: powerwalk.backward([50], GRAPH, exact_index(), steps=1), "sources lie in 50..50"),
    (lambda: powerwalk.backward([0], GRAPH, exact_index(), steps=0.5), "steps is 0.5"),
    (lambda: powerwalk.work([-1], GRAPH, None, steps=1), "sources lie in -1..-1"),
    (lambda: powerwalk.work([0], GRAPH, None, steps=0.5), "steps is 0.5"),
    (lambda: powerwalk.query([0], RAW, None, steps=1), r"graph is a Graph; walks need fingerprints\.walk_graph"),
    (lambda: powerwalk.exact_top_k([0], RAW, k=1), "graph is a Graph; walks need"),
    (lambda: powerwalk_sharded.shard(RAW, exact_index(), make_mesh(), axis="data"), "graph is a Graph; walks need"),
    (lambda: fingerprints.build_index(RAW, jax.random.key(0), walks=1), "graph is a Graph; walks need"),
    (lambda: fingerprints.make_index(3, np.array([0]), np.array([3]), np.ones(1)), r"of vertices 0\.\.2"),
    (lambda: fingerprints.build_index(GRAPH, 0, walks=1), r"key is 0; give jax.random.key\(0\)"),
    (lambda: fingerprints.walk_graph(networkx.path_graph(3)), r"graph is a networkx\.\S+; make a Graph of it"),
    (lambda: powerwalk.decompose(jnp.array([0]), GRAPH, steps=1, reset=1.0), "reset is 1.0"),
    (lambda: powerwalk.decompose(jnp.array([0]), GRAPH, steps=1, prune="some"), "prune is 'some'"),
    (lambda: fingerprints.build_index(GRAPH, jax.random.key(0), walks=0), "walks is 0"),
    (lambda: fingerprints.build_index(GRAPH, jax.random.key(0), walks=1, cap=0.5), "cap is 0.5"),
    (lambda: fingerprints.build_index(GRAPH, jax.random.key(0), walks=1, reset=0), "reset is 0"),
    (lambda: fingerprints.build_index(GRAPH, jax.random.key(0), walks=1, norm="l2"), "norm is 'l2'"),
    (lambda: fingerprints.build_index(GRAPH, jax.random.key(0), walks=1, moves="jump"), "moves is 'jump'"),
    (
      lambda: fingerprints.build_index(GRAPH, jax.random.key(0), walks=1, moves="long_path", norm="unbiased"),
      "needs norm=self_norm",
    ),
    (lambda: fingerprints.build_index(GRAPH, jax.random.key(0), walks=2**27), "6710886400 walks; their numbers"),
    (lambda: powerwalk_sharded.shard(GRAPH, exact_index(), make_mesh(), axis="x"), "axis is 'x'"),
    (
      lambda: powerwalk_sharded.build_index(GRAPH, jax.random.key(0), make_mesh(), axis="x", walks=1),
      "axis is 'x'; .*data",
    ),
    (lambda: powerwalk_baselines.fora(jax.random.key(0), GRAPH, jnp.array([0]), r_max=0.1, eps=-1.0), "positive"),
  ],
)
def test_impossible_requests_are_named(call, message):
  with pytest.raises(InputError, match=message):
    call()


def test_the_experiment_runs_and_continues(tmp_path, monkeypatch):
  measures = "accuracy.measure", "accuracy.caps", "speed.measure", "speed.measure_size"
  report = run_and_continue("powerwalk", tmp_path, monkeypatch, *measures)
  for name in ("passes over the edges", "faster power iteration"):
    (note,) = (claim.note for claim in report.claims if name in claim.name)
    assert "in L1" in note and "cap" in note
