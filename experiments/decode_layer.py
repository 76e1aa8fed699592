"""Decoding steps through layers of an 8B model's shapes: random weights, a long cache, whatever attention."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.overlap import overlapped
from jaxlab.attention.chunkllm import attend_units
from jaxlab.core.checks import require
from jaxlab.models import paged
from jaxlab.models.attention import dot_product_attention

PAGE = 64


class Weights(NamedTuple):
  """Of one layer: queries, keys and values, output, gate and up, down. All layers are alike."""

  query: jax.Array
  key_value: jax.Array
  out: jax.Array
  up: jax.Array
  down: jax.Array


class Contestant(NamedTuple):
  """attend: (layer, q, k, v of one token a row, x, state, position) -> (attention like q, state); the first state."""

  attend: Callable
  state: object


def random_weights(s, dtype) -> Weights:
  heads, inner = s.q_heads * s.head_dim, s.kv_heads * s.head_dim
  shapes = (s.width, heads), (s.width, 2 * inner), (heads, s.width), (s.width, 2 * s.mlp_width), (s.mlp_width, s.width)
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return Weights(
    *(jax.random.normal(k, shape, dtype) * shape[0] ** -0.5 for k, shape in zip(keys, shapes, strict=True))
  )


def layer_of(s, w: Weights, x, attend):
  """(the layer's output, what `attend(q, k, v)` keeps) for x (rows, time, width); no rotation."""
  heads = lambda a, count: a.reshape(*x.shape[:2], count, s.head_dim)
  normal = lambda x: x / jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)).astype(x.dtype)
  y = normal(x)
  k, v = jnp.split(heads(y @ w.key_value, 2 * s.kv_heads), 2, axis=2)
  out, state = attend(heads(y @ w.query, s.q_heads), k, v)
  x = x + out.reshape(*x.shape[:2], -1) @ w.out
  gate, up = jnp.split(normal(x) @ w.up, 2, axis=-1)
  return x + (jax.nn.silu(gate) * up) @ w.down, state


def time_steps(s, contestants: dict[str, Contestant], *, rows: int, context: int, layers: int, dtype):
  """(`timing.Times` of s.steps tokens a row, up to position `context`; {name: temporary bytes}).

  Every contestant starts from its first state in every repetition; one copy of it is in the time of all its steps.

  Raises:
    InputError: steps that end in no numbers: what a method chooses, and so its time, would mean nothing.
  """
  w, first = random_weights(s, dtype), context - s.steps
  x = jax.random.normal(jax.random.key(1), (rows, 1, s.width), dtype)

  def program(contestant):
    def run(w, x, state):
      def one(carry, i):
        x, state = carry
        for layer in range(layers):
          attend = lambda q, k, v: contestant.attend(layer, q, k, v, x, state, first + i)  # noqa: B023 (used at once)
          x, state = layer_of(s, w, x, attend)
        return (x, state), None

      (x, state), _ = jax.lax.scan(one, (x, state), jnp.arange(s.steps))
      return x

    return jax.jit(run).lower(w, x, contestant.state).compile()

  compiled = dict(zip(contestants, overlapped(program, contestants.values()), strict=True))
  runs = {name: functools.partial(run, w, x, contestants[name].state) for name, run in compiled.items()}
  for name, run in runs.items():
    require(bool(jnp.isfinite(run()).all()), f"{name}: the steps' output is no number; it cannot be timed so")
  times = timing.compare(runs, repetitions=s.repetitions, warmup=0)
  return times, {name: timing.memory(run)["temporaries"] for name, run in compiled.items()}


def weight_bytes(s, dtype) -> int:
  """Of one layer."""
  shapes = jax.eval_shape(lambda: random_weights(s, dtype))
  return sum(a.size * a.dtype.itemsize for a in shapes)


def dense_contestants(s, *, rows: int, context: int, layers: int, dtype) -> dict[str, Contestant]:
  """Dense attention by XLA, over pages by this library's kernel, and on a GPU by cuDNN."""
  whole = _pairs((rows, context, s.kv_heads, s.head_dim), layers, dtype)
  pages = context // PAGE
  pools = _pairs((s.kv_heads, rows * pages, PAGE, s.head_dim), layers, dtype)
  table = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)

  def over_pages(layer, q, k, v, x, state, at):
    pair = tuple(paged.write(a, new, table, at) for a, new in zip(state[layer], (k, v), strict=True))
    view = paged.View(layer, None, *pair, table, at, jnp.full(rows, at + 1, jnp.int32), x)
    used = jnp.full(rows, at // PAGE + 1, jnp.int32)
    places = jnp.broadcast_to(jnp.arange(pages, dtype=jnp.int32), table.shape)  # of a row's own pages
    out = attend_units(q, view, places, used, PAGE)
    return out, (*state[:layer], pair, *state[layer + 1 :])

  made = {"XLA": Contestant(_over_rows(_by_xla), whole), "pages": Contestant(over_pages, pools)}
  return ({"cuDNN": Contestant(_over_rows(_by_cudnn), whole)} if jax.default_backend() == "gpu" else {}) | made


def _over_rows(attention):
  def attend(layer, q, k, v, x, state, at):
    write = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, at, 1)
    pair = tuple(map(write, state[layer], (k, v)))
    return attention(q, *pair, at), (*state[:layer], pair, *state[layer + 1 :])

  return attend


def _by_xla(q, k, v, at):
  return dot_product_attention(q, k, v, start=at)


def _by_cudnn(q, k, v, at):
  lengths = dict(
    query_seq_lengths=jnp.ones(len(q), jnp.int32), key_value_seq_lengths=jnp.full(len(q), at + 1, jnp.int32)
  )
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)


def _pairs(shape, layers: int, dtype):
  draw = lambda i: jax.random.normal(jax.random.key(i), shape, dtype)
  return tuple((draw(2 * i), draw(2 * i + 1)) for i in range(layers))
