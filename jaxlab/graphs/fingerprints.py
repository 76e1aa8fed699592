"""Random walks on a graph, and the index PowerWalk keeps of them: a fingerprint of every vertex.

R walks from v stop with probability c before each move. All their visits count (full path), so that with X(w) visits
to w, E[c X(w) / R] = p_v(w), the personalised PageRank of v (`powerwalk` has the notation and the paper).

  graph = walk_graph(common.load("edge_list", path="wiki-Vote.txt", directed=True))
  index = build_index(graph, jax.random.key(0), walks=100)
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_choice, require_key
from jaxlab.graphs.common import Graph, Named, require_graph, sorted_pairs

NORMS = ("self_norm", "unbiased")
MOVES = ("walkers", "long_path", "rounded")
RESET = 0.15
# Visits counted at once on a CPU, tens of megabytes; elsewhere 16 times more, about a gigabyte.
_VISITS = 2**22


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("offsets", "targets", "degree", "in_sources", "in_targets"),
  meta_fields=("nodes", "digest"),
  drop_fields=("names",),
)
@dataclasses.dataclass(frozen=True)
class WalkGraph(Named):
  """Out-edges by source for walks, in-edges by target for steps.

  Attributes:
    offsets, targets: out-neighbours of v are targets[offsets[v] : offsets[v + 1]]; degree their number, never 0.
    in_sources, in_targets: the same edges sorted by target.
    digest: of the vertices and edges, which an index remembers.
    names: of the vertices (`Named`); None inside a transformation, and where they are the positions.
  """

  offsets: Int[Array, "nodes_plus_1"]
  targets: Int[Array, "edges"]
  degree: Int[Array, "nodes"]
  in_sources: Int[Array, "edges"]
  in_targets: Int[Array, "edges"]
  nodes: int
  digest: str
  names: np.ndarray | None = dataclasses.field(default=None, compare=False)


class Built(NamedTuple):
  """What an index was built from: the digest of its graph, the reset probability, and its size."""

  graph: str
  reset: float
  walks: int
  length: int
  cap: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Index:
  """Fingerprints as a sparse matrix: values[i] estimates p_{origins[i]}(visited[i]); sorted by visited.

  Zeros at the end fill it up to one of few lengths, so that a query compiles for few shapes. Of entries from elsewhere
  (`make_index`) nobody knows what they were `built` from: None.
  """

  origins: Int[Array, "entries"]
  visited: Int[Array, "entries"]
  values: Float[Array, "entries"]
  nodes: int = dataclasses.field(metadata=dict(static=True))
  built: Built | None = dataclasses.field(default=None, metadata=dict(static=True))

  @property
  def bytes(self) -> int:
    """What is stored: two ids and a value an entry, those that fill up included."""
    return self.origins.nbytes + self.visited.nbytes + self.values.nbytes


def walk_graph(graph: Graph) -> WalkGraph:
  """Both directions of undirected edges; a self-loop for every vertex without out-edges; the names of the graph.

  Raises:
    InputError: no `Graph`.
  """
  require_graph(graph)
  sources, targets = graph.arcs()
  dangling = np.flatnonzero(np.bincount(sources, minlength=graph.nodes) == 0)
  sources, targets = np.concatenate([sources, dangling]), np.concatenate([targets, dangling])
  out_sources, out_targets = sorted_pairs(sources, targets, graph.nodes)
  in_targets, in_sources = sorted_pairs(targets, sources, graph.nodes)
  degree = np.bincount(out_sources, minlength=graph.nodes)
  arrays = np.concatenate([[0], np.cumsum(degree)]), out_targets, degree, in_sources, in_targets
  digest = hashlib.blake2b(graph.nodes.to_bytes(8, "little"), digest_size=16)
  for ends in (out_sources, out_targets):
    digest.update(ends.astype("<i4").tobytes())
  return WalkGraph(*(jnp.asarray(x, jnp.int32) for x in arrays), graph.nodes, digest.hexdigest(), graph.names)


def check_graph(graph: WalkGraph) -> None:
  """Refuses what is no graph for walks."""
  name = type(graph).__name__
  require(isinstance(graph, WalkGraph), f"graph is a {name}; walks need fingerprints.walk_graph(graph) of a Graph")


def check_sources(sources, graph: Named) -> Int[np.ndarray, "queries"]:
  """The sources as int32, refused unless all are positions of vertices; traced ones have been checked."""
  if isinstance(sources, jax.core.Tracer):
    return sources
  sources = np.asarray(sources)
  require(
    sources.ndim == 1 and len(sources) > 0, f"sources have shape {sources.shape}; give a non-empty list of vertices"
  )
  require(
    sources.dtype.kind in "iu",
    f"sources hold {sources.dtype}, not integers; they are positions of vertices: graph.index(names) tells them",
  )
  low, high = int(sources.min()), int(sources.max())
  require(low >= 0 and high < graph.nodes, f"sources lie in {low}..{high}; vertices are 0..{graph.nodes - 1}")
  return sources.astype(np.int32)


def check_whole(name: str, value: object, least: int) -> None:
  """Refuses what is no integer, or below `least`."""
  whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
  require(whole and value >= least, f"{name} is {value!r:.40}; it must be an integer, {least} or more")


def check_index(index: Index, graph: WalkGraph) -> None:
  """Refuses an index of another graph."""
  require(index.nodes == graph.nodes, f"the index has {index.nodes} vertices, the graph {graph.nodes}; build it anew")
  same = index.built is None or index.built.graph == graph.digest
  require(same, "the index was built from a graph of other edges; build it anew")


def check_reset(built: Built | None, reset: float) -> None:
  """Refuses a reset probability that is not the one of the walks."""
  same = built is None or built.reset == reset
  require(same, f"reset is {reset}; the index was built with another: give reset={built and built.reset} or build anew")


def walks(
  key: jax.Array,
  graph: WalkGraph,
  origins: Int[Array, "walkers"],
  *,
  length: int,
  reset: float = RESET,
  restart: bool = False,
  numbers: Int[Array, "walkers"] | None = None,
) -> tuple[Int[Array, "length walkers"], Bool[Array, "length walkers"]]:
  """One walk from every origin: (position, alive) at its 1st .. length-th visit; the origin is the first.

  A walker stops with probability c before each move; stopped, it stays where it is with alive = False. The last row of
  positions is where a walk ended. With `restart` it goes back to its origin instead, and never stops. What a key draws
  for a walker depends on its number (None: its place) alone, not on who walks beside it.
  """

  def move(carry, key):
    position, alive = carry
    # Folding a number in hashes it to 64 bits: the two draws of a move, in float32 whatever the default is.
    bits = jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))
    stop, choose = ((bits[:, i] >> 8).astype(jnp.float32) * 2.0**-24 for i in (0, 1))
    goes = stop >= reset
    degree = graph.degree[position]
    hop = (choose * degree).astype(jnp.int32)
    there = graph.targets[graph.offsets[position] + jnp.minimum(hop, degree - 1)]
    alive = alive & (goes | restart)
    position = jnp.where(alive, jnp.where(goes, there, origins), position)
    return (position, alive), (position, alive)

  origins = origins.astype(jnp.int32)
  numbers = jnp.arange(len(origins)) if numbers is None else numbers
  start = origins, jnp.ones(origins.shape, bool)
  _, rest = jax.lax.scan(move, start, jax.random.split(key, length - 1))
  return tuple(jnp.concatenate([a[None], b]) for a, b in zip(start, rest, strict=True))


@functools.partial(jax.jit, static_argnames=("per_origin", "length", "reset", "restart"))
def _visits(key, graph, rows, origins, count, *, per_origin, length, reset, restart):
  """(row * nodes + vertex of a visit, [how many]); those of stopped walkers and of rows from `count` on are last."""
  rows = jnp.repeat(rows, per_origin)
  numbers = rows.astype(jnp.uint32) * per_origin + jnp.arange(len(rows), dtype=jnp.uint32) % per_origin
  options = dict(length=length, reset=reset, restart=restart, numbers=numbers)
  position, alive = walks(key, graph, jnp.repeat(origins, per_origin), **options)
  alive &= rows < count
  # Keys of (row, vertex) need 64 bits.
  keys = jnp.where(alive, rows.astype(jnp.int64) * graph.nodes + position, jnp.iinfo(jnp.int64).max).reshape(-1)
  # A GPU sorts them in place; on a CPU numpy drops the stopped ones first, which leaves little to sort.
  return keys if jax.default_backend() == "cpu" else jnp.sort(keys), jnp.sum(alive)[None]


@functools.partial(jax.jit, static_argnames=("per_origin", "length", "reset"))
def rounded_visits(
  key: jax.Array,
  graph: WalkGraph,
  rows: Int[Array, "origins"],
  origins: Int[Array, "origins"],
  *,
  per_origin: int,
  length: int,
  reset: float = RESET,
) -> Float[Array, "origins nodes"]:
  """Visits as the published code counts them: numbers of walkers move, not walkers.

  Of the k walkers of an origin at a vertex floor((1 - c) k + u) go on, and of these k' each out-edge carries
  floor(k' / d + u), u uniform: right on average, but the number of walkers is not conserved. Memory edges x origins.
  `rows` number the origins: what a key draws for an origin depends on its number.
  """
  sources = jnp.repeat(jnp.arange(graph.nodes), graph.degree, total_repeat_length=len(graph.targets))
  rounded = lambda key, x: jnp.floor(x + jax.random.uniform(key, x.shape, jnp.float32))

  def move(walkers, key):
    stop, spread = jax.random.split(key)
    walkers = rounded(stop, (1 - reset) * walkers)
    sent = rounded(spread, (walkers / graph.degree)[sources])
    walkers = jnp.zeros_like(walkers).at[graph.targets].add(sent)
    return walkers, walkers

  def count(key, origin):
    start = jnp.zeros(graph.nodes, jnp.float32).at[origin].set(per_origin)
    return start + jnp.sum(jax.lax.scan(move, start, jax.random.split(key, length - 1))[1], axis=0)

  return jax.vmap(count)(jax.vmap(jax.random.fold_in, (None, 0))(key, rows), origins)


def count_visits(
  key: jax.Array,
  graph: WalkGraph,
  origins: Int[np.ndarray, "origins"],
  *,
  per_origin: int,
  length: int,
  reset: float = RESET,
  moves: str = "walkers",
  block: int = 0,
  devices: int = 1,
  spread: Callable[[Callable], Callable] = lambda walk: walk,
) -> tuple[Int[np.ndarray, "entries"], Int[np.ndarray, "entries"], Int[np.ndarray, "entries"]]:
  """(row of the origin, vertex, visits > 0), sorted; `block` origins walk at once (0 picks) on each of the devices.

  Walkers are numbered through all rows: what a key draws depends neither on the blocks nor on the devices. `spread`
  makes of a function of (key, graph, rows, origins, ...) one whose rows are split over the devices.

  Raises:
    InputError: 2^32 walkers or more, which have no numbers.
  """
  walkers = len(origins) * per_origin
  require(walkers < 2**32, f"{walkers} walks; their numbers have 32 bits: walk from fewer origins at a time")
  limit = _VISITS if jax.default_backend() == "cpu" else 16 * _VISITS
  each = len(graph.targets) if moves == "rounded" else per_origin * length
  block = devices * min(block or max(limit // each, 1), -(-len(origins) // devices))
  options = dict(per_origin=per_origin, length=length, reset=reset)
  parts = []
  for start in range(0, len(origins), block):
    count = min(block, len(origins) - start)
    rows = jnp.arange(start, start + block, dtype=jnp.int32)
    chosen = jnp.asarray(np.pad(origins[start : start + block], (0, block - count)))
    if moves == "rounded":
      counts = np.asarray(spread(rounded_visits)(key, graph, rows, chosen, **options))[:count]
      row, vertex = np.nonzero(counts)
      parts.append((start + row, vertex, counts[row, vertex].astype(np.int64)))
      continue
    with jax.enable_x64(True):
      restart = moves == "long_path"
      keys, live = spread(_visits)(key, graph, rows, chosen, len(origins), restart=restart, **options)
      keys = keys.reshape(devices, -1)
      if jax.default_backend() != "cpu":
        # Fetched in few lengths: each one compiles.
        keys = keys[:, : _round_up(int(live.max()))]
      keys = np.asarray(keys).reshape(-1)
    keys = np.sort(keys[keys < np.iinfo(np.int64).max])
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    row, vertex = np.divmod(keys[first], graph.nodes)
    parts.append((row, vertex, np.diff(first, append=len(keys))))
  return tuple(np.concatenate([p[i] for p in parts]) for i in range(3))


def build_index(
  graph: WalkGraph,
  key: jax.Array,
  *,
  walks: int,
  length: int = 64,
  cap: int = 1024,
  norm: str = "self_norm",
  moves: str = "walkers",
  reset: float = RESET,
  origins: Int[np.ndarray, "origins"] | None = None,
  block: int = 0,
  devices: int = 1,
  spread: Callable[[Callable], Callable] = lambda walk: walk,
) -> Index:
  """Fingerprints of every vertex by full-path Monte Carlo: all visits of R walks count, not only their ends.

  Args:
    walks, length: R, and the most visits a walk makes (64 loses 3e-5 of the mass; the published code stops at 10).
    cap: entries kept a vertex, the largest; with "self_norm" what is kept is normalised again.
    norm: "self_norm" visits / total visits; "unbiased" c visits / R, of walks that end.
    moves: "walkers" is R independent walks. Two modes of the published code: "long_path" restarts a walker at its
      origin, so that it makes `length` visits; "rounded" is `rounded_visits`.
    origins: the vertices to index (hubs); None: all.
    block: origins walked at once on a device; 0 picks what suits it. The index does not depend on it.
    devices, spread: of `count_visits`, and given by `powerwalk_sharded.build_index`.

  Raises:
    InputError: no graph of `walk_graph`, no key, walks, length or cap no integers or below 1, reset outside (0, 1),
      2^32 walks or more, an unknown norm or move, or long paths that are not self-normalised.
  """
  check_graph(graph)
  require_key(key)
  for name, value in (("walks", walks), ("length", length), ("cap", cap)):
    check_whole(name, value, 1)
  require(0 < reset < 1, f"reset is {reset}; it must lie strictly between 0 and 1")
  require_choice("norm", norm, NORMS)
  require_choice("moves", moves, MOVES)
  require(moves != "long_path" or norm == "self_norm", "long paths never end: moves=long_path needs norm=self_norm")
  origins = np.arange(graph.nodes, dtype=np.int32) if origins is None else check_sources(origins, graph)
  row, vertex, count = count_visits(
    key,
    graph,
    origins,
    per_origin=walks,
    length=length,
    reset=reset,
    moves=moves,
    block=block,
    devices=devices,
    spread=spread,
  )
  kept = _largest(row, count, cap)
  row, vertex, count = row[kept], vertex[kept], count[kept]
  values = count / np.bincount(row, count)[row] if norm == "self_norm" else reset * count / walks
  built = Built(graph.digest, reset, walks, length, cap)
  return make_index(graph.nodes, origins[row], vertex, values, built=built)


def _largest(row, count, cap: int) -> Int[np.ndarray, "kept"]:
  """Places of the `cap` largest counts of every row, the earlier of equal ones first."""
  entries = np.bincount(row)
  large = np.flatnonzero((entries > cap)[row])
  # Rows above the cap alone are sorted, by count within the row.
  order = large[np.lexsort((-count[large], row[large]))]
  rank = np.arange(len(order)) - np.searchsorted(row[order], row[order])
  keep = np.ones(len(row), bool)
  keep[order[rank >= cap]] = False
  return np.flatnonzero(keep)


def make_index(nodes: int, origins, visited, values, dtype=jnp.float32, built: Built | None = None) -> Index:
  """An index from any list of entries; those of the same (origin, visited) add.

  Raises:
    InputError: an end that is no position of a vertex.
  """
  for ends in (np.asarray(origins), np.asarray(visited)):
    inside = ends.dtype.kind in "iu" and bool(((ends >= 0) & (ends < nodes)).all())
    require(inside or not len(ends), f"entries must be of vertices 0..{nodes - 1}; make the index of the graph's own")
  # Sparse formats sort by counting.
  sparse = scipy.sparse.coo_array(
    (np.asarray(values), (np.asarray(origins), np.asarray(visited))), shape=(nodes, nodes)
  )
  sparse = sparse.tocsc()
  empty = (0, _round_up(sparse.nnz) - sparse.nnz)
  array = lambda x, dtype, fill: jnp.asarray(np.pad(x, empty, constant_values=fill), dtype)
  visited = np.repeat(np.arange(nodes), np.diff(sparse.indptr))
  arrays = array(sparse.indices, jnp.int32, 0), array(visited, jnp.int32, nodes - 1), array(sparse.data, dtype, 0)
  return Index(*arrays, nodes, built)


def _round_up(length: int) -> int:
  """To one of eight lengths an octave."""
  granule = max(2 ** (length.bit_length() - 3), 256)
  return -(-length // granule) * granule
