import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxlab.core.checks import InputError
from jaxlab.kernels.xnor_matmul import pack_bits, unpack_bits, xnor_matmul
from tests.common import interpreted, lowered_for_hopper


def signs(*shape, seed=0):
  return np.random.default_rng(seed).choice(np.float32([-1, 1]), shape)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
def test_bits_come_back_and_end_in_zeros(size):
  x = signs(3, size)
  packed = pack_bits(jnp.asarray(x))
  assert packed.dtype == jnp.uint32 and packed.shape == (3, -(-size // 32))
  np.testing.assert_array_equal(unpack_bits(packed, size), x)
  np.testing.assert_array_equal(packed, pack_bits(jnp.asarray(x > 0)))
  assert (np.asarray(unpack_bits(packed, 32 * packed.shape[1]))[:, size:] == -1).all()
  assert pack_bits(jnp.float32([0.0, -0.0, -1e-9, 5])).tolist() == [0b1011]


@pytest.mark.parametrize("implementation", ["reference", "triton", "mosaic_tpu"])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
def test_it_is_the_product_of_signs(implementation, size):
  """Exactly, for words and tiles that are not full, and for fewer rows than a program takes."""
  how = dict(implementation=implementation, interpret=interpreted(implementation))
  for rows, outputs in ((1, 5), (11, 40)):
    a, b = signs(rows, size), signs(outputs, size, seed=1)
    found = xnor_matmul(pack_bits(jnp.asarray(a)), pack_bits(jnp.asarray(b)), size, **how)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, a @ b.T)


def test_tpu_words_of_several_grid_steps():
  a, b = signs(3, 32 * 300), signs(2, 32 * 300, seed=1)
  packed = pack_bits(jnp.asarray(a)), pack_bits(jnp.asarray(b))
  np.testing.assert_array_equal(xnor_matmul(*packed, 9600, implementation="mosaic_tpu", interpret=True), a @ b.T)


def test_it_lowers_for_tpus_and_for_cuda():
  packed = pack_bits(jnp.asarray(signs(70, 2304))), pack_bits(jnp.asarray(signs(200, 2304)))
  for name, platform, call in ("mosaic_tpu", "tpu", "tpu_custom_call"), ("triton", "cuda", "triton"):
    run = jax.jit(lambda a, b, name=name: xnor_matmul(a, b, 2304, implementation=name))
    if platform == "tpu":
      text = export.export(run, platforms=["tpu"])(*packed).mlir_module()
    else:
      text = lowered_for_hopper(run, *packed)
    assert call in text and "xnor_matmul" in text
    assert platform == "tpu" or ("popc" in text and "ctpop" not in text)  # Triton cannot compile math.ctpop


def test_bad_input():
  a, b = pack_bits(jnp.ones((2, 40))), pack_bits(jnp.ones((3, 40)))
  with pytest.raises(InputError, match=r"shapes \(2, 2\) and \(3, 2\); of 70 columns they have 3 words a row"):
    xnor_matmul(a, b, 70)
  with pytest.raises(InputError, match="implementation is 'cuda'"):
    xnor_matmul(a, b, 40, implementation="cuda")
  with pytest.raises(InputError, match="size is 0"):
    xnor_matmul(a, b, 0)
