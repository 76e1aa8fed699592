"""Linear maps in other forms than one matrix: what a compressed model holds in the place of `layers.Linear`.

Every form is called like Linear, holds exactly the arrays that are stored (the bytes of a model are those of its
arrays), and says in `spec` what `hub` needs to read it. `named` and `replaced` are how methods take a model's maps
and give others back.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from jaxlab.core.checks import InputError, require, require_choice, require_divides
from jaxlab.kernels.bitstack_matmul import reference
from jaxlab.models.experts import TiledExperts
from jaxlab.models.layers import Linear, MoE

NAMES = ("q", "k", "v", "o", "mlp.gate", "mlp.up", "mlp.down")  # of a block


class Affine(nnx.Module):
  """y = x W + b.

  W: (*stack, inputs, outputs); b: (*stack, outputs).
  """

  kind = "affine"

  def __init__(self, weight: Float[Array, "*stack inputs outputs"], bias: Float[Array, "*stack outputs"]):
    self.weight = nnx.Param(weight, axes=("embed", "embed"))
    self.bias = nnx.Param(bias, axes=(None,))

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    return x @ self.weight[...].astype(x.dtype) + self.bias[...].astype(x.dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """(*stack, inputs, outputs), as of the matrix."""
    return self.weight.shape

  @property
  def spec(self) -> dict:
    return {}

  @classmethod
  def empty(cls, stack, inputs: int, outputs: int) -> "Affine":
    return cls(jnp.zeros((*stack, inputs, outputs)), jnp.zeros((*stack, outputs)))


class Factored(nnx.Module):
  """y = (x V) U + b: a map of low rank.

  V: (*stack, inputs, rank); U: (*stack, rank, outputs); b: (*stack, outputs) or None.
  """

  kind = "factored"

  def __init__(self, down: Float[Array, "*stack inputs rank"], up: Float[Array, "*stack rank outputs"], bias=None):
    self.down = nnx.Param(down, axes=("embed", None))
    self.up = nnx.Param(up, axes=(None, "embed"))
    self.bias = None if bias is None else nnx.Param(bias, axes=(None,))

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    y = (x @ self.down[...].astype(x.dtype)) @ self.up[...].astype(x.dtype)
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """(*stack, inputs, outputs), as of the matrix."""
    return (*self.down.shape[:-1], self.up.shape[-1])

  @property
  def spec(self) -> dict:
    return {"rank": self.down.shape[-1], "bias": self.bias is not None}

  @classmethod
  def empty(cls, stack, inputs: int, outputs: int, *, rank: int, bias: bool) -> "Factored":
    zeros = lambda *shape: jnp.zeros((*stack, *shape))
    return cls(zeros(inputs, rank), zeros(rank, outputs), zeros(outputs) if bias else None)


class Quantised(nnx.Module):
  """y = x W + b, W = scale (code - zero): whole numbers of `bits` bits, groups of inputs with a scale and a zero each.

  codes: (*stack, bits inputs / 8, outputs), packed along the inputs, least significant bit first; scale: (*stack,
  inputs / group, outputs); zero: like scale, uint8; b: (*stack, outputs) or None.
  """

  kind = "quantised"

  def __init__(self, codes: UInt8[Array, "*stack packed outputs"], scale, zero, *, bits: int, bias=None):
    self.bits = bits
    self.codes = nnx.Param(codes, axes=(None, None))
    self.scale = nnx.Param(scale, axes=(None, None))
    self.zero = nnx.Param(zero, axes=(None, None))
    self.bias = None if bias is None else nnx.Param(bias, axes=(None,))

  def weight(self) -> Float[Array, "*stack inputs outputs"]:
    """W in float32."""
    code = unpack_codes(self.codes[...], self.bits)
    scale, zero = self.scale[...].astype(jnp.float32), self.zero[...]
    *stack, groups, outputs = scale.shape
    grouped = code.reshape(*stack, groups, -1, outputs).astype(jnp.float32) - zero[..., None, :]
    return (grouped * scale[..., None, :]).reshape(code.shape)

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    y = x @ self.weight().astype(x.dtype)
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """(*stack, inputs, outputs), as of the matrix."""
    *stack, packed, outputs = self.codes.shape
    return (*stack, packed * 8 // self.bits, outputs)

  @property
  def spec(self) -> dict:
    return {"bits": self.bits, "groups": self.scale.shape[-2], "bias": self.bias is not None}

  @classmethod
  def empty(cls, stack, inputs: int, outputs: int, *, bits: int, groups: int, bias: bool = False) -> "Quantised":
    zeros = lambda rows, dtype: jnp.zeros((*stack, rows, outputs), dtype)
    codes = zeros(bits * inputs // 8, jnp.uint8)
    added = jnp.zeros((*stack, outputs)) if bias else None
    return cls(codes, zeros(groups, jnp.float16), zeros(groups, jnp.uint8), bits=bits, bias=added)


class SignStack(nnx.Module):
  """y = (x / s) W^T,  W = sum_{i < count} S_i * (U_i V_i): blocks of signs, each with a matrix of low rank.

  signs: uint8 (*stack, blocks, outputs, ceil(inputs / 8)), row by row, the most significant bit first, 1 for +1; u:
  (*stack, blocks, outputs, rank); v: (*stack, blocks, rank, inputs); scale: s, (*stack, inputs), or None where it is
  folded into what comes before; count: int32 (*stack), the blocks in use: data, so that a change compiles nothing;
  held: the blocks that each layer of a stack has, where others have more: the rest are zeros, which no file holds.
  """

  kind = "sign_stack"

  def __init__(
    self, signs: UInt8[Array, "*stack blocks outputs bytes"], u, v, scale, count: Int[Array, "*stack"], held=None
  ):
    self.held = held
    self.signs = nnx.Param(signs, axes=(None, None, None))
    self.u = nnx.Param(u, axes=(None, None, None))
    self.v = nnx.Param(v, axes=(None, None, None))
    self.scale = None if scale is None else nnx.Param(scale, axes=(None,))
    self.count = nnx.Param(count, axes=())

  def weight(self) -> Float[Array, "outputs inputs"]:
    """W in float32, block after block, of a map that is not stacked."""
    return reference.weight(self.signs[...], self.u[...], self.v[...], self.count[...])

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    x = x if self.scale is None else x / self.scale[...].astype(x.dtype)
    return x @ self.weight().T.astype(x.dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """(*stack, inputs, outputs), as of the matrix."""
    *stack, _, outputs, _ = self.u.shape
    return (*stack, self.v.shape[-1], outputs)

  @property
  def spec(self) -> dict:
    own = {"blocks": self.u.shape[-3], "rank": self.u.shape[-1], "scaled": self.scale is not None}
    return own if self.held is None else own | {"held": list(self.held)}

  @classmethod
  def empty(cls, stack, inputs: int, outputs: int, *, blocks: int, rank: int, scaled: bool, held=None) -> "SignStack":
    right = held is None or (isinstance(held, list) and [len(held)] == [*stack] and max(held) == blocks)
    require(right, f"compression: held is {held!r:.80}; it must say of every layer how many of {blocks} blocks it has")
    zeros = lambda dtype, *shape: jnp.zeros((*stack, *shape), dtype)
    signs = zeros(jnp.uint8, blocks, outputs, -(-inputs // 8))
    u, v = zeros(jnp.float16, blocks, outputs, rank), zeros(jnp.float16, blocks, rank, inputs)
    scale = zeros(jnp.float16, inputs) if scaled else None
    return cls(signs, u, v, scale, zeros(jnp.int32), held=held and tuple(held))

  def of_layer(self, layer: int) -> "SignStack":
    """That layer alone, given without a leading axis, with the blocks it has."""
    if self.held is None:
      return self
    signs, u, v = (one[...][: self.held[layer]] for one in (self.signs, self.u, self.v))
    return SignStack(signs, u, v, None if self.scale is None else self.scale[...], self.count[...])

  @property
  def stored_sizes(self) -> dict[str, list[int]]:
    """{parameter of a stack: leading size of every layer's own part}, what files hold of it."""
    uneven = self.held is not None and self.count.ndim
    return {name: list(self.held) for name in ("signs", "u", "v")} if uneven else {}


class SharedBasis(nnx.Module):
  """y = x B^T C, or x C^T B: B a basis that maps of several names and layers share, C of one map alone.

  basis: (*stack, rank, width), the width that of the residual stream; coefficients: (*stack, rows, others), rank rows
  and zeros; group: int32 (*stack), the number of the basis from 1 on. A layer of group 0 shares none: its coefficients
  are the map itself, (width, others), or (width, others) of its transpose where the map `writes` the residual stream.
  A file holds every basis once, and no zeros; in memory a stack has it for every layer.
  """

  kind = "shared_basis"

  def __init__(self, basis, coefficients, group: Int[Array, "*stack"], *, groups: tuple[int, ...], writes: bool):
    self.groups, self.writes = groups, writes
    self.basis = nnx.Param(basis, axes=(None, None))
    self.coefficients = nnx.Param(coefficients, axes=(None, None))
    self.group = nnx.Param(group, axes=())

  @classmethod
  def of_layers(cls, layers, *, writes: bool) -> "SharedBasis":
    """Of (group, basis (rank, width) or None, coefficients) of every layer, one of which has a basis at least."""
    rank, width = next(basis.shape for _, basis, _ in layers if basis is not None)
    rows = max(len(own) for *_, own in layers)
    bases = [jnp.zeros((rank, width)) if basis is None else jnp.asarray(basis) for _, basis, _ in layers]
    filled = [jnp.pad(jnp.asarray(own), ((0, rows - len(own)), (0, 0))) for *_, own in layers]
    groups = tuple(group for group, *_ in layers)
    dtype = filled[0].dtype
    return cls(jnp.stack(bases).astype(dtype), jnp.stack(filled), jnp.int32(groups), groups=groups, writes=writes)

  def weight(self) -> Float[Array, "*stack inputs outputs"]:
    """W in float32."""
    basis, own, group = (one[...] for one in (self.basis, self.coefficients, self.group))
    basis, own = basis.astype(jnp.float32), own.astype(jnp.float32)
    product = jnp.swapaxes(basis, -1, -2) @ own[..., : basis.shape[-2], :]
    rows = min(own.shape[-2], basis.shape[-1])
    whole = jnp.zeros_like(product).at[..., :rows, :].set(own[..., :rows, :])
    upright = jnp.where(group[..., None, None] == 0, whole, product)
    return jnp.swapaxes(upright, -1, -2) if self.writes else upright

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    basis, own = self.basis[...].astype(x.dtype), self.coefficients[...].astype(x.dtype)
    rank, rows = len(basis), len(own)
    fill = lambda a, size: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, size - a.shape[-1])])
    if self.writes:
      z = x @ own.T
      return jnp.where(self.group[...] == 0, z, z[..., :rank] @ basis) if rows > rank else z @ basis
    z = x @ basis.T
    return (jnp.where(self.group[...] == 0, x, fill(z, rows)) if rows > rank else z) @ own

  def of_layer(self, layer: int) -> "Linear | Factored":
    """That layer alone, given without a leading axis, in the form it has by itself."""
    turned = lambda a: a.T if self.writes else a
    if not self.groups[layer]:
      return Linear(turned(self.coefficients[...]), ("embed", "embed"))
    basis, own = self.basis[...], self.coefficients[...][: self.basis.shape[-2]]
    return Factored(own.T, basis) if self.writes else Factored(basis.T, own)

  @property
  def shape(self) -> tuple[int, ...]:
    """(*stack, inputs, outputs), as of the matrix."""
    *stack, _, others = self.coefficients.shape
    width = self.basis.shape[-1]
    return (*stack, others, width) if self.writes else (*stack, width, others)

  @property
  def stored_sizes(self) -> dict[str, list[int]]:
    """As of `SignStack`."""
    rank, width = self.basis.shape[-2:]
    return {
      "basis": [rank if group else 0 for group in self.groups],
      "coefficients": [rank if group else width for group in self.groups],
    }

  @property
  def stored_names(self) -> dict[str, list[str]]:
    """{parameter of a stack: the tensor that holds every layer's part} where others are of the same tensor."""
    return {"basis": [f"shared_basis.{group}" for group in self.groups]}

  @property
  def spec(self) -> dict:
    return {"rank": self.basis.shape[-2], "groups": list(self.groups), "writes": self.writes}

  @classmethod
  def empty(cls, stack, inputs: int, outputs: int, *, rank: int, groups: list, writes: bool) -> "SharedBasis":
    right = isinstance(groups, list) and [len(groups)] == [*stack] and any(groups)
    require(right, f"compression: groups is {groups!r:.80}; it must say of every layer which basis it shares, 0: none")
    width, others = (outputs, inputs) if writes else (inputs, outputs)
    rows = rank if all(groups) else max(rank, width)
    basis, own = jnp.zeros((*stack, rank, width)), jnp.zeros((*stack, rows, others))
    return cls(basis, own, jnp.zeros(stack, jnp.int32), groups=tuple(groups), writes=writes)


