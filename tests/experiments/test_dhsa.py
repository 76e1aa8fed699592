import functools

import jax
import numpy as np
import pytest

from configs import dhsa as config_file
from experiments.dhsa import accuracy_claims, predicting
from experiments.dhsa.methods import CACHES, KINDS, decoders
from experiments.long_context import Subject
from jaxlab.attention.dhsa_boundaries import randomly
from jaxlab.core.checks import InputError
from jaxlab.data.tokens import Tokens
from jaxlab.models import inference
from tests.common import configs, random_model, random_tokens, run_and_continue


def test_everything_is_measured_once_of_a_users_model_too(tiny_checkpoint, tmp_path, monkeypatch):
  config = config_file.get_config("test")
  config.model, config.data.path = f"hf:{tiny_checkpoint}", "docs/*.md"
  measures = ("predicting.measure", "prefilling.measure", "prefilling.measure_network", "beside.trained")
  measures += ("long_context.accuracy", "long_context.losses")
  report = run_and_continue("dhsa", tmp_path, monkeypatch, *measures, config=config)
  assert set(report.metrics) == {"predictor", "accuracy", "losses", "prefill", "network"} and len(report.figures) == 2
  assert set(report.metrics["prefill"]["96"]["temporaries"]) >= {"dense", "materialised", "DHSA", "static blocks"}


def test_sections_are_pieces_of_documents_and_end_where_it_is_said():
  """Of documents of one token each, so that a section is what has one number."""
  ids = np.repeat(np.arange(1, 9), 100)
  subject = Subject("tiny", None, None, Tokens(ids, np.arange(0, 801, 100), 0))
  rows, ends = predicting.sections(subject, 3, 256, seed=0)
  for row, end in zip(rows, ends, strict=True):
    changes = np.flatnonzero(np.diff(row[1:])) + 1
    assert row[0] == 0 and len(row) == 256 and set(changes.tolist()) <= set(end.tolist()) and len(end) >= 3


def test_every_kind_has_a_decoder_and_others_are_refused():
  config, score = config_file.get_config("cpu"), randomly(None)
  made = decoders(tuple(f"{kind} 0.25" for kind in KINDS), config, score, longest=512)
  assert len(set(made.values())) == 1 + len(KINDS)
  for text, message in (("dhsa", "is not of the form"), ("nearest 0.1", "the method is 'nearest'; it must be one of")):
    with pytest.raises(InputError, match=message):
      decoders((text,), config, score, longest=512)


def test_caches_keep_as_many_tokens_as_the_budget():
  """Of a prompt of 64 tokens a quarter; PyramidKV on average over its two layers."""
  config, net = config_file.get_config("cpu"), jax.jit(inference.take_apart)(random_model(configs()["qwen3"]))
  made = decoders(tuple(f"{kind} 0.25" for kind in CACHES), config, randomly(None), longest=64)
  for kind in CACHES:
    prefill = jax.jit(functools.partial(made[f"{kind} 0.25"].prefill, capacity=80))
    _, state = prefill(net, random_tokens(1, 64))
    assert abs(np.mean([int(layer.used[0]) for layer in state.memory]) - 16) <= 1


def test_caches_are_no_way_to_cut_a_prompt_and_are_compared_by_themselves():
  shares = {"dense": 0.9, "dhsa 0.1": 0.5, "blocks 0.1": 0.4, "h2o 0.1": 0.7, "streaming_llm 0.1": 0.6}
  row = lambda name, share: dict(decoder=name, share=share, count=10)
  of = {c.name: c for c in accuracy_claims({"base": {"rows": [row(*item) for item in shares.items()]}})}
  (cut,) = (claim for name, claim in of.items() if "cut and score" in name)
  (cache,) = (claim for name, claim in of.items() if "the best cache" in name)
  np.testing.assert_allclose([cut.ours, cache.ours], [10.0, -20.0])
  assert "blocks" in cut.baseline and "h2o" in cache.baseline
