"""ChunkLLM: trained adapters choose which chunks of the past are read, anew where a chunk ends (arXiv 2510.02361).

  adapters = ChunkAdapters(config, key)                                  # `chunkllm_training` trains them
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(chunkllm(adapters, keep=0.4)))

The chunk adapter reads the first layer's output h of every token: sigmoid(w . h + b) is the probability that the token
ends a chunk. The QK adapters of layer l compress the heads of its query, and those of the key of a chunk's last token,

  qa = W2 silu(W1 q),  ka = W2' silu(W1' k),  s[c] = qa . ka[c] / sqrt(width),

before RoPE, as content has no position. A token attends to the first `sink` tokens, the chunks that its layer chose,
those of its own chunk so far and at least the last `local` ones. Keys stay where they are, at their positions. Where a
chunk ends the layers choose anew, for the tokens after it: the ceil(keep * chunks) of the largest score, the later of
equal ones, the chunk that just ended always among them. All keys stay in memory: what falls is what is read. The
paper's text was not at hand: sizes, the key that stands for a chunk and the settings of training are reconstructions.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.attention.chunkllm_chunks import (
  ChunkAdapters,
  chunk_ends,
  chunk_ids,
  chunk_mass,
  chunk_means,
  chunk_scores,
  chunk_table,
  pick_chunks,
  require_fit,
  without_maps,
)
from jaxlab.attention.chunkllm_prefill import attend_chosen, choices
from jaxlab.attention.compact_attention import page_table
from jaxlab.core.checks import require, require_choice, require_counts, require_divides
from jaxlab.models import paged
from jaxlab.models.generate import Decoder
from jaxlab.models.inference import Network

CHOICES = ("adapters", "raw", "oracle", "random", "ends")
CROSS_LAYER = ("per_layer", "vote")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
  """What is gathered while a prompt is read: logits of the ends (batch, capacity); queries of the last token (layers,
  batch, q_heads, head_dim) after RoPE, or what adapters read in their place; where that is not in the cache, the same
  of all tokens (layers, batch, capacity, 1, width)."""

  ends: Array
  queries: Array
  hidden: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
  """What decoding keeps.

  Attributes:
    ids: int32[batch, capacity], the chunk of every token; count: int32[batch], chunks that ended; begin: int32[batch],
      where the open one begins.
    keys: float32[layers, batch, chunks, size], ka of those that ended.
    table: int32[layers, batch, places], the units of `grain` tokens that are read, in order; used: int32[layers,
      batch], how many; the last holds the last token.
    token: (end's logit (batch,), queries after RoPE (layers, batch, q_heads, head_dim)) of the last token, and what
      would stand for its chunk if that ended with it (layers, batch, kv_heads, head_dim).
    mass: what the oracle saw of the chunks, (layers, batch, chunks), or None.
    gone: bool[layers, batch, chunks], those that will never be read again, or None.
    attended: int32[layers, batch], tokens that the last token attended to.
    retained: float32[batch], sum over the tokens since the prompt of the layers' mean attended / position;
      tokens: their number.
  """

  ids: Array
  count: Array
  begin: Array
  keys: Array
  table: Array
  used: Array
  token: tuple[Array, Array, Array]
  mass: Array | None
  gone: Array | None
  attended: Array
  retained: Array
  tokens: Array


def retention(state: paged.State) -> Float[Array, "batch"]:
  """Share of the tokens so far that a token since the prompt attended to, mean over tokens and layers; NaN of none."""
  return state.memory.retained / state.memory.tokens


def chunkllm(
  adapters: ChunkAdapters,
  *,
  keep: float = 0.4,
  most: int | None = None,
  sink: int = 4,
  local: int = 64,
  threshold: float = 0.5,
  min_chunk: int = 4,
  max_chunk: int = 128,
  cross_layer: str = "per_layer",
  choose: str = "adapters",
  every_token: bool = False,
  evict: bool = False,
  sparse_prefill: bool = False,
  grain: int | None = None,
  splits: int | None = None,
  implementation: str | None = None,
) -> paged.Method:
  """The method for a paged cache. It must read the prompt itself: as the `decode` of a `paged.decoder` behind
  another method it would know neither where chunks of the prompt end nor its last queries.

  Layers with a window of their own keep to that. Adapters of a large model are better arguments of a program than
  constants in it: make the method inside the program, for `paged.prefill` and `paged.step`.

  Args:
    keep, most: ceil(keep * chunks) are chosen, at most `most`; None: any number.
    threshold: probability above which a token ends a chunk; at 1 every chunk is `max_chunk` long (FixLLM).
    cross_layer: "per_layer", or "vote": all layers read the chunks that most of them choose.
    choose: "adapters"; or for comparison "raw" (the products of queries and keys themselves, mean over the heads, which
      takes no distillation), "oracle" (true attention, read for every token), "random", or "ends": no chunk but the
      last token of each, as SepLLM reads its separators, where the chunk adapter has learnt those and min_chunk is 1.
    every_token: the layers choose anew for every token, not only where a chunk ends.
    evict: a chunk that a layer does not choose it never reads again, so that its keys and values could be given up.
    sparse_prefill: the prompt, read as one chunk of the decoder, is sparse as well (`chunkllm_prefill`).
    grain: chunks are rounded out to this many tokens, a divisor of the page; 1 is exact, None the whole page, which
      the kernel reads fastest. What is read in excess is attended to and counted.
    splits, implementation: as in `kernels.paged_attention`.

  Raises:
    InputError: sizes out of range, an unknown choice; a network of one layer, or of other sizes than the adapters'.
  """
  require(0 < keep <= 1, f"keep is {keep}; it must lie in 0 < keep <= 1")
  require(0 <= threshold <= 1, f"threshold is {threshold}; it must be a probability, 0 to 1")
  require(sink >= 0, f"sink is {sink}; it must be at least 0")
  require_counts(min_chunk=min_chunk, local=local)
  require(max_chunk >= min_chunk, f"max_chunk is {max_chunk}; it must be at least min_chunk={min_chunk}")
  require(most is None or most >= 1, f"most is {most}; choose at least 1 chunk, or give None for any number")
  require_choice("cross_layer", cross_layer, CROSS_LAYER)
  require_choice("choose", choose, CHOICES)
  own = cross_layer == "per_layer" and choose == "adapters"
  require(not sparse_prefill or own, "sparse_prefill is for layers that choose by their adapters, each for itself")
  require(not evict or (choose != "ends" and cross_layer == "per_layer"), "evict is for layers that choose chunks")
  require(choose != "oracle" or adapters.reads != "hidden", "the oracle needs queries; let the adapters read those")
  adapters = without_maps(adapters) if choose == "raw" else adapters
  limit = math.log(threshold / (1 - threshold)) if 0 < threshold < 1 else math.inf * (2 * threshold - 1)

  def empty(config, *, batch, capacity, page, dtype):
    require_fit(adapters, config)
    require_divides("grain", grain or page, "page", page)
    zeros = lambda *shape: jnp.zeros((config.depth, batch, *shape), dtype)
    ends = jnp.zeros((batch, capacity), jnp.float32)
    if adapters.reads == "hidden":
      return Prompt(ends, zeros(1, config.width), zeros(capacity, 1, config.width))
    return Prompt(ends, zeros(config.q_heads, config.head_dim))

  def read(q, k, v, view: paged.View, memory: Prompt):
    """A part of the prompt."""
    ends, place = memory.ends, (view.lengths - 1 - view.start)[:, None]
    if view.layer == 1:
      ends = jax.lax.dynamic_update_slice(ends, adapters.ends(view.x), (0, view.start))
    inside, (asked, told) = (place >= 0) & (place < q.shape[1]), adapters.inputs(q, k, view.x)
    last = jnp.take_along_axis(asked, jnp.clip(place, 0, q.shape[1] - 1)[..., None, None], axis=1)[:, 0]
    queries = memory.queries.at[view.layer].set(jnp.where(inside[..., None], last, memory.queries[view.layer]))
    hidden = memory.hidden
    if hidden is not None:
      hidden = jax.lax.dynamic_update_slice(hidden, told[None], (view.layer, 0, view.start, 0, 0))
    memory = Prompt(ends, queries, hidden)
    if not sparse_prefill or view.layer == 0 or view.window is not None:
      return paged.attend_densely(q, k, v, view, memory)
    size = functools.partial(chunk_ends, min_chunk=min_chunk, max_chunk=max_chunk)
    ended = jax.vmap(size)(ends[:, : q.shape[1]] > limit, view.lengths)
    ids, chunks = chunk_ids(ended), max(1, q.shape[1] // min_chunk)
    final, _ = jax.vmap(functools.partial(chunk_table, chunks=chunks))(ended)
    chosen = choices(adapters, asked, told, ids, final, view.layer, keep=keep, most=most)
    return attend_chosen(q, k, v, ids, chosen, sink=sink, local=local), memory

  def ready(network: Network, state: paged.State, time: int) -> paged.State:
    batch, capacity = state.memory.ends.shape
    layers, chunks, unit = len(network.blocks), max(1, capacity // min_chunk), grain or state.page
    size = functools.partial(chunk_ends, min_chunk=min_chunk, max_chunk=max_chunk)
    ends = jax.vmap(size)(state.memory.ends > limit, state.length)
    last, count = jax.vmap(functools.partial(chunk_table, chunks=chunks))(ends)
    newest = jnp.take_along_axis(last, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    begin = jnp.where(count > 0, newest + 1, 0)
    mass, ids = None, chunk_ids(ends)
    found = jnp.stack([_contents(adapters, layer, state, ids, last, count) for layer in range(layers)])
    keys = adapters.keys(found[:, :, :chunks])
    span = lambda tokens: (tokens - 2) // unit + 2  # units that a stretch of tokens can touch
    places = capacity // unit
    if most is not None and choose != "ends":
      places = min(places, span(sink) + most * span(max_chunk) + span(local + max_chunk))
    if choose == "oracle":
      own = jnp.take_along_axis(ids, state.length[:, None] - 1, axis=1)
      see = functools.partial(chunk_mass, ids=ids, below=own, start=state.length - 1, chunks=chunks, sink=sink)
      windows = network.model.config.windows
      queries = state.memory.queries[:, :, None]
      seen = lambda i, pool: see(queries[i], paged.rows(pool, state.table), window=windows[i])[:, 0]
      mass = jnp.stack([seen(i, pool) for i, (pool, _) in enumerate(state.pools)])
    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    token = jnp.zeros(batch), state.memory.queries, found[:, :, chunks]
    table, used = zeros((layers, batch, places)), zeros((layers, batch))
    retained = jnp.zeros(batch)
    gone = jnp.zeros((layers, batch, chunks), bool) if evict else None
    memory = Chunks(ids, count, begin, keys, table, used, token, mass, gone, used, retained, jnp.int32(0))
    table, used, gone = _choose(memory, state.length - 1, unit)
    return dataclasses.replace(state, memory=dataclasses.replace(memory, table=table, used=used, gone=gone))

  def attend(q, k, v, view: paged.View, memory):
    if isinstance(memory, Prompt):
      return read(q, k, v, view, memory)
    require(q.shape[1] == 1, f"{q.shape[1]} tokens at once; chunks are chosen token after token")
    unit, i, rows, position = grain or view.keys.shape[2], view.layer, jnp.arange(len(q)), view.lengths - 1
    if i == 0:  # the token joins the open chunk, and its unit what is read
      new = position % unit == 0
      layers, _, places = memory.table.shape
      place = jnp.where(new, memory.used, places)
      table = memory.table.at[jnp.arange(layers)[:, None], rows, place].set(position // unit, mode="drop")
      ids = memory.ids.at[rows, position].set(memory.count)
      memory = dataclasses.replace(memory, ids=ids, table=table, used=memory.used + new)
    end, queries, keys = memory.token
    end = adapters.ends(view.x)[:, 0] if i == 1 else end
    asked, told = adapters.inputs(q, k, view.x)
    content = adapters.content(told, position[:, None])[:, 0]
    mean = keys[i][:, : content.shape[1]]  # the chunk's so far, where it is kept
    mean = mean + (content - mean) / (position - memory.begin + 1)[:, None, None]
    token = end, queries.at[i].set(asked[:, 0]), keys.at[i].set(adapters.joined(content, mean))
    if view.window is None:
      seen = (memory.used[i] - 1) * unit + position % unit + 1
      how = dict(splits=splits, implementation=implementation)
      out = attend_units(q, view, memory.table[i], memory.used[i], unit, **how)
    else:
      seen = jnp.minimum(view.window, position) + 1
      out, _ = paged.attend_densely(q, k, v, view, memory)
    memory = dataclasses.replace(memory, token=token, attended=memory.attended.at[i].set(seen))
    if choose == "oracle":
      where = dict(start=position, chunks=memory.mass.shape[2], sink=sink, window=view.window)
      mass = chunk_mass(q, paged.rows(view.keys, view.table), memory.ids, memory.count[:, None], **where)
      memory = dataclasses.replace(memory, mass=memory.mass.at[i].set(mass[:, 0]))
    return out, _close(memory, position, unit) if i == len(memory.keys) - 1 else memory

  def _close(memory: Chunks, position, unit: int) -> Chunks:
    """After a token's last layer: its chunk ends where it should, and the layers of those rows choose."""
    length = position - memory.begin + 1
    ended = (memory.token[0] > limit) & (length >= min_chunk) | (length >= max_chunk)
    begin = jnp.where(ended, position + 1, memory.begin)
    after = dataclasses.replace(memory, count=memory.count + ended, begin=begin)
    again = jnp.ones_like(ended) if every_token else ended

    def anew():
      made = adapters.keys(memory.token[2][:, :, None])
      chosen, before = _choose(after, position, unit), (memory.table, memory.used, memory.gone)
      mine = lambda a, b: jnp.where(again.reshape(-1, *[1] * (a.ndim - 2)), a, b)
      return made[:, :, 0], *jax.tree.map(mine, chosen, before)

    # One branch for all rows: under vmap both would run for every token.
    stay = lambda: (memory.keys[:, :, 0], memory.table, memory.used, memory.gone)
    made, table, used, gone = jax.lax.cond(again.any(), anew, stay)
    place = jnp.where(ended, memory.count, memory.keys.shape[2])
    keys = memory.keys.at[:, jnp.arange(len(ended)), place].set(made, mode="drop")
    share = (memory.attended / (position + 1)).mean(axis=0)
    how = dict(keys=keys, table=table, used=used, gone=gone)
    return dataclasses.replace(after, **how, retained=memory.retained + share, tokens=memory.tokens + 1)

  def _choose(memory: Chunks, position, unit: int):
    """The units that the tokens after `position` read, chosen by the queries of the last token: (table, used, gone).

    A chunk that ends with it has no key yet, and needs none.
    """
    layers, batch, chunks, _ = memory.keys.shape
    place, gone = jnp.arange(memory.ids.shape[1]), memory.gone
    if choose == "ends":
      last = (memory.ids != jnp.roll(memory.ids, -1, axis=1)) | (place == position[:, None])
      kept = jnp.broadcast_to(last, (layers, *memory.ids.shape))
    else:
      scores = _scores(memory, position)
      if gone is not None:
        scores = jnp.where(gone, -jnp.inf, scores)
      chosen = pick_chunks(scores, memory.count, keep=keep, most=most, vote=cross_layer == "vote")
      if gone is not None:
        gone |= ~chosen & (jnp.arange(chunks) < memory.count[:, None])
      ids = jnp.minimum(memory.ids, chunks - 1)
      kept = jnp.take_along_axis(chosen, jnp.broadcast_to(ids, (layers, *ids.shape)), axis=2)
    kept = kept & (place < memory.begin[:, None]) | (place < sink)
    kept |= place >= jnp.minimum(memory.begin, position + 2 - local)[:, None]
    wanted = kept.reshape(layers * batch, -1, unit).any(axis=2)
    end = jnp.tile(position // unit + 1, layers)[:, None]
    table, count = page_table(wanted, end, end)
    places = memory.table.shape[2]
    return table[:, :places].reshape(layers, batch, places), count[:, 1].reshape(layers, batch), gone

  def _scores(memory: Chunks, position):
    if choose == "oracle":
      return memory.mass
    layers, _, chunks, _ = memory.keys.shape
    if choose == "random":
      draw = lambda at: jax.random.uniform(jax.random.fold_in(jax.random.key(0), at), (layers, chunks))
      return jax.vmap(draw, out_axes=1)(position)
    queries = adapters.queries(adapters.content(memory.token[1][:, :, None], position[:, None]))
    return chunk_scores(queries, memory.keys)[:, :, 0]

  return paged.Method(attend, empty, ready, whole=sparse_prefill)


def _contents(adapters: ChunkAdapters, layer: int, state: paged.State, ids, last, count):
  """What stands for a prompt's chunks in a layer, and where means do, last of all for the open one.

  Returns:
    float32[batch, chunks + 1, heads, head_dim].
  """
  pool, hidden = state.pools[layer][0], state.memory.hidden
  last = jnp.pad(last, ((0, 0), (0, 1)))
  if hidden is not None:
    content = jnp.take_along_axis(hidden[layer], last[..., None, None], axis=1)
  else:
    pages = jnp.take_along_axis(state.table, last // state.page, axis=1)
    content = jnp.moveaxis(pool[:, pages, last % state.page], 0, 2)
  content = adapters.content(content, last)
  if adapters.stands == "last":
    return content
  keys = jnp.swapaxes(paged.rows(pool, state.table), 1, 2) if hidden is None else hidden[layer]
  means = chunk_means(adapters.content(keys, jnp.arange(keys.shape[1])), ids, state.length, last.shape[1])
  mine = jnp.take_along_axis(means, count[:, None, None, None], axis=1)
  return adapters.joined(content, jnp.concatenate([means[:, :-1], mine], axis=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(Network):
  """Adapters are arguments of every program, as the network is, not constants in it."""

  adapters: ChunkAdapters


@functools.cache
def decoder(*, chunk: int = 256, page: int = 64, **options) -> Decoder:
  """`chunkllm` for an `Adapted` network, as `paged.decoder`."""
  method = lambda network: chunkllm(network.adapters, **options)

  def prefill(network, prompts, lengths=None, *, capacity):
    how = dict(capacity=capacity, chunk=chunk, page=page, method=method(network))
    return paged.prefill(network, prompts, lengths, **how)

  def step(network, tokens, state):
    return paged.step(network, tokens, state, method=method(network))

  return Decoder(prefill, step)


def attend_units(q, view: paged.View, table, used, unit: int, **how):
  """Attention of one token a row over the units of `unit` tokens that a table names, read where they lie.

  Args:
    q: (batch, 1, q_heads, head_dim) at positions view.lengths - 1.
    table: int32[batch, places], used: int32[batch]: logical units of the row, the last one the token's own.
    how: `splits` and `implementation` of `kernels.paged_attention`.
  """
  kv_heads, pages, page, size = view.keys.shape
  each = page // unit  # units of a page
  physical = jnp.take_along_axis(view.table, table // each, axis=1) * each + table % each
  cut = lambda pool: pool.reshape(kv_heads, pages * each, unit, size)
  by_head = lambda a: jnp.repeat(a[:, None], kv_heads, axis=1)
  count = jnp.stack([used - 1, used], axis=1)
  pools = cut(view.keys), cut(view.values)
  out, _ = paged.attend_tables(q, *pools, by_head(physical), by_head(count), view.lengths - 1, **how)
  return out
