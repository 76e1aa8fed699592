"""How much faster a network with thinner maps reads and writes."""

import time

import jax
import numpy as np

from experiments.compressing import Subject, stored
from experiments.compressing_speed import speeds
from jaxlab.models import Transformer
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
  pair = stored(model), stored(lord.truncate(model, bases, ranks))
  return speeds(s, *pair, read) | {"seconds": seconds}
