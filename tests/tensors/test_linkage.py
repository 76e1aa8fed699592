import functools
import itertools

import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from sympy.polys.matrices import DomainMatrix

from configs import linkage as config_file
from experiments.linkage import baselines, identities, speed
from experiments.linkage import graphs as graph_part
from jaxlab.core.checks import InputError
from jaxlab.tensors import fields, linkage
from jaxlab.tensors import linkage_graphs as graphs
from tests.common import Whole, run_and_continue

N = 3
FIRST = jnp.arange(2 * N) < N
link = jax.jit(linkage.link, static_argnums=(2, 3, 4, 5), static_argnames="skewed")
minimise = jax.jit(linkage.minimise_overlap, static_argnums=(2, 3, 4, 5))
compiled, compiled_graphs = Whole(linkage), Whole(graphs)


def batched(f):
  return jax.jit(jax.vmap(f))


def spaces(p, instances, size=N, seed=0):
  return identities.random_spaces(p, instances, size, seed)


def vectors(m, p):
  m = np.asarray(m)
  return {tuple(map(int, np.array(c) @ m % p)) for c in itertools.product(range(p), repeat=m.shape[0])}


def test_the_worked_example():
  """lambda = 1 < |P| = 2, and P' = {b}."""
  a, b = fields.space([[1, 0, 1, 1], [0, 1, 0, 1]], 2), fields.space([[1, 0, 1], [0, 1, 1]], 2)
  whole = link(a, b, 2, 2, 1, 2)
  assert whole.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
  small_a, small_b, kept, size = minimise(a, b, 2, 2, 1, 2)
  assert int(size) == 1 and kept.tolist() == [False, True]
  assert np.array_equal(link(small_a, small_b, 2, 2, 1, 2), whole)


def test_identities_on_random_instances():
  """F1, F2, F5, same link, |P'| = lambda over GF(101): 400 instances of 1..6 columns a block, ranks 0..6.

  GF(2) is in the run of the experiment below.
  """
  result = identities.check_identities(101, config_file.get_config("test"))
  assert result["instances"] == 400
  assert set(result["failures"].values()) == {0} and len(result["failures"]) == 6
  assert 0 < result["after"] < result["before"] and len(result["sizes"]) >= 5  # lambda from 0 to 4 and more


def test_the_link_is_what_enumeration_finds():
  """Every vector of the link and no other, over GF(2) and GF(3)."""
  for p in (2, 3):
    a, b = spaces(p, 20)
    got = batched(lambda a, b, p=p: linkage.link(a, b, N, N, N, p))(a, b)
    for x, y, m in zip(a, b, got, strict=True):
      rows = np.asarray(m)[np.any(np.asarray(m) != 0, 1)]
      assert (vectors(rows, p) or {(0,) * 2 * N}) == linkage.enumerate_link(x, y, N, N, N, p)


def subspaces(n):
  """All subspaces of GF(2)^n as reduced row echelon forms of n rows."""
  nonzero = [v for v in itertools.product((0, 1), repeat=n) if any(v)]
  bases = [c for k in range(n + 1) for c in itertools.combinations(nonzero, k)]
  rows = np.array([[*c, *[(0,) * n] * (n - len(c))] for c in bases])
  reduced = batched(lambda m: linkage.canonical(m, 2))(jnp.asarray(rows, jnp.int32))
  return jnp.asarray(np.unique(reduced, axis=0))


def test_what_one_shared_coordinate_can_do_by_exhaustion():
  """F3 (solvability), F4 and F5 on all 16 spaces over S+P and P+Q and all 67 over S+Q; |S| = |Q| = 2."""
  wholes = subspaces(4)
  parts = wholes[~np.any(np.asarray(wholes)[:, :, 3], 1), :3, :3]
  assert len(parts) == 16 and len(wholes) == 67
  on_s, on_p = jnp.arange(4) < 2, jnp.arange(3) == 2
  rank = lambda m: linkage.rank(m, 2)

  def pair(a, b):
    full = (rank(fields.keep(a, on_p)) == 1) & (rank(fields.keep(b, on_p[::-1])) == 1)
    empty = (rank(linkage.contract(a, on_p, 2)) == 0) & (rank(linkage.contract(b, on_p[::-1], 2)) == 0)
    whole = linkage.link(a, b, 2, 1, 2, 2)
    return whole, full & empty, linkage.connectivity(whole, on_s, 2)

  linked, irreducible, least = jax.jit(jax.vmap(jax.vmap(pair, (None, 0)), (0, None)))(parts, parts)
  np.testing.assert_array_equal(irreducible, np.asarray(least) == 1)  # F5: |P| = 1 is minimal iff irreducible
  reached = np.array([[np.any(np.all(row == v, (1, 2))) for v in wholes] for row in np.asarray(linked)])
  lam = np.asarray(batched(lambda m: linkage.connectivity(m, on_s, 2))(wholes))
  np.testing.assert_array_equal(reached.any(0), lam <= 1)  # F4: the bound, and that it is reached
  assert set(lam.tolist()) == {0, 1, 2}

  def solvable(a, m):
    """V_SP o S contains V_SQ o S, and V_SP x S lies in V_SQ x S."""
    s = jnp.arange(3) < 2
    inside = lambda x, y: rank(jnp.concatenate([x[:, :2], y[:, :2]])) == rank(y[:, :2])
    restricted = inside(linkage.restrict(m, on_s, 2), linkage.restrict(a, s, 2))
    return restricted & inside(linkage.contract(a, s, 2), linkage.contract(m, on_s, 2))

  conditions = jax.jit(jax.vmap(jax.vmap(solvable, (None, 0)), (0, None)))(parts, wholes)
  np.testing.assert_array_equal(reached, conditions)


