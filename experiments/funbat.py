"""FunBaT: a known surface, real or generated tensors against the baselines, the cost of the smoother and an epoch."""

import functools
import itertools
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, timing
from experiments.results import Claim, Report
from jaxlab.core import kalman
from jaxlab.core.checks import InputError, require, require_choice
from jaxlab.tensors import funbat, funbat_baselines, matern
from jaxlab.tensors.funbat import Settings

DATA = ("field", "npz")
FUNCTIONAL, DISCRETE, ALS = ("FunBaT-CP", "FunBaT"), ("discrete CP", "discrete Tucker"), ("CP-ALS", "P-Tucker")


def run(config, workdir: Path, cache: Path, console) -> Report:
  folds = load_folds(config)
  console.say("the surface")
  surface_result, curves = learn_surface(config)
  comparison, epochs = compare(config, folds, console)
  console.say("timing smoothers and epochs")
  cost = {"scan_gap": scan_gap(), "smoother": time_smoothers(config), "epoch": time_epochs(config)}
  metrics = {"surface": surface_result, "comparison": comparison, "cost": cost}
  files = {
    draw_surface(curves, workdir): "Posterior factor functions of the surface, two standard deviations, and the truth",
    draw_comparison(comparison, epochs, workdir): "Test error by method; and by epoch, chosen rank, mean over folds",
    draw_cost(cost, workdir): "Seconds of one smoother pass against its length; of one epoch against observations",
  }
  return Report(metrics, make_claims(config, surface_result, comparison, cost), files)


def surface(seed: int):
  """sin(2 pi x)^2 cos(2 pi x) * exp(-2 y) sin(1.5 pi y) on six random 15 x 15 grids; half of them to train."""
  rng = np.random.default_rng(seed)
  grids = [np.stack(np.meshgrid(rng.uniform(size=15), rng.uniform(size=15)), -1).reshape(-1, 2) for _ in range(6)]
  at = rng.permutation(np.concatenate(grids))
  y = surface_factor(0, at[:, 0]) * surface_factor(1, at[:, 1])
  half = len(at) // 2
  return (at[:half], y[:half]), (at[half:], y[half:])


def surface_factor(mode: int, x):
  if mode == 0:
    return np.sin(2 * np.pi * x) ** 2 * np.cos(2 * np.pi * x)
  return np.exp(-2 * x) * np.sin(1.5 * np.pi * x)


def surface_settings() -> Settings:
  """The authors' but for the order: with all messages before all smoothers (inner=False) many starts never converge."""
  return Settings(rank=1, model="cp", kernel="matern32", lengthscale=0.1, variance=0.5, damping=(0.1, 0.2, 0.0))


def learn_surface(config) -> tuple[dict, list]:
  """Errors on unseen points, coverage, the ablation of the interpolation, and the factor functions on a fine grid."""
  (at, y), (new, target) = surface(config.seed)
  settings, data = surface_settings(), funbat.observe(at, y)
  fit = jax.jit(lambda key: funbat.fit(data, settings, key, epochs=config.surface.epochs)[0])
  state = fit(jax.random.key(config.seed))
  predict = jax.jit(functools.partial(funbat.predict, settings=settings), static_argnames="rule")
  result = {"std": float(np.std(target))}
  for rule in matern.RULES:
    mean, variance = predict(state, data.grids, jnp.asarray(new, data.y.dtype), rule=rule)
    error = np.asarray(mean) - target
    result[rule] = {
      "rmse": float(np.sqrt(np.mean(error**2))),
      "mae": float(np.mean(np.abs(error))),
      "coverage_95": float(np.mean(np.abs(error) < 1.96 * np.sqrt(np.asarray(variance)))),
    }
  fine, curves = jnp.linspace(0, 1, 200), []
  for k in range(2):
    mean, cov = funbat.factor_at(state, data.grids, fine, settings, k)
    truth = surface_factor(k, np.asarray(fine))
    # A factor is known up to a scale, which the other one undoes.
    scale = float(truth @ mean[:, 0] / (mean[:, 0] @ mean[:, 0]))
    curves.append(
      (np.asarray(fine), truth, scale * np.asarray(mean[:, 0]), abs(scale) * np.sqrt(np.asarray(cov[:, 0, 0])))
    )
  return result, curves


