"""Time of a decoding step through one layer of an 8B model's shapes, and of the merging, beside dense attention."""

import functools

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.chelsea import decoders
from experiments.decode_layer import (
  Contestant,
  dense_contestants,
  layer_of,
  random_weights,
  time_steps,
  weight_bytes,
)
from experiments.overlap import overlapped
from jaxlab.cache.chelsea import Layer, chelsea
from jaxlab.cache.chelsea_merging import compress, kept
from jaxlab.cache.entries import PAGE, Entries
from jaxlab.models import paged
from jaxlab.models.attention import dot_product_attention


def measure(config, console) -> dict:
  """{"steps": a case each, "merging": times of a prompt's}."""
  s = config.speed
  dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
  cases = [_steps(config, rows, context, dtype) for rows, context in console.track("decoding", list(s.cases))]
  console.say("timing what merging a prompt takes")
  return {"steps": cases, "merging": _merging(config, dtype), "bandwidth": timing.copy_bandwidth(repetitions=3)}


def _steps(config, rows: int, context: int, dtype) -> dict:
  """Milliseconds of one step of `rows` rows at `context` tokens, of the quickest dense attention and of Chelsea."""
  s, m = config.speed, config.method
  how = dict(rows=rows, context=context, layers=1, dtype=dtype)
  contestants = dense_contestants(s, **how) | {"Chelsea": _merged(config, rows, context - s.steps, dtype)}
  times, temporaries = time_steps(s, contestants, **how)
  best = min((name for name in contestants if name != "Chelsea"), key=times.median)
  ratio, spread = times.speedup("Chelsea", over=best)
  per_token = 2 * rows * s.kv_heads * s.head_dim * jnp.dtype(dtype).itemsize
  return {
    "rows": rows,
    "context": context,
    "milliseconds": {name: times.median(name) * 1e3 / s.steps for name in contestants},
    "best": best,
    "speedup": ratio,
    "spread": spread,
    "cache_bytes": per_token * context,
    "weight_bytes": weight_bytes(s, dtype),
    "chelsea_bytes": decoders.entries(m, s.keep, context) * (per_token + 4 * rows * s.kv_heads),
    "temporaries": temporaries,
  }


def _merged(config, rows: int, first: int, dtype) -> Contestant:
  """Chelsea behind a prompt of `first` tokens, with random centroids."""
  s, m = config.speed, config.method
  method = chelsea(keep=s.keep, **m.to_dict())
  body = (first - m.sink - m.recent) // m.chunk * m.chunk
  left, count = first - m.sink - body, kept(body, s.keep, m.chunk)
  room = (s.steps // m.chunk + 1) * kept(m.chunk, s.keep, m.chunk)

  def part(i, places: int, taken: int) -> Entries:
    shape = (rows, s.kv_heads, places)
    draw = lambda i: jax.random.normal(jax.random.key(i), (*shape, s.head_dim), dtype)
    size = jnp.broadcast_to((jnp.arange(places) < taken).astype(jnp.float32), shape)
    return Entries(draw(2 * i), draw(2 * i + 1), size)

  parts = part(2, -(-(count + room) // PAGE) * PAGE, count), part(3, m.sink, m.sink), part(4, m.recent + m.chunk, left)
  layer = Layer(*parts, *(jnp.full(rows, number, jnp.int32) for number in (count, left)))

  def attend(layer, q, k, v, x, memory, at):
    view = paged.View(layer, None, None, None, None, at, jnp.full(rows, at + 1, jnp.int32), x)
    return method.attend(q, k, v, view, memory)

  return Contestant(attend, (layer,))


def _merging(config, dtype) -> dict:
  """Milliseconds that one layer's prompt takes to be read and to be merged, in chunks and without."""
  s, m = config.speed, config.method
  w = random_weights(s, dtype)
  x = jax.random.normal(jax.random.key(1), (1, s.prompt, s.width), dtype)
  shape = (s.kv_heads, s.prompt, s.head_dim)
  keys, values = (jax.random.normal(jax.random.key(i), shape, dtype) for i in (2, 3))
  held = Entries(keys, values, jnp.ones(shape[:2], jnp.float32))

  def prefill(w, x):
    return layer_of(s, w, x, lambda q, k, v: (dot_product_attention(q, k, v), None))[0]

  by_head = lambda merging, e: jax.lax.map(functools.partial(merging, keep=config.keep, chunk=m.chunk), e)
  at_once = jax.vmap(functools.partial(compress, keep=config.keep, chunk=m.chunk))
  programs = {
    "prefill": (jax.jit(prefill), (w, x)),
    "Chelsea": (jax.jit(at_once), (held,)),
    "no chunks": (jax.jit(functools.partial(by_head, decoders.without_chunks)), (held,)),
  }
  compiled = dict(zip(programs, overlapped(lambda p: p[0].lower(*p[1]).compile(), programs.values()), strict=True))
  runs = {name: functools.partial(run, *programs[name][1]) for name, run in compiled.items()}
  times = timing.compare(runs, repetitions=s.repetitions, warmup=1)
  return {
    "prompt": s.prompt,
    "milliseconds": {name: times.median(name) * 1e3 for name in runs},
    "temporaries": {name: timing.memory(run)["temporaries"] for name, run in compiled.items()},
  }
