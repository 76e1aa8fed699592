"""Attention of one chunk over a long past: forms of executing one selection, timed beside dense attention."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import timing
from experiments.compact_attention.choosing import captured
from experiments.long_context import Subject, documents
from jaxlab.attention.compact_attention import attend_blocks, attend_union, block_union, density
from jaxlab.attention.selection import block_means, flash_prefill
from jaxlab.models import paged
from jaxlab.training.metrics import peak_flops

DENSE, FULL, SPARSE, COPY, IN_PLACE, TRITON, SELECTION, WHOLE = (
  "dense", "full table", "block-sparse", "copied", "in place", "in place by Triton", "selection",
  "selection and in place",
)  # fmt: skip
PLANTED = "planted"
_TOPICS, _OF_CHUNK, _OF_BLOCK = 16, 5, 2  # what keys are about; what a chunk asks for; what a head's query block does
_ROUNDS = 16  # of bisection


class Problem(NamedTuple):
  """Queries (1, chunk, q_heads, head_dim); keys and values (1, length, kv_heads, head_dim) of past and chunk."""

  q: jax.Array
  k: jax.Array
  v: jax.Array


@functools.partial(jax.jit, static_argnames=("length", "chunk", "block", "heads", "kv_heads", "size", "dtype"))
def planted(key, *, length: int, chunk: int, block: int, heads: int, kv_heads: int, size: int, dtype) -> Problem:
  """Keys whose blocks are about topics, more or less, and queries that ask for some of them; the first block draws
  everybody. Nearby heads and query blocks ask for overlapping topics, as those of trained networks do."""
  keys = jax.random.split(key, 8)
  blocks, tiles, group = length // block, chunk // block, heads // kv_heads
  topics = jax.random.normal(keys[0], (kv_heads, _TOPICS, size))
  sink = jax.random.normal(keys[1], (kv_heads, size))
  about = jax.random.randint(keys[2], (kv_heads, blocks), 0, _TOPICS)
  strength = jax.random.uniform(keys[3], (kv_heads, blocks, 1), minval=0.4, maxval=0.8)
  base = strength * jnp.take_along_axis(topics, about[..., None], axis=1)
  base = base.at[:, 0].set(0.7 * sink)
  k = jnp.repeat(base, block, axis=1) + jax.random.normal(keys[4], (kv_heads, length, size))
  rank = jax.random.uniform(keys[5], (kv_heads, group, tiles, _OF_CHUNK))  # topics 0 .. 4 are what the chunk asks for
  asked = rank.argsort(axis=-1)[..., :_OF_BLOCK]
  wish = jax.vmap(lambda topics, asked: topics[asked].sum(axis=-2))(topics, asked) + sink[:, None, None]
  q = 0.7 * jnp.repeat(wish.reshape(heads, tiles, size), block, axis=1)
  q = q + jax.random.normal(keys[6], (heads, chunk, size))
  v = jax.random.normal(keys[7], (kv_heads, length, size))
  return Problem(*(jnp.swapaxes(a, 0, 1)[None].astype(dtype) for a in (q, k, v)))


def dumped(subject: Subject, *, length: int, chunk: int, layer: int) -> Problem:
  """The last chunk of one layer of a network on held-out text; the keys stand for the values, too."""
  q, k = captured(subject.network, documents(subject.tokens, 1, length))[layer]
  q, k = (jnp.swapaxes(a, 1, 2) for a in (q, k))
  return Problem(q[:, -chunk:], k, k)


def measure(config, problem: Problem) -> dict:
  """All forms at the selection of FlashPrefill's rule whose union reads `executions.density` of what is causal.

  Returns:
    {"alpha", "before", "after": densities, "milliseconds": {form: {median, p10, p90}}, "tflops": {form: achieved in
    attention's products}, "speedup": {form: [median, p10, p90] over dense attention}, "peak": TFLOP/s of the device,
    "temporaries": bytes of selection and attention in place, "scores": bytes that the chunk's scores would take}.
  """
  e = config.executions
  length, chunk, page = problem.k.shape[1], problem.q.shape[1], e.page
  past = (length - chunk) // page
  view, rows, means = _prepared(problem, page)
  choose = functools.partial(flash_prefill, block=page, sink=config.select.sink, window=config.select.window)
  at = lambda alpha: choose(rows, means, past=past * page, alpha=alpha)
  alpha, chosen = _at_density(at, problem.k.shape[2], past, e.density)
  wanted = block_union(chosen, kv_heads=problem.k.shape[2], past=past)
  given, most = (problem, view, means, chosen, wanted), int(wanted.sum(axis=-1).max())
  forms = {name: timing.Steady(form, given) for name, form in _forms(choose, alpha, most).items()}
  times = timing.compare(forms, repetitions=e.repetitions)
  work = _flops(problem, chosen, wanted, page)
  over = {name: times.speedup(name, over=DENSE) for name in forms if name != DENSE}
  return {
    "alpha": alpha,
    "before": float(density(chosen, past)),
    "after": float(density(_for_heads(wanted, chosen), past)),
    "milliseconds": times.summary(),
    "tflops": {name: work[name] / times.median(name) / 1e12 for name in work if name in forms},
    "speedup": {name: [ratio, *spread] for name, (ratio, spread) in over.items()},
    "peak": peak_flops() / 1e12,
    "temporaries": forms[WHOLE].memory()["temporaries"],
    "scores": problem.q.shape[2] * chunk * length * problem.q.dtype.itemsize,
  }


@functools.partial(jax.jit, static_argnames="page")
def _prepared(problem: Problem, page: int):
  """(the keys and values in pages, queries for a selector, mean keys of all pages)."""
  pool = lambda a: jnp.moveaxis(a[0], 1, 0).reshape(a.shape[2], -1, page, a.shape[3])
  length = problem.k.shape[1]
  table = jnp.arange(length // page, dtype=jnp.int32)[None]
  start, lengths = jnp.int32(length - problem.q.shape[1]), jnp.full((1,), length)
  view = paged.View(0, None, pool(problem.k), pool(problem.v), table, start, lengths, problem.q)
  return view, jnp.swapaxes(problem.q, 1, 2), block_means(jnp.swapaxes(problem.k, 1, 2), page)


def _forms(choose: Callable, alpha: float, most: int) -> dict[str, Callable]:
  """What is timed, as functions of (problem, view, means, chosen, wanted): dense attention knows no table, the full
  table holds every page, `most` is what is copied for a row, and the last one knows the keys' means alone."""
  backend = "cudnn" if jax.default_backend() == "gpu" else "xla"

  def dense(a):
    # Without a mask: cuDNN's causal one is of squares. Half a chunk of keys in excess is the least it can do.
    return jax.nn.dot_product_attention(*a[0], implementation=backend)

  def selected(a):
    problem, view, means, *_ = a
    page = view.keys.shape[2]
    fresh = block_means(jnp.swapaxes(problem.k[:, -problem.q.shape[1] :], 1, 2), page)
    means = jax.lax.dynamic_update_slice(means, fresh, (0, 0, view.start // page, 0))
    chosen = choose(jnp.swapaxes(problem.q, 1, 2), means, past=view.start, alpha=alpha)
    return block_union(chosen, kv_heads=problem.k.shape[2], past=view.start // page)

  forms = {
    DENSE: dense,
    FULL: lambda a: attend_union(a[0].q, a[1], jnp.ones_like(a[4]))[0],
    SPARSE: lambda a: attend_blocks(a[0].q, a[1], a[3])[0],
    COPY: lambda a: attend_union(a[0].q, a[1], a[4], copy=True, capacity=most)[0],
    IN_PLACE: lambda a: attend_union(a[0].q, a[1], a[4])[0],
    SELECTION: selected,
    WHOLE: lambda a: attend_union(a[0].q, a[1], selected(a))[0],
  }
  by_triton = {TRITON: lambda a: attend_union(a[0].q, a[1], a[4], implementation="triton")[0]}
  return forms | (by_triton if backend == "cudnn" else {})


def _at_density(choose: Callable, kv_heads: int, past: int, target: float) -> tuple[float, jax.Array]:
  """(alpha, the selection) whose union comes nearest to `target` from below, by bisection of log alpha."""

  @jax.jit
  def read(alpha):
    chosen = choose(alpha)
    return chosen, density(_for_heads(block_union(chosen, kv_heads=kv_heads, past=past), chosen), past)

  low, high = -12.0, 0.0
  for _ in range(_ROUNDS):
    middle = (low + high) / 2
    _, found = read(float(np.exp(middle)))
    low, high = (middle, high) if float(found) > target else (low, middle)
  alpha = float(np.exp(high))
  return alpha, read(alpha)[0]


def _for_heads(wanted, chosen):
  """The union of a group for every head and query block, like `chosen`."""
  group = chosen.shape[1] // wanted.shape[1]
  return jnp.broadcast_to(jnp.repeat(wanted, group, axis=1)[:, :, None], chosen.shape)


def _flops(problem: Problem, chosen, wanted, page: int) -> dict[str, float]:
  """Of both products over the (query, key) pairs that a form attends to."""
  (_, chunk, heads, size), length = problem.q.shape, problem.k.shape[1]
  past, own = length - chunk, chunk * (chunk + 1) / 2
  behind = np.arange(length // page) < past // page
  union = heads / wanted.shape[1] * chunk * page * float((np.asarray(wanted) & behind).sum()) + heads * own
  diagonal = np.arange(chunk // page)[:, None] + past // page == np.arange(length // page)
  blocks = float((np.asarray(chosen) & ~diagonal).sum()) * page * page + heads * chunk * (page + 1) / 2
  pairs = {
    DENSE: heads * chunk * length,
    FULL: heads * (chunk * past + own),
    SPARSE: blocks,
    COPY: union,
    IN_PLACE: union,
    TRITON: union,
  }
  return {name: 4 * size * count for name, count in (pairs | {WHOLE: union}).items()}
