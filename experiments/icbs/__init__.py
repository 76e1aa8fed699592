"""iCBS: perplexity and accuracy at a density beside one-shot pruning, its parts left out one by one.

A module here is a part of the run.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from experiments import results
from experiments.compressing import COMPRESSED, at, chosen_parts, measured, subjects
from experiments.compressing_drawing import draw_pair
from experiments.compressing_folder import written, written_claims, written_finding
from experiments.icbs import language, pictures
from experiments.icbs.drawing import draw_densities, draw_progress
from experiments.results import Claim

FRONTIER, PICTURES = "frontier", "pictures"
TITLES = dict(
  icbs="iCBS", wanda="Wanda", wanda_more="Wanda, more text", sparsegpt="SparseGPT", magnitude="magnitude",
  gradient="gradient", random="random", icbs_diagonal="iCBS, diagonal", icbs_released="iCBS, released cutoff",
  icbs_random="iCBS, random blocks", icbs_no_gradient="iCBS, a = 0", icbs_no_tabu="iCBS, no tabu",
  icbs_no_fixing="iCBS, nothing fixed", icbs_from_wanda="iCBS from Wanda", cbs="CBS-S", cbs_update="CBS-S, CBS-U",
)  # fmt: skip
_MOST = 3.0  # times the original's perplexity, of a model of one's own at half the weights


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts; of config.model alone the one that prunes it to config.budget, the share that stays."""
  measures = {
    FRONTIER: lambda subject: language.frontier(config, subject, console=console),
    COMPRESSED: lambda subject: written(config, subject, language.chosen(config, subject), workdir, console),
  }
  parts = chosen_parts(config, measures | {PICTURES: None})
  of_models = {part: run for part, run in parts.items() if part != PICTURES}
  metrics = measured(config, workdir, of_models, subjects(config, cache), console) if of_models else {}
  if PICTURES in parts:
    console.say(PICTURES)
    run = lambda: pictures.measure(config, cache, console)
    metrics[PICTURES] = {pictures.SUBJECT: results.part(workdir, PICTURES, run)}
  return metrics


def claims(config, metrics: dict) -> list[Claim]:
  if COMPRESSED in metrics:
    return written_claims(*metrics[COMPRESSED].values(), most=_MOST)
  made = []
  if FRONTIER in metrics:
    made += language_claims(metrics)
  if PICTURES in metrics:
    made += picture_claims(config, metrics[PICTURES][pictures.SUBJECT])
  return made + part_claims(metrics) + [prediction_claim(metrics)]


def ratios(metrics: dict, method: str, over: str) -> dict[str, float]:
  """{"subject at density": perplexity over that of the other, where both were measured}.

  Of a classifier it is the exponential of its loss on the test set.
  """
  found = {}
  for name, rows in _tables(metrics):
    other = {row["budget"]: row["perplexity"] for row in rows if row["method"] == over}
    mine = [row for row in rows if row["method"] == method and row["budget"] in other]
    found |= {f"{name} at {row['budget']:g}": row["perplexity"] / other[row["budget"]] for row in mine}
  return found


def _few(value: float) -> float:
  """Four digits: those that metrics as they are published determine."""
  return float(f"{value:.4g}")


def _tables(metrics: dict) -> Iterator[tuple[str, list[dict]]]:
  for name, found in metrics.get(FRONTIER, {}).items():
    yield name, found["rows"]
  for name, found in metrics.get(PICTURES, {}).items():
    rows = [dict(method="dense", density=1, **found["dense"]), *found["rows"]]
    yield name, [dict(row, budget=row["density"], perplexity=math.exp(row["loss"])) for row in rows]


def language_claims(metrics: dict) -> list[Claim]:
  only = {FRONTIER: metrics[FRONTIER]}
  made = [
    _worst("Perplexity of iCBS over Wanda's of the same density, worst case", only, "icbs", "wanda", 0.98),
    _worst("Perplexity of iCBS over Wanda's on all the text that iCBS read", only, "icbs", "wanda_more", 0.98),
    _worst("Perplexity of iCBS, which changes no weight, over SparseGPT's, which does", only, "icbs", "sparsegpt", 1.0),
  ]
  curves = {
    f"{name} at {density}": curve
    for name, found in metrics[FRONTIER].items()
    for density, curve in found["curves"].items()
  }
  later = {where: curve[-1]["perplexity"] / curve[1]["perplexity"] for where, curve in curves.items()}
  where = max(later, key=later.get)
  by_epoch = lambda curve: ", ".join(f"{one['perplexity']:.4g}" for one in curve)
  seen = lambda curve: f"{100 * curve[-1]['covered']:.2g} % of the weights in a block"
  listed = "; ".join(f"{name}: {by_epoch(curve)}, {seen(curve)}" for name, curve in curves.items())
  made.insert(
    1,
    Claim(
      "Perplexity after the last epoch over that after the first, worst case", "ratio", "lower",
      ours=_few(later[where]), threshold=0.995, baseline=f"{curves[where][1]['perplexity']:.4g} after one",
      note=f"{where}; {listed}",
    ),
  )  # fmt: skip
  return made


def _worst(name: str, metrics: dict, method: str, over: str, threshold: float) -> Claim:
  found = ratios(metrics, method, over)
  where = max(found, key=found.get)
  subject, density = where.split(" at ")
  rows = dict(_tables(metrics))[subject]
  say = lambda who: f"{at(rows, who, float(density))['perplexity']:.4g}"
  return Claim(
    name, "ratio", "lower", ours=_few(found[where]), threshold=threshold, baseline=f"{TITLES[over]} {say(over)}",
    note=f"{where}: {say(method)}; " + ", ".join(f"{key} {ratio:.3g}" for key, ratio in found.items())
    + (", of the exponential of the test loss" if pictures.SUBJECT in dict(_tables(metrics)) else ""),
  )  # fmt: skip


