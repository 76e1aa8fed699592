import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import mesh as meshes
from jaxlab.models.config import nanochat
from jaxlab.training import optimizers
from jaxlab.training.muon import muon, polar_factor
from tests.common import configs, random_model

constant = lambda value: lambda count: value


def make_muon(**changes):
  options = dict(momentum=constant(0.9), weight_decay=constant(0.0), dtype=jnp.float32)
  return muon(constant(0.02), **(options | changes))


@pytest.mark.parametrize("shape", [(3, 32, 32), (64, 16), (16, 64)])
def test_the_polar_factor_is_nearly_orthogonal(shape):
  """For singular values down to 2 % of the largest; five steps do not lift smaller ones all the way."""
  left, size, right = jnp.linalg.svd(jax.random.normal(jax.random.key(0), shape), full_matrices=False)
  u = polar_factor((left * jnp.geomspace(1, 0.02, size.shape[-1])) @ right, jnp.float32)
  rotated = jnp.swapaxes(left, -1, -2) @ u @ jnp.swapaxes(right, -1, -2)
  np.testing.assert_allclose(rotated - jnp.eye(rotated.shape[-1]), 0, atol=0.5)
  values = np.linalg.svd(np.asarray(u), compute_uv=False)
  assert values.min() > 0.5 and values.max() < 1.5


def numpy_nanochat_muon(w, grads, lr=0.02, beta=0.9, decay=0.0):
  """The update on torch-oriented matrices (rows are outputs), step by step as nanochat describes it."""
  rows, cols = w.shape
  m, v = np.zeros_like(w), 0.0
  for g in grads:
    m = beta * m + (1 - beta) * g
    u = (1 - beta) * g + beta * m
    u = u / (1.01 * np.linalg.norm(u) + 1e-6)
    for a, b, c in [
      (8.15655, -22.48329, 15.87877),
      (4.04293, -2.80892, 0.50002),
      (3.89167, -2.77248, 0.50606),
      (3.28575, -2.36813, 0.46449),
      (2.34654, -1.70978, 0.42324),
    ]:
      if rows > cols:
        gram = u.T @ u
        u = a * u + u @ (b * gram + c * gram @ gram)
      else:
        gram = u @ u.T
        u = a * u + (b * gram + c * gram @ gram) @ u
    reduced = 1 if rows >= cols else 0
    square = (u * u).mean(reduced, keepdims=True)
    v = 0.9 * v + 0.1 * square
    s = 1 / np.sqrt(np.maximum(v, 1e-10))
    n = u.shape[reduced]
    u = u * s * np.sqrt((square * n).sum() / (square * n * s * s).sum())
    w = w - lr * max(1, rows / cols) ** 0.5 * (u + decay * w * (u * w >= 0))
  return w


@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_muon_is_nanochats_on_the_transposed_matrix(shape, decay):
  rng = np.random.default_rng(0)
  w, grads = rng.normal(size=shape), rng.normal(size=(3, *shape))
  with jax.enable_x64(True):
    optimizer = make_muon(dtype=jnp.float64, weight_decay=constant(decay))
    params = jnp.asarray(w)[None]
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for g in grads:
      updates, state = update(jnp.asarray(g)[None], state, params)
      params = optax.apply_updates(params, updates)
  expected = numpy_nanochat_muon(w.T, grads.transpose(0, 2, 1), decay=decay).T
  np.testing.assert_allclose(params[0], expected, rtol=1e-4, atol=1e-5)


def test_a_stack_is_its_matrices():
  g = jax.random.normal(jax.random.key(0), (4, 8, 16))
  optimizer = make_muon()
  step = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g)[0])
  np.testing.assert_allclose(step(g), jnp.stack([step(one) for one in g]), rtol=1e-5, atol=1e-6)


