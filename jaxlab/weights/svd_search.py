"""ASVD's own search for ranks (Yuan et al. 2023, arXiv 2312.05821): every map of every layer gets a rank of its own.

  full = svd.decompose(model, tokens, svd.asvd)
  losses = sensitivity(model, full, loss)                       # of every map alone at every ratio
  small = truncate_each(model, full, search(full, losses, budget=0.8))

A ratio is a share of a map's parameters: rank = floor(ratio m n / (m + n)); 1 leaves the matrix.
"""

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.core.checks import require
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import Linear
from jaxlab.models.map_forms import Factored, SharedBasis
from jaxlab.weights.calibration import with_maps
from jaxlab.weights.lord import masked, of_factors

RATIOS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_WRITE = ("o", "mlp.down")  # whose outputs are of the residual stream
Trial = tuple[str, int, float]  # a map, its layer and a ratio


def sensitivity(
  model: Transformer,
  full: Mapping[str, Factored],
  loss: Callable[[Transformer], Float[Array, ""]],
  *,
  ratios: Sequence[float] = RATIOS,
) -> dict[Trial, float]:
  """{(map, layer, ratio): loss with that map alone at that ratio}; one compiled program.

  Args:
    full: of `svd.decompose`, float32; loss: mean negative log-likelihood on the calibration text.

  Raises:
    InputError: a ratio outside (0, 1), or one that leaves a map no rank.
  """
  bases = of_factors(full)
  evaluate = jax.jit(lambda model, bases, ranks: loss(masked(model, bases, ranks)))
  whole = {name: np.zeros(len(one.up[...]), np.int32) for name, one in full.items()}
  found = {}
  for (name, one), ratio in itertools.product(full.items(), ratios):
    require(0 < ratio < 1, f"a ratio is {ratio}; it must be between 0 and 1")
    rank = _rank(one, ratio)
    require(rank >= 1, f"ratio {ratio} leaves {name} no rank; raise it")
    for layer, own in enumerate(np.eye(len(whole[name]), dtype=np.int32) * rank):
      found[name, layer, ratio] = float(evaluate(model, bases, whole | {name: own}))
  return found


def search(full: Mapping[str, Factored], losses: Mapping[Trial, float], *, budget: float) -> dict[str, list[float]]:
  """{map: ratio of every layer, 1 where the matrix stays} that take at most `budget` of the parameters.

  Trials are sorted by loss, the worst first, and those before a cut given up; a map's ratio is the smallest of its
  trials that are left. The cut is the last one within the budget, found by bisection.

  Raises:
    InputError: a budget outside 0..1 or below the smallest ratios of all maps, a loss that is no number.
  """
  require(0 < budget <= 1, f"budget is {budget}; it is a share of the maps' parameters, 0 < budget <= 1")
  for (name, layer, ratio), value in losses.items():
    require(not np.isnan(value), f"the loss with {name}, layer {layer}, at ratio {ratio} is no number")
  order = sorted(losses, key=lambda trial: (-losses[trial], trial))

  def ratios(cut: int) -> dict[str, list[float]]:
    found = {name: [1.0] * len(one.up[...]) for name, one in full.items()}
    for name, layer, ratio in order[cut:]:
      found[name][layer] = min(found[name][layer], ratio)
    return found

  def size(cut: int) -> int:
    return sum(_numbers(full[name], ratio) for name, own in ratios(cut).items() for ratio in own)

  total = size(len(order))
  require(size(0) <= budget * total, f"budget is {budget}; the smallest ratios take {size(0) / total:.3f}")
  return ratios(bisect.bisect_right(range(len(order) + 1), budget * total, key=size) - 1)


def truncate_each(
  model: Transformer, full: Mapping[str, Factored], ratios: Mapping[str, Sequence[float]]
) -> Transformer:
  """The model with the maps of every layer at ratios of their own (1: the matrix), in its own dtype.

  Raises:
    InputError: a map with a bias or of another form, or layers of unequal sizes.
  """
  require(not model.config.ragged, "layers of this model have unequal sizes; give them ranks before pruning")
  forms, numbers = {}, itertools.count(1)
  for name, own in ratios.items():
    one = maps.named(model.blocks)[name]
    require(isinstance(one, Linear), f"{name} is a {type(one).__name__}; only plain maps without bias have such ranks")
    upright = lambda a, writes=name in _WRITE: jnp.asarray(a.T if writes else a, model.dtype)
    down, up, layers = full[name].down[...], full[name].up[...], []
    for layer, ratio in enumerate(own):
      if ratio == 1:
        layers.append((0, None, upright(one.weight[layer])))
        continue
      rank = _rank(full[name], ratio)
      read, write = down[layer, :, :rank].T, up[layer, :rank]
      basis, coefficients = (write, read) if name in _WRITE else (read, write)
      layers.append((next(numbers), basis, coefficients.astype(model.dtype)))
    if min(own) < 1:
      forms[name] = SharedBasis.of_layers(layers, writes=name in _WRITE)
  return with_maps(model, forms)


def _rank(one: Factored, ratio: float) -> int:
  inputs, outputs = one.shape[-2:]
  return int(ratio * inputs * outputs / (inputs + outputs))


def _numbers(one: Factored, ratio: float) -> int:
  """Parameters of one layer's map."""
  inputs, outputs = one.shape[-2:]
  return inputs * outputs if ratio == 1 else _rank(one, ratio) * (inputs + outputs)
