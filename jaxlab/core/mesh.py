"""Device meshes and the table that maps logical array axes onto them.

Parameters carry the names of their axes as metadata (`nnx.Param(value, axes=("embed", "heads"))`); optimizer states
mirror the parameters and so carry them too. One table, `RULES`, says which mesh axis shards which logical axis.
"""

import math
from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlab.core.checks import require, require_divides

AXES = ("data", "fsdp", "tensor", "layer", "sequence")
RULES: Mapping[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "sequence": "sequence",
  "layer": "layer",
  "embed": "fsdp",
  "heads": "tensor",
  "mlp": "tensor",
  "expert": "tensor",
  "vocab": "tensor",
}


def make_mesh(shape: Mapping[str, int] | None = None) -> Mesh:
  """A mesh over all devices with the axes of `AXES`; sizes left out are 1, one size may be -1 ("the rest").

  Raises:
    InputError: an unknown axis, or sizes whose product is not the number of devices.
  """
  shape = dict(shape or {"data": -1})
  require(set(shape) <= set(AXES), f"unknown mesh axes {sorted(set(shape) - set(AXES))}; known: {', '.join(AXES)}")
  sizes = [int(shape.get(axis, 1)) for axis in AXES]
  devices = jax.device_count()
  require(sizes.count(-1) <= 1, f"mesh {shape}: at most one axis may be -1")
  known = math.prod(size for size in sizes if size != -1)
  sizes = [devices // known if size == -1 else size for size in sizes]
  require(
    math.prod(sizes) == devices and min(sizes) >= 1,
    f"mesh {shape} does not cover the {devices} devices; make the product of its sizes {devices}",
  )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes; an axis that does not divide evenly stays whole.

  A leading axis beyond `axes` is the layer axis of a stacked module.
  """
  axes = ("layer",) * (len(shape) - len(axes)) + tuple(axes)
  parts = []
  for axis, size in zip(axes, shape, strict=True):
    target = RULES.get(axis) if axis else None
    names = (target,) if isinstance(target, str) else target or ()
    parts.append(target if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None)
  return PartitionSpec(*parts)


def shardings(tree, mesh: Mesh):
  """NamedShardings in the structure of `tree` (parameters, optimizer states); a leaf without named axes stays whole."""

  def one(leaf):
    if isinstance(leaf, nnx.Variable):
      value = leaf.get_value()
      if not jax.tree.leaves(value):  # an optimizer group's place for a parameter of another group
        return leaf
      axes = leaf.get_metadata().get("axes", ())
      # A state factored or reduced from its parameter has lost the parameter's shape: keep it whole.
      known = len(axes) <= value.ndim <= len(axes) + 1
      return leaf.replace(NamedSharding(mesh, spec(axes, value.shape, mesh) if known else PartitionSpec()))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of a (batch, sequence) array."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["sequence"]))


def place_batch(batch, mesh: Mesh):
  """This host's rows of a batch (a pytree of (rows, sequence) arrays) as part of the global, sharded one.

  Raises:
    InputError: the rows do not divide over the devices that share them.
  """
  sharding = batch_sharding(mesh)
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  require_divides("mesh data x fsdp", parts, "batch rows", len(jax.tree.leaves(batch)[0]) * jax.process_count())
  return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
