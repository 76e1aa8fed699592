"""What FunBaT is measured against: alternating least squares, its functional forms, Gaussian processes, a network.

Tensor baselines take `funbat.Data` (indices on grids), the others raw coordinates.

  factors, core = als(data, jax.random.key(0), rank=3, ridge=0.1, sweeps=30)
  y = multilinear(factors, core, index)

All fits are jittable pure functions; ranks, sweeps and steps are static.
"""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlab.core import kalman
from jaxlab.core.checks import require, require_choice
from jaxlab.tensors import funbat, matern

BASES = ("fourier", "polynomial")


def multilinear(factors, core: Float[Array, "M"] | None, index: Int[Array, "N K"]) -> Float[Array, "N"]:
  """sum of core * (u^1 x ... x u^K) at the indices; core None is the CP model."""
  rows = [u[index[:, k]] for k, u in enumerate(factors)]
  return math.prod(rows[1:], start=rows[0]).sum(-1) if core is None else funbat.kron(rows, len(index)) @ core


def als(
  data: funbat.Data, key: jax.Array, *, rank: int, ridge: float, sweeps: int, model: str = "tucker"
) -> tuple[tuple[Float[Array, "J R"], ...], Float[Array, "M"] | None]:
  """P-Tucker / CP-ALS on the observed entries: rows (sum aa' + ridge I)^-1 sum a y, then the core.

  Rows without an observation are 0.

  Raises:
    InputError: another model, or ridge <= 0.
  """
  bases = [jnp.eye(len(grid), dtype=data.y.dtype) for grid in data.grids]
  return basis_als(data, bases, key, rank=rank, ridge=ridge, sweeps=sweeps, model=model, rowwise=True)


def basis_als(
  data: funbat.Data, bases, key: jax.Array, *, rank: int, ridge: float, sweeps: int, model="tucker", rowwise=False
):
  """ALS with U^k = B_k C_k: factors that are combinations of given functions of the coordinate (FTT-ALS style).

  Args:
    bases: B_k (J_k, P_k) on the grids, see `basis`.
    rowwise: the bases are identities and the normal equations fall apart into rows.

  Returns:
    ((U^1, ..., U^K) on the grids, core or None for "cp").
  """
  require_choice("model", model, funbat.MODELS)
  require(isinstance(ridge, jax.Array) or ridge > 0, f"ridge is {ridge}; rows without an observation need it positive")
  modes, size, dtype = len(bases), len(data.y), data.y.dtype
  keys = jax.random.split(key, modes + 1)
  factors = tuple(
    b @ (jax.random.uniform(k, (b.shape[1], rank), dtype) / (1 if rowwise else b.shape[1] ** 0.5))
    for b, k in zip(bases, keys, strict=False)
  )
  core = None
  if model == "tucker":
    core = funbat.superdiagonal([rank] * modes, dtype)
    core += 0.1 * jax.random.normal(keys[-1], core.shape, dtype)

  def others(factors, core, k):
    rows = [u[data.index[:, j]] for j, u in enumerate(factors) if j != k]
    if core is None:
      return math.prod(rows[1:], start=rows[0])
    return funbat.kron(rows, size) @ jnp.moveaxis(core.reshape([rank] * modes), k, 0).reshape(rank, -1).T

  def sweep(_, carry):
    factors, core = carry
    for k, b in enumerate(bases):
      a, column = others(factors, core, k), data.index[:, k]
      if rowwise:
        gather = functools.partial(jax.ops.segment_sum, segment_ids=column, num_segments=len(b))
        gram = gather(a[:, :, None] * a[:, None, :]) + ridge * jnp.eye(rank, dtype=dtype)
        u = jnp.linalg.solve(gram, gather(data.y[:, None] * a)[..., None])[..., 0]
      else:
        u = b @ _ridge(funbat.kron([b[column], a], size), data.y, ridge).reshape(-1, rank)
      factors = (*factors[:k], u, *factors[k + 1 :])
    if core is not None:
      core = _ridge(funbat.kron([u[data.index[:, k]] for k, u in enumerate(factors)], size), data.y, ridge)
    return factors, core

  with jax.default_matmul_precision("highest"):
    return jax.lax.fori_loop(0, sweeps, sweep, (factors, core))


def basis(grid: Float[Array, "J"], *, kind: str, size: int) -> Float[Array, "J P"]:
  """Chebyshev polynomials, or cosines cos(pi p x) (Fourier basis of the even extension); x is the grid in [0, 1]."""
  require_choice("basis", kind, BASES)
  x = (grid - grid[0]) / jnp.maximum(grid[-1] - grid[0], jnp.finfo(grid.dtype).tiny)
  order = jnp.arange(size)
  return jnp.cos(order * (jnp.arccos(jnp.clip(2 * x - 1, -1, 1)) if kind == "polynomial" else jnp.pi * x)[:, None])


