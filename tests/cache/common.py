"""What tests of several cache methods share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.models.generate import Decoder
from tests.common import random_tokens

LENGTHS, STEPS = (38, 19), 9


def assert_rows_are_alone(network, decoder: Decoder) -> None:
  """Logits of a padded row, behind its prompt and of every token after it, are those of the row without the other."""
  prompts, later = np.asarray(random_tokens(2, max(LENGTHS))), jnp.asarray(random_tokens(2, STEPS, seed=1))

  @functools.partial(jax.jit, static_argnames="capacity")
  def run(prompts, lengths, later, *, capacity):
    first, state = decoder.prefill(network, prompts, lengths, capacity=capacity)
    step = lambda state, token: decoder.step(network, token[:, None], state)[::-1]
    return jnp.concatenate([first, jnp.moveaxis(jax.lax.scan(step, state, later.T)[1][:, :, 0], 0, 1)], axis=1)

  both = run(prompts, np.array(LENGTHS), later, capacity=max(LENGTHS) + STEPS)
  short = LENGTHS[1]
  alone = run(prompts[1:, :short], np.array([short]), later[1:], capacity=short + STEPS)
  np.testing.assert_allclose(both[1:], alone, rtol=1e-4, atol=1e-4)
