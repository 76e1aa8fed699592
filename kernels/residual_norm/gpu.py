"""The kernel by Pallas' Triton lowering: a program takes the whole width of one or two tokens."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxlab.core.checks import require

_LEAST = 64  # channels of a piece: Triton's blocks have powers of two as sides, a width is several of them
_TOKENS = 2  # of a program, at most: the whole width stays in registers


def supports(width: int) -> bool:
  return width % _LEAST == 0


def residual_norm(x, x0, scale, x0_scale, gain, *, eps, interpret=False):
  """As `jaxlab.kernels.residual_norm.residual_norm`; the sum is rounded to the dtype of x before its norm is taken."""
  *batch, width = x.shape
  require(supports(width), f"width is {width}; the Triton kernel needs a multiple of {_LEAST}")
  rows = math.prod(batch)
  tokens = math.gcd(rows, _TOKENS)
  block = pl.BlockSpec((tokens, width), lambda i: (i, 0))
  one = pl.BlockSpec((1,), lambda i: (0,))
  operands = [x.reshape(rows, width), jnp.broadcast_to(x0, x.shape).reshape(rows, width)]
  operands += [jnp.reshape(a, (1,)).astype(jnp.float32) for a in (scale, x0_scale)]
  specs = [block, block, one, one]
  if gain is not None:
    operands, specs = [*operands, gain], [*specs, pl.BlockSpec((width,), lambda i: (0,))]
  piece = min(math.gcd(width, 1 << 30), 512)
  mixed, normed = pl.pallas_call(
    functools.partial(_kernel, eps=eps, piece=piece),
    grid=(rows // tokens,),
    in_specs=specs,
    out_specs=[block, block],
    out_shape=[jax.ShapeDtypeStruct((rows, width), x.dtype)] * 2,
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    interpret=interpret,
    name="residual_norm",
  )(*operands)
  return mixed.reshape(x.shape), normed.reshape(x.shape)


def _kernel(x, x0, scale, x0_scale, *rest, eps, piece):
  *gain, mixed, normed = rest
  width = x.shape[-1]
  pieces = [slice(start, start + piece) for start in range(0, width, piece)]
  a, b = scale[0], x0_scale[0]
  wide = lambda ref, at: ref[:, at].astype(jnp.float32)
  kept, square = [], 0.0
  for at in pieces:
    value = (a * wide(x, at) + b * wide(x0, at)).astype(mixed.dtype)
    mixed[:, at] = value
    kept.append(value.astype(jnp.float32))
    square += jnp.sum(kept[-1] * kept[-1], axis=-1)
  factor = jax.lax.rsqrt(square / width + eps)[:, None]
  for at, value in zip(pieces, kept, strict=True):
    value = value * factor
    if gain:
      value = value.astype(normed.dtype).astype(jnp.float32) * gain[0][at].astype(jnp.float32)[None]
    normed[:, at] = value.astype(normed.dtype)