def load_folds(config) -> list[tuple[funbat.Data, funbat.Data]]:
  """(train, test) of every fold on the same grids."""
  d = config.data
  require_choice("config.data.name", d.name, DATA)
  require(d.folds >= 1 and d.span > 0, f"data.folds is {d.folds} and data.span {d.span}; both must be positive")
  if d.name == "field":
    return field(config)
  require(Path(d.path).is_file(), f"config.data.path is '{d.path}', not a file; data.name=npz needs an .npz file")
  try:
    with np.load(d.path, allow_pickle=False) as file:
      available = len({name.split("/")[1] for name in file.files if name.startswith("data/")})
      require(available >= d.folds, f"{d.path} has {available} folds; lower data.folds from {d.folds}")
      modes = len([name for name in file.files if name.startswith("ndims/")])
      grids = [np.linspace(0, d.span, int(file[f"ndims/{k}"])) for k in range(modes)]
      rows = [[file[f"data/{i}/{part}"] for part in ("tr_ind", "tr_y", "te_ind", "te_y")] for i in range(d.folds)]
  except (KeyError, ValueError, IndexError, zipfile.BadZipFile) as error:
    raise InputError(f"{d.path}: {error}; expected data/<fold>/{{tr_ind,tr_y,te_ind,te_y}}, ndims/<mode>") from None
  folds = []
  for train, y, test, target in rows:
    center, scale = np.mean(y), np.std(y)
    standard = lambda values, c=center, s=scale: (np.asarray(values, float) - c) / s
    folds.append((funbat.on_grids(grids, train, standard(y)), funbat.on_grids(grids, test, standard(target))))
  return folds


def field(config) -> list[tuple[funbat.Data, funbat.Data]]:
  """A Tucker model whose factors are random smooth functions, with noise 0.3; random coordinates, 20 % for testing."""
  d, rng = config.data, np.random.default_rng(config.seed)
  grids = [np.sort(rng.uniform(0, d.span, n)) for n in d.levels]
  rank, waves = 3, 12
  factors = []
  for grid in grids:
    frequency, phase = rng.uniform(0.5, 6, (waves, rank)), rng.uniform(0, 2 * np.pi, (waves, rank))
    factors.append(np.sin(frequency * grid[:, None, None] + phase).sum(1) / np.sqrt(waves / 2))
  core = rng.normal(size=(rank,) * len(grids))
  index = np.stack([rng.integers(0, n, d.observations) for n in d.levels], 1)
  y = np.einsum("abc,na,nb,nc->n", core, *(f[index[:, k]] for k, f in enumerate(factors)))
  y = y / y.std() + 0.3 * rng.normal(size=len(y))
  y = (y - y.mean()) / y.std()
  folds = []
  for _ in range(d.folds):
    order, cut = rng.permutation(len(y)), len(y) // 5
    test, train = order[:cut], order[cut:]
    folds.append((funbat.on_grids(grids, index[train], y[train]), funbat.on_grids(grids, index[test], y[test])))
  return folds


def compare(config, folds, console):
  """Every method: hyperparameters chosen on a tenth of the first fold's training set, then errors on all test sets."""
  data, held = hold_out(folds[0][0])
  methods = contestants(config)
  for name in config.methods:
    require_choice("an entry of config.methods", name, methods)
  result, histories = {}, {}
  for name, (make, grid) in console.track("methods", list(methods.items())):
    too_large = name == "exact GP" and len(data.y) > config.baselines.gp_limit
    if too_large or (config.methods and name not in config.methods):
      continue
    choices = list(grid)
    scores = [make(data, held, **choice)[0] for choice in choices] if len(choices) > 1 else [{"rmse": 0.0}]
    best = choices[int(np.argmin([score["rmse"] for score in scores]))]
    rows = [make(train, test, **best) for train, test in folds]
    errors = [row for row, _ in rows]
    summary = lambda key, errors=errors: [e[key] for e in errors]
    result[name] = {"chosen": best} | {
      key: {"mean": float(np.mean(summary(key))), "std": float(np.std(summary(key)))} for key in errors[0]
    }
    if rows[0][1] is not None:
      histories[name] = np.mean([h for _, h in rows], 0)
  return result, histories


