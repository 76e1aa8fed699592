"""MAKER on the Towers of Hanoi: a small trained step model, votes on every step, and the laws that foretell both.

A module here is a part of the run: `training` makes the model, `sampling` draws from it, `voting` runs whole towers,
`flags` looks at over-long samples, `multiplication` at the recursive form.
"""

import functools
import math
from pathlib import Path

import numpy as np

from experiments import results
from experiments.maker import flags, multiplication, speed, training, voting
from experiments.maker.drawing import draw
from experiments.maker.voting import MAIN, SCHEMES, voted_eps
from experiments.report import rounded
from experiments.results import Claim
from jaxlab.core.checks import require
from jaxlab.tasks import maker

__all__ = ["claims", "draw", "finding", "measure"]

GROWTH = {"s ln s": lambda s: s * math.log(s), "s": lambda s: s, "s^2": lambda s: s * s}
PLAIN, WARM = "as published", "renamed, temperature 1"
RIVALS = ("first to k", "majority", "repairing", "one vote")


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Trains, measures error rates, and votes; what the workdir holds is not done again."""
  require(config.disks % 2 == 0 and config.disks >= 4, f"disks is {config.disks}; it must be even, 4 or more")
  stages = [f"{stage}" for stage in config.train.stages]
  require(f"{config.main}" in stages, f"main is {config.main}; it must be one of the stages {', '.join(stages)}")
  part = functools.partial(results.part, workdir)

  @functools.cache
  def models() -> dict:
    return dict(zip(stages, training.stages(config, workdir / "model", console), strict=True))

  found = {"stages": {}}
  main = f"{config.main}"
  for stage in stages:
    measured = SCHEMES if stage == main else (MAIN, PLAIN)
    rates = functools.partial(error_rates, config, models, stage, measured, console)
    found["stages"][stage] = part(f"rates.{stage}", rates)
  margin = found["stages"][main]["schemes"][MAIN]["margin"]
  require(margin is not None, f"after {main} steps half of all samples are wrong; train longer (train.stages)")

  def run(name, stage=main, **options):
    console.say(f"runs: {name}")
    options = dict(margin=margin, seeds=config.few_seeds) | options
    return part(f"run.{name.replace(' ', '_')}", lambda: voting.run(config, models()[stage], **options))

  seeds = {margin: config.seeds, margin - 1: config.less_seeds}
  by_steps = found["stages"][main]["schemes"][MAIN]["margin_of_steps"]
  seeds[by_steps] = config.seeds
  found["runs"] = {
    f"{MAIN}, k = {k}": run(f"{MAIN}, k = {k}", margin=k, seeds=seeds.get(k, config.few_seeds))
    for k in margins(config, margin, by_steps)
  }
  for scheme in SCHEMES:
    k = found["stages"][main]["schemes"][scheme]["margin"]
    if scheme != MAIN and k is not None:
      found["runs"][scheme] = run(scheme, scheme=scheme, margin=k)
  for stage in stages:
    for scheme, rates in found["stages"][stage]["schemes"].items():
      if stage != main and rates["margin"] is not None:
        name = f"after {stage} steps, {scheme}"
        found["runs"][name] = run(name, stage, scheme=scheme, margin=rates["margin"])
  whole = found["runs"][f"{MAIN}, k = {margin}"]
  per_step = whole["votes"]
  found["rivals"] = {
    "first to k": run("first to k", rule="first"),
    "majority": run("majority", rule="majority", margin=max(1, round(per_step))),
    "repairing": run("repairing", forgiving=True),
  }
  found["agents"] = {}
  eps, steps = found["stages"][main]["schemes"][MAIN]["mean"], voting.steps_of(config)
  for m in config.agent_steps:
    k = maker.k_min(eps, target=config.target, steps=steps, m=m)
    found["agents"][f"{m}"] = {"margin": k} | (whole if m == 1 else run(f"agents of {m}", margin=k, m=m))
  found["length"] = [
    whole if n == config.disks else run(f"{2**n - 1} steps", **length(config, found, main, n)) for n in config.lengths
  ]
  found["flags"] = part("flags", lambda: flags.measure(config, workdir / "rambling", console))
  found["multiplication"] = part("multiplication", lambda: {"rows": multiplication.measure(config)})["rows"]
  if config.loop_steps:
    found["speed"] = part("speed", lambda: speed.measure(config, models()[main], margin))
  return rounded(found)


def margins(config, margin: int, by_steps: int | None) -> list[int]:
  """Those of the curve, what decides first: k_min, one less, the steps' own, then others near; 1 is always there."""
  near = range(margin + config.curve.beyond, max(0, margin - config.curve.below - 1), -1)
  return [k for k in dict.fromkeys((margin, margin - 1, by_steps or margin, *near, 1)) if k >= 1]


