"""One token through n blocks side by side, in five kernels instead of ten and more.

A block of a small network takes less time to read than its kernels take to start.
"""

import jax
import jax.numpy as jnp

from jaxlab.core.checks import require, require_choice
from jaxlab.kernels.decode_block import gpu
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.block import Block, Side, join_heads, split_heads

IMPLEMENTATIONS = (None, "reference", "triton")
_WINDOW = 1 << 30  # of a layer that sees all


def usable(config, dtype) -> bool:
  """Whether blocks of this config are what the kernels compute, on a machine that runs them."""
  return jax.default_backend() == "gpu" and gpu.supports(config, dtype)


def decode_block(blocks: Block, x, pair, *, cos, sin, start, windows, chunk=1, implementation=None, interpret=False):
  """Outputs of n stacked blocks for one token, each on its own input, and their caches with that token.

  Args:
    blocks: of `block.for_inference`, every parameter with a leading axis n; plain pre-norm blocks with a dense
      MLP, no mixture of experts, hyper-connections, value embeddings or residual lambdas.
    x: (n, 1, 1, width).
    pair: keys and values of all layers, (n chunk, 1, capacity, kv_heads, head_dim) each.
    cos, sin: (1, head_dim / 2) or (1, 1, head_dim / 2), the token's rotary angles.
    start: positions filled, int32[] or int32[1]; windows: of the n chunk layers (`AttentionFn`).
    chunk: layers that a block is fused of (`snlp_suffix.fuse`).
    implementation: "reference" (XLA) or "triton"; None takes Triton on a GPU where it can.
    interpret: run the kernels in Pallas' interpreter, on any machine.

  Returns:
    (outputs like x, pair with the token's keys and values written at `start`). The new key and query are rounded to
    the dtype of x, softmax and sums are float32.

  Raises:
    InputError: an unknown implementation, or blocks the kernels cannot take for "triton".
  """
  require_choice("implementation", implementation, IMPLEMENTATIONS)
  c, n = blocks.config, x.shape[0]
  if implementation is None:
    implementation = "triton" if usable(c, x.dtype) else "reference"
  if implementation == "reference":
    return _reference(blocks, x, pair, cos, sin, start, windows, chunk)
  require(
    gpu.supports(c, x.dtype),
    "the Triton kernels take plain blocks with a dense MLP, a head_dim that is a power of two from 32 on, widths that "
    "are multiples of 4, at most 16 queries a key head and 32 bits; use implementation='reference'",
  )
  mlp = blocks.mlp
  gain = lambda norm: None if norm is None or norm.gain is None else norm.gain[...]
  heads = gain(blocks.q_norm)
  weights = gpu.Weights(
    gain(blocks.attention_norm),
    blocks.qkv.weight[...],
    None if heads is None else heads.reshape(n, -1),
    blocks.o.weight[...],
    gain(blocks.mlp_norm),
    (mlp.up if mlp.gate_up is None else mlp.gate_up).weight[...],
    mlp.down.weight[...],
  )
  shape = gpu.Shape(
    n, chunk, c.width, c.q_heads, c.kv_heads, c.head_dim, c.mlp_width, pair[0].shape[2], c.norm_eps, c.qk_norm,
    c.qk_scale,
  )  # fmt: skip
  sizes = jnp.array([_WINDOW if window is None else window for window in windows], jnp.int32)
  start = jnp.asarray(start, jnp.int32).reshape(1)
  out, *stored = gpu.decode_block(
    weights, x.reshape(n, c.width), *(jnp.squeeze(a, 1) for a in pair),
    cos=cos, sin=sin, windows=sizes, start=start, shape=shape, interpret=interpret,
  )  # fmt: skip
  return out.reshape(x.shape), tuple(a[:, None] for a in stored)


def _reference(blocks, x, pair, cos, sin, start, windows, chunk):
  """Products batched over the blocks, attention layer by layer."""
  side = Side(None, cos, sin, start, None, None)
  inner, _, *heads = jax.vmap(lambda block, x: block.project(x, side, None, None))(blocks, x)
  heads, attended = [split_heads(a, chunk) for a in heads], []
  for j, window in enumerate(windows):
    q, k, v = (a[j : j + 1] for a in heads)
    how = dict(windows=(window,), start=start, layer=j, attention=dot_product_attention)
    y, (pair,) = blocks.steps.attend_cached(q, k, v, (pair,), **how)
    attended.append(y)
  attended = join_heads(jnp.concatenate(attended), chunk)
  return jax.vmap(lambda block, x, y: block.finish(x, None, y, None)[0])(blocks, inner, attended), pair
