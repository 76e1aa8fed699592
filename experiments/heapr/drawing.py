"""Figures of pruned mixtures."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import figures

_HEAPR = ("heapr", "heapr_layer", "heapr_use", "heapr_tiles")
_WHOLE = ("naee", "least_used", "merged", "low_rank")


def draw_curves(rows: list[dict], workdir: Path, titles: Mapping[str, str]) -> str:
  """Perplexity added in % against the share removed: beside other scores, and beside other parts than neurons."""
  others = [name for name in dict.fromkeys(row["method"] for row in rows) if name not in ("dense", *_HEAPR, *_WHOLE)]
  groups = (("heapr", *others), (*_HEAPR, *_WHOLE))
  figure, axes = figures.subplots(2, sharey=True)
  dense = rows[0]["perplexity"]
  for axis, methods in zip(axes, groups, strict=True):
    for i, name in enumerate(methods):
      points = sorted(
        (100 * row["ratio"], 100 * (row["perplexity"] / dense - 1)) for row in rows if row["method"] == name
      )
      if points:
        thick = 2.2 if name == "heapr" else 1.1
        axis.plot(*zip(*points, strict=True), marker="osv^DPX*"[i % 8], ms=4, lw=thick, label=titles[name])
    axis.axhline(3, color="0.4", lw=0.8, ls="--")
    axis.set(xlabel="experts' parameters removed, %")
    axis.set_yscale("symlog", linthresh=1)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=7)
  axes[0].set(ylabel="perplexity added, %")
  return figures.save(figure, workdir, "curves")


def draw_removals(found: dict, workdir: Path, titles: Mapping[str, str]) -> str:
  """Measured against predicted loss of single removals, and correlations by score."""
  figure, (left, right) = figures.subplots(2)
  predicted, real = np.array(found["predicted"]), np.array(found["added"])
  left.plot(predicted, real, "o", ms=3)
  span = np.geomspace(max(predicted.min(), 1e-9), max(predicted.max(), 1e-8), 200)
  left.plot(span, span, color="0.4", lw=0.8, ls="--")
  left.axhline(0, color="0.4", lw=0.8)
  left.set(xlabel="added by HEAPr's score, nats", ylabel="really added, nats")
  left.set_xscale("log")
  left.set_yscale("symlog", linthresh=max(float(np.median(np.abs(real))), 1e-6))
  names = list(found["correlation"])
  label = lambda name: titles.get(name, titles.get(name.split(" ")[0], name) + " times use")
  right.barh(range(len(names)), [found["correlation"][name] for name in names])
  right.set_yticks(range(len(names)), [label(name) for name in names], size=8)
  right.invert_yaxis()
  right.set(xlabel="rank correlation with the loss added")
  return figures.save(figure, workdir, "removals")
