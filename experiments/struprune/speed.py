"""How much faster a network with fewer heads and neurons reads and writes."""

import jax
import numpy as np

from experiments.compressing import stored
from experiments.compressing_speed import speeds
from jaxlab.models import Transformer
from jaxlab.models.config import TransformerConfig
from jaxlab.weights import structured
from jaxlab.weights.structured import Groups, Least


def measure(config) -> dict:
  """Random weights of config.speed.shape beside the same with config.budget of its blocks' parameters, layers at sizes
  of their own, as `compressing_speed.speeds`; "share" is that of the parameters."""
  s = config.speed
  model = Transformer(TransformerConfig(**s.shape), jax.random.key(config.seed))
  c, rng = model.config, np.random.default_rng(config.seed)
  read = rng.integers(0, c.vocab_size, (max(s.rows), s.time)).astype(np.int32)
  # Few different sizes, as every shape is tuned and compiled by itself: the first and last quarter keep more.
  more = np.isin(np.arange(c.depth) * 4 // c.depth, (0, 3))
  numbers = config.budget * structured.dense_parameters(c)
  shares = np.clip(np.where(more, 1.2, 0.8) * config.budget, 0, 1)[:, None].repeat(2, axis=1)
  heads, neurons = structured.counts(shares, c, numbers=numbers, least=Least(1, s.multiple), multiple=s.multiple)
  score = Groups(rng.random((c.depth, c.kv_heads)), rng.random((c.depth, c.mlp_width)))
  keep = Groups(structured.top(score.heads, heads), structured.top(score.neurons, neurons))
  small = structured.sliced(model, keep)
  found = speeds(s, stored(model), stored(small), read)
  return found | {"share": structured.parameters(keep, c) / structured.dense_parameters(c)}
