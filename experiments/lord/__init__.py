"""LoRD: perplexity at equal parameters and equal bytes, ranks by type of map, calibration texts, speed.

A module here is a part of the run.
"""

import math
from pathlib import Path

from experiments.compressing import COMPRESSED, at, chosen_parts, measured, subjects
from experiments.compressing_drawing import draw_frontier, draw_pair
from experiments.compressing_folder import written, written_claims, written_finding
from experiments.lord import quality, speed
from experiments.lord.drawing import draw_sweep
from experiments.results import Claim

FRONTIER, TEXTS, TUNING, SPEED = "frontier", "texts", "tuning", "speed"
TITLES = dict(
  lord="LoRD", uniform="LoRD, one share", sequential="LoRD, one share, block after block",
  uncentred="LoRD, uncentred", svd="SVD", asvd="ASVD", svd_llm="SVD-LLM",
  asvd_ranked="ASVD, ranks by loss", svd_llm_ranked="SVD-LLM, ranks by loss", asvd_searched="ASVD, ranks by its search",
  rtn="round to nearest", gptq="GPTQ", bitstack="BitStack",
) | {"nf4": "NF4", "spqr": "SpQR", "lord+rtn": "LoRD, then 4 bits", "lord+nf4": "LoRD, then NF4",
     "lord+spqr": "LoRD, then SpQR", "lord+bitstack": "LoRD, then BitStack"}  # fmt: skip
_ONE_PERCENT = 0.01


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts; of config.model alone the one that compresses it to config.budget."""

  measures = {
    FRONTIER: lambda subject: quality.frontier(config, subject, console=console),
    TEXTS: lambda subject: quality.texts(config, subject, cache=cache),
    TUNING: lambda subject: quality.tuning_of(config, subject, cache=cache),
    SPEED: lambda subject: speed.measure(config, subject),
    COMPRESSED: lambda subject: written(config, subject, quality.chosen(config, subject), workdir, console),
  }
  return measured(config, workdir, chosen_parts(config, measures), subjects(config, cache), console)


def claims(config, metrics: dict) -> list[Claim]:
  made = []
  if FRONTIER in metrics:
    made += frontier_claims(config, {name: found["rows"] for name, found in metrics[FRONTIER].items()})
    made.insert(1, sweep_claim(metrics[FRONTIER]))
  if TEXTS in metrics:
    made.append(text_claim(*metrics[TEXTS].values()))
  if TUNING in metrics:
    made.append(tuning_claim(*metrics[TUNING].values()))
  if SPEED in metrics:
    made += speed_claims(metrics)
  if COMPRESSED in metrics:
    made += written_claims(*metrics[COMPRESSED].values(), most=1.5)
  return made


def ratios(by_model: dict, method: str, over: str) -> dict[str, float]:
  """{"model at budget": perplexity over that of the other at the same budget, where both were measured}; the other's
  ranks are chosen by loss, or by its own search, where that was measured and is better."""
  found = {}
  for name, rows in by_model.items():
    names = (over, f"{over}_ranked", f"{over}_searched")
    others = sorted((row for row in rows if row["method"] in names), key=lambda row: -row["perplexity"])
    other = {row["budget"]: row["perplexity"] for row in others}
    mine = [row for row in rows if row["method"] == method and row["budget"] in other]
    found |= {f"{name} at {row['budget']:g}": row["perplexity"] / other[row["budget"]] for row in mine}
  return found


def frontier_claims(config, by_model: dict) -> list[Claim]:
  return [
    _worst("Perplexity over SVD-LLM's of as many parameters, worst case", by_model, "lord", "svd_llm", 1.005),
    _worst("Perplexity over ASVD's of as many parameters, worst case", by_model, "lord", "asvd", 0.95, ("svd",)),
    _worst("Perplexity with ranks chosen by loss over one share for all maps", by_model, "lord", "uniform", 0.95),
    _worst("Perplexity with outputs centred over not centred", by_model, "lord", "uncentred", 1.0),
    *byte_claims(config, by_model),
  ]  # fmt: skip


def _worst(name: str, by_model: dict, method: str, over: str, threshold: float, besides: tuple[str, ...] = ()) -> Claim:
  found = ratios(by_model, method, over)
  where = max(found, key=found.get)
  model, budget = where.split(" at ")
  say = lambda who: f"{at(by_model[model], who, float(budget))['perplexity']:.4g}"
  how = {f"{over}_ranked": "chosen by loss", f"{over}_searched": "of its own search"}
  own = [row for row in by_model[model] if row["method"] in how and f"{row['budget']:g}" == budget]
  ranked = "".join(f", {row['perplexity']:.4g} at ranks {how[row['method']]}" for row in own)
  return Claim(
    name, "ratio", "lower", ours=found[where], threshold=threshold, baseline=f"{TITLES[over]} {say(over)}{ranked}",
    note=f"{where}: {say(method)}; " + ", ".join(f"{key} {ratio:.3g}" for key, ratio in found.items())
    + "".join(f"; at most {max(ratios(by_model, method, one).values()):.3g} times {TITLES[one]}'s" for one in besides),
  )  # fmt: skip


def added(rows: list[dict], budget: float) -> float:
  """Perplexity of LoRD at a budget over the dense model's, in %."""
  return 100 * (at(rows, "lord", budget)["perplexity"] / at(rows, "dense")["perplexity"] - 1)


