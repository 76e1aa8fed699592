"""By cuDNN's paged attention: what lies before the new tokens, unmasked, and they themselves, causally."""

import math

import jax
import jax.numpy as jnp

from jaxlab.kernels import cudnn

NEEDS = (
  "takes 16-bit numbers, head_dim in 8s up to 256, pages of 16 positions or more, a table with room for as many pages "
  "as there are, no sizes, and a Hopper GPU or a later one"
)


def preferred(*problem) -> bool:
  return cudnn.allowed() and supports(*problem)


def supports(q, keys, values, table, count, start, sizes) -> bool:
  pages, page, _ = keys.shape
  return page >= 16 and table.size == pages and sizes is None and cudnn.takes(q, keys)


def paged_attention(q, keys, values, table, count, start, sizes, *, heads: int):
  """As `jaxlab.kernels.paged_attention.paged_attention`, in two parts to be combined: (rows, 2, queries, ...).

  cuDNN's causal mask is of squares, so that the new tokens, which end their rows, are read by a call of their own, from
  a copy of their few pages. All pages that the table names must hold numbers.
  """
  attention = cudnn.module()
  (rows, queries, size), page = q.shape, keys.shape[1]
  tokens = queries // heads
  by_head = q.reshape(rows, tokens, heads, size)
  how = dict(scale=1 / math.sqrt(size), return_residual=True)
  opened, total = count[:, 0], count[:, 1]
  # The pages of the new tokens follow the open ones, and begin with the past's last ones.
  past = jnp.where(total > opened, opened * page + start % page, opened * page)
  places = table.reshape(rows, 1, -1, 1)
  of_past = attention.paged_attention(
    by_head,
    *(pool[:, :, None] for pool in (keys, values)),
    jnp.full(rows, tokens, jnp.int32),
    jnp.maximum(past, 1),
    places,
    places,
    mask_type=attention.MaskType.PADDING,
    **how,
  )
  mine = -(-(tokens + page - 1) // page)
  own = jnp.take_along_axis(table, jnp.minimum(opened[:, None] + jnp.arange(mine), table.shape[1] - 1), axis=1)

  def new(pool):
    read = pool[own].reshape(rows, -1, size)
    cut = lambda a, at: jax.lax.dynamic_slice_in_dim(a, at, tokens)
    return jax.vmap(cut)(read, start % page)[:, :, None]

  of_own = attention.dot_product_attention(by_head, new(keys), new(values), mask_type=attention.MaskType.CAUSAL, **how)
  some = jnp.stack([past > 0, total > opened], axis=1)[:, :, None, None]
  out, rest = (jnp.stack(pair, axis=1) for pair in zip(of_past, of_own, strict=True))
  out = jnp.where(some[..., None], out, 0).reshape(rows, 2, queries, size)
  # cuDNN's log-sum-exp is (rows, heads, tokens).
  return out, jnp.where(some, jnp.swapaxes(rest, 2, 3), -jnp.inf).reshape(rows, 2, queries)
