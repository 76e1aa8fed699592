import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import struprune as config_file
from experiments import compressing, results
from experiments.struprune import rivals, slicegpt
from jaxlab.models import hub, maps
from jaxlab.models.layers import Linear
from jaxlab.weights import structured
from jaxlab.weights.structured import Groups
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
  # The norms' gains, which stay, are 0.3 % of so small a block.
  assert dense["share"] == 1 and all(row["share"] < 0.71 and row["bytes"] < dense["bytes"] for row in others)
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
