import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxlab.core import kalman
from jaxlab.core.checks import InputError

STEPS, STATE = 11, 3
smooth = jax.jit(kalman.smooth, static_argnames="scan")


def problem(seed, *, empty=()):
  """A random chain and random terms; steps in `empty` see nothing, every third has a rank-one Lam."""
  rng = np.random.default_rng(seed)
  root = rng.normal(size=(STEPS, STATE, STATE))
  a = 0.6 * rng.normal(size=(STEPS, STATE, STATE))
  a[0] = 0
  seen = rng.normal(size=(STEPS, STATE, STATE))
  seen[::3, :, 1:] = 0
  seen[list(empty)] = 0
  linear = np.einsum("sij,sj->si", seen, rng.normal(size=(STEPS, STATE)))
  chain = kalman.Chain(jnp.asarray(a), jnp.asarray(root @ root.swapaxes(1, 2)))
  return chain, jnp.asarray(seen @ seen.swapaxes(1, 2)), jnp.asarray(linear)


def dense(chain, precision, linear):
  """The joint Gaussian of all states, by inverting its (steps state)^2 precision."""
  a, q = np.asarray(chain.transition), np.asarray(chain.noise)
  lower = np.eye(STEPS * STATE)
  block = lambda j: slice(j * STATE, (j + 1) * STATE)
  noise = np.zeros_like(lower)
  for j in range(STEPS):
    noise[block(j), block(j)] = q[j]
    if j:
      lower[block(j), block(j - 1)] = -a[j]
  prior = np.linalg.inv(lower) @ noise @ np.linalg.inv(lower).T
  seen = np.zeros_like(lower)
  for j in range(STEPS):
    seen[block(j), block(j)] = precision[j]
  eta = np.asarray(linear).reshape(-1)
  cov = np.linalg.inv(np.linalg.inv(prior) + seen)
  log_z = 0.5 * eta @ cov @ eta - 0.5 * np.linalg.slogdet(np.eye(len(seen)) + prior @ seen)[1]
  return cov @ eta, cov, log_z


@given(seed=st.integers(0, 10**6), scan=st.sampled_from(kalman.SCANS), empty=st.sets(st.integers(0, STEPS - 1)))
def test_the_smoother_is_the_marginal_of_the_joint_gaussian(seed, scan, empty):
  with jax.enable_x64(True):
    chain, precision, linear = problem(seed, empty=empty)
    got = smooth(chain, precision, linear, scan=scan)
    mean, cov, log_z = dense(chain, precision, linear)
    scale = np.abs(cov).max() + np.abs(mean).max()
    np.testing.assert_allclose(got.mean.reshape(-1), mean, atol=1e-9 * scale)
    for j in range(STEPS):
      block = slice(j * STATE, (j + 1) * STATE)
      np.testing.assert_allclose(got.cov[j], cov[block, block], atol=1e-9 * scale)
    np.testing.assert_allclose(got.filtered_mean[-1], got.mean[-1])
    np.testing.assert_allclose(kalman.log_normaliser(chain, precision, linear, got), log_z, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 37])
def test_the_scan_is_the_loop_to_rounding(steps):
  with jax.enable_x64(True):
    chain, precision, linear = problem(1)
    tile = lambda x: jnp.concatenate([x] + [x[1:]] * (steps // STEPS + 1))[:steps]
    chain = jax.tree.map(tile, chain)
    run = lambda scan: smooth(chain, tile(precision), tile(linear), scan=scan)
    for scan in kalman.PARALLEL:
      for a, b in zip(jax.tree.leaves(run(scan)), jax.tree.leaves(run("seq")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


def test_singular_noise_and_repeated_points_are_ordinary():
  """Q = 0 and A = I: two terms on one point are one term with the sum."""
  with jax.enable_x64(True):
    chain, precision, linear = problem(2)
    twice = kalman.Chain(chain.transition.at[4].set(jnp.eye(STATE)), chain.noise.at[4].set(0.0))
    once = jax.tree.map(lambda x: jnp.delete(x, 4, axis=0), twice)
    merged = (
      jnp.delete(precision.at[3].add(precision[4]), 4, axis=0),
      jnp.delete(linear.at[3].add(linear[4]), 4, axis=0),
    )
    for scan in kalman.SCANS:
      a, b = smooth(twice, precision, linear, scan=scan), smooth(once, *merged, scan=scan)
      np.testing.assert_allclose(np.delete(a.cov, 3, axis=0), b.cov, atol=1e-9)
      np.testing.assert_allclose(a.mean[3], a.mean[4], atol=1e-9)


@pytest.mark.parametrize("scan", kalman.SCANS)
def test_gradients_match_finite_differences(scan):
  with jax.enable_x64(True):
    chain, precision, linear = jax.tree.map(lambda x: x[:4], problem(3))
    value = lambda q, eta: jnp.sum(
      jnp.sin(kalman.smooth(kalman.Chain(chain.transition, q), precision, eta, scan=scan).mean)
    )
    check_grads(jax.jit(value), (chain.noise, linear), order=1, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scan", kalman.SCANS)
def test_float32_covariances_stay_positive_with_terms_far_sharper_than_the_prior(scan):
  """Lam 1e6 times the prior's: no covariance may be a difference of nearly equal matrices, in no scan."""
  chain, precision, linear = jax.tree.map(lambda x: x.astype(jnp.float32), problem(4))
  cov = smooth(chain, 1e6 * precision, linear, scan=scan).filtered_cov
  assert float(jnp.linalg.eigvalsh(cov).min()) > 0
  # Without transitions every step is alone, and its covariance is (Q^-1 + Lam)^-1.
  eye = jnp.eye(STATE)
  apart = kalman.Chain(0 * chain.transition, jnp.broadcast_to(5 * eye, chain.noise.shape))
  sharp = 1e6 * (0.01 * eye + precision)
  np.testing.assert_allclose(
    smooth(apart, sharp, linear, scan=scan).cov @ (eye / 5 + sharp), jnp.broadcast_to(eye, chain.noise.shape), atol=0.02
  )


def test_impossible_requests_are_named():
  chain, precision, linear = problem(0)
  with pytest.raises(InputError, match="scan is 'magic'"):
    kalman.smooth(chain, precision, linear, scan="magic")
  with pytest.raises(InputError, match=r"precision has shape \(10, 3, 3\)"):
    kalman.smooth(chain, precision[1:], linear)
