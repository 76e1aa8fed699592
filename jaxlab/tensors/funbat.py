"""FunBaT: Bayesian Tucker and CP models with factors that are functions (ICLR 2024, arXiv 2311.04829).

An observation y_n comes with K real coordinates i_n^1..i_n^K. The factors are functions u^k: R -> R^{R_k} with
independent Matern-nu Gaussian process components, the core W has the prior N(0, v_w I), and

  y_n = w' (u^1(i_n^1) x ... x u^K(i_n^K)) + eps,   eps ~ N(0, 1 / tau),   tau ~ Gamma(a0, b0),   w = vec(W);

CP fixes W to the superdiagonal of ones. A Matern process is a Markov chain over the sorted coordinates, so that a pass
over J of them costs O(J). q = q(w) q(tau) prod_k q(u^k) is found by conditional expectation propagation: each
likelihood term sends a Gaussian message to u^k(i_n^k), with a = W_(k) (x_{j != k} u^j),

  Lam_n = E[tau] E[aa'],   eta_n = E[tau] y_n E[a],   new = d old + (1 - d) fresh,

and likewise to w and tau; then a Kalman smoother over each mode's coordinates turns the sums of messages into q(u^k).
Damping is linear, so only the sums over the observations of one coordinate are kept: no array of size N x M x M.

  data = funbat.observe(coordinates, y)                                     # (N, K) and (N,), in any units
  state, lengthscale, _ = funbat.learn(data, settings := funbat.Settings(rank=3), jax.random.key(0), epochs=60)
  mean, variance = funbat.predict(state, data, new_coordinates, dataclasses.replace(settings, lengthscale=lengthscale))

Kronecker order everywhere: mode 1 slowest, as `W.reshape(R_1, ..., R_K)` has it.
"""