def byte_claims(config, by_model: dict) -> list[Claim]:
  """Beside few bits, alone and together."""
  (name, rows), *_ = by_model.items()
  perplexity = lambda *key: at(rows, *key)["perplexity"]
  share = lambda *key: f"{100 * at(rows, *key)['share']:.3g} % of the blocks' bytes"
  main = config.budget
  of_lord = perplexity("lord+rtn", main) / perplexity("lord", main)
  of_dense = perplexity("rtn", 4) / perplexity("dense")
  spqr = {row["method"]: row for row in rows if row["method"] in ("spqr", "lord+spqr")}
  outliers = "".join(f"; {TITLES[of]}: {row['perplexity']:.4g}, {100 * row['share']:.3g} %" for of, row in spqr.items())
  smallest = min((row for row in rows if row["method"] == "lord"), key=lambda row: row["bytes"])
  made = [
    Claim(
      "What 4 bits multiply LoRD's perplexity by over what they multiply the dense model's by", "ratio", "lower",
      ours=of_lord / of_dense, threshold=1.0, baseline=f"dense {of_dense:.4g}",
      note=f"{name} at {main}, rounded to nearest: {of_lord:.4g}, {share('lord+rtn', main)}{outliers}",
    ),
    Claim(
      "Perplexity of LoRD in 16 bits over that of GPTQ's 4 bits, which take fewer bytes", "ratio", "lower",
      ours=smallest["perplexity"] / perplexity("gptq", 4), threshold=1.0, baseline=f"GPTQ {perplexity('gptq', 4):.4g}",
      note=f"{name}: LoRD {smallest['perplexity']:.4g} with {100 * smallest['share']:.3g} %, "
      f"GPTQ {share('gptq', 4)}",
    ),
  ]  # fmt: skip
  if any(row["method"] == "lord+bitstack" for row in rows):
    both, alone = at(rows, "lord+bitstack"), at(rows, "bitstack")
    made.append(
      Claim(
        "Perplexity of LoRD, then BitStack over BitStack alone of as many bytes", "ratio", "lower",
        ours=both["perplexity"] / alone["perplexity"], threshold=1.0, baseline=f"BitStack {alone['perplexity']:.4g}",
        note=f"{name}: {both['bytes'] / 1e6:.3g} and {alone['bytes'] / 1e6:.3g} MB",
      )
    )  # fmt: skip
  return made


