"""JAX's module that calls cuDNN, for what has no public name there: paged attention, packed sequences, a backward pass
with another softmax's sums."""

import contextlib
import functools
import importlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

_left_out = 0


@contextlib.contextmanager
def left_out() -> Iterator[None]:
  """Programs made meanwhile do without cuDNN where they have a choice.

  cuDNN loads a program's graph, when it first runs, by capturing a stream, and what other threads of the process do on
  the device meanwhile breaks the capture.
  """
  global _left_out
  _left_out += 1
  try:
    yield
  finally:
    _left_out -= 1


def allowed() -> bool:
  """Whether a program that has a choice may take it: not within `left_out`."""
  return not _left_out


@functools.cache
def module():
  """None without cuDNN, without a Hopper GPU or a later one, or where JAX has other names for it."""
  try:
    found = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    found.check_cudnn_version()
    known = found.paged_attention, found.dot_product_attention, found.MaskType.PADDING
    return found if known and found.check_compute_capability("9.0") else None
  except (ImportError, AttributeError, RuntimeError):
    return None


def takes(q, keys) -> bool:
  """Whether it attends with queries and keys (..., head_dim) of these dtypes."""
  size = q.shape[-1]
  sixteen = q.dtype == keys.dtype and q.dtype in (jnp.bfloat16, jnp.float16)
  return jax.default_backend() == "gpu" and sixteen and size % 8 == 0 and size <= 256 and module() is not None
