"""HEAPr: perplexity at a share of the experts' parameters removed, what single removals cost, FLOPs, memory, speed.

A module here is a part of the run. The mixture that is pruned is trained first.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from experiments import results
from experiments.compressing import COMPRESSED, chosen_parts, measured, subjects
from experiments.compressing_drawing import draw_pair
from experiments.compressing_folder import written, written_claims, written_finding
from experiments.heapr import quality, removals, speed, training
from experiments.heapr.drawing import draw_curves, draw_removals
from experiments.report import rounded
from experiments.results import Claim

TRAINING, QUALITY, REMOVALS, DENSE, SPEED = "training", "quality", "removals", "dense", "speed"
TITLES = dict(
  heapr="HEAPr", heapr_layer="HEAPr in each layer", heapr_use="HEAPr times use", heapr_tiles="HEAPr in tiles",
  identity="G = I", fisher="Fisher of masks", magnitude="magnitude", wanda="Wanda", camera="CAMERA-P",
  random="random", naee="NAEE", least_used="least used experts", merged="HC-SMoE", low_rank="D2-MoE",
)  # fmt: skip
_MORE = 3.0  # % of perplexity


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts; of config.model alone the one that compresses it to config.budget."""
  if config.model:
    one = {COMPRESSED: lambda subject: written(config, subject, quality.chosen(config, subject), workdir, console)}
    return measured(config, workdir, chosen_parts(config, one), subjects(config, cache), console)
  own = config.copy_and_resolve_references()
  own.model = "transformer"
  own.data.name = "local_text" if config.data.path else config.data.name

  def named(model: str):
    given = config.copy_and_resolve_references()
    given.model = model
    (read,) = subjects(given, cache).values()
    return read

  subject, dense = named(f"hf:{workdir / 'moe'}"), named(config.dense)
  measures = {
    TRAINING: lambda: training.trained(own, workdir, cache, console),
    QUALITY: lambda: quality.measure(config, subject(), console),
    REMOVALS: lambda: removals.measure(config, subject()),
    DENSE: lambda: quality.measure_dense(config, dense(), console),
    SPEED: lambda: speed.measure(config, subject()),
  }
  # As it is published: claims follow from the same digits.
  return rounded({part: results.part(workdir, part, measures[part]) for part in config.parts})


def claims(config, metrics: dict) -> list[Claim]:
  if COMPRESSED in metrics:
    return written_claims(*metrics[COMPRESSED].values(), most=1.5)
  made = quality_claims(config, metrics)
  if REMOVALS in metrics:
    made.append(removal_claim(metrics[REMOVALS]))
  if DENSE in metrics:
    made.append(dense_claim(config, metrics[DENSE]))
  if SPEED in metrics:
    made.append(speed_claim(config, metrics[SPEED]))
  return made


def at(rows: list[dict], method: str, ratio: float) -> dict | None:
  """The row of a method at a ratio, None where it was not measured."""
  return next((row for row in rows if row["method"] == method and abs(row["ratio"] - ratio) < 1e-9), None)


def added(rows: list[dict], method: str, ratio: float) -> float | None:
  """Perplexity over the dense model's, in %."""
  row = at(rows, method, ratio)
  return None if row is None else 100 * (row["perplexity"] / rows[0]["perplexity"] - 1)


def least(rows: list[dict], methods: tuple[str, ...], ratio: float) -> tuple[str, float] | None:
  """The method that adds least perplexity at a ratio, and how much."""
  found = {name: more for name in methods if (more := added(rows, name, ratio)) is not None}
  best = min(found, key=found.get, default=None)
  return None if best is None else (best, found[best])


def reached(rows: list[dict], more: float = _MORE) -> float:
  """The ratio at which HEAPr has added that many %, between the measured ones in a straight line, in %."""
  ratios = sorted({row["ratio"] for row in rows if row["method"] == "heapr"})
  ratios, curve = [0.0, *ratios], [0.0, *(added(rows, "heapr", ratio) for ratio in ratios)]
  for i in range(1, len(ratios)):
    if curve[i] >= more:
      share = (more - curve[i - 1]) / (curve[i] - curve[i - 1])
      return 100 * (ratios[i - 1] + share * (ratios[i] - ratios[i - 1]))
  return 100 * ratios[-1]


