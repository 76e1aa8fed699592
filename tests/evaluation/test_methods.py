"""Methods by name: the same network for scoring and for generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.depth import snlp
from jaxlab.evaluation.methods import plain, subject
from jaxlab.models import generate
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


@pytest.mark.parametrize(
  "method, options, message",
  [
    ("snap", {}, "method is 'snap'; it must be one of snlp"),
    (None, dict(layers=2), "options of a method need method="),
    ("snlp", {}, "method snlp needs layers="),
    ("snlp", dict(layers=2, depth=3), "an option of method snlp is 'depth'; it must be one of layers, "),
    ("snlp", dict(layers=7), "layers"),
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
