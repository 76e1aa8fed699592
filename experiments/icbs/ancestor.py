r"""The Combinatorial Brain Surgeon (Yu et al. 2022, arXiv 2203.04466): one problem over all weights of a small network.

  least w_P^T F_PP w_P / 2 over the pruned set P,   F = mean_b g_b g_b^T + lam I of the dense network

CBS-S draws starts by magnitude, then swaps weights; CBS-U changes what stays, delta_K = -F_KK^-1 F_KP delta_P.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.weights.pruning import keep

_LEAST = 1e-4  # of the energy, that a swap has to gain
_ATTEMPTS, _RANGE = 20, 10  # pruned weights that are tried, and kept ones for each


def select(network, params: Mapping[str, jax.Array], batch, density: float, fields, seed: int):
  """(params, masks, factors, lam) of CBS-S: the best of fields.starts random ones, then swaps within a map.

  A start keeps the largest of |w| times exp(fields.noise times a normal number).
  """
  index = {name: jnp.arange(weight.size) for name, weight in params.items()}
  pairs = {name: network.observe(params, name, batch) for name in params}
  samples = {name: one.at(index[name]) for name, one in pairs.items()}
  factors = {name: g.T / np.sqrt(len(g)) for name, g in samples.items()}
  total = sum(float((one**2).sum()) for one in factors.values())
  lam = fields.ridge * total / sum(len(one) for one in factors.values())
  flat = {name: weight.ravel() for name, weight in params.items()}
  rng = np.random.default_rng(seed)

  def pruned_energy(masks):
    r = sum((jnp.where(masks[name], 0, flat[name]) @ factors[name] for name in flat), 0.0)
    own = sum(jnp.where(masks[name], 0, flat[name] ** 2).sum() for name in flat)
    return r, float(r @ r / 2 + lam * own / 2)

  def drawn(noise):
    masks = {}
    for name, weight in params.items():
      scores = np.abs(weight) * np.exp(noise * rng.normal(size=weight.shape))
      masks[name] = jnp.asarray(keep(scores, density).ravel())
    return masks

  masks = min((drawn(fields.noise if i else 0.0) for i in range(fields.starts)), key=lambda m: pruned_energy(m)[1])
  r, energy = pruned_energy(masks)
  for _ in range(fields.swaps):
    found = [_best_swap(flat[name], factors[name], masks[name], r, lam) for name in flat]
    at = min(range(len(found)), key=lambda i: float(found[i][0]))
    change, back, gone, step = found[at]
    if not float(change) < -_LEAST * energy:
      break
    name = list(flat)[at]
    masks[name] = masks[name].at[back].set(True).at[gone].set(False)
    r, energy = r + step, energy + float(change)
  shaped = {name: np.asarray(masks[name]).reshape(weight.shape) for name, weight in params.items()}
  return {name: jnp.where(shaped[name], w, 0) for name, w in params.items()}, shaped, params, factors, lam


@jax.jit
def _best_swap(weight, factor, mask, r, lam):
  """(change of the energy, the weight that comes back, the one that goes, change of r): the best of those tried."""
  rows = weight[:, None] * factor
  slope, own = rows @ r, (rows**2).sum(axis=1) / 2 + lam * weight**2 / 2
  tries, reach = min(_ATTEMPTS, weight.size), min(_RANGE, weight.size)
  backs = jax.lax.top_k(jnp.where(mask, -jnp.inf, slope - (rows**2).sum(axis=1) / 2 + lam * weight**2 / 2), tries)[1]
  goes = jax.lax.top_k(jnp.where(mask, -(slope + own), -jnp.inf), reach)[1]
  change = (own - lam * weight**2 - slope)[backs][:, None] + (own + slope)[goes] - rows[backs] @ rows[goes].T
  valid = ~mask[backs][:, None] & mask[goes]
  change = jnp.where(valid, change, jnp.inf)
  i, j = jnp.divmod(jnp.argmin(change), reach)
  return change[i, j], backs[i], goes[j], rows[goes[j]] - rows[backs[i]]


def update(pruned, masks, params, factors, lam) -> dict[str, jax.Array]:
  """CBS-U: what stays, changed by the closed form; through a system of the samples' size."""
  kept = {name: jnp.asarray(masks[name].ravel())[:, None] * one for name, one in factors.items()}
  lost = sum((-jnp.where(masks[name].ravel(), 0, w.ravel()) @ factors[name] for name, w in params.items()), 0.0)
  gram = sum(one.T @ one for one in kept.values()) + lam * jnp.eye(len(lost))
  step = jnp.linalg.solve(gram, lost)
  return {name: pruned[name] - (kept[name] @ step).reshape(w.shape) for name, w in params.items()}
