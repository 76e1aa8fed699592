"""The figures: training curves with what they end at, and what mistakes in the text cost."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.hnet.data import PERTURBATIONS


def pictures(metrics: dict, titles: dict[str, str], workdir: Path) -> dict[str, str]:
  files = {}
  if "arms" in metrics:
    files[_curves(metrics, titles, workdir)] = (
      "Training, bits a byte of held-out text at its end, and of perturbed text"
    )
  if "speed" in metrics:
    files[_speed(metrics["speed"], titles, workdir)] = "Time of a training step at equal FLOPs"
  return files


def _curves(metrics: dict, titles: dict[str, str], workdir: Path) -> str:
  found = metrics["arms"]
  figure, (left, middle, right) = figures.subplots(3)
  for name, row in found.items():
    if name != "bpe":  # whose loss is of tokens
      left.plot(*np.array(row["curve"]).T, lw=1, label=titles[name])
  left.set(xlabel="step", ylabel="training loss, nats a byte")
  left.legend(fontsize=8)
  bits = {titles[name]: row["bits"]["clean"] for name, row in found.items()}
  bits |= {f"one stage, {name}": row["bits"]["clean"] for name, row in metrics.get("ablations", {}).items()}
  colours = ["C0"] * len(found) + ["C4"] * (len(bits) - len(found))
  middle.barh(list(bits)[::-1], list(bits.values())[::-1], color=colours[::-1])
  low, high = min(bits.values()), max(bits.values())
  middle.set(xlabel="bits a byte of held-out text (orange: fewer steps)", xlim=(low - (high - low) / 4, None))
  for offset, name in enumerate(("mamba", "one", "bpe")):
    row = found[name]["bits"]
    lost = [100 * (row[how] / row["unchanged"] - 1) for how in PERTURBATIONS]
    right.bar(np.arange(len(lost)) + 0.27 * (offset - 1), lost, 0.25, label=titles[name])
  right.set_xticks(range(len(PERTURBATIONS)), [how.replace(" ", "\n") for how in PERTURBATIONS])
  right.set(ylabel="bits a byte added by mistakes, %")
  right.legend(fontsize=8)
  return figures.save(figure, workdir, "bits")


def _speed(found: dict, titles: dict[str, str], workdir: Path) -> str:
  figure, axis = figures.subplots()
  axis.barh([titles[name] for name in found["milliseconds"]], list(found["milliseconds"].values()))
  axis.set(xlabel="milliseconds of a training step")
  return figures.save(figure, workdir, "speed")
