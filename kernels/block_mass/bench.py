"""`block_mass` against XLA's products, maxima and sums."""

import functools

import jax
import jax.numpy as jnp

from jaxlab.kernels import Bench
from jaxlab.kernels.block_mass import block_mass


def cases(tiny: bool = False) -> dict[str, Bench]:
  """A chunk of 1,024 tokens of 32 over 8 heads of 128, as in Llama 3.1 8B, and the means of its past."""
  if tiny:
    return {"tiny": _case(heads=(2, 1), tokens=32, size=16, block=16, blocks=5)}
  return {
    f"1024 tokens, {blocks} blocks of 128": _case(heads=(32, 8), tokens=1024, size=128, block=128, blocks=blocks)
    for blocks in (256, 1024)
  }


def _case(*, heads: tuple[int, int], tokens: int, size: int, block: int, blocks: int) -> Bench:
  keys = jax.random.split(jax.random.key(0), 2)
  q = jax.random.normal(keys[0], (1, heads[0], tokens, size), jnp.bfloat16)
  means = jax.random.normal(keys[1], (1, heads[1], blocks, size), jnp.float32)
  past = blocks * block  # every query sees every block
  rivals = {name: functools.partial(_by, name, past, block) for name in ("triton", "reference")}
  written = heads[0] * (tokens // block) * blocks * 4
  return Bench(rivals, (q, means), None, 2 * q.size + 4 * means.size + written)


def _by(implementation: str, past: int, block: int, q, means, _):
  interpret = jax.default_backend() != "gpu" and implementation == "triton"
  return block_mass(q, means, past=past, block=block, implementation=implementation, interpret=interpret), None
