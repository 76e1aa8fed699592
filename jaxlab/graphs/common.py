"""Graphs: one loader for edge-list files, generated graphs and those networkx ships.

  graph = common.load("edge_list", path="wiki-Vote.txt", directed=True)
  graph = common.load("rmat", nodes=2**18, degree=16, seed=0)

Node ids are made contiguous; self-loops and repeated edges are removed, so that |E| counts what a simple graph has.
"""

import array
import dataclasses
import re
from pathlib import Path

import networkx
import numpy as np
from jaxtyping import Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.core.foreign import foreign, lines

NAMES = ("edge_list", "rmat", "sbm", "barabasi_albert", "karate", "les_miserables", "florentine")
_INTEGER = re.compile(r"[+-]?[0-9]+")  # int() takes more: 1_000, digits of other scripts


@dataclasses.dataclass(frozen=True)
class Graph:
  """A simple graph. An undirected edge is stored once, as (smaller, larger).

  Attributes:
    nodes: |V|; ids are 0 .. nodes - 1, isolated ones included.
    edges: (|E|, 2), sorted by first then second end.
    directed: whether (u, v) and (v, u) are different edges.
  """

  nodes: int
  edges: Int[np.ndarray, "edges 2"]
  directed: bool = False

  def arcs(self) -> tuple[Int[np.ndarray, "arcs"], Int[np.ndarray, "arcs"]]:
    """(from, to) of every edge, an undirected one in both directions."""
    u, v = self.edges.T
    return (u, v) if self.directed else (np.concatenate([u, v]), np.concatenate([v, u]))


def sorted_pairs(
  first: Int[np.ndarray, "pairs"], second: Int[np.ndarray, "pairs"], span: int
) -> tuple[Int[np.ndarray, "pairs"], Int[np.ndarray, "pairs"]]:
  """The pairs ascending, both below `span`: as one integer each they sort several times faster than as two."""
  return np.divmod(np.sort(first.astype(np.int64) * span + second), span)


def make(nodes: int, edges: Int[np.ndarray, "any 2"], *, directed: bool = False) -> Graph:
  """A simple graph from any list of pairs: orders undirected pairs, drops self-loops and repetitions.

  Raises:
    InputError: not pairs, no node, or an end outside 0 .. nodes - 1.
  """
  edges = np.asarray(edges)
  require(edges.ndim == 2 and edges.shape[1] == 2, f"edges have shape {edges.shape}; expected (edges, 2)")
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
  return Graph(nodes, pairs[np.append(True, fresh)[: len(pairs)]], directed)


def load(
  name: str,
  *,
  path: str = "",
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
    directed: keep the direction of edges (the networkx graphs have none: both directions are then stored).
    nodes, degree: size of a generated graph and its mean number of edges a node (before repetitions are dropped).
    blocks, mixing: of "sbm", the number of equal communities and the share of edges between them.

  Raises:
    InputError: an unknown name, a missing path, or an impossible size.
  """
  require_choice("data.name", name, NAMES)
  if name == "edge_list":
    require(bool(path), "data.name=edge_list needs a file; give data.path=FILE")
    return read_edge_list(path, directed=directed)
  require(nodes >= 2 and degree > 0, f"nodes={nodes}, degree={degree}; a generated graph needs nodes >= 2, degree > 0")
  if name == "rmat":
    return rmat(nodes, round(nodes * degree), directed=directed, seed=seed)
  if name == "sbm":
    return sbm(nodes, round(nodes * degree), blocks=blocks, mixing=mixing, directed=directed, seed=seed)
  if name == "barabasi_albert":
    require(1 <= int(degree) < nodes, f"barabasi_albert needs 1 <= degree < nodes, not degree={degree}, nodes={nodes}")
    return _from_networkx(networkx.barabasi_albert_graph(nodes, int(degree), seed=seed), directed)
  ships = {
    "karate": networkx.karate_club_graph,
    "les_miserables": networkx.les_miserables_graph,
    "florentine": networkx.florentine_families_graph,
  }
  return _from_networkx(ships[name](), directed)


def read_edge_list(path: str | Path, *, directed: bool = False) -> Graph:
  """A text file (or .gz, .xz) with two integers a line, any white space or a comma between; # and % start comments.

  Further columns are ignored. Ids may have gaps.

  Raises:
    InputError: no such file, no edges, or a line that does not start with two integers (its number is told).
  """
  path = Path(path)
  require(path.is_file(), f"no edge list {str(path)!r}; give the path of a text file with two node ids a line")
  pairs, number = array.array("q"), 0
  with foreign(path, "mend or remove it", place=lambda: f"line {number}"):
    for number, line in lines(path):
      words = line.replace(",", " ").split()
      if not words or words[0][0] in "#%":
        continue
      integers = len(words) > 1 and all(_INTEGER.fullmatch(word) for word in words[:2])
      require(
        integers,
        f"{path}, line {number}: {line.strip()[:40]!r} does not start with two integer node ids; mend or remove it",
      )
      pairs.extend((int(words[0]), int(words[1])))
  require(len(pairs) > 0, f"{path} holds no edges; expected a line 'u v' for each")
  names, ends = np.unique(np.frombuffer(pairs, np.int64), return_inverse=True)
  return make(len(names), ends.reshape(-1, 2), directed=directed)


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


def _from_networkx(graph, directed: bool) -> Graph:
  graph = networkx.convert_node_labels_to_integers(graph)
  edges = np.array(graph.edges, np.int64).reshape(-1, 2)
  return make(len(graph), np.concatenate([edges, edges[:, ::-1]]) if directed else edges, directed=directed)
