"""Figures: quality by method and density, quality by epoch, predicted and measured changes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import figures


def draw_densities(tables: Mapping[str, list[dict]], workdir: Path, titles: Mapping[str, str]) -> str:
  """A bar a method and density, an axis a subject; bars beyond twelve times the best are cut."""
  figure, axes = figures.subplots(len(tables), squeeze=False)
  for axis, (name, rows) in zip(axes[0], tables.items(), strict=True):
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    rows = [row for row in rows if row["method"] != "dense"]
    rows.sort(key=lambda row: (row["budget"], -row["perplexity"]))
    values = [row["perplexity"] for row in rows]
    densities = [row["budget"] for row in rows]
    place = np.arange(len(rows)) + np.cumsum(np.diff(densities, prepend=densities[0]) > 0)  # a gap between densities
    colours = ["C1" if row["method"].startswith("icbs") else "C0" for row in rows]
    axis.barh(place, values, color=colours)
    labels = [f"{titles.get(row['method'], row['method'])}, {row['budget']:g}" for row in rows]
    axis.set_yticks(place, labels, size=7)
    most = min(1.15 * max(values), 12 * min(values))
    for y, value in zip(place, values, strict=True):
      axis.text(min(value, most), y, f" {value:.4g}", size=6, va="center", ha="left")
    axis.axvline(dense, color="0.4", lw=0.8, ls="--", label=f"dense, {dense:.4g}")
    axis.set(xlabel="perplexity", xscale="log", xlim=(0.9 * min(dense, *values), most), title=name)
    axis.xaxis.set_major_formatter("{x:.4g}")
    axis.xaxis.set_minor_formatter("{x:.4g}")
    axis.tick_params(axis="x", which="both", labelsize=6)
    axis.legend(fontsize=7, loc="upper right")
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
