"""BiBench: eight operators of signs on pictures, text and clouds of points, and the six tracks computed from that.

A module here is a part of the run.
"""

from pathlib import Path

import numpy as np

from experiments import results
from experiments.bibench import tracks
from experiments.bibench.corruptions import CORRUPTIONS
from experiments.bibench.drawing import draw_tasks, draw_tracks
from experiments.bibench.tasks import KINDS, TASKS
from experiments.bibench.tracks import TWIN
from experiments.results import Claim
from jaxlab.core.checks import require, require_choice
from jaxlab.weights import bibench_metrics
from jaxlab.weights.bibench import ALGORITHMS, REFERENCES

TITLES = {
  "bnn": "BNN", "xnor": "XNOR", "dorefa": "DoReFa", "bireal": "Bi-Real", "xnor++": "XNOR++", "reactnet": "ReActNet",
  "recu": "ReCU", "fda": "FDA", "fp32": "full precision", "bwn": "signs of weights alone", "int8": "8 bits",
}  # fmt: skip
SOFT, HARD = ("bireal", "reactnet", "fda"), ("bnn", "xnor++")
STEADY, UNSTEADY = ("xnor", "bireal", "reactnet"), ("bnn", "xnor++", "recu", "fda")
OTHERS = ("settings", "sizes", "speed")


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts: of each task a part, and of the tracks that are no accuracies.

  Claims are made of what is there: some operators and tasks may be left out.
  """
  for name in config.parts:
    require_choice("config.parts", name, (*TASKS, *OTHERS))
  for name in (*config.operators, *config.settings.operators):
    require_choice("an operator", name, ALGORITHMS)
  for name in config.references:
    require_choice("config.references", name, REFERENCES)
  for name in config.corruptions:
    require_choice("config.corruptions", name, CORRUPTIONS)
  require(bool(set(TASKS) & set(config.parts)), f"config.parts must have one of {', '.join(TASKS)}")
  both = all(set(some) & set(config.operators) for some in (SOFT, HARD))
  require(both, f"config.operators must have one of {', '.join(SOFT)} and one of {', '.join(HARD)}")
  metrics: dict = {"tasks": {}}
  for name in config.parts:
    console.say(name)
    if name in TASKS:
      run = lambda name=name: tracks.measure_task(config, name, cache, console)
      metrics["tasks"][name] = results.part(workdir, name, run)
    else:
      run = {
        "settings": lambda: tracks.measure_settings(config, cache),
        "sizes": lambda: tracks.measure_sizes(config),
        "speed": lambda: tracks.measure_speed(config),
      }[name]
      metrics[name] = results.part(workdir, name, run)
  return metrics


def ratios(metrics: dict) -> dict[str, dict[str, float]]:
  """{task: {operator: E[A_bi / A_fp]}}; the twin went on as long as the operators did."""
  return {
    task: {
      operator: bibench_metrics.accuracy(row["accuracy"], float(np.mean(found["rows"][TWIN]["accuracy"])))
      for operator, row in found["rows"].items()
      if operator != TWIN
    }
    for task, found in metrics["tasks"].items()
  }


def of_tasks(metrics: dict) -> dict[str, float]:
  """{operator: OM of the learning tasks, in percent}; with one network a task it is that of architectures, too."""
  by_task = ratios(metrics)
  names = [name for name in ALGORITHMS if all(name in found for found in by_task.values())]
  return {name: 100 * bibench_metrics.overall(found[name] for found in by_task.values()) for name in names}


def of_corruptions(metrics: dict) -> dict[str, float]:
  rows = metrics["tasks"]["pictures"]["rows"]
  pair = lambda operator, kind: (float(np.mean(rows[operator]["accuracy"])), rows[operator]["corrupted"][kind])
  return {
    operator: 100
    * bibench_metrics.overall(
      bibench_metrics.robustness(pair(operator, kind), pair(TWIN, kind)) for kind in rows[TWIN]["corrupted"]
    )
    for operator in rows
    if operator in ALGORITHMS
  }


def of_training(metrics: dict) -> dict[str, tuple[float | None, float]]:
  """{operator: (T_fp / T_bi or None where nothing was timed, std(A_fp) / std(A_bi))}."""
  found, times = metrics["settings"], metrics["tasks"].get("pictures", {}).get("seconds", {})
  of = lambda name: times.get(name)
  return {
    name: bibench_metrics.training(of(name), of(TWIN), values, found[TWIN])
    for name, values in found.items()
    if name != TWIN
  }


def claims(config, metrics: dict) -> list[Claim]:
  made = [_headline(metrics), *_part_claims(of_tasks(metrics)), *_task_claims(metrics)]
  pictures = metrics["tasks"].get("pictures", {})
  if pictures:
    made.append(_robust_claim(metrics))
  if "settings" in metrics and {*STEADY, *UNSTEADY} <= metrics["settings"].keys():
    made.append(_settings_claim(metrics))
  if "sizes" in metrics:
    made += _size_claims(metrics["sizes"], pictures.get("packed", {}))
  if "fda" in pictures.get("seconds", {}):
    made.append(_time_claim(pictures["seconds"]))
  if {"speed", "sizes"} <= metrics.keys():
    made.append(_speed_claim(config, metrics))
  return made


def _few(value: float) -> float:
  """Four digits: those that metrics as they are published determine."""
  return float(f"{value:.4g}")


def listed(values: dict[str, float], digits: int = 3) -> str:
  return ", ".join(f"{TITLES.get(name, name)} {value:.{digits}g}" for name, value in values.items())


def _headline(metrics: dict) -> Claim:
  overall = of_tasks(metrics)
  soft, hard = (float(np.mean([overall[name] for name in names if name in overall])) for names in (SOFT, HARD))
  absolute = "; ".join(
    f"{task}, % right: " + listed({name: 100 * float(np.mean(row["accuracy"])) for name, row in found["rows"].items()})
    for task, found in metrics["tasks"].items()
  )
  return Claim(
    "Points of overall accuracy (OM) of Bi-Real, ReActNet and FDA, on average, over BNN and XNOR++", "points",
    "higher", ours=_few(soft - hard), threshold=4.0, paper=9.78, baseline=f"{hard:.4g}",
    note=f"OM of {len(metrics['tasks'])} tasks: {listed(overall)}; {absolute}",
  )  # fmt: skip


def _part_claims(overall: dict[str, float]) -> list[Claim]:
  wanted = (
    ("Points of OM that a scale for every output gives: DoReFa over BNN", "dorefa", "bnn", 9.0),
    ("Points of OM that a soft gradient gives: Bi-Real over DoReFa", "bireal", "dorefa", 1.81),
  )
  return [
    Claim(
      name, "points", "higher", ours=_few(overall[ours] - overall[other]), threshold=0.0, paper=paper,
      baseline=f"{TITLES[other]} {overall[other]:.4g}",
    )
    for name, ours, other, paper in wanted
    if ours in overall and other in overall
  ]  # fmt: skip


def _task_claims(metrics: dict) -> list[Claim]:
  by_task, eight = ratios(metrics), of_tasks(metrics)
  percent = {task: {name: 100 * found[name] for name in eight} for task, found in by_task.items()}
  made = []
  if len(by_task) > 1 and "text" in by_task:
    lowest = [name for name in eight if min(percent, key=lambda task: percent[task][name]) == "text"]
    made.append(
      Claim(
        "Operators that keep least of the twin's accuracy on the transformer", "operators", "higher",
        ours=len(lowest), threshold=5, baseline=f"{len(eight)} operators, {len(by_task)} architectures",
        note="; ".join(f"{KINDS[task]}: {listed(found)} %" for task, found in percent.items()),
      )
    )  # fmt: skip
  for task, better, threshold, paper in (("pictures", "lower", 2, 1), ("text", "higher", 3, 6)):
    if task in percent and "recu" in eight:
      rank = 1 + sum(value > percent[task]["recu"] for value in percent[task].values())
      made.append(
        Claim(
          f"Rank of ReCU among the operators on {task}", "", better, ours=rank, threshold=threshold, paper=paper,
          baseline=f"best {max(percent[task].values()):.4g} % of the twin, ReCU {percent[task]['recu']:.4g}",
        )
      )  # fmt: skip
  return made


def _robust_claim(metrics: dict) -> Claim:
  found, rows = of_corruptions(metrics), metrics["tasks"]["pictures"]["rows"]
  twin = rows[TWIN]
  losses = {name: 100 * (float(np.mean(twin["accuracy"])) - value) for name, value in twin["corrupted"].items()}
  return Claim(
    "Overall robustness (OM) to corrupted pictures, mean of the operators: 100 loses what the twin loses", "%",
    "higher", ours=_few(float(np.mean(list(found.values())))), threshold=80.0, paper=95.3, baseline="the twin 100",
    note=f"{listed(found)}; points that the twin loses: {listed(losses)}",
  )  # fmt: skip


def _settings_claim(metrics: dict) -> Claim:
  found = {name: pair[1] for name, pair in of_training(metrics).items()}
  steady, rest = (float(np.mean([found[name] for name in names])) for names in (STEADY, UNSTEADY))
  spread = {name: 100 * float(np.std(values)) for name, values in metrics["settings"].items()}
  best = {name: 100 * max(values) for name, values in metrics["settings"].items()}
  both = {name: 100 * bibench_metrics.overall(pair) for name, pair in of_training(metrics).items() if pair[0]}
  return Claim(
    "Steadiness std(fp32) / std over settings of the optimiser: XNOR, Bi-Real, ReActNet over BNN, XNOR++, ReCU, FDA",
    "x", "higher", ours=_few(steady / rest), threshold=1.0, baseline=f"{rest:.3g} of the latter",
    note=f"PointNet from scratch; deviation in points, small where nothing is learned: {listed(spread)}; best: "
    f"{listed(best)}" + (f"; OM: {listed(both)}" if both else ""),
  )  # fmt: skip


def _size_claims(sizes: dict, packed: dict) -> list[Claim]:
  found = sizes["ResNet20"]
  worst = min(found, key=lambda name: min(found[name][:2]))
  overall = {name: bibench_metrics.overall(values[:2]) for name, values in found.items()}
  apart = [{name: values[i] / min(v[i] for v in found.values()) for name, values in found.items()} for i in (0, 1)]
  say = lambda i: "; ".join(f"{name}: {listed({op: v[i] for op, v in each.items()})}" for name, each in sizes.items())
  same = "; ".join(
    f"on packed bits {TITLES[name]} classifies {100 * one['same']:.4g} % of pictures as it was trained to"
    for name, one in packed.items()
  )
  return [
    Claim(
      "Times fewer bits or operations of ResNet20, the worse of both, worst operator", "x", "higher",
      ours=_few(min(found[worst][:2])), threshold=10.0, paper=12.71, baseline="32 and 64 at most",
      note=f"{TITLES[worst]}; OM_comp: {listed(overall)}; r_c: {say(0)}; bytes as packed: {say(2)}; {same}",
    ),
    Claim(
      "By how much operators differ in bits or operations of ResNet20, the larger of both", "%", "lower",
      ours=_few(100 * (max(max(one.values()) for one in apart) - 1)), threshold=3.0, paper=1.8,
      baseline="the operator that saves least",
      note=f"r_s: {say(1)}; 144 signs of 16 channels count as 2.25 multiplications; a scale adds one",
    ),
  ]  # fmt: skip


def _time_claim(times: dict) -> Claim:
  others = {name: value for name, value in times.items() if name in ALGORITHMS and name != "fda"}
  return Claim(
    "Time of a training step of FDA over that of the slowest other operator", "x", "higher",
    ours=_few(times["fda"] / max(others.values())), threshold=1.0,
    baseline=f"{TITLES[max(others, key=others.get)]} {max(others.values()):.3g} ms",
    note=f"ms a step, pictures: {listed(times)}",
  )  # fmt: skip


def _speed_claim(config, metrics: dict) -> Claim:
  speed = metrics["speed"]
  ratio = {rows: min(t["float32"], t["bfloat16"]) / t["packed"] for rows, t in speed.items()}
  best = max(ratio, key=ratio.get)
  said = lambda times: ", ".join(f"{name} {value:.3g} ms" for name, value in times.items())
  name = config.speed.operator
  both = (speed[best]["float32"] / speed[best]["packed"], metrics["sizes"]["ResNet20"][name][2])
  return Claim(
    "Times as fast as in 16 or 32 bits a network runs on packed bits on this device, best batch", "x", "higher",
    ours=_few(ratio[best]), threshold=1.0, baseline="the faster of bfloat16 and float32",
    note="; ".join(f"{rows} images: {said(times)}" for rows, times in speed.items())
    + f"; OM_infer of {TITLES[name]}, time and bytes: {100 * bibench_metrics.overall(both):.4g} %",
  )  # fmt: skip


def finding(config, metrics: dict) -> str:
  overall = of_tasks(metrics)
  order = sorted(overall, key=overall.get, reverse=True)
  return (
    f"Of the twin's accuracy on {', '.join(metrics['tasks'])} {TITLES[order[0]]} keeps most "
    f"({overall[order[0]]:.3g} % in quadratic mean), {TITLES[order[-1]]} least ({overall[order[-1]]:.3g} %); Bi-Real, "
    f"ReActNet and FDA are {_headline(metrics).ours:.3g} points above BNN and XNOR++ (paper 9.78, on eight data sets)."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  twins = {task: 100 * float(np.mean(found["rows"][TWIN]["accuracy"])) for task, found in metrics["tasks"].items()}
  percent = {task: {name: 100 * value for name, value in found.items()} for task, found in ratios(metrics).items()}
  made = {draw_tasks(percent, of_tasks(metrics), twins, workdir, TITLES): "What operators keep of the twin's accuracy"}
  if "pictures" in metrics["tasks"]:
    caption = "Points lost on corrupted pictures, and accuracies by settings of the optimiser"
    made[draw_tracks(metrics, list(of_corruptions(metrics)), workdir, TITLES)] = caption
  return made
