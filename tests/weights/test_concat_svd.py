"""Concatenated-matrix SVD: bounds that hold, groups that keep their promise, a partition of what was given."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.weights import concat_svd
from jaxlab.weights.concat_svd import METHODS, bound, cluster, relative_error


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def collection(seed: int, *, count: int = 6, m: int = 12, width: int = 3, noise: float = 0.1) -> list[np.ndarray]:
  """Matrices of few directions and noise, of very different sizes and widths up to `width`."""
  rng = np.random.default_rng(seed)
  basis = rng.normal(size=(m, 3))
  made = []
  for _ in range(count):
    n = int(rng.integers(1, width + 1))
    made.append(np.exp(rng.normal()) * (basis @ rng.normal(size=(3, n)) + noise * rng.normal(size=(m, n))))
  return made


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_bounds_hold_in_their_order(seed, rank):
  """true <= incremental <= 1, true <= residual <= Weyl with the same first matrices."""
  blocks = collection(seed)
  true = relative_error(blocks, rank=rank)
  weyl, residual, incremental = (bound(blocks, rank=rank, method=method) for method in METHODS)
  assert true <= incremental + 1e-9 and incremental <= 1
  assert true <= residual + 1e-9 and residual <= weyl + 1e-9


def test_single_values_are_not_bounded_but_their_sums_are():
  """A_1 = e_1, A_2 = (c, s): the residuals' values are 1 and s, of which s exceeds the second singular value."""
  angle = 0.7
  blocks = [np.array([[1.0], [0.0]]), np.array([[np.cos(angle)], [np.sin(angle)]])]
  residuals = np.asarray(concat_svd.residual_state([*map(jnp.asarray, blocks)], rank=2).values)
  values = np.linalg.svd(np.hstack(blocks), compute_uv=False)
  np.testing.assert_allclose(residuals, [1, np.sin(angle)])
  assert residuals[1] > values[1]
  assert np.all(np.cumsum(residuals**2) <= np.cumsum(values**2) + 1e-12)


def test_where_bounds_are_exact():
  blocks = collection(1)
  for rank in (3, 7):
    np.testing.assert_allclose(bound(blocks, rank=rank, oversampling=12), relative_error(blocks, rank=rank), atol=1e-10)
  axes = [scale * np.eye(8)[:, [i]] for i, scale in enumerate((3.0, 1.0, 2.0, 0.5))]
  np.testing.assert_allclose(bound(axes, rank=2, method="residuals"), relative_error(axes, rank=2), atol=1e-12)
  same = [scale * blocks[0] for scale in (1.0, -2.0, 0.1)]
  assert bound(same, rank=3) < 1e-7 and relative_error(same, rank=3) < 1e-7


def test_the_order_changes_bounds_but_not_the_error():
  blocks = collection(2, count=4)
  errors = [relative_error(order, rank=3) for order in itertools.permutations(blocks)]
  np.testing.assert_allclose(errors, errors[0], atol=1e-9)
  for method in METHODS:
    bounds = [bound(order, rank=3, method=method) for order in itertools.permutations(blocks)]
    assert min(bounds) >= errors[0] - 1e-9


@pytest.mark.parametrize("method", (*METHODS, concat_svd.EXACT))
@pytest.mark.parametrize("order", concat_svd.ORDERS)
def test_every_group_keeps_its_promise(method, order):
  """Also where the first matrix is wider than the rank; groups are a partition, and give back what they promise."""
  for seed, (rank, eps) in enumerate([(3, 0.3), (2, 0.15), (6, 0.05)]):
    blocks = collection(seed, count=12, width=4)
    found = cluster(blocks, rank=rank, eps=eps, method=method, order=order)
    assert sorted(i for one in found for i in one.members) == list(range(12))
    for one in found:
      parts = [blocks[i] for i in one.members]
      if one.basis is not None:
        assert relative_error(parts, rank=rank) <= one.bound + 1e-9 <= eps + 1e-9
      back = np.hstack([one.matrix(place) for place in range(len(parts))])
      lost = np.linalg.norm(back - np.hstack(parts)) / np.linalg.norm(np.hstack(parts))
      assert lost <= eps + 1e-9


