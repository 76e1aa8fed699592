"""Where chunks of keys end, for DHSA (arXiv 2510.24606): labels from attention, a small network that predicts them.

  predictor = BoundaryPredictor(config, key)
  loss = boundary_loss(predictor, network, tokens)              # train it with the model frozen
  bounds = select_boundaries(predictor.score(q, k, lengths)[0], length, most=64, instruction=64)

Position i ends a chunk where later queries treat the w tokens up to i and the w after it unlike each other. A *score*
is a function (q, k, lengths, window) -> float32[batch, time] of how well a chunk would end at every position; q and k
are (batch, time, heads, head_dim) after RoPE, and what lies past a row's length counts for nothing.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.attention.dhsa_encoders import ENCODERS
from jaxlab.attention.selection import grouped_products
from jaxlab.core.checks import require, require_choice, require_counts
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.config import TransformerConfig
from jaxlab.models.inference import Network, run_layers

HALF = 4  # w, tokens on either side of a gap
RATIO = 2.0  # of attention, from which on a gap is a boundary
_EPSILON = 1e-6
_POSITIONS = 256  # that the predictor looks at together: windows hold every key 2 w times


def map_query_blocks(function: Callable, q, k, *, block: int, window: int | None = None):
  """function(weight, at) of every block of queries, stacked: no attention map of the whole row is kept.

  weight: the block's causal attention, mean over the heads, float32[batch, block, time]; at: int32[block], its
  positions, of which the last block's may lie past the row.
  """
  time, size = q.shape[1], q.shape[3]
  blocks = -(-time // block)
  q = jnp.pad(q, ((0, 0), (0, blocks * block - time), (0, 0), (0, 0)))
  keys, place = jnp.swapaxes(k, 1, 2), jnp.arange(time)

  def one(i):
    rows = jax.lax.dynamic_slice_in_dim(q, i * block, block, axis=1)
    at = i * block + jnp.arange(block)
    # A query past the row's end sees its last key, so that no softmax is over nothing.
    query = jnp.minimum(at, time - 1)[:, None]
    see = (place <= query) & (place >= query - (time if window is None else window))
    score = grouped_products(jnp.swapaxes(rows, 1, 2), keys) / math.sqrt(size)
    return function(jax.nn.softmax(jnp.where(see, score, -jnp.inf), axis=-1).mean(axis=1), at)

  return jax.lax.map(one, jnp.arange(blocks))


def attention_ratio(q, k, lengths=None, window: int | None = None, *, half: int = HALF, block: int = 128):
  """rho, the score that labels are made of: how unlike later rows r treat the two sides of the gap behind i.

    past_i = sum_{r > i + w} sum_{c = i - w + 1 .. i} A[r, c],  next_i = the same over c = i + 1 .. i + w,
    rho_i = (max(past_i, next_i) + 1e-6) / (min(past_i, next_i) + 1e-6),

  A being the attention averaged over the heads; 0 outside 2 w - 1 <= i < length - 2 w. Nearer rows are left out, as
  they attend to what is near whatever it is. Under a window only the next `window` rows r count. The sums over c are
  taken row by row, w terms each: differences of an integral image would cancel in float32.

  Returns:
    float32[batch, time].
  """
  batch, time = q.shape[:2]
  lengths = _lengths(lengths, batch, time)
  position = jnp.arange(time)

  def sums(weight, at):
    later = at[:, None] - (position + half)
    counts = (later > 0) & (later <= (time if window is None else window)) & (at < lengths[:, None])[..., None]
    padded = jnp.pad(weight, ((0, 0), (0, 0), (half - 1, half)))
    inside = sum(padded[..., j : j + time + half] for j in range(half))
    sides = jnp.stack([inside[..., :time], inside[..., half:]])
    return jnp.where(counts, sides, 0).sum(axis=2)

  sides = map_query_blocks(sums, q, k, block=block, window=window).sum(axis=0)
  rho = (sides.max(axis=0) + _EPSILON) / (sides.min(axis=0) + _EPSILON)
  return jnp.where(scored(lengths, time, half), rho, 0)


def scored(lengths: Int[Array, "batch"], time: int, half: int = HALF) -> Bool[Array, "batch time"]:
  """The positions that have labels, 2 w - 1 <= i < length - 2 w."""
  position = jnp.arange(time)
  return (position >= 2 * half - 1) & (position < lengths[:, None] - 2 * half)


class BoundaryPredictor(nnx.Module):
  """Whether a chunk ends at a position, from the keys around it; one network for all layers, float32.

  x_t = the keys of all key heads at t, C numbers; X_i = x_{i-w+1 .. i+w}, zeros outside the row; e = encoder(X_i)
  l, r = means of e's first and last w rows;  f = [l, r, |l - r|, l r, cos(l, r)];  logit = W2 relu(W1 f + b1) + b2

  Args:
    encoder: one of `dhsa_encoders.ENCODERS`, "attention" as published.
    gated: l and r are means weighed by a softmax over their rows of e . g, g trained.
  """

  def __init__(
    self,
    config: TransformerConfig,
    key: jax.Array,
    *,
    half: int = HALF,
    heads: int = 4,
    hidden: int = 256,
    encoder: str = "attention",
    gated: bool = False,
  ):
    size, keys = config.kv_heads * config.head_dim, jax.random.split(key, 3)
    require_counts(half=half, hidden=hidden)
    require_choice("encoder", encoder, tuple(ENCODERS))
    normal = lambda key, inputs, outputs: nnx.Param(
      jax.random.normal(key, (inputs, outputs)) / math.sqrt(inputs), axes=(None, None)
    )
    fill = lambda value, size: nnx.Param(jnp.full((size,), value), axes=(None,))
    self.half = half
    self.encoder = ENCODERS[encoder](size, keys[0], heads=heads)
    self.gate = fill(0.0, size) if gated else None
    self.w1, self.b1 = normal(keys[1], 4 * size + 1, hidden), fill(0.0, hidden)
    self.w2, self.b2 = normal(keys[2], hidden, 1), fill(0.0, 1)

  def __call__(
    self,
    k: Float[Array, "batch time kv_heads head_dim"],
    lengths: Int[Array, "batch"] | None = None,
    key: jax.Array | None = None,
  ) -> Float[Array, "batch time"]:
    """Logits, float32; with a key for encoders that drop out in training."""
    batch, time = k.shape[:2]
    real = jnp.arange(time) < _lengths(lengths, batch, time)[:, None]
    x = jnp.where(real[..., None], k.reshape(batch, time, -1).astype(jnp.float32), 0)
    each = min(_POSITIONS, time)
    pieces = -(-time // each)
    x = jnp.pad(x, ((0, 0), (self.half - 1, pieces * each - time + self.half), (0, 0)))
    x = self.encoder.prepare(x)  # every position once, not every window

    @jax.checkpoint
    def one(i):
      near = jax.lax.dynamic_slice_in_dim(x, i * each, each + 2 * self.half - 1, axis=1)
      windows = jnp.stack([near[:, j : j + each] for j in range(2 * self.half)], axis=2)
      return self._logits(self.encoder(windows, None if key is None else jax.random.fold_in(key, i)))

    return jnp.moveaxis(jax.lax.map(one, jnp.arange(pieces)), 0, 1).reshape(batch, -1)[:, :time]

  def _logits(self, e: Float[Array, "batch positions two_w C"]):
    left, right = self._pooled(e[..., : self.half, :]), self._pooled(e[..., self.half :, :])
    norm = lambda a: jnp.sqrt((a * a).sum(axis=-1, keepdims=True) + 1e-12)
    cosine = (left * right).sum(axis=-1, keepdims=True) / (norm(left) * norm(right))
    f = jnp.concatenate([left, right, jnp.abs(left - right), left * right, cosine], axis=-1)
    hidden = jax.nn.relu(f @ self.w1[...] + self.b1[...])
    return (hidden @ self.w2[...] + self.b2[...])[..., 0]

  def _pooled(self, rows: Float[Array, "batch positions w C"]):
    if self.gate is None:
      return rows.mean(axis=-2)
    return (jax.nn.softmax(rows @ self.gate[...], axis=-1)[..., None] * rows).sum(axis=-2)

  def score(self, q, k, lengths=None, window: int | None = None):
    """The logits, -inf where there are no labels and nothing was trained."""
    batch, time = k.shape[:2]
    return jnp.where(scored(_lengths(lengths, batch, time), time, self.half), self(k, lengths), -jnp.inf)


def evenly(size: int) -> Callable:
  """The score of chunks of `size` tokens each, as long as the least distance of boundaries allows them."""
  require_counts(size=size)
  ends = lambda time: jnp.where(jnp.arange(1, time + 1) % size == 0, jnp.inf, -jnp.inf)
  return lambda q, k, lengths=None, window=None: jnp.broadcast_to(ends(k.shape[1]), k.shape[:2])


def randomly(key: jax.Array) -> Callable:
  """A score uniform in [0, 1): with theta=0 chunks end anywhere."""
  return lambda q, k, lengths=None, window=None: jax.random.uniform(key, k.shape[:2])


def focal_loss(
  logits: Float[Array, "*shape"], target: Bool[Array, "*shape"], *, gamma: float = 2.0, weight: float = 1.3
) -> Float[Array, "*shape"]:
  """(1 - p_t)^gamma times the cross-entropy, that of the positive targets times `weight`; p_t is the target's share."""
  z = jnp.where(target, logits, -logits)
  return jax.nn.sigmoid(-z) ** gamma * -jax.nn.log_sigmoid(z) * jnp.where(target, weight, 1.0)


