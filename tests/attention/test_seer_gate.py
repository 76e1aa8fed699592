import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.attention.compact_attention import compact
from jaxlab.attention.seer_gate import SeerGate, attention_by_block, gate_logits, gate_loss, pooled_keys, seer
from jaxlab.core.checks import InputError
from jaxlab.models import generate, inference, paged
from tests.common import configs, random_model, random_tokens

CONFIG = dataclasses.replace(configs()["qwen3"], depth=2)


def network():
  return jax.jit(inference.take_apart)(random_model(CONFIG))


def arrays(time=16):
  keys = jax.random.split(jax.random.key(0), 2)
  shape = lambda heads: (2, heads, time, CONFIG.head_dim)
  return jax.random.normal(keys[0], shape(4)), jax.random.normal(keys[1], shape(2))


def test_the_target_is_the_largest_weight_of_a_block():
  q, k = arrays()
  found = attention_by_block(q, k, block=4, window=9)
  score = jnp.einsum("bhqd,bhkd->bhqk", q, jnp.repeat(k, 2, axis=1)) / 4
  at = jnp.arange(16)
  see = (at <= at[:, None]) & (at >= at[:, None] - 9)
  weight = jax.nn.softmax(jnp.where(see, score, -jnp.inf), axis=-1)
  top = weight.reshape(2, 4, 4, 4, 4, 4).max(axis=(3, 5))
  np.testing.assert_allclose(found, top / top.sum(axis=-1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_scores_above_tau_and_the_last_blocks_are_kept():
  q, k = arrays()
  gate = SeerGate(CONFIG, jax.random.key(1), width=8)
  maps = gate.q[0], gate.k[0]
  pooled = pooled_keys(k, 4)
  np.testing.assert_allclose(pooled[..., :16], k.reshape(2, 2, 4, 4, 16).max(axis=3))
  keep = lambda tau: np.asarray(seer(q, pooled, past=0, block=4, maps=maps, theta=gate.theta, tau=tau))
  behind = np.arange(4)[:, None] - np.arange(4)
  np.testing.assert_array_equal(keep(0.0), np.broadcast_to(behind >= 0, (2, 4, 4, 4)))
  np.testing.assert_array_equal(keep(1.0), np.broadcast_to((behind >= 0) & (behind < 2), (2, 4, 4, 4)))
  # A chunk in the middle of the row is scored as the same queries are in the whole.
  later = seer(q[:, :, 8:], pooled, past=8, block=4, maps=maps, theta=gate.theta, tau=0.3)
  np.testing.assert_array_equal(later, keep(0.3)[:, :, 2:])


def test_what_padding_pools_to_is_left_out():
  """Of 10 queries and keys that count; in a block, copies of what it is pooled to change nothing."""
  q, k = arrays()
  gate = SeerGate(CONFIG, jax.random.key(1), width=8)
  pooled = pooled_keys(k, 4, jnp.array([16, 10]))
  last = k[1, :, 8:10]
  expected = jnp.concatenate([last.max(axis=1), last.min(axis=1), last.mean(axis=1)], axis=-1)
  np.testing.assert_allclose(pooled[1, :, 2], expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(pooled[0], pooled_keys(k, 4)[0], rtol=1e-6, atol=1e-6)
  how = dict(past=0, block=4, maps=(gate.q[0], gate.k[0]), theta=gate.theta)
  filled = q.at[1, :, 10:12].set(q[1, :, 8:10].mean(axis=1, keepdims=True))
  found, same = gate_logits(q, pooled, real=jnp.array([16, 10]), **how), gate_logits(filled, pooled, **how)
  np.testing.assert_allclose(found[0], same[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found[1, :, :3], same[1, :, :3], rtol=1e-5, atol=1e-5)


def test_training_moves_the_gate_alone_and_towards_the_attention():
  net, tokens = network(), random_tokens(4, 32)
  gate = SeerGate(CONFIG, jax.random.key(1), width=16)
  grads = jax.grad(lambda net: gate_loss(gate, net, tokens, block=4), allow_int=True)(net)
  assert all(not np.asarray(a).any() for a in jax.tree.leaves(grads) if a.dtype == jnp.float32)
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(gate, state):
    loss, grads = jax.value_and_grad(gate_loss)(gate, net, tokens, block=4)
    updates, state = optimizer.update(grads, state, gate)
    return optax.apply_updates(gate, updates), state, loss

  state, losses = optimizer.init(gate), []
  for _ in range(60):
    gate, state, loss = step(gate, state)
    losses.append(float(loss))
  assert 0 < losses[-1] < losses[0] / 3
  with pytest.raises(InputError, match="block"):
    gate_loss(gate, net, tokens, block=5)


def test_the_gates_gradient_is_that_of_finite_differences():
  net, tokens = network(), random_tokens(2, 8)
  gate = SeerGate(CONFIG, jax.random.key(1), width=8)
  loss = jax.jit(lambda gate: gate_loss(gate, net, tokens, block=4))
  direction = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), gate)
  along = lambda t: float(loss(jax.tree.map(lambda a, d: a + t * d, gate, direction)))
  found = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (jax.grad(loss)(gate), direction)), strict=True))
  np.testing.assert_allclose(found, (along(1e-2) - along(-1e-2)) / 2e-2, rtol=2e-2)


def test_with_every_block_generation_is_the_dense_one():
  net, prompts = network(), random_tokens(2, 21)
  method = compact(SeerGate(CONFIG, jax.random.key(1), width=8).selectors(tau=0.0))
  found = generate(net, prompts, tokens=3, decoder=paged.decoder(method, chunk=8, page=4))
  np.testing.assert_array_equal(found, generate(net, prompts, tokens=3))
