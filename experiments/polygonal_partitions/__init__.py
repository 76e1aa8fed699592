"""Fat polygonal partitions: bounds on adversarial trees, a real treemap, slack boxes, embeddings, time against size."""

import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
import scipy.cluster.hierarchy

from experiments import results, timing
from experiments.polygonal_partitions import figures as pictures
from experiments.results import Claim, Report
from jaxlab.core.checks import require, require_choice
from jaxlab.graphs import polygonal_partitions as polygons
from jaxlab.graphs import slack_boxes as boxes
from jaxlab.graphs import treemaps
from jaxlab.graphs.weighted_trees import (
  Tree,
  binarise,
  is_leaf,
  node_depths,
  tree_from_sizes,
  tree_from_wordnet,
  weighted_tree,
)

BOUNDED = ("greedy", "gap", "angular")
SOURCES = ("package", "directory", "wordnet")
# What a node costs, against the few dozen scalar operations of a rectangle in a squarified row.
COSTS = {
  "angular": "each cut sorts and clips a padded polygon in float64, V^2 operations",
  "greedy": "each cut is tried in every wide gap, both ways round, and the aspect of both parts measured",
  "slack boxes": "all child lists of the tree are cut together in NumPy",
}


def run(config, workdir: Path, cache: Path, console) -> Report:
  del cache
  d = config.data
  require_choice("config.data.name", d.name, SOURCES)
  if d.name == "wordnet":
    tree, names = tree_from_wordnet(d.path)
  else:
    sizes, folder = file_sizes(d.name, d.path)
    tree, names = tree_from_sizes(sizes)
  what = "nouns of WordNet" if d.name == "wordnet" else f"files of {d.path}"
  console.say(f"{what}: {int(is_leaf(tree.parents).sum())} leaves, {len(names)} nodes")
  part = functools.partial(results.part, workdir)
  bounds = part("bounds", lambda: check_bounds(config, console))
  skewed = part("skewed", lambda: compare_skewed(config))
  real, drawings = compare_real(tree)
  real["name"] = what
  slack = part("slack", lambda: check_slack(config))
  embedding = part("embedding", lambda: check_embeddings(config, console))
  if d.name != "wordnet":
    embedding["real"] = part("embedding.real", lambda: embed_files(config, folder, sizes))
  speed = part("speed", lambda: measure_speed(config, console))
  metrics = dict(bounds=bounds, skewed=skewed, real=real, slack=slack, embedding=embedding, speed=speed)
  files = {
    pictures.draw_treemaps(
      tree, names, drawings, real, workdir
    ): f"{what[0].upper()}{what[1:]} by weight, a colour per branch",
    pictures.draw_aspects(
      skewed, workdir
    ): "Worst aspect ratio of caterpillar trees against their height, and the bounds",
    pictures.draw_embedding(
      embedding, speed, workdir
    ): "Distortion over its lower bound against spread; time against size",
  }
  pictures.write_svg(tree, names, drawings["greedy"], workdir)
  # Two points that a baseline puts on one place have no distortion.
  return Report(metrics, make_claims(config, metrics), files, undefined=("embedding.*.distortion.*",))


def file_sizes(name: str, path: str) -> tuple[dict[str, float], Path]:
  """{relative path: bytes} of all non-empty files under a package's or any folder, and that folder."""
  if name == "package":
    spec = importlib.util.find_spec(path) if path.isidentifier() else None
    found = spec is not None and spec.submodule_search_locations
    require(bool(found), f"config.data.path is {path!r}, not an installed package; try numpy, or data.name=directory")
    folder = Path(next(iter(spec.submodule_search_locations)))
  else:
    folder = Path(path).expanduser()
    require(folder.is_dir(), f"config.data.path {path!r} is not a folder; give one for data.name=directory")
  skip = lambda p: "__pycache__" in p.parts or p.is_symlink() or not p.is_file()
  sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if not skip(p)}
  # An empty file has no area; the methods refuse weight 0.
  sizes = {p: float(s) for p, s in sizes.items() if s > 0}
  require(bool(sizes), f"{path} has no file that is not empty; name another folder")
  return sizes, folder


