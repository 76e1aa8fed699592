"""From the joint q, k, v product to what attention reads, in one pass (rotation, RMS norm, scale, gated values).

XLA takes three to five kernels for it, and writes the rotated queries and keys twice.
"""

import jax

from jaxlab.core.checks import require_choice
from jaxlab.kernels.rotary_qkv import gpu
from jaxlab.models import layers

IMPLEMENTATIONS = (None, "reference", "triton")


def rotary_qkv(heads, cos, sin, value=None, gate=None, *, implementation=None, interpret=False, **sizes):
  """`jaxlab.models.layers.rotary_qkv`, which says what the arguments are.

  Args:
    implementation: "reference" (XLA) or "triton"; None takes Triton on a GPU, but for float64 and where head_dim is no
      power of two.
    interpret: run the kernel in Pallas' interpreter, on any machine.

  Raises:
    InputError: an unknown implementation, or a head_dim that is no power of two for "triton".
  """
  require_choice("implementation", implementation, IMPLEMENTATIONS)
  if implementation is None:
    usable = jax.default_backend() == "gpu" and heads.dtype.itemsize <= 4 and gpu.supports(heads.shape[-1])
    implementation = "triton" if usable else "reference"
  if implementation == "reference":
    return layers.rotary_qkv(heads, cos, sin, value, gate, **sizes)
  return gpu.rotary_qkv(heads, cos, sin, value, gate, interpret=interpret, **sizes)
