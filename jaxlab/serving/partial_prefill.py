"""The prefill of some tokens of a prompt, at any positions and in any order, where the others' keys and values lie.

  rows = begin(network, tokens, positions)
  rows, cached, seen = advance(network, rows, cached, groups, start=0, stop=network.model.depth)
  logits = finish(network, rows, read)

Keys are kept BEFORE rotation, so that a stretch of text can lie at any offset: they are rotated where they are read, by
the positions they lie at. A row sees the keys at its own position and before, whichever rows are computed beside it: a
mask aligned to the last of them would show early rows what comes later. While it attends, a row tells how much of its
attention goes to each group of positions; matrices of all positions by all positions are not kept.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.models.block import Side
from jaxlab.models.config import TransformerConfig
from jaxlab.models.inference import Network, Pair, State
from jaxlab.models.layers import apply_rope, rope_table

_ROWS = 256  # that attend at once, at most
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Tokens on their way through the layers.

  Attributes:
    x: the state, (batch, rows, width), or with streams; x0, values, backout: as in `Side` and `Transformer.logits`.
    positions: int32[batch, rows] in the prompt, no two alike in a row of the batch; -1: padding.
  """

  x: Array
  x0: Array
  values: Array | None
  backout: Array | None
  positions: Int[Array, "batch rows"] | Any


class Cached(NamedTuple):
  """Keys before rotation and values of some layers: (layers, batch, capacity, kv_heads, head_dim) each."""

  keys: Array
  values: Array


class Seen(NamedTuple):
  """Where attention went, means over the heads, in float32.

  Attributes:
    mass: (layers, batch, rows, groups), of every row to every group; with what is in no group they sum to 1.
    received: (batch, capacity), by every position, summed over layers and rows.
  """

  mass: Array
  received: Array


def require_movable(network: Network) -> None:
  """Raises InputError for networks whose keys and values depend on positions by more than a rotation at the end."""
  c = network.model.config
  require(not c.smear, "this model smears embeddings: its keys depend on the token before; take another model")
  turned = c.qk_norm == "after_rope" and c.norm_gain
  require(not turned, "this model scales keys by channel after rotating them, so they cannot be moved; take another")
  even = all(block.config.kv_heads == c.kv_heads for block in network.blocks)
  require(even, "layers differ in heads; take the model apart without narrow=True")


