"""STRUPRUNE: the original at full budget, better than leaving out, one layer in memory whatever the depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.struprune.memory import watched
from jaxlab.core.checks import InputError
from jaxlab.models import hub, inference, maps
from jaxlab.weights import lord, structured, struprune
from jaxlab.weights.structured import Groups, Least
from jaxlab.weights.struprune import Options, Survey
from jaxlab.weights.struprune_solver import Admm, Split
from tests.common import configs, random_model, random_tokens

TOKENS = np.asarray(random_tokens(16, 24))
QUICK = Options(admm=Admm(stages=1, iterations=3), split=Split(outer=2))
HOW = dict(least=Least(1, 8), options=QUICK, batch=16)


@pytest.fixture(scope="module")
def model():
  return random_model(dataclasses.replace(configs()["qwen3"], depth=2))


@pytest.fixture(scope="module")
def found(model):
  return struprune.survey(model, TOKENS, batch=16)


@pytest.fixture(scope="module")
def small(model, found):
  kept = struprune.allocate(model.config, found, budget=0.6, rule="uniform", least=Least(1, 8))
  return struprune.rebuild(model, TOKENS, *kept, options=QUICK, batch=16)


def test_the_whole_budget_is_the_model(model):
  """At once, and by the long way: all groups kept, weights fitted to what they gave."""
  assert struprune.prune(model, TOKENS, budget=1) is model
  c = model.config
  whole = struprune.rebuild(model, TOKENS, [c.kv_heads] * 2, [c.mlp_width] * 2, options=QUICK, batch=16)
  logits = model(TOKENS)
  np.testing.assert_allclose(whole(TOKENS), logits, rtol=0, atol=1e-6 * float(jnp.abs(logits).max()))


def test_the_parameters_are_those_of_the_budget(model, small):
  c = small.config
  used = sum(
    structured.parameters(Groups(np.ones((1, one.kv_heads)), np.ones((1, one.mlp_width))), one)
    for one in map(c.of_layer, range(2))
  )
  biases = 2 * 2 * c.width
  whole, neuron = structured.dense_parameters(model.config), structured.costs(model.config)[1]
  assert 0.6 * whole - neuron < used + biases <= 0.6 * whole


def test_it_comes_closer_than_leaving_the_same_number_out(model, small, found):
  """To the original's states, of text that it was not fitted to."""
  c = small.config
  own = [c.of_layer(layer) for layer in range(2)]
  heads, neurons = [one.kv_heads for one in own], [one.mlp_width for one in own]
  plain = structured.sliced(
    model, Groups(structured.top(found.scores.heads, heads), structured.top(found.scores.neurons, neurons))
  )
  text = random_tokens(8, 24, seed=5)
  apart = lambda one: float(jnp.square(one.hidden(text)[0] - model.hidden(text)[0]).mean())
  assert apart(small) < 0.8 * apart(plain)


def test_masked_losses_are_the_masked_models(model):
  """Streamed through the layers, of several choices at once; with a model that reads a layer's output at the end."""
  other = random_model(dataclasses.replace(configs()["nanochat_plain"], depth=2))
  rng = np.random.default_rng(0)
  logits = jax.jit(lambda one, keep: structured.masked(one, keep)(TOKENS[:4]))
  for one in (model, other):
    c = one.config
    keeps = [Groups(rng.random((2, c.kv_heads)) < 0.6, rng.random((2, c.mlp_width)) < 0.6) for _ in range(2)]
    found = struprune.masked_losses(one, TOKENS[:4], keeps)
    for keep, loss in zip(keeps, found, strict=True):
      logp = jax.nn.log_softmax(logits(one, keep))[:, :-1]
      expected = -jnp.take_along_axis(logp, TOKENS[:4, 1:, None], axis=-1).mean()
      np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_rows_held_out_need_not_fill_a_batch(model):
  """A quarter of 48 is 12: in batches of 6, where the text comes in batches of 8."""
  tokens = np.asarray(random_tokens(48, 6))
  rest = Options(admm=Admm(stages=1, iterations=1), split=Split(outer=1))
  small = struprune.prune(model, tokens, budget=0.7, least=Least(1, 8), options=rest)
  assert maps.bytes_of(small) < maps.bytes_of(model)
  keeps = [Groups(np.ones((2, 2), bool), np.arange(128).reshape(2, 64) % 3 > 0)]
  parts, whole = (struprune.masked_losses(model, tokens[-12:], keeps, batch=batch) for batch in (8, 12))
  np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_importance_is_what_a_branch_adds_to_its_state(model, found):
  x, trace, _ = model.trace(TOKENS)
  assert found.importance.shape == (2, 2) and found.scores.heads.shape == (2, 2)
  np.testing.assert_allclose(found.scores.neurons.mean(axis=1), 1, rtol=1e-5)
  silent = jax.tree.map(lambda a: a, model.blocks)
  silent.o.weight[...] = silent.o.weight[...].at[0].set(0)
  changed = struprune.survey(maps.with_blocks(model, silent), TOKENS, batch=16)
  assert changed.importance[0, 0] == 0
  size = np.array(structured.costs(model.config)) * (2, 64)
  after, before = trace[0], x  # without attention the first layer's MLP adds all there is
  one = maps.with_blocks(model, silent)
  after = one.trace(TOKENS)[1][0]
  ratio = (jnp.square(after - before).sum(axis=-1) / jnp.square(after).sum(axis=-1)).mean()
  np.testing.assert_allclose(changed.importance[0, 1] * size[1], ratio, rtol=1e-4)


