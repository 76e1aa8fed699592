"""The figures of FunBaT."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import LogLocator

from experiments import figures
from experiments.funbat.methods import FUNCTIONAL
from experiments.results import number


def draw_surface(curves, workdir: Path) -> str:
  figure, axes = figures.subplots(2)
  for axis, (x, truth, mean, std), name in zip(axes, curves, ("x", "y"), strict=True):
    mean, std = np.asarray(mean), np.asarray(std)
    axis.plot(x, mean, label="posterior mean")
    axis.fill_between(x, mean - 2 * std, mean + 2 * std, alpha=0.3, lw=0)
    axis.plot(x, truth, "k--", lw=1, label="truth")
    axis.set(xlabel=name, title=f"u({name}), rank 1, Matern-3/2")
  axes[0].legend()
  return figures.save(figure, workdir, "surface")


def draw_comparison(comparison, workdir: Path) -> str:
  figure, axes = figures.subplots(2, gridspec_kw=dict(width_ratios=(1.2, 1)))
  names = sorted(comparison, key=lambda name: -comparison[name]["errors"]["rmse"]["mean"])
  color = ["C0" if name in FUNCTIONAL else "0.7" for name in names]
  value = lambda key: [comparison[name]["errors"]["rmse"][key] for name in names]
  axes[0].barh(names, value("mean"), xerr=value("std"), color=color, error_kw=dict(lw=1))
  axes[0].grid(axis="y", alpha=0)
  axes[0].set(xlabel="test RMSE (standardised)", title="Methods, mean and deviation over folds")
  for name, row in comparison.items():
    if "history" in row:
      epochs = range(1, len(row["history"]) + 1)
      axes[1].plot(epochs, row["history"], label=name, ls="-" if name in FUNCTIONAL else "--")
  axes[1].set(xlabel="epoch", ylabel="test RMSE", title="Test error while fitting")
  axes[1].legend()
  return figures.save(figure, workdir, "comparison")


def draw_cost(cost, workdir: Path) -> str:
  figure, axes = figures.subplots(2)
  labels = {"numpy": "NumPy loop", "seq": "lax.scan", "assoc": "associative scan", "doubling": "recursive doubling"}
  rows = cost["smoother"]["rows"]
  for name, label in labels.items():
    line = [(r["steps"], r["milliseconds"][name]["median"] / 1e3) for r in rows if name in r["milliseconds"]]
    axes[0].loglog(*zip(*line, strict=True), "o-", label=label)
  axes[0].set(xlabel="steps J", ylabel="seconds", title="Kalman filter and RTS smoother")
  axes[0].legend()
  size, milliseconds = np.asarray(cost["epoch"]["line"]).T
  axes[1].loglog(size, milliseconds, "o-", label="measured")
  axes[1].loglog(size, milliseconds[-1] * size / size[-1], ":", color="black", label="linear")
  axes[1].set_ylim(milliseconds.min() / 4, milliseconds.max() * 2)
  axes[1].legend(loc="upper left")
  for axis, ticks in ((axes[0], [r["steps"] for r in rows]), (axes[1], size)):
    axis.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
    axis.minorticks_off()
  axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes[1].yaxis.set_major_formatter("{x:g}")
  axes[1].set(
    xlabel="observations N", ylabel="milliseconds", title=f"One epoch, slope {number(cost['epoch']['slope'])}"
  )
  return figures.save(figure, workdir, "cost")
