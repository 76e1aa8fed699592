import jax.numpy as jnp
import numpy as np
import pytest

from experiments.snlp import speculation as snlp_speculation
from jaxlab.models.generate import generate
from tests.common import random_model, random_tokens
from tests.depth.test_snlp import CONFIGS


def test_greedy_tokens_miss_nothing_and_others_by_the_difference_of_logits():
  model, prompt = random_model(CONFIGS["nanochat"]), random_tokens(1, 6)
  tokens = generate(model, prompt, tokens=5)
  np.testing.assert_allclose(snlp_speculation.shortfall(model, prompt, tokens), 0, atol=1e-5)
  other = tokens.at[0, 3].set((tokens[0, 3] + 1) % model.config.vocab_size)
  logits = model(jnp.concatenate([prompt, tokens[:, :3]], axis=1))[0, -1]
  missed = snlp_speculation.shortfall(model, prompt, other)
  np.testing.assert_allclose(missed[0, :3], 0, atol=1e-5)
  assert missed[0, 3] == pytest.approx(float(logits.max() - logits[other[0, 3]]), abs=1e-5) and missed[0, 3] > 0


def test_tokens_that_are_not_the_networks_own_fail_the_claims():
  run = lambda worst, equal: {
    "acceptance": 0.5,
    "tokens_per_cycle": 2.0,
    "equal_tokens": 0.4,
    "float32": equal,
    "shortfall": {"worst": worst, "mean": 0.0},
    "speedup": 1.2,
    "spread": (1.1, 1.3),
  }
  model = lambda **runs: {"shortfall": {"worst": 0.05, "mean": 0.001}, "settings": runs}
  held = lambda worst, equal: [
    claim.holds for claim in snlp_speculation.claims({"plain": model(a=run(0.05, 1.0), b=run(worst, equal))})
  ]
  assert held(0.08, 1.0) == [True, True, False]  # 40 % are equal in 16 bits
  assert held(0.08, 0.999) == [True, False, False]