import dataclasses
import math
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core import kalman
from jaxlab.core.checks import require, require_key
from jaxlab.core.precision import exactly
from jaxlab.tensors import matern
from jaxlab.tensors.funbat_data import (  # noqa: F401 - what a user of this module needs beside it
  MODELS,
  RAW,
  Data,
  Settings,
  Units,
  numbers,
  observe,
  on_grids,
  require_same_grids,
  take,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mode:
  """q(u^k) on the grid, and the summed messages that made it."""

  mean: Float[Array, "J R"]
  cov: Float[Array, "J R R"]
  precision: Float[Array, "J R R"]
  linear: Float[Array, "J R"]
  chain: kalman.Posterior


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """q(u), q(w) = N(core_mean, core_cov), q(tau) = Gamma(shape, rate), with the summed messages to w and tau."""

  modes: tuple[Mode, ...]
  core_mean: Float[Array, "M"]
  core_cov: Float[Array, "M M"]
  core_precision: Float[Array, "M M"]
  core_linear: Float[Array, "M"]
  residual: Float[Array, ""]
  shape: Float[Array, ""]
  rate: Float[Array, ""]


def initial_state(data: Data, settings: Settings, key: jax.Array) -> State:
  """Random means in (0, 1); covariances, noise and core as `settings.initial` says; messages near zero."""
  require_key(key)
  modes, size, dtype = len(data.grids), data.y.shape[0], data.y.dtype
  small = settings.initial == "small"
  ranks = [settings.of_mode("rank", k, modes) for k in range(modes)]
  keys = jax.random.split(key, 2 * modes + 1)
  made = []
  for k, (rank, grid) in enumerate(zip(ranks, data.grids, strict=True)):
    mean = jax.random.uniform(keys[2 * k], (len(grid), rank), dtype)
    eye = jnp.broadcast_to(jnp.eye(rank, dtype=dtype), (len(grid), rank, rank))
    count = jnp.zeros(len(grid), dtype).at[data.index[:, k]].add(1e-3)[:, None]
    linear = count * jax.random.uniform(keys[2 * k + 1], (len(grid), rank), dtype)
    width = rank * matern.order(settings.kernel)
    moments = jnp.zeros((len(grid), width), dtype), jnp.zeros((len(grid), width, width), dtype)
    cov = (0.1 if small else 1.0) * eye
    made.append(Mode(mean, cov, count[..., None] * eye, linear, kalman.Posterior(*moments, *moments)))
  width = ranks[0] if settings.model == "cp" else math.prod(ranks)
  if settings.model == "cp":
    core, cov = jnp.ones(width, dtype), jnp.zeros((width, width), dtype)
  else:
    core = superdiagonal(ranks, dtype)
    if settings.update_core and small:
      core = core + 0.1 * jax.random.normal(keys[-1], core.shape, dtype)
    elif settings.update_core:
      core = jax.random.uniform(keys[-1], core.shape, dtype)
    cov = jnp.eye(width, dtype=dtype) * (0.0 if not settings.update_core else 0.1 if small else 1.0)
  shape = jnp.asarray(settings.noise[0] + size / 2, dtype)
  rate = shape / (10.0 if small else 1.0)
  message = 1e-3 * jnp.eye(width, dtype=dtype)
  return State(tuple(made), core, cov, message, message @ core, rate - settings.noise[1], shape, rate)


def superdiagonal(ranks, dtype=jnp.float32) -> Float[Array, "M"]:
  """vec of the core with ones at (r, r, ..., r): the CP model as a Tucker model."""
  core = np.zeros(tuple(ranks))
  core[tuple([np.arange(min(ranks))] * len(ranks))] = 1
  return jnp.asarray(core.reshape(-1), dtype)


@exactly
def epoch(state: State, data: Data, settings: Settings) -> State:
  """One sweep: every mode, then the core, then the noise."""
  modes = range(len(data.grids))
  if settings.inner:
    for k in modes:
      state = _replace_mode(state, k, smooth_mode(*damped_message(state, data, settings, k), data, settings, k))
  else:
    messages = [damped_message(state, data, settings, k) for k in modes]
    new = tuple(smooth_mode(*message, data, settings, k) for k, message in enumerate(messages))
    state = dataclasses.replace(state, modes=new)
  if settings.model == "tucker" and settings.update_core:
    state = update_core(state, data, settings)
  return update_noise(state, data, settings)


def fit(data: Data, settings: Settings, key: jax.Array, *, epochs: int, test: Data | None = None):
  """Runs `epochs` sweeps from a random start, in one `lax.scan`.

  Args:
    test: observations on the same grids; their error is recorded after each epoch.

  Returns:
    (State, {"train_rmse", "noise" = (E[tau])^-1/2, and with `test` "test_rmse", "test_mae"}, each (epochs,)), all in
    the model's units.

  Raises:
    InputError: no key, epochs no integer or below 1, or a test set on other grids or in other units.
  """
  require_same_grids(data, test)
  return _sweeps(initial_state(data, settings, key), data, settings, epochs, test)


def _sweeps(state: State, data: Data, settings: Settings, epochs: int, test: Data | None):
  require(isinstance(epochs, Integral) and epochs >= 1, f"epochs is {epochs}; give an integer, at least 1")

  def body(state, _):
    state = epoch(state, data, settings)
    error = expected(state, data.index, settings)[0] - data.y
    row = {"train_rmse": jnp.sqrt(jnp.mean(error**2)), "noise": jnp.sqrt(state.rate / state.shape)}
    if test is not None:
      error = expected(state, test.index, settings)[0] - test.y
      row |= {"test_rmse": jnp.sqrt(jnp.mean(error**2)), "test_mae": jnp.mean(jnp.abs(error))}
    return state, row

  return jax.lax.scan(body, state, length=epochs)


def learn(
  data: Data, settings: Settings, key: jax.Array, *, epochs: int, rounds: int = 5, starts: int = 2, test=None
) -> tuple[State, Float[Array, "K"], dict]:
  """`fit` with one lengthscale a mode, chosen among `candidates` by the evidence of the model itself.

  With the messages to u^k fixed, the bound `elbo` depends on l_k through the log normaliser of mode k's chain alone.
  Every start makes `rounds` of epochs / rounds sweeps, and after each but the last every mode takes the lengthscale
  with the largest one. Starts differ in their random means and begin at lengthscales of 0.1 and 0.01 of a mode's range
  in turn; the one that ends with the largest bound is returned.

  Args:
    settings: its lengthscale is not used.

  Returns:
    (State, lengthscale of each mode in the units of the grids, history as in `fit`).

  Raises:
    InputError: as `fit` and `elbo`, or epochs that are no multiple of `rounds`.
  """
  require(rounds >= 1 and epochs % rounds == 0, f"{epochs} epochs do not divide into {rounds} rounds; give a multiple")
  require(starts >= 1, f"starts is {starts}; at least one is needed")
  require_same_grids(data, test)
  table = candidates(data)

  def one(start):
    lengthscale = jnp.where(start % 2, 0.01, 0.1).astype(data.y.dtype) * table[:, -1] / SHARES[-1]

    def body(carry, i):
      state, old = carry
      new = jnp.stack([_best_lengthscale(state, data, settings, table[k], k) for k in range(len(table))])
      lengthscale = jnp.where(i == 0, old, new)
      state, row = _sweeps(state, data, dataclasses.replace(settings, lengthscale=lengthscale), epochs // rounds, test)
      return (state, lengthscale), row

    first = initial_state(data, settings, jax.random.fold_in(key, start)), lengthscale
    (state, lengthscale), rows = jax.lax.scan(body, first, jnp.arange(rounds))
    bound = elbo(state, data, dataclasses.replace(settings, lengthscale=lengthscale))
    return bound, (state, lengthscale, jax.tree.map(jnp.ravel, rows))

  bounds, found = jax.lax.map(one, jnp.arange(starts))
  return jax.tree.map(lambda a: a[jnp.argmax(jnp.nan_to_num(bounds, nan=-jnp.inf))], found)


SHARES = tuple(10.0 ** (i / 2) for i in range(-6, 2))  # 0.001 to 3 ranges


def candidates(data: Data) -> Float[Array, "K C"]:
  """The lengthscales `learn` chooses from: SHARES of every mode's range."""
  ranges = jnp.stack([jnp.where(grid[-1] > grid[0], grid[-1] - grid[0], 1.0) for grid in data.grids])
  return ranges[:, None] * jnp.asarray(SHARES, data.y.dtype)


@exactly
def _best_lengthscale(state: State, data: Data, settings: Settings, table: Float[Array, "C"], k: int):
  mode = state.modes[k]

  def evidence(lengthscale):
    chosen = dataclasses.replace(settings, lengthscale=lengthscale)
    prior, precision, linear = prior_chain(data.grids, chosen, k), *_in_state_space(mode, chosen)
    return kalman.log_normaliser(prior, precision, linear, kalman.smooth(prior, precision, linear, scan=settings.scan))

  return table[jnp.argmax(jax.vmap(evidence)(table))]


def stopping_epoch(train_rmse: Float[Array, "epochs"], *, tolerance: float = 1e-4, window: int = 5) -> Int[Array, ""]:
  """The first epoch, counted from 1, at which the training error changed by less than `tolerance` of it over `window`.

  The last epoch if there is none: `fit(..., epochs=stopping_epoch(history["train_rmse"]))` is the stopped fit.
  """
  before, after = train_rmse[:-window], train_rmse[window:]
  still = jnp.append(jnp.abs(after - before) < tolerance * before, True)
  return jnp.minimum(window + 1 + jnp.argmax(still), len(train_rmse))


def damped_message(state: State, data: Data, settings: Settings, k: int):
  """(Lam^k_j, eta^k_j): the messages to u^k(t_j) summed over the observations there, damped."""
  mode, tau = state.modes[k], state.shape / state.rate
  first, second = conditional_moments(_gathered(state, data.index), state, settings, k)
  column, size = data.index[:, k], mode.mean.shape[0]
  gather = lambda values: jax.ops.segment_sum(values, column, num_segments=size)
  d = settings.damping[0]
  precision = d * mode.precision + (1 - d) * tau * gather(second)
  return precision, d * mode.linear + (1 - d) * tau * gather(data.y[:, None] * first)


def conditional_moments(factors, state: State, settings: Settings, k: int):
  """E[a] (N, R_k) and E[aa'] (N, R_k, R_k) of a = W_(k) (x_{j != k} u^j); for CP a = prod_{j != k} u^j.

  Args:
    factors: per mode (E[u] (N, R_j), E[uu'] (N, R_j, R_j)) at the observations.
  """
  means = [m for j, (m, _) in enumerate(factors) if j != k]
  seconds = [s for j, (_, s) in enumerate(factors) if j != k]
  if settings.model == "cp":
    return math.prod(means, start=jnp.ones_like(factors[k][0])), math.prod(seconds, start=jnp.ones_like(factors[k][1]))
  ranks = [m.shape[1] for m, _ in factors]
  rest = math.prod(ranks) // ranks[k]
  size = factors[k][0].shape[0]
  z, zz = kron(means, size), kron_square(seconds, size)
  mean = jnp.moveaxis(state.core_mean.reshape(ranks), k, 0).reshape(ranks[k], rest)
  square = _core_square(state, settings).reshape(*ranks, *ranks)
  square = jnp.moveaxis(square, (k, len(ranks) + k), (0, 1)).reshape(ranks[k], ranks[k], rest * rest)
  return z @ mean.T, jnp.einsum("np,rsp->nrs", zz.reshape(-1, rest * rest), square)


def smooth_mode(precision, linear, data: Data, settings: Settings, k: int) -> Mode:
  """q(u^k) from its summed messages: a Kalman smoother over the grid of mode k."""
  prior, width, rank = prior_chain(data.grids, settings, k), precision.shape[0], precision.shape[1]
  seen = precision if settings.extra_prior is None else precision + jnp.eye(rank) / settings.extra_prior
  # The emission H = [I 0] picks the values out of (values, derivatives).
  pad = prior.noise.shape[-1] - rank
  state_linear = jnp.concatenate([linear, jnp.zeros((width, pad), linear.dtype)], 1)
  chain = kalman.smooth(prior, jnp.pad(seen, ((0, 0), (0, pad), (0, pad))), state_linear, scan=settings.scan)
  return Mode(chain.mean[:, :rank], chain.cov[:, :rank, :rank], precision, linear, chain)


def prior_chain(grids, settings: Settings, k: int) -> kalman.Chain:
  """The Matern prior of mode k on its grid."""
  return matern.chain(
    grids[k],
    kernel=settings.kernel,
    lengthscale=settings.of_mode("lengthscale", k, len(grids)),
    variance=settings.of_mode("variance", k, len(grids)),
    rank=settings.of_mode("rank", k, len(grids)),
  )


def update_core(state: State, data: Data, settings: Settings) -> State:
  """q(w) = N(V sum eta, V), V = (sum_n Lam_n + I / v_w)^-1 with Lam_n = E[tau] E[zz'], eta_n = E[tau] y_n E[z]."""
  factors, tau, d = _gathered(state, data.index), state.shape / state.rate, settings.damping[2]
  (_, first), rest = factors[0], factors[1:]
  zz = kron_square([s for _, s in rest], len(data.y))
  # The sum over n is one matrix product of (N, R_1^2) and (N, (M / R_1)^2): E[zz'] itself is never formed.
  total = jnp.einsum("nab,npq->apbq", first, zz).reshape(state.core_cov.shape)
  precision = d * state.core_precision + (1 - d) * tau * total
  linear = d * state.core_linear + (1 - d) * tau * data.y @ kron([m for m, _ in factors], len(data.y))
  prior = 0.0 if settings.core_variance is None else 1.0 / settings.core_variance
  cov = kalman.symmetric(jnp.linalg.inv(precision + prior * jnp.eye(len(linear), dtype=linear.dtype)))
  return dataclasses.replace(state, core_mean=cov @ linear, core_cov=cov, core_precision=precision, core_linear=linear)


def update_noise(state: State, data: Data, settings: Settings) -> State:
  """q(tau) = Gamma(a0 + N / 2, b0 + sum_n b_n), b_n = (y^2 - 2 y E[y] + E[y^2]) / 2 of the model's y, damped."""
  d = settings.damping[1]
  residual = d * state.residual + (1 - d) * half_residual(state, data, settings)
  return dataclasses.replace(state, residual=residual, rate=settings.noise[1] + residual)


def half_residual(state: State, data: Data, settings: Settings) -> Float[Array, ""]:
  """sum_n b_n = sum_n E[(y_n - w' z_n)^2] / 2."""
  mean, second = expected(state, data.index, settings)
  return 0.5 * jnp.sum(data.y**2 - 2 * data.y * mean + second)


@exactly
def expected(state: State, index: Int[Array, "N K"], settings: Settings):
  """(E[w'z], E[(w'z)^2]), each (N,), on the grid."""
  return _output_moments(_gathered(state, index), state, settings)


def predict(state: State, data: Data, coordinates: Float[Array, "N K"], settings: Settings, *, rule: str = "markov"):
  """Mean and variance of a new observation at any coordinates, in the units `data` were given in.

  E[y] = E[w]' E[z], Var[y] = tr(E[ww'] E[zz']) - E[y]^2 + b / (a - 1).

  Args:
    rule: "markov" is exact; "merge" is the authors' code, which joins the neighbours as if independent (an ablation).

  Raises:
    InputError: the coordinates have another number of modes, or (where they are not traced) are NaN or infinite.
  """
  modes = len(data.grids)
  if not isinstance(coordinates, jax.core.Tracer):
    coordinates = numbers("coordinates", coordinates)
  require(
    coordinates.ndim == 2 and coordinates.shape[1] == modes,
    f"coordinates have shape {coordinates.shape}; expected (N, {modes})",
  )
  factors = []
  for k in range(modes):
    mean, cov = factor_at(state, data, coordinates[:, k], settings, k, rule=rule)
    factors.append((mean, cov + mean[:, :, None] * mean[:, None, :]))
  mean, variance = _observed(*exactly(_output_moments)(factors, state, settings), state)
  return data.units.mean + data.units.spread * mean, data.units.spread**2 * variance


def predict_on_grid(state: State, index: Int[Array, "N K"], settings: Settings):
  """`predict` at coordinates of the grid, by their indices and in the model's units: the smoother has been there."""
  return _observed(*expected(state, index, settings), state)


@exactly
def factor_at(state: State, data: Data, points: Float[Array, "T"], settings: Settings, k: int, *, rule: str = "markov"):
  """E (T, R_k) and Cov (T, R_k, R_k) of u^k at any points: between, beyond and on the grid of mode k."""
  grids = data.grids
  rank = settings.of_mode("rank", k, len(grids))
  options = dict(
    kernel=settings.kernel,
    lengthscale=settings.of_mode("lengthscale", k, len(grids)),
    variance=settings.of_mode("variance", k, len(grids)),
    rank=rank,
  )
  points = jnp.asarray(data.units.of_mode(k, points), grids[k].dtype)
  mean, cov = matern.interpolate(grids[k], state.modes[k].chain, points, rule=rule, **options)
  return mean[:, :rank], cov[:, :rank, :rank]


@exactly
def elbo(state: State, data: Data, settings: Settings) -> Float[Array, ""]:
  """log p(y) >= E[log p(y | .)] - KL(q(u)) - KL(q(w)) - KL(q(tau)); with d = 0 no update lowers it.

  KL(q(u^k)) = sum_j (eta_j' m_j - tr(Lam_j M2_j) / 2) - log Z, log Z as in `kalman.log_normaliser`.

  Raises:
    InputError: messages with an extra prior, or a core without one.
  """
  require(settings.extra_prior is None, "the bound is that of the model itself; set extra_prior=None")
  require(settings.core_variance is not None, "the bound needs a prior on the core; set core_variance")
  digamma, lgamma = jax.scipy.special.digamma, jax.scipy.special.gammaln
  (a, b), (a0, b0) = (state.shape, state.rate), settings.noise
  size = data.y.shape[0]
  log_tau = digamma(a) - jnp.log(b)
  likelihood = 0.5 * size * (log_tau - math.log(2 * math.pi)) - a / b * half_residual(state, data, settings)
  bound = likelihood
  bound -= (a - a0) * digamma(a) - lgamma(a) + math.lgamma(a0) + a0 * (jnp.log(b) - math.log(b0)) + a * (b0 - b) / b
  for k, mode in enumerate(state.modes):
    prior, precision, linear = prior_chain(data.grids, settings, k), *_in_state_space(mode, settings)
    second = mode.cov + mode.mean[:, :, None] * mode.mean[:, None, :]
    tilt = jnp.sum(mode.linear * mode.mean) - 0.5 * jnp.sum(mode.precision * second)
    bound -= tilt - kalman.log_normaliser(prior, precision, linear, mode.chain)
  if settings.model == "tucker" and settings.update_core:
    v, width = settings.core_variance, state.core_mean.shape[0]
    square = jnp.trace(state.core_cov) + state.core_mean @ state.core_mean
    bound -= 0.5 * (square / v - width + width * math.log(v) - jnp.linalg.slogdet(state.core_cov)[1])
  # No KL is below 0; of messages far sharper than the prior float32 keeps so little that theirs can come out so.
  return jnp.minimum(bound, likelihood)


def kron(vectors, size: int) -> Float[Array, "N M"]:
  """Row-wise Kronecker product of (N, R_k), the first slowest; of none, ones."""
  out = jnp.ones((size, 1), vectors[0].dtype if vectors else None)
  for v in vectors:
    out = jnp.einsum("na,nb->nab", out, v).reshape(size, -1)
  return out


def kron_square(matrices, size: int) -> Float[Array, "N M M"]:
  """Kronecker product of (N, R_k, R_k) for each n, the first slowest; of none, ones."""
  out = jnp.ones((size, 1, 1), matrices[0].dtype if matrices else None)
  for m in matrices:
    width = out.shape[1] * m.shape[1]
    out = jnp.einsum("nab,ncd->nacbd", out, m).reshape(size, width, width)
  return out


def _output_moments(factors, state, settings):
  """E[y] = E[a] . m^1 and E[y^2] = <E[aa'], M2^1>: mode 1 against all others."""
  first, second = conditional_moments(factors, state, settings, 0)
  return jnp.sum(first * factors[0][0], -1), jnp.sum(second * factors[0][1], (-1, -2))


def _observed(mean, second, state):
  """Mean and variance of an observation, the noise's included."""
  return mean, jnp.maximum(second - mean**2, 0) + state.rate / (state.shape - 1)


def _gathered(state, index):
  second = lambda mode: mode.cov + mode.mean[:, :, None] * mode.mean[:, None, :]
  return [(mode.mean[index[:, k]], second(mode)[index[:, k]]) for k, mode in enumerate(state.modes)]


def _core_square(state, settings):
  square = jnp.outer(state.core_mean, state.core_mean)
  return square + state.core_cov if settings.core_moments == "full" else square


def _replace_mode(state, k, mode):
  return dataclasses.replace(state, modes=(*state.modes[:k], mode, *state.modes[k + 1 :]))


def _in_state_space(mode: Mode, settings: Settings):
  """The messages to u^k as terms of its chain, whose state also holds derivatives where the kernel has them."""
  rank = mode.mean.shape[1]
  pad = rank * (matern.order(settings.kernel) - 1)
  return jnp.pad(mode.precision, ((0, 0), (0, pad), (0, pad))), jnp.pad(mode.linear, ((0, 0), (0, pad)))
