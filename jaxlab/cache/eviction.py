"""Caches that drop entries: the published baselines that cache methods are compared with.

  method = snapkv(keep=0.25)
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(method, chunk=512))

A prompt is read densely; then every key head keeps the share `keep` of the entries, those of the largest score. Under
`slide` every later token takes the place of the entry that is worth least, otherwise the cache grows.

  streaming_llm  the first tokens and the last                                     Xiao et al. 2023, arXiv 2309.17453
  h2o            mean attention of all queries that see a key; half are the last   Zhang et al. 2023, arXiv 2306.14048
  snapkv         attention of the last queries, averaged along the row             Li et al. 2024, arXiv 2404.14469
  keydiff        keys that are least like the mean of all                          Park et al. 2025, arXiv 2504.15364

Scores are a key head's: means over the query heads that read it.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.cache.chelsea import Entries, attend_entries
from jaxlab.core.checks import require
from jaxlab.models import paged
from jaxlab.models.inference import Network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
  """What a layer keeps: entries (batch, kv_heads, places, ...), their positions and scores; `used` places of a row."""

  entries: Entries
  position: Int[Array, "batch kv_heads places"]
  score: Float[Array, "batch kv_heads places"]
  used: Int[Array, "batch"]


def streaming_llm(*, keep: float = 0.25, sink: int = 4, slide: bool = True) -> paged.Method:
  """The first `sink` tokens and the last ones."""

  def score(keys, seen, length):
    position = jnp.arange(keys.shape[2])
    return jnp.broadcast_to(jnp.where(position < sink, jnp.inf, position.astype(jnp.float32)), keys.shape[:3])

  return _method(score, keep=keep, slide=slide)


def keydiff(*, keep: float = 0.25) -> paged.Method:
  """The keys with the least cosine to the mean of all unit keys."""

  def score(keys, seen, length):
    unit = keys.astype(jnp.float32)
    unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
    real = (jnp.arange(keys.shape[2]) < length[:, None])[:, None, :, None]
    mean = jnp.where(real, unit, 0).sum(axis=2, keepdims=True)
    mean = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
    return -(unit * mean).sum(axis=-1)

  return _method(score, keep=keep)


def snapkv(*, keep: float = 0.25, window: int = 64, kernel: int = 5) -> paged.Method:
  """The last `window` tokens, and those that their queries attend to most, averaged over `kernel` neighbours."""
  require(kernel % 2 == 1, f"kernel is {kernel}; it must be odd, so that it has a middle")

  def empty(config, *, batch, capacity, page, dtype):
    return tuple(jnp.zeros((batch, window, config.q_heads, config.head_dim), dtype) for _ in range(config.depth))

  def look(q, k, view: paged.View, seen):
    """The queries of the row's last `window` tokens, as far as they are in this chunk."""
    place = view.lengths[:, None] - window + jnp.arange(window) - view.start
    inside = (place >= 0) & (place < q.shape[1])
    found = jnp.take_along_axis(q, jnp.clip(place, 0, q.shape[1] - 1)[..., None, None], axis=1)
    return jnp.where(inside[..., None, None], found, seen)

  def score(keys, seen, length):
    count = keys.shape[2]
    position = jnp.arange(count)
    query = length[:, None] - window + jnp.arange(window)
    weight = _attention(seen, keys, query)
    # Queries before the row's first token are none.
    real = (query >= 0)[:, None, None, :, None]
    mean = jnp.where(real, weight, 0).sum(axis=3).mean(axis=2) / window
    body = position < (length - window)[:, None, None]
    padded = jnp.pad(jnp.where(body, mean, 0), ((0, 0), (0, 0), (kernel // 2, kernel // 2)))
    smooth = sum(padded[..., i : i + count] for i in range(kernel)) / kernel
    return jnp.where(body, smooth, jnp.inf)

  return _method(score, keep=keep, empty=empty, look=look)


def h2o(*, keep: float = 0.25, slide: bool = True) -> paged.Method:
  """Half of the budget the last tokens, half the keys that the prompt's and later queries attend to most."""

  def empty(config, *, batch, capacity, page, dtype):
    return tuple(jnp.zeros((batch, config.kv_heads, capacity), jnp.float32) for _ in range(config.depth))

  def look(q, k, view: paged.View, seen):
    query = view.start + jnp.broadcast_to(jnp.arange(q.shape[1]), (len(q), q.shape[1]))
    weight = _attention(q, paged.rows(view.keys, view.table), query)
    real = (query < view.lengths[:, None])[:, None, None, :, None]
    return seen + jnp.where(real, weight, 0).sum(axis=3).mean(axis=2)

  def score(keys, seen, length):
    position = jnp.arange(keys.shape[2])
    mean = seen / jnp.maximum(length[:, None, None] - position, 1)
    recent = jnp.floor(keep * length / 2).astype(jnp.int32)
    return jnp.where(position >= (length - recent)[:, None, None], jnp.inf, mean)

  return _method(score, keep=keep, slide=slide, empty=empty, look=look, attended=True)


def _method(
  score: Callable,
  *,
  keep: float,
  slide: bool = False,
  empty: Callable = lambda config, **sizes: (),
  look: Callable | None = None,
  attended: bool = False,
) -> paged.Method:
  """A method from its score(keys, what `look` gathered, lengths): float32[batch, kv_heads, positions].

  Args:
    look: (q, k, view, what it gathered of this layer before) -> what it has gathered, chunk by chunk.
    attended: the score is attention, to which later queries add; the last half of the places is safe from `slide`.
  """
  require(0 < keep <= 1, f"keep is {keep}; it must lie in 0 < keep <= 1")

  def ready(network: Network, state: paged.State, time: int) -> paged.State:
    capacity = state.table.shape[1] * state.page
    places, room = max(1, math.floor(keep * time)), 0 if slide else capacity - time
    kept = jnp.maximum(jnp.floor(keep * state.length), 1).astype(jnp.int32)

    def layer(i, pair):
      keys, values = (paged.rows(pool, state.table) for pool in pair)
      worth = score(keys, state.memory[i] if state.memory else None, state.length)
      worth = jnp.where(jnp.arange(capacity) < state.length[:, None, None], worth, -jnp.inf)
      worth, at = jax.lax.top_k(worth, places)
      size = jnp.broadcast_to((jnp.arange(places) < kept[:, None])[:, None], at.shape).astype(jnp.float32)
      take = lambda a: jnp.where((size > 0)[..., None], jnp.take_along_axis(a, at[..., None], axis=2), 0)
      entries = Entries(take(keys), take(values), size)
      tree = (entries, at, jnp.where(size > 0, worth, -jnp.inf))
      return Layer(
        *jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, room), *[(0, 0)] * (a.ndim - 3))), tree), kept
      )

    memory = tuple(layer(i, pair) for i, pair in enumerate(state.pools))
    return dataclasses.replace(state, pools=(), memory=memory)

  def attend(q, k, v, view: paged.View, memory):
    if view.keys is not None:  # the prompt
      if look is not None:
        mine = look(q, k, view, memory[view.layer])
        memory = (*memory[: view.layer], mine, *memory[view.layer + 1 :])
      return paged.attend_densely(q, k, v, view, memory)
    require(q.shape[1] == 1, f"{q.shape[1]} tokens at once; a cache that evicts takes one after the other")
    mine = _put(memory[view.layer], k[:, 0], v[:, 0], view.lengths - 1, slide, attended)
    out = attend_entries(q, mine.entries)
    if attended:
      weight = _weights(q, mine.entries).mean(axis=2)
      mine = dataclasses.replace(mine, score=mine.score + weight)
    return out, (*memory[: view.layer], mine, *memory[view.layer + 1 :])

  return paged.Method(attend, empty, ready)


