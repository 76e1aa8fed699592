"""FunBaT against its baselines: every method chooses on a tenth of the first fold's training set, all folds follow."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, results
from experiments.funbat import baselines
from experiments.overlap import overlapped
from experiments.results import Claim
from jaxlab.core.checks import require_choice
from jaxlab.tensors import funbat
from jaxlab.tensors.funbat import Settings

FUNCTIONAL, DISCRETE, ALS = ("FunBaT-CP", "FunBaT"), ("discrete CP", "discrete Tucker"), ("CP-ALS", "P-Tucker")
SPARSE = 0.01
EXACT, ONE_LENGTHSCALE = "exact GP", "FunBaT-CP, one lengthscale"
PROCESSES = (EXACT, "GPTF")  # of the coordinates; of learned embeddings of discrete indices


@dataclasses.dataclass(frozen=True)
class Method:
  """One contestant.

  Attributes:
    fit: (train, test, value, rank) -> {"mean": of the test observations, and if it has them "variance" and the
      errors by epoch "train_rmse", "test_rmse"}.
    value: what `values` regularise; they are traced, `ranks` static.
    alone: one fold at a time whatever `config.together` says: a batch of large factorisations runs unblocked on a GPU.
  """

  fit: Callable
  ranks: tuple = (0,)
  values: tuple = (0.0,)
  value: str = ""
  alone: bool = False


def compare(config, sets: dict, workdir: Path, console) -> dict:
  """{data set: {method: its `measure`}}, each a part of the run."""
  methods = contestants(config)
  for name in config.methods:
    require_choice("an entry of config.methods", name, methods)
  fits = lambda name, folds: name != EXACT or len(folds[0][0].y) <= config.baselines.gp_limit
  jobs = [(where, name) for where, folds in sets.items() for name in config.methods or methods if fits(name, folds)]

  def one(job):
    where, name = job
    together = config.together and not methods[name].alone
    return results.part(workdir, f"method.{where}.{name}", lambda: measure(methods[name], sets[where], together))

  table, rows = {where: {} for where in sets}, overlapped(one, jobs)
  for where, name in console.track("methods", jobs):
    table[where][name] = next(rows)
  return table


def measure(method: Method, folds, together: bool) -> dict:
  """The choice with the least error on the held-out tenth, and the errors it gives on the folds' test sets.

  Args:
    together: all folds and all values as one batch; else one after another.
  """

  @functools.partial(jax.jit, static_argnames="rank")
  def run(train, test, values, *, rank):
    """Folds times values, the folds slowest."""

    def one(at):
      fold = jax.tree.map(lambda a: a[at // len(values)], (train, test))
      return scores(method.fit(*fold, values[at % len(values)], rank), fold[1])

    # Products of float32 matrices default to fewer bits on accelerators than a regression needs.
    with jax.default_matmul_precision("highest"):
      every = jnp.arange(len(train.y) * len(values))
      return jax.vmap(one)(every) if together else jax.lax.map(one, every)

  best, epoch, held_out = (method.ranks[0], method.values[0]), None, None
  if len(method.ranks) * len(method.values) > 1:
    problem = stacked([hold_out(folds[0][0])])
    table = {rank: run(*problem, jnp.asarray(method.values), rank=rank) for rank in method.ranks}
    least = {rank: np.nan_to_num(np.asarray(row["rmse"]), nan=np.inf) for rank, row in table.items()}
    rank = min(least, key=lambda rank: least[rank].min())
    at = int(least[rank].argmin())
    best, held_out = (rank, method.values[at]), float(least[rank][at])
    if "test_rmse" in table[rank]:
      epoch = int(np.argmin(table[rank]["test_rmse"][at]))
  row = jax.tree.map(np.asarray, run(*stacked(folds), jnp.asarray([best[1]]), rank=best[0]))
  history = row.pop("test_rmse", None)
  if epoch is not None:
    row["rmse_at_chosen_epoch"] = history[:, epoch]
  lengthscale = row.pop("lengthscale", None)
  summary = {
    name: {"mean": float(values.mean()), "std": float(values.std()), "folds": values.tolist()}
    for name, values in row.items()
  }
  chosen = {method.value: best[1], "rank": best[0]} if method.value else {}
  chosen |= {} if epoch is None else {"epoch": epoch + 1}
  chosen |= {} if lengthscale is None else {"lengthscale": np.median(lengthscale, 0).tolist()}
  return {"chosen": chosen, "held_out_rmse": held_out, "errors": summary}


def scores(fitted: dict, test: funbat.Data) -> dict:
  """Errors at the last epoch, also on the training entries, coverage, and what early stopping by the latter gives."""
  gap = fitted["mean"] - test.y
  row = {"rmse": jnp.sqrt(jnp.mean(gap**2)), "mae": jnp.mean(jnp.abs(gap))}
  if "variance" in fitted:
    row["coverage_95"] = jnp.mean(jnp.abs(gap) < 1.96 * jnp.sqrt(fitted["variance"]))
    stop = funbat.stopping_epoch(fitted["train_rmse"])
    row |= {"stopping_epoch": stop, "rmse_at_stopping_epoch": fitted["test_rmse"][stop - 1]}
    row["rmse_of_training"] = fitted["train_rmse"][-1]
  return row | {name: fitted[name] for name in ("test_rmse", "lengthscale", "unsettled") if name in fitted}


def hold_out(data: funbat.Data):
  """A random tenth of the observations apart, on the same grids."""
  order = np.random.default_rng(0).permutation(len(data.y))
  cut = len(order) // 10
  return funbat.take(data, order[cut:]), funbat.take(data, order[:cut])


def stacked(pairs) -> tuple[funbat.Data, funbat.Data]:
  """Folds of one size on the same grids, along a leading axis."""
  return tuple(jax.tree.map(lambda *parts: jnp.stack(parts), *side) for side in zip(*pairs, strict=True))


def contestants(config) -> dict[str, Method]:
  f, b, key = config.funbat, config.baselines, jax.random.key(config.seed)
  bayes = dict(ranks=tuple(f.ranks), values=tuple(f.variances), value="variance")
  ridge = dict(ranks=tuple(f.ranks), values=tuple(b.ridges), value="ridge")
  table = {"mean": Method(lambda train, test, value, rank: {"mean": jnp.full_like(test.y, train.y.mean())})}
  for kernel, names in ((f.kernel, FUNCTIONAL), ("white", DISCRETE)):
    for model, name in zip(("cp", "tucker"), names, strict=True):
      table[name] = Method(functools.partial(_bayes, config, kernel, model), **bayes)
  table[ONE_LENGTHSCALE] = Method(functools.partial(_one_lengthscale, config), **bayes)
  for model, name in zip(("cp", "tucker"), ALS, strict=True):
    table[name] = Method(functools.partial(_als, config, model), **ridge)
  smooth = dict(values=tuple(itertools.product(b.ridges, b.lengthscales)), value="ridge and lengthscale")
  table["GP on CP-ALS factors"] = Method(functools.partial(_smoothed_als, config), **ridge | smooth)
  for kind in baselines.BASES:
    table[f"{kind} factors"] = Method(functools.partial(_basis, config, kind), **ridge)

  def regression(inputs, fit, **options):
    levels = lambda data: {} if inputs is coordinates else {"levels": tuple(map(len, data.grids))}
    return Method(
      lambda train, test, value, rank: fit(inputs(train), train.y, inputs(test), key, value, **levels(train)),
      **options,
    )

  rates = dict(values=tuple(b.rates), value="rate")
  sparse = functools.partial(baselines.sparse_gp, inducing=b.inducing, steps=b.gp_steps)
  exact = functools.partial(baselines.gp, points=b.gp_points, steps=b.gp_steps)
  return table | {
    "MLP": regression(coordinates, functools.partial(baselines.mlp, steps=b.mlp_steps), **rates),
    "sparse GP": regression(coordinates, sparse, **rates),
    "GPTF": regression(lambda data: data.index, sparse, **rates),
    EXACT: regression(coordinates, exact, alone=True, values=(0.1,)),
  }


def coordinates(data: funbat.Data):
  return jnp.stack([g[data.index[:, k]] for k, g in enumerate(data.grids)], 1)


def _settings(config, kernel, model, variance, rank) -> Settings:
  f = config.funbat
  return Settings(rank=rank, model=model, kernel=kernel, variance=variance, damping=tuple(f.damping), scan=f.scan)


def _bayes(config, kernel, model, train, test, variance, rank):
  """The model with lengthscales by evidence; a white kernel has none, but the same starts, and so the same care."""
  f, settings = config.funbat, _settings(config, kernel, model, variance, rank)
  options = dict(epochs=f.epochs, rounds=f.rounds, starts=f.starts, test=test)
  state, lengthscale, history = funbat.learn(train, settings, jax.random.key(config.seed), **options)
  mean, variance = funbat.predict_on_grid(state, test.index, settings)
  learned = {} if kernel == "white" else {"lengthscale": lengthscale}
  return {"mean": mean, "variance": variance} | learned | history


def _one_lengthscale(config, train, test, variance, rank):
  settings = dataclasses.replace(
    _settings(config, config.funbat.kernel, "cp", variance, rank), lengthscale=config.funbat.lengthscale
  )
  state, history = funbat.fit(train, settings, jax.random.key(config.seed), epochs=config.funbat.epochs, test=test)
  mean, variance = funbat.predict_on_grid(state, test.index, settings)
  return {"mean": mean, "variance": variance} | history


def _als(config, model, train, test, ridge, rank):
  key, sweeps = jax.random.key(config.seed), config.baselines.sweeps
  factors, core = baselines.als(train, key, rank=rank, ridge=ridge, sweeps=sweeps, model=model)
  return {"mean": baselines.multilinear(factors, core, test.index)}


def _smoothed_als(config, train, test, value, rank):
  key, f = jax.random.key(config.seed), config.funbat
  factors, core = baselines.als(train, key, rank=rank, ridge=value[0], sweeps=config.baselines.sweeps, model="cp")
  prior = dict(kernel=f.kernel, lengthscale=value[1], variance=1.0, scan=f.scan)
  factors = baselines.smoothed_factors(train, factors, core, **prior)
  return {"mean": baselines.multilinear(factors, core, test.index)}


def _basis(config, kind, train, test, ridge, rank):
  b, key = config.baselines, jax.random.key(config.seed)
  bases = [baselines.basis(grid, kind=kind, size=b.basis) for grid in train.grids]
  factors, core = baselines.basis_als(train, bases, key, rank=rank, ridge=ridge, sweeps=b.sweeps)
  return {"mean": baselines.multilinear(factors, core, test.index)}


def mine(rows: dict) -> str | None:
  """FunBaT's variant that is better on held-out training data, not on the test sets."""
  held_out = {name: rows[name]["held_out_rmse"] or 0.0 for name in FUNCTIONAL if name in rows}
  return min(held_out, key=held_out.get, default=None)


