import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.kernels.residual_norm import residual_norm
from jaxlab.models import layers
from tests.common import INTERPRET, lowered_for_hopper


def problem(seed, *shape, dtype=jnp.float32, gain=False):
  keys = jax.random.split(jax.random.key(seed), 3)
  x, x0 = (jax.random.normal(key, shape).astype(dtype) for key in keys[:2])
  gain = 1 + 0.3 * jax.random.normal(keys[2], shape[-1:]) if gain else None
  return x, x0, jnp.float32(1.1), jnp.float32(-0.2), gain


@given(
  st.integers(0, 99),
  st.sampled_from(((), (1,), (2, 3), (1, 16))),
  st.sampled_from((64, 192, 640)),
  st.booleans(),
  st.sampled_from((jnp.float32, jnp.bfloat16)),
)
def test_kernel_equals_reference(seed, batch, width, gain, dtype):
  arrays = problem(seed, *batch, width, gain=gain, dtype=dtype)
  expected = layers.residual_norm(*arrays, eps=1e-5)
  found = residual_norm(*arrays, eps=1e-5, implementation="triton", interpret=INTERPRET)
  tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
  for a, b in zip(found, expected, strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance)


def test_layers_at_once_equal_layers_one_by_one():
  x, x0, *_ = problem(2, 3, 4, 64)
  scales = jnp.array([1.0, 0.9, 0.8]), jnp.array([0.1, 0.2, 0.3])
  run = lambda x, a, b: residual_norm(x, x0[0], a, b, None, eps=1e-6, implementation="triton", interpret=INTERPRET)
  together = jax.vmap(run)(x, *scales)
  for i in range(3):
    for a, b in zip(together, run(x[i], scales[0][i], scales[1][i]), strict=True):
      np.testing.assert_array_equal(a[i], b)


def test_kernel_lowers_for_a_gpu_without_one():
  run = lambda *a: residual_norm(*a, None, eps=1e-6, implementation="triton")
  arrays = problem(0, 1, 64, 1280, dtype=jnp.bfloat16)[:4]
  text = lowered_for_hopper(run, *arrays)
  assert "residual_norm" in text and "triton" in text


def test_bad_input():
  arrays = problem(0, 2, 96)
  with pytest.raises(InputError, match="width is 96; the Triton kernel needs a multiple of 64"):
    residual_norm(*arrays, eps=1e-6, implementation="triton", interpret=INTERPRET)
  with pytest.raises(InputError, match="implementation is 'cuda'; it must be one of None, reference, triton"):
    residual_norm(*arrays, eps=1e-6, implementation="cuda")
