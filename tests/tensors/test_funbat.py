import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import funbat as config_file
from experiments.funbat import baselines as funbat_baselines
from experiments.funbat import comparison, speed, surface
from experiments.funbat.data import load_folds
from jaxlab.core import kalman
from jaxlab.core.checks import InputError
from jaxlab.tensors import funbat, matern
from jaxlab.tensors.funbat import Settings
from tests.common import Whole, run_and_continue

RANK = 2
# Eager scans and solves compile one by one; whole functions compile once.
fit = jax.jit(funbat.fit, static_argnames=("settings", "epochs"))
learn = jax.jit(funbat.learn, static_argnames=("settings", "epochs", "rounds", "starts"))
predict = jax.jit(funbat.predict, static_argnames=("settings", "rule"))
epoch = jax.jit(funbat.epoch, static_argnames="settings")
factor_at = jax.jit(funbat.factor_at, static_argnames=("settings", "k", "rule"))
interpolate = jax.jit(matern.interpolate, static_argnames=("rule", "kernel", "lengthscale", "variance", "rank"))
smooth = jax.jit(kalman.smooth, static_argnames="scan")
steps = jax.jit(matern.steps, static_argnames=("kernel", "rank"))
chain_of = jax.jit(matern.chain, static_argnames=("kernel", "lengthscale", "variance", "rank"))
initial_state = jax.jit(funbat.initial_state, static_argnames="settings")
compiled, baselines = Whole(funbat), Whole(funbat_baselines)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def covariance(kernel, lengthscale, variance, a, b):
  d = np.abs(a[:, None] - b[None, :])
  x = np.sqrt(3) * d / lengthscale
  return variance * (np.exp(-d / lengthscale) if kernel == "matern12" else (1 + x) * np.exp(-x))


def random_problem(seed=0, size=60, levels=(5, 6, 4), cov=None):
  """Observations on a grid, and a state whose every moment is random."""
  rng = np.random.default_rng(seed)
  grids = [np.sort(rng.uniform(size=n)) for n in levels]
  index = np.stack([rng.integers(0, n, size) for n in levels], 1)
  return funbat.on_grids(grids, index, rng.normal(size=size), units=funbat.RAW)


def random_state(data, settings, seed=0):
  state = initial_state(data, settings, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  square = lambda *shape: (lambda r: jnp.asarray(r @ r.swapaxes(-1, -2)))(0.5 * rng.normal(size=(*shape, shape[-1])))
  modes = tuple(dataclasses.replace(m, cov=square(*m.mean.shape)) for m in state.modes)
  core_cov = square(len(state.core_mean)) if settings.update_core and settings.model == "tucker" else state.core_cov
  return dataclasses.replace(state, modes=modes, core_cov=core_cov, rate=state.shape / 1.7)


@pytest.mark.parametrize("scan", kalman.SCANS)
@pytest.mark.parametrize("kernel", ["matern12", "matern32"])
def test_one_mode_of_rank_one_is_gaussian_process_regression(kernel, scan):
  """mean and covariance at training and new points, between, on and beyond the grid; and log Z."""
  rng = np.random.default_rng(0)
  t, y, tau, ls, s2 = np.sort(rng.uniform(0, 1, 25)), rng.normal(size=25), 3.0, 0.2, 1.3
  new = np.concatenate([[-0.5, -0.01], rng.uniform(0, 1, 12), t[[0, 7, 24]], [1.02, 2.0]])
  options = dict(kernel=kernel, lengthscale=ls, variance=s2, rank=1)
  chain = chain_of(jnp.asarray(t), **options)
  width = matern.order(kernel)
  precision = jnp.zeros((25, width, width)).at[:, 0, 0].set(tau)
  linear = jnp.zeros((25, width)).at[:, 0].set(tau * y)
  posterior = smooth(chain, precision, linear, scan=scan)
  k = covariance(kernel, ls, s2, t, t) + np.eye(25) / tau
  points = np.concatenate([t, new])
  cross = covariance(kernel, ls, s2, points, t)
  mean, cov = interpolate(jnp.asarray(t), posterior, jnp.asarray(points), **options)
  np.testing.assert_allclose(mean[:, 0], cross @ np.linalg.solve(k, y), atol=1e-8)
  np.testing.assert_allclose(cov[:, 0, 0], s2 - np.sum(cross.T * np.linalg.solve(k, cross.T), 0), atol=1e-8)
  evidence = jax.jit(kalman.log_normaliser)(chain, precision, linear, posterior) + np.sum(
    0.5 * np.log(tau / (2 * np.pi)) - 0.5 * tau * y**2
  )
  expected = -0.5 * (y @ np.linalg.solve(k, y) + np.linalg.slogdet(k)[1] + 25 * np.log(2 * np.pi))
  np.testing.assert_allclose(evidence, expected, rtol=1e-9)


def test_joining_the_neighbours_as_if_independent_is_not_the_process():
  """The `merge` ablation: exact on the grid, wrong and over-confident between."""
  t = jnp.linspace(0, 1, 9)
  options = dict(kernel="matern12", lengthscale=0.5, variance=1.0, rank=1)
  posterior = smooth(chain_of(t, **options), jnp.ones((9, 1, 1)), jnp.sin(6 * t)[:, None])
  exact, merged = (interpolate(t, posterior, t + 0.06, rule=rule, **options) for rule in matern.RULES)
  assert float((merged[1] / exact[1])[:-1].max()) < 0.9
  np.testing.assert_allclose(*(interpolate(t, posterior, t, rule=r, **options)[0] for r in matern.RULES))


@given(log_x=st.floats(-9, 1.5), lengthscale=st.floats(0.05, 5))
def test_process_noise_of_a_short_step_keeps_its_digits(log_x, lengthscale):
  """Q(dt) against its integral's series q [dt^3 / 3, dt^2 / 2, dt] at small x, against P - A P A' at large."""
  dt = 10.0**log_x * lengthscale
  options = dict(kernel="matern32", lengthscale=lengthscale, variance=0.7, rank=1)
  a, q = steps(jnp.asarray(dt), **options)
  p = matern.stationary(dtype=jnp.float64, **options)
  np.testing.assert_allclose(q, p - a @ p @ a.T, atol=1e-12 * float(p.max()))
  if log_x < -4:
    strength = 4 * (np.sqrt(3) / lengthscale) ** 3 * 0.7
    np.testing.assert_allclose(q, strength * np.array([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]]), rtol=2e-3)
  float32 = steps(jnp.asarray(dt, jnp.float32), **options)[1]
  np.testing.assert_allclose(float32, q, rtol=2e-5)