def sweep_claim(by_model: dict) -> Claim:
  """The largest rank reduction of a type of map that saves parameters and costs less than 1 %."""
  found, listed = {}, []
  for model, kept in by_model.items():
    dense = kept["sweep"]["dense"]
    for name, losses in kept["sweep"]["losses"].items():
      size = kept["sizes"][name]
      good = [int(rank) for rank, loss in losses.items() if math.exp(loss - dense) < 1 + _ONE_PERCENT]
      good = [rank for rank in good if rank < size["even"]]
      if good:
        found[model, name] = 100 * (1 - min(good) / size["full"])
        listed.append(f"{model} {name} {min(good)} of {size['full']}")
  best = max(found, key=found.get, default=None)
  return Claim(
    "Ranks that one type of map loses in all layers at less than 1 % perplexity, best type", "%", "higher",
    ours=found.get(best, 0.0), threshold=39.58, paper=39.58, baseline="only ranks that save parameters",
    note="on the text that ranks are chosen by; smallest rank: " + (", ".join(listed) or "none"),
  )  # fmt: skip


def text_claim(found: dict) -> Claim:
  own, other = found["own"], found["other"]
  return Claim(
    "Perplexity calibrated on another kind of text over calibrated on the kind measured", "ratio", "higher",
    ours=other / own, threshold=1.0, baseline=f"of its own kind {own:.4g}",
    note=f"same ranks; without BOS at the start of rows {found['no BOS']:.4g}, "
    f"with a quarter of the text {found['a quarter']:.4g}",
  )  # fmt: skip


def tuning_claim(found: dict) -> Claim:
  dense, thin = found["dense"], found["LoRD"]
  said = ", ".join(f"{name} {one['before']:.4g} to {one['after']:.4g}, {one['bytes'] / 1e6:.3g} MB and "
                   f"{one['adapters'] / 1e6:.3g} M trained" for name, one in found.items())  # fmt: skip
  return Claim(
    "Perplexity of LoRD in 4 bits after tuning adapters over that of whole maps in 4 bits before", "ratio", "lower",
    ours=thin["after"] / dense["before"], threshold=1.05, baseline=f"whole maps {dense['before']:.4g}", note=said,
  )  # fmt: skip


def speed_claims(metrics: dict) -> list[Claim]:
  found = next(iter(metrics[SPEED].values()))
  most = max(found["forward"], key=lambda case: case["rows"])
  listed = ", ".join(f"{case['rows']} rows {case['speedup']:.3g} x" for case in found["forward"])
  seconds = {name: kept["seconds"] for name, kept in metrics.get(FRONTIER, {}).items()} | {"0.5 B": found["seconds"]}
  return [
    Claim(
      "How many times as fast a text is read at 0.8 of the parameters", "x", "higher", ours=most["speedup"],
      threshold=1.05, paper=1.2235, spread=tuple(most["spread"]), baseline=f"dense {most['dense']:.4g} tokens/s",
      note=f"random weights of a 0.5 B shape, bfloat16; {listed}; a token at a time {found['decode']:.3g} x",
    ),
    Claim(
      "Seconds to the bases of all maps, slowest model", "s", "lower", ours=max(seconds.values()), threshold=60.0,
      baseline="ten minutes for 16 B on an A100",
      note="one pass over the calibration text and an eigendecomposition a map, compilation included; "
      + ", ".join(f"{name} {time:.3g} s" for name, time in seconds.items()),
    ),
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  if COMPRESSED in metrics:
    return written_finding(metrics)
  by_model = {name: found["rows"] for name, found in metrics[FRONTIER].items()}
  losses = " and ".join(f"{added(rows, config.budget):.3g} % ({name})" for name, rows in by_model.items())
  rival = frontier_claims(config, by_model)[0]
  most = sweep_claim(metrics[FRONTIER]).ours
  text = (
    f"With {config.budget:.0%} of the parameters perplexity grows by {losses}, at worst {rival.ours:.3g} times "
    f"SVD-LLM's; one type of map loses {most:.3g} % of its ranks at less than 1 % (paper 39.6 %)"
  )
  if SPEED in metrics:
    text += f", and a text is read {speed_claims(metrics)[0].ours:.3g}x as fast (paper up to 1.22x)"
  return text + "."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  if FRONTIER not in metrics:
    return draw_pair(metrics, workdir)
  rows = [row for found in metrics[FRONTIER].values() for row in found["rows"]]
  return {
    draw_frontier(rows, workdir, TITLES): "Perplexity on held-out text against the bytes of the whole model",
    draw_sweep(metrics[FRONTIER], workdir): "Perplexity added by one type of map at a lower rank in all layers",
  }
