"""Labelled images of one size, in memory: folders of files, or public tensorflow_datasets sets of image and label.

splits = labelled("cifar10", cache=...)                  # or path="DIR": DIR/train/<class>/*.jpg, DIR/test/<class>/*
splits["train"].pixels, splits["train"].labels
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from jaxlab.core.checks import plain, require
from jaxlab.core.foreign import foreign
from jaxlab.data import corpora

SPLITS = ("train", "test")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class Images:
  """pixels: (images, height, width, 3); labels: (images,), places in `classes`."""

  pixels: UInt8[np.ndarray, "images height width 3"]
  labels: Int[np.ndarray, "images"]
  classes: tuple[str, ...]


def labelled(name: str = "", *, cache: str | os.PathLike, path: str = "", most: int | None = None) -> dict[str, Images]:
  """{"train", "test"} of a tfds set, or of a folder with a folder for every class in train/ and in test/.

  Args:
    path: the folder, which wins over `name`. most: images of a class at most, the first by name; None takes all.

  Raises:
    InputError: no such folder or set; splits of different classes, images of different sizes, a file that is no image,
      a class without one.
  """
  require(
    bool(path or name), "no images: give a folder with train/<class>/*.jpg and test/<class>/*.jpg, or a tfds name"
  )
  splits = {split: _folder(Path(os.path.expanduser(path)) / split, most) for split in SPLITS} if path else {}
  splits = splits or _public(name, cache, most)
  train, test = (splits[split] for split in SPLITS)
  require(train.classes == test.classes, f"train has the classes {plain(*train.classes)}, test {plain(*test.classes)}")
  sizes = {one.pixels.shape[1:] for one in splits.values()}
  require(len(sizes) == 1, f"images of train and test differ in size: {sizes}; scale them to one")
  return splits


def _folder(folder: Path, most: int | None) -> Images:
  require(folder.is_dir(), f"no folder {folder}; images lie in train/<class>/ and test/<class>/")
  classes = sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
  require(bool(classes), f"{folder} has no folder for a class")
  pixels, labels = [], []
  for label, name in enumerate(classes):
    files = sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in _SUFFIXES)[:most]
    require(bool(files), f"{folder / name} has no image; they end in {', '.join(_SUFFIXES)}")
    for file in files:
      with foreign(file, "it is no image that can be read: remove it or fetch it again"), Image.open(file) as image:
        one = np.asarray(image.convert("RGB"))
      same = not pixels or one.shape == pixels[0].shape
      require(
        same, f"{file} is {_size(one)}, the images before it {_size(pixels[0]) if pixels else ''}; scale them to one"
      )
      pixels.append(one)
      labels.append(label)
  return Images(np.stack(pixels), np.array(labels, np.int32), tuple(classes))


def _size(pixels: np.ndarray) -> str:
  return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _public(name: str, cache, most: int | None) -> dict[str, Images]:
  builder = corpora.public(name, cache, prepared=True)
  features, splits = builder.info.features, builder.info.splits
  needed = {"image", "label"} <= set(features) and set(SPLITS) <= set(splits)
  require(needed, f"dataset {name} must have image, label, train and test; it has {', '.join((*features, *splits))}")
  return {
    split: _records(builder.as_data_source(split=split), tuple(features["label"].names), most) for split in SPLITS
  }


def _records(source: Sequence, classes: tuple[str, ...], most: int | None) -> Images:
  seen = np.zeros(len(classes), int)
  pixels, labels = [], []
  for record in source:
    label = int(record["label"])
    seen[label] += 1
    if most is None or seen[label] <= most:
      pixels.append(np.broadcast_to(record["image"], (*record["image"].shape[:2], 3)))
      labels.append(label)
  return Images(np.stack(pixels), np.array(labels, np.int32), classes)
