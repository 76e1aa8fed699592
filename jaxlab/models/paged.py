"""A key-value cache in pages, filled chunk by chunk: for long prompts, and for methods that read or keep less of it.

  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(chunk=512))           # dense attention
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(method, chunk=512))

A prompt is read `chunk` tokens at a time, which bounds the memory its reading takes; one program serves prompts of any
length up to the capacity. Pages are head-major: those of one head are contiguous rows, so that a kernel that is given a
table of pages reads them where they lie.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_divides
from jaxlab.models.compaction import Compactor
from jaxlab.models.generate import Decoder
from jaxlab.models.inference import Network, Pair, before_smear, last_of, run_layers

_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that the difference of two is no NaN
_KEYS = 512  # positions that `attend_pages` reads at once, at least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The cache of `batch` rows.

  Attributes:
    pools: keys (after RoPE and norm) and values of every layer, (kv_heads, pages, page, head_dim) each; or none,
      where the method keeps them.
    table: the pages of every row in the order of their positions.
    length: positions filled, of all rows or of each; what lies past them is never read.
    memory: what a method keeps of its own.
    previous: as in `inference.State`.
  """

  # Any: trees of shardings have this form too.
  pools: tuple[Pair, ...] | Any
  table: Int[Array, "batch pages_per_row"] | Any
  length: Int[Array, "*batch"] | Any
  memory: object
  previous: Float[Array, "batch 1 width"] | Any | None

  @property
  def page(self) -> int:
    """Positions of a page."""
    return self.pools[0][0].shape[2]


class View(NamedTuple):
  """What a layer's attention sees: its cache with the new tokens in it, and where they stand.

  Attributes:
    layer: its number; window: as in `AttentionFn`.
    keys, values: (kv_heads, pages, page, head_dim), or None where the pools were dropped; table: (batch,
      pages_per_row).
    start: position of the first new token, of all rows or of each.
    lengths: (batch,), the positions of every row that count, new tokens included; later ones are padding.
    x: the layer's input, (batch, time, width).
    tokens: the new tokens' ids, (batch, time).
  """

  layer: int
  window: int | None
  keys: Array
  values: Array
  table: Array
  start: Array
  lengths: Array
  x: Array
  tokens: Array | None = None


def attend_densely(q, k, v, view: View, memory):
  """Dense softmax attention over the pages: what `Method` is by default."""
  out, _ = attend_pages(q, view.keys, view.values, view.table, start=view.start, window=view.window)
  return out, memory


class Method(NamedTuple):
  """How new tokens meet the cache; hashable, as it is compiled into a program.

  Attributes:
    attend: (q, k, v, view, memory) -> (attention like q, memory); q, k, v are of the new tokens,
      (batch, time, heads, head_dim) after RoPE.
    empty: (config, batch=, capacity=, page=, dtype=) -> memory before the first token.
    ready: (network, state, time) -> state, once prompts of up to `time` tokens are read; it may drop the pools.
    whole: a prompt has to be read as one chunk.
    pooled: False where the method keeps all keys and values in its memory: no pools are made.
    in_pages: the same method for sequences that share pages, as `serving.Engine` has them; None: there is no such form.
  """

  attend: Callable = attend_densely
  empty: Callable = lambda config, **sizes: ()
  ready: Callable = lambda network, state, time: state
  whole: bool = False
  pooled: bool = True
  in_pages: Compactor | None = None


DENSE = Method()


def decoder(method: Method = DENSE, *, decode: Method | None = None, chunk: int = 512, page: int = 64) -> Decoder:
  """Generation over a paged cache (`jaxlab.models.generate`).

  Args:
    method: for the prompt and, without `decode`, for the tokens after it.
    decode: another method for the tokens after the prompt; it takes over with its `empty` and `ready`.
    chunk: tokens of a prompt that are read at once, a multiple of page.
    page: positions of a page.

  Raises:
    InputError: sizes below 1, or a page that does not divide the chunk.
  """
  require(chunk >= 1 and page >= 1, f"chunk is {chunk} and page {page}; both must be at least 1")
  require_divides("page", page, "chunk", chunk)
  return _decoder(method, decode or method, chunk, page)


@functools.cache
def _decoder(method: Method, after: Method, chunk: int, page: int) -> Decoder:
  how = dict(chunk=chunk, page=page, method=method, after=after)
  return Decoder(functools.partial(prefill, **how), functools.partial(step, method=after))


