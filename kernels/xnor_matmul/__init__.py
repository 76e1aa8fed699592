"""Products of vectors of signs, 32 of them in a word: a.b = K - 2 popcount(a xor b), exact in whole numbers."""

import jax
from jaxtyping import Array, Int, UInt32

from jaxlab.core.checks import require, require_choice, require_counts
from jaxlab.kernels.xnor_matmul import gpu, reference, tpu
from jaxlab.kernels.xnor_matmul.reference import pack_bits, unpack_bits

__all__ = ["IMPLEMENTATIONS", "pack_bits", "unpack_bits", "xnor_matmul"]

IMPLEMENTATIONS = (None, "reference", "triton", "mosaic_tpu")
_KERNELS = {"triton": gpu, "mosaic_tpu": tpu}
_BEST = {"gpu": "triton", "tpu": "mosaic_tpu"}


def xnor_matmul(
  a: UInt32[Array, "rows words"],
  b: UInt32[Array, "outputs words"],
  size: int,
  *,
  implementation=None,
  interpret: bool = False,
) -> Int[Array, "rows outputs"]:
  """A B^T of two matrices of +1 and -1 with `size` columns, packed along them; int32.

  Args:
    a, b: `pack_bits` of the matrices, 1 for +1; the bits behind the last column are 0 in both.
    size: K, the columns: ceil(K / 32) words.
    implementation: "reference" (XLA), "triton" or "mosaic_tpu"; None takes the kernel of the device.
    interpret: run the kernel in Pallas' interpreter, on any machine.

  Raises:
    InputError: an unknown implementation, or words that do not hold `size` columns.
  """
  require_choice("implementation", implementation, IMPLEMENTATIONS)
  require_counts(size=size)
  words = -(-size // 32)
  shapes = f"{a.shape} and {b.shape}"
  fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] == words
  require(fits, f"packed matrices have the shapes {shapes}; of {size} columns they have {words} words a row")
  implementation = implementation or _BEST.get(jax.default_backend(), "reference")
  if implementation == "reference":
    return reference.xnor_matmul(a, b, size)
  return _KERNELS[implementation].xnor_matmul(a, b, size, interpret=interpret)
