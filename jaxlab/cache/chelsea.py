"""Chelsea, later CentroidKV: keys alike in a stretch of the cache are merged with their values (arXiv 2506.11418).

  method = chelsea(keep=0.25)
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(paged.DENSE, decode=method))

The prompt is read with its whole cache. Then entries between the first `sink` and the last `recent` are paired within
chunks: those at even offsets propose to the most similar key at an odd one, the best proposals are accepted, and a
cluster becomes its mean, weighted by the number s of tokens that each entry stands for. Attention gives a centroid the
weight of its tokens, q . k / sqrt(d) + log s. While tokens are generated the oldest chunk of the recent ones is merged
as soon as there are `chunk` too many. With `during_prefill` the prompt itself is read that way, and no whole cache is
ever made: `paged.decoder(chelsea(keep=0.25, during_prefill=True))`.

The paper's text was not at hand: schedule and weighting are reconstructions.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlab.cache.chelsea_merging import compress, kept, schedule
from jaxlab.cache.entries import (
  PAGE,
  Entries,
  attend_centroids,
  attend_entries,
  attend_parts,
  require_whole_context,
)
from jaxlab.core.checks import require
from jaxlab.kernels.paged_attention import combine, gpu
from jaxlab.models import paged
from jaxlab.models.compaction import Compaction, Compactor
from jaxlab.models.inference import Network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
  """The cache of one layer: centroids (batch, kv_heads, places, ...), first and recent tokens as they were.

  `used` places of a row's centroids are taken, `filled` of its recent ones.
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
  rounds: int | None = None,
  size_bias: bool = True,
  skip_layers: tuple[int, ...] = (),
  during_prefill: bool = False,
  most: int | None = None,
  merging: Callable[..., Entries] = compress,
  implementation: str | None = None,
) -> paged.Method:
  """The method for the tokens after a prompt (`paged.decoder(..., decode=)`); one token a step.

  Args:
    keep: share of the entries that stays; 1 keeps all.
    chunk: tokens that are merged among themselves.
    sink, recent: first and last tokens that stay as they are.
    rounds: of merging, None: as few as it takes (`schedule`).
    size_bias: False gives every centroid the weight of one token.
    skip_layers: layers whose cache stays whole.
    during_prefill: the method reads the prompt too, `chunk` tokens at a time, and merges behind itself: what a later
      part of the prompt sees of an earlier one is centroids. The cache is never whole.
    most: centroids that a head has at most, for a cache that does not grow: where more would come, one more round, of
      half, is run on those there are. None: any number.
    merging: (entries, keep=, chunk=, rounds=, count=) -> at most `kept(n, keep, chunk, rounds)` entries in the place
      of n, for one head, exactly where `count` is None. Otherwise n is `count`, an array: they lie in the first places,
      and empty places may follow what is returned.
    implementation: of a token's attention over the centroids, as in `kernels.paged_attention`; None: its kernel on a
      GPU, `attend_entries` elsewhere.

  Raises:
    InputError: sizes out of range.
  """
  schedule(chunk, keep, chunk, rounds)
  require(sink >= 0 and recent >= 0, f"sink is {sink} and recent {recent}; both must be at least 0")
  budget = lambda layer: dict(keep=1.0 if layer in skip_layers else keep, chunk=chunk, rounds=rounds)
  if most is not None:
    one = kept(chunk, 1.0 if skip_layers else keep, chunk, rounds)
    least = next(n for n in range(one, 4 * (one + chunk)) if kept(n, 0.5, chunk) + one <= n)
    require(most >= least, f"most is {most}; half of it and a merged chunk must fit, take at least {least}")

  def by_head(entries: Entries, count, **how) -> Entries:
    """Every row is merged as if it were alone: by its own number of entries, where it is given."""
    one = lambda e, n: merging(e, count=n, **how)
    return jax.vmap(jax.vmap(one, (0, None)), (0, None if count is None else 0))(entries, count)

  halve = functools.partial(by_head, keep=0.5, chunk=chunk, rounds=None)

  def squeeze(layer: int, entries: Entries, count=None) -> Entries:
    return by_head(entries, count, **budget(layer))

  def empty(config, *, batch, capacity, page, dtype):
    require_whole_context(config, capacity)
    if not during_prefill:
      return ()
    blank = jnp.zeros(batch, jnp.int32)

    def part(places: int) -> Entries:
      shape = (batch, config.kv_heads, places)
      zeros = lambda: jnp.zeros((*shape, config.head_dim), dtype)
      return Entries(zeros(), zeros(), jnp.zeros(shape, jnp.float32))

    def layer(i):
      places = max(0, capacity - sink - recent) // chunk * kept(chunk, **budget(i))
      places = places if most is None else min(places, most)
      return Layer(part(_whole_pages(places)), part(sink), part(recent + 2 * chunk), blank, blank)

    return tuple(map(layer, range(config.depth)))

  def ready(network: Network, state: paged.State, time: int) -> paged.State:
    if during_prefill:
      return state
    capacity = state.table.shape[1] * state.page
    chunks = max(0, (time - sink - recent) // chunk)  # of the longest row, all that are merged at once
    later = -(-(capacity - time) // chunk)
    taken = jnp.clip((state.length - sink - recent) // chunk, 0, chunks)

    def layer(i, pair):
      keys, values = (paged.rows(pool, state.table) for pool in pair)
      valid = lambda place, end: jnp.broadcast_to((place < end)[:, None], (len(end), keys.shape[1], place.shape[-1]))

      def part(size, cut) -> Entries:
        """Places that are cut out of the row, those past its end as zeros: pages may hold anything there."""
        real = lambda a: jnp.where((size > 0)[..., None], a, 0)
        return Entries(real(cut(keys)), real(cut(values)), size.astype(jnp.float32))

      place = jnp.arange(chunks * chunk)
      body = part(valid(place, (taken * chunk)[:, None]), lambda a: a[:, :, sink : sink + chunks * chunk])
      body = squeeze(i, body, taken * chunk)
      own = [kept(n * chunk, **budget(i)) for n in range(chunks + 1)]  # of rows with n chunks
      used = jnp.array(own, jnp.int32)[taken]
      while most is not None and max(own) > most:
        less = _resized(halve(body, used), body.size.shape[2])
        body = _of_rows(used > most, less, body)
        own = [kept(n, 0.5, chunk) if n > most else n for n in own]
        used = jnp.array(own, jnp.int32)[taken]
      places = max(own) + later * kept(chunk, **budget(i))
      body = _resized(_resized(body, max(own)), _whole_pages(places if most is None else min(places, most)))
      first = part(valid(jnp.arange(sink), state.length[:, None]), lambda a: a[:, :, :sink])
      begin = sink + taken * chunk
      filled = jnp.maximum(state.length - begin, 0)
      window = jnp.arange(recent + chunk)
      at = jnp.minimum(begin[:, None] + window, capacity - 1)
      gather = lambda a: jnp.take_along_axis(a, at[:, None, :, None], axis=2)
      return Layer(body, first, part(valid(window, filled[:, None]), gather), used, filled)

    memory = tuple(layer(i, pair) for i, pair in enumerate(state.pools))
    return dataclasses.replace(state, pools=(), memory=memory)

  def by_kernel(q, body: Entries) -> bool:
    usable = jax.default_backend() == "gpu" and gpu.supports(q, body.keys[0, :, :PAGE])
    return q.shape[1] == 1 and body.size.shape[2] > 0 and (usable or implementation is not None)

  def in_parts(q, layer: Layer, see):
    """The centroids by the kernel, and beside them the few first and recent tokens."""
    first, places = layer.sink.size.shape[2], layer.recent.size.shape[2]
    rest = jnp.concatenate([see[..., :first], see[..., -places:]], axis=2)
    parts = (
      attend_centroids(q, layer.body, layer.used, size_bias=size_bias, implementation=implementation),
      attend_parts(q, (layer.sink, layer.recent), size_bias, rest),
    )
    out, total = (jnp.stack([part[i][:, 0] for part in parts], axis=1) for i in range(2))
    return combine(out, total)[0][:, None]

  def attend(q, k, v, view: paged.View, memory):
    if not memory:  # the prompt
      return paged.attend_densely(q, k, v, view, memory)
    time = q.shape[1]
    require(time == 1 or during_prefill, f"{time} tokens at once; a merged cache takes one after the other")
    start = jnp.broadcast_to(view.start, view.lengths.shape)
    end = jnp.minimum(view.lengths, start + time)

    def some(layer: Layer, part):
      """The next tokens of every row, as many as are in `part`."""
      (q, k, v), begin = part
      layer, see = _append(layer, k, v, begin, end)
      if by_kernel(q, layer.body):
        out = in_parts(q, layer, see)
      else:
        out = attend_entries(q, layer.sink, layer.body, layer.recent, size_bias=size_bias, see=see)
      mine = functools.partial(squeeze, view.layer)
      return _merge_oldest(layer, recent + chunk, chunk, mine, halve, most), out

    size = min(chunk, time)
    pad = lambda a: jnp.pad(a, ((0, 0), (0, -time % size), (0, 0), (0, 0)))
    parts = jax.tree.map(lambda a: jnp.stack(jnp.split(pad(a), -(-time // size), axis=1)), (q, k, v))
    begins = start + size * jnp.arange(-(-time // size))[:, None]
    mine, out = jax.lax.scan(some, memory[view.layer], (parts, begins), unroll=time == size)
    out = jnp.concatenate([*out], axis=1)[:, :time]
    return out, (*memory[: view.layer], mine, *memory[view.layer + 1 :])

  def plan(prompt: int):
    """As `ready` and `attend` do it: all whole chunks of the prompt at once, later every chunk that is full."""
    begin = max(0, prompt - sink - recent) // chunk * chunk
    used, each = kept(begin, keep, chunk, rounds), kept(chunk, keep, chunk, rounds)
    if used < begin:
      yield Compaction(prompt, sink, begin, used, begin)
    if each == chunk:
      return
    for end in itertools.count(sink + recent + begin + chunk, chunk):
      yield Compaction(end, sink + used, chunk, each, chunk)
      used += each

  def compact(keys, values, size):
    made = merging(Entries(keys, values, size), keep=keep, chunk=chunk, rounds=rounds)
    return made if size_bias else made._replace(size=jnp.ones_like(made.size))

  uniform = not (skip_layers or during_prefill or most)
  in_pages = Compactor(plan, compact) if uniform else None
  return paged.Method(attend, empty=empty, ready=ready, pooled=not during_prefill, in_pages=in_pages)


def _whole_pages(places: int) -> int:
  return -(-places // PAGE) * PAGE


def _resized(entries: Entries, places: int) -> Entries:
  """With the first `places` places, empty ones where there are fewer."""
  fit = lambda a: jnp.pad(
    a[:, :, :places], ((0, 0), (0, 0), (0, max(0, places - a.shape[2])), *[(0, 0)] * (a.ndim - 3))
  )
  return jax.tree.map(fit, entries)


def _of_rows(rows, new, old):
  """The arrays of `new` in these rows, those of `old` in the others."""
  return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (b.ndim - 1)), a.astype(b.dtype), b), new, old)


def _append(layer: Layer, keys, values, begin: Int[Array, "batch"], end) -> tuple[Layer, Array]:
  """(with the tokens (batch, time, kv_heads, head_dim) at positions begin, begin + 1, ... before end, among the
  first or behind the recent ones; bool[batch, time, entries]: which of first, body and recent each sees)."""
  first, body, places = (part.size.shape[2] for part in (layer.sink, layer.body, layer.recent))
  batch, time, heads, _ = keys.shape
  position = begin[:, None] + jnp.arange(time)
  oldest = jnp.maximum(begin, first) - layer.filled  # position of the first of the recent ones
  real = position < end[:, None]
  index = (jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None])
  moved = lambda a: jnp.swapaxes(a, 1, 2)
  new = Entries(moved(keys), moved(values), jnp.ones((batch, heads, time), jnp.float32))

  def put(part: Entries, at) -> Entries:
    return jax.tree.map(lambda a, b: a.at[(*index, at[:, None])].set(b.astype(a.dtype), mode="drop"), part, new)

  sink = put(layer.sink, jnp.where(real, position, first))
  recent = put(layer.recent, jnp.where(real & (position >= first), position - oldest[:, None], places))
  added = (real & (position >= first)).sum(axis=1, dtype=jnp.int32)
  until = lambda count, last: jnp.arange(count) <= last[..., None]
  see = [until(first, position), jnp.ones((batch, time, body), bool), until(places, position - oldest[:, None])]
  layer = dataclasses.replace(layer, sink=sink, recent=recent, filled=layer.filled + added)
  return layer, jnp.concatenate(see, axis=2)


def _merge_oldest(layer: Layer, length: int, chunk: int, squeeze, halve, most: int | None) -> Layer:
  """Rows with `length` recent tokens or more have their oldest chunk merged into the body, which is halved before where
  it would get more than `most` entries."""
  full = layer.filled >= length
  oldest = lambda: jax.tree.map(lambda a: a[:, :, :chunk], layer.recent)
  merged = jax.eval_shape(squeeze, oldest())
  count = merged.size.shape[2]

  def move(recent: Entries):
    shift = lambda a: jnp.concatenate([a[:, :, chunk:], jnp.zeros_like(a[:, :, :chunk])], axis=2)
    new = jax.tree.map(lambda a, like: a.astype(like.dtype), squeeze(oldest()), layer.body)
    return new, _of_rows(full, jax.tree.map(shift, recent), recent)

  def stay(recent: Entries):
    return jax.tree.map(lambda a, like: jnp.zeros(a.shape, like.dtype), merged, layer.body), recent

  # The body is no part of the branches, which would copy it.
  new, recent = jax.lax.cond(full.any(), move, stay, layer.recent)

  def write(body, new, at, full):
    old = jax.lax.dynamic_slice_in_dim(body, at, count, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(body, jnp.where(full, new, old), at, axis=1)

  body, used = layer.body, layer.used
  if most is not None:
    over = full & (used + count > most)
    body, used = jax.lax.cond(over.any(), functools.partial(_halved, over, halve, most), lambda *a: a, body, used)
  if body.size.shape[2] >= count:  # a row that has room for no merged chunk never has one
    body = jax.tree.map(lambda a, b: jax.vmap(write)(a, b, used, full), body, new)
  moved = lambda a, by: a + jnp.where(full, by, 0)
  return dataclasses.replace(
    layer, body=body, recent=recent, used=moved(used, count), filled=moved(layer.filled, -chunk)
  )


def _halved(rows, halve, most: int, body: Entries, used):
  """The body with the first `most` places of these rows halved, and how many places of all rows are then used."""
  places = body.size.shape[2]
  merged = halve(jax.tree.map(lambda a: a[:, :, :most], body), None)
  count = merged.size.shape[2]
  return _of_rows(rows, _resized(merged, places), body), jnp.where(rows, count, used)