def test_implicit_inversion_holds_exactly_when_its_conditions_do():
  """F3: V_PQ = V_SP <-> V_SQ iff V_SP o P contains V_PQ o P and V_SP x P lies in V_PQ x P; both occur."""

  def check(a, b):
    whole = linkage.link(a, b, N, N, N, 3)
    swapped = jnp.concatenate([a[:, N:], a[:, :N]], 1)
    back = linkage.link(swapped, whole, N, N, N, 3)
    restrict = linkage.restrict(a, ~FIRST, 3)[:, N:], linkage.restrict(b, FIRST, 3)[:, :N]
    contract = linkage.contract(a, ~FIRST, 3)[:, N:], linkage.contract(b, FIRST, 3)[:, :N]
    inside = lambda x, y: linkage.rank(jnp.concatenate([x, y]), 3) == linkage.rank(y, 3)
    return jnp.all(back == linkage.canonical(b, 3)), inside(restrict[1], restrict[0]) & inside(contract[0], contract[1])

  inverted, conditions = batched(check)(*spaces(3, 400))
  np.testing.assert_array_equal(inverted, conditions)
  assert 0.05 < np.mean(conditions) < 0.95


def test_decompositions_link_back_with_the_least_overlap(p=101):
  """Decompose o link = identity, |P| = lambda, minimising changes nothing; the minor form; three parts."""

  def check(m):
    m, n = linkage.canonical(m, p), 2 * N
    lam = linkage.connectivity(m, FIRST, p)
    a, b, size = linkage.decompose(m, N, p)
    same = [jnp.all(linkage.link(a, b, N, N, N, p) == m), size == lam]
    for mask in (FIRST, ~FIRST):  # F4, its other two forms
      same.append(lam == linkage.rank(fields.keep(m, mask), p) - linkage.rank(linkage.contract(m, mask, p), p))
    same.append(linkage.minimise_overlap(a, b, N, N, N, p)[3] == lam)
    a, b, t = linkage.decompose_minor(m, N, p)
    same += [jnp.all(linkage.link(a, b, N, N, N, p) == m), jnp.sum(t) == lam, ~jnp.any(jnp.where(t, 0, a[:, N:]))]
    sizes = (2, 1, 3)
    parts, ports, lambdas = linkage.decompose_parts(m, sizes, p)
    same.append(jnp.all(linkage.link(linkage.direct_sum(parts, sizes), ports, n, n, 0, p) == m))
    for size, start, count in zip(sizes, (0, 2, 3), lambdas, strict=True):
      at = (jnp.arange(n) >= start) & (jnp.arange(n) < start + size)
      same.append(count == linkage.connectivity(m, at, p))
    return jnp.stack(same)

  a, b = spaces(p, 200)
  m = jnp.concatenate([a, b[:, :2]], 1)
  assert np.all(np.asarray(batched(check)(m)), 0).all()


def test_every_space_over_two_elements_decomposes():
  """Decompose o link = identity with |P| = lambda, and the minor form, for all 67 spaces over GF(2)^4."""
  on_s = jnp.arange(4) < 2

  def check(m):
    (a, b, size), (minor_a, minor_b, t) = linkage.decompose(m, 2, 2), linkage.decompose_minor(m, 2, 2)
    lam = linkage.connectivity(m, on_s, 2)
    same = [jnp.all(linkage.link(*pair, 2, 2, 2, 2) == m) for pair in ((a, b), (minor_a, minor_b))]
    used = jnp.any(a[:, 2:] != 0, 0) | jnp.any(b[:, :2] != 0, 0)
    return jnp.stack([*same, size == lam, jnp.sum(t) == lam, jnp.sum(used) == lam])

  assert np.all(np.asarray(batched(check)(subspaces(4))), 0).all()


def test_linking_is_associative_over_disjoint_sets():
  """(V_SP <-> V_PQ) <-> V_QT = V_SP <-> (V_PQ <-> V_QT)."""
  go = lambda a, b: linkage.link(a, b, N, N, N, 3)
  (a, b), (c, _) = spaces(3, 200), spaces(3, 200, seed=1)
  assert np.array_equal(
    batched(lambda a, b, c: go(go(a, b), c))(a, b, c), batched(lambda a, b, c: go(a, go(b, c)))(a, b, c)
  )


