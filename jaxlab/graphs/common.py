"""Graphs: from pairs, networkx, pandas, edge-list and CSV files, generated; with the names that vertices have there.

  graph = common.from_edges([("ann", "bob"), ("bob", "eve")])
  graph = common.load("edge_list", path="wiki-Vote.txt", directed=True)
  graph = common.load("edge_list", path="friends.csv", columns=("from", "to"))
  graph = common.load("rmat", nodes=2**18, degree=16, seed=0)

Methods work with positions 0 .. |V| - 1; `Graph.index` and `Graph.named` go from names to positions and back.
Self-loops and repeated edges are removed, so that |E| counts what a simple graph has; weights are not read.
"""

import array
import csv
import dataclasses
import functools
import re
from collections.abc import Hashable, Iterable
from pathlib import Path

import networkx
import numpy as np
from jaxtyping import Float, Int

from jaxlab.core.checks import InputError, plain, require, require_choice
from jaxlab.core.foreign import foreign, lines

NAMES = ("edge_list", "rmat", "sbm", "barabasi_albert", "karate", "les_miserables", "florentine")
_INTEGER = re.compile(r"[+-]?[0-9]+")  # int() takes more: 1_000, digits of other scripts


class Named:
  """What has `nodes` vertices and their `names`: an array of them by position, or None where names are positions."""

  @functools.cached_property
  def _positions(self) -> dict[Hashable, int]:
    return {name: position for position, name in enumerate(self.named(np.arange(self.nodes)).tolist())}

  def index(self, names: Iterable[Hashable]) -> Int[np.ndarray, "names"]:
    """Positions of the vertices with these names.

    Raises:
      InputError: no list, or a name that no vertex has.
    """
    listed = isinstance(names, Iterable) and not isinstance(names, str | bytes)
    require(listed, f"names is {names!r:.60}; give a list of names, also of a single one")

    def position(name):
      try:
        return self._positions[name]
      except (KeyError, TypeError):
        known = ", ".join(f"{name!r:.40}" for name in self.named(np.arange(min(self.nodes, 3))).tolist())
        raise InputError(f"no vertex is named {name!r:.60}; the first of {self.nodes} names are {known}") from None

    return np.array([position(name) for name in (names.tolist() if hasattr(names, "tolist") else names)], np.int32)

  def named(self, positions: Int[np.ndarray, "*any"]) -> np.ndarray:
    """The names of the vertices at these positions, in an array of the same shape."""
    return np.arange(self.nodes)[positions] if self.names is None else self.names[positions]


@dataclasses.dataclass(frozen=True)
class Graph(Named):
  """A simple graph. An undirected edge is stored once, as (smaller, larger).

  Attributes:
    nodes: |V|; positions are 0 .. nodes - 1, isolated vertices included.
    edges: (|E|, 2) positions, sorted by first then second end.
    directed: whether (u, v) and (v, u) are different edges.
    names: of every vertex, integers or any objects; None where they are the positions.
  """

  nodes: int
  edges: Int[np.ndarray, "edges 2"]
  directed: bool = False
  names: np.ndarray | None = None

  def arcs(self) -> tuple[Int[np.ndarray, "arcs"], Int[np.ndarray, "arcs"]]:
    """(from, to) of every edge, an undirected one in both directions."""
    u, v = self.edges.T
    return (u, v) if self.directed else (np.concatenate([u, v]), np.concatenate([v, u]))


def require_graph(graph: object) -> None:
  """Raises InputError for what is no `Graph`, one of networkx for instance."""
  require(
    isinstance(graph, Graph),
    f"graph is a {type(graph).__module__}.{type(graph).__name__}; make a Graph of it, e.g. common.from_networkx",
  )


def sorted_pairs(
  first: Int[np.ndarray, "pairs"], second: Int[np.ndarray, "pairs"], span: int
) -> tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"]]:
  """The pairs ascending, both below `span`: as one integer each they sort several times faster than as two."""
  return np.divmod(np.sort(first.astype(np.int64) * span + second), span)


