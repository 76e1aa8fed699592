import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import newton
from jaxlab.core.checks import InputError
from jaxlab.core.recurrence import linear_recurrence

N, S, D = 5, 2, 4
KEYS = jax.random.split(jax.random.key(0), 4)


def make_surrogates():
  streams = jax.random.uniform(KEYS[3], (N, S, S))
  return {
    "jacobi": newton.jacobi,
    "identity": newton.identity,
    "damped": newton.scaled(0.7),
    "scaled": newton.scaled(jnp.linspace(1.1, 0.9, N)),
    "diagonal": newton.diagonal(KEYS[2], probes=2, clip=2.0),
    "streams": newton.streams(streams / streams.sum(-2, keepdims=True)),
    "exact": newton.exact,
  }


@pytest.fixture(params=["float32", "float64"])
def chain(request):
  """A chain of n random residual MLPs on (streams, width) states, and its sequential trace."""
  with jax.enable_x64(request.param == "float64"):
    w = jax.random.normal(KEYS[0], (N, D, D), request.param)
    z0 = jax.random.normal(KEYS[1], (S, D), request.param)
    blocks = jax.vmap(lambda w, z: z + jnp.tanh(z @ w), in_axes=(0, 0))
    trace = [z0]
    for j in range(N):
      trace.append(trace[-1] + jnp.tanh(trace[-1] @ w[j]))
    yield (lambda z: blocks(w, z)), jnp.stack(trace), (1e-5 if request.param == "float32" else 1e-12)


@pytest.mark.parametrize("name", make_surrogates())
@pytest.mark.parametrize("iterations", [1, 3, N])
def test_the_first_k_outputs_are_exact_after_k_iterations(chain, name, iterations):
  blocks, expected, tolerance = chain
  start = jnp.concatenate([expected[:1], jax.random.normal(KEYS[2], expected[1:].shape, expected.dtype)])
  actual = newton.solve(blocks, start, iterations=iterations, surrogate=make_surrogates()[name])
  k = iterations
  np.testing.assert_allclose(actual.trace[: k + 1], expected[: k + 1], rtol=tolerance * 10, atol=tolerance * 10)
  assert actual.residuals.shape == (k,) and int(actual.iterations) == k


def test_identity_is_the_cumulative_sum_of_branches_on_the_old_trace(chain):
  """z_{j+1} = z_0 + sum_{i<=j} (f_i(z_i) - z_i)."""
  blocks, trace, tolerance = chain
  start = jnp.concatenate([trace[:1], jax.random.normal(KEYS[3], trace[1:].shape, trace.dtype)])
  expected = start[0] + jnp.cumsum(blocks(start[:-1]) - start[:-1], axis=0)
  actual = newton.solve(blocks, start, iterations=1, surrogate=newton.identity).trace[1:]
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * 10)


def test_damping_spans_jacobi_to_identity(chain):
  blocks, trace, tolerance = chain
  start = jnp.broadcast_to(trace[:1], trace.shape)
  run = lambda s: newton.solve(blocks, start, iterations=2, surrogate=s).trace
  np.testing.assert_allclose(run(newton.scaled(0.0)), run(newton.jacobi), rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(
    run(newton.scaled(jnp.ones(N))), run(newton.identity), rtol=tolerance * 10, atol=tolerance * 10
  )


def test_matching_surrogates_solve_affine_chains_in_one_step():
  """f(z) = z + b: identity. f(X) = A X + b on streams: streams. Any affine chain: exact Newton."""
  b = jax.random.normal(KEYS[0], (N, S, D))
  a = jax.random.normal(KEYS[1], (N, S, S))
  z0 = jax.random.normal(KEYS[2], (S, D))
  cases = [
    (lambda z: z + b, [newton.identity, newton.exact, newton.diagonal(KEYS[3])]),
    (lambda z: a @ z + b, [newton.streams(a), newton.streams(lambda z: a), newton.exact]),
  ]
  for blocks, surrogates in cases:
    start = jnp.broadcast_to(z0, (N + 1, S, D))
    expected = newton.solve(blocks, start, iterations=N, surrogate=newton.jacobi).trace
    for surrogate in surrogates:
      actual = newton.solve(blocks, start, iterations=1, surrogate=surrogate).trace
      np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_exact_newton_converges_quadratically():
  with jax.enable_x64(True):
    w = jax.random.normal(KEYS[0], (12, D, D), "float64") * 0.3
    blocks = lambda z: z + jnp.tanh(jnp.einsum("nsd,nde->nse", z, w))
    start = jnp.broadcast_to(jax.random.normal(KEYS[1], (S, D), "float64"), (13, S, D))
    truth = newton.solve(blocks, start, iterations=12, surrogate=newton.jacobi).trace
    error = [
      float(jnp.linalg.norm(newton.solve(blocks, start, iterations=k, surrogate=newton.exact).trace - truth))
      for k in (1, 2, 3)
    ]
  assert error[1] < 5 * error[0] ** 2 and error[2] < 5 * error[1] ** 2 + 1e-13
  assert error[2] < 1e-3 * error[0]


def test_the_tolerance_stops_early_and_reports_it(chain):
  blocks, expected, _ = chain
  start = jnp.broadcast_to(expected[:1], expected.shape)
  solution = newton.solve(blocks, start, iterations=50, surrogate=newton.exact, tolerance=1e-4)
  k = int(solution.iterations)
  assert 1 <= k <= N + 1
  assert np.all(np.isfinite(solution.residuals[:k])) and np.all(np.isnan(solution.residuals[k:]))
  np.testing.assert_allclose(solution.trace, expected, rtol=1e-3, atol=1e-3)


def test_hutchinson_estimates_the_diagonal():
  """With a diagonal Jacobian one probe is exact; the correction is then the diagonal recurrence."""
  z = jax.random.normal(KEYS[0], (N, D))
  _, correct = newton.diagonal(KEYS[1])(lambda z: jnp.sin(z), z)
  r = jax.random.normal(KEYS[2], (N, D))
  np.testing.assert_allclose(correct(r), linear_recurrence(jnp.cos(z), r), rtol=1e-5, atol=1e-5)


def test_impossible_requests_are_named():
  with pytest.raises(InputError, match="iterations is 0"):
    newton.solve(lambda z: z, jnp.ones((3, 2)), iterations=0, surrogate=newton.identity)
  with pytest.raises(InputError, match="n \\+ 1"):
    newton.solve(lambda z: z, jnp.ones((1, 2)), iterations=1, surrogate=newton.identity)