def test_the_scan_and_the_loop_fit_the_same_model():
  """`test_kalman` has the other parallel scan."""
  data = random_problem(levels=(5, 6))
  run = lambda scan: fit(data, Settings(rank=RANK, kernel="matern32", scan=scan), jax.random.key(0), epochs=5)[0]
  for a, b in zip(jax.tree.leaves(run("doubling")), jax.tree.leaves(run("seq")), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("model", funbat.MODELS)
def test_summed_messages_are_messages_per_observation(model):
  """Every observation keeps its own damped message, moments by brute-force sums over w."""
  settings, data = Settings(rank=RANK, model=model, kernel="matern12", scan="seq"), random_problem(size=12)
  state = random_state(data, settings)
  d_u, d_tau, d_core = settings.damping
  tau = float(state.shape / state.rate)
  index, y = np.asarray(data.index), np.asarray(data.y)
  core = np.asarray(state.core_mean if model == "tucker" else funbat.superdiagonal([RANK] * 3)).reshape([RANK] * 3)
  cov = np.asarray(state.core_cov if model == "tucker" else np.zeros((8, 8)))
  ww = (np.outer(core.reshape(-1), core.reshape(-1)) + cov).reshape([RANK] * 6)
  first = [np.asarray(m.mean)[index[:, k]] for k, m in enumerate(state.modes)]
  second = [
    np.asarray(m.cov)[index[:, k]] + f[:, :, None] * f[:, None]
    for k, (m, f) in enumerate(zip(state.modes, first, strict=True))
  ]
  for k in range(3):
    i, j = [x for x in range(3) if x != k]
    # per-observation old messages, all different, whose sums are the state's aggregated ones
    rng = np.random.default_rng(k)
    old = rng.normal(size=(12, RANK, RANK)), rng.normal(size=(12, RANK))
    sums = np.zeros_like(state.modes[k].precision), np.zeros_like(state.modes[k].linear)
    fresh = np.zeros_like(sums[0]), np.zeros_like(sums[1])
    for n in range(12):
      mean, square = np.zeros(RANK), np.zeros((RANK, RANK))
      for r, p, q in itertools.product(range(RANK), repeat=3):
        at = lambda r, p, q, k=k: tuple(np.insert([p, q], k, r))
        mean[r] += core[at(r, p, q)] * first[i][n, p] * first[j][n, q]
        for s, a, b in itertools.product(range(RANK), repeat=3):
          square[r, s] += ww[at(r, p, q) + at(s, a, b)] * second[i][n, p, a] * second[j][n, q, b]
      place = index[n, k]
      sums[0][place] += old[0][n]
      sums[1][place] += old[1][n]
      fresh[0][place] += d_u * old[0][n] + (1 - d_u) * tau * square
      fresh[1][place] += d_u * old[1][n] + (1 - d_u) * tau * y[n] * mean
    mode = dataclasses.replace(state.modes[k], precision=jnp.asarray(sums[0]), linear=jnp.asarray(sums[1]))
    given_state = dataclasses.replace(state, modes=(*state.modes[:k], mode, *state.modes[k + 1 :]))
    precision, linear = compiled.damped_message(given_state, data, settings, k)
    np.testing.assert_allclose(precision, fresh[0], atol=1e-10)
    np.testing.assert_allclose(linear, fresh[1], atol=1e-10)
  letters = np.einsum("na,nb,nc->nabc", *first).reshape(12, -1)
  squares = np.einsum("nad,nbe,ncf->nabcdef", *second).reshape(12, 8, 8)
  flat, square = core.reshape(-1), ww.reshape(8, 8)
  b = np.sum(y**2 / 2 - y * (letters @ flat) + 0.5 * np.einsum("ij,nij->n", square, squares))
  np.testing.assert_allclose(compiled.half_residual(state, data, settings), b, rtol=1e-10)
  new = compiled.update_noise(state, data, settings)
  np.testing.assert_allclose(new.rate, 1 + d_tau * float(state.residual) + (1 - d_tau) * b, rtol=1e-10)
  assert float(new.shape) == 1 + 12 / 2
  if model == "tucker":
    new = compiled.update_core(state, data, settings)
    precision = d_core * np.asarray(state.core_precision) + (1 - d_core) * tau * squares.sum(0)
    np.testing.assert_allclose(new.core_cov, np.linalg.inv(precision + np.eye(8)), atol=1e-10)
    linear = d_core * np.asarray(state.core_linear) + (1 - d_core) * tau * y @ letters
    np.testing.assert_allclose(new.core_mean, new.core_cov @ linear, atol=1e-10)


def test_a_frozen_superdiagonal_core_is_the_cp_model():
  data = random_problem()
  start = jax.random.key(3)
  frozen = Settings(rank=RANK, update_core=False, kernel="matern32")
  cp = dataclasses.replace(frozen, model="cp")
  (a, ha), (b, hb) = (fit(data, s, start, epochs=3) for s in (frozen, cp))
  for x, y in zip(jax.tree.leaves((a.modes, a.rate)), jax.tree.leaves((b.modes, b.rate)), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-9)
  np.testing.assert_allclose(ha["train_rmse"], hb["train_rmse"])
  points = jnp.asarray(np.random.default_rng(0).uniform(size=(7, 3)))
  for x, y in zip(predict(a, data, points, frozen), predict(b, data, points, cp), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-9)


@pytest.mark.parametrize(
  "settings",
  [
    Settings(rank=(2, 3, 2), kernel="matern12", damping=(0.0, 0.0, 0.0)),
    Settings(rank=2, model="cp", kernel="matern32", damping=(0.0, 0.0, 0.0)),
  ],
)
def test_no_undamped_update_lowers_the_evidence_bound(settings):
  """after every single block update."""
  data, seed = random_problem(1), 1
  state = epoch(initial_state(data, settings, jax.random.key(seed)), data, settings)
  bound = jax.jit(lambda s: funbat.elbo(s, data, settings))
  update = jax.jit(
    lambda s, k: funbat._replace_mode(
      s, k, funbat.smooth_mode(*funbat.damped_message(s, data, settings, k), data, settings, k)
    ),
    static_argnums=1,
  )
  core, noise = (jax.jit(lambda s, f=f: f(s, data, settings)) for f in (funbat.update_core, funbat.update_noise))
  values = [float(bound(state))]
  for _ in range(8):
    for k in range(3):
      state = update(state, k)
      values.append(float(bound(state)))
    if settings.model == "tucker":
      state = core(state)
      values.append(float(bound(state)))
    state = noise(state)
    values.append(float(bound(state)))
  steps = np.diff(values)
  assert steps.min() > -1e-8 * abs(values[-1]) and values[-1] > values[0] + 0.1


@pytest.mark.parametrize("model, scan", [("tucker", "seq"), ("cp", "assoc")])
def test_with_one_mode_the_model_is_regression_whatever_its_form(model, scan):
  """through the whole model: K = 1, R = 1, tau fixed by a sharp prior, and w fixed to 1."""
  rng = np.random.default_rng(0)
  t, y, tau = np.sort(rng.uniform(size=30)), rng.normal(size=30), 2.0
  settings = Settings(
    rank=1,
    model=model,
    update_core=False,
    kernel="matern32",
    damping=(0.0, 0.0, 0.0),
    noise=(1e14, 1e14 / tau),
    lengthscale=0.3,
    variance=1.5,
    scan=scan,
  )
  data = funbat.observe(t[:, None], y, units=funbat.RAW)
  state = initial_state(data, settings, jax.random.key(0))
  state = dataclasses.replace(state, rate=state.shape / tau)
  state = epoch(state, data, settings)
  new = np.concatenate([[-0.2], rng.uniform(size=9), [1.4]])
  mean, variance = predict(state, data, jnp.asarray(new)[:, None], settings)
  k, cross = covariance("matern32", 0.3, 1.5, t, t) + np.eye(30) / tau, covariance("matern32", 0.3, 1.5, new, t)
  np.testing.assert_allclose(mean, cross @ np.linalg.solve(k, y), atol=1e-8)
  expected = 1.5 - np.sum(cross.T * np.linalg.solve(k, cross.T), 0) + 1 / tau
  np.testing.assert_allclose(variance, expected, atol=1e-8)


def test_the_published_surface_is_learned():
  """675 of 1,350 points on six random 15 x 15 grids; test RMSE < 0.006 in 100 epochs."""
  config = config_file.get_config("test")
  config.surface.epochs = 100
  result = surface.measure(config)
  assert result["markov"]["rmse"] < 0.006 < 0.1 * result["std"]
  assert result["markov"]["rmse"] <= result["merge"]["rmse"] and result["markov"]["coverage_95"] > 0.9


def test_a_prediction_on_the_grid_is_one_at_its_coordinates():
  """Grid points that only the test set has are interpolated by the smoother itself."""
  data, settings = random_problem(size=9), Settings(rank=RANK, kernel="matern32")
  state = fit(data, settings, jax.random.key(0), epochs=2)[0]
  index = jnp.asarray(list(np.ndindex(5, 6, 4)))
  assert min(len(set(np.asarray(data.index[:, k]))) - len(g) for k, g in enumerate(data.grids)) < 0
  points = jnp.stack([g[index[:, k]] for k, g in enumerate(data.grids)], 1)
  ours, theirs = compiled.predict_on_grid(state, index, settings), predict(state, data, points, settings)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9)


