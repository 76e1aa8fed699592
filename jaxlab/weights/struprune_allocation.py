r"""STRUPRUNE between layers: how many heads and neurons each keeps, from a few numbers a layer.

  threshold   min_m sum (1 - m_g) E_g  s.t.  sum c_g m_g <= budget   =>   m_g = 1 iff E_g / c_g > lambda
  softmax     min_p sum_l n_l (p_l I_l + T p_l log p_l)  s.t.  sum n_l p_l = n p   =>   p_l ~ exp(-I_l / T) <= p_max

A unit is the attention or the MLP of a layer. All of it is done on the host.
"""

import numpy as np

from jaxlab.core.checks import require
from jaxlab.models.config import TransformerConfig
from jaxlab.weights.structured import Groups, Least, costs, in_order, least_of


def threshold(energy: Groups, config: TransformerConfig, *, numbers: float, least: Least = Least()) -> Groups:
  """Groups in the order of E / c while they fit into so many parameters; the least number of every layer always.

  Raises:
    InputError: what every layer keeps at least takes more.
  """
  head, neuron = costs(config)
  ratios = Groups(np.asarray(energy.heads) / head, np.asarray(energy.neurons) / neuron)
  return in_order(ratios, config, numbers=numbers, least=least)


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


def most_sparse(config: TransformerConfig, most: float, least: Least) -> np.ndarray:
  """(2,) the largest sparsity of attention and MLP."""
  full = np.array([config.kv_heads, config.mlp_width])
  return np.minimum(most, 1 - np.array(least_of(config, least)) / full)
