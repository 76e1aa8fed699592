import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.kernels.decode_attention import decode_attention
from jaxlab.kernels.decode_block import decode_block
from jaxlab.kernels.residual_norm import residual_norm
from jaxlab.kernels.rotary_qkv import rotary_qkv
from jaxlab.models import generate, inference
from jaxlab.models.generate import complete, pad, sample, stream
from jaxlab.models.inference import take_apart
from jaxlab.models.layers import Steps
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
    (dict(temperature=1.0, min_p=0.49), [2 / 3, 1 / 3, 0, 0]),
    (dict(temperature=1.0, min_p=1.0), [1, 0, 0, 0]),
    (dict(temperature=1.0, min_p=0.25, top_k=3), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
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
    (dict(temperature=1.0, min_p=0.0), "min_p is 0.0"),
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


@pytest.mark.parametrize("name", ["nanochat", "mhc", "qwen3_moe"])
def test_rows_of_any_lengths_are_as_if_alone(name):
  """Prompts shorter and longer than the window of 128: smear, value embeddings, windows, streams, experts."""
  model = random_model(configs()[name])
  network = take_apart(model)
  prompts = [np.asarray(random_tokens(1, n, seed=n)[0]).tolist() for n in (1, 137)]
  options = dict(tokens=11, stretch=4)
  together = complete(network, prompts, **options)
  for prompt, row in zip(prompts, together, strict=True):
    alone = generate(model, jnp.array([prompt]), tokens=11)
    assert row.tokens == alone[0].tolist()
  padded, lengths = pad(prompts)
  padded[np.arange(padded.shape[1]) >= lengths[:, None]] = 63  # padding may be any token
  rows = generate(network, padded, lengths, tokens=11)
  assert rows.tolist() == [row.tokens for row in together]


def test_logprobs_are_those_of_the_full_forward():
  """Of the tokens sampling chose, before temperature and top_k."""
  model, prompts = random_model(configs()["nanochat"]), [[5, 9, 2], [7]]
  rows = complete(model, prompts, tokens=6, temperature=3.0, top_k=5, key=jax.random.key(3))
  for prompt, row in zip(prompts, rows, strict=True):
    logprobs = jax.nn.log_softmax(model(jnp.array([prompt + row.tokens]))[0, len(prompt) - 1 : -1])
    expected = jnp.take_along_axis(logprobs, jnp.array(row.tokens)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(row.logprobs, expected, atol=1e-4)
    assert len(row.tokens) == 6


def test_a_stream_depends_on_neither_its_stretch_nor_what_jit_surrounds_it():
  model, options = random_model(configs()["qwen3"]), dict(tokens=9, temperature=2.0, top_p=0.9, key=jax.random.key(4))
  prompts = np.asarray(random_tokens(2, 16))
  sizes, rows = [], []
  for stretch in (1, 3, 8):
    pieces = list(stream(model, prompts.tolist(), stretch=stretch, **options))
    sizes.append([len(piece[0].tokens) for piece in pieces])
    rows.append([[token for piece in pieces for token in piece[i].tokens] for i in range(2)])
  assert sizes == [[1] * 9, [1, 3, 3, 2], [1, 8]]
  assert rows[0] == rows[1] == rows[2] == generate(model, prompts, **options).tolist()
  jitted = jax.jit(lambda m, p: generate(m, p, **options))
  assert rows[0] == jitted(model, prompts).tolist()


def test_a_row_ends_with_its_stop_token_and_the_stream_with_the_last_row():
  model, prompts = random_model(configs()["qwen3"]), [[3, 1], [4, 1, 5]]
  whole = [row.tokens for row in complete(model, prompts, tokens=40)]
  stop = whole[0][5], whole[1][2]
  ends = [next(i for i, token in enumerate(row) if token in stop) + 1 for row in whole]
  pieces = list(stream(model, prompts, tokens=40, stop=stop, stretch=2))
  rows = [[token for piece in pieces for token in piece[i].tokens] for i in range(2)]
  assert rows == [row[:end] for row, end in zip(whole, ends, strict=True)]
  assert len(pieces) == 1 + -(-(max(ends) - 1) // 2)


@pytest.mark.parametrize("name", ["nanochat", "qwen3"])
def test_rows_of_any_lengths_through_the_kernels(name, monkeypatch):
  """Interpreted, as there is no GPU here."""
  kernel = dict(implementation="triton", interpret=True)
  steps = Steps(*(functools.partial(f, **kernel) for f in (rotary_qkv, residual_norm, decode_attention)))
  model = random_model(dataclasses.replace(configs()[name], width=64, depth=4))
  prompt, lengths = random_tokens(2, 6), jnp.array([6, 3])
  expected = generate(model, prompt, lengths, tokens=3)
  monkeypatch.setattr(inference, "kernel_steps", lambda *_: steps)
  found = generate(jax.jit(inference.take_apart)(model), prompt, lengths, tokens=3)
  np.testing.assert_array_equal(found, expected)


def test_one_row_through_the_kernels_of_whole_blocks(monkeypatch):
  steps = Steps(whole=functools.partial(decode_block, implementation="triton", interpret=True))
  model = random_model(dataclasses.replace(configs()["qwen3"], head_dim=32, depth=2))
  prompt, lengths = random_tokens(1, 6), jnp.array([4])
  expected = generate(model, prompt, lengths, tokens=4)
  monkeypatch.setattr(inference, "kernel_steps", lambda *_: steps)
  found = generate(jax.jit(inference.take_apart)(model), prompt, lengths, tokens=4)
  np.testing.assert_array_equal(found, expected)


def test_impossible_requests_are_named():
  model = random_model(configs()["qwen3"])
  with pytest.raises(InputError, match="a prompt is empty"):
    stream(model, [[1], []], tokens=1)
  with pytest.raises(InputError, match=r"the tokens have ids 0\.\.64, the model 0\.\.63"):
    stream(model, [[1], [64]], tokens=1)
  for lengths, message in ([1], "lengths has shape"), ([0, 3], r"must lie in 1\.\.3"), ([1, 4], r"must lie in 1\.\.3"):
    with pytest.raises(InputError, match=message):
      generate(model, random_tokens(2, 3), jnp.array(lengths), tokens=1)
  with pytest.raises(InputError, match="stretch is 0"):
    stream(model, [[1]], tokens=1, stretch=0)
  for prompt, options, message in [
    (jnp.zeros((1, 0), jnp.int32), dict(tokens=1), "time >= 1"),
    (random_tokens(1, 3), dict(tokens=0), "tokens is 0"),
    (random_tokens(1, 3), dict(tokens=1, temperature=1.0), "needs a key"),
  ]:
    with pytest.raises(InputError, match=message):
      generate(model, prompt, **options)
