"""`decode_attention` against XLA's kernels and cuDNN's attention over the same cache, written in place."""

import functools

import jax
import jax.numpy as jnp

from jaxlab.kernels import Bench
from jaxlab.kernels.decode_attention import decode_attention
from jaxlab.models.attention import write_cache


def cases(tiny: bool = False) -> dict[str, Bench]:
  """One token of 1, 6 and 48 layers (or layers x sequences) at context 2048; Llama 3.1 8B's heads at 8192."""
  if tiny:
    return {"tiny": _case(layers=1, heads=(2, 1), size=16, context=40)}
  return {
    "1 layer, 5 heads of 128, context 2048": _case(layers=1, heads=(5, 5), size=128, context=2048),
    "6 layers, 5 heads of 128, context 2048": _case(layers=6, heads=(5, 5), size=128, context=2048),
    "48 layers, 5 heads of 128, context 2048": _case(layers=48, heads=(5, 5), size=128, context=2048),
    "1 layer, 32 over 8 heads of 128, context 8192": _case(layers=1, heads=(32, 8), size=128, context=8192),
  }


def _case(*, layers: int, heads: tuple[int, int], size: int, context: int) -> Bench:
  q_heads, kv_heads = heads
  keys = jax.random.split(jax.random.key(0), 5)
  new = [
    jax.random.normal(key, (layers, 1, 1, n, size), jnp.bfloat16)
    for key, n in zip(keys[:3], (q_heads, kv_heads, kv_heads), strict=True)
  ]
  cache = tuple(jax.random.normal(key, (layers, 1, context + 64, kv_heads, size), jnp.bfloat16) for key in keys[3:])
  rivals = {name: functools.partial(_ours, name) for name in ("triton", "reference")}
  if jax.default_backend() == "gpu":
    rivals["cudnn"] = _cudnn
  return Bench(rivals, (*new, jnp.int32(context)), cache, 2 * layers * context * kv_heads * size * 2)


def _ours(implementation: str, q, k, v, start, cache):
  interpret = jax.default_backend() != "gpu"
  how = dict(windows=(None,) * q.shape[0], start=start, implementation=implementation, interpret=interpret)
  out, (cache,) = decode_attention(q, k, v, [cache], **how)
  return out, cache


def _cudnn(q, k, v, start, cache):
  """All layers as one batch, as much of the cache as is filled."""
  fold = lambda a: a.reshape(-1, *a.shape[2:])
  keys, values = (write_cache(store, new, (0, 0, start)) for store, new in zip(cache, (k, v), strict=True))
  filled = jnp.full((q.shape[0] * q.shape[1],), start + 1, jnp.int32)
  out = jax.nn.dot_product_attention(
    fold(q), fold(keys), fold(values), key_value_seq_lengths=filled, implementation="cudnn"
  )
  return out.reshape(q.shape), (keys, values)