def test_coordinates_without_an_observation_are_interpolated():
  """A grid point with no data in the smoother is the prediction at an unseen coordinate; and inf data at none."""
  data, settings = random_problem(), Settings(rank=RANK, kernel="matern32")
  rng = np.random.default_rng(1)
  extra = [np.sort(np.concatenate([g, rng.uniform(-0.2, 1.2, 3)])) for g in data.grids]
  wide = np.stack(
    [
      np.searchsorted(e, np.asarray(g)[data.index[:, k]])
      for k, (e, g) in enumerate(zip(extra, data.grids, strict=True))
    ],
    1,
  )
  larger = funbat.on_grids(extra, wide, data.y, units=funbat.RAW)
  first = initial_state(data, settings, jax.random.key(0))
  start = initial_state(larger, settings, jax.random.key(0))
  modes = []
  for k, mode in enumerate(start.modes):
    at = np.searchsorted(extra[k], np.asarray(data.grids[k]))
    old = first.modes[k]

    def put(new, old, at=at):
      spread = np.zeros(new.shape)
      spread[at] = old
      return jnp.asarray(spread)

    modes.append(
      dataclasses.replace(
        mode,
        mean=put(mode.mean, old.mean),
        precision=put(mode.precision, old.precision),
        linear=put(mode.linear, old.linear),
      )
    )
  start = dataclasses.replace(start, modes=tuple(modes))
  for _ in range(3):
    first, start = epoch(first, data, settings), epoch(start, larger, settings)
  for k in range(3):
    mean, cov = factor_at(first, data, jnp.asarray(extra[k]), settings, k)
    np.testing.assert_allclose(start.modes[k].mean, mean, atol=1e-9)
    np.testing.assert_allclose(start.modes[k].cov, cov, atol=1e-9)


