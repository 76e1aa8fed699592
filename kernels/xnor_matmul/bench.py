"""`xnor_matmul` against XLA's counting of the same words, and against the product of the signs in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.kernels import Bench
from jaxlab.kernels.xnor_matmul import pack_bits, xnor_matmul


def cases(tiny: bool = False) -> dict[str, Bench]:
  """A square map of 4096, and what a 3 x 3 convolution of 256 channels on 8 x 8 pixels and 32 images is."""
  shapes = {"1 row of 4096": (1, 4096, 4096), "8 rows of 4096": (8, 4096, 4096), "2048 rows of 2304": (2048, 256, 2304)}
  return {name: _case(*((2, 40, 70) if tiny else shape)) for name, shape in shapes.items()}


def _case(rows: int, outputs: int, size: int) -> Bench:
  rng = np.random.default_rng(0)
  signs = lambda *shape: jnp.asarray(rng.choice([-1.0, 1.0], shape), jnp.bfloat16)
  x, w = signs(rows, size), signs(outputs, size)
  how = dict(interpret=jax.default_backend() != "gpu")

  def of(name):
    return lambda a, b, x, w, carry: (xnor_matmul(a, b, size, implementation=name, **how), None)

  rivals = {name: of(name) for name in ("triton", "reference")}
  rivals["bfloat16"] = lambda a, b, x, w, carry: (jnp.matmul(x, w.T, preferred_element_type=jnp.float32), None)
  a, b = pack_bits(x), pack_bits(w)
  return Bench(rivals, (a, b, x, w), None, a.nbytes + b.nbytes + 4 * rows * outputs)
