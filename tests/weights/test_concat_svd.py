"""Concatenated-matrix SVD: bounds that hold, groups that keep their promise, a partition of what was given."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from experiments import compressing
from jaxlab.core.checks import InputError
from jaxlab.models import generate, hub, maps
from jaxlab.models.layers import Linear
from jaxlab.models.map_forms import SharedBasis
from jaxlab.weights import concat_svd
from jaxlab.weights.calibration import with_maps
from jaxlab.weights.concat_svd import METHODS, bound, cluster, relative_error
from tests.common import configs, random_model


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


@pytest.mark.parametrize(("m", "rank"), [(8, 2), (24, 5)])
def test_bounds_hold_of_many_collections(m, rank):
  """250 each, of scales a thousandfold apart and of widths that may exceed the rank."""
  for seed in range(250):
    blocks = collection(seed, count=4, m=m, width=6, noise=10.0 ** -(seed % 4))
    true = relative_error(blocks, rank=rank)
    weyl, residual, incremental = (bound(blocks, rank=rank, method=method) for method in METHODS)
    assert true <= incremental + 1e-9 and incremental <= 1 + 1e-9
    assert true <= residual + 1e-9 and residual <= weyl + 1e-9


def test_the_state_is_that_of_a_plain_loop_and_states_merge_one_sidedly():
  """Against eigenvalues of [[diag(l) + Y Y', Y B'], [B Y', B B']] in NumPy; of two halves nothing is overestimated."""
  blocks, rank = collection(6, count=8), 3
  basis, values = np.zeros((12, 0)), np.zeros(0)
  for block in blocks:
    inside = basis.T @ block
    new, rest = np.linalg.qr(block - basis @ inside)
    gram = np.block([[np.diag(values) + inside @ inside.T, inside @ rest.T], [rest @ inside.T, rest @ rest.T]])
    found, vectors = np.linalg.eigh(gram)
    kept = np.argsort(found)[::-1][: rank + 5]
    kept = kept[found[kept] > 1e-12]
    basis, values = np.hstack([basis, new]) @ vectors[:, kept], found[kept]
  states = [concat_svd.tracked([*map(jnp.asarray, part)], rank=rank) for part in (blocks, blocks[:4], blocks[4:])]
  np.testing.assert_allclose(states[0].values[: len(values)], values, rtol=1e-9)
  merged = concat_svd.merge(*states[1:])
  true = np.linalg.svd(np.hstack(blocks), compute_uv=False)
  size = len(true)
  assert np.all(np.sort(merged.values)[::-1][:size] <= true[: len(merged.values)] ** 2 + 1e-9)
  np.testing.assert_allclose(merged.energy, (true**2).sum())


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
  assert [one.members for one in cluster(same, rank=3, eps=1e-6)] == [(1, 2, 0)]
  # What lies within the basis adds to the energy alone: of 5.01 |A|^2 in all the first matrix bounds 1.
  np.testing.assert_allclose(bound(same, rank=3, method="residuals"), (4.01 / 5.01) ** 0.5, rtol=1e-12)


def test_the_order_changes_bounds_but_not_the_error():
  blocks = collection(2, count=4)
  errors = [relative_error(order, rank=3) for order in itertools.permutations(blocks)]
  np.testing.assert_allclose(errors, errors[0], atol=1e-9)
  for method in METHODS:
    bounds = [bound(order, rank=3, method=method) for order in itertools.permutations(blocks)]
    assert min(bounds) >= errors[0] - 1e-9
    assert method == "approximate" or max(bounds) > min(bounds) + 0.1


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


@pytest.mark.parametrize("eps", [0.0, 1e-4, 3e-4, 1e-3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_promise_is_kept_of_narrow_numbers_too(eps, dtype):
  """Directions that are nearly but not quite the same: the error of what is stored, too, but for its own rounding."""
  rng = np.random.default_rng(0)
  basis = rng.normal(size=(48, 4))
  wide = [basis @ rng.normal(size=(4, 3)) + 3e-4 * rng.normal(size=(48, 3)) for _ in range(24)]
  with jax.enable_x64(False):
    blocks = [jnp.asarray(block, dtype) for block in wide]
    groups = cluster(blocks, rank=6, eps=eps)
  assert groups[0].coefficients[0].dtype == jnp.float32
  rounding = np.finfo(np.float32).eps * 10
  for one in groups:
    parts = np.hstack([np.asarray(blocks[i], np.float64) for i in one.members])
    back = np.hstack([np.asarray(one.matrix(i), np.float64) for i in range(len(one.members))])
    assert np.linalg.norm(back - parts) / np.linalg.norm(parts) <= eps + rounding
    if one.basis is not None:
      assert relative_error([blocks[i] for i in one.members], rank=6) <= one.bound <= eps


def test_what_is_no_number_bounds_nothing():
  assert concat_svd._error(float("nan"), 1.0, 1) == float("inf") and concat_svd._error(2.0, 1.0, 1) < 1e-7


def test_how_far_groups_reach():
  blocks = collection(3, count=10, width=2, noise=0.0)
  whole = lambda **options: [len(one.members) for one in cluster(blocks, rank=4, **options)]
  assert whole(eps=1.0) == [10]
  assert whole(eps=1e-6) == [10]  # all of rank 3
  other = [*blocks, *collection(4, count=10, width=2, noise=0.0)]
  apart = [*blocks, *(1e-3 * block for block in other[10:])]
  exact = cluster(apart, rank=3, eps=1e-6, order="residual", patience=30)
  assert [sorted(one.members) for one in exact] == [[*range(10)], [*range(10, 20)]]
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


def test_a_matrix_more_never_lowers_a_singular_value():
  """Nor what is tracked of it, which is never more than it; of residuals it is the sums that are bounded."""
  blocks, before = collection(5), (0, 0, 0)
  for count in range(1, len(blocks) + 1):
    first = [*map(jnp.asarray, blocks[:count])]
    true = np.linalg.svd(np.hstack(blocks[:count]), compute_uv=False)
    true = np.pad(true, (0, 12))[:8] ** 2
    tracked = np.asarray(concat_svd.tracked(first, rank=3).values)
    residual = np.asarray(concat_svd.residual_state(first, rank=8).values) ** 2
    for now, then in zip((true, tracked, residual), before, strict=True):
      assert np.all(now >= then - 1e-12)
    assert np.all(tracked <= true + 1e-9) and np.all(np.cumsum(residual) <= np.cumsum(true) + 1e-9)
    before = true, tracked, residual
  assert tracked.sum() > 0.99 * true.sum() and residual[0] > 0
  padded = [np.hstack([block, np.zeros((12, 2))]) for block in blocks]
  np.testing.assert_allclose(bound(padded, rank=3), bound(blocks, rank=3), atol=1e-10)


@pytest.mark.parametrize(
  "blocks, options, message",
  [
    ([], {}, "no matrix was given"),
    ([np.ones((3, 1)), np.ones((4, 1))], {}, r"matrix 1 has shape \(4, 1\)"),
    ([np.full((3, 1), np.nan)], {}, "matrix 0 holds NaN"),
    ([np.full((3, 1), 1e200)], {}, "numbers whose squares overflow"),
    ([np.ones((3, 1))], dict(rank=0), "rank"),
    ([np.ones((3, 1))], dict(method="weyl"), "method is 'weyl'"),
    ([np.ones((3, 1))], dict(order="size"), "order is 'size'"),
    ([np.ones((3, 1))], dict(eps=-1), "eps is -1"),
  ],
)
def test_wrong_input_is_one_line(blocks, options, message):
  with pytest.raises(InputError, match=message):
    cluster(blocks, **(dict(rank=1, eps=0.1) | options))


# --- Maps of a model that share bases.


def alike(depth=3):
  """A model whose maps of layers 0 and 1 read and write few directions of the stream; those of layer 2, larger, all."""
  config = dataclasses.replace(configs()["qwen3"], depth=depth)
  model = random_model(config)
  rng, forms = np.random.default_rng(0), {}
  basis = rng.normal(size=(config.width, 6))
  for name, one in maps.named(model.blocks).items():
    weight = np.array(one.weight[...])
    turned = name in concat_svd.WRITE
    for layer in (0, 1):
      shape = weight[layer].T.shape if turned else weight[layer].shape
      low = 0.01 * basis @ rng.normal(size=(6, shape[1])) + 1e-4 * rng.normal(size=shape)
      weight[layer] = low.T if turned else low
    forms[name] = Linear(jnp.asarray(weight, jnp.float32), one.weight.axes)
  return with_maps(model, forms)


@pytest.fixture(scope="module")
def original():
  with jax.enable_x64(False):
    yield alike()


def test_a_model_whose_maps_share_a_basis_gives_what_its_matrices_give(original, tmp_path):
  """In a whole forward, token by token, from a folder, and by matrices in its place; a layer that shares none stays."""
  with jax.enable_x64(False):
    model, groups = concat_svd.compress(original, rank=8, eps=0.01)
    forms = maps.named(model.blocks)
    assert {type(one) for one in forms.values()} == {SharedBasis}
    assert all(one.groups[0] and one.groups[1] and not one.groups[2] for one in forms.values())
    tokens = np.random.default_rng(1).integers(0, 64, (2, 9)).astype(np.int32)
    logits, found = np.asarray(original(tokens)), np.asarray(model(tokens))
    assert 0 < np.abs(found - logits).max() < 0.05 * np.abs(logits).max()
    np.testing.assert_allclose(compressing.restored(model)(tokens), found, atol=2e-5)
    for name, one in forms.items():
      np.testing.assert_array_equal(one.weight()[2], maps.named(original.blocks)[name].weight[2])
      worst = np.abs(one.weight()[0] - maps.named(original.blocks)[name].weight[0]).max()
      assert worst < 0.02 * np.abs(maps.named(original.blocks)[name].weight[0]).max()
    hub.save(model, tmp_path)
    again = hub.load(tmp_path)
    np.testing.assert_array_equal(again(tokens), found)
    made = [generate(one, tokens[:, :4], tokens=5, temperature=0)[:, -5:].tolist() for one in (model, again)]
    assert made[0] == made[1]
    tensors = sum(a.nbytes for file in tmp_path.glob("*.safetensors") for a in load_file(file).values())
    assert maps.bytes_of(model) == tensors
    rest = sum(a.nbytes for a in jax.tree.leaves(original)) - 4 * sum(
      one.weight.size for one in maps.named(original.blocks).values()
    )
    assert tensors - rest - 4 * 3 * 7 == 4 * sum(one.numbers for one in groups)  # and 3 numbers of groups a map


def test_where_nothing_is_shared_nothing_changes(original):
  with jax.enable_x64(False):
    model, groups = concat_svd.compress(original, rank=8, eps=0.0)
    assert all(one.basis is None for one in groups) and maps.all_plain(model.blocks)
    tokens = np.zeros((1, 3), np.int32)
    np.testing.assert_array_equal(model(tokens), original(tokens))


def test_models_that_cannot_share_are_named(original, tmp_path):
  with jax.enable_x64(False):
    model, _ = concat_svd.compress(original, rank=8, eps=0.01, names=("k",))
    broken = with_maps(original, {"v": Linear(original.blocks.v.weight.at[1, 0, 0].set(jnp.nan), (None, None))})
    for call, message in (
      (lambda: concat_svd.compress(model, rank=8, eps=0.1), "the map k is compressed already"),
      (lambda: concat_svd.compress(original, rank=8, eps=0.1, names=("z",)), "a map is 'z'"),
      (lambda: concat_svd.compress(broken, rank=8, eps=0.1), "blocks.v of layer 1 holds NaN"),
      (lambda: concat_svd.compress(jnp.zeros(3), rank=8, eps=0.1), "a Transformer"),
    ):
      with pytest.raises(InputError, match=message):
        call()
    hub.save(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["compression"]["k"]["groups"] = [1, 1]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="it must say of every layer which basis it shares"):
      hub.load(tmp_path)
