"""Boxes with slack, and ultrametrics embedded in R^d by them: distortion against its lower bound."""

import math
from pathlib import Path

import numpy as np
import scipy.cluster.hierarchy

from experiments import figures, timing
from experiments.polygonal_partitions.trees import random_trees
from experiments.results import Claim
from jaxlab.core.checks import require
from jaxlab.graphs import slack_boxes as boxes
from jaxlab.graphs import treemaps
from jaxlab.graphs.weighted_trees import node_depths


def check_slack(config) -> dict:
  """Worst aspect over its bound and the range of volumes over their bounds, by eps and dimension."""
  rows = {}
  for eps in config.slack.eps:
    for d in config.slack.dimensions:
      worst, low, high = 0.0, math.inf, 0.0
      random = np.random.default_rng(config.seed)
      for tree in random_trees(config.slack.trees, config.trees.leaves, config.seed + d):
        root = random.uniform(1, 1 / eps, d)
        sides = boxes.slack_boxes(tree, eps=eps, root_sides=root)[1]
        ratio = sides.prod(1) / root.prod() / (tree.weights / tree.weights[0])
        worst = max(worst, float(boxes.box_aspect(sides).max()) / max(float(root.max() / root.min()), 3, 1 / eps))
        low = min(low, float((ratio / (1 - eps) ** node_depths(tree.parents)).min()))
        high = max(high, float(ratio.max()))
      rows[f"eps {eps}, d {d}"] = dict(aspect_over_bound=worst, volume_over_least=low, volume_over_most=high)
  return rows


def random_ultrametric(points: int, log2_spread: float, random) -> boxes.Ultrametric:
  """Clusters split at random; the levels' labels fall from 2^log2_spread to 1 in four steps a doubling at most."""
  parents, labels, stack = [-1], [2.0**log2_spread], [(0, points, 0.0)]
  while stack:
    node, count, level = stack.pop()
    # Below label 1 everything separates: the spread is what it says.
    parts = (
      np.ones(count, int)
      if level >= log2_spread
      else np.diff(
        [
          0,
          *np.sort(random.choice(np.arange(1, count), min(count - 1, int(random.integers(1, 4))), replace=False)),
          count,
        ]
      )
    )
    for part in parts:
      parents.append(node)
      below = min(level + random.uniform(0.25, 0.5) * log2_spread / 2, log2_spread)
      labels.append(0.0 if part == 1 else 2.0 ** (log2_spread - below) if below > level else labels[node])
      if part > 1:
        stack.append((len(parents) - 1, int(part), below))
  return boxes.Ultrametric(np.array(parents), np.array(labels))


def check_embeddings(config, console) -> dict:
  """Distortion over LB against the spread, per dimension; a star with outliers, with and without slack."""
  e = config.embedding
  growth = {}
  for d in e.dimensions:
    for spread in console.track(f"embedding in R^{d}", list(e.log2_spreads)):
      random = np.random.default_rng(config.seed)
      ratios, bounded = [], True
      for _ in range(e.trees):
        tree = random_ultrametric(e.points, spread, random)
        points, bound = boxes.embed_ultrametric(tree, dimensions=d)
        found = boxes.distortion(points, tree)
        bounded &= found >= bound * (1 - 1e-9)
        ratios.append(found / bound)
      row = growth.setdefault(f"d {d}", {})
      row[f"{spread}"] = dict(mean=float(np.mean(ratios)), worst=float(np.max(ratios)), above_bound=bool(bounded))
  tree = star_with_outliers(e.star)
  slack, bound = boxes.embed_ultrametric(tree, dimensions=2, eps=0.1)
  exact, _ = boxes.embed_ultrametric(tree, dimensions=2, eps=0.0)
  outliers = dict(slack=boxes.distortion(slack, tree), exact=boxes.distortion(exact, tree), bound=bound)
  return {"growth": growth, "star": outliers}


def star_with_outliers(points: int, outliers: int = 3) -> boxes.Ultrametric:
  """`points` at distance 1 from one another, and points that join one by one at 1.1, 1.2, ..."""
  spine = list(range(outliers + 1))
  parents = [-1, *spine[:-1], *spine[:-1], *[outliers] * points]
  labels = [1 + 0.1 * (outliers - k) for k in spine] + [0.0] * (outliers + points)
  return boxes.Ultrametric(np.array(parents), np.array(labels))


