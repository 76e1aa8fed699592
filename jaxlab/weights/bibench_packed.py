"""A trained network of signs on packed bits: 32 of them in a word, whole numbers by xor and counting (`xnor_matmul`).

  packed = pack(network, params, stats, images, "recu")        # words of bits, scales, the rest in full precision
  logits = run(network, packed, images, "recu")                # as `apply` gives them, to rounding
  save(packed, "packed.safetensors")                           # as many bytes, and a header; `load` reads it

Batch normalisation and the sign behind it are one comparison of a whole number a channel (`fold`).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxlab.core.checks import plain, require
from jaxlab.core.files import write_files
from jaxlab.core.foreign import foreign
from jaxlab.kernels.xnor_matmul import pack_bits, xnor_matmul
from jaxlab.weights import bibench
from jaxlab.weights.bibench import FINAL, REFERENCES
from jaxlab.weights.bibench_layers import Layers, Network, Params, outline


class Packed(NamedTuple):
  """A kernel's signs.

  words: of each output, (outputs, words) of a dense map, (taps, outputs, words) of a convolution; scale_of_signs: what
  the signs of an output are multiplied by, or None for 1.
  """

  words: UInt32[Array, "*taps outputs words"]
  scale_of_signs: Float[Array, "outputs"] | None


def pack_kernel(signs: Float[Array, "*inputs outputs"], scale=1.0) -> Packed:
  """From what an operator's `weight` gives: signs, and a number an output."""
  rows = jnp.moveaxis(signs, -1, -2)  # words run along the inputs
  rows = rows.reshape(-1, *rows.shape[-2:]) if signs.ndim == 4 else rows
  return Packed(pack_bits(rows), scale if isinstance(scale, jax.Array) else None)


def packed_dense(x: UInt32[Array, "rows words"], words, size: int, **how) -> Int[Array, "rows outputs"]:
  """Counts of a dense map; `how` as of `xnor_matmul`."""
  return xnor_matmul(x, words, size, **how)


def packed_conv(
  x: UInt32[Array, "batch height width words"],
  words: UInt32[Array, "taps outputs words"],
  size: int,
  *,
  kernel: tuple[int, int],
  stride: int = 1,
  **how,
) -> Int[Array, "batch rows columns outputs"]:
  """Counts of a convolution of `size` channels padded by zeros, exactly as `bibench.convolve` of the signs gives them.

  A packed image has no 0: the border is of words of -1, and what they add is taken off, a number an output and place.
  """
  rows, columns = kernel
  pads = [bibench.padding(n) for n in kernel]
  _, height, width, count = x.shape
  taps = _taps(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel, stride)  # (batch, rows, columns, taps, words)
  *places, _, _ = taps.shape
  flat = taps.reshape(-1, rows * columns * count)
  outputs = words.shape[1]
  weights = jnp.moveaxis(words, 0, 1).reshape(outputs, -1)
  # Bits that fill a tap's last word are 0 on both sides and count as equal: they are no columns.
  padded = 32 * flat.shape[1]
  counts = xnor_matmul(flat, weights, padded, **how) - (padded - rows * columns * size)
  outside = jnp.pad(jnp.zeros((height, width), bool), pads, constant_values=True)[None, :, :, None]
  outside = _taps(outside, kernel, stride)[..., 0].astype(jnp.int32)  # (1, rows, columns, taps)
  ones = jax.lax.population_count(words).astype(jnp.int32).sum(axis=-1)
  border = outside @ (2 * ones - size)  # the sum of a tap's signs
  return counts.reshape(*places, outputs) + border


