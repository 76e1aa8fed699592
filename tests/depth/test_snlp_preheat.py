"""The predicted start: exact where the trace is affine in the embeddings, never worse than the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.depth import snlp, snlp_preheat
from tests.common import configs, random_model, random_tokens

BATCHES = [random_tokens(8, 16, seed=s) for s in range(20)]


def test_an_affine_trace_is_predicted_exactly():
  """Without branches z_j = a_j x0: full rank recovers it, and one step from that start is the network."""
  model = random_model(configs()["nanochat"])
  for linear in (model.blocks.o, model.blocks.mlp.down):
    linear.weight.set_value(jnp.zeros_like(linear.weight[...]))
  _, trace, side = jax.jit(lambda m: m.trace(BATCHES[0]))(model)
  preheat = snlp_preheat.fit(model, BATCHES, layers=4, rank=model.config.width, ridge=1e-9)
  start = snlp_preheat.predict(preheat, side.x0)
  np.testing.assert_allclose(start, trace[2:], rtol=1e-2, atol=1e-2)


def test_the_prediction_is_better_than_the_mean_on_new_text():
  """Not better than h0: h_S knows the context, x0 only its own token."""
  model = random_model(configs()["llama"])
  tokens = random_tokens(4, 16, seed=9)
  _, trace, side = jax.jit(lambda m: m.trace(tokens))(model)
  error = lambda z: float(jnp.mean(jnp.square(z - trace[2:])))
  preheat = snlp_preheat.fit(model, BATCHES, layers=4, rank=24)
  start = snlp_preheat.predict(preheat, side.x0)
  mean = error(jnp.broadcast_to(preheat.offset[:, None, None], trace[2:].shape))
  assert error(start) < 0.98 * mean
  options = dict(layers=4, iterations=4)
  z = jax.jit(lambda m, z: snlp.solve(m, trace[1], side, initial=z, **options).trace)(model, start)
  np.testing.assert_allclose(z[1:], trace[2:], rtol=1e-4, atol=1e-4)  # K = n from any start


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("mhc", dict(layers=2), "plain states"),
    ("llama", dict(layers=2, rank=33), "rank is 33"),
    ("llama", dict(layers=7), "is 7; it must lie in 1..6"),
  ],
)
def test_impossible_fits_are_named(name, options, message):
  with pytest.raises(InputError, match=message):
    snlp_preheat.fit(random_model(configs()[name]), BATCHES, **options)
  with pytest.raises(InputError, match="at least one batch"):
    snlp_preheat.fit(random_model(configs()["llama"]), [], layers=2)
