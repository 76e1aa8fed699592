"""A network whose heads and neurons several devices share, along a `tensor` mesh axis: each computes its part of every
layer, and what `o` and `down` give is summed over the axis, two sums a layer (Shoeybi et al. 2019, arXiv 1909.08053).

  network = split(model, mesh)
  jax.shard_map(lambda network, x: f(mine(network), x), mesh=mesh, in_specs=(PLACED, PartitionSpec()), ...)

Inside the function a device has an ordinary network of fewer heads. Embeddings and head are whole on every device.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxlab.core.checks import require
from jaxlab.models import inference, maps
from jaxlab.models.config import TransformerConfig
from jaxlab.models.inference import Network
from jaxlab.models.layers import Linear
from jaxlab.models.transformer import Transformer

AXIS = "tensor"
PLACED = PartitionSpec(AXIS)  # of every leaf of a split network, and of pools of keys and values by their heads
_SPLIT = ("heads", "mlp")  # logical axes


class Summed(nnx.Module):
  """A map whose inputs several devices share: the sum of their parts."""

  def __init__(self, part):
    self.part = part

  def __call__(self, x):
    return jax.lax.psum(self.part(x), AXIS)


def split(model: Transformer, mesh: Mesh) -> Network:
  """The network taken apart on every device, its leaves stacked along a leading axis that the devices share.

  Where there are more devices than key-value heads, several have the same one.

  Raises:
    InputError: a mesh without the axis, heads or neurons that the devices do not divide, or a model whose layers are no
      plain dense ones.
  """
  require(AXIS in mesh.axis_names, f"the mesh has axes {mesh.axis_names}; it needs one named {AXIS!r}")
  c, devices = model.config, mesh.shape[AXIS]
  plain = not c.experts and not c.value_embeddings and not c.ragged and maps.all_plain(model.blocks)
  require(
    plain, "a model with experts, value embeddings, or compressed or pruned maps runs on one device; take no mesh"
  )
  kv_heads = max(c.kv_heads, devices)
  sizes = dict(q_heads=c.q_heads, kv_heads=kv_heads, mlp_width=c.mlp_width)
  require(
    not any(size % devices for size in sizes.values()) and kv_heads % c.kv_heads == 0 and c.q_heads % kv_heads == 0,
    f"{devices} devices cannot share {c.q_heads} heads, {c.kv_heads} key-value heads and {c.mlp_width} neurons evenly; "
    "take a number that divides them all, or a multiple of the key-value heads",
  )
  model = _of(_repeated(model, kv_heads // c.kv_heads), dataclasses.replace(c, kv_heads=kv_heads))
  own = dataclasses.replace(c, **{name: size // devices for name, size in sizes.items()})

  def on_each(model):
    network = inference.take_apart(_of(model, own))
    for block in network.blocks:
      block.o, block.mlp.down = Summed(block.o), Summed(block.mlp.down)
    return jax.tree.map(lambda a: a[None], network)

  run = jax.shard_map(on_each, mesh=mesh, in_specs=(_parts(model),), out_specs=PLACED, check_vma=False)
  return jax.jit(run)(model)


def mine(tree):
  """A device's own part of what `split` returns, inside `jax.shard_map`."""
  return jax.tree.map(lambda a: a[0], tree)


def _of(model: Transformer, config: TransformerConfig) -> Transformer:
  model = jax.tree.map(lambda a: a, model)
  model.config = model.blocks.config = config
  return model


def _repeated(model: Transformer, times: int) -> Transformer:
  """The same function with every key-value head `times` times: queries keep the one that they read."""
  model, size = jax.tree.map(lambda a: a, model), model.config.head_dim
  for name in ("k", "v"):
    one = getattr(model.blocks, name)
    weight = one.weight[...]
    heads = weight.reshape(*weight.shape[:-1], -1, size)
    setattr(
      model.blocks, name, Linear(jnp.repeat(heads, times, axis=-2).reshape(*weight.shape[:-1], -1), one.weight.axes)
    )
  return model


def _parts(model: Transformer):
  """PartitionSpecs in the structure of the model, by the names of its axes."""

  def one(leaf):
    axes = leaf.get_metadata().get("axes", ())
    name = lambda axis: axis[0] if isinstance(axis, tuple) else axis
    own = [AXIS if name(axis) in _SPLIT else None for axis in axes]
    return leaf.replace(PartitionSpec(*[None] * (leaf.get_value().ndim - len(own)), *own))

  return jax.tree.map(one, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
