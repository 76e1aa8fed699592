"""Maps of low rank from their weights: the rivals of the methods that look at outputs.

Each takes W (inputs, outputs), y = W^T x, and gives (V, U) with W ~ V U.
"""

import functools
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.models import Transformer, maps
from jaxlab.models.map_forms import Affine, Factored
from jaxlab.weights.calibration import Moments, layer_by_layer, matrix, with_maps

_TINY = 1e-6


def triplets(matrix: Float[Array, "m n"], rank: int | None = None):
  """(left, values, right): the first singular triplets, all without a rank.

  By an eigendecomposition of the smaller side's Gram matrix, several times as fast as an SVD. That side's vectors are
  orthonormal, the other's what they take of the matrix, so that all triplets give it back; values below 1e-3 of the
  largest are in no exact order.
  """
  tall = matrix.shape[0] > matrix.shape[1]
  wide = matrix.T if tall else matrix
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  left = jnp.linalg.eigh(product(wide, wide.T))[1][:, ::-1][:, :rank]
  right = product(left.T, wide)
  values = jnp.linalg.norm(right, axis=1)
  right = right / jnp.maximum(values, jnp.finfo(values.dtype).tiny)[:, None]
  return (right.T, values, left.T) if tall else (left, values, right)


def plain_svd(weight: Float[Array, "inputs outputs"], x: Moments):
  """W alone: the singular values split evenly. All ranks at once, as those below."""
  left, values, right = triplets(weight.astype(jnp.float32))
  root = jnp.sqrt(values)
  return left * root, root[:, None] * right


def asvd(weight: Float[Array, "inputs outputs"], x: Moments, *, alpha: float = 0.5):
  """ASVD (Yuan et al. 2023, arXiv 2312.05821): inputs weigh (mean |x|)^alpha."""
  scale = x.absolute**alpha + _TINY
  left, right = plain_svd(scale[:, None] * weight.astype(jnp.float32), x)
  return left / scale[:, None], right


def svd_llm(weight: Float[Array, "inputs outputs"], x: Moments):
  """SVD-LLM (Wang et al. 2024, arXiv 2403.07378): inputs whitened by the Cholesky factor of their second moment.

  Where there is none, as of inputs of few directions, one with what rounding takes of the largest eigenvalue added.
  """
  second = x.second
  values = jnp.linalg.eigvalsh(second)
  floor = len(second) * jnp.finfo(second.dtype).eps * values[-1] - jnp.minimum(values[0], 0)
  root = jnp.linalg.cholesky(second)
  raised = jnp.linalg.cholesky(second + floor * jnp.eye(len(second), dtype=second.dtype))
  root = jnp.where(jnp.isfinite(root).all(), root, raised)
  left, values, right = triplets(root.T @ weight.astype(second.dtype))
  half = jnp.sqrt(values)
  return jax.scipy.linalg.solve_triangular(root.T, left * half, lower=False), half[:, None] * right


def decompose(
  model: Transformer,
  tokens: Int[Array, "rows time"],
  how: Callable = svd_llm,
  *,
  names: Collection[str] = maps.NAMES,
  batch: int = 8,
) -> dict[str, Factored]:
  """The linear maps of those names by `how` at full rank, stacked over layers: lower ranks are prefixes.

  Raises:
    InputError: a map that is no matrix; and as `layer_by_layer`.
  """
  made = jax.jit(how)

  def visit(layer, block, inputs):
    chosen = {name: one for name, one in maps.named(block).items() if name in names}
    bias = lambda one: one.bias[...] if isinstance(one, Affine) else None
    return {name: Factored(*made(matrix(name, one), inputs[name]), bias(one)) for name, one in chosen.items()}

  return layer_by_layer(model, tokens, visit, batch=batch)


def truncate(model: Transformer, full: Mapping[str, Factored], *, budget: float, multiple: int = 1) -> Transformer:
  """The model with every map at the same share of its parameters, in its own dtype.

  Raises:
    InputError: a budget outside (0, 1), or one so small that a map would have no rank left.
  """
  require(0 < budget < 1, f"budget is {budget}; it must be between 0 and 1")
  forms = {}
  for name, one in full.items():
    n, m = one.down.shape[-2], one.up.shape[-1]
    rank = int(budget * n * m / (n + m)) // multiple * multiple
    require(rank >= 1, f"budget {budget} leaves {name} no rank; its smallest is {multiple * (n + m) / (n * m):.3f}")
    down, up = one.down[..., :rank], one.up[..., :rank, :]
    bias = None if one.bias is None else one.bias[...].astype(model.dtype)
    forms[name] = Factored(down.astype(model.dtype), up.astype(model.dtype), bias)
  return with_maps(model, forms)
