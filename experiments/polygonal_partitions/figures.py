"""Figures of the polygonal partitions experiment."""

from pathlib import Path

import matplotlib.colors
import numpy as np
from matplotlib.collections import PolyCollection

from experiments import figures
from jaxlab.core.files import write_text
from jaxlab.graphs import polygonal_partitions as polygons
from jaxlab.graphs.weighted_trees import Tree, is_leaf, node_depths


def node_colours(tree: Tree, names: list[str]) -> list[str]:
  """A hue for every folder of the first level, by weight; a lightness for every file."""
  tops = [name.split("/")[0] for name in names]
  sizes = {top: tree.weights[i] for i, top in enumerate(names) if top and "/" not in top}
  rank = {top: i for i, top in enumerate(sorted(sizes, key=sizes.get, reverse=True))}
  colours = []
  for i, top in enumerate(tops):
    hue = (0.58 + 0.381966 * rank.get(top, 0)) % 1.0
    light = 0.72 + 0.24 * ((i * 0.618034) % 1.0)
    colours.append(matplotlib.colors.to_hex(matplotlib.colors.hsv_to_rgb((hue, 0.45, light))))
  return colours


def corners(drawing) -> list[np.ndarray]:
  """The vertices of every node's shape, polygon or rectangle."""
  if isinstance(drawing, polygons.Polygon):
    return [o + v[:n] for o, v, n in zip(drawing.origin, drawing.vertices, drawing.count, strict=True)]
  square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
  return [low + side * square for low, side in zip(*drawing, strict=True)]


def draw_treemaps(tree: Tree, names, drawings: dict, real: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(len(drawings))
  leaf, colours = np.flatnonzero(is_leaf(tree.parents)), node_colours(tree, names)
  top = np.flatnonzero(node_depths(tree.parents) == 1)
  for axis, (name, drawing) in zip(axes, drawings.items(), strict=True):
    shapes = corners(drawing)
    axis.add_collection(
      PolyCollection([shapes[i] for i in leaf], facecolors=[colours[i] for i in leaf], edgecolors="white", lw=0.2)
    )
    axis.add_collection(PolyCollection([shapes[i] for i in top], facecolors="none", edgecolors="black", lw=0.8))
    for i in sorted(top, key=lambda i: -tree.weights[i])[:6]:
      share, middle = tree.weights[i] / tree.weights[0], shapes[i].mean(axis=0)
      if share > 0.03:
        axis.text(*middle, Path(names[i]).name, ha="center", va="center", fontsize=8, clip_on=True)
    worst, median = real["aspect"][name], real["median_leaf_aspect"][name]
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal", xticks=[], yticks=[])
    axis.set_title(f"{name}: aspect worst {worst:.3g}, median {median:.2f}")
    for spine in axis.spines.values():
      spine.set_visible(False)
  return figures.save(figure, workdir, "treemap")


def write_svg(tree: Tree, names, drawing: polygons.Polygon, workdir: Path) -> None:
  leaf, colours = np.flatnonzero(is_leaf(tree.parents)), node_colours(tree, names)
  shapes = polygons.Polygon(*(part[leaf] for part in drawing))
  write_text(workdir / "treemap.svg", polygons.svg(shapes, [colours[i] for i in leaf]))


def draw_aspects(skewed: dict, workdir: Path) -> str:
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
  return figures.save(figure, workdir, "aspect")


def draw_embedding(embedding: dict, speed: dict, workdir: Path) -> str:
  figure, (left, right) = figures.subplots(2)
  for name, rows in embedding["growth"].items():
    spreads = [int(s) for s in rows]
    left.plot(spreads, [r["mean"] for r in rows.values()], "o-", label=f"{name.replace('d ', 'd = ')}, mean")
    left.plot(spreads, [r["worst"] for r in rows.values()], "o:", color=left.lines[-1].get_color(), label="worst")
  left.set(xlabel="log2(spread)", ylabel="distortion / lower bound", title="Ultrametrics in R^d", ylim=(0, None))
  left.legend(fontsize=8)
  leaves = [int(n) for n in speed["leaves"]]
  for method, slope in speed["log_log_slope"].items():
    times = [row["milliseconds"][method]["median"] / 1e3 for row in speed["leaves"].values()]
    right.plot(leaves, times, "o-", label=f"{method}, slope {slope:.2f}")
  right.set(xlabel="leaves", ylabel="seconds", xscale="log", yscale="log", title="Time of a whole treemap")
  right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
  return figures.save(figure, workdir, "embedding_and_time")
