"""PowerWalk: personalised PageRank from random-walk fingerprints and a few exact steps (Liu et al., CIKM 2016).

With reset probability c and row-stochastic P, the PPR of source u is p_u = c sum_t (1 - c)^t e_u P^t. Its
decomposition over vertices (arXiv 1608.06054), unrolled T times,

  p_u = sum_{t<T} c (1 - c)^t e_u P^t + sum_v f_T(v) p_v,    f_T = (1 - c)^T e_u P^T,    |f_T|_1 = (1 - c)^T,

is exact. Offline, R walks from every vertex give a fingerprint, an estimate of p_v. Online, T steps with the flow F of
all queries of a batch share every pass over the edges (VERD), and the fingerprints finish what is left:

  repeat T times:  S += c F,  F <- (1 - c) F P;      estimate = S + F Index.

A vertex without out-edges gets a self-loop: P does not depend on the source. Arrays are vertex-major: F[v, query].

  graph = powerwalk.walk_graph(common.load("edge_list", path="wiki-Vote.txt", directed=True))
  index = powerwalk.build_index(graph, jax.random.key(0), walks=100)
  ids, scores = powerwalk.top_k(sources, graph, index, steps=2, k=100)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.graphs.common import Graph

PRUNE = ("none", "drop", "hold")
NORMS = ("self_norm", "unbiased")
RESET = 0.15
# Below this many vertices counts are a dense matrix (a block of origins at a time); above, sorted pairs.
_DENSE = 16384
# Messages (entries x queries) written out at once on a CPU, where they should stay in cache; elsewhere 64 times more.
_MESSAGES = 2**21


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WalkGraph:
  """Out-edges by source for walks, in-edges by target for steps.

  Attributes:
    offsets, targets: out-neighbours of v are targets[offsets[v] : offsets[v + 1]]; degree their number, never 0.
    in_sources, in_targets: the same edges sorted by target.
  """

  offsets: Int[Array, "nodes_plus_1"]
  targets: Int[Array, "edges"]
  degree: Int[Array, "nodes"]
  in_sources: Int[Array, "edges"]
  in_targets: Int[Array, "edges"]
  nodes: int = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Index:
  """Fingerprints as a sparse matrix: values[i] estimates p_{origins[i]}(visited[i]); sorted by visited.

  Zeros at the end fill it up to one of few lengths, so that a query compiles for few shapes.
  """

  origins: Int[Array, "entries"]
  visited: Int[Array, "entries"]
  values: Float[Array, "entries"]
  nodes: int = dataclasses.field(metadata=dict(static=True))

  @property
  def bytes(self) -> int:
    """8 an entry: an id and a float32."""
    return 8 * int(jnp.count_nonzero(self.values))


def walk_graph(graph: Graph) -> WalkGraph:
  """Both directions of undirected edges; a self-loop for every vertex without out-edges."""
  edges = graph.edges if graph.directed else np.concatenate([graph.edges, graph.edges[:, ::-1]])
  out = np.bincount(edges[:, 0], minlength=graph.nodes)
  dangling = np.flatnonzero(out == 0).astype(np.int32)
  edges = np.concatenate([edges, np.stack([dangling, dangling], axis=1)])
  by_source = edges[np.lexsort((edges[:, 1], edges[:, 0]))]
  by_target = edges[np.lexsort((edges[:, 0], edges[:, 1]))]
  degree = np.bincount(edges[:, 0], minlength=graph.nodes)
  array = lambda x: jnp.asarray(x, jnp.int32)
  offsets = np.concatenate([[0], np.cumsum(degree)])
  return WalkGraph(
    array(offsets), array(by_source[:, 1]), array(degree), array(by_target[:, 0]), array(by_target[:, 1]), graph.nodes
  )


def spmm(
  sources: Int[Array, "entries"],
  targets: Int[Array, "entries"],
  weights: Float[Array, "entries"],
  flow: Float[Array, "nodes queries"],
  *,
  nodes: int,
  floor: float | Array = 0.0,
) -> Float[Array, "nodes queries"]:
  """out[w] = sum over entries (v, w) of weight * flow[v]; `targets` sorted, so sums have one order.

  Entries go in chunks, added in place: a batch of queries times all edges is never in memory. Products below `floor`
  are left out.
  """

  def add(total, entries):
    s, t, w = entries
    product = w[:, None].astype(flow.dtype) * flow[s]
    product = jnp.where(product < floor, 0, product)
    return total.at[t].add(product, indices_are_sorted=True), None

  messages = _MESSAGES if jax.default_backend() == "cpu" else 64 * _MESSAGES
  chunk = min(max(messages // flow.shape[1], 1), max(len(sources), 1))
  empty = -len(sources) % chunk
  pad = lambda x, value: jnp.pad(x, (0, empty), constant_values=value).reshape(-1, chunk)
  chunks = pad(sources, 0), pad(targets, nodes - 1), pad(weights, 0)
  return jax.lax.scan(add, jnp.zeros((nodes, flow.shape[1]), flow.dtype), chunks)[0]


def step(flow: Float[Array, "nodes queries"], graph: WalkGraph) -> Float[Array, "nodes queries"]:
  """F P: every vertex sends its flow in equal parts to its out-neighbours."""
  weights = 1 / graph.degree[graph.in_sources].astype(flow.dtype)
  return spmm(graph.in_sources, graph.in_targets, weights, flow, nodes=graph.nodes)


def one_hot(sources: Int[Array, "queries"], nodes: int, dtype=jnp.float32) -> Float[Array, "nodes queries"]:
  """The flow before the first step, e_u for every query."""
  return jnp.zeros((nodes, len(sources)), dtype).at[sources, jnp.arange(len(sources))].set(1)


def decompose(
  sources: Int[Array, "queries"],
  graph: WalkGraph,
  *,
  steps: int,
  reset: float = RESET,
  eps: float | Array = 0.0,
  prune: str = "none",
  hubs: Bool[Array, "nodes"] | None = None,
  dtype=jnp.float32,
) -> tuple[Array, Array, Array, Array]:
  """T steps of the decomposition of a batch: (S, F, H, dropped).

  Args:
    prune: "none"; "drop" discards increments c F < eps and outgoing flow with (1 - c) F / d < eps, as the published
      code does; "hold" moves such flow into H instead, where the index finishes it: no mass is lost.
    hubs: if given, flow that reaches one of these vertices is held there: the index needs no other rows.

  Returns:
    S, F, H (nodes, queries), and the mass dropped by query. S + F + H sums to 1 a query unless flow is dropped.

  Raises:
    InputError: negative steps, reset outside (0, 1), an unknown pruning.
  """
  # Under jit the number of steps may be an argument: then the caller has checked it.
  require(not isinstance(steps, int) or steps >= 0, f"steps is {steps}; it must be 0 (fingerprint alone) or more")
  require(0 < reset < 1, f"reset is {reset}; it must lie strictly between 0 and 1")
  require_choice("prune", prune, PRUNE)
  flow = one_hot(sources, graph.nodes, dtype)
  zero = jnp.zeros_like(flow)

  def body(_, carry):
    s, f, h, dropped = carry
    if hubs is not None:
      h, f = h + jnp.where(hubs[:, None], f, 0), jnp.where(hubs[:, None], 0, f)
    out = (1 - reset) * f
    small = out / graph.degree[:, None] < eps
    if prune == "hold":
      h = h + jnp.where(small, f, 0)
      f = jnp.where(small, 0, f)
    gain, out = reset * f, (1 - reset) * f
    if prune == "drop":
      kept_gain, kept_out = jnp.where(gain < eps, 0, gain), jnp.where(small, 0, out)
      dropped = dropped + jnp.sum(gain - kept_gain + out - kept_out, axis=0)
      gain, out = kept_gain, kept_out
    return s + gain, step(out, graph), h, dropped

  return jax.lax.fori_loop(0, steps, body, (zero, flow, zero, jnp.zeros(len(sources), dtype)))


def combine(
  s: Float[Array, "nodes queries"],
  flow: Float[Array, "nodes queries"],
  held: Float[Array, "nodes queries"],
  index: Index,
  *,
  eps: float | Array = 0.0,
  prune: str = "none",
) -> Float[Array, "nodes queries"]:
  """S + (F + H) Index. With "drop", flow and products below eps are skipped."""
  rest = flow + held
  floor = eps if prune == "drop" else 0.0
  rest = jnp.where(rest < floor, 0, rest)
  return s + spmm(index.origins, index.visited, index.values, rest, nodes=index.nodes, floor=floor)


def query(
  sources: Int[Array, "queries"],
  graph: WalkGraph,
  index: Index | None,
  *,
  steps: int,
  reset: float = RESET,
  eps: float | Array = 0.0,
  prune: str = "none",
  hubs: Bool[Array, "nodes"] | None = None,
  dtype=jnp.float32,
) -> Float[Array, "nodes queries"]:
  """Estimates of p_u for a batch of sources; without an index S alone, short of p_u by exactly (1 - c)^T in L1.

  With `hubs`, flow that has met no hub within the steps stays where it is.

  Raises:
    InputError: as `decompose`.
  """
  require(steps >= 0, f"steps is {steps}; it must be 0 (fingerprint alone) or more")
  options = dict(reset=reset, eps=eps, prune=prune, hubs=hubs, dtype=dtype)
  return _query(sources, graph, index, steps=jnp.int32(steps), **options)


@functools.partial(jax.jit, static_argnames=("reset", "prune", "dtype"))
def _query(sources, graph, index, *, steps, reset, eps, prune, hubs, dtype):
  s, f, h, _ = decompose(sources, graph, steps=steps, reset=reset, eps=eps, prune=prune, hubs=hubs, dtype=dtype)
  if index is None:
    return s
  if hubs is not None:
    met = jnp.where(hubs[:, None], f, 0)
    return combine(s + f - met, met, h, index, eps=eps, prune=prune)
  return combine(s, f, h, index, eps=eps, prune=prune)


def top_k(
  sources: Int[np.ndarray, "queries"], graph: WalkGraph, index: Index | None, *, k: int, batch: int = 256, **options
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
  """The k vertices of largest estimated PPR of each source, ties by smaller id, in batches of one compiled shape.

  Raises:
    InputError: a source that is no vertex, or k or batch outside their ranges.
  """
  sources = check_sources(sources, graph)
  require(1 <= k <= graph.nodes, f"k is {k}; it must lie in 1..{graph.nodes}, the number of vertices")
  require(batch >= 1, f"batch is {batch}; it must be at least 1")
  padded = np.pad(sources, (0, -len(sources) % batch))
  parts = [_top(query(jnp.asarray(b), graph, index, **options), k=k) for b in padded.reshape(-1, batch)]
  scores, ids = (np.concatenate([np.asarray(p[i]) for p in parts])[: len(sources)] for i in (0, 1))
  return ids, scores


@functools.partial(jax.jit, static_argnames="k")
def _top(estimate, *, k):
  return jax.lax.top_k(estimate.T, k)


def check_sources(sources, graph: WalkGraph) -> Int[np.ndarray, "queries"]:
  """The sources as int32, refused unless all are vertices."""
  sources = np.asarray(sources, np.int32)
  require(
    sources.ndim == 1 and len(sources) > 0, f"sources have shape {sources.shape}; give a non-empty list of vertices"
  )
  low, high = int(sources.min()), int(sources.max())
  require(low >= 0 and high < graph.nodes, f"sources lie in {low}..{high}; vertices are 0..{graph.nodes - 1}")
  return sources


@functools.partial(jax.jit, static_argnames=("iterations", "reset", "dtype"))
def exact(
  sources: Int[Array, "queries"], graph: WalkGraph, *, iterations: int = 150, reset: float = RESET, dtype=jnp.float32
) -> Float[Array, "nodes queries"]:
  """Power iteration: S after `iterations` steps, normalised remainder left out (0.85^150 = 2.6e-11)."""
  return decompose(sources, graph, steps=iterations, reset=reset, dtype=dtype)[0]


@functools.partial(jax.jit, static_argnames=("steps", "reset"))
def backward(
  targets: Int[Array, "columns"], graph: WalkGraph, index: Index, *, steps: int, reset: float = RESET
) -> Float[Array, "nodes columns"]:
  """p_v(w) of all v for chosen w, by T backward sweeps p_v <- c e_v + ((1 - c)/d_v) sum p_w from the fingerprints.

  The dynamic programme of Jeh and Widom; the same estimate as `query` without pruning, all sources at once.
  """
  start = one_hot(targets, graph.nodes, index.values.dtype)
  sources = jnp.repeat(jnp.arange(graph.nodes), graph.degree, total_repeat_length=len(graph.targets))
  order = jnp.argsort(index.origins, stable=True)
  estimate = spmm(index.visited[order], index.origins[order], index.values[order], start, nodes=graph.nodes)
  weights = 1 / graph.degree[sources].astype(start.dtype)
  sweep = lambda _, p: reset * start + (1 - reset) * spmm(graph.targets, sources, weights, p, nodes=graph.nodes)
  return jax.lax.fori_loop(0, steps, sweep, estimate)


def walks(
  key: jax.Array, graph: WalkGraph, origins: Int[Array, "walkers"], *, length: int, reset: float = RESET
) -> tuple[Int[Array, "length walkers"], Bool[Array, "length walkers"]]:
  """One walk from every origin: (position, alive) at its 1st .. length-th visit; the origin is the first.

  A walker stops with probability c before each move; stopped, it stays where it is with alive = False. The last row of
  positions is where a walk ended.
  """

  def move(carry, key):
    position, alive = carry
    stop, choose = jax.random.split(key)
    alive &= jax.random.uniform(stop, position.shape) >= reset
    degree = graph.degree[position]
    hop = (jax.random.uniform(choose, position.shape) * degree).astype(jnp.int32)
    there = graph.targets[graph.offsets[position] + jnp.minimum(hop, degree - 1)]
    position = jnp.where(alive, there, position)
    return (position, alive), (position, alive)

  start = origins.astype(jnp.int32), jnp.ones(origins.shape, bool)
  _, rest = jax.lax.scan(move, start, jax.random.split(key, length - 1))
  return tuple(jnp.concatenate([a[None], b]) for a, b in zip(start, rest, strict=True))


@functools.partial(jax.jit, static_argnames=("per_origin", "length", "reset"))
def dense_visits(
  key: jax.Array,
  graph: WalkGraph,
  origins: Int[Array, "origins"],
  *,
  per_origin: int,
  length: int,
  reset: float = RESET,
) -> Float[Array, "origins nodes"]:
  """Visits of `per_origin` walks from each origin, counted in a matrix (float32: no 16-bit overflow)."""
  walkers = jnp.repeat(jnp.arange(len(origins)), per_origin)
  position, alive = walks(key, graph, origins[walkers], length=length, reset=reset)
  counts = jnp.zeros((len(origins), graph.nodes))
  add = lambda counts, visit: (counts.at[walkers, visit[0]].add(visit[1]), None)
  return jax.lax.scan(add, counts, (position, alive.astype(jnp.float32)))[0]


@functools.partial(jax.jit, static_argnames=("per_origin", "length", "reset"))
def sorted_visits(
  key: jax.Array,
  graph: WalkGraph,
  origins: Int[Array, "origins"],
  *,
  per_origin: int,
  length: int,
  reset: float = RESET,
) -> tuple[Int[Array, "visits"], Int[Array, "visits"], Int[Array, "visits"]]:
  """The same visits as (row of the origin, vertex, count), sorted, for graphs too large for a matrix.

  The count stands at the first place of its (row, vertex) and is 0 at the others; so are all of stopped walkers.
  """
  walkers = jnp.repeat(jnp.arange(len(origins), dtype=jnp.int32), per_origin)
  position, alive = walks(key, graph, origins[walkers], length=length, reset=reset)
  row = jnp.where(alive, walkers[None], len(origins)).reshape(-1)
  row, vertex = jax.lax.sort((row, position.reshape(-1)), num_keys=2, is_stable=False)
  first = jnp.concatenate([jnp.array([True]), (row[1:] != row[:-1]) | (vertex[1:] != vertex[:-1])])
  run = jnp.cumsum(first) - 1
  size = jax.ops.segment_sum(jnp.ones_like(row), run, num_segments=len(row), indices_are_sorted=True)
  return row, vertex, jnp.where(first & (row < len(origins)), size[run], 0)


def build_index(
  graph: WalkGraph,
  key: jax.Array,
  *,
  walks: int,
  length: int = 64,
  cap: int = 1024,
  norm: str = "self_norm",
  reset: float = RESET,
  origins: Int[np.ndarray, "origins"] | None = None,
  block: int = 0,
) -> Index:
  """Fingerprints of every vertex by full-path Monte Carlo: all visits of R walks count, not only their ends.

  Args:
    walks, length: R, and the most visits a walk makes (64 loses 3e-5 of the mass; the published code stops at 10).
    cap: entries kept a vertex, the largest; with "self_norm" what is kept is normalised again.
    norm: "self_norm" visits / total visits; "unbiased" c visits / R.
    origins: the vertices to index (hubs); None: all.
    block: origins walked at once; 0 picks.

  Raises:
    InputError: walks, length or cap below 1, or an unknown norm.
  """
  require(walks >= 1 and length >= 1 and cap >= 1, f"walks={walks}, length={length}, cap={cap} must all be at least 1")
  require_choice("norm", norm, NORMS)
  origins = np.arange(graph.nodes, dtype=np.int32) if origins is None else check_sources(origins, graph)
  block = min(block or max(2**22 // (walks * length), 16), len(origins))
  dense = graph.nodes <= _DENSE
  parts = []
  for i, start in enumerate(range(0, len(origins), block)):
    chosen = origins[start : start + block]
    count = len(chosen)
    chosen = jnp.asarray(np.pad(chosen, (0, block - count)))
    options = dict(per_origin=walks, length=length, reset=reset)
    if dense:
      counts = np.asarray(dense_visits(jax.random.fold_in(key, i), graph, chosen, **options))[:count]
      row, vertex = np.nonzero(counts)
      parts.append((origins[start + row], vertex, counts[row, vertex]))
    else:
      row, vertex, size = (np.asarray(x) for x in sorted_visits(jax.random.fold_in(key, i), graph, chosen, **options))
      real = (size > 0) & (row < count)
      parts.append((origins[start + row[real]], vertex[real], size[real]))
  origin, vertex, count = (np.concatenate([p[i] for p in parts]) for i in range(3))
  # The largest of each origin first, ties by id.
  order = np.lexsort((vertex, -count, origin))
  origin, vertex, count = origin[order], vertex[order], count[order].astype(np.float64)
  starts = np.concatenate([[0], np.cumsum(np.bincount(origin, minlength=graph.nodes))])
  kept = np.arange(len(origin)) - starts[origin] < cap
  origin, vertex, count = origin[kept], vertex[kept], count[kept]
  total = np.bincount(origin, count, minlength=graph.nodes)
  values = count / total[origin] if norm == "self_norm" else reset * count / walks
  return make_index(graph.nodes, origin, vertex, values)


def make_index(nodes: int, origins, visited, values, dtype=jnp.float32) -> Index:
  """An index from any list of entries."""
  order = np.lexsort((origins, visited))
  granule = max(2 ** (len(order).bit_length() - 3), 256)
  empty = (0, -len(order) % granule)
  array = lambda x, dtype, fill: jnp.asarray(np.pad(np.asarray(x)[order], empty, constant_values=fill), dtype)
  return Index(array(origins, jnp.int32, 0), array(visited, jnp.int32, nodes - 1), array(values, dtype, 0), nodes)


def quality(
  estimate: Float[Array, "nodes queries"], truth: Float[Array, "nodes queries"], *, k: int
) -> dict[str, Float[Array, "queries"]]:
  """L1 error, precision@k, RAG@k (true PPR of the returned k over that of the best k), NDCG@k; by query."""
  found = jax.lax.top_k(estimate.T, k)[1]
  best, ideal = jax.lax.top_k(truth.T, k)
  gain = jnp.take_along_axis(truth.T, found, axis=1)
  discount = 1 / jnp.log2(jnp.arange(k) + 2.0)
  hits = (found[:, :, None] == ideal[:, None, :]).any(axis=2)
  return {
    "l1": jnp.abs(estimate - truth).sum(axis=0),
    "precision": hits.mean(axis=1),
    "rag": gain.sum(axis=1) / best.sum(axis=1),
    "ndcg": (gain * discount).sum(axis=1) / (best * discount).sum(axis=1),
  }


def work(sources: Int[Array, "queries"], graph: WalkGraph, index: Index | None, *, steps: int) -> dict[str, float]:
  """Mean edge traversals, index entries touched and active vertices at the end, of a query without pruning."""
  active = one_hot(jnp.asarray(sources), graph.nodes)
  edges = 0.0
  for _ in range(steps):
    edges += float((active * graph.degree[:, None]).sum()) / len(sources)
    active = (step(active, graph) > 0).astype(jnp.float32)
  rows = jnp.zeros(graph.nodes)
  if index is not None:
    rows = rows.at[index.origins].add(index.values > 0)
  touched = float((active * rows[:, None]).sum()) / len(sources)
  return {"edges": edges, "entries": touched, "active": float(active.sum()) / len(sources)}
