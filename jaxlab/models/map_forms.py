"""Linear maps in other forms than one matrix: what a compressed model holds in the place of `layers.Linear`.

Every form is called like Linear, holds exactly the arrays that are stored (the bytes of a model are those of its
arrays), and says in `spec` what `hub` needs to read it.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import InputError, require, require_choice
from jaxlab.models.layers import Linear
from jaxlab.models.packed_maps import NormalFloat, Quantised, SignStack, Sparse, WithOutliers


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


class SharedBasis(nnx.Module):
  """y = x B^T C, or x C^T B: B a basis that maps of several names and layers share, C of one map alone.

  basis: (*stack, rank, width), the width that of the residual stream; coefficients: (*stack, rows, others), rank rows
  and zeros; group: int32 (*stack), the number of the basis from 1 on. A layer of group 0 shares none: its coefficients
  are the map itself, (width, others), or (width, others) of its transpose where the map `writes` the residual stream.
  Bases may be of unequal `ranks` (of every layer; 0 for group 0), filled up with zeros. A file holds every basis once,
  and no zeros; in memory a stack has it for every layer.
  """

  kind = "shared_basis"

  def __init__(
    self, basis, coefficients, group: Int[Array, "*stack"], *, groups: tuple[int, ...], ranks: tuple[int, ...], writes
  ):
    self.groups, self.ranks, self.writes = groups, ranks, writes
    self.basis = nnx.Param(basis, axes=(None, None))
    self.coefficients = nnx.Param(coefficients, axes=(None, None))
    self.group = nnx.Param(group, axes=())

  @classmethod
  def of_layers(cls, layers, *, writes: bool) -> "SharedBasis":
    """Of (group, basis (rank, width) or None, coefficients) of every layer, one of which has a basis at least."""
    width = next(basis.shape[1] for _, basis, _ in layers if basis is not None)
    bases = [jnp.zeros((0, width)) if basis is None else jnp.asarray(basis) for _, basis, _ in layers]
    ranks = tuple(map(len, bases))
    filled = lambda own, rows: jnp.stack([jnp.pad(jnp.asarray(a), ((0, rows - len(a)), (0, 0))) for a in own])
    own = filled([own for *_, own in layers], max(len(own) for *_, own in layers))
    groups = tuple(group for group, *_ in layers)
    how = dict(groups=groups, ranks=ranks, writes=writes)
    return cls(filled(bases, max(ranks)).astype(own.dtype), own, jnp.int32(groups), **how)

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
    basis, own = (one[...][: self.ranks[layer]] for one in (self.basis, self.coefficients))
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
    width = self.basis.shape[-1]
    return {"basis": list(self.ranks), "coefficients": [rank or width for rank in self.ranks]}

  @property
  def stored_names(self) -> dict[str, list[str]]:
    """{parameter of a stack: the tensor that holds every layer's part} where others are of the same tensor."""
    return {"basis": [f"shared_basis.{group}" for group in self.groups]}

  @property
  def spec(self) -> dict:
    most = max(self.ranks)
    even = all(rank in (0, most) for rank in self.ranks)
    return {"rank": most if even else list(self.ranks), "groups": list(self.groups), "writes": self.writes}

  @classmethod
  def empty(cls, stack, inputs: int, outputs: int, *, rank: int | list, groups: list, writes: bool) -> "SharedBasis":
    right = isinstance(groups, list) and [len(groups)] == [*stack] and any(groups)
    require(right, f"compression: groups is {groups!r:.80}; it must say of every layer which basis it shares, 0: none")
    ranks = rank if isinstance(rank, list) else [rank if group else 0 for group in groups]
    right = [bool(one) for one in ranks] == [bool(group) for group in groups]
    require(right, f"compression: rank is {rank!r:.80}; it must be that of every layer's basis, 0 where there is none")
    width, others = (outputs, inputs) if writes else (inputs, outputs)
    rows = max(own or width for own in ranks)
    basis, own = jnp.zeros((*stack, max(ranks), width)), jnp.zeros((*stack, rows, others))
    group = jnp.zeros(stack, jnp.int32)
    return cls(basis, own, group, groups=tuple(groups), ranks=tuple(ranks), writes=writes)


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
    parts = empty_form("down", down, stack, inputs, rank), empty_form("up", up, stack, rank, outputs)
    return cls(*parts, jnp.zeros((*stack, outputs)) if bias else None, rank=rank)


UNEVEN = (SignStack, SharedBasis)  # whose stacks have layers of unequal sizes
_ALL = (Factored, Quantised, NormalFloat, WithOutliers, SignStack, Sparse, SharedBasis, Product, Affine)
FORMS = {form.kind: form for form in _ALL}


def empty_form(name: str, fields: Mapping, stack, inputs: int, outputs: int) -> nnx.Module:
  """A map of that form, filled with zeros.

  Args:
    name: of the map, for errors; fields: "kind" and the form's own sizes.

  Raises:
    InputError: an unknown form, or fields that are not its own.
  """
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
