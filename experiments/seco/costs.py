"""Time and temporary memory of one gradient, by backpropagation and in chunks, over lengths."""

import functools

import jax
import numpy as np

from experiments import timing
from experiments.long_finetuning import backpropagation, stretched
from jaxlab.models import Transformer
from jaxlab.models.attention import dot_product_attention
from jaxlab.sequence import seco

NAIVE, LAYERS = "naive", "layers recomputed"


def in_chunks(chunk: int, visited: int | None = None) -> str:
  return f"SeCO {chunk}" if visited is None else f"SpaCO {chunk}, {visited}"


def blockwise(q, k, v, *, window, start, block: int = 128):
  """An `AttentionFn` that keeps no scores, where there is no flash attention: queries by blocks, again backwards."""
  rows, time = q.shape[:2]
  if time <= block or time % block:
    return dot_product_attention(q, k, v, window=window, start=start)
  parts = q.reshape(rows, time // block, block, *q.shape[2:]).swapaxes(0, 1)

  @jax.checkpoint
  def one(part, k, v, first):
    return dot_product_attention(part, k, v, window=window, start=first)

  out = jax.lax.map(lambda at: one(at[0], k, v, at[1]), (parts, start + block * np.arange(time // block)))
  return out.swapaxes(0, 1).reshape(q.shape)


def gradients_of(config, length: int) -> dict:
  """{name: GradientFn} of those that are compared at a length."""
  identity, c = (lambda model: model), config.costs
  whole = dot_product_attention if jax.default_backend() == "gpu" else blockwise
  found = {NAIVE: backpropagation(identity, attention=whole, remat="none")}
  found[LAYERS] = backpropagation(identity, attention=whole, remat="full")
  for chunk in c.chunks:
    if chunk < length:
      found[in_chunks(chunk)] = seco.gradient(chunk=chunk)
  for visited in c.visited:
    if visited < length // c.chunks[0]:
      found[in_chunks(c.chunks[0], visited)] = seco.gradient(chunk=c.chunks[0], visited=visited)
  return found


def measure(config, model: Transformer, console) -> dict:
  """{length: {"temporaries": {name: bytes}, "milliseconds": {name: median, p10, p90}}}.

  Times are of lengths in costs.timed, and of gradients whose temporaries fit costs.limit bytes.
  """
  c, rng, found = config.costs, np.random.default_rng(config.seed), {}
  for length in c.lengths:
    console.say(f"gradients of {length} tokens")
    ids = rng.integers(0, model.config.vocab_size, (1, length + 1)).astype(np.int32)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    long = stretched(model, length, "none")
    contestants = {
      name: timing.Steady(functools.partial(_called, gradient_fn), long, batch, jax.random.key(0))
      for name, gradient_fn in gradients_of(config, length).items()
    }
    timing.compile_all(contestants)
    temporaries = {name: one.memory()["temporaries"] for name, one in contestants.items()}
    fits = {name: one for name, one in contestants.items() if temporaries[name] <= c.limit and length in c.timed}
    times = timing.compare(fits, repetitions=c.repetitions, warmup=1).summary() if fits else {}
    found[f"{length}"] = {"temporaries": temporaries, "milliseconds": times}
  return found


def _called(gradient_fn, model, batch, key):
  return gradient_fn(model, batch, 0, key)
