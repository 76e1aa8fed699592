import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxlab.core.checks import InputError
from jaxlab.core.recurrence import doubling_scan, linear_recurrence, matrix_recurrence, transfer, transfer_tensor


def loop(transition, increment, reverse=False):
  """The recurrence, one step after the other, in float64."""
  order = range(len(increment))[::-1] if reverse else range(len(increment))
  solution, state = np.zeros(increment.shape), np.zeros(increment.shape[1:])
  for t in order:
    state = transition(t, state) + increment[t]
    solution[t] = state
  return solution


@given(
  steps=st.integers(1, 90), reverse=st.booleans(), kind=st.sampled_from(["identity", "number", "scalar", "diagonal"])
)
def test_elementwise_transitions_match_the_loop(steps, reverse, kind):
  rng = np.random.default_rng(steps)
  b = rng.normal(size=(steps, 2, 3))
  a = {"identity": 1.0, "number": 0.7, "scalar": rng.normal(size=steps), "diagonal": rng.normal(size=(steps, 2, 3))}[
    kind
  ]
  at = (lambda t: a) if isinstance(a, float) else (lambda t: a[t])
  expected = loop(lambda t, h: at(t) * h, b, reverse)
  with jax.enable_x64(True):
    solve = jax.jit(linear_recurrence, static_argnames=("transition", "reverse") if isinstance(a, float) else "reverse")
    actual = solve(transition=a, increment=jnp.asarray(b), reverse=reverse)
  np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@given(steps=st.integers(1, 20), reverse=st.booleans(), batched=st.booleans())
def test_matrix_transitions_match_the_loop(steps, reverse, batched):
  rng = np.random.default_rng(steps)
  a = rng.normal(size=(steps, 2 if batched else 1, 3, 3)) / 2
  b = rng.normal(size=(steps, 2, 3, 5))
  expected = loop(lambda t, h: a[t] @ h, b, reverse)
  with jax.enable_x64(True):
    solve = jax.jit(matrix_recurrence, static_argnames="reverse")
    actual = solve(jnp.asarray(a), jnp.asarray(b), reverse=reverse)
  np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_identity_equals_associative_scan_and_cumsum():
  for steps in (24, 100):
    b = jax.random.normal(jax.random.key(0), (steps, 4))
    actual = linear_recurrence(1.0, b)
    np.testing.assert_allclose(actual, jax.lax.associative_scan(jnp.add, b), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(actual, jnp.cumsum(b, 0), rtol=1e-5, atol=1e-5)


def test_any_axis_and_any_pytree():
  b = {"x": jnp.arange(12.0).reshape(3, 4), "y": jnp.ones((2, 4, 5))}
  actual = linear_recurrence(1.0, b, axis=1)
  np.testing.assert_allclose(actual["x"], jnp.cumsum(b["x"], 1))
  np.testing.assert_allclose(actual["y"], jnp.cumsum(b["y"], 1))


def test_bfloat16_is_accumulated_in_float32():
  b = jnp.ones((1000,), jnp.bfloat16)
  actual = linear_recurrence(1.0, b)
  assert actual.dtype == jnp.bfloat16
  assert float(actual[-1]) == 1000.0  # a bfloat16 running sum of ones stops at 256


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_match_finite_differences(reverse):
  key_a, key_b = jax.random.split(jax.random.key(0))
  with jax.enable_x64(True):
    a, b = jax.random.normal(key_a, (5, 3), "float64"), jax.random.normal(key_b, (5, 3), "float64")
    solve = lambda f: jax.jit(lambda a, b: f(a, b, reverse=reverse))
    check_grads(solve(linear_recurrence), (a, b), order=1, modes=["fwd", "rev"])
    m = jax.random.normal(key_a, (5, 3, 3), "float64")
    check_grads(solve(matrix_recurrence), (m, b[..., None]), order=1, modes=["fwd", "rev"])


def test_transfer_tensor_is_the_recurrence_as_one_product():
  key_a, key_b = jax.random.split(jax.random.key(0))
  a, b = jax.random.normal(key_a, (6, 4, 4)) / 2, jax.random.normal(key_b, (6, 4, 3))
  rows = jnp.array([1, a.shape[0] - 1])
  for actual, expected in (
    (transfer(transfer_tensor(a), b), matrix_recurrence(a, b)),
    (transfer(transfer_tensor(a)[rows], b), matrix_recurrence(a, b)[rows]),
  ):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_disagreeing_lengths_are_named():
  with pytest.raises(InputError, match="transition has 4 steps, increment 5"):
    linear_recurrence(jnp.ones(4), jnp.ones((5, 2)))
  with pytest.raises(InputError, match="does not fit increment"):
    matrix_recurrence(jnp.ones((5, 3, 3)), jnp.ones((5, 2, 1)))


@pytest.mark.parametrize("steps", [1, 2, 8, 13])
@pytest.mark.parametrize("reverse", [False, True])
def test_doubling_is_the_associative_scan(steps, reverse):
  """On products of matrices, which do not commute, with a pytree of two shapes."""
  rng = np.random.default_rng(steps)
  elements = {"a": jnp.asarray(rng.normal(size=(steps, 2, 2))), "b": jnp.asarray(rng.normal(size=(steps, 2)))}
  combine = lambda x, y: {"a": y["a"] @ x["a"], "b": jnp.einsum("...ij,...j->...i", y["a"], x["b"]) + y["b"]}
  run = lambda scan: jax.jit(lambda e: scan(combine, e, reverse=reverse))(elements)
  expected = run(jax.lax.associative_scan)
  for name, value in run(doubling_scan).items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
