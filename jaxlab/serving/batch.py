"""One step of a batch, on the device: rows that decode and rows that read a chunk of a prompt, in one pass.

All products run once over the tokens of both kinds; attention runs over each kind by itself, as `models.paged` does it.
Shapes are static: a program is compiled for a number of rows of each kind, a chunk length, and a number of tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.models import inference, paged, tensor_parallel
from jaxlab.models.compaction import compact_pages
from jaxlab.models.generate import COLDEST
from jaxlab.models.inference import Network


class Shape(NamedTuple):
  """What a program is compiled for.

  Attributes:
    decode: rows of one token; chunks: rows that read `length` tokens each, none or more.
    steps: tokens that every decoding row makes; 1 where there are chunks.
    score: log-probabilities of the chunks' own next tokens are wanted.
  """

  decode: int
  chunks: int
  length: int
  steps: int = 1
  score: bool = False


class Rows(NamedTuple):
  """Sequences of one kind, as arrays of the host.

  Attributes:
    tokens: int32[rows, length]; start: int32[rows], their first position; count: int32[rows], how many are real.
    gone: int32[rows], how many fewer entries than tokens there are before them: the first one's is start - gone.
    table: int32[rows, pages_per_row], page 0 where a row has no page.
    temperature, top_p, min_p: float32[rows]; top_k, seed, number: int32[rows]; top_k and min_p are 0 and top_p is 1 for
      all, number that of the token that is drawn.
    targets: int32[rows, length], the tokens after these, for `Shape.score`.
  """

  tokens: np.ndarray
  start: np.ndarray
  count: np.ndarray
  gone: np.ndarray
  table: np.ndarray
  temperature: np.ndarray
  top_p: np.ndarray
  min_p: np.ndarray
  top_k: np.ndarray
  seed: np.ndarray
  number: np.ndarray
  targets: np.ndarray


def blank(rows: int, length: int, pages_per_row: int) -> tuple[np.ndarray, Rows]:
  """(int32[rows, numbers], what a program takes: one array travels faster than ten; views of it: padding)."""
  packed = np.zeros((rows, 2 * length + pages_per_row + _SINGLE), np.int32)
  made = split(packed, length)
  made.count[:], made.top_p[:] = 1, 1
  return packed, made


_SINGLE = 9  # numbers of a row that are no list


def split(packed, length: int) -> Rows:
  """The rows that lie in an array of `blank`, of the host or the device; reals lie there by their bits."""
  tokens, targets, table = packed[:, :length], packed[:, length : 2 * length], packed[:, 2 * length : -_SINGLE]
  start, count, gone, top_k, seed, number, *reals = packed[:, -_SINGLE:].T
  return Rows(tokens, start, count, gone, table, *map(_reals, reals), top_k, seed, number, targets)


def _reals(a):
  return a.view(np.float32) if isinstance(a, np.ndarray) else jax.lax.bitcast_convert_type(a, jnp.float32)


def drawn_of(packed: np.ndarray) -> tuple[np.ndarray, ...]:
  """What `run` drew, from the one array that a program gives."""
  token, logprob, best, of_best = packed
  return token, _reals(logprob), best, _reals(of_best)


def empty_pools(network: Network, pages: int, size: int, mesh: Mesh | None = None, *, sized: bool = False) -> tuple:
  """Keys and values of every layer, (kv_heads, pages, size, head_dim) each, and if `sized` the sizes of the entries,
  float32[kv_heads, pages, size]; the heads of a split network's devices side by side."""
  c, dtype = network.model.config, network.model.dtype
  heads = c.kv_heads * (mesh.shape[tensor_parallel.AXIS] if mesh else 1)
  placed = NamedSharding(mesh, tensor_parallel.PLACED) if mesh else None
  store = lambda: jnp.zeros((heads, pages, size, c.head_dim), dtype, device=placed)
  sizes = lambda: (jnp.zeros((heads, pages, size), jnp.float32, device=placed),) if sized else ()
  return tuple((store(), store(), *sizes()) for _ in network.blocks)


