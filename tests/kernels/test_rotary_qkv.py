import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.kernels.rotary_qkv import rotary_qkv
from jaxlab.models import layers
from tests.common import INTERPRET, lowered_for_hopper


def problem(seed, *, batch, time, q_heads, kv_heads, size, gains=False, values=False, apart=False, dtype=jnp.float32):
  """((heads, cos, sin, value, gate), gain) of random numbers; `apart`: every row at positions of its own."""
  keys = jax.random.split(jax.random.key(seed), 5)
  normal = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)
  angle = jax.random.uniform(keys[1], (*(batch if apart else ()), time, size // 2), maxval=6.0)
  heads = normal(keys[0], *batch, time, q_heads + 2 * kv_heads, size)
  value, gate = (normal(keys[2], *batch, time, kv_heads, size), normal(keys[3], *batch, time, kv_heads))
  arrays = (heads, jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype))
  gain = 1 + 0.3 * jax.random.normal(keys[4], (q_heads + kv_heads, size)) if gains else None
  return (*arrays, value, gate) if values else (*arrays, None, None), gain


def compare(arrays, gain, tolerance, **sizes):
  sizes |= dict(gain=gain, eps=1e-6)
  expected = layers.rotary_qkv(*arrays, **sizes)
  found = rotary_qkv(*arrays, implementation="triton", interpret=INTERPRET, **sizes)
  for a, b in zip(found, expected, strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance)


@given(
  st.integers(0, 99),
  st.sampled_from(((), (1,), (2, 3))),
  st.sampled_from((1, 7, 16, 24)),
  st.sampled_from(((4, 4), (4, 1), (6, 2))),
  st.sampled_from((None, "before_rope", "after_rope")),
  st.booleans(),
  st.booleans(),
  st.booleans(),
)
def test_kernel_equals_reference(seed, batch, time, heads, norm, gains, values, apart):
  sizes = dict(q_heads=heads[0], kv_heads=heads[1])
  gains &= norm is not None
  arrays, gain = problem(seed, batch=batch, time=time, size=16, gains=gains, values=values, apart=apart, **sizes)
  compare(arrays, gain, 2e-6, norm=norm, scale=1.2, **sizes)


def test_kernel_in_bfloat16():
  sizes = dict(q_heads=4, kv_heads=2)
  arrays, gain = problem(0, batch=(2,), time=32, size=64, gains=True, values=True, dtype=jnp.bfloat16, **sizes)
  compare(arrays, gain, 2e-2, norm="after_rope", scale=1.0, **sizes)


def test_layers_at_once_equal_layers_one_by_one():
  sizes = dict(q_heads=4, kv_heads=2)
  arrays, gain = problem(1, batch=(3, 1), time=8, size=16, gains=True, **sizes)
  heads, cos, sin = arrays[:3]
  run = functools.partial(
    rotary_qkv, implementation="triton", interpret=INTERPRET, norm="before_rope", eps=1e-6, scale=1.0, **sizes
  )
  gains = gain * jnp.array([1.0, 2.0, 3.0])[:, None, None]
  together = jax.vmap(lambda h, g: run(h, cos, sin, gain=g))(heads, gains)
  for i in range(3):
    for a, b in zip(together, run(heads[i], cos, sin, gain=gains[i]), strict=True):
      np.testing.assert_array_equal(a[i], b)


def test_kernel_lowers_for_a_gpu_without_one():
  sizes = dict(q_heads=10, kv_heads=10)
  arrays, _ = problem(0, batch=(1,), time=64, size=128, values=True, dtype=jnp.bfloat16, **sizes)
  run = lambda *a: rotary_qkv(*a, implementation="triton", norm="after_rope", gain=None, eps=1e-6, scale=1.2, **sizes)
  text = lowered_for_hopper(run, *arrays)
  assert "rotary_qkv" in text and "triton" in text


def test_bad_input():
  sizes = dict(q_heads=2, kv_heads=1, norm=None, gain=None, eps=1e-6, scale=1.0)
  arrays, _ = problem(0, batch=(), time=2, q_heads=2, kv_heads=1, size=12)
  with pytest.raises(InputError, match="head_dim is 12; the Triton kernel needs a power of two"):
    rotary_qkv(*arrays, implementation="triton", interpret=INTERPRET, **sizes)
  with pytest.raises(InputError, match="implementation is 'cuda'; it must be one of None, reference, triton"):
    rotary_qkv(*arrays, implementation="cuda", **sizes)
