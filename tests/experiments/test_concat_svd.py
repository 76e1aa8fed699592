import numpy as np
import pytest

from configs import concat_svd as config_file
from experiments import results
from experiments.concat_svd import data
from jaxlab.models import hub, maps
from jaxlab.models.map_forms import SharedBasis
from tests.common import run_and_continue


def test_everything_is_measured_once(two_layers, tmp_path, monkeypatch):
  config = config_file.get_config("test")
  config.data.path, config.data.calibration, config.data.test = "docs/**/*.md", "train", "train"
  config.subjects = (f"hf:{two_layers}",)
  report = run_and_continue("concat_svd", tmp_path, monkeypatch, "bounds", "groups", "layers", config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  assert len(report.claims) == 11 and report.claims[0].holds and report.claims[5].holds
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
