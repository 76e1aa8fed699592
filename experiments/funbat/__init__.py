"""FunBaT: a known surface, real or generated tensors against the baselines, the cost of the smoother and an epoch."""

from pathlib import Path

from experiments import results
from experiments.funbat import comparison, speed, surface
from experiments.funbat.data import density, load_folds
from experiments.results import Claim

UNDEFINED = ("speed.*.slope*",)  # one size has no slope


def measure(config, workdir: Path, cache: Path, console) -> dict:
  sets = load_folds(config)
  console.say("the surface")
  metrics = {"surface": results.part(workdir, "surface", lambda: surface.measure(config))}
  metrics["density"] = {where: density(folds) for where, folds in sets.items()}
  metrics["comparison"] = comparison.compare(config, sets, workdir, console)
  console.say("timing smoothers and epochs")
  return metrics | {"speed": speed.measure(config, workdir)}


def claims(config, metrics: dict) -> list[Claim]:
  made = comparison.claims(config, metrics["comparison"], metrics["density"])
  return made + surface.claims(metrics["surface"]) + speed.claims(config, metrics["speed"])


def finding(config, metrics: dict) -> str:
  learned = metrics["surface"]["markov"]["rmse"]
  parts = [comparison.finding(metrics["comparison"]), f"a known surface is learned to {learned:.4f} (paper 0.004)"]
  return "; ".join(filter(None, parts)) + "."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  files = surface.draw(metrics["surface"], workdir) | comparison.draw(metrics["comparison"], workdir)
  return files | speed.draw(metrics["speed"], workdir)