class Product(nnx.Module):
  """y = up(down(x)) + b: a map of low rank, each factor in another form.

  b: (*stack, outputs) or None.
  """

  kind = "product"

  def __init__(self, down: nnx.Module, up: nnx.Module, bias=None, *, rank: int):
    self.rank = rank
    self.down, self.up = down, up
    self.bias = None if bias is None else nnx.Param(bias, axes=(None,))

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    y = self.up(self.down(x))
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """(*stack, inputs, outputs), as of the matrix."""
    return (*self.down.shape[:-1], self.up.shape[-1])

  @property
  def spec(self) -> dict:
    part = lambda one: {"kind": one.kind} | one.spec
    return {"rank": self.rank, "bias": self.bias is not None, "down": part(self.down), "up": part(self.up)}

  @classmethod
  def empty(cls, stack, inputs: int, outputs: int, *, rank: int, bias: bool, down: Mapping, up: Mapping) -> "Product":
    parts = _empty("down", down, stack, inputs, rank), _empty("up", up, stack, rank, outputs)
    return cls(*parts, jnp.zeros((*stack, outputs)) if bias else None, rank=rank)


class Sparse(nnx.Module):
  """y = x W, most entries of W being 0: a bit for every entry and the values of those that are kept.

  bits: uint8 (*stack, ceil(inputs outputs / 8)), entries row after row, the most significant bit first; values:
  (*stack, kept), in the same order, then zeros where another map of the stack keeps more. It saves bytes, not time: W
  is made again where it is used.
  """

  kind = "sparse"

  def __init__(
    self, bits: UInt8[Array, "*stack bytes"], values: Float[Array, "*stack kept"], inputs: int, outputs: int
  ):
    self.inputs, self.outputs = inputs, outputs
    self.bits = nnx.Param(bits, axes=(None,))
    self.values = nnx.Param(values, axes=(None,))

  def weight(self) -> Float[Array, "*stack inputs outputs"]:
    """W in the dtype of the values."""
    bits = jnp.unpackbits(self.bits[...], axis=-1, count=self.inputs * self.outputs)
    place = jnp.cumsum(bits, axis=-1, dtype=jnp.int32) - 1
    values = self.values[...]
    found = jnp.take_along_axis(values, jnp.clip(place, 0, values.shape[-1] - 1), axis=-1)
    return jnp.where(bits == 1, found, 0).reshape(*bits.shape[:-1], self.inputs, self.outputs)

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    return x @ self.weight().astype(x.dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """(*stack, inputs, outputs), as of the matrix."""
    return (*self.bits.shape[:-1], self.inputs, self.outputs)

  @property
  def spec(self) -> dict:
    return {"kept": self.values.shape[-1]}

  @classmethod
  def empty(cls, stack, inputs: int, outputs: int, *, kept: int) -> "Sparse":
    bits = jnp.zeros((*stack, -(-inputs * outputs // 8)), jnp.uint8)
    return cls(bits, jnp.zeros((*stack, kept)), inputs, outputs)


UNEVEN = (SignStack, SharedBasis)  # whose stacks have layers of unequal sizes
FORMS = {form.kind: form for form in (Factored, Quantised, SignStack, Sparse, SharedBasis, Product, Affine)}


def sparse(weight: Float[Array, "*stack inputs outputs"]) -> Sparse:
  """The entries that are not 0, and where they are."""
  *stack, inputs, outputs = weight.shape
  flat = np.asarray(weight).reshape(-1, inputs * outputs)
  kept = flat != 0
  values = np.zeros((len(flat), max(1, int(kept.sum(axis=-1).max()))), flat.dtype)
  for row, mask, found in zip(flat, kept, values, strict=True):
    found[: mask.sum()] = row[mask]
  bits = np.packbits(kept, axis=-1)
  return Sparse(jnp.asarray(bits.reshape(*stack, -1)), jnp.asarray(values.reshape(*stack, -1)), inputs, outputs)


def pack_signs(x: Float[Array, "*rows n"]) -> UInt8[Array, "*rows bytes"]:
  """One bit an entry, 1 for x >= 0; the last byte is filled with 0."""
  return jnp.packbits(x >= 0, axis=-1)


def unpack_signs(packed: UInt8[Array, "*rows bytes"], n: int) -> Float[Array, "*rows n"]:
  """+1 and -1 of `pack_signs`, float32."""
  return jnp.unpackbits(packed, axis=-1, count=n).astype(jnp.float32) * 2 - 1


def pack_codes(codes: UInt8[Array, "*stack inputs outputs"], bits: int) -> UInt8[Array, "*stack packed outputs"]:
  """Whole numbers below 2^bits, `bits` bits each one after the other along the inputs.

  Raises:
    InputError: bits outside 1..8, or inputs whose bits fill no whole number of bytes.
  """
  require(1 <= bits <= 8, f"bits is {bits}; it must be 1..8")
  *stack, inputs, outputs = codes.shape
  require_divides("8", 8, "bits times inputs", bits * inputs)
  bit = (codes[..., :, None, :] >> jnp.arange(bits, dtype=jnp.uint8)[:, None]) & 1
  byte = bit.reshape(*stack, -1, 8, outputs) << jnp.arange(8, dtype=jnp.uint8)[:, None]
  return byte.sum(axis=-2).astype(jnp.uint8)


def unpack_codes(packed: UInt8[Array, "*stack packed outputs"], bits: int) -> UInt8[Array, "*stack inputs outputs"]:
  """The inverse of `pack_codes`."""
  *stack, _, outputs = packed.shape
  bit = (packed[..., :, None, :] >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & 1
  code = bit.reshape(*stack, -1, bits, outputs) << jnp.arange(bits, dtype=jnp.uint8)[:, None]
  return code.sum(axis=-2).astype(jnp.uint8)


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
    maps[name] = _empty(name, fields, layers, inputs, outputs)
  return with_blocks(model, replaced(model.blocks, maps))


def _empty_experts(fields: Mapping, moe: MoE) -> TiledExperts:
  """Experts of unequal widths, filled with zeros."""
  names = {"kind", "tile", "counts", "skip_empty"}
  right = isinstance(fields, Mapping) and set(fields) == names and fields["kind"] == TiledExperts.kind
  require(right, f"compression.mlp is {fields!r:.80}; it must be {TiledExperts.kind} with {', '.join(sorted(names))}")
  return TiledExperts.empty(moe, **{name: value for name, value in fields.items() if name != "kind"})


def _empty(name: str, fields: Mapping, stack, inputs: int, outputs: int) -> nnx.Module:
  """A map of that form, filled with zeros."""
  require(isinstance(fields, Mapping), f"compression.{name} is {fields!r:.80}; it must be an object with a kind")
  require_choice(f"compression.{name}.kind", fields.get("kind"), FORMS)
  sizes = {key: value for key, value in fields.items() if key != "kind"}
  whole = lambda value: type(value) in (int, bool) and value >= 0
  fits = lambda value: (
    isinstance(value, Mapping) or whole(value) or (isinstance(value, list) and all(map(whole, value)))
  )
  require(all(map(fits, sizes.values())), f"compression.{name} is {fields!r:.80}; its sizes must be whole numbers")
  try:
    return FORMS[fields["kind"]].empty(stack, inputs, outputs, **sizes)
  except (TypeError, ValueError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"compression.{name} is not a {fields['kind']} map: {error}") from None


def _owner(blocks, name: str):
  owner, _, attribute = name.rpartition(".")
  return (operator.attrgetter(owner)(blocks) if owner else blocks), attribute