def test_rules_share_out_what_they_say():
  config = dataclasses.replace(configs()["qwen3"], depth=3)
  rng = np.random.default_rng(0)
  scores = structured.normalised(Groups(rng.random((3, 2)) + 0.5, rng.random((3, 64)) + 0.5))
  found = Survey(scores, np.array([[3.0, 2.0], [1.0, 0.1], [3.0, 0.5]]) * 1e-6)
  at = lambda **how: struprune.allocate(config, found, budget=0.6, least=Least(1, 8), biases=False, **how)
  neurons = lambda **how: list(np.argsort(at(**how)[1]))
  assert neurons(rule="softmax", temperature=0.5) == neurons(rule="threshold") == [1, 2, 0]
  hot, uniform = at(rule="softmax", temperature=1e6), at(rule="uniform")
  np.testing.assert_allclose(hot, uniform, atol=1)
  multiple = at(rule="softmax", temperature=1.0, multiple=16)[1]
  assert all(n % 16 == 0 or n == 8 for n in multiple)


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_one_layer_is_on_the_device_whatever_the_depth(depth):
  """A model in host memory, and what lives each time a layer is loaded: what is no layer, and a batch of states."""
  config = dataclasses.replace(configs()["llama"], depth=depth)
  model, seen = watched(jax.tree.map(np.asarray, random_model(config)))
  tokens = TOKENS[:4, :8]
  rest = Options(admm=Admm(stages=1, iterations=1), split=Split(outer=1))
  small = struprune.prune(model, tokens, budget=0.7, batch=2, temperature=1.0, least=Least(1, 8), options=rest)
  assert isinstance(small.blocks.o.weight[...], np.ndarray) and len(seen) == 2 * 7 * depth
  block = maps.bytes_of(model.blocks) // depth
  outside = maps.bytes_of(model) - depth * block
  # 7 matrices of a layer are read one after the other: the others of the same layer may be there.
  assert max(seen) <= outside + block + 2 * tokens.nbytes + 4096


def test_then_lord(small):
  """Thinner maps of a pruned network: counted, saved, read."""
  thin = lord.truncate(small, lord.decompose(small, TOKENS, batch=16), {"mlp.up": 8, "q": 8})
  logits, _ = jax.jit(inference.step)(inference.take_apart(thin, narrow=True), TOKENS[:2])
  np.testing.assert_allclose(logits, jax.jit(type(thin).__call__)(thin, TOKENS[:2]), rtol=1e-4, atol=1e-4)
  assert maps.bytes_of(thin) < maps.bytes_of(small)
  assert maps.spec_of(thin)["mlp.down"] == {"kind": "affine"}


def test_three_lines_on_ones_own_model(model, tmp_path):
  small = struprune.prune(model, TOKENS, budget=0.7, **HOW)
  hub.save(small, tmp_path)
  np.testing.assert_array_equal(hub.load(tmp_path)(TOKENS[:1]), small(TOKENS[:1]))


def test_wrong_input_is_one_line(model):
  for wrong, said in (
    (dict(budget=1.2), "budget is 1.2"),
    (dict(budget=0.01), "what every layer keeps takes 0"),
    (dict(budget=0.7, rule="best"), "rule is 'best'"),
    (dict(budget=0.7, score="loud"), "score is 'loud'"),
  ):
    with pytest.raises(InputError, match=said):
      struprune.prune(model, TOKENS, **(HOW | wrong))
  with pytest.raises(InputError, match="has 1 row; give two or more"):
    struprune.rebuild(model, TOKENS[:1], [1, 1], [8, 8], batch=1)
  with pytest.raises(InputError, match="16 rows of calibration text; give a multiple of batch=5"):
    struprune.survey(model, TOKENS, batch=5)
  with pytest.raises(InputError, match="the rule softmax has a temperature"):
    struprune.allocate(model.config, struprune.survey(model, TOKENS, batch=16), budget=0.7, least=Least(1, 8))


def test_a_ridge_below_the_rounding_of_sums_is_not_taken(monkeypatch):
  """One direction holds nearly all of A and rows are few: without a ridge worth the name there is no factor."""
  monkeypatch.setattr(struprune, "RIDGES", (1e-9, 1e-1))
  rng = np.random.default_rng(0)
  x = jnp.asarray(1e3 * np.outer(rng.normal(size=20), rng.normal(size=64)) + rng.normal(size=(20, 64)), jnp.float32)
  weight = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)
  gram, cross = struprune.ridged(*struprune._moments(x, x @ weight, QUICK)[:2], weight, 1e-9)
  assert jnp.isnan(struprune.least_squares(gram, cross, jnp.ones(64, bool))).any()
  fitted, bias, error = struprune._fit(x, x @ weight, weight, jnp.arange(64) < 48, 16, QUICK)
  assert jnp.isfinite(fitted).all() and jnp.isfinite(bias).all() and jnp.isfinite(error)
