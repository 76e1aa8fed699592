"""Methods by name: the same network for scoring and for generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.attention.chunkllm_chunks import ChunkAdapters
from jaxlab.attention.compact_attention import compact
from jaxlab.attention.dhsa_boundaries import BoundaryPredictor
from jaxlab.attention.seer_gate import SeerGate
from jaxlab.attention.selection import flash_prefill
from jaxlab.cache.chelsea import chelsea
from jaxlab.core import modules
from jaxlab.core.checks import InputError
from jaxlab.depth import snlp
from jaxlab.evaluation.long_context import continuation_scores
from jaxlab.evaluation.methods import PAGED, plain, subject
from jaxlab.models import generate, paged
from tests.common import configs, plain_attention, random_model, random_tokens, start, wait

TOKENS = random_tokens(2, 9)


@pytest.fixture(scope="module")
def model():
  return random_model(configs()["qwen3"])


def test_without_a_method_the_model_is_what_it_is(model):
  network, logits, decoder = subject(model)
  np.testing.assert_allclose(jax.jit(logits)(network, TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
  assert generate(network, TOKENS, tokens=5, decoder=decoder).tolist() == generate(model, TOKENS, tokens=5).tolist()


@pytest.mark.parametrize("iterations, exact", [(1, False), (3, True)])
def test_snlp_is_its_forward_and_with_as_many_steps_as_layers_the_model(model, iterations, exact):
  network, logits, decoder = subject(model, "snlp", layers=3, iterations=iterations, surrogate="jacobi")
  expected = snlp.forward(model, TOKENS, layers=3, iterations=iterations, surrogate="jacobi")
  np.testing.assert_allclose(jax.jit(logits)(network, TOKENS), expected, rtol=1e-4, atol=2e-4)
  tokens = [generate(network, TOKENS, tokens=8, decoder=decoder), generate(model, TOKENS, tokens=8)]
  assert exact == np.array_equal(*tokens)


def test_an_attention_function_takes_part_in_scores_and_generation(model):
  def nearest(q, k, v, *, window, start):
    return plain_attention(q, k, v, window=1, start=start)

  network, logits, decoder = plain(model, nearest)
  expected = model(TOKENS, attention=nearest)
  assert float(jnp.abs(expected - model(TOKENS)).max()) > 0.1
  np.testing.assert_allclose(jax.jit(logits)(network, TOKENS), expected, rtol=1e-4, atol=1e-4)
  out = generate(network, TOKENS, tokens=4, decoder=decoder)
  whole = model(jnp.concatenate([TOKENS, out], axis=1), attention=nearest)
  np.testing.assert_array_equal(out, jnp.argmax(whole[:, 8:-1], axis=-1))


FULL = {  # what makes every method the model
  "dense": {},
  "compact_attention": dict(alpha=0.0),
  "quoka": dict(queries=1.0, budget=1.0),
  "dhsa": dict(budget=256),
  "sliding_window": dict(budget=256),
  **{name: dict(keep=1.0, slide=False) for name in ("streaming_llm", "h2o")},
  **{name: dict(keep=1.0) for name in ("chelsea", "snapkv", "pyramidkv", "keydiff")},
}
LENGTHS = np.array([9, 6])


@pytest.mark.parametrize("name", PAGED)
def test_methods_of_a_paged_cache_by_name(model, name):
  """At its full budget each gives the model's tokens, rows of different lengths."""
  network, logits, decoder = subject(model, name, page=4, prefill_chunk=8, **FULL[name])
  assert logits is None
  expected = generate(model, TOKENS, LENGTHS, tokens=4)
  assert generate(network, TOKENS, LENGTHS, tokens=4, decoder=decoder).tolist() == expected.tolist()


def test_a_prompt_over_several_devices_by_name(model):
  network, logits, decoder = subject(model, "sequence", devices=2, page=4, prefill_chunk=8)
  assert logits is None
  expected = generate(model, TOKENS, LENGTHS, tokens=4)
  assert generate(network, TOKENS, LENGTHS, tokens=4, decoder=decoder).tolist() == expected.tolist()


def test_scores_behind_prompts_of_different_lengths(model):
  network, _, decoder = subject(model, "dense", page=4, prefill_chunk=8)
  following = random_tokens(2, 4)
  found, likeliest = continuation_scores(network, TOKENS, LENGTHS, following, decoder=decoder)
  for i, length in enumerate(LENGTHS):
    whole = jnp.concatenate([TOKENS[i, :length], following[i]])
    logp = jax.nn.log_softmax(model(whole[None]))[0, length - 1 : -1]
    np.testing.assert_allclose(found[i], jnp.take_along_axis(logp, following[i][:, None], axis=1)[:, 0], atol=2e-4)
    np.testing.assert_array_equal(likeliest[i], logp.argmax(axis=-1) == following[i])


