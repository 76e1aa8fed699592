"""The figure of the sweep over ranks."""

from pathlib import Path

import numpy as np

from experiments import figures


def draw_sweep(by_model: dict, workdir: Path) -> str:
  """Perplexity added against the parameters that a type of map keeps, an axis a model."""
  figure, axes = figures.subplots(len(by_model), squeeze=False)
  for axis, (model, found) in zip(axes[0], by_model.items(), strict=True):
    for mark, (name, losses) in zip("osv^DPX", found["sweep"]["losses"].items(), strict=False):
      kept = np.array([int(rank) for rank in losses]) / found["sizes"][name]["even"]
      more = 100 * (np.exp(np.array([*losses.values()]) - found["sweep"]["dense"]) - 1)
      axis.plot(kept, np.maximum(more, 0.05), f"{mark}-", ms=4, lw=1, label=name)
    axis.axhline(1, color="0.4", lw=0.8, ls="--")
    axis.set(xlabel="parameters kept of that type", ylabel="perplexity added, %", yscale="log", title=model)
    axis.yaxis.set_major_formatter("{x:.3g}")
    axis.legend(fontsize=7)
  return figures.save(figure, workdir, "sweep")
