import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import maps
from jaxlab.models.map_forms import Factored, Product
from jaxlab.models.packed_maps import SignStack, sparse
from jaxlab.training import lora
from jaxlab.weights.quantise import rtn
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


@pytest.mark.parametrize("form", ["factored", "quantised", "product", "sign_stack", "sparse"])
def test_beside_a_map_in_another_form_there_is_an_adapter(form):
  """y = map(x) + 3 (x A) B in the layers from `start` on, whatever the map is; new adapters change nothing."""
  rng = np.random.default_rng(0)
  down, up = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((6, 32, 8), (6, 8, 64)))
  bits = lambda w: jax.vmap(lambda w: rtn(w, bits=4, group=8))(w)
  made = {
    "factored": lambda: Factored(down, up, up[:, 0]),
    "quantised": lambda: bits(down @ up),
    "product": lambda: Product(bits(down), bits(up), rank=8),
    "sign_stack": lambda: SignStack.empty((6,), 32, 64, blocks=2, rank=1, scaled=False),
    "sparse": lambda: sparse(jnp.where(rng.random((6, 32, 64)) < 0.3, down @ up, 0)),
  }[form]()
  assert made.kind == form and made.shape == (6, 32, 64)
  model = maps.with_blocks(MODEL, maps.replaced(MODEL.blocks, {"mlp.up": made}))
  where = lambda name: name == "blocks.mlp.up"
  fresh = lora.init(model, jax.random.key(0), rank=2, alpha=6.0, start=4, where=where)
  merged = lora.merge(model, changed(fresh)).blocks.mlp.up
  x = jax.random.normal(jax.random.key(1), (5, 32))
  one = lambda tree, layer: jax.tree.map(lambda a: a[layer], tree)
  for layer in (0, 5):
    beside = 0.0 if layer == 0 else 3.0 * (x @ fresh.a["blocks.mlp.up"][1]) @ changed(fresh).b["blocks.mlp.up"][1]
    np.testing.assert_allclose(one(merged, layer)(x), one(made, layer)(x) + beside, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(one(lora.merge(model, fresh).blocks.mlp.up, layer).b[...], 0)


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
