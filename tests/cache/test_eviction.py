import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxlab.cache import eviction
from jaxlab.core.checks import InputError
from jaxlab.models import generate, inference, paged
from tests.common import configs, random_model, random_tokens

LENGTHS, TIME, WINDOW = np.array([21, 13]), 21, 4
METHODS = dict(eviction.METHODS, snapkv=functools.partial(eviction.snapkv, window=WINDOW, kernel=3))


@functools.cache
def network():
  return jax.jit(inference.take_apart)(random_model(dataclasses.replace(configs()["qwen3"], depth=2)))


def read(name, keep, capacity=28):
  """(decoder, state after the prompts, queries and keys of the first layer)."""
  prompts = random_tokens(2, TIME)
  decoder = paged.decoder(METHODS[name](keep=keep), chunk=8, page=4)
  _, state = jax.jit(functools.partial(decoder.prefill, capacity=capacity))(network(), prompts, LENGTHS)
  return decoder, state, *map(np.asarray, seen_arrays(prompts))


def seen_arrays(prompts):
  """Queries and keys of the first layer, after RoPE."""
  net = network()
  x, side, _ = net.model.embed(prompts)
  block = net.blocks[0]
  _, _, q, k, _ = block.project(x, side, None, None)
  return q, k


def attention(q, k, row, head, length):
  """(group, queries, keys) of one key head, causal."""
  score = np.einsum("trd,nd->rtn", q[row, :length, 2 * head : 2 * head + 2], k[row, :length, head]) / 4
  score = np.where(np.tri(length, dtype=bool), score, -np.inf)
  weight = np.exp(score - score.max(-1, keepdims=True))
  return weight / weight.sum(-1, keepdims=True)


def expected(name, q, k, row, head, keep):
  """Positions kept, from the definitions."""
  length = LENGTHS[row]
  count = int(keep * length)
  if name == "streaming_llm":
    return {*range(4), *range(length - (count - 4), length)}
  if name == "keydiff":
    unit = k[row, :length, head] / np.linalg.norm(k[row, :length, head], axis=1, keepdims=True)
    return {*np.argsort(unit @ unit.mean(0))[:count].tolist()}
  weight = attention(q, k, row, head, length)
  if name == "h2o":
    recent = int(keep * length / 2)
    mean = weight.sum(1).mean(0) / (length - np.arange(length))
    heavy = np.argsort(-mean[: length - recent])[: count - recent]
    return {*heavy.tolist(), *range(length - recent, length)}
  body = length - WINDOW
  mean = np.pad(weight[:, body:, :body].mean(1), ((0, 0), (1, 1)))
  smooth = (mean[:, :-2] + mean[:, 1:-1] + mean[:, 2:]).mean(0) / 3
  return {*np.argsort(-smooth)[: count - WINDOW].tolist(), *range(body, length)}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_kept_is_what_the_definition_says(name):
  """Of rows of different lengths, read in chunks."""
  _, state, q, k = read(name, 0.5)
  for row, head in np.ndindex(2, 2):
    full = np.asarray(state.memory[0].entries.size[row, head]) > 0
    found = np.asarray(state.memory[0].position[row, head])[full]
    assert len(found) == int(0.5 * LENGTHS[row]) and set(found.tolist()) == expected(name, q, k, row, head, 0.5)
    np.testing.assert_allclose(state.memory[0].entries.keys[row, head][full], k[row, found, head], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_with_everything_kept_generation_is_the_plain_one(name):
  growing = {} if name in ("snapkv", "keydiff") else dict(slide=False)
  decoder = paged.decoder(METHODS[name](keep=1.0, **growing), chunk=8, page=4)
  found = generate(network(), random_tokens(2, TIME), LENGTHS, tokens=5, decoder=decoder)
  np.testing.assert_array_equal(found, generate(network(), random_tokens(2, TIME), LENGTHS, tokens=5))


@pytest.mark.parametrize("name", ["streaming_llm", "h2o"])
def test_a_sliding_cache_keeps_its_number_and_its_last_tokens(name):
  decoder, state, *_ = read(name, 0.5)
  step = jax.jit(decoder.step)
  for made in range(5):
    _, state = step(network(), random_tokens(2, 1, seed=made), state)
    for row, head in np.ndindex(2, 2):
      full = np.asarray(state.memory[1].entries.size[row, head]) > 0
      found = set(np.asarray(state.memory[1].position[row, head])[full].tolist())
      last, count = LENGTHS[row] + made, int(0.5 * LENGTHS[row])
      assert len(found) == full.sum() == count and last in found
      if name == "streaming_llm":
        assert found == {*range(4), *range(last - (count - 4) + 1, last + 1)}
      else:
        assert {*range(last - count // 2 + 1, last + 1)} <= found


def test_wrong_options_are_named():
  for make, message in (
    (lambda: eviction.h2o(keep=0), "keep is 0"),
    (lambda: eviction.snapkv(kernel=4), "kernel is 4"),
  ):
    with pytest.raises(InputError, match=message):
      make()
