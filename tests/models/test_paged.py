import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import generate, inference, paged
from jaxlab.models.attention import dot_product_attention
from tests.common import configs, random_model, random_tokens

LENGTHS = np.array([13, 1, 22])


@functools.cache
def network(name):
  """Two layers, one of a short window."""
  config = dataclasses.replace(configs()[name], depth=2, layer_windows=(5, None))
  return jax.jit(inference.take_apart)(random_model(config))


@functools.partial(jax.jit, static_argnames=("chunk", "page", "capacity"))
def read(network, prompts, lengths, chunk, page=4, capacity=32):
  return paged.prefill(network, prompts, lengths, capacity=capacity, chunk=chunk, page=page)


@pytest.mark.parametrize("name, chunk", [("nanochat", 4), ("nanochat", 24), ("mhc", 8), ("qwen3", 8)])
def test_any_chunk_gives_the_logits_of_one_prefill(name, chunk):
  """Rows of different lengths, with smearing, windows and streams; then tokens one by one."""
  net, prompts = network(name), random_tokens(3, 22)
  expected, dense = jax.jit(functools.partial(inference.prefill, capacity=32))(net, prompts, LENGTHS)
  logits, state = read(net, prompts, LENGTHS, chunk)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  steps = jax.jit(inference.step), jax.jit(paged.step)
  for token in random_tokens(3, 3, seed=1).T:
    expected, dense = steps[0](net, token[:, None], dense)
    logits, state = steps[1](net, token[:, None], state)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_generation_is_that_of_the_plain_cache():
  net, prompts = network("nanochat"), random_tokens(3, 22)
  expected = generate(net, prompts, LENGTHS, tokens=6)
  for chunk, page in (8, 4), (64, 16):
    found = generate(net, prompts, LENGTHS, tokens=6, decoder=paged.decoder(chunk=chunk, page=page))
    np.testing.assert_array_equal(found, expected)


def test_one_program_reads_prompts_of_any_length_and_no_chunk_too_many():
  net, prompts = network("qwen3"), random_tokens(2, 24)
  read.clear_cache()
  for lengths in ([3, 1], [24, 9]):
    _, state = read(net, prompts, np.array(lengths), 4, capacity=24)
    filled = np.abs(np.asarray(state.pools[0][0], float)).reshape(2, 2, 24, -1).max((0, 1, 3)) > 0
    np.testing.assert_array_equal(filled, np.arange(24) < -(-max(lengths) // 4) * 4)
  assert read._cache_size() == 1


def problem(*, time=3, page=4, pages=6, heads=(4, 2)):
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (2, time, heads[0], 8))
  pool = [jax.random.normal(key, (heads[1], 2 * pages, page, 8)) for key in keys[1:3]]
  table = jax.random.permutation(keys[3], 2 * pages).reshape(2, pages)
  return q, pool, table


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("keys", [4, 8, 512])
def test_attention_reads_pages_by_the_table_and_nothing_past_the_rows(window, keys, monkeypatch):
  """In groups of one page, of two and of all; what lies past a row's last token is poison."""
  monkeypatch.setattr(paged, "_KEYS", keys)
  q, pool, table = problem()
  start = jnp.array([19, 4])
  rows = [jnp.moveaxis(a[:, table].reshape(2, 2, 24, 8), 0, 2) for a in pool]
  expected = dot_product_attention(q, *rows, window=window, start=start)
  place = jnp.arange(24).reshape(6, 4)
  past = jnp.zeros((12, 4), bool).at[table].set(place[None] >= (start + 3)[:, None, None])
  poisoned = [jnp.where(past[None, :, :, None], jnp.nan, a) for a in pool]
  out, total = paged.attend_pages(q, *poisoned, table, start=start, window=window)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
  score = jnp.einsum("btkgd,bskd->btkgs", q.reshape(2, 3, 2, 2, 8), rows[0]) / 8**0.5
  query = (start[:, None] + jnp.arange(3))[:, :, None, None, None]
  see = (jnp.arange(24) <= query) & (jnp.arange(24) >= query - (99 if window is None else window))
  wanted = jax.nn.logsumexp(jnp.where(see, score, -jnp.inf), axis=-1).reshape(2, 3, 4)
  np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", [4, 512])
def test_an_entry_counts_for_as_many_tokens_as_its_size_says(keys, monkeypatch):
  """As if it stood there that often; 0: not at all. Read a page at a time, and all at once."""
  monkeypatch.setattr(paged, "_KEYS", keys)
  rng, count = np.random.default_rng(0), np.array([1, 3, 2, 0, 1, 1, 4, 1])
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  pool, q, table = [make(2, 6, 4, 8) for _ in range(2)], make(1, 1, 4, 8), jnp.array([[5, 2]])
  sizes = np.zeros((2, 6, 4), np.float32)
  sizes[:, [5, 2]] = count.reshape(2, 4)
  out, total = paged.attend_pages(q, *pool, table, start=7, sizes=jnp.asarray(sizes))
  k, v = (np.repeat(paged.rows(a, table), count, axis=2) for a in pool)
  plain = dot_product_attention(q, *(np.swapaxes(a, 1, 2) for a in (k, v)), start=count.sum() - 1)
  np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-5)
  score = np.einsum("kgd,knd->kgn", q.reshape(2, 2, 8), k[0]) / 8**0.5
  np.testing.assert_allclose(total.reshape(2, 2), jax.nn.logsumexp(score, axis=-1), rtol=1e-5)


