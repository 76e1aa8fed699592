"""Three tasks: pictures (CIFAR-10), passages of text (which document is it from), generated clouds of points."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from experiments import text
from experiments.bibench import networks
from jaxlab.core.checks import require
from jaxlab.data import images, tokenizer

PARTS = ("train", "held", "test")


class Task(NamedTuple):
  """What operators are trained for and judged by.

  Attributes:
    network: of `Layers` and a batch. parts: {"train", "held", "test"}: (x, labels); rates are chosen by the held part.
    augment: (key, batch of x) -> batch. teach: is the twin a teacher. together: runs side by side in one program.
  """

  network: Callable
  parts: dict[str, tuple[Array, Int[Array, "n"]]]
  augment: Callable
  teach: bool
  together: bool


def pictures(config, cache: Path) -> Task:
  """CIFAR-10 or a folder like it; the last of the training images of every class are held."""
  p = config.pictures
  splits = images.labelled(p.name, cache=cache, path=p.path, most=p.most or None)
  classes = len(splits["train"].classes)

  def ready(one, chosen):
    x = jnp.asarray(one.pixels[chosen], jnp.float32) / 255
    n, height, width, _ = x.shape
    require(height % p.shrink == 0 == width % p.shrink, f"pictures.shrink={p.shrink} must divide {height} and {width}")
    x = x.reshape(n, height // p.shrink, p.shrink, width // p.shrink, p.shrink, 3).mean(axis=(2, 4))
    return x, jnp.asarray(one.labels[chosen])

  place = _place_in_class(splits["train"].labels)
  share = place / np.bincount(splits["train"].labels)[splits["train"].labels]
  held = share >= 1 - p.held
  few = _place_in_class(splits["test"].labels) < p.judged
  parts = dict(train=ready(splits["train"], ~held), held=ready(splits["train"], held), test=ready(splits["test"], few))
  mean, spread = float(parts["train"][0].mean()), float(parts["train"][0].std())
  of = networks.of_pictures(p.network, width=p.width, blocks=p.blocks, classes=classes)
  network = lambda layers, x: of(layers, (x - mean) / spread)
  return Task(network, parts, shifted, False, False)


def _place_in_class(labels) -> np.ndarray:
  """The how manieth of its class every image is."""
  place = np.empty(len(labels), int)
  for label in np.unique(labels):
    mine = np.flatnonzero(labels == label)
    place[mine] = np.arange(len(mine))
  return place


def shifted(key, x):
  """Padded by an eighth of its side (4 of 32) on all sides, cut back anywhere, and flipped in half of the cases."""
  n, height, width, _ = x.shape
  pad = max(height // 8, 1)
  padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  k1, k2, k3 = jax.random.split(key, 3)
  rows = jax.random.randint(k1, (n, 1), 0, 2 * pad + 1) + jnp.arange(height)
  columns = jax.random.randint(k2, (n, 1), 0, 2 * pad + 1) + jnp.arange(width)
  columns = jnp.where(jax.random.bernoulli(k3, 0.5, (n, 1)), columns[:, ::-1], columns)
  return padded[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None]]


def passages(config, cache: Path) -> Task:
  """The longest documents of a split, cut into passages; the last ones of each are held and judged on, those between
  the three parts are left out."""
  t = config.text
  data = config.data.copy_and_resolve_references()
  data.name = "local_text" if data.path else data.name
  documents = text.load_documents(data, data.split, cache)
  longest = sorted(range(len(documents)), key=lambda i: -len(documents[i]))[: t.classes]
  require(len(longest) == t.classes, f"the split {data.split} has {len(documents)} documents, {t.classes} are needed")
  bpe = tokenizer.trained(
    [documents[i] for i in longest], key=f"{documents.key} {longest}", vocab_size=t.vocabulary, cache=cache
  )
  sizes = dict(train=t.rows, held=t.judged, test=t.judged)
  parts = {part: ([], []) for part in PARTS}
  for label, i in enumerate(longest):
    ids = np.array(bpe.encode(documents[i], add_special_tokens=False).ids, np.int32)
    rows = ids[: len(ids) // t.time * t.time].reshape(-1, t.time)
    wanted = sum(sizes.values()) + 2
    said = f"document {label} has {len(rows)} passages of {t.time} tokens, {wanted} are needed; give longer ones"
    require(len(rows) >= wanted, said)
    ends = dict(train=len(rows) - 2 * t.judged - 2, held=len(rows) - t.judged - 1, test=len(rows))
    for part, (x, y) in parts.items():
      begin = 0 if part == "train" else ends[part] - t.judged
      chosen = np.linspace(begin, ends[part] - 1, sizes[part]).astype(int)
      x.append(rows[chosen])
      y.append(np.full(len(chosen), label, np.int32))
  joined = {part: tuple(map(jnp.asarray, map(np.concatenate, both))) for part, both in parts.items()}
  sizes = dict(vocabulary=bpe.get_vocab_size(), width=t.width, depth=t.depth, heads=t.heads, classes=t.classes)
  return Task(networks.of_text(**sizes), joined, lambda key, x: x, True, True)


def clouds(config, cache: Path) -> Task:
  """Points on the surfaces of parametric solids, noisy, each turned about its vertical axis."""
  c = config.clouds
  sizes = dict(train=c.rows, held=c.judged, test=c.judged)
  make = functools.partial(solids, points=c.points, classes=c.classes)
  parts = {part: make(np.random.default_rng((7, i)), each=sizes[part]) for i, part in enumerate(PARTS)}
  of = networks.of_clouds(c.network, width=c.width, classes=c.classes)
  return Task(of, {part: tuple(map(jnp.asarray, both)) for part, both in parts.items()}, turned, False, True)


SHAPES = 20


def solids(rng: np.random.Generator, *, each: int, points: int, classes: int):
  """(clouds (n, points, 3) float32, labels) of `each` clouds a class: ten kinds of solids, flat and tall ones."""
  require(2 <= classes <= SHAPES, f"clouds.classes is {classes}; there are {SHAPES} kinds of solids")
  labels = np.repeat(np.arange(classes), each)
  found = np.stack([_solid(label, rng, points) for label in labels])
  found += rng.normal(scale=0.03, size=found.shape)
  found -= found.mean(axis=1, keepdims=True)
  found /= np.linalg.norm(found, axis=2).max(axis=1)[:, None, None]
  return found.astype(np.float32), labels.astype(np.int32)


def _solid(label: int, rng, points: int) -> np.ndarray:
  kind, tall = label % 10, 1.8 if label >= 10 else 0.9
  u, v = rng.random(points), rng.random(points)
  turn, height = 2 * math.pi * u, 2 * v - 1
  ring = np.stack([np.cos(turn), np.sin(turn)])
  ratio = rng.uniform(0.25, 0.5)
  faces = rng.integers(0, 3, points)
  made = {
    0: lambda: (*(ring * np.sqrt(1 - height**2)), height),  # a sphere
    1: lambda: (*ring, height),  # a tube
    2: lambda: (*(ring * (1 - v)), 2 * v - 1),  # a cone
    3: lambda: ((1 + ratio * np.cos(2 * math.pi * v)) * ring[0], (1 + ratio * np.cos(2 * math.pi * v)) * ring[1],
                ratio * np.sin(2 * math.pi * v)),  # a torus
    4: lambda: _box(rng, points, faces),
    5: lambda: (2 * u - 1, height, (2 * u - 1) * height),  # a saddle
    6: lambda: (*(ring * (0.3 + 0.7 * height**2)), height),  # an hourglass
    7: lambda: (np.cos(3 * turn) * (0.6 + 0.1 * rng.random(points)), np.sin(3 * turn) * 0.6, 2 * u - 1),  # a helix
    8: lambda: (*(ring * np.sqrt(v) * 1.0), np.where(faces == 0, -1.0, 1.0)),  # two disks
    9: lambda: (*(ring * np.sqrt(1 - height**2)), np.abs(height)),  # a dome
  }  # fmt: skip
  return np.stack(made[kind](), axis=1) * [1.0, rng.uniform(0.8, 1.0), tall * rng.uniform(0.8, 1.2)]


def _box(rng, points: int, faces):
  place = rng.uniform(-1, 1, (3, points))
  place[faces, np.arange(points)] = rng.choice([-1.0, 1.0], points)
  return tuple(place)


def turned(key, x):
  """About the vertical axis, each by its own angle."""
  angle = jax.random.uniform(key, (len(x), 1), maxval=2 * math.pi)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1], x[..., 2]], axis=-1)


TASKS = dict(pictures=pictures, text=passages, clouds=clouds)
KINDS = dict(pictures="CNN", text="transformer", clouds="MLP")
