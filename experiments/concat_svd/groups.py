"""Bounds beside the true error, and groups of every collection beside groups that know no error."""

import time
from pathlib import Path

import numpy as np

from experiments.concat_svd import data
from jaxlab.weights import concat_svd
from jaxlab.weights.concat_svd import EXACT, METHODS, bound, cluster, compression_ratio, relative_error


def bounds(config, cache: Path) -> dict[str, list[dict]]:
  """{collection: rows of a random subset: {count, true, and the bound of every method}}."""
  b, found = config.bounds, {}
  for name, blocks in data.collections(config, cache).items():
    of = config.collections[name]
    rng = np.random.default_rng(config.seed)
    found[name] = []
    for count in (count for count in b.sizes if count <= len(blocks)):
      for _ in range(b.trials):
        chosen = [blocks[i] for i in rng.choice(len(blocks), count, replace=False)]
        row = {method: bound(chosen, rank=of.rank, method=method) for method in METHODS}
        found[name].append({"count": count, "true": relative_error(chosen, rank=of.rank)} | row)
  return found


def groups(config, cache: Path) -> dict[str, dict]:
  """{collection: {method: {groups, largest: matrices, worst, mean: true error of groups that share, ratio, seconds}}}.

  Beside the methods those of config.rivals, at random and by k-means as many as "approximate" makes, by HDBSCAN as many
  as it finds: {groups, above: share whose error exceeds eps, worst, ratio: numbers over those stored}; and the seconds
  of an SVD at every step of the exact groups.
  """
  found = {}
  for name, blocks in data.collections(config, cache).items():
    of, made = config.collections[name], {}
    for method in (*METHODS, EXACT):
      how = dict(rank=of.rank, eps=of.eps, method=method)
      cluster(blocks[: min(len(blocks), of.rank + 2)], **how)  # compiles
      start = time.perf_counter()
      made[method] = cluster(blocks, **how)
      seconds = time.perf_counter() - start
      errors = [_error(blocks, one.members, of.rank) for one in made[method] if one.basis is not None]
      found.setdefault(name, {})[method] = dict(
        groups=len(made[method]),
        largest=max(len(one.members) for one in made[method]),
        worst=max(errors, default=0.0),
        mean=float(np.mean(errors)) if errors else 0.0,
        ratio=compression_ratio(blocks, made[method]),
        seconds=seconds,
      )
    found[name]["svd_seconds"] = _with_svds(blocks, made[EXACT])
    rng = np.random.default_rng(config.seed)
    count = len(made["approximate"])
    ways = {
      "random": lambda blocks=blocks, count=count, rng=rng: data.at_random(len(blocks), count, rng),
      "k-means": lambda blocks=blocks, count=count, rng=rng: data.k_means(blocks, count, rng),
      "HDBSCAN": lambda blocks=blocks: data.hdbscan(blocks),
    }
    for rival in config.rivals:
      found[name][rival] = judged(blocks, ways[rival](), of)
  return found


def judged(blocks, parts: list[list[int]], of) -> dict:
  """Groups that a rival made, stored as the methods' are: whole where factors would take as many numbers."""
  errors = np.array([_error(blocks, part, of.rank) for part in parts])
  rows, total = len(blocks[0]), sum(block.size for block in blocks)
  columns = [sum(blocks[i].shape[1] for i in part) for part in parts]
  factors = lambda part, n: of.rank * (rows + n) if len(part) > 1 else rows * n
  stored = sum(min(rows * n, factors(part, n)) for part, n in zip(parts, columns, strict=True))
  above = float((errors > of.eps).mean())
  return dict(groups=len(parts), above=above, worst=float(errors.max()), ratio=total / stored)


def _error(blocks, members, rank: int) -> float:
  """The true error, by numpy, which compiles nothing for a group of another size."""
  energy = np.linalg.svd(np.concatenate([blocks[i] for i in members], axis=1), compute_uv=False) ** 2
  return float(np.sqrt(energy[rank:].sum() / energy.sum()))


def _with_svds(blocks, clusters: list[concat_svd.Cluster]) -> float:
  """Seconds of an SVD at every step of the way to these groups, from at most 12 of each group's steps."""
  total = 0.0
  for one in clusters:
    steps = len(one.members) - 1
    stops = np.unique(np.linspace(2, steps + 1, 12).astype(int)) if steps else ()
    start = time.perf_counter()
    for stop in stops:
      np.linalg.svd(np.concatenate([blocks[i] for i in one.members[:stop]], axis=1), compute_uv=False)
    total += (time.perf_counter() - start) * steps / max(1, len(stops))
  return total