def boundary_loss(
  predictor: BoundaryPredictor, network: Network, tokens: Int[Array, "batch time"], key: jax.Array | None = None
):
  """Sum over layers of the mean focal loss of the predictor's logits against rho >= 2, over positions with labels.

  The gradient is the predictor's alone: the network's activations are constants. key: of what the predictor drops.

  Raises:
    InputError: rows too short to hold a label.
  """
  batch, time = tokens.shape
  least = 4 * predictor.half
  require(time >= least, f"the rows have {time} tokens; a label needs at least {least}: use longer documents")
  x, side, _ = network.model.embed(tokens)
  real = scored(_lengths(None, batch, time), time, predictor.half)
  losses = []

  def attend(layer, _, x, q, k, v, window):
    rows, keys = (jax.lax.stop_gradient(a) for a in (q, k))
    target = attention_ratio(rows, keys, window=window, half=predictor.half) >= RATIO
    logits = predictor(keys, key=None if key is None else jax.random.fold_in(key, layer))
    losses.append(jnp.where(real, focal_loss(logits, target), 0).sum() / real.sum())
    return dot_product_attention(q, k, v, window=window, start=0)

  run_layers(network, x, side, attend)
  return sum(losses)


def agreement(score: Float[Array, "time"], rho: Float[Array, "time"], *, theta: float = 0.0, top: int = 500):
  """How well a score tells the boundaries rho >= 2 among the positions with labels (rho > 0).

  Returns:
    {"precision", "recall", "f1"} of score > theta, and "overlap", the share that the `top` positions of both have in
    common.
  """
  labelled = rho > 0
  said, true = labelled & (score > theta), rho >= RATIO
  hits = (said & true).sum()
  share = lambda a, b: a / jnp.maximum(b, 1)
  highest = lambda a: jax.lax.top_k(jnp.where(labelled, a, -jnp.inf), min(top, len(rho)))[1]
  marks = lambda a: jnp.zeros(len(rho), bool).at[highest(a)].set(True) & labelled
  both = marks(score) & marks(rho)
  return {
    "precision": share(hits, said.sum()),
    "recall": share(hits, true.sum()),
    "f1": share(2 * hits, said.sum() + true.sum()),
    "overlap": share(both.sum(), marks(rho).sum()),
  }