def test_empty_spaces_and_sides():
  """Rank 0, no Q (a generalised minor), lambda = 0."""
  a, zero = fields.space([[1, 0, 1], [0, 1, 1]], 3), fields.space([[0]], 3)
  full = fields.space([[1]], 3)
  assert int(linkage.rank(link(a, full, 2, 1, 0, 3), 3)) == 2  # V_P = F^P: restriction
  assert np.asarray(link(a, zero, 2, 1, 0, 3))[0].tolist() == [1, 2]  # V_P = 0: contraction
  assert int(minimise(a, full, 2, 1, 0, 3)[3]) == 0


def test_packed_words_and_the_host_loops_find_the_same_overlap_and_spaces():
  """Words, and the peers of the benchmark (NumPy, integer rows), give P' and both spaces of the batched form."""
  a, b = spaces(2, 60, size=5)
  small_a, small_b, kept, size = batched(lambda a, b: linkage.minimise_overlap(a, b, 5, 5, 5, 2))(a, b)
  words = [speed.pack_blocks(np.asarray(x), 5) for x in (a, b)]
  packed = batched(lambda a, b: linkage.minimise_overlap(a, b, 1, 1, 1, 2))(*words)
  for x, y in zip(packed[:2], (small_a, small_b), strict=True):
    bits = np.concatenate([fields.unpack_bits(x[..., :1], 5), fields.unpack_bits(x[..., 1:], 5)], -1)
    np.testing.assert_array_equal(bits[:, :10], y)
    assert not np.any(bits[:, 10:])
  np.testing.assert_array_equal(fields.unpack_bits(packed[2], 5), kept)
  np.testing.assert_array_equal(packed[3], size)
  reduced = lambda m: (lambda rows, pivots: rows[: len(pivots)])(*baselines.numpy_eliminate(m, 2, range(m.shape[1])))
  for x, y, u, v, k in zip(*map(np.asarray, (a, b, small_a, small_b, kept)), strict=True):
    host_a, host_b, host_kept = baselines.numpy_minimise(x.astype(np.int64), y.astype(np.int64), 5, 5, 5, 2)
    assert np.flatnonzero(k).tolist() == host_kept
    ours = linkage.compact(u, np.append(np.ones(5, bool), k)), linkage.compact(v, np.append(k, np.ones(5, bool)))
    np.testing.assert_array_equal(reduced(host_a), ours[0])
    np.testing.assert_array_equal(reduced(host_b), ours[1])
    bits_a, bits_b, bits_kept = baselines.bitset_minimise(*map(baselines.to_bitset, (x, y)), 5, 5, 5)
    assert bits_kept == host_kept
    for bits, expected in ((bits_a, u), (bits_b, v)):
      expected = baselines.to_bitset(expected[expected.any(1)])
      assert sorted(baselines.bitset_eliminate(bits, range(10))[0]) == sorted(expected)


@pytest.mark.parametrize("p", [2, 101])
def test_galois_finds_the_same_overlap_and_spaces(p):
  """An independent implementation of the fields, where it is installed."""
  field = pytest.importorskip("galois").GF(p)
  reduced = lambda m: (lambda rows, pivots: rows[: len(pivots)])(*baselines.numpy_eliminate(m, p, range(m.shape[1])))
  for x, y in zip(*(np.asarray(s, np.int64) for s in spaces(p, 20)), strict=True):
    *expected, kept = baselines.numpy_minimise(x, y, N, N, N, p)
    *found, also = baselines.galois_minimise(x, y, N, N, N, field)
    assert also == kept
    for ours, theirs in zip(found, expected, strict=True):
      np.testing.assert_array_equal(reduced(np.asarray(ours, np.int64)), reduced(theirs))


def test_ranks_of_nearly_dependent_rows_differ_between_floats_and_exact_fields():
  """Rows (1, 1), (1, 1 + 10^-k): at k = 4 both say 2, at 12 floats say 1, and the gap tells."""
  with jax.enable_x64(True):
    for (
      k,
      real_rank,
    ) in ((4, 2), (12, 1)):
      rows = [[10**k, 10**k], [10**k, 10**k + 1]]
      assert int(compiled.rank(fields.space(rows, fields.LARGE), fields.LARGE)) == 2
      found, (nonzero, zero), *_ = real_figures(fields.space(rows, 0))
      assert int(found) == real_rank
      assert (nonzero < 1e-3 and zero == 0) if k == 4 else (nonzero == 1 and 1e-14 < zero < fields.TOLERANCE)


def test_elimination_agrees_with_sympy():
  """An independent reduced row echelon form over GF(7)."""
  rng = np.random.default_rng(0)
  for _ in range(10):
    m = rng.integers(0, 7, (4, 6)) * (rng.random((4, 6)) < 0.6)
    got = jax.jit(fields.eliminate, static_argnums=1)(jnp.asarray(m, jnp.int32), 7)
    expected, pivots = DomainMatrix([[sympy.GF(7)(int(v)) for v in row] for row in m], (4, 6), sympy.GF(7)).rref()
    np.testing.assert_array_equal(got.rows, np.array(expected.to_Matrix().tolist(), int) % 7)
    assert np.flatnonzero(got.pivots).tolist() == list(pivots)