def empty_state(network: Network, *, batch: int, capacity: int, page: int = 64, method: Method = DENSE) -> State:
  """A cache with room for `capacity` tokens a row, whose pages lie row after row."""
  c, dtype = network.model.config, network.model.dtype
  each = -(-capacity // page)
  store = lambda: jnp.zeros((c.kv_heads, batch * each, page, c.head_dim), dtype)
  table = jnp.arange(batch * each, dtype=jnp.int32).reshape(batch, each)
  previous = jnp.zeros((batch, 1, c.width), dtype) if c.smear else None
  memory = method.empty(c, batch=batch, capacity=each * page, page=page, dtype=dtype)
  return State(
    tuple((store(), store()) for _ in network.blocks if method.pooled), table, jnp.int32(0), memory, previous
  )


def prefill(
  network: Network,
  prompts: Int[Array, "batch time"],
  lengths: Int[Array, "batch"] | None = None,
  *,
  capacity: int,
  chunk: int = 512,
  page: int = 64,
  method: Method = DENSE,
  after: Method | None = None,
) -> tuple[Float[Array, "batch 1 vocab"], State]:
  """`inference.prefill`, the prompt read chunk by chunk; chunks past the longest of `lengths` are not read.

  Args:
    after: the method that goes on from the returned state, by default the same.

  Raises:
    InputError: a prompt longer than the capacity, or than the chunk where the method reads it as one.
  """
  batch, time = prompts.shape
  require(
    time <= chunk or not method.whole,
    f"the prompt has {time} tokens, the chunk {chunk}; this method reads a prompt as one chunk: "
    f"give decoder a chunk of at least {-(-time // page) * page}",
  )
  prompts, lengths, chunk = in_chunks(prompts, lengths, capacity=capacity, chunk=chunk, unit=page)
  state = empty_state(network, batch=batch, capacity=max(capacity, prompts.shape[1]), page=page, method=method)
  ends, state = read(network, prompts, lengths, state, chunk=chunk, method=method)
  previous = before_smear(network.model, last_of(prompts, lengths))
  state = dataclasses.replace(state, length=lengths, previous=previous)
  if after is not None and after is not method:
    sizes = dict(batch=batch, capacity=state.table.shape[1] * page, page=page, dtype=network.model.dtype)
    state = dataclasses.replace(state, memory=after.empty(network.model.config, **sizes))
  return network.model.logits(*ends), (after or method).ready(network, state, time)


def in_chunks(prompts, lengths, *, capacity: int, chunk: int, unit: int):
  """(prompts padded to whole chunks, lengths, chunk), the chunk of no more units than the prompts fill.

  Raises:
    InputError: a prompt longer than the capacity.
  """
  batch, time = prompts.shape
  require(time <= capacity, f"the prompt has {time} tokens, the cache room for {capacity}; raise the capacity")
  lengths = jnp.full((batch,), time, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
  chunk = min(chunk, -(-time // unit) * unit)
  return jnp.pad(prompts, ((0, 0), (0, -time % chunk))), lengths, chunk


def read(
  network: Network,
  prompts: Int[Array, "batch time"],
  lengths: Int[Array, "batch"],
  state: State,
  *,
  chunk: int,
  method: Method,
  share: int | None = None,
  offset=0,
):
  """((output of the last layer, backout or None) at every row's last token, the state that has read the prompts).

  Args:
    share: tokens of every chunk that are read here, from its token `offset` on, by default all; the others' keys are
      another device's. A row whose last token is not read here has zeros for its outputs.
  """
  share, model = share or chunk, network.model
  blank = jnp.zeros_like(model.embed(prompts[:, :1])[0])
  ends = (blank, blank if model.config.backout else None)

  def one(i, carry):
    state, ends = carry
    start = i * chunk + offset
    tokens = jax.lax.dynamic_slice_in_dim(prompts, start, share, axis=1)
    previous = before_smear(model, jax.lax.dynamic_slice_in_dim(prompts, jnp.maximum(start - 1, 0), 1, axis=1))
    previous = None if previous is None else jnp.where(start > 0, previous, 0)
    state = dataclasses.replace(state, length=start, previous=previous)
    *found, state = hidden(network, tokens, state, lengths, method)
    at = lengths - start
    inside = (at >= 1) & (at <= share)
    column = inside.reshape(-1, *[1] * (blank.ndim - 1))
    choose = lambda new, old: jnp.where(column, last_of(new, jnp.clip(at, 1, share)), old)
    return state, jax.tree.map(choose, tuple(found), ends)

  state, ends = jax.lax.fori_loop(0, (jnp.max(lengths) + chunk - 1) // chunk, one, (state, ends))
  return ends, state


def step(
  network: Network, tokens: Int[Array, "batch time"], state: State, *, method: Method = DENSE
) -> tuple[Float[Array, "batch time vocab"], State]:
  """Logits of the next tokens and the state with them; the caller sees to it that they fit the pages.

  Raises:
    InputError: several tokens at a position that may not be the first, for a method that reads a prompt as one chunk;
      or tokens beyond the pages, unless a transformation hides how many there are.
  """
  behind = tokens.shape[1] == 1 or state.length.ndim == 1
  require(behind or not method.whole, "this method reads a prompt as one chunk: call prefill for it, then step")
  after = state.length + tokens.shape[1]
  if state.pools and not isinstance(after, jax.core.Tracer):
    room, most = state.table.shape[1] * state.page, int(np.max(after))
    require(most <= room, f"{most} tokens do not fit into pages for {room}; give more capacity")
  *found, state = hidden(network, tokens, state, jnp.broadcast_to(after, tokens.shape[:1]), method)
  return network.model.logits(*found), dataclasses.replace(state, length=after)


def hidden(network: Network, tokens, state: State, lengths, method: Method):
  """(output of the last layer, backout or None, state with the new tokens in its pages)."""
  model = network.model
  x, side, last = model.embed(tokens, state)
  pools, memory = list(state.pools), state.memory

  def attend(layer, block, x, q, k, v, window):
    nonlocal memory
    if pools:
      new = zip(pools[layer], (k, v), strict=True)
      pools[layer] = tuple(write(pool, a, state.table, side.start) for pool, a in new)
    pair = pools[layer] if pools else (None, None)
    view = View(layer, window, *pair, state.table, side.start, lengths, x, tokens)
    out, memory = method.attend(q, k, v, view, memory)
    return out

  x, backout = run_layers(network, x, side, attend)
  previous = last if model.config.smear else None
  return x, backout, dataclasses.replace(state, pools=tuple(pools), memory=memory, previous=previous)


def write(pool: Float[Array, "kv_heads pages page head_dim"], new, table, start):
  """The pool with `new` keys or values (batch, time, kv_heads, head_dim) at positions start, start + 1, ... of rows."""
  page = pool.shape[2]
  place = jnp.broadcast_to(jnp.asarray(start)[..., None] + jnp.arange(new.shape[1]), new.shape[:2])
  pages = jnp.take_along_axis(table, place // page, axis=1)
  return pool.at[:, pages, place % page].set(jnp.moveaxis(new, 2, 0).astype(pool.dtype))


def rows(pool: Float[Array, "kv_heads pages page head_dim"], table) -> Float[Array, "batch kv_heads capacity head_dim"]:
  """A copy of every row's keys or values in the order of their positions."""
  kv_heads, _, _, size = pool.shape
  return jnp.moveaxis(pool[:, table], 0, 1).reshape(table.shape[0], kv_heads, -1, size)


def attend_tables(q, keys, values, table, count, start, *, implementation: str | None = None, **how):
  """Attention over the pages of every group of heads by `kernels.paged_attention`, which has the other options.

  Args:
    q: (batch, time, q_heads, head_dim), at positions start, start + 1, ... of their rows.
    keys, values: (kv_heads, pages, page, head_dim).
    table: int32[batch, groups, capacity], numbers of pages; groups are of q_heads / groups heads each, a multiple of
      kv_heads. count: int32[batch, groups, 2]; start: int32[] or int32[batch].

  Returns:
    (attention like q; its log-sum-exp, float32[batch, time, q_heads]).
  """
  # Imported late: other kernels import their reference functions from this package.
  from jaxlab.kernels.paged_attention import paged_attention

  batch, time, heads, size = q.shape
  (kv_heads, pages), (groups, capacity) = keys.shape[:2], table.shape[1:]
  share = heads // groups
  flat = lambda a: a.reshape(kv_heads * pages, *a.shape[2:])
  head = jnp.arange(groups)[:, None] // (groups // kv_heads)
  rows = jnp.moveaxis(q.reshape(batch, time, groups, share, size), 2, 1)
  if how.get("sizes") is not None:
    how["sizes"] = flat(how["sizes"])
  out, total = paged_attention(
    rows.reshape(batch * groups, time * share, size),
    flat(keys),
    flat(values),
    (table + head * pages).reshape(batch * groups, capacity),
    count.reshape(batch * groups, 2),
    jnp.repeat(jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,)), groups),
    heads=share,
    implementation=implementation,
    **how,
  )
  back = lambda a: jnp.moveaxis(a.reshape(batch, groups, time, share, *a.shape[2:]), 1, 2).reshape(
    batch, time, heads, *a.shape[2:]
  )
  return back(out), back(total)


def kernel_takes(q, keys, window: int | None) -> bool:
  """Whether attention over pages is a kernel's here."""
  from jaxlab.kernels.paged_attention import gpu  # late, as in `attend_tables`

  return jax.default_backend() == "gpu" and window is None and gpu.supports(q, keys[0])


def attend_pages(q, keys, values, table, *, start, window: int | None = None, places=None, sizes=None):
  """Causal attention of new tokens over paged keys: by a kernel on a GPU, else some pages at a time, so that there is
  no score matrix of the whole context. Where the kernel is used there is no derivative.

  Args:
    q: (batch, time, q_heads, head_dim), at positions start, start + 1, ... of their rows.
    keys, values: (kv_heads, pages, page, head_dim); table: int32[batch, pages_per_row].
    start: int32[] or int32[batch]; window: as in `AttentionFn`.
    places: int32[batch, pages_per_row], position of the first entry of every page, ascending, for tables that leave
      pages out; these are not read by the kernel. By default pages follow each other.
    sizes: float32[kv_heads, pages, page], tokens that every entry stands for, numbers everywhere; None: one each.

  Returns:
    (attention like q; its log-sum-exp, float32[batch, time, q_heads]). Pages past the last position are not read.
    Tokens that see no page are zeros, and -inf.
  """
  batch, time, q_heads, size = q.shape
  kv_heads, _, page, _ = keys.shape
  start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,))
  if places is None and kernel_takes(q, keys, window):
    count = jnp.stack([start // page, (start + time - 1) // page + 1], axis=1)
    by_head = lambda a: jnp.repeat(a[:, None], kv_heads, axis=1)
    return attend_tables(q, keys, values, by_head(table), by_head(count), start, sizes=sizes)
  each = min(max(1, _KEYS // page), table.shape[1])
  groups = -(-table.shape[1] // each)
  if places is None:
    places = jnp.broadcast_to(page * jnp.arange(table.shape[1]), table.shape)
  last = start[:, None] + time - 1
  used = (jnp.max((places <= last).sum(axis=1)) + each - 1) // each
  fill = lambda a, value: jnp.pad(a, ((0, 0), (0, groups * each - a.shape[1])), constant_values=value)
  table, places = fill(table, 0), fill(places, jnp.iinfo(jnp.int32).max - page)
  query = (start[:, None] + jnp.arange(time))[:, None, None, :, None]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  grouped = q.reshape(batch, time, kv_heads, -1, size)

  def one(i, carry):
    o, m, l = carry  # noqa: E741 (the field's name)
    here, first = (jax.lax.dynamic_slice_in_dim(a, i * each, each, axis=1) for a in (table, places))
    read = lambda pool: pool[:, here].reshape(kv_heads, batch, each * page, size)
    key, value = read(keys), read(values)
    place = (first[..., None] + jnp.arange(page)).reshape(batch, -1)
    see = place[:, None, None, None] <= query
    if window is not None:
      see &= place[:, None, None, None] >= query - window
    # Pages may hold anything past a row's length, also what is not a number.
    value = jnp.where((place <= last)[None, :, :, None], value, 0)
    if sizes is not None:
      counts = jnp.swapaxes(sizes[:, here], 0, 1).reshape(batch, kv_heads, 1, 1, each * page)
      see &= counts > 0  # an empty entry's score must not be the largest
    score = jnp.einsum("btkgd,kbsd->bkgts", grouped, key, preferred_element_type=wide) / size**0.5
    score = jnp.where(see, score, _LOWEST)
    top = jnp.maximum(m, score.max(axis=-1))
    weight = jnp.where(see, jnp.exp(score - top[..., None]), 0)
    if sizes is not None:
      weight *= counts
    fade = jnp.exp(m - top)
    sums = jnp.einsum("bkgts,kbsd->bkgtd", weight.astype(value.dtype), value, preferred_element_type=wide)
    return fade[..., None] * o + sums, top, fade * l + weight.sum(axis=-1)

  shape = (batch, kv_heads, q_heads // kv_heads, time)
  carry = jnp.zeros((*shape, size), wide), jnp.full(shape, _LOWEST, wide), jnp.zeros(shape, wide)
  o, m, l = jax.lax.fori_loop(0, used, one, carry)  # noqa: E741
  some = l != 0  # also of keys that are no numbers
  safe = jnp.where(some, l, 1)
  out = jnp.moveaxis(o / safe[..., None], 3, 1).reshape(q.shape).astype(q.dtype)
  return out, jnp.moveaxis(jnp.where(some, m + jnp.log(safe), -jnp.inf), 3, 1).reshape(batch, time, q_heads)
