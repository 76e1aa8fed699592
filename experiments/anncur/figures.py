"""Figures of the ANNCUR experiment."""

from pathlib import Path

import numpy as np

from experiments import figures, timing

METHODS = {
  "ADACUR": dict(color="C1", marker="s"),
  "ANNCUR": dict(color="C0", marker="o"),
  "fixed_anc_ent_cur": dict(color="C5", marker="P", ls="-."),
  "DE_base": dict(color="C2", marker="^", ls="--"),
  "DE distilled, MATCH": dict(color="C3", marker="v", ls="--"),
  "mean score": dict(color="0.2"),
  "BM25": dict(color="C4", marker="x", ls=":"),
  "TF-IDF": dict(color="0.5", marker="d", ls=":"),
  "random": dict(color="0.7", ls=":"),
}


def draw_recall(config, table: dict, workdir: Path) -> str:
  ks = (1, *config.search.claimed)
  figure, axes = figures.subplots(len(ks), sharey=True)
  for axis, k in zip(axes, ks, strict=True):
    for name, style in METHODS.items():
      row = table[name][f"k={k}"]
      axis.plot([int(c.removeprefix("C=")) for c in row], list(row.values()), ms=5, label=name, **style)
    axis.set(xlabel="calls of f a query, C", title=f"k = {k}", ylim=(0, 1.02))
  axes[0].set_ylabel("recall of the exact top k")
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
  return figures.save(figure, workdir, "recall")


def draw_errors(config, errors: dict, workdir: Path) -> str:
  figure, axis = figures.subplots(width=1.5)
  for name, style in (
    ("bare", "x:"), ("rcond 0.01", "d--"), ("ridge", "o-"), ("CUR oracle", "k-."), ("SVD of the test matrix", "k:")
  ):  # fmt: skip
    row = errors["emb"].get(name, {})
    axis.loglog([int(a) for a in row], list(row.values()), style, label=name)
  axis.axhline(errors["emb"]["mean score"], color="0.6", lw=1, label="mean score")
  axis.axvline(config.domain.anchor_queries, color="0.8", lw=1, zorder=0)
  ticks = list(config.errors.anchors)
  axis.set_xticks(ticks, [f"{t}" for t in ticks], rotation=60)
  axis.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1.0], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
  axis.minorticks_off()
  axis.set(xlabel="anchor items $k_i$ (line: $k_i = k_q$)", ylabel="relative error, test queries", title="EMB-CE")
  axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  return figures.save(figure, workdir, "errors")


def draw_spectrum(spectrum: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  for head, label in (("emb", "EMB-CE"), ("cls", "CLS-CE")):
    s = spectrum[head]["singular values"]
    axis.loglog(np.arange(1, len(s) + 1), s, label=f"{label}, effective rank {spectrum[head]['centred']:.1f}")
  axis.set(xlabel="index", ylabel="singular value / first", title="Score matrices without column means")
  axis.set_ylim(1e-4, 1.5)  # queries that are cut to the same tokens, and the means, leave zeros at the end
  axis.legend(fontsize=8)
  return figures.save(figure, workdir, "spectrum")


def draw_cost(cost: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(2)
  sizes = [int(n) for n in cost]
  groups = (
    ("A query", {"all items by f": "o-", "rerank DE_base": "s--", "ANNCUR": "^-"}),
    ("Algebra", {"index": "o-", "index, NumPy": "o--", "search": "^-", "search, NumPy": "^--"}),
  )
  for axis, (title, names) in zip(axes, groups, strict=True):
    for name, style in names.items():
      points = [(n, cost[f"{n}"][name]) for n in sizes]
      axis.loglog(*zip(*points, strict=True), style, label=f"{name}, slope {timing.slope(points):.2f}")
    axis.set(xlabel="items n", ylabel="seconds", title=title)
    axis.set_ylim(top=axis.get_ylim()[1] * 30)  # room for the legend
    axis.legend(fontsize=8, loc="upper left")
  return figures.save(figure, workdir, "cost")
