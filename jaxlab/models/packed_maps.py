"""Linear maps in few bits: whole numbers with scales, stacks of signs, and a bit for every entry with those that stay.

Each is a form as in `map_forms`.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from jaxlab.core.checks import require, require_divides
from jaxlab.kernels.bitstack_matmul import bitstack_matmul, reference


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


def _normal_levels() -> tuple[float, ...]:
  """The 16 levels of NF4: quantiles of the normal at evenly spaced probabilities, eight above 0, seven below, and 0
  itself, over the largest; the outermost probability lies between those of 15 and of 16 equal shares."""
  outer = 1 - (1 / 30 + 1 / 32) / 2
  of = lambda count: [statistics.NormalDist().inv_cdf(outer + (0.5 - outer) * i / count) for i in range(count)]
  above, below = of(8), of(7)
  return tuple(level / above[0] for level in (*(-one for one in below), 0.0, *reversed(above)))


NORMAL_LEVELS = _normal_levels()
_MAXIMA = 256  # that share a scale


class NormalFloat(nnx.Module):
  """y = x W + b, W = level[code] m: NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314). A group of
  inputs of an output has one m, its largest |w|: the mean of all + scale f, f an 8-bit float, a scale for every 256 of
  them.

  codes: (*stack, inputs / 2, outputs), as of `pack_codes`; maxima: uint8 (*stack, inputs / group, outputs), the bits of
  f (float8_e4m3fn); scale: float16 (*stack, ceil(groups outputs / 256)); mean: float16 (*stack), both in 16 bits where
  the paper has 32; b: (*stack, outputs) or None.
  """

  kind = "normal_float"

  def __init__(self, codes: UInt8[Array, "*stack packed outputs"], maxima, scale, mean, *, bias=None):
    self.codes = nnx.Param(codes, axes=(None, None))
    self.maxima = nnx.Param(maxima, axes=(None, None))
    self.scale = nnx.Param(scale, axes=(None,))
    self.mean = nnx.Param(mean, axes=())
    self.bias = None if bias is None else nnx.Param(bias, axes=(None,))

  def weight(self) -> Float[Array, "*stack inputs outputs"]:
    """W in float32."""
    level = jnp.asarray(NORMAL_LEVELS, jnp.float32)[unpack_codes(self.codes[...], 4)]
    most = unpack_maxima(self.maxima[...], self.scale[...], self.mean[...])
    *stack, groups, outputs = most.shape
    return (level.reshape(*stack, groups, -1, outputs) * most[..., None, :]).reshape(level.shape)

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    y = x @ self.weight().astype(x.dtype)
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """(*stack, inputs, outputs), as of the matrix."""
    *stack, packed, outputs = self.codes.shape
    return (*stack, 2 * packed, outputs)

  @property
  def spec(self) -> dict:
    return {"groups": self.maxima.shape[-2], "bias": self.bias is not None}

  @classmethod
  def empty(cls, stack, inputs: int, outputs: int, *, groups: int, bias: bool = False) -> "NormalFloat":
    zeros = lambda dtype, *shape: jnp.zeros((*stack, *shape), dtype)
    codes, maxima = zeros(jnp.uint8, inputs // 2, outputs), zeros(jnp.uint8, groups, outputs)
    scale, mean = zeros(jnp.float16, -(-groups * outputs // _MAXIMA)), zeros(jnp.float16)
    return cls(codes, maxima, scale, mean, bias=zeros(jnp.float32, outputs) if bias else None)


def pack_maxima(most: Float[Array, "groups outputs"]) -> tuple[Array, Array, Array]:
  """(maxima, scale, mean) of `NormalFloat`."""
  mean = most.mean().astype(jnp.float16)
  flat = most.ravel() - mean.astype(jnp.float32)
  rows = jnp.pad(flat, (0, -flat.size % _MAXIMA)).reshape(-1, _MAXIMA)
  top = float(jnp.finfo(jnp.float8_e4m3fn).max)
  scale = jnp.maximum(jnp.abs(rows).max(axis=1) / top, jnp.finfo(jnp.float16).smallest_normal).astype(jnp.float16)
  # The scale as it is stored may be the smaller one: nothing lies beyond the largest 8-bit float.
  held = jnp.clip(rows / scale.astype(jnp.float32)[:, None], -top, top).astype(jnp.float8_e4m3fn)
  bits = jax.lax.bitcast_convert_type(held, jnp.uint8).ravel()[: flat.size]
  return bits.reshape(most.shape), scale, mean


def unpack_maxima(maxima: UInt8[Array, "*stack groups outputs"], scale, mean) -> Float[Array, "*stack groups outputs"]:
  """The largest |w| of every group, float32, as `NormalFloat` holds it."""
  *stack, groups, outputs = maxima.shape
  held = jax.lax.bitcast_convert_type(maxima, jnp.float8_e4m3fn).astype(jnp.float32)
  each = jnp.repeat(scale.astype(jnp.float32), _MAXIMA, axis=-1)[..., : groups * outputs]
  most = mean.astype(jnp.float32)[..., None, None] + held * each.reshape(*stack, groups, outputs)
  return jnp.maximum(most, 0)


_SHARING = 16  # scales, or zeros, that share two numbers
_SHARED_BITS = 3


class WithOutliers(nnx.Module):
  """y = x W + b, W = scale (code - zero) but for outliers, which are held as they are: the form of SpQR (Dettmers et
  al. 2023, arXiv 2306.03078). Scale and zero of a group of inputs of an output are quantised in their turn.

  codes: (*stack, bits inputs / 8, outputs), as of `pack_codes`; scale, zero: uint8 (*stack, 6, ceil(groups outputs /
  16)), and scale_ends, zero_ends: float16 (*stack, 2, the same), as of `pack_shared`; values: float16 (*stack, k),
  outliers, input after input; outputs: uint16 (*stack, k), the output of each; counts: uint16 (*stack, inputs), how
  many an input has; b: (*stack, outputs) or None.
  """

  kind = "with_outliers"

  def __init__(
    self, codes, scale, scale_ends, zero, zero_ends, values, outputs, counts, *, bits: int, groups: int, bias=None
  ):
    self.bits, self.groups = bits, groups
    self.codes = nnx.Param(codes, axes=(None, None))
    self.scale, self.zero = nnx.Param(scale, axes=(None, None)), nnx.Param(zero, axes=(None, None))
    self.scale_ends, self.zero_ends = nnx.Param(scale_ends, axes=(None, None)), nnx.Param(zero_ends, axes=(None, None))
    self.values, self.outputs = nnx.Param(values, axes=(None,)), nnx.Param(outputs, axes=(None,))
    self.counts = nnx.Param(counts, axes=(None,))
    self.bias = None if bias is None else nnx.Param(bias, axes=(None,))

  def weight(self) -> Float[Array, "*stack inputs outputs"]:
    """W in float32."""
    code = unpack_codes(self.codes[...], self.bits)
    *stack, _, outputs = code.shape
    held = lambda codes, ends: unpack_shared(codes[...], ends[...], self.groups, outputs)[..., None, :]
    grouped = code.reshape(*stack, self.groups, -1, outputs).astype(jnp.float32)
    grid = held(self.scale, self.scale_ends) * (grouped - held(self.zero, self.zero_ends))

    def with_outliers(weight, values, outputs, counts):
      rows = jnp.searchsorted(jnp.cumsum(counts.astype(jnp.int32)), jnp.arange(len(values)), side="right")
      return weight.at[rows, outputs].set(values.astype(jnp.float32))

    for _ in stack:
      with_outliers = jax.vmap(with_outliers)
    return with_outliers(grid.reshape(code.shape), self.values[...], self.outputs[...], self.counts[...])

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    y = x @ self.weight().astype(x.dtype)
    return y if self.bias is None else y + self.bias[...].astype(x.dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """(*stack, inputs, outputs), as of the matrix."""
    return (*self.counts.shape, self.codes.shape[-1])

  @property
  def spec(self) -> dict:
    own = {"bits": self.bits, "groups": self.groups, "outliers": self.values.shape[-1]}
    return own | {"bias": self.bias is not None}

  @classmethod
  def empty(
    cls, stack, inputs: int, outputs: int, *, bits: int, groups: int, outliers: int, bias: bool = False
  ) -> "WithOutliers":
    zeros = lambda dtype, *shape: jnp.zeros((*stack, *shape), dtype)
    blocks = -(-groups * outputs // _SHARING)
    shared = lambda: (zeros(jnp.uint8, _SHARED_BITS * _SHARING // 8, blocks), zeros(jnp.float16, 2, blocks))
    found = zeros(jnp.float16, outliers), zeros(jnp.uint16, outliers), zeros(jnp.uint16, inputs)
    codes, added = zeros(jnp.uint8, bits * inputs // 8, outputs), zeros(jnp.float32, outputs) if bias else None
    return cls(codes, *shared(), *shared(), *found, bits=bits, groups=groups, bias=added)


def pack_shared(numbers: Float[Array, "groups outputs"]) -> tuple[UInt8[Array, "6 blocks"], Float[Array, "2 blocks"]]:
  """Numbers in 3 bits: 16 of them, one row after the other, share the smallest and a step, both in float16."""
  flat = numbers.ravel()
  rows = jnp.pad(flat, (0, -flat.size % _SHARING), mode="edge").reshape(-1, _SHARING).T
  low = rows.min(axis=0).astype(jnp.float16).astype(jnp.float32)
  top = 2**_SHARED_BITS - 1
  step = ((rows.max(axis=0) - low) / top).astype(jnp.float16).astype(jnp.float32)
  codes = jnp.clip(jnp.round((rows - low) / jnp.where(step > 0, step, 1)), 0, top).astype(jnp.uint8)
  return pack_codes(codes, _SHARED_BITS), jnp.stack([low, step]).astype(jnp.float16)


def unpack_shared(codes: UInt8[Array, "*stack 6 blocks"], ends, groups: int, outputs: int):
  """The numbers of `pack_shared`, float32 (*stack, groups, outputs)."""
  ends = ends.astype(jnp.float32)
  rows = ends[..., :1, :] + ends[..., 1:, :] * unpack_codes(codes, _SHARED_BITS)
  flat = jnp.swapaxes(rows, -1, -2).reshape(*codes.shape[:-2], -1)
  return flat[..., : groups * outputs].reshape(*codes.shape[:-2], groups, outputs)


class SignStack(nnx.Module):
  """y = (x / s) W^T,  W = sum_{i < count} S_i * (U_i V_i): blocks of signs, each with a matrix of low rank.

  signs: uint8 (*stack, blocks, outputs, ceil(inputs / 8)), row by row, the most significant bit first, 1 for +1; u:
  (*stack, blocks, outputs, rank); v: (*stack, blocks, rank, inputs); scale: s, (*stack, inputs), or None where it is
  folded into what comes before; count: int32 (*stack), the blocks in use: data, so that a change compiles nothing;
  held: the blocks that each layer of a stack has, where others have more: the rest are zeros, which no file holds.
  A few rows on a GPU or TPU are multiplied with the bits as they are; else W is written out first.
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
    parts = self.signs[...], self.u[...], self.v[...], self.count[...]
    return bitstack_matmul(x.reshape(-1, x.shape[-1]), *parts).reshape(*x.shape[:-1], -1)

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
