"""Runs of all steps side by side: how many go without one wrong step, and at what price."""

import time

import jax
import numpy as np

from experiments.maker import sampling
from jaxlab.core.checks import require
from jaxlab.tasks import maker

# Temperature of a step's first sample and of the others, and of what names are drawn.
SCHEMES = {
  "as published": dict(first=0.0, rest=0.1, renamed="nothing"),
  "temperature 1": dict(renamed="nothing"),
  "renamed, temperature 1": dict(renamed="pegs and disks"),
  "renamed": dict(first=0.0, rest=0.1, renamed="pegs and disks"),
}
MAIN = "renamed"


def steps_of(config) -> int:
  return 2**config.disks - 1


def rates(config, model, scheme: str, *, step, disks: int, draws: int) -> np.ndarray:
  """float64[steps]: the error rate of each of these steps of a tower of `disks`, the mean over `draws` of names."""
  chosen = sampling.agent(config, model, **SCHEMES[scheme], period=steps_of(config))
  size, found = config.rates.batch, []
  computing = sampling.cast(model, config.dtype)
  step, disks = np.broadcast_arrays(np.asarray(step, np.int32), np.asarray(disks, np.int32))
  for at in range(0, len(step), size):
    pad = lambda a: np.resize(a[at : at + size], size)  # noqa: B023 (used at once)
    key = jax.random.fold_in(jax.random.key(config.seed), at)
    options = dict(draws=draws, disks=config.disks, names=config.names)
    found.append(sampling.error_rates(computing, chosen, pad(step), pad(disks), key, **options))
  return np.concatenate([np.asarray(part, float) for part in found])[: len(step)]


def spread(config, model, scheme: str) -> dict:
  """How a scheme's error rates are distributed over the steps of a run, and the margins two laws ask for."""
  steps = steps_of(config)
  at = np.unique(np.linspace(0, steps - 1, min(steps, config.rates.steps)).astype(np.int64))
  draws = 1 if SCHEMES[scheme]["renamed"] == "nothing" else config.rates.draws
  eps = np.clip(rates(config, model, scheme, step=at, disks=config.disks, draws=draws), 0, 1)
  mean = float(eps.mean())
  margin = maker.k_min(mean, target=config.target, steps=steps) if mean < 0.5 else None
  return {
    "mean": mean,
    "max": float(eps.max()),
    "fatal": float((eps >= 0.5).mean()),
    # of two votes on a step: the variance of its error rate over that of a vote
    "correlation": float(eps.var() / max(mean * (1 - mean), 1e-300)),
    "quantiles": np.quantile(eps, [0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0]).tolist(),
    "margin": margin,
    "margin_of_steps": margin_of(eps, steps, config),
    "law": {k: by_steps(eps, steps, k) for k in range(1, (margin or 1) + config.curve.beyond + 4)},
  }


def by_steps(eps: np.ndarray, steps: int, k: int) -> float:
  """Success by the law in which every step has its own error rate, from those of some steps."""
  return maker.success_of(eps, k) ** (steps / len(eps))


def margin_of(eps: np.ndarray, steps: int, config) -> int | None:
  """The least margin by that law; None where no margin up to `curve.most` is enough."""
  return next((k for k in range(1, config.curve.most + 1) if by_steps(eps, steps, k) >= config.target), None)


def run(config, model, *, margin: int, seeds: int, scheme=MAIN, steps=None, m=1, rule="ahead", forgiving=False) -> dict:
  """`seeds` runs of the first `steps` steps (all by default) decided side by side."""
  whole = steps_of(config)
  steps = (whole if steps is None else steps) // m
  require(steps >= 1, f"agents of {m} steps do not fit a run of {whole}")
  chosen = sampling.agent(config, model, **SCHEMES[scheme], m=m, period=steps * m, forgiving=forgiving)
  width, start = config.width, time.perf_counter()
  found = maker.decide(
    sampling.item_sample(config.disks, config.names, config.disks + 8),
    chosen,
    steps * seeds,
    margin=margin,
    key=jax.random.key(config.seed + 1),
    width=width,
    rule=rule,
    most=config.most_samples,
    capacity=max(steps_of(config) * config.seeds, steps * seeds),
  )
  seconds = time.perf_counter() - start
  right = np.asarray(sampling.right(chosen, items=whole, disks=config.disks))[:steps]
  wrong = ~(found.said.reshape(seeds, steps, 2) == right).all(axis=-1)
  drawn = int(found.votes.sum() + found.flagged.sum())
  return {
    "margin": margin,
    "steps": steps * m,
    "seeds": seeds,
    "success": float((~wrong.any(axis=1)).mean()),
    "wrong": [int(count) for count in wrong.sum(axis=1)],
    "votes": float(found.votes.mean()),
    "samples": drawn / (steps * seeds),
    "flagged": float(found.flagged.sum() / drawn),
    "capped": found.capped,
    "lost": found.lost,
    "computed": found.samples,
    "seconds": seconds,
    "windows": windows(wrong),
  }


def windows(wrong: np.ndarray) -> dict[str, float]:
  """{n: the share of stretches of 2^n - 1 consecutive steps without a wrong one}, what runs of n disks would be."""
  found = {}
  for disks in range(3, 9):
    size = 2**disks - 1
    if size <= wrong.shape[1]:
      sums = np.cumsum(np.pad(wrong, ((0, 0), (1, 0))), axis=1)
      found[f"{disks}"] = float((sums[:, size:] == sums[:, :-size]).mean())
  return found


def voted_eps(config, metrics: dict, run: dict) -> float:
  """The mean error rate of a sample that was a vote: those with a red flag are wrong too, but do not count."""
  mean = metrics["stages"][f"{config.main}"]["schemes"][MAIN]["mean"]
  return max(0.0, 1 - (1 - mean) / max(1 - run["flagged"], 1e-9))