def make(
  nodes: int, edges: Int[np.ndarray, "any 2"], *, directed: bool = False, names: np.ndarray | None = None
) -> Graph:
  """A simple graph from pairs of positions: orders undirected pairs, drops self-loops and repetitions.

  Raises:
    InputError: not pairs of integers, no node, or an end outside 0 .. nodes - 1.
  """
  edges = np.asarray(edges)
  require(edges.ndim == 2 and edges.shape[1] == 2, f"edges have shape {edges.shape}; expected (edges, 2)")
  integers = edges.dtype.kind in "iu" or not len(edges)
  require(integers, f"edges hold {edges.dtype}, not integers; `from_edges` takes names of any kind")
  require(1 <= nodes < 2**31, f"a graph of {nodes} nodes; give at least 1 and fewer than 2^31")
  if len(edges):
    low, high = int(edges.min()), int(edges.max())
    require(
      low >= 0 and high < nodes, f"edge ends lie in {low}..{high}; with nodes={nodes} they must lie in 0..{nodes - 1}"
    )
  u, v = edges[edges[:, 0] != edges[:, 1]].T
  u, v = (u, v) if directed else (np.minimum(u, v), np.maximum(u, v))
  pairs = np.stack(sorted_pairs(u, v, nodes), axis=1).astype(np.int32)
  fresh = (pairs[1:] != pairs[:-1]).any(axis=1)
  return Graph(nodes, pairs[np.append(True, fresh)[: len(pairs)]], directed, names)


def from_edges(
  pairs: Iterable[tuple[Hashable, Hashable]], *, directed: bool = False, vertices: Iterable[Hashable] = ()
) -> Graph:
  """A simple graph from pairs of names: an array, or any pairs of text, integers, tuples, ...

  Args:
    vertices: names that come first and in this order, also of those without an edge. The others follow, ascending where
      all names are integers, else as they appear.

  Raises:
    InputError: an entry that is no pair of names (its number is told), or nothing at all.
  """
  pairs, vertices = (x if isinstance(x, np.ndarray) else list(x) for x in (pairs, vertices))
  require(len(pairs) + len(vertices) > 0, "no edges; give pairs of names, one for each")
  if not len(vertices) and _all_integers(pairs):
    names, ends = np.unique(np.asarray(pairs), return_inverse=True)
    return make(len(names), ends.reshape(-1, 2), directed=directed, names=_told(names))
  positions, ends = {name: i for i, name in enumerate(dict.fromkeys(vertices))}, []
  for number, pair in enumerate(pairs.tolist() if isinstance(pairs, np.ndarray) else pairs):
    try:
      first, second = () if isinstance(pair, str) else pair
      missing = any(name is None or name != name for name in (first, second))
      require(not missing, f"pair {number} is {pair!r:.60}: a name is missing; drop the pair")
      ends += [positions.setdefault(name, len(positions)) for name in (first, second)]
    except InputError:
      raise
    except (TypeError, ValueError):
      raise InputError(f"pair {number} is {pair!r:.60}; expected two names, each text, a number or a tuple") from None
  names = np.fromiter(positions, object, len(positions))
  return make(len(names), np.reshape(ends, (-1, 2)).astype(np.int64), directed=directed, names=_told(names))


def _all_integers(pairs) -> bool:
  """Whether these are integers in two columns. A list of (integer, text) is not: NumPy would make all of it text."""
  if isinstance(pairs, np.ndarray):
    return pairs.dtype.kind in "iu" and pairs.ndim == 2 and pairs.shape[1] == 2
  return all(isinstance(pair, tuple | list) and len(pair) == 2 and {*map(type, pair)} == {int} for pair in pairs)


def _told(names: np.ndarray) -> np.ndarray | None:
  """Names as a graph keeps them: integers as such, none where they are the positions."""
  whole = lambda name: isinstance(name, int | np.integer) and not isinstance(name, bool) and abs(name) < 2**63
  if names.dtype == object and all(map(whole, names)):
    names = names.astype(np.int64)
  return None if names.dtype != object and np.array_equal(names, np.arange(len(names))) else names


def from_networkx(graph: networkx.Graph) -> Graph:
  """The vertices, names and edges of a networkx graph, directed if it is.

  Raises:
    InputError: no networkx graph, or one without vertices.
  """
  require(isinstance(graph, networkx.Graph), f"graph is a {type(graph).__name__}; from_networkx takes networkx graphs")
  return from_edges(graph.edges(), directed=graph.is_directed(), vertices=graph)


