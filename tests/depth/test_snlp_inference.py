"""Split networks: uncached steps, cached decoding and generation against the whole network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.depth import snlp
from jaxlab.depth.snlp_inference import decoder, empty_state, exact_step, from_cache, generate, prefill, split, step
from jaxlab.depth.snlp_suffix import fuse, parts
from jaxlab.kernels.decode_attention import decode_attention
from jaxlab.kernels.decode_block import decode_block
from jaxlab.kernels.residual_norm import residual_norm
from jaxlab.kernels.rotary_qkv import rotary_qkv
from jaxlab.models import inference
from jaxlab.models.generate import generate as plain_generate
from jaxlab.models.layers import Steps
from tests.common import INTERPRET, configs, plain_attention, random_model, random_tokens

CONFIGS = configs()
TOKENS = random_tokens(2, 140)  # past the short window of 128
PROMPT = 132


def decode(network, tokens, prompt, *, start=prefill, **options):
  """Logits of tokens prompt .. : one cached step each, after a prefill."""
  logits, state = jax.jit(lambda n, t: start(n, t, capacity=tokens.shape[1] + 3))(network, tokens[:, :prompt])
  one = jax.jit(lambda n, t, s: step(n, t, s, **options))
  rows = [logits[:, -1]]
  for i in range(prompt, tokens.shape[1]):
    logits, state = one(network, tokens[:, i : i + 1], state)
    rows.append(logits[:, -1])
  return jnp.stack(rows, axis=1)


@pytest.mark.parametrize("name, surrogate", [("nanochat", "scaled"), ("mhc", "streams"), ("qwen3", "identity")])
def test_an_uncached_step_is_the_forward(name, surrogate):
  model = random_model(CONFIGS[name])
  options = dict(iterations=2, surrogate=surrogate, initial="batch_fwd")
  expected = jax.jit(lambda m: snlp.forward(m, TOKENS, layers=4, **options))(model)
  actual, state = jax.jit(lambda n: step(n, TOKENS, **options))(split(model, 4))
  assert state is None
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["nanochat", "mhc", "mhc_dynamic", "qwen3", "qwen3_moe"])
def test_decoding_with_n_iterations_is_the_sequential_network(name):
  """Windows, value embeddings, hyper-connections, experts; 8 steps after a prompt longer than the window."""
  model = random_model(CONFIGS[name])
  expected = jax.jit(lambda m: m(TOKENS))(model)[:, PROMPT - 1 :]
  surrogate = "streams" if "mhc" in name else "identity"
  actual = decode(split(model, 4), TOKENS, PROMPT, iterations=4, surrogate=surrogate)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["nanochat", "qwen3"])
def test_parts_and_a_tail_are_exact_with_as_many_iterations_as_a_part_has_layers(name):
  """Cached, and uncached with fewer iterations as `snlp.forward` with the same groups and tail."""
  model = random_model(CONFIGS[name])
  network = split(model, parts(model, 4, groups=2, tail=1))
  expected = jax.jit(lambda m: m(TOKENS))(model)[:, PROMPT - 1 :]
  np.testing.assert_allclose(decode(network, TOKENS, PROMPT, iterations=2), expected, rtol=1e-3, atol=1e-3)
  how = dict(layers=4, groups=2, tail=1, iterations=1)
  expected = jax.jit(lambda m: snlp.forward(m, TOKENS[:, :9], **how))(model)
  actual, _ = jax.jit(lambda n: step(n, TOKENS[:, :9], iterations=1))(network)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_decoding_with_n_iterations_is_exact_in_float64_and_from_a_warm_start():
  with jax.enable_x64(True):
    model = random_model(CONFIGS["nanochat"], dtype="float64")
    tokens = random_tokens(1, 12)
    expected = jax.jit(lambda m: m(tokens, attention=plain_attention))(model)[:, 3:]
    begin = lambda n, t, capacity: prefill(n, t, capacity=capacity, attention=plain_attention)
    for initial in ("h0", "warm"):
      options = dict(start=begin, iterations=4, initial=initial, attention=plain_attention)
      np.testing.assert_allclose(decode(split(model, 4), tokens, 4, **options), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["nanochat", "mhc", "qwen3", "qwen3_moe"])
def test_a_split_network_without_a_suffix_is_the_model(name):
  """Layers apart, projections side by side and transposed."""
  model, tokens = random_model(CONFIGS[name]), TOKENS[:, :9]
  actual, _ = jax.jit(step)(split(model), tokens)
  np.testing.assert_allclose(actual, jax.jit(lambda m: m(tokens))(model), rtol=1e-4, atol=1e-4)


def test_without_a_suffix_a_step_is_the_plain_cached_step():
  model = random_model(CONFIGS["nanochat"])
  expected = jax.jit(lambda m: m(TOKENS))(model)[:, PROMPT - 1 :]
  np.testing.assert_allclose(decode(split(model), TOKENS, PROMPT), expected, rtol=1e-3, atol=1e-3)


def test_one_iteration_with_its_own_keys_is_the_uncached_forward():
  """K = 1 from h0 reads every token's keys at h_S, cached or not, if the prompt was prefilled by SNLP too."""
  model = random_model(CONFIGS["nanochat"])
  expected = jax.jit(lambda m: snlp.forward(m, TOKENS, layers=4, iterations=1))(model)[:, PROMPT - 1 :]
  options = dict(iterations=1, cache_kv="last_iteration")
  begin = lambda n, t, capacity: step(n, t, empty_state(n, batch=2, capacity=capacity), **options)
  actual = decode(split(model, 4), TOKENS, PROMPT, start=begin, **options)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_between_one_and_n_iterations_cached_and_uncached_differ():
  model = random_model(CONFIGS["nanochat"])
  uncached = jax.jit(lambda m: snlp.forward(m, TOKENS, layers=4, iterations=2))(model)[:, PROMPT:]
  cached = decode(split(model, 4), TOKENS, PROMPT, iterations=2)[:, 1:]
  gap = float(jnp.abs(cached - uncached).max())
  assert np.isfinite(gap) and gap > 1e-3