def _put(layer: Layer, key, value, position, slide: bool, attended: bool) -> Layer:
  """With one more token (batch, kv_heads, head_dim): in a free place, or in that of the entry worth least."""
  places = layer.score.shape[2]
  at = jnp.broadcast_to(jnp.minimum(layer.used, places - 1)[:, None], key.shape[:2])
  if slide:
    worth = layer.score
    if attended:
      recent = jnp.maximum(layer.used // 2, 1)[:, None, None]
      worth = jnp.where(layer.position > position[:, None, None] - recent, jnp.inf, worth)
    # A place that was never used is worth least of all.
    worth = jnp.where(layer.entries.size > 0, worth, -jnp.inf)
    # Rows of fewer entries than places keep to their own number.
    inside = jnp.arange(places) < layer.used[:, None, None]
    at = jnp.argmin(jnp.where(inside, worth, jnp.inf), axis=2)
  index = (jnp.arange(len(key))[:, None], jnp.arange(key.shape[1]), at)
  new = Entries(key, value, jnp.ones(key.shape[:2], jnp.float32))
  entries = jax.tree.map(lambda a, b: a.at[index].set(b.astype(a.dtype)), layer.entries, new)
  where = layer.position.at[index].set(jnp.broadcast_to(position[:, None], at.shape))
  worth = 0.0 if attended else jnp.broadcast_to(position[:, None].astype(jnp.float32), at.shape)
  return Layer(entries, where, layer.score.at[index].set(worth), layer.used + (0 if slide else 1))


def _attention(q, keys, query: Int[Array, "batch time"]):
  """Causal attention of queries (batch, time, q_heads, head_dim), float32[batch, kv_heads, group, time, keys]."""
  batch, time, _, size = q.shape
  grouped = q.reshape(batch, time, keys.shape[1], -1, size)
  score = jnp.einsum("btgrd,bgnd->bgrtn", grouped, keys, preferred_element_type=jnp.float32) / math.sqrt(size)
  see = jnp.arange(keys.shape[2]) <= query[:, None, None, :, None]
  return jax.nn.softmax(jnp.where(see, score, -1e30), axis=-1)


def _weights(q, entries: Entries):
  """Attention weights of one query over the entries, float32[batch, kv_heads, group, places]."""
  batch, _, _, size = q.shape
  grouped = q.reshape(batch, entries.keys.shape[1], -1, size)
  score = jnp.einsum("bgrd,bgnd->bgrn", grouped, entries.keys, preferred_element_type=jnp.float32) / math.sqrt(size)
  return jax.nn.softmax(jnp.where((entries.size > 0)[:, :, None], score, -jnp.inf), axis=-1)


METHODS = dict(streaming_llm=streaming_llm, h2o=h2o, snapkv=snapkv, keydiff=keydiff)
