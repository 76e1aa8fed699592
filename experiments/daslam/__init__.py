"""DaSLaM: a small decomposer that is rewarded for what a frozen solver makes of its sub-questions.

A module here is a part of the run: `chain` makes problems, `solving` lets solvers and decomposers meet on the device,
`training` makes both.
"""

import functools
from pathlib import Path

import jax
import numpy as np

from experiments import figures, results
from experiments.daslam import solving, training
from experiments.report import rounded
from experiments.results import Claim
from jaxlab.core.checks import require

REWARDS = ("coverage", "consistency", "order", "proximity", "correct")
ALL = dict.fromkeys(REWARDS, 1.0)
OUTCOME = dict.fromkeys(REWARDS, 0.0) | {"correct": 1.0}
TRAINED = "M"  # the solver that decomposers are trained with
ARMS = {
  "taught": "taught alone",
  "ppo": "taught, then rewarded",
  "outcome": "rewarded for right answers alone",
  "blind": "rewarded, without the attempt",
}
_CONDITION = {"blind": "none"}


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Runs all parts; what the workdir holds is not measured again."""
  sizes = tuple(config.solvers)
  require(TRAINED in sizes, f"config.solvers has {', '.join(sizes)}; decomposers are trained with {TRAINED}")
  part = functools.partial(results.part, workdir)
  solver = functools.cache(lambda name: training.solver(config, name, workdir, console))
  alone = lambda name: part(f"solver.{name}", lambda: judged(config, solver(name), None, "none", 0, (1, 2)))
  found = {"solvers": {name: alone(name) for name in sizes}, "arms": {}, "others": {}, "rewards": {}}

  @functools.cache
  def decomposer(arm: str, seed: int):
    condition = _CONDITION.get(arm, "attempt")
    start = training.taught(config, solver(TRAINED), condition, seed, workdir, console)
    if arm == "taught":
      return start, []
    weights = OUTCOME if arm == "outcome" else ALL
    folder = workdir / f"ppo_{arm}_{seed}"
    return training.tuned(config, solver(TRAINED), start, condition, weights, seed, folder, console)

  def of(arm: str, seed: int, size: str):
    return judged(config, solver(size), decomposer(arm, seed)[0], _CONDITION.get(arm, "attempt"), seed)

  seeds = range(config.seed, config.seed + config.seeds)
  for arm in ARMS:
    rows = {f"{s}": part(f"arm.{arm}.{s}", lambda a=arm, s=s: of(a, s, TRAINED)) for s in seeds}
    found["arms"][arm] = rows
  for size in sizes:
    rows = {f"{s}": part(f"transfer.{size}.{s}", lambda z=size, s=s: of("ppo", s, z)) for s in seeds if size != TRAINED}
    found["others"][size] = rows or found["arms"]["ppo"]
  found["rewards"] = {
    arm: part(f"rewards.{arm}", lambda a=arm: thinned(decomposer(a, config.seed)[1])) for arm in ("ppo", "outcome")
  }
  found["oracle"] = {
    size: part(f"oracle.{size}", lambda z=size: judged(config, solver(z), None, "none", config.seed)) for size in sizes
  }
  found["votes"] = part("votes", lambda: votes(config, solver(TRAINED), found))
  both = lambda: judged(config, *[training.both_jobs(config, workdir, console)] * 2, "none", config.seed)
  found["itself"] = part("itself", both)
  return rounded(found)


def judged(config, solver, decomposer, condition: str, seed: int, depths=None) -> dict:
  """{depth: what `solving.evaluated` says}; the same questions for all of a seed."""
  how = dict(count=config.count, modulus=config.modulus, condition=condition, least=config.least)
  key = jax.random.key(10_000 + seed)
  of = lambda depth: solving.evaluated(solver, decomposer, jax.random.fold_in(key, depth), depth=depth, **how)
  return {
    f"{depth}": {name: float(value) for name, value in of(depth).items()} for depth in depths or config.depths.judged
  }


def votes(config, solver, found: dict) -> dict:
  """Self-consistency with as many solver tokens as the rewarded decomposer's episodes take."""
  rows, made = found["arms"]["ppo"][f"{config.seed}"], {}
  for depth in config.depths.judged:
    spent = rows[f"{depth}"]["tokens"]
    one = solving.voted(
      solver, jax.random.key(depth), count=config.count, modulus=config.modulus, depth=depth, samples=1
    )
    samples = max(1, round(spent / max(1.0, float(one["tokens"]))))
    out = solving.voted(
      solver, jax.random.key(depth), count=config.count, modulus=config.modulus, depth=depth, samples=samples
    )
    made[f"{depth}"] = {name: float(value) for name, value in out.items()} | {"samples": samples}
  return made


