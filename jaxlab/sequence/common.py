"""What methods that read a sequence chunk by chunk share: a chunk's loss, and its gradient through what it cached.

The loss J_j and cache m_j of chunk j depend on the caches before it: (J_j, m_j) = f(x_j; m_1 .. m_{j-1}; theta). Going
backwards from the last chunk, what later chunks sent back to m_j is known when j is reached.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.models.attention import Cache
from jaxlab.models.transformer import Transformer, sequential
from jaxlab.training import losses

# (params, cache, a chunk's part of the batch, its first position) -> (the chunk's share of the loss, cache with its
# own entries written); it reads no entry from its first position on.
ChunkLoss = Callable[..., tuple[Float[Array, ""], object]]


def transformer_loss(params, cache, part, start, *, model_of, frozen, total, how):
  """A `ChunkLoss` of a transformer: the sum of a chunk's losses over all tokens that count.

  Args:
    cache: (keys, values) of all layers; part: (inputs, targets) int32 (rows, chunk).
    model_of: (params, *frozen) -> the model; total: tokens that count, of all chunks; how: (attention, remat).
  """
  attention, remat = how
  model: Transformer = model_of(params, *frozen)
  inputs, targets = part
  x, side, _ = model.embed(inputs, Cache(*cache, jnp.asarray(start, jnp.int32), None))
  x, backout, _, cache = sequential(model, x, side, attention=attention, cache=cache, remat=remat)
  return losses.token_losses(model, (x, backout), targets).sum() / total, cache


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
