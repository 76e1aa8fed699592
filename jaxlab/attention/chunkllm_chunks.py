"""What ChunkLLM's decoding and training share: the adapters, the chunks of a row, their scores and the teacher's.

A chunk is a stretch of tokens that a token marked as its end closes; those behind the last end are the open chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.attention.selection import grouped_products
from jaxlab.core.checks import require, require_choice, require_counts
from jaxlab.models.config import TransformerConfig
from jaxlab.models.layers import apply_rope, rope_table

STANDS = ("last", "mean", "both")
READS = ("unrotated", "rotated", "hidden")


class ChunkAdapters(nnx.Module):
  """The maps, float32: w (width) and b of the chunk adapter; W1 (layers, inputs, hidden) and W2 (layers, hidden, size)
  of queries and of keys. Scores begin near 0, so that all chunks begin alike.

  Args:
    stands: what stands for a chunk: the key of its "last" token, the "mean" of its tokens' keys, or "both" side by
      side. By the first alone the first layer cannot tell chunks apart that end with the same token.
    reads: what queries and keys are to the adapters: the model's "unrotated", before RoPE, as content has no position;
      "rotated"; or the layer's input, "hidden", in the place of both.
  """

  def __init__(
    self,
    config: TransformerConfig,
    key: jax.Array,
    *,
    hidden: int = 512,
    size: int = 128,
    stands: str = "last",
    reads: str = "unrotated",
  ):
    require_counts(hidden=hidden, size=size)
    require_choice("stands", stands, STANDS)
    require_choice("reads", reads, READS)
    c, keys = config, jax.random.split(key, 5)
    normal = lambda key, *shape, scale: nnx.Param(scale * jax.random.normal(key, shape), axes=(None,) * len(shape))
    first = lambda key, inputs: normal(key, c.depth, inputs, hidden, scale=inputs**-0.5)
    second = lambda key: normal(key, c.depth, hidden, size, scale=0.02)
    inputs = lambda heads: c.width if reads == "hidden" else heads * c.head_dim
    self.config, self.stands, self.reads = c, stands, reads
    self.w, self.b = normal(keys[0], c.width, scale=c.width**-0.5), nnx.Param(jnp.zeros(()), axes=())
    self.q1, self.q2 = first(keys[1], inputs(c.q_heads)), second(keys[2])
    self.k1, self.k2 = first(keys[3], (1 + (stands == "both")) * inputs(c.kv_heads)), second(keys[4])

  def ends(self, x: Float[Array, "batch time *streams width"]) -> Float[Array, "batch time"]:
    """Logit, float32, that a token with this output of the first layer ends a chunk; streams are averaged."""
    x = x.astype(jnp.float32)
    x = x.mean(axis=2) if x.ndim == 4 else x
    return jnp.einsum("btw,w->bt", x, self.w[...], precision=jax.lax.Precision.HIGHEST) + self.b[...]

  def inputs(self, q, k, x):
    """What of a layer's queries, keys and input (batch, time, ...) is `content` for queries and for keys."""
    if self.reads != "hidden":
      return q, k
    x = (x.mean(axis=2) if x.ndim == 4 else x)[:, :, None]
    return x, x

  def content(self, x: Float[Array, "*batch time heads head_dim"], positions: Int[Array, "*batch time"]):
    """`inputs` at these positions, float32; queries and keys turned back to before RoPE where adapters read them so."""
    x = x.astype(jnp.float32)
    if self.reads != "unrotated":
      return x
    cos, sin = rope_table(self.config, positions, jnp.float32)
    return apply_rope(x, cos, -sin)

  def joined(self, content: Float[Array, "*batch heads head_dim"], mean: Float[Array, "*batch heads head_dim"]):
    """What stands for a chunk, of its last token's content and of the mean of all of them."""
    if self.stands == "both":
      return jnp.concatenate([mean, content], axis=-2)
    return mean if self.stands == "mean" else content

  def queries(self, content: Float[Array, "*layers batch time q_heads head_dim"], layer: int | None = None):
    """qa, float32[*layers, batch, time, size], of a layer, or without `layer` of all layers'."""
    return _compressed(content, self.q1[...], self.q2[...], layer)

  def keys(self, content: Float[Array, "*layers batch chunks kv_heads head_dim"], layer: int | None = None):
    """ka of what stands for chunks, as `queries`."""
    return _compressed(content, self.k1[...], self.k2[...], layer)


