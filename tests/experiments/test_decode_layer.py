"""Decoding steps through a layer: what is timed beside a method attends to the same keys in every form."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.decode_layer import PAGE, Contestant, dense_contestants, time_steps
from jaxlab.core.checks import InputError
from tests.common import plain_attention

SIZES = types.SimpleNamespace(q_heads=4, kv_heads=2, head_dim=16, width=32, mlp_width=32)


def test_all_forms_of_dense_attention_read_the_whole_cache_of_every_row():
  rows, at = 3, 2 * PAGE + 5
  q, k, v = (
    jax.random.normal(jax.random.key(i), (rows, 1, heads, SIZES.head_dim)) for i, heads in enumerate((4, 2, 2))
  )
  made = dense_contestants(SIZES, rows=rows, context=4 * PAGE, layers=1, dtype=jnp.float32)
  x = jnp.zeros((rows, 1, SIZES.width))
  outs = {name: one.attend(0, q, k, v, x, one.state, at) for name, one in made.items()}
  for name, (out, state) in outs.items():
    if name == "pages":
      rows_of = lambda pool: jnp.moveaxis(pool.reshape(2, rows, -1, SIZES.head_dim), 0, 2)
      keys, values = map(rows_of, state[0])
    else:
      keys, values = state[0]
    expected = plain_attention(q, keys[:, : at + 1], values[:, : at + 1], start=at)
    np.testing.assert_allclose(out, expected, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(keys[:, at], k[:, 0])


def test_what_is_timed_stays_finite_and_is_refused_where_not():
  sizes = types.SimpleNamespace(**vars(SIZES) | dict(steps=40, repetitions=1))
  how = dict(rows=2, context=2 * PAGE, layers=2, dtype=jnp.bfloat16)
  made = dense_contestants(sizes, **how)
  time_steps(sizes, made, **how)
  broken = Contestant(lambda layer, q, k, v, x, state, at: (q * jnp.nan, state), 0)
  with pytest.raises(InputError, match="broken: the steps' output is no number"):
    time_steps(sizes, made | {"broken": broken}, **how)
