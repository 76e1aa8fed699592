"""Collections of matrices that may share a basis: travelling waves, channels of many antennas, columns of weights,
pictures. And groups of them that know no error: at random, by k-means, by HDBSCAN."""

from pathlib import Path

import numpy as np

from jaxlab.core.checks import InputError, require, require_choice
from jaxlab.data import images
from jaxlab.models import hub, maps

RIVALS = ("random", "k-means", "HDBSCAN")
_NO_SKLEARN = (
  "groups by HDBSCAN need scikit-learn; pip install scikit-learn, or --config.rivals=\"('random','k-means')\""
)


def collections(config, cache: Path) -> dict[str, list[np.ndarray]]:
  """Those of config.collections; pictures only where config.pictures has a path or a name."""
  p, made = config.pictures, {}
  for name, of in config.collections.items():
    if name != "pictures":
      made[name] = collection(name, of.count, seed=config.seed)
    elif p.path or p.name:
      pixels = images.labelled(p.name, cache=cache, path=p.path, most=p.most)["train"].pixels
      made[name] = pictures(pixels, of.count, np.random.default_rng(config.seed))
  return made


def collection(name: str, count: int, *, seed: int = 0) -> list[np.ndarray]:
  """float32 matrices with the same rows."""
  rng = np.random.default_rng(seed)
  made = {"waves": waves, "channels": channels, "columns": columns, "wide_columns": wide_columns}[name](count, rng)
  return [np.ascontiguousarray(a, np.float32) for a in made]


def waves(count: int, rng, *, places: int = 256, times: int = 67) -> list[np.ndarray]:
  """u(x, t) = u_0(x - beta t) on a circle, (places, times): u_0 of five of 40 sines, beta of 0.1 to 1."""
  x, t = np.linspace(0, 1, places, endpoint=False), np.linspace(0, 1, times)
  made = []
  for _ in range(count):
    beta, phases, sizes = rng.uniform(0.1, 1), rng.uniform(0, 2 * np.pi, 5), rng.normal(size=5)
    waves = rng.integers(1, 41, 5)
    angle = 2 * np.pi * waves[:, None, None] * (x[:, None] - beta * t) + phases[:, None, None]
    made.append(np.einsum("s,sxt->xt", sizes, np.sin(angle)))
  return made


def channels(count: int, rng, *, antennas: int = 64, subcarriers: int = 64, clusters: int = 6) -> list[np.ndarray]:
  """Of users in one cell, (2 antennas, subcarriers), real above imaginary parts.

  A user sees 2 of the cell's clusters of scatterers: 10 rays each, around the cluster's angle and delay, which weaken
  with the delay, received by antennas half a wavelength apart.
  """
  angles, delays = rng.uniform(-np.pi / 3, np.pi / 3, clusters), rng.exponential(0.1, clusters)
  made = []
  for _ in range(count):
    seen = np.repeat(rng.choice(clusters, 2, replace=False), 10)
    angle = angles[seen] + rng.normal(0, 0.02, 20)
    delay = delays[seen] + rng.exponential(0.01, 20)
    gain = (rng.normal(size=20) + 1j * rng.normal(size=20)) * np.exp(-delay / 0.2)
    steering = np.exp(1j * np.pi * np.arange(antennas)[:, None] * np.sin(angle))
    response = np.exp(-2j * np.pi * np.arange(subcarriers) * delay[:, None])
    channel = (steering * gain) @ response
    made.append(np.concatenate([channel.real, channel.imag]))
  return made


def columns(count: int, rng, *, width: int = 1) -> list[np.ndarray]:
  """Of maps of `base` that read its residual stream, drawn from all layers."""
  blocks = maps.named(hub.load("base", dtype="float32").blocks)
  weight = np.concatenate([np.asarray(blocks[name].weight[...]) for name in ("q", "k", "v", "mlp.gate", "mlp.up")], 2)
  wide = np.concatenate(list(weight), axis=1)
  starts = rng.choice(wide.shape[1] // width, count, replace=False) * width
  return [wide[:, i : i + width] for i in starts]


def wide_columns(count: int, rng) -> list[np.ndarray]:
  """Columns by four next to each other."""
  return columns(count, rng, width=4)


def pictures(pixels: np.ndarray, count: int, rng, *, side: int = 8) -> list[np.ndarray]:
  """A matrix a picture, (3 side^2, patches): the entries 0 to 1 of its patches of side x side pixels, one a column.

  Args:
    pixels: uint8 (pictures, height, width, 3), of which `count` are drawn.

  Raises:
    InputError: fewer pictures than `count`, or a side that does not divide theirs.
  """
  n, height, width, _ = pixels.shape
  require(count <= n, f"there are {n} pictures, collections.pictures.count is {count}; raise pictures.most")
  require(height % side == 0 == width % side, f"pictures are {width} x {height}; patches have {side} pixels a side")
  chosen = pixels[rng.choice(n, count, replace=False)].astype(np.float32) / 255
  patches = chosen.reshape(count, height // side, side, width // side, side, 3).transpose(0, 2, 4, 5, 1, 3)
  return [*patches.reshape(count, 3 * side**2, -1)]


def require_rivals(names) -> None:
  """Raises InputError unless all are of `RIVALS`, and scikit-learn is installed where HDBSCAN is one."""
  for name in names:
    require_choice("a rival", name, RIVALS)
  if "HDBSCAN" in names:
    _hdbscan()


def at_random(count: int, groups: int, rng) -> list[list[int]]:
  """As many groups as given, all of one size but for one."""
  return [part.tolist() for part in np.array_split(rng.permutation(count), groups)]


def k_means(blocks: list[np.ndarray], groups: int, rng, *, rounds: int = 20) -> list[list[int]]:
  """Of the matrices' entries; a mean that loses all stays where it is."""
  flat = np.stack([block.ravel() for block in blocks])
  means = flat[rng.choice(len(flat), groups, replace=False)]
  for _ in range(rounds):
    away = (means**2).sum(axis=1) - 2 * flat @ means.T
    nearest = away.argmin(axis=1)
    means = np.stack([flat[nearest == i].mean(axis=0) if (nearest == i).any() else means[i] for i in range(groups)])
  return [np.flatnonzero(nearest == i).tolist() for i in range(groups) if (nearest == i).any()]


def hdbscan(blocks: list[np.ndarray], *, least: int = 2) -> list[list[int]]:
  """Dense regions of the matrices' entries, of `least` matrices at least and as many as there are; what lies in none
  is by itself.
  """
  labels = _hdbscan()(min_cluster_size=least, copy=True).fit_predict(np.stack([block.ravel() for block in blocks]))
  alone = [[int(i)] for i in np.flatnonzero(labels < 0)]
  return [np.flatnonzero(labels == label).tolist() for label in range(labels.max() + 1)] + alone


def _hdbscan():
  try:
    from sklearn.cluster import HDBSCAN
  except ImportError:
    raise InputError(_NO_SKLEARN) from None
  return HDBSCAN
