import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export

from jaxlab.core.checks import InputError
from jaxlab.kernels.block_mass import block_mass
from tests.common import interpreted, lowered_for_hopper


def problem(seed, *, heads=(4, 2), queries=48, blocks=9, size=128, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return draw(2, heads[0], queries, size), draw(2, heads[1], blocks, size)


REAL = np.array([48, 21])  # queries of the two rows that count


def by_hand(q, means, past, block):
  """From the definition, in float64."""
  q, means = (np.asarray(a, np.float64) for a in (q, means))
  (batch, heads, queries, size), blocks = q.shape, means.shape[2]
  out = np.full((batch, heads, queries // block, blocks), -np.inf)
  for b, h, t, j in np.ndindex(batch, heads, queries, blocks):
    if past + t >= (j + 1) * block - 1 and t < REAL[b]:
      z = q[b, h, t] @ means[b, h * means.shape[1] // heads, j] / np.sqrt(size)
      out[b, h, t // block, j] = np.logaddexp(out[b, h, t // block, j], z)
  return out


@functools.partial(jax.jit, static_argnames=("block", "implementation"))
def run(q, means, past, block, implementation):
  how = dict(real=REAL, implementation=implementation, interpret=interpreted(implementation))
  return block_mass(q, means, past=past, block=block, **how)


@given(st.integers(0, 10_000), st.sampled_from((0, 16, 64, 128)))
def test_the_reference_is_the_definition(seed, past):
  q, means = problem(seed, size=8)
  np.testing.assert_allclose(run(q, means, past, 16, "reference"), by_hand(q, means, past, 16), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("heads, queries, block, blocks", [((4, 2), 48, 16, 9), ((3, 1), 64, 32, 130)])
def test_kernels_equal_the_reference(implementation, dtype, tolerance, heads, queries, block, blocks):
  """Groups of heads, more means than a program takes, a chunk at the start and one far behind it."""
  for past in 0, 8192:
    q, means = problem(past, heads=heads, queries=queries, blocks=blocks, dtype=dtype)
    found, expected = (run(q, means, past, block, name) for name in (implementation, "reference"))
    assert found.dtype == jnp.float32 and np.isneginf(expected[0]).any() == (past == 0)
    assert np.isneginf(expected[1, :, -(-REAL[1] // block) :]).all()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", ["reference", "triton", "mosaic_tpu"])
def test_a_mean_that_is_no_number_makes_none(implementation):
  q, means = problem(0)
  mass = np.asarray(run(q, means.at[:, :, 2].set(jnp.nan), 64, 16, implementation))
  counts = np.isfinite(run(q, means, 64, 16, implementation))
  np.testing.assert_array_equal(np.isnan(mass), counts & (np.arange(9) == 2))


def test_it_lowers_for_tpus_and_for_cuda():
  for dtype in jnp.float32, jnp.bfloat16:
    q, means = problem(0, dtype=dtype)
    kernel = lambda name: jax.jit(functools.partial(block_mass, past=64, block=16, implementation=name))
    assert "tpu_custom_call" in export.export(kernel("mosaic_tpu"), platforms=["tpu"])(q, means).mlir_module()
    assert "triton" in lowered_for_hopper(kernel("triton"), q, means)


def test_what_it_cannot_do_is_named():
  q, means = problem(0, size=24)
  with pytest.raises(InputError, match="the triton kernel takes 16 or 32 bits; for GPUs blocks of 16 to 256 queries"):
    block_mass(q, means, past=0, block=16, implementation="triton")
  with pytest.raises(InputError, match="do not fit"):
    block_mass(q, means[..., :8], past=0, block=16)
  with pytest.raises(InputError, match="block"):
    block_mass(q, means, past=0, block=10)