def embed_files(config, folder: Path, sizes: dict) -> dict:
  """The files' byte histograms under single linkage: distortion over LB of boxes and of the usual embeddings."""
  chosen = sorted(sizes)[:: max(1, len(sizes) // config.data.ultrametric_points)][: config.data.ultrametric_points]
  counts = [np.bincount(np.frombuffer((folder / p).read_bytes(), np.uint8), minlength=256) for p in chosen]
  histograms = np.unique(np.sqrt([c / c.sum() for c in counts]).round(6), axis=0)
  require(len(histograms) > 2, f"{folder} has fewer than three different files; name another folder")
  tree = boxes.from_linkage(scipy.cluster.hierarchy.linkage(histograms, "single"))
  rounded = boxes.round_labels(tree)
  delta = boxes.distance_matrix(tree)
  place = lambda t, **options: boxes.embed_ultrametric(t, dimensions=2, **options)
  contestants = {
    "boxes": place(tree)[0],
    "boxes, labels rounded": place(rounded)[0],
    "exact boxes": place(tree, eps=0.0)[0],
    "stress descent": treemaps.stress_descent(delta, 2),
    "classical MDS": treemaps.classical_mds(delta, 2),
    "random projection": treemaps.random_projection(delta, 2, config.seed),
  }
  positive = delta[delta > 0]
  return {
    "points": len(delta),
    "log2_spread": float(np.log2(positive.max() / positive.min())),
    "bound": place(tree)[1],
    "distortion": {name: boxes.distortion(points, tree) for name, points in contestants.items()},
  }


def claims(config, slack: dict, embedding: dict) -> list[Claim]:
  growth, star = embedding["growth"], embedding["star"]
  rows = [row for by_spread in growth.values() for row in by_spread.values()]
  excess = {}
  for name, by_spread in growth.items():
    d = int(name.split()[1])
    power = timing.slope([(float(spread), row["mean"]) for spread, row in by_spread.items()])
    excess[f"d = {d}: {power:.2f}, proven {2 * (d - 1) / d:.2f}"] = power - 2 * (d - 1) / d
  return [
    Claim(
      "Worst side ratio of a box with slack over its bound", "ratio", "lower",
      ours=max(row["aspect_over_bound"] for row in slack.values()), threshold=1 + 1e-9, baseline="the bound",
    ),
    Claim(
      "Least volume of a box with slack over the least allowed", "ratio", "higher",
      ours=min(row["volume_over_least"] for row in slack.values()), threshold=1 - 1e-9, baseline="(1 - eps)^depth",
    ),
    Claim(
      "Power of log2(spread) by which distortion over its lower bound grows, less the proven one, worst dimension",
      "power", "lower", ours=max(excess.values()), threshold=0.0, baseline="2 (d - 1) / d", note="; ".join(excess),
    ),
    Claim(
      "Share of embeddings whose distortion is at least the lower bound", "share", "higher",
      ours=min(float(row["above_bound"]) for row in rows), threshold=1.0, baseline="all",
    ),
    Claim(
      "Distortion of a star with three outliers with slack over that of exact boxes", "ratio", "lower",
      ours=star["slack"] / star["exact"], threshold=1.0, baseline=star["exact"],
      note=f"{config.embedding.star} points: {star['slack']:.1f} against {star['exact']:.1f}; "
      f"lower bound {star['bound']:.1f}",
    ),
  ]  # fmt: skip


def draw(embedding: dict, workdir: Path) -> dict[str, str]:
  figure, axis = figures.subplots()
  for name, rows in embedding["growth"].items():
    spreads = [int(s) for s in rows]
    axis.plot(spreads, [r["mean"] for r in rows.values()], "o-", label=f"{name.replace('d ', 'd = ')}, mean")
    axis.plot(spreads, [r["worst"] for r in rows.values()], "o:", color=axis.lines[-1].get_color(), label="worst")
  axis.set(xlabel="log2(spread)", ylabel="distortion / lower bound", title="Ultrametrics in R^d", ylim=(0, None))
  axis.legend(fontsize=8)
  return {figures.save(figure, workdir, "embedding"): "Distortion over its lower bound against spread"}
