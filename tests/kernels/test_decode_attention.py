import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.kernels.decode_attention import decode_attention
from jaxlab.models.attention import dot_product_attention
from tests.common import INTERPRET, lowered_for_hopper

kernel = functools.partial(decode_attention, implementation="triton", interpret=INTERPRET)


def problem(seed, *, heads, time=1, capacity=96, size=16, layers=2, stored=3, batch=2, dtype=jnp.float32):
  """q, k, v of the new tokens and the cache of one kind of window, of `stored` layers."""
  q_heads, kv_heads = heads
  shapes = [(layers, batch, time, n, size) for n in (q_heads, kv_heads, kv_heads)]
  shapes += 2 * [(stored, batch, capacity, kv_heads, size)]
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnames=("window", "layer"))
def both(arrays, poisoned, start, window, layer):
  """By the kernels, which see `poisoned` past `start`, and by the reference."""
  q, k, v, *cache = arrays
  how = dict(windows=(window,) * len(q), layer=layer, start=start)
  past = jnp.arange(cache[0].shape[2])[:, None, None] >= start
  stale = [jnp.where(past, poisoned, a) for a in cache]
  return kernel(q, k, v, [stale], **how), decode_attention(q, k, v, [cache], implementation="reference", **how)


def compare(arrays, start, tolerance, *, window=None, layer=1):
  (found, (cache,)), (expected, (wanted,)) = both(arrays, jnp.nan, jnp.int32(start), window, layer)
  assert found.dtype == expected.dtype == arrays[0].dtype
  np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=tolerance, atol=tolerance)
  end = start + arrays[0].shape[2]
  for a, b in zip(cache, wanted, strict=True):
    np.testing.assert_array_equal(a[layer:, :, :end], b[layer:, :, :end])
    np.testing.assert_array_equal(a[:layer, :, :start], b[:layer, :, :start])
    assert np.isnan(a[layer:, :, end:]).all() and np.isnan(a[:layer, :, start:]).all()


@pytest.mark.parametrize(
  "heads, time, window",
  [((4, 4), 1, None), ((4, 1), 1, 40), ((6, 2), 3, None), ((4, 4), 3, 2), ((2, 1), 8, 70)],
)
@given(st.integers(0, 99), st.sampled_from((0, 1, 39, 64, 88)))
def test_kernels_equal_reference_and_read_nothing_past_the_length(heads, time, window, seed, start):
  """Grouped heads, several tokens, windows narrower and wider than a block, filled to nothing, a block or the end."""
  compare(problem(seed, heads=heads, time=time), start, 2e-6, window=window)


def test_rows_filled_to_lengths_of_their_own():
  """Each as it would be alone, grouped heads and a window among them; of one kind of window and of two."""
  arrays, starts = problem(5, heads=(4, 2), batch=3, stored=2), jnp.array([0, 70, 33], jnp.int32)
  q, k, v, *cache = arrays
  for implementation in ("reference", "triton"):
    how = dict(implementation=implementation, interpret=True)
    run = jax.jit(functools.partial(decode_attention, windows=(None, 40), **how))
    pairs = [[a[j : j + 1] for a in cache] for j in range(2)]
    found, written = run(q, k, v, pairs, start=starts)
    for row, start in enumerate(starts):
      mine = jax.tree.map(lambda a, row=row: a[:, row : row + 1], (q, k, v, pairs))
      expected, wanted = decode_attention(*mine, windows=(None, 40), start=start, implementation="reference")
      np.testing.assert_allclose(found[:, row : row + 1], expected, rtol=2e-6, atol=2e-6)
      for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a[:, row : row + 1], b)


def test_a_head_of_more_blocks_than_stretches():
  compare(problem(0, heads=(2, 1), capacity=4200, size=4, layers=1, stored=1, batch=1), 4150, 2e-6, layer=0)


def test_kernels_in_bfloat16():
  compare(problem(1, heads=(4, 2), dtype=jnp.bfloat16), 77, 2e-2)


def test_a_full_cache_is_not_written_past_its_end():
  """The last position is overwritten, as `dynamic_update_slice` does."""
  arrays = problem(2, heads=(2, 2))
  (_, cache), (_, wanted) = both(arrays, 0.0, jnp.int32(200), None, 0)
  np.testing.assert_array_equal(cache, wanted)


def test_kinds_of_windows_lie_apart_and_come_back_in_order():
  """Layers of three kinds, two of them in several places: equal to every layer alone."""
  windows = (9, None, 9, 30, None)
  (q, k, v, *cache), start = problem(4, heads=(2, 1), layers=5, stored=5), jnp.int32(50)
  pairs = [[a[jnp.array(rows)] for a in cache] for rows in ((0, 2), (1, 4), (3,))]
  found, written = jax.jit(lambda *a: kernel(*a, windows=windows, start=start))(q, k, v, pairs)
  keys = dict(zip((0, 2, 1, 4, 3), (row for pair in written for row in pair[0]), strict=True))
  for j, window in enumerate(windows):
    one = [a[j : j + 1] for a in (q, k, v)], [[a[j : j + 1] for a in cache]]
    expected, ((wanted, _),) = decode_attention(
      *one[0], one[1], windows=(window,), start=start, implementation="reference"
    )
    np.testing.assert_allclose(found[j], expected[0], rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(keys[j], wanted[0])


def test_another_attention_is_left_to_the_reference():
  q, k, v, *cache = problem(3, heads=(2, 2))
  seen = []

  def attention(q, k, v, **how):
    seen.append(how["window"])
    return dot_product_attention(q, k, v, **how)

  decode_attention(q, k, v, [cache], windows=(5, 5), start=jnp.int32(3), layer=1, attention=attention)
  assert seen == [5]


def test_kernels_lower_for_a_gpu_without_one():
  arrays = problem(0, heads=(5, 5), size=128, capacity=2648, layers=6, stored=6, batch=1, dtype=jnp.bfloat16)
  how = dict(windows=6 * (512,), start=jnp.int32(2048), implementation="triton")
  run = lambda q, k, v, *cache: decode_attention(q, k, v, [cache], **how)
  text = lowered_for_hopper(run, *arrays)
  assert "decode_attention" in text and "decode_attention_combine" in text and "triton" in text


@pytest.mark.parametrize(
  "changes, implementation, message",
  [
    (dict(time=20), "triton", r"20 queries of 4 heads over 4 key heads of 16 float32: .* at most 16 queries"),
    (dict(size=12), "triton", "head_dim that is a power of two"),
    (dict(), "cuda", "implementation is 'cuda'; it must be one of None, reference, triton"),
  ],
)
def test_bad_input(changes, implementation, message):
  q, k, v, *cache = problem(0, heads=(4, 4), **changes)
  with pytest.raises(InputError, match=message):
    decode_attention(q, k, v, [cache], windows=(None, None), start=0, implementation=implementation)
