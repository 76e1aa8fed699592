"""The figure of what layers keep."""

from pathlib import Path

import numpy as np

from experiments import figures


def draw_sizes(config, by_model: dict, workdir: Path) -> str:
  """Shares of heads and of neurons a layer at the smallest and the main budget, an axis a model."""
  figure, axes = figures.subplots(len(by_model), squeeze=False)
  for axis, (model, rows) in zip(axes[0], by_model.items(), strict=True):
    mine = sorted((row for row in rows if row["method"] == "struprune"), key=lambda row: -row["budget"])
    for row, colour in zip(mine if len(mine) < 3 else (mine[0], mine[-1]), ("C0", "C1"), strict=False):
      for kind, line in (("heads", "o--"), ("neurons", "s-")):
        sizes = np.atleast_1d(row["kept"][kind])
        layers = np.arange(row["kept"]["layers"])
        share = np.broadcast_to(sizes, layers.shape) / row["kept"][f"all {kind}"]
        axis.plot(layers, share, line, color=colour, ms=4, lw=1, label=f"{kind} at {row['budget']:g}")
    axis.set(xlabel="layer", ylabel="share that is kept", ylim=(0, 1.05), title=model)
    figures.leave_room(axis, 0.2)
    axis.legend(fontsize=7, ncols=2, loc="upper center")
  return figures.save(figure, workdir, "sizes")
