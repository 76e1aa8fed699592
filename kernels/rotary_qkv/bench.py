"""`rotary_qkv` against XLA's kernels for the same function."""

import jax
import jax.numpy as jnp

from jaxlab.kernels import Bench
from jaxlab.kernels.rotary_qkv import rotary_qkv


def cases(tiny: bool = False) -> dict[str, Bench]:
  """nanochat's heads at a width of 1280 (d20), with gated value embeddings."""
  return {f"{time} tokens, 30 heads of 128": _case(time) for time in ((8,) if tiny else (1, 64, 512, 2048))}


def _case(time: int, heads: int = 10, size: int = 128) -> Bench:
  keys = jax.random.split(jax.random.key(0), 4)
  normal = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
  angle = jnp.arange(time)[:, None] / 10000 ** (jnp.arange(size // 2) / (size // 2))
  arrays = (
    normal(keys[0], 1, time, 3 * heads, size),
    jnp.cos(angle).astype(jnp.bfloat16),
    jnp.sin(angle).astype(jnp.bfloat16),
    normal(keys[1], 1, time, heads, size),
    normal(keys[2], 1, time, heads),
  )
  how = dict(q_heads=heads, kv_heads=heads, norm="after_rope", gain=None, eps=1e-6, scale=1.2)
  how["interpret"] = jax.default_backend() != "gpu"
  rivals = {
    name: lambda *given, name=name: (rotary_qkv(*given[:-1], implementation=name, **how), None)
    for name in ("triton", "reference")
  }
  return Bench(rivals, arrays, None, sum(a.nbytes for a in arrays) + arrays[0].nbytes)