def test_a_fused_suffix_decodes_as_its_uncached_self():
  """K = units is the wide network run sequentially, whether its keys are cached or not."""
  model = random_model(CONFIGS["qwen3"])
  suffix = fuse(model, 4, chunk=2)
  expected = jax.jit(lambda m, s: snlp.forward(m, TOKENS, layers=s, iterations=2))(model, suffix)[:, PROMPT - 1 :]
  begin = lambda n, t, capacity: prefill(n, t, capacity=capacity, iterations=2)
  actual = decode(split(model, suffix), TOKENS, PROMPT, start=begin, iterations=2)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_a_cache_of_the_plain_model_goes_on_as_a_state():
  model = random_model(CONFIGS["nanochat"])
  network = split(model, 4)
  extend = jax.jit(lambda m, t, c: m.extend(t, c))
  _, cache = extend(model, TOKENS[:, :PROMPT], model.empty_cache(2, 150))
  expected, _ = extend(model, TOKENS[:, PROMPT:], cache)
  actual, state = jax.jit(exact_step)(network, TOKENS[:, PROMPT:], from_cache(network, cache))
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
  assert int(state.length) == 140


def test_generation_with_n_iterations_is_plain_generation():
  model, prompt = random_model(CONFIGS["nanochat"]), TOKENS[:, :5]
  expected = plain_generate(model, prompt, tokens=12)
  actual = jax.jit(lambda n: generate(n, prompt, tokens=12, iterations=4))(split(model, 4))
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(surrogate="exact"), "surrogate is 'exact'"),
    (dict(initial="warm"), "'warm' needs a state"),
    (dict(iterations=0), "iterations is 0"),
  ],
)
def test_impossible_steps_are_named(options, message):
  network = split(random_model(CONFIGS["qwen3"]), 4)
  with pytest.raises(InputError, match=message):
    step(network, TOKENS, **options)


@pytest.mark.parametrize("lengths", [None, (9, 4)])
def test_a_prefill_leaves_the_exact_trace_of_its_last_token(lengths):
  """What "warm" starts the next token from, also of a row with padding after it."""
  model = random_model(CONFIGS["nanochat"])
  trace = jax.jit(lambda m: m.trace(TOKENS[:, :9])[1])(model)
  given = None if lengths is None else jnp.array(lengths)
  _, state = jax.jit(lambda n: prefill(n, TOKENS[:, :9], given, capacity=12))(split(model, 4))
  for row, length in enumerate(lengths or (9, 9)):
    np.testing.assert_allclose(state.traces[0][:, row, 0], trace[2:, row, length - 1], rtol=1e-4, atol=1e-4)


def test_a_fused_suffix_generates_rows_of_any_lengths():
  """Each as if it were alone."""
  model = random_model(CONFIGS["qwen3"])
  network, options = split(model, fuse(model, 4, chunk=2)), dict(iterations=2, cache_kv="last_iteration")
  padded, lengths = jnp.where(jnp.arange(9) < jnp.array([[9], [4]]), TOKENS[:, :9], 63), jnp.array([9, 4])
  run = lambda prompt, lengths: plain_generate(network, prompt, lengths, tokens=6, decoder=decoder(**options))
  together = run(padded, lengths)
  for row, length in enumerate((9, 4)):
    np.testing.assert_array_equal(together[row], run(TOKENS[row : row + 1, :length], None)[0])


def test_a_network_without_a_suffix_takes_no_options():
  with pytest.raises(InputError, match="leave out iterations"):
    step(split(random_model(CONFIGS["qwen3"])), TOKENS, iterations=2)


@pytest.mark.parametrize("name", ["nanochat", "qwen3"])
def test_through_the_kernels_n_iterations_are_the_sequential_network(name, monkeypatch):
  """Uncached, and cached with a short prompt; interpreted, as there is no GPU here.

  Four layers: long and short windows, with and without value embeddings, and those on both sides of the split.
  """
  kernel = dict(implementation="triton", interpret=INTERPRET)
  steps = Steps(*(functools.partial(f, **kernel) for f in (rotary_qkv, residual_norm, decode_attention)))
  monkeypatch.setattr(inference, "kernel_steps", lambda *_: steps)
  model = random_model(dataclasses.replace(CONFIGS[name], width=64, depth=4))
  network, tokens = split(model, 2), TOKENS[:1, :8]
  expected = jax.jit(lambda m: m(tokens))(model)
  actual, _ = jax.jit(lambda n: step(n, tokens, iterations=2))(network)
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(decode(network, tokens, 6, iterations=2), expected[:, 5:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 2])
def test_one_token_through_the_kernels_of_whole_blocks(chunk, monkeypatch):
  """Of a plain and of a fused suffix, which are what XLA makes of them."""
  model = random_model(dataclasses.replace(CONFIGS["qwen3"], head_dim=32, depth=4))
  suffix, tokens = fuse(model, 2, chunk=2) if chunk == 2 else 2, TOKENS[:1, :8]
  expected = decode(split(model, suffix), tokens, 6, iterations=1)
  steps = Steps(whole=functools.partial(decode_block, implementation="triton", interpret=INTERPRET))
  monkeypatch.setattr(inference, "kernel_steps", lambda *_: steps)
  np.testing.assert_allclose(decode(split(model, suffix), tokens, 6, iterations=1), expected, rtol=1e-4, atol=1e-4)
