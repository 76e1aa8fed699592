import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.cache.eviction import streaming_llm
from jaxlab.core.checks import InputError
from jaxlab.data import corpora, tokenizer, tokens
from jaxlab.evaluation import long_context
from jaxlab.evaluation.long_context import (
  answered,
  cache_bytes,
  continuation_logprobs,
  continuation_losses,
  interval,
  late,
  question,
)
from jaxlab.models import generate, inference, paged
from jaxlab.models.generate import Decoder
from tests.common import configs, random_model, random_tokens


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """(corpus, tokenizer) of the standard library's validation split."""
  cache = tmp_path_factory.mktemp("cache")
  documents = corpora.documents("stdlib_code", split="validation", cache=cache)
  bpe = tokenizer.trained(documents, key=documents.key, vocab_size=512, cache=cache)
  return tokens.tokenize(documents, bpe, bos=tokenizer.bos_id(bpe), cache=cache), bpe


@pytest.mark.parametrize("task", long_context.TASKS)
def test_a_document_holds_its_answers_and_leaves_room_for_them(text, task):
  corpus, bpe = text
  for seed in range(5):
    made = question(task, corpus, bpe, length=500, seed=seed)
    said = bpe.decode(made.prompt.tolist())
    assert made.prompt[0] == corpus.bos and 400 < len(made.prompt) + made.tokens <= 500
    assert all(answer in said for answer in made.answers) and len(set(made.answers)) == len(made.answers)
    room = len(bpe.encode(" " + ", ".join(made.answers), add_special_tokens=False).ids)
    assert made.tokens >= room
    again = question(task, corpus, bpe, length=500, seed=seed)
    np.testing.assert_array_equal(again.prompt, made.prompt)
  with pytest.raises(InputError, match="too short"):
    question(task, corpus, bpe, length=100, seed=0)


def test_the_common_words_are_the_most_frequent_ones(text):
  corpus, bpe = text
  made = question("common_words", corpus, bpe, length=900, seed=1)
  count = collections.Counter(bpe.decode(made.prompt.tolist()).split("\n\nQuestion")[0].split())
  ordered = count.most_common()
  assert {word for word, _ in ordered[:3]} == set(made.answers) and ordered[2][1] >= 4 * ordered[3][1]


def test_answers_count_wherever_they_stand_in_what_is_generated(text, monkeypatch):
  """Two of three values in another order are two thirds; what stands past the room for answers counts for nothing."""
  corpus, bpe = text
  rows = [question("multi_value", corpus, bpe, length=300, seed=i) for i in range(3)]
  given = [[2, 0], [1, 2, 0], []]

  def generate(network, prompts, lengths, *, tokens, decoder):
    assert prompts.shape[0] == 2
    mine = [
      next(i for i, row in enumerate(rows) if row.prompt.tolist() == p[:n].tolist())
      for p, n in zip(prompts, lengths, strict=True)
    ]
    out = np.zeros((2, tokens + 50), np.int32)
    for line, i in zip(out, mine, strict=True):
      said = bpe.encode(" " + ", ".join(rows[i].answers[j] for j in given[i])).ids
      line[: len(said)] = said
      late = bpe.encode(" " + ", ".join(rows[i].answers)).ids
      line[tokens : tokens + len(late)] = late
    return out

  monkeypatch.setattr(long_context, "generate", generate)
  found = answered(None, Decoder(), bpe, rows, batch=2)
  np.testing.assert_allclose(found, [2 / 3, 1, 0])


def test_the_interval_is_wilsons():
  np.testing.assert_allclose(interval([1] * 8 + [0] * 2), (0.4901625, 0.9433178), atol=1e-6)
  low, high = interval([1.0] * 200)
  assert 0.98 < low < high <= 1
  with pytest.raises(InputError, match="no question"):
    interval([])


def test_losses_behind_a_prompt_are_those_of_one_forward():
  model, rows = random_model(dataclasses.replace(configs()["qwen3"], depth=2)), random_tokens(2, 14)
  network = jax.jit(inference.take_apart)(model)
  expected = -jnp.take_along_axis(jax.nn.log_softmax(model(rows[:, :-1])), rows[:, 1:, None], axis=-1)[:, 8:, 0]
  for decoder in Decoder(), paged.decoder(chunk=4, page=4):
    found = continuation_losses(network, rows, prompt=9, decoder=decoder)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  logprobs = continuation_logprobs(network, rows, prompt=9, decoder=decoder)
  np.testing.assert_allclose(-jnp.take_along_axis(logprobs, rows[:, 9:, None], axis=2)[..., 0], expected, rtol=1e-4)


def test_what_is_read_late_is_not_known_before():
  """Dense tokens stay the same, with rows of different lengths; a cache that evicts has not seen the last tokens."""
  network = jax.jit(inference.take_apart)(random_model(dataclasses.replace(configs()["qwen3"], depth=2)))
  prompts, lengths, after = random_tokens(2, 14), np.array([14, 9]), late(paged.decoder(chunk=4, page=4), 3)
  found = generate(network, prompts, lengths, tokens=4, decoder=after)
  np.testing.assert_array_equal(found, generate(network, prompts, lengths, tokens=4))
  last = late(paged.decoder(streaming_llm(keep=0.5, slide=False), chunk=4, page=4), 3)
  _, state = last.prefill(network, prompts, lengths, capacity=16)
  for row, length in enumerate(lengths):
    real = np.asarray(state.memory[0].entries.size[row, 0]) > 0
    held = set(np.asarray(state.memory[0].position[row, 0])[real].tolist())
    before = length - 3
    assert held == {*range(min(4, before // 2)), *range(before - max(0, before // 2 - 4), length)}


def test_bytes_of_a_state_count_without_it_being_made():
  network = jax.jit(inference.take_apart)(random_model(configs()["qwen3"]))
  shape = jax.eval_shape(lambda n: inference.empty_state(n, batch=3, capacity=16), network)
  assert cache_bytes(shape) == 6 * 2 * 3 * 16 * 2 * 16 * 4 + 4
