"""How much faster a compressed network reads and writes."""

import functools

import jax.numpy as jnp
import numpy as np

from experiments import timing
from jaxlab.models import Transformer, generate, inference
from jaxlab.models.attention import dot_product_attention


def speeds(s, dense: Transformer, small: Transformer, read: np.ndarray) -> dict:
  """How much faster a smaller network reads s.rows rows of s.time tokens and writes s.tokens tokens of one.

  Returns:
    {"forward": [{rows, speedup, spread, dense: tokens/s}], "decode": speedup at one row}.
  """
  pair, forward = {"dense": dense, "small": small}, []
  networks, state = pair, lambda model, tokens: model.hidden(tokens)[0]
  if small.config.ragged:  # its layers run by themselves, and so then do the others
    networks = {name: inference.take_apart(one, narrow=True) for name, one in pair.items()}
    state = lambda network, tokens: inference.hidden(network, tokens, None, attention=dot_product_attention)[0]
  for rows in s.rows:
    runs = {name: timing.Steady(state, one, jnp.asarray(read[:rows])) for name, one in networks.items()}
    times = timing.compare(runs, repetitions=s.repetitions)
    ratio, spread = times.speedup("small", "dense")
    forward.append(dict(rows=rows, speedup=ratio, spread=spread, dense=rows * s.time / times.median("dense")))
  prompt = jnp.asarray(read[:1, :8])
  runs = {name: functools.partial(generate, one, prompt, tokens=s.tokens) for name, one in pair.items()}
  decode = timing.compare(runs, repetitions=s.repetitions, warmup=1).speedup("small", "dense")[0]
  return {"forward": forward, "decode": decode}
