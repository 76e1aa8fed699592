import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

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


def test_shardings_keep_the_structure():
  mesh = meshes.make_mesh({"tensor": 8})
  tree = {"w": nnx.Param(jnp.ones((4, 16)), axes=("embed", "mlp")), "step": jnp.int32(0)}
  placed = jax.device_put(tree, meshes.shardings(tree, mesh))
  assert placed["w"].get_value().sharding.spec == P("fsdp", "tensor")
  assert placed["step"].sharding.is_fully_replicated
