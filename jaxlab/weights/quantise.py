"""Weights as whole numbers of a few bits: what weight methods are compared with at equal bytes.

w ~ scale (code - zero),   code in 0 .. 2^bits - 1,   scale and zero for every group of inputs of every output
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_divides
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import Linear
from jaxlab.models.map_forms import Affine, Factored, Product
from jaxlab.models.packed_maps import (
  NORMAL_LEVELS,
  NormalFloat,
  Quantised,
  WithOutliers,
  pack_codes,
  pack_maxima,
  pack_shared,
  unpack_maxima,
  unpack_shared,
)
from jaxlab.weights.calibration import Moments, layer_by_layer, require_transformer, with_maps
from jaxlab.weights.folding import fold, foldable

_DAMPING = 0.01  # of the mean of the Hessian's diagonal
_ALPHAS = np.arange(20, dtype=np.float32) / 20
_CLIPS = 1 - np.arange(1, 20, dtype=np.float32) / 40  # shares of a group's range
_SMALLEST = 1e-4  # mean |x| of an input that is hardly used


def _grid(weight: Float[Array, "*groups group outputs"], bits: int):
  """(scale as it is stored, zero) by the smallest and the largest of a group, 0 among them."""
  return _between(weight.min(axis=-2), weight.max(axis=-2), bits)


def _between(low: Float[Array, "*groups"], high: Float[Array, "*groups"], bits: int):
  """As `_grid`, of numbers from low to high."""
  low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
  top = 2**bits - 1
  scale = jnp.maximum((high - low) / top, jnp.finfo(jnp.float16).smallest_normal).astype(jnp.float16)
  return scale, _zero(low, scale, bits).astype(jnp.uint8)


def _zero(low, scale, bits: int):
  return jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, 2**bits - 1)


def _code(weight, scale, zero, bits: int):
  whole = jnp.round(zero.astype(jnp.float32))  # added after rounding: a weight between two codes falls to the even one
  near = jnp.round(weight / scale.astype(jnp.float32) + (zero - whole)) + whole
  return jnp.clip(near, 0, 2**bits - 1).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def rtn(weight: Float[Array, "inputs outputs"], x: Moments | None = None, *, bits: int, group: int) -> Quantised:
  """Round to nearest: every weight by itself."""
  weight = weight.astype(jnp.float32)
  grouped = weight.reshape(-1, group, weight.shape[1])
  scale, zero = _grid(grouped, bits)
  code = _code(grouped, scale[:, None], zero[:, None], bits).reshape(weight.shape)
  return Quantised(pack_codes(code, bits), scale, zero, bits=bits)


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def nf4(weight: Float[Array, "inputs outputs"], x: Moments | None = None, *, bits: int = 4, group: int = 64):
  """QLoRA's NF4 (Dettmers et al. 2023, arXiv 2305.14314): every weight at the nearest of 16 quantiles of the normal
  times its group's largest, which is quantised in its turn (`NormalFloat`, which is what it gives).

  Raises:
    InputError: bits that are not 4.
  """
  require(bits == 4, f"bits is {bits}; NF4 has 4")
  grouped = weight.astype(jnp.float32).reshape(-1, group, weight.shape[1])
  held = pack_maxima(jnp.abs(grouped).max(axis=1))
  share = grouped / jnp.maximum(unpack_maxima(*held), jnp.finfo(jnp.float32).tiny)[:, None]
  levels = jnp.asarray(NORMAL_LEVELS, jnp.float32)
  code = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, share).astype(jnp.uint8).reshape(weight.shape)
  return NormalFloat(pack_codes(code, 4), *held)


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def gptq(weight: Float[Array, "inputs outputs"], x: Moments, *, bits: int, group: int) -> Quantised:
  """GPTQ (Frantar et al. 2022, arXiv 2210.17323): input after input is rounded, and what that costs the outputs is
  made good by the inputs that follow, by the inverse of H = 2 mean x x^T, damped.

  Inputs of the largest mean square come first, on grids of the weights as they were (the released code's activation
  order with static groups): the ones that come last take the errors of all others, and matter least.
  """
  weight = weight.astype(jnp.float32)
  scale, zero = _grid(weight.reshape(-1, group, weight.shape[1]), bits)
  codes, _ = _in_order(weight, scale, zero, _spread(x), bits=bits)
  return Quantised(pack_codes(codes, bits), scale, zero, bits=bits)


@functools.partial(jax.jit, static_argnames=("bits", "group", "outliers"))
def spqr(
  weight: Float[Array, "inputs outputs"], x: Moments, *, bits: int, group: int = 16, outliers: float = 0.01
) -> WithOutliers:
  """SpQR (Dettmers et al. 2023, arXiv 2306.03078): GPTQ in small groups with 3 bits for a scale and for a zero, and the
  weights that cost most kept in 16 bits, as they are when their turn comes.

  Outliers have the largest (w - q)^2 / (2 [H^-1]_jj), q the nearest on the grid of the other weights of their group:
  one that stretches its group's grid lies far outside theirs (two on one side hide each other). The grid is then that
  of the weights that are none. Grids are of the weights as they were, as in `gptq`, where the released code's are made
  as their turn comes: the threshold is known at once, and all maps of a shape keep as many.

  Args:
    outliers: their share of the weights.

  Raises:
    InputError: a share outside 0..1, a group of one weight, or more than 65,536 outputs.
  """
  inputs, outputs = weight.shape
  require(0 <= outliers <= 1, f"outliers is {outliers}; it must be a share of the weights, 0 to 1")
  require(group > 1, f"group is {group}; a weight is held against the others of its group")
  require(outputs <= 2**16, f"a map has {outputs} outputs; an outlier's place among them has 16 bits")
  weight = weight.astype(jnp.float32)
  grouped = weight.reshape(-1, group, outputs)
  spread = _spread(x)
  ordered = jnp.sort(grouped, axis=1)
  others = lambda ends: jnp.where(grouped == ends[:, :1], ends[:, 1:], ends[:, :1])
  scale, zero = _between(others(ordered[:, :2]), others(ordered[:, :-3:-1]), bits)
  error = grouped - scale.astype(jnp.float32) * (_code(grouped, scale, zero, bits).astype(jnp.float32) - zero)
  cost = error.reshape(weight.shape) ** 2 / (2 * spread.inverse[:, None])
  cost = jnp.where(spread.dead[:, None], 0, cost)
  places = jnp.sort(jax.lax.top_k(cost.ravel(), round(outliers * weight.size))[1])
  kept = jnp.zeros(weight.size, bool).at[places].set(True).reshape(weight.shape)
  rest = jnp.where(kept, 0, weight).reshape(grouped.shape)
  held_scale = pack_shared(_grid(rest, bits)[0].astype(jnp.float32))
  scale = unpack_shared(*held_scale, len(grouped), outputs)
  held_zero = pack_shared(_zero(jnp.minimum(rest.min(axis=1), 0), scale, bits))
  zero = unpack_shared(*held_zero, len(grouped), outputs)
  codes, turned = _in_order(weight, scale, zero, spread, bits=bits, kept=kept)
  row, output = jnp.divmod(places, outputs)
  return WithOutliers(
    pack_codes(codes, bits), *held_scale, *held_zero, turned.ravel()[places].astype(jnp.float16),
    output.astype(jnp.uint16), jnp.bincount(row, length=inputs).astype(jnp.uint16), bits=bits, groups=len(grouped),
  )  # fmt: skip


class _Spread(NamedTuple):
  """order: of the inputs, the largest mean square first; rows: in it, how the error of an input spreads over those
  after it; inverse: the diagonal of H^-1; dead: inputs that are always 0, both in the inputs' own order."""

  order: Int[Array, "inputs"]
  rows: Float[Array, "inputs inputs"]
  inverse: Float[Array, "inputs"]
  dead: Bool[Array, "inputs"]


