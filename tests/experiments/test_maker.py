"""MAKER's experiment: the step model's data, its samplers and exact error rates, and a whole run at test scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import maker as config_file
from experiments.console import Console
from experiments.maker import flags, sampling, training, voting
from jaxlab.models import TransformerConfig, inference
from jaxlab.models.attention import dot_product_attention
from jaxlab.tasks import hanoi
from tests.common import random_model, run_and_continue

DISKS, NAMES = 4, 6


@pytest.fixture(scope="module")
def config():
  return config_file.get_config("test")


@pytest.fixture(scope="module")
def model(config):
  shape = config.shape.to_dict() | dict(vocab_size=hanoi.vocabulary(NAMES), context=2 * DISKS + 13)
  return random_model(TransformerConfig(**shape))


def test_what_is_trained_on_is_the_rule_at_every_number_of_disks(config):
  batch = jax.jit(lambda key: training.rows(key, config, rambling=0.0))(jax.random.key(0))
  inputs, targets = (np.asarray(batch[name]) for name in ("inputs", "targets"))
  answers = [row[row >= 0] for row in targets]
  assert {len(answer) for answer in answers} <= {3 + 8, 4 + 8} and all(a[-1] == hanoi.STOP for a in answers)
  for row, answer in zip(inputs, answers, strict=True):
    at = int(np.flatnonzero(row == hanoi.ASK)[0])
    assert row[0] == hanoi.LAST and answer[0] == hanoi.MOVE
    disks = lambda tokens: sorted(token for token in tokens if token >= hanoi.DISK)
    assert disks(row[3:at]) == disks(answer[5:-1]) and len(set(disks(answer[5:-1]))) == len(answer) - 8


def test_of_rare_steps_every_disk_moves_as_often():
  present = jnp.repeat(jnp.array([3, 20]), 4000)
  step = training.any_mover(jax.random.key(0), present)
  assert (step >= 0).all() and (step < 2**present - 1).all()
  move, _ = hanoi.take_step(hanoi.state_before(step, 20, present))
  for disks in (3, 20):
    moved = np.asarray(move[:, 0])[np.asarray(present) == disks]
    np.testing.assert_allclose(np.bincount(moved, minlength=disks + 1)[1:], 4000 / disks, rtol=0.3)
    assert len(moved) == 4000 and moved.max() == disks


def test_long_thoughts_are_wrong_every_other_time_and_short_ones_never(config):
  config = config.copy_and_resolve_references()
  config.train.batch = 400
  batch = jax.jit(lambda key: training.rows(key, config, rambling=0.5))(jax.random.key(1))
  lengths = np.array([int((row >= 0).sum()) for row in np.asarray(batch["targets"])])
  short = np.isin(lengths, [3 + 8 + 3, 4 + 8 + 3])
  assert 140 < short.sum() < 260 and set(lengths[~short]) == {3 + 8 + 12, 4 + 8 + 12}


def test_attention_of_one_query_is_dot_product_attention():
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (3, length, 2, 8)) for key, length in zip(keys, (1, 6, 6), strict=True))
  for start in (0, 3, 5):
    expected = dot_product_attention(q, k, v, start=jnp.int32(start))
    np.testing.assert_allclose(sampling.attend(q, k, v, start=jnp.int32(start)), expected, rtol=1e-5, atol=1e-6)


def test_at_temperature_0_samples_are_the_likeliest_tokens_one_after_the_other(model):
  prompt = jnp.arange(10).reshape(2, 5) % 7 + 9

  @jax.jit
  def both(model):
    network = inference.take_apart(model)
    made = sampling.generated(network, prompt, jax.random.key(0), jnp.zeros(2), tokens=4)
    return made, jnp.argmax(model(jnp.concatenate([prompt, made], axis=1)), axis=-1)[:, 4:8]

  np.testing.assert_array_equal(*both(model))


def test_error_rates_are_those_of_a_model_that_knows_each_token_with_probability_q(config, model):
  """1 - q^12: M, three entries, N, four disks, two bars and the full stop."""
  q, vocabulary, steps = 0.9, hanoi.vocabulary(NAMES), (jnp.arange(15), jnp.full(15, DISKS))
  agent = sampling.agent(config, model, period=15, renamed="pegs and disks")

  def knows(tokens):
    """Answers are rows' own next tokens; the last one, which is not there, is the full stop."""
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=hanoi.STOP)
    right = jax.nn.one_hot(following, vocabulary)
    return jnp.log(q * right + (1 - q) / (vocabulary - 1) * (1 - right))

  sizes = dict(draws=2, disks=DISKS, names=NAMES)
  rates = jax.jit(lambda agent: sampling.error_rates.__wrapped__(knows, agent, *steps, jax.random.key(0), **sizes))
  found = rates(agent)
  np.testing.assert_allclose(found, 1 - q**12, rtol=1e-5)


def test_runs_past_the_period_ask_about_the_same_steps(config, model):
  agent = sampling.agent(config, model, period=12, m=3)
  np.testing.assert_array_equal(
    sampling.state_of(agent, jnp.arange(8), DISKS).pegs,
    hanoi.state_before(jnp.array([0, 3, 6, 9] * 2), DISKS).pegs,
  )
  right = sampling.right(agent, items=4, disks=DISKS)
  assert len(np.unique(right, axis=0)) == 4


def given_rates(config, model, scheme, step, **_):
  """Those of a model of six steps would forbid to vote."""
  return np.full(len(step), 0.01)


def test_maker_writes_claims_and_figures_and_resumes(model, tmp_path, monkeypatch):
  """Whatever a model without training says."""
  monkeypatch.setattr(voting, "rates", given_rates)
  monkeypatch.setattr(training, "stages", lambda config, *_: [model] * len(config.train.stages))
  found = dict(eps=0.1, collisions=0.01, share=0.2)
  monkeypatch.setattr(flags, "measure", lambda *_: {"flagged": found, "unflagged": found})
  report = run_and_continue("maker", tmp_path, monkeypatch, "voting.run", "flags.measure", "multiplication.measure")
  assert report.metrics["runs"]["renamed, k = 2"]["steps"] == 15
  assert "without one wrong step" in report.claims[0].name and report.finding


@pytest.mark.slow
def test_the_models_are_trained_and_kept(config, tmp_path, monkeypatch):
  monkeypatch.setattr(voting, "rates", given_rates)
  report = run_and_continue("maker", tmp_path, monkeypatch, "voting.run", "flags.measure")
  assert 0 <= report.metrics["flags"]["flagged"]["share"] <= 1
  again = list(training.stages(config, tmp_path / "model", Console()))
  assert len(again) == 2 and (again[0].embedding[...] != again[1].embedding[...]).any()
