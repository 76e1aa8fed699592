"""ChunkLLM's sparse prefill: every token of a prompt reads the chunks that the end of the chunk before its own chose.

Where chunks end is known after the first layer, which reads everything; the layers behind it read less. Attention is
masked, by blocks of queries: what falls is what is attended to, not yet the time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxlab.attention.chunkllm_chunks import ChunkAdapters, chunk_means, chunk_scores, pick_chunks

_QUERIES = 128  # of a block


def choices(
  adapters: ChunkAdapters,
  asked,
  told,
  ids: Int[Array, "batch time"],
  last,
  layer: int,
  *,
  keep: float,
  most: int | None,
) -> Bool[Array, "batch chunks chunks"]:
  """[b, c]: the chunks, c the newest of them, that the last token of chunk c chooses for the next chunk's tokens.

  Args:
    asked, told: what `adapters.inputs` gives for the prompt; last: int32[batch, chunks], the last token of each.
  """
  batch, chunks = last.shape
  at_end = lambda a: adapters.content(jnp.take_along_axis(a, last[..., None, None], axis=1), last)
  plain = adapters.content(told, jnp.arange(told.shape[1]))
  means = chunk_means(plain, ids, jnp.full(batch, told.shape[1]), chunks)
  keys = adapters.keys(adapters.joined(at_end(told), means), layer)
  scores = chunk_scores(adapters.queries(at_end(asked), layer), keys)
  count = jnp.tile(jnp.arange(1, chunks + 1), batch)
  chosen = pick_chunks(scores.reshape(1, batch * chunks, chunks), count, keep=keep, most=most)
  return chosen.reshape(batch, chunks, chunks)


def attend_chosen(q, keys, values, ids: Int[Array, "batch time"], chosen, *, sink: int, local: int):
  """Causal attention of a whole prompt to the first `sink` tokens, its set of chunks, its own, and the last `local`.

  Args:
    q: (batch, time, q_heads, head_dim); keys, values: (batch, time, kv_heads, head_dim).
    chosen: bool[batch, chunks, chunks] of `choices`; a token of chunk c reads those of chunk c - 1.
  """
  batch, time, heads, size = q.shape
  place, chunks = jnp.arange(time), chosen.shape[1]
  grouped = q.reshape(batch, time, keys.shape[2], -1, size)
  of_key = jnp.minimum(ids, chunks - 1)

  def some(at):
    query = jnp.take(grouped, at, axis=1)
    mine = jnp.take(ids, at, axis=1)
    before = jnp.take_along_axis(chosen, jnp.maximum(mine - 1, 0)[..., None], axis=1) & (mine > 0)[..., None]
    read = jnp.take_along_axis(before, jnp.broadcast_to(of_key[:, None], (batch, len(at), time)), axis=2)
    read &= ids[:, None] < mine[..., None]
    see = read | (ids[:, None] == mine[..., None]) | (place < sink) | (place > at[:, None] - local)
    see &= place <= at[:, None]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    score = jnp.einsum("btkgd,bskd->bkgts", query, keys, preferred_element_type=wide) / size**0.5
    weight = jax.nn.softmax(jnp.where(see[:, None, None], score, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskd->btkgd", weight.astype(values.dtype), values, preferred_element_type=wide)

  block = min(_QUERIES, time)
  # The last block repeats the last query.
  blocks = jnp.minimum(jnp.arange(-(-time // block) * block), time - 1).reshape(-1, block)
  out = jax.lax.map(some, blocks)
  return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, size)[:, :time].astype(q.dtype)
