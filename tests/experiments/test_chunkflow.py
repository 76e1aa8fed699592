"""ChunkFlow's experiment: rivals with the same gradient, lengths by the paper's law, and a run."""

import jax
import numpy as np
import pytest

from configs import chunkflow as config_file
from experiments.chunkflow import arms, contestants, fastest, pipeline, speed
from jaxlab.models import hub
from jaxlab.sequence.chunkflow import Cost
from tests.common import run_and_continue


@pytest.fixture(scope="module")
def config():
  made = config_file.get_config("test")
  made.data.path, made.data.name = "docs/**/*.md", "local_text"
  return made


def test_lengths_have_the_papers_law():
  sizes = speed.lengths(100_000, 65_536, 0)
  assert sizes[0] == sizes.max() == 65_536 and sizes.min() >= 128
  below = lambda limit: (sizes < limit).mean()
  assert below(2048) == pytest.approx(0.90, abs=0.01) and below(8192) == pytest.approx(0.98, abs=0.005)
  assert below(63_488) == pytest.approx(0.9999, abs=3e-4)


def test_sequences_are_a_text_from_where_the_last_ended():
  made = speed.sequences(np.arange(10), np.array([4, 3, 5]), 1)
  assert [one["inputs"].tolist() for one in made] == [[1, 2, 3, 4], [5, 6, 7], [8, 9, 0, 1, 2]]
  assert made[2]["targets"].tolist() == [9, 0, 1, 2, 3]


def test_steps_of_rivals_hold_every_token_once_and_waste_a_third_at_most():
  sizes = speed.lengths(40, 1024, 3)
  batch = speed.sequences(np.arange(1, 30_000), sizes)
  for name in arms.ARMS:
    arm = arms.Arm(_prepare(name), {})
    steps = arm.prepare(batch)
    counted = np.concatenate([arrays["targets"][arrays["targets"] >= 0] for _, arrays in steps])
    assert sorted(counted) == sorted(np.concatenate([one["targets"] for one in batch]))
    for kind, arrays in steps:
      if kind == "rows":
        long = (arrays["targets"] >= 0).sum(axis=1).max()
        assert arrays["targets"].shape[1] <= max(128, 1.5 * long)


def _prepare(name):
  return arms.arm(name, chunk=256).prepare


def test_stages_in_simulated_time_are_the_papers():
  found = pipeline.example()
  exact = ("1F1B, equal lengths", "1F1B, unequal lengths", "ChunkFlow, chunks too large")
  assert all(found[name]["bubble"] == pytest.approx(found[name]["paper"], abs=1e-4) for name in exact)
  assert all(row["bubble"] <= row["paper"] + 1e-4 for row in found.values())


def test_the_fit_of_a_chunks_cost_is_used_as_it_is(config):
  fit = {"cost": [0.0, 4e-6, 0.0]}
  found = pipeline.simulated(config, fit)
  (rows,) = found["choices"].values()
  assert {(row["chunk"], row["keep"]) for row in rows} == {(128, 1), (128, 2), (256, 1)}  # C K of 256 at most
  one = rows[0]
  assert one["seconds"] <= found["whole"]["seconds"] and 0 < one["bubble"] < 1
  assert Cost(*fit["cost"]).forward(128, 5) == pytest.approx(512e-6)


@pytest.fixture
def exact():
  """The precision of `exactly` in every thread: what is compiled for a shape in one is the others' too."""
  before = jax.config.jax_default_matmul_precision
  jax.config.update("jax_default_matmul_precision", "highest")
  yield
  jax.config.update("jax_default_matmul_precision", before)


def test_rivals_have_the_same_gradient_and_everything_is_measured_once(config, exact, tmp_path, monkeypatch):
  parts = ("speed.agreement", "speed.measure", "speed.growth", "speed.curve", "pipeline.fitted")
  config.curve.batch = config.batch  # arms share what is compiled for a shape; all as exact as what is compared
  report = run_and_continue("chunkflow", tmp_path, monkeypatch, *parts, config=config)
  rows = report.metrics["speed"]["256"]
  assert set(rows) == set(contestants(config)) and fastest(rows, "one")[0] == "one none"
  apart = report.metrics["agreement"]
  assert max(value for name, value in apart.items() if name != "apart") < 1e-5 < 1e-3 < apart["apart"]
  losses = report.metrics["curves"]
  np.testing.assert_allclose(losses["chunkflow"]["loss"], losses["one"]["loss"], rtol=1e-4)


def test_ones_own_checkpoint_is_tuned_on_whole_documents(tiny_checkpoint, tmp_path, monkeypatch):
  made = config_file.get_config("test")
  made.model, made.data.path, made.save_dtype = f"hf:{tiny_checkpoint}", "docs/**/*.md", "float32"
  report = run_and_continue("chunkflow", tmp_path, monkeypatch, "long_finetuning.measure", config=made)
  found = report.metrics["tuned"]
  assert found["loss"]["after"] != found["loss"]["before"] and hub.load(tmp_path / "tuned").depth > 0