def test_predictive_moments_are_those_of_the_posterior():
  """E and Var of a new y against 200,000 draws of factors, core and noise."""
  data, settings = random_problem(), Settings(rank=RANK)
  state = fit(data, settings, jax.random.key(0), epochs=3)[0]
  rng, points = np.random.default_rng(0), np.array([[0.31, 0.55, 0.72]])
  mean, variance = predict(state, data, jnp.asarray(points), settings)
  draw = lambda m, c: rng.multivariate_normal(np.asarray(m), np.asarray(c), 200_000)
  factors = [factor_at(state, data, jnp.asarray(points[:, k]), settings, k) for k in range(3)]
  w = draw(state.core_mean, state.core_cov).reshape(-1, RANK, RANK, RANK)
  y = np.einsum("nabc,na,nb,nc->n", w, *(draw(m[0], c[0]) for m, c in factors))
  y = y + rng.normal(size=len(y)) / np.sqrt(rng.gamma(state.shape, 1 / state.rate, len(y)))
  np.testing.assert_allclose(mean[0], y.mean(), atol=5 * y.std() / np.sqrt(len(y)))
  np.testing.assert_allclose(variance[0], y.var(), rtol=0.05)


def sines(size=500):
  """Two products of sines on a grid with noise 0.1, centred, of standard deviation 1."""
  rng = np.random.default_rng(0)
  grids = [np.linspace(0, 1, n) for n in (12, 14, 16)]
  index = np.stack([rng.integers(0, len(g), size) for g in grids], 1)
  y = sum(np.prod([np.sin((2 + r) * 3 * g[index[:, k]] + r) for k, g in enumerate(grids)], 0) for r in range(2))
  y = (y - y.mean()) / y.std() + 0.1 * rng.normal(size=size)
  return funbat.on_grids(grids, index, y)


def test_the_defaults_do_not_collapse_and_the_authors_settings_do():
  """Zero is a stable fixed point: RMSE must be < 0.9 std; from the authors' start it is std."""
  data = sines()
  learn = lambda **o: fit(data, Settings(rank=2, **o), jax.random.key(0), epochs=20)
  std = float(jnp.std(data.y))
  assert float(learn()[1]["train_rmse"][-1]) < 0.9 * std
  authors = dict(core_moments="mean", core_variance=None, extra_prior=1.0, damping=(0.5, 0.6, 0.9), initial="code")
  state, history = learn(lengthscale=0.3, **authors)
  np.testing.assert_allclose(history["train_rmse"][-1], jnp.sqrt(jnp.mean(data.y**2)), rtol=1e-6)
  assert max(float(jnp.abs(mode.mean).max()) for mode in state.modes) < 1e-4


def test_the_evidence_bound_is_never_above_the_likelihood():
  """A fit that has lost its digits, whose means are not those of its messages, must not win among several starts."""
  data, settings = random_problem(1), Settings(rank=2, model="cp", damping=(0.0, 0.0, 0.0))
  state = fit(data, settings, jax.random.key(0), epochs=5)[0]
  modes = tuple(dataclasses.replace(mode, mean=30 * mode.mean) for mode in state.modes)
  broken = dataclasses.replace(state, modes=modes)
  bound = jax.jit(lambda s: funbat.elbo(s, data, settings))
  tau, error = float(broken.shape / broken.rate), float(compiled.half_residual(broken, data, settings))
  assert float(bound(broken)) < 0.5 * len(data.y) * np.log(tau) - tau * error < float(bound(state))