def smoothed_factors(
  data: funbat.Data, factors, core, *, kernel: str, lengthscale: float, variance: float, scan: str = "seq"
) -> tuple[Float[Array, "J R"], ...]:
  """Gaussian process regression on the factors of a finished ALS, each mode apart: no uncertainty flows between modes.

  The row u_j is seen with precision sum a a' / s^2, s^2 the training residual: the ALS likelihood of that row alone.
  """
  rank, size, out = factors[0].shape[1], len(data.y), []
  noise = jnp.mean((data.y - multilinear(factors, core, data.index)) ** 2)
  rows = [u[data.index[:, k]] for k, u in enumerate(factors)]
  for k, u in enumerate(factors):
    others = [r for j, r in enumerate(rows) if j != k]
    if core is None:
      a = math.prod(others[1:], start=others[0])
    else:
      a = funbat.kron(others, size) @ jnp.moveaxis(core.reshape([rank] * len(rows)), k, 0).reshape(rank, -1).T
    gram = jax.ops.segment_sum(a[:, :, None] * a[:, None, :], data.index[:, k], num_segments=len(u)) / noise
    linear = jnp.einsum("jrs,js->jr", gram, u)
    prior = matern.chain(data.grids[k], kernel=kernel, lengthscale=lengthscale, variance=variance, rank=rank)
    pad = prior.noise.shape[-1] - rank
    gram, linear = jnp.pad(gram, ((0, 0), (0, pad), (0, pad))), jnp.pad(linear, ((0, 0), (0, pad)))
    out.append(kalman.smooth(prior, gram, linear, scan=scan).mean[:, :rank])
  return tuple(out)


