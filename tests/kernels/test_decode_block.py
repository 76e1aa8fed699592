import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.kernels.decode_block import decode_block
from jaxlab.models import Transformer
from jaxlab.models.block import for_inference
from jaxlab.models.config import nanochat, qwen3
from jaxlab.models.layers import rope_table
from tests.common import INTERPRET

LLAMA = dict(vocab_size=32, depth=3, width=48, q_heads=6, kv_heads=2, head_dim=32, mlp_width=80, context=256)
SHAPES = {
  "llama": dataclasses.replace(qwen3(**LLAMA), qk_norm=None),
  "qwen3": qwen3(**LLAMA),
  "one key head": qwen3(**LLAMA | dict(depth=1, kv_heads=1)),
  "a key head each": qwen3(**LLAMA | dict(depth=1, kv_heads=6)),
  "nanochat": nanochat(
    depth=4, aspect_ratio=16, head_dim=32, vocab_size=32, context=256, x0=False, value_embeddings=False
  ),
}


SIXTEEN = ("qwen3", "one key head", "a key head each")


@pytest.mark.parametrize("dtype, name", [(jnp.float32, n) for n in SHAPES] + [(jnp.bfloat16, n) for n in SIXTEEN])
def test_kernels_equal_reference_and_read_nothing_past_the_length(name, dtype):
  """Heads in groups of one, three and six, gains or none, both activations; caches filled to nothing, within a block
  and to the end."""
  config, tolerance = SHAPES[name], 5e-6 if dtype == jnp.float32 else 2e-2
  blocks = for_inference(Transformer(config, jax.random.key(0)).blocks)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  blocks = jax.tree.map(lambda a: (0.3 * jax.random.normal(next(keys), a.shape)).astype(dtype), blocks)
  store = (config.depth, 1, 150, config.kv_heads, config.head_dim)
  pair = [jax.random.normal(next(keys), store, dtype) for _ in range(2)]
  x = jax.random.normal(next(keys), (config.depth, 1, 1, config.width), dtype)
  windows = [None, 40, 129, 10][: config.depth]

  @functools.partial(jax.jit, static_argnames="implementation")
  def run(start, pair, implementation):
    cos, sin = rope_table(config, start + jnp.arange(1), x.dtype)
    how = dict(implementation=implementation, interpret=implementation == "triton" and INTERPRET)
    return decode_block(blocks, x, pair, cos=cos, sin=sin, start=start, windows=windows, **how)

  def close(a, b):
    assert a.dtype == b.dtype == dtype
    a, b = (np.asarray(y, float) for y in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

  for start in (0, 1, 70, 149):
    start = jnp.int32(start)
    stale = [jnp.where(jnp.arange(150)[:, None, None] >= start, jnp.nan, a) for a in pair]
    out, found = run(start, stale, "triton")
    expected, wanted = run(start, pair, "reference")
    close(out, expected)
    for a, b in zip(found, wanted, strict=True):
      close(a[:, :, : start + 1], b[:, :, : start + 1])
      assert np.isnan(a[:, :, start + 1 :]).all()


def test_what_the_kernels_cannot_take_is_named():
  config = dataclasses.replace(SHAPES["qwen3"], head_dim=24)
  blocks = for_inference(Transformer(config, jax.random.key(0)).blocks)
  x = jnp.zeros((config.depth, 1, 1, config.width))
  pair = [jnp.zeros((config.depth, 1, 8, config.kv_heads, config.head_dim))] * 2
  how = dict(cos=x, sin=x, start=0, windows=(None,) * config.depth)
  with pytest.raises(InputError, match="a head_dim that is a power of two from 32 on"):
    decode_block(blocks, x, pair, implementation="triton", **how)
  with pytest.raises(InputError, match="implementation"):
    decode_block(blocks, x, pair, implementation="mosaic", **how)
