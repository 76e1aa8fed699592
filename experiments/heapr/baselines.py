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
_HIGHEST = jax.lax.Precision.HIGHEST


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


def low_rank(model: Transformer, found: heapr.Statistics, x: jax.Array, ratio: float) -> Transformer:
  """D2-MoE (Gu et al. 2025, arXiv 2502.17298): in each layer every matrix is a mean over the experts, by their Fisher
  information, plus a difference of low rank, whitened by what the matrix reads.

  The mean and the factors together take 1 - ratio of the experts' parameters; the matrices that come back are dense.
  """
  weights = [np.asarray(one[...], np.float64).copy() for one in _three(model)]
  fisher = np.asarray(jnp.trace(found.covariance, axis1=-2, axis2=-1), np.float64) + 1e-30
  _, experts, width, size = weights[0].shape
  rank = int(((1 - ratio) * experts - 1) * width * size / (experts * (width + size)))
  half = jax.jit(lambda difference, read: _low_rank(difference, read, rank))
  for layer in range(model.depth):
    h, _ = outputs(layer_of(model, layer), x[layer])
    chosen = np.asarray(gates(layer_of(model, layer), x[layer])[0]) > 0
    share = fisher[layer] / fisher[layer].sum()
    for place, w in enumerate(weights):
      mean = np.einsum("e,eab->ab", share, w[layer])
      for e in range(experts):
        mine = chosen[:, e] if chosen[:, e].any() else slice(None)
        read = np.asarray(x[layer] if place < 2 else h[:, e], np.float64)[mine]
        second = read.T @ read
        floor = 1e-4 * np.trace(second) / len(second) * np.eye(len(second))
        root = np.linalg.cholesky(second + floor).T  # as many rows for every expert, of the same second moment
        w[layer, e] = mean + np.asarray(half(*(jnp.asarray(a, jnp.float32) for a in (w[layer, e] - mean, root))))
  return _with_three(model, weights)


def _low_rank(difference, read, rank: int):
  down, up = svd.svd_llm(difference, moments(read[None]))
  return jnp.matmul(down[:, :rank], up[:rank], precision=_HIGHEST)


def _three(model: Transformer):
  moe = model.blocks.mlp
  return moe.gate, moe.up, moe.down


def _with_three(model: Transformer, weights) -> Transformer:
  """The model with other weights of its experts."""
  moe = jax.tree.map(lambda a: a, model.blocks.mlp)
  cast = lambda w, like: nnx.Param(jnp.asarray(w, like.dtype), axes=like.axes)
  moe.gate, moe.up, moe.down = (cast(w, like) for w, like in zip(weights, (moe.gate, moe.up, moe.down), strict=True))
  return maps.with_blocks(model, maps.replaced(model.blocks, {"mlp": moe}))
