"""`residual_norm` against XLA's kernels for the same function."""

import jax
import jax.numpy as jnp

from jaxlab.kernels import Bench
from jaxlab.kernels.residual_norm import residual_norm


def cases(tiny: bool = False) -> dict[str, Bench]:
  """States of width 1280 (d20)."""
  return {f"{time} tokens of width 1280": _case(time) for time in ((8,) if tiny else (64, 2048, 32768))}


def _case(time: int, width: int = 1280) -> Bench:
  keys = jax.random.split(jax.random.key(0), 2)
  x, x0 = (jax.random.normal(key, (1, time, width), jnp.bfloat16) for key in keys)
  how = dict(eps=1e-6, interpret=jax.default_backend() != "gpu")
  rivals = {
    name: lambda *given, name=name: (residual_norm(*given[:4], None, implementation=name, **how), None)
    for name in ("triton", "reference")
  }
  return Bench(rivals, (x, x0, jnp.float32(1.1), jnp.float32(-0.2)), None, 4 * x.nbytes)
