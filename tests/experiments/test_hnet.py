import shutil

import jax
import numpy as np
import pytest

from configs import hnet as config_file
from experiments import hnet, results
from experiments.hnet import arms, data, words
from experiments.hnet.arms import arm_of
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError
from jaxlab.data import byte_level
from tests.common import run_and_continue


def test_everything_is_measured_once(tmp_path, monkeypatch):
  """One stage is trained, on one device; the others are judged as they start, which compiles as much again less."""
  make_mesh = meshes.make_mesh
  monkeypatch.setattr(meshes, "make_mesh", lambda *shape: make_mesh(*(shape or ({"data": 1},)), jax.devices()[:1]))
  config = config_file.get_config("test")
  config.data.path, config.eval.split = "docs/**/*.md", "train"
  config.arms, config.ablations = ("one", *(arm for arm in config_file.ARMS if arm != "one")), ("none", "equal rates")
  config.shapes.mamba = config.shapes.transformer
  train = arms.train

  def train_one(config, corpus, arm, *, workdir, **how):
    if workdir.name == "one 0.004 2":
      return train(config, corpus, arm, workdir=workdir, **how)
    shutil.copytree(tmp_path / "one 0.004 2", workdir, dirs_exist_ok=True)
    return arms.fresh(arm.config, 0)

  monkeypatch.setattr(arms, "train", train_one)
  parts = ("arms.measured", "words.measure", "speed.measure")
  report = run_and_continue("hnet", tmp_path, monkeypatch, *parts, config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  found = report.metrics["arms"]
  assert len(report.claims) == 12 and set(found) == set(config_file.ARMS)
  assert set(found["one"]["bits"]) == {"clean", "unchanged", *data.PERTURBATIONS}
  assert found["one"]["trials"].keys() == {"0.004"} and len(found["two"]["sizes"]) == 2
  assert 4.5 < found["pool"]["sizes"][0] <= 6  # rows end within a piece


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
def test_networks_that_are_compared_cost_the_same(scale):
  """FLOPs a byte of training, within 5 %, at the length of chunks aimed at and the bytes a token has in books."""
  config = config_file.get_config(scale)
  flops = {}
  for name in config_file.ARMS:
    arm, size = arm_of(config, name), 1.0
    if arm.bpe:
      size = {"cpu": 2.6, "gpu": 4.4, "paper": 4.6}[scale]
    flops[name] = arm.config.flops_per_token(round(config.train.length / size)) / size
  assert max(flops.values()) < 1.05 * flops["one"] and min(flops.values()) > 0.95 * flops["one"]


def test_text_is_perturbed_as_it_is_said():
  text, random = "Grün, old Man. " * 40, np.random.default_rng(0)
  change = lambda how: data.perturbed(text, how, random)
  assert change("upper case") == text.upper() and change("random case").lower() == text.lower() != change("random case")
  assert 0.8 * len(text) < len(change("letters dropped")) < len(text) < len(change("letters repeated"))
  assert data.cut("né", 2) == "n"


def test_hosts_draw_rows_of_their_own(tmp_path, monkeypatch):
  config = config_file.get_config("test")
  config.data.path = "docs/*.md"
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  drawn = []
  for index in range(2):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    drawn.append(next(iter(data.Corpus(config, tmp_path).batches(False)))["inputs"])
  assert drawn[0].shape == drawn[1].shape == (config.train.batch // 2, config.train.length)
  assert not {row.tobytes() for row in drawn[0]} & {row.tobytes() for row in drawn[1]}
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  with pytest.raises(InputError, match=r"hosts=3 must divide config\.train\.batch=8"):
    data.Corpus(config, tmp_path).batches(False)


def test_words_follow_each_other_without_a_gap():
  random = np.random.default_rng(0)
  lexicon = words.words(5, random)
  ids, begins = words.stream(lexicon, 2, 40, random)
  starts = np.flatnonzero(begins[0])
  pieces = [byte_level.decode(part) for part in np.split(ids[0], starts[1:])]
  assert {*pieces[:-1]} <= {byte_level.decode(word) for word in lexicon} and starts[0] == 0
  assert words.f1(begins, begins) == 1 and words.f1(~begins, begins) == 0


def test_claims_follow_from_metrics_without_all_parts():
  made = {"words": dict(nats=[5.0, 1.0], share=0.2, size=5.5, f1=0.6, chance=0.2)}
  (claim,) = hnet.claims(config_file.get_config("test"), made)
  assert claim.holds and "0.4" in hnet.finding(config_file.get_config("test"), made)


@pytest.mark.slow
def test_words_without_delimiters_are_found():
  """200 steps: only which word comes next is left to learn, a share near 1/N is cut, more than chance at words."""
  found = words.measure(config_file.get_config("cpu"))
  assert found["nats"][1] < 1.1 * np.log(50) / found["size"]
  assert abs(found["share"] * 5.5 - 1) < 0.25
  assert found["f1"] > found["chance"] + 0.1
