"""Value coding, the control: cities whose geometry follows what they mean, as nothing occurs with anything."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bows import value_coding
from experiments.results import Claim
from jaxlab.core.checks import require, require_choice
from jaxlab.core.foreign import foreign, lines


def load(config) -> np.ndarray:
  """(latitude, longitude, population) of cities above 50,000 people; generated ones fill a box the size of the US."""
  c = config.cities
  require_choice("config.cities.name", c.name, ("generated", "csv"))
  if c.name == "csv":
    require(
      Path(c.path).is_file(), f"no file {c.path!r}; give --config.cities.path, lines of latitude,longitude,population"
    )
    with foreign(c.path, "every line is latitude,longitude,population"):
      table = np.loadtxt([line for _, line in lines(Path(c.path))], delimiter=",", ndmin=2)
    require(
      table.shape[1] == 3 and bool(np.isfinite(table).all()),
      f"{c.path} has {table.shape[1]} columns or no finite number in one; every line is latitude,longitude,population",
    )
    table = table[table[:, 2] > 50_000]
    require(len(table) >= 30, f"{c.path} has {len(table)} cities above 50,000 people; at least 30 are needed")
    return table
  random = np.random.default_rng(config.seed)
  n = c.count
  return np.stack([random.uniform(26, 48, n), random.uniform(-122, -70, n), random.pareto(1.1, n) * 5e4 + 5e4], 1)


def measure(config, cities: np.ndarray) -> dict:
  """Accuracy of the octant, R2 of the probe on unseen cities, and accuracy with the probe's plane removed or alone."""
  c = config.cities
  random = np.random.default_rng(42)
  n = len(cities)
  first, second = random.integers(0, n, c.pairs), random.integers(0, n - 1, c.pairs)
  second = np.where(second >= first, second + 1, second)
  at = lambda index: jnp.asarray(cities[index, :2].T)
  labels = value_coding.octant(value_coding.bearing(*at(first), *at(second)))
  cut = int(0.8 * c.pairs)
  trained, _ = value_coding.train(
    value_coding.init_params(jax.random.key(42), cities=n),
    *(jnp.asarray(a[:cut]) for a in (first, second, labels)),
    steps=c.steps,
    batch=c.batch,
  )
  held = tuple(jnp.asarray(a[cut:]) for a in (first, second, labels))
  # The probe never sees the largest 20 cities and 30 % of the others.
  unseen = np.zeros(n, bool)
  unseen[np.argsort(-cities[:, 2])[: min(20, n // 4)]] = True
  unseen |= random.random(n) < 0.3
  place = jnp.asarray(cities[:, :2])
  plane, offset = value_coding.ridge(trained["embedding"][~unseen], place[~unseen], alpha=1e-3)
  error = place[unseen] - trained["embedding"][unseen] @ plane - offset
  spread = place[unseen] - place[unseen].mean(axis=0)
  ablated = {
    mode: value_coding.accuracy(
      trained | {"embedding": value_coding.ablate(trained["embedding"], plane, mode=mode)}, *held
    )
    for mode in value_coding.ABLATIONS
  }
  r2 = 1 - jnp.sum(error**2, axis=0) / jnp.sum(spread**2, axis=0)
  return {"cities": n, "accuracy": value_coding.accuracy(trained, *held), "probe_r2": r2.tolist(), "ablated": ablated}


def claims(coding: dict) -> list[Claim]:
  a = coding["ablated"]
  return [
    Claim(
      "Accuracy of the direction between cities by the plane of their places alone, less that without it", "", "higher",
      ours=a["keep"] - a["remove"], threshold=0.0, baseline=coding["accuracy"],
      note=f"{coding['cities']} cities; accuracy {coding['accuracy']:.2f}, the plane alone {a['keep']:.2f}, without it "
      f"{a['remove']:.2f}, renormalised {a['renormalise']:.2f}; probe R2 of latitude and longitude on unseen cities "
      + ", ".join(f"{v:.2f}" for v in coding["probe_r2"]),
    )
  ]  # fmt: skip
