"""Time of whole treemaps against their leaves."""

import functools
from pathlib import Path

from experiments import figures, timing
from experiments.polygonal_partitions.polygons import BOUNDED
from experiments.polygonal_partitions.trees import bushy_tree
from experiments.results import Claim
from jaxlab.graphs import polygonal_partitions as polygons
from jaxlab.graphs import slack_boxes as boxes
from jaxlab.graphs import treemaps
from jaxlab.graphs.weighted_trees import binarise


def measure(config, console) -> dict:
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


def claims(speed: dict) -> list[Claim]:
  leaves, row = list(speed["leaves"].items())[-1]
  slopes = ", ".join(f"{name} {slope:.2f}" for name, slope in speed["log_log_slope"].items())
  squarified = f"squarified {row['milliseconds']['squarified']['median']:.0f} ms, O(n) Python"
  slowest = min(BOUNDED, key=lambda method: row["speedup"][method][0])
  made = []
  for what, method in (("boxes with slack", "slack boxes"), ("polygons by the slowest method", slowest)):
    ratio, spread = row["speedup"][method]
    made.append(
      Claim(
        f"How many times as fast as squarified rectangles {what} are, largest tree", "x", "higher",
        ours=ratio, threshold=1.0, spread=tuple(spread), baseline=squarified,
        note=f"{leaves} leaves, {method}; "
        + ", ".join(f"{m} {row['speedup'][m][0]:.2g} x" for m in (*BOUNDED, "slack boxes"))
        + f"; exponents of the time against leaves {slopes}",
      )
    )  # fmt: skip
  return made


def draw(speed: dict, workdir: Path) -> dict[str, str]:
  figure, axis = figures.subplots()
  leaves = [int(n) for n in speed["leaves"]]
  for method, slope in speed["log_log_slope"].items():
    times = [row["milliseconds"][method]["median"] / 1e3 for row in speed["leaves"].values()]
    axis.plot(leaves, times, "o-", label=f"{method}, slope {slope:.2f}")
  axis.set(xlabel="leaves", ylabel="seconds", xscale="log", yscale="log", title="Time of a whole treemap")
  axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
  return {figures.save(figure, workdir, "time"): "Time of a whole treemap against its leaves"}
