"""Convex polygons: aspect ratios against their bounds on adversarial and skewed trees, beside rectangles."""

import math
from pathlib import Path

import numpy as np

from experiments import figures
from experiments.polygonal_partitions.trees import caterpillar, random_trees, star
from experiments.results import Claim
from jaxlab.graphs import polygonal_partitions as polygons
from jaxlab.graphs import slack_boxes as boxes
from jaxlab.graphs import treemaps
from jaxlab.graphs.weighted_trees import Tree, binarise

BOUNDED = ("greedy", "gap", "angular")


def level_metrics(partition: polygons.Partition) -> polygons.Metrics:
  every = [polygons.measure(level) for level in partition.levels]
  return polygons.Metrics(*(np.concatenate(part) for part in zip(*every, strict=True)))


def check_bounds(config, console) -> dict:
  """Aspect over its bound, separation under its bound and area errors, the worst over all random trees."""
  worst = {m: dict(aspect=0.0, aspect_over_bound=0.0, separation_over_bound=math.inf, area_error=0.0) for m in BOUNDED}
  trees = list(random_trees(config.trees.count, config.trees.leaves, config.seed))
  for tree in console.track("bounds", trees):
    binary = binarise(tree)
    for method in BOUNDED:
      partition = polygons.partition(binary, method=method)
      metrics, w = level_metrics(partition), worst[method]
      limit = polygons.aspect_bound(len(binary.levels), method=method)
      angle = polygons.separation_bound(len(binary.levels), method=method)
      areas = polygons.measure(partition.of_nodes(binary)).area
      w["aspect"] = max(w["aspect"], float(metrics.aspect.max()))
      w["aspect_over_bound"] = max(w["aspect_over_bound"], float(metrics.aspect.max() / limit))
      least = min((float(s.min()) for s in partition.separations), default=math.inf)
      w["separation_over_bound"] = min(w["separation_over_bound"], least / angle)
      w["area_error"] = max(w["area_error"], float(np.abs(areas * tree.weights[0] / tree.weights - 1).max()))
  return worst | {"trees": len(trees)}


def worst_aspects(tree: Tree) -> dict[str, float]:
  """The worst diam^2 / area of every method; for polygons over the helper nodes of the binary tree too."""
  binary = binarise(tree)
  worst = {m: float(level_metrics(polygons.partition(binary, method=m)).aspect.max()) for m in polygons.METHODS}
  rectangles = {
    "slice-and-dice": treemaps.slice_and_dice(tree)[1],
    "squarified": treemaps.squarified(tree)[1],
    "exact split": boxes.slack_boxes(tree, eps=0.0)[1],
    "slack 0.1": boxes.slack_boxes(tree, eps=0.1)[1],
  }
  return worst | {name: float(treemaps.rectangle_aspect(s).max()) for name, s in rectangles.items()}


def compare_skewed(config) -> dict:
  """The sheet's trees: lognormal weights, caterpillars with tiny sides and with sides of 0.3."""
  random = np.random.default_rng(config.seed)
  trees = {
    "star, lognormal(6)": star(random.lognormal(0, 6, config.skewed.star)),
    "caterpillar, sides 1e-3 to 1e-9": caterpillar(10 ** -random.uniform(3, 9, config.skewed.levels)),
  } | {f"caterpillar, sides 0.3, {n} levels": caterpillar(np.full(n, 0.3)) for n in config.skewed.caterpillars}
  rows = {}
  for name, tree in trees.items():
    height = len(binarise(tree).levels)
    limits = {f"bound {m}": polygons.aspect_bound(height, method=m) for m in BOUNDED}
    rows[name] = {"height": height, "aspect": worst_aspects(tree)} | limits
  return rows


def claims(bounds: dict, skewed: dict) -> list[Claim]:
  each = lambda key: ", ".join(f"{method} {bounds[method][key]:.3g}" for method in BOUNDED)
  rivals = {
    f"{rival}, {name}": row["aspect"][rival]
    for name, row in skewed.items()
    if "0.3" not in name
    for rival in ("slice-and-dice", "squarified")
  }
  least = min(rivals, key=rivals.get)
  fat = max(row["aspect"][m] for name, row in skewed.items() if "0.3" not in name for m in BOUNDED)
  return [
    Claim(
      "Worst aspect ratio of a polygon over its proven bound, three methods, adversarial trees", "ratio", "lower",
      ours=max(bounds[method]["aspect_over_bound"] for method in BOUNDED), threshold=1.0, baseline="the bound",
      note=f"{bounds['trees']} trees: {each('aspect_over_bound')}; worst aspect {each('aspect')}; least cut angle over "
      f"its bound {each('separation_over_bound')}",
    ),
    Claim(
      "Largest relative error of a polygon's area on those trees", "", "lower",
      ours=max(bounds[method]["area_error"] for method in BOUNDED), threshold=1e-9, baseline="the weight",
    ),
    Claim(
      "Worst aspect ratio of the rectangles of other treemaps on skewed weights, least of rivals and trees",
      "diam^2/area", "higher", ours=rivals[least], threshold=100.0, baseline=f"worst polygon {fat:.3g}",
      note=", ".join(f"{name} {value:.3g}" for name, value in rivals.items())
      + "; squarified has no bound, but one level of lognormal weights suits it",
    ),
  ]  # fmt: skip


def draw(skewed: dict, workdir: Path) -> dict[str, str]:
  figure, (left, right) = figures.subplots(2)
  chains = {row["height"]: row for name, row in skewed.items() if "0.3" in name}
  for method in ("greedy", "gap", "angular", "random", "squarified"):
    style = "s--" if method == "squarified" else "o-"  # it lies on the angular method's line
    left.plot(list(chains), [row["aspect"][method] for row in chains.values()], style, label=method)
  left.plot(list(chains), [row["bound angular"] for row in chains.values()], "k:", label="bound")
  left.set(xlabel="binary height H", ylabel="worst diam$^2$ / area", xscale="log", yscale="log")
  left.set_title("Caterpillars, sides of 0.3")
  left.set_xticks(list(chains), [str(h) for h in chains])
  left.minorticks_off()
  left.legend(fontsize=8)
  rows = {name: row["aspect"] for name, row in skewed.items() if "0.3" not in name}
  methods = list(next(iter(rows.values())))
  for k, (name, row) in enumerate(rows.items()):
    right.barh(np.arange(len(methods)) + 0.4 * k - 0.2, [row[m] for m in methods], 0.38, label=name)
  right.set_yticks(range(len(methods)), methods)
  right.invert_yaxis()
  right.set(xscale="log", xlabel="worst diam$^2$ / area", title="Skewed weights")
  right.legend(fontsize=8, loc="lower right")
  caption = "Worst aspect ratio of caterpillar trees against their height, and the bounds"
  return {figures.save(figure, workdir, "aspect"): caption}
