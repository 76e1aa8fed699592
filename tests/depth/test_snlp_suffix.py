"""Fused layers and groups of layers against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.depth import snlp
from jaxlab.depth.snlp_suffix import evaluate, fuse, plain
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.block import layer_slice
from jaxlab.models.config import HyperConnections, nanochat
from tests.common import CLOSE, configs, plain_attention, random_model, random_tokens

CHAT = dict(depth=6, aspect_ratio=8, head_dim=16, vocab_size=64, context=512, value_embeddings=False)
CONFIGS = configs() | {
  "windows": nanochat(**CHAT, x0=False),
  "lambdas": nanochat(**CHAT),
  "mhc_plain": nanochat(**CHAT, hyper=HyperConnections()),
}
TOKENS = random_tokens(1, 150)  # longer than the short window of 128


def forward(model, **options):
  return jax.jit(lambda m: snlp.hidden(m, TOKENS, **options)[0])(model)


def fused(model, layers, chunk, **options):
  suffix = fuse(model, layers, chunk=chunk)
  return jax.jit(lambda m, s: snlp.hidden(m, TOKENS, layers=s, **options)[0])(model, suffix)


@pytest.mark.parametrize("name", ["windows", "qwen3"])
def test_without_mlps_a_wide_layer_is_one_newton_step(name, dtype):
  model, options = random_model(CONFIGS[name], dtype=dtype), dict(iterations=1, attention=plain_attention)
  by_layer = jax.jit(lambda m: snlp.hidden(m, TOKENS, layers=4, **options)[0])
  wide = jax.jit(lambda m: snlp.hidden(m, TOKENS, layers=fuse(m, 4, chunk=4), **options)[0])
  assert float(jnp.abs(wide(model) - by_layer(model)).max()) > 1e-2
  down = model.blocks.mlp.down.weight
  down.set_value(jnp.zeros_like(down[...]))
  np.testing.assert_allclose(wide(model), by_layer(model), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("name, surrogate", [("lambdas", "scaled"), ("mhc_plain", "streams"), ("qwen3", "identity")])
def test_wide_layers_of_one_are_the_layers(name, surrogate):
  model = random_model(CONFIGS[name])
  options = dict(iterations=2, surrogate=surrogate)
  np.testing.assert_allclose(fused(model, 4, 1, **options), forward(model, layers=4, **options), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("average", [False, True])
def test_a_wide_layer_is_its_formula(average):
  """y = x + sum_i Attention_i(norm_i(x)), F = y + sum_i MLP_i(norm_i(y)); both sums over M with `average`."""
  model = random_model(CONFIGS["qwen3"])
  _, trace, side = jax.jit(lambda m: m.trace(TOKENS))(model)
  x = trace[1]
  layers = [jax.tree.map(lambda a: a[0], layer_slice(model.blocks, i, i + 1)) for i in (2, 3, 4, 5)]

  def wide(x, pair):
    attended = []
    for layer in pair:
      _, _, q, k, v = layer.project(x, side, None, None)
      attended.append(layer.o(dot_product_attention(q, k, v).reshape(*x.shape[:2], -1)))
    y = x + sum(attended) / (2 if average else 1)
    return y + sum(layer.mlp(layer.mlp_norm(y)) for layer in pair) / (2 if average else 1)

  states = jnp.stack([x, 0.5 * x])
  actual = evaluate(model, fuse(model, 4, chunk=2, average=average), states, side)[0]
  expected = jnp.stack([wide(states[0], layers[:2]), wide(states[1], layers[2:])])
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_mixing_and_lambdas_of_a_wide_layer_are_means():
  model = random_model(CONFIGS["lambdas"])
  means = model.blocks.residual_lambda[...][2:].reshape(2, 2).mean(1)
  np.testing.assert_allclose(fuse(model, 4, chunk=2).blocks.residual_lambda[...], means, rtol=1e-6)
  model = random_model(CONFIGS["mhc_plain"])
  _, side, _ = model.embed(TOKENS[:, :4])
  mlp, attention = (side.mixing[2][2:, i].reshape(2, 2, 4, 4).mean(1) for i in (1, 0))
  actual = snlp.stream_transition(side, fuse(model, 4, chunk=2))
  np.testing.assert_allclose(actual, mlp @ attention, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups, iterations", [(4, 1), (2, 2)])
def test_groups_solved_exactly_are_the_network(groups, iterations):
  """Each of C groups of M layers is exact after M steps; M = 1 is the sequential suffix itself."""
  model = random_model(CONFIGS["nanochat"])
  actual = forward(model, layers=4, groups=groups, iterations=iterations)
  np.testing.assert_allclose(actual, jax.jit(lambda m: m.hidden(TOKENS)[0])(model), rtol=1e-4, atol=2e-4)


def test_pairs_in_a_row_add_the_branches_of_one_input():
  """Groups of two, K = 1: consecutive pairs read the same input and their updates are added."""
  model = random_model(CONFIGS["qwen3"])
  x, side, _ = model.embed(TOKENS)
  for start in (0, 2, 4):
    h = x
    for i in (start, start + 1):
      part = plain(model, 1, stop=i + 1)
      x = x + evaluate(model, part, h[None], side)[0][0] - h
  actual = forward(model, layers=6, groups=3, iterations=1)
  np.testing.assert_allclose(actual, x, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("qwen3", dict(layers=4, chunk=3), "chunk=3 must divide layers"),
    ("qwen3", dict(layers=4, chunk=0), "chunk is 0"),
    ("qwen3", dict(layers=9, chunk=3), "is 9; it must lie in 1..6"),
    ("qwen3_moe", dict(layers=4, chunk=2), "experts cannot be fused"),
    ("mhc_dynamic", dict(layers=4, chunk=2), "dynamic hyper-connections cannot be fused"),
  ],
)
def test_impossible_fusions_are_named(name, options, message):
  with pytest.raises(InputError, match=message):
    fuse(random_model(CONFIGS[name]), **options)


def test_groups_must_divide_plain_layers():
  model = random_model(CONFIGS["qwen3"])
  with pytest.raises(InputError, match="divide"):
    snlp.forward(model, TOKENS, layers=4, groups=3, iterations=1)
  with pytest.raises(InputError, match="solved in one"):
    snlp.forward(model, TOKENS, layers=fuse(model, 4, chunk=2), groups=2, iterations=1)
  with pytest.raises(InputError, match="stacked blocks, not dict"):
    snlp.forward({}, TOKENS, layers=2, iterations=1)