class _WithoutMaps(ChunkAdapters):
  def __init__(self, adapters: ChunkAdapters):
    vars(self).update(vars(adapters))

  def queries(self, content, layer=None):
    c = self.config
    grouped = content.reshape(*content.shape[:-2], c.kv_heads, c.q_heads // c.kv_heads, c.head_dim)
    return grouped.sum(axis=-2).reshape(*content.shape[:-2], -1) / c.q_heads

  def keys(self, content, layer=None):
    return content.reshape(*content.shape[:-2], -1)


def without_maps(adapters: ChunkAdapters) -> ChunkAdapters:
  """Adapters whose scores are 1/H sum_h q_h . k_h of what they read, up to a factor: what distillation starts from.

  Raises:
    InputError: adapters that read the layer's input, or chunks that two keys stand for, which have no such product.
  """
  fits = adapters.reads != "hidden" and adapters.stands != "both"
  require(fits, "only queries and keys have a product of their own; take adapters with stands='last' or 'mean'")
  return _WithoutMaps(adapters)


def _compressed(content, first, second, layer):
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  one = lambda x, first, second: product(jax.nn.silu(product(x.reshape(*x.shape[:-2], -1), first)), second)
  return jax.vmap(one)(content, first, second) if layer is None else one(content, first[layer], second[layer])


def require_fit(adapters: ChunkAdapters, config: TransformerConfig) -> None:
  """Raises InputError for a model that the adapters were not made for, or whose first layer's output no layer sees."""
  require(config.depth >= 2, "the model has one layer; a second must read the first one's output")
  require(config == adapters.config, "the adapters are of another model; make them from this model's configuration")


def chunk_ends(
  wanted: Bool[Array, "time"], length: Int[Array, ""] | int, *, min_chunk: int, max_chunk: int
) -> Bool[Array, "time"]:
  """Where chunks of one row end: at wanted places that make them `min_chunk` long, or when they reach `max_chunk`.

  Where a chunk ends depends on where the one before did. All possible successors are worked out at once, and those
  that the first token leads to are found in log2(chunks) rounds of jumps twice as long as the last: no loop over time.
  """
  time = len(wanted)
  place = jnp.arange(time)
  nearest = jax.lax.cummin(jnp.where(wanted, place, time), reverse=True)
  nearest = jnp.concatenate([nearest, jnp.full(1, time)])
  begin = jnp.arange(time + 2)  # of a chunk; time + 1: there is none
  end = jnp.minimum(nearest[jnp.minimum(begin + min_chunk - 1, time)], begin + max_chunk - 1)
  jump = jnp.where(end < jnp.minimum(length, time), end + 1, time + 1)
  reached = jnp.zeros(time + 2, jnp.int32).at[0].set(1)
  for _ in range((time // min_chunk + 1).bit_length()):
    reached = reached.at[jump].max(reached)
    jump = jump[jump]
  return reached[1 : time + 1] > 0


def chunk_ids(ends: Bool[Array, "*batch time"]) -> Int[Array, "*batch time"]:
  """The number of every token's chunk: how many ended before it."""
  return jnp.cumsum(ends, axis=-1) - ends


def chunk_table(ends: Bool[Array, "time"], chunks: int) -> tuple[Int[Array, "chunks"], Int[Array, ""]]:
  """(the last token of every chunk that ended, in order, 0 past their count; the count)."""
  index = jnp.where(ends, chunk_ids(ends), chunks)
  last = jnp.zeros(chunks, jnp.int32).at[index].set(jnp.arange(len(ends)), mode="drop")
  return last, jnp.sum(ends, dtype=jnp.int32)


def chunk_means(content: Float[Array, "batch time heads head_dim"], ids, length, chunks: int):
  """The mean over every chunk's tokens before `length`, (batch, chunks, heads, head_dim); 0 of none.

  Args:
    ids: int32[batch, time]; length: int32[batch].
  """
  real = jnp.arange(content.shape[1]) < length[:, None]
  index = jnp.where(real, ids, chunks)  # what lies behind, which may be anything, is left out
  add = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=chunks + 1))
  size = jnp.maximum(add(jnp.ones(index.shape), index), 1)[..., None, None]
  return (add(jnp.where(real[..., None, None], content, 0), index) / size)[:, :chunks]


def chunk_mass(q, keys, ids, below, *, start, chunks: int, sink: int, window: int | None = None):
  """Attention of queries to each of the first `below` chunks, mean over the heads, without the first `sink` tokens.

    mass[t, c] = 1/H sum_h sum_{j in c, j >= sink} softmax_j(q_t^h . k_j / sqrt(d)),  c < below[t]

  Args:
    q: (batch, time, q_heads, head_dim) at positions start, start + 1, ..., start of all rows or of each.
    keys: (batch, kv_heads, positions, head_dim); ids: int32[batch, positions], their chunks.
    below: int32[batch, time], as many chunks as a query counts; window: as in `AttentionFn`.

  Returns:
    float32[batch, time, chunks].
  """
  batch, time, _, size = q.shape
  place = jnp.arange(keys.shape[2])
  query = jnp.broadcast_to(jnp.asarray(start)[..., None] + jnp.arange(time), (batch, time))[:, None, :, None]
  see = place <= query
  if window is not None:
    see &= place >= query - window
  score = grouped_products(jnp.moveaxis(q, 2, 1), jnp.where(see.any(axis=2)[..., None], keys, 0)) / math.sqrt(size)
  weight = jax.nn.softmax(jnp.where(see, score, -jnp.inf), axis=-1).mean(axis=1)
  weight = jnp.where(place >= sink, weight, 0)
  summed = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=chunks))(jnp.swapaxes(weight, 1, 2), ids)
  return jnp.where(jnp.arange(chunks) < below[..., None], jnp.swapaxes(summed, 1, 2), 0)


