"""The kernel by Pallas' Mosaic lowering for TPUs: a grid step adds up a tile of rows and outputs word by word."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_ROWS = 8
_OUTPUTS = 128
_WORDS = 128  # of a grid step, at most: a word of a tile fills whole registers


def xnor_matmul(a, b, size: int, *, interpret: bool = False):
  """As `jaxlab.kernels.xnor_matmul.xnor_matmul`; words that fill no tile are 0 on both sides and count nothing."""
  rows, outputs = len(a), len(b)
  # Word after word on the leading axis, where a loop may take any: rows along sublanes, outputs along lanes.
  a, b = _planes(a, _ROWS)[:, :, None], _planes(b, _OUTPUTS)[:, None]
  words = min(_WORDS, len(a))
  a, b = (jnp.pad(one, ((0, -len(one) % words), (0, 0), (0, 0))) for one in (a, b))
  out = pl.pallas_call(
    functools.partial(_kernel, size=size),
    grid=(a.shape[1] // _ROWS, b.shape[2] // _OUTPUTS, len(a) // words),
    in_specs=[
      pl.BlockSpec((words, _ROWS, 1), lambda i, j, k: (k, i, 0)),
      pl.BlockSpec((words, 1, _OUTPUTS), lambda i, j, k: (k, 0, j)),
    ],
    out_specs=pl.BlockSpec((_ROWS, _OUTPUTS), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((a.shape[1], b.shape[2]), jnp.int32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    interpret=interpret,
    name="xnor_matmul",
  )(a, b)
  return out[:rows, :outputs]


def _planes(words, rows: int):
  """(words, rows), int32."""
  return jax.lax.bitcast_convert_type(jnp.pad(words, ((0, -len(words) % rows), (0, 0))), jnp.int32).T


def _kernel(a, b, out, *, size: int):
  @pl.when(pl.program_id(2) == 0)
  def _():
    out[...] = jnp.full_like(out, size)

  def word(k, count):
    return count + jax.lax.population_count(a[k] ^ b[k])

  out[...] -= 2 * jax.lax.fori_loop(0, a.shape[0], word, jnp.zeros(out.shape, jnp.int32))