def from_pandas(frame, source: str, target: str, *, directed: bool = False) -> Graph:
  """An edge for each row of a pandas frame, between the names in two of its columns.

  Raises:
    InputError: no such column, or a row without a name in one of them.
  """
  for column in (source, target):
    require(column in frame, f"the frame has no column {column!r}; it has {plain(*map(str, frame))}")
    missing = int(frame[column].isna().sum())
    require(missing == 0, f"column {column!r} misses {missing} names; drop these rows with frame.dropna()")
  return from_edges(zip(frame[source].tolist(), frame[target].tolist(), strict=True), directed=directed)


def load(
  name: str,
  *,
  path: str = "",
  columns: tuple[str, ...] = (),
  directed: bool = False,
  nodes: int = 1000,
  degree: float = 10,
  blocks: int = 20,
  mixing: float = 0.1,
  seed: int = 0,
) -> Graph:
  """A graph by name.

  Args:
    name: "edge_list" reads `path`; "rmat", "sbm", "barabasi_albert" are generated; "karate", "les_miserables" and
      "florentine" ship with networkx.
    columns: the titles of two columns where `path` is a table with a header (`read_table`).
    directed: keep the direction of edges (the networkx graphs have none: both directions are then stored).
    nodes, degree: size of a generated graph and its mean number of edges a node (before repetitions are dropped).
    blocks, mixing: of "sbm", the number of equal communities and the share of edges between them.

  Raises:
    InputError: an unknown name, a missing path, or an impossible size.
  """
  require_choice("data.name", name, NAMES)
  if name == "edge_list":
    require(bool(path), "data.name=edge_list needs a file; give data.path=FILE")
    return read_table(path, *columns, directed=directed) if len(columns) else read_edge_list(path, directed=directed)
  require(nodes >= 2 and degree > 0, f"nodes={nodes}, degree={degree}; a generated graph needs nodes >= 2, degree > 0")
  if name == "rmat":
    return rmat(nodes, round(nodes * degree), directed=directed, seed=seed)
  if name == "sbm":
    return sbm(nodes, round(nodes * degree), blocks=blocks, mixing=mixing, directed=directed, seed=seed)
  if name == "barabasi_albert":
    require(1 <= int(degree) < nodes, f"barabasi_albert needs 1 <= degree < nodes, not degree={degree}, nodes={nodes}")
    return _undirected(networkx.barabasi_albert_graph(nodes, int(degree), seed=seed), directed)
  ships = {
    "karate": networkx.karate_club_graph,
    "les_miserables": networkx.les_miserables_graph,
    "florentine": networkx.florentine_families_graph,
  }
  return _undirected(ships[name](), directed)


def read_edge_list(path: str | Path, *, directed: bool = False) -> Graph:
  """A text file (or .gz, .xz) with two integers a line, any white space or a comma between; # and % start comments.

  Further columns are ignored. The integers may have gaps: they are the names of the vertices.

  Raises:
    InputError: no such file, no edges, or a line that does not start with two integers (its number is told).
  """
  path = _edge_file(path)
  pairs, number = array.array("q"), 0
  with foreign(path, "mend or remove it", place=lambda: f"line {number}"):
    for number, line in lines(path):
      words = line.replace(",", " ").split()
      if not words or words[0][0] in "#%":
        continue
      integers = len(words) > 1 and all(_INTEGER.fullmatch(word) for word in words[:2])
      require(
        integers,
        f"{path}, line {number}: {line.strip()[:40]!r} does not start with two integer node ids; mend or remove it, "
        "or name the two columns of a table with a header: columns=('from', 'to')",
      )
      pairs.extend((int(words[0]), int(words[1])))
  require(len(pairs) > 0, f"{path} holds no edges; expected a line 'u v' for each")
  return from_edges(np.frombuffer(pairs, np.int64).reshape(-1, 2), directed=directed)


