"""Real trees: the files of a package or folder, or the nouns of WordNet, as polygons and as rectangles."""

import importlib.util
import os
from pathlib import Path

import matplotlib.colors
import numpy as np
from matplotlib.collections import PolyCollection

from experiments import figures
from experiments.polygonal_partitions.polygons import BOUNDED, worst_aspects
from experiments.results import Claim, number
from jaxlab.core.checks import require, require_choice
from jaxlab.core.files import write_text
from jaxlab.graphs import polygonal_partitions as polygons
from jaxlab.graphs import slack_boxes as boxes
from jaxlab.graphs import treemaps
from jaxlab.graphs.weighted_trees import Tree, binarise, is_leaf, node_depths, tree_from_sizes, tree_from_wordnet

SOURCES = ("package", "directory", "wordnet")


def load(config) -> tuple[Tree, list[str], str]:
  """(tree, names of its nodes, what it is)."""
  d = config.data
  require_choice("config.data.name", d.name, SOURCES)
  if d.name == "wordnet":
    return *tree_from_wordnet(d.path), "nouns of WordNet"
  return *tree_from_sizes(file_sizes(d.name, d.path)[0]), f"files of {d.path}"


def file_sizes(name: str, path: str) -> tuple[dict[str, float], Path]:
  """{relative path: bytes} of all non-empty files under a package's or any folder, and that folder."""
  if name == "package":
    spec = importlib.util.find_spec(path) if path.isidentifier() else None
    found = spec is not None and spec.submodule_search_locations
    require(bool(found), f"config.data.path is {path!r}, not an installed package; try numpy, or data.name=directory")
    folder = Path(next(iter(spec.submodule_search_locations)))
  else:
    folder = Path(os.path.expanduser(path))
    require(folder.is_dir(), f"config.data.path {path!r} is not a folder; give one for data.name=directory")
  skip = lambda p: "__pycache__" in p.parts or p.is_symlink() or not p.is_file()
  sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if not skip(p)}
  # An empty file has no area; the methods refuse weight 0.
  sizes = {p: float(s) for p, s in sizes.items() if s > 0}
  require(bool(sizes), f"{path} has no file that is not empty; name another folder")
  return sizes, folder


def measure(tree: Tree, what: str) -> dict:
  """Worst aspect by method and its bound, median aspect of the leaves' shapes."""
  binary, leaf = binarise(tree), is_leaf(tree.parents)
  height = len(binary.levels)
  median = {name: float(np.median(aspects(shapes)[leaf])) for name, shapes in drawings(tree).items()}
  sides = boxes.slack_boxes(tree, eps=0.1)[1]
  return {
    "name": what,
    "leaves": int(leaf.sum()),
    "depth": int(node_depths(tree.parents).max()),
    "height": height,
    "aspect": worst_aspects(tree),
    "bound": {m: polygons.aspect_bound(height, method=m) for m in BOUNDED},
    "median_leaf_aspect": median,
    "slack_side_ratio": float(boxes.box_aspect(sides).max()),
  }


def drawings(tree: Tree) -> dict:
  """The shapes of every node by two polygonal methods and as squarified rectangles."""
  binary = binarise(tree)
  shapes = {m: polygons.partition(binary, method=m).of_nodes(binary) for m in ("greedy", "angular")}
  return shapes | {"squarified": treemaps.squarified(tree)}


def aspects(shapes) -> np.ndarray:
  if isinstance(shapes, polygons.Polygon):
    return polygons.measure(shapes).aspect
  return treemaps.rectangle_aspect(shapes[1])


def claims(real: dict) -> list[Claim]:
  each = ", ".join(f"{method} {real['aspect'][method]:.3g} (bound {real['bound'][method]:.0f})" for method in BOUNDED)
  return [
    Claim(
      f"Worst aspect ratio of a polygon of a real tree, {real['name']}, three methods", "diam^2/area", "lower",
      ours=max(real["aspect"][method] for method in BOUNDED), threshold=30.0,
      baseline=f"squarified {number(real['aspect']['squarified'])}, "
      f"slice-and-dice {number(real['aspect']['slice-and-dice'])}",
      note=f"{each}; {real['leaves']} leaves, depth {real['depth']}, H = {real['height']}",
    ),
    Claim(
      f"Worst side ratio of boxes whose areas may be off by a tenth a level, {real['name']}", "ratio", "lower",
      ours=real["slack_side_ratio"], threshold=10.0 + 1e-9,
      baseline=f"exact split {number(real['aspect']['exact split'])}",
    ),
  ]  # fmt: skip


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


def draw(config, real: dict, workdir: Path) -> dict[str, str]:
  tree, names, what = load(config)
  shapes = drawings(tree)
  draw_treemaps(tree, names, shapes, real, workdir)
  write_svg(tree, names, shapes["greedy"], workdir)
  return {"treemap.png": f"{what[0].upper()}{what[1:]} by weight, a colour per branch"}


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
