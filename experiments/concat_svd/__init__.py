"""Concatenated-matrix SVD: bounds beside the truth, groups that keep a promise, maps of a model that share a basis.

A module here is a part of the run.
"""

import itertools
from pathlib import Path

import jax
import numpy as np

from experiments import figures, results
from experiments.compressing import COMPRESSED, measured, subjects
from experiments.compressing_drawing import draw_frontier, draw_pair
from experiments.compressing_folder import written, written_claims, written_finding
from experiments.concat_svd.data import require_rivals
from experiments.concat_svd.groups import bounds, groups
from experiments.concat_svd.layers import layers, shared
from experiments.results import Claim
from jaxlab.weights.concat_svd import EXACT, METHODS

BOUNDS, GROUPS, LAYERS = "bounds", "groups", "layers"
_LEAST = 0.01  # e^2 = 1 - sums / |M|^2, a difference of float32 numbers
_TITLES = dict(shared="a basis shared by a group", plain_svd="SVD of each map", svd_llm="SVD-LLM of each map")


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts; that on models last. Of config.model alone: its maps share bases at config.budget."""
  if config.model:
    made = lambda subject: shared(config, subject, config.rank, config.budget)[0]
    part = {COMPRESSED: lambda subject: written(config, subject, made(subject), workdir, console)}
    return measured(config, workdir, part, subjects(config, cache), console)
  if GROUPS in config.parts:
    require_rivals(config.rivals)
  alone, metrics = {BOUNDS: bounds, GROUPS: groups}, {}
  with jax.default_device(jax.devices("cpu")[0]):  # many small SVDs are the host's work
    for part in (part for part in config.parts if part in alone):
      console.say(part)
      metrics[part] = results.part(workdir, part, lambda part=part: alone[part](config, cache))
  rest = {part: lambda subject: layers(config, subject) for part in config.parts if part == LAYERS}
  return metrics | measured(config, workdir, rest, subjects(config, cache), console)


def claims(config, metrics: dict) -> list[Claim]:
  if COMPRESSED in metrics:
    return written_claims(*metrics[COMPRESSED].values(), most=1.5)
  made = group_claims(config, metrics[GROUPS]) if GROUPS in metrics else []
  made += bound_claims(metrics[BOUNDS]) if BOUNDS in metrics else []
  return made + (layer_claims(metrics[LAYERS]) if LAYERS in metrics else [])


def group_claims(config, found: dict) -> list[Claim]:
  eps = {name: of.eps for name, of in config.collections.items()}
  broken = {(name, m): found[name][m]["worst"] / eps[name] for name in found for m in METHODS}
  worst = max(broken, key=broken.get)
  ratio = lambda name, method: found[name][method]["ratio"]
  every = lambda method: ", ".join(f"{name} {ratio(name, method):.4g}" for name in found)
  steps = lambda name: (ratio(name, b) / ratio(name, a) for a, b in itertools.pairwise(METHODS))
  ordered = {name: min(steps(name)) for name in found}
  close = {name: ratio(name, "approximate") / ratio(name, EXACT) for name in found}
  quick = {name: rows["approximate"]["seconds"] / rows["svd_seconds"] for name, rows in found.items()
           if rows["svd_seconds"] > 0}  # fmt: skip
  as_many = lambda rows: (rows[rival]["above"] for rival in ("random", "k-means") if rival in rows)
  above = {name: max(as_many(rows), default=0.0) for name, rows in found.items()}
  dense = {name: rows["HDBSCAN"] for name, rows in found.items() if "HDBSCAN" in rows}
  by_density = ", ".join(f"{name} {one['above']:.3g} of {one['groups']} (at worst {one['worst']:.3g}), compression "
                         f"{one['ratio']:.4g}" for name, one in dense.items())  # fmt: skip
  listed = lambda values: ", ".join(f"{name} {value:.3g}" for name, value in values.items())
  return [
    Claim(
      f"True error of a group over the error promised, worst of three methods and {len(found)} collections", "ratio",
      "lower", ours=broken[worst], threshold=1.0, baseline=f"promised {eps[worst[0]]}",
      note=f"{worst[0]} by {worst[1]}; approximate: "
      + listed({name: found[name]["approximate"]["worst"] for name in found}),
    ),
    Claim(
      "Compression by a better bound over that by the one before it, worst step", "ratio", "higher",
      ours=min(ordered.values()), threshold=1.0, baseline=f"norms alone: {every('max_norm')}",
      note=f"residuals: {every('residuals')}; approximate: {every('approximate')}",
    ),
    Claim(
      "Compression by the approximate bound over that by true errors, worst collection", "ratio", "higher",
      ours=min(close.values()), threshold=0.9, baseline=f"true errors: {every(EXACT)}", note=listed(close),
    ),
    Claim(
      "Time of the approximate bound over that of an SVD a step, slowest collection", "ratio", "lower",
      ours=max(quick.values(), default=1.0), threshold=0.2, baseline="an SVD of the group at every step",
      note=listed(quick)
      + "; M M^T and its eigenvalues a step: "
      + listed({name: rows[EXACT]["seconds"] / rows["svd_seconds"] for name, rows in found.items() if name in quick}),
    ),
    Claim(
      "Groups above the error among as many made at random or by k-means, least of the collections", "", "higher",
      ours=min(above.values()), threshold=0.25, baseline="none of ours",
      note=listed(above) + (f"; by HDBSCAN, in as many as it finds: {by_density}" if dense else ""),
    ),
  ]  # fmt: skip


def bound_claims(found: dict) -> list[Claim]:
  rows = [row for rows in found.values() for row in rows if row["true"] > _LEAST]
  mean = lambda method: float(np.mean([row[method] for row in rows]))
  over = {method: float(np.mean([row[method] / row["true"] for row in rows])) for method in METHODS}
  least = min(row[method] / row["true"] for row in rows for method in METHODS)
  means = ", ".join(f"{name} {mean(name):.3g}" for name in ("true", *METHODS))
  return [
    Claim(
      "Smallest bound over the true error, all subsets and methods", "ratio", "higher", ours=least, threshold=0.999,
      baseline="the true error, float32",
      note=f"{len(rows)} subsets of a true error above {_LEAST}, of which float32 has 3 digits; mean errors: {means}",
    ),
    Claim(
      "Approximate bound over the true error, mean of subsets", "ratio", "lower", ours=over["approximate"],
      threshold=1.1, baseline=f"residuals {over['residuals']:.3g}, norms alone {over['max_norm']:.3g}",
    ),
    Claim(
      "Bound by residuals over that by norms, mean of subsets", "ratio", "lower",
      ours=float(np.mean([row["residuals"] / row["max_norm"] for row in rows])), threshold=1.0,
      baseline="norms of the first matrices",
    ),
  ]  # fmt: skip


def layer_claims(by_model: dict) -> list[Claim]:
  shared = {name: [row for row in found["rows"] if row["method"] == "shared"] for name, found in by_model.items()}
  dense = {name: found["rows"][0]["perplexity"] for name, found in by_model.items()}
  listed = "; ".join(
    f"{name} at {row['budget']:g}: {row['shared']} of {by_model[name]['matrices']} maps share, {row['share']:.3g} of "
    f"their numbers, perplexity {row['perplexity']:.4g}"
    for name, rows in shared.items()
    for row in rows
  )
  kept = lambda row, name: row["perplexity"] <= 1.05 * dense[name]
  ratios = {name: max((row["ratio"] for row in rows if kept(row, name)), default=1.0) for name, rows in shared.items()}
  model, ratio = max(ratios.items(), key=lambda item: item[1])

  def over(rival: str, says: str) -> Claim:
    found = {}
    for name, kept in by_model.items():
      other = {row["budget"]: row["perplexity"] for row in kept["rows"] if row["method"] == rival}
      found |= {f"{name} at {row['budget']:g}": row["perplexity"] / other[row["budget"]] for row in shared[name]
                if row["budget"] in other}  # fmt: skip
    return Claim(
      says, "ratio", "lower", ours=max(found.values(), default=1.0), threshold=1.0, baseline=_TITLES[rival],
      note=", ".join(f"{where} {value:.3g}" for where, value in found.items()) or "no group had two maps",
    )  # fmt: skip

  return [
    Claim(
      "Numbers of a model's maps over those stored at less than 5 % perplexity, best model", "ratio", "higher",
      ours=ratio, threshold=1.1, baseline=f"dense perplexity {dense[model]:.4g}", note=f"{model}; {listed}",
    ),
    over("plain_svd", "Perplexity with bases shared over truncated SVDs of as many numbers, worst case"),
    over("svd_llm", "Perplexity with bases shared over SVD-LLM of as many numbers, worst case"),
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  if COMPRESSED in metrics:
    return written_finding(metrics)
  said = []
  if GROUPS in metrics:
    kept, _, close, *_ = group_claims(config, metrics[GROUPS])
    said.append(
      f"a group's true error is at most {kept.ours:.3g} of what was promised, and the best bound compresses at least "
      f"{close.ours:.3g} times as well as true errors would"
    )
  if LAYERS in metrics:
    best, *_ = layer_claims(metrics[LAYERS])
    most = "no" if best.ours == 1 else f"{1 - 1 / best.ours:.3g} of the"
    said.append(f"sharing a basis saves a language model's maps {most} numbers at less than 5 % perplexity")
  text = "; ".join(said)
  return f"{text[0].upper()}{text[1:]}." if text else "No part was measured."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  if COMPRESSED in metrics:
    return draw_pair(metrics, workdir)
  made = {}
  if BOUNDS in metrics:
    made[draw_bounds(metrics[BOUNDS], workdir)] = "Bounds of the joint error against the true error of random subsets"
  if LAYERS in metrics:
    rows = [row for found in metrics[LAYERS].values() for row in found["rows"]]
    made[draw_frontier(rows, workdir, _TITLES)] = "Perplexity on held-out text against the bytes of the whole model"
  return made


def draw_bounds(found: dict, workdir: Path) -> str:
  """An axis a collection; the file's name."""
  figure, axes = figures.subplots(2, -(-len(found) // 2), squeeze=False)
  for axis in axes.ravel()[len(found) :]:
    axis.set_axis_off()
  for axis, (name, rows) in zip(axes.ravel(), found.items(), strict=False):
    true = [row["true"] for row in rows]
    for mark, method in zip("sv+", METHODS, strict=True):
      axis.plot(true, [row[method] for row in rows], mark, ms=5, label=method.replace("_", " "))
    low, high = min(true), max(true)
    axis.plot([low, high], [low, high], "k--", lw=0.8)
    axis.set(xlabel="true error", ylabel="bound", title=name.replace("_", " "))
    axis.legend(fontsize=7)
  return figures.save(figure, workdir, "bounds")
