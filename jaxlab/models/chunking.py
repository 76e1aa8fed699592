"""Dynamic chunking: where a sequence is cut, the vectors that stand for its chunks, and the way back (H-Net).

  p_t = (1 - cos(W_q h_{t-1}, W_k h_t)) / 2,   b_t = [p_t > 1/2]      cut where a vector differs from the one before
  x'  = h at the positions with b_t = 1                               one vector a chunk
  s_j = P_j z_j + (1 - P_j) s_{j-1}                                   smoothed, P_j the p of chunk j
  y_t = ste(c_t) s_{chunk of t} + W h_t + bias                        c_t = max(p_t, 1 - p_t)

b has no gradient; p has three: through P, through c, and through a loss on how much is cut. All of it is in float32,
whatever the layers compute in: near a cosine of 1, where most positions are, 16 bits have no digits left.
Reference: Hwang, Wang and Gu 2025, arXiv 2507.07955.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require
from jaxlab.core.recurrence import linear_recurrence
from jaxlab.models.layers import wide

_CLIP = 1e-4  # of P, from both ends


class Chunks(NamedTuple):
  """Where a stage was cut.

  probability: p; cut: b, demotions done; wanted: b before them; valid: positions that are no padding.
  """

  probability: Float[Array, "batch time"]
  cut: Bool[Array, "batch time"]
  wanted: Bool[Array, "batch time"]
  valid: Bool[Array, "batch time"]

  @property
  def index(self) -> Int[Array, "batch time"]:
    """The chunk that every position reads: the one begun last."""
    return jnp.maximum(jnp.cumsum(self.cut, axis=1) - 1, 0)

  @property
  def count(self) -> Int[Array, "batch"]:
    return jnp.sum(self.cut, axis=1)

  @property
  def confidence(self) -> Float[Array, "batch time"]:
    """c: the probability of what was done. Of a cut that capacity forbade, that of not cutting."""
    return jnp.where(self.cut, self.probability, 1 - self.probability)


def chunks_of(
  probability: Float[Array, "batch time"], valid: Bool[Array, "batch time"], capacity: int | None = None
) -> Chunks:
  """Cuts where p > 1/2 (a tie is no cut), at most `capacity` a row: later ones are demoted before anything reads them.

  Raises:
    InputError: a capacity below 1.
  """
  wanted = (probability > 0.5) & valid
  if capacity is None:
    return Chunks(probability, wanted, wanted, valid)
  require(capacity >= 1, f"capacity is {capacity}; a row has at least 1 chunk")
  return Chunks(probability, wanted & (jnp.cumsum(wanted, axis=1) <= capacity), wanted, valid)


def places(chunks: Chunks, capacity: int) -> Int[Array, "batch capacity"]:
  """The position that each chunk begins at; 0 where there is no chunk."""
  batch, time = chunks.cut.shape
  slot = jnp.where(chunks.cut, chunks.index, capacity)
  rows, here = jnp.arange(batch)[:, None], jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), slot.shape)
  return jnp.zeros((batch, capacity), jnp.int32).at[rows, slot].set(here, mode="drop")


def take(x: Float[Array, "batch time width"], index: Int[Array, "batch n"]) -> Float[Array, "batch n width"]:
  """Row by row the vectors at these positions."""
  return jnp.take_along_axis(x, index[..., None], axis=1)


def smooth(
  z: Float[Array, "batch chunks width"],
  probability: Float[Array, "batch chunks"],
  starts: Bool[Array, "batch chunks"] | None = None,
) -> Float[Array, "batch chunks width"]:
  """s_j = P_j z_j + (1 - P_j) s_{j-1}, s_0 = 0, in float32 or better, P clipped to 1e-4 .. 1 - 1e-4.

  Args:
    starts: chunks that begin a document: s_{j-1} is 0 for them too.
  """
  p = clipped(probability)
  keep = 1 - p if starts is None else jnp.where(starts, 0.0, 1 - p)
  return linear_recurrence(keep[..., None], p[..., None] * wide(z), axis=1)


def clipped(probability: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """P of the recurrence: a chunk's output never stands alone, nor is it ever left out."""
  return jnp.clip(probability, _CLIP, 1 - _CLIP)


def straight_through(confidence: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """1 forwards, the identity backwards."""
  return confidence + jax.lax.stop_gradient(1 - confidence)


class Chunker(nnx.Module):
  """The parameters between a stage and the next: the router, and the map around all that lies inside."""

  def __init__(self, width: int, routing: str, key: jax.Array):
    """W_q and W_k start as the identity, the map around as zero. "linear" routing is p = sigmoid(w h + bias)."""
    if routing == "cosine":
      self.q, self.k = (nnx.Param(jnp.eye(width), axes=(None, None)) for _ in range(2))
    else:
      self.q = self.k = None
      self.router = nnx.Param(0.02 * jax.random.normal(key, (width,)), axes=(None,))
      self.router_bias = nnx.Param(jnp.zeros(()), axes=())
    self.residual = nnx.Param(jnp.zeros((width, width)), axes=(None, None))
    self.bias = nnx.Param(jnp.zeros(width), axes=(None,))

  def probability(self, h: Float[Array, "*batch width"], before: Float[Array, "*batch width"]) -> Array:
    """p of positions with vectors h behind positions with vectors `before`."""
    h, before = wide(h), wide(before)
    if self.q is None:
      return jax.nn.sigmoid(h @ self.router[...] + self.router_bias[...])
    project = lambda x, w: jnp.einsum("...i,ij->...j", x, w[...], precision="highest")
    unit = lambda a: a * jax.lax.rsqrt(jnp.maximum(jnp.sum(a * a, axis=-1, keepdims=True), 1e-24))
    cosine = jnp.sum(unit(project(before, self.q)) * unit(project(h, self.k)), axis=-1)
    return jnp.clip((1 - cosine) / 2, 0.0, 1.0)

  def around(self, h: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """W h + bias, what goes past the inner stages."""
    return wide(h) @ self.residual[...] + self.bias[...]
