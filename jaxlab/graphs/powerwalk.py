"""PowerWalk: personalised PageRank from random-walk fingerprints and a few exact steps (Liu et al., CIKM 2016).

With reset probability c and row-stochastic P, the PPR of source u is p_u = c sum_t (1 - c)^t e_u P^t. Its
decomposition over vertices (arXiv 1608.06054), unrolled T times,

  p_u = sum_{t<T} c (1 - c)^t e_u P^t + sum_v f_T(v) p_v,    f_T = (1 - c)^T e_u P^T,    |f_T|_1 = (1 - c)^T,

is exact. Offline, R walks from every vertex give a fingerprint, an estimate of p_v. Online, T steps with the flow F of
all queries of a batch share every pass over the edges (VERD), and the fingerprints finish what is left:

  repeat T times:  S += c F,  F <- (1 - c) F P;      estimate = S + F Index.

A vertex without out-edges gets a self-loop: P does not depend on the source. Arrays are vertex-major: F[v, query].

  graph = fingerprints.walk_graph(common.load("edge_list", path="wiki-Vote.txt", directed=True))
  index = fingerprints.build_index(graph, jax.random.key(0), walks=100)
  names, scores = powerwalk.top_k([30, 8], graph, index, steps=2, k=100)
"""

import functools
from collections.abc import Hashable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxlab.core.checks import require, require_choice
from jaxlab.graphs.fingerprints import (
  RESET,
  Index,
  WalkGraph,
  check_graph,
  check_index,
  check_reset,
  check_sources,
  check_whole,
)

