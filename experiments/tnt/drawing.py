"""The figures: time of a step, losses of the arms and ablations, losses by chunk, recall."""

from pathlib import Path

import numpy as np
from matplotlib import ticker

from experiments import figures
from experiments.tnt.arms import TNT
from experiments.tnt.stages import TUNED


def pictures(config, metrics: dict, workdir: Path) -> dict[str, str]:
  files = {}
  if "arms" in metrics:
    files[_losses(metrics, workdir)] = (
      "Loss of held-out text at equal parameters and tokens (grey: a part of TNT changed)"
    )
  if "speed" in metrics or "stages" in metrics:
    files[_curves(config, metrics, workdir)] = (
      "Time of a training step against the length of its rows; loss of held-out text by the chunk of the evaluation"
    )
  if "recall" in metrics:
    files[_recall(metrics["recall"], workdir)] = "Pairs recalled, a point a seed"
  return files


def _losses(metrics: dict, workdir: Path) -> str:
  rows = metrics["arms"] | {f"TNT, {name}": row for name, row in metrics.get("ablations", {}).items()}
  rows = dict(sorted(rows.items(), key=lambda pair: pair[1]["loss"], reverse=True))
  figure, axis = figures.subplots(width=1.5, height=1.2)
  colour = lambda name: "C1" if name == TNT else "C0" if name in metrics["arms"] else "0.6"
  axis.barh(list(rows), [row["loss"] for row in rows.values()], color=[colour(name) for name in rows])
  for place, row in enumerate(rows.values()):
    axis.plot(row["losses"], [place] * len(row["losses"]), "k|", ms=9)
  every = [loss for row in rows.values() for loss in row["losses"]]
  low, high = min(every), max(every)
  axis.set(xlabel="loss of held-out text, nats a token (bars: mean, marks: seeds)")
  axis.set_xlim(low - max((high - low) / 3, 0.01), high + max((high - low) / 20, 0.002))
  axis.grid(axis="y", visible=False)
  return figures.save(figure, workdir, "losses")


def _curves(config, metrics: dict, workdir: Path) -> str:
  figure, (left, right) = figures.subplots(2, width=1.1)
  for name, rows in metrics.get("speed", {"milliseconds": {}})["milliseconds"].items():
    left.loglog([int(n) for n in rows], [row["median"] for row in rows.values()], "o-", label=name)
  if "speed" in metrics:
    lengths = list(config.speed.lengths)
    left.set_xticks(lengths, [f"{n}" for n in lengths])
    left.set_xticks([], minor=True)
    left.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    left.yaxis.set_minor_formatter(ticker.StrMethodFormatter("{x:g}"))
    left.tick_params(axis="y", which="minor", labelsize=8)
    left.set(xlabel="tokens of a row", ylabel=f"ms a step of {config.speed.tokens} tokens")
    left.legend(fontsize=8)
  if "stages" in metrics:
    c = config.chunks
    own = {"Titans": c.titans, "Titans, large chunks": c.coarse, "stage 1": c.local[0], TUNED: c.small[0]}
    for number, (name, curve) in enumerate(metrics["stages"]["curves"].items()):
      right.semilogx([int(n) for n in curve], list(curve.values()), "o-", base=2, ms=4, color=f"C{number}", label=name)
      if f"{own[name]}" in curve:
        right.plot(own[name], curve[f"{own[name]}"], "*", ms=14, color=f"C{number}")
    chunks = sorted({int(n) for curve in metrics["stages"]["curves"].values() for n in curve})
    right.set_xticks(chunks, [f"{n}" for n in chunks])
    right.set(xlabel="first local chunk at evaluation (star: in training)", ylabel="loss of held-out text, nats")
    right.legend(fontsize=8)
  return figures.save(figure, workdir, "curves")


def _recall(found: dict, workdir: Path) -> str:
  figure, axis = figures.subplots(width=1.4)
  for place, (name, row) in enumerate(reversed(found.items())):
    right = 100 * np.asarray(row["accuracy"])
    axis.barh(place, right.mean(), color="C0" if "," in name else "C2")
    axis.plot(right, [place] * len(right), "k|", ms=9)
  axis.set_yticks(range(len(found)), list(found)[::-1])
  axis.set(xlabel="values recalled, % (marks: seeds)", xlim=(0, 105))
  axis.grid(axis="y", visible=False)
  return figures.save(figure, workdir, "recall")
