"""The kernel by Pallas' Triton lowering: a program keeps the counts of some rows with a tile of outputs and words."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_ROWS = 8  # of a program, at most
_OUTPUTS = 32
_WORDS = 32


def xnor_matmul(a, b, size: int, *, interpret: bool = False):
  """As `jaxlab.kernels.xnor_matmul.xnor_matmul`; words that fill no tile are 0 on both sides and count nothing."""
  rows, outputs = len(a), len(b)
  each = min(_ROWS, pl.next_power_of_2(rows))
  a, b = _filled(a, each, _WORDS), _filled(b, _OUTPUTS, _WORDS)
  words = a.shape[1]
  out = pl.pallas_call(
    functools.partial(_kernel, size=size, rows=each, count=jax.lax.population_count if interpret else _count),
    grid=(len(b) // _OUTPUTS, len(a) // each),
    in_specs=[
      pl.BlockSpec((each, words), lambda j, i: (i, 0)),
      pl.BlockSpec((_OUTPUTS, words), lambda j, i: (j, 0)),
    ],
    out_specs=pl.BlockSpec((each, _OUTPUTS), lambda j, i: (i, j)),
    out_shape=jax.ShapeDtypeStruct((len(a), len(b)), jnp.int32),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="xnor_matmul",
  )(a, b)
  return out[:rows, :outputs]


def _filled(words, rows: int, columns: int):
  return jnp.pad(words, ((0, -words.shape[0] % rows), (0, -words.shape[1] % columns)))


def _count(words):
  """Ones of every word: Triton knows no operation for them, the processor does. Its results have a sign."""
  made = [jax.ShapeDtypeStruct(words.shape, jnp.int32)]
  return triton.elementwise_inline_asm(
    "popc.b32 $0, $1;", args=[words], constraints="=r,r", pack=1, result_shape_dtypes=made
  )[0]


def _kernel(a, b, out, *, size: int, rows: int, count):
  def tile(i, counts):
    part = pl.ds(i * _WORDS, _WORDS)
    weights = b[:, part]
    differ = lambda row: count(weights ^ a[row, part][None]).astype(jnp.int32)
    return tuple(so_far + differ(row) for row, so_far in enumerate(counts))

  none = jnp.zeros((_OUTPUTS, _WORDS), jnp.int32)
  counts = jax.lax.fori_loop(0, a.shape[1] // _WORDS, tile, (none,) * rows)
  for row, ones in enumerate(counts):
    out[row, :] = size - 2 * ones.sum(axis=1)
