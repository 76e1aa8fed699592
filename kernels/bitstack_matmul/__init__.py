"""x W^T of a few rows with W as blocks of packed signs: a weight is never written out, the bits are read once.

W = sum_{i < count} S_i * (U_i V_i); what is restored first by XLA is 16 or 32 times the bytes of a block's signs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxlab.core.checks import require, require_choice
from jaxlab.kernels.bitstack_matmul import gpu, reference, tpu

IMPLEMENTATIONS = (None, "reference", "triton", "mosaic_tpu")
_KERNELS = {"triton": gpu, "mosaic_tpu": tpu}
_BEST = {"gpu": "triton", "tpu": "mosaic_tpu"}


def bitstack_matmul(
  x: Float[Array, "rows inputs"],
  signs: UInt8[Array, "blocks outputs bytes"],
  u: Float[Array, "blocks outputs rank"],
  v: Float[Array, "blocks rank inputs"],
  count: Int[Array, ""],
  *,
  implementation=None,
  interpret: bool = False,
) -> Float[Array, "rows outputs"]:
  """The product with the first `count` blocks, summed in float32, in the dtype of x; the count compiles nothing.

  Args:
    signs: row by row, the most significant bit first, 1 for +1 (`models.packed_maps.pack_signs`).
    implementation: "reference" (XLA), "triton" or "mosaic_tpu"; None takes the kernel of the device where it takes
      these shapes: up to 8 rows, a multiple of 8 inputs, outputs in 16s (Triton) or 128s (TPU).
    interpret: run the kernel in Pallas' interpreter, on any machine.

  Returns:
    like x; its derivative is the reference's.

  Raises:
    InputError: an unknown implementation, or shapes that it does not take.
  """
  require_choice("implementation", implementation, IMPLEMENTATIONS)
  if implementation is None:
    best = _BEST.get(jax.default_backend())
    implementation = best if best and _KERNELS[best].supports(x, u) else "reference"
  if implementation == "reference":
    return reference.bitstack_matmul(x, signs, u, v, count)
  kernel = _KERNELS[implementation]
  shapes = f"{x.shape[0]} rows of {x.shape[1]} and {u.shape[1]} outputs"
  require(kernel.supports(x, u), f"{implementation} does not take {shapes}; it takes {kernel.NEEDS}")
  return _by_kernel(implementation, interpret, x, signs, u, v, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(implementation, interpret, x, signs, u, v, count):
  # Columns a bit apart are eight apart in a row: planes of every eighth column unpack without moving a lane.
  planes = lambda a: jnp.moveaxis(a.reshape(*a.shape[:-1], -1, 8), -1, 0)
  given = planes(x.astype(jnp.float32)), signs, u, planes(v), jnp.reshape(count, (1,)).astype(jnp.int32)
  return _KERNELS[implementation].bitstack_matmul(*given, interpret=interpret).astype(x.dtype)


def _backward(implementation, interpret, given, cotangent):
  x, signs, u, v, count = given
  to_x, to_u, to_v = jax.vjp(lambda x, u, v: reference.bitstack_matmul(x, signs, u, v, count), x, u, v)[1](cotangent)
  return to_x, None, to_u, to_v, None


_by_kernel.defvjp(
  lambda implementation, interpret, *given: (_by_kernel(implementation, interpret, *given), given), _backward
)
