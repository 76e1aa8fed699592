import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.attention.seer_gate import SeerGate
from jaxlab.core import modules
from jaxlab.core.checks import InputError
from tests.common import configs


def test_a_module_comes_back_as_it_was_made_and_trained(tmp_path):
  make = functools.partial(SeerGate, configs()["qwen3"], jax.random.key(0))
  trained = jax.tree.map(lambda a: a + 1, make(width=5))
  file = tmp_path / "gate.npz"
  modules.save(file, trained, dict(width=5), losses=np.arange(3))
  found = modules.load(file, make)
  jax.tree.map(np.testing.assert_array_equal, found, trained)
  assert jax.tree.structure(found) == jax.tree.structure(trained)
  assert modules.beside(file, "losses").tolist() == [0, 1, 2]


def test_files_of_something_else_are_named(tmp_path):
  file, make = tmp_path / "kept.npz", lambda size: jnp.zeros(size)
  modules.save(file, jnp.zeros(2), dict(size=2))
  with pytest.raises(InputError, match=re.escape(f"{file} holds an array of shape (2,) where the model asks for (4,)")):
    modules.load(file, lambda size: jnp.zeros(2 * size))
  with pytest.raises(InputError, match="give the file of a module that was trained for this model"):
    modules.load(file, lambda width: jnp.zeros(width))
  for damage in (lambda: file.write_bytes(file.read_bytes()[:-40]), lambda: file.write_text("no"), file.unlink):
    damage()
    with pytest.raises(InputError, match=re.escape(f"{file}: ")):
      modules.load(file, make)
