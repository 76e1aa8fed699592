"""One look for all figures."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update(
  {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": matplotlib.cycler(
      color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B5A2B"]
    ),
    "legend.frameon": False,
  }
)


def subplots(columns: int = 1, rows: int = 1, *, width: float = 1.0, height: float = 1.0, **options):
  """(figure, axes) in the common style, each axis of `width` and `height` times the usual ones."""
  size = 5.2 * columns * width, 3.8 * rows * height
  return plt.subplots(rows, columns, figsize=size, layout="constrained", **options)


def leave_room(axis, share: float = 0.3) -> None:
  """Room for a legend above the data."""
  low, high = axis.get_ylim()
  axis.set_ylim(low, high + share * (high - low))


def save(figure, workdir: Path, name: str) -> str:
  """Saves as PNG and returns the file name."""
  figure.savefig(workdir / f"{name}.png")
  plt.close(figure)
  return f"{name}.png"