def _spread(x: Moments) -> _Spread:
  diagonal = 2 * jnp.diagonal(x.second)
  order, dead = jnp.argsort(-diagonal), diagonal == 0
  hessian = 2 * x.second[order][:, order] + jnp.diag(jnp.where(dead, 1.0, _DAMPING * diagonal.mean())[order])
  root = jnp.linalg.cholesky(hessian)
  inverse = jax.scipy.linalg.cho_solve((root, True), jnp.eye(len(order), dtype=hessian.dtype))
  # The upper Cholesky factor of the inverse.
  return _Spread(order, jnp.linalg.cholesky(inverse).T, jnp.diagonal(inverse)[jnp.argsort(order)], dead)


def _in_order(weight, scale, zero, spread: _Spread, *, bits: int, kept=None):
  """GPTQ's loop: codes of all weights, and the weights as they were when their turn came.

  Args:
    scale, zero: of every group, (groups, outputs); kept: weights that are held in float16 beside their code.
  """
  inputs, outputs = weight.shape
  group = inputs // len(scale)
  order, dead = spread.order, spread.dead[spread.order]
  scales, zeros = (a[order // group] for a in (scale, zero))  # of every input
  kept = jnp.zeros(weight.shape, bool) if kept is None else kept[order]
  weight = jnp.where(dead[:, None], 0, weight[order])

  def one_block(weight, start):
    """What the rounding of so many inputs costs reaches those after them as one product."""
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, group)
    part, rows, scale, zero, whole = map(cut, (weight, spread.rows, scales, zeros, kept))
    inside = jax.lax.dynamic_slice_in_dim(rows, start, group, axis=1)

    def one(j, state):
      part, codes, errors = state
      code = _code(part[j], scale[j], zero[j], bits)
      near = scale[j].astype(jnp.float32) * (code.astype(jnp.float32) - zero[j])
      near = jnp.where(whole[j], part[j].astype(jnp.float16).astype(jnp.float32), near)
      error = (part[j] - near) / inside[j, j]
      after = jnp.where(jnp.arange(group) > j, inside[j], 0)
      return part - after[:, None] * error, codes.at[j].set(code), errors.at[j].set(error)

    part, codes, errors = jax.lax.fori_loop(0, group, one, (part, part.astype(jnp.uint8), part))
    after = jnp.where(jnp.arange(inputs) >= start + group, rows, 0)
    change = jnp.matmul(after.T, errors, precision=jax.lax.Precision.HIGHEST)
    return weight - change, (codes, part)

  _, made = jax.lax.scan(one_block, weight, jnp.arange(0, inputs, group))
  return tuple(a.reshape(inputs, outputs)[jnp.argsort(order)] for a in made)


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def clipped(weight: Float[Array, "inputs outputs"], x: Moments, *, bits: int, group: int) -> Quantised:
  """Round to nearest on a grid that is narrowed, for every group and output, to where its part of y errs least."""
  grouped = weight.astype(jnp.float32).reshape(-1, group, weight.shape[1])
  groups = len(grouped)
  second = x.second.reshape(groups, group, groups, group)[jnp.arange(groups), :, jnp.arange(groups)]

  def of(share):
    narrow = share * grouped.min(axis=1, keepdims=True), share * grouped.max(axis=1, keepdims=True)
    scale, zero = _grid(jnp.clip(grouped, *narrow), bits)
    code = _code(grouped, scale[:, None], zero[:, None], bits)
    error = scale[:, None].astype(jnp.float32) * (code.astype(jnp.float32) - zero[:, None]) - grouped
    return (error * (second @ error)).sum(axis=1), (code, scale, zero)

  def better(best, share):
    loss, made = of(share)
    keep = lambda a, b: jnp.where((loss < best[0]).reshape(groups, *(1,) * (b.ndim - 2), -1), a, b)
    return (jnp.minimum(loss, best[0]), jax.tree.map(keep, made, best[1])), None

  (_, (code, scale, zero)), _ = jax.lax.scan(better, of(1.0), _CLIPS)
  return Quantised(pack_codes(code.reshape(weight.shape), bits), scale, zero, bits=bits)


def awq(model: Transformer, tokens: Int[Array, "rows time"], *, bits: int, group: int = 64, batch: int = 8):
  """AWQ (Lin et al. 2023, arXiv 2306.00978): inputs that are large on average are scaled up before rounding.

  s = (mean |x|)^alpha over the root of its largest times its smallest, alpha of 0, 0.05 .. 0.95 by the error of the
  outputs, folded into what comes before (`folding`); then every map but q and k on a clipped grid.

  Raises:
    InputError: a map that is not plain; and as `quantise`.
  """

  @jax.jit
  def scale(weights, x: Moments):
    def of(alpha):
      s = jnp.maximum(x.absolute, _SMALLEST) ** alpha
      s = s / jnp.sqrt(s.max() * s.min())
      error = [rtn(s[:, None] * w, bits=bits, group=group).weight() / s[:, None] - w for w in weights]
      return sum((e * (x.second @ e)).sum() for e in error), s

    losses, scales = jax.lax.map(of, _ALPHAS)
    return scales[jnp.nanargmin(losses)]

  require_transformer(model)
  groups = foldable(model)
  for name, one in maps.named(model.blocks).items() if groups else ():
    require(isinstance(one, Linear), f"{name} is a {type(one).__name__}; AWQ is of plain maps, give the original model")

  def visit(layer, block, inputs):
    found = maps.named(block)
    weights = lambda group: [found[name].weight[...].astype(jnp.float32) for name in group]
    return {group[0]: scale(weights(group), inputs[group[0]]) for group in groups}

  folded = fold(model, layer_by_layer(model, tokens, visit, batch=batch)) if groups else model
  grids = {name: rtn if name in ("q", "k") else clipped for name in maps.named(model.blocks)}
  return quantise(folded, tokens, grids, bits=bits, group=group, batch=batch)


def quantise(
  model: Transformer,
  tokens: Int[Array, "rows time"],
  how: Callable | Mapping[str, Callable] = gptq,
  *,
  bits: int,
  group: int = 64,
  batch: int = 8,
) -> Transformer:
  """Every linear map of the blocks in `bits` bits; later layers are calibrated behind the earlier ones' quantised maps.

  Of a map of low rank both factors are quantised, the second one behind the first.

  Args:
    how: `rtn`, `nf4`, `gptq`, `spqr` or `clipped`, of all maps or by map.

  Raises:
    InputError: bits outside 1..8, a group that does not divide the inputs of a map; and as `layer_by_layer`.
  """
  require_transformer(model)
  require(1 <= bits <= 8, f"bits is {bits}; it must be 1..8")
  for name, one in maps.named(model.blocks).items():
    require(
      isinstance(one, Linear | Affine | Factored),
      f"{name} is a {type(one).__name__}; only plain and low-rank maps are quantised",
    )
    low = isinstance(one, Factored)
    factors = {f"{name}.down": one.down, f"{name}.up": one.up} if low else {name: one.weight}
    for factor, weight in factors.items():
      require_divides("group", group, f"the inputs of {factor}", weight.shape[-2])

  def other(name: str, one, x: Moments):
    made = functools.partial(how[name] if isinstance(how, Mapping) else how, bits=bits, group=group)
    if isinstance(one, Linear):
      return made(one.weight[...], x)
    if isinstance(one, Affine):
      other = made(one.weight[...], x)
      other.bias = nnx.data(nnx.Param(one.bias[...], axes=(None,)))
      return other
    down = made(one.down[...], x)
    up = made(one.up[...], x.through(down.weight()))
    return Product(down, up, None if one.bias is None else one.bias[...], rank=one.down.shape[-1])

  def visit(layer, block, inputs):
    return {name: other(name, one, inputs[name]) for name, one in maps.named(block).items()}

  return with_maps(model, layer_by_layer(model, tokens, visit, batch=batch, sequential=True))