def best_chunks(scores: Float[Array, "*batch chunks"], count: Int[Array, "*batch"], most: int):
  """bool like scores: the `count` largest ones above -inf, at most `most`; of equal ones the later.

  What is no number is the largest, so that it is read and seen in the answer.
  """
  most = min(most, scores.shape[-1])
  scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
  value, index = jax.lax.top_k(scores[..., ::-1], most)
  taken = (jnp.arange(most) < count[..., None]) & (value > -jnp.inf)
  return jnp.put_along_axis(jnp.zeros(scores.shape, bool), scores.shape[-1] - 1 - index, taken, -1, inplace=False)


def chunk_scores(queries: Float[Array, "*batch time size"], keys: Float[Array, "*batch chunks size"]):
  """s = qa . ka / sqrt(size), float32[*batch, time, chunks]."""
  product = jnp.einsum("...td,...cd->...tc", queries, keys, precision=jax.lax.Precision.HIGHEST)
  return product / math.sqrt(keys.shape[-1])


def pick_chunks(
  scores: Float[Array, "layers batch chunks"],
  count: Int[Array, "batch"],
  *,
  keep: float,
  most: int | None = None,
  vote: bool = False,
) -> Bool[Array, "layers batch chunks"]:
  """The newest of `count` chunks and the best others, min(ceil(keep * count), most) in all, for every layer.

  Args:
    vote: the same for all layers: those that most of them would choose.
  """
  place = jnp.arange(scores.shape[2])
  most = most or scores.shape[2]
  number = jnp.minimum(jnp.ceil((1 - 1e-6) * keep * count).astype(jnp.int32), most)  # rounding makes no more of them
  real, newest = place < count[:, None], place == count[:, None] - 1
  each = jnp.broadcast_to(number, scores.shape[:2])
  chosen = best_chunks(jnp.where(newest, jnp.inf, jnp.where(real, scores, -jnp.inf)), each, most)
  if not vote:
    return chosen
  votes = jnp.where(real, chosen.sum(axis=0), -jnp.inf)
  return jnp.broadcast_to(best_chunks(votes, number, most), scores.shape)
