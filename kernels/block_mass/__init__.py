"""How much attention blocks of queries would pay to blocks of keys that all were their block's mean."""

import math

import jax
import jax.numpy as jnp

from jaxlab.core.checks import require, require_choice, require_divides, warn_once
from jaxlab.kernels.block_mass import pallas

IMPLEMENTATIONS = (None, "reference", "triton", "mosaic_tpu")


def block_mass(q, means, *, past, block: int, real=None, implementation=None, interpret=False):
  """log sum_t exp(q[t] . means[j] / sqrt(head_dim)) over the queries t of block i at or past the last key of block j.

  Args:
    q: (batch, q_heads, queries, head_dim), at positions past, past + 1, ...; the block divides their number.
    means: (batch, kv_heads, key_blocks, head_dim), matched in the dtype of q.
    past: int32[] or int.
    real: int32[batch], the queries of every row that count, the first ones; None: all.
    implementation: "reference" (XLA), "triton" or "mosaic_tpu"; None picks what runs best where it is called.
    interpret: run the kernel in Pallas' interpreter, on any machine.

  Returns:
    float32[batch, q_heads, query_blocks, key_blocks]; -inf where no query stands that far. There is no derivative but
    the reference's.

  Raises:
    InputError: an unknown implementation, shapes that do not fit, or sizes that the kernel cannot take.
  """
  require_choice("implementation", implementation, IMPLEMENTATIONS)
  require(
    q.shape[0] == means.shape[0] and q.shape[3] == means.shape[3] and q.shape[1] % means.shape[1] == 0,
    f"q {q.shape} and means {means.shape} do not fit: expected (batch, q_heads, queries, d), (batch, kv_heads, blocks, "
    "d) with whole groups of query heads",
  )
  require_divides("block", block, "queries", q.shape[2])
  if implementation is None:
    implementation = {"gpu": "triton", "tpu": "mosaic_tpu"}.get(jax.default_backend(), "reference")
    if implementation != "reference" and not pallas.supports(q, block, implementation):
      warn_once(f"no kernel takes blocks of {block} and {q.shape[3]} channels in {q.dtype}: XLA writes all products")
      implementation = "reference"
  real = jnp.full(q.shape[0], q.shape[2], jnp.int32) if real is None else jnp.asarray(real, jnp.int32)
  problem = q, means.astype(q.dtype), jnp.asarray(past, jnp.int32), real
  if implementation == "reference":
    return _reference(*problem, block)
  require(
    pallas.supports(q, block, implementation), f"the {implementation} kernel {pallas.NEEDS}; use 'reference' instead"
  )
  return pallas.block_mass(*problem, block, implementation, interpret)


def _reference(q, means, past, real, block: int):
  batch, heads, queries, size = q.shape
  grouped = q.reshape(batch, means.shape[1], -1, queries, size)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  z = jnp.einsum("bgrqd,bgkd->bgrqk", grouped, means, preferred_element_type=wide, precision=precision)
  blocks = means.shape[2]
  far = past + jnp.arange(queries)[:, None] >= (jnp.arange(blocks) + 1) * block - 1
  counts = far & (jnp.arange(queries)[:, None] < real[:, None, None])
  z = jnp.where(counts[:, None, None], z / math.sqrt(size), -jnp.inf)
  return jax.nn.logsumexp(z.reshape(batch, heads, queries // block, block, blocks), axis=3)
