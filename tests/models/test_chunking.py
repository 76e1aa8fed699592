"""Cutting, smoothing and the way back are what the paper's formulas say, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxlab.core.checks import InputError
from jaxlab.models import chunking
from jaxlab.models.chunking import Chunker

TIME = 9
probabilities = arrays(np.float32, (2, TIME), elements=st.sampled_from([0.0, 0.2, 0.5, 0.51, 0.75, 1.0]))


def first_is_cut(p):
  p[:, 0] = 1.0
  return jnp.asarray(p)


@given(probabilities, st.integers(1, TIME), arrays(np.bool_, (2, TIME)))
def test_cuts_places_and_confidence_are_the_definition(p, capacity, valid):
  """A tie is no cut, padding is none; cuts past the capacity are demoted before c and the chunk of t are read."""
  p, valid[:, 0] = first_is_cut(p), True
  chunks = chunking.chunks_of(p, jnp.asarray(valid), capacity)
  places = np.asarray(chunking.places(chunks, capacity))
  for row in range(2):
    begun = [t for t in range(TIME) if p[row, t] > 0.5 and valid[row, t]]
    kept = begun[:capacity]
    assert places[row, : len(kept)].tolist() == kept and not places[row, len(kept) :].any()
    assert int(chunks.count[row]) == len(kept) and int(chunks.wanted[row].sum()) == len(begun)
    for t in range(TIME):
      assert int(chunks.index[row, t]) == sum(k <= t for k in kept) - 1
      assert float(chunks.confidence[row, t]) == float(p[row, t] if t in kept else 1 - p[row, t])


@given(probabilities, arrays(np.bool_, (2, TIME)))
def test_smoothing_is_the_recurrence(p, starts):
  with jax.enable_x64(True):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, TIME, 3)))
    actual = chunking.smooth(z, jnp.asarray(p, jnp.float64), jnp.asarray(starts))
    clipped, state = np.clip(p.astype(np.float64), 1e-4, 1 - 1e-4)[..., None], np.zeros((2, 3))
    for t in range(TIME):
      state = clipped[:, t] * np.asarray(z)[:, t] + np.where(starts[:, t, None], 0, (1 - clipped[:, t]) * state)
      np.testing.assert_allclose(actual[:, t], state, atol=1e-12)


def test_all_cut_gives_every_chunk_back_and_none_cut_the_first_everywhere():
  z = jnp.asarray(np.random.default_rng(0).normal(size=(1, TIME, 3)), jnp.float32)
  ones = jnp.ones((1, TIME))
  chunks = chunking.chunks_of(ones, ones > 0)
  s = chunking.smooth(z, jnp.take_along_axis(chunks.probability, chunking.places(chunks, TIME), axis=1))
  before = jnp.concatenate([jnp.zeros((1, 1, 3)), s[:, :-1]], axis=1)
  np.testing.assert_allclose(chunking.take(s, chunks.index), (1 - 1e-4) * z + 1e-4 * before, rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(chunking.take(s, chunks.index), z, atol=1e-3)
  alone = chunking.chunks_of(ones.at[:, 1:].set(0.0), ones > 0)
  assert int(alone.count[0]) == 1
  s = chunking.smooth(z[:, :1], ones[:, :1])
  np.testing.assert_array_equal(chunking.take(s, alone.index), jnp.broadcast_to(s, z.shape))


def test_a_vector_is_cut_off_where_it_differs_from_the_one_before():
  """The router that is the identity: p = 0 behind the same vector, 1 behind its opposite, 1/2, no cut, behind one at
  a right angle."""
  router, h = Chunker(4, "cosine", jax.random.key(0)), jnp.array([1.0, 2.0, -1.0, 0.5])
  np.testing.assert_allclose(router.probability(h, 3 * h), 0, atol=1e-6)
  np.testing.assert_allclose(router.probability(h, -h), 1, atol=1e-6)
  tie = router.probability(jnp.array([1.0, 0, 0, 0]), jnp.array([0, 1.0, 0, 0]))
  assert float(tie) == 0.5 and not chunking.chunks_of(tie[None, None], jnp.ones((1, 1), bool)).cut.any()
  assert not router.around(h).any()


def test_routers_are_the_formulas():
  """cos(W_q h_{t-1}, W_k h_t): which of the two is the query is no matter at the start, and one after it."""
  random = np.random.default_rng(0)
  h, before = random.normal(size=(2, 5, 4))
  router = Chunker(4, "cosine", jax.random.key(0))
  wq, wk = random.normal(size=(2, 4, 4))
  router.q[...], router.k[...] = jnp.asarray(wq, jnp.float32), jnp.asarray(wk, jnp.float32)
  q, k = before @ wq, h @ wk
  cosine = (q * k).sum(-1) / np.linalg.norm(q, axis=-1) / np.linalg.norm(k, axis=-1)
  np.testing.assert_allclose(router.probability(jnp.asarray(h), jnp.asarray(before)), (1 - cosine) / 2, atol=1e-5)
  linear = Chunker(4, "linear", jax.random.key(0))
  linear.router_bias[...] = jnp.float32(0.3)
  expected = 1 / (1 + np.exp(-(h @ np.asarray(linear.router[...]) + 0.3)))
  np.testing.assert_allclose(linear.probability(jnp.asarray(h), jnp.asarray(before)), expected, atol=1e-6)


def test_a_zero_vector_has_no_infinite_gradient():
  """What is before the first position is zero; its p is not used, and must not spoil the gradient either."""
  router = Chunker(4, "cosine", jax.random.key(0))
  loss = lambda h: jnp.where(jnp.arange(2) == 0, 1.0, router.probability(h, jnp.array([[0.0] * 4, [1.0] * 4]))).sum()
  assert jnp.isfinite(jax.grad(loss)(jnp.ones((2, 4)) * jnp.arange(1.0, 5))).all()


def test_straight_through_is_one_forwards_and_the_identity_backwards():
  c = jnp.array([0.5, 0.7, 1.0])
  np.testing.assert_array_equal(chunking.straight_through(c), 1.0)
  np.testing.assert_array_equal(
    jax.grad(lambda c: (chunking.straight_through(c) * jnp.arange(3.0)).sum())(c), [0, 1, 2]
  )


def test_a_row_has_room_for_a_chunk():
  with pytest.raises(InputError, match="capacity is 0; a row has at least 1 chunk"):
    chunking.chunks_of(jnp.ones((1, 2)), jnp.ones((1, 2), bool), 0)
