"""Tokenwise function classes T: the next state of a token predicted from that token's own vector alone.

The local classes fit a linear map A(x) anew for every token, on its k nearest reference tokens; A depends on x and
varies smoothly with it, so T(x) = A(x) x is nonlinear. All of them shrink towards the identity (T(x) = x), never
towards zero: k < D neighbours do not determine a D x D map. The global ones are fitted once: an affine map, an MLP, and
a table with one entry a token. `prefix_mean` gives the affine map the context that no tokenwise function has.

  index, weight = neighbours(x_reference, x, k=64)
  outputs = apply_local("low_rank", x_reference, y_reference, x, index, weight)      # T(x), (M, D)

Here x are the inputs of one block, y its outputs and u = y - x, a row a token.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.core.precision import exactly
from jaxlab.models.layers import rms_norm

_CHUNK = 1024  # tokens fitted at a time
_NEWTON_STEPS = 12  # scaled Newton converges in 9 for condition numbers up to 1e16

Rows = Float[Array, "tokens width"]
Near = Float[Array, "k width"]


def unit_rms(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
  """x / rms(x)."""
  return rms_norm(x, 1e-12)


@exactly
def neighbours(
  reference: Float[Array, "N width"],
  queries: Float[Array, "M width"],
  *,
  k: int,
  own: Int[Array, "M"] | None = None,
) -> tuple[Int[Array, "M k"], Float[Array, "M k"]]:
  """The k nearest reference tokens of every query, nearest first, and their weights exp(-d^2 / (2 tau^2)).

  d is the distance of x / rms(x), which orders tokens as their cosine does; tau is the median of a query's k distances.

  Args:
    own: row of the reference that each query is, or -1: a token is not its own neighbour.

  Raises:
    InputError: k outside 1..N (N - 1 with `own`).
  """
  most = len(reference) - (own is not None)
  require(1 <= k <= most, f"k is {k} neighbours; it must lie in 1..{most}, the reference tokens there are")
  x = unit_rms(reference)
  square = jnp.sum(x * x, axis=-1)
  own = jnp.full(len(queries), -1) if own is None else own

  def one(query_and_own):
    query, own = query_and_own
    query = unit_rms(query)
    distance = square - 2 * (x @ query) + query @ query
    distance = jnp.where(jnp.arange(len(x)) == own, jnp.inf, distance)
    nearest, index = jax.lax.top_k(-distance, k)
    return index, jnp.maximum(-nearest, 0.0)

  index, distance = jax.lax.map(one, (queries, own), batch_size=_CHUNK)
  tau = jnp.median(jnp.sqrt(distance), axis=-1, keepdims=True)
  return index, jnp.exp(-distance / (2 * jnp.maximum(tau, 1e-12) ** 2))


def diagonal(x: Float[Array, "width"], near: Near, target: Near, weight: Float[Array, "k"], *, ridge: ArrayLike = 1e-2):
  """T(x) = a * x, a_c = (sum_j w_j x_jc y_jc + lam) / (sum_j w_j x_jc^2 + lam), lam = ridge mean_c sum_j w_j x_jc^2."""
  square = weight @ (near * near)
  lam = ridge * jnp.mean(square)
  return x * (weight @ (near * target) + lam) / (square + lam)


def low_rank(
  x: Float[Array, "width"],
  near: Near,
  target: Near,
  weight: Float[Array, "k"],
  *,
  rank: int = 16,
  ridge: ArrayLike = 1e-2,
) -> Float[Array, "width"]:
  """T(x) = x + B_R x, B_R the best map of rank R on the neighbours (reduced-rank ridge regression, dual form).

  With rows X, U = Y - X scaled by sqrt(w), G = X X', lam = ridge tr(G) / k: B = U' (G + lam I)^-1 X. The fitted
  increments F = X B' have right singular vectors V_R, and B_R = V_R V_R' B. Nothing of size D x D is formed.
  """
  scale = jnp.sqrt(weight)[:, None]
  inputs, increments = scale * near, scale * (target - near)
  gram = inputs @ inputs.T
  # By eigenvectors: triangular solves of this size wait milliseconds for BLAS threads on a busy CPU.
  spectrum, axes = jnp.linalg.eigh(gram)
  spectrum = jnp.maximum(spectrum, 0.0)
  lam = ridge * jnp.sum(spectrum) / len(gram)
  change = increments.T @ (axes @ ((axes.T @ (inputs @ x)) / (spectrum + lam)))
  fitted = (axes * (spectrum / (spectrum + lam))) @ (axes.T @ increments)
  energy, left = jnp.linalg.eigh(fitted @ fitted.T)
  energy, left = energy[-rank:], left[:, -rank:]
  # Directions below rounding have no reliable singular vector.
  kept = energy > 10 * jnp.finfo(energy.dtype).eps * energy[-1]
  inverse = jnp.where(kept, 1 / jnp.where(kept, energy, 1.0), 0.0)
  return x + fitted.T @ (left @ (inverse * (left.T @ (fitted @ change))))


def orthogonal(
  x: Float[Array, "width"],
  near: Near,
  target: Near,
  weight: Float[Array, "k"],
  *,
  ridge: ArrayLike = 1e-2,
  scaled: bool = False,
) -> Float[Array, "width"]:
  """T(x) = s Q x: Procrustes, argmin over Q'Q = I of ||Y - X Q'||^2 + lam ||Q - I||^2, the polar factor of Y'X + lam I.

  Solved in the span E of X and Y (at most 2k dimensions), Q is the identity on its complement; the ridge fixes what k
  neighbours leave open inside E. s = 1, or tr(Q'Y'X) / ||X||^2 if `scaled`. lam = ridge ||X||^2 / k.
  """
  scale = jnp.sqrt(weight)[:, None]
  inputs, outputs = scale * near, scale * target
  basis = orthonormal(jnp.concatenate([inputs, outputs]).T)
  inner = (outputs @ basis).T @ (inputs @ basis)
  energy = jnp.sum(inputs * inputs)
  rotation = polar(inner + ridge * energy / len(near) * jnp.eye(len(inner), dtype=inner.dtype))
  inside = basis.T @ x
  rotated = x + basis @ (rotation @ inside - inside)
  return rotated * (jnp.sum(rotation * inner) / energy) if scaled else rotated


def orthonormal(a: Float[Array, "m n"]) -> Float[Array, "m n"]:
  """An orthonormal basis of the columns of a, by Gram-Schmidt, twice; a column inside the span of the others is 0.

  Batches run in step on a GPU, where Householder reflections are multiplied out one matrix after the other.
  """
  rounding = 100 * jnp.finfo(a.dtype).eps

  def step(j, basis):
    column = a[:, j]
    rest = column - basis @ (basis.T @ column)
    rest = rest - basis @ (basis.T @ rest)
    size = jnp.linalg.norm(rest)
    new = jnp.where(size > rounding * jnp.linalg.norm(column), rest / jnp.where(size == 0, 1.0, size), 0.0)
    return basis.at[:, j].set(new)

  return jax.lax.fori_loop(0, a.shape[1], step, jnp.zeros_like(a))


def polar(a: Float[Array, "n n"]) -> Float[Array, "n n"]:
  """The orthogonal polar factor of a regular matrix, by Newton's iteration with Frobenius scaling (Higham 1986).

  Batches of small matrices run as batched LU on a GPU, where singular value decompositions go one by one.
  """

  def step(_, q):
    inverse = jnp.linalg.inv(q).T
    scale = jnp.sqrt(jnp.linalg.norm(inverse) / jnp.linalg.norm(q))
    return (scale * q + inverse / scale) / 2

  return jax.lax.fori_loop(0, _NEWTON_STEPS, step, a)


LOCAL: dict[str, Callable] = {
  "diagonal": diagonal,
  "low_rank": low_rank,
  "orthogonal": orthogonal,
  "scaled_orthogonal": functools.partial(orthogonal, scaled=True),
}


@exactly
def apply_local(
  name: str,
  reference: Float[Array, "N width"],
  outputs: Float[Array, "N width"],
  x: Float[Array, "M width"],
  index: Int[Array, "M k"],
  weight: Float[Array, "M k"],
  **options,
) -> Float[Array, "M width"]:
  """T(x) of a local class by its name in `LOCAL`, fitted for each token on the neighbours that `neighbours` found.

  Args:
    reference, outputs: x and y of the reference tokens.
    options: `ridge`, and `rank` of low_rank.

  Raises:
    InputError: an unknown class, a rank outside 1..k.
  """
  require_choice("tokenwise class", name, LOCAL)
  k, rank = index.shape[1], options.get("rank", 1)
  require(1 <= rank <= k, f"rank is {rank}; it must lie in 1..{k}, the number of neighbours")
  fit = functools.partial(LOCAL[name], **options)
  one = lambda token: fit(token[0], reference[token[1]], outputs[token[1]], token[2])
  # Batched LAPACK calls that meet in XLA's CPU pool (those of the last, shorter chunk and of the others, for instance)
  # wait for each other for ever once they hold all its threads (jaxlib 0.10.2): there, one token at a time.
  chunk = None if jax.default_backend() == "cpu" else _CHUNK
  return jax.lax.map(one, (x, index, weight), batch_size=chunk)


@exactly
def fit_affine(
  inputs: Float[Array, "N features"], targets: Float[Array, "N width"], *, ridge: ArrayLike = 1e-2
) -> tuple[Float[Array, "features width"], Float[Array, "width"]]:
  """(W, b) of the ridge regression targets ~ inputs W + b, lam = ridge tr(X'X) / features on centred inputs.

  Fitted to increments u it shrinks T(x) = x + x W + b towards the identity and a shift.
  """
  mean, target_mean = inputs.mean(axis=0), targets.mean(axis=0)
  centred = inputs - mean
  square = centred.T @ centred
  lam = ridge * jnp.trace(square) / len(square)
  regular = square + lam * jnp.eye(len(square), dtype=square.dtype)
  weights = jnp.linalg.solve(regular, centred.T @ (targets - target_mean))
  return weights, target_mean - mean @ weights


@exactly
def apply_affine(parameters: tuple[Array, Array], inputs: Float[Array, "*M features"]) -> Float[Array, "*M width"]:
  """inputs W + b."""
  weights, bias = parameters
  return inputs @ weights + bias


def prefix_mean(x: Float[Array, "rows time width"]) -> Float[Array, "rows time width"]:
  """mean_{j <= i} x_j of every position of a row: with x_i, the context of the upper control."""
  count = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)
  return jnp.cumsum(x, axis=1) / count[:, None]


def fit_lookup(ids: Int[Array, "N"], increments: Float[Array, "N width"], *, vocab: int) -> Float[Array, "vocab width"]:
  """The mean increment of every token id; ids that are not in the reference get the mean of all."""
  count = jnp.zeros(vocab).at[ids].add(1.0)[:, None]
  total = jnp.zeros((vocab, increments.shape[1]), increments.dtype).at[ids].add(increments)
  return jnp.where(count > 0, total / jnp.maximum(count, 1.0), increments.mean(axis=0))


@exactly
def fit_mlp(
  x: Float[Array, "N width"],
  increments: Float[Array, "N width"],
  key: jax.Array,
  *,
  steps: int = 2000,
  batch: int = 1024,
  rate: float = 1e-3,
  checks: int = 20,
) -> dict[str, Array]:
  """u ~ W2 gelu(W1 x / rms(x) + b1) + b2 with hidden width D, by AdamW; starts at zero, so T starts at the identity.

  The last tenth of the tokens is held out; of `checks` evenly spaced states the one with the least held-out error is
  kept. Targets are divided by their rms, so that one rate fits layers of any scale. Map it over layers with `jax.vmap`.

  Raises:
    InputError: fewer than ten tokens, or no steps.
  """
  n, width = x.shape
  require(n >= 10 and steps >= 1, f"an MLP needs 10 tokens and a step; it got {n} and {steps}")
  cut, checks = n - n // 10, min(checks, steps)
  inputs = unit_rms(x)
  scale = jnp.maximum(jnp.sqrt(jnp.mean(increments**2)), 1e-12)
  targets = increments / scale
  first, draw = jax.random.split(key)
  start = {
    "w1": jax.random.normal(first, (width, width), x.dtype) / jnp.sqrt(width),
    "b1": jnp.zeros(width, x.dtype),
    "w2": jnp.zeros((width, width), x.dtype),
    "b2": jnp.zeros(width, x.dtype),
  }
  optimizer = optax.adamw(rate)
  error = lambda p, rows: jnp.mean((_mlp(p, inputs[rows]) - targets[rows]) ** 2)

  def step(carry, key):
    params, state = carry
    gradient = jax.grad(error)(params, jax.random.randint(key, (batch,), 0, cut))
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  def round_(carry, keys):
    training, best, least = carry
    training, _ = jax.lax.scan(step, training, keys)
    held_out = error(training[0], slice(cut, None))
    best = jax.tree.map(lambda new, old: jnp.where(held_out < least, new, old), training[0], best)
    return (training, best, jnp.minimum(held_out, least)), None

  keys = jax.random.split(draw, (checks, steps // checks))
  begin = ((start, optimizer.init(start)), start, error(start, slice(cut, None)))
  (_, best, _), _ = jax.lax.scan(round_, begin, keys)
  return best | {"scale": scale}


@exactly
def apply_mlp(params: dict[str, Array], x: Float[Array, "M width"]) -> Float[Array, "M width"]:
  """The increment that a fitted MLP predicts."""
  return params["scale"] * _mlp(params, unit_rms(x))


def _mlp(params, inputs):
  return jax.nn.gelu(inputs @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
