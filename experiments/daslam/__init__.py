"""DaSLaM: a small decomposer that is rewarded for what a frozen solver makes of its sub-questions.

A module here is a part of the run: `chain` makes problems, `solving` lets solvers and decomposers meet on the device,
`training` makes both.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import figures, results
from experiments.daslam import chain, solving, training
from experiments.report import rounded
from experiments.results import Claim
from jaxlab.core.checks import require

REWARDS = ("coverage", "consistency", "order", "proximity", "correct")
ALL = dict.fromkeys(REWARDS, 1.0)
OUTCOME = dict.fromkeys(REWARDS, 0.0) | {"correct": 1.0}
TRAINED = "M"  # the solver that decomposers are trained with


class Arm(NamedTuple):
  """A way to a decomposer: what it reads beside the question in training and, if it is rewarded, by what."""

  label: str
  condition: str = "attempt"
  weights: dict | None = None
  form: str = "paper"

  @property
  def judged(self) -> str:
    """What it reads when it is judged: gold lines are to be had in training alone."""
    return "attempt" if self.condition == "gold" else self.condition


ARMS = {
  "taught": Arm("taught alone"),
  "ppo": Arm("taught, then rewarded", weights=ALL),
  "outcome": Arm("rewarded for right answers alone", weights=OUTCOME),
  "code": Arm("rewarded by the code's sums", weights=ALL, form="code"),
  "blind": Arm("rewarded, without the attempt", "none", ALL),
  "gold": Arm("rewarded, gold lines for the attempt", "gold", ALL),
}
_INSTEAD = {
  "code": "is rewarded as the code has it, by sums",
  "gold": "reads gold lines in training, as the code has it, and the attempt when it is judged",
}


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Measures all parts; what the workdir holds is not measured again."""
  found = {name: results.part(workdir, name, make) for name, make in parts(config, workdir, console).items()}
  seeds, sizes = [f"{seed}" for seed in _seeds(config)], tuple(config.solvers)
  arms = {arm: {seed: found[f"arm.{arm}.{seed}"] for seed in seeds} for arm in ARMS}
  others = {
    size: arms["ppo"] if size == TRAINED else {seed: found[f"transfer.{size}.{seed}"] for seed in seeds}
    for size in sizes
  }
  return rounded(
    {
      "solvers": {size: found[f"solver.{size}"] for size in sizes},
      "arms": arms,
      "others": others,
      "rewards": {arm: found[f"rewards.{arm}"] for arm in ARMS if ARMS[arm].weights},
      "oracle": {size: found[f"oracle.{size}"] for size in sizes},
      "apart": {seed: found[f"apart.{seed}"] for seed in seeds},
    }
    | {name: found[name] for name in ("votes", "retry", "itself")}
  )


def parts(config, workdir: Path, console) -> dict:
  """{name: what measures it}; each makes what it needs and is not in the workdir: a solver, a taught decomposer, a
  rewarded one."""
  sizes, first = tuple(config.solvers), config.seed
  require(TRAINED in sizes, f"config.solvers has {', '.join(sizes)}; decomposers are trained with {TRAINED}")
  chain.Sizes(**config.problems).check()
  require(
    max(*config.depths.trained, *config.depths.judged) <= config.problems.longest,
    f"config.depths asks for more steps than config.problems.longest, {config.problems.longest}; raise that",
  )
  solver = functools.cache(lambda size: training.solver(config, size, workdir, console))
  itself = lambda: training.both_jobs(config, workdir, console)

  @functools.cache
  def decomposer(name: str, seed: int):
    arm = ARMS[name]
    start = training.taught(config, solver(TRAINED), arm.condition, seed, workdir, console)
    if arm.weights is None:
      return start, []
    folder = workdir / f"ppo_{name}_{seed}"
    return training.tuned(config, solver(TRAINED), start, arm.condition, arm.weights, arm.form, seed, folder, console)

  def of(arm: str, seed: int, size: str = TRAINED, **how):
    return judged(config, solver(size), decomposer(arm, seed)[0], ARMS[arm].judged, seed, **how)

  plain = lambda size, depths=None: judged(config, solver(size), None, "none", first if depths is None else 0, depths)
  made = {f"solver.{size}": functools.partial(plain, size, (1, 2)) for size in sizes}
  made["itself"] = lambda: judged(config, *[itself()] * 2, "none", first)
  for seed in _seeds(config):
    made |= {f"arm.{arm}.{seed}": functools.partial(of, arm, seed) for arm in ARMS}
  for seed in _seeds(config):
    made |= {f"transfer.{size}.{seed}": functools.partial(of, "ppo", seed, size) for size in sizes if size != TRAINED}
    made[f"apart.{seed}"] = functools.partial(of, "ppo", seed, append_history=False)
  rewarded = [arm for arm in ARMS if ARMS[arm].weights]
  made |= {f"rewards.{arm}": lambda arm=arm: thinned(decomposer(arm, first)[1]) for arm in rewarded}
  made |= {f"oracle.{size}": functools.partial(plain, size) for size in sizes}
  ppo = lambda: results.part(workdir, f"arm.ppo.{first}", made[f"arm.ppo.{first}"])
  made["votes"] = lambda: votes(config, solver(TRAINED), ppo())
  made["retry"] = lambda: votes(config, solver(TRAINED))
  return made


