import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxlab.cache import eviction
from jaxlab.cache.chelsea import chelsea
from jaxlab.core.checks import InputError
from jaxlab.models import generate, inference, paged
from tests.cache.common import assert_rows_are_alone
from tests.common import configs, random_model, random_tokens

LENGTHS, TIME, WINDOW = np.array([21, 13]), 21, 4
SEPARATORS, SINK, LOCAL = (*range(0, 64, 5),), 2, 3
METHODS = dict(
  eviction.METHODS,
  snapkv=functools.partial(eviction.snapkv, window=WINDOW, kernel=3),
  pyramidkv=functools.partial(eviction.pyramidkv, window=WINDOW, kernel=3, beta=4.0),
  sepllm=functools.partial(eviction.sepllm, SEPARATORS, sink=SINK, local=LOCAL),
)


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


def held(name, keep, length, layer=0):
  """Entries of a row in one of two layers."""
  if name != "pyramidkv":
    return int(keep * length)
  mean = keep * length - WINDOW
  return int(WINDOW + (mean / 4, mean * 2 - mean / 4)[1 - layer])


def expected(name, q, k, row, head, keep):
  """Positions kept, from the definitions."""
  length = LENGTHS[row]
  count = held(name, keep, length)
  if name == "streaming_llm":
    return {*range(4), *range(length - (count - 4), length)}
  if name == "keydiff":
    unit = k[row, :length, head] / np.linalg.norm(k[row, :length, head], axis=1, keepdims=True)
    return {*np.argsort(unit @ unit.mean(0))[:count].tolist()}
  if name == "sepllm":
    tokens, last = np.asarray(random_tokens(2, TIME))[row], {*range(SINK), *range(length - LOCAL, length)}
    rest = sorted({*range(length)} - last, key=lambda j: (tokens[j] in SEPARATORS, j), reverse=True)
    return last | {*rest[: count - len(last)]}
  weight = attention(q, k, row, head, length)
  if name == "h2o":
    recent = int(keep * length / 2)
    total = weight.sum(1).mean(0)
    heavy = np.argsort(-total[: length - recent])[: count - recent]
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
    assert len(found) == held(name, 0.5, LENGTHS[row]) and set(found.tolist()) == expected(name, q, k, row, head, 0.5)
    np.testing.assert_allclose(state.memory[0].entries.keys[row, head][full], k[row, found, head], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_among_longer_ones_is_the_row_alone(name):
  assert_rows_are_alone(network(), paged.decoder(METHODS[name](keep=0.5), chunk=8, page=4))


@pytest.mark.parametrize("name", METHODS)
def test_with_everything_kept_generation_is_the_plain_one(name):
  growing = {} if name in ("snapkv", "pyramidkv", "keydiff") else dict(slide=False)
  decoder = paged.decoder(METHODS[name](keep=1.0, **growing), chunk=8, page=4)
  found = generate(network(), random_tokens(2, TIME), LENGTHS, tokens=5, decoder=decoder)
  np.testing.assert_array_equal(found, generate(network(), random_tokens(2, TIME), LENGTHS, tokens=5))


@pytest.mark.parametrize("method", [*METHODS, "chelsea"])
def test_layers_that_look_back_a_window_are_refused(method):
  """Among fewer entries nobody would know which are still inside."""
  model = random_model(dataclasses.replace(configs()["qwen3"], depth=2, layer_windows=(5, None)))
  chosen = chelsea(keep=1.0) if method == "chelsea" else METHODS[method](keep=1.0)
  with pytest.raises(InputError, match="layers of this model look back a window"):
    generate(model, random_tokens(1, 20), tokens=2, decoder=paged.decoder(chosen, chunk=8, page=4))


def slid(name, q, k, tokens, row, head, length, held, new):
  """Positions held after each of `new` tokens, from the definitions: the entry worth least goes, but for the last ones.

  H2O's worth is the attention of all queries, the prompt's and later ones, summed; SepLLM's separators', then age.
  """
  held, sets = set(held), []
  of_prompt = attention(q, k, row, head, length)
  heavy = {j: of_prompt[..., j].sum() / 2 for j in range(length)}
  count = len(held)
  recent = {"streaming_llm": 1, "h2o": count // 2, "sepllm": min(LOCAL, count - SINK)}[name]
  sink = {"streaming_llm": 4, "h2o": 0, "sepllm": SINK}[name]
  for t in range(length, length + new):
    separators = {j: (tokens[row, j] in SEPARATORS, j) for j in held}
    worth = {"streaming_llm": {j: j for j in held}, "h2o": heavy, "sepllm": separators}[name]
    held.remove(min((j for j in held if sink <= j <= t - recent), key=worth.get))
    held.add(t)
    places = sorted(held)
    score = np.einsum("rd,nd->rn", q[row, t, 2 * head : 2 * head + 2], k[row, places, head]) / 4
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight = (weight / weight.sum(-1, keepdims=True)).mean(0)
    heavy |= {j: heavy.get(j, 0) + w for j, w in zip(places, weight, strict=True)}
    sets.append(set(held))
  return sets


@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "sepllm"])
def test_in_a_sliding_cache_the_entry_worth_least_makes_room(name):
  """More tokens than the cache has places for last ones: those of the prompt lose their privilege too."""
  new = 9
  decoder, state, *_ = read(name, 0.5, capacity=32)
  later = random_tokens(2, new, seed=1)
  prompts = np.asarray(random_tokens(2, TIME))
  step, found = jax.jit(decoder.step), [state.memory[0]]
  for made in range(new):
    _, state = step(network(), later[:, made, None], state)
    found.append(state.memory[0])
  for row, length in enumerate(LENGTHS):
    whole = np.concatenate([prompts[:, :length], np.asarray(later)], axis=1)
    q, k = map(np.asarray, seen_arrays(whole))
    for head in range(2):
      full = [np.asarray(layer.entries.size[row, head]) > 0 for layer in found]
      held = [
        set(np.asarray(layer.position[row, head])[mine].tolist()) for layer, mine in zip(found, full, strict=True)
      ]
      assert {mine.sum() for mine in full} == {int(0.5 * length)}
      assert held[1:] == slid(name, q, k, whole, row, head, int(length), held[0], new)


def test_a_pyramid_keeps_as_many_in_all_and_of_few_the_last():
  """Two layers of 21 tokens, of which SnapKV keeps 10 each; at a share too small for the window its last tokens."""
  _, state, *_ = read("pyramidkv", 0.5)
  sizes = [(np.asarray(layer.entries.size[0, 0]) > 0).sum() for layer in state.memory]
  assert sizes == [held("pyramidkv", 0.5, 21, layer) for layer in range(2)] == [15, 5]
  _, state, *_ = read("snapkv", 0.1)
  full = np.asarray(state.memory[0].entries.size[0, 0]) > 0
  assert np.asarray(state.memory[0].position[0, 0])[full].tolist() == [19, 20]


def test_wrong_options_are_named():
  for make, message in (
    (lambda: eviction.h2o(keep=0), "keep is 0"),
    (lambda: eviction.snapkv(kernel=4), "kernel is 4"),
    (lambda: eviction.sepllm(()), "no separators are given"),
    (lambda: eviction.pyramidkv(beta=0), "beta is 0"),
    (lambda: eviction.pyramidkv(keep=2), "keep is 2"),
  ):
    with pytest.raises(InputError, match=message):
      make()
