"""PPO: advantages against a double sum, gradients against the plain policy gradient, and a policy that learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.models.generate import generate
from jaxlab.tasks import ppo
from tests.common import configs, random_model, random_tokens

CONFIG = dataclasses.replace(configs()["llama"], depth=3, vocab_size=16)
END = 1


@pytest.fixture(scope="module")
def actor():
  made = ppo.Actor(random_model(CONFIG))
  made.value = type(made.value)(0.1 * jax.random.normal(jax.random.key(5), (CONFIG.width + 1,)))
  return made


@functools.cache
def rollout_of(batch=4, time=10):
  """Rows of different lengths, of which the last is written from the fourth token on."""
  tokens = random_tokens(batch, time, vocab=16)
  at = jnp.arange(time - 1)
  mask = (at >= 3) & (at < 3 + jnp.array([[6], [4], [1], [2]]))
  return tokens, mask


def advantages_of(tokens, mask, logp, values):
  rewards = ppo.token_rewards(logp, logp - 0.1, mask, 0.2, jnp.arange(4.0))
  advantages, returns = ppo.gae(rewards, values, mask)
  return ppo.Rollout(tokens, mask, logp, values, ppo.whiten(advantages, mask), returns)


@given(st.integers(0, 2**31), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_advantages_are_the_double_sum(seed, gamma, decay):
  rng = np.random.default_rng(seed)
  rewards, values = rng.normal(size=(2, 3, 7))
  starts, sizes = rng.integers(0, 3, 3), rng.integers(0, 5, 3)
  mask = (np.arange(7) >= starts[:, None]) & (np.arange(7) < (starts + sizes)[:, None])
  found, returns = ppo.gae(*map(jnp.asarray, (rewards, values, mask)), gamma=gamma, decay=decay)
  expected = np.zeros((3, 7))
  for b in range(3):
    for t in np.flatnonzero(mask[b]):
      for k in (k for k in np.flatnonzero(mask[b]) if k >= t):
        after = values[b, k + 1] if k + 1 < 7 and mask[b, k + 1] else 0.0
        expected[b, t] += (gamma * decay) ** (k - t) * (rewards[b, k] + gamma * after - values[b, k])
  np.testing.assert_allclose(found, expected, atol=1e-5)
  np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), atol=1e-5)


def test_whitened_advantages_count_what_was_written_alone():
  x, (_, mask) = jax.random.normal(jax.random.key(0), (4, 9)), rollout_of()
  found = np.asarray(ppo.whiten(x.at[:, 0].set(1e6), mask))
  assert found[np.asarray(mask)].mean() == pytest.approx(0, abs=1e-5)
  assert found[np.asarray(mask)].std() == pytest.approx(1, abs=1e-4) and (found[~np.asarray(mask)] == 0).all()


def test_scores_are_those_of_the_network_before_each_token(actor):
  tokens, _ = rollout_of()
  logp, values = ppo.scores(actor, tokens)
  whole = jax.nn.log_softmax(actor.model(tokens), axis=-1)
  expected = jnp.take_along_axis(whole[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
  np.testing.assert_allclose(logp, expected, atol=1e-4)
  assert values.shape == logp.shape and float(jnp.abs(ppo.scores(ppo.Actor(actor.model), tokens)[1]).max()) == 0


def test_at_first_the_gradient_is_the_plain_policy_gradient(actor):
  """rho = 1: the gradient of -mean A log pi, and that of the value loss without its clip."""
  tokens, mask = rollout_of()
  rollout = advantages_of(tokens, mask, *ppo.scores(actor, tokens))
  (_, report), ours = jax.value_and_grad(ppo.loss, has_aux=True)(actor, rollout)

  def plain(actor):
    logp, values = ppo.scores(actor, tokens)
    mean = lambda x: jnp.where(mask, x, 0.0).sum() / mask.sum()
    return mean(-rollout.advantages * logp) + 0.1 * 0.5 * mean((values - rollout.returns) ** 2)

  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(jax.grad(plain)(actor)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert float(report["clipped"]) == 0


def test_tokens_that_were_not_written_have_no_gradient(actor):
  """What follows the end may be anything, bit for bit; and no loss is taken of the prompt."""
  tokens, mask = rollout_of()
  logp, values = ppo.scores(actor, tokens)
  rollout = advantages_of(tokens, mask, logp, values)
  gradient = jax.jit(jax.grad(lambda actor, rollout: ppo.loss(actor, rollout)[0]))
  ours = gradient(actor, rollout)
  beyond = jnp.arange(10) > 3 + jnp.array([[6], [4], [1], [2]])
  wild = dict(logp=jnp.where(mask, logp, 9.0), values=jnp.where(mask, values, -9.0))
  other = gradient(actor, rollout._replace(tokens=jnp.where(beyond, 7, tokens), **wild))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)
  of_logp = jax.grad(lambda r: ppo.loss(actor, rollout._replace(logp=r))[0])(logp)
  assert (np.asarray(of_logp)[~np.asarray(mask)] == 0).all() and np.abs(of_logp).max() > 0


def test_a_ratio_beyond_the_clip_sends_no_gradient_where_it_would_go_further(actor):
  tokens, mask = rollout_of()
  logp, values = ppo.scores(actor, tokens)
  rollout = advantages_of(tokens, mask, logp, values)._replace(advantages=jnp.ones_like(logp))
  policy = lambda r: ppo.loss(actor, r, value_weight=0.0)[0]
  beyond = rollout._replace(logp=logp - 0.5)  # rho = 1.65, advantage 1
  of = lambda r: jax.grad(lambda a: ppo.loss(a, r, value_weight=0.0)[0])(actor)
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(of(beyond))) == 0
  assert float(policy(beyond)) == pytest.approx(-1.2, rel=1e-5)
  back = beyond._replace(advantages=-jnp.ones_like(logp))
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(of(back))) > 0


def test_the_penalty_is_a_tokens_and_the_reward_the_last_ones():
  _, mask = rollout_of()
  logp, reward = jnp.zeros((4, 9)), jnp.array([1.0, 2.0, 3.0, 4.0])
  found = np.asarray(ppo.token_rewards(logp, logp - 1.0, mask, 0.5, reward))
  np.testing.assert_allclose(found.sum(axis=1), reward - 0.5 * mask.sum(axis=1), rtol=1e-6)
  assert found[0, 8] == pytest.approx(0.5) and found[2, 3] == pytest.approx(2.5) and found[2, 4] == 0
  assert float(ppo.kl(logp, logp, mask)) == 0 and float(ppo.kl(logp, logp - 1, mask)) == pytest.approx(13 / 4)
  some = mask & jnp.array([True, False, False, True])[:, None]  # episodes that count nowhere are not averaged in
  assert float(ppo.kl(logp, logp - 1, some)) == pytest.approx(float(some.sum()) / 2)
  assert float(ppo.kl(logp, logp - 1, mask & False)) == 0


def test_the_penaltys_weight_falls_where_nothing_has_moved_and_rises_where_too_much_has():
  assert float(ppo.adapted(0.01, 0.0, 64)) == pytest.approx(0.01 * (1 - 0.2 * 64 / 10_000))
  assert float(ppo.adapted(0.01, 4.4, 100)) == pytest.approx(0.01 * (1 + 0.1 * 100 / 10_000))
  assert float(ppo.adapted(0.01, 400.0, 100)) == pytest.approx(0.01 * (1 + 0.2 * 100 / 10_000))
  with pytest.raises(InputError, match="target"):
    ppo.adapted(0.01, 1.0, 1, target=0.0)


def test_what_was_written_follows_its_prompt_up_to_the_end():
  prompts = jnp.array([[5, 6, 7], [8, 9, 9]])
  tokens, mask = ppo.written(prompts, jnp.array([3, 1]), jnp.array([[2, END, 4, 4], [3, 3, 3, 3]]), END)
  assert tokens.tolist() == [[5, 6, 7, 2, END, 0, 0], [8, 3, 3, 3, 3, 0, 0]]
  assert mask.tolist() == [[False, False, True, True, False, False], [True, True, True, True, False, False]]


def test_blocks_that_are_not_the_last_stay_bit_for_bit(actor):
  tokens, mask = rollout_of()
  rollout = advantages_of(tokens, mask, *ppo.scores(actor, tokens))
  optimizer = optax.chain(optax.adam(1e-2), ppo.scaled_by(ppo.last_blocks(actor, 1)))
  after, _, _ = ppo.improve(
    actor, optimizer.init(actor), rollout, optimizer, key=jax.random.key(0), epochs=2, minibatches=2
  )
  for (path, old), (_, new) in zip(*(jax.tree_util.tree_flatten_with_path(a)[0] for a in (actor, after)), strict=True):
    name, moved = jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(old != new)
    if name.startswith("value"):
      assert moved.any()
    elif "blocks." in name:
      assert not moved[:2].any() and moved[2].any()
    else:
      assert not moved.any()
  for wrong, message in ((dict(minibatches=3), "divide"), (dict(epochs=0), "epochs")):
    with pytest.raises(InputError, match=message):
      ppo.improve(actor, optimizer.init(actor), rollout, optimizer, key=jax.random.key(0), **wrong)
  with pytest.raises(InputError, match="4 blocks"):
    ppo.last_blocks(actor, 4)


@jax.jit
def _iteration(actor, key):
  """Prompts of one token; the reward is the share of 3 among what is written."""
  prompts, lengths = jnp.full((64, 1), 5), jnp.ones(64, jnp.int32)
  new = generate(actor.model, prompts, lengths, tokens=4, key=key, temperature=1.0)
  tokens, mask = ppo.written(prompts, lengths, new, END)
  logp, values = ppo.scores(actor, tokens)
  reward = (jnp.where(mask, tokens[:, 1:] == 3, False)).sum(axis=1) / 4
  advantages, returns = ppo.gae(ppo.token_rewards(logp, logp, mask, 0.0, reward), values, mask)
  return ppo.Rollout(tokens, mask, logp, values, ppo.whiten(advantages, mask), returns), reward.mean()


def test_a_policy_learns_what_is_rewarded():
  """In a dozen lines on one's own reward."""
  actor = ppo.Actor(random_model(dataclasses.replace(CONFIG, depth=1)))
  optimizer = optax.adam(5e-3)
  state, rewards = optimizer.init(actor), []
  for i in range(15):
    rollout, reward = _iteration(actor, jax.random.key(i))
    actor, state, _ = ppo.improve(actor, state, rollout, optimizer, key=jax.random.key(100 + i))
    rewards.append(float(reward))
  assert rewards[-1] > 0.6 > 0.3 > rewards[0]
