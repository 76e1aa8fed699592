import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import struprune as config_file
from experiments import compressing, results
from experiments.struprune import rivals, slicegpt, sparsellm
from jaxlab.models import hub, maps
from jaxlab.models.layers import Linear
from jaxlab.weights import pruning, structured
from jaxlab.weights.calibration import moments
from jaxlab.weights.structured import Groups
from jaxlab.weights.struprune import Options
from jaxlab.weights.struprune_solver import Mlp, Split
from tests.common import configs, random_model, random_tokens, run_and_continue


@pytest.fixture
def config(two_layers):
  made = config_file.get_config("test")
  made.data.path, made.data.calibration, made.data.test = "docs/**/*.md", "train", "train"
  made.subjects = (f"hf:{two_layers}",)
  return made


def test_everything_is_measured_once(config, two_layers, tmp_path, monkeypatch):
  parts = ("quality.frontier", "memory.measure", "speed.measure", "recovery.measure")
  report = run_and_continue("struprune", tmp_path, monkeypatch, *parts, config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  assert len(report.claims) == 9  # of 12: three are of what keeps 0.6 or less
  dense, *others = report.metrics["frontier"][two_layers.name]["rows"]
  assert {*config_file.MAIN, "oracle+rebuilt"} <= {row["method"] for row in others}
  # The norms' gains, which stay, are 0.3 % of so small a block; a mask by weight has a bit for each of 16 besides.
  assert dense["share"] == 1 and all(row["bytes"] < dense["bytes"] for row in others)
  assert all(row["share"] < (0.775 if row["method"] == "sparsellm" else 0.71) for row in others)
  assert "SparseLLM by weight, no smaller where dense: " in report.claims[0].note
  assert len({row["live"] for row in report.metrics["memory"]["rows"]}) == 1


def test_ones_own_model_becomes_a_folder(config, two_layers, tmp_path, monkeypatch):
  config.model, config.budget = f"hf:{two_layers}", 0.7
  report = run_and_continue("struprune", tmp_path, monkeypatch, "quality.chosen", config=config)
  (found,) = report.metrics["compressed"].values()
  small = hub.load(tmp_path / "compressed")
  dense = compressing.stored(hub.load(two_layers))
  assert maps.bytes_of(small) == found["bytes"]["compressed"] < found["bytes"]["original"] == maps.bytes_of(dense)
  assert hub.load_vocabulary(tmp_path / "compressed").tokenizer.get_vocab_size() > 0


def test_slicing_no_direction_away_changes_nothing():
  model, tokens = random_model(configs()["llama"]), random_tokens(4, 12)
  width = model.config.width
  found = slicegpt.directions(model, tokens, width, batch=4)
  out, _ = slicegpt.hidden(model, *found, tokens)
  np.testing.assert_allclose(out, model.hidden(tokens)[0], rtol=1e-3, atol=1e-3)
  kept = slicegpt.kept_at(model.config, 0.7)
  dense = structured.dense_parameters(model.config)
  assert slicegpt.parameters(model.config, kept) <= 0.7 * dense < slicegpt.parameters(model.config, kept + 1)


def test_gradients_tell_what_leaving_a_group_out_costs(config, tmp_path):
  """To the first order: the slope of the loss along everything that belongs to a group."""
  (read,) = compressing.subjects(config, tmp_path).values()
  subject = read()
  model, c, row = subject.model, subject.model.config, subject.selection[:1]
  loss = compressing.selection_loss(dataclasses.replace(subject, selection=row))

  def scaled(by: Groups):
    found, size = maps.named(model.blocks), {"k": c.head_dim, "v": c.head_dim}
    made = {}
    for name, one in found.items():
      heads = jnp.repeat(by.heads, size.get(name, c.q_heads // c.kv_heads * c.head_dim), axis=1)
      factor = by.neurons if name.startswith("mlp.") else heads
      factor = factor[:, :, None] if name in structured.ENDS else factor[:, None]
      made[name] = Linear(one.weight[...] * factor, one.weight.axes)
    return loss(maps.with_blocks(model, maps.replaced(model.blocks, made)))

  ones = Groups(jnp.ones((c.depth, c.kv_heads)), jnp.ones((c.depth, c.mlp_width)))
  slopes, found = jax.jit(jax.grad(scaled))(ones), rivals.taylor(model, row)
  for kind in ("heads", "neurons"):
    slope = np.abs(getattr(slopes, kind))
    np.testing.assert_allclose(getattr(found["group"], kind), slope, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(getattr(found["fisher"], kind), slope**2, rtol=2e-3, atol=1e-9)
    assert np.all(getattr(found["element"], kind) >= slope - 1e-6)


def test_llm_pruner_spares_no_layers_where_the_others_have_no_room(config, tmp_path):
  (read,) = compressing.subjects(config, tmp_path).values()
  config.spared, subject = ((0.0, 0.0), (0.5, 0.0)), read()
  small = rivals.makers(config, subject, compressing.selection_loss(subject))["llm_pruner"](0.55)
  assert small.config.kv_heads == 1 < subject.model.config.kv_heads


BY_WEIGHT = dict(options=Options(split=Split(outer=2)), batch=8)


@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
def test_masks_by_weight_that_keep_all_are_the_model(mlp):
  """What is fitted fits as it is, and activations that give the outputs stay."""
  model = random_model(dataclasses.replace(configs()["llama"], depth=2, mlp=mlp))
  tokens = np.asarray(random_tokens(8, 24))
  same = sparsellm.prune(model, tokens, density=1.0, **BY_WEIGHT)
  np.testing.assert_allclose(same(tokens), model(tokens), rtol=1e-2, atol=1e-2)


def test_masks_by_weight_keep_their_share_and_lose_less_than_sparsegpt():
  """As many weights of every map; fitted to what the original gives, on text that was not calibrated on."""
  model = random_model(dataclasses.replace(configs()["llama"], depth=2))
  tokens, held = np.split(np.asarray(random_tokens(40, 24)), [32])
  small = sparsellm.prune(model, tokens, density=0.5, **BY_WEIGHT)
  for name, one in maps.named(small.blocks).items():
    np.testing.assert_allclose((one.weight[...] != 0).mean(axis=(1, 2)), 0.5, atol=0.01, err_msg=name)
  apart = lambda other: float(jnp.square(other(held) - model(held)).mean())
  assert apart(small) < apart(pruning.prune(model, tokens, "sparsegpt", density=0.5, batch=8).model)


def test_rounds_over_activations_are_taken_where_they_err_less():
  """An MLP pruned to a quarter of its weights errs less on the rows held out after four than after the first."""
  rng = np.random.default_rng(0)
  x, up, gate, down = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((600, 16), (16, 32), (16, 32), (32, 16)))
  mlp = Mlp(up / 4, gate / 4, down / 6)
  y = mlp.hidden(x, "swiglu") @ mlp.down
  shrink = functools.partial(pruning.sparsegpt, density=0.25)
  made = [
    sparsellm.rounds(x, y, mlp, shrink, fitted=400, kind="swiglu", options=Options(split=Split(outer=outer)))
    for outer in (1, 4)
  ]
  first, best = (float(jnp.square(one.hidden(x[400:], "swiglu") @ one.down - y[400:]).mean()) for one in made)
  assert best < 0.985 * first


def test_a_map_is_fitted_where_that_helps_and_stays_where_it_does_not():
  """To outputs that other weights gave, and to noise of few rows, of which least squares makes something worse."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  shrink, x, weight = functools.partial(pruning.sparsegpt, density=0.75), draw(300, 16), draw(16, 8)
  y = x @ (weight + draw(16, 8))
  _, error = sparsellm.fit(x, y, weight, shrink, fitted=200)
  kept = shrink(weight, moments(x[None, :200]))[0]
  assert error < 0.3 * float(jnp.square(x[200:] @ kept - y[200:]).mean())
  few, noisy = x[:30], x[:30] @ weight + 20 * draw(30, 8)
  made, _ = sparsellm.fit(few, noisy, weight, shrink, fitted=20)
  np.testing.assert_array_equal(made, shrink(weight, moments(few[None]))[0])
