r"""STRUPRUNE between layers: how many heads and neurons each keeps, from a few numbers a layer.

  threshold   min_m sum (1 - m_g) E_g  s.t.  sum c_g m_g <= budget   =>   m_g = 1 iff E_g / c_g > lambda
  softmax     min_p sum_l n_l (p_l I_l + T p_l log p_l)  s.t.  sum n_l p_l = n p   =>   p_l ~ exp(-I_l / T) <= p_max

A unit is the attention or the MLP of a layer. All of it is done on the host.
"""

from typing import NamedTuple

import numpy as np

from jaxlab.core.checks import require
from jaxlab.models.config import TransformerConfig
from jaxlab.weights.pruning import Groups, costs, top


class Least(NamedTuple):
  """Groups of heads and neurons that every layer keeps."""

  heads: int = 1
  neurons: int = 64


def threshold(energy: Groups, config: TransformerConfig, *, numbers: float, least: Least = Least()) -> Groups:
  """Groups in the order of E / c while they fit into so many parameters; the least number of every layer always.

  Raises:
    InputError: what every layer keeps at least takes more.
  """
  require_room(config, numbers, least)
  cost = costs(config)
  parts = [np.asarray(energy.heads, np.float64), np.asarray(energy.neurons, np.float64)]
  forced = [top(a, np.full(len(a), n)) for a, n in zip(parts, _least(config, least), strict=True)]
  ratio = np.concatenate([(a / c).ravel() for a, c in zip(parts, cost, strict=True)])
  price = np.concatenate([np.full(a.size, c) for a, c in zip(parts, cost, strict=True)])
  keep = np.concatenate([a.ravel() for a in forced])
  left = numbers - price[keep].sum()
  for group in np.argsort(-ratio, kind="stable"):
    if not keep[group] and price[group] <= left:
      keep[group], left = True, left - price[group]
  heads, neurons = np.split(keep, [parts[0].size])
  return Groups(heads.reshape(parts[0].shape), neurons.reshape(parts[1].shape))


def softmax(importance, sizes, *, sparsity: float, temperature: float, most) -> np.ndarray:
  """p_l = p n exp(-I_l / T) / sum_j n_j exp(-I_j / T), the excess over `most` shared out among the others in turn.

  Args:
    importance, sizes: (units,) I and n; sparsity: p; most: p_max, of all units or of each.

  Raises:
    InputError: a temperature that is not positive, or a sparsity that cannot be had.
  """
  importance, sizes = np.asarray(importance, np.float64), np.asarray(sizes, np.float64)
  most = np.broadcast_to(np.asarray(most, np.float64), importance.shape)
  require(temperature > 0, f"the temperature is {temperature}; it must be positive")
  wanted, reached = sparsity * sizes.sum(), (most * sizes).sum()
  enough = sparsity >= 0 and wanted <= reached * (1 + 1e-9)
  require(enough, f"sparsity is {sparsity:.4g}; with what layers keep at least it is 0..{reached / sizes.sum():.4g}")
  p, free = most.copy(), np.ones(len(sizes), bool)
  while free.any():
    weight = np.exp(-(importance[free] - importance[free].min()) / temperature)
    share = (wanted - (most * sizes)[~free].sum()) / (sizes[free] * weight).sum() * weight
    over = share > most[free]
    if not over.any():
      p[free] = share
      break
    free[np.flatnonzero(free)[over]] = False
  return p


def counts(
  shares, config: TransformerConfig, *, numbers: float, least: Least = Least(), multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
  """(key-value heads, neurons) of every layer: whole ones of the shares that are kept, within so many parameters.

  Args:
    shares: (layers, 2) of the heads and of the neurons; multiple: neurons are a multiple of it where they are not all.

  Rounded down at first; then up where the most was lost, while it fits; what is left over is neurons, by their share.
  """
  require_room(config, numbers, least)
  head, neuron = costs(config)
  full = np.array([config.kv_heads, config.mlp_width])
  floor = np.array(_least(config, least))
  step = np.array([1, multiple])
  wanted = np.clip(np.asarray(shares) * full, floor, full)
  kept = np.maximum(np.floor(wanted / step + 1e-9).astype(int) * step, floor)
  price = np.array([head, neuron])
  left = numbers - (kept * price).sum()
  while left < 0:  # the least numbers took more than their share: from where the most is
    spare = np.where(kept - step >= floor, kept / full, -1)
    place = np.unravel_index(spare.argmax(), spare.shape)
    kept[place] -= step[place[1]]
    left += price[place[1]] * step[place[1]]
  lost = (wanted - kept) / step
  for place in zip(*np.unravel_index(np.argsort(-lost, axis=None, kind="stable"), lost.shape), strict=True):
    more = min(step[place[1]], full[place[1]] - kept[place])
    if lost[place] > 1e-9 and more and price[place[1]] * more <= left:
      kept[place] += more
      left -= price[place[1]] * more
  while True:
    room = (kept[:, 1] < full[1]) & (np.minimum(multiple, full[1] - kept[:, 1]) * neuron <= left)
    if not room.any():
      return kept[:, 0], kept[:, 1]
    layer = np.where(room, wanted[:, 1] - kept[:, 1], -np.inf).argmax()
    more = min(multiple, full[1] - kept[layer, 1])
    kept[layer, 1] += more
    left -= neuron * more


def most_sparse(config: TransformerConfig, most: float, least: Least) -> np.ndarray:
  """(2,) the largest sparsity of attention and MLP."""
  full = np.array([config.kv_heads, config.mlp_width])
  return np.minimum(most, 1 - np.array(_least(config, least)) / full)


def require_room(config: TransformerConfig, numbers: float, least: Least) -> None:
  """Raises InputError where what every layer keeps at least takes more than so many parameters."""
  head, neuron = costs(config)
  heads, neurons = _least(config, least)
  taken = config.depth * (heads * head + neurons * neuron)
  total = config.depth * (config.kv_heads * head + config.mlp_width * neuron)
  require(
    taken <= numbers, f"budget {numbers / total:.4g} is too small; what every layer keeps takes {taken / total:.4g}"
  )


def _least(config: TransformerConfig, least: Least) -> tuple[int, int]:
  return min(least.heads, config.kv_heads), min(least.neurons, config.mlp_width)
