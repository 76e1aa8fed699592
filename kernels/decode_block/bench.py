"""`decode_block` against XLA's products between this library's other kernels, which were the fastest before.

The weights of a single block stay in the card's cache from call to call, for both; those of sixteen do not.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlab.kernels import Bench
from jaxlab.kernels.decode_block import decode_block
from jaxlab.models import Transformer
from jaxlab.models.block import for_inference
from jaxlab.models.config import TransformerConfig, nanochat, qwen3
from jaxlab.models.inference import kernel_steps
from jaxlab.models.layers import rope_table


def cases(tiny: bool = False) -> dict[str, Bench]:
  """Blocks of SmolLM2-135M, one and sixteen side by side, and of 32 x 640; a token at context 384 and 2048."""
  llama = lambda **sizes: dataclasses.replace(qwen3(vocab_size=32, context=8192, **sizes), qk_norm=None)
  if tiny:
    shape = llama(depth=2, width=64, q_heads=2, kv_heads=1, head_dim=32, mlp_width=96)
    return {"tiny": _case(shape, context=40)}
  smollm2 = llama(depth=16, width=576, q_heads=9, kv_heads=3, head_dim=64, mlp_width=1536)
  wide = nanochat(depth=32, aspect_ratio=20, vocab_size=32, x0=False, value_embeddings=False, window_pattern="L")
  return {
    "1 block of SmolLM2-135M, context 384": _case(dataclasses.replace(smollm2, depth=1), context=384),
    "16 blocks of SmolLM2-135M, context 384": _case(smollm2, context=384),
    "1 block of 32 x 640, context 2048": _case(dataclasses.replace(wide, depth=1, width=640), context=2048),
  }


def _case(config: TransformerConfig, *, context: int) -> Bench:
  dtype = jnp.bfloat16
  keys = iter(jax.random.split(jax.random.key(0), 64))
  blocks = for_inference(Transformer(config, next(keys)).blocks, kernel_steps(config, dtype))
  blocks = jax.tree.map(lambda a: (0.02 * jax.random.normal(next(keys), a.shape)).astype(dtype), blocks)
  n = config.depth
  x = jax.random.normal(next(keys), (n, 1, 1, config.width), dtype)
  store = (n, 1, context + 64, config.kv_heads, config.head_dim)
  pair = tuple(jax.random.normal(next(keys), store, dtype) for _ in range(2))
  cos, sin = rope_table(config, jnp.array([context]), dtype)

  def run(implementation: str, blocks, x, pair):
    interpret = implementation == "triton" and jax.default_backend() != "gpu"
    how = dict(cos=cos, sin=sin, start=jnp.int32(context), windows=config.windows)
    return decode_block(blocks, x, pair, implementation=implementation, interpret=interpret, **how)

  rivals = {name: lambda *given, name=name: run(name, *given) for name in ("triton", "reference")}
  weights = sum(a.nbytes for a in jax.tree.leaves(blocks))
  return Bench(rivals, (blocks, x), pair, weights + 2 * n * context * config.kv_heads * config.head_dim * 2)