def _seeds(config) -> range:
  return range(config.seed, config.seed + config.seeds)


def judged(config, solver, decomposer, condition: str, seed: int, depths=None, append_history: bool = True) -> dict:
  """{depth: what `solving.evaluated` says}; the same questions for all of a seed."""
  where = solving.CONDITIONS.index(condition)
  how = dict(count=config.count, condition=where, least=config.least, append_history=append_history)
  key, sizes = jax.random.key(10_000 + seed), chain.Sizes(**config.problems)
  of = lambda d: solving.evaluated(solver, decomposer, jax.random.fold_in(key, d), depth=d, sizes=sizes, **how)
  return {
    f"{depth}": {name: float(value) for name, value in of(depth).items()} for depth in depths or config.depths.judged
  }


def votes(config, solver, rows: dict | None = None) -> dict:
  """Self-consistency with as many solver tokens as the episodes of `rows` take; without, one attempt: a retry."""
  made = {}
  for depth in config.depths.judged:
    how = dict(count=config.count, sizes=chain.Sizes(**config.problems), depth=depth)
    of = lambda samples: solving.voted(solver, jax.random.key(depth), samples=samples, **how)  # noqa: B023
    out, samples = of(1), 1
    if rows:
      samples = max(1, round(rows[f"{depth}"]["tokens"] / max(1.0, float(out["tokens"]))))
      out = of(samples)
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
  has = [arm for arm in ("code", "gold") if arm in arms]  # not in what was published before
  spread = [100 * (share(arms["ppo"][s], depths) - share(arms["taught"][s], depths)) for s in arms["ppo"]]
  gain = {size: 100 * (over(rows, depths) - over(rows, depths, "first")) for size, rows in metrics["others"].items()}
  others = {size: value for size, value in gain.items() if size != TRAINED}
  largest = max(metrics["solvers"], key=lambda size: config.solvers[size].depth * config.solvers[size].width ** 2)
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
      baseline=first,
      note=f"alone {by_depth(one, 'first')}"
      + (f"; again at temperature 0.9 {by_depth(metrics['retry'])}" if "retry" in metrics else ""),
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
      note=f"sub-questions {asked('ppo'):.3g} and {asked('blind'):.3g}"
      + (f"; none in {100 * over(arms['ppo'], depths, 'retried'):.3g} % of episodes" if "retry" in metrics else ""),
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
      note="; ".join(f"{size} {by_depth(rows)}" for size, rows in metrics["oracle"].items())
      + (f"; each asked alone {100 * over(metrics['apart'], depths):.3g}" if "apart" in metrics else ""),
    ),
    Claim(
      "Right answers of the weakest solver on questions of one and two steps", "", "higher",
      ours=min(rows[d]["first"] for rows in metrics["solvers"].values() for d in rows), threshold=0.9,
      note="; ".join(f"{size} {by_depth(rows, 'first')}" for size, rows in metrics["solvers"].items()),
    ),
    *[
      Claim(
        f"Right answers with the decomposer less those with one that {_INSTEAD[arm]}", "points", "higher",
        ours=right("ppo") - right(arm), threshold=0.0, baseline=right(arm),
        note=f"sub-questions {asked('ppo'):.3g} and {asked(arm):.3g}",
      )
      for arm in has
    ],
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
  for arm, rows in metrics["arms"].items():
    line(left, rows, ARMS[arm].label, marker="o")
  line(left, metrics["arms"]["ppo"], "the solver alone", "first", marker=".", color="black")
  line(left, {"": metrics["votes"]}, "a vote, as many tokens", marker=".", color="gray")
  line(left, {"": metrics["itself"]}, "a solver that asks itself", marker="x", color="gray")
  if "retry" in metrics:
    line(left, {"": metrics["retry"]}, "it tries again", ls="--", color="gray")
  if "apart" in metrics:
    line(left, metrics["apart"], "rewarded, each asked alone", ls="--", color="black")
  line(left, {"": metrics["oracle"][TRAINED]}, "every step in order", ls=":", color="black")
  left.set(xlabel="steps", ylabel="right answers, %", xticks=[int(d) for d in depths])
  figures.leave_room(left, 0.6)
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
