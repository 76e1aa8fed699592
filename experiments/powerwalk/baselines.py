"""What PowerWalk is compared with: power iteration in scipy, end-point Monte Carlo, forward push, FORA.

reserve, residual, pushes = baselines.forward_push(sources, graph, r_max=1e-5)
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.graphs.fingerprints import RESET, WalkGraph, walks
from jaxlab.graphs.powerwalk import one_hot, step


def transition(graph: WalkGraph) -> scipy.sparse.csr_array:
  """P in scipy."""
  degree = np.asarray(graph.degree)
  shape = (graph.nodes, graph.nodes)
  return scipy.sparse.csr_array(
    (np.repeat(1 / degree, degree), np.asarray(graph.targets), np.asarray(graph.offsets)), shape=shape
  )


def scipy_power(
  sources: Int[np.ndarray, "queries"], transposed: scipy.sparse.csr_array, *, iterations: int, reset: float = RESET
) -> Float[np.ndarray, "nodes queries"]:
  """`powerwalk.exact` of a batch with scipy's sparse product; `transposed` is P^T as CSR, in the wished precision."""
  scaled = transposed * transposed.dtype.type(1 - reset)
  columns = np.arange(len(sources))
  p = np.zeros((transposed.shape[0], len(sources)), transposed.dtype)
  p[sources, columns] = 1
  for _ in range(iterations):
    p = scaled @ p
    p[sources, columns] += reset
  return p


@functools.partial(jax.jit, static_argnames=("per_source", "length", "reset"))
def end_point(
  key: jax.Array, graph: WalkGraph, sources: Int[Array, "queries"], *, per_source: int, length: int = 64, reset=RESET
) -> Float[Array, "nodes queries"]:
  """Share of walks from each source that stop at each vertex: variance p (1 - p) / R."""
  column = jnp.repeat(jnp.arange(len(sources)), per_source)
  position, _ = walks(key, graph, sources[column], length=length, reset=reset)
  return jnp.zeros((graph.nodes, len(sources))).at[position[-1], column].add(1 / per_source)


@functools.partial(jax.jit, static_argnames=("reset", "sweeps"))
def forward_push(
  sources: Int[Array, "queries"], graph: WalkGraph, *, r_max: float, reset: float = RESET, sweeps: int = 1000
) -> tuple[Float[Array, "nodes queries"], Float[Array, "nodes queries"], Float[Array, "queries"]]:
  """Andersen, Chung and Lang by synchronous sweeps: every vertex with residual >= r_max d pushes at once.

  Returns:
    (reserve, residual, edges traversed by query); p_u = reserve + sum_v residual(v) p_v throughout.
  """

  def large(residual):
    return residual >= r_max * graph.degree[:, None]

  def body(carry):
    reserve, residual, edges, sweep = carry
    pushed = jnp.where(large(residual), residual, 0)
    edges = edges + jnp.sum(large(residual) * graph.degree[:, None], axis=0)
    return reserve + reset * pushed, residual - pushed + (1 - reset) * step(pushed, graph), edges, sweep + 1

  start = one_hot(sources, graph.nodes)
  carry = jnp.zeros_like(start), start, jnp.zeros(len(sources)), 0
  return jax.lax.while_loop(lambda c: large(c[1]).any() & (c[3] < sweeps), body, carry)[:3]


def fora(
  key: jax.Array,
  graph: WalkGraph,
  sources: Int[Array, "queries"],
  *,
  r_max: float,
  eps: float = 0.5,
  delta: float | None = None,
  p_fail: float | None = None,
  length: int = 64,
  reset: float = RESET,
) -> Float[Array, "nodes queries"]:
  """FORA (Wang et al. 2017): forward push, then walks from what is left; unbiased.

  |r|_1 omega walks for a query, omega = (2 eps / 3 + 2) ln(2 / p_f) / (eps^2 delta), start in proportion to the
  residual by systematic sampling, each of weight |r|_1 / walks (the published code takes ceil(r(v) omega) from every v;
  the largest query of the batch sets the number here). delta and p_f default to 1 / |V|.

  Raises:
    InputError: eps or delta not positive.
  """
  delta, p_fail = delta or 1 / graph.nodes, p_fail or 1 / graph.nodes
  require(eps > 0 and delta > 0, f"eps={eps}, delta={delta} must be positive")
  reserve, residual, _ = forward_push(sources, graph, r_max=r_max, reset=reset)
  omega = (2 * eps / 3 + 2) * math.log(2 / p_fail) / (eps**2 * delta)
  count = max(math.ceil(float(residual.sum(axis=0).max()) * omega), 1)
  return _finish(key, graph, reserve, residual, count=count, length=length, reset=reset)


@functools.partial(jax.jit, static_argnames=("count", "length", "reset"))
def _finish(key, graph, reserve, residual, *, count, length, reset):
  shift, path = jax.random.split(key)
  queries = residual.shape[1]
  cumulative = jnp.cumsum(residual, axis=0)
  total = cumulative[-1]
  grid = (jnp.arange(count)[None] + jax.random.uniform(shift, (queries, 1))) / count * total[:, None]
  origins = jax.vmap(lambda c, g: jnp.searchsorted(c, g, side="right"))(cumulative.T, grid)
  origins = jnp.minimum(origins, graph.nodes - 1).reshape(-1)
  position, _ = walks(path, graph, origins, length=length, reset=reset)
  column = jnp.repeat(jnp.arange(queries), count)
  return reserve.at[position[-1], column].add((total / count)[column])
