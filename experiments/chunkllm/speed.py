"""Time of a decoding step through layers of an 8B model's shapes, chunks chosen anew where they end, beside dense."""

import types

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.decode_layer import PAGE, Contestant, dense_contestants, time_steps, weight_bytes
from jaxlab.attention.chunkllm import Prompt, chunkllm
from jaxlab.attention.chunkllm_chunks import ChunkAdapters
from jaxlab.models import paged
from jaxlab.models.config import TransformerConfig

_LAYERS = 2  # the second one says where chunks end


def measure(config, console) -> dict:
  """{rows, context, milliseconds of a step through a layer by contestant, best dense one, "keeps": {keep: {speedup,
  spread, read}}, ...}."""
  s = config.speed
  console.say(f"timing steps at {s.context} tokens")
  dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
  how = dict(rows=s.rows, context=s.context, layers=_LAYERS, dtype=dtype)
  dense = dense_contestants(s, **how)
  pools = dense["pages"].state
  contestants, read = dict(dense), {}
  for keep in s.keeps:
    contestants[f"{keep:g}"], read[f"{keep:g}"] = _chunked(s, keep, pools)
  times, temporaries = time_steps(s, contestants, **how)
  best = min(dense, key=times.median)
  size = jnp.dtype(dtype).itemsize
  keeps = {}
  for keep, share in read.items():
    ratio, spread = times.speedup(keep, over=best)
    keeps[keep] = {"speedup": ratio, "spread": spread, "read": share}
  return {
    "rows": s.rows,
    "context": s.context,
    "milliseconds": {name: times.median(name) * 1e3 / s.steps / _LAYERS for name in contestants},
    "best": best,
    "keeps": keeps,
    "cache_bytes": 2 * s.rows * s.context * s.kv_heads * s.head_dim * size,
    "weight_bytes": weight_bytes(s, dtype),
    "temporaries": temporaries,
    "bandwidth": timing.copy_bandwidth(repetitions=3),
  }


def _chunked(s, keep: float, pools) -> tuple[Contestant, float]:
  """(ChunkLLM whose chunks all have s.chunk tokens, share of the tokens read behind the prompt)."""
  shape = dict(vocab_size=8, depth=_LAYERS, width=s.width, mlp_width=s.mlp_width, head_dim=s.head_dim)
  model = TransformerConfig(**shape, q_heads=s.q_heads, kv_heads=s.kv_heads, context=s.context)
  adapters = ChunkAdapters(model, jax.random.key(7))
  options = dict(keep=keep, threshold=1.0, min_chunk=s.chunk, max_chunk=s.chunk, grain=s.grain)
  first, pages = s.context - s.steps, s.context // PAGE
  table = jnp.arange(s.rows * pages, dtype=jnp.int32).reshape(s.rows, pages)
  lengths = jnp.full(s.rows, first, jnp.int32)
  queries = jax.random.normal(jax.random.key(8), (_LAYERS, s.rows, s.q_heads, s.head_dim), pools[0][0].dtype)

  @jax.jit
  def memory_of(adapters, pools):
    prompt = Prompt(jnp.zeros((s.rows, s.context)), queries)
    state = paged.State(pools, table, lengths, prompt, None)
    network = types.SimpleNamespace(blocks=(None,) * _LAYERS)
    return chunkllm(adapters, **options).ready(network, state, first).memory

  memory = memory_of(adapters, pools)

  def attend(layer, q, k, v, x, state, at):
    adapters, pools, memory = state
    pair = tuple(paged.write(a, new, table, at) for a, new in zip(pools[layer], (k, v), strict=True))
    view = paged.View(layer, None, *pair, table, at, jnp.full(s.rows, at + 1, jnp.int32), x)
    out, memory = chunkllm(adapters, **options).attend(q, k, v, view, memory)
    return out, (adapters, (*pools[:layer], pair, *pools[layer + 1 :]), memory)

  share = float(memory.used.mean()) * s.grain / first
  return Contestant(attend, (adapters, pools, memory)), min(1.0, share)