def test_every_parameter_has_the_group_of_the_recipe():
  found = {}
  for config in configs().values():
    labelled = optimizers.labels(random_model(config))
    for path, group in jax.tree_util.tree_leaves_with_path(labelled):
      found[jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")] = group
  expected = {
    "embedding": "embedding",
    "head.weight": "head",
    "value_embeddings": "value_embeddings",
    "blocks.residual_lambda": "residual_lambda",
    "blocks.x0_lambda": "x0_lambda",
    "smear_gate": "smear_backout",
    "backout_lambda": "smear_backout",
    "blocks.q.weight": "muon",
    "blocks.value_gate": "muon",
    "blocks.mlp.down": "muon",
    "blocks.mlp.router.weight": "muon",
    "blocks.attention_mixing.residual": "mixing",
    "blocks.mlp_mixing.projection": "mixing",
    "blocks.q_norm.gain": "gain",
  }
  assert {name: found[name] for name in expected} == expected


def test_the_weight_decay_rule_gives_the_published_values():
  make = lambda aspect: nanochat(depth=32, aspect_ratio=aspect)
  assert optimizers.default_weight_decay(make(20), 2**20) == pytest.approx(0.0396, abs=1e-4)
  assert optimizers.default_weight_decay(make(64), 2**21) == pytest.approx(0.0368, abs=2e-4)


@pytest.mark.parametrize("name", ["nanochat", "qwen3_moe", "mhc_dynamic"])
def test_a_step_moves_every_parameter_downhill(name):
  model = random_model(configs()[name])
  optimizer = optimizers.muon_adamw(model.config, steps=10, batch_tokens=2**19)
  step = jax.jit(lambda m: optimizer.update(jax.tree.map(jnp.sign, m), optimizer.init(m), m)[0])
  updates = step(model)
  for update, value in zip(jax.tree.leaves(updates), jax.tree.leaves(model), strict=True):
    assert np.sum(np.asarray(update) * np.sign(np.asarray(value))) < 0


def test_optimizer_states_are_sharded_like_their_parameters():
  mesh = meshes.make_mesh({"fsdp": 2, "tensor": 4})
  model = random_model(configs()["nanochat"])
  optimizer = optimizers.muon_adamw(model.config, steps=10, batch_tokens=2**19)
  make = lambda m: optimizer.init(m)
  abstract = jax.eval_shape(make, model)
  placed = jax.jit(make, out_shardings=meshes.shardings(abstract, mesh))(model)
  momentum = placed.inner_states["muon"].inner_state.momentum.blocks.mlp.up.weight.get_value()
  assert momentum.sharding.spec == jax.sharding.PartitionSpec("layer", "fsdp", "tensor")


def test_adamw_warms_up_stays_and_cools_down_by_the_root():
  """Of a constant gradient Adam makes the rate: 10 % up, 1 - sqrt over the last 20 %; factors and decay by name."""
  params = {"a": {"weight": jnp.full((2,), 2.0)}, "b": {"gain": jnp.full((2,), 3.0)}}
  made = optimizers.adamw(
    1e-2,
    steps=40,
    factor=lambda name: 0.5 if name == "b.gain" else 1.0,
    decayed=lambda name: name.endswith("weight"),
    weight_decay=0.1,
  )
  update, state, seen = jax.jit(made.update), made.init(params), []
  for _ in range(40):
    moved, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    seen.append((-moved["a"]["weight"][0], -moved["b"]["gain"][0]))
  weight, gain = np.array(seen).T
  share = np.ones(40)
  share[:4] = np.arange(1, 5) / 4
  share[32:] = 1 - np.sqrt(np.arange(8) / 8)
  np.testing.assert_allclose(weight, 1e-2 * share * (1 + 0.1 * 2.0), rtol=1e-4)
  np.testing.assert_allclose(gain, 1e-2 * share * 0.5, rtol=1e-4)


def test_adam_rises_and_falls_in_lines_at_a_rate_by_name():
  params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
  made = optimizers.adam(1e-2, steps=20, warmup=4, factor=lambda name: 30.0 if name == "b" else 1.0)
  update, state, seen = jax.jit(made.update), made.init(params), []
  for _ in range(20):
    moved, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    seen.append((-moved["a"][0], -moved["b"][0]))
  rate = 1e-2 * np.minimum((np.arange(20) + 1) / 4, 1 - np.arange(20) / 20)
  np.testing.assert_allclose(np.array(seen), rate[:, None] * [1, 30], rtol=1e-4)