def quality_claims(config, metrics: dict) -> list[Claim]:
  found = metrics[QUALITY]
  rows, main = found["rows"], 1 - config.budget
  dense = rows[0]
  mine = added(rows, "heapr", main)
  name, whole = least(rows, quality.EXPERTS, main)
  said = lambda method, ratio: f"{at(rows, method, ratio)['perplexity']:.4g}"
  chosen = found["chosen"]
  listed = lambda methods: ", ".join(
    f"{TITLES[one]} {added(rows, one, main):.3g} %" for one in methods if at(rows, one, main)
  )
  trained = metrics.get(TRAINING)
  note = f"perplexity {said('heapr', main)}, next tokens right {100 * at(rows, 'heapr', main)['accuracy']:.3g} % "
  note += f"(dense {100 * dense['accuracy']:.3g} %)"
  if trained:
    note += (
      f"; a mixture of {trained['parameters'] / 1e6:.3g} M parameters after {trained['tokens'] / 1e6:.3g} M tokens"
    )
    note += ", undertrained: the paper's have read trillions" if undertrained(trained) else ""
  layouts = found["layouts"][f"{main:g}"]
  order = [
    _worst("ranked over the model", rows, "heapr", ("heapr_layer",), 1.0, config, ""),
    _worst("in each layer", rows, "heapr_layer", ("identity",), 1.0, config, f"G = I ranked by {chosen['identity']}"),
  ]
  return [
    Claim(
      f"Perplexity added without {main:.0%} of the experts' parameters", "%", "lower", ours=mine, threshold=_MORE,
      paper=2.5, baseline=f"dense {dense['perplexity']:.4g}", note=note,
    ),
    Claim(
      "Perplexity added over the least that dropping or merging whole experts adds", "ratio", "lower",
      ours=mine / max(whole, 1e-9), threshold=0.5, paper=0.052, baseline=f"{TITLES[name]} {whole:.3g} %",
      note=f"at {main:.0%}: {listed(quality.EXPERTS)}; tokens pass over dropped experts",
    ),
    dataclasses.replace(
      max(order, key=lambda claim: claim.ours), note="; ".join(claim.note for claim in order),
      name="Perplexity ranked over the model over in each layer, and of that over G = I's (no gradients), worst case",
    ),
    _worst(
      "Perplexity over scores times the expert's use, worst case", rows, "heapr", ("heapr_use",), 1.0, config, "",
    ),
    _worst(
      "Perplexity over the best other ranking without gradients, worst case", rows, "heapr",
      ("magnitude", "wanda", "camera", "random"), 1.0, config,
      ", ".join(f"{TITLES[one]}: {chosen[one]}" for one in ("magnitude", "wanda", "camera")),
    ),
    _worst(
      "Perplexity over experts stored as differences of low rank, worst case", rows, "heapr", (quality.DELTAS,), 1.0,
      config, "",
    ),
    _worst(
      "Perplexity over masks' own Fisher information, which takes h and g . w not as independent, worst case", rows,
      "heapr", ("fisher",), 1.01, config, "",
    ),
    Claim(
      f"Experts' parameters that can go at {_MORE:g} % more perplexity", "%", "higher", ours=reached(rows),
      threshold=10.0, paper=20.0, baseline="paper: 2.5 % more at 20 %",
      note="in a straight line between the ratios measured: "
      + ", ".join(f"{row['ratio']:.3g} {added(rows, 'heapr', row['ratio']):.3g} %" for row in _of(rows, "heapr")),
    ),
    Claim(
      f"FLOPs of the experts that go with {main:.0%} of their parameters", "%", "higher",
      ours=100 * layouts["exact"]["experts"], threshold=15.0, paper=20.0, baseline="paper: of the whole model",
      note=f"counted from widths and use; of a whole token {100 * (1 - layouts['exact']['flops']):.3g} %; "
      + "; ".join(f"{name}: {100 * one['experts']:.3g} % and {100 * (1 - one['memory']):.3g} % of the experts' bytes"
                  for name, one in layouts.items() if name != "exact")
      + f"; perplexity in tiles of {config.tile} {said('heapr_tiles', main)}",
    ),
  ]  # fmt: skip


def _of(rows: list[dict], method: str) -> list[dict]:
  return sorted((row for row in rows if row["method"] == method), key=lambda row: row["ratio"])


def _worst(name: str, rows, method: str, rivals: tuple[str, ...], threshold: float, config, note: str) -> Claim:
  """A method's perplexity over the best rival's, the largest from the budget's ratio to one half."""
  ratios = sorted({row["ratio"] for row in rows if 1 - config.budget <= row["ratio"] <= 0.5})
  found = {}
  for ratio in ratios:
    if (best := least(rows, rivals, ratio)) is not None:
      mine, other = at(rows, method, ratio), at(rows, best[0], ratio)
      found[ratio] = mine["perplexity"] / other["perplexity"], best[0], math.hypot(other["error"], _own(mine))
  where = max(found, key=lambda ratio: found[ratio][0])
  rival = found[where][1]
  listed = ", ".join(f"{at:g}: {one[0]:.4g} +- {one[2]:.2g} ({TITLES[one[1]]})" for at, one in found.items())
  return Claim(
    name, "ratio", "lower", ours=found[where][0], threshold=threshold,
    baseline=f"{TITLES[rival]} {at(rows, rival, where)['perplexity']:.4g}",
    note=f"removed {listed}" + (f"; {note}" if note else ""),
  )  # fmt: skip


