import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.many_gpus import collectives
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError


def test_sizes_are_filled_in_and_checked():
  assert jax.device_count() == 8
  mesh = meshes.make_mesh({"data": -1, "tensor": 2})
  assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "layer": 1, "sequence": 1}
  for shape, message in [({"data": 3}, "does not cover"), ({"rows": 8}, "unknown mesh axes"), ({"data": 16}, "cover")]:
    with pytest.raises(InputError, match=message):
      meshes.make_mesh(shape)


def test_specs_follow_the_rules_and_skip_what_does_not_divide():
  mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
  assert meshes.spec(("embed", "mlp"), (8, 6), mesh) == P("fsdp", "tensor")
  assert meshes.spec(("embed", "mlp"), (6, 6), mesh) == P(None, "tensor")
  assert meshes.spec(("embed", "mlp"), (3, 8, 6), mesh) == P("layer", "fsdp", "tensor")
  assert meshes.spec(("embed", ("heads", 8)), (8, 48), mesh) == P("fsdp", "tensor")  # 6 heads of 8
  assert meshes.spec(("embed", ("heads", 16)), (8, 48), mesh) == P("fsdp", None)  # 3 heads of 16
  assert meshes.spec(("rows", "mlp"), (4, 3), mesh) == P(("data", "fsdp"), None)  # 4 rows for 4 x 2 devices


def test_shardings_keep_the_structure():
  mesh = meshes.make_mesh({"tensor": 8})
  tree = {"w": nnx.Param(jnp.ones((4, 16)), axes=("embed", "mlp")), "step": jnp.int32(0)}
  placed = jax.device_put(tree, meshes.shardings(tree, mesh))
  assert placed["w"].get_value().sharding.spec == P("fsdp", "tensor")
  assert placed["step"].sharding.is_fully_replicated


@pytest.mark.parametrize(
  "shape, matrices", [({"fsdp": 2, "tensor": 2, "data": 2}, 8), ({"fsdp": 8}, 8), ({"fsdp": 8}, 6)]
)
def test_a_stack_of_matrices_is_shared_out_and_comes_back(shape, matrices):
  """No product is split, so that nothing is summed; where the devices do not divide, each has all of them."""
  mesh = meshes.make_mesh(shape)
  stack = jnp.arange(matrices * 16 * 24.0).reshape(-1, 16, 24)
  stored = jax.NamedSharding(mesh, meshes.spec(("embed", "mlp"), stack.shape, mesh))

  @functools.partial(jax.jit, out_shardings=stored)
  def gram(x):
    with meshes.using(mesh):
      product = lambda x: x @ (jnp.swapaxes(x, 1, 2) @ x)
      return meshes.share_out(product, x)

  text = gram.lower(jax.device_put(stack, stored)).compile().as_text()
  expected = jax.jit(lambda x: x @ (jnp.swapaxes(x, 1, 2) @ x))(stack)
  np.testing.assert_allclose(gram(jax.device_put(stack, stored)), expected, rtol=1e-5)
  sent = collectives.collectives(text)
  assert {c.kind for c in sent} <= {"all-to-all", "all-gather"}
  assert sent[0].bytes <= stack.nbytes // (2 if matrices == 8 else 1)


def test_weights_are_gathered_and_their_gradients_scattered():
  mesh = meshes.make_mesh({"fsdp": 8})
  w = nnx.Param(jnp.ones((16, 24)), axes=("embed", "mlp"))
  placed = jax.device_put(w, meshes.shardings(w, mesh))
  x = jax.device_put(jnp.arange(64 * 16.0).reshape(64, 16), jax.NamedSharding(mesh, P("fsdp")))

  @jax.jit
  def gradient(w, x):
    with meshes.using(mesh):
      return jax.grad(lambda w: jnp.sum(jnp.sin(x @ meshes.gathered(w).get_value())))(w)

  found = gradient(placed, x)
  assert found.get_value().sharding.spec[0] == "fsdp"
  np.testing.assert_allclose(found, jax.grad(lambda w: jnp.sum(jnp.sin(x @ w.get_value())))(w), rtol=1e-4, atol=1e-3)
  kinds = [c.kind for c in collectives.collectives(gradient.lower(placed, x).compile().as_text())]
  assert sorted(kinds) == ["all-gather", "all-reduce"]  # the latter and its slice are a reduce-scatter on a GPU