def test_no_score_matrix_of_the_whole_context_is_kept():
  q, pool, table = problem(time=64, page=64, pages=64)
  lowered = jax.jit(functools.partial(paged.attend_pages, start=4032)).lower(q, *pool, table)
  assert lowered.compile().memory_analysis().temp_size_in_bytes < q.shape[0] * 4 * 64 * 4096 * 4 / 2


def test_a_method_sees_every_layer_and_hands_over_to_another_for_decoding():
  """The first counts the tokens it reads, the second starts from what `ready` makes of the prompt."""

  def attend(q, k, v, view, memory):
    out, _ = paged.attend_densely(q, k, v, view, memory)
    return out, memory.at[view.layer].add(q.shape[1] * (view.x.shape[-1] == 32))

  empty = lambda config, **sizes: jnp.zeros(config.depth, jnp.int32)
  first = paged.Method(attend, empty)
  ready = lambda network, state, time: dataclasses.replace(state, memory=state.memory + 100 * time)
  second = paged.Method(attend, empty, ready)
  net, prompts = network("qwen3"), random_tokens(2, 10)
  alone = paged.prefill(net, prompts, capacity=16, chunk=4, page=4, method=first)[1]
  np.testing.assert_array_equal(alone.memory, 12)
  state = paged.prefill(net, prompts, capacity=16, chunk=4, page=4, method=first, after=second)[1]
  np.testing.assert_array_equal(paged.step(net, prompts[:, :1], state, method=second)[1].memory, 1001)
  both = paged.decoder(first, decode=second, chunk=4, page=4)
  np.testing.assert_array_equal(generate(net, prompts, tokens=4, decoder=both), generate(net, prompts, tokens=4))


def test_wrong_sizes_are_named():
  with pytest.raises(InputError, match=r"page.*64.*chunk.*100"):
    paged.decoder(chunk=100)
  with pytest.raises(InputError, match="chunk is 0"):
    paged.decoder(chunk=0)
  with pytest.raises(InputError, match="the prompt has 9 tokens, the cache room for 8"):
    paged.prefill(network("qwen3"), random_tokens(1, 9), capacity=8)


def test_a_token_beyond_the_pages_is_refused():
  net = jax.jit(inference.take_apart)(random_model(configs()["qwen3"]))
  prompt = random_tokens(1, 8)
  _, state = paged.prefill(net, prompt, capacity=8, chunk=4, page=4)
  with pytest.raises(InputError, match="9 tokens do not fit into pages for 8; give more capacity"):
    paged.step(net, prompt[:, :1], state)