def smooth_and_rough(size=300):
  """y = u(a) v(b): u smooth, v without any relation between its 40 values; noise 0.1."""
  rng = np.random.default_rng(0)
  a, b = rng.uniform(size=size), rng.integers(0, 40, size)
  return np.stack([a, b / 39], 1), (1.5 + np.sin(2 * a)) * rng.normal(size=40)[b] + 0.1 * rng.normal(size=size)


def test_the_evidence_tells_the_lengthscales_of_the_modes_apart():
  """One for both modes is wrong for one of them: learned ones have the larger bound and the smaller error.

  Of several starts the one with the largest bound is kept.
  """
  at, y = smooth_and_rough()
  data = funbat.take(whole := funbat.observe(at, y), slice(200))
  settings = Settings(rank=1, model="cp", lengthscale=0.1, damping=(0.0, 0.0, 0.0))
  test = funbat.take(whole, slice(200, None))
  state, lengthscale, history = learn(data, settings, jax.random.key(0), epochs=30, rounds=3, test=test)
  assert float(lengthscale[0]) >= 10 * float(lengthscale[1]) and history["train_rmse"].shape == (30,)
  fixed, other = fit(data, settings, jax.random.key(0), epochs=30, test=test)
  assert float(history["test_rmse"][-1]) < 0.8 * float(other["test_rmse"][-1])
  learned = dataclasses.replace(settings, lengthscale=lengthscale)
  assert learned.lengthscale == tuple(lengthscale.tolist())  # static again
  bound = float(compiled.elbo(state, data, learned))
  assert bound > float(compiled.elbo(fixed, data, settings))
  first, at_first, _ = learn(data, settings, jax.random.key(0), epochs=30, rounds=3, starts=1, test=test)
  assert bound >= float(compiled.elbo(first, data, dataclasses.replace(settings, lengthscale=at_first)))


@pytest.mark.parametrize("model", funbat.MODELS)
def test_outputs_far_from_zero_and_unix_seconds_are_learned_as_they_come(model):
  """y around 300 ended at the zero fixed point; an hour's seconds of the year 2026 were a few dozen float32 numbers."""
  at, y = smooth_and_rough()
  with jax.enable_x64(False):
    seconds = 1.79e9 + np.round(3600 * at)
    data = funbat.observe(seconds[:200], 300 + 5 * y[:200])
    assert len(data.grids[0]) == len(np.unique(seconds[:200, 0])) and float(data.grids[0].max()) == 1
    settings = Settings(rank=1, model=model, damping=(0.0, 0.0, 0.0))
    state, lengthscale, _ = learn(data, settings, jax.random.key(0), epochs=30, rounds=3)
    settings = dataclasses.replace(settings, lengthscale=lengthscale)
    # A constant of the program: as its argument the seconds would be float32.
    mean, variance = jax.jit(lambda state: funbat.predict(state, data, seconds[200:], settings))(state)
  error = np.asarray(mean) - (300 + 5 * y[200:])
  assert np.sqrt(np.mean(error**2)) < 0.2 * 5 * y.std()
  assert np.mean(np.abs(error) < 1.96 * np.sqrt(variance)) > 0.9


def test_coordinates_that_the_model_cannot_tell_apart_are_named():
  """Seconds of ten years: neighbours are one float32 number even in shares of their range."""
  seconds = 1.7e9 + np.array([0.0, 1.0, 3e8, 3e8 + 1])[:, None]
  with jax.enable_x64(False), pytest.raises(InputError, match=r"one number in float32 \(at position 3\); round"):
    funbat.observe(seconds, np.ones(4))
  assert len(funbat.observe(seconds, np.ones(4)).grids[0]) == 4


def test_constant_outputs_and_coordinates_have_no_spread():
  """The deviation of equal numbers is rounding: divided by it they were ones. A mode of one coordinate is one."""
  data = funbat.observe(np.stack([np.arange(7.0), np.full(7, 300.0)], 1), np.full(7, 0.1))
  assert data.units.spread == 1 and float(jnp.abs(data.y).max()) < 1e-12
  assert data.units.span == (6.0, 1.0) and data.grids[1].tolist() == [0.0]


def test_units_change_nothing_but_the_units():
  """Predictions of a y + b at c i + d are a times those of y at i, plus b; and points of a factor are in its units."""
  at, y = smooth_and_rough(80)
  settings = Settings(rank=1, model="cp", kernel="matern32")
  results = []
  for scale, shift, a, b in ((1.0, 0.0, 1.0, 0.0), (7.0, -3.0, 4.0, 50.0)):
    data = funbat.observe(scale * at + shift, a * y + b)
    state, _ = fit(data, settings, jax.random.key(0), epochs=3)
    new = scale * np.array([[0.2, 0.3], [0.9, 1.2]]) + shift
    mean, variance = predict(state, data, new, settings)
    factor = factor_at(state, data, new[:, 0], settings, 0)[0]
    results.append(((mean - b) / a, variance / a**2, factor))
  for x, z in zip(*results, strict=True):
    np.testing.assert_allclose(x, z, rtol=1e-6)


def test_a_test_set_on_other_grids_is_refused():
  """Its indices would name other coordinates: `fit` gave errors of nonsense without a word."""
  at, y = smooth_and_rough(60)
  whole = funbat.observe(at, y)
  train, alone = funbat.take(whole, slice(40)), funbat.observe(at[40:], y[40:])
  for test in (alone, dataclasses.replace(whole, units=funbat.RAW), random_problem()):
    with pytest.raises(InputError, match="other grids, or in other units"):
      funbat.fit(train, Settings(rank=1), jax.random.key(0), epochs=1, test=test)
  moved = dataclasses.replace(whole, grids=(whole.grids[0] + 0.1, whole.grids[1]))
  with pytest.raises(InputError, match="observe all data once"):
    funbat.learn(train, Settings(rank=1), jax.random.key(0), epochs=5, test=moved)


