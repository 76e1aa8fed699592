import jax.numpy as jnp
import numpy as np
import pytest

from configs import chelsea as config_file
from experiments import results
from experiments.chelsea import decoders
from jaxlab.cache.chelsea_merging import kept
from jaxlab.cache.entries import Entries
from tests.common import run_and_continue


def test_everything_is_measured_once(tiny_checkpoint, tmp_path, monkeypatch):
  """On a folder of one's own, named on the command line."""
  config = config_file.get_config("test")
  config.model, config.data.path = f"hf:{tiny_checkpoint}", "docs/**/*.md"
  config.data.split = "train"
  report = run_and_continue("chelsea", tmp_path, monkeypatch, "subjects", "speed.measure", config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  assert list(report.metrics["losses"]) == [tiny_checkpoint.name] and len(report.claims) == 12
  rows = {row["decoder"]: row for row in report.metrics["losses"][tiny_checkpoint.name]}
  assert set(rows) == {"dense", "Chelsea 0.25", "snapkv"}
  # Of 96 tokens 4 and 28 as they are, 64 as 16.
  assert rows["Chelsea 0.25"]["entries"] == 48 / 96 and rows["dense"]["difference"] == 0
  kl = {way: row["kl"] for way, row in report.metrics["mergings"][tiny_checkpoint.name].items()}
  served = report.metrics["serving"][tiny_checkpoint.name]
  assert served["Chelsea"]["most"] > served["dense"]["most"] and served["Chelsea"]["compacted"] >= 4
  assert served["dense"]["compacted"] == 0 and served["Chelsea"]["pages"] < served["dense"]["pages"]
  assert set(kl) == set(config_file.COMPARED)
  # The model's one layer is among the first ones.
  assert abs(kl.pop("first layers whole")) < 1e-6 < min(kl.values())


def test_rivals_hold_as_many_bytes():
  """A centroid has a count of four bytes beside its key and value; half a chunk passes through the second round."""
  m = config_file.get_config("cpu").method
  assert decoders.entries(m, 0.25, 896) == 896 - 832 + 224 and decoders.entries(m, 0.25, 60) == 60
  assert decoders.rival_keep(m, 0.25, time=896, bytes_of_entry=256) * 896 * 256 == pytest.approx(288 * (256 + 4))
  assert decoders.rival_keep(m, 0.25, time=60, bytes_of_entry=256) == 1


@pytest.mark.parametrize("merging", [decoders.without_chunks, decoders.into_nearest, decoders.k_means])
def test_other_ways_of_merging_leave_as_many_entries_and_lose_no_mass(merging):
  rng = np.random.default_rng(0)
  n, keep, chunk = 32, 0.25, 8
  keys, values = (jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for _ in range(2))
  size = jnp.ones(n).at[28:].set(0)  # a row that is shorter
  out = merging(Entries(keys, values, size), keep=keep, chunk=chunk)
  assert len(out.size) == kept(n, keep, chunk) and float(out.size.sum()) == 28
  for before, after in ((keys, out.keys), (values, out.values)):
    np.testing.assert_allclose((out.size[:, None] * after).sum(0), before[:28].sum(0), rtol=1e-4, atol=1e-4)


def test_k_means_finds_clusters_that_are_apart():
  rng = np.random.default_rng(0)
  centres = 50 * rng.normal(size=(8, 8))
  keys = jnp.asarray(centres[np.arange(32) // 4] + rng.normal(size=(32, 8)), jnp.float32)
  out = decoders.k_means(Entries(keys, keys, jnp.ones(32)), keep=0.25, chunk=8)
  np.testing.assert_array_equal(out.size, 4)
  expected = np.asarray(keys).reshape(8, 4, 8).mean(1)
  found = np.asarray(out.keys)
  np.testing.assert_allclose(sorted(found.tolist()), sorted(expected.tolist()), rtol=1e-4)
