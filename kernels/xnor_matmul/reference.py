"""The plain functions: signs into words and back, and the product, a stretch of outputs at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

_AT_ONCE = 2**22  # words of a product


def pack_bits(x: Bool[Array, "*batch size"] | Float[Array, "*batch size"]) -> UInt32[Array, "*batch words"]:
  """Bits of the last axis, least significant first: True, or a number from 0 on (sign(0) is +1), is 1; 0 behind it."""
  bits = x if x.dtype == jnp.bool_ else x >= 0
  *batch, size = bits.shape
  bits = jnp.pad(bits, [(0, 0)] * len(batch) + [(0, -size % 32)]).reshape(*batch, -1, 32)
  return (bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)).sum(axis=-1, dtype=jnp.uint32)


def unpack_bits(words: UInt32[Array, "*batch words"], size: int) -> Float[Array, "*batch size"]:
  """+1 and -1, float32."""
  bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
  return bits.reshape(*words.shape[:-1], -1)[..., :size].astype(jnp.float32) * 2 - 1


def xnor_matmul(a, b, size: int) -> Int[Array, "rows outputs"]:
  """As `jaxlab.kernels.xnor_matmul.xnor_matmul`."""

  def row(one):
    return jax.lax.population_count(one ^ b).astype(jnp.int32).sum(axis=1)

  return size - 2 * jax.lax.map(row, a, batch_size=max(1, min(len(a), _AT_ONCE // b.size)))
