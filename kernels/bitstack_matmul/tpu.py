"""The kernel by Pallas' Mosaic lowering for TPUs: a grid step takes 128 outputs, the count is read ahead."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

NEEDS = "1 to 8 rows, inputs in 8s and outputs in 128s"
_OUTPUTS = 128  # of a grid step
_ROWS = 8


def supports(x, u) -> bool:
  return x.shape[0] <= _ROWS and x.shape[1] % 8 == 0 and u.shape[1] % _OUTPUTS == 0


def bitstack_matmul(x, signs, u, v, count, *, interpret: bool = False):
  """From planes of every eighth column: x (8, rows, bytes) float32, v (8, blocks, rank, bytes)."""
  rows, size = x.shape[1:]
  blocks, outputs, rank = u.shape
  whole = lambda a: pl.BlockSpec(a.shape, lambda i, *_: (0,) * a.ndim)
  # The units know no float16.
  u, v = u.astype(jnp.float32), jnp.moveaxis(v, 0, 1).astype(jnp.float32)
  return pl.pallas_call(
    _kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(outputs // _OUTPUTS,),
      in_specs=[
        whole(x),
        pl.BlockSpec((blocks, _OUTPUTS, size), lambda i, *_: (0, i, 0)),
        pl.BlockSpec((blocks, _OUTPUTS, rank), lambda i, *_: (0, i, 0)),
        whole(v),
      ],
      out_specs=pl.BlockSpec((rows, _OUTPUTS), lambda i, *_: (0, i)),
    ),
    out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    interpret=interpret,
    name="bitstack_matmul",
  )(count, x, signs, u, v)


def _kernel(count, x, signs, u, v, out):
  across = (((1,), (1,)), ((), ()))
  out[...] = jnp.zeros_like(out)

  @pl.loop(0, count[0])
  def _(i):
    packed = signs[i].astype(jnp.int32)
    total = jnp.zeros(out.shape, jnp.float32)
    for bit in range(8):
      product = jnp.dot(u[i], v[i, bit], preferred_element_type=jnp.float32)
      weight = jnp.where((packed >> (7 - bit)) & 1 == 1, product, -product)
      total += jax.lax.dot_general(x[bit], weight, across, preferred_element_type=jnp.float32)
    out[...] += total
