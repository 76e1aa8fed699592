"""Fat polygonal partitions: bounds on adversarial trees, a real treemap, slack boxes, embeddings, time against size."""

import functools
from pathlib import Path

from experiments import results
from experiments.polygonal_partitions import embedding, files, polygons, speed
from experiments.results import Claim
from jaxlab.graphs.weighted_trees import is_leaf

UNDEFINED = ("embedding.*.distortion.*",)  # of a baseline that puts two points on one place


def measure(config, workdir: Path, cache: Path, console) -> dict:
  d = config.data
  tree, names, what = files.load(config)
  console.say(f"{what}: {int(is_leaf(tree.parents).sum())} leaves, {len(names)} nodes")
  part = functools.partial(results.part, workdir)
  metrics = dict(
    bounds=part("bounds", lambda: polygons.check_bounds(config, console)),
    skewed=part("skewed", lambda: polygons.compare_skewed(config)),
    real=part("real", lambda: files.measure(tree, what)),
    slack=part("slack", lambda: embedding.check_slack(config)),
    embedding=part("embedding", lambda: embedding.check_embeddings(config, console)),
  )
  if d.name != "wordnet":
    sizes, folder = files.file_sizes(d.name, d.path)
    metrics["embedding"]["real"] = part("embedding.real", lambda: embedding.embed_files(config, folder, sizes))
  return metrics | {"speed": part("speed", lambda: speed.measure(config, console))}


def claims(config, metrics: dict) -> list[Claim]:
  made = polygons.claims(metrics["bounds"], metrics["skewed"]) + files.claims(metrics["real"])
  return made + embedding.claims(config, metrics["slack"], metrics["embedding"]) + speed.claims(metrics["speed"])


def finding(config, metrics: dict) -> str:
  bounds, real = metrics["bounds"], metrics["real"]
  worst = max(bounds[method]["aspect_over_bound"] for method in polygons.BOUNDED)
  aspect = real["aspect"]
  return (
    f"On {bounds['trees']} adversarial trees no polygon exceeds {worst:.2f} of its proven aspect bound; of "
    f"{real['leaves']} {real['name']} the worst aspect is {aspect['greedy']:.3g} (squarified "
    f"{aspect['squarified']:.3g}, slice-and-dice {aspect['slice-and-dice']:.2g})."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  drawn = files.draw(config, metrics["real"], workdir) | polygons.draw(metrics["skewed"], workdir)
  return drawn | embedding.draw(metrics["embedding"], workdir) | speed.draw(metrics["speed"], workdir)
