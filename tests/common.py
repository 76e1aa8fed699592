"""Small models and reference code that several test files share."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.models import Transformer, TransformerConfig
from jaxlab.models.config import Experts, HyperConnections, nanochat, qwen3

SHAPE = dict(depth=6, width=32, q_heads=4, kv_heads=2, head_dim=16, mlp_width=64, vocab_size=64)


def configs() -> dict[str, TransformerConfig]:
  """One tiny config for every kind of model; the nanochat ones have a 128-token short window."""
  chat = dict(depth=6, aspect_ratio=8, head_dim=16, vocab_size=64, context=512)
  return {
    "nanochat": nanochat(**chat),
    "nanochat_plain": nanochat(**chat, x0=False, value_embeddings=False, window_pattern="L"),
    "mhc": nanochat(**chat, hyper=HyperConnections()),
    "mhc_dynamic": nanochat(**chat, hyper=HyperConnections(dynamic=True, rounds=20)),
    "llama": TransformerConfig(**SHAPE),
    "qwen3": qwen3(**SHAPE, context=512),
    "qwen3_moe": TransformerConfig(**SHAPE, qk_norm="before_rope", experts=Experts(count=4, active=2, width=24)),
  }


def random_model(config: TransformerConfig, seed: int = 0, dtype="float32") -> Transformer:
  """Every parameter random: a zero-initialised projection would make tests pass for any code."""
  model = Transformer(config, jax.random.key(seed))
  leaves, structure = jax.tree.flatten(model)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  noise = lambda k, a: (a + 0.15 * jax.random.normal(k, a.shape) / (1 if a.ndim < 2 else 1.5)).astype(dtype)
  return jax.tree.unflatten(structure, [noise(k, a) for k, a in zip(keys, leaves, strict=True)])


def random_tokens(batch: int, time: int, vocab: int = 64, seed: int = 0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, time)), jnp.int32)
