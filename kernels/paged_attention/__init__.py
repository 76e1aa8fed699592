"""Attention of new tokens over the pages that a table names, read where they lie.

A row is one key head (or a share of its query heads) of one sequence. Softmax is over all the positions of its pages.
An entry of a page may stand for several tokens, as centroids do.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core.checks import require, require_choice, warn_once
from jaxlab.kernels.paged_attention import cudnn, gpu, mosaic_gpu, tpu

KERNELS = {"cudnn": cudnn, "triton": gpu, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": tpu}
IMPLEMENTATIONS = (None, "reference", *KERNELS)
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that the difference of two is no NaN
_PREFILL = 64  # tokens from which cuDNN's kernel, with its two launches, is the quicker one
_PROGRAMS = 512  # of one token over many pages, by splitting rows


def paged_attention(
  q, keys, values, table, count, start, *, heads=1, sizes=None, splits=None, implementation=None, interpret=False
):
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
    sizes: float32[pages, page], tokens that every entry stands for: what its weight in the softmax is multiplied by.
      Where it is 0 there must be numbers, but they are not seen.
    splits: parts of a row's pages that are read side by side, for one token a row; None: as many as fill a GPU.
    implementation: "reference" (XLA), "cudnn" (Hopper and later; a table that has room for as many pages as there
      are), "triton", "mosaic_gpu" (Hopper; never picked by itself) or "mosaic_tpu"; None picks what runs best where
      it is called.
    interpret: run the kernel in Pallas' interpreter, on any machine; "mosaic_gpu" has none.

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
  one_token = queries == heads
  require(splits in (None, 1) or (one_token and splits > 1), f"splits is {splits}; only rows of one token have parts")
  require(
    sizes is None or sizes.shape == keys.shape[:2],
    f"sizes must be given as (pages, page) {keys.shape[:2]}",
  )
  require(jnp.issubdtype(q.dtype, jnp.floating), f"q holds {q.dtype}; attention is of floating-point numbers")
  _check_table(table, count, len(keys))
  problem = q, keys, values, table, count.astype(jnp.int32), jnp.asarray(start, jnp.int32), sizes
  if implementation is None:
    implementation = _best(problem, heads)
  if implementation == "reference":
    return _reference(*problem, heads=heads)
  module = KERNELS[implementation]
  require(module.supports(*problem), f"the {implementation} kernel {module.NEEDS}; use implementation='reference'")
  if implementation == "cudnn":
    return combine(*_without_derivative(functools.partial(cudnn.paged_attention, heads=heads))(*problem))
  run = _without_derivative(functools.partial(module.paged_attention, heads=heads, interpret=interpret))
  if splits is None and one_token and jax.default_backend() == "gpu":
    splits = 2 ** max(0, round(math.log2(_PROGRAMS / rows)))
  splits = min(splits or 1, table.shape[1])
  if splits == 1:
    return run(*problem)
  out, total = run(*_split(problem, splits))
  out, total = (a.reshape(rows, splits, *a.shape[1:]) for a in (out, total))
  return combine(out, total)


def _check_table(table, count, pages: int) -> None:
  """Of values that no transformation hides: those of a compiled program cannot be looked at."""
  if isinstance(table, jax.core.Tracer) or isinstance(count, jax.core.Tracer):
    return
  table, count = np.asarray(table), np.asarray(count)
  ordered = (count[:, 0] >= 0) & (count[:, 0] <= count[:, 1]) & (count[:, 1] <= table.shape[1])
  require(
    ordered.all(), f"count must be (open, all), 0 <= open <= all <= {table.shape[1]}; it is {count.tolist()!s:.80}"
  )
  read = table[np.arange(table.shape[1]) < count[:, 1:]]
  inside = ((read >= 0) & (read < pages)).all()
  require(inside, f"the table names pages {read.min(initial=0)}..{read.max(initial=0)}; there are 0..{pages - 1}")


def _best(problem, heads: int) -> str:
  if jax.default_backend() == "gpu":
    if problem[0].shape[1] >= _PREFILL * heads and cudnn.preferred(*problem):
      return "cudnn"
    if gpu.supports(*problem):
      return "triton"
    shape, page = problem[0].shape, problem[1].shape[1]
    warn_once(f"no kernel takes pages of {page} and {shape[2]} channels in {problem[0].dtype}: XLA copies all pages")
    return "reference"
  return "mosaic_tpu" if jax.default_backend() == "tpu" and tpu.supports(*problem) else "reference"


def _split(problem, splits: int):
  """Rows whose pages lie every splits-th: the last page of a row, the token's own, is the last one of its part."""
  q, keys, values, table, count, start, sizes = problem
  repeat = lambda a: jnp.repeat(a, splits, axis=0)
  table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % splits)))
  table = jnp.swapaxes(table.reshape(len(table), -1, splits), 1, 2).reshape(len(table) * splits, -1)
  count = jnp.maximum(-(-(count[:, None] - jnp.arange(splits)[:, None]) // splits), 0).reshape(-1, 2)
  return repeat(q), keys, values, table, count, repeat(start), sizes


def combine(out, total):
  """Attention over the union of parts, from (rows, parts, queries, head_dim) and log-sum-exp (rows, parts, queries)."""
  whole = jax.nn.logsumexp(total, axis=1)
  share = jnp.exp(total - jnp.where(jnp.isfinite(whole), whole, 0)[:, None])[..., None]
  return (share * out).sum(axis=1).astype(out.dtype), whole


def _without_derivative(function):
  """The function, whose differentiation is refused by name instead of by an error from inside Pallas."""
  wrapped = jax.custom_vjp(function)

  def refuse(*_):
    require(False, "paged_attention has no derivative; train with implementation='reference' or dense attention")

  wrapped.defvjp(refuse, refuse)
  return wrapped


def _reference(q, keys, values, table, count, start, sizes, *, heads: int):
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
  tokens = 1.0 if sizes is None else sizes[table].reshape(rows, 1, -1)
  see &= tokens > 0  # an empty entry's score must not be the largest
  score = jnp.where(see, score, LOWEST)
  top = score.max(axis=-1, keepdims=True)
  weight = jnp.where(see, jnp.exp(score - top) * tokens, 0)
  total = weight.sum(axis=-1)
  out = jnp.einsum("rqk,rkd->rqd", weight.astype(value.dtype), value, preferred_element_type=wide)
  some = total != 0  # also of keys that are no numbers, which the answer shows
  out = jnp.where(some[..., None], out / jnp.where(some, total, 1)[..., None], 0)
  return out.astype(q.dtype), jnp.where(some, top[..., 0] + jnp.log(jnp.where(some, total, 1)), -jnp.inf)
