"""The figures of the experiment."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.dhsa.methods import DENSE
from experiments.long_context import parse


def accuracies(found: dict, workdir: Path) -> dict[str, str]:
  """Questions answered against the budget, mean over tasks of the longest prompts, a panel a model."""
  figure, axes = figures.subplots(len(found), squeeze=False)
  for axis, (subject, measured) in zip(axes[0], found.items(), strict=True):
    longest = max(row["length"] for row in measured["rows"])
    rows = [row for row in measured["rows"] if row["length"] == longest]
    lines = {}
    for text in dict.fromkeys(row["decoder"] for row in rows):
      low, share, high = (
        np.mean([row[at] for row in rows if row["decoder"] == text]) for at in ("low", "share", "high")
      )
      kind, budget = (DENSE, None) if text == DENSE else parse(text)
      lines.setdefault(kind, []).append((budget, share, share - low, high - share))
    for i, (kind, points) in enumerate(lines.items()):
      if kind == DENSE:
        axis.axhline(points[0][1], color="0.4", lw=1, label=kind)
        continue
      x, y, *error = zip(*sorted(points), strict=True)
      x = np.array(x) * (1 + 0.015 * i)  # bars beside each other
      axis.errorbar(x, y, yerr=error, fmt="o-", ms=4, capsize=2, color=f"C{i}", label=kind.replace("_", " "))
    axis.set(xlabel="keys a block sees, share of the prompt", ylabel="share answered", xscale="log")
    axis.set(title=f"{subject}, {longest} tokens", ylim=(0, 1.03))
    axis.legend(fontsize=7)
  return {figures.save(figure, workdir, "accuracy"): "Questions answered against the budget of keys"}


def prefills(found: dict, workdir: Path) -> dict[str, str]:
  """Milliseconds and temporary memory of a layer against the length of the prompt."""
  cases = sorted(found.values(), key=lambda case: case["length"])
  figure, (time, memory) = figures.subplots(2)
  for name in dict.fromkeys(name for case in cases for name in case["milliseconds"]):
    mine = [case for case in cases if name in case["milliseconds"]]
    lengths = [case["length"] for case in mine]
    time.plot(lengths, [case["milliseconds"][name]["median"] for case in mine], "o-", ms=4, label=name)
    memory.plot(lengths, [case["temporaries"][name] / 1e6 for case in mine], "o-", ms=4, label=name)
  for axis, label in ((time, "ms a layer"), (memory, "MB of temporaries")):
    lengths = [case["length"] for case in cases]
    axis.set(xlabel="positions", ylabel=label, xscale="log", yscale="log", xticks=lengths)
    axis.set_xticklabels([f"{length // 1024}K" if length >= 1024 else f"{length}" for length in lengths])
    axis.minorticks_off()
  time.legend(fontsize=7)
  return {figures.save(figure, workdir, "prefill"): "Time and memory of one layer against the length of the prompt"}
