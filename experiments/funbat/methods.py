"""FunBaT against its baselines: every method chooses on a tenth of the first fold's training set, all folds follow."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results
from experiments.funbat import baselines
from experiments.overlap import overlapped
from jaxlab.core.checks import require_choice
from jaxlab.tensors import funbat
from jaxlab.tensors.funbat import Settings

FUNCTIONAL, DISCRETE, ALS = ("FunBaT-CP", "FunBaT"), ("discrete CP", "discrete Tucker"), ("CP-ALS", "P-Tucker")


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


def compare(config, folds, workdir: Path, console) -> dict:
  """{method: its `measure`}, each a part of the run."""
  methods = contestants(config)
  for name in config.methods:
    require_choice("an entry of config.methods", name, methods)
  wanted = config.methods or [
    name for name in methods if name != "exact GP" or len(folds[0][0].y) <= config.baselines.gp_limit
  ]
  one = lambda name: results.part(
    workdir, f"method.{name}", lambda: measure(methods[name], folds, config.together and not methods[name].alone)
  )
  return dict(zip(wanted, console.track("methods", overlapped(one, wanted)), strict=True))


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
  row.pop("train_rmse", None)
  if epoch is not None:
    row["rmse_at_chosen_epoch"] = history[:, epoch]
  summary = {
    name: {"mean": float(values.mean()), "std": float(values.std()), "folds": values.tolist()}
    for name, values in row.items()
  }
  chosen = {method.value: best[1], "rank": best[0]} if method.value else {}
  chosen |= {} if epoch is None else {"epoch": epoch + 1}
  return {"chosen": chosen, "held_out_rmse": held_out, "errors": summary} | (
    {} if history is None else {"history": history.mean(0).tolist()}
  )


def scores(fitted: dict, test: funbat.Data) -> dict:
  """Errors at the last epoch, coverage, and what early stopping by the training error gives."""
  gap = fitted["mean"] - test.y
  row = {"rmse": jnp.sqrt(jnp.mean(gap**2)), "mae": jnp.mean(jnp.abs(gap))}
  if "variance" in fitted:
    row["coverage_95"] = jnp.mean(jnp.abs(gap) < 1.96 * jnp.sqrt(fitted["variance"]))
    stop = funbat.stopping_epoch(fitted["train_rmse"])
    row |= {"stopping_epoch": stop, "rmse_at_stopping_epoch": fitted["test_rmse"][stop - 1]}
    row |= {name: fitted[name] for name in ("train_rmse", "test_rmse")}
  return row


def hold_out(data: funbat.Data):
  """A random tenth of the observations apart, on the same grids."""
  order = np.random.default_rng(0).permutation(len(data.y))
  cut = len(order) // 10
  part = lambda at: funbat.Data(data.grids, data.index[at], data.y[at])
  return part(order[cut:]), part(order[:cut])


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
      table[name] = Method(functools.partial(_bayes, config, kernel, model, None), **bayes)
  table["FunBaT-CP, extra prior"] = Method(functools.partial(_bayes, config, f.kernel, "cp", 1.0), **bayes)
  for model, name in zip(("cp", "tucker"), ALS, strict=True):
    table[name] = Method(functools.partial(_als, config, model, False), **ridge)
  table["GP on CP-ALS factors"] = Method(functools.partial(_als, config, "cp", True), **ridge)
  for kind in baselines.BASES:
    table[f"{kind} factors"] = Method(functools.partial(_basis, config, kind), **ridge)
  points = lambda data: jnp.stack([g[data.index[:, k]] for k, g in enumerate(data.grids)], 1)

  def regression(inputs, fit, **options):
    levels = lambda data: {} if inputs is points else {"levels": tuple(map(len, data.grids))}
    return Method(
      lambda train, test, value, rank: {"mean": fit(inputs(train), train.y, inputs(test), key, **levels(train))},
      **options,
    )

  sparse = functools.partial(baselines.sparse_gp, inducing=b.inducing, steps=b.gp_steps)
  exact = functools.partial(baselines.gp, points=b.gp_points, steps=b.gp_steps)
  return table | {
    "MLP": regression(points, functools.partial(baselines.mlp, steps=b.mlp_steps)),
    "sparse GP": regression(points, sparse),
    "GPTF": regression(lambda data: data.index, sparse),
    "exact GP": regression(points, lambda *arrays: exact(*arrays)[0], alone=True),
  }


def _bayes(config, kernel, model, extra_prior, train, test, variance, rank):
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
  state, history = funbat.fit(train, settings, jax.random.key(config.seed), epochs=f.epochs, test=test)
  mean, variance = funbat.predict_on_grid(state, test.index, settings)
  return {"mean": mean, "variance": variance} | history


def _als(config, model, smooth, train, test, ridge, rank):
  key, sweeps = jax.random.key(config.seed), config.baselines.sweeps
  factors, core = baselines.als(train, key, rank=rank, ridge=ridge, sweeps=sweeps, model=model)
  if smooth:
    f = config.funbat
    factors = baselines.smoothed_factors(
      train, factors, core, kernel=f.kernel, lengthscale=f.lengthscale, variance=1.0, scan=f.scan
    )
  return {"mean": baselines.multilinear(factors, core, test.index)}


def _basis(config, kind, train, test, ridge, rank):
  b, key = config.baselines, jax.random.key(config.seed)
  bases = [baselines.basis(grid, kind=kind, size=b.basis) for grid in train.grids]
  factors, core = baselines.basis_als(train, bases, key, rank=rank, ridge=ridge, sweeps=b.sweeps)
  return {"mean": baselines.multilinear(factors, core, test.index)}
