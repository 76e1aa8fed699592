import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import heapr as config_file
from experiments import results
from experiments.heapr import baselines, quality, training
from jaxlab.data import tokenizer
from jaxlab.models import TransformerConfig, hub, maps
from jaxlab.models.config import Experts
from jaxlab.training.losses import language_model_loss
from jaxlab.weights import heapr
from tests.common import random_model, random_tokens, run_and_continue

SHAPE = dict(depth=1, width=16, q_heads=2, kv_heads=1, head_dim=8, mlp_width=16, vocab_size=32)
CONFIG = TransformerConfig(**SHAPE, qk_norm="before_rope", experts=Experts(count=4, active=2, width=24))
ROWS = np.asarray(random_tokens(8, 17, vocab=32))
HEAPR = ("heapr", "heapr_layer", "heapr_use", "heapr_tiles")


@pytest.fixture
def config(tiny_checkpoint):
  made = config_file.get_config("test")
  made.dense = f"hf:{tiny_checkpoint}"
  made.data.path, made.data.calibration, made.data.test = "docs/**/*.md", "train", "train"
  return made


@pytest.fixture(scope="module")
def model():
  return random_model(CONFIG)


@pytest.fixture(scope="module")
def found(model):
  return heapr.statistics(model, ROWS, covariance=True)


@pytest.fixture(scope="module")
def read(model):
  return baselines.captured(model, ROWS, 100)


def test_everything_is_measured_once(config, tmp_path, monkeypatch):
  config.budget, config.ratios = 0.5, (0.5,)
  parts = ("training.trained", "quality.measure", "removals.measure", "speed.measure")
  report = run_and_continue("heapr", tmp_path, monkeypatch, *parts, config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  assert len(report.claims) == 12
  rows = report.metrics["quality"]["rows"]
  assert {row["method"] for row in rows} == {"dense", *quality.SCORES, *quality.EXPERTS, quality.DELTAS, *HEAPR}
  for one in report.metrics["quality"]["layouts"].values():
    assert (
      one["exact"]["memory"] <= one["stacked"]["memory"] <= 1 and one["tiles"]["memory"] <= one["stacked"]["memory"]
    )
  assert all(one["bytes"] < report.metrics["speed"]["experts"] for one in report.metrics["speed"]["kept"])
  assert all(one["flops"] < 1 for one in report.metrics["speed"]["kept"])


def test_ones_own_mixture_becomes_a_folder(config, tmp_path, monkeypatch):
  bpe = tokenizer.train([file.read_text() for file in sorted(Path("docs").glob("*.md"))], 320)
  folder = tmp_path / "mine"
  own = random_model(TransformerConfig(**SHAPE | {"vocab_size": bpe.get_vocab_size()}, qk_norm="before_rope",
                                       experts=Experts(count=4, active=2, width=24)))  # fmt: skip
  hub.save(own, folder)
  (folder / "tokenizer.json").write_text(bpe.to_str())
  config.model, config.budget = f"hf:{folder}", 0.5
  report = run_and_continue("heapr", tmp_path, monkeypatch, "quality.chosen", config=config)
  (made,) = report.metrics["compressed"].values()
  small = hub.load(tmp_path / "compressed")
  kept = sum(leaf.size for leaf in jax.tree.leaves((small.blocks.mlp.gates, small.blocks.mlp.ups)))
  assert kept < jax.tree.leaves(own.blocks.mlp.gate)[0].size * 2
  assert made["files"]["compressed"] < maps.bytes_of(own)
  assert [claim.name.split()[0] for claim in report.claims] == ["Perplexity", "Bytes"]


def test_training_computes_the_model_and_balances_it(model):
  """The cross-entropy of all experts in one product is the model's; 1 is an even balance."""
  batch = dict(inputs=ROWS[:, :-1], targets=ROWS[:, 1:])
  value, balance, busiest = jax.jit(training.balanced_loss)(model, batch)
  np.testing.assert_allclose(value, language_model_loss(model, batch)[0], rtol=1e-5)
  assert balance > 0.9 and busiest > 1
  even = jax.tree.map(lambda a: a, model)
  even.blocks.mlp.router.weight[...] = 1e-6 * even.blocks.mlp.router.weight[...]
  np.testing.assert_allclose(training.balanced_loss(even, batch)[1], 1, rtol=1e-3)


def test_naee_finds_the_subset_of_least_error(model, read, monkeypatch):
  """By trying all of them; taken out one after the other it drops as many and is no better."""
  found = baselines.naee(model, read, 2)
  assert (found.sum(axis=-1) == 2).all()
  size = CONFIG.experts.width
  whole = lambda alive: heapr.sliced(model, np.repeat(alive[..., None], size, axis=-1), tile=size, skip_empty=True)
  first = lambda one: jax.tree.map(lambda a: a[0], one.blocks.mlp)(read[0])
  error = lambda alive: float(jnp.square(first(whole(alive[None])) - first(model)).sum())
  every = [np.isin(np.arange(4), pair) for pair in itertools.combinations(range(4), 2)]
  best = min(error(alive) for alive in every)
  np.testing.assert_allclose(error(found[0]), best, rtol=1e-4)
  monkeypatch.setattr(baselines, "_SUBSETS", 1)
  greedy = baselines.naee(model, read, 2)
  assert (greedy.sum(axis=-1) == 2).all() and error(greedy[0]) >= best * (1 - 1e-4)


def test_equal_experts_merge_without_a_loss(model, found, read):
  """Two experts that are one, its neurons in another order: matched first, their mean is either one."""
  twins = jax.tree.map(lambda a: a, model)
  moe = twins.blocks.mlp
  order = np.random.default_rng(0).permutation(CONFIG.experts.width)
  moe.gate[...] = moe.gate[...].at[:, 2].set(moe.gate[...][:, 0][..., order])
  moe.up[...] = moe.up[...].at[:, 2].set(moe.up[...][:, 0][..., order])
  moe.down[...] = moe.down[...].at[:, 2].set(moe.down[...][:, 0][:, order])
  same = baselines.merged(twins, found, read, 3, align=True)
  np.testing.assert_allclose(same(ROWS), twins(ROWS), atol=1e-4)
  assert float(jnp.abs(baselines.merged(twins, found, read, 3, align=False)(ROWS) - twins(ROWS)).max()) > 1e-2


def test_differences_of_full_rank_are_the_experts(model, found, read):
  """And fewer ranks are further away."""
  parts = baselines.differences(model, found, read)
  full = baselines.low_rank(model, parts, -2.0)
  np.testing.assert_allclose(full(ROWS), model(ROWS), atol=1e-2)
  off = [float(jnp.abs(baselines.low_rank(model, parts, r)(ROWS) - model(ROWS)).mean()) for r in (0.1, 0.6)]
  assert 0 < off[0] < off[1]