def test_lists_are_as_good_as_tuples():
  """One value a mode as a list, an array or a tuple are the same, hashable settings."""
  by = lambda make: Settings(rank=make((1, 2)), lengthscale=make((0.1, 1.0)), variance=make((1.0, 2.0)))
  assert by(list) == by(tuple) == by(np.asarray) and hash(by(list)) == hash(by(tuple))
  with pytest.raises(InputError, match=r"lengthscale is \(0.1, -1.0\); it must be positive"):
    Settings(lengthscale=[0.1, -1.0])


def test_fits_stop_where_the_training_error_does():
  """The first epoch whose error is within 1e-4 of that five epochs before; else the last."""
  errors = jnp.array([9.0, 5.0, 3.0, 2.0, 1.0, 1.5, 1.00005, 1.00004, 1.00003, 1.0, 1.00002, 1.0])
  assert int(funbat.stopping_epoch(errors)) == 10
  assert int(funbat.stopping_epoch(errors[:9])) == 9
  assert int(funbat.stopping_epoch(errors, window=1)) == 8
  assert int(funbat.stopping_epoch(errors[:3])) == 3


def test_regularisations_are_fitted_as_a_batch():
  """A variance that is traced gives what the number gives."""
  data = random_problem(levels=(5, 6))
  batch = jax.jit(
    jax.vmap(lambda v: funbat.fit(data, Settings(rank=1, variance=v), jax.random.key(0), epochs=2)[1]["train_rmse"])
  )(jnp.array([0.5, 3.0]))
  for i, variance in enumerate((0.5, 3.0)):
    alone = fit(data, Settings(rank=1, variance=variance), jax.random.key(0), epochs=2)[1]["train_rmse"]
    np.testing.assert_allclose(batch[i], alone, rtol=1e-9)


def test_folds_run_under_vmap():
  """Epochs as in `test_predictive_moments_are_those_of_the_posterior`, whose program it runs."""
  folds = [random_problem(seed) for seed in (0, 1)]
  folds = [dataclasses.replace(f, grids=folds[0].grids) for f in folds]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *folds)
  run = lambda d: fit(d, Settings(rank=RANK), jax.random.key(0), epochs=3)[1]["train_rmse"]
  np.testing.assert_allclose(jax.jit(jax.vmap(run))(stacked), [run(f) for f in folds], rtol=1e-9)


def test_repeated_coordinates_are_merged():
  """Two observations of one coordinate share a grid entry, and replicates act as one of twice the precision."""
  at = np.array([[0.3, 1.0], [0.3, 2.0], [0.1, 1.0], [0.1, 1.0]])
  data = funbat.observe(at, np.arange(4.0), units=funbat.RAW)
  assert [g.tolist() for g in data.grids] == [[0.1, 0.3], [1.0, 2.0]]
  assert data.index.tolist() == [[1, 0], [1, 1], [0, 0], [0, 0]]


