"""Features that code values: the control of BOWS in which geometry follows what a feature means, not what it meets.

A network sees two cities, each an embedding, and names the compass octant of the great-circle bearing from one to the
other. Nothing co-occurs more than anything else, yet a plane of the embedding comes to hold latitude and longitude
(Prieto et al. 2026, arXiv 2603.09972). Usage:

  params, losses = train(init_params(key, cities=len(lat)), first, second, octant(...), steps=800, batch=1024)
  plane, offset = ridge(params["embedding"], positions, alpha=1e-3)
  accuracy(params | {"embedding": ablate(params["embedding"], plane, mode="remove")}, first, second, labels)
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_choice

ABLATIONS = ("remove", "renormalise", "keep")


def bearing(
  lat1: Float[Array, "n"], lon1: Float[Array, "n"], lat2: Float[Array, "n"], lon2: Float[Array, "n"]
) -> Float[Array, "n"]:
  """Initial great-circle bearing from 1 to 2 in degrees, 0 north, 90 east; all arguments in degrees.

  atan2(sin dlon cos lat2, cos lat1 sin lat2 - sin lat1 cos lat2 cos dlon).
  """
  a, b, turn = jnp.radians(lat1), jnp.radians(lat2), jnp.radians(lon2 - lon1)
  east = jnp.sin(turn) * jnp.cos(b)
  north = jnp.cos(a) * jnp.sin(b) - jnp.sin(a) * jnp.cos(b) * jnp.cos(turn)
  return jnp.degrees(jnp.arctan2(east, north)) % 360


def octant(degrees: Float[Array, "n"]) -> Int[Array, "n"]:
  """0 north, 1 north-east, ... 7 north-west: floor((degrees + 22.5) / 45) mod 8."""
  return (jnp.floor((degrees + 22.5) / 45) % 8).astype(jnp.int32)


def init_params(key: jax.Array, *, cities: int, width: int = 50, hidden: int = 128) -> dict[str, Array]:
  """Embedding of standard normals, two linear layers uniform within 1 / sqrt(fan in)."""
  require(cities >= 2, f"{cities} cities; give at least two")
  keys = jax.random.split(key, 5)
  uniform = lambda key, shape, fan: jax.random.uniform(key, shape, minval=-(fan**-0.5), maxval=fan**-0.5)
  return {
    "embedding": jax.random.normal(keys[0], (cities, width)),
    "w1": uniform(keys[1], (2 * width, hidden), 2 * width),
    "b1": uniform(keys[2], (hidden,), 2 * width),
    "w2": uniform(keys[3], (hidden, 8), hidden),
    "b2": uniform(keys[4], (8,), hidden),
  }


def logits(params: dict[str, Array], first: Int[Array, "n"], second: Int[Array, "n"]) -> Float[Array, "n 8"]:
  """Linear, ReLU, linear on the two concatenated embeddings."""
  pair = jnp.concatenate([params["embedding"][first], params["embedding"][second]], axis=-1)
  return jax.nn.relu(pair @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


@functools.partial(jax.jit, static_argnames=("steps", "batch"))
def train(
  params: dict[str, Array],
  first: Int[Array, "n"],
  second: Int[Array, "n"],
  labels: Int[Array, "n"],
  *,
  steps: int,
  batch: int,
  rate: float = 1e-3,
  seed: int = 0,
) -> tuple[dict[str, Array], Float[Array, "steps"]]:
  """Adam on the cross-entropy of random batches; (parameters, losses)."""
  optimizer = optax.adam(rate)

  def objective(params, index):
    scores = logits(params, first[index], second[index])
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels[index]).mean()

  def step(carry, key):
    params, state = carry
    index = jax.random.randint(key, (batch,), 0, len(first))
    value, gradient = jax.value_and_grad(objective)(params, index)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), value

  keys = jax.random.split(jax.random.key(seed), steps)
  (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
  return params, losses


def accuracy(params: dict[str, Array], first, second, labels) -> float:
  """Share of pairs whose octant is named."""
  return float(jnp.mean(jnp.argmax(logits(params, first, second), axis=-1) == labels))


def ridge(
  inputs: Float[Array, "n k"], targets: Float[Array, "n t"], *, alpha: float
) -> tuple[Float[Array, "k t"], Float[Array, "t"]]:
  """(coefficients, intercept) of least squares + alpha ||coefficients||^2, the intercept free."""
  mean, level = inputs.mean(axis=0), targets.mean(axis=0)
  x = inputs - mean
  coefficients = jnp.linalg.solve(x.T @ x + alpha * jnp.eye(x.shape[1]), x.T @ (targets - level))
  return coefficients, level - mean @ coefficients


def ablate(embedding: Float[Array, "n k"], coefficients: Float[Array, "k t"], *, mode: str) -> Float[Array, "n k"]:
  """The embedding without, or with nothing but, the span of the probe's coefficients (orthonormal by QR).

  "remove"; "renormalise": remove, then every row to its old length; "keep": the span's part plus the mean of the rest.

  Raises:
    InputError: another mode.
  """
  require_choice("ablation", mode, ABLATIONS)
  basis, _ = jnp.linalg.qr(coefficients)
  inside = embedding @ basis @ basis.T
  outside = embedding - inside
  if mode == "keep":
    return inside + outside.mean(axis=0)
  if mode == "renormalise":
    length = jnp.linalg.norm(embedding, axis=1, keepdims=True)
    return outside * length / jnp.maximum(jnp.linalg.norm(outside, axis=1, keepdims=True), 1e-12)
  return outside
