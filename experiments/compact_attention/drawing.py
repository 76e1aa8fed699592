"""The figures of the experiment."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.compact_attention.choosing import DENSE, QUOKA
from experiments.compact_attention.executing import PLANTED
from experiments.long_context import parse

_MARKS = dict(zip(("compact", "x_attention", "flex_prefill", "minference", "seer"), "os^Dv", strict=True))


def times(cases: dict, workdir: Path) -> dict[str, str]:
  """Milliseconds of every form against the length of the past."""
  of_length = sorted((case for name, case in cases.items() if name.startswith(PLANTED)), key=lambda c: c["length"])
  figure, axis = figures.subplots(width=1.2)
  lengths = [case["length"] for case in of_length]
  for name in of_length[0]["milliseconds"]:
    found = [[case["milliseconds"][name][at] for case in of_length] for at in ("median", "p10", "p90")]
    (line,) = axis.plot(lengths, found[0], "o-", ms=4, label=name)
    axis.fill_between(lengths, found[1], found[2], color=line.get_color(), alpha=0.2)
  axis.set(xlabel="positions", ylabel="ms a chunk", xscale="log", yscale="log", xticks=lengths)
  axis.set_xticklabels([f"{length // 1024}K" if length >= 1024 else f"{length}" for length in lengths])
  axis.minorticks_off()
  axis.legend(fontsize=7)
  return {figures.save(figure, workdir, "times"): "Attention of one chunk in all forms of executing one selection"}


def choices(found: dict, workdir: Path) -> dict[str, str]:
  """Attention captured against blocks, of every selector before (hollow) and after the union, a panel a model."""
  figure, axes = figures.subplots(len(found), squeeze=False)
  for axis, (subject, methods) in zip(axes[0], found.items(), strict=True):
    kinds = dict.fromkeys(parse(text)[0] for text in methods)
    for i, kind in enumerate(kinds):
      rows = [row for text, row in methods.items() if parse(text)[0] == kind]
      style = dict(color=f"C{i}", marker=_MARKS.get(kind, "o"), ms=5)
      for when, fill in (("before", "none"), ("after", "full")):
        label = kind.replace("_", " ") if when == "after" else None
        line = sorted((row[when], row[f"mass_{when}"]) for row in rows)
        axis.plot(*zip(*line, strict=True), "-", alpha=0.9, fillstyle=fill, label=label, **style)
    axis.set(xlabel="share of the causal blocks", ylabel="share of the attention", title=subject)
    axis.legend(fontsize=7, loc="lower right")
  caption = "Attention captured by what selectors choose (hollow) and by the union of a chunk (full)"
  return {figures.save(figure, workdir, "choices"): caption}


def accuracies(found: dict, chosen: dict, workdir: Path) -> dict[str, str]:
  """Questions answered against the share of the past that is read, mean over tasks of the longest prompts."""
  figure, axes = figures.subplots(len(found), squeeze=False)
  colours = {}
  for axis, (subject, measured) in zip(axes[0], found.items(), strict=True):
    longest = max(row["length"] for row in measured["rows"])
    groups = {}
    for row in measured["rows"]:
      if row["length"] == longest:
        groups.setdefault(row["decoder"], []).append(row)
    lines = {}
    for text, rows in groups.items():
      kind, value = (DENSE, 1.0) if text == DENSE else parse(text)
      known = {DENSE: 1.0, QUOKA: value}.get(kind)
      # Block-sparse attention shares the rule of the union, and its place on the axis.
      place = known or chosen.get(subject, {}).get(f"compact {text.partition(' ')[2]}", {}).get("past")
      place = chosen.get(subject, {}).get(text, {}).get("past", place)
      if place is not None:
        low, share, high = (np.mean([row[at] for row in rows]) for at in ("low", "share", "high"))
        lines.setdefault(kind, []).append((place, share, share - low, high - share))
    for i, (kind, points) in enumerate(lines.items()):
      x, y, *error = zip(*sorted(points), strict=True)
      x = np.array(x) + 0.008 * i  # bars beside each other
      color = colours.setdefault(kind, f"C{len(colours)}")
      axis.errorbar(x, y, yerr=error, fmt="o-", ms=4, capsize=2, color=color, label=kind.replace("_", " "))
    axis.set(xlabel="share of the past read", ylabel="share answered", title=f"{subject}, {longest} tokens")
    axis.set_ylim(0, 1.03)
    axis.legend(fontsize=7, loc="lower right")
  return {figures.save(figure, workdir, "accuracy"): "Questions answered against the share of the past that is read"}