def random_trees(count: int, leaves: int, seed: int):
  """Adversarial trees in turn: lognormal stars, geometric stars, caterpillars of tiny sides, random recursive trees."""
  random = np.random.default_rng(seed)
  for i in range(count):
    n = int(random.integers(2, leaves + 1))
    if i % 4 == 0:
      yield star(random.lognormal(0, random.choice([0, 2, 6]), n))
    elif i % 4 == 1:
      yield star(random.uniform(0.02, 0.98) ** np.arange(min(n, 40)))
    elif i % 4 == 2:
      yield caterpillar(10 ** -random.uniform(0, random.choice([0.5, 3, 12]), n))
    else:
      reach = int(random.integers(1, 8))
      parents = [-1, *(int(random.integers(max(0, k - reach), k)) for k in range(1, n))]
      yield weighted_tree(parents, random.lognormal(0, random.choice([0, 3, 8]), n))


def star(weights) -> Tree:
  return weighted_tree([-1] + [0] * len(weights), [0.0, *weights])


def caterpillar(sides) -> Tree:
  """A path of inner nodes with a leaf of weight sides[i] at node i and a leaf of weight 1 at its end."""
  parents, weights, at = [-1], [0.0], 0
  for side in sides:
    parents += [at, at]
    weights += [float(side), 0.0]
    at = len(parents) - 1
  weights[-1] = 1.0
  return weighted_tree(parents, weights)


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


def compare_real(tree: Tree) -> tuple[dict, dict]:
  """Worst and median aspect of the leaves' shapes, and the shapes of three methods."""
  binary = binarise(tree)
  height = len(binary.levels)
  leaf = is_leaf(tree.parents)
  drawings = {m: polygons.partition(binary, method=m).of_nodes(binary) for m in ("greedy", "angular")}
  drawings["squarified"] = treemaps.squarified(tree)
  median = {m: float(np.median(polygons.measure(d).aspect[leaf])) for m, d in drawings.items() if m != "squarified"}
  median["squarified"] = float(np.median(treemaps.rectangle_aspect(drawings["squarified"][1])[leaf]))
  sides = boxes.slack_boxes(tree, eps=0.1)[1]
  return {
    "leaves": int(leaf.sum()),
    "depth": int(node_depths(tree.parents).max()),
    "height": height,
    "aspect": worst_aspects(tree),
    "bound": {m: polygons.aspect_bound(height, method=m) for m in BOUNDED},
    "median_leaf_aspect": median,
    "slack_side_ratio": float(boxes.box_aspect(sides).max()),
  }, drawings


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


def measure_speed(config, console) -> dict:
  """Whole treemaps, from the tree to every node's shape, of random trees with up to ten children and skewed weights."""
  rows = {}
  for leaves in config.bench.leaves:
    tree = bushy_tree(leaves, config.seed)

    def polygonal(method, tree=tree):
      binary = binarise(tree)
      return polygons.partition(binary, method=method).of_nodes(binary)

    contestants = {m: functools.partial(polygonal, m) for m in BOUNDED}
    contestants["slack boxes"] = lambda tree=tree: boxes.slack_boxes(tree, eps=0.1)
    contestants["squarified"] = lambda tree=tree: treemaps.squarified(tree)
    contestants["slice-and-dice"] = lambda tree=tree: treemaps.slice_and_dice(tree)
    console.say(f"timing {len(contestants)} treemaps of {leaves} leaves")
    times = timing.compare(contestants, repetitions=config.bench.repetitions, warmup=1)
    speedup = {m: times.speedup(m, "squarified") for m in (*BOUNDED, "slack boxes")}
    rows[f"{leaves}"] = {"milliseconds": times.summary(), "speedup": speedup}
  seconds = lambda m: [r["milliseconds"][m]["median"] / 1e3 for r in rows.values()]
  slope = lambda m: timing.slope(list(zip(map(float, rows), seconds(m), strict=True)))
  return {"leaves": rows, "log_log_slope": {m: slope(m) for m in contestants}}


def bushy_tree(leaves: int, seed: int) -> Tree:
  random = np.random.default_rng(seed)
  parents, frontier, total = [np.array([-1])], np.array([0]), 1
  while len(frontier) < leaves:
    count = random.integers(1, 11, len(frontier))
    count = count[: int(np.searchsorted(np.cumsum(count), leaves, side="right")) + 1]
    new = np.repeat(frontier[: len(count)], count)[: leaves - (len(frontier) - len(count))]
    parents.append(new)
    frontier = np.concatenate([frontier[len(count) :], total + np.arange(len(new))])
    total += len(new)
  return weighted_tree(np.concatenate(parents), random.lognormal(0, 4, total))


