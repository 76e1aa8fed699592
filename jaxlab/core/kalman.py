"""Gaussian Markov chains: filtering and smoothing as one associative scan, or as a loop.

The chain x_1 ~ N(0, Q_1), x_j = A_j x_{j-1} + N(0, Q_j) is seen through terms exp(-x_j' Lam_j x_j / 2 + eta_j' x_j),
one a step (an observation y = H x + N(0, R) is Lam = H' R^-1 H, eta = H' R^-1 y). Nothing inverts Lam or Q: steps
without an observation (Lam = 0), rank-deficient ones and repeated points (Q = 0) are ordinary.

  posterior = kalman.smooth(kalman.Chain(transition, noise), precision, linear)   # depth O(log J)
  posterior.mean, posterior.cov                                                   # of every x_j given everything

References: Kalman 1960; Rauch, Tung & Striebel 1965; Sarkka & Garcia-Fernandez 2021 (the scan).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.core.checks import require, require_choice
from jaxlab.core.recurrence import doubling_scan

PARALLEL = {"assoc": jax.lax.associative_scan, "doubling": doubling_scan}
SCANS = (*PARALLEL, "seq")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
  """A_j and Q_j; `noise[0]` is the prior covariance of x_1 and `transition[0]` must be zero (nothing comes before)."""

  transition: Float[Array, "steps state state"]
  noise: Float[Array, "steps state state"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
  """Moments of x_j given the terms 1..j (filtered) and given all of them."""

  filtered_mean: Float[Array, "steps state"]
  filtered_cov: Float[Array, "steps state state"]
  mean: Float[Array, "steps state"]
  cov: Float[Array, "steps state state"]


def smooth(
  chain: Chain,
  precision: Float[Array, "steps state state"],
  linear: Float[Array, "steps state"],
  *,
  scan: str = "assoc",
) -> Posterior:
  """Filters forward and smooths backward.

  Args:
    precision: Lam_j, symmetric positive semi-definite.
    linear: eta_j.
    scan: "assoc" has depth O(log steps) and about six times the work, for accelerators; "doubling" has half its
      depth, log(steps) / 2 times its work, and compiles in a fraction of the time (`recurrence.doubling_scan`); "seq"
      is the plain loop. In float32 all keep positive covariances with Lam up to 1e6 times the prior precision.

  Raises:
    InputError: another scan, or shapes that disagree.
  """
  require_choice("scan", scan, SCANS)
  steps, state = linear.shape
  for name, array in (("transition", chain.transition), ("noise", chain.noise), ("precision", precision)):
    require(
      array.shape == (steps, state, state),
      f"{name} has shape {array.shape}; linear terms {linear.shape} need (steps, state, state)={(steps, state, state)}",
    )
  # Matrix products on accelerators default to fewer bits than a covariance needs.
  with jax.default_matmul_precision("highest"):
    if scan in PARALLEL:
      mean, cov = _filter_scan(PARALLEL[scan], chain, precision, linear)
      return Posterior(mean, cov, *_smooth_scan(PARALLEL[scan], chain, mean, cov))
    mean, cov = _filter_loop(chain, precision, linear)
    return Posterior(mean, cov, *_smooth_loop(chain, mean, cov))


def predict(
  transition: Float[Array, "*batch state state"],
  noise: Float[Array, "*batch state state"],
  mean: Float[Array, "*batch state"],
  cov: Float[Array, "*batch state state"],
):
  """Moments of A x + N(0, Q) for x ~ N(mean, cov)."""
  return _apply(transition, mean), symmetric(transition @ cov @ _t(transition) + noise)


def backward(
  transition: Float[Array, "*batch state state"],
  noise: Float[Array, "*batch state state"],
  mean: Float[Array, "*batch state"],
  cov: Float[Array, "*batch state state"],
  next_mean: Float[Array, "*batch state"],
  next_cov: Float[Array, "*batch state state"],
):
  """One Rauch-Tung-Striebel step: x ~ N(mean, cov) corrected by the smoothed moments of x' = A x + N(0, Q)."""
  ahead_mean, ahead_cov = predict(transition, noise, mean, cov)
  gain = _t(_solve_positive(ahead_cov, transition @ cov))
  new = mean + _apply(gain, next_mean - ahead_mean)
  return new, symmetric(cov + gain @ (next_cov - ahead_cov) @ _t(gain))


def log_normaliser(
  chain: Chain,
  precision: Float[Array, "steps state state"],
  linear: Float[Array, "steps state"],
  posterior: Posterior,
) -> Float[Array, ""]:
  """log E_prior[ prod_j exp(-x_j' Lam_j x_j / 2 + eta_j' x_j) ], from the filtered moments.

  Step j adds -log|I + P Lam| / 2 + eta' m - m' Lam m / 2 + (eta - Lam m)' P_f (eta - Lam m) / 2 with (m, P) the moments
  before and P_f the covariance after the term; the log marginal likelihood is this plus terms of the data alone.
  """
  mean = jnp.concatenate([jnp.zeros_like(posterior.mean[:1]), posterior.filtered_mean[:-1]])
  cov = jnp.concatenate([jnp.zeros_like(posterior.cov[:1]), posterior.filtered_cov[:-1]])
  mean, cov = predict(chain.transition, chain.noise, mean, cov)
  rest = linear - _apply(precision, mean)
  volume = jnp.linalg.slogdet(jnp.eye(mean.shape[-1], dtype=mean.dtype) + cov @ precision)[1]
  quadratic = jnp.sum((linear + rest) * mean, -1) + jnp.sum(rest * _apply(posterior.filtered_cov, rest), -1)
  return 0.5 * jnp.sum(quadratic - volume)


