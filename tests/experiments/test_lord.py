import itertools

import jax
import numpy as np
import pytest

from configs import lord as config_file
from experiments import compressing, results
from experiments.lord import quality, ratios, tuning
from jaxlab.models import hub, maps
from jaxlab.training import lora
from jaxlab.training.losses import language_model_loss
from tests.common import run_and_continue

RANKED = ("svd_llm_ranked 0.8", "asvd_searched 0.8")
METHODS = (*config_file.METHODS, *RANKED, *config_file.MORE)


@pytest.fixture
def config(tiny_checkpoint):
  made = config_file.get_config("test")
  made.data.path, made.data.calibration, made.data.test = "docs/**/*.md", "train", "train"
  made.subjects = (f"hf:{tiny_checkpoint}",)
  made.methods.others = METHODS
  return made


def test_everything_is_measured_once(config, tiny_checkpoint, tmp_path, monkeypatch):
  parts = ("quality.frontier", "quality.texts", "quality.tuning_of", "speed.measure")
  report = run_and_continue("lord", tmp_path, monkeypatch, *parts, config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  assert len(report.claims) == 12
  rows = report.metrics["frontier"][tiny_checkpoint.name]["rows"]
  assert [row["method"] for row in rows] == ["dense", *(text.split()[0] for text in METHODS)]
  dense, *others = rows
  assert dense["share"] == 1 and all(row["bytes"] < dense["bytes"] for row in others)
  of = {row["method"]: row for row in others}
  assert all(
    of[name]["share"] <= 0.8
    for name in ("lord", "uniform", "sequential", "uncentred", "svd_llm", "svd_llm_ranked", "asvd", "svd")
  )
  assert of["nf4"]["bytes"] < of["rtn"]["bytes"] and of["lord+nf4"]["bytes"] < of["lord+rtn"]["bytes"]
  assert of["lord+spqr"]["bytes"] < of["lord+rtn"]["bytes"] and of["spqr"]["bytes"] < of["gptq"]["bytes"]
  assert "; SpQR: " in report.claims[5].note and "; LoRD, then SpQR: " in report.claims[5].note
  assert of["bitstack"]["bytes"] <= of["lord+bitstack"]["bytes"] < of["lord"]["bytes"]


def test_ones_own_model_becomes_a_folder(config, tiny_checkpoint, tmp_path, monkeypatch):
  config.model, config.budget = f"hf:{tiny_checkpoint}", 0.7
  report = run_and_continue("lord", tmp_path, monkeypatch, "quality.chosen", config=config)
  (found,) = report.metrics["compressed"].values()
  small = hub.load(tmp_path / "compressed")
  dense = compressing.stored(hub.load(tiny_checkpoint))
  assert maps.bytes_of(small) == found["bytes"]["compressed"] < found["bytes"]["original"] == maps.bytes_of(dense)
  assert maps.bytes_of(maps.named(small.blocks)) <= 0.7 * maps.bytes_of(maps.named(dense.blocks))
  assert [claim.name.split()[0] for claim in report.claims] == ["Perplexity", "Bytes"]
  assert hub.load_vocabulary(tmp_path / "compressed").tokenizer.get_vocab_size() > 0


def test_tuning_learns(config, tmp_path):
  """On the same batch again and again the adapters' loss falls; what is in few bits stays."""
  (read,) = compressing.subjects(config, tmp_path).values()
  subject = read()
  bases, table, _ = quality.swept(config, subject)
  small = quality.makers(config, subject, bases, table)["lord+nf4"](0.8)
  rows = subject.calibration
  batch = dict(inputs=rows[:, :-1], targets=rows[:, 1:])
  config.tuning.steps, config.tuning.rate = 30, 1e-2
  adapters = tuning.tuned(small, itertools.repeat(batch), config.tuning, jax.random.key(0))
  loss = lambda model: float(language_model_loss(model, batch)[0])
  merged = lora.merge(small, adapters)
  assert loss(merged) < loss(small) - 0.1
  np.testing.assert_allclose(compressing.restored(merged)(rows[:1]), merged(rows[:1]), rtol=1e-2, atol=1e-2)


def test_one_program_judges_every_form(config, tmp_path):
  """The matrices that stand for other forms give their logits."""
  (read,) = compressing.subjects(config, tmp_path).values()
  subject = read()
  bases, table, _ = quality.swept(config, subject)
  make = quality.makers(config, subject, bases, table)
  tokens = subject.calibration[:1]
  for method, budget in (
    ("lord", 0.8),
    ("lord+rtn", 0.8),
    ("rtn", 4),
    ("lord+nf4", 0.8),
    ("lord+spqr", 0.8),
    ("lord+bitstack", 0),
  ):
    model = make[method](budget)
    np.testing.assert_allclose(compressing.restored(model)(tokens), model(tokens), rtol=1e-2, atol=1e-2)
    stored = compressing.stored(model)
    assert maps.bytes_of(stored) < maps.bytes_of(model)
  # Of a model that was of low rank before.
  before = make["lord"](0.8)
  np.testing.assert_allclose(compressing.restored(model, before)(tokens), model(tokens), rtol=1e-2, atol=1e-2)


def test_a_rival_is_taken_at_its_best_ranks():
  rows = [dict(method=name, budget=0.8, perplexity=value) for name, value in (("lord", 6.0), ("asvd", 12.0))]
  of = lambda *more: ratios({"base": [*rows, *more]}, "lord", "asvd")["base at 0.8"]
  assert of() == 0.5
  assert of(dict(method="asvd_searched", budget=0.8, perplexity=8.0)) == 0.75
  assert of(dict(method="asvd_searched", budget=0.8, perplexity=20.0)) == 0.5
