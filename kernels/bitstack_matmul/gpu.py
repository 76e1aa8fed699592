"""The kernel by Pallas' Triton lowering: a program takes 16 outputs and a stretch of the inputs; XLA sums stretches."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

NEEDS = "1 to 8 rows, inputs in 8s and outputs in 16s"
_OUTPUTS = 16  # of a program
_BYTES = 32  # of a program's stretch: 256 inputs
_ROWS = 8


def supports(x, u) -> bool:
  return x.shape[0] <= _ROWS and x.shape[1] % 8 == 0 and u.shape[1] % _OUTPUTS == 0


def bitstack_matmul(x, signs, u, v, count, *, interpret: bool = False):
  """From planes of every eighth column: x (8, rows, bytes) float32, v (8, blocks, rank, bytes)."""
  rows, size = x.shape[1:]
  blocks, outputs, rank = u.shape
  stretches = pl.cdiv(size, _BYTES)
  pad = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, stretches * _BYTES - size)])
  whole = lambda a: pl.BlockSpec(a.shape, lambda i, j: (0,) * a.ndim)
  x, signs, v = pad(x), signs if size % _BYTES == 0 else pad(signs), pad(v)
  parts = pl.pallas_call(
    functools.partial(_kernel, rows=rows, rank=rank),
    grid=(outputs // _OUTPUTS, stretches),
    in_specs=[
      pl.BlockSpec((8, rows, _BYTES), lambda i, j: (0, 0, j)),
      pl.BlockSpec((blocks, _OUTPUTS, _BYTES), lambda i, j: (0, i, j)),
      pl.BlockSpec((blocks, _OUTPUTS, rank), lambda i, j: (0, i, 0)),
      pl.BlockSpec((8, blocks, rank, _BYTES), lambda i, j: (0, 0, 0, j)),
      whole(count),
    ],
    out_specs=pl.BlockSpec((None, rows, _OUTPUTS), lambda i, j: (j, 0, i)),
    out_shape=jax.ShapeDtypeStruct((stretches, rows, outputs), jnp.float32),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name="bitstack_matmul",
  )(x, signs, u, v, count)
  return parts.sum(axis=0)


def _kernel(x, signs, u, v, count, out, *, rows: int, rank: int):
  wide = rank >= 16 and rank & (rank - 1) == 0  # what the matrix units take

  def one(i, sums):
    packed = signs[i].astype(jnp.int32)
    if wide:
      product_of = lambda bit: triton.dot(u[i], v[bit, i])
    else:
      left = [u[i, :, k].astype(jnp.float32)[:, None] for k in range(rank)]
      product_of = lambda bit: sum(left[k] * v[bit, i, k].astype(jnp.float32)[None] for k in range(rank))
    for bit in range(8):
      product = product_of(bit)
      weight = jnp.where((packed >> (7 - bit)) & 1 == 1, product, -product)
      sums = tuple(total + weight * x[bit, row][None] for row, total in enumerate(sums))
    return sums

  none = jnp.zeros((_OUTPUTS, _BYTES), jnp.float32)
  sums = jax.lax.fori_loop(0, count[0], one, (none,) * rows)
  for row, total in enumerate(sums):
    out[row, :] = total.sum(axis=1)
