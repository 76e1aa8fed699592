"""A rival of local memories: attention in a sliding window beside the global memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlab.models.attention import dot_product_attention
from jaxlab.sequence.tnt import MemoryConfig, MemoryLayer, turned
from jaxlab.sequence.tnt_model import MemoryModel, MemoryModelConfig


@dataclasses.dataclass(frozen=True)
class WindowedConfig(MemoryModelConfig):
  """A `MemoryModelConfig` of a global memory alone; `window` tokens are attended to, its own among them."""

  window: int = 1

  def flops_per_token(self, length: int) -> int:
    """As that of memories, and 12 for a channel and token in the window, forward and backward."""
    return super().flops_per_token(length) + 12 * self.depth * self.memory.inner * min(self.window, length)


def windowed(config: WindowedConfig, key: jax.Array) -> MemoryModel:
  """For training and whole rows: it has no steps token by token."""
  return MemoryModel(config, key, layer=functools.partial(WindowedLayer, window=config.window))


class WindowedLayer(MemoryLayer):
  """o_t = f(V at the start of the chunk, q_t) + softmax_s(gain sqrt(d) q_t' k_s) v_s over the last tokens s <= t.

  q and k, of unit length, are those of the memories, here with rotary positions; every head has a gain of its own.
  """

  def __init__(self, config: MemoryConfig, key: jax.Array, *, window: int):
    super().__init__(config, key)
    self.window = window
    self.log_gain = nnx.Param(jnp.zeros(config.heads), axes=(None,))

  def recall(self, x, q, k, v, chunks: tuple[int, ...]):
    """As of `MemoryLayer`."""
    total, *memories = super().recall(x, q, k, v, chunks)
    turn = lambda a: turned(a, jnp.arange(a.shape[1])).astype(x.dtype)
    # Attention divides by sqrt(d), which is the spread of a product of vectors that are not of unit length.
    queries = turn(q * (q.shape[-1] * jnp.exp(self.log_gain[...]))[:, None])
    said = dot_product_attention(queries, turn(k), v.astype(x.dtype), window=self.window - 1)
    return total + said, *memories
