"""Attention as a function the model is given, and the key-value cache as an explicit pytree."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_FLASH_FROM = 256  # queries; below, XLA's few fused kernels take less time than cuDNN's call


@runtime_checkable
class AttentionFn(Protocol):
  """Causal attention of `time` new queries at absolute positions start .. start + time - 1 over `keys` positions.

  Query at position p sees keys p - window .. p (window None: 0 .. p). Positions past p are never read. `start` is one
  for all rows or one a row.
  """

  def __call__(
    self,
    q: Float[Array, "batch time q_heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    *,
    window: int | None,
    start: Int[Array, "*batch"] | int,
  ) -> Float[Array, "batch time q_heads head_dim"]: ...


def dot_product_attention(q, k, v, *, window=None, start=0, flash=True):
  """Dense softmax attention, an `AttentionFn`: cuDNN flash attention on a GPU in 16 bits, XLA elsewhere and where the
  whole score matrix is small.

  With start = 0 (static) and as many keys as queries this is plain causal attention. Otherwise positions past the
  query's own are masked, so `k` and `v` may be a cache with room to spare. A single query under a window reads only
  the window + 1 keys it sees.

  Args:
    flash: False keeps off cuDNN, whose attention has no forward-mode derivative.
  """
  time, keys = q.shape[1], k.shape[1]
  if isinstance(start, int) and start == 0 and time == keys:
    narrow = window is not None and window < time
    flash &= jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and time >= _FLASH_FROM
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      is_causal=True,
      local_window_size=(window, 0) if narrow else None,
      implementation="cudnn" if flash else "xla",
    )
  start, first = jnp.asarray(start), 0
  if time == 1 and window is not None and window + 1 < keys:
    first = jnp.clip(start - window, 0, keys - window - 1)
    read = lambda x, at, axis: jax.lax.dynamic_slice_in_dim(x, at, window + 1, axis=axis)
    rows = jax.vmap(lambda x, at: read(x, at, 0)) if start.ndim else lambda x, at: read(x, at, 1)
    k, v = rows(k, first), rows(v, first)
  query = (start[..., None] + jnp.arange(time))[..., :, None]
  key = (jnp.asarray(first)[..., None] + jnp.arange(k.shape[1]))[..., None, :]
  mask = key <= query
  if window is not None:
    mask &= key >= query - window
  mask = mask.reshape(-1, 1, *mask.shape[-2:])
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def masked_attention(attend: Callable, segments: Int[Array, "batch time"] | None = None) -> AttentionFn:
  """Causal attention, among tokens of one segment where there are `segments`.

  Args:
    attend: (q, k, v, mask=bool (batch or 1, 1, queries, keys)) -> attended, with the shapes of an `AttentionFn`.
  """

  def attention(q, k, v, *, window, start):
    query, key = (jnp.arange(q.shape[1]) + start)[:, None], jnp.arange(k.shape[1])
    mask = key <= query
    if window is not None:
      mask &= key >= query - window
    mask = mask[None] if segments is None else mask & (segments[:, :, None] == segments[:, None, :])
    return attend(q, k, v, mask=mask[:, None])

  return attention


def window_kinds(windows) -> dict[int | None, list[int]]:
  """The positions of every kind of window."""
  return {kind: [j for j, window in enumerate(windows) if window == kind] for kind in dict.fromkeys(windows)}


def attend_cached(q, k, v, pairs, *, windows, start, layer=0, attention: AttentionFn = dot_product_attention):
  """Attention of `time` new tokens over what the caches of n layers hold and over themselves.

  Args:
    q: (n, batch, time, q_heads, head_dim); k, v: (n, batch, time, kv_heads, head_dim), of the new tokens.
    pairs: keys and values of the layers of every kind of window, in the order of `window_kinds(windows)`, each
      (N, batch, capacity, kv_heads, head_dim): rows layer, layer + 1, ... of a pair are the layers of its kind.
    windows: of the n layers; start: positions filled (`AttentionFn`). With start = 0 (static) the new tokens attend to
      themselves alone, which they do by the fastest kernel there is.

  Returns:
    (attended, like q; pairs with the new keys and values written at `start`).
  """
  attended, written = [None] * q.shape[0], []
  fold = lambda a: a.reshape(-1, *a.shape[2:])
  empty = isinstance(start, int) and start == 0
  for (window, index), pair in zip(window_kinds(windows).items(), pairs, strict=True):
    queries, *new = (take_layers(a, index) for a in (q, k, v))
    pair = tuple(write_tokens(store, a, layer, start) for store, a in zip(pair, new, strict=True))
    mine = new if empty else (store[layer : layer + len(index)] for store in pair)
    first = jnp.tile(start, len(index)) if jnp.ndim(start) else start
    out = attention(fold(queries), *map(fold, mine), window=window, start=first).reshape(queries.shape)
    for j, y in zip(index, out, strict=True):
      attended[j] = y
    written.append(pair)
  return jnp.stack(attended), tuple(written)


def take_layers(a, index: list[int]):
  """Rows of a static index; a whole range is no copy."""
  return a if index == list(range(a.shape[0])) else jnp.stack([a[j] for j in index])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys (after RoPE and norm) and values of the tokens seen so far, for all layers.

  `length` positions are filled; the rest holds zeros or stale entries that attention never reads. `previous` is the
  last token's normalised embedding before smearing (models with `smear`), zeros before the first token.
  """

  keys: Float[Array, "layer batch capacity kv_heads head_dim"]
  values: Float[Array, "layer batch capacity kv_heads head_dim"]
  length: Int[Array, ""]
  previous: Float[Array, "batch 1 width"] | None

  @property
  def capacity(self) -> int:
    return self.keys.shape[2]


def write_cache(store: Array, new: Array, where: tuple) -> Array:
  """`store` with the entries `new` written at `where`; the axes `where` leaves out start at 0."""
  index = [jnp.asarray(i, jnp.int32) for i in (*where, *[0] * (store.ndim - len(where)))]
  return jax.lax.dynamic_update_slice(store, new.astype(store.dtype), index)


def write_tokens(store: Float[Array, "layer batch capacity *head"], new, layer: int, start) -> Array:
  """`store` with the keys or values `new` of layers layer, layer + 1, ... at positions start, start + 1, ...

  Args:
    new: (layers, batch, time, *head); start: one for all rows or one a row.
  """
  if jnp.ndim(start) == 0:
    return write_cache(store, new, (layer, 0, start))
  row = lambda store, new, start: write_cache(store, new, (layer, start))
  return jax.vmap(row, in_axes=(1, 1, 0), out_axes=1)(store, new, start)