def sample_rows(logits, rows):
  """(a token a row, its log-probability, the likeliest, that one's): `generate.sample`, each row by its own settings.

  Args:
    logits: float32[n, vocab]; rows: `Rows`, of n rows.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def drawn():
    scaled = logits / jnp.maximum(rows.temperature, COLDEST)[:, None]
    limited = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    scaled = jax.lax.cond(limited.any(), lambda: _limited(scaled, rows), lambda: scaled)
    keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(
      rows.seed.astype(jnp.uint32), rows.number
    )
    token = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    return jnp.where(rows.temperature < COLDEST, greedy, token)

  token = jax.lax.cond((rows.temperature >= COLDEST).any(), drawn, lambda: greedy)
  of = lambda ids: jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
  return token, of(token), greedy, of(greedy)


def _limited(logits, rows):
  """The logits with -inf where top_k, top_p or min_p leave a token out; equal ones stay or go together."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  last = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, logits.shape[1]), logits.shape[1]) - 1
  kth = jnp.take_along_axis(ordered, last[:, None], axis=1)
  kept = jnp.where(ordered < kth, -jnp.inf, ordered)
  share = jax.nn.softmax(kept, axis=-1)
  before = jnp.cumsum(share, axis=-1) - share
  stays = (before < rows.top_p[:, None]) | (before == 0)
  smallest = jnp.maximum(kth, jnp.min(jnp.where(stays, kept, jnp.inf), axis=-1, keepdims=True))
  likely = logits - ordered[:, :1] >= jnp.log(rows.min_p)[:, None]
  return jnp.where(likely & (logits >= smallest), logits, -jnp.inf)


def forward(network: Network, pools, decode, chunks):
  """(output of the last layer of all tokens (n, 1, width), backout or None, pools with the new entries).

  Tokens are those of `decode`'s rows, then those of `chunks`', row after row.
  """
  parts = [part for part in (decode, chunks) if len(part.tokens)]
  size = pools[0][0].shape[2]
  flat = lambda of: jnp.concatenate([of(part).reshape(-1) for part in parts])
  place = lambda part: (part.start - part.gone)[:, None] + jnp.arange(part.tokens.shape[1])
  at = flat(lambda part: part.start[:, None] + jnp.arange(part.tokens.shape[1]))

  def page_of(part):
    wanted = place(part) // size
    known = jnp.take_along_axis(part.table, jnp.minimum(wanted, part.table.shape[1] - 1), axis=1)
    # Padding fills the row's own places to come, where it has them: what a page held before, which may be no number,
    # would else be read, with a weight of zero, by the tokens before. The rest goes to the page that nobody reads.
    return jnp.where(wanted < part.table.shape[1], known, 0)

  pages, offset = flat(page_of), flat(place) % size
  x, side, _ = network.model.embed(flat(lambda part: part.tokens)[:, None], paged.State((), None, at, (), None))
  pools = list(pools)

  def attend(layer, block, x, q, k, v, window):
    write = lambda pool, new: pool.at[:, pages, offset].set(jnp.swapaxes(new[:, 0], 0, 1).astype(pool.dtype))
    pools[layer] = tuple(map(write, pools[layer], (k, v, jnp.ones(k.shape[:-1]))))
    keys, values, sizes = (*pools[layer], None)[:3]
    found, begin = [], 0
    for part in parts:
      rows, length = part.tokens.shape
      mine = q[begin : begin + rows * length].reshape(rows, length, *q.shape[2:])
      first = part.start - part.gone
      out, _ = paged.attend_pages(mine, keys, values, part.table, start=first, window=window, sizes=sizes)
      found.append(out.reshape(rows * length, 1, *q.shape[2:]))
      begin += rows * length
    return jnp.concatenate(found)

  x, backout = inference.run_layers(network, x, side, attend)
  return x, backout, tuple(pools)


