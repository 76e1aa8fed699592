"""The suffix over eight devices is the suffix on one, and the cost model's limits."""

import functools

import chex
import jax
import numpy as np
import pytest

from experiments.many_gpus import collectives
from jaxlab.core.checks import InputError
from jaxlab.depth import snlp_inference, snlp_sharded
from jaxlab.models.config import nanochat
from tests.common import random_model, random_tokens

CHAT = dict(depth=10, aspect_ratio=5, head_dim=16, vocab_size=64, context=512, window_pattern="L")
TOKENS = random_tokens(2, 20)


def mesh(devices=8, name="layer"):
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((devices,), (name,), devices=jax.devices()[:devices], axis_types=auto)


@pytest.mark.parametrize("iterations", [1, 3])
def test_eight_devices_are_one(iterations):
  """A prompt, then a token onto the caches it filled. The backout layer (5 of 10) lies inside the suffix."""
  network = snlp_inference.split(random_model(nanochat(**CHAT)), 8)
  state = snlp_inference.empty_state(network, batch=2, capacity=24)
  options = dict(iterations=iterations)
  one = functools.partial(snlp_inference.step, cache_kv="last_iteration", **options)
  many = jax.jit(functools.partial(snlp_sharded.step, mesh=mesh(), **options))
  placed, theirs = (snlp_sharded.place(tree, mesh()) for tree in (network, state))
  for tokens in (TOKENS, TOKENS[:, :1]):
    expected, state = jax.jit(one)(network, tokens, state)
    actual, theirs = many(placed, tokens, theirs)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  chex.assert_trees_all_close(theirs, state, rtol=1e-4, atol=1e-4)


def test_each_layer_lies_on_one_device_and_an_iteration_sends_one_message():
  model = random_model(nanochat(**CHAT | dict(depth=8)))
  network = snlp_sharded.place(snlp_inference.split(model, 8), mesh())
  assert network.parts[0].blocks.o.weight[...].sharding.spec[0] == "layer"
  program = jax.jit(functools.partial(snlp_sharded.step, mesh=mesh(), iterations=8)).lower(network, TOKENS).compile()
  expected = jax.jit(lambda m: m(TOKENS))(model)
  np.testing.assert_allclose(program(network, TOKENS)[0], expected, rtol=1e-4, atol=1e-4)  # K = n: the network itself
  assert [c.kind for c in collectives.collectives(program.as_text())] == 8 * ["all-gather"]


def test_the_cost_model_pays_only_where_layers_outweigh_messages():
  base = dict(depth=32, layers=24, iterations=2, t_lat=15e-6, message=8e-6, bandwidth=4e11, state_bytes=1280)
  seconds = lambda devices, b: snlp_sharded.step_seconds(devices=devices, b=b, **base)
  assert seconds(1, 2e-6) == pytest.approx(8 * 17e-6 + 2 * (15e-6 + 48e-6))
  assert seconds(8, 0.1e-6) > seconds(1, 0.1e-6)  # tiny layers: the gather costs more than it saves
  assert seconds(8, 20e-6) < 0.5 * seconds(1, 20e-6)


@pytest.mark.parametrize(
  "layers, options, message",
  [
    (6, dict(mesh=mesh(4)), "devices on 'layer'=4 must divide layers"),
    (8, dict(mesh=mesh(8, "data")), "needs one named 'layer'"),
    (8, dict(mesh=mesh(), iterations=0), "iterations is 0"),
    (0, dict(mesh=mesh()), "with one plain suffix"),
  ],
)
def test_impossible_meshes_are_named(layers, options, message):
  network = snlp_inference.split(random_model(nanochat(**CHAT)), layers)
  with pytest.raises(InputError, match=message):
    snlp_sharded.step(network, TOKENS, **options)


def test_windows_must_repeat_from_device_to_device():
  network = snlp_inference.split(random_model(nanochat(**CHAT | dict(window_pattern="SSSL"))), 8)
  with pytest.raises(InputError, match="window patterns differ"):
    snlp_sharded.step(network, random_tokens(1, 140), mesh=mesh())  # longer than the window: it is felt


def test_a_suffix_that_does_not_divide_cannot_be_placed():
  network = snlp_inference.split(random_model(nanochat(**CHAT)), 6)
  for tree in (network, snlp_inference.empty_state(network, batch=1, capacity=4)):
    with pytest.raises(InputError, match="devices on 'layer'=4 must divide layers"):
      snlp_sharded.place(tree, mesh(4))