def read_table(path: str | Path, source: str, target: str, *, directed: bool = False) -> Graph:
  """A CSV file (or .gz, .xz) whose first line names its columns; the ends of each edge are in two of them.

  Columns are parted by the first of tab, semicolon and comma that the header has. Names are integers if all are, else
  text.

  Raises:
    InputError: no such file, no such column, no edges, or a line with an empty end (its number is told).
  """
  path, number, pairs = _edge_file(path), 1, []
  with foreign(path, "mend or remove it", place=lambda: f"line {number}"):
    table = lines(path)
    header = next(table, (1, ""))[1]
    mark = next((mark for mark in "\t;," if mark in header), ",")
    cells = lambda line: [cell.strip() for cell in next(csv.reader([line], delimiter=mark, strict=True), [])]
    titles = cells(header)
    for column in (source, target):
      require(column in titles, f"{path} has no column {column!r}; its first line names {plain(*titles) or 'none'}")
    ends = [titles.index(source), titles.index(target)]
    for number, line in table:
      row = cells(line)
      require(
        len(row) > max(ends) and all(row[end] for end in ends),
        f"{path}, line {number}: {line.strip()[:40]!r} has an empty end; mend or remove it",
      )
      pairs.append(tuple(row[end] for end in ends))
    if all(_INTEGER.fullmatch(name) for pair in pairs for name in pair):
      pairs = [(int(first), int(second)) for first, second in pairs]
  require(len(pairs) > 0, f"{path} holds no edges; expected a line for each below the header")
  return from_edges(pairs, directed=directed)


def _edge_file(path: str | Path) -> Path:
  path = Path(path)
  require(path.is_file(), f"no edge list {str(path)!r}; give the path of a text file with an edge a line")
  return path


def rmat(
  nodes: int,
  edges: int,
  *,
  directed: bool = False,
  seed: int = 0,
  quadrants: tuple[float, ...] = (0.57, 0.19, 0.19, 0.05),
) -> Graph:
  """R-MAT (Chakrabarti et al. 2004): every edge falls through log2(nodes) levels of a 2 x 2 split of the matrix.

  Draws `edges` pairs; repetitions and self-loops are then dropped, so |E| is somewhat smaller. Node ids are shuffled.

  Raises:
    InputError: nodes is not a power of two, or the four probabilities do not sum to 1.
  """
  require(nodes >= 2 and nodes & (nodes - 1) == 0, f"rmat needs a power of two of nodes, not {nodes}")
  require(
    len(quadrants) == 4 and abs(sum(quadrants) - 1) < 1e-9, f"quadrants {quadrants} must be 4 numbers that sum to 1"
  )
  rng = np.random.default_rng(seed)
  row, column = np.zeros((2, edges), np.int32)
  # Rounded down, so that float32 draws compare with them as with the exact sums.
  first, second, third = _floor_float32(np.cumsum(quadrants)[:3])
  for _ in range(nodes.bit_length() - 1):
    draw = rng.random(edges, np.float32)
    lower = draw > second
    right = (draw > first) ^ lower ^ (draw > third)
    row, column = (row << 1) | lower, (column << 1) | right
  names = rng.permutation(nodes).astype(np.int32)
  return make(nodes, np.stack([names[row], names[column]], axis=1), directed=directed)


def _floor_float32(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
  """The largest float32 that is not above x."""
  near = x.astype(np.float32)
  return np.where(near > x, np.nextafter(near, np.float32(-np.inf)), near)


def sbm(nodes: int, edges: int, *, blocks: int, mixing: float, directed: bool = False, seed: int = 0) -> Graph:
  """A stochastic block model with equal blocks: each edge stays in the block of its first end but for a share `mixing`.

  Raises:
    InputError: blocks outside 1..nodes, or mixing outside 0..1.
  """
  require(1 <= blocks <= nodes, f"blocks is {blocks}; it must lie in 1..{nodes}, the number of nodes")
  require(0 <= mixing <= 1, f"mixing is {mixing}; it is a share and must lie in 0..1")
  rng = np.random.default_rng(seed)
  u = rng.integers(0, nodes, edges)
  # Node v is in block v mod blocks: a partner in the same block is a node with the same remainder.
  members = (nodes - 1 - u % blocks) // blocks + 1
  same = u % blocks + blocks * (rng.random(edges) * members).astype(np.int64)
  v = np.where(rng.random(edges) < mixing, rng.integers(0, nodes, edges), same)
  return make(nodes, np.stack([u, v], axis=1), directed=directed)


def _undirected(graph: networkx.Graph, both: bool) -> Graph:
  """`both`: as a directed graph, with each edge in both directions."""
  return from_networkx(graph.to_directed() if both else graph)
