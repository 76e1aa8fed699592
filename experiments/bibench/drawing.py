"""Figures: accuracy of the twin's by task, robustness, spread over settings."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import figures


def draw_tasks(percent: Mapping, overall: Mapping, twins: Mapping, workdir: Path, titles: Mapping[str, str]) -> str:
  """A bar a task for every operator, those of least OM first; references behind them."""
  order = sorted(overall, key=overall.get)
  order += dict.fromkeys(name for found in percent.values() for name in found if name not in overall)
  figure, axis = figures.subplots(width=1.9)
  for i, (task, found) in enumerate(percent.items()):
    names = [name for name in order if name in found]
    place = np.array([order.index(name) for name in names]) + 0.26 * (i - 1)
    axis.bar(place, [found[name] for name in names], 0.24, label=f"{task}, twin {twins[task]:.3g} % right")
  axis.plot(
    range(len(overall)), [overall[name] for name in order[: len(overall)]], "k_", ms=22, mew=1.5, label="overall"
  )
  axis.axhline(100, color="0.4", lw=0.8, ls="--")
  axis.set_xticks(range(len(order)), [titles[name].replace(" of ", "\nof ") for name in order], size=8)
  axis.set(ylabel="% of the twin's accuracy")
  figures.leave_room(axis, 0.15)
  axis.legend(fontsize=7, ncols=4, loc="upper left")
  return figures.save(figure, workdir, "tasks")


def draw_tracks(metrics: Mapping, operators: list[str], workdir: Path, titles: Mapping[str, str]) -> str:
  """Left: points lost by corruption, the twin and the operators; right: accuracy in every setting."""
  settings = metrics.get("settings", {})
  figure, axes = figures.subplots(2 if settings else 1, width=1.1, squeeze=False)
  rows = metrics["tasks"]["pictures"]["rows"]
  kinds = list(rows["fp32"]["corrupted"])
  lost = lambda name: [100 * (np.mean(rows[name]["accuracy"]) - rows[name]["corrupted"][kind]) for kind in kinds]
  axis = axes[0][0]
  axis.boxplot(np.array([lost(name) for name in operators]), orientation="horizontal", widths=0.5)
  axis.plot(lost("fp32"), np.arange(len(kinds)) + 1, "D", ms=4, label="full precision")
  axis.set_yticks(np.arange(len(kinds)) + 1, [kind.replace("_", " ") for kind in kinds], size=7)
  axis.set(xlabel="points of accuracy lost, operators as boxes")
  axis.legend(fontsize=7)
  if settings:
    axis = axes[0][1]
    names = list(settings)
    for i, name in enumerate(names):
      half = len(settings[name]) // 2
      for part, mark, what in ((slice(half), "o", "Adam"), (slice(half, None), "x", "SGD")):
        values = [100 * value for value in settings[name][part]]
        axis.plot(
          values, np.full(len(values), i), mark, ms=5, color="C0" if mark == "o" else "C1", label=None if i else what
        )
    axis.set_yticks(range(len(names)), [titles[name] for name in names], size=8)
    axis.set(xlabel="% right in each of the settings, clouds")
    axis.legend(fontsize=7)
  return figures.save(figure, workdir, "tracks")
