"""Folds of real tensors (.npz) or of a generated one."""

import math
from pathlib import Path

import numpy as np

from jaxlab.core.checks import require, require_choice
from jaxlab.core.foreign import foreign, read_npz
from jaxlab.tensors import funbat

DATA = ("field", "npz")
_LEVELS = 10_000_000  # of a mode, at most


def load_folds(config) -> dict[str, list[tuple[funbat.Data, funbat.Data]]]:
  """{name of a data set: (train, test) of every fold on the same grids}; coordinates in [0, 1], y standardised."""
  d = config.data
  require_choice("config.data.name", d.name, DATA)
  require(d.folds >= 1, f"data.folds is {d.folds}; at least one is needed")
  if d.name == "field":
    return {"generated field": field(config)}
  require(len(d.paths) > 0, "config.data.paths is empty; data.name=npz needs .npz files")
  sets = {Path(path).stem: read_folds(Path(path), d.folds) for path in d.paths}
  few = lambda folds, size: [thinned(*fold, size) for fold in folds]
  return sets | {f"{name}, {size} entries": few(folds, size) for name, folds in sets.items() for size in d.few}


def thinned(train: funbat.Data, test: funbat.Data, size: int):
  """A fold with `size` of its training entries, drawn at random."""
  at = np.random.default_rng(0).permutation(len(train.y))[:size]
  require(len(at) == size >= 1, f"data.few has {size}; a fold has {len(train.y)} training entries")
  return funbat.take(train, at), test


def density(folds) -> float:
  """The share of the tensor's entries that are training entries."""
  train = folds[0][0]
  return len(train.y) / math.prod(map(len, train.grids))


def read_folds(path: Path, count: int) -> list[tuple[funbat.Data, funbat.Data]]:
  require(path.is_file(), f"config.data.paths has '{path}', not a file; data.name=npz needs .npz files")
  file = read_npz(path)
  with foreign(path, "expected data/<fold>/{tr_ind,tr_y,te_ind,te_y}, ndims/<mode>"):
    available = len({name.split("/")[1] for name in file if name.startswith("data/")})
    require(available >= count, f"{path} has {available} folds; lower data.folds from {count}")
    modes = len([name for name in file if name.startswith("ndims/")])
    levels = [int(file[f"ndims/{k}"]) for k in range(modes)]
    require(max(levels, default=0) <= _LEVELS, f"{path} has a mode of {max(levels)} levels, over {_LEVELS}")
    grids = [np.linspace(0, 1, n) for n in levels]
    rows = [[file[f"data/{i}/{part}"] for part in ("tr_ind", "tr_y", "te_ind", "te_y")] for i in range(count)]
    require(all(row[k].dtype.kind in "iu" for row in rows for k in (0, 2)), f"{path}: indices are no integers")
    sizes = {(len(row[1]), len(row[3])) for row in rows}
    require(len(sizes) == 1, f"{path} has folds of several sizes, {sorted(sizes)}; they are fitted as one batch")
    return [pair(grids, *row) for row in rows]


def pair(grids, train, y, test, target):
  """One fold, standardised by its training set; in the model's units, so that all folds share one program."""
  center, scale = np.mean(y), np.std(y)
  one = lambda index, values: funbat.on_grids(
    grids, index, (np.asarray(values, float) - center) / scale, units=funbat.RAW
  )
  return one(train, y), one(test, target)


def field(config) -> list[tuple[funbat.Data, funbat.Data]]:
  """A Tucker model whose factors are random smooth functions, with noise 0.3; random coordinates, 20 % for testing."""
  d, rng = config.data, np.random.default_rng(config.seed)
  grids = [np.sort(rng.uniform(0, 1, n)) for n in d.levels]
  rank, waves = 3, 12
  factors = []
  for grid in grids:
    frequency, phase = rng.uniform(5, 60, (waves, rank)), rng.uniform(0, 2 * np.pi, (waves, rank))
    factors.append(np.sin(frequency * grid[:, None, None] + phase).sum(1) / np.sqrt(waves / 2))
  core = rng.normal(size=(rank,) * len(grids))
  index = np.stack([rng.integers(0, n, d.observations) for n in d.levels], 1)
  y = np.einsum("abc,na,nb,nc->n", core, *(f[index[:, k]] for k, f in enumerate(factors)))
  y = y / y.std() + 0.3 * rng.normal(size=len(y))
  folds = []
  for _ in range(d.folds):
    order, cut = rng.permutation(len(y)), len(y) // 5
    test, train = order[:cut], order[cut:]
    folds.append(pair(grids, index[train], y[train], index[test], y[test]))
  return folds