def test_the_reals_agree_with_a_large_prime():
  """Integer instances over the reals (projectors) and over GF(32749): ranks, lambda, |P'| and the same link."""

  def numbers(a, b, p):
    whole = linkage.link(a, b, N, N, N, p)
    return linkage.rank(whole, p), linkage.connectivity(whole, FIRST, p), whole

  def again_and_dual(small_a, small_b, a, b):
    dual_b = jnp.where(FIRST, -1, 1) * linkage.perp(b, 0)
    return linkage.link(small_a, small_b, N, N, N, 0), linkage.link(linkage.perp(a, 0), dual_b, N, N, N, 0)

  def projector(m):
    return np.linalg.pinv(m, rcond=1e-9) @ m  # of the row space

  @batched
  def over_the_reals(a, b):
    small_a, small_b, _, size = linkage.minimise_overlap(a, b, N, N, N, 0)
    found = numbers(a, b, 0)
    return *found, size, fields.projector(found[2]), *again_and_dual(small_a, small_b, a, b), *fields.gap(a)

  with jax.enable_x64(True):
    a, b = spaces(3, 60, seed=3)
    rank, lam, whole, size, onto, again, dual, nonzero, zero = over_the_reals(a.astype(float), b.astype(float))
    exact_rank, exact_lam, _ = batched(lambda a, b: numbers(a, b, 32749))(a, b)
    np.testing.assert_array_equal(rank, exact_rank)
    np.testing.assert_array_equal(lam, exact_lam)
    np.testing.assert_array_equal(size, exact_lam)
    np.testing.assert_allclose(onto, projector(whole), atol=1e-8)
    np.testing.assert_allclose(projector(again), projector(whole), atol=1e-8)
    np.testing.assert_allclose(projector(dual), np.eye(2 * N) - projector(whole), atol=1e-8)
    assert float(jnp.min(nonzero)) > 1e-3 and float(jnp.max(zero)) < 1e-12


def shared_graphs(seed, tree):
  """Two random connected graphs on 3 shared and 2 own vertices each, and a path, or one edge twice, on the shared."""
  rng = np.random.default_rng(seed)

  def own(first):
    names = np.array([0, 1, 2, first, first + 1])
    order = rng.permutation(5)
    chain = [(names[order[i]], names[order[rng.integers(i)]]) for i in range(1, 5)]
    return np.array(chain + [tuple(rng.choice(names, 2, replace=False)) for _ in range(2)])

  return own(3), np.array([[0, 1], [1, 2] if tree else [0, 1]]), own(5)


def test_cut_spaces_link_to_the_cut_space_of_the_composition():
  """Equality with a spanning tree as P, for both kinds; one dimension more without."""
  tree = np.arange(32) % 2 == 0
  triples = []
  for seed, spans in enumerate(tree):
    s, p, q = shared_graphs(seed, spans)
    with_s, with_q, whole = np.concatenate([s, p]), np.concatenate([p, q]), np.concatenate([s, q])
    triples.append((with_s, with_q, whole))
    if spans:
      assert np.array_equal(graphs.compose_graphs(with_s, with_q, 2, 7), whole)
    else:
      with pytest.raises(InputError, match="in 2 pieces"):
        graphs.compose_graphs(with_s, with_q, 2, 7)
  matrices = [jnp.asarray(np.array([graphs.incidence(e, 7) % 3 for e in side])) for side in zip(*triples, strict=True)]

  def check(with_s, with_q, whole):
    linked, whole = linkage.link(with_s, with_q, 6, 2, 6, 3), linkage.canonical(whole, 3)
    cycles = linkage.link(linkage.perp(with_s, 3), linkage.perp(with_q, 3), 6, 2, 6, 3, skewed=True)
    size = linkage.minimise_overlap(with_s, with_q, 6, 2, 6, 3)[3]
    more = linkage.rank(linked, 3) - linkage.rank(whole, 3)
    return jnp.all(linked == whole), jnp.all(cycles == linkage.perp(whole, 3)), size, more

  equal, cycles_equal, size, more = map(np.asarray, batched(check)(*matrices))
  np.testing.assert_array_equal(equal, tree)
  np.testing.assert_array_equal(cycles_equal, tree)
  np.testing.assert_array_equal(more, ~tree)
  np.testing.assert_array_equal(size, np.where(tree, 2, 1))


def test_cut_and_cycle_spaces_of_a_triangle():
  cut, cycle = (graphs.graph_space([[0, 1], [1, 2], [0, 2]], 3, 3, kind=kind) for kind in ("cut", "cycle"))
  assert np.asarray(cut)[:2].tolist() == [[1, 0, 1], [0, 1, 1]] and not np.any(cut[2:])
  assert np.asarray(cycle)[0].tolist() == [1, 1, 2] and not np.any(cycle[1:])


