import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxlab.core.checks import InputError
from jaxlab.kernels import bitstack_matmul as bitstack_module
from jaxlab.kernels.bitstack_matmul import bitstack_matmul
from jaxlab.models.packed_maps import SignStack, pack_signs
from tests.common import interpreted, lowered_for_hopper


def problem(*, rows=1, inputs=72, outputs=128, blocks=3, rank=2, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  signs = pack_signs(jnp.asarray(rng.normal(size=(blocks, outputs, inputs))))
  u, v = (jnp.asarray(rng.normal(size=s), jnp.float16) for s in ((blocks, outputs, rank), (blocks, rank, inputs)))
  return jnp.asarray(rng.normal(size=(rows, inputs)), dtype), signs, u, v


def first_blocks(signs, u, v, count):
  """The sum of them, in NumPy."""
  bits = np.unpackbits(np.asarray(signs), axis=-1, count=v.shape[-1])
  blocks = np.where(bits, 1.0, -1.0) * (np.asarray(u, np.float64) @ np.asarray(v, np.float64))
  return blocks[:count].sum(axis=0)


@pytest.mark.parametrize("implementation", ["reference", "triton", "mosaic_tpu"])
@pytest.mark.parametrize("rows, inputs, outputs, rank", [(1, 72, 128, 2), (3, 320, 256, 1), (8, 8, 128, 16)])
def test_it_is_the_map_of_its_first_blocks(implementation, rows, inputs, outputs, rank):
  """Inputs that fill no stretch, and every number of blocks; one program for all of them."""
  x, signs, u, v = problem(rows=rows, inputs=inputs, outputs=outputs, rank=rank)
  how = dict(implementation=implementation, interpret=interpreted(implementation))
  run = jax.jit(lambda count: bitstack_matmul(x, signs, u, v, count, **how))
  for count in (1, 2, 3):
    weight = first_blocks(signs, u, v, count)
    stack = SignStack(signs, u, v, None, jnp.int32(count))
    np.testing.assert_allclose(stack.weight(), weight, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(run(jnp.int32(count)), np.asarray(x) @ weight.T, rtol=1e-4, atol=1e-3)
  assert run._cache_size() == 1


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
def test_sixteen_bits_come_back_as_they_went_in(implementation):
  x, *rest = problem(rows=2, dtype=jnp.bfloat16)
  run = lambda name: bitstack_matmul(x, *rest, jnp.int32(3), implementation=name, interpret=interpreted(name))
  found, expected = run(implementation), run("reference")
  assert found.dtype == expected.dtype == jnp.bfloat16
  wide = lambda a: np.asarray(a, np.float32)
  assert np.abs(wide(found) - wide(expected)).max() < 2**-6 * np.abs(wide(expected)).max()


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
def test_its_derivative_is_the_references(implementation):
  x, signs, u, v = problem(rows=3)

  def pulled(name):
    run = lambda *given: bitstack_matmul(
      given[0], signs, *given[1:], jnp.int32(2), implementation=name, interpret=interpreted(name)
    )
    out, pull = jax.vjp(run, x, u, v)
    return pull(jnp.cos(out))

  for ours, theirs in zip(pulled(implementation), pulled("reference"), strict=True):
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=2e-3, atol=2e-2)


def test_a_map_takes_the_kernel_of_its_device(monkeypatch):
  """Also under a stack's vmap and a prompt's two axes; many rows have W written out."""
  x, signs, u, v = problem(rows=6)
  stack = SignStack(signs, u, v, jnp.full(72, 2.0), jnp.int32(2))
  plain = (x / 2) @ stack.weight().T
  taken, kernel = [], bitstack_module._by_kernel
  interpreted_kernel = lambda name, interpret, x, *rest: taken.append(x.shape[0]) or kernel(name, True, x, *rest)
  monkeypatch.setattr(bitstack_module, "_by_kernel", interpreted_kernel)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  np.testing.assert_allclose(stack(x.reshape(2, 3, 72)).reshape(6, -1), plain, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(jax.vmap(stack)(x[:, None])[:, 0], plain, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(stack(jnp.tile(x, (2, 1)))[6:], plain, rtol=1e-4, atol=1e-3)
  assert taken == [6, 1]


def test_it_lowers_for_tpus_and_for_cuda():
  arrays = problem(inputs=576, outputs=1536, rank=16, dtype=jnp.bfloat16)
  for name, platform, call in ("mosaic_tpu", "tpu", "tpu_custom_call"), ("triton", "cuda", "triton"):
    run = jax.jit(lambda *given, name=name: bitstack_matmul(*given, jnp.int32(2), implementation=name))
    if platform == "tpu":
      text = export.export(run, platforms=["tpu"])(*arrays).mlir_module()
    else:
      text = lowered_for_hopper(run, *arrays)
    assert call in text and "bitstack_matmul" in text


def test_bad_input():
  x, *rest = problem(rows=9)
  with pytest.raises(InputError, match="triton does not take 9 rows of 72 and 128 outputs; it takes 1 to 8 rows"):
    bitstack_matmul(x, *rest, jnp.int32(1), implementation="triton")
  with pytest.raises(InputError, match="implementation is 'cuda'"):
    bitstack_matmul(x, *rest, jnp.int32(1), implementation="cuda")
