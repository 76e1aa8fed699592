"""Scales folded into what comes before: the same logits, with and without groups of heads that share keys."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import maps
from jaxlab.weights import lord
from jaxlab.weights.folding import fold, foldable
from tests.common import configs, random_model, random_tokens

TOKENS = random_tokens(4, 24)
GROUPS = {"q", "o", "mlp.gate", "mlp.down"}


def scales_of(model, names):
  rng = np.random.default_rng(0)
  found = maps.named(model.blocks)
  return {n: jnp.asarray(np.exp(rng.normal(size=found[n].weight.shape[:2])), jnp.float32) for n in sorted(names)}


@pytest.mark.parametrize(
  "kind, change, takes",
  [
    ("llama", {}, GROUPS - {"o"}),
    ("llama", {"kv_heads": 4}, GROUPS),
    ("qwen3", {}, GROUPS - {"o"}),
    ("nanochat_plain", {}, {"o"}),
    ("nanochat", {}, set()),
  ],
)
def test_logits_stay(kind, change, takes):
  model = random_model(dataclasses.replace(configs()[kind], **change))
  firsts = {group[0] for group in foldable(model)}
  assert firsts == takes
  folded = fold(model, scales_of(model, firsts))
  np.testing.assert_allclose(folded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
  for name in firsts:
    before, after = (maps.named(one.blocks)[name].weight[...] for one in (model, folded))
    assert float(jnp.abs(after - before).max()) > 0.1


def test_wrong_input_is_one_line():
  model = random_model(dataclasses.replace(configs()["llama"], depth=2))
  with pytest.raises(InputError, match=r"nothing before o takes its scale; there are q, mlp\.gate, mlp\.down"):
    fold(model, scales_of(model, {"o"}))
  bases = lord.decompose(model, random_tokens(16, 24), batch=16)
  small = lord.truncate(model, bases, {"mlp.up": 4})
  with pytest.raises(InputError, match="folded into plain maps"):
    fold(small, scales_of(model, {"q"}))