def _taps(x, kernel, stride):
  height, width = ((x.shape[axis + 1] - kernel[axis]) // stride + 1 for axis in (0, 1))
  cut = lambda i, j: x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
  return jnp.stack([cut(i, j) for i in range(kernel[0]) for j in range(kernel[1])], axis=3)


class Threshold(NamedTuple):
  """sign(BN(scale * count)) is +1 where count >= at, of channels with `flip` where count <= at."""

  at: Int[np.ndarray, "channels"]
  flip: Bool[np.ndarray, "channels"]

  def __call__(self, count: Int[Array, "*batch channels"]) -> Bool[Array, "*batch channels"]:
    return jnp.where(self.flip, count <= self.at, count >= self.at)


def fold(
  norm: Mapping[str, Array], stats: Mapping[str, Array], scale=1.0, *, shift=0.0, eps: float = 1e-5
) -> Threshold:
  """One comparison a channel for sign(gain (scale count - mean) / sqrt(var + eps) + offset + shift), in float64.

  Args:
    norm: gain and offset; stats: mean and var. scale: of the counts. shift: ReActNet's threshold of the next layer.
  """
  wide = lambda a: np.asarray(a, np.float64)
  slope = wide(norm["gain"]) / np.sqrt(wide(stats["var"]) + eps)
  constant = wide(norm["offset"]) - slope * wide(stats["mean"]) + wide(shift)
  slope = slope * wide(scale)
  slope, constant = np.broadcast_arrays(slope, constant)
  with np.errstate(divide="ignore", invalid="ignore"):
    crossing = -constant / slope
  limit = 2**31 - 1
  always = np.where(constant >= 0, -limit, limit)  # where no count matters
  at = np.where(slope > 0, np.ceil(crossing), np.floor(crossing))
  at = np.where(slope == 0, always, np.clip(at, -limit, limit))
  return Threshold(at.astype(np.int32), slope < 0)


def pack(network: Network, params: Params, stats: Params, x, operator: str) -> tuple[Params, Params]:
  """(params, stats) with the kernels of binary layers as words and scales; a noise that has ended is left out.

  Raises:
    InputError: an operator whose activations are no signs.
  """
  require(operator not in REFERENCES, f"{operator} multiplies no signs; pack one of {', '.join(bibench.ALGORITHMS)}")
  one, made = bibench.operator(operator), dict(params)
  for name, binary in outline(network, x, operator).binary.items():
    if binary:
      kept = {key: value for key, value in params[name].items() if not key.endswith(("_up", "_down"))}
      packed = pack_kernel(*one.weight(kept.pop("kernel"), params[name], FINAL))._asdict()
      made[name] = kept | {part: value for part, value in packed.items() if value is not None}
  return made, stats


def save(packed: tuple[Params, Params], file: str | os.PathLike) -> None:
  """Writes what `pack` gave as one safetensors file: "params.LAYER.PART" and "stats.LAYER.PART"."""
  both = zip(("params", "stats"), packed, strict=True)
  tensors = {f"{kind}.{layer}.{part}": np.asarray(a) for kind, of in both for layer, own in of.items()
             for part, a in own.items()}  # fmt: skip
  path = Path(file)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_files(path.parent, {path.name: lambda open_file: open_file.write(safetensors.numpy.save(tensors))})


def load(file: str | os.PathLike) -> tuple[Params, Params]:
  """What `save` wrote, for `run` with the same network and operator.

  Raises:
    InputError: a damaged file, or one of something else.
  """
  with foreign(file, "save the packed network again"):
    tensors = safetensors.numpy.load_file(file)
  packed = {"params": {}, "stats": {}}
  for name, a in tensors.items():
    kind, _, rest = name.partition(".")
    layer, _, part = rest.rpartition(".")
    require(kind in packed and layer, f"{file} has a tensor {plain(name)}; it is no packed network")
    packed[kind].setdefault(layer, {})[part] = jnp.asarray(a)
  return packed["params"], packed["stats"]


def run(network: Network, packed: tuple[Params, Params], x, operator: str, **how):
  """What `apply` returns in evaluation, from packed kernels; `how` as of `xnor_matmul`."""
  return network(_PackedLayers(operator, *packed, how=how), x)


class _PackedLayers(Layers):
  def __init__(self, operator: str, params: Params, stats: Params, *, how: dict):
    super().__init__(operator, params, stats)
    self.how = how

  def conv(self, name: str, x, outputs: int, *, size: int = 3, stride: int = 1, binary: bool = True):
    product = lambda bits, words: packed_conv(bits, words, x.shape[-1], kernel=(size, size), stride=stride, **self.how)
    if binary:
      return self._packed(name, x, product, (-3, -2, -1))
    return super().conv(name, x, outputs, size=size, stride=stride, binary=False)

  def dense(self, name: str, x, outputs: int, *, binary: bool = True, bias: bool = True):
    flat = lambda bits: bits.reshape(-1, bits.shape[-1])
    product = lambda bits, words: packed_dense(flat(bits), words, x.shape[-1], **self.how)
    if binary:
      return self._packed(name, x, lambda *given: product(*given).reshape(*x.shape[:-1], outputs), (-1,))
    return super().dense(name, x, outputs, binary=False, bias=bias)

  def _packed(self, name: str, x, product, sample):
    kept = self.params[name]
    signs, scale = self.one.act(x, kept, FINAL, False, sample)
    y = product(pack_bits(signs), kept["words"]).astype(x.dtype) * scale * kept.get("scale_of_signs", 1)
    y = self.one.out(y, kept)
    return y + kept["bias"] if "bias" in kept else y
