"""Device meshes and the table that maps logical array axes onto them.

Parameters carry the names of their axes as metadata (`nnx.Param(value, axes=("embed", "mlp"))`); optimizer states
mirror the parameters and so carry them too. One table, `RULES`, says which mesh axis shards which logical axis. An axis
that may be cut only between units, as heads of 128 channels, is named with their size: ("heads", 128).

What a step computes is placed too: under `using(mesh)` a model's `constrain` and `gathered` say where activations and
weights lie. Left to itself the partitioner keeps weights where they are stored and sums activations over devices.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxlab.core.checks import require, require_divides

AXES = ("data", "fsdp", "tensor", "layer", "sequence")
RULES: Mapping[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "rows": ("data", "fsdp", "tensor"),  # the batch, where nothing else is split over `tensor`
  "stack": ("data", "fsdp", "tensor", "layer", "sequence"),  # independent matrices: each device has its share
  "sequence": "sequence",
  "layer": "layer",
  "embed": "fsdp",
  "heads": "tensor",
  "mlp": "tensor",
  "expert": "tensor",
  "vocab": "tensor",
}


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over `devices` (None: all) with the axes of `AXES`; sizes left out are 1, one size may be -1 ("the rest").

  Raises:
    InputError: an unknown axis, or sizes whose product is not the number of devices.
  """
  shape = dict(shape or {"data": -1})
  require(set(shape) <= set(AXES), f"unknown mesh axes {sorted(set(shape) - set(AXES))}; known: {', '.join(AXES)}")
  sizes = [int(shape.get(axis, 1)) for axis in AXES]
  count = jax.device_count() if devices is None else len(devices)
  require(sizes.count(-1) <= 1, f"mesh {shape}: at most one axis may be -1")
  known = math.prod(size for size in sizes if size != -1)
  sizes = [count // known if size == -1 else size for size in sizes]
  require(
    math.prod(sizes) == count and min(sizes) >= 1,
    f"mesh {shape} does not cover the {count} devices; make the product of its sizes {count}",
  )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(axes: tuple, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes.

  Where the mesh axes of a rule do not divide evenly together, the first of them that do are used. A leading axis beyond
  `axes` is the layer axis of a stacked module.
  """
  axes = ("layer",) * (len(shape) - len(axes)) + tuple(axes)
  parts = (_splitting(axis, size, mesh) for axis, size in zip(axes, shape, strict=True))
  return PartitionSpec(*((names if len(names) > 1 else names[0]) if names else None for names in parts))


def _splitting(axis, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  """The mesh axes that split an axis of this size."""
  name, unit = axis if isinstance(axis, tuple) else (axis, 1)
  rule = RULES.get(name)
  names = (rule,) if isinstance(rule, str) else rule or ()
  while names and size % (unit * math.prod(mesh.shape[name] for name in names)):
    names = names[:-1]
  return names


def shardings(tree, mesh: Mesh | AbstractMesh):
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


def using(mesh: Mesh):
  """A context for tracing: `constrain` and `gathered` inside it mean this mesh."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _mesh() -> AbstractMesh | None:
  """The mesh of `using`; None without one, with one device, and inside shard_map, which places arrays by itself."""
  mesh = jax.sharding.get_abstract_mesh()
  known = set(mesh.axis_names) == set(AXES) and mesh.size > 1
  return mesh if known and all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def constrain(x: jax.Array, *axes, gradient: tuple = ()):
  """x with its first dimensions placed by these logical axes and the others whole.

  Args:
    gradient: axes for the cotangent where those differ: what is gathered forwards is scattered backwards.
  """
  mesh = _mesh()
  if mesh is None:
    return x
  place = lambda axes: NamedSharding(mesh, spec((*axes, *[None] * (x.ndim - len(axes))), x.shape, mesh))
  return _move(x, place(axes), place(gradient)) if gradient else jax.lax.with_sharding_constraint(x, place(axes))


def to_batch(x: Float[Array, "batch time *rest"]) -> Array:
  """Rows of each device's own -> those of its whole `tensor` group, for products whose weights that group splits."""
  return constrain(x, "batch", "sequence", gradient=("rows", "sequence"))


def to_rows(x: Float[Array, "batch time *rest"]) -> Array:
  """The group's sum of such products -> each device's own rows of it."""
  return constrain(x, "rows", "sequence", gradient=("batch", "sequence"))


def gathered(tree):
  """Parameters as a step computes with them: whole along `fsdp`, one all-gather; gradients are scattered again.

  Applied to one layer's parameters at a time, no device ever holds the others whole. Stacked ones stay as they are.
  """
  mesh = _mesh()
  if mesh is None or mesh.shape["fsdp"] == 1:
    return tree

  def one(leaf):
    if not isinstance(leaf, nnx.Variable):
      return leaf
    axes, value = leaf.get_metadata().get("axes", ()), leaf.get_value()
    if len(axes) != value.ndim:
      return leaf
    kept = spec(axes, value.shape, mesh)
    whole = PartitionSpec(*(None if target == "fsdp" else target for target in kept))
    return leaf.replace(_move(value, NamedSharding(mesh, whole), NamedSharding(mesh, kept)))

  return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _move(x, forward: NamedSharding, backward: NamedSharding):
  return jax.lax.with_sharding_constraint(x, forward)


def _move_back(forward: NamedSharding, backward: NamedSharding, _, gradient):
  # First where the forward pass put it: a sum over devices is finished there, not moved to another axis unfinished.
  return (_move(jax.lax.with_sharding_constraint(gradient, forward), backward, forward),)


_move.defvjp(lambda x, forward, backward: (_move(x, forward, backward), None), _move_back)


def share_out(function: Callable[[Array], Array], stack: Float[Array, "stack rows columns"]) -> Array:
  """`function(stack)`, which treats every matrix by itself: each device takes whole ones, however they were split.

  All of them where the devices do not divide their number.
  """
  mesh = _mesh()
  if mesh is None:
    return function(stack)
  names = [name for name in _splitting("stack", len(stack), mesh) if mesh.shape[name] > 1]
  free = PartitionSpec.UNCONSTRAINED

  def place(x, count):
    rest = () if count == len(names) else (free, free)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(tuple(names[:count]), *rest)))

  # One mesh axis after the other is an all-to-all each; all at once would be copies of everything on every device.
  counts = range(1, len(names) + 1) or [0]
  for count in counts:
    stack = place(stack, count)
  stack = function(stack)
  for count in reversed(counts):
    stack = place(stack, count)
  return stack


def each_row(function: Callable[..., Array], *arrays: Array) -> Array:
  """`function(*arrays)` of arrays (batch, ...) whose rows do not meet, and of scalars: each device takes rows of its
  own, for programs that the partitioner cannot split by itself. The result is placed as the first array."""
  mesh = _mesh()
  if mesh is None:
    return function(*arrays)
  place = lambda a: spec(("batch", *[None] * (a.ndim - 1))[: a.ndim], a.shape, mesh)
  specs = tuple(map(place, arrays))
  return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def stored(tree) -> list[NamedSharding | None]:
  """Where the leaves of a tree of parameters are kept, in the order of `jax.tree.leaves`; None without a mesh."""
  mesh = _mesh()
  return [None] * len(jax.tree.leaves(tree)) if mesh is None else jax.tree.leaves(shardings(tree, mesh))


def split_over(axis: str, size: int) -> int:
  """Devices that share an axis of this size; 1 without a mesh."""
  mesh = _mesh()
  return 1 if mesh is None else math.prod(mesh.shape[name] for name in _splitting(axis, size, mesh))


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
