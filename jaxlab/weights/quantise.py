"""Weights as whole numbers of a few bits: what weight methods are compared with at equal bytes.

w ~ scale (code - zero),   code in 0 .. 2^bits - 1,   scale and zero for every group of inputs of every output
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_divides
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import Linear
from jaxlab.models.map_forms import Affine, Factored, Product
from jaxlab.models.packed_maps import NORMAL_LEVELS, NormalFloat, Quantised, pack_codes, pack_maxima, unpack_maxima
from jaxlab.weights.calibration import Moments, layer_by_layer, require_transformer, with_maps
from jaxlab.weights.folding import fold, foldable

_DAMPING = 0.01  # of the mean of the Hessian's diagonal
_ALPHAS = np.arange(20, dtype=np.float32) / 20
_CLIPS = 1 - np.arange(1, 20, dtype=np.float32) / 40  # shares of a group's range
_SMALLEST = 1e-4  # mean |x| of an input that is hardly used


def _grid(weight: Float[Array, "*groups group outputs"], bits: int):
  """(scale as it is stored, zero) by the smallest and the largest of a group, 0 among them."""
  low, high = jnp.minimum(weight.min(axis=-2), 0), jnp.maximum(weight.max(axis=-2), 0)
  top = 2**bits - 1
  scale = jnp.maximum((high - low) / top, jnp.finfo(jnp.float16).smallest_normal).astype(jnp.float16)
  zero = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, top)
  return scale, zero.astype(jnp.uint8)


def _code(weight, scale, zero, bits: int):
  return jnp.clip(jnp.round(weight / scale.astype(jnp.float32)) + zero, 0, 2**bits - 1).astype(jnp.uint8)


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
  inputs, outputs = weight.shape
  scale, zero = _grid(weight.astype(jnp.float32).reshape(-1, group, outputs), bits)
  diagonal = 2 * jnp.diagonal(x.second)
  order = jnp.argsort(-diagonal)
  diagonal, weight, hessian = diagonal[order], weight[order], 2 * x.second[order][:, order]
  scales, zeros = (a[order // group] for a in (scale, zero))  # of every input
  dead = diagonal == 0
  hessian = hessian + jnp.diag(jnp.where(dead, 1.0, _DAMPING * diagonal.mean()))
  # The upper Cholesky factor of the inverse: row j says how the error of input j spreads over those after it.
  root = jnp.linalg.cholesky(hessian)
  inverse = jax.scipy.linalg.cho_solve((root, True), jnp.eye(inputs, dtype=hessian.dtype))
  spread = jnp.linalg.cholesky(inverse).T
  weight = jnp.where(dead[:, None], 0, weight.astype(jnp.float32))

  def one_block(weight, start):
    """What the rounding of so many inputs costs reaches those after them as one product."""
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, group)
    part, rows, scale, zero = map(cut, (weight, spread, scales, zeros))
    inside = jax.lax.dynamic_slice_in_dim(rows, start, group, axis=1)

    def one(j, state):
      part, codes, errors = state
      code = _code(part[j], scale[j], zero[j], bits)
      error = (part[j] - scale[j].astype(jnp.float32) * (code.astype(jnp.float32) - zero[j])) / inside[j, j]
      after = jnp.where(jnp.arange(group) > j, inside[j], 0)
      return part - after[:, None] * error, codes.at[j].set(code), errors.at[j].set(error)

    _, codes, errors = jax.lax.fori_loop(0, group, one, (part, part.astype(jnp.uint8), part))
    after = jnp.where(jnp.arange(inputs) >= start + group, rows, 0)
    change = jnp.matmul(after.T, errors, precision=jax.lax.Precision.HIGHEST)
    return weight - change, codes

  _, codes = jax.lax.scan(one_block, weight, jnp.arange(0, inputs, group))
  codes = codes.reshape(inputs, outputs)[jnp.argsort(order)]
  return Quantised(pack_codes(codes, bits), scale, zero, bits=bits)


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
    how: `rtn`, `nf4`, `gptq` or `clipped`, of all maps or by map.

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