PRUNE = ("none", "drop", "hold")
# Messages (entries x queries) written out at once on a CPU, where they should stay in cache; elsewhere 256 times more,
# 2 GiB: every chunk is a pass over the sums.
_MESSAGES = 2**21
# Vertices of a group whose best alone competes for a place among the k best.
_GROUP = 128


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

  messages = _MESSAGES if jax.default_backend() == "cpu" else 256 * _MESSAGES
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
    InputError: a source that is no vertex, steps no integer or negative, reset outside (0, 1), an unknown pruning.
  """
  sources = check_sources(sources, graph)
  # Under jit the number of steps may be an argument: then the caller has checked it.
  if not isinstance(steps, jax.Array):
    check_whole("steps", steps, 0)
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

  Sources and rows of the answer are positions; `top_k` takes names. With `hubs`, flow that has met no hub within the
  steps stays where it is.

  Raises:
    InputError: no graph of `walk_graph`, a source that is no vertex, an index of another graph or reset, or as
      `decompose`.
  """
  check_graph(graph)
  sources = check_sources(sources, graph)
  check_whole("steps", steps, 0)
  if index is not None:
    check_index(index, graph)
    check_reset(index.built, reset)
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
  sources: Iterable[Hashable], graph: WalkGraph, index: Index | None, *, k: int, batch: int = 256, **options
) -> tuple[Shaped[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
  """The k vertices of largest estimated PPR of each source, ties by position, in batches of one compiled shape.

  Args:
    sources: names of vertices, which are positions where the graph has none.
    options: steps and all others of `query`.

  Returns:
    Names of vertices and their scores, falling.

  Raises:
    InputError: a source that is no vertex, k or batch outside their ranges, or as `query`.
  """
  return _in_batches(lambda part: query(part, graph, index, **options), sources, graph, k=k, batch=batch)


def exact_top_k(
  sources: Iterable[Hashable], graph: WalkGraph, *, k: int, iterations: int = 150, batch: int = 256
) -> tuple[Shaped[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
  """`top_k` by power iteration.

  Raises:
    InputError: as `top_k`, or iterations no integer or negative.
  """
  return _in_batches(lambda part: exact(part, graph, iterations=iterations), sources, graph, k=k, batch=batch)


def _in_batches(answer, sources, graph, *, k, batch):
  check_graph(graph)
  sources = check_sources(sources if graph.names is None else graph.index(sources), graph)
  check_whole("batch", batch, 1)
  check_whole("k", k, 1)
  require(k <= graph.nodes, f"k is {k}; it must lie in 1..{graph.nodes}, the number of vertices")
  padded = np.pad(sources, (0, -len(sources) % batch)).reshape(-1, batch)
  parts = [largest(answer(part), k=k) for part in padded]
  scores, ids = (np.concatenate([np.asarray(p[i]) for p in parts])[: len(sources)] for i in (0, 1))
  return graph.named(ids), scores


@functools.partial(jax.jit, static_argnames="k")
def largest(
  estimate: Float[Array, "nodes queries"], *, k: int
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
  """`jax.lax.top_k` of the columns, exact to the order of ties, in one pass over a large estimate.

  Of groups of neighbouring ids the k with the largest maxima hold the k largest entries: each group that has one of
  those entries has a maximum as large, and of equal maxima the group of smaller ids comes first. A sort of k groups
  replaces one of all vertices.
  """
  nodes, queries = estimate.shape
  groups = -(-nodes // _GROUP)
  if groups <= k:
    return jax.lax.top_k(estimate.T, k)
  grouped = jnp.pad(estimate, ((0, groups * _GROUP - nodes), (0, 0)), constant_values=-jnp.inf)
  grouped = grouped.reshape(groups, _GROUP, queries)
  chosen = jnp.sort(jax.lax.top_k(grouped.max(axis=1).T, k)[1], axis=1)
  candidates = grouped[chosen, :, jnp.arange(queries)[:, None]].reshape(queries, k * _GROUP)
  scores, place = jax.lax.top_k(candidates, k)
  return scores, jnp.take_along_axis(chosen, place // _GROUP, axis=1) * _GROUP + place % _GROUP


def exact(
  sources: Int[Array, "queries"], graph: WalkGraph, *, iterations: int = 150, reset: float = RESET, dtype=jnp.float32
) -> Float[Array, "nodes queries"]:
  """Power iteration: p <- c e_u + (1 - c) p P from e_u, which is S + F after as many steps (0.85^150 = 2.6e-11).

  Raises:
    InputError: no graph of `walk_graph`, a source that is no vertex, iterations no integer or negative.
  """
  check_graph(graph)
  check_whole("iterations", iterations, 0)
  return _exact(check_sources(sources, graph), graph, iterations=jnp.int32(iterations), reset=reset, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("reset", "dtype"))
def _exact(sources, graph, *, iterations, reset, dtype):
  columns = jnp.arange(len(sources))
  sweep = lambda _, p: step((1 - reset) * p, graph).at[sources, columns].add(reset)
  return jax.lax.fori_loop(0, iterations, sweep, one_hot(sources, graph.nodes, dtype))


def backward(
  targets: Int[Array, "columns"], graph: WalkGraph, index: Index, *, steps: int, reset: float = RESET
) -> Float[Array, "nodes columns"]:
  """p_v(w) of all v for chosen w, by T backward sweeps p_v <- c e_v + ((1 - c)/d_v) sum p_w from the fingerprints.

  The dynamic programme of Jeh and Widom; the same estimate as `query` without pruning, all sources at once.

  Raises:
    InputError: no graph of `walk_graph`, a target that is no vertex, steps no integer or negative, an index of another
      graph or reset.
  """
  check_graph(graph)
  check_whole("steps", steps, 0)
  check_index(index, graph)
  check_reset(index.built, reset)
  return _backward(check_sources(targets, graph), graph, index, steps=steps, reset=reset)


@functools.partial(jax.jit, static_argnames=("steps", "reset"))
def _backward(targets, graph, index, *, steps, reset):
  start = one_hot(targets, graph.nodes, index.values.dtype)
  sources = jnp.repeat(jnp.arange(graph.nodes), graph.degree, total_repeat_length=len(graph.targets))
  order = jnp.argsort(index.origins, stable=True)
  estimate = spmm(index.visited[order], index.origins[order], index.values[order], start, nodes=graph.nodes)
  weights = 1 / graph.degree[sources].astype(start.dtype)
  sweep = lambda _, p: reset * start + (1 - reset) * spmm(graph.targets, sources, weights, p, nodes=graph.nodes)
  return jax.lax.fori_loop(0, steps, sweep, estimate)


def quality(
  estimate: Float[Array, "nodes queries"], truth: Float[Array, "nodes queries"], *, k: int
) -> dict[str, Float[Array, "queries"]]:
  """L1 error, precision@k, RAG@k (true PPR of the returned k over that of the best k), NDCG@k; by query."""
  found = largest(estimate, k=k)[1]
  best, ideal = largest(truth, k=k)
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
  """Mean edge traversals, index entries touched and active vertices at the end, of a query without pruning.

  Raises:
    InputError: as `query`.
  """
  check_graph(graph)
  check_whole("steps", steps, 0)
  sources = check_sources(sources, graph)
  active, edges = (np.asarray(x, np.float64) for x in _active(jnp.asarray(sources), graph, jnp.int32(steps)))
  entries = np.zeros(graph.nodes)
  if index is not None:
    entries += np.bincount(np.asarray(index.origins)[np.asarray(index.values) > 0], minlength=graph.nodes)
  count = len(sources)
  return {"edges": edges / count, "entries": active @ entries / count, "active": active.sum() / count}


@jax.jit
def _active(sources, graph, steps):
  """(queries whose flow is at each vertex after the steps, edges they have gone along)."""

  def body(_, carry):
    flow, edges = carry
    edges = edges + jnp.sum((flow > 0) * graph.degree[:, None], dtype=jnp.float32)
    return (step(flow, graph) > 0).astype(jnp.float32), edges

  flow, edges = jax.lax.fori_loop(0, steps, body, (one_hot(sources, graph.nodes), jnp.float32(0)))
  return jnp.sum(flow, axis=1), edges
