"""Figures: success against the margin beside the law, cost against the number of steps, and how error rates spread."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.maker.voting import MAIN, SCHEMES, voted_eps
from jaxlab.tasks import maker


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  return {
    margins(config, metrics, workdir): "Runs without one wrong step against the votes an answer is ahead",
    costs(metrics, workdir): "Samples a step against the length of the run, at the margin its length asks for",
    spreads(
      config, metrics, workdir
    ): "Error rates of the steps of a run, by stage of training and by how samples are asked; 1/2 and more is fatal",
  }


def margins(config, metrics: dict, workdir: Path) -> str:
  figure, axis = figures.subplots(width=1.3)
  rows = sorted((r for n, r in metrics["runs"].items() if n.startswith(f"{MAIN}, k")), key=lambda r: r["margin"])
  eps = metrics["stages"][f"{config.main}"]["schemes"][MAIN]
  ks = np.arange(1, max(r["margin"] for r in rows) + 1)
  steps, votes = rows[0]["steps"], voted_eps(config, metrics, rows[0])
  axis.plot(ks, [maker.success(votes, int(k), steps) for k in ks], "k--", label="law, mean error rate of votes")
  own = [eps["law"][f"{k}"] for k in ks if f"{k}" in eps["law"]]
  axis.plot(ks[: len(own)], own, ":", color="gray", label="law, every step's own, flags as errors")
  axis.plot([r["margin"] for r in rows], [r["success"] for r in rows], "o", ms=8, label="measured")
  for marker, scheme in zip("sv^", (s for s in SCHEMES if s != MAIN), strict=True):
    if scheme in metrics["runs"]:
      run = metrics["runs"][scheme]
      axis.plot(run["margin"], run["success"], marker, ms=9, mfc="none", label=f"asked otherwise: {scheme}")
  axis.set(xlabel="k, votes ahead", ylabel="runs without a wrong step", ylim=(-0.05, 1.05))
  axis.set_xticks(ks)
  axis.set_title(f"{steps} steps, error rate of votes {votes:.2g}")
  axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  return figures.save(figure, workdir, "margins")


def costs(metrics: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  steps, samples = (np.array([r[name] for r in metrics["length"]], float) for name in ("steps", "samples"))
  axis.semilogx(steps, samples, "o-", base=2, label="measured")
  factor = np.exp(np.mean(np.log(samples / np.log(steps))))
  axis.semilogx(steps, factor * np.log(steps), "k--", base=2, label="a ln s")
  axis.set(xlabel="steps s", ylabel="samples a step", ylim=(0, None), title="Cost of a run, a step")
  axis.legend()
  return figures.save(figure, workdir, "cost")


def spreads(config, metrics: dict, workdir: Path) -> str:
  stages = metrics["stages"]
  figure, axes = figures.subplots(len(stages), width=0.75, sharey=True)
  share = [0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0]
  for axis, (stage, found) in zip(axes, stages.items(), strict=True):
    for colour, (name, line) in enumerate(zip(SCHEMES, ("o-", "s--", "^--", "o-"), strict=True)):
      if name in found["schemes"]:
        quantiles = np.maximum(found["schemes"][name]["quantiles"], 1e-6)
        axis.plot(range(len(share)), quantiles, line, ms=4, color=f"C{colour}", label=name)
    axis.axhline(0.5, color="black", ls=":", lw=1)
    axis.set(yscale="log", xlabel="quantile of the steps", title=f"after {stage} steps of training")
    axis.set_xticks(range(len(share)), [f"{q:g}" for q in share], fontsize=7)
  axes[0].set_ylabel("error rate of a sample")
  axes[list(stages).index(f"{config.main}")].legend(fontsize=7)
  return figures.save(figure, workdir, "spread")
