r"""LoRD: maps of low rank, their basis taken from what a layer gives on a calibration text (Kaushal et al. 2023,
arXiv 2309.14021; the decomposition after Yu and Wu, AAAI 2023).

  y = W^T x,   C = mean (y - mu)(y - mu)^T = E diag(lambda) E^T,   eigenvalues descending
  y ~ E_r E_r^T (y - mu) + mu   =>   V = W E_r,  U = E_r^T,  b = mu - E_r E_r^T mu

the map of rank r with the least squared error of its outputs, T sum_{i > r} lambda_i. Without centring (mu = 0) it is
SVD-LLM's (`svd.svd_llm`) in another way.

  bases = decompose(model, tokens)                                       # one pass, one eigh a map
  small = truncate(model, bases, choose(bases, sweep(model, bases, loss), budget=0.8))
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.models import Transformer, maps
from jaxlab.models.map_forms import Factored
from jaxlab.weights.calibration import Moments, layer_by_layer, matrix, require_transformer, with_maps

_LEAST = 4  # calibration tokens for every output at least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Basis:
  """The outputs' principal directions, those of rank r being the first r: a prefix.

  down: (*stack, inputs, most) = W E; up: (*stack, most, outputs) = E^T; eigenvalues: (*stack, most), descending; mean:
  (*stack, outputs) of x W, zeros without centring; bias: (*stack, outputs) of the map itself, if it has one.
  """

  down: Array
  up: Array
  eigenvalues: Array
  mean: Array
  bias: Array | None = None

  @property
  def shifts(self) -> bool:
    """Whether a map of low rank has a bias."""
    return self.bias is not None or bool(jnp.any(self.mean != 0))

  @property
  def weights(self) -> int:
    """Of the dense map."""
    return self.down.shape[-2] * self.up.shape[-1]

  def cost(self, rank: int, *, bias: bool) -> int:
    """Numbers that a map of this rank takes, which is never more than the dense one's."""
    small = rank * (self.down.shape[-2] + self.up.shape[-1]) + bias * self.up.shape[-1]
    return min(small, self.weights)


def basis(weight: Float[Array, "inputs outputs"], x: Moments, *, centre: bool = True) -> Basis:
  """Of one map that reads inputs of those moments; with more outputs than inputs through the smaller side's matrix."""
  inputs, outputs = weight.shape
  weight = weight.astype(x.mean.dtype)
  cov = x.covariance if centre else x.second
  product = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  if outputs <= inputs:
    values, vectors = jnp.linalg.eigh(product(weight.T, product(cov, weight)))
    vectors = vectors[:, ::-1]
  else:
    # A root by eigenvalues: a covariance of few directions, or of some far above the others, has no Cholesky factor.
    spread, axes = jnp.linalg.eigh(cov)
    wide = product(weight.T, axes * jnp.sqrt(jnp.maximum(spread, 0)))
    values, right = jnp.linalg.eigh(product(wide.T, wide))
    vectors = product(wide, right[:, ::-1])
    # Directions without variance come last and are made orthonormal to the others all the same.
    vectors = jnp.linalg.qr(vectors)[0]
  mean = product(weight.T, x.mean) if centre else jnp.zeros(outputs, weight.dtype)
  return Basis(product(weight, vectors), vectors.T, jnp.maximum(values[::-1], 0), mean)


def decompose(
  model: Transformer,
  tokens: Int[Array, "rows time"],
  *,
  centre: bool = True,
  batch: int = 8,
) -> dict[str, Basis]:
  """The basis of every linear map of the blocks, stacked over layers, from one pass over a calibration text.

  Raises:
    InputError: fewer than four tokens for every output of the widest basis, whose directions would be noise; a basis
      that is not finite; a map that is no matrix; and as `layer_by_layer`.
  """
  require_enough(model, tokens)
  made = jax.jit(basis, static_argnames="centre")

  def visit(layer, block, inputs):
    found = {}
    for name, one in maps.named(block).items():
      bias = getattr(one, "bias", None)
      own = made(one.weight[...], inputs[name], centre=centre)
      require_finite(name, layer, own)
      found[name] = dataclasses.replace(own, bias=None if bias is None else bias[...])
    return found

  return layer_by_layer(model, tokens, visit, batch=batch)