def make_claims(config, m: dict) -> list[Claim]:
  """The sheet's claims, and the time against the squarified treemap."""
  trees = m["bounds"]["trees"]
  claims = []
  for method in BOUNDED:
    worst = m["bounds"][method]
    claims.append(
      Claim(
        f"{method}: worst aspect over its bound, {trees} adversarial trees",
        "ratio",
        "lower",
        ours=worst["aspect_over_bound"],
        threshold=1.0,
        note=f"worst aspect {worst['aspect']:.1f}; least cut angle over its bound {worst['separation_over_bound']:.3f}",
      )
    )
  error = max(m["bounds"][method]["area_error"] for method in BOUNDED)
  claims.append(Claim("relative error of areas, the same trees", "", "lower", ours=error, threshold=1e-9))
  real = m["real"]
  for method in BOUNDED:
    claims.append(
      Claim(
        f"{method}: worst aspect, {real['name']}",
        "diam^2/area",
        "lower",
        ours=real["aspect"][method],
        threshold=30.0,
        baseline=f"squarified {results.number(real['aspect']['squarified'])}, "
        f"slice-and-dice {results.number(real['aspect']['slice-and-dice'])}",
        note=f"{real['leaves']} leaves, depth {real['depth']}, H = {real['height']}; bound {real['bound'][method]:.0f}",
      )
    )
  for name, row in m["skewed"].items():
    if "0.3" in name:
      continue
    fat = "polygons here: " + ", ".join(f"{method} {row['aspect'][method]:.1f}" for method in BOUNDED)
    for rival in ("slice-and-dice", "squarified"):
      lucky = rival == "squarified" and "star" in name
      note = f"squarified has no bound, but one level of lognormal weights suits it; {fat}" if lucky else fat
      claims.append(
        Claim(
          f"{rival}: worst aspect, {name}",
          "diam^2/area",
          "higher",
          ours=row["aspect"][rival],
          threshold=100.0,
          baseline=f"greedy {results.number(row['aspect']['greedy'])}",
          note=note,
        )
      )
  worst = max(row["aspect_over_bound"] for row in m["slack"].values())
  claims.append(Claim("slack boxes: worst side ratio over its bound", "ratio", "lower", ours=worst, threshold=1 + 1e-9))
  lost = min(row["volume_over_least"] for row in m["slack"].values())
  claims.append(Claim("slack boxes: volume over the least allowed", "ratio", "higher", ours=lost, threshold=1 - 1e-9))
  claims.append(
    Claim(
      f"slack boxes, eps 0.1: worst side ratio, {real['name']}",
      "ratio",
      "lower",
      ours=real["slack_side_ratio"],
      threshold=10.0 + 1e-9,
      baseline=f"exact split {results.number(real['aspect']['exact split'])}",
    )
  )
  growth = m["embedding"]["growth"]
  for name, rows in growth.items():
    d = int(name.split()[1])
    slope = timing.slope([(float(s), r["mean"]) for s, r in rows.items()])
    claims.append(
      Claim(
        f"distortion / LB grows as this power of log2(spread), d = {d}",
        "power",
        "lower",
        ours=slope,
        threshold=2 * (d - 1) / d,
        note="mean distortion / LB " + ", ".join(f"{r['mean']:.2f} at 2^{s}" for s, r in rows.items()),
      )
    )
  above = min(float(row["above_bound"]) for rows in growth.values() for row in rows.values())
  claims.append(Claim("distortion never below LB", "share", "higher", ours=above, threshold=1.0))
  star_ = m["embedding"]["star"]
  claims.append(
    Claim(
      f"star of {config.embedding.star} points and 3 outliers: distortion with slack over exact boxes",
      "ratio",
      "lower",
      ours=star_["slack"] / star_["exact"],
      threshold=1.0,
      baseline=star_["exact"],
      note=f"distortion {star_['slack']:.1f} against {star_['exact']:.1f}; LB {star_['bound']:.1f}",
    )
  )
  leaves, row = list(m["speed"]["leaves"].items())[-1]
  for method in ("angular", "greedy", "slack boxes"):
    ratio, spread = row["speedup"][method]
    claims.append(
      Claim(
        f"{method}: speed over the squarified treemap, {leaves} leaves",
        "x",
        "higher",
        ours=ratio,
        threshold=1.0,
        spread=spread,
        baseline=f"squarified {row['milliseconds']['squarified']['median']:.0f} ms, O(n) Python",
        note=f"log-log slope of time against leaves {m['speed']['log_log_slope'][method]:.2f}; " + COSTS[method],
      )
    )
  return claims
