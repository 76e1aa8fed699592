"""Caches that drop entries: the published baselines that cache methods are compared with.

  method = snapkv(keep=0.25)
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(method, chunk=512))

A prompt is read densely; then every key head keeps the share `keep` of the entries, those of the largest score. Under
`slide` every later token takes the place of the entry that is worth least, otherwise the cache grows.

  streaming_llm  the first tokens and the last                                     Xiao et al. 2023, arXiv 2309.17453
  h2o            attention of all queries so far, summed; half are the last        Zhang et al. 2023, arXiv 2306.14048
  snapkv         attention of the last queries, averaged along the row             Li et al. 2024, arXiv 2404.14469
  keydiff        keys that are least like the mean of all                          Park et al. 2025, arXiv 2504.15364
  pyramidkv      SnapKV's scores; lower layers keep more, upper ones less          Cai et al. 2024, arXiv 2406.02069
  sepllm         the first tokens, separators such as commas, and the last tokens  Chen et al. 2024, arXiv 2412.12094

Scores are a key head's: means over the query heads that read it.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.cache.entries import Entries, attend_entries, require_whole_context
from jaxlab.core.checks import require
from jaxlab.models import paged
from jaxlab.models.compaction import Compaction, Compactor
from jaxlab.models.generate import power_of_two
from jaxlab.models.inference import Network

_FAR = 2.0**22  # more than any position; float32 tells the sums of two and a position apart


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


def sepllm(
  separators: tuple[int, ...], *, keep: float = 0.25, sink: int = 4, local: int = 64, slide: bool = True
) -> paged.Method:
  """The first `sink` tokens, the separators, and with what is left of the budget the last tokens.

  The model is used as it is, without the published training. Where the separators are too many, the last `local` tokens
  stay and the oldest separators go.

  Args:
    separators: ids of the tokens that stand for the segment before them (`data.tokenizer.ids_of`).

  Raises:
    InputError: no separators.
  """
  require(len(separators) > 0, "no separators are given; take those that data.tokenizer.ids_of finds")
  ids = jnp.array(separators, jnp.int32)

  def empty(config, *, batch, capacity, page, dtype):
    return tuple(jnp.zeros((batch, capacity), bool) for _ in range(config.depth))

  def look(q, k, view: paged.View, seen):
    return jax.lax.dynamic_update_slice(seen, jnp.isin(view.tokens, ids), (0, view.start))

  def score(keys, seen, length):
    position = jnp.arange(keys.shape[2])
    worth = jnp.where(position < sink, jnp.inf, position + _FAR * seen)
    return jnp.broadcast_to(worth[:, None], keys.shape[:3])

  def fresh(view: paged.View):
    return (view.lengths - 1).astype(jnp.float32) + _FAR * jnp.isin(view.tokens[:, 0], ids)

  recent = lambda used: jnp.minimum(local, used - sink)
  return _method(score, keep=keep, slide=slide, empty=empty, look=look, fresh=fresh, recent=recent)


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


def snapkv(*, keep: float = 0.25, window: int = 32, kernel: int = 7) -> paged.Method:
  """The last `window` tokens, and those that their queries attend to most, averaged over `kernel` neighbours."""
  _require_share(keep)
  return _snapkv(keep, window, kernel)


def _snapkv(keep: float | Callable, window: int, kernel: int) -> paged.Method:
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
    return sum(padded[..., i : i + count] for i in range(kernel)) / kernel

  return _method(score, keep=keep, empty=empty, look=look, recent=lambda used: jnp.minimum(window, used))


def pyramidkv(*, keep: float = 0.25, window: int = 32, kernel: int = 7, beta: float = 20.0) -> paged.Method:
  """`snapkv` whose lower layers keep more: of n entries beside the window, on average over the layers, the first keeps
  (2 - 1 / beta) n and the last n / beta, evenly in between; where that is more than there are, all, and the last more.

  Raises:
    InputError: beta under 1; and what `snapkv` raises.
  """
  _require_share(keep)
  require(beta >= 1, f"beta is {beta}; the last layer keeps 1 / beta of the mean, so it must be at least 1")

  def held(layer, layers, lengths):
    mean, most = np.maximum(keep * lengths - window, 0), np.maximum(lengths - window, 0)
    least = np.maximum(mean / beta, 2 * mean - most)
    depth = layer / (layers - 1) if layers > 1 else 0.5
    return np.minimum(keep * lengths, window) + 2 * mean - least + 2 * (least - mean) * depth

  return _snapkv(held, window, kernel)


def h2o(*, keep: float = 0.25, slide: bool = True) -> paged.Method:
  """Half of the budget the last tokens, half the keys that the prompt's and later queries attend to most.

  A key's score is the sum of its attention weights over all queries since it was read, each query's a mean over the
  query heads that read the key head. A sum and no mean: a decoded token, one query, counts as one of the prompt's does.
  """

  def empty(config, *, batch, capacity, page, dtype):
    return tuple(jnp.zeros((batch, config.kv_heads, capacity), jnp.float32) for _ in range(config.depth))

  def look(q, k, view: paged.View, seen):
    query = view.start + jnp.broadcast_to(jnp.arange(q.shape[1]), (len(q), q.shape[1]))
    weight = _attention(q, paged.rows(view.keys, view.table), query)
    real = (query < view.lengths[:, None])[:, None, None, :, None]
    return seen + jnp.where(real, weight, 0).sum(axis=3).mean(axis=2)

  return _method(
    lambda keys, seen, length: seen,
    keep=keep,
    slide=slide,
    empty=empty,
    look=look,
    attended=True,
    fresh=lambda view: jnp.zeros(view.lengths.shape),
    recent=lambda used: used // 2,
  )


def _method(
  score: Callable,
  *,
  keep: float | Callable[[int, int, np.ndarray], np.ndarray],
  slide: bool = False,
  empty: Callable = lambda config, **sizes: (),
  look: Callable | None = None,
  attended: bool = False,
  fresh: Callable = lambda view: (view.lengths - 1).astype(jnp.float32),
  recent: Callable = lambda used: used * 0,
) -> paged.Method:
  """A method from its score(keys, what `look` gathered, lengths): float32[batch, kv_heads, positions].

  Args:
    keep: share of the entries; or how many of a layer's, from its number, that of all, and tokens of prompts.
    look: (q, k, view, what it gathered of this layer before) -> what it has gathered, chunk by chunk.
    attended: the score is attention, to which later queries add.
    fresh: view -> float32[batch], the score of a new token; by default its position.
    recent: places that are used -> how many of the last tokens are kept whatever their score, the new one among them.
  """
  if not callable(keep):
    _require_share(keep)

  def ready(network: Network, state: paged.State, time: int) -> paged.State:
    capacity = state.table.shape[1] * state.page
    room = 0 if slide else capacity - time

    def layer(i, pair):
      lengths = np.arange(time + 1)
      held = keep(i, len(state.pools), lengths) if callable(keep) else keep * lengths
      held = np.maximum(np.floor(held), 1).astype(np.int32)  # by a row's own length
      places, kept = int(held.max()), jnp.asarray(held)[state.length]
      keys, values = (paged.rows(pool, state.table) for pool in pair)
      worth = score(keys, state.memory[i] if state.memory else None, state.length)
      place, length = jnp.arange(capacity), state.length[:, None, None]
      worth = jnp.where(place < length, worth, -jnp.inf)
      safe = (place >= length - recent(kept)[:, None, None]) & (place < length)
      _, at = jax.lax.top_k(jnp.where(safe, jnp.inf, worth), places)
      worth = jnp.take_along_axis(worth, at, axis=2)
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
    layer = memory[view.layer]
    mine = _put(layer, k[:, 0], v[:, 0], view.lengths - 1, fresh(view), recent(layer.used) if slide else None)
    out = attend_entries(q, mine.entries)
    if attended:
      weight = _weights(q, mine.entries).mean(axis=2)
      mine = dataclasses.replace(mine, score=mine.score + weight)
    return out, (*memory[: view.layer], mine, *memory[view.layer + 1 :])

  def checked(config, *, capacity, **sizes):
    require_whole_context(config, capacity)
    return empty(config, capacity=capacity, **sizes)

  in_pages = _in_pages(score, keep) if look is None and not slide and not callable(keep) else None
  return paged.Method(attend, checked, ready, in_pages=in_pages)


def _in_pages(score: Callable, keep: float) -> Compactor:
  """What `ready` does, for scores that take nothing but the keys."""

  def plan(prompt: int):
    left = max(1, math.floor(keep * prompt))
    if left < prompt:
      yield Compaction(prompt, 0, prompt, left, power_of_two(prompt))

  def compact(keys, values, size):
    worth = jnp.where(size > 0, score(keys[None, None], None, (size > 0).sum()[None])[0, 0], -jnp.inf)
    _, at = jax.lax.top_k(worth, len(worth))
    return keys[at], values[at], size[at]

  return Compactor(plan, compact)


def _require_share(keep: float) -> None:
  require(0 < keep <= 1, f"keep is {keep}; it must lie in 0 < keep <= 1")


def _put(layer: Layer, key, value, position, score, recent) -> Layer:
  """With one more token (batch, kv_heads, head_dim) of this score: in a free place, or where `recent` of a row's tokens
  are safe, in that of the entry worth least among the others."""
  places = layer.score.shape[2]
  at = jnp.broadcast_to(jnp.minimum(layer.used, places - 1)[:, None], key.shape[:2])
  slide = recent is not None
  if slide:
    safe = position - jnp.maximum(recent, 1)
    worth = jnp.where(layer.position > safe[:, None, None], jnp.inf, layer.score)
    # A place that was never used is worth least of all.
    worth = jnp.where(layer.entries.size > 0, worth, -jnp.inf)
    # Rows of fewer entries than places keep to their own number.
    inside = jnp.arange(places) < layer.used[:, None, None]
    at = jnp.argmin(jnp.where(inside, worth, jnp.inf), axis=2)
  index = (jnp.arange(len(key))[:, None], jnp.arange(key.shape[1]), at)
  new = Entries(key, value, jnp.ones(key.shape[:2], jnp.float32))
  entries = jax.tree.map(lambda a, b: a.at[index].set(b.astype(a.dtype)), layer.entries, new)
  where = layer.position.at[index].set(jnp.broadcast_to(position[:, None], at.shape))
  worth = layer.score.at[index].set(jnp.broadcast_to(score[:, None], at.shape))
  return Layer(entries, where, worth, layer.used + (0 if slide else 1))


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


METHODS = dict(streaming_llm=streaming_llm, h2o=h2o, snapkv=snapkv, pyramidkv=pyramidkv, keydiff=keydiff)
