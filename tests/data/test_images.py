"""Folders of labelled images: what is read, and what is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from jaxlab.core.checks import InputError
from jaxlab.data import images


def folder(root, size=(6, 5), classes=("cat", "dog"), count=3):
  rng = np.random.default_rng(0)
  for split in ("train", "test"):
    for name in classes:
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / split / name / f"{i}.png")
  return root


def test_a_folder_of_classes(tmp_path):
  folder(tmp_path)
  (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
  Image.fromarray(np.full((5, 6), 7, np.uint8)).save(tmp_path / "train" / "dog" / "9.png")  # of one channel
  splits = images.labelled(path=str(tmp_path), cache=tmp_path)
  train = splits["train"]
  assert train.pixels.shape == (7, 5, 6, 3) and train.pixels.dtype == np.uint8
  assert train.classes == ("cat", "dog") and train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
  assert (train.pixels[-1] == 7).all()
  with Image.open(tmp_path / "test" / "dog" / "1.png") as image:
    np.testing.assert_array_equal(splits["test"].pixels[4], image)
  assert len(images.labelled(path=str(tmp_path), cache=tmp_path, most=2)["train"].labels) == 4


def test_wrong_folders_are_one_line(tmp_path):
  read = lambda name: images.labelled(path=str(tmp_path / name), cache=tmp_path)
  with pytest.raises(InputError, match="no images: give a folder"):
    images.labelled(cache=tmp_path)
  with pytest.raises(InputError, match=r"no folder .*nowhere/train; images lie in train/<class>/"):
    read("nowhere")
  (tmp_path / "flat" / "train").mkdir(parents=True)
  with pytest.raises(InputError, match="has no folder for a class"):
    read("flat")
  folder(tmp_path / "empty")
  (tmp_path / "empty" / "train" / "bird").mkdir()
  with pytest.raises(InputError, match="bird has no image"):
    read("empty")
  folder(tmp_path / "sizes")
  Image.new("RGB", (9, 9)).save(tmp_path / "sizes" / "train" / "dog" / "9.png")
  with pytest.raises(InputError, match=r"9\.png is 9 x 9, the images before it 6 x 5"):
    read("sizes")
  folder(tmp_path / "broken")
  (tmp_path / "broken" / "test" / "dog" / "1.png").write_bytes(b"no image")
  with pytest.raises(InputError, match=r"1\.png: .*remove it or fetch it again"):
    read("broken")
  folder(tmp_path / "classes")
  (tmp_path / "classes" / "test" / "dog").rename(tmp_path / "classes" / "test" / "wolf")
  with pytest.raises(InputError, match="train has the classes cat, dog, test cat, wolf"):
    read("classes")


def test_a_public_set_is_read_by_its_records():
  """As a data source gives them: dicts of an image, of one channel too, and a label."""
  records = [{"image": np.full((4, 4, 1), i, np.uint8), "label": i % 2} for i in range(6)]
  found = images._records(records, ("even", "odd"), 2)
  assert found.pixels.shape == (4, 4, 4, 3) and found.labels.tolist() == [0, 1, 0, 1]
  assert found.pixels[3, 0, 0].tolist() == [3, 3, 3]
