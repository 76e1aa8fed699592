"""`bitstack_matmul` against restoring the weight by XLA, and against the product with it in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.kernels import Bench
from jaxlab.kernels.bitstack_matmul import bitstack_matmul


def cases(tiny: bool = False) -> dict[str, Bench]:
  """A map of 4096 x 4096: blocks in use, of which rank."""
  size = 64 if tiny else 4096
  return {
    f"{rows} rows, {blocks} blocks of rank {rank}": _case(rows, blocks, rank, size)
    for rows, blocks, rank in ((1, 2, 16), (1, 4, 16), (1, 2, 2), (4, 2, 16))
  }


def _case(rows: int, blocks: int, rank: int, size: int) -> Bench:
  rng = np.random.default_rng(0)
  signs = jnp.asarray(rng.integers(0, 256, (blocks, size, size // 8)), jnp.uint8)
  part = lambda *shape: jnp.asarray(rng.normal(size=shape) / size**0.5, jnp.float16)
  u, v = part(blocks, size, rank), part(blocks, rank, size)
  x = jnp.asarray(rng.normal(size=(rows, size)), jnp.bfloat16)
  dense = jnp.asarray(rng.normal(size=(size, size)), jnp.bfloat16)
  how = dict(interpret=jax.default_backend() != "gpu")

  def of(name):
    return lambda x, signs, u, v, dense, carry: (
      bitstack_matmul(x, signs, u, v, jnp.int32(blocks), implementation=name, **how),
      None,
    )

  rivals = {name: of(name) for name in ("triton", "reference")}
  rivals["bfloat16"] = lambda x, signs, u, v, dense, carry: (x @ dense, None)
  return Bench(rivals, (x, signs, u, v, dense), None, signs.nbytes + u.nbytes + v.nbytes)
