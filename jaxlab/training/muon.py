"""Muon with Polar Express iterations, NorMuon variance reduction and cautious weight decay, as in nanochat.

Sources: Jordan et al. 2024 (Muon); Amsel et al. 2025, arXiv 2505.16932 (Polar Express); Li et al. 2025, arXiv
2510.05491 (NorMuon). Works on stacks of matrices (..., inputs, outputs); every leading axis is a batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxlab.core import mesh as meshes

# (a, b, c) of each step: u <- a u + u (b A + c A A), A = u^T u. Five steps, safety 2e-2, cushion 2.
_POLAR_EXPRESS = (
  (8.15655, -22.48329, 15.87877),
  (4.04293, -2.80892, 0.50002),
  (3.89167, -2.77248, 0.50606),
  (3.28575, -2.36813, 0.46449),
  (2.34654, -1.70978, 0.42324),
)


def polar_factor(g: Float[Array, "*stack rows columns"], dtype=jnp.bfloat16) -> Float[Array, "*stack rows columns"]:
  """The orthogonal factor U V^T of g = U S V^T, roughly: singular values end within about [0.7, 1.2].

  The products run in `dtype`; the matrix is transposed where that makes the Gram matrix the smaller one. On several
  devices each has its share of a stack: products of split matrices would be sums over devices, fifteen of them.
  """
  wide = g.shape[-2] < g.shape[-1]
  u = jnp.swapaxes(g, -1, -2) if wide else g
  norm = jnp.linalg.norm(u.astype(jnp.float32), axis=(-2, -1), keepdims=True)
  u = (u / (1.01 * norm + 1e-6)).astype(dtype)
  u = meshes.share_out(_iterate, u) if u.ndim == 3 else _iterate(u)
  return jnp.swapaxes(u, -1, -2) if wide else u


def _iterate(u):
  for a, b, c in _POLAR_EXPRESS:
    gram = jnp.swapaxes(u, -1, -2) @ u
    u = a * u + u @ (b * gram + c * (gram @ gram))
  return u


class MuonState(NamedTuple):
  """Step count, momentum (like the parameters), second moment of each output row or input column."""

  count: Array
  momentum: PyTree
  variance: PyTree


def muon(
  learning_rate: optax.Schedule,
  *,
  momentum: optax.Schedule,
  weight_decay: optax.Schedule,
  variance_decay: float = 0.9,
  dtype=jnp.bfloat16,
) -> optax.GradientTransformation:
  """The optimizer for matrices W (inputs, outputs), y = x W.

  m <- beta m + (1 - beta) g;  u = polar((1 - beta) g + beta m), rescaled so that each output (or, with more inputs than
  outputs, each input) has the same running mean square at equal ||u||_F;
  W <- W - lr sqrt(max(1, outputs / inputs)) (u + weight_decay W [u W >= 0]).
  """

  def axis(shape):
    return -2 if shape[-1] >= shape[-2] else -1

  def init(params):
    variance = lambda p: jnp.zeros_like(jnp.mean(p.astype(jnp.float32), axis=axis(p.shape), keepdims=True))
    zeros = lambda p: jnp.zeros_like(p, jnp.float32)
    return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params), jax.tree.map(variance, params))

  def one(g, m, v, p, stored, beta, lr, decay):
    place = lambda a: a if stored is None else jax.lax.with_sharding_constraint(a, stored)
    g = g.astype(jnp.float32)
    m = beta * m + (1 - beta) * g
    # Before and after: the momentum would otherwise be split like the stack, and gathered too.
    u = place(polar_factor(place((1 - beta) * g + beta * m), dtype)).astype(jnp.float32)
    reduced = axis(u.shape)
    square = jnp.mean(u * u, axis=reduced, keepdims=True)
    v = variance_decay * v + (1 - variance_decay) * square
    scale = jax.lax.rsqrt(jnp.maximum(v, 1e-10))
    total = lambda x: jnp.sum(x, axis=(-2, -1), keepdims=True)
    u = u * scale * jnp.sqrt(total(square) / jnp.maximum(total(square * scale * scale), 1e-30))
    step = lr * max(1.0, p.shape[-1] / p.shape[-2]) ** 0.5
    return -step * (u + decay * p * (u * p >= 0)), m, v

  def update(grads, state, params):
    beta, lr, decay = (schedule(state.count) for schedule in (momentum, learning_rate, weight_decay))
    columns = [jax.tree.leaves(tree) for tree in (grads, state.momentum, state.variance, params)]
    results = [one(*each, beta, lr, decay) for each in zip(*columns, meshes.stored(params), strict=True)]
    # The states keep their own structure: it carries the parameters' axis names.
    updates, new_m, new_v = (
      jax.tree.unflatten(jax.tree.structure(tree), list(column))
      for tree, column in zip((grads, state.momentum, state.variance), zip(*results, strict=True), strict=True)
    )
    return updates, MuonState(state.count + 1, new_m, new_v)

  return optax.GradientTransformation(init, update)
