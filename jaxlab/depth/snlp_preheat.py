"""Predicting SNLP's initial trace from the embeddings: the "preheat" start.

  z_j ~ b_j + U_j V^T (x0 - mean),   V: top-r right singular vectors of centred x0, U: ridge least squares,

fitted once on calibration text. `snlp.solve(..., initial=predict(preheat, side.x0))` starts from it.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.depth.snlp_suffix import plain
from jaxlab.models import Transformer
from jaxlab.models.layers import wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preheat:
  """V (width, rank), the mean of x0, and for every layer of the suffix b (n, width) and U (n, rank, width)."""

  basis: Float[Array, "width rank"]
  mean: Float[Array, "width"]
  offset: Float[Array, "n width"]
  slope: Float[Array, "n rank width"]


def fit(
  model: Transformer, batches: Iterable[Int[Array, "batch time"]], *, layers: int, rank: int = 32, ridge: float = 1e-4
) -> Preheat:
  """Fits the predictor of the last `layers` layers' outputs; one pass for the basis, one for the regression.

  Args:
    batches: calibration tokens; kept, they are read twice.
    ridge: added to the Gram matrix of the projections, relative to its mean diagonal.

  Raises:
    InputError: hyper-connections (their state has streams), a rank outside 1..width, no batch.
  """
  batches = list(batches)
  width = model.config.width
  require(model.config.hyper is None, "preheat predicts plain states; this model has hyper-connections")
  require(1 <= rank <= width, f"rank is {rank}; it must lie in 1..{width}, the model's width")
  require(bool(batches), "preheat needs at least one batch of calibration tokens")
  start = plain(model, layers).start

  @jax.jit
  def moments(model, tokens):
    x = wide(model.embed(tokens)[1].x0).reshape(-1, width)
    return x.sum(axis=0), x.T @ x, x.shape[0]

  total, square, count = _sum(moments(model, tokens) for tokens in batches)
  mean = total / count
  _, vectors = jnp.linalg.eigh(square / count - jnp.outer(mean, mean))
  basis = vectors[:, ::-1][:, :rank]

  @jax.jit
  def products(model, tokens):
    _, trace, side = model.trace(tokens)
    p = (wide(side.x0).reshape(-1, width) - mean) @ basis
    y = wide(trace[start:]).reshape(layers, -1, width)
    return p.T @ p, jnp.einsum("tr,ntd->nrd", p, y), y.sum(axis=1)

  gram, cross, sums = _sum(products(model, tokens) for tokens in batches)
  gram += ridge * jnp.trace(gram) / rank * jnp.eye(rank)
  # Projections are centred, so the offset is the mean of the outputs.
  slope = jnp.linalg.solve(gram, cross)
  return Preheat(basis, mean, sums / count, slope)


def predict(preheat: Preheat, x0: Float[Array, "batch time width"]) -> Float[Array, "n batch time width"]:
  """The start z_1 .. z_n for embeddings x0, in their dtype."""
  p = (wide(x0) - preheat.mean) @ preheat.basis
  z = preheat.offset[:, None, None] + jnp.einsum("btr,nrd->nbtd", p, preheat.slope)
  return z.astype(x0.dtype)


def _sum(parts):
  total = None
  for part in parts:
    total = part if total is None else jax.tree.map(jnp.add, total, part)
  return total
