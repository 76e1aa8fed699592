import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.training import lora
from tests.common import configs, random_model, random_tokens

MODEL = random_model(configs()["llama"])


def changed(adapters, seed=3):
  """The adapters with B no longer zero."""
  keys = dict(zip(adapters.b, jax.random.split(jax.random.key(seed), len(adapters.b)), strict=True))
  b = {name: jax.random.normal(keys[name], value.shape) for name, value in adapters.b.items()}
  return lora.Lora(adapters.a, b, adapters.scale, adapters.config)


def test_new_adapters_change_nothing():
  chex.assert_trees_all_equal(lora.merge(MODEL, lora.init(MODEL, jax.random.key(0), rank=4)), MODEL)


def test_the_merged_map_is_the_map_beside_its_adapters():
  """x W' = x W + (alpha / rank) (x A) B, of every layer from `start` on; the layers before and other maps stay."""
  where = lambda name: name.startswith("blocks.") and not name.endswith("k")
  adapters = changed(lora.init(MODEL, jax.random.key(0), rank=2, alpha=6.0, start=4, where=where))
  merged = lora.merge(MODEL, adapters)
  x = jax.random.normal(jax.random.key(1), (5, MODEL.config.width))
  before, after = MODEL.blocks.mlp.up.weight[...], merged.blocks.mlp.up.weight[...]
  for layer in range(MODEL.depth):
    beside = x @ before[layer]
    if layer >= 4:
      a, b = adapters.a["blocks.mlp.up"][layer - 4], adapters.b["blocks.mlp.up"][layer - 4]
      beside += 3.0 * (x @ a) @ b
    np.testing.assert_allclose(x @ after[layer], beside, rtol=1e-4, atol=1e-4)
  chex.assert_trees_all_equal(merged.blocks.k, MODEL.blocks.k)
  chex.assert_trees_all_equal((merged.head, merged.embedding), (MODEL.head, MODEL.embedding))


def test_gradients_reach_the_adapters_alone_and_the_dtype_stays():
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), MODEL)
  adapters = changed(lora.init(MODEL, jax.random.key(0), rank=2))
  assert {leaf.dtype for leaf in jax.tree.leaves(lora.merge(half, adapters))} == {jnp.dtype("bfloat16")}
  loss = lambda adapters: jnp.square(lora.merge(MODEL, adapters)(random_tokens(1, 4))).mean()
  gradient = jax.jit(jax.grad(loss))(adapters)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(rank=0), "lora rank is 0; .* takes 1"),
    (dict(rank=33), "lora rank is 33; .* takes 1..32"),
    (dict(rank=2, where=lambda name: False), "no linear map"),
    (dict(rank=2, start=6, where=lambda name: name.startswith("blocks")), "lora starts at layer 6"),
  ],
)
def test_what_cannot_be_adapted_is_named(options, message):
  with pytest.raises(InputError, match=message):
    lora.init(MODEL, jax.random.key(0), **options)
