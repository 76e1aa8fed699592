from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

from experiments.long_context import Subject, accuracy, documents, losses, subjects, table
from jaxlab.core.checks import InputError
from jaxlab.data import corpora, tokenizer, tokens
from jaxlab.evaluation.long_context import continuation_losses
from jaxlab.models import hub, inference, paged
from jaxlab.models.config import qwen3
from tests.common import random_model

ROOT = Path(__file__).parents[2]
SHAPE = dict(depth=1, width=16, q_heads=2, kv_heads=1, head_dim=8, mlp_width=16, context=512, tied_embeddings=True)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
  """A random network, and text of the standard library."""
  cache = tmp_path_factory.mktemp("cache")
  read = corpora.documents("stdlib_code", split="validation", cache=cache)
  bpe = tokenizer.trained(read, key=read.key, vocab_size=300, cache=cache)
  network = jax.jit(inference.take_apart)(random_model(qwen3(vocab_size=bpe.get_vocab_size(), **SHAPE)))
  return Subject("tiny", network, bpe, tokens.tokenize(read, bpe, bos=tokenizer.bos_id(bpe), cache=cache))


def test_a_decoder_differs_from_itself_by_nothing(subject):
  asked = ml_collections.ConfigDict(dict(tasks=("needle", "multi_value"), lengths=(200,), count=3, batch=4))
  dense = paged.decoder(chunk=64, page=16)
  rows = accuracy(subject, {"dense": dense, "again": dense}, asked)
  assert [(row["decoder"], row["task"]) for row in rows] == [
    (decoder, task) for decoder in ("dense", "again") for task in asked.tasks
  ]
  assert all(row["difference"] == row["error"] == 0 and row["low"] <= row["share"] <= row["high"] for row in rows)
  lines = table(rows, ("decoder", "task", "share")).splitlines()
  assert len(lines) == 5 and lines[2].split() == ["dense", "multi_value", "0"]


def test_losses_are_those_of_single_rows_and_differences_are_paired(subject):
  """Rows that fill up the last batch count for nothing."""
  read = ml_collections.ConfigDict(dict(prompt=40, rest=6, documents=3, batch=2))
  first, second = paged.decoder(chunk=64, page=16), paged.decoder(paged.Method(_first_key_only), chunk=64, page=16)
  dense, other = losses(subject, {"dense": first, "other": second}, read)
  rows = documents(subject.tokens, 3, 46)
  assert (rows[:, 0] == subject.tokens.bos).all() and len(np.unique(rows, axis=0)) == 3
  one = lambda row, decoder: continuation_losses(subject.network, row[None], prompt=40, decoder=decoder).mean()
  expected = np.array([[one(row, decoder) for row in rows] for decoder in (first, second)])
  np.testing.assert_allclose([dense["loss"], other["loss"]], expected.mean(axis=1), rtol=1e-5)
  apart = expected[1] - expected[0]
  np.testing.assert_allclose(
    [other["difference"], other["error"]], [apart.mean(), apart.std(ddof=1) / 3**0.5], rtol=1e-3
  )
  with pytest.raises(InputError, match="no held-out document has 9999999 tokens"):
    documents(subject.tokens, 1, 10_000_000)


def _first_key_only(q, k, v, view, memory):
  return jax.numpy.broadcast_to(view.values[0, view.table[:, :1], :1], q.shape), memory


def test_a_users_folder_takes_the_place_of_the_subjects(subject, tmp_path):
  hub.save(random_model(qwen3(vocab_size=subject.tokenizer.get_vocab_size(), **SHAPE)), tmp_path / "mine")
  (tmp_path / "mine" / "tokenizer.json").write_text(subject.tokenizer.to_str())
  data = dict(name="stdlib_code", path=f"{ROOT}/docs/*.md", split="train")
  config = dict(subjects=("base",), model=f"hf:{tmp_path}/mine", dtype="float32", data=data)
  (found,) = subjects(ml_collections.ConfigDict(config), tmp_path)
  assert found.name == "mine" and len(found.tokens) > 5 and found.network.model.config.width == 16