def test_one_method_reads_the_prompt_and_another_goes_on(model):
  """CompactAttention's prefill and Chelsea's cache, by name: the tokens of the two methods put together in Python."""
  prompts = random_tokens(1, 32)
  options = dict(select="flash_prefill", alpha=0.9, sink=1, window=1, page=4, prefill_chunk=8)
  merging = dict(keep=0.5, recent=4, chunk=4)
  network, _, decoder = subject(model, "compact_attention", decode="chelsea", **merging, **options)
  select = functools.partial(flash_prefill, alpha=0.9, sink=1, window=1)
  by_hand = paged.decoder(compact(select), decode=chelsea(sink=1, **merging), chunk=8, page=4)
  score = lambda decoder: continuation_scores(network, prompts[:, :24], None, prompts[:, 24:], decoder=decoder)[0]
  np.testing.assert_array_equal(score(decoder), score(by_hand))


@pytest.mark.parametrize(
  "made, sizes, name, options",
  [
    (ChunkAdapters, dict(hidden=8, size=4), "chunkllm", dict(adapters="{}", keep=1.0, min_chunk=2)),
    (BoundaryPredictor, dict(half=2, hidden=8), "dhsa", dict(predictor="{}", budget=256)),
    (SeerGate, dict(width=8), "compact_attention", dict(select="seer", gate="{}", tau=0.0)),
  ],
)
def test_methods_with_trained_parts_by_the_files_that_hold_them(model, tmp_path, made, sizes, name, options):
  """At full budget the model's tokens; an option that says so reaches the module: other sizes are its file's."""
  part = made(model.config, jax.random.key(3), **sizes)
  modules.save(tmp_path / "part.npz", part, sizes)
  options = {key: value.format(tmp_path / "part.npz") if value == "{}" else value for key, value in options.items()}
  network, logits, decoder = subject(model, name, page=4, prefill_chunk=8, **options)
  assert logits is None
  found = generate(network, TOKENS, LENGTHS, tokens=4, decoder=decoder)
  assert found.tolist() == generate(model, TOKENS, LENGTHS, tokens=4).tolist()


@pytest.mark.parametrize(
  "method, options, message",
  [
    ("snap", {}, "method is 'snap'; it must be one of snlp"),
    ("h2o", dict(rate=1), "an option of method h2o is 'rate'; it must be one of prefill_chunk, page, "),
    ("dense", dict(decode="snap"), "decode is 'snap'; it must be one of dense, "),
    ("compact_attention", dict(select="best"), "select is 'best'; it must be one of flash_prefill"),
    ("compact_attention", dict(real=3), "an option of method compact_attention is 'real'; it must be one of"),
    (None, dict(layers=2), "options of a method need method="),
    ("snlp", {}, "method snlp needs layers="),
    ("chunkllm", {}, "method chunkllm needs adapters="),
    (
      "chunkllm",
      dict(adapters="none.npz", depth=3),
      "an option of method chunkllm is 'depth'; it must be one of adapters",
    ),
    ("chunkllm", dict(adapters="none.npz"), "none.npz: No such file"),
    ("compact_attention", dict(select="seer"), "select=seer needs gate="),
    ("snlp", dict(layers=2, depth=3), "an option of method snlp is 'depth'; it must be one of layers, "),
    ("snlp", dict(layers=7), "layers"),
    ("sequence", dict(devices=9), "devices is 9; this machine has 8"),
    ("sequence", dict(devices=3), "page x devices on 'sequence'=192 must divide chunk=4096"),
  ],
)
def test_impossible_methods_are_named(model, method, options, message):
  with pytest.raises(InputError, match=message):
    subject(model, method, **options)


def test_the_command_says_in_one_line_that_the_harness_is_missing():
  done = wait(
    start(
      "import runpy, sys\n"
      "sys.modules['lm_eval'] = None\n"
      "runpy.run_module('jaxlab.evaluation.lm_eval', run_name='__main__')\n"
    )
  )
  assert done.returncode == 2 and done.stderr.splitlines() == [
    "error: the evaluation harness is not installed; pip install 'jaxlab[eval]'"
  ]