def thinned(reports: list[dict], points: int = 50) -> dict:
  """{name: means of stretches of rounds}."""
  parts = np.array_split(np.arange(len(reports)), min(points, len(reports)))
  return {name: [float(np.mean([reports[i][name] for i in part])) for part in parts] for name in reports[0]}


def deep(config) -> list[str]:
  """The depths that claims are about: what no solver was trained on."""
  return [f"{depth}" for depth in config.depths.judged if depth >= config.depths.claimed]


def share(rows: dict, depths: list[str], what: str = "right") -> float:
  return float(np.mean([rows[depth][what] for depth in depths]))


def over(by_seed: dict, depths: list[str], what: str = "right") -> float:
  return float(np.mean([share(rows, depths, what) for rows in by_seed.values()]))


def claims(config, metrics: dict) -> list[Claim]:
  depths, arms = deep(config), metrics["arms"]
  right = lambda arm: 100 * over(arms[arm], depths)
  first = 100 * over(arms["ppo"], depths, "first")
  by_depth = lambda rows, what="right": ", ".join(f"{d}: {100 * row[what]:.3g}" for d, row in rows.items())
  one = next(iter(arms["ppo"].values()))
  spread = [100 * (share(arms["ppo"][s], depths) - share(arms["taught"][s], depths)) for s in arms["ppo"]]
  gain = {size: 100 * (over(rows, depths) - over(rows, depths, "first")) for size, rows in metrics["others"].items()}
  others = {size: value for size, value in gain.items() if size != TRAINED}
  largest = list(metrics["solvers"])[-1]
  largest_first = 100 * over(metrics["others"][largest], depths, "first")
  asked = lambda arm: over(arms[arm], depths, "asked")
  vote = 100 * share(metrics["votes"], depths)
  where = f"questions of {depths[0]} to {depths[-1]} steps"
  return [
    Claim(
      f"Right answers with the rewarded decomposer less those with the taught one, {where}", "points", "higher",
      ours=right("ppo") - right("taught"), threshold=8.0, spread=(min(spread), max(spread)), baseline=right("taught"),
      note=f"solver {TRAINED}, {len(spread)} seeds; {by_depth(one)}",
    ),
    Claim(
      "The same less those of the solver alone", "points", "higher", ours=right("ppo") - first, threshold=30.0,
      baseline=first, note=f"alone {by_depth(one, 'first')}",
    ),
    Claim(
      "The same less those of a vote among attempts with as many of the solver's tokens", "points", "higher",
      ours=right("ppo") - vote, threshold=0.0, baseline=vote,
      note=", ".join(f"{d}: {100 * row['right']:.3g} of {row['samples']}" for d, row in metrics["votes"].items()),
    ),
    Claim(
      "Least gain of a solver that the decomposer was not trained with, over that of the one it was", "",
      "higher",
      ours=min(others.values(), default=gain[TRAINED]) / max(gain[TRAINED], 1e-3), threshold=0.6,
      baseline=gain[TRAINED],
      note=", ".join(f"{size} {value:.3g} points" for size, value in gain.items()),
    ),
    Claim(
      f"Right answers of solver {TRAINED} with the decomposer less those of solver {largest} alone", "points", "higher",
      ours=right("ppo") - largest_first, threshold=0.0, baseline=largest_first,
    ),
    Claim(
      "Right answers lost by a decomposer that does not see the attempt", "points", "higher",
      ours=right("ppo") - right("blind"), threshold=0.0, baseline=right("blind"),
      note=f"sub-questions {asked('ppo'):.3g} and {asked('blind'):.3g}",
    ),
    Claim(
      "Right answers with all five rewards less those with that for right answers alone", "points", "higher",
      ours=right("ppo") - right("outcome"), threshold=0.0, baseline=right("outcome"),
    ),
    Claim(
      "Right answers with the decomposer less those of a solver that asks itself, trained for as many steps", "points",
      "higher", ours=right("ppo") - 100 * share(metrics["itself"], depths), threshold=0.0,
      baseline=100 * share(metrics["itself"], depths), note=by_depth(metrics["itself"]),
    ),
    Claim(
      "Share of what asking for every step in order reaches", "", "higher",
      ours=right("ppo") / max(100 * share(metrics["oracle"][TRAINED], depths), 1e-3), threshold=0.9,
      baseline=100 * share(metrics["oracle"][TRAINED], depths),
      note="; ".join(f"{size} {by_depth(rows)}" for size, rows in metrics["oracle"].items()),
    ),
    Claim(
      "Right answers of the weakest solver on questions of one and two steps", "", "higher",
      ours=min(rows[d]["first"] for rows in metrics["solvers"].values() for d in rows), threshold=0.9,
      note="; ".join(f"{size} {by_depth(rows, 'first')}" for size, rows in metrics["solvers"].items()),
    ),
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  depths, arms = deep(config), metrics["arms"]
  right = lambda arm: f"{100 * over(arms[arm], depths):.3g} %"
  return (
    f"On questions of {depths[0]} to {depths[-1]} steps a solver that was trained on two gets "
    f"{100 * over(arms['ppo'], depths, 'first'):.3g} % alone, {right('taught')} with a taught decomposer, "
    f"{right('ppo')} with one that is then rewarded, {right('blind')} if that does not see its attempt, "
    f"{100 * share(metrics['votes'], depths):.3g} % by a vote at as many tokens, and "
    f"{100 * share(metrics['oracle'][TRAINED], depths):.3g} % asked for every step in order (the paper's tables are "
    "not to be had)."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  figure, (left, right) = figures.subplots(2)
  depths = list(next(iter(metrics["arms"]["ppo"].values())))
  line = lambda axis, by_seed, label, what="right", **look: axis.plot(
    [int(d) for d in depths], [100 * over(by_seed, [d], what) for d in depths], label=label, **look
  )
  for arm, label in ARMS.items():
    line(left, metrics["arms"][arm], label, marker="o")
  line(left, metrics["arms"]["ppo"], "the solver alone", "first", marker=".", color="black")
  line(left, {"": metrics["votes"]}, "a vote, as many tokens", marker=".", color="gray")
  line(left, {"": metrics["oracle"][TRAINED]}, "every step in order", ls=":", color="black")
  left.set(xlabel="steps", ylabel="right answers, %", xticks=[int(d) for d in depths])
  figures.leave_room(left, 0.4)
  left.legend(fontsize=7, ncols=2, loc="upper center")
  for name in REWARDS:
    values = metrics["rewards"]["ppo"][name]
    right.plot(np.linspace(0, config.ppo.updates, len(values)), values, lw=1.2, label=name)
  right.set(xlabel="round of PPO", ylabel="reward")
  figures.leave_room(right, 0.2)
  right.legend(fontsize=7, ncols=3, loc="upper center")
  caption = (
    "Left: right answers by the number of steps, of one solver. Right: the five rewards while the decomposer is "
    "trained, means over questions that the solver does not answer at once"
  )
  return {figures.save(figure, workdir, "daslam"): caption}