def picture_claims(config, found: dict) -> list[Claim]:
  """In points of accuracy."""
  right = {(row["method"], row["density"]): row["accuracy"] for row in found["rows"]}
  main = config.pictures.main
  gain = right["icbs", main] - right["magnitude", main]
  curve = ", ".join(f"{one['accuracy']:.4g}" for one in found["curves"][f"{main:g}"])
  rivals = {
    density: max(right[how, density] for how in ("wanda", "wanda_more", "cbs") if (how, density) in right)
    for how, density in right if how == "icbs"
  }  # fmt: skip
  best = {
    density: max(right[how, density] for how in ("icbs", "icbs_from_wanda") if (how, density) in right)
    for density in rivals
  }
  worst = min(best, key=lambda density: best[density] - rivals[density])
  listed = "; ".join(
    f"at {density:g} " + ", ".join(f"{TITLES[how]} {value:.3g}" for (how, d), value in right.items()
                                  if d == density and not (how in language.VARIANTS and how != "icbs"))
    for density in best
  )  # fmt: skip
  return [
    Claim(
      f"Points of accuracy that iCBS gives back to magnitude pruning at a density of {main:g}", "points", "higher",
      ours=_few(gain), threshold=15.0, paper=21.9, baseline=f"magnitude {right['magnitude', main]:.4g} %",
      note=f"images, {found['dense']['accuracy']:.4g} % dense; by epoch {curve}; the paper's notebook has other images",
    ),
    Claim(
      "Points of accuracy of iCBS over the best of Wanda and CBS-S, which change no weight either, worst density",
      "points", "higher", ours=_few(best[worst] - rivals[worst]), threshold=0.0, baseline=f"{rivals[worst]:.4g} %",
      note=listed,
    ),
  ]  # fmt: skip


def part_claims(metrics: dict) -> list[Claim]:
  """What each part of the method is good for: perplexity with it over without, or of it over another way."""
  wanted = {
    "icbs_diagonal": ("Perplexity with interactions in a block over without, worst case", 1.0),
    "icbs_released": ("Perplexity with the right cutoff over the released code's, worst case", 1.0),
    "icbs_random": ("Perplexity with blocks by gradient over random ones, worst case", 1.0),
    "icbs_no_gradient": ("Perplexity with the first-order term over without, worst case", 1.0),
    "icbs_no_tabu": ("Perplexity with tabu weights over without, worst case", 1.0),
    "icbs_no_fixing": ("Perplexity with weights fixed over none, worst case", 1.0),
  }
  measured_ones = {how: said for how, said in wanted.items() if ratios(metrics, "icbs", how)}
  found = {how: _worst(said, metrics, "icbs", how, most) for how, (said, most) in measured_ones.items()}
  both = [found.pop(how) for how in ("icbs_no_tabu", "icbs_no_fixing") if how in found]
  if len(both) == 2:
    worst = max(both, key=lambda one: one.ours)
    notes = "; ".join(f"{word}: {one.note}" for word, one in zip(("tabu", "fixed"), both, strict=True))
    name = "Perplexity with tabu and fixed weights over without one of them, worst case"
    found["both"] = Claim(name, "ratio", "lower", ours=worst.ours, threshold=1.0, baseline=worst.baseline, note=notes)
  return list(found.values())


def prediction_claim(metrics: dict) -> Claim:
  found = {
    f"{name} at {density}": language.rank_correlation(pairs)
    for part in (FRONTIER, PICTURES)
    for name, kept in metrics.get(part, {}).items()
    for density, pairs in kept["steps"].items()
  }
  where = min(found, key=found.get)
  return Claim(
    "Rank correlation of the predicted and the measured change of a batch's loss, worst case", "", "higher",
    ours=_few(found[where]), threshold=0.5, baseline="none would be 0",
    note=", ".join(f"{name} {value:.3g}" for name, value in found.items()),
  )  # fmt: skip


def finding(config, metrics: dict) -> str:
  if COMPRESSED in metrics:
    return written_finding(metrics)
  said = []
  if FRONTIER in metrics:
    for name, found in metrics[FRONTIER].items():
      mine, wanda, dense = (f"{at(found['rows'], *which)['perplexity']:.4g}" for which in _said(config))
      said.append(f"{name} {mine} (Wanda {wanda}, dense {dense})")
    said = [f"with {config.budget:.0%} of the weights perplexity is " + ", ".join(said)]
  if PICTURES in metrics:
    gain = picture_claims(config, metrics[PICTURES][pictures.SUBJECT])[0].ours
    share = f"{config.pictures.main:.0%}"
    said.append(f"at {share} a classifier of images gets back {gain:.3g} points over magnitude (paper's code 21.9)")
  text = "; ".join(said)
  return text[0].upper() + text[1:] + "."


def _said(config):
  return (("icbs", config.budget), ("wanda", config.budget), ("dense",))


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  if COMPRESSED in metrics:
    return draw_pair(metrics, workdir)
  return {
    draw_densities(
      dict(_tables(metrics)), workdir, TITLES
    ): "Perplexity (of images the exponential of the test loss) at a share of the weights",
    draw_progress(metrics, workdir): "What further epochs give, and what steps change beside what was predicted",
  }
