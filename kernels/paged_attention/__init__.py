"""Attention of new tokens over the pages that a table names, read where they lie.

A row is one key head (or a share of its query heads) of one sequence. Softmax is over all the positions of its pages.
"""

import math

import jax
import jax.numpy as jnp

from jaxlab.core.checks import require, require_choice
from jaxlab.kernels.paged_attention import gpu, tpu

IMPLEMENTATIONS = (None, "reference", "triton", "mosaic_tpu")
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that the difference of two is no NaN


def paged_attention(q, keys, values, table, count, start, *, heads=1, implementation=None, interpret=False):
  """Attention of every row's queries over the pages of its table.

  Args:
    q: (rows, queries, head_dim): `heads` heads of every new token side by side, query i at position
      start + i // heads.
    keys, values: (pages, page, head_dim).
    table: int32[rows, capacity], pages of every row; entries past its count are read by nobody, but must name a page.
    count: int32[rows, 2]: (open, all). The first `open` pages lie before the new tokens and are full: every query sees
      them. Those from `open` to `all` hold the positions from page * (start // page) on, in order, and are masked
      causally; the new tokens are among them.
    start: int32[rows], position of the first new token.
    implementation: "reference" (XLA), "triton" or "mosaic_tpu"; None picks what runs best where it is called.
    interpret: run the kernel in Pallas' interpreter, on any machine.

  Returns:
    (attention like q; its log-sum-exp, float32[rows, queries]). Rows without a page are zeros, and -inf.
    There is no derivative.

  Raises:
    InputError: an unknown implementation; shapes that do not fit; a problem the kernel cannot take.
  """
  require_choice("implementation", implementation, IMPLEMENTATIONS)
  rows, queries, size = q.shape
  require(
    keys.shape == values.shape and keys.shape[2] == size and table.shape[0] == rows == count.shape[0],
    f"q {q.shape}, keys {keys.shape}, values {values.shape}, table {table.shape} and count {count.shape} do not fit: "
    "expected (rows, queries, d), (pages, page, d) twice, (rows, capacity) and (rows, 2)",
  )
  require(heads >= 1 and queries % heads == 0, f"{queries} queries are no whole number of tokens of {heads} heads")
  if implementation is None:
    implementation = {"gpu": "triton", "tpu": "mosaic_tpu"}.get(jax.default_backend(), "reference")
    usable = dict(triton=gpu, mosaic_tpu=tpu, reference=None)[implementation]
    implementation = implementation if usable and usable.supports(q, keys) else "reference"
  args = q, keys, values, table, count.astype(jnp.int32), jnp.asarray(start, jnp.int32)
  if implementation == "reference":
    return _reference(*args, heads=heads)
  module = gpu if implementation == "triton" else tpu
  require(module.supports(q, keys), f"the {implementation} kernel {module.NEEDS}; use implementation='reference'")
  return _without_derivative(lambda *args: module.paged_attention(*args, heads=heads, interpret=interpret))(*args)


def _without_derivative(function):
  """The function, whose differentiation is refused by name instead of by an error from inside Pallas."""
  wrapped = jax.custom_vjp(function)

  def refuse(*_):
    require(False, "paged_attention has no derivative; train with implementation='reference' or dense attention")

  wrapped.defvjp(refuse, refuse)
  return wrapped


def _reference(q, keys, values, table, count, start, *, heads: int):
  page, size = keys.shape[1:]
  rows, queries, _ = q.shape
  wide = jnp.promote_types(q.dtype, jnp.float32)
  index = jnp.arange(table.shape[1])
  opened, total = count[:, :1], count[:, 1:]
  # The position of the first entry of every page; of those that all queries see only that it is early enough.
  first = jnp.where(index < opened, -page, (start[:, None] // page + index - opened) * page)
  place = jnp.where((index < total)[..., None], first[..., None] + jnp.arange(page), jnp.iinfo(jnp.int32).max)
  place = place.reshape(rows, 1, -1)
  query = start[:, None, None] + (jnp.arange(queries) // heads)[:, None]
  read = lambda pool: pool[table].reshape(rows, -1, size)
  see = place <= query
  last = jnp.max(query, axis=1, keepdims=True)
  # Pages may hold anything past a row's last token, also what is not a number.
  value = jnp.where((place <= last)[:, 0, :, None], read(values), 0)
  score = jnp.einsum("rqd,rkd->rqk", q, read(keys), preferred_element_type=wide) / math.sqrt(size)
  score = jnp.where(see, score, LOWEST)
  top = score.max(axis=-1, keepdims=True)
  weight = jnp.where(see, jnp.exp(score - top), 0)
  total = weight.sum(axis=-1)
  out = jnp.einsum("rqk,rkd->rqd", weight.astype(value.dtype), value, preferred_element_type=wide)
  some = total > 0
  out = jnp.where(some[..., None], out / jnp.where(some, total, 1)[..., None], 0)
  return out.astype(q.dtype), jnp.where(some, top[..., 0] + jnp.log(jnp.where(some, total, 1)), -jnp.inf)
