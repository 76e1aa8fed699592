import sys

import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs import concat_svd as config_file
from experiments import concat_svd, results
from experiments.concat_svd import data
from experiments.concat_svd.groups import judged
from jaxlab.core.checks import InputError
from jaxlab.models import hub, maps
from jaxlab.models.map_forms import SharedBasis
from tests.common import run_and_continue


def test_everything_is_measured_once(two_layers, tmp_path, monkeypatch):
  config = config_file.get_config("test")
  config.data.path, config.data.calibration, config.data.test = "docs/**/*.md", "train", "train"
  config.subjects = (f"hf:{two_layers}",)
  rng = np.random.default_rng(0)
  for number in range(12):
    folder = tmp_path / "pictures" / ("test" if number % 2 else "train") / f"class{number % 3}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
  config.pictures.path = str(tmp_path / "pictures")
  report = run_and_continue("concat_svd", tmp_path, monkeypatch, "bounds", "groups", "layers", config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  assert len(report.claims) == 11 and report.claims[0].holds and report.claims[5].holds
  found = report.metrics["groups"]
  assert set(found) == set(report.metrics["bounds"]) == set(config.collections) and "pictures" in found
  assert all(rival in found[name] for name in found for rival in data.RIVALS)
  assert "5 collections" in report.claims[0].name and "by HDBSCAN" in report.claims[4].note
  rows = report.metrics["layers"][two_layers.name]["rows"]
  shared = next(row for row in rows if row["method"] == "shared")
  assert report.metrics["layers"][two_layers.name]["matrices"] == 4 and shared["worst"] <= shared["budget"]


def test_ones_own_model_becomes_a_folder(two_layers, tmp_path, monkeypatch):
  config = config_file.get_config("test")
  config.data.path, config.data.calibration, config.data.test = "docs/**/*.md", "train", "train"
  config.model, config.budget, config.rank = f"hf:{two_layers}", 0.7, 0.3
  report = run_and_continue("concat_svd", tmp_path, monkeypatch, "shared", config=config)
  (found,) = report.metrics["compressed"].values()
  small = hub.load(tmp_path / "compressed")
  assert maps.bytes_of(small) == found["bytes"]["compressed"] < found["bytes"]["original"]
  assert any(isinstance(one, SharedBasis) for one in maps.named(small.blocks).values())
  assert [claim.name.split()[0] for claim in report.claims] == ["Perplexity", "Bytes"]


def test_collections_are_what_they_say():
  for name in ("waves", "channels"):
    (first, *rest), again = data.collection(name, 4), data.collection(name, 4)
    assert all(block.shape == first.shape for block in rest) and np.array_equal(first, again[0])
  # A wave is its first column, moved: every column has the same energy and few sines.
  wave = data.collection("waves", 1)[0]
  np.testing.assert_allclose((wave**2).sum(axis=0), (wave[:, 0] ** 2).sum(), rtol=1e-3)
  assert np.linalg.matrix_rank(wave, tol=1e-3) <= 10


@pytest.mark.parametrize("groups", [1, 3])
def test_rival_groups_are_partitions(groups):
  rng = np.random.default_rng(0)
  blocks = [np.full((2, 2), 10.0 * (i % 3)) + 0.1 * rng.normal(size=(2, 2)) for i in range(12)]
  for parts in (data.at_random(12, groups, rng), data.k_means(blocks, groups, rng)):
    assert sorted(i for part in parts for i in part) == list(range(12)) and len(parts) <= groups


def test_groups_by_density_leave_what_lies_alone_by_itself():
  rng = np.random.default_rng(0)
  centres = np.repeat([0.0, 50.0], 6)
  blocks = [np.full((2, 2), centre) + 0.1 * rng.normal(size=(2, 2)) for centre in (*centres, -400.0, 300.0)]
  parts = data.hdbscan(blocks, least=5)
  assert sorted(map(sorted, parts)) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12], [13]]


def test_groups_of_rivals_are_counted_as_ours_are():
  """Five columns along one direction and one by itself, of length 8 at rank 2: 2 (8 + 5) + 8 numbers for 48."""
  direction, other = np.eye(8)[:, :1], np.eye(8)[:, 1:2]
  blocks = [scale * direction for scale in (1.0, 2, 3, 4, 5)] + [other]
  of = ml_collections.ConfigDict(dict(rank=2, eps=0.1))
  found = judged(blocks, [[0, 1, 2, 3, 4], [5]], of)
  assert found["ratio"] == 48 / 34 and found["above"] == 0 and found["groups"] == 2
  assert judged(blocks, [[0, 5], [1, 2, 3, 4]], of)["ratio"] == 48 / (16 + 24)


def test_pictures_are_cut_into_patches_and_left_out_where_none_are_given(tmp_path):
  pixels = np.arange(3 * 4 * 6 * 3, dtype=np.uint8).reshape(3, 4, 6, 3)
  made = data.pictures(pixels, 3, np.random.default_rng(0), side=2)
  first = np.random.default_rng(0).choice(3, 3, replace=False)[0]
  assert {block.shape for block in made} == {(12, 6)}
  # The fifth patch: rows 2 and 3, columns 2 and 3.
  np.testing.assert_allclose(made[0][:, 4], pixels[first, 2:4, 2:4].ravel() / 255, rtol=1e-6)
  with pytest.raises(InputError, match=r"there are 3 pictures, collections\.pictures\.count is 4"):
    data.pictures(pixels, 4, np.random.default_rng(0), side=2)
  with pytest.raises(InputError, match="pictures are 6 x 4; patches have 4 pixels a side"):
    data.pictures(pixels, 3, np.random.default_rng(0), side=4)
  config = config_file.get_config("test")
  assert set(data.collections(config, tmp_path)) == set(config.collections) - {"pictures"}


def test_rivals_are_refused_before_anything_is_measured(tmp_path, monkeypatch):
  config = config_file.get_config("test")
  monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
  with pytest.raises(InputError, match="groups by HDBSCAN need scikit-learn; pip install scikit-learn"):
    concat_svd.measure(config, tmp_path, tmp_path, None)
  config.rivals = ("by_hand",)
  with pytest.raises(InputError, match="a rival is 'by_hand'"):
    concat_svd.measure(config, tmp_path, tmp_path, None)
