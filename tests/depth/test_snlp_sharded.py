"""The suffix over eight devices is the suffix on one, and the cost model's limits."""

import jax
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.depth import snlp, snlp_sharded
from jaxlab.models.config import nanochat
from tests.common import random_model, random_tokens

CHAT = dict(depth=10, aspect_ratio=5, head_dim=16, vocab_size=64, context=512)
TOKENS = random_tokens(2, 20)


def mesh(devices=8, name="layer"):
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((devices,), (name,), devices=jax.devices()[:devices], axis_types=auto)


@pytest.mark.parametrize("iterations", [1, 3])
def test_eight_devices_are_one(iterations):
  """The backout layer (5 of 10) lies inside the suffix and is read from the sharded trace."""
  model = random_model(nanochat(**CHAT))
  options = dict(layers=8, iterations=iterations)
  expected = jax.jit(lambda m: snlp.hidden(m, TOKENS, **options))(model)
  placed = snlp_sharded.place(model, mesh(), layers=8)
  actual = jax.jit(lambda m: snlp_sharded.hidden(m, TOKENS, mesh=mesh(), **options))(placed)
  for a, b in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_suffix_of_the_whole_depth_keeps_each_layer_on_one_device():
  model = random_model(nanochat(**CHAT | dict(depth=8)))
  placed = snlp_sharded.place(model, mesh(), layers=8)
  assert placed.blocks.o.weight[...].sharding.spec[0] == "layer"
  program = jax.jit(lambda m: snlp_sharded.hidden(m, TOKENS, layers=8, iterations=8, mesh=mesh()))
  expected = jax.jit(lambda m: m.hidden(TOKENS))(model)
  np.testing.assert_allclose(program(placed)[0], expected[0], rtol=1e-4, atol=1e-4)  # K = n: the network itself
  assert "all-gather" in program.lower(placed).compile().as_text()


def test_the_cost_model_pays_only_where_layers_outweigh_messages():
  base = dict(depth=32, layers=24, iterations=2, t_lat=15e-6, message=8e-6, bandwidth=4e11, state_bytes=1280)
  seconds = lambda devices, b: snlp_sharded.step_seconds(devices=devices, b=b, **base)
  assert seconds(1, 2e-6) == pytest.approx(8 * 17e-6 + 2 * (15e-6 + 48e-6))
  assert seconds(8, 0.1e-6) > seconds(1, 0.1e-6)  # tiny layers: the gather costs more than it saves
  assert seconds(8, 20e-6) < 0.5 * seconds(1, 20e-6)


@pytest.mark.parametrize(
  "config, options, message",
  [
    (CHAT, dict(layers=6, mesh=mesh(4)), "devices on 'layer'=4 must divide layers"),
    (CHAT, dict(layers=8, mesh=mesh(8, "data")), "needs one named 'layer'"),
    (CHAT, dict(layers=8, mesh=mesh(), iterations=0), "iterations is 0"),
  ],
)
def test_impossible_meshes_are_named(config, options, message):
  with pytest.raises(InputError, match=message):
    snlp_sharded.hidden(random_model(nanochat(**config)), TOKENS, **dict(iterations=1) | options)


def test_windows_must_repeat_from_device_to_device():
  model, tokens = random_model(nanochat(**CHAT)), random_tokens(1, 140)  # longer than the window: it is felt
  with pytest.raises(InputError, match="window patterns differ"):
    snlp_sharded.hidden(model, tokens, layers=8, iterations=1, mesh=mesh())
