"""Every sample's gradient at chosen entries, from what a map reads and what its outputs' gradients are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import maps
from jaxlab.models.layers import Linear
from jaxlab.weights.per_sample import Language, Tensors, split
from tests.common import configs, random_model, random_tokens

ROWS = random_tokens(3, 9)


@pytest.mark.parametrize("kind", ["nanochat"])
def test_of_a_transformer_as_one_gradient_a_sample(kind):
  model = random_model(dataclasses.replace(configs()[kind], depth=2))
  network = Language()
  names = network.names(model)
  assert len(names) == 2 * len(maps.named(model.blocks)) and names[0] == "q.0"

  @jax.jit
  def every(model):
    def loss(weights, row):
      one = maps.with_blocks(
        model, maps.replaced(model.blocks, {n: Linear(w, (None,) * 2) for n, w in weights.items()})
      )
      logp = jax.nn.log_softmax(one(row[None, :-1]))
      return -jnp.take_along_axis(logp, row[None, 1:, None], axis=-1).mean()

    weights = {name: one.weight[...] for name, one in maps.named(model.blocks).items()}
    return jax.lax.map(lambda row: jax.value_and_grad(loss)(weights, row), ROWS)

  losses, slopes = every(model)
  for name in ("q.1", "mlp.up.0", "mlp.down.1", "k.0"):
    which, layer = split(name)
    expected = slopes[which][:, layer]
    pairs = network.observe(model, name, ROWS)
    np.testing.assert_allclose(pairs.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(pairs.mean(), expected.mean(axis=0), atol=1e-6)
    index = jnp.asarray(np.random.default_rng(0).choice(expected[0].size, 12, replace=False))
    np.testing.assert_allclose(pairs.at(index), expected.reshape(3, -1)[:, index], atol=1e-6)
    assert float(jnp.abs(expected).max()) > 1e-3
  np.testing.assert_allclose(network.loss(model, ROWS), losses.mean(), rtol=1e-5)


def test_a_matrix_is_exchanged_in_its_layer_alone():
  model, network = random_model(dataclasses.replace(configs()["qwen3"], depth=2)), Language()
  new = jnp.ones((32, 32))
  copy = jax.tree.map(jnp.copy, model)
  assert network.get(model, "o.1").shape == (64, 32)
  made = network.put(copy, "k.1", new)
  np.testing.assert_array_equal(network.get(made, "k.1"), new)
  for name in set(network.names(model)) - {"k.1"}:
    np.testing.assert_array_equal(network.get(made, name), network.get(model, name))


def losses(dense, batch):
  """A network that reads several rows a sample."""
  x, y = batch
  hidden = jnp.tanh(dense("first", x))
  return jnp.square(dense("second", hidden).mean(axis=1) - y).sum(axis=-1)


def test_of_ones_own_function_as_one_gradient_a_sample():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params, batch = {"first": draw(5, 6), "second": draw(6, 2)}, (draw(4, 3, 5), draw(4, 2))
  network = Tensors(losses)

  def one(params, sample):
    return losses(lambda name, x: x @ params[name], jax.tree.map(lambda a: a[None], sample))[0]

  slopes = jax.vmap(jax.grad(one), (None, 0))(params, batch)
  for name in params:
    pairs = network.observe(params, name, batch)
    index = jnp.arange(params[name].size)
    np.testing.assert_allclose(pairs.at(index), slopes[name].reshape(4, -1), atol=1e-5)
    np.testing.assert_allclose(pairs.mean(), slopes[name].mean(axis=0), atol=1e-5)
  np.testing.assert_allclose(network.loss(params, batch), pairs.losses.mean(), rtol=1e-6)


def test_wrong_input_is_one_line():
  params, batch = {"first": jnp.ones((5, 6)), "second": jnp.ones((6, 2))}, (jnp.ones((4, 3, 5)), jnp.ones((4, 2)))
  with pytest.raises(InputError, match="a map is 'third'"):
    Tensors(losses).observe(params, "third", batch)
  twice = Tensors(lambda dense, batch: losses(dense, batch) + losses(dense, batch))
  with pytest.raises(InputError, match="first is used 2 times"):
    twice.observe(params, "first", batch)
