"""How much faster a network with thinner maps reads and writes."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import timing
from experiments.compressing import Subject, stored
from jaxlab.models import Transformer, generate
from jaxlab.models.config import TransformerConfig
from jaxlab.weights import lord


def measure(config, subject: Subject) -> dict:
  """Random weights of config.speed.shape beside their LoRD at config.budget, one share for all maps.

  Returns:
    {"forward": [{rows, speedup, spread, dense: tokens/s}], "decode": speedup at one row, "seconds": to the bases}.
  """
  s = config.speed
  model = Transformer(TransformerConfig(**s.shape), jax.random.key(config.seed))
  read = np.random.default_rng(config.seed).integers(0, s.shape.vocab_size, (max(s.rows), s.time)).astype(np.int32)
  least = 4 * s.shape.width
  text = np.resize(read, (max(len(read), -(-least // s.time)), s.time))
  start = time.perf_counter()
  bases = jax.block_until_ready(lord.decompose(model, text, batch=len(text)))
  seconds = time.perf_counter() - start
  multiple = min(64, s.shape.width // 8)
  ranks = lord.uniform(bases, budget=config.budget, multiple=multiple)
  pair = {"dense": stored(model), "LoRD": stored(lord.truncate(model, bases, ranks))}
  forward = []
  for rows in s.rows:
    state = lambda model, tokens: model.hidden(tokens)[0]
    runs = {name: timing.Steady(state, one, jnp.asarray(read[:rows])) for name, one in pair.items()}
    times = timing.compare(runs, repetitions=s.repetitions)
    ratio, spread = times.speedup("LoRD", "dense")
    forward.append(dict(rows=rows, speedup=ratio, spread=spread, dense=rows * s.time / times.median("dense")))
  prompt = jnp.asarray(read[:1, :8])
  runs = {name: functools.partial(generate, one, prompt, tokens=s.tokens) for name, one in pair.items()}
  decode = timing.compare(runs, repetitions=s.repetitions, warmup=1).speedup("LoRD", "dense")[0]
  return {"forward": forward, "decode": decode, "seconds": seconds}