def length(config, found, main: str, disks: int) -> dict:
  """The run of as many steps as towers of `disks` take: its own margin, and enough runs to see their mean cost."""
  steps = 2**disks - 1
  k = maker.k_min(found["stages"][main]["schemes"][MAIN]["mean"], target=config.target, steps=steps)
  return dict(margin=k, steps=steps, seeds=max(1, config.few_seeds * (voting.steps_of(config) // steps)))


def error_rates(config, models, stage: str, schemes, console) -> dict:
  """By scheme how error rates are distributed, and by the number of disks their mean."""
  console.say(f"error rates of single samples, stage {stage}")
  by_disks, model = {}, models()[stage]
  for disks in range(training.LEAST, config.disks + 1):
    rng = np.random.default_rng(disks)
    steps = rng.integers(0, 2**disks - 1, config.rates.flat)
    by_disks[f"{disks}"] = float(voting.rates(config, model, WARM, step=steps, disks=disks, draws=1).mean())
  return {"by_disks": by_disks, "schemes": {scheme: voting.spread(config, model, scheme) for scheme in schemes}}


def at_margin(config, metrics: dict) -> dict:
  """The main runs at k_min."""
  return metrics["runs"][f"{MAIN}, k = {metrics['stages'][f'{config.main}']['schemes'][MAIN]['margin']}"]


def one_less(config, metrics: dict) -> dict:
  """The main runs at one vote less than k_min, or at k_min where that is 1."""
  return metrics["runs"][f"{MAIN}, k = {max(1, at_margin(config, metrics)['margin'] - 1)}"]


def law(config, metrics: dict, run: dict) -> float:
  """Success that the law foretells from the mean error rate of votes."""
  return maker.success(voted_eps(config, metrics, run), run["margin"], run["steps"])


def growth(metrics: dict) -> dict[str, float]:
  """By form of growth, the standard deviation of log(cost / form) over the lengths."""
  rows = [(row["steps"], row["steps"] * row["samples"]) for row in metrics["length"]]
  return {name: float(np.std([math.log(cost / form(s)) for s, cost in rows])) for name, form in GROWTH.items()}


def told(run: dict) -> str:
  return f"k = {run['margin']}: {run['success']:.0%} of {run['seeds']} runs, {run['samples']:.3g} samples a step"


def told_rates(rates: dict) -> str:
  """Error rates of a scheme in words."""
  return (
    f"mean {rates['mean']:.3g}, largest {rates['max']:.3g}, 1/2 or more at {rates['fatal']:.2g} of steps, two votes "
    f"correlated by {rates['correlation']:.2g}"
  )


def early_success(metrics: dict, stage: str) -> dict[str, float]:
  """By scheme; 0 where half of all samples are wrong and there is no margin to run at."""
  runs = metrics["runs"]
  return {scheme: runs.get(f"after {stage} steps, {scheme}", {"success": 0.0})["success"] for scheme in (MAIN, PLAIN)}


def claims(config, metrics: dict) -> list[Claim]:
  main, less = at_margin(config, metrics), one_less(config, metrics)
  stage = metrics["stages"][f"{config.main}"]
  schemes, eps = stage["schemes"], stage["schemes"][MAIN]
  own = metrics["runs"][f"{MAIN}, k = {eps['margin_of_steps'] or main['margin']}"]
  plain = metrics["runs"].get(PLAIN)
  expected = maker.expected_votes(voted_eps(config, metrics, main), main["margin"])
  flat, fits = stage["by_disks"], growth(metrics)
  flagged, free = (metrics["flags"][name] for name in ("flagged", "unflagged"))
  earlier = {s: early_success(metrics, s) for s in metrics["stages"] if s != f"{config.main}"}
  best_rival = min(fits[name] for name in fits if name != "s ln s")
  agents, rows = metrics["agents"], metrics["multiplication"]
  most, longest = max(agents, key=int), max(row["digits"] for row in rows)
  solved = {row["votes"]: row["right"] for row in rows if row["digits"] == longest}
  made = [
    Claim(
      f"Share of runs of {main['steps']} steps without one wrong step at the margin that the law gives", "", "higher",
      ours=main["success"], threshold=0.9, paper=1.0,
      baseline="votes on the question as it is: " + (told(plain) if plain else "half of all samples wrong"),
      note=f"{told(main)}, mean error rate {eps['mean']:.3g}, target {config.target}; {sum(main['wrong'])} wrong "
      f"steps in all; at the margin of the steps' own error rates {told(own)}",
    ),
    Claim(
      "How far success at one vote less is from what the law foretells", "", "lower",
      ours=abs(less["success"] - law(config, metrics, less)), threshold=0.2,
      baseline=f"the law: {law(config, metrics, less):.3g}",
      note=f"{told(less)}; error rate of votes {voted_eps(config, metrics, less):.3g}; by every step's own error rate, "
      f"flags as errors, {eps['law'].get(str(less['margin']), 0):.3g}; {sum(less['wrong'])} wrong steps in all",
    ),
    Claim(
      "Votes a step over those of the law, distance from 1", "", "lower", ours=abs(main["votes"] / expected - 1),
      threshold=0.02, baseline=f"{expected:.4g} votes", note=f"{main['votes']:.4g} votes at k = {main['margin']}",
    ),
    Claim(
      "Largest error rate of a step once pegs and disks get other names for every sample", "", "lower", ours=eps["max"],
      threshold=0.5, baseline=f"asked as it is {schemes[PLAIN]['max']:.3g}",
      note="; ".join(f"{name}: {told_rates(s)}" for name, s in schemes.items()),
    ),
    Claim(
      "What other names add to success after less training, worst stage", "points", "higher",
      ours=100 * min(after[MAIN] - after[PLAIN] for after in earlier.values()), threshold=0.0,
      baseline="; ".join(f"after {s} steps {after[PLAIN]:.3g}" for s, after in earlier.items()),
      note="; ".join(
        f"after {s} steps, {scheme}: {early[scheme]:.0%}, {told_rates(metrics['stages'][s]['schemes'][scheme])}"
        for s, early in earlier.items() for scheme in early
      ),
    ),
    Claim(
      "Error rate of a step with the most disks over that with the fewest, at temperature 1", "x", "lower",
      ours=flat[f"{config.disks}"] / max(flat[f"{training.LEAST}"], 1e-12), threshold=2.0, paper=1.0,
      baseline=f"{training.LEAST} disks: {flat[f'{training.LEAST}']:.3g}",
      note=", ".join(f"{n}: {value:.2g}" for n, value in flat.items()),
    ),
    Claim(
      "Misfit of cost growing as s ln s over that of s or s^2, the better of them", "", "lower",
      ours=fits["s ln s"] / max(best_rival, 1e-12), threshold=1.0,
      baseline=", ".join(f"{name} {value:.3g}" for name, value in fits.items()),
      note="standard deviations of log(cost / form); samples a step by length: "
      + ", ".join(
        f"{r['steps']}: {r['samples']:.3g} ({r['success']:.0%} of {r['seeds']} runs right)" for r in metrics["length"]
      ),
    ),
    Claim(
      "Steps whose first two votes are both wrong with a limit on length, over those without", "", "lower",
      ours=flagged["collisions"] / max(free["collisions"], 1e-12), threshold=0.5,
      baseline=f"{free['collisions']:.3g} of steps",
      note=f"error rate {flagged['eps']:.3g} with the limit, {free['eps']:.3g} without; two independent votes would "
      f"collide in {flagged['eps'] ** 2:.2g} and {free['eps'] ** 2:.2g}; {flagged['share']:.0%} of samples too long",
    ),
    Claim(
      f"Samples for as many steps by agents of {most} steps, over those by agents of one", "x", "higher",
      ours=relative_cost(metrics, most), threshold=1.0,
      baseline=f"the law: {predicted_cost(config, metrics, int(most)):.3g}",
      note="; ".join(f"m = {m}: {relative_cost(metrics, m):.3g}x, {told(run)}" for m, run in agents.items()),
    ),
    Claim(
      "Success of the best of four rivals over that of the votes of one answer ahead", "", "lower",
      ours=max(rival(config, metrics, name)["success"] for name in RIVALS) / max(main["success"], 1e-12), threshold=1.0,
      baseline="first to k, majority of as many votes, repaired samples, one vote",
      note="; ".join(f"{name}: {told(rival(config, metrics, name))}" for name in RIVALS),
    ),
    Claim(
      f"Share of {longest}-digit products right by the recursive form with votes, of agents that err", "", "higher",
      ours=solved[max(solved)], threshold=0.9, baseline=f"without votes {solved[1]:.3g}",
      note=f"error rate {config.multiplication.eps}; "
      + "; ".join(
        f"{r['digits']} digits, {r['votes']} votes: {r['right']:.3g} at {r['samples']:.3g} samples" for r in rows
      ),
    ),
  ]  # fmt: skip
  return made + speed_claims(metrics)


def rival(config, metrics: dict, name: str) -> dict:
  return metrics["runs"][f"{MAIN}, k = 1"] if name == "one vote" else metrics["rivals"][name]


def relative_cost(metrics: dict, m: str) -> float:
  """Samples times steps each, a step of the task, over those of agents of one step."""
  return metrics["agents"][m]["samples"] / metrics["agents"]["1"]["samples"]


def predicted_cost(config, metrics: dict, m: int) -> float:
  mean = metrics["stages"][f"{config.main}"]["schemes"][MAIN]["mean"]
  cost = lambda m: maker.expected_cost(mean, target=config.target, steps=voting.steps_of(config), m=m)
  return cost(m) / cost(1)


def speed_claims(metrics: dict) -> list[Claim]:
  if "speed" not in metrics:
    return []
  s = metrics["speed"]
  return [
    Claim(
      f"Seconds for one run of {s['steps']} steps", "s", "lower", ours=s["seconds"], threshold=600.0,
      baseline=f"one sample after the other: {s['loop_seconds']:.3g} s (from {s['loop_steps']} steps), "
      f"{s['loop_rate']:.3g} samples a second",
      note=f"k = {s['margin']}, {s['rate']:.4g} samples a second, {s['width']} at once; runs without a wrong step: "
      f"{s['success']:.0%}",
    ),
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  main, less = at_margin(config, metrics), one_less(config, metrics)
  eps = metrics["stages"][f"{config.main}"]["schemes"][MAIN]
  plain = metrics["runs"].get(PLAIN)
  asked = f"{plain['success']:.0%} at k = {plain['margin']}" if plain else "no margin is enough"
  return (
    f"{main['success']:.0%} of {main['seeds']} runs of {main['steps']} steps have no wrong step at k = "
    f"{main['margin']} (paper: the one run it makes), {less['success']:.0%} at k = {less['margin']} (law "
    f"{law(config, metrics, less):.0%}), with an error rate of {eps['mean']:.3g} a sample and other names for pegs and "
    f"disks in each; asked without them {asked}."
  )