def require_enough(model: Transformer, tokens: Int[Array, "rows time"]) -> None:
  """Raises InputError for a text too short for the model's bases, or a map that is no matrix."""
  require_transformer(model)
  most = max(min(matrix(name, one).shape[-2:]) for name, one in maps.named(model.blocks).items())
  enough = _LEAST * most
  require(
    tokens.size >= enough, f"the calibration text has {tokens.size} tokens; bases of {most} take {enough} or more"
  )


def require_finite(name: str, layer: int, one: Basis) -> None:
  """Raises InputError for a basis that holds NaN or infinity."""
  finite = all(bool(jnp.isfinite(a).all()) for a in (one.down, one.up, one.mean))
  require(finite, f"the basis of {name}, layer {layer}, holds NaN or infinity; give another calibration text")


def of_factors(full: Mapping[str, Factored]) -> dict[str, Basis]:
  """Factors whose first ones are those of a lower rank (`svd.decompose`), for `sweep`, `choose` and `truncate`: ranks
  of other decompositions, chosen alike. They have no eigenvalues and no means."""
  found = {}
  for name, one in full.items():
    down, up = one.down[...], one.up[...]
    none, mean = jnp.zeros(down.shape[:-2] + down.shape[-1:]), jnp.zeros(up.shape[:-2] + up.shape[-1:])
    found[name] = Basis(down, up, none, mean, None if one.bias is None else one.bias[...])
  return found


def _or_zero(bias: Array | None):
  return 0 if bias is None else bias


def factors(basis: Basis, rank: int, *, dtype) -> Factored:
  """The map of that rank: its first directions and, where outputs have a mean, what the others add on average."""
  down, up = basis.down[..., :rank], basis.up[..., :rank, :]
  left = basis.mean - ((up @ basis.mean[..., None]) * up).sum(axis=-2) + _or_zero(basis.bias)
  bias = left.astype(dtype) if basis.shifts else None
  return Factored(down.astype(dtype), up.astype(dtype), bias)


def truncate(model: Transformer, bases: Mapping[str, Basis], ranks: Mapping[str, int]) -> Transformer:
  """The model with the maps named in `ranks` at those ranks in all layers, in its own dtype.

  A rank at which the factors would take as many numbers as the matrix leaves the map as it is.

  Raises:
    InputError: as `thinner`.
  """
  return with_maps(model, thinner(bases, ranks, dtype=model.dtype))


def thinner(bases: Mapping[str, Basis], ranks: Mapping[str, int], *, dtype) -> dict[str, Factored]:
  """The maps at their ranks, without those whose factors would take as many numbers as the matrix.

  Raises:
    InputError: a map without a basis, or a rank outside 1 .. the basis' size.
  """
  forms = {}
  for name, rank in ranks.items():
    require_choice("a map", name, bases)
    one = bases[name]
    most = one.up.shape[-2]
    require(1 <= rank <= most, f"rank {rank} of {name}; it must be 1..{most}")
    made = factors(one, rank, dtype=dtype)
    if one.cost(rank, bias=made.bias is not None) < one.weights:
      forms[name] = made
  return forms


class _Masked(nnx.Module):
  """A basis whose rank is data: one program for all ranks."""

  def __init__(self, basis: Basis, rank: Int[Array, "*stack"]):
    self.basis, self.rank = nnx.data(basis), nnx.data(rank)

  def __call__(self, x):
    b = self.basis
    keep = jnp.arange(b.up.shape[-2]) < self.rank
    cut = lambda a: jnp.where(keep, a @ b.down.astype(a.dtype), 0) @ b.up.astype(a.dtype)
    left = b.mean - (jnp.where(keep, b.up @ b.mean, 0)[:, None] * b.up).sum(axis=0) + _or_zero(b.bias)
    return cut(x) + left.astype(x.dtype)


def masked(model: Transformer, bases: Mapping[str, Basis], ranks: Mapping[str, Int[Array, "*layers"]]) -> Transformer:
  """`truncate` with ranks that are data, of a map or of each of its layers; a rank of 0 keeps the dense map."""
  forms = {}
  for name, rank in ranks.items():
    one = bases[name]
    layers, most = one.up.shape[0], one.up.shape[-2]
    full = jnp.where(rank == 0, most, rank)
    forms[name] = _Masked(one, jnp.full((layers,), full))
  return with_maps(model, forms)