def select_boundaries(
  score: Float[Array, "time"],
  length: Int[Array, ""] | int,
  *,
  most: int,
  limit: Int[Array, ""] | int | None = None,
  theta: float = 1.1,
  apart: int = 8,
  instruction: int = 64,
) -> Int[Array, "most_plus_2"]:
  """Bounds b of chunks [b_n, b_{n+1}): 0, at most `most` of them, and the row's length, which fills what is left over.

  The instruction, the row's last tokens, always begins a chunk and holds no other bound. Then from the highest score
  above theta down, a chunk ends at i (its bound is i + 1) where no bound is as near as `apart`; of equal scores the
  first wins. Where no score passes there are two chunks.

  The greedy choice is made in parallel rounds: what beats all its neighbours is chosen whatever lies elsewhere.

  Args:
    limit: bounds besides 0 and the length, at most `most`, the default; where rows have lengths of their own.

  Raises:
    InputError: most < 1, or a negative distance or instruction.
  """
  require_counts(most=most)
  require(apart >= 0 and instruction >= 0, f"apart is {apart} and instruction {instruction}; neither may be negative")
  time = len(score)
  position = jnp.arange(time)
  start = jnp.maximum(length - instruction, 0)
  rank = jnp.argsort(jnp.argsort(-score, stable=True)).astype(jnp.int32)
  around = functools.partial(
    jax.lax.reduce_window, window_dimensions=(2 * apart + 1,), window_strides=(1,), padding="SAME"
  )

  def one_round(carry):
    alive, chosen = carry
    best = alive & (rank == around(jnp.where(alive, rank, time), jnp.int32(time), jax.lax.min))
    return alive & ~around(best, False, jax.lax.bitwise_or), chosen | best

  candidates = (score > theta) & (position + 1 < start - apart)
  _, chosen = jax.lax.while_loop(lambda carry: carry[0].any(), one_round, (candidates, jnp.zeros(time, bool)))
  places = min(most - 1, time)
  order = jnp.argsort(jnp.where(chosen, rank, time))[:places]
  kept = chosen[order] & (jnp.arange(places) < (most if limit is None else limit) - 1)
  ends = jnp.pad(jnp.where(kept, order + 1, length), (0, most - 1 - places), constant_values=time)
  return jnp.sort(jnp.concatenate([jnp.stack([0, start, length]), jnp.minimum(ends, length)])).astype(jnp.int32)


def _lengths(lengths, batch: int, time: int) -> Int[Array, "batch"]:
  return jnp.full((batch,), time, jnp.int32) if lengths is None else lengths
