"""Residual scaling and the norm that reads it in one pass: XLA writes the sum, then reads it again for the norm."""

import jax

from jaxlab.core.checks import require_choice
from jaxlab.kernels.residual_norm import gpu
from jaxlab.models import layers

IMPLEMENTATIONS = (None, "reference", "triton")


def residual_norm(x, x0, scale, x0_scale, gain, *, eps: float, implementation=None, interpret=False):
  """(r, RMS norm of r times the gain) of r = scale x + x0_scale x0, both in the dtype of x.

  Args:
    x, x0: (*batch, width); scale, x0_scale: scalars; gain: (width,) or None.
    eps: added to the mean square.
    implementation: "reference" (XLA) or "triton"; None takes Triton on a GPU, but for float64 and for widths
      that are no multiple of 64.
    interpret: run the kernel in Pallas' interpreter, on any machine.

  Raises:
    InputError: an unknown implementation, or a width that is no multiple of 64 for "triton".
  """
  require_choice("implementation", implementation, IMPLEMENTATIONS)
  if implementation is None:
    usable = jax.default_backend() == "gpu" and x.dtype.itemsize <= 4 and gpu.supports(x.shape[-1])
    implementation = "triton" if usable else "reference"
  if implementation == "reference":
    return layers.residual_norm(x, x0, scale, x0_scale, gain, eps=eps)
  return gpu.residual_norm(x, x0, scale, x0_scale, gain, eps=eps, interpret=interpret)
