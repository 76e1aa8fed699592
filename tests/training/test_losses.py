"""The loss in slices: the same value and gradient however the logits are made and kept."""

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxlab.training import losses
from tests.common import configs, random_model, random_tokens


@pytest.mark.parametrize("keep_logits", [False, True])
def test_slices_and_kept_logits_change_neither_loss_nor_gradient(monkeypatch, keep_logits):
  model = random_model(configs()["nanochat"])
  tokens = random_tokens(2, 13)
  batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:].at[0, 3].set(-1)}

  def plain(m):
    p = jax.nn.log_softmax(m(batch["inputs"]))
    chosen = jnp.take_along_axis(p, jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
    return -(chosen * (batch["targets"] >= 0)).sum() / 23

  sliced = lambda m: losses.language_model_loss(m, batch, keep_logits=keep_logits)[0]
  vocab = model.config.vocab_size
  monkeypatch.setattr(losses, "_SLICE_BYTES", 2 * 2 * vocab * 4)  # two positions of both rows at once
  expected, actual = (jax.jit(jax.value_and_grad(f))(model) for f in (plain, sliced))
  chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
