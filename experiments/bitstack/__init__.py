"""BitStack: perplexity at the bytes of quantised models and at any size between, and what its parts are worth.

A module here is a part of the run.
"""

import dataclasses
from pathlib import Path

from experiments import figures
from experiments.bitstack import quality
from experiments.bitstack.quality import MAIN
from experiments.compressing import COMPRESSED, at, chosen_parts, measured, subjects
from experiments.compressing_drawing import draw_frontier, draw_pair
from experiments.compressing_folder import written, written_claims, written_finding
from experiments.results import Claim

FRONTIER, SIZES, ABLATIONS = "frontier", "sizes", "ablations"
_TITLES = {
  "bitstack": "BitStack",
  "rtn": "round to nearest",
  "gptq": "GPTQ",
  "awq": "AWQ",
  "greedy": "sorted greedily",
  "random": "in random order",
  "unscaled": "without scaling",
  "folded": "scales folded",
  "published": "residuals of unrounded factors",
  "svd": "without signs",
  "svd unscaled": "without signs and scaling",
}


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts; of config.model alone the one that compresses it to config.budget."""
  measures = {
    FRONTIER: lambda subject: quality.frontier(config, subject, console=console),
    SIZES: lambda subject: quality.sizes_of(config, subject),
    ABLATIONS: lambda subject: quality.ablations(config, subject, console=console),
    COMPRESSED: lambda subject: written(config, subject, quality.within(config, subject), workdir, console),
  }
  return measured(config, workdir, chosen_parts(config, measures), subjects(config, cache), console)


def claims(config, metrics: dict) -> list[Claim]:
  if COMPRESSED in metrics:
    return written_claims(*metrics[COMPRESSED].values(), most=2.0)
  made = frontier_claims(metrics[FRONTIER])
  if SIZES in metrics:
    made += size_claims(*metrics[SIZES].values())
  if ABLATIONS in metrics:
    made += ablation_claims(*metrics[ABLATIONS].values())
  return made


def frontier_claims(by_model: dict) -> list[Claim]:
  (name, found), *others = by_model.items()
  seconds = ", ".join(f"{model} {kept['seconds']:.3g} s" for model, kept in by_model.items())
  paper = {("gptq", 2): 79.28 / 1.7e5, ("awq", 2): 79.28 / 1.5e6, ("gptq", 3): 10.91 / 38.28, ("awq", 3): 10.91 / 8.06}
  made = []
  for rival, bits in (("gptq", 2), ("awq", 2), ("gptq", 3), ("awq", 3), ("gptq", 4)):
    one = at(found["rows"], rival, bits)
    mine = nearest(found["rows"], one["bytes"])
    made.append(
      Claim(
        f"Perplexity over {_TITLES[rival]}'s at the bytes of {bits} bits", "ratio", "lower",
        ours=mine["perplexity"] / one["perplexity"], threshold=1.0, paper=paper.get((rival, bits), 8.14 / 6.83),
        baseline=f"{_TITLES[rival]} {one['perplexity']:.4g}",
        note=f"{name}: {mine['perplexity']:.4g}, {mine['bytes'] / 1e6:.4g} and {one['bytes'] / 1e6:.4g} MB"
        + "".join(_beside(other, kept["rows"], rival, bits) for other, kept in others),
      )
    )  # fmt: skip
  return [dataclasses.replace(made[0], note=f"{made[0].note}; all blocks of {seconds}"), *made[1:]]


def _beside(name: str, rows: list[dict], rival: str, bits: int) -> str:
  """The same ratio on another model, where it was measured."""
  one = next((row for row in rows if (row["method"], row["budget"]) == (rival, bits)), None)
  return "" if one is None else f"; {name} {nearest(rows, one['bytes'])['perplexity'] / one['perplexity']:.3g}"


def nearest(rows: list[dict], most: int) -> dict:
  """BitStack's largest size of at most as many bytes."""
  return max((row for row in rows if row["method"] == MAIN and row["bytes"] <= most), key=lambda row: row["bytes"])


