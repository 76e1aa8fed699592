"""Figures: quality by density, quality by epoch, predicted and measured changes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import figures


def draw_densities(tables: Mapping[str, list[dict]], workdir: Path, titles: Mapping[str, str]) -> str:
  """An axis a subject: lines over densities, points where a method was measured at one."""
  figure, axes = figures.subplots(len(tables), squeeze=False)
  marks = "os^vDPX*<>hd12348"
  for axis, (name, rows) in zip(axes[0], tables.items(), strict=True):
    rows = [row for row in rows if row["method"] != "dense"]
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
      points = sorted((row["budget"], row["perplexity"]) for row in rows if row["method"] == method)
      look = dict(marker=marks[i % len(marks)], ms=5, lw=1, mfc=None if i < 6 else "none")
      axis.plot(*zip(*points, strict=True), label=titles.get(method, method), **look)
    best = min(row["perplexity"] for row in rows)
    axis.set_ylim(0.95 * best, min(max(row["perplexity"] for row in rows) * 1.1, 12 * best))
    axis.set(xlabel="weights that stay", ylabel="perplexity", yscale="log", title=name)
    axis.yaxis.set_major_formatter("{x:.4g}")
    axis.yaxis.set_minor_formatter("{x:.4g}")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.legend(fontsize=6, ncols=2)
  return figures.save(figure, workdir, "densities")


def draw_progress(metrics: dict, workdir: Path) -> str:
  """Left: the measure of a subject over its own before the first epoch; right: predicted and measured changes."""
  figure, (left, right) = figures.subplots(2)
  for part in metrics.values():
    for name, found in part.items():
      for density, curve in found["curves"].items():
        quality = np.array([one.get("perplexity", np.exp(one.get("loss", 0.0))) for one in curve])
        left.plot([one["epoch"] for one in curve], quality / quality[0], "o-", ms=3, lw=1, label=f"{name}, {density}")
      for density, pairs in found["steps"].items():
        right.plot(*np.array(pairs).T, ".", ms=4, label=f"{name}, {density}")
  left.set(xlabel="epochs", ylabel="perplexity over the start's")
  right.axhline(0, color="0.4", lw=0.8)
  low = min(right.get_xlim()[0], right.get_ylim()[0])
  right.plot([low, 0], [low, 0], color="0.4", lw=0.8, ls="--")
  right.set(xlabel="predicted change of the loss", ylabel="measured")
  left.legend(fontsize=7)
  right.legend(fontsize=7)
  return figures.save(figure, workdir, "progress")
