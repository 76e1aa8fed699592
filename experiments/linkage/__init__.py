"""Linkage: theorems on random instances, graphs cut in two, a resistive network solved in parts, and throughput."""

import functools
from pathlib import Path

from experiments import results
from experiments.linkage import graphs, identities, speed
from experiments.results import Claim
from jaxlab.tensors import fields


def measure(config, workdir: Path, cache: Path, console) -> dict:
  loaded, b = graphs.load_graphs(config), config.bench
  for p in (*config.fields, *b.fields):
    fields.check_field(p)
  part = functools.partial(results.part, workdir)
  metrics = {"identities": {}, "graphs": {}, "network": {}, "speed": {}}
  for p in console.track("identities", list(config.fields)):
    metrics["identities"][f"{p}"] = part(f"identities.{p}", lambda p=p: identities.check_identities(p, config))
  metrics["reals"] = part("reals", lambda: identities.check_reals(config))
  metrics["matroids"] = part("matroids", lambda: identities.check_matroids(config))
  for name, graph in console.track("graphs", list(loaded.items())):
    file = name.replace(", ", ".")
    metrics["graphs"][name] = part(f"cut.{file}", lambda g=graph: graphs.cut_graph(*g))
    # Solving it whole is dense.
    if len(graph[0]) <= 300:
      metrics["network"][name] = part(f"network.{file}", lambda g=graph: graphs.solve_in_parts(*g))
  for p, n in console.track("timing", [(p, n) for p in b.fields for n in b.sizes]):
    metrics["speed"][f"GF({p}) {n}"] = part(f"speed.{p}.{n}", lambda p=p, n=n: speed.time_minimise(b, p, n))
  return metrics


def claims(config, metrics: dict) -> list[Claim]:
  made = identities.claims(metrics["identities"], metrics.get("reals"), metrics["matroids"])
  return made + graphs.claims(metrics["graphs"], metrics["network"]) + speed.claims(config, metrics["speed"])


def finding(config, metrics: dict) -> str:
  found, rows = metrics["identities"], metrics["graphs"]
  failures = sum(sum(r["failures"].values()) for r in found.values())
  total = sum(r["instances"] for r in found.values())
  before, after = (sum(r["instances"] * r[key] for r in found.values()) / total for key in ("before", "after"))
  saved = sum(r["tree"] - r["formula"] for r in rows.values())
  return (
    f"{failures} failures of the paper's theorems (proved there, no experiments) on {total} random pairs of spaces, "
    f"whose overlap falls from {before:.2f} to {after:.2f} coordinates on average; {len(rows)} cuts of graphs need "
    f"{sum(r['formula'] for r in rows.values())} shared coordinates, {saved} fewer than trees on their boundaries."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  return graphs.draw(metrics["graphs"], workdir) | speed.draw(metrics["speed"], workdir)
