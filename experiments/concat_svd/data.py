"""Collections of matrices that may share a basis: travelling waves, channels of many antennas, columns of weights."""

import numpy as np

from jaxlab.models import hub, maps


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
