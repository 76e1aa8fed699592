"""Weights as whole numbers of a few bits: what weight methods are compared with at equal bytes.

w ~ scale (code - zero),   code in 0 .. 2^bits - 1,   scale and zero for every group of inputs of every output
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_divides
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import Linear
from jaxlab.models.maps import Factored, Product, Quantised, pack_codes
from jaxlab.weights.calibration import Moments, layer_by_layer, with_maps

_DAMPING = 0.01  # of the mean of the Hessian's diagonal


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
def gptq(weight: Float[Array, "inputs outputs"], x: Moments, *, bits: int, group: int) -> Quantised:
  """GPTQ (Frantar et al. 2022, arXiv 2210.17323): input after input is rounded, and what that costs the outputs is
  made good by the inputs that follow, by the inverse of H = 2 mean x x^T, damped; groups are gridded when reached.
  """
  inputs, outputs = weight.shape
  hessian = 2 * x.second
  diagonal = jnp.diagonal(hessian)
  dead = diagonal == 0
  hessian = hessian + jnp.diag(jnp.where(dead, 1.0, _DAMPING * diagonal.mean()))
  # The upper Cholesky factor of the inverse: row j says how the error of input j spreads over those after it.
  root = jnp.linalg.cholesky(hessian)
  inverse = jax.scipy.linalg.cho_solve((root, True), jnp.eye(inputs, dtype=hessian.dtype))
  spread = jnp.linalg.cholesky(inverse).T
  weight = jnp.where(dead[:, None], 0, weight.astype(jnp.float32))

  def regrid(j, state):
    w, _, scales, zeros = state
    scale, zero = _grid(jax.lax.dynamic_slice_in_dim(w, j, group), bits)
    write = lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, j // group, 0)
    return write(scales, scale), write(zeros, zero)

  def one(j, state):
    w, codes, scales, zeros = state
    scales, zeros = jax.lax.cond(j % group == 0, lambda: regrid(j, state), lambda: (scales, zeros))
    scale, zero = scales[j // group], zeros[j // group]
    code = _code(w[j], scale, zero, bits)
    error = (w[j] - scale.astype(jnp.float32) * (code.astype(jnp.float32) - zero)) / spread[j, j]
    after = jnp.where(jnp.arange(inputs) > j, spread[j], 0)
    return w - after[:, None] * error, codes.at[j].set(code), scales, zeros

  groups = inputs // group
  empty = lambda rows, dtype: jnp.zeros((rows, outputs), dtype)
  state = (weight, empty(inputs, jnp.uint8), empty(groups, jnp.float16), empty(groups, jnp.uint8))
  _, codes, scales, zeros = jax.lax.fori_loop(0, inputs, one, state)
  return Quantised(pack_codes(codes, bits), scales, zeros, bits=bits)


def quantise(
  model: Transformer,
  tokens: Int[Array, "rows time"],
  how: Callable = gptq,
  *,
  bits: int,
  group: int = 64,
  batch: int = 8,
) -> Transformer:
  """Every linear map of the blocks in `bits` bits; later layers are calibrated behind the earlier ones' quantised maps.

  Of a map of low rank both factors are quantised, the second one behind the first.

  Raises:
    InputError: bits outside 1..8, a group that does not divide the inputs of a map; and as `layer_by_layer`.
  """
  require(1 <= bits <= 8, f"bits is {bits}; it must be 1..8")
  for name, one in maps.named(model.blocks).items():
    require(
      isinstance(one, Linear | Factored),
      f"{name} is a {type(one).__name__}; only plain and low-rank maps are quantised",
    )
    factors = {name: one.weight} if isinstance(one, Linear) else {f"{name}.down": one.down, f"{name}.up": one.up}
    for factor, weight in factors.items():
      require_divides("group", group, f"the inputs of {factor}", weight.shape[-2])
  how = functools.partial(how, bits=bits, group=group)

  def other(one, x: Moments):
    if isinstance(one, Linear):
      return how(one.weight[...], x)
    down = how(one.down[...], x)
    up = how(one.up[...], x.through(down.weight()))
    return Product(down, up, None if one.bias is None else one.bias[...], rank=one.down.shape[-1])

  def visit(layer, block, inputs):
    return {name: other(one, inputs[name]) for name, one in maps.named(block).items()}

  return with_maps(model, layer_by_layer(model, tokens, visit, batch=batch, sequential=True))