def test_in_single_precision_the_basis_stays_one():
  """Matrices of directions close to each other: what each adds falls quickly, down to rounding."""
  rng = np.random.default_rng(0)
  centres, place, blocks = rng.uniform(-2, 2, 6), np.arange(32)[:, None], []
  for _ in range(64):
    angle = place * (np.repeat(rng.choice(centres, 2, replace=False), 10) + 0.02 * rng.normal(size=20))
    blocks.append(jnp.asarray(np.concatenate([np.cos(angle), np.sin(angle)]) @ rng.normal(size=(20, 24)), jnp.float32))
  state = concat_svd.residual_state(blocks, rank=12)
  basis = np.asarray(state.basis)[:, : min(64, int(state.filled))]
  np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-5)
  true = relative_error(blocks, rank=12)
  assert true > 0.05 and all(bound(blocks, rank=12, method=method) >= 0.999 * true for method in METHODS)


def test_what_is_no_number_bounds_nothing():
  assert concat_svd._error(float("nan"), 1.0) == float("inf") and concat_svd._error(2.0, 1.0) == 0


def test_how_far_groups_reach():
  blocks = collection(3, count=10, width=2, noise=0.0)
  whole = lambda **options: [len(one.members) for one in cluster(blocks, rank=4, **options)]
  assert whole(eps=1.0) == [10]
  assert whole(eps=1e-6) == [10]  # all of rank 3
  other = [*blocks, *collection(4, count=10, width=2, noise=0.0)]
  exact = cluster(other, rank=3, eps=1e-6, patience=30)
  assert {frozenset(i // 10 for i in one.members) for one in exact if len(one.members) > 3} <= {
    frozenset({0}), frozenset({1})
  }  # fmt: skip
  first = [len(cluster(other, rank=5, eps=0.05, method=method)[0].members) for method in METHODS]
  assert first == sorted(first) and first[-1] > first[0]


def test_what_is_stored_is_counted():
  """Five columns of length 8 at rank 2: 2 (8 + 5) numbers for 40; two columns are stored as they are."""
  direction = np.arange(1.0, 9)[:, None]
  same = [scale * direction for scale in (1.0, 2, 3, 4, 5)]
  (one,) = cluster(same, rank=2, eps=0.01)
  assert one.numbers == 26 and concat_svd.compression_ratio(same, [one]) == 40 / 26
  (two,) = cluster(same[:2], rank=2, eps=0.01)
  assert two.basis is None and two.numbers == 16


def test_a_column_more_never_lowers_a_singular_value():
  blocks = collection(5)
  before = np.linalg.svd(np.hstack(blocks[:-1]), compute_uv=False)
  after = np.linalg.svd(np.hstack(blocks), compute_uv=False)[: len(before)]
  assert np.all(after >= before - 1e-12)
  padded = [np.hstack([block, np.zeros((12, 2))]) for block in blocks]
  np.testing.assert_allclose(bound(padded, rank=3), bound(blocks, rank=3), atol=1e-10)


@pytest.mark.parametrize(
  "blocks, options, message",
  [
    ([], {}, "no matrix was given"),
    ([np.ones((3, 1)), np.ones((4, 1))], {}, r"matrix 1 has shape \(4, 1\)"),
    ([np.full((3, 1), np.nan)], {}, "matrix 0 holds NaN"),
    ([np.ones((3, 1))], dict(rank=0), "rank"),
    ([np.ones((3, 1))], dict(method="weyl"), "method is 'weyl'"),
    ([np.ones((3, 1))], dict(order="size"), "order is 'size'"),
    ([np.ones((3, 1))], dict(eps=-1), "eps is -1"),
  ],
)
def test_wrong_input_is_one_line(blocks, options, message):
  with pytest.raises(InputError, match=message):
    cluster(blocks, **(dict(rank=1, eps=0.1) | options))
