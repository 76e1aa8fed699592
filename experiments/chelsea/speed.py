"""Time of a decoding step through one layer of an 8B model's shapes, and of the merging, beside dense attention."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.chelsea import decoders
from experiments.overlap import overlapped
from jaxlab.attention.chunkllm import attend_units
from jaxlab.cache.chelsea import Entries, Layer, chelsea, compress, kept
from jaxlab.models import paged
from jaxlab.models.attention import dot_product_attention

_PAGE = 64


class Weights(NamedTuple):
  """Of one layer: queries, keys and values, output, gate and up, down."""

  query: jax.Array
  key_value: jax.Array
  out: jax.Array
  up: jax.Array
  down: jax.Array


def measure(config, console) -> dict:
  """{"steps": a case each, "merging": times of a prompt's}."""
  s = config.speed
  dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
  cases = [_steps(config, rows, context, dtype) for rows, context in console.track("decoding", list(s.cases))]
  console.say("timing what merging a prompt takes")
  return {"steps": cases, "merging": _merging(config, dtype), "bandwidth": timing.copy_bandwidth(repetitions=3)}


def _weights(s, dtype) -> Weights:
  heads, inner = s.q_heads * s.head_dim, s.kv_heads * s.head_dim
  shapes = (s.width, heads), (s.width, 2 * inner), (heads, s.width), (s.width, 2 * s.mlp_width), (s.mlp_width, s.width)
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return Weights(
    *(jax.random.normal(k, shape, dtype) * shape[0] ** -0.5 for k, shape in zip(keys, shapes, strict=True))
  )


def _layer(s, w: Weights, x, attend):
  """(the layer's output, what `attend` keeps) for one token a row, x: (rows, width); no norms, no rotation."""
  rows = len(x)
  q = (x @ w.query).reshape(rows, 1, s.q_heads, s.head_dim)
  k, v = jnp.split((x @ w.key_value).reshape(rows, 1, 2 * s.kv_heads, s.head_dim), 2, axis=2)
  out, kept_ = attend(q, k, v)
  x = x + out.reshape(rows, -1) @ w.out
  gate, up = jnp.split(x @ w.up, 2, axis=1)
  return x + (jax.nn.silu(gate) * up) @ w.down, kept_


def _steps(config, rows: int, context: int, dtype) -> dict:
  """Milliseconds of one step of `rows` rows at `context` tokens, of the quickest dense attention and of Chelsea."""
  s, m = config.speed, config.method
  w = _weights(s, dtype)
  x = jax.random.normal(jax.random.key(1), (rows, s.width), dtype)
  first = context - s.steps  # as many tokens are there before
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, dtype)

  def dense(implementation):
    shape = (rows, context, s.kv_heads, s.head_dim)

    def attend(q, k, v, cache, at):
      cache = tuple(jax.lax.dynamic_update_slice_in_dim(a, new, at, 1) for a, new in zip(cache, (k, v), strict=True))
      if implementation == "cudnn":
        length = jnp.full(rows, at + 1, jnp.int32)
        one = jnp.ones(rows, jnp.int32)
        how = dict(query_seq_lengths=one, key_value_seq_lengths=length, implementation="cudnn")
        return jax.nn.dot_product_attention(q, *cache, **how), cache
      return dot_product_attention(q, *cache, start=at), cache

    return attend, (draw(2, *shape), draw(3, *shape))

  def paged_dense():
    pages = context // _PAGE
    shape = (s.kv_heads, rows * pages, _PAGE, s.head_dim)
    table = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
    splits = max(1, 2 ** round(math.log2(max(1, 512 / (rows * s.kv_heads)))))

    def attend(q, k, v, pools, at):
      pools = tuple(paged.write(a, new, table, at) for a, new in zip(pools, (k, v), strict=True))
      lengths = jnp.full(rows, at + 1, jnp.int32)
      view = paged.View(0, None, *pools, table, at, lengths, None)
      return attend_units(q, view, table, at // _PAGE + 1 + jnp.zeros(rows, jnp.int32), _PAGE, splits=splits), pools

    return attend, (draw(2, *shape), draw(3, *shape))

  def merged():
    method = chelsea(keep=s.keep, **m.to_dict())
    body = (first - m.sink - m.recent) // m.chunk * m.chunk
    left, count = first - m.sink - body, kept(body, s.keep, m.chunk)
    room = -(-s.steps // m.chunk) * kept(m.chunk, s.keep, m.chunk)

    def part(i, places: int, taken: int) -> Entries:
      shape = (rows, s.kv_heads, places)
      size = jnp.broadcast_to((jnp.arange(places) < taken).astype(jnp.float32), shape)
      return Entries(draw(2 * i, *shape, s.head_dim), draw(2 * i + 1, *shape, s.head_dim), size)

    each = lambda number: jnp.full(rows, number, jnp.int32)
    parts = part(2, count + room, count), part(3, m.sink, m.sink), part(4, m.recent + m.chunk, left)
    layer = Layer(*parts, each(count), each(left))

    def attend(q, k, v, memory, at):
      view = paged.View(0, None, None, None, None, at, jnp.full(rows, at + 1, jnp.int32), None)
      return method.attend(q, k, v, view, memory)

    return attend, (layer,)

  def program(attend):
    def run(w, x, state):
      def one(carry, i):
        x, state = carry
        y, state = _layer(s, w, x, lambda q, k, v: attend(q, k, v, state, first + i))
        return (y / jnp.sqrt(jnp.mean(jnp.square(y.astype(jnp.float32)))).astype(y.dtype), state), None

      (x, state), _ = jax.lax.scan(one, (x, state), jnp.arange(s.steps))
      return x

    return run

  contestants = {"XLA": dense("xla"), "pages": paged_dense()} | {"Chelsea": merged()}
  if jax.default_backend() == "gpu":
    contestants = {"cuDNN": dense("cudnn")} | contestants
  compile_ = lambda job: jax.jit(program(job[0])).lower(w, x, job[1]).compile()
  compiled = dict(zip(contestants, overlapped(compile_, contestants.values()), strict=True))
  runs = {name: functools.partial(run, w, x, contestants[name][1]) for name, run in compiled.items()}
  times = timing.compare(runs, repetitions=s.repetitions, warmup=1)
  entries = decoders.entries(m, s.keep, first)
  size = jnp.dtype(dtype).itemsize
  per_token = 2 * rows * s.kv_heads * s.head_dim * size
  dense_names = [name for name in runs if name != "Chelsea"]
  best = min(dense_names, key=times.median)
  ratio, spread = times.speedup("Chelsea", over=best)
  return {
    "rows": rows,
    "context": context,
    "milliseconds": {name: times.median(name) * 1e3 / s.steps for name in runs},
    "best": best,
    "speedup": ratio,
    "spread": spread,
    "cache_bytes": per_token * context,
    "weight_bytes": sum(a.size * size for a in w),
    "chelsea_bytes": entries * (per_token + 4 * rows * s.kv_heads),
    "temporaries": {name: timing.memory(run)["temporaries"] for name, run in compiled.items()},
  }


def _merging(config, dtype) -> dict:
  """Milliseconds that one layer's prompt takes to be read and to be merged, in chunks and without."""
  s, m = config.speed, config.method
  w = _weights(s, dtype)
  x = jax.random.normal(jax.random.key(1), (1, s.prompt, s.width), dtype)
  shape = (s.kv_heads, s.prompt, s.head_dim)
  keys, values = (jax.random.normal(jax.random.key(i), shape, dtype) for i in (2, 3))
  held = Entries(keys, values, jnp.ones(shape[:2], jnp.float32))

  def prefill(w, x):
    heads = lambda a, count: a.reshape(1, -1, count, s.head_dim)
    k, v = jnp.split(heads(x @ w.key_value, 2 * s.kv_heads), 2, axis=2)
    y = x + dot_product_attention(heads(x @ w.query, s.q_heads), k, v).reshape(1, s.prompt, -1) @ w.out
    gate, up = jnp.split(y @ w.up, 2, axis=2)
    return y + (jax.nn.silu(gate) * up) @ w.down

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
