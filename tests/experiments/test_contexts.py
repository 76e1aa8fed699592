import dataclasses
import functools

import jax
import ml_collections
import numpy as np
import pytest

from configs import contexts as config_file
from experiments import contexts, results
from experiments.compact_attention.choosing import captured
from experiments.contexts.readers import EVICTING, KINDS, decoders
from experiments.contexts.reading import attention_to_prompt, bytes_of, kept_of, losses_of
from experiments.long_context import Subject
from jaxlab.core.checks import InputError
from jaxlab.evaluation.long_context import cache_bytes, continuation_losses
from jaxlab.models import generate, inference
from tests.common import configs, random_model, random_tokens, run_and_continue

QWEN = dataclasses.replace(configs()["qwen3"], depth=2)
FULL = ("compact 0.0", "quoka 1", "dhsa 1", "chunkllm 1", "chelsea 1", *(f"{name} 1" for name in EVICTING))


@functools.cache
def network():
  return jax.jit(inference.take_apart)(random_model(QWEN))


def with_methods(*methods):
  config = config_file.get_config("test")
  config.methods = methods
  return config


def test_everything_is_measured_once_of_a_users_model(two_layers, tmp_path, monkeypatch):
  config = with_methods("compact 0.8", "dhsa 0.25", "chunkllm 0.4", "chelsea 0.25", "snapkv 0.25")
  config.model, config.data.path, config.data.split = f"hf:{two_layers}", "docs/**/*.md", "train"
  report = run_and_continue("contexts", tmp_path, monkeypatch, "questions_of", "text_of", config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  name, (first, *_) = two_layers.name, config.methods
  rows, text = report.metrics["questions"][name], report.metrics["text"][name]
  assert {row["task"] for row in rows} == set(config_file.TASKS) and len(rows) == 5 * (1 + len(config.methods))
  assert [row["position"] for row in text["losses"] if row["decoder"] == first] == [96, 160]
  assert set(text["kept"]) == {"chunkllm 0.4", "snapkv 0.25"}
  assert text["bytes"]["snapkv 0.25"] < text["bytes"]["chelsea 0.25"] < text["bytes"]["dense"]


def test_every_method_at_its_full_budget_is_the_model():
  made = decoders(with_methods(*FULL), QWEN, 64)
  prompts, lengths = random_tokens(2, 64), np.array([64, 50])
  assert {name.split()[0] for name in made} == {"dense", *KINDS}
  tokens = {name: generate(network(), prompts, lengths, tokens=3, decoder=one) for name, one in made.items()}
  for name, found in tokens.items():
    # A cache that slides has no place for a further token.
    count = 1 if name.split()[0] in ("h2o", "streaming_llm") else 3
    np.testing.assert_array_equal(found[:, :count], tokens["dense"][:, :count], err_msg=name)
  for text, message in (("dhsa", "is not of the form"), ("zip 1", "the method is 'zip'")):
    with pytest.raises(InputError, match=message):
      decoders(with_methods(text), QWEN, 64)


def test_losses_by_position_are_those_of_rows_that_are_cut_there():
  """Although all positions share a program, and their prompts one length."""
  compared = decoders(with_methods("snapkv 0.5"), QWEN, 80)
  rows = np.asarray(random_tokens(3, 84))
  read = ml_collections.ConfigDict(dict(positions=(50, 80), rest=4, batch=2))
  found = losses_of(Subject("tiny", network(), None, None), compared, rows, read)
  first = {}
  for row in found:
    cut, decoder = rows[:, : row["position"] + 4], compared[row["decoder"]]
    expected = np.asarray(continuation_losses(network(), cut, prompt=row["position"], decoder=decoder)).mean(axis=1)
    dense = first.setdefault(row["position"], expected)
    np.testing.assert_allclose(
      [row["loss"], row["difference"]], [expected.mean(), (expected - dense).mean()], atol=2e-5
    )
  assert [row["position"] for row in found] == [50, 80] * 2 and all(row["count"] == 3 for row in found)


def test_what_is_held_and_the_attention_on_it_are_those_of_the_definition():
  rows, prompt = np.asarray(random_tokens(2, 80)), 64
  subject = Subject("tiny", network(), None, None)
  compared = decoders(with_methods("streaming_llm 0.25", "chunkllm 0.1", "chelsea 0.25", "quoka 0.5"), QWEN, prompt)
  mass = np.stack([by_hand(q, k, prompt) for q, k in captured(network(), rows)])
  np.testing.assert_allclose(attention_to_prompt(network(), rows, prompt=prompt), mass, atol=1e-6)
  found = kept_of(subject, compared, rows, prompt)
  assert set(found) == {"streaming_llm 0.25", "chunkllm 0.1"}
  ends = np.isin(np.arange(prompt), [*range(4), *range(prompt - 12, prompt)])
  np.testing.assert_allclose(found["streaming_llm 0.25"]["share"], 0.25)
  np.testing.assert_allclose(found["streaming_llm 0.25"]["recall"], mass[..., ends].sum(-1).mean(), rtol=1e-5)
  # Of eight chunks of eight tokens the newest, and the first four tokens.
  ends = np.isin(np.arange(prompt), [*range(4), *range(prompt - 8, prompt)])
  assert found["chunkllm 0.1"]["share"] == 12 / 64
  np.testing.assert_allclose(found["chunkllm 0.1"]["recall"], mass[..., ends].sum(-1).mean(), rtol=1e-5)
  held = {name: bytes_of(network(), one, prompt, 16) for name, one in compared.items()}
  for name, one in compared.items():
    state = jax.jit(functools.partial(one.prefill, capacity=prompt + 16))(network(), rows[:1, :prompt])[1]
    assert held[name] == cache_bytes(state)
  assert held["streaming_llm 0.25"] < held["dense"] < held["chunkllm 0.1"]


def by_hand(q, k, prompt):
  """(batch, kv_heads, prompt), of queries and keys (batch, heads, time, head_dim) of a layer."""
  q, k = (np.asarray(a, np.float64) for a in (q, k))
  score = np.einsum("bhqd,bhkd->bhqk", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1)) / q.shape[3] ** 0.5
  weight = np.where(np.tri(q.shape[2], dtype=bool), np.exp(score), 0)
  weight = (weight / weight.sum(-1, keepdims=True))[:, :, prompt:, :prompt]
  weight = weight.reshape(len(q), k.shape[1], -1, *weight.shape[2:]).mean(axis=(2, 3))
  return weight / weight.sum(-1, keepdims=True)


