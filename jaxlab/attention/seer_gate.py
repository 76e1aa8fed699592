"""SeerAttention's gate (arXiv 2410.13276), a learned selector: two small linear maps a head on pooled queries and keys.

  gate = SeerGate(config, key)
  loss = gate_loss(gate, network, tokens, block=64)            # train it with the model frozen
  method = compact(gate.selectors(tau=5e-4))

  score[i, j] = softmax_j rope(Wq avg q_i) . rope(Wk [max, min, avg] k_j) / sqrt(width), block-causal,

rotated to the positions where blocks begin. Kept: score > tau, and the last blocks.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.attention.selection import (
  Selection,
  block_means,
  blocks_behind,
  first_ones,
  grouped_products,
  in_blocks,
)
from jaxlab.core.checks import require_divides, require_none_negative
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.config import TransformerConfig
from jaxlab.models.inference import Network, run_layers
from jaxlab.models.layers import apply_rope


class SeerGate(nnx.Module):
  """The maps of every layer: q (layers, q_heads, head_dim, width), k (layers, kv_heads, 3 head_dim, width), float32."""

  def __init__(self, config: TransformerConfig, key: jax.Array, *, width: int = 128):
    c, keys = config, jax.random.split(key)
    normal = lambda key, heads, size: jax.random.normal(key, (c.depth, heads, size, width)) / math.sqrt(size)
    self.theta = c.rope_theta
    self.q = nnx.Param(normal(keys[0], c.q_heads, c.head_dim), axes=(None,) * 4)
    self.k = nnx.Param(normal(keys[1], c.kv_heads, 3 * c.head_dim), axes=(None,) * 4)

  def selectors(self, *, tau: float = 5e-4, recent: int = 2) -> tuple:
    """`seer` of every layer, for `compact_attention.compact`."""
    layers = zip(self.q[...], self.k[...], strict=True)
    how = dict(theta=self.theta, tau=tau, recent=recent)
    return tuple(functools.partial(seer, maps=maps, **how) for maps in layers)


def pooled_keys(
  k: Float[Array, "batch kv_heads positions head_dim"], block: int, real: Int[Array, "batch"] | None = None
):
  """The largest, least and mean entries of a block's keys, float32[batch, kv_heads, positions / block, 3 head_dim].

  Of every row the first `real` keys count, all with None; what a block without any has means nothing.
  """
  blocks = in_blocks(k, block)
  if real is not None:
    blocks = jnp.where(in_blocks(first_ones(real, k.shape[2]), block), blocks, blocks[:, :, :, :1])
  return jnp.concatenate([blocks.max(axis=3), blocks.min(axis=3), block_means(k, block, real)], axis=-1)


def seer(
  q: Float[Array, "batch q_heads queries head_dim"],
  pooled: Float[Array, "batch kv_heads key_blocks three_head_dim"],
  *,
  past: Int[Array, ""] | int,
  block: int,
  real: Int[Array, "batch"] | None = None,
  maps: tuple[Array, Array],
  theta: float,
  tau: float = 5e-4,
  recent: int = 2,
) -> Selection:
  """The blocks that one layer's gate scores above tau, and the `recent` last ones that a query block may see.

  Args:
    pooled: `pooled_keys` of the cache; maps: q and k of the layer.

  Raises:
    InputError: a negative tau or recent.
  """
  require_none_negative(tau=tau, recent=recent)
  logits = gate_logits(q, pooled, past=past, block=block, real=real, maps=maps, theta=theta)
  scores = jax.nn.softmax(logits, axis=-1)
  behind = blocks_behind(past, scores.shape[2], scores.shape[3], block)
  return ((scores > tau) | (behind < recent)) & (behind >= 0)


def gate_logits(q, pooled, *, past, block: int, real=None, maps, theta: float):
  """The gate's scores before their softmax, float32[batch, q_heads, query blocks, key blocks]; -inf ahead."""
  project = lambda x, weight: jnp.einsum("bhnd,hdw->bhnw", x, weight, precision=jax.lax.Precision.HIGHEST)
  queries, keys = project(block_means(q, block, real), maps[0]), project(pooled, maps[1])
  queries = _turned(queries, past + block * jnp.arange(queries.shape[2]), theta)
  keys = _turned(keys, block * jnp.arange(keys.shape[2]), theta)
  logits = grouped_products(queries, keys) / math.sqrt(queries.shape[3])
  return jnp.where(blocks_behind(past, *logits.shape[2:], block) >= 0, logits, -jnp.inf)


def _turned(x: Float[Array, "batch heads blocks width"], positions, theta: float):
  half = x.shape[-1] // 2
  angle = positions[:, None] * theta ** (-jnp.arange(half) / half)
  return jnp.swapaxes(apply_rope(jnp.swapaxes(x, 1, 2), jnp.cos(angle), jnp.sin(angle)), 1, 2)


def gate_loss(gate: SeerGate, network: Network, tokens: Int[Array, "batch time"], *, block: int) -> Float[Array, ""]:
  """Mean over layers, heads and query blocks of KL(target || gate), the target being the largest attention in a block.

  The gradient is the gate's alone: the network's activations are constants. time is a multiple of block.

  Raises:
    InputError: a block that does not divide the rows.
  """
  require_divides("block", block, "the tokens of a row", tokens.shape[1])
  x, side, _ = network.model.embed(tokens)
  losses = []

  def attend(layer, _, x, q, k, v, window):
    rows, keys = (jax.lax.stop_gradient(jnp.swapaxes(a, 1, 2)) for a in (q, k))
    target = attention_by_block(rows, keys, block=block, window=window)
    maps = gate.q[layer], gate.k[layer]
    logits = gate_logits(rows, pooled_keys(keys, block), past=0, block=block, maps=maps, theta=gate.theta)
    seen = jnp.isfinite(logits)
    scores = jnp.where(seen, jax.nn.log_softmax(logits, axis=-1), 0)
    entropy = jnp.where(target > 0, target * jnp.log(jnp.where(target > 0, target, 1)), 0)
    losses.append((entropy - target * scores).sum(axis=-1).mean())
    return dot_product_attention(q, k, v, window=window, start=0)

  run_layers(network, x, side, attend)
  return jnp.stack(losses).mean()


def attention_by_block(q, k, *, block: int, window: int | None = None):
  """The largest attention weight in every block, rows summing to 1: float32[batch, q_heads, query blocks, key blocks].

  A query block at a time, so that no attention map of the whole row is kept.
  """
  time = q.shape[2]
  position = jnp.arange(time)

  def one(i):
    rows = jax.lax.dynamic_slice_in_dim(q, i * block, block, axis=2)
    at = i * block + jnp.arange(block)[:, None]
    see = (position <= at) & (position >= at - (time if window is None else window))
    score = jnp.where(see, grouped_products(rows, k) / math.sqrt(q.shape[3]), -jnp.inf)
    weight = jax.nn.softmax(score, axis=-1)
    return weight.reshape(*weight.shape[:3], time // block, block).max(axis=(2, 4))

  top = jnp.moveaxis(jax.lax.map(one, jnp.arange(time // block)), 0, 2)
  return top / top.sum(axis=-1, keepdims=True)
