"""By cuDNN's paged attention: what lies before the new tokens, unmasked, and they themselves, causally."""

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

NEEDS = (
  "takes 16-bit numbers, head_dim in 8s up to 256, pages of 16 positions or more, a table with room for as many pages "
  "as there are, no sizes, and a Hopper GPU or a later one"
)


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


def preferred(*problem) -> bool:
  return not _left_out and supports(*problem)


@functools.cache
def _cudnn():
  """JAX's module that calls cuDNN, or None: paged attention has no public name there yet."""
  try:
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    module.check_cudnn_version()
    known = module.paged_attention, module.dot_product_attention, module.MaskType.PADDING
    return module if known and module.check_compute_capability("9.0") else None
  except (ImportError, AttributeError, RuntimeError):
    return None


def supports(q, keys, values, table, count, start, sizes) -> bool:
  pages, page, size = keys.shape
  return (
    jax.default_backend() == "gpu"
    and q.dtype == keys.dtype
    and q.dtype in (jnp.bfloat16, jnp.float16)
    and size % 8 == 0
    and size <= 256
    and page >= 16
    and table.size == pages
    and sizes is None
    and _cudnn() is not None
  )


def paged_attention(q, keys, values, table, count, start, sizes, *, heads: int):
  """As `jaxlab.kernels.paged_attention.paged_attention`, in two parts to be combined: (rows, 2, queries, ...).

  cuDNN's causal mask is of squares, so that the new tokens, which end their rows, are read by a call of their own, from
  a copy of their few pages. All pages that the table names must hold numbers.
  """
  cudnn = _cudnn()
  (rows, queries, size), page = q.shape, keys.shape[1]
  tokens = queries // heads
  by_head = q.reshape(rows, tokens, heads, size)
  how = dict(scale=1 / math.sqrt(size), return_residual=True)
  opened, total = count[:, 0], count[:, 1]
  # The pages of the new tokens follow the open ones, and begin with the past's last ones.
  past = jnp.where(total > opened, opened * page + start % page, opened * page)
  places = table.reshape(rows, 1, -1, 1)
  of_past = cudnn.paged_attention(
    by_head,
    *(pool[:, :, None] for pool in (keys, values)),
    jnp.full(rows, tokens, jnp.int32),
    jnp.maximum(past, 1),
    places,
    places,
    mask_type=cudnn.MaskType.PADDING,
    **how,
  )
  mine = -(-(tokens + page - 1) // page)
  own = jnp.take_along_axis(table, jnp.minimum(opened[:, None] + jnp.arange(mine), table.shape[1] - 1), axis=1)

  def new(pool):
    read = pool[own].reshape(rows, -1, size)
    cut = lambda a, at: jax.lax.dynamic_slice_in_dim(a, at, tokens)
    return jax.vmap(cut)(read, start % page)[:, :, None]

  of_own = cudnn.dot_product_attention(by_head, new(keys), new(values), mask_type=cudnn.MaskType.CAUSAL, **how)
  some = jnp.stack([past > 0, total > opened], axis=1)[:, :, None, None]
  out, rest = (jnp.stack(pair, axis=1) for pair in zip(of_past, of_own, strict=True))
  out = jnp.where(some[..., None], out, 0).reshape(rows, 2, queries, size)
  # cuDNN's log-sum-exp is (rows, heads, tokens).
  return out, jnp.where(some, jnp.swapaxes(rest, 2, 3), -jnp.inf).reshape(rows, 2, queries)
