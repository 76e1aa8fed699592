"""Skip-thinking: rationales in chunks beside whole ones, and what students leave out.

A module here is a part of the run: `tasks` writes questions and rationales, `training` has the arms, `diagnostics` asks
what a step's gradient is made of.
"""

import functools
import itertools
from pathlib import Path

import jax
import numpy as np

from experiments import figures, results, timing
from experiments.report import rounded
from experiments.results import Claim
from experiments.skip_thinking import diagnostics, training
from experiments.skip_thinking.tasks import TASKS
from experiments.skip_thinking.training import AFTER, BASE
from jaxlab.core.checks import require
from jaxlab.models.generate import complete
from jaxlab.models.inference import take_apart
from jaxlab.sequence import skip_thinking as st

TUNED = ("full", "average")  # whose rates the arms of their kind take
EVERY_STEP = "letters"  # the task of which nothing can be left out


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Trains every arm with every seed; what the workdir holds is not measured again."""
  unknown = sorted(set(config.tasks) - set(TASKS))
  require(config.tasks and not unknown, f"config.tasks has {unknown or 'nothing'}; there are {', '.join(TASKS)}")
  part, first = functools.partial(results.part, workdir), config.seed
  rates = {arm: part(f"rate.{arm}", lambda a=arm: tuned(config, a, workdir, console)) for arm in TUNED}
  chunked = lambda arm: arm in ("random", "average", "search")
  rate = lambda arm: rates["average" if chunked(arm) else "full"]["best"]

  @functools.cache
  def student(arm: str, seed: int):
    return training.base(config, arm, seed, rate(arm), workdir, console)

  def graduate(arm: str, seed: int, labels: dict):
    start, _ = student("search", seed)
    return training.after(config, arm, seed, rate("search"), start, labels, workdir, console)

  found = {"rates": rates, "base": {}, "after": {}, "left_out": {}}
  seeds = range(first, first + config.seeds)
  for arm, seed in itertools.product(BASE, seeds):
    judged = lambda a=arm, s=seed: training.answers(config, student(a, s)[0], s)
    found["base"].setdefault(arm, {})[f"{seed}"] = part(f"base.{arm}.{seed}", judged)
  labels = {s: part(f"labels.{s}", lambda s=s: training.labelled(config, student("search", s)[0], s)) for s in seeds}
  for arm, seed in itertools.product(AFTER, seeds):
    judged = lambda a=arm, s=seed: training.answers(config, graduate(a, s, labels[s]), s)
    found["after"].setdefault(arm, {})[f"{seed}"] = part(f"after.{arm}.{seed}", judged)
  found["left_out"] = {f"{seed}": left_out(config, labels[seed], seed) for seed in seeds}
  found["forced"] = {
    f"{j}": part(f"forced.{j}", lambda j=j: training.answers(config, student("search", first)[0], first, forced=j))
    for j in range(config.chunks + 1)
  }
  pair = lambda: {"search": student("search", first)[0], "skip": graduate("skip", first, labels[first])}
  found["speed"] = part("speed", lambda: speed(config, pair()))
  diagnose = lambda arm: diagnosed(config, arm, *student(arm, first))
  found["diagnostics"] = {arm: part(f"diagnostics.{arm}", lambda a=arm: diagnose(a)) for arm in ("full", "search")}
  return rounded(found)


def tuned(config, arm: str, workdir: Path, console) -> dict:
  """{"best", "right": {rate: share}}: judged on the second fold, which none of these has seen, first seed."""
  right = {}
  for rate in config.train.rates:
    model, _ = training.base(config, arm, config.seed, rate, workdir, console)
    found = training.answers(config, model, config.seed, fold="second")
    right[f"{rate:g}"] = float(np.mean([row["right"] for row in found.values()]))
    console.say(f"{arm} at {rate:g}: {right[f'{rate:g}']:.1%}")
  return {"best": float(max(right, key=right.get)), "right": right}


def left_out(config, labels: dict, seed: int) -> dict:
  """{task: {"reason", "filler": share of such units left out, "chunks": share of chunks}} on the second fold."""
  made, _, _ = training.folds(config, seed)
  fold, tally = made["second"], {task: np.zeros((3, 2)) for task in config.tasks}
  for cuts, kept, task, reasons in zip(labels["cuts"], labels["kept"], fold.task, fold.reasons, strict=True):
    for m, (start, stop) in enumerate(itertools.pairwise(cuts), 1):
      gone = m not in kept
      for kind, count in enumerate((reasons[start:stop].sum(), (~reasons[start:stop]).sum(), start < stop)):
        tally[task][kind] += gone * count, count
  share = lambda pair: float(pair[0] / max(1, pair[1]))
  return {
    task: dict(zip(("reason", "filler", "chunks"), map(share, rows), strict=True)) for task, rows in tally.items()
  }


def speed(config, models: dict) -> dict:
  """{arm: seconds a question, one at a time}, and the tokens of each."""
  made, tags, _ = training.folds(config, config.seed)
  test = made["test"].samples
  some = test[:: max(1, len(test) // config.eval.timed)][: config.eval.timed]
  networks = {arm: jax.jit(take_apart)(model) for arm, model in models.items()}

  def run(arm):
    how = dict(tokens=config.eval.tokens, stop=(tags.end,), stretch=8)
    return [complete(networks[arm], [st.prompt(one, tags)], **how)[0].tokens for one in some]

  times = timing.compare({arm: functools.partial(run, arm) for arm in models}, repetitions=3, warmup=1)
  tokens = {arm: float(np.mean([len(text) for text in run(arm)])) for arm in models}
  return {"seconds": {arm: times.median(arm) / len(some) for arm in models}, "tokens": tokens}


def diagnosed(config, arm: str, model, cuts) -> dict:
  made, tags, _ = training.folds(config, config.seed)
  return diagnostics.measure(config, model, made["first"], cuts, tags, staged=arm == "search", seed=config.seed)


def over(metrics: dict, arm: str, what: str, tasks) -> float:
  """Mean over tasks and seeds of an arm."""
  found = metrics["base"].get(arm) or metrics["after"][arm]
  return float(np.mean([rows[task][what] for rows in found.values() for task in tasks]))


def spread(metrics: dict, arm: str, rival: str, tasks) -> tuple[float, float]:
  """Least and most points an arm is ahead of a rival, over the seeds."""
  of = lambda name: metrics["base"].get(name) or metrics["after"][name]
  ahead = [
    100 * float(np.mean([of(arm)[seed][task]["right"] - of(rival)[seed][task]["right"] for task in tasks]))
    for seed in of(arm)
  ]
  return min(ahead), max(ahead)


def claims(config, metrics: dict) -> list[Claim]:
  tasks, seeds = config.tasks, len(metrics["base"]["full"])
  right = lambda arm, of=tasks: 100 * over(metrics, arm, "right", of)
  ahead = lambda arm, rival: right(arm) - right(rival)
  told = lambda arms: ", ".join(f"{(BASE | AFTER)[arm]} {right(arm):.3g}" for arm in arms)
  by_task = lambda arm: ", ".join(f"{task} {right(arm, [task]):.3g}" for task in tasks)
  fewer = lambda of: 1 - over(metrics, "skip", "tokens", of) / over(metrics, "whole", "tokens", of)
  free = [task for task in tasks if task != EVERY_STEP]
  made = [
    Claim(
      "Right answers of chunk-wise training with searched cuts less those of full thinking, at equal steps", "points",
      "higher", ours=ahead("search", "full"), threshold=1.0, spread=spread(metrics, "search", "full", tasks),
      baseline=right("full"), note=f"{seeds} seeds, {', '.join(tasks)}; {told(BASE)}; chunk-wise: {by_task('search')}; "
      f"full: {by_task('full')}",
    ),
    Claim(
      "The same beside full thinking on as many tokens a step", "points", "higher", ours=ahead("search", "full_small"),
      threshold=0.0, spread=spread(metrics, "search", "full_small", tasks), baseline=right("full_small"),
    ),
    Claim(
      "The same beside full thinking of which a random stretch counts", "points", "higher",
      ours=ahead("search", "full_window"), threshold=0.0, spread=spread(metrics, "search", "full_window", tasks),
      baseline=right("full_window"),
    ),
    Claim(
      "Searched cuts less equal ones", "points", "higher", ours=ahead("search", "average"), threshold=-0.5,
      spread=spread(metrics, "search", "average", tasks), baseline=right("average"),
      note=f"random cuts {right('random'):.3g}",
    ),
    Claim(
      "Right answers of the student that skips less those of one trained on as long on the whole rationale", "points",
      "higher", ours=ahead("skip", "whole"), threshold=-1.0, spread=spread(metrics, "skip", "whole", tasks),
      baseline=right("whole"), note=f"skipping: {by_task('skip')}; whole: {by_task('whole')}",
    ),
    Claim(
      "Right answers of the student that skips less those of its best rival", "points", "higher",
      ours=min(ahead("skip", rival) for rival in ("skip_random", "shortest", "icot")), threshold=0.0,
      baseline=max(map(right, ("skip_random", "shortest", "icot"))),
      note="; ".join(
        f"{AFTER[arm]} {right(arm):.3g} in {over(metrics, arm, 'tokens', tasks):.3g} tokens" for arm in AFTER
      ),
    ),
  ]  # fmt: skip
  if free:
    made.append(
      Claim(
        "Tokens that the student that skips saves, all tasks but the one that needs every step", "", "higher",
        ours=fewer(free), threshold=0.3, baseline=over(metrics, "whole", "tokens", free),
        note=", ".join(f"{task} {fewer([task]):.2g}" for task in tasks),
      )
    )  # fmt: skip
  if EVERY_STEP in tasks:
    made.append(
      Claim(
        "Tokens that it saves on last letters, which need every step", "", "lower", ours=fewer([EVERY_STEP]),
        threshold=0.1, baseline=over(metrics, "whole", "tokens", [EVERY_STEP]),
      )
    )  # fmt: skip
  rate = lambda kind: float(np.mean([row[kind] for rows in metrics["left_out"].values() for row in rows.values()]))
  shorter = [
    100 * np.mean([row["right"] for row in rows.values()])
    for rows in metrics["forced"].values()
    if np.mean([row["tokens"] for row in rows.values()]) <= over(metrics, "skip", "tokens", tasks)
  ]
  early = 100 * float(np.mean([row["right"] for row in next(iter(metrics["after"]["skip"].values())).values()]))
  seconds, tokens = (metrics["speed"][name] for name in ("seconds", "tokens"))
  both = metrics["diagnostics"]
  sharp = lambda arm: ", ".join(f"{radius} {rise:.3g}" for radius, rise in both[arm]["sharpness"].items())
  return [
    *made,
    Claim(
      "Sentences of filler left out as often as sentences that reason", "x", "higher",
      ours=rate("filler") / max(rate("reason"), 1e-3), threshold=2.0, baseline=rate("reason"),
      note="; ".join(
        f"{task}: reason {np.mean([rows[task]['reason'] for rows in metrics['left_out'].values()]):.2g}, filler "
        f"{np.mean([rows[task]['filler'] for rows in metrics['left_out'].values()]):.2g}" for task in tasks
      ),
    ),
    Claim(
      "Right answers of the student that skips less those of the chunk-wise one asked for the answer as early",
      "points", "higher", ours=early - max(shorter, default=0.0),
      threshold=0.0, baseline=max(shorter, default=0.0),
      note="; ".join(
        f"after {j} chunks {100 * np.mean([row['right'] for row in rows.values()]):.3g} in "
        f"{np.mean([row['tokens'] for row in rows.values()]):.3g} tokens" for j, rows in metrics["forced"].items()
      ),
    ),
    Claim(
      "Time an answer takes by the student that skips over the chunk-wise one's, divided by the same of tokens", "",
      "lower", ours=(seconds["skip"] / seconds["search"]) / (tokens["skip"] / tokens["search"]), threshold=1.2,
      baseline=seconds["search"] * 1e3, note=f"one at a time: {seconds['skip'] * 1e3:.3g} ms and "
      f"{seconds['search'] * 1e3:.3g} ms, {tokens['skip']:.3g} and {tokens['search']:.3g} tokens",
    ),
    Claim(
      "Share of a step's gradient from words that reason, chunk-wise over full thinking", "x", "higher",
      ours=both["search"]["gradient"] / both["full"]["gradient"], threshold=1.0, baseline=both["full"]["gradient"],
      note=f"of its tokens {both['search']['share']:.2g} and {both['full']['share']:.2g} reason; the loss rises under "
      f"noise of relative length r by {sharp('search')} and {sharp('full')} nats",
    ),
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  tasks = config.tasks
  right = lambda arm: f"{100 * over(metrics, arm, 'right', tasks):.3g} %"
  tokens = lambda arm: f"{over(metrics, arm, 'tokens', tasks):.3g}"
  return (
    f"Students trained from nothing on {', '.join(tasks)}: chunk-wise {right('search')} right with searched cuts, "
    f"{right('average')} with equal ones, full thinking {right('full')} at as many steps and {right('full_small')} at "
    f"as many tokens (the paper: searched over equal over full); trained to skip {right('skip')} in {tokens('skip')} "
    f"tokens, on the whole rationale as long {right('whole')} in {tokens('whole')}, with as much left out at random "
    f"{right('skip_random')} in {tokens('skip_random')}."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  figure, axes = figures.subplots(2)
  tasks, width = config.tasks, 0.8 / len(BASE)
  for i, (arm, label) in enumerate(BASE.items()):
    heights = [100 * over(metrics, arm, "right", [task]) for task in tasks]
    axes[0].bar(np.arange(len(tasks)) + (i - len(BASE) / 2 + 0.5) * width, heights, width, label=label)
  axes[0].set(xticks=range(len(tasks)), xticklabels=tasks, yticks=range(0, 101, 20), ylabel="right answers, %")
  figures.leave_room(axes[0], 0.45)
  axes[0].legend(fontsize=7, ncols=2, loc="upper right")
  for arm, label in AFTER.items():
    axes[1].plot(over(metrics, arm, "tokens", tasks), 100 * over(metrics, arm, "right", tasks), "o", label=label)
  rows = metrics["forced"].values()
  line = [
    (np.mean([r["tokens"] for r in row.values()]), 100 * np.mean([r["right"] for r in row.values()])) for row in rows
  ]
  axes[1].plot(*zip(*line, strict=True), "k.-", lw=1, label="chunk-wise, asked early")
  axes[1].set(xlabel="tokens written", ylabel="right answers, %")
  axes[1].legend(fontsize=7)
  caption = (
    "Left: right answers by arm and task. Right: right answers, mean over tasks, against what is written, of students "
    "trained on from the chunk-wise one, and of that one asked for the answer after 0, 1, .. chunks"
  )
  return {figures.save(figure, workdir, "arms"): caption}
