import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export

from jaxlab.core.checks import InputError
from jaxlab.kernels.paged_attention import _best, cudnn, mosaic_gpu, paged_attention
from jaxlab.models.attention import dot_product_attention
from tests.common import HOPPER, interpreted, lowered_for_hopper

ROWS, PAGES, CAPACITY = 3, 14, 6


def problem(seed, *, dtype=jnp.float32, heads=2, tokens=20, page=16, size=128):
  """Rows at different positions, each with its own share of the pages before; what it must not read is poison."""
  rng = np.random.default_rng(seed)
  start = rng.integers(0, 3 * page, ROWS)
  mine = -(-(start % page + tokens) // page)
  opened = np.array([rng.integers(0, min(s // page, CAPACITY - m) + 1) for s, m in zip(start, mine, strict=True)])
  count = np.stack([opened, opened + mine], axis=1).astype(np.int32)
  table = np.stack([rng.permutation(PAGES)[:CAPACITY] for _ in range(ROWS)]).astype(np.int32)
  q = rng.normal(size=(ROWS, tokens * heads, size))
  pools = rng.normal(size=(2, PAGES, page, size))
  return *(jnp.asarray(a, dtype) for a in (q, *pools)), jnp.asarray(table), jnp.asarray(count), jnp.asarray(start)


def by_hand(q, keys, values, table, count, start, heads, sizes=None):
  """Row by row and query by query, from the definition, in float64."""
  q, keys, values = (np.asarray(a, np.float64) for a in (q, keys, values))
  page = keys.shape[1]
  out, total = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
  for r, i in np.ndindex(q.shape[:2]):
    at, (opened, pages) = start[r] + i // heads, count[r]
    seen = []
    for j in range(pages):
      place = (start[r] // page + j - opened) * page + np.arange(page)
      seen += [(table[r, j], k) for k in range(page) if j < opened or place[k] <= at]
    score = np.array([q[r, i] @ keys[p] for p in seen]) / np.sqrt(q.shape[2])
    score = score if sizes is None else score + np.log([sizes[p] for p in seen])
    total[r, i] = np.logaddexp.reduce(score)
    out[r, i] = np.exp(score - total[r, i]) @ np.array([values[p] for p in seen])
  return out, total


def poisoned(arrays, tokens):
  """The same, with what is not a number wherever no row has a token."""
  q, keys, values, table, count, start = arrays
  page = keys.shape[1]
  last = np.full((PAGES, page), True)
  for r in range(ROWS):
    for j in range(count[r, 1]):
      place = (start[r] // page + j - count[r, 0]) * page + np.arange(page)
      last[table[r, j]] &= (place >= start[r] + tokens) & (j >= count[r, 0])
  return q, *(jnp.where(last[..., None], jnp.nan, a) for a in (keys, values)), table, count, start


@functools.partial(jax.jit, static_argnames=("heads", "implementation", "splits"))
def run(arrays, heads, implementation, sizes=None, splits=1):
  how = dict(implementation=implementation, interpret=interpreted(implementation))
  return paged_attention(*arrays, heads=heads, sizes=sizes, splits=splits, **how)


@given(st.integers(0, 10_000))
def test_the_reference_is_the_definition(seed):
  arrays = problem(seed, tokens=5, page=4, size=8)
  for found, expected in zip(run(arrays, 2, "reference"), by_hand(*map(np.asarray, arrays), 2), strict=True):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("heads, tokens, page", [(1, 20, 16), (4, 33, 32), (8, 1, 16)])
def test_kernels_equal_the_reference(implementation, dtype, tolerance, heads, tokens, page):
  """Groups of heads, sizes that no block divides, one token; rows end within a page, whose rest is poison."""
  for seed in range(2):
    arrays = problem(seed, dtype=dtype, heads=heads, tokens=tokens, page=page)
    expected = run(arrays, heads, "reference")
    found = run(poisoned(arrays, tokens), heads, implementation)
    for a, b in zip(found, expected, strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", ["reference", "triton", "mosaic_tpu"])
@pytest.mark.parametrize("splits", [1, 3])
def test_entries_that_stand_for_several_tokens_weigh_as_many(implementation, splits):
  """log s is added to their scores; those of size 0 are not there. In parts it is the same, rows without pages too."""
  heads, page = 4, 16
  q, keys, values, table, count, start = arrays = problem(1, heads=heads, tokens=1, page=page)
  sizes = jnp.asarray(np.random.default_rng(0).integers(0, 5, (PAGES, page)), jnp.float32)
  with np.errstate(divide="ignore"):
    expected = by_hand(*map(np.asarray, arrays), heads, np.asarray(sizes))
  found = run(arrays, heads, implementation, sizes, splits)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
  plain = run(arrays, heads, implementation, None, splits)
  for a, b in zip(plain, run(arrays, heads, "reference"), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
  out, total = run((q, keys, values, table, count.at[1].set(0), start), heads, implementation, sizes, splits)
  assert not np.asarray(out[1]).any() and np.isneginf(total[1]).all() and np.isfinite(out).all()


@pytest.mark.parametrize("implementation", ["reference", "triton", "mosaic_tpu"])
def test_empty_entries_hide_no_others_however_small_their_scores(implementation):
  """Centroids with logits of -100 beside empty places, whose keys are zeros."""
  q, keys, values, table, count, start = problem(2, heads=4, tokens=1)
  there = jnp.arange(keys.shape[1]) < 8
  q = jnp.ones_like(q)
  keys = jnp.where(there[:, None], -100 / keys.shape[2] ** 0.5, jnp.zeros_like(keys))
  sizes = jnp.broadcast_to(jnp.where(there, 4.0, 0.0), keys.shape[:2])
  arrays = q, keys, jnp.full_like(values, 7.0), table, jnp.broadcast_to(jnp.array([1, 1]), count.shape), start
  out, total = run(arrays, 4, implementation, sizes)
  np.testing.assert_allclose(out, 7.0, rtol=1e-5)
  np.testing.assert_allclose(total, -100 + np.log(8 * 4), rtol=1e-5)


@pytest.mark.parametrize("heads, tokens, page", [(1, 128, 64), (4, 96, 32), (4, 200, 128)])
def test_cudnn_equals_the_reference(heads, tokens, page):
  """At positions within a page, too; where there is a GPU that has it."""
  q, keys, values, _, count, start = problem(0, dtype=jnp.bfloat16, heads=heads, tokens=tokens, page=page)
  capacity = CAPACITY + -(-tokens // page)
  keys, values = (jnp.resize(a, (ROWS * capacity, *a.shape[1:])) for a in (keys, values))
  table = jax.random.permutation(jax.random.key(0), ROWS * capacity).reshape(ROWS, -1).astype(jnp.int32)
  arrays = q, keys, values, table, count, start
  if not cudnn.supports(*arrays, None):
    with pytest.raises(InputError, match="the cudnn kernel takes 16-bit numbers"):
      run(arrays, heads, "cudnn")
    pytest.skip("no GPU that has it")
  for a, b in zip(run(arrays, heads, "cudnn"), run(arrays, heads, "reference"), strict=True):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype, size", [(jnp.bfloat16, 128), (jnp.float16, 64)])
@pytest.mark.parametrize("heads, tokens, page", [(1, 20, 64), (4, 96, 128), (2, 150, 192), (8, 1, 64)])
def test_mosaic_gpu_equals_the_reference(dtype, size, heads, tokens, page):
  """Rows end within a page, whose rest is poison, and one has no page; where there is a Hopper GPU."""
  q, keys, values, table, count, start = problem(0, dtype=dtype, heads=heads, tokens=tokens, page=page, size=size)
  arrays = q, keys, values, table, count.at[1].set(0), start
  attend = functools.partial(paged_attention, heads=heads, implementation="mosaic_gpu", splits=1)
  if not mosaic_gpu.supports(*arrays, None):
    with pytest.raises(InputError, match="the mosaic_gpu kernel takes bfloat16 or float16"):
      attend(*arrays)
    pytest.skip("no Hopper GPU, and no interpreter")
  found = jax.jit(attend)(*poisoned(arrays, tokens))
  for a, b in zip(found, run(arrays, heads, "reference"), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("heads, page, size", [(1, 64, 128), (4, 128, 64), (4, 192, 128)])
def test_mosaic_gpu_lowers_for_hopper(heads, page, size):
  """Without such a GPU: all that Pallas checks, though not what the driver's compiler does."""
  arrays = problem(0, dtype=jnp.bfloat16, heads=heads, tokens=33, page=page, size=size)
  kernel = functools.partial(paged_attention, heads=heads, implementation="mosaic_gpu")
  assert "mosaic_gpu" in lowered_for_hopper(kernel, *arrays)


def test_mosaic_gpu_is_taken_by_name_only_and_says_what_it_cannot_do(monkeypatch):
  arrays = problem(0, dtype=jnp.bfloat16, tokens=1, page=64)
  attend = functools.partial(paged_attention, heads=2, implementation="mosaic_gpu")
  with jax.sharding.use_abstract_mesh(HOPPER):
    assert mosaic_gpu.supports(*arrays, None)
    with pytest.raises(InputError, match="has no interpreter"):
      attend(*arrays, interpret=True)
    with pytest.raises(InputError, match="has no derivative"):
      jax.grad(lambda q: attend(q, *arrays[1:])[0].sum())(arrays[0])
    for other in dict(dtype=jnp.float32, page=64), dict(dtype=jnp.bfloat16, page=32):
      with pytest.raises(InputError, match=r"the mosaic_gpu kernel takes bfloat16 or float16, .* pages in 64s"):
        attend(*problem(0, tokens=1, **other))
    with pytest.raises(InputError, match="no sizes"):
      attend(*arrays, sizes=jnp.ones(arrays[1].shape[:2]))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _best((*arrays, None), 2) == "triton"


def test_all_pages_are_dense_attention():
  tokens, page, pages = 8, 4, 6
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (1, n, 1, 16)) for key, n in zip(keys, (tokens, 24, 24), strict=True))
  start = jnp.array([16])
  expected = dot_product_attention(q, k, v, start=start)
  table, count = jnp.arange(pages)[None], jnp.array([[4, 6]])
  pool = lambda a: a.reshape(pages, page, 16)
  out, _ = paged_attention(q[:, :, 0], pool(k), pool(v), table, count, start)
  np.testing.assert_allclose(out, expected[:, :, 0], rtol=1e-5, atol=1e-5)


def test_a_row_without_pages_is_zero():
  q, keys, values, table, count, start = problem(0)
  for implementation in "reference", "triton", "mosaic_tpu":
    out, total = run((q, keys, values, table, count.at[1].set(0), start), 2, implementation)
    assert not np.asarray(out[1]).any() and np.isneginf(total[1]).all() and np.isfinite(out).all()


@pytest.mark.parametrize("implementation", ["reference", "triton", "mosaic_tpu"])
def test_a_key_that_is_no_number_is_in_the_answer(implementation):
  """Of the queries that see it, instead of zeros as if they saw nothing: a row's oldest page, and its newest token."""
  heads = 2
  q, keys, values, *_ = problem(0, heads=heads)
  start, table = jnp.full(ROWS, 48), jnp.arange(ROWS * 4).reshape(ROWS, 4)  # a page of the past and all of the new ones
  keys = keys.at[0, 3].set(jnp.nan).at[4 + 2, 3].set(jnp.nan)  # of row 0 in the past, of row 1 at position 67
  arrays = q, keys, values, jnp.pad(table, ((0, 0), (0, 2))), jnp.tile(jnp.array([1, 3]), (ROWS, 1)), start
  out, total = run(arrays, heads, implementation)
  seen = np.array([[True], [False], [False]]) | (np.arange(20 * heads) // heads + 48 >= 67) & np.eye(3, 1, -1, bool)
  np.testing.assert_array_equal(np.isnan(out).any(axis=2), seen)
  np.testing.assert_array_equal(np.isnan(total), seen)


def test_it_lowers_for_tpus_and_for_cuda():
  for dtype in jnp.float32, jnp.bfloat16:
    arrays = problem(0, dtype=dtype)
    kernel = lambda name: jax.jit(functools.partial(paged_attention, heads=2, implementation=name))
    assert "tpu_custom_call" in export.export(kernel("mosaic_tpu"), platforms=["tpu"])(*arrays).mlir_module()
    assert "triton" in lowered_for_hopper(kernel("triton"), *arrays)


def test_tables_and_numbers_that_cannot_be_are_named():
  q, keys, values, table, count, start = problem(0, tokens=5, page=4, size=8)
  for arrays, message in (
    (
      (q, keys, values, table.at[0, 0].set(99), count.at[0].set(2), start),
      r"the table names pages .*99; there are 0\.\.13",
    ),
    ((q, keys, values, table, count.at[0, 1].set(CAPACITY + 1), start), f"<= all <= {CAPACITY}"),
    ((q, keys, values, table, count.at[0].set(jnp.array([3, 2])), start), "it is \\[\\[3, 2\\]"),
    ((q.astype(jnp.int8), keys, values, table, count, start), "q holds int8"),
  ):
    with pytest.raises(InputError, match=message):
      paged_attention(*arrays, heads=2, implementation="reference")


def test_where_no_kernel_serves_it_is_said_once(monkeypatch):
  """Head sizes that are no power of two, on a GPU."""
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  q, *rest = problem(0, heads=1, tokens=1, size=24)
  with pytest.warns(UserWarning, match="no kernel takes pages of 16 and 24 channels in float32"):
    assert _best((q, *rest, None), 1) == "reference"
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    _best((q, *rest, None), 1)


def test_what_it_cannot_do_is_named():
  q, keys, values, table, count, start = problem(0, size=24)
  with pytest.raises(InputError, match="the triton kernel takes pages and head_dim that are powers of two"):
    paged_attention(q, keys, values, table, count, start, implementation="triton")
  with pytest.raises(InputError, match="do not fit"):
    paged_attention(q, keys[..., :8], values, table, count, start)
  with pytest.raises(InputError, match="41 heads"):
    paged_attention(q, keys, values, table, count, start, heads=41)
  with pytest.raises(InputError, match="splits is 2; only rows of one token"):
    paged_attention(q, keys, values, table, count, start, splits=2)
  with pytest.raises(InputError, match=r"sizes must be given as \(pages, page\) \(14, 16\)"):
    paged_attention(q, keys, values, table, count, start, sizes=jnp.ones(14))
  arrays = problem(0)
  with pytest.raises(InputError, match="has no derivative"):
    jax.grad(lambda q: run((q, *arrays[1:]), 2, "triton")[0].sum())(arrays[0])
