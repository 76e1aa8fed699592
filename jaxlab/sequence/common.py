"""What methods that read a sequence chunk by chunk share: a chunk's loss, and its gradient through what it cached.

The loss J_j and cache m_j of chunk j depend on the caches before it: (J_j, m_j) = f(x_j; m_1 .. m_{j-1}; theta). Going
backwards from the last chunk, what later chunks sent back to m_j is known when j is reached.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.core.checks import require
from jaxlab.kernels import chunk_attention
from jaxlab.models.attention import AttentionFn, Cache, dot_product_attention
from jaxlab.models.config import TransformerConfig
from jaxlab.models.transformer import Transformer, sequential
from jaxlab.training import losses

# (params, cache, a chunk's part of the batch, its first position) -> (the chunk's share of the loss, cache with its
# own entries written); it reads no entry from its first position on.
ChunkLoss = Callable[..., tuple[Float[Array, ""], object]]


def transformer_loss(params, cache, part, start, *, model_of, frozen, share, how):
  """A `ChunkLoss` of a transformer.

  Args:
    cache: (keys, values) of all layers; part: (inputs, targets) int32 (rows, chunk).
    model_of: (params, *frozen) -> the model; share: of the loss, as `share_of` makes it; how: (attention, remat).
  """
  attention, remat = how
  model: Transformer = model_of(params, *frozen)
  inputs, targets = part
  x, side, _ = model.embed(inputs, Cache(*cache, jnp.asarray(start, jnp.int32), None))
  x, backout, _, cache = sequential(model, x, side, attention=attention, cache=cache, remat=remat)
  return share(model, (x, backout), targets), cache


def share_of(token_losses: losses.TokenLosses, total) -> Callable:
  """(model, hidden states, targets) -> what these tokens add to the mean over all `total` that count."""
  return lambda model, hidden, targets: losses.mean_loss(token_losses(model, hidden, targets), targets, total)


def require_readable(config: TransformerConfig, length: int) -> None:
  """Raises InputError unless the model reads sequences of `length` tokens chunk by chunk."""
  require(not config.smear, "models that smear embeddings cannot be read in chunks here; train them with a loss_fn")
  require(length >= 1, "the sequences have no tokens; give them one or more")
  beyond = f"sequences are longer than the model's context of {config.context} tokens"
  require(length <= config.context, f"{beyond}; cut them, or give the model a longer context")


def rung(chunks: int) -> int:
  """The first of 1, 2, 4, 8, ... that is as large: how many chunks of a cache `over_prefix` reads of so many."""
  return 1 << (chunks - 1).bit_length()


def over_prefix(attention: AttentionFn) -> AttentionFn:
  """Attention of a chunk over the shortest prefix of the cache, of 1, 2, 4, ... chunks, that has it and what is before
  it: it multiplies less than twice what it must, where a mask over the whole cache multiplies all.

  Only what is given to it is kept for the backward pass, which runs it forward once more: what the prefixes keep would
  have as many shapes, and a place each in every layer.

  Args:
    attention: its queries are a chunk, its `start` a multiple of that, one for all rows.
  """

  def shortest(q, k, v, *, window, start):
    chunk, keys = q.shape[1], k.shape[1]
    sizes = [min(chunk << i, keys) for i in range(rung(-(-keys // chunk)).bit_length())]
    over = lambda n: lambda q, k, v, start: attention(q, k[:, :n], v[:, :n], window=window, start=start)
    back = lambda way: lambda q, k, v, start, out: jax.vjp(lambda q, k, v: way(q, k, v, start), q, k, v)[1](out)
    place = lambda start: (start + chunk > jnp.array(sizes[:-1], jnp.int32)).sum()
    ways = [over(n) for n in sizes]

    @jax.custom_vjp
    def attend(q, k, v, start):
      return jax.lax.switch(place(start), ways, q, k, v, start)

    def pull(given, out):
      return *jax.lax.switch(place(given[-1]), [back(way) for way in ways], *given, out), None

    attend.defvjp(lambda *given: (attend(*given), given), pull)
    return attend(q, k, v, start)

  return shortest


def over_cache(q, k, v, *, window, start):
  """An `AttentionFn` of a chunk over its cache: cuDNN's two calls on a GPU in 16 bits, else XLA's `over_prefix`."""
  if chunk_attention.preferred(q, k, window):
    return chunk_attention.behind(q, k, v, start=start, implementation="cudnn")
  return over_prefix(dot_product_attention)(q, k, v, window=window, start=start)


def zeros(tree):
  """Where sums over chunks begin, in float32 or better: a bfloat16 sum of a hundred of them loses two digits."""
  return jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)), tree)


def add(total, new):
  """The sum of two trees, in the precision of the first."""
  return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, new)


def backward(
  chunk_loss: ChunkLoss,
  params,
  cache,
  sums: tuple,
  pieces: Sequence[tuple],
  *,
  chunk: int,
  direct: float | Array = 1.0,
  relay: float | Array = 1.0,
  axis: int = 2,
):
  """Consecutive chunks forwards, their activations kept, then backwards, the last first.

  Args:
    cache: arrays with positions along `axis`, those before the first of these chunks filled.
    sums: (gradient by params, by the cache) of all later chunks, as `zeros` begins them.
    pieces: (part, first position) of each.
    direct, relay: cotangents of a chunk's loss, and of its cache as a multiple of what came back to it.

  Returns:
    (the loss of these chunks, cache with their entries, sums with their gradients; what had come back to these chunks
    is used up and zero).
  """
  cut = lambda a, start: jax.lax.dynamic_slice_in_dim(a, start, chunk, axis)
  kept, loss = [], 0.0
  for part, start in pieces:

    def own(params, cache, part=part, start=start):
      loss, after = chunk_loss(params, cache, part, start)
      return (loss, jax.tree.map(lambda a: cut(a, start), after)), after

    (one, _), pull, cache = jax.vjp(own, params, cache, has_aux=True)
    kept.append((start, pull))
    loss = loss + one
  gradient, back = sums
  for start, pull in reversed(kept):
    sent = jax.tree.map(lambda a, b: (relay * cut(b, start)).astype(a.dtype), cache, back)  # noqa: B023
    more, to_cache = pull((jnp.asarray(direct, loss.dtype), sent))
    back = jax.tree.map(lambda b: jax.lax.dynamic_update_slice_in_dim(b, zeros(cut(b, start)), start, axis), back)  # noqa: B023
    gradient, back = add(gradient, more), add(back, to_cache)
  return loss, cache, (gradient, back)
