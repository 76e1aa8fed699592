"""LoRD block after block: the least error against the dense outputs, LoRD itself in the first block."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import maps
from jaxlab.weights import lord, lord_sequential
from jaxlab.weights.calibration import moments
from tests.common import configs, random_model, random_tokens

TOKENS = random_tokens(16, 24)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_map_is_the_best_of_its_rank_from_the_inputs_it_will_read(shape):
  """Reduced-rank regression in NumPy: the fit of least squares, cut to its principal directions."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2000, shape[0])) + rng.normal(size=shape[0])
  other = x + 0.5 * np.roll(x, 1, axis=1) + 0.1 * rng.normal(size=x.shape) + 1.0
  weight = rng.normal(size=shape)
  target = x @ weight
  both = moments(jnp.asarray(np.concatenate([other, x], axis=1)[None], jnp.float32))
  made = lord_sequential._fit(jnp.asarray(weight, jnp.float32), both)
  fit = (other - other.mean(axis=0)) @ np.linalg.lstsq(other - other.mean(axis=0), target - target.mean(axis=0))[0]
  error = lambda y: float(((np.asarray(y, np.float64) - target) ** 2).sum())
  for rank in (3, 8):
    left, values, right = np.linalg.svd(fit, full_matrices=False)
    best = error(left[:, :rank] * values[:rank] @ right[:rank] + target.mean(axis=0))
    assert best < error(lord.factors(made, rank, dtype=jnp.float32)(jnp.asarray(other, jnp.float32))) < 1.001 * best
    alone = lord.factors(lord.basis(jnp.asarray(weight, jnp.float32), moments(jnp.asarray(x[None], jnp.float32))), rank,
                         dtype=jnp.float32)  # fmt: skip
    assert error(alone(jnp.asarray(other, jnp.float32))) > 1.1 * best


@pytest.fixture(scope="module")
def made():
  model = random_model(dataclasses.replace(configs()["qwen3"], depth=3))
  bases = lord.decompose(model, TOKENS, batch=8)
  ranks = lord.uniform(bases, budget=0.6)
  return model, ranks, bases, lord_sequential.decompose(model, TOKENS, ranks, batch=8)


def test_the_first_block_is_lords_and_later_ones_are_nearer(made):
  """In its maps; the error of every later block's output on the calibration text is smaller."""
  model, ranks, *found = made
  one_shot, in_order = (lord.truncate(model, bases, ranks) for bases in found)
  product = lambda small, name, layer: np.asarray(
    maps.named(small.blocks)[name].down[layer] @ maps.named(small.blocks)[name].up[layer]
  )
  for name in ranks:
    first, other = (product(small, name, 0) for small in (one_shot, in_order))
    np.testing.assert_allclose(other, first, atol=2e-3 * np.abs(first).max())
    assert np.abs(product(in_order, name, 2) - product(one_shot, name, 2)).max() > 0.02 * np.abs(first).max()
  exact = model.trace(TOKENS)[1]
  errors = [((small.trace(TOKENS)[1] - exact) ** 2).mean(axis=(1, 2, 3)) for small in (one_shot, in_order)]
  np.testing.assert_allclose(errors[1][0], errors[0][0], rtol=1e-3)
  assert (errors[1][1:] < errors[0][1:]).all()


def test_wrong_input_is_one_line(made):
  model, ranks, *_ = made
  with pytest.raises(InputError, match="a map is 'head'"):
    lord_sequential.decompose(model, TOKENS, {"head": 3}, batch=8)
  with pytest.raises(InputError, match=r"rank 33 of q; it must be 1\.\.32"):
    lord_sequential.decompose(model, TOKENS, {"q": 33}, batch=8)
  with pytest.raises(InputError, match="has 8 tokens; bases of 32 take 128"):
    lord_sequential.decompose(model, TOKENS[:1, :8], ranks)
