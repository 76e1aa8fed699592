import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.models import generate
from jaxlab.models.generate import sample
from tests.common import configs, random_model, random_tokens

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))


def frequencies(**options):
  draw = jax.jit(jax.vmap(lambda key: sample(LOGITS, key, **options)[0]))
  return np.bincount(draw(jax.random.split(jax.random.key(0), 20_000)), minlength=4) / 20_000


@pytest.mark.parametrize(
  "options, expected",
  [
    (dict(temperature=1.0), [0.5, 0.25, 0.15, 0.1]),
    (dict(temperature=0.0), [1, 0, 0, 0]),
    (dict(temperature=1e-40), [1, 0, 0, 0]),  # denormal: logits over it are no numbers
    (dict(temperature=2e-5), [1, 0, 0, 0]),
    (dict(temperature=0.5), np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
    (dict(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
    (dict(temperature=1.0, top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
    (dict(temperature=1.0, top_p=0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
    (dict(temperature=1.0, top_p=1e-9), [1, 0, 0, 0]),
    (dict(temperature=1.0, top_k=3, top_p=0.5), [1, 0, 0, 0]),
  ],
)
def test_sampling_draws_from_the_stated_distribution(options, expected):
  np.testing.assert_allclose(frequencies(**options), expected, atol=0.015)


@given(st.integers(0, 1000), st.integers(1, 8))
def test_top_k_never_leaves_the_largest(seed, k):
  logits = jax.random.normal(jax.random.key(seed), (3, 8))
  token = sample(logits, jax.random.key(seed + 1), temperature=2.0, top_k=k)
  rank = (logits > jnp.take_along_axis(logits, token[:, None], 1)).sum(1)
  assert int(rank.max()) < k


@pytest.mark.parametrize("name", ["nanochat", "qwen3"])
def test_greedy_generation_is_the_argmax_of_the_full_forward(name):
  model, prompt = random_model(configs()[name]), random_tokens(2, 7)
  out = generate(model, prompt, tokens=6)
  logits = jax.jit(lambda m, t: m(t))(model, jnp.concatenate([prompt, out], axis=1))
  np.testing.assert_array_equal(out, jnp.argmax(logits[:, 6:-1], axis=-1))


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(temperature=-0.5), "temperature is -0.5"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(temperature=float("inf")), "temperature is inf"),
    (dict(top_k=0), "top_k is 0"),
    (dict(temperature=1.0, top_k=-1), "top_k is -1"),
    (dict(top_p=0.0), "top_p is 0.0"),
    (dict(temperature=1.0, top_p=1.01), "top_p is 1.01"),
    (dict(top_p=float("nan")), "top_p is nan"),
  ],
)
def test_sampling_out_of_range_is_refused(options, message):
  with pytest.raises(InputError, match=message):
    sample(LOGITS, jax.random.key(0), **options)


def test_sampling_depends_on_the_key_alone():
  model, prompt = random_model(configs()["qwen3"]), random_tokens(1, 3)
  run = lambda seed: generate(model, prompt, tokens=12, key=jax.random.key(seed), temperature=1.5)
  np.testing.assert_array_equal(run(1), run(1))
  assert not np.array_equal(run(1), run(2))


def test_impossible_requests_are_named():
  model = random_model(configs()["qwen3"])
  for prompt, options, message in [
    (jnp.zeros((1, 0), jnp.int32), dict(tokens=1), "time >= 1"),
    (random_tokens(1, 3), dict(tokens=0), "tokens is 0"),
    (random_tokens(1, 3), dict(tokens=1, temperature=1.0), "needs a key"),
  ]:
    with pytest.raises(InputError, match=message):
      generate(model, prompt, **options)
