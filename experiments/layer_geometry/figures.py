"""Figures of layer geometry."""

from pathlib import Path

import matplotlib.ticker
import numpy as np

from experiments import figures, timing

_STYLE = {"cos_ut": ("C0", "cos(u, t)"), "cos_ur": ("C2", "cos(u, r)"), "cos_rt": ("C1", "cos(r, t)")}


def rows(model: dict) -> range:
  return range(1, len(model["layers"]) + 1)


def grid(plt_rows: int, columns: int, **options):
  """(figure, axes) of several rows in the common style."""
  return figures.plt.subplots(
    plt_rows, columns, figsize=(3.6 * columns, 3.0 * plt_rows), layout="constrained", squeeze=False, **options
  )


def draw_alignment(models: dict, main: str, workdir: Path) -> str:
  figure, axes = grid(2, len(models), sharey="row")
  for column, (name, model) in enumerate(models.items()):
    top, bottom = axes[:, column]
    layers, x = model["layers"], rows(model)
    for key, (colour, label) in _STYLE.items():
      top.plot(x, [r["classes"][main]["increment"][key]["mean"] for r in layers], "o-", color=colour, label=label)
    top.plot(x, [r["nulls"]["gap_orthogonal"] for r in layers], "k--", lw=1, label="sqrt(R²)")
    identity = [r["classes"]["identity"]["state"]["cos_ut"]["mean"] for r in layers]
    top.plot(x, identity, ":", color="0.5", label="cos(y, x)")
    top.set(title=name, ylim=(-0.3, 1.05))
    for key, colour, label in (("in_u", "C0", "E(u)"), ("in_t", "C4", "E(t)"), ("in_r", "C1", "E(r)")):
      bottom.plot(x, [r["classes"][main]["increment"][key]["mean"] for r in layers], "o-", color=colour, label=label)
    bottom.set(xlabel="layer", ylim=(0, 1.05))
    for axis in (top, bottom):
      axis.set_xticks(list(x))
  axes[0, 0].set_ylabel("mean cosine")
  axes[1, 0].set_ylabel("energy in the dominant subspace")
  for axis in axes[:, -1]:
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return figures.save(figure, workdir, "alignment")


def draw_null(models: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(2)
  markers = dict(zip(models, "osD^vP*X", strict=False))
  for axis, key, other, label in (
    (axes[0], "cos_ut", lambda r2: np.sqrt(r2), "cos(u, t)"),
    (axes[1], "cos_ur", lambda r2: np.sqrt(1 - r2), "cos(u, r)"),
  ):
    for name, model in models.items():
      points = [
        (np.clip(c["r2"], 0, 1), c["increment"][key]["mean"])
        for r in model["layers"]
        for kind, c in r["classes"].items()
        if kind != "identity"
      ]
      axis.plot(*zip(*points, strict=True), markers[name], ms=4, alpha=0.6, label=name)
    curve = np.linspace(0, 1, 200)
    axis.plot(curve, other(curve), "k--", lw=1, label="orthogonal fit")
    axis.set(xlabel="held-out R²", ylabel=f"mean {label}", xlim=(-0.03, 1.03), ylim=(-0.1, 1.05))
  axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return figures.save(figure, workdir, "null")


def draw_harm(models: dict, main: str, workdir: Path) -> str:
  figure, axes = grid(2, len(models), sharey="row")
  deepest = max(models.values(), key=lambda model: len(model["layers"]))
  for column, (name, model) in enumerate(models.items()):
    top, bottom = axes[:, column]
    layers, x = model["layers"], rows(model)
    of = lambda mode, which, layers=layers: [r["interventions"][main][mode][which] for r in layers]
    middle = np.array(of("single_token", "spearman"))
    low, high = np.array(of("single_token", "spearman_interval")).T
    bars = np.maximum([middle - low, high - middle], 0)
    top.errorbar(x, middle, bars, fmt="o-", capsize=2, label="one token")
    top.plot(x, of("all_tokens", "spearman"), "s-", label="all tokens")
    top.plot(x, of("single_token", "partial"), "^--", label="one token,\n‖u‖ and entropy fixed")
    top.axhline(0.7, color="black", lw=0.8, ls=":")
    top.set(title=name, xlabel="layer", ylim=(-0.45, 1.05))
    top.set_xticks(list(x))
    for i, r in enumerate(layers):
      colour = figures.plt.cm.viridis(i / max(len(deepest["layers"]) - 1, 1) * 0.9)
      doses = [(float(a), d["single_token"]) for a, d in r["doses"].items() if float(a) > 0]
      bottom.plot(*zip(*doses, strict=True), "o-", ms=3, color=colour, label=f"layer {i + 1}")
      bottom.plot(1.06, r["noise"]["single_token"], "x", color=colour)
    bottom.set(xlabel="share of r removed  (x: noise)", yscale="log")
    if model is deepest:
      handles, labels = bottom.get_legend_handles_labels()
  axes[1, -1].legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
  axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
  axes[0, 0].set_ylabel("Spearman of ‖r‖ and KL")
  axes[1, 0].set_ylabel("mean KL (nats), one token")
  return figures.save(figure, workdir, "harm")


def draw_classes(models: dict, classes: tuple[str, ...], workdir: Path) -> str:
  figure, axes = grid(1, len(models), sharey=True)
  colours = figures.plt.cm.tab10(np.arange(10))
  for axis, (name, model) in zip(axes[0], models.items(), strict=True):
    for i, kind in enumerate(c for c in classes if c != "identity"):
      fvu = [r["classes"][kind]["fvu"] for r in model["layers"]]
      axis.plot(rows(model), fvu, "o-", ms=3, color=colours[i], label=kind.replace("_", " "))
    axis.axhline(1, color="black", lw=0.8, ls=":")
    axis.set(title=name, xlabel="layer", ylim=(0, 1.6))
    axis.set_xticks(list(rows(model)))
  axes[0, 0].set_ylabel("fraction of variance unexplained")
  axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
  return figures.save(figure, workdir, "classes")


def draw_cost(cost: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(2)
  titles = {"fits": ("tokens fitted", "Low-rank fits"), "interventions": ("tokens T in the row", "T interventions")}
  for axis, (key, (label, title)) in zip(axes, titles.items(), strict=True):
    names = list(next(iter(cost[key].values()))["seconds"])
    for name in names:
      points = [(int(size), r["seconds"][name]) for size, r in cost[key].items()]
      shown = {"jax": "here", "numpy": "NumPy"}.get(name, name)
      axis.loglog(*zip(*points, strict=True), "o-", label=f"{shown}: n^{timing.slope(points[-2:]):.2f}")
    axis.set(xlabel=label, ylabel="seconds", title=title)
    axis.set_xticks(sizes := [int(size) for size in cost[key]], [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()
  return figures.save(figure, workdir, "cost")
