"""The plain function: W in float32, block after block, then a product."""

import jax
import jax.numpy as jnp


def weight(signs, u, v, count):
  """W (outputs, inputs) in float32 of the first `count` blocks."""

  def add(total, block):
    packed, left, right, i = block
    sign = jnp.unpackbits(packed, axis=-1, count=v.shape[-1]).astype(jnp.float32) * 2 - 1
    product = left.astype(jnp.float32) @ right.astype(jnp.float32)
    return total + jnp.where(i < count, sign * product, 0), None

  blocks, outputs, _ = u.shape
  return jax.lax.scan(add, jnp.zeros((outputs, v.shape[-1])), (signs, u, v, jnp.arange(blocks)))[0]


def bitstack_matmul(x, signs, u, v, count):
  """As `jaxlab.kernels.bitstack_matmul.bitstack_matmul`."""
  return x @ weight(signs, u, v, count).T.astype(x.dtype)
