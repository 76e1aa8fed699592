"""Figures of compressed models: perplexity against bytes."""

from collections.abc import Mapping
from pathlib import Path

from experiments import figures
from experiments.compressing import COMPRESSED, at


def draw_frontier(rows: list[dict], workdir: Path, titles: Mapping[str, str]) -> str:
  """Perplexity against bytes, an axis a model, a line a method; the file's name."""
  models = list(dict.fromkeys(row["subject"] for row in rows))
  figure, axes = figures.subplots(len(models), squeeze=False)
  marks = "os^vDPX*<>"
  for axis, model in zip(axes[0], models, strict=True):
    mine = [row for row in rows if row["subject"] == model]
    methods = [method for method in dict.fromkeys(row["method"] for row in mine) if method != "dense"]
    dense = at(mine, "dense")
    for i, method in enumerate(methods):
      points = sorted((row["bytes"] / 1e6, row["perplexity"]) for row in mine if row["method"] == method)
      fill = None if i < 8 else "none"  # there are eight colours
      look = dict(marker=marks[i % len(marks)], ms=5, lw=1, mfc=fill, label=titles.get(method, method))
      axis.plot(*zip(*points, strict=True), **look)
    axis.axhline(dense["perplexity"], color="0.4", lw=0.8, ls="--", label=f"dense, {dense['bytes'] / 1e6:.3g} MB")
    high = min(max(row["perplexity"] for row in mine), 30 * dense["perplexity"])
    axis.set(xlabel="MB, all parameters", ylabel="perplexity", yscale="log", title=model)
    axis.set_ylim(0.9 * dense["perplexity"], 1.1 * high)
    axis.yaxis.set_major_formatter("{x:.4g}")
    axis.yaxis.set_minor_formatter("{x:.4g}")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    beside = dict(loc="center left", bbox_to_anchor=(1, 0.5)) if len(methods) > 8 else {}
    axis.legend(fontsize=7, **beside)
  return figures.save(figure, workdir, "frontier")


def draw_pair(metrics: dict, workdir: Path) -> dict[str, str]:
  """Perplexity against bytes of the original and of the folder that was written."""
  (found,) = metrics[COMPRESSED].values()
  figure, axis = figures.subplots()
  for name in ("original", COMPRESSED):
    axis.plot(found["bytes"][name] / 1e6, found["perplexity"][name], "o", label=name)
  axis.set(xlabel="MB, all parameters", ylabel="perplexity", xlim=(0, 1.1 * found["bytes"]["original"] / 1e6))
  axis.legend()
  return {figures.save(figure, workdir, "pair"): "Before and after"}
