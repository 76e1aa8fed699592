"""Padding of a prompt's last chunk has no say in what selectors choose."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.attention.compact_attention import compact, quoka
from jaxlab.attention.dhsa_blocks import top_blocks, vertical_slash, vertical_slash_means
from jaxlab.attention.seer_gate import SeerGate
from jaxlab.attention.selection import flash_prefill
from jaxlab.models import inference, paged
from tests.attention.test_compact_attention import SELECTORS
from tests.common import configs, random_model, random_tokens

CONFIG = dataclasses.replace(configs()["qwen3"], depth=2)
LENGTHS = np.array([27, 21, 14])  # of chunks of 8 in pages of 4: a part of a first page, of a second, a whole one
GATE = SeerGate(CONFIG, jax.random.key(1), width=8)
BY_PAGES = {
  "top_blocks": functools.partial(top_blocks, density=0.3, tiles=2),
  "top_blocks, A": functools.partial(top_blocks, density=0.3, tiles=1, ends=True),
  "vertical_slash": functools.partial(vertical_slash, density=0.3, tiles=1),
  "vertical_slash_means": functools.partial(vertical_slash_means, density=0.3, tiles=1),
}
BY_BLOCKS = SELECTORS | {
  # Of a random network the means are alike.
  "flash_prefill": functools.partial(flash_prefill, alpha=0.97, sink=0, window=1),
  "seer": GATE.selectors(tau=0.2, recent=1),
}
METHODS = {
  **{name: compact(select) for name, select in BY_BLOCKS.items()},
  **{f"{name}, no union": compact(select, union=False) for name, select in (BY_BLOCKS | BY_PAGES).items()},
  "quoka": quoka(queries=0.4, budget=0.3),
}


@pytest.fixture(scope="module")
def network():
  return jax.jit(inference.take_apart)(random_model(CONFIG))


@pytest.mark.parametrize("name", METHODS)
def test_padding_and_other_rows_change_no_answer(network, name):
  """Other ids behind the rows' ends; rows of different lengths read together, and each among its copies."""
  method = METHODS[name]
  read = jax.jit(functools.partial(paged.prefill, capacity=32, chunk=8, page=4, method=method))
  logits = lambda prompts, lengths: np.asarray(read(network, prompts, lengths)[0])
  prompts, others = random_tokens(3, 32), random_tokens(3, 32, seed=1)
  padded = jnp.where(np.arange(32) < LENGTHS[:, None], prompts, others)
  found = logits(prompts, LENGTHS)
  np.testing.assert_allclose(logits(padded, LENGTHS), found, rtol=1e-5, atol=1e-5)
  for i, length in enumerate(LENGTHS):
    alone = logits(padded[np.array([i, i, i])], np.full(3, length))
    np.testing.assert_allclose(alone[0], found[i], rtol=1e-5, atol=1e-5)
