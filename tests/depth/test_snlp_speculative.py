"""Speculation changes the time, never the output."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.depth.snlp_inference import split
from jaxlab.depth.snlp_speculative import speculate
from jaxlab.models.generate import generate
from tests.common import configs, random_model, random_tokens

CONFIGS = configs()
PROMPT = random_tokens(1, 9)


@pytest.mark.parametrize("name, draft", [("nanochat", 3), ("nanochat", 1), ("mhc", 4)])
def test_greedy_speculation_is_greedy_decoding(name, draft):
  model = random_model(CONFIGS[name])
  expected = generate(model, PROMPT, tokens=24)
  surrogate = "streams" if name == "mhc" else "identity"
  go = jax.jit(lambda n: speculate(n, PROMPT, tokens=24, draft=draft, iterations=1, surrogate=surrogate))
  actual, statistics = go(split(model, 4))
  np.testing.assert_array_equal(actual, expected)
  assert 24 <= 1 + int(statistics.accepted) + int(statistics.cycles) <= 24 + draft
  if name == "nanochat":
    assert int(statistics.accepted) < draft * int(statistics.cycles)  # this drafter errs


def test_an_exact_drafter_is_always_accepted():
  model = random_model(CONFIGS["qwen3"])
  go = jax.jit(lambda n: speculate(n, PROMPT, tokens=21, draft=4, iterations=3))
  actual, statistics = go(split(model, 3))
  np.testing.assert_array_equal(actual, generate(model, PROMPT, tokens=21))
  assert int(statistics.cycles) == 4 and int(statistics.accepted) == 16


def test_sampled_speculation_has_the_sequential_distribution():
  """Chi-square over all outcomes of three tokens; drafts are often rejected."""
  config = dataclasses.replace(CONFIGS["qwen3"], vocab_size=4, depth=3)
  model, prompt = random_model(config), random_tokens(1, 5, vocab=4)
  network, runs, temperature = split(model, 2), 20000, 0.7
  draw = lambda key: speculate(network, prompt, tokens=3, draft=2, key=key, temperature=temperature, iterations=1)
  tokens, statistics = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), runs))
  assert 0.1 < float(statistics.accepted.sum() / (2 * statistics.cycles.sum())) < 0.95
  every = jnp.stack(jnp.meshgrid(*[jnp.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
  rows = jnp.concatenate([jnp.repeat(prompt, 64, 0), every], axis=1)
  p = jax.nn.softmax(jax.jit(lambda m: m(rows))(model)[:, 4:7] / temperature, axis=-1)
  expected = np.asarray(jnp.take_along_axis(p, every[..., None], -1)[..., 0].prod(axis=1)) * runs
  seen = np.bincount(np.asarray(tokens[:, 0] @ jnp.array([16, 4, 1])), minlength=64)
  chi_square = ((seen - expected) ** 2 / expected).sum()
  assert expected.min() > 1 and chi_square < 110.0  # 63 degrees of freedom: p = 2e-4


def test_impossible_requests_are_named():
  model = random_model(CONFIGS["qwen3"])
  with pytest.raises(InputError, match="2 rows"):
    speculate(split(model, 3), random_tokens(2, 4), tokens=4, draft=2)
  with pytest.raises(InputError, match="plain suffix"):
    speculate(split(model), PROMPT, tokens=4, draft=2)
  with pytest.raises(InputError, match="draft is 0"):
    speculate(split(model, 3), PROMPT, tokens=4, draft=0)
  with pytest.raises(InputError, match="needs a key"):
    speculate(split(model, 3), PROMPT, tokens=4, draft=2, temperature=1.0)
