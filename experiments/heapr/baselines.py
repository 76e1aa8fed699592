"""Rivals of HEAPr: other scores of atomic experts, experts dropped, merged, or stored as differences of low rank."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.optimize import linear_sum_assignment

from experiments.heapr.training import gates, hidden
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import MoE, wide
from jaxlab.weights import heapr, svd
from jaxlab.weights.calibration import moments

_SUBSETS = 5000  # of a layer's experts that are all tried


def variants(found: heapr.Statistics, moe: MoE, seed: int) -> dict[str, dict[str, tuple]]:
  """{method: {variant: (scores, pool)}}: of each method the variant that is best on the text to choose by is taken.

  identity: HEAPr with G = I; magnitude: of all three weights; wanda: |h| over the text times |w|; camera: CAMERA-P, a
  mixture of the L2 and the largest norm of h, times |w|, in each layer; fisher: of masks, 1/2 mean (g . e)^2.
  """
  gate, up, down = (np.asarray(one[...], np.float64) for one in (moe.gate, moe.up, moe.down))
  square = (down**2).sum(axis=-1)
  count = np.asarray(found.count, np.float64)
  energy, peak = np.asarray(found.energy, np.float64), np.asarray(found.peak, np.float64)
  seen = np.maximum(count, 1)[..., None]
  norm = np.sqrt(square)
  pools = lambda scores: {pool: (scores, pool) for pool in ("model", "layer")}
  mixture = lambda share: ((1 - share) * np.sqrt(energy) + share * peak) * norm
  return {
    "identity": pools(energy / seen * square),
    "fisher": {"model": (np.asarray(found.joint, np.float64) / seen, "model")},
    "magnitude": pools(square + (gate**2).sum(axis=2) + (up**2).sum(axis=2)),
    "wanda": pools(np.sqrt(energy) * norm),
    "camera": {f"{share:g} of the largest": (mixture(share), "layer") for share in (0, 0.01, 0.1, 0.5, 1)},
    "random": {"model": (np.random.default_rng(seed).random(square.shape), "model")},
  }


def captured(model: Transformer, rows: np.ndarray, tokens: int) -> jax.Array:
  """(layers, tokens, width): what the experts of each layer read of the calibration text."""

  @jax.jit
  def run(model, rows):
    seen = []

    def mlp(layer, moe, a):
      seen.append(a.reshape(-1, a.shape[-1]))
      return moe(a)

    hidden(model, rows, mlp)
    return jnp.stack(seen)

  return run(model, jnp.asarray(rows[: -(-tokens // rows.shape[1])]))[:, :tokens]


def layer_of(model: Transformer, layer: int) -> MoE:
  return jax.tree.map(lambda a: a[layer], model.blocks.mlp)


@jax.jit
def outputs(moe: MoE, x):
  """(hidden neurons (tokens, experts, hidden), outputs (tokens, experts, width)) of all experts for all tokens."""
  of = lambda w: jnp.einsum("td,edf->tef", x, w[...])
  h = jax.nn.silu(of(moe.gate)) * of(moe.up)
  return h, jnp.einsum("tef,efd->ted", h, moe.down[...])


def naee(model: Transformer, x: jax.Array, drop: int) -> np.ndarray:
  """NAEE (Lu et al. 2024, arXiv 2402.14800): bool (layers, experts), in each layer without those `drop` experts whose
  absence changes the layer's output least.

  All subsets are tried, or, where there are more than 5000, experts taken out one after the other.
  """
  alive = []
  for layer in range(model.depth):
    moe = layer_of(model, layer)
    experts = moe.gate.shape[0]
    errors = lambda subsets, moe=moe, x=x[layer]: np.asarray(_errors(moe, x, jnp.asarray(subsets)))
    if math.comb(experts, drop) <= _SUBSETS:
      subsets = np.ones((math.comb(experts, drop), experts), bool)
      for one, gone in zip(subsets, itertools.combinations(range(experts), drop), strict=True):
        one[list(gone)] = False
      alive.append(subsets[errors(subsets).argmin()])
      continue
    best = np.ones(experts, bool)
    for _ in range(drop):
      tried = np.flatnonzero(best)
      subsets = np.repeat(best[None], experts, axis=0)
      subsets[tried, tried] = False
      best = subsets[tried][errors(subsets)[tried].argmin()]
    alive.append(best)
  return np.stack(alive)


@jax.jit
def _errors(moe: MoE, x, subsets):
  out, logits = outputs(moe, x)[1], wide(moe.router(x))
  right = jnp.einsum("te,ted->td", gates(moe, x)[0], out)

  def error(alive):
    top, chosen = jax.lax.top_k(jax.nn.softmax(jnp.where(alive, logits, -1e30), axis=-1), moe.active)
    top = top / top.sum(axis=-1, keepdims=True) if moe.normalize else top
    weight = jnp.einsum("tk,tke->te", top, jax.nn.one_hot(chosen, len(alive)))
    return jnp.square(jnp.einsum("te,ted->td", weight, out) - right).sum()

  return jax.lax.map(error, subsets)


def least_used(found: heapr.Statistics, drop: int) -> dict[str, np.ndarray]:
  """{variant: bool (layers, experts)}: without the experts of the fewest tokens or the smallest router weights."""
  made = {}
  for name, use in (("tokens", found.count), ("weights", found.weight)):
    rank = np.argsort(np.argsort(np.asarray(use), axis=-1, kind="stable"), axis=-1)
    made[name] = rank >= drop
  return made


def merged(model: Transformer, found: heapr.Statistics, x: jax.Array, groups: int, *, align: bool) -> Transformer:
  """HC-SMoE (Chen et al. 2024, arXiv 2410.08589): in each layer `groups` clusters of experts of similar mean outputs,
  each replaced by its mean by use.

  Args:
    align: hidden neurons are matched to the most used expert's first, as MC-SMoE does.

  The model has as many experts as before, those of a cluster equal.
  """
  weights = [np.asarray(one[...], np.float64).copy() for one in _three(model)]
  for layer in range(model.depth):
    mean = np.asarray(outputs(layer_of(model, layer), x[layer])[1].mean(axis=0))
    use = np.asarray(found.count[layer], np.float64) + 1e-9
    label = cut_tree(linkage(mean, "average"), n_clusters=groups)[:, 0]
    for group in range(groups):
      mine = np.flatnonzero(label == group)
      first = mine[use[mine].argmax()]
      gate, up, down = (w[layer] for w in weights)
      flat = lambda e, parts=(gate, up, down): np.concatenate([parts[0][e], parts[1][e], parts[2][e].T])
      order = {e: np.arange(gate.shape[-1]) for e in mine}
      if align:
        order |= {e: linear_sum_assignment(-flat(first).T @ flat(e))[1] for e in mine}
      share = use[mine] / use[mine].sum()
      for w, axis in ((gate, 1), (up, 1), (down, 0)):
        w[mine] = sum(s * np.take(w[e], order[e], axis=axis) for s, e in zip(share, mine, strict=True))
  return _with_three(model, weights)


def differences(model: Transformer, found: heapr.Statistics, x: jax.Array) -> list[tuple]:
  """D2-MoE (Gu et al. 2025, arXiv 2502.17298): of every matrix its mean over the experts of a layer, by their Fisher
  information, and each expert's difference from it as factors, whitened by what the matrix reads.

  Args:
    found: with covariances.

  Returns:
    Of gate, up and down (means (layers, inputs, outputs), V (layers, experts, inputs, most), U (..., most, outputs)),
    the best factors of any rank being the first columns and rows.
  """
  fisher = np.asarray(jnp.trace(found.covariance, axis1=-2, axis2=-1), np.float64) + 1e-30
  share = fisher / fisher.sum(axis=-1, keepdims=True)
  weights = [np.asarray(one[...], np.float64) for one in _three(model)]
  means = [np.einsum("le,leab->lab", share, w) for w in weights]
  factors = [[], [], []]
  for layer in range(model.depth):
    moe = layer_of(model, layer)
    h, used = outputs(moe, x[layer])[0], np.asarray(gates(moe, x[layer])[0]) > 0
    for e in range(used.shape[1]):
      mine = used[:, e] if used[:, e].any() else slice(None)
      roots = [_root(read) for read in (x[layer][mine], h[mine, e])]
      for place, (w, mean) in enumerate(zip(weights, means, strict=True)):
        difference = jnp.asarray(w[layer, e] - mean[layer], jnp.float32)
        factors[place].append(_whitened(difference, roots[place == 2]))
  stacked = lambda parts: np.stack(parts).reshape(model.depth, -1, *parts[0].shape)
  return [(m, *(stacked([f[i] for f in made]) for i in (0, 1))) for m, made in zip(means, factors, strict=True)]


def low_rank(model: Transformer, parts: list[tuple], ratio: float) -> Transformer:
  """The model of `differences` at the rank at which means and factors take 1 - ratio of the experts' parameters.

  The matrices that come back are dense.
  """
  _, experts, width, size = model.blocks.mlp.gate.shape
  rank = int(((1 - ratio) * experts - 1) * width * size / (experts * (width + size)))
  return _with_three(model, [mean[:, None] + v[..., :rank] @ u[..., :rank, :] for mean, v, u in parts])


def _root(read) -> jax.Array:
  """Rows, as many for every expert, of the second moment of what it reads."""
  read = np.asarray(read, np.float64)
  second = read.T @ read
  floor = 1e-4 * np.trace(second) / len(second) * np.eye(len(second))
  return jnp.asarray(np.linalg.cholesky(second + floor).T, jnp.float32)


@jax.jit
def _whitened(difference, read):
  return svd.svd_llm(difference, moments(read[None]))


def _three(model: Transformer):
  moe = model.blocks.mlp
  return moe.gate, moe.up, moe.down


def _with_three(model: Transformer, weights) -> Transformer:
  """The model with other weights of its experts."""
  moe = jax.tree.map(lambda a: a, model.blocks.mlp)
  cast = lambda w, like: nnx.Param(jnp.asarray(w, like.dtype), axes=like.axes)
  moe.gate, moe.up, moe.down = (cast(w, like) for w, like in zip(weights, (moe.gate, moe.up, moe.down), strict=True))
  return maps.with_blocks(model, maps.replaced(model.blocks, {"mlp": moe}))
