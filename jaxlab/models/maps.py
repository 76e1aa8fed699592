"""A model's linear maps by name, whatever their forms (`map_forms`): how methods take them and give others back, what
they take in a file, and what a config.json says of them.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlab.core.checks import require, require_choice
from jaxlab.models.experts import TiledExperts
from jaxlab.models.layers import Linear, MoE
from jaxlab.models.map_forms import FORMS, UNEVEN, Affine, Factored, Product, SharedBasis, empty_form

NAMES = ("q", "k", "v", "o", "mlp.gate", "mlp.up", "mlp.down")  # of a block


def named(blocks, *more: type) -> dict[str, nnx.Module]:
  """The linear maps of a block or of stacked ones, by their names (`NAMES`); experts and routers are none of them.

  Args:
    more: other kinds of modules that count as maps.
  """
  found = {}
  for name in NAMES:
    owner, attribute = _owner(blocks, name)
    one = getattr(owner, attribute, None)
    if isinstance(one, (Linear, *FORMS.values(), *more)):
      found[name] = one
  return found


def replaced(blocks, maps: Mapping[str, nnx.Module]):
  """The block or stacked blocks with other maps in the places of those named; "q.up" is a factor of a Product."""
  blocks = jax.tree.map(lambda a: a, blocks)
  for name, one in maps.items():
    owner, attribute = _owner(blocks, name)
    require(getattr(owner, attribute, None) is not None, f"these blocks have no map {name}")
    setattr(owner, attribute, one)
  return blocks


def parts(blocks) -> dict[str, nnx.Module]:
  """`named`, of a Product its two factors ("q.down", "q.up")."""
  found = {}
  for name, one in named(blocks).items():
    found |= {f"{name}.down": one.down, f"{name}.up": one.up} if isinstance(one, Product) else {name: one}
  return found


def stored_parts(blocks) -> dict[str, list[tuple[int, str]]]:
  """{parameter of stacked blocks: (leading size, name of the tensor) of every layer's own part} where files hold no
  whole array. Parts of one name are one tensor."""
  uneven = {name: one for name, one in parts(blocks).items() if isinstance(one, UNEVEN)}
  if isinstance(blocks.mlp, TiledExperts):
    uneven["mlp"] = blocks.mlp
  found = {}
  for name, one in uneven.items():
    for leaf, sizes in one.stored_sizes.items():
      own = [f"blocks.{name}.{leaf}.{layer}" for layer in range(len(sizes))]
      found[f"{name}.{leaf}"] = list(zip(sizes, _tensors(one, leaf) or own, strict=True))
  return found


def _tensors(one: nnx.Module, leaf: str) -> list[str] | None:
  return one.stored_names.get(leaf) if isinstance(one, SharedBasis) else None


def sizes_of(config, name: str, layer: int) -> dict[str, int]:
  """{"inputs" or "outputs": how many of them that map has in a layer of a config whose layers differ}."""
  own = config.of_layer(layer)
  side = "inputs" if name in ("o", "mlp.down") else "outputs"
  heads = own.q_heads if name in ("q", "o") else own.kv_heads
  return {side: own.mlp_width if name.startswith("mlp.") else heads * own.head_dim}


def narrowed(block, layer: int):
  """One layer's block, of stacked ones that were filled with zeros, at its own number of heads and neurons.

  Attention or the MLP keeps the zeros where a map is neither a matrix nor of low rank.
  """
  maps, made, config = named(block), {}, block.config.of_layer(layer)
  for names in (NAMES[:4], NAMES[4:]):
    found = {name: maps[name] for name in names if name in maps}
    if all(isinstance(one, (Linear, Affine, Factored)) for one in found.values()):
      made |= {name: _cut(one, **sizes_of(block.config, name, layer)) for name, one in found.items()}
    elif names == NAMES[:4]:
      config = dataclasses.replace(config, q_heads=block.config.q_heads, kv_heads=block.config.kv_heads)
    else:
      config = dataclasses.replace(config, mlp_width=block.config.mlp_width)
  block = replaced(block, made)
  block.config = config
  return block


def _cut(one, inputs: int | None = None, outputs: int | None = None):
  """A map of the first inputs and outputs of another."""
  if isinstance(one, Factored):
    bias = None if one.bias is None else one.bias[..., :outputs]
    return Factored(one.down[..., :inputs, :], one.up[..., :outputs], bias)
  weight = one.weight[..., :inputs, :outputs]
  return Affine(weight, one.bias[..., :outputs]) if isinstance(one, Affine) else Linear(weight, one.weight.axes)


def stack(blocks: list):
  """Blocks of equal shapes as one with a leading layer axis.

  Raises:
    InputError: blocks that are not alike.
  """
  shapes = {jax.tree.structure(block): None for block in blocks}
  require(len(shapes) == 1, "these layers hold maps of different forms and cannot be stacked")
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def with_blocks(model, blocks):
  """The model with other stacked blocks."""
  model = jax.tree.map(lambda a: a, model)
  model.blocks = blocks
  return model


def bytes_of(tree) -> int:
  """Bytes of all arrays, without zeros that fill up smaller layers, experts or stacks: what a file takes but for its
  header."""
  uneven = lambda one: isinstance(one, (*UNEVEN, TiledExperts))
  total, seen = 0, set()
  for one in jax.tree.leaves(tree, is_leaf=uneven):
    own = one.stored_sizes if uneven(one) else {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(one):
      name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
      held = own.get(name)
      if tensors := held and _tensors(one, name):  # each once
        held = [rows for tensor, rows in dict(zip(tensors, held, strict=True)).items() if tensor not in seen]
        seen.update(tensors)
      size = leaf.size if held is None else sum(held) * math.prod(leaf.shape[2:])
      total += size * np.dtype(leaf.dtype).itemsize
  ragged = getattr(getattr(tree, "config", None), "ragged", False)
  return total - _filling(tree) if ragged else total


def _filling(model) -> int:
  """Bytes of the zeros that fill up layers with fewer heads or neurons than others."""
  total = 0
  for name, one in named(model.blocks).items():
    if isinstance(one, (Linear, Affine, Factored)):
      side, *_ = sizes_of(model.config, name, 0)
      matrix = getattr(one, ("down" if side == "inputs" else "up") if isinstance(one, Factored) else "weight")
      layers, *sides = matrix.shape
      whole, other = sides if side == "inputs" else sides[::-1]
      kept = sum(sizes_of(model.config, name, layer)[side] for layer in range(layers))
      total += (layers * whole - kept) * other * np.dtype(matrix.dtype).itemsize
  return total


def all_plain(blocks) -> bool:
  """Whether every map is one matrix."""
  return all(isinstance(one, Linear) for one in named(blocks).values())


def spec_of(model) -> dict[str, dict]:
  """{map: {"kind": form, ...}} of every map that is not one matrix, and of experts of unequal widths ("mlp"), for a
  config.json."""
  other = {name: one for name, one in named(model.blocks).items() if not isinstance(one, Linear)}
  if isinstance(model.blocks.mlp, TiledExperts):
    other["mlp"] = model.blocks.mlp
  return {name: {"kind": one.kind} | one.spec for name, one in other.items()}


def shaped(model, spec: Mapping[str, Mapping]):
  """The model with maps of the forms and shapes that `spec_of` gave, filled with zeros.

  Raises:
    InputError: a map this model does not have, an unknown form, or fields that are not its own.
  """
  maps, plain = {}, named(model.blocks) | ({"mlp": model.blocks.mlp} if isinstance(model.blocks.mlp, MoE) else {})
  for name, fields in spec.items():
    require_choice("compression: the map", name, plain)
    if name == "mlp":
      maps[name] = _empty_experts(fields, model.blocks.mlp)
      continue
    *layers, inputs, outputs = plain[name].weight.shape
    maps[name] = empty_form(name, fields, layers, inputs, outputs)
  return with_blocks(model, replaced(model.blocks, maps))


def _empty_experts(fields: Mapping, moe: MoE) -> TiledExperts:
  """Experts of unequal widths, filled with zeros."""
  names = {"kind", "tile", "counts", "skip_empty"}
  right = isinstance(fields, Mapping) and set(fields) == names and fields["kind"] == TiledExperts.kind
  require(right, f"compression.mlp is {fields!r:.80}; it must be {TiledExperts.kind} with {', '.join(sorted(names))}")
  return TiledExperts.empty(moe, **{name: value for name, value in fields.items() if name != "kind"})


def _owner(blocks, name: str):
  owner, _, attribute = name.rpartition(".")
  return (operator.attrgetter(owner)(blocks) if owner else blocks), attribute
