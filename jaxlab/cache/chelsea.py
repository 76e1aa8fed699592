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
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.kernels.paged_attention import combine, gpu, paged_attention
from jaxlab.models import paged
from jaxlab.models.compaction import Compaction, Compactor
from jaxlab.models.inference import Network

PARTITIONS = ("alternating", "halves", "random")
LIKENESS = ("cosine", "neighbours", "chance")
PAGE = 64  # centroids that the kernel reads at once


class Entries(NamedTuple):
  """Keys and values (..., n, head_dim) and how many tokens each stands for, float32 (..., n); 0: an empty place."""

  keys: Array
  values: Array
  size: Array


def schedule(entries: int, keep: float, chunk: int, rounds: int | None = None) -> list[tuple[int, int]]:
  """(entries of a chunk, how many of them go) of every round that leaves the share `keep` of `entries`.

  A round removes at most half: ceil(log2(1 / keep)) rounds of the same ratio, each on chunks of what is left.

  Args:
    rounds: more than these; with few of them every entry that proposes is merged, however unlike its partner is.

  Raises:
    InputError: keep outside 0 < keep <= 1, a chunk under 2, or fewer rounds than it takes.
  """
  require(0 < keep <= 1, f"keep is {keep}; it must lie in 0 < keep <= 1")
  require(chunk >= 2, f"chunk is {chunk}; entries are paired, so it must be at least 2")
  least = math.ceil(math.log2(1 / keep) - 1e-9)
  rounds = least if rounds is None else rounds
  require(
    rounds >= least, f"rounds is {rounds}; to keep {keep} it takes at least {least}, as each removes half at most"
  )
  ratio, made = keep ** (1 / max(rounds, 1)), []
  for _ in range(rounds):
    size = min(chunk, entries) // 2 * 2
    if size == 0:
      break
    removed = min(round((1 - ratio) * size), size // 2)
    made.append((size, removed))
    entries -= entries // size * removed
  return made


def kept(entries: int, keep: float, chunk: int, rounds: int | None = None) -> int:
  """Entries that `compress` leaves."""
  for size, removed in schedule(entries, keep, chunk, rounds):
    entries -= entries // size * removed
  return entries


def soft_match(
  keys: Float[Array, "c head_dim"],
  size: Float[Array, "c"],
  removed: int,
  *,
  partition: str = "alternating",
  likeness: str = "cosine",
) -> Int[Array, "c"]:
  """Where every entry of a chunk goes: rows 0 .. c - removed - 1, in the order of time.

  Each entry at an even offset proposes to the one at an odd offset whose key has the largest cosine with its own; the
  `removed` best proposals are accepted. Of equal ones the first. Empty places pair among themselves, before all others.

  Args:
    partition: "alternating", or for comparison "halves": the first half proposes to the second, "random": one half
      drawn by chance to the other.
    likeness: "cosine", or for comparison "neighbours": of the entries that lie as near as any, "chance": any.
  """
  c = len(keys)
  order = jax.random.permutation(jax.random.key(c), c) if partition == "random" else jnp.arange(c)
  a, b = (order[0::2], order[1::2]) if partition == "alternating" else (order[: c // 2], order[c // 2 :])
  unit = keys.astype(jnp.float32)
  unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
  alike = jnp.matmul(unit[a], unit[b].T, precision=jax.lax.Precision.HIGHEST)
  if likeness == "neighbours":
    away = jnp.abs(a[:, None] - b)
    alike = jnp.where(away == away.min(axis=1, keepdims=True), alike, -1.5)
  elif likeness == "chance":
    alike = jax.random.uniform(jax.random.key(0), alike.shape)
  full = size > 0
  alike = jnp.where(full[a][:, None] == full[b], jnp.where(full[a][:, None], alike, 2.0), -jnp.inf)
  best = jnp.argmax(alike, axis=1)
  _, chosen = jax.lax.top_k(jnp.max(alike, axis=1), removed)
  gone = jnp.zeros(c, bool).at[a[chosen]].set(True)
  row = jnp.cumsum(~gone) - 1
  return jnp.where(gone, row[jnp.zeros(c, jnp.int32).at[a].set(b[best])], row)


def merge(entries: Entries, row: Int[Array, "c"], count: int, *, rescale: bool = False) -> Entries:
  """The means of the entries that go to the same of `count` rows, weighted by their sizes; sizes add up.

  Args:
    rescale: keys get the mean length of those they stand for; a mean is shorter. Values stay means.
  """
  weight = jnp.where(row == jnp.arange(count)[:, None], entries.size, 0.0)
  total = weight.sum(axis=1)
  share = weight / jnp.maximum(total, 1e-30)[:, None]
  # An empty place may hold what is not a number.
  full = (entries.size > 0)[:, None]
  mean = lambda a: jnp.matmul(share, jnp.where(full, a, 0).astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
  keys = mean(entries.keys)
  if rescale:
    length = lambda a: jnp.linalg.norm(a.astype(jnp.float32), axis=1, keepdims=True)
    keys = keys * mean(length(entries.keys)) / jnp.maximum(length(keys), 1e-12)
  return Entries(keys.astype(entries.keys.dtype), mean(entries.values).astype(entries.values.dtype), total)


def error_bound(q: Float[Array, "queries head_dim"], before: Entries, after: Entries, row: Int[Array, "n"]):
  """The most that merging moves the attention of every query, float32[queries].

    |o' - o| <= (exp(2 eps) - 1) max_i |v_i|,   eps = max_i |q . (k_i - k'_row(i))| / sqrt(d),

  as every entry's weight changes by a factor between exp(-2 eps) and exp(2 eps). It holds for one head, attention by
  `attend_entries`, and centroids that are means: of entries before that stand for one token each.

  Args:
    row: where in `after` every entry of `before` went, as `soft_match` says.
  """
  moved = jnp.einsum("qd,nd->qn", q, before.keys - after.keys[row], precision=jax.lax.Precision.HIGHEST)
  eps = jnp.abs(moved).max(axis=1) / math.sqrt(q.shape[1])
  return jnp.expm1(2 * eps) * jnp.linalg.norm(before.values, axis=1).max()


def compress(
  entries: Entries,
  *,
  keep: float,
  chunk: int,
  rounds: int | None = None,
  partition: str = "alternating",
  likeness: str = "cosine",
  rescale: bool = False,
) -> Entries:
  """`kept(n, keep, chunk, rounds)` entries in the place of n, for one head: every round merges within chunks.

  Entries that fill no chunk pass through a round. The options are those of `soft_match` and of `merge`.

  Raises:
    InputError: an unknown option.
  """
  require_choice("partition", partition, PARTITIONS)
  require_choice("likeness", likeness, LIKENESS)
  for size, removed in schedule(len(entries.size), keep, chunk, rounds):
    whole = len(entries.size) // size * size
    parts = jax.tree.map(lambda a: a[:whole].reshape(-1, size, *a.shape[1:]), entries)  # noqa: B023 (used at once)
    match = functools.partial(soft_match, removed=removed, partition=partition, likeness=likeness)
    rows = jax.vmap(match)(parts.keys, parts.size)
    merged = jax.vmap(functools.partial(merge, count=size - removed, rescale=rescale))(parts, rows)
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), merged)
    entries = jax.tree.map(lambda a, b: jnp.concatenate([a, b[whole:]]), flat, entries)  # noqa: B023
  return entries


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
  return _attend(q, parts, size_bias, see)[0]


def _attend(q, parts: tuple[Entries, ...], size_bias: bool, see):
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
    merging: (entries, keep=, chunk=, rounds=) -> `kept(n, keep, chunk, rounds)` entries in the place of n, for one
      head.
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
  halve = lambda entries: jax.vmap(jax.vmap(functools.partial(merging, keep=0.5, chunk=chunk, rounds=None)))(entries)

  def squeeze(layer: int, entries: Entries) -> Entries:
    return jax.vmap(jax.vmap(functools.partial(merging, **budget(layer))))(entries)

  def empty(config, *, batch, capacity, page, dtype):
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
      body = squeeze(i, body)
      while most is not None and body.size.shape[2] > most:
        body = halve(body)
      taken_up = body.size.shape[2]
      places = taken_up + later * kept(chunk, **budget(i))
      room = _whole_pages(places if most is None else min(places, most)) - taken_up
      body = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, room), *[(0, 0)] * (a.ndim - 3))), body)
      first = part(valid(jnp.arange(sink), state.length[:, None]), lambda a: a[:, :, :sink])
      begin = sink + taken * chunk
      filled = jnp.maximum(state.length - begin, 0)
      window = jnp.arange(recent + chunk)
      at = jnp.minimum(begin[:, None] + window, capacity - 1)
      gather = lambda a: jnp.take_along_axis(a, at[:, None, :, None], axis=2)
      used = jnp.full(len(taken), taken_up, jnp.int32)
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
      _attend(q, (layer.sink, layer.recent), size_bias, rest),
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
  choose = lambda new, old: jnp.where(full.reshape(-1, *[1] * (new.ndim - 1)), new, old)
  oldest = lambda: jax.tree.map(lambda a: a[:, :, :chunk], layer.recent)
  merged = jax.eval_shape(squeeze, oldest())
  count = merged.size.shape[2]

  def move(recent: Entries):
    shift = lambda a: jnp.concatenate([a[:, :, chunk:], jnp.zeros_like(a[:, :, :chunk])], axis=2)
    new = jax.tree.map(lambda a, like: a.astype(like.dtype), squeeze(oldest()), layer.body)
    return new, jax.tree.map(lambda a: choose(shift(a), a), recent)

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
  merged = halve(jax.tree.map(lambda a: a[:, :, :most], body))
  count = merged.size.shape[2]
  fill = lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, places - count), *[(0, 0)] * (a.ndim - 3)))
  mine = lambda new, old: jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), fill(new).astype(old.dtype), old)
  return jax.tree.map(mine, merged, body), jnp.where(rows, count, used)