def test_claims_are_of_the_four_methods_and_their_worst_model():
  row = lambda name, share: dict(decoder=name, task="needle", length=9, share=share, count=5)
  asked = lambda ours: [row("dense", 0.9), row("dhsa 0.25", ours), row("chelsea 0.5", 0.5), row("snapkv 0.5", 0.7)]
  loss = lambda name, position, more: dict(decoder=name, position=position, difference=more, error=0.1, loss=2.0)
  text = {
    "losses": [loss("dense", 5, 0.0), loss("dhsa 0.25", 5, 0.01), loss("dhsa 0.25", 9, 0.05), loss("h2o 1", 9, 3.0)],
    "bytes": {"dense": 100, "chelsea 0.5": 60},
    "kept": {"snapkv 0.5": dict(share=0.5, recall=0.75), "h2o 0.5": dict(share=0.5, recall=0.4)},
  }
  metrics = {"questions": {"a": asked(0.9), "b": asked(0.6)}, "text": {"a": text}}
  of = {claim.name: claim.ours for claim in contexts.claims(None, metrics)}
  ours = lambda part: next(value for name, value in of.items() if part in name)
  found = [ours(part) for part in ("DHSA answers", "Chelsea answers", "evicts", "last position", "first position")]
  np.testing.assert_allclose(found, [30, 40, -20, 0.05, 0.04])
  np.testing.assert_allclose([ours("Bytes"), ours("attention to the prompt")], [0.6, 0.8])
  assert "DHSA +0.050" in contexts.finding(None, metrics) and len(of) == 7