def sweep(
  model: Transformer,
  bases: Mapping[str, Basis],
  loss: Callable[[Transformer], Float[Array, ""]],
  *,
  shares: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
  multiple: int = 16,
) -> tuple[float, dict[str, dict[int, float]]]:
  """(loss of the dense model, {map: {rank: loss with that map alone at that rank in all layers}}).

  Args:
    loss: mean negative log-likelihood on text that is neither the calibration's nor the final test's; compiled once.
    shares: of the ranks at which factors take as many numbers as the matrix; multiple: ranks are multiples of it.
  """
  evaluate = jax.jit(lambda model, bases, ranks: loss(masked(model, bases, ranks)))
  ranks_of = lambda one: sorted({round(share * _even(one) / multiple) * multiple for share in shares} - {0})
  none = dict.fromkeys(bases, jnp.int32(0))
  at = lambda name, rank: float(evaluate(model, bases, none | {name: jnp.int32(rank)}))
  dense = float(evaluate(model, bases, none))
  return dense, {name: {rank: at(name, rank) for rank in ranks_of(one)} for name, one in bases.items()}


def choose(
  bases: Mapping[str, Basis],
  found: tuple[float, Mapping[str, Mapping[int, float]]],
  *,
  budget: float,
) -> dict[str, int]:
  """Ranks by map, from `sweep`, at which the blocks' maps take at most `budget` of their dense parameters.

  Step by step the map and rank are taken that save the most parameters for the least additional loss; what the last
  step saved too much is given back.

  Raises:
    InputError: a budget outside 0..1 or one that the smallest ranks of the sweep do not reach, a loss that is no
      number.
  """
  _require_share(budget)
  dense, table = found
  require(not np.isnan(dense), "the loss of the dense model is no number; look at the model and the text")
  for name, losses in table.items():
    for rank, value in losses.items():
      require(not np.isnan(value), f"the loss with {name} at rank {rank} is no number; leave that rank out")
  bias = {name: one.shifts for name, one in bases.items()}
  cost = lambda name, rank: bases[name].cost(rank, bias=bias[name]) if rank else bases[name].weights
  total = sum(one.weights for one in bases.values())
  ranks = dict.fromkeys(bases, 0)
  loss = lambda name, rank: table[name][rank] if rank else dense
  while sum(cost(name, rank) for name, rank in ranks.items()) > budget * total:
    steps = []
    for name, now in ranks.items():
      for rank in table[name]:
        saved = cost(name, now) - cost(name, rank)
        if saved > 0:
          steps.append((saved / max(loss(name, rank) - loss(name, now), 1e-9), name, rank))
    smallest = sum(min(cost(name, r) for r in (0, *table[name])) for name in bases) / total
    require(bool(steps), f"budget is {budget}; the smallest ranks of the sweep take {smallest:.3f} of the parameters")
    _, name, rank = max(steps)
    ranks[name] = rank
  # The last step may have saved more than it had to: what is left goes where it helps most.
  while True:
    left = budget * total - sum(cost(name, rank) for name, rank in ranks.items())
    steps = [
      (loss(name, now) - loss(name, rank), name, rank)
      for name, now in ranks.items()
      for rank in (0, *table[name])
      if 0 < cost(name, rank) - cost(name, now) <= left and loss(name, rank) < loss(name, now)
    ]
    if not steps:
      break
    _, name, rank = max(steps)
    ranks[name] = rank
  return {name: rank for name, rank in ranks.items() if rank}


def uniform(bases: Mapping[str, Basis], *, budget: float, multiple: int = 1) -> dict[str, int]:
  """Ranks by map at which every map takes at most the same share of its parameters; at a budget of 1 no map has one.

  Raises:
    InputError: a budget outside 0..1, or one that leaves a map no rank.
  """
  _require_share(budget)
  ranks = {}
  for name, one in bases.items() if budget < 1 else ():
    inputs, outputs = one.down.shape[-2], one.up.shape[-1]
    bias = outputs if one.shifts else 0
    ranks[name] = int((budget * one.weights - bias) / (inputs + outputs)) // multiple * multiple
    require(ranks[name] >= 1, f"budget {budget} leaves {name} no rank of a multiple of {multiple}; raise it")
  return ranks


def _require_share(budget: float) -> None:
  require(0 < budget <= 1, f"budget is {budget}; it is a share of the maps' parameters, 0 < budget <= 1")


def _even(one: Basis) -> float:
  """The rank at which the factors take as many numbers as the matrix."""
  inputs, outputs = one.down.shape[-2], one.up.shape[-1]
  return one.weights / (inputs + outputs)