def undertrained(trained: dict) -> bool:
  """Fewer than 20 tokens a parameter."""
  return trained["tokens"] < 20 * trained["parameters"]


def _own(row: dict) -> float:
  """A row's error beside HEAPr's, which is 0 of HEAPr itself."""
  return 0.0 if row["method"] == "heapr" else row["error"]


def removal_claim(found: dict) -> Claim:
  ours, rival = (found["correlation"][f"{name} by use"] for name in ("heapr", "identity"))
  title = lambda name: TITLES[name.removesuffix(" by use")] + " times use" * name.endswith(" by use")
  said = lambda part: ", ".join(f"{title(name)} {value:.3g}" for name, value in found[part].items())
  return Claim(
    "Rank correlation of scores, times use, with the loss that single removals add to the text", "Spearman", "higher",
    ours=ours, threshold=rival, baseline=f"G = I {rival:.3g}",
    note=f"{len(found['added'])} random atomic experts, {100 * np.mean(np.array(found['added']) < 0):.3g} % of which "
    f"lower the loss: {said('correlation')}; with its size, whatever the sign: {said('magnitudes')}",
  )  # fmt: skip


def dense_claim(config, rows: list[dict]) -> Claim:
  main = 1 - config.budget
  name, _ = least(rows, ("identity, model", "identity, layer"), main)
  ours, rival = (at(rows, one, main)["perplexity"] for one in ("heapr", name))
  title = lambda method, *pool: ", ".join((TITLES.get(method, method), *(f"by {one}" for one in pool)))
  said = "; ".join(f"{title(*row['method'].split(', '))} {row['perplexity']:.4g}" for row in rows)
  return Claim(
    f"Perplexity of a dense pretrained model without {main:.0%} of its MLPs over G = I's", "ratio", "lower",
    ours=ours / rival, threshold=1.0, baseline=f"G = I {rival:.4g}",
    note=f"{config.dense}, each MLP a mixture of one expert: {said}",
  )  # fmt: skip


def speed_claim(config, found: dict) -> Claim:
  of = {(one["layout"], one["ratio"]): one for one in found["kept"]}
  main = of["tiles", 0.5]
  said = ", ".join(
    f"{layout} {ratio:g}: {one['speedup']:.3g} x, {one['flops']:.3g} of the FLOPs XLA counts, "
    f"{one['bytes'] / found['experts']:.3g} of the bytes"
    for (layout, ratio), one in of.items()
  )
  return Claim(
    "How many times as fast a text is read without half of the experts' parameters, in tiles", "x", "higher",
    ours=main["speedup"], threshold=1.05, spread=tuple(main["spread"]), baseline=f"dense {found['dense']:.4g} tokens/s",
    note=f"{found['rows']} rows of {found['time']} tokens; {said}",
  )  # fmt: skip


def finding(config, metrics: dict) -> str:
  if COMPRESSED in metrics:
    return written_finding(metrics)
  rows, main = metrics[QUALITY]["rows"], 1 - config.budget
  name, whole = least(rows, quality.EXPERTS, main)
  of = " of a small, fresh mixture" * (TRAINING in metrics and undertrained(metrics[TRAINING]))
  text = (
    f"Without {main:.0%} of the experts' parameters{of} perplexity grows by {added(rows, 'heapr', main):.3g} % "
    f"(paper 2.5 % at 20 %), by {whole:.3g} % or more where whole experts go ({TITLES[name]}); "
    f"{reached(rows):.3g} % can go for {_MORE:g} % more"
  )
  if SPEED in metrics:
    text += f", and without half a text is read {speed_claim(config, metrics[SPEED]).ours:.3g}x as fast"
  return text + "."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  if COMPRESSED in metrics:
    return draw_pair(metrics, workdir)
  drawn = {draw_curves(metrics[QUALITY]["rows"], workdir, TITLES): "Perplexity added on text not seen, by method"}
  if REMOVALS in metrics:
    drawn[draw_removals(metrics[REMOVALS], workdir, TITLES)] = "What single removals add to the loss, and what was said"
  return drawn
