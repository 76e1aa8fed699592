"""Decoding steps through a layer: what is timed beside a method attends to the same keys in every form."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from experiments.decode_layer import PAGE, dense_contestants
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
