"""From the joint q, k, v product to what attention reads, in one pass (rotation, RMS norm, scale, gated values).

XLA takes three to five kernels for it, and writes the rotated queries and keys twice.
"""

import jax

from jaxlab.core.checks import require_choice
from jaxlab.kernels.rotary_qkv import gpu
from jaxlab.models import layers

IMPLEMENTATIONS = (None, "reference", "triton")


def rotary_qkv(heads, cos, sin, value=None, gate=None, *, implementation=None, interpret=False, **sizes):
  """Queries, keys and values of one product: q and k rotated, normalised and scaled, v plus its gated value embedding.

  Args:
    heads: (*batch, time, q_heads + 2 kv_heads, head_dim), queries before keys before values.
    cos, sin: (time, head_dim / 2).
    value, gate: (*batch, time, kv_heads, head_dim) and (*batch, time, kv_heads), or None.
    sizes: q_heads, kv_heads, norm, gain, eps and scale, as of `jaxlab.models.layers.rotary_qkv`.
    implementation: "reference" (XLA) or "triton"; None takes Triton on a GPU, but for float64 and where head_dim is no
      power of two.
    interpret: run the kernel in Pallas' interpreter, on any machine.

  Returns:
    (q, k, v), each (*batch, time, its heads, head_dim).

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
