import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments import beside
from experiments.console import Console
from experiments.long_context import Subject
from jaxlab.core.checks import InputError
from jaxlab.data import tokenizer


def test_what_was_trained_is_kept_and_mistakes_are_one_line(tiny_checkpoint, tmp_path):
  network = jnp.array([1.0, -2.0])
  subject = Subject("tiny", network, tokenizer.load(tiny_checkpoint), None)
  train = ml_collections.ConfigDict(dict(split="train", steps=60, batch=1, length=32, rate=0.2))
  data = ml_collections.ConfigDict(dict(name="stdlib_code", path="docs/*.md"))
  how = dict(data=data, cache=tmp_path, seed=0, console=Console(quiet=True))

  def loss(module, network, tokens):
    return ((module - network) ** 2).sum() + 0.0 * tokens.sum()

  make = lambda size: jnp.zeros(size)
  run = lambda size, loss, name: beside.trained(
    make, loss, subject, train, options=dict(size=size), file=tmp_path / name, **how
  )
  made, losses = run(2, loss, "kept.npz")
  np.testing.assert_allclose(made, network, atol=0.1)
  assert losses[-1] < losses[0] / 20
  again, same = run(2, None, "kept.npz")
  np.testing.assert_array_equal(again, made)
  assert same == losses
  with pytest.raises(InputError, match="lower the learning rate"):
    run(2, lambda module, network, tokens: jnp.nan * module.sum(), "other.npz")
  assert not (tmp_path / "other.npz").exists()
