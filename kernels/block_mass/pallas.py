"""The kernel, for GPUs by Pallas' Triton lowering and for TPUs by Mosaic's: a program matches one block of queries with
some means, so that no product of a query with a mean leaves the chip."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

NEEDS = (
  "takes 16 or 32 bits; for GPUs blocks of 16 to 256 queries and a head_dim from 16 on, both powers of two, for TPUs "
  "blocks in eights and a head_dim in 128s"
)
_MEANS = 128  # of a program
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that the difference of two is no NaN


def supports(q, block: int, implementation: str) -> bool:
  size = q.shape[3]
  if implementation == "triton":
    fits = all(n >= 16 and n & (n - 1) == 0 for n in (block, size)) and block <= 256
  else:
    fits = implementation == "mosaic_tpu" and block % 8 == 0 and size % 128 == 0
  return fits and q.dtype.itemsize in (2, 4)


def block_mass(q, means, past, real, block: int, implementation: str, interpret: bool):
  """As `jaxlab.kernels.block_mass.block_mass`."""
  batch, heads, queries, size = q.shape
  kv_heads, blocks = means.shape[1:3]
  group, rows, tiles = heads // kv_heads, queries // block, pl.cdiv(blocks, _MEANS)
  means = jnp.pad(means, ((0, 0), (0, 0), (0, tiles * _MEANS - blocks), (0, 0)))
  on_tpu = implementation == "mosaic_tpu"
  on_gpu = triton.CompilerParams(num_warps=8 if block >= 128 else 4, num_stages=1)
  numbers = lambda count: pl.BlockSpec(memory_space=pltpu.SMEM) if on_tpu else pl.BlockSpec((count,), lambda *_: (0,))
  out = pl.pallas_call(
    functools.partial(_kernel, block=block, heads=heads),
    grid=(batch * heads, rows, tiles),
    in_specs=[
      numbers(1),
      numbers(batch),
      pl.BlockSpec((None, block, size), lambda h, i, j: (h, i, 0)),
      pl.BlockSpec((None, _MEANS, size), lambda h, i, j: (jax.lax.div(h, group), j, 0)),
    ],
    out_specs=pl.BlockSpec((None, None, 1, _MEANS), lambda h, i, j: (h, i, 0, j)),
    out_shape=jax.ShapeDtypeStruct((batch * heads, rows, 1, tiles * _MEANS), jnp.float32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=3 * ("parallel",)) if on_tpu else on_gpu,
    interpret=interpret,
    name="block_mass",
  )(past.reshape(1), real, q.reshape(batch * heads, queries, size), means.reshape(batch * kv_heads, -1, size))
  return out[:, :, 0, :blocks].reshape(batch, heads, rows, blocks)


def _kernel(past, real, q, means, out, *, block: int, heads: int):
  i, j = pl.program_id(1), pl.program_id(2)
  size = q.shape[1]
  precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  across = (((1,), (1,)), ((), ()))
  z = jax.lax.dot_general(q[...], means[...], across, precision=precision, preferred_element_type=jnp.float32)
  shape = (block, _MEANS)
  query = i * block + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  last = (j * _MEANS + jax.lax.broadcasted_iota(jnp.int32, shape, 1) + 1) * block - 1
  counts = (past[0] + query >= last) & (query < real[jax.lax.div(pl.program_id(0), heads)])
  z = jnp.where(counts, z / math.sqrt(size), _LOWEST)
  top = jnp.max(z, axis=0, keepdims=True)
  mass = jnp.sum(jnp.where(counts, jnp.exp(z - top), 0.0), axis=0, keepdims=True)
  out[...] = jnp.where(mass == 0, -jnp.inf, top + jnp.log(jnp.where(mass == 0, 1.0, mass)))  # what is no number stays