@pytest.mark.parametrize("seed", [0, 1, 3, 5])
@pytest.mark.parametrize("count", [14, 7])
def test_connectivity_of_a_cut_graph_counts_components(seed, count):
  """lambda = |W| + c - c_S - c_Q, by rank; the tree is in excess by c_S + c_Q - 1 - c.

  With 7 edges these graphs are in two pieces or more, one of them cut where no vertex is shared.
  """
  graph = networkx.gnm_random_graph(9, count, seed=seed)
  edges, part = np.array(graph.edges), np.random.default_rng(seed).random(count) < 0.5
  matrix = graphs.incidence(edges, 9)
  rank = lambda keep: np.linalg.matrix_rank(matrix * keep)
  lam = rank(part) + rank(~part) - rank(np.ones(count))
  assert graphs.graph_connectivity(edges, 9, part) == lam
  assert graphs.split_graph(edges, 9, part)[2] == max(len(graphs.boundary(edges, part)) - 1, 0) - lam
  theirs = networkx.incidence_matrix(graph, nodelist=range(9), edgelist=graph.edges, oriented=True).toarray()
  np.testing.assert_array_equal(np.abs(matrix), np.abs(theirs))
  labels = graphs.components(edges, 9)
  assert len(set(labels.tolist())) == networkx.number_connected_components(graph)
  assert graphs.spanning_tree(edges, 9).sum() == 9 - len(set(labels.tolist()))


@st.composite
def networks(draw):
  """A connected network of 2..8 vertices in any two halves, which may be in pieces, and one vertex without an edge."""
  n = draw(st.integers(2, 8))
  edges = [(draw(st.integers(0, v - 1)), v) for v in range(1, n)]
  pair = st.lists(st.integers(0, n - 1), min_size=2, max_size=2, unique=True).map(tuple)
  edges += draw(st.lists(pair, min_size=1, max_size=6))
  part = [True, *draw(st.lists(st.booleans(), min_size=len(edges) - 2, max_size=len(edges) - 2)), False]
  conductance = [10 ** draw(st.floats(-2, 2)) for _ in edges]
  order = draw(st.permutations(range(len(edges))))
  return np.array(edges)[order], n + 1, np.array(part)[order], np.array(conductance)


def unit_currents(edges, vertices, conductance):
  """Voltages of every branch (rows) where a unit current enters and leaves at the ends of one (columns): N' L^+ N.

  The diagonal holds the effective resistances.
  """
  n = graphs.incidence(edges, vertices).astype(float)
  return n.T @ np.linalg.pinv(n * conductance @ n.T, rcond=1e-12, hermitian=True) @ n