def empty(config: TransformerConfig, *, batch: int, capacity: int, layers: int, dtype) -> Cached:
  """Room for `capacity` positions."""
  shape = (layers, batch, capacity, config.kv_heads, config.head_dim)
  return Cached(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def begin(network: Network, tokens: Int[Array, "batch rows"], positions: Int[Array, "batch rows"]) -> Rows:
  """Rows before the first layer."""
  x, side, _ = network.model.embed(tokens)
  return Rows(x, side.x0, side.values, jnp.zeros_like(x) if network.model.config.backout else None, positions)


def advance(
  network: Network,
  rows: Rows,
  cached: Cached,
  groups: Int[Array, "batch capacity"],
  *,
  start: int,
  stop: int,
  count: int,
) -> tuple[Rows, Cached, Seen]:
  """Layers start .. stop - 1 of the rows, whose keys and values are written into the cache on the way.

  Args:
    cached: of these layers alone.
    groups: of every position, from 0 on, or -1 where nothing lies, which nobody sees.
    count: of groups that `Seen.mass` tells apart; larger numbers count for none.
  """
  mass, received = [], 0
  for layer in range(start, stop):
    rows, cached, seen = advance_layer(network, rows, cached, groups, layer=layer, at=layer - start, count=count)
    mass.append(seen.mass)
    received += seen.received
  return rows, cached, Seen(jnp.concatenate(mass), received)


def advance_layer(
  network: Network,
  rows: Rows,
  cached: Cached,
  groups,
  *,
  layer: int,
  at: int,
  count: int,
  choose: Callable | None = None,
) -> tuple[Rows, Cached, Seen]:
  """`advance` of one layer, which is number `at` of the cache.

  Args:
    choose: (the rows' own values, those that lay at their positions) -> int32[batch, chosen]: the rows that go on.
      All have their keys and values written; None: all go on.
  """
  model, block, c = network.model, network.blocks[layer], network.model.config
  table = (rows.positions.shape[1], c.head_dim // 2)
  # An angle of 0: what comes out of the projections is not rotated yet.
  side = Side(rows.x0, jnp.ones(table, rows.x.dtype), jnp.zeros(table, rows.x.dtype), 0, rows.values, model.mixing)
  value = rows.values[c.value_layers.index(layer)] if layer in c.value_layers else None
  mixing = jax.tree.map(lambda m: m[layer], side.mixing)
  inner, mix, q, k, v = block.project(rows.x, side, value, mixing)
  before = None if choose is None else lying_at(cached.values[at], rows.positions)
  cached = Cached(*(write(a, at, new, rows.positions) for a, new in zip(cached, (k, v), strict=True)))
  if choose is not None:
    chosen = choose(v, before)
    rows, q, inner = take(rows, chosen), _take(q, chosen), _take(inner, chosen)
    mix = jax.tree.map(lambda a: _take(a, chosen), mix) if c.hyper and c.hyper.dynamic else mix
  keys = apply_rope(cached.keys[at].astype(q.dtype), *rope_table(c, jnp.arange(cached.keys.shape[2]), q.dtype))
  q = apply_rope(q, *rope_table(c, rows.positions, q.dtype))
  out, seen = attend_at(q, keys, cached.values[at], rows.positions, groups, window=c.windows[layer], count=count)
  x = block.finish(inner, mix, out, mixing)[0]
  backout = x if c.backout and layer == model.depth // 2 else rows.backout
  return dataclasses.replace(rows, x=x, backout=backout), cached, seen


def write(store: Array, at: int, new: Float[Array, "batch rows heads size"], positions) -> Array:
  """The store (layers, batch, capacity, ...) with `new` at the positions of layer `at`; padding is dropped."""
  place = jnp.where(positions < 0, store.shape[2], positions)  # -1 would be the last one
  return store.at[at, jnp.arange(len(place))[:, None], place].set(new.astype(store.dtype), mode="drop")


def lying_at(layer: Float[Array, "batch capacity heads size"], positions) -> Array:
  """What lies at the positions."""
  return jnp.take_along_axis(layer, jnp.maximum(positions, 0)[..., None, None], axis=1)


def take(rows: Rows, index: Int[Array, "batch chosen"]) -> Rows:
  """The rows of that index, in its order; an index of -1 is padding."""
  real = jnp.maximum(index, 0)
  values = None if rows.values is None else jax.vmap(lambda a: _take(a, real))(rows.values)
  backout = None if rows.backout is None else _take(rows.backout, real)
  positions = jnp.where(index < 0, -1, jnp.take_along_axis(rows.positions, real, axis=1))
  return Rows(_take(rows.x, real), _take(rows.x0, real), values, backout, positions)


def _take(a: Array, index: Int[Array, "batch chosen"]) -> Array:
  return jnp.take_along_axis(a, index.reshape(*index.shape, *[1] * (a.ndim - 2)), axis=1)


def attend_at(q, keys, values, positions, groups, *, window: int | None = None, count: int):
  """Attention of queries at positions of their own: y is seen by x if y <= positions[x] and something lies at y.

  Args:
    q: (batch, rows, q_heads, head_dim) and keys (batch, capacity, kv_heads, head_dim), both rotated; values like keys.
    positions, groups, window, count: as in `advance` and `AttentionFn`.

  Returns:
    (attention like q, `Seen` of one layer).
  """
  batch, rows, heads, size = q.shape
  capacity, kv_heads = keys.shape[1:3]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  member = (groups[..., None] == jnp.arange(count)).astype(wide)  # (batch, capacity, groups)
  place = jnp.arange(capacity)
  each = next(size for size in range(min(rows, _ROWS), 0, -1) if rows % size == 0)

  def some(part):
    q, positions = part
    see = (place <= positions[..., None]) & (groups >= 0)[:, None]
    if window is not None:
      see &= place >= positions[..., None] - window
    grouped = q.reshape(batch, each, kv_heads, heads // kv_heads, size)
    score = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=wide) / size**0.5
    weight = jax.nn.softmax(jnp.where(see[:, None, None], score, _LOWEST), axis=-1)
    out = jnp.einsum("bkgts,bskd->btkgd", weight.astype(values.dtype), values).reshape(q.shape)
    mean = weight.mean(axis=(1, 2)) * (positions >= 0)[..., None]
    return out.astype(q.dtype), jnp.einsum("bts,bsn->btn", mean, member), mean.sum(axis=1)

  split = lambda a: jnp.moveaxis(a.reshape(batch, rows // each, each, *a.shape[2:]), 1, 0)
  join = lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, rows, *a.shape[3:])
  out, mass, received = jax.lax.map(some, (split(q), split(positions)))
  return join(out), Seen(join(mass)[None], received.sum(axis=0))


def finish(network: Network, rows: Rows, index: Int[Array, "batch read"]) -> Float[Array, "batch read vocab"]:
  """Logits of the rows of that index."""
  chosen = take(rows, index)
  return network.model.logits(chosen.x, chosen.backout)


def partial_prefill(
  network: Network,
  tokens: Int[Array, "batch rows"],
  positions: Int[Array, "batch rows"],
  cached: Cached,
  groups: Int[Array, "batch capacity"],
  *,
  count: int,
  read: Int[Array, "batch read"],
) -> tuple[Float[Array, "batch read vocab"], Cached, Seen]:
  """All layers of some tokens of a prompt, over keys and values that are there and their own.

  Args:
    tokens, positions: of the rows that are computed; rows at position -1 are padding. Every position below one of
      them that is in a group has to be cached or among them.
    cached: of all layers; groups, count: as in `advance`. read: rows whose logits are wanted.
  """
  rows = begin(network, tokens, positions)
  rows, cached, seen = advance(network, rows, cached, groups, start=0, stop=len(network.blocks), count=count)
  return finish(network, rows, read), cached, seen


def decoding_state(network: Network, cached: tuple[Cached, ...], length: int) -> State:
  """The state with which `inference.step` goes on after a prompt of `length` tokens: its keys are rotated."""
  return State(tuple(pair for part in cached for pair in _turned(network, part)), jnp.int32(length), None)


@jax.jit
def _turned(network: Network, cached: Cached) -> tuple[Pair, ...]:
  turn = rope_table(network.model.config, jnp.arange(cached.keys.shape[2]), cached.keys.dtype)
  return tuple((apply_rope(k, *turn), v) for k, v in zip(*cached, strict=True))


start_rows = jax.jit(begin)
advance_rows = jax.jit(advance, static_argnames=("start", "stop", "count"), donate_argnames="cached")
end_rows = jax.jit(finish)
take_rows = jax.jit(take)


def room(tokens: int, least: int = 64) -> int:
  """The smallest of least x (1, 1.5, 2, 3, 4, 6, ...) that is at least `tokens`: few shapes, few programs."""
  size = least
  while size < tokens:
    size = size * 3 // 2 if (size // least).bit_count() == 1 and size % least == 0 else size // 3 * 4
  return size