def best(rows: dict, names) -> str | None:
  """The one of them that is best on the test sets: rivals are given that."""
  errors = {name: rmse(rows, name)["mean"] for name in names if name in rows}
  return min(errors, key=errors.get, default=None)


def rmse(rows: dict, name: str) -> dict:
  return rows[name]["errors"]["rmse"]


def claims(config, comparison: dict, density: dict) -> list[Claim]:
  """FunBaT against the best of each kind, every one the worst over the data sets; sparse and dense tensors apart."""
  made = []

  def margins(names, keep):
    """Standard deviations over folds, of the two the larger, by which FunBaT is below the best of `names`."""
    found = {}
    for where, rows in comparison.items():
      ours, rival = mine(rows), best(rows, names)
      if ours and rival and keep(where):
        a, b = rmse(rows, ours), rmse(rows, rival)
        # Two digits: a result's metrics are rounded, and the claims must follow from them.
        margin = round((b["mean"] - a["mean"]) / max(a["std"], b["std"], 1e-12), 2)
        errors = f"{where}: {ours} {a['mean']:.4f}, {rival} {b['mean']:.4f} ({margin:.2f})"
        # What lies between a rival's errors on training and test entries is all that a prior could take off it.
        if seen := rows[rival]["errors"].get("rmse_of_training"):
          errors += f", on its training entries {seen['mean']:.4f}"
        found[where] = margin, f"{errors}; {chosen(rows, ours)}; {chosen(rows, rival)}"
    return found

  def add(name, better, threshold, unit, found, baseline):
    if not found:
      return
    at = (min if better == "higher" else max)(found, key=lambda where: found[where][0])
    of = f"worst of {len(found)} data sets" if len(found) > 1 else at
    note = "; ".join(note for _, note in found.values())
    made.append(Claim(f"{name}, {of}", unit, better, found[at][0], threshold, baseline=baseline, note=note))

  sparse, dense = (lambda where: density[where] < SPARSE), (lambda where: density[where] >= SPARSE)
  folds = f"{config.data.folds} folds"
  below = "Standard deviations over folds by which FunBaT's error is below the best"
  discrete = f"{below} with discrete factors and the same inference"
  add(f"{discrete}, under {SPARSE:.0%} of the entries seen", "higher", 2.0, "std", margins(DISCRETE, sparse), folds)
  add(f"{discrete}, more seen", "higher", 2.0, "std", margins(DISCRETE, dense), folds)
  squares = f"{below} by least squares, under {SPARSE:.0%} of the entries seen"
  add(squares, "higher", 2.0, "std", margins(ALS, sparse), folds)
  above = {where: (-margin, note) for where, (margin, note) in margins(PROCESSES, lambda where: True).items()}
  name = "Standard deviations over folds by which FunBaT's error is above the best Gaussian process'"
  add(name, "lower", 1.0, "std", above, folds)
  ratio, inside = {}, {}
  for where, rows in comparison.items():
    if "FunBaT-CP" in rows and ONE_LENGTHSCALE in rows:
      a, b = rmse(rows, "FunBaT-CP")["mean"], rmse(rows, ONE_LENGTHSCALE)["mean"]
      ratio[where] = round(a / b, 3), f"{where}: {a:.4f} against {b:.4f}"
    if ours := mine(rows):
      share = rows[ours]["errors"]["coverage_95"]["mean"]
      inside[where] = share, f"{where}: {share:.3f} by {ours}"
  one = f"FunBaT-CP, {config.funbat.lengthscale:g} of every mode's range"
  add("Error with a lengthscale a mode by evidence over that with one for all", "lower", 1.0, "ratio", ratio, one)
  add("Share of test entries inside their 95 % intervals", "higher", 0.9, "", inside, 0.95)
  return made