@given(networks())
def test_star_mesh_keeps_effective_resistances_and_all_voltages(network):
  """Both halves reduced to the vertices they share, against the pseudo-inverse of the whole Laplacian."""
  edges, vertices, part, conductance = network
  order = np.argsort(~part, kind="stable")
  expected = unit_currents(edges[order], vertices, conductance)
  for unit, voltage in zip(np.eye(len(edges)), expected.T, strict=True):
    found, ports = baselines.solve_by_star_mesh(edges, vertices, part, conductance, -unit)
    np.testing.assert_allclose(found, voltage, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    assert ports == len(np.intersect1d(edges[part], edges[~part])) - 1


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_a_star_becomes_its_mesh(degree):
  """Conductances g_i to one vertex are g_i g_j / sum(g) between its neighbours: none, a series, a delta, a mesh."""
  rng = np.random.default_rng(degree)
  star, others = rng.uniform(0.1, 5, degree), rng.uniform(0.1, 5, degree)
  leaves = np.arange(1, degree + 1)
  # A path over the leaves and one vertex more is the other half.
  star_edges, path = np.stack([0 * leaves, leaves], 1), np.stack([leaves, leaves + 1], 1)
  edges, part = np.concatenate([star_edges, path]), np.arange(2 * degree) < degree
  mesh = np.array(list(itertools.combinations(leaves, 2)), int).reshape(-1, 2)
  between = star[mesh[:, 0] - 1] * star[mesh[:, 1] - 1] / star.sum()
  expected = unit_currents(np.concatenate([path, mesh]), degree + 2, np.concatenate([others, between]))
  for i in range(degree):
    unit = np.eye(2 * degree)[degree + i]
    found, ports = baselines.solve_by_star_mesh(edges, degree + 2, part, np.concatenate([star, others]), -unit)
    np.testing.assert_allclose(found[degree:], expected[:degree, i], rtol=1e-10, atol=1e-12)
    assert ports == degree - 1


def test_star_mesh_of_halves_in_pieces():
  """A path whose edges go to the halves in turn: every resistance is its own. A network in pieces is refused."""
  path, part = np.stack([np.arange(6), np.arange(1, 7)], 1), np.arange(6) % 2 == 0
  conductance = np.arange(1.0, 7)
  for unit, own in zip(np.eye(6), np.diag(1 / conductance), strict=True):
    found, ports = baselines.solve_by_star_mesh(path, 7, part, conductance, -unit)
    np.testing.assert_allclose(found, own, atol=1e-12)
    assert ports == 4
  for apart in (np.array([[0, 1], [1, 2], [3, 4], [4, 5]]), np.array([[0, 1], [2, 3], [3, 4], [0, 1]])):
    with pytest.raises(InputError, match="in 2 pieces"):
      baselines.solve_by_star_mesh(apart, 6, np.array([True, False, True, False]), np.ones(4), np.ones(4))
  with pytest.raises(InputError, match="share 0 vertices"):
    baselines.solve_by_star_mesh(path, 7, np.ones(6, bool), conductance, conductance)


def bit_mask(chosen):
  return sum(1 << e for e in chosen)


def test_matroid_union_by_tables_augmentation_and_enumeration():
  """Rank formula of the union and of the link against both other ways to compute them."""
  rng = np.random.default_rng(0)
  table = jax.jit(graphs.rank_table, static_argnums=1)
  for _ in range(3):
    a, b = (jnp.asarray(rng.integers(0, 2, (2, 5)), jnp.int32) for _ in range(2))
    first, second = np.asarray(table(a, 2)), np.asarray(table(b, 2))
    union = np.asarray(graphs.union_rank_table(jnp.asarray(first), jnp.asarray(second)))
    oracle = lambda ranks: lambda chosen: ranks[bit_mask(chosen)] == len(chosen)
    for subset in ([0, 1, 2, 3, 4], [1, 3, 4], [0, 2], []):
      parts = graphs.matroid_union(subset, oracle(first), oracle(second))
      assert not parts[0] & parts[1] and oracle(first)(parts[0]) and oracle(second)(parts[1])
      assert len(parts[0]) + len(parts[1]) == union[bit_mask(subset)]
      assert graphs.enumerate_union(subset, oracle(first), oracle(second)) == union[bit_mask(subset)]


def test_the_rank_of_a_matroid_link_by_augmentation():
  """r(X u P) - r(P) by augmenting paths and by the table of all subsets."""
  rng = np.random.default_rng(1)
  a, b = (jnp.asarray(rng.integers(0, 2, (2, 4)), jnp.int32) for _ in range(2))
  table = compiled_graphs.link_rank_table(a, b, 2, 2, 2, 3)
  wide = np.pad(a, ((0, 0), (0, 2))), np.pad(b, ((0, 0), (2, 0)))
  oracles = [graphs.independent_columns(m, 3) for m in wide]
  for bits in (0b0011, 0b1100, 0b1111):
    subset = [(0, 1, 4, 5)[i] for i in range(4) if bits >> i & 1]
    assert graphs.link_rank(subset, [2, 3], *oracles) == int(table[bits])


def test_blocks_and_spaces_may_be_empty():
  """No rows, no S, no P, no Q: links, least overlaps and decompositions, as many columns as there are."""
  rng = np.random.default_rng(0)

  @functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
  def figures(a, b, s, q, t, p):
    whole = linkage.link(a, b, s, q, t, p)
    small_a, small_b, kept, size = linkage.minimise_overlap(a, b, s, q, t, p)
    again = linkage.link(small_a, small_b, s, q, t, p)
    rank = lambda *m: linkage.rank(jnp.concatenate(m), p)
    assert kept.shape == (q,)
    sizes = size, linkage.decompose(whole, s, p)[2], linkage.decompose_minor(whole, s, p)[2].sum()
    overlaps = *sizes, linkage.connectivity(whole, jnp.arange(s + t) < s, p)
    return (rank(whole), rank(again), rank(whole, again)), overlaps, rank(linkage.perp(whole, p))

  with jax.enable_x64(True):
    for p, rows_a, rows_b, s, q, t in ((3, 0, 2, 0, 1, 1), (0, 2, 2, 1, 0, 1), (0, 0, 1, 0, 0, 0)):
      a, b = (fields.space(rng.integers(0, 2, (m, n)), p) for m, n in ((rows_a, s + q), (rows_b, q + t)))
      ranks, overlaps, others = figures(a, b, s, q, t, p)
      assert len(set(map(int, ranks))) == len(set(map(int, overlaps))) == 1
      assert int(others) == s + t - int(ranks[0])


def test_packed_spaces_may_be_empty():
  assert fields.pack_bits(np.zeros((2, 0))).shape == (2, 0)
  assert fields.unpack_bits(np.zeros((2, 0), np.uint32)).shape == (2, 0)
  assert int(linkage.rank(fields.space(np.zeros((0, 4)), 2, pack=True), 2)) == 0


@jax.jit
def real_figures(space):
  """(rank, gap, orthogonal space, its rank, projector) over the reals."""
  orthogonal = linkage.perp(space, 0)
  return linkage.rank(space, 0), fields.gap(space), orthogonal, linkage.rank(orthogonal, 0), fields.projector(space)


@pytest.mark.parametrize("units", [(1, 1e9, 1, 1e9, 1, 1e9), (1e-9, 1, 1e9, 1e18, 1, 1), (1e9,) * 6])
def test_units_of_columns_and_rows_do_not_change_a_rank(units):
  """Columns times 1e9 once lost rank 3 of 3, and the gap said that all was well."""
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    full, short = rng.normal(size=(3, 6)), rng.normal(size=(6, 2)) @ rng.normal(size=(2, 6))
    rows = 10.0 ** np.arange(6)[:, None]
    for m, rank in ((full, 3), (full * units, 3), (short * units, 2), (rows * short * units, 2)):
      found, (nonzero, zero), orthogonal, others, both = real_figures(fields.space(m, 0))
      assert int(found) == rank and float(nonzero) > 1e-3 and float(zero) < 1e-13
      assert int(others) == 6 - rank
      terms = np.asarray(orthogonal)[:, None] * m
      assert np.all(np.abs(terms.sum(-1)) <= 1e-12 * np.abs(terms).sum(-1))
      np.testing.assert_allclose(both @ both, both, atol=1e-12)


def test_a_gap_that_is_none_is_shown():
  """Rows that float64 cannot tell from dependent ones: the largest singular value taken as zero is near the limit."""
  with jax.enable_x64(True):
    _, (_, zero), *_ = real_figures(fields.space([[1, 1], [1, 1 + 1e-11]], 0))
    assert 1e-12 < float(zero) < fields.TOLERANCE
    _, (_, dust), *_ = real_figures(fields.space([[1, 2], [1e-17, 3e-17]], 0))
    assert float(dust) > 0  # a row shorter than rounding is taken as zero, and said so


def test_rows_that_are_rounding_in_some_columns_have_no_rank_there():
  """Orthonormal rows of a space, turned by 1e-8: in S the first row is rounding, yet its length there is 1e-8.

  Singular vectors of equal singular values come out like that; sized anew in S, the row counted as a second direction.
  """
  with jax.enable_x64(True):
    rows = np.array([[0, 0, 0, 1, 1], [1, 1 / 3, 2 / 3, 0, 0.0]])
    turned = np.array([[1, 1e-8], [-1e-8, 1]]) @ rows
    space = fields.space(turned + 1e-16 * np.random.default_rng(0).normal(size=(2, 5)), 0)
    on_s = jnp.arange(5) < 3
    apart, inside, (nonzero, zero), plain = jax.jit(
      lambda space: (
        linkage.connectivity(space, on_s, 0),
        linkage.rank(linkage.restrict(space, on_s, 0), 0),
        fields.gap(space, on_s),
        linkage.canonical(space, 0),
      )
    )(space)
    assert int(apart) == 0 and int(inside) == 1
    assert float(nonzero) == 1 and float(zero) < 1e-14
    plain = np.asarray(plain)  # unit vectors in the pivot columns, nothing in between
    assert np.abs(plain[plain != 0]).min() > 0.1


def test_spaces_decompose_over_the_reals_as_over_a_large_prime():
  """lambda coordinates, and the link of the parts is the space."""
  m = jnp.asarray(np.random.default_rng(5).integers(0, 3, (30, 3, 2 * N)) * [[[1], [1], [0]]], jnp.int32)
  with jax.enable_x64(True):
    v_sp, v_pq, size = batched(lambda m: linkage.decompose(m, N, 0))(m.astype(float))
    np.testing.assert_array_equal(size, batched(lambda m: linkage.connectivity(m, FIRST, 32749))(m))
    again = batched(lambda a, b: linkage.link(a, b, N, N, N, 0))(v_sp, v_pq)
    same = jnp.concatenate([again, m.astype(float)], 1)
    np.testing.assert_array_equal(
      batched(lambda m: linkage.rank(m, 0))(same), batched(lambda m: linkage.rank(m, 32749))(m)
    )


def test_integers_beyond_the_field_are_brought_into_it():
  """An incidence matrix has entries -1; packed words, `space` and the bare array are one space."""
  bare = jnp.asarray(graphs.incidence([[0, 1], [1, 2], [0, 2]], 3))
  for p in (2, 3, 101):
    np.testing.assert_array_equal(compiled.canonical(bare, p), compiled.canonical(fields.space(bare, p), p))


SPACE = jnp.zeros((1, 4), jnp.int32)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: fields.space([[1, 0]], 4), "p is 4; a finite field GF"),
    (lambda: fields.space([[1, 0]], 1), "p is 1; a finite field"),
    (lambda: fields.space([[1, 0]], 2.5), "p is 2.5; give an integer"),
    (lambda: fields.space([[1, 0]], "2"), "p is '2'; give an integer"),
    (lambda: fields.space([[1e20, 0]], 5), r"integers of 2\^53 or more; reduce them modulo 5"),
    (lambda: fields.space(np.array([[2**63 + 1]], np.uint64), 5), r"integers of 2\^53 or more"),
    (lambda: linkage.rank([[1, 0]], 5), "a space is a list; make it with fields.space"),
    (lambda: linkage.connectivity(SPACE, jnp.array([1, 0, 1, 0]), 5), r"the mask is int32\[4\]; expected .* 4 bool"),
    (lambda: linkage.contract(SPACE, jnp.array([True]), 5), r"the mask is bool\[1\]; expected an array of 4 bool"),
    (lambda: linkage.restrict(SPACE, [True, False, True, False], 5), "the mask is a list; expected an array of 4 bool"),
    (lambda: fields.eliminate(jnp.zeros((1, 2), jnp.uint32), 2, jnp.ones(2, bool)), "expected an array of 2 uint32"),
    (lambda: fields.space([[1, 0]], 65537), "use a prime up to 32749"),
    (lambda: fields.space([[1, 0]], fields.LARGE), "needs 64-bit integers"),
    (lambda: fields.space([[1, np.nan]], 3), "NaN or infinite"),
    (lambda: fields.space([[0.5, 1]], 3), "hold fractions"),
    (lambda: fields.space([[0.5, 1]], 0), "needs 64-bit floats"),
    (lambda: linkage.rank(jnp.ones((2, 2)), 0), "needs 64-bit floats"),
    (lambda: linkage.rank(SPACE, 4), "p is 4; a finite field GF"),
    (lambda: linkage.rank(SPACE, fields.LARGE), "needs 64-bit integers"),
    (lambda: linkage.rank(jnp.ones((2, 2), jnp.int8), 3), "a space of int8 does not go with p=3"),
    (lambda: linkage.rank(jnp.ones(2, jnp.int32), 3), r"a space has shape \(2,\); expected a matrix"),
    (lambda: fields.space([["a"]], 3), "rows hold <U1; a space needs numbers"),
    (lambda: fields.space([[1], [1, 2]], 3), "give rows of one length"),
    (lambda: linkage.rank(jnp.ones((2, 2), jnp.uint32), 3), "a space of uint32 does not go with p=3"),
    (lambda: fields.space([[1, 1]], 3, pack=True), r"not GF\(3\)"),
    (lambda: linkage.link(SPACE, SPACE, 2, 3, 1, 2), r"expected \|S\|\+\|P\|=5"),
    (lambda: linkage.decompose(SPACE, 5, 2), "nS is 5; the space has 4"),
    (lambda: linkage.perp(jnp.zeros((1, 1), jnp.uint32), 2), "not defined on packed words"),
    (lambda: linkage.decompose_parts(SPACE, (1, 2), 2), "must add up to 4"),
    (lambda: graphs.incidence([[0, 9]], 3), "name vertices 0..9; the graph has 0..2"),
    (lambda: graphs.incidence([[0, np.nan]], 3), "NaN"),
    (lambda: graphs.graph_space([[0, 1]], 2, 2, kind="tie"), "kind is 'tie'"),
    (lambda: graphs.rank_table(jnp.zeros((1, 21), jnp.int32), 2), "up to 20"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_the_experiment_runs_and_continues(tmp_path, monkeypatch):
  """Identities over GF(2), matroids, a network: linkage.md asks for 0 failures and voltages within 1e-8."""
  report = run_and_continue("linkage", tmp_path, monkeypatch)
  exact = [claim for claim in report.claims if claim.threshold < 1e-6]
  assert len(exact) == 8 and all(claim.holds for claim in exact)
  # The scaled matroids agree, and without the scaling ranks differ in both directions.
  matroids = report.metrics["matroids"]
  assert matroids["mismatches"] == 0 and matroids["unscaled_lower"] > 0 and matroids["unscaled_higher"] > 0
  # A network whose halves are in pieces needs fewer ports than boundary vertices, and has the same voltages.
  network = report.metrics["network"]["florentine, random"]
  assert 0 < network["ports"] < network["star_mesh_ports"]
  assert network["difference"] < 1e-12 and network["star_mesh_difference"] < 1e-12


def test_an_edge_list_is_read_and_a_wrong_one_named(tmp_path):
  config = config_file.get_config("test")
  config.data.name = "edge_list"
  with pytest.raises(InputError, match="not a file"):
    graph_part.load_graphs(config)
  file = tmp_path / "square.txt"
  file.write_text("# a square\na b\nb c\nc d\nd a\n")
  config.data.path = str(file)
  edges, vertices, part = graph_part.load_graphs(config)["square, random"]
  assert vertices == 4 and len(edges) == 4 and graphs.graph_connectivity(edges, vertices, part) >= 1


def test_products_beyond_32_bits_are_refused():
  """int32 entries over p = 2^31 - 1 once overflowed in silence."""
  with jax.enable_x64(True):
    narrow = jnp.asarray([[2**30, 2**30 + 1], [2**30 + 2, 2**29]], jnp.int32)
    with pytest.raises(InputError, match="a space of int32 does not go with p=2147483647"):
      linkage.rank(narrow, fields.LARGE)
    with pytest.raises(InputError, match="a space of int32 does not go with p=2147483647"):
      graphs.generic_link(narrow, narrow, 1, 1, 1, jax.random.key(0))