def hold_out(data: funbat.Data):
  """A random tenth of the observations apart, on the same grids."""
  order = np.random.default_rng(0).permutation(len(data.y))
  cut = len(order) // 10
  part = lambda at: funbat.Data(data.grids, data.index[at], data.y[at])
  return part(order[cut:]), part(order[:cut])


def contestants(config) -> dict:
  """{name: (fit(train, test, **choice) -> (errors, history or None), choices)}."""
  f, b, key = config.funbat, config.baselines, jax.random.key(config.seed)
  combine = lambda **grid: [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
  bayes = combine(rank=f.ranks, variance=f.variances)
  ridge = combine(rank=f.ranks, ridge=b.ridges)
  table = {"mean": (lambda train, test: (errors(jnp.mean(train.y), test), None), [{}])}
  for kernel, names in ((f.kernel, FUNCTIONAL), ("white", DISCRETE)):
    for model, name in zip(("cp", "tucker"), names, strict=True):
      table[name] = (functools.partial(fit_bayes, config, kernel, model), bayes)
  table["FunBaT-CP, extra prior"] = (functools.partial(fit_bayes, config, f.kernel, "cp", extra_prior=1.0), bayes)
  for model, name in zip(("cp", "tucker"), ALS, strict=True):
    table[name] = (functools.partial(fit_als, config, key, model, False), ridge)
  table["GP on CP-ALS factors"] = (functools.partial(fit_als, config, key, "cp", True), ridge)
  for kind in funbat_baselines.BASES:
    table[f"{kind} factors"] = (functools.partial(fit_basis, config, key, kind), ridge)

  points = lambda data: jnp.stack([g[data.index[:, k]] for k, g in enumerate(data.grids)], 1)

  def on(inputs, fit):
    fit = jax.jit(fit, static_argnames=() if inputs is points else "levels")
    options = lambda train: {} if inputs is points else {"levels": tuple(map(len, train.grids))}
    return lambda train, test: (
      errors(fit(inputs(train), train.y, inputs(test), key, **options(train)), test),
      None,
    )

  indices = lambda data: data.index
  sparse = functools.partial(funbat_baselines.sparse_gp, inducing=b.inducing, steps=b.gp_steps)
  exact = functools.partial(funbat_baselines.gp, points=b.gp_points, steps=b.gp_steps)
  table["MLP"] = on(points, functools.partial(funbat_baselines.mlp, steps=b.mlp_steps)), [{}]
  table["sparse GP"] = on(points, sparse), [{}]
  table["GPTF"] = on(indices, sparse), [{}]
  table["exact GP"] = on(points, lambda *arrays: exact(*arrays)[0]), [{}]
  return table


def errors(mean, test: funbat.Data) -> dict:
  gap = np.asarray(mean) - np.asarray(test.y)
  return {"rmse": float(np.sqrt(np.mean(gap**2))), "mae": float(np.mean(np.abs(gap)))}


@functools.partial(jax.jit, static_argnames=("settings", "epochs"))
def _fit(train, test, key, *, settings, epochs):
  state, history = funbat.fit(train, settings, key, epochs=epochs, test=test)
  points = jnp.stack([g[test.index[:, k]] for k, g in enumerate(test.grids)], 1)
  return funbat.predict(state, train.grids, points, settings), history


def fit_bayes(config, kernel, model, train, test, *, rank, variance, extra_prior=None):
  """Last-epoch errors after interpolation, those of the epoch that is best on the test set, and coverage."""
  f = config.funbat
  settings = Settings(
    rank=rank,
    model=model,
    kernel=kernel,
    lengthscale=f.lengthscale,
    variance=variance,
    damping=tuple(f.damping),
    extra_prior=extra_prior,
    scan=f.scan,
  )
  (mean, var), history = _fit(train, test, jax.random.key(config.seed), settings=settings, epochs=f.epochs)
  covered = np.abs(np.asarray(mean - test.y)) < 1.96 * np.sqrt(np.asarray(var))
  extra = {"best_epoch_rmse": float(history["test_rmse"].min()), "coverage_95": float(np.mean(covered))}
  return errors(mean, test) | extra, np.asarray(history["test_rmse"])


@functools.partial(jax.jit, static_argnames=("rank", "sweeps", "model"))
def _als(train, key, *, rank, ridge, sweeps, model):
  return funbat_baselines.als(train, key, rank=rank, ridge=ridge, sweeps=sweeps, model=model)


def fit_als(config, key, model, smooth, train, test, *, rank, ridge):
  factors, core = _als(train, key, rank=rank, ridge=ridge, sweeps=config.baselines.sweeps, model=model)
  if smooth:
    options = dict(kernel=config.funbat.kernel, lengthscale=config.funbat.lengthscale, variance=1.0)
    factors = jax.jit(functools.partial(funbat_baselines.smoothed_factors, **options))(train, factors, core)
  return errors(funbat_baselines.multilinear(factors, core, test.index), test), None


@functools.partial(jax.jit, static_argnames=("kind", "size", "rank", "sweeps"))
def _basis_als(train, key, *, kind, size, rank, ridge, sweeps):
  bases = [funbat_baselines.basis(grid, kind=kind, size=size) for grid in train.grids]
  return funbat_baselines.basis_als(train, bases, key, rank=rank, ridge=ridge, sweeps=sweeps)


def fit_basis(config, key, kind, train, test, *, rank, ridge):
  b = config.baselines
  factors, core = _basis_als(train, key, kind=kind, size=b.basis, rank=rank, ridge=ridge, sweeps=b.sweeps)
  return errors(funbat_baselines.multilinear(factors, core, test.index), test), None


def random_chain(steps: int, rank: int, dtype=np.float32):
  """A Matern-1/2 chain of `rank` components and terms of every rank."""
  rng = np.random.default_rng(steps)
  times = np.cumsum(rng.uniform(0.01, 0.1, steps)).astype(dtype)
  root = rng.normal(size=(steps, rank, rank)).astype(dtype)
  chain = matern.chain(jnp.asarray(times), kernel="matern12", lengthscale=1.0, variance=1.0, rank=rank)
  return chain, jnp.asarray(root @ root.swapaxes(1, 2)), jnp.asarray(rng.normal(size=(steps, rank)).astype(dtype))


def numpy_smoother(chain: kalman.Chain, precision, linear):
  """Kalman filter and RTS smoother as a NumPy loop in information form: the peer."""
  a, q, lam, eta = (np.asarray(x) for x in (chain.transition, chain.noise, precision, linear))
  eye, steps = np.eye(eta.shape[1], dtype=eta.dtype), len(eta)
  mean, cov = np.empty_like(eta), np.empty_like(lam)
  m, p = np.zeros_like(eta[0]), np.zeros_like(lam[0])
  for t in range(steps):
    m, p = a[t] @ m, a[t] @ p @ a[t].T + q[t]
    p = np.linalg.solve(eye + p @ lam[t], p)
    m = m + p @ (eta[t] - lam[t] @ m)
    mean[t], cov[t] = m, p
  for t in range(steps - 2, -1, -1):
    ahead = a[t + 1] @ cov[t] @ a[t + 1].T + q[t + 1]
    gain = np.linalg.solve(ahead, a[t + 1] @ cov[t]).T
    mean[t] = mean[t] + gain @ (mean[t + 1] - a[t + 1] @ mean[t])
    cov[t] = cov[t] + gain @ (cov[t + 1] - ahead) @ gain.T
  return mean, cov


def scan_gap() -> float:
  """Largest difference between the two scans in float64."""
  with jax.enable_x64(True):
    problem = random_chain(200, 3, np.float64)
    a, b = (jax.jit(kalman.smooth, static_argnames="scan")(*problem, scan=scan) for scan in kalman.SCANS)
    return float(max(jnp.abs(x - y).max() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


def time_smoothers(config) -> dict:
  """Seconds of the three smoothers by chain length, and their ratios."""
  b, result = config.bench, {}
  for steps in b.steps:
    problem = random_chain(steps, b.rank)
    calls = {}
    for scan in kalman.SCANS:
      smooth = jax.jit(functools.partial(kalman.smooth, scan=scan))
      calls[scan] = functools.partial(smooth, *problem)
    if steps <= b.numpy_limit:
      host = jax.tree.map(np.asarray, problem)
      calls["numpy"] = functools.partial(numpy_smoother, *host)
    times = timing.compare(calls, repetitions=b.repetitions, warmup=1)
    row = {"milliseconds": times.summary(), "assoc_over_seq": times.speedup("assoc", over="seq")}
    if "numpy" in calls:
      row |= {f"{scan}_over_numpy": times.speedup(scan, over="numpy") for scan in kalman.SCANS}
    result[steps] = row
  return result


def time_epochs(config) -> dict:
  """Milliseconds of one epoch (Tucker, fixed grids) by number of observations, and the log-log slope."""
  rng, levels = np.random.default_rng(0), (50, 60, 70)
  settings, result = Settings(rank=config.bench.rank, scan=config.funbat.scan), {}
  for size in config.bench.observations:
    index = np.stack([rng.integers(0, n, size) for n in levels], 1)
    data = funbat.on_grids([np.linspace(0, 10, n) for n in levels], index, rng.normal(size=size))
    state = funbat.initial_state(data, settings, jax.random.key(0))
    step = jax.jit(lambda s, d: funbat.epoch(s, d, settings))
    times = timing.compare(
      {"epoch": functools.partial(step, state, data)}, repetitions=config.bench.repetitions, warmup=1
    )
    result[size] = times.median("epoch") * 1e3
  slope = np.polyfit(np.log(list(result)), np.log(list(result.values())), 1)[0]
  return {"milliseconds": result, "slope": float(slope)}


def make_claims(config, surface_result, comparison, cost) -> list[Claim]:
  """The sheet's criteria: accuracy on the surface, a margin over discrete factors, level with a GP, linear cost."""
  where = Path(config.data.path).stem if config.data.name == "npz" else "generated field"
  claims = [
    Claim(
      "test RMSE on the surface",
      "",
      "lower",
      ours=surface_result["markov"]["rmse"],
      threshold=0.006,
      paper=0.004,
      baseline=surface_result["std"],
      note="paper: the authors' notebook; baseline: the standard deviation. The authors' way to join neighbours gives "
      f"{surface_result['merge']['rmse']:.4f}",
    )
  ]
  best = lambda names: min(
    (n for n in names if n in comparison), key=lambda n: comparison[n]["rmse"]["mean"], default=None
  )
  mine = best(FUNCTIONAL)
  for rival in filter(None, (best(DISCRETE), best(ALS)) if mine else ()):
    a, b = comparison[mine]["rmse"], comparison[rival]["rmse"]
    claims.append(
      Claim(
        f"{mine} below {rival}, RMSE, {where}",
        "std over folds",
        "higher",
        ours=(b["mean"] - a["mean"]) / max(a["std"], b["std"], 1e-12),
        threshold=1.0,
        baseline=f"{b['mean']:.4f} against {a['mean']:.4f}",
        note=f"{config.data.folds} folds; rank and regularisation of both chosen on a tenth of the training set",
      )
    )
  if mine and "exact GP" in comparison:
    a, b = comparison[mine]["rmse"], comparison["exact GP"]["rmse"]
    claims.append(
      Claim(
        f"{mine} above exact GP regression, RMSE, {where}",
        "std over folds",
        "lower",
        ours=(a["mean"] - b["mean"]) / max(a["std"], b["std"], 1e-12),
        threshold=1.0,
        baseline=f"{b['mean']:.4f} against {a['mean']:.4f}",
        note="level or better: at most one standard deviation above",
      )
    )
  claims.append(
    Claim(
      "associative scan against the loop, largest difference, float64",
      "",
      "lower",
      ours=cost["scan_gap"],
      threshold=1e-8,
      baseline="sequential",
    )
  )
  steps = max(s for s, row in cost["smoother"].items() if "seq_over_numpy" in row)
  scan = config.funbat.scan
  ratio, spread = cost["smoother"][steps][f"{scan}_over_numpy"]
  claims.append(
    Claim(
      f"smoother, {steps} steps, {scan}, speed-up over a NumPy loop",
      "x",
      "higher",
      ours=ratio,
      threshold=1.0,
      baseline="NumPy loop",
      spread=spread,
    )
  )
  if jax.default_backend() != "cpu":
    steps = max(cost["smoother"])
    ratio, spread = cost["smoother"][steps]["assoc_over_seq"]
    claims.append(
      Claim(
        f"smoother, {steps} steps, associative scan over sequential",
        "x",
        "higher",
        ours=ratio,
        threshold=1.0,
        baseline="lax.scan, jitted",
        spread=spread,
      )
    )
  claims.append(
    Claim(
      "epoch time against observations, log-log slope",
      "",
      "lower",
      ours=cost["epoch"]["slope"],
      threshold=1.1,
      paper=1.0,
      baseline="linear",
      note=f"{config.bench.observations[0]} to {config.bench.observations[-1]} observations, rank {config.bench.rank}",
    )
  )
  return claims


def draw_surface(curves, workdir: Path) -> str:
  figure, axes = figures.subplots(2)
  for axis, (x, truth, mean, std), name in zip(axes, curves, ("x", "y"), strict=True):
    axis.plot(x, mean, label="posterior mean")
    axis.fill_between(x, mean - 2 * std, mean + 2 * std, alpha=0.3, lw=0)
    axis.plot(x, truth, "k--", lw=1, label="truth")
    axis.set(xlabel=name, title=f"u({name}), rank 1, Matern-3/2")
  axes[0].legend()
  return figures.save(figure, workdir, "surface")


def draw_comparison(comparison, epochs, workdir: Path) -> str:
  figure, axes = figures.subplots(2, gridspec_kw=dict(width_ratios=(1.2, 1)))
  names = sorted(comparison, key=lambda name: -comparison[name]["rmse"]["mean"])
  color = ["C0" if name in FUNCTIONAL else "0.7" for name in names]
  value = lambda key: [comparison[name]["rmse"][key] for name in names]
  axes[0].barh(names, value("mean"), xerr=value("std"), color=color, error_kw=dict(lw=1))
  axes[0].grid(axis="y", alpha=0)
  axes[0].set(xlabel="test RMSE (standardised)", title="Methods, mean and deviation over folds")
  for name, history in epochs.items():
    axes[1].plot(range(1, len(history) + 1), history, label=name, ls="-" if name in FUNCTIONAL else "--")
  axes[1].set(xlabel="epoch", ylabel="test RMSE", title="Test error while fitting")
  axes[1].legend()
  return figures.save(figure, workdir, "comparison")


def draw_cost(cost, workdir: Path) -> str:
  figure, axes = figures.subplots(2)
  labels = {"numpy": "NumPy loop", "seq": "lax.scan", "assoc": "associative scan"}
  for name, label in labels.items():
    rows = [
      (s, r["milliseconds"][name]["median"] / 1e3) for s, r in cost["smoother"].items() if name in r["milliseconds"]
    ]
    axes[0].loglog(*zip(*rows, strict=True), "o-", label=label)
  axes[0].set(xlabel="steps J", ylabel="seconds", title="Kalman filter and RTS smoother")
  axes[0].legend()
  times = cost["epoch"]["milliseconds"]
  axes[1].loglog(list(times), np.asarray(list(times.values())) / 1e3, "o-")
  for axis, ticks in ((axes[0], list(cost["smoother"])), (axes[1], list(cost["epoch"]["milliseconds"]))):
    axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axis.minorticks_off()
  axes[1].set(xlabel="observations N", ylabel="seconds", title=f"One epoch, slope {cost['epoch']['slope']:.2f}")
  return figures.save(figure, workdir, "cost")