def test_least_squares_recovers_a_noiseless_tensor():
  """Baselines: CP-ALS and P-Tucker fit a rank-2 tensor; functional factors fit a function of their own basis."""
  rng = np.random.default_rng(0)
  factors = [rng.normal(size=(n, 2)) for n in (6, 7, 8)]
  index = np.stack(np.meshgrid(*map(np.arange, (6, 7, 8)), indexing="ij"), -1).reshape(-1, 3)
  y = np.einsum("nr,nr,nr->n", *(f[index[:, k]] for k, f in enumerate(factors)))
  seen = rng.permutation(len(y))[: len(y) * 2 // 3]
  data = funbat.on_grids([np.linspace(0, 1, n) for n in (6, 7, 8)], index[seen], y[seen], units=funbat.RAW)
  for model in funbat.MODELS:
    solve = jax.jit(lambda key, m=model: funbat_baselines.als(data, key, rank=2, ridge=1e-6, sweeps=200, model=m))
    got = baselines.multilinear(*solve(jax.random.key(1)), jnp.asarray(index))
    assert np.sqrt(np.mean((got - y) ** 2)) < 0.02 * y.std()
  for kind in funbat_baselines.BASES:
    bases = [baselines.basis(g, kind=kind, size=3) for g in data.grids]
    smooth = [b @ rng.normal(size=(3, 1)) for b in bases]
    target = np.prod([np.asarray(s)[index[seen, k], 0] for k, s in enumerate(smooth)], 0)
    exact = dataclasses.replace(data, y=jnp.asarray(target))
    got = baselines.basis_als(exact, bases, jax.random.key(0), rank=1, ridge=1e-8, sweeps=30)
    np.testing.assert_allclose(baselines.multilinear(*got, exact.index), target, atol=1e-3 * target.std())


def test_gaussian_process_baselines_learn_a_smooth_function():
  """The sparse bound with as many inducing points as data is the exact GP; both interpolate."""
  rng = np.random.default_rng(0)
  x, new = rng.uniform(size=(60, 2)), rng.uniform(0.1, 0.9, size=(20, 2))
  f = lambda x: np.sin(4 * x[:, 0]) + x[:, 1] ** 2
  arrays = jnp.asarray(x), jnp.asarray(f(x)), jnp.asarray(new), jax.random.key(0)
  exact = jax.jit(lambda *a: funbat_baselines.gp(*a, points=60, steps=60))(*arrays)
  sparse = jax.jit(lambda *a: funbat_baselines.sparse_gp(*a, inducing=60, steps=60))(*arrays)
  for got in (exact, sparse):
    assert np.sqrt(np.mean((got["mean"] - f(new)) ** 2)) < 0.1 * f(x).std()
  assert float(exact["gp_variance"].min()) > 0 and -0.01 < float(exact["unsettled"]) < 0.1


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_a_fit_that_loses_its_loss_keeps_the_last_parameters_that_had_one(steps):
  """Steps of 0.1 from 0.25; below 0 there is no loss, as with a kernel that float32 cannot factorise."""
  found = funbat_baselines._adam(lambda p: jnp.where(p > 0, p, jnp.nan), jnp.asarray(0.25), rate=0.1, steps=steps)
  assert float(found) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: funbat.observe(np.array([[0.1, np.nan]]), np.ones(1)), "coordinates has 1 NaN"),
    (lambda: funbat.observe([["monday", 1]], np.ones(1)), "coordinates are no numbers .*dates as seconds"),
    (lambda: funbat.on_grids([[0.0, 1.0]], np.zeros((1, 1)), np.ones(1)), "index holds float64; expected integers"),
    (lambda: funbat.on_grids([[]], np.zeros((1, 1), int), np.ones(1)), r"grid 0 has shape \(0,\)"),
    (lambda: funbat.learn(random_problem(), Settings(), jax.random.key(0), epochs=7), "7 epochs do not divide into 5"),
    (lambda: funbat.observe(np.ones((2, 2)), np.array([1.0, np.inf])), "y has 1 NaN or infinite"),
    (lambda: funbat.observe(np.ones((2, 2)), np.ones(3)), r"\(2, 2\) and y \(3,\) do not fit"),
    (lambda: funbat.on_grids([np.array([0.0, 1.0, 1.0])], np.zeros((1, 1), int), np.ones(1)), "at position 2 .*merge"),
    (lambda: funbat.on_grids([np.array([0.0, 1.0])], np.full((1, 1), 2), np.ones(1)), r"spans 2\.\.2; its grid has 2"),
    (lambda: Settings(rank=0), "rank is 0; it must be positive"),
    (lambda: Settings(rank=2.5), "rank is 2.5; give integers"),
    (lambda: Settings(lengthscale="0.1"), "lengthscale is '0.1'; give a number, or one for each mode"),
    (lambda: Settings(damping=0.3), "damping is 0.3; give 3 numbers"),
    (lambda: Settings(noise=(1.0,)), r"noise is \(1.0,\); give 2 numbers"),
    (lambda: funbat.observe(1j * np.ones((1, 1)), np.ones(1)), "coordinates are complex"),
    (lambda: funbat.fit(random_problem(), Settings(), 0, epochs=1), r"key is 0; give jax.random.key\(0\)"),
    (lambda: funbat.fit(random_problem(), Settings(), jax.random.key(0), epochs=2.5), "epochs is 2.5; give an integer"),
    (
      lambda: funbat.fit(random_problem(), Settings(), jax.random.key(0), epochs=1, test=(np.ones((1, 3)), np.ones(1))),
      "the test set is a tuple; make it with observe and take",
    ),
    (lambda: funbat.predict(None, random_problem(), jnp.full((1, 3), jnp.nan), Settings()), "coordinates has 3 NaN"),
    (lambda: Settings(rank=(2, 3), model="cp"), "one rank for all modes"),
    (lambda: Settings(kernel="rbf"), "kernel is 'rbf'"),
    (lambda: Settings(damping=(1.0, 0.0, 0.0)), "each must lie in"),
    (lambda: funbat.fit(random_problem(), Settings(rank=(2, 2)), jax.random.key(0), epochs=1), "the data have 3 modes"),
    (lambda: funbat.fit(random_problem(), Settings(), jax.random.key(0), epochs=0), "epochs is 0"),
    (lambda: funbat_baselines.als(random_problem(), jax.random.key(0), rank=1, ridge=0, sweeps=1), "ridge is 0"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(InputError, match=message):
    make()


def test_the_experiment_runs_and_continues(tmp_path, monkeypatch):
  with jax.enable_x64(False):
    report = run_and_continue("funbat", tmp_path, monkeypatch)
  assert report.claims[0].name.startswith("Standard deviations over folds") and len(report.figures) == 3
  assert "generated field" in report.finding and (tmp_path / "method.generated field.FunBaT-CP.part.json").exists()


def test_the_choice_is_made_on_the_held_out_tenth_alone():
  """Of a good and a useless value the good one is chosen; the folds' errors are those of fits with it."""
  values, train = (0.0, 1.0, 2.0), random_problem(size=40)
  test = dataclasses.replace(random_problem(1, size=10), grids=train.grids)
  fit = lambda train, test, value, rank: {"mean": jnp.full_like(test.y, (value - 1.0) * 50 + rank)}
  method = comparison.Method(fit, ranks=(0, 7), values=values, value="offset")
  for together in (False, True):
    result = comparison.measure(method, [(train, test)] * 2, together)
    assert result["chosen"] == {"offset": 1.0, "rank": 0} and result["held_out_rmse"] > 0
    np.testing.assert_allclose(result["errors"]["rmse"]["folds"], [np.sqrt(np.mean(test.y**2))] * 2)


def test_claims_take_the_variant_chosen_on_held_out_data_and_the_worst_data_set():
  """Not the better one on the test sets; the rival is, in its favour."""

  def row(held, rmse):
    spread = {"mean": rmse, "std": 0.1}
    return {"chosen": {"rank": 2}, "held_out_rmse": held, "errors": {"rmse": spread, "coverage_95": {"mean": 0.9}}}

  rows = {"FunBaT-CP": row(0.4, 0.6), "FunBaT": row(0.5, 0.3), "discrete CP": row(0.1, 0.9)}
  rows["discrete CP"]["errors"]["rmse_of_training"] = {"mean": 0.85, "std": 0.1}
  sets = {"easy": rows | {"discrete Tucker": row(0.9, 2.0)}, "hard": rows | {"discrete Tucker": row(0.9, 0.7)}}
  full = rows | {"exact GP": row(0.1, 0.4), "GPTF": row(0.1, 0.25)}
  claim, dense, processes, *_ = comparison.claims(
    config_file.get_config("test"), sets | {"full": full}, {"easy": 1e-3, "hard": 1e-3, "full": 0.5}
  )
  assert dense.name.endswith("more seen, full") and dense.holds
  assert "discrete CP 0.9000 (3.00), on its training entries 0.8500" in dense.note
  # The best Gaussian process, of indices too: FunBaT-CP is 3.5 deviations above it.
  assert processes.ours == pytest.approx(3.5) and not processes.holds and "FunBaT-CP 0.6000, GPTF" in processes.note
  assert claim.name.endswith("worst of 2 data sets") and claim.ours == pytest.approx(1.0) and not claim.holds
  assert "hard: FunBaT-CP 0.6000, discrete Tucker 0.7000" in claim.note
  assert "0.600 on hard (discrete 0.700)" in comparison.finding(sets)


def test_the_claims_follow_from_the_config_and_the_parts():
  """The parallel scans are claimed where the config chose one, whatever machine reads the parts."""
  row = {
    "steps": 3200,
    "over": {p: dict.fromkeys(("assoc", "doubling", "seq"), (2.0, (1, 3))) for p in ("seq", "numpy")},
  }
  epoch = {"line": [(10, 3.0), (1000, 4.0)], "slope": 0.06, "slope_at_the_end": 0.06}
  cost = {"scan_gap": 0.0, "smoother": {"rows": [row], "slopes": {"seq": 1.0}}, "epoch": epoch}
  names = {scale: [c.name for c in speed.claims(config_file.get_config(scale), cost)] for scale in ("cpu", "gpu")}
  assert len(names["cpu"]) == 3 and sum("as lax.scan the parallel smoother" in name for name in names["gpu"]) == 1


def test_real_tensors_are_read(tmp_path):
  """The published files: indices of any integer type, standardised by the training set's mean and deviation."""
  config, rng = config_file.get_config("test"), np.random.default_rng(0)
  arrays = {f"ndims/{k}": np.int64(n) for k, n in enumerate((15, 95, 267))}
  for fold in range(2):
    for part, size in (("tr", 30), ("te", 8)):
      arrays[f"data/{fold}/{part}_ind"] = rng.integers(0, (15, 95, 267), (size, 3)).astype(np.int16)
      arrays[f"data/{fold}/{part}_y"] = rng.normal(60, 9, size)
  path = tmp_path / "us.npz"
  config.data.update(name="npz", paths=(str(path),))
  np.savez(path, **arrays)
  (train, test), _ = load_folds(config)["us"]
  assert [len(g) for g in train.grids] == [15, 95, 267] and float(train.grids[2][-1]) == 1.0
  np.testing.assert_allclose([train.y.mean(), train.y.std()], [0, 1], atol=1e-6)
  config.data.few = (10, 20)
  fewer = load_folds(config)
  assert {name: len(folds[0][0].y) for name, folds in fewer.items()} == {
    "us": 30,
    "us, 10 entries": 10,
    "us, 20 entries": 20,
  }
  assert all((fold.y == test.y).all() for (_, fold), _ in fewer.values())
  config.data.few = (31,)
  with pytest.raises(InputError, match="has 31; a fold has 30"):
    load_folds(config)
  config.data.few = ()
  np.savez(path, **arrays | {"data/1/te_y": np.zeros(7), "data/1/te_ind": arrays["data/1/te_ind"][:7]})
  with pytest.raises(InputError, match="folds of several sizes"):
    load_folds(config)
  y = arrays["data/0/tr_y"]
  np.testing.assert_allclose(test.y, (arrays["data/0/te_y"] - y.mean()) / y.std(), rtol=1e-6)


def test_a_wrong_file_is_named(tmp_path):
  config = config_file.get_config("test")
  config.data.name = "npz"
  with pytest.raises(InputError, match="paths is empty"):
    load_folds(config)
  config.data.paths = (str(tmp_path / "x.npz"),)
  with pytest.raises(InputError, match="not a file"):
    load_folds(config)
  np.savez(config.data.paths[0], **{"data/0/tr_ind": np.zeros((1, 1)), "data/1/tr_ind": np.zeros((1, 1))})
  with pytest.raises(InputError, match="expected data/<fold>"):
    load_folds(config)
