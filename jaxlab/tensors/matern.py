"""Matern Gaussian processes as Markov chains: k(d) = s2 exp(-d / l) and s2 (1 + lam d) exp(-lam d), lam = sqrt(3) / l.

State (values) for nu = 1/2, (values, derivatives) for nu = 3/2, R independent components side by side: every matrix is
kron(small block, I_R). P is the stationary covariance, A(dt) the transition, Q(dt) = P - A P A'.

  posterior = kalman.smooth(matern.chain(times, kernel="matern32", lengthscale=0.2, variance=1.0, rank=1), lam, eta)
  mean, cov = matern.interpolate(times, posterior, new_times, kernel="matern32", lengthscale=0.2, variance=1.0, rank=1)

Reference: Hartikainen & Sarkka 2010. Closed forms; no matrix exponential.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.core import kalman
from jaxlab.core.checks import require_choice

KERNELS = ("matern12", "matern32", "white")
RULES = ("markov", "merge")


def order(kernel: str) -> int:
  """State entries per component."""
  return 2 if kernel == "matern32" else 1


def stationary(*, kernel: str, lengthscale: float, variance: float, rank: int, dtype) -> Float[Array, "D D"]:
  """P = diag(s2), or diag(s2, lam^2 s2) for nu = 3/2, times I_R."""
  block = [variance] if kernel != "matern32" else [variance, 3 * variance / lengthscale**2]
  return jnp.kron(jnp.diag(jnp.asarray(block, dtype)), jnp.eye(rank, dtype=dtype))


def steps(dt: Float[Array, "*batch"], *, kernel: str, lengthscale: float, variance: float, rank: int):
  """A(dt) and Q(dt), each (*batch, D, D).

  Q for nu = 3/2, with x = lam dt: s2 [[p, 2 lam x^2 e], [., lam^2 (p + 4 x e)]], e = exp(-2x) and
  p = 1 - e (1 + 2x + 2x^2), which loses all digits at small x and is summed as a series there.

  Raises:
    InputError: another kernel.
  """
  require_choice("kernel", kernel, KERNELS)
  if kernel == "white":
    a, q = jnp.zeros_like(dt)[..., None, None], jnp.full_like(dt, variance)[..., None, None]
  elif kernel == "matern12":
    x = dt / lengthscale
    a, q = jnp.exp(-x)[..., None, None], -variance * jnp.expm1(-2 * x)[..., None, None]
  else:
    lam = math.sqrt(3) / lengthscale
    x = lam * dt
    e = jnp.exp(-2 * x)
    stack = lambda rows: jnp.stack([jnp.stack(row, -1) for row in rows], -2)
    a = jnp.exp(-x)[..., None, None] * stack([[1 + x, dt], [-lam * x, 1 - x]])
    p, cross = _third_tail(2 * x), 2 * lam * x**2 * e
    q = variance * stack([[p, cross], [cross, lam**2 * (p + 4 * x * e)]])
  eye = jnp.eye(rank, dtype=dt.dtype)
  wide = lambda block: jnp.einsum("...ij,ab->...iajb", block, eye).reshape(*dt.shape, *[block.shape[-1] * rank] * 2)
  return wide(a), wide(q)


def chain(times: Float[Array, "J"], **kernel) -> kalman.Chain:
  """The prior of the values at increasing times; the options are those of `steps`."""
  a, q = steps(jnp.diff(times), **kernel)
  start = stationary(dtype=times.dtype, **kernel)[None]
  return kalman.Chain(jnp.concatenate([jnp.zeros_like(start), a]), jnp.concatenate([start, q]))


def interpolate(
  times: Float[Array, "J"], posterior: kalman.Posterior, points: Float[Array, "T"], *, rule: str = "markov", **kernel
):
  """Posterior mean (T, D) and covariance (T, D, D) of the state at any points.

  Between t_i <= t < t_{i+1} the filtered state of t_i is predicted to t and corrected by the smoothed one of t_{i+1}
  (one RTS step); beyond t_J the smoothed state is predicted; before t_1 it is one RTS step from the stationary prior.

  Args:
    rule: "markov", or "merge": smoothed neighbours joined as if independent, with precision Q1^-1 + A2' Q2^-1 A2 and
      linear term Q1^-1 A1 m_i + Q2^-1 m_{i+1}, and A^-1 before t_1. It double counts the data; kept to measure that.

  Raises:
    InputError: another kernel or rule.
  """
  require_choice("rule", rule, RULES)
  last = len(times) - 1
  before = jnp.searchsorted(times, points, side="right") - 1
  i, j = jnp.clip(before, 0, last), jnp.clip(before + 1, 0, last)
  since, until = jnp.maximum(points - times[i], 0), jnp.maximum(times[j] - points, 0)
  (a1, q1), (a2, q2) = steps(since, **kernel), steps(until, **kernel)
  p = jnp.broadcast_to(stationary(dtype=times.dtype, **kernel), q1.shape)
  smoothed = lambda at: (posterior.mean[at], posterior.cov[at])

  right = kalman.predict(a1, q1, *smoothed(i))
  # A white chain's A is 0 even at dt = 0: on the grid the state is the smoothed one whatever the kernel.
  on_grid = since == 0
  # At a grid point Q(until) may be the whole step, at the clipped ends it is 0 and unused: keep the solve regular.
  inner = kalman.predict(a1, q1, posterior.filtered_mean[i], posterior.filtered_cov[i])
  regular = jnp.where((before < 0)[:, None, None] | (before >= last)[:, None, None], p, q2)
  if rule == "markov":
    between = kalman.backward(a2, regular, *inner, *smoothed(j))
    q = jnp.where((before < 0)[:, None, None], q2, p)
    left = kalman.backward(a2, q, jnp.zeros_like(inner[0]), p, *smoothed(jnp.zeros_like(i)))
  else:
    safe = jnp.where((on_grid | (before < 0))[:, None, None], p, q1)
    w1, w2 = jnp.linalg.inv(safe), jnp.linalg.inv(regular)
    cov = jnp.linalg.inv(w1 + jnp.swapaxes(a2, -1, -2) @ w2 @ a2)
    apply = lambda m, v: jnp.einsum("...ij,...j->...i", m, v)
    linear = apply(w1 @ a1, posterior.mean[i]) + apply(w2, posterior.mean[j])
    between = apply(cov, linear), kalman.symmetric(cov)
    inverse = jnp.linalg.inv(jnp.where((before < 0)[:, None, None], a2, jnp.eye(a2.shape[-1], dtype=a2.dtype)))
    left = apply(inverse, posterior.mean[jnp.zeros_like(i)]), p

  def choose(on, inside, beyond, ahead):
    shape = (-1,) + (1,) * (on.ndim - 1)
    where = lambda mask, x, y: jnp.where(mask.reshape(shape), x, y)
    return where(before < 0, ahead, where(on_grid, on, where(before >= last, beyond, inside)))

  return tuple(choose(*parts) for parts in zip(smoothed(i), between, right, left, strict=True))


def _third_tail(y):
  """1 - exp(-y) (1 + y + y^2 / 2) = exp(-y) sum_{k >= 3} y^k / k!, to full relative precision."""
  series, term = jnp.zeros_like(y), jnp.minimum(y, 1.0) ** 3 / 6
  for k in range(4, 20):
    series, term = series + term, term * jnp.minimum(y, 1.0) / k
  return jnp.where(y < 1, jnp.exp(-y) * series, 1 - jnp.exp(-y) * (1 + y + y**2 / 2))