def run(network: Network, pools, decode, chunks, shape: Shape):
  """A step.

  Returns:
    (pools; what `sample_rows` returns, (rows, steps) each, the decoding rows before the chunks'; with `shape.score`,
    (log-probability of every target, likeliest id, that one's) (chunks, length) each).
  """
  head = lambda x, backout: network.model.logits(x, backout)[:, 0].astype(jnp.float32)
  if not shape.chunks:

    def one(carry, _):
      pools, decode = carry
      x, backout, pools = forward(network, pools, decode, chunks)
      drawn = sample_rows(head(x, backout), decode)
      decode = decode._replace(tokens=drawn[0][:, None], start=decode.start + 1, number=decode.number + 1)
      return (pools, decode), drawn

    (pools, _), drawn = jax.lax.scan(one, (pools, decode), length=shape.steps)
    return pools, tuple(a.T for a in drawn), None
  x, backout, pools = forward(network, pools, decode, chunks)
  first = shape.decode + shape.length * jnp.arange(shape.chunks)
  last = jnp.concatenate([jnp.arange(shape.decode), first + chunks.count - 1])
  pick = lambda a, where: None if a is None else a[where]
  cut = chunks._replace(tokens=chunks.tokens[:, :1], targets=chunks.targets[:, :1])
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), decode, cut)
  drawn = sample_rows(head(pick(x, last), pick(backout, last)), both)
  scores = _scores(head, x, backout, chunks, shape) if shape.score else None
  return pools, tuple(a[:, None] for a in drawn), scores


def _scores(head, x, backout, chunks, shape: Shape):
  """Row by row: the logits of a chunk's tokens are a vocabulary each."""

  def one(i):
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, shape.decode + i * shape.length, shape.length)
    logits = jax.nn.log_softmax(head(*(None if a is None else cut(a) for a in (x, backout))), axis=-1)
    of_target = jnp.take_along_axis(logits, chunks.targets[i][:, None], axis=1)[:, 0]
    return of_target, jnp.argmax(logits, axis=-1).astype(jnp.int32), logits.max(axis=-1)

  return jax.lax.map(one, jnp.arange(shape.chunks))


def compiled(network: Network, pools, pages_per_row: int, shape: Shape, mesh: Mesh | None = None):
  """(leaves of the network, pools, decode, chunks: arrays of `blank`) -> (pools, drawn: for `drawn_of`, scores).

  The step `run`, compiled; the pools are overwritten. With a mesh the network is one that `tensor_parallel.split` made.
  """
  leaves, structure = jax.tree.flatten(network)
  return _compiled(structure, tuple(map(shaped, leaves)), jax.tree.map(shaped, pools), pages_per_row, shape, mesh)


def shaped(a) -> jax.ShapeDtypeStruct:
  """What a program has to know of an array."""
  return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None))


@functools.lru_cache(maxsize=128)
def _compiled(structure, leaves, pools, pages_per_row: int, shape: Shape, mesh: Mesh | None):
  """Engines of one network share it."""
  length = max(shape.length, 1)

  def program(leaves, pools, decode, chunks):
    network = jax.tree.unflatten(structure, tensor_parallel.mine(leaves) if mesh else leaves)
    pools, drawn, scores = run(network, pools, split(decode, 1), split(chunks, length), shape)
    bits = lambda a: jax.lax.bitcast_convert_type(a, jnp.int32)
    return pools, jnp.stack(list(map(bits, drawn))), scores

  if mesh:
    whole, placed = PartitionSpec(), tensor_parallel.PLACED
    specs = dict(in_specs=(placed, placed, whole, whole), out_specs=(placed, whole, whole))
    program = jax.shard_map(program, mesh=mesh, **specs, check_vma=False)  # what is drawn is the same on all
  rows, _ = zip(blank(shape.decode, 1, pages_per_row), blank(shape.chunks, length, pages_per_row), strict=True)
  return jax.jit(program, donate_argnums=1).lower(list(leaves), pools, *rows).compile()


@functools.lru_cache(maxsize=1024)
def compiled_compaction(layer, width: int, room: int, how: Callable, mesh: Mesh | None = None):
  """`compact_pages` compiled for tables of `width` pages and a layer's arrays, given by their shapes: (pools, table,
  target, numbers) -> pools, which are overwritten. One program serves all layers."""
  program = functools.partial(compact_pages, room=room, how=how)
  if mesh:
    whole, placed = PartitionSpec(), tensor_parallel.PLACED
    program = jax.shard_map(program, mesh=mesh, in_specs=(placed, *[whole] * 3), out_specs=placed, check_vma=False)
  row = np.zeros(width, np.int32)
  return jax.jit(program, donate_argnums=0).lower(layer, row, row, np.zeros(3, np.int32)).compile()
