"""The checkpoint that ships: it loads by name, reads English and finds needles."""

import lzma

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.data import recall, tokenizer, tokens
from jaxlab.models import generate, hub
from jaxlab.training import losses

ENGLISH = (
  "The old man put down his newspaper and looked out of the window. It had been raining since the morning, and the "
  "street was empty but for a boy who was running home with a loaf of bread under his coat. He watched him until he "
  "had turned the corner, and then he sighed, and rose, and went slowly to the door.\n\n"
)


@pytest.fixture(scope="module")
def base():
  folder = hub.find("base")
  return hub.load("base", dtype="float32"), tokenizer.load(folder)


def test_it_is_the_size_that_is_promised(base):
  model, bpe = base
  folder = hub.find("base")
  files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
  assert sum(path.stat().st_size for path in folder.iterdir()) <= 40 * 2**20
  assert max(path.stat().st_size for path in files) <= 16 * 2**20
  assert model.config.context == 8192 and model.config.kv_heads < model.config.q_heads
  assert bpe.get_vocab_size() == model.config.vocab_size == 8192


def test_it_predicts_english_far_better_than_a_compressor(base):
  model, bpe = base
  ids = np.array([tokenizer.bos_id(bpe), *bpe.encode(ENGLISH).ids], np.int32)
  batch = {"inputs": ids[None, :-1], "targets": ids[None, 1:]}
  measured = losses.evaluator(jax.jit(lambda m, t: m.hidden(t)), tokenizer.token_bytes(bpe))(model, [batch])
  assert measured["bits_per_byte"] < 1.5 < 8 * len(lzma.compress(ENGLISH.encode())) / len(ENGLISH)


def test_it_continues_with_words(base):
  model, bpe = base
  ids = jnp.array([[tokenizer.bos_id(bpe), *bpe.encode("It was a cold evening in November, and").ids]])
  out = generate(model, ids, tokens=40, key=jax.random.key(0), temperature=0.7, top_p=0.9)
  words = bpe.decode(np.asarray(out[0]).tolist()).split()
  assert len(words) > 20 and {"the", "and", "to", "of", "was", "a"} & set(words)


@pytest.mark.parametrize("task", recall.TASKS)
def test_it_finds_needles(base, task):
  model, bpe = base
  hay = bpe.encode(ENGLISH * 3).ids
  text = tokens.Tokens(np.array(hay, np.uint16), np.array([0, len(hay)]), tokenizer.bos_id(bpe))
  made = [recall.example(task, text, bpe, length=512, rng=np.random.default_rng(i)) for i in range(6)]
  right = 0
  for example in made:
    answer = generate(model, jnp.asarray(example.prompt)[None], tokens=8)
    right += np.array_equal(answer[0, : len(example.answer)], example.answer)
  assert right >= 5
