"""Cache entries that stand for several tokens each, and attention over them."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require
from jaxlab.kernels.paged_attention import paged_attention
from jaxlab.models.config import TransformerConfig

PAGE = 64  # entries that the kernel reads at once


class Entries(NamedTuple):
  """Keys and values (..., n, head_dim) and how many tokens each stands for, float32 (..., n); 0: an empty place."""

  keys: Array
  values: Array
  size: Array


def require_whole_context(config: TransformerConfig, capacity: int) -> None:
  """Raises InputError where a layer looks back a window shorter than the cache: what leaves it could not be known."""
  require(
    all(window is None or window >= capacity for window in config.windows),
    "layers of this model look back a window, in which entries would have to keep their places; take another method",
  )


def attend_entries(
  q: Float[Array, "batch time q_heads head_dim"],
  *parts: Entries,
  size_bias: bool = True,
  see: Bool[Array, "batch time n"] | None = None,
) -> Float[Array, "batch time q_heads head_dim"]:
  """Softmax of q . k / sqrt(d) + log s over all entries (batch, kv_heads, n, ...) of all parts, or over those that a
  query sees. Empty places weigh nothing, but must hold numbers.

  The parts are read where they lie: only scores are put together.
  """
  return attend_parts(q, parts, size_bias, see)[0]


def attend_parts(q, parts: tuple[Entries, ...], size_bias: bool, see):
  """(`attend_entries`, log-sum-exp float32[batch, time, q_heads])."""
  batch, time, _, width = q.shape
  grouped = q.reshape(batch, time, parts[0].keys.shape[1], -1, width)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  dot = functools.partial(jnp.einsum, preferred_element_type=wide)
  score = jnp.concatenate([dot("btgrd,bgnd->bgrtn", grouped, part.keys) for part in parts], axis=-1) / math.sqrt(width)
  size = jnp.concatenate([part.size for part in parts], axis=-1)[:, :, None, None]
  full = size > 0
  bias = jnp.log(jnp.where(full, size, 1.0)) if size_bias else 0.0
  full = full if see is None else full & see[:, None, None]
  score = jnp.where(full, score + bias, -jnp.inf)
  weight = jax.nn.softmax(score, axis=-1).astype(q.dtype)
  ends = np.cumsum([part.size.shape[-1] for part in parts])
  weights = jnp.split(weight, ends[:-1], axis=-1)
  out = sum(dot("bgrtn,bgnd->btgrd", w, part.values) for w, part in zip(weights, parts, strict=True))
  total = jnp.moveaxis(jax.nn.logsumexp(score, axis=-1), 3, 1).reshape(q.shape[:3])
  return out.reshape(q.shape).astype(q.dtype), total


def attend_centroids(
  q: Float[Array, "batch 1 q_heads head_dim"],
  body: Entries,
  used: Int[Array, "batch"],
  *,
  size_bias: bool = True,
  implementation: str | None = None,
):
  """`attend_entries` of one token over the first `used` places of a row, by `kernels.paged_attention`.

  Args:
    body: (batch, kv_heads, places, ...), their number a multiple of `PAGE`; those past `used` are empty.

  Returns:
    (attention like q; its log-sum-exp, float32[batch, 1, q_heads]). A row without entries is zeros, and -inf.
  """
  batch, kv_heads, places, width = body.keys.shape
  rows, pages = batch * kv_heads, places // PAGE
  sizes = body.size if size_bias else (body.size > 0).astype(jnp.float32)
  filled = jnp.repeat(-(-used // PAGE), kv_heads)
  out, total = paged_attention(
    q.reshape(rows, -1, width),
    *(a.reshape(rows * pages, PAGE, width) for a in (body.keys, body.values)),
    jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages),
    jnp.stack([filled, filled], axis=1),
    jnp.zeros(rows, jnp.int32),
    heads=q.shape[2] // kv_heads,
    sizes=sizes.reshape(rows * pages, PAGE),
    implementation=implementation,
  )
  return out.reshape(q.shape), total.reshape(q.shape[:3])
