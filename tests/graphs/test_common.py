import gzip

import networkx
import numpy as np
import pandas
import pytest

from jaxlab.core.checks import InputError
from jaxlab.graphs import common


def test_an_edge_list_loses_comments_gaps_loops_and_repetitions(tmp_path):
  path = tmp_path / "graph.txt"
  path.write_text("# a comment\n% another\n\n7 3\n3\t7\n3,100 0.5\n100 100\n7 3\n")
  graph = common.load("edge_list", path=str(path))
  assert graph.nodes == 3 and not graph.directed
  np.testing.assert_array_equal(graph.edges, [[0, 1], [0, 2]])
  np.testing.assert_array_equal(graph.names, [3, 7, 100])
  directed = common.load("edge_list", path=str(path), directed=True)
  np.testing.assert_array_equal(directed.edges, [[0, 1], [0, 2], [1, 0]])
  packed = tmp_path / "graph.txt.gz"
  packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n")))
  np.testing.assert_array_equal(common.read_edge_list(packed).edges, graph.edges)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "holds no edges"),
    (b"# x\n", "holds no edges"),
    (b"1 2\r\n\r\n1 b\r\n", "line 3: '1 b' does not start"),
    (b"1 2\n1\n", "line 2"),
    (b"1 2\n1_000 2\n", "line 2"),
    (b"1 2\n\x00 2\n", "line 2"),
    (b"1 2\n9223372036854775808 2\n", "line 2.*too big"),
    (b"1 2\n\xff", "line 2, byte 0"),
    (b"1.0 2.0\n", "line 1: '1.0 2.0' does not start"),
    (b"ann bob\n", "line 1: 'ann bob' does not start.*columns="),
  ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
  path = tmp_path / "bad.txt"
  path.write_bytes(content)
  with pytest.raises(InputError, match=message):
    common.load("edge_list", path=str(path))


FRAME = pandas.DataFrame({"from": ["a", "b"], "to": ["c", None], "weight": [1.0, 2.0]})


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: common.load("magic"), "data.name is 'magic'"),
    (lambda: common.load("edge_list"), "give data.path"),
    (lambda: common.load("edge_list", path="/no/where"), "no edge list '/no/where'"),
    (lambda: common.load("rmat", nodes=100), "power of two"),
    (lambda: common.load("sbm", nodes=10, blocks=11), "blocks is 11"),
    (lambda: common.load("sbm", nodes=10, mixing=1.5, blocks=2), "mixing is 1.5"),
    (lambda: common.load("rmat", nodes=1), "nodes >= 2"),
    (lambda: common.make(3, np.array([[0, 3]])), r"0..3; with nodes=3"),
    (lambda: common.make(3, np.array([0, 1])), "expected"),
    (lambda: common.make(3, np.array([[0.0, 1.5]])), "hold float64, not integers; `from_edges`"),
    (lambda: common.make(3, [("a", "b")]), "not integers; `from_edges`"),
    (lambda: common.load("edge_list", path="/"), "no edge list '/'"),
    (lambda: common.from_edges([]), "no edges"),
    (lambda: common.from_edges([("a", "b"), "ab"]), "pair 1 is 'ab'; expected two names"),
    (lambda: common.from_edges([("a", ["b"])]), "pair 0 is"),
    (lambda: common.from_edges(np.array([[1.0, np.nan]])), "pair 0 is .*a name is missing"),
    (lambda: common.from_edges([("a", None)]), "a name is missing"),
    (lambda: common.from_pandas(FRAME, "from", "into"), "no column 'into'; it has from, to"),
    (lambda: common.from_pandas(FRAME, "from", "to"), "'to' misses 1 names"),
    (lambda: common.from_edges([("a", "b")]).index(["a", "c"]), "no vertex is named 'c'; the first of 2 names are 'a'"),
    (lambda: common.from_edges([("a", "b")]).index("a"), "names is 'a'; give a list"),
    (lambda: common.load("karate").index([34]), "no vertex is named 34"),
    (lambda: common.from_networkx(common.load("karate")), "graph is a Graph; from_networkx takes networkx graphs"),
    (lambda: common.rmat(8, 10, quadrants=(0.5, 0.5, 0.5, 0.5)), "sum to 1"),
  ],
)
def test_impossible_graphs_are_named(call, message):
  with pytest.raises(InputError, match=message):
    call()


CITIES = [("Rome", "Oslo"), ("Oslo", "Bern"), ("Bern", "Oslo"), ("Rome", "Rome")]