def gp(
  x: Float[Array, "N K"], y: Float[Array, "N"], new: Float[Array, "T K"], key: jax.Array, rate=0.1, *, points, steps
) -> dict:
  """Exact GP regression, ARD Matern-3/2: hyperparameters by Adam on the evidence of `points` observations, then all N.

  Returns:
    {"mean", "variance" of new observations, each (T,), "unsettled": by how much the evidence of an observation still
    rose in the last fifth of the steps}. Memory N^2.
  """
  chosen = jax.random.permutation(key, len(y))[: min(points, len(y))]
  zero = jnp.zeros((), y.dtype)
  start = {"scale": jnp.log(0.3 * jnp.std(x, 0)), "signal": zero, "noise": zero - 1}

  def loss(p):
    factor, weights = _cholesky(p, x[chosen], y[chosen])
    return (0.5 * y[chosen] @ weights + jnp.sum(jnp.log(jnp.diag(factor)))) / len(chosen)

  early = _adam(loss, start, rate=rate, steps=steps - steps // 5)
  p = _adam(loss, early, rate=rate, steps=steps // 5)
  factor, weights = _cholesky(p, x, y)
  cross = _matern32(p, new, x)
  half = jax.scipy.linalg.solve_triangular(factor, cross.T, lower=True)
  variance = jnp.exp(p["signal"]) - jnp.sum(half**2, 0) + jnp.exp(2 * p["noise"])
  return {"mean": cross @ weights, "gp_variance": variance, "unsettled": loss(early) - loss(p)}


def sparse_gp(
  x: Float[Array, "N K"] | Int[Array, "N K"],
  y: Float[Array, "N"],
  new: Float[Array, "T K"] | Int[Array, "T K"],
  key: jax.Array,
  rate: float = 0.03,
  *,
  inducing: int,
  steps: int,
  levels: tuple[int, ...] | None = None,
  embedding: int = 3,
) -> dict:
  """Sparse GP by the collapsed bound (Titsias 2009), Adam on inducing inputs and hyperparameters; {"mean" (T,)}.

  With `levels` the inputs are indices and the GP sees a learned embedding of each mode's, side by side: GPTF.
  """
  keys = jax.random.split(key, 3)
  start = {"signal": jnp.zeros((), y.dtype), "noise": jnp.full((), -1.0, y.dtype)}
  if levels is None:
    features = lambda p, at: at
    start["scale"] = jnp.log(0.3 * jnp.std(x, 0))
  else:
    features = lambda p, at: jnp.concatenate([table[at[:, k]] for k, table in enumerate(p["tables"])], 1)
    start["tables"] = [
      0.5 * jax.random.normal(k, (n, embedding), y.dtype)
      for k, n in zip(jax.random.split(keys[0], len(levels)), levels, strict=True)
    ]
    start["scale"] = jnp.zeros(embedding * len(levels), y.dtype)
  start["inducing"] = features(start, x)[jax.random.permutation(keys[1], len(y))[:inducing]]

  def parts(p):
    z, noise = p["inducing"], jnp.exp(2 * p["noise"])
    kzz = _matern32(p, z, z) + 1e-4 * jnp.exp(p["signal"]) * jnp.eye(len(z), dtype=y.dtype)
    root = jnp.linalg.cholesky(kzz)
    a = jax.scipy.linalg.solve_triangular(root, _matern32(p, z, features(p, x)), lower=True) / jnp.sqrt(noise)
    b = jnp.linalg.cholesky(jnp.eye(len(z), dtype=y.dtype) + a @ a.T)
    c = jax.scipy.linalg.solve_triangular(b, a @ y, lower=True) / jnp.sqrt(noise)
    return root, a, b, c, noise

  def loss(p):
    _, a, b, c, noise = parts(p)
    slack = len(y) * jnp.exp(p["signal"]) / noise - jnp.sum(a**2)
    bound = -0.5 * len(y) * jnp.log(noise) - jnp.sum(jnp.log(jnp.diag(b))) - 0.5 * (y @ y / noise - c @ c + slack)
    penalty = 0.0 if levels is None else 0.5 * sum(jnp.sum(table**2) for table in p["tables"])
    return (penalty - bound) / len(y)

  p = _adam(loss, start, rate=rate, steps=steps)
  root, _, b, c, _ = parts(p)
  half = jax.scipy.linalg.solve_triangular(root, _matern32(p, p["inducing"], features(p, new)), lower=True)
  return {"mean": jax.scipy.linalg.solve_triangular(b, half, lower=True).T @ c}


def mlp(x, y, new, key: jax.Array, rate: float = 1e-3, *, steps: int, batch: int = 256, width: int = 64) -> dict:
  """A network of two tanh layers on the standardised coordinates, Adam; {"mean" (T,)}."""
  sizes = (x.shape[1], width, width, 1)
  keys = jax.random.split(key, len(sizes))
  params = [
    (jax.random.normal(k, (m, n), y.dtype) / math.sqrt(m), jnp.zeros(n, y.dtype))
    for k, m, n in zip(keys[1:], sizes[:-1], sizes[1:], strict=True)
  ]
  mean, scale = x.mean(0), jnp.std(x, 0)

  def apply(params, x):
    h = (x - mean) / scale
    for w, b in params[:-1]:
      h = jnp.tanh(h @ w + b)
    return (h @ params[-1][0] + params[-1][1])[:, 0]

  def loss(params, key):
    at = jax.random.randint(key, (batch,), 0, len(y))
    return jnp.mean((apply(params, x[at]) - y[at]) ** 2)

  return {"mean": apply(_adam(loss, params, rate=rate, steps=steps, key=keys[0]), new)}


def _ridge(design, y, ridge):
  gram = design.T @ design + ridge * jnp.eye(design.shape[1], dtype=y.dtype)
  return jnp.linalg.solve(gram, design.T @ y)


def _matern32(p, a, b):
  """exp(signal) (1 + r) exp(-r), r = sqrt(3) times the distance in lengthscales."""
  a, b = a / jnp.exp(p["scale"]), b / jnp.exp(p["scale"])
  # Differences, not |a|^2 + |b|^2 - 2 a'b: with short lengthscales that cancels, and float32 loses the kernel's rank.
  square = sum((a[:, k, None] - b[None, :, k]) ** 2 for k in range(a.shape[1]))
  # The slope of sqrt at 0 is infinite; the kernel's there is 0.
  r = math.sqrt(3) * jnp.sqrt(jnp.maximum(square, 1e-10))
  return jnp.exp(p["signal"]) * (1 + r) * jnp.exp(-r)


def _cholesky(p, x, y):
  """Factor of K + noise I, and (K + noise I)^-1 y."""
  noise = jnp.exp(2 * p["noise"]) + 1e-3
  factor = jnp.linalg.cholesky(_matern32(p, x, x) + noise * jnp.eye(len(y), dtype=y.dtype))
  return factor, jax.scipy.linalg.cho_solve((factor, True), y)


def _adam(loss, params, *, rate, steps: int, key: jax.Array | None = None):
  """Adam for `steps` steps; with a key the loss takes (params, key of the step).

  Where a step ends at a loss that is no number (a kernel that float32 cannot factorise), the last parameters before it
  are kept, and returned if no other step leads on.
  """
  optimizer = optax.adam(rate)

  def step(carry, i):
    params, state, good = carry
    arguments = () if key is None else (jax.random.fold_in(key, i),)
    value, grads = jax.value_and_grad(loss)(params, *arguments)
    finite = jnp.isfinite(value) & jnp.all(jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]))
    updates, moved = optimizer.update(grads, state)
    pick = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return (pick(optax.apply_updates(params, updates), good), pick(moved, state), pick(params, good)), None

  start = params, optimizer.init(params), params
  last, _, good = jax.lax.scan(step, start, jnp.arange(steps))[0]
  arguments = () if key is None else (jax.random.fold_in(key, steps),)
  return jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(loss(last, *arguments)), a, b), last, good)