def size_claims(found: dict) -> list[Claim]:
  losses = [row["perplexity"] for row in found["rows"]]
  rise = max(100 * (after / min(losses[: i + 1]) - 1) for i, after in enumerate(losses[1:]))
  return [
    Claim(
      "Largest rise of perplexity over that of a smaller size", "%", "lower", ours=rise, threshold=1.0,
      baseline=f"{len(losses)} of {found['configurations']} sizes",
      note=", ".join(f"{row['bytes'] / 1e6:.4g} MB {row['perplexity']:.4g}" for row in found["rows"]),
    ),
    Claim(
      "Programs compiled while the model shrinks and grows through all sizes", "", "lower", ours=found["programs"],
      threshold=1, baseline="one for the first size",
      note=f"back at its size the logits are the same: {found['same']}",
    ),
  ]  # fmt: skip


def ablation_claims(rows: list[dict]) -> list[Claim]:
  def least(name: str, says: str) -> Claim:
    found = {row["budget"]: row["perplexity"] / at(rows, MAIN, row["budget"])["perplexity"] for row in rows
             if row["method"] == name}  # fmt: skip
    bits = min(found, key=found.get)
    return Claim(
      says, "ratio", "higher", ours=found[bits], threshold=1.0,
      baseline=f"BitStack {at(rows, MAIN, bits)['perplexity']:.4g}",
      note=", ".join(f"at the bytes of {key:g} bits {ratio:.4g}" for key, ratio in found.items()),
    )  # fmt: skip

  folded = at(rows, "folded")
  return [
    least("unscaled", "Perplexity without scaling over with it, where it matters least"),
    least("svd", "Perplexity of an SVD of as many bytes over that of signs, least"),
    least("random", "Perplexity with blocks in random order over sorted by level, least"),
    least("greedy", "Perplexity with blocks sorted over all levels at once over level by level, least"),
    Claim(
      "Perplexity with scales folded into what comes before over scales kept", "ratio", "lower",
      ours=folded["perplexity"] / at(rows, MAIN, folded["budget"])["perplexity"], threshold=1.01,
      baseline="an array of scales for every map",
      note="folded into gains and weights of 16 bits; heads that share values keep the scale of the map after them",
    ),
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  if COMPRESSED in metrics:
    return written_finding(metrics)
  two, _, three, _, four = frontier_claims(metrics[FRONTIER])
  return (
    f"At the bytes of 2, 3 and 4 bits BitStack's perplexity is {two.ours:.3g}, {three.ours:.3g} and {four.ours:.3g} "
    f"times GPTQ's (paper {two.paper:.2g}, {three.paper:.3g} and {four.paper:.3g}), any size between from one file."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  if COMPRESSED in metrics:
    return draw_pair(metrics, workdir)
  rows = [row for found in metrics[FRONTIER].values() for row in found["rows"]]
  made = {draw_frontier(rows, workdir, _TITLES): "Perplexity on held-out text against the bytes of the whole model"}
  if ABLATIONS in metrics:
    made[draw_ablations(*metrics[ABLATIONS].values(), workdir)] = "Perplexity without a part of the method"
  return made


def draw_ablations(rows: list[dict], workdir: Path) -> str:
  """Bars, a group a number of bytes; the file's name."""
  budgets, names = sorted({row["budget"] for row in rows}), list(dict.fromkeys(row["method"] for row in rows))
  figure, axis = figures.subplots(width=1.4)
  for i, name in enumerate(names):
    mine = [row for row in rows if row["method"] == name]
    place = [budgets.index(row["budget"]) + 0.8 * (i + 0.5) / len(names) - 0.4 for row in mine]
    look = dict(label=_TITLES[name], hatch=None if i < 6 else "///")  # there are six colours
    axis.bar(place, [row["perplexity"] for row in mine], 0.8 / len(names), **look)
  axis.set_xticks(range(len(budgets)), [f"bytes of {budget:g} bits" for budget in budgets])
  low = min(row["perplexity"] for row in rows)
  axis.set(ylabel="perplexity, cut off", yscale="log", ylim=(low / 2, 100 * low))
  axis.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
  return figures.save(figure, workdir, "ablations")