def test_vertices_keep_the_names_they_have_in_pairs_networkx_pandas_and_tables(tmp_path):
  path = tmp_path / "roads.csv"
  path.write_text('km;"to";from\n7;Oslo;"Rome"\n9;Bern;Oslo\n1;"Oslo";Bern\n\n2;Rome;Rome\n')
  frame = pandas.DataFrame(CITIES, columns=["from", "to"])
  graphs = [
    common.from_edges(CITIES),
    common.from_networkx(networkx.Graph(CITIES)),
    common.from_pandas(frame, "from", "to"),
    common.load("edge_list", path=str(path), columns=("from", "to")),
  ]
  for graph in graphs:
    assert graph.nodes == 3 and graph.named(graph.edges).tolist() == [["Rome", "Oslo"], ["Oslo", "Bern"]]
    assert graph.index(["Bern", "Rome"]).tolist() == [2, 0]
  assert len(common.load("edge_list", path=str(path), columns=("from", "to"), directed=True).edges) == 3
  assert common.from_networkx(networkx.DiGraph(CITIES)).directed
  lonely = networkx.Graph([((0, 1), (0, 2))])
  lonely.add_node((5, 5))
  graph = common.from_networkx(lonely)
  assert graph.nodes == 3 and graph.named([2])[0] == (5, 5) and graph.index([(0, 2)]) == [1]
  assert common.load("les_miserables").index(["Valjean"]).shape == (1,)


def test_integer_names_stay_integers_and_positions_need_none():
  graph = common.from_edges([(30, 7), (7, 1000)])
  np.testing.assert_array_equal(graph.names, [7, 30, 1000])
  np.testing.assert_array_equal(common.from_edges(np.array([[30, 7], [7, 1000]])).names, graph.names)
  assert graph.index(np.array([1000, 7])).tolist() == [2, 0]
  assert common.from_edges(zip(np.array([3, 5]), [8, 8], strict=True)).names.dtype == np.int64
  assert common.from_edges([(1, 0), (2, 1)]).names is None and common.load("karate").names is None
  assert common.load("karate").index([33, 2]).tolist() == [33, 2]
  mixed = common.from_edges([(1, "1")])
  assert mixed.nodes == 2 and mixed.named([0, 1]).tolist() == [1, "1"]


@pytest.mark.parametrize(
  "content, message",
  [
    ("", "no column 'from'; its first line names none"),
    ("from,into\na,b\n", "no column 'to'; its first line names from, into"),
    ("from,to\n", "holds no edges"),
    ("from,to\na,b\nc,\n", "line 3: 'c,' has an empty end"),
    ("from,to\na\n", "line 2: 'a' has an empty end"),
    ('from,to\na,"b\n', "line 2: .*mend or remove"),
  ],
)
def test_a_bad_table_is_named(tmp_path, content, message):
  path = tmp_path / "bad.csv"
  path.write_text(content)
  with pytest.raises(InputError, match=message):
    common.read_table(path, "from", "to")


def test_generated_graphs_are_simple_and_shaped_as_asked():
  graph = common.load("sbm", nodes=4000, degree=5, blocks=10, mixing=0.1)
  inside = (graph.edges[:, 0] % 10 == graph.edges[:, 1] % 10).mean()
  assert 0.85 < inside < 0.95 and 19000 < len(graph.edges) <= 20000
  hubs = common.load("rmat", nodes=1024, degree=8)
  degree = np.bincount(hubs.edges.ravel(), minlength=1024)
  assert degree.max() > 10 * degree.mean()
  again = common.load("rmat", nodes=1024, degree=8)
  np.testing.assert_array_equal(hubs.edges, again.edges)
  assert len(common.load("karate").edges) == 78 and len(common.load("karate", directed=True).edges) == 156
  for g in (graph, hubs, common.load("barabasi_albert", nodes=50, degree=3)):
    assert (g.edges[:, 0] < g.edges[:, 1]).all() and len(np.unique(g.edges, axis=0)) == len(g.edges)


def test_rmat_falls_through_the_quadrants():
  """Every level's quadrant by the cumulative probabilities in float64, from the same draws."""
  rng = np.random.default_rng(3)
  ends = np.zeros((2, 4000), int)
  for _ in range(6):
    quadrant = np.searchsorted(np.cumsum([0.57, 0.19, 0.19, 0.05])[:3], rng.random(4000, np.float32))
    ends = 2 * ends + np.stack([quadrant // 2, quadrant % 2])
  u, v = rng.permutation(64)[ends]
  graph = common.rmat(64, 4000, directed=True, seed=3)
  assert set(map(tuple, graph.edges.tolist())) == {
    (a, b) for a, b in zip(u.tolist(), v.tolist(), strict=True) if a != b
  }
  bounds = common._floor_float32(np.array([0.1, 0.5, 0.3, 1 / 3]))
  assert (bounds <= [0.1, 0.5, 0.3, 1 / 3]).all() and (
    np.nextafter(bounds, np.float32(1)) > [0.1, 0.5, 0.3, 1 / 3]
  ).all()


def test_arcs_are_edges_both_ways_unless_directed():
  pairs = [(2, 0), (1, 2)]
  arcs = lambda directed: set(
    zip(*map(np.ndarray.tolist, common.make(3, pairs, directed=directed).arcs()), strict=True)
  )
  assert arcs(True) == {(2, 0), (1, 2)} and arcs(False) == {(0, 2), (2, 0), (1, 2), (2, 1)}
  assert [x.tolist() for x in common.sorted_pairs(np.array([2, 0, 2]), np.array([1, 3, 0]), 4)] == [
    [0, 2, 2],
    [3, 0, 1],
  ]