def chosen(rows: dict, name: str) -> str:
  """What a method chose on the held-out tenth of the first fold's training set."""
  text = lambda value: " / ".join(f"{v:.3g}" for v in value) if isinstance(value, list | tuple) else f"{value:g}"
  choice = rows[name]["chosen"]
  return f"{name} chose " + (", ".join(f"{key} {text(value)}" for key, value in choice.items()) or "nothing")


def finding(comparison: dict) -> str:
  parts = []
  for where, rows in comparison.items():
    ours = mine(rows)
    others = {
      "discrete": best(rows, DISCRETE),
      "least squares": best(rows, ALS),
      "Gaussian process": best(rows, PROCESSES),
    }
    text = ", ".join(f"{kind} {rmse(rows, name)['mean']:.3f}" for kind, name in others.items() if name)
    if ours:
      parts.append(f"{rmse(rows, ours)['mean']:.3f} on {where} ({text})")
  return "Error in standard deviations: " + "; ".join(parts) if parts else ""


def draw(comparison: dict, workdir: Path) -> dict[str, str]:
  figure, axes = figures.subplots(len(comparison), squeeze=False, width=1.2)
  for axis, (where, rows) in zip(axes[0], comparison.items(), strict=True):
    names = sorted(rows, key=lambda name: -rmse(rows, name)["mean"])
    mean, std = ([min(rmse(rows, name)[key], 1.2) for name in names] for key in ("mean", "std"))
    color = ["C0" if name in FUNCTIONAL else "0.7" for name in names]
    axis.barh(names, mean, xerr=std, color=color, error_kw=dict(lw=1))
    axis.grid(axis="y", alpha=0)
    axis.set(xlabel="test error (standard deviations of y)", title=where.replace("_", " "))
  return {figures.save(figure, workdir, "comparison"): "Test error by method, mean and deviation over folds"}