def symmetric(matrix: Float[Array, "*batch state state"]) -> Float[Array, "*batch state state"]:
  """(M + M') / 2."""
  return 0.5 * (matrix + _t(matrix))


def _filter_scan(scan, chain, precision, linear):
  """Element j is (A, b, C, eta, J): p(x_j | x_{j-1}) ~ N(A x + b, C), likelihood of x_{j-1} in information form."""
  a, q = chain.transition, chain.noise
  state = linear.shape[-1]
  eye = jnp.eye(state, dtype=linear.dtype)
  solved = jnp.linalg.solve(eye + precision @ q, jnp.concatenate([precision, linear[..., None]], -1))
  inverse, s = symmetric(solved[..., :state]), solved[..., state]
  # Joseph's form of Q - Q S Q: of that difference float32 keeps no digit with Lam 1e6 times the prior's precision.
  left = symmetric(jnp.linalg.solve(eye + q @ precision, q))
  keep = eye - left @ precision
  element = (
    keep @ a,
    _apply(q, s),
    symmetric(keep @ q @ _t(keep) + left @ precision @ left),
    _apply(_t(a), s),
    symmetric(_t(a) @ inverse @ a),
  )

  def combine(first, second):
    (a1, b1, c1, eta1, j1), (a2, b2, c2, eta2, j2) = first, second
    right = jnp.concatenate([a1, c1, (b1 + _apply(c1, eta2))[..., None]], -1)
    solved = jnp.linalg.solve(eye + c1 @ j2, right)
    xa, xc, xb = solved[..., :state], solved[..., state : 2 * state], solved[..., 2 * state]
    return (
      a2 @ xa,
      _apply(a2, xb) + b2,
      symmetric(a2 @ xc @ _t(a2)) + c2,
      _apply(_t(xa), eta2 - _apply(j2, b1)) + eta1,
      symmetric(_t(xa) @ j2 @ a1) + j1,
    )

  _, mean, cov, _, _ = scan(combine, element)
  return mean, cov


def _smooth_scan(scan, chain, mean, cov):
  """Element j is (E, g, L): x_j given x_{j+1} is N(E x_{j+1} + g, L)."""
  a, q = chain.transition[1:], chain.noise[1:]
  gain = _t(_solve_positive(symmetric(a @ cov[:-1] @ _t(a) + q), a @ cov[:-1]))
  gain = jnp.concatenate([gain, jnp.zeros_like(cov[:1])])
  step = jnp.concatenate([a, jnp.zeros_like(cov[:1])])
  # Joseph's form of cov - gain @ step @ cov: a sum of positive terms.
  keep = jnp.eye(mean.shape[-1], dtype=mean.dtype) - gain @ step
  noise = jnp.concatenate([q, jnp.zeros_like(cov[:1])])
  rest = symmetric(keep @ cov @ _t(keep) + gain @ noise @ _t(gain))
  element = (gain, mean - _apply(gain, _apply(step, mean)), rest)

  def combine(later, earlier):
    (e2, g2, l2), (e1, g1, l1) = later, earlier
    return e1 @ e2, _apply(e1, g2) + g1, symmetric(e1 @ l2 @ _t(e1)) + l1

  _, mean, cov = scan(combine, element, reverse=True)
  return mean, cov


def _filter_loop(chain, precision, linear):
  eye = jnp.eye(linear.shape[-1], dtype=linear.dtype)

  def step(carry, inputs):
    a, q, lam, eta = inputs
    mean, cov = predict(a, q, *carry)
    new = symmetric(jnp.linalg.solve(eye + cov @ lam, cov))
    mean = mean + new @ (eta - lam @ mean)
    # Joseph's form: a sum of positive terms, so rounding in float32 cannot make the covariance indefinite.
    keep = eye - new @ lam
    new = symmetric(keep @ cov @ keep.T + new @ lam @ new)
    return (mean, new), (mean, new)

  start = (jnp.zeros_like(linear[0]), jnp.zeros_like(precision[0]))
  return jax.lax.scan(step, start, (chain.transition, chain.noise, precision, linear))[1]


def _smooth_loop(chain, mean, cov):
  def step(carry, inputs):
    moments = backward(*inputs, *carry)
    return moments, moments

  last = (mean[-1], cov[-1])
  inputs = (chain.transition[1:], chain.noise[1:], mean[:-1], cov[:-1])
  _, (means, covs) = jax.lax.scan(step, last, inputs, reverse=True)
  return jnp.concatenate([means, last[0][None]]), jnp.concatenate([covs, last[1][None]])


def _solve_positive(matrix, right):
  """Positive definite solve by elimination, a step a row; no pivots are needed.

  Not LAPACK: its batched calls that meet in XLA's CPU pool (interpolations of several chains) wait for each other for
  ever once they hold all its threads (jaxlib 0.10.2), and on a GPU a call costs more than these few elementwise steps.
  """
  size = matrix.shape[-1]
  both = jnp.concatenate([matrix, right], -1)
  for i in range(size):
    row = both[..., i, :] / both[..., i, i, None]
    rest = both - both[..., :, i, None] * row[..., None, :]
    both = jnp.where((jnp.arange(size) == i)[:, None], row[..., None, :], rest)
  return both[..., size:]


def _apply(matrix, vector):
  return jnp.einsum("...ij,...j->...i", matrix, vector)


def _t(matrix):
  return jnp.swapaxes(matrix, -1, -2)
