"""The figures of the experiment."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.contexts.readers import DENSE
from experiments.long_context import draw_answers


def answers(found: dict, workdir: Path) -> dict[str, str]:
  """Of the first model's longest prompts."""
  rows = next(iter(found.values()))
  longest = max(row["length"] for row in rows)
  file = draw_answers([row for row in rows if row["length"] == longest], workdir)
  return {file: "Answers right at the longest prompts, a colour a task, with 95 % intervals"}


def positions(found: dict, workdir: Path) -> dict[str, str]:
  """Losses over dense attention's by position, a panel a model."""
  figure, axes = figures.subplots(len(found), squeeze=False)
  for axis, (model, of) in zip(axes[0], found.items(), strict=True):
    names = dict.fromkeys(row["decoder"] for row in of["losses"] if row["decoder"] != DENSE)
    for i, name in enumerate(names):
      rows = [row for row in of["losses"] if row["decoder"] == name]
      x, y, error = (np.array([row[key] for row in rows]) for key in ("position", "difference", "error"))
      axis.errorbar(x + 0.008 * i * max(x), y, error, fmt="o-", ms=3, capsize=2, label=name)
    axis.axhline(0, color="grey", lw=0.8)
    axis.set_xticks(x)
    axis.set(title=model, xlabel="tokens before", ylabel="loss over dense, nats")
    axis.legend(fontsize=7)
  return {figures.save(figure, workdir, "positions"): "Loss of text over dense attention's by the tokens before it"}
