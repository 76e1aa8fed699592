"""Chelsea, later CentroidKV: keys alike in a stretch of the cache are merged with their values (arXiv 2506.11418).

  method = chelsea(keep=0.25)
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(paged.DENSE, decode=method))

The prompt is read with its whole cache. Then entries between the first `sink` and the last `recent` are paired within
chunks: those at even offsets propose to the most similar key at an odd one, the best proposals are accepted, and a
cluster becomes its mean, weighted by the number s of tokens that each entry stands for. Attention gives a centroid the
weight of its tokens, q . k / sqrt(d) + log s. While tokens are generated the oldest chunk of the recent ones is merged
as soon as there are `chunk` too many. The paper's text was not at hand: schedule and weighting are reconstructions.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.models import paged
from jaxlab.models.inference import Network

_PARTITIONS = ("alternating", "halves")


class Entries(NamedTuple):
  """Keys and values (..., n, head_dim) and how many tokens each stands for, float32 (..., n); 0: an empty place."""

  keys: Array
  values: Array
  size: Array


def schedule(entries: int, keep: float, chunk: int) -> list[tuple[int, int]]:
  """(entries of a chunk, how many of them go) of every round that leaves the share `keep` of `entries`.

  A round removes at most half: ceil(log2(1 / keep)) rounds of the same ratio, each on chunks of what is left.

  Raises:
    InputError: keep outside 0 < keep <= 1, or a chunk under 2.
  """
  require(0 < keep <= 1, f"keep is {keep}; it must lie in 0 < keep <= 1")
  require(chunk >= 2, f"chunk is {chunk}; entries are paired, so it must be at least 2")
  rounds = math.ceil(math.log2(1 / keep) - 1e-9)
  ratio, made = keep ** (1 / max(rounds, 1)), []
  for _ in range(rounds):
    size = min(chunk, entries) // 2 * 2
    if size == 0:
      break
    removed = min(round((1 - ratio) * size), size // 2)
    made.append((size, removed))
    entries -= entries // size * removed
  return made


def kept(entries: int, keep: float, chunk: int) -> int:
  """Entries that `compress` leaves."""
  for size, removed in schedule(entries, keep, chunk):
    entries -= entries // size * removed
  return entries


def soft_match(
  keys: Float[Array, "c head_dim"], size: Float[Array, "c"], removed: int, *, partition: str = "alternating"
) -> Int[Array, "c"]:
  """Where every entry of a chunk goes: rows 0 .. c - removed - 1, in the order of time.

  Each entry at an even offset proposes to the one at an odd offset whose key has the largest cosine with its own; the
  `removed` best proposals are accepted. Of equal ones the first. Empty places pair among themselves, before all others.

  Args:
    partition: "alternating", or "halves": the first half proposes to the second (a comparison).
  """
  c = len(keys)
  offsets = jnp.arange(c)
  a, b = (offsets[: c // 2], offsets[c // 2 :]) if partition == "halves" else (offsets[0::2], offsets[1::2])
  unit = keys.astype(jnp.float32)
  unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
  alike = jnp.matmul(unit[a], unit[b].T, precision=jax.lax.Precision.HIGHEST)
  full = size > 0
  alike = jnp.where(full[a][:, None] == full[b], jnp.where(full[a][:, None], alike, 2.0), -jnp.inf)
  best = jnp.argmax(alike, axis=1)
  _, chosen = jax.lax.top_k(jnp.max(alike, axis=1), removed)
  gone = jnp.zeros(c, bool).at[a[chosen]].set(True)
  row = jnp.cumsum(~gone) - 1
  return jnp.where(gone, row[jnp.zeros(c, jnp.int32).at[a].set(b[best])], row)


def merge(entries: Entries, row: Int[Array, "c"], count: int) -> Entries:
  """The means of the entries that go to the same of `count` rows, weighted by their sizes; sizes add up."""
  weight = jnp.where(row == jnp.arange(count)[:, None], entries.size, 0.0)
  total = weight.sum(axis=1)
  share = weight / jnp.maximum(total, 1e-30)[:, None]
  # An empty place may hold what is not a number.
  full = (entries.size > 0)[:, None]
  mean = lambda a: jnp.matmul(
    share, jnp.where(full, a, 0).astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
  ).astype(a.dtype)
  return Entries(mean(entries.keys), mean(entries.values), total)


def compress(entries: Entries, *, keep: float, chunk: int, partition: str = "alternating") -> Entries:
  """`kept(n, keep, chunk)` entries in the place of n, for one head: every round merges within chunks.

  Entries that fill no chunk pass through a round.
  """
  for size, removed in schedule(len(entries.size), keep, chunk):
    whole = len(entries.size) // size * size
    parts = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), entries)  # noqa: B023 (used at once)
    match = functools.partial(soft_match, removed=removed, partition=partition)
    rows = jax.vmap(match)(parts.keys, parts.size)
    merged = jax.vmap(functools.partial(merge, count=size - removed))(parts, rows)
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), merged)
    entries = jax.tree.map(lambda a, b: jnp.concatenate([a, b[whole:]]), flat, entries)  # noqa: B023
  return entries


def attend_entries(
  q: Float[Array, "batch time q_heads head_dim"], entries: Entries, *, size_bias: bool = True
) -> Float[Array, "batch time q_heads head_dim"]:
  """Softmax of q . k / sqrt(d) + log s over all entries (batch, kv_heads, n, ...), without a causal mask."""
  batch, time, _, width = q.shape
  grouped = q.reshape(batch, time, entries.keys.shape[1], -1, width)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  score = jnp.einsum("btgrd,bgnd->bgrtn", grouped, entries.keys, preferred_element_type=wide) / math.sqrt(width)
  full = (entries.size > 0)[:, :, None, None]
  bias = jnp.log(jnp.where(full, entries.size[:, :, None, None], 1.0)) if size_bias else 0.0
  weight = jax.nn.softmax(jnp.where(full, score + bias, -jnp.inf), axis=-1)
  values = jnp.where((entries.size > 0)[..., None], entries.values, 0)
  out = jnp.einsum("bgrtn,bgnd->btgrd", weight.astype(values.dtype), values, preferred_element_type=wide)
  return out.reshape(q.shape).astype(q.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
  """The cache of one layer: centroids (batch, kv_heads, places, ...), first and recent tokens as they were.

  `used` places of the centroids are taken, of every row; `filled` recent ones.
  """

  body: Entries
  sink: Entries
  recent: Entries
  used: Int[Array, "batch"]
  filled: Int[Array, "batch"]


def chelsea(
  *,
  keep: float = 0.25,
  chunk: int = 128,
  sink: int = 4,
  recent: int = 128,
  size_bias: bool = True,
  skip_layers: tuple[int, ...] = (),
  partition: str = "alternating",
) -> paged.Method:
  """The method for the tokens after a prompt (`paged.decoder(..., decode=)`); one token a step.

  Args:
    keep: share of the entries that stays; 1 keeps all.
    chunk: tokens that are merged among themselves.
    sink, recent: first and last tokens that stay as they are.
    size_bias: False gives every centroid the weight of one token.
    skip_layers: layers whose cache stays whole.

  Raises:
    InputError: sizes out of range.
  """
  schedule(chunk, keep, chunk)
  require(sink >= 0 and recent >= 0, f"sink is {sink} and recent {recent}; both must be at least 0")
  require(partition in _PARTITIONS, f"partition is {partition!r}; choose one of {', '.join(_PARTITIONS)}")
  share = lambda layer: 1.0 if layer in skip_layers else keep

  def squeeze(layer: int, entries: Entries) -> Entries:
    one = functools.partial(compress, keep=share(layer), chunk=chunk, partition=partition)
    return jax.vmap(jax.vmap(one))(entries)

  def ready(network: Network, state: paged.State, time: int) -> paged.State:
    capacity = state.table.shape[1] * state.page
    chunks = max(0, (time - sink - recent) // chunk)  # of the longest row, all that are merged at once
    later = -(-(capacity - time) // chunk)
    taken = jnp.clip((state.length - sink - recent) // chunk, 0, chunks)

    def layer(i, pair):
      keys, values = (paged.rows(pool, state.table) for pool in pair)
      valid = lambda place, end: jnp.broadcast_to((place < end)[:, None], (len(end), keys.shape[1], place.shape[-1]))
      part = lambda size, cut: Entries(cut(keys), cut(values), size.astype(jnp.float32))
      place = jnp.arange(chunks * chunk)
      body = part(valid(place, (taken * chunk)[:, None]), lambda a: a[:, :, sink : sink + chunks * chunk])
      body = squeeze(i, body)
      room = later * kept(chunk, share(i), chunk)
      body = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, room), *[(0, 0)] * (a.ndim - 3))), body)
      first = part(valid(jnp.arange(sink), state.length[:, None]), lambda a: a[:, :, :sink])
      begin = sink + taken * chunk
      filled = jnp.maximum(state.length - begin, 0)
      window = jnp.arange(recent + chunk)
      at = jnp.minimum(begin[:, None] + window, capacity - 1)
      gather = lambda a: jnp.take_along_axis(a, at[:, None, :, None], axis=2)
      used = jnp.full(len(taken), kept(chunks * chunk, share(i), chunk), jnp.int32)
      return Layer(body, first, part(valid(window, filled[:, None]), gather), used, filled)

    memory = tuple(layer(i, pair) for i, pair in enumerate(state.pools))
    return dataclasses.replace(state, pools=(), memory=memory)

  def attend(q, k, v, view: paged.View, memory):
    if not memory:  # the prompt
      return paged.attend_densely(q, k, v, view, memory)
    require(q.shape[1] == 1, f"{q.shape[1]} tokens at once; a merged cache takes one after the other")
    mine = _append(memory[view.layer], k[:, 0], v[:, 0])
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), mine.sink, mine.body, mine.recent)
    out = attend_entries(q, whole, size_bias=size_bias)
    mine = _merge_oldest(mine, chunk, functools.partial(squeeze, view.layer))
    return out, (*memory[: view.layer], mine, *memory[view.layer + 1 :])

  return paged.Method(attend, ready=ready)


def _append(layer: Layer, key, value) -> Layer:
  """With one token's key and value (batch, kv_heads, head_dim) behind the recent ones."""
  rows, heads = jnp.arange(len(key))[:, None], jnp.arange(key.shape[1])
  at = (rows, heads, layer.filled[:, None])
  new = Entries(key, value, jnp.ones(key.shape[:2], jnp.float32))
  recent = jax.tree.map(lambda a, b: a.at[at].set(b.astype(a.dtype)), layer.recent, new)
  return dataclasses.replace(layer, recent=recent, filled=layer.filled + 1)


def _merge_oldest(layer: Layer, chunk: int, squeeze) -> Layer:
  """Rows whose recent places are all filled have their oldest chunk merged into the body."""
  places = layer.recent.size.shape[2]
  full = layer.filled == places

  def move(layer: Layer) -> Layer:
    merged = squeeze(jax.tree.map(lambda a: a[:, :, :chunk], layer.recent))
    count = merged.size.shape[2]

    def write(body, new, at):
      return jax.lax.dynamic_update_slice_in_dim(body, new.astype(body.dtype), at, axis=1)

    choose = lambda new, old: jnp.where(full.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    body = jax.tree.map(lambda a, b: choose(jax.vmap(write)(a, b, layer.used), a), layer.body, merged)
    shifted = jax.tree.map(
      lambda a: jnp.concatenate([a[:, :, chunk:], jnp.zeros_like(a[:, :, :chunk])], 2), layer.recent
    )
    recent = jax.tree.map(choose, shifted, layer.recent)
    used, filled = layer.used + jnp.where(full, count, 0), layer.filled - jnp.where(full, chunk, 0)
    return dataclasses.replace(layer, body=body, recent=recent, used=used, filled=filled)

  return jax.lax.cond(full.any(), move, lambda layer: layer, layer)
