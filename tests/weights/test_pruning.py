"""One-shot pruning: which weights stay, SparseGPT as it is published, a model at a density, its bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import hub, maps, packed_maps
from jaxlab.weights import pruning
from jaxlab.weights.calibration import moments
from jaxlab.weights.pruning import keep, keep_n_of_m, prune, sparsegpt, stored_sparse, wanda
from tests.common import configs, random_model, random_tokens

TOKENS = random_tokens(8, 24)


@pytest.fixture(scope="module")
def model():
  return random_model(dataclasses.replace(configs()["qwen3"], depth=2))


def example(inputs=24, outputs=10, tokens=300, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(1, tokens, inputs)) * np.exp(rng.normal(size=inputs)) @ rng.normal(size=(inputs, inputs))
  return jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)


def test_the_largest_scores_stay_of_the_map_of_an_output_or_of_an_input():
  scores = np.random.default_rng(0).permutation(60).reshape(10, 6)
  np.testing.assert_array_equal(keep(scores, 0.25), scores >= 45)
  by_output = keep(scores, 0.3, per="output")
  assert (by_output.sum(axis=0) == 3).all() and (keep(scores, 0.5, per="input").sum(axis=1) == 3).all()
  for column, mask in zip(scores.T, by_output.T, strict=True):
    assert column[mask].min() > column[~mask].max()
  assert keep(scores, 0).sum() == 0 and keep(scores, 1).all()
  assert keep(np.ones((10, 6)), 0.3).sum() == 18  # of equal scores, too, as many


def test_two_of_four():
  scores = np.random.default_rng(0).random((8, 3))
  mask = keep_n_of_m(scores, 2, 4)
  assert (mask.reshape(2, 4, 3).sum(axis=1) == 2).all()
  assert mask[scores[:4, 0].argmax(), 0] and not mask[scores[:4, 0].argmin(), 0]


def test_wanda_is_the_weight_times_the_norm_of_its_input():
  x, weight = example()
  expected = np.abs(weight) * np.linalg.norm(np.asarray(x[0], np.float64), axis=0)[:, None]
  np.testing.assert_allclose(wanda(weight, moments(x)), expected, rtol=1e-4)


def written_out(weight, x, density, block):
  """SparseGPT in float64, column by column of the transposed weight, as in the paper's Algorithm 1."""
  w = np.asarray(weight, np.float64).T.copy()
  h = 2 * np.asarray(x, np.float64)[0].T @ np.asarray(x, np.float64)[0] / x.shape[1]
  h += 0.01 * np.diag(h).mean() * np.eye(len(h))
  upper = np.linalg.cholesky(np.linalg.inv(h)).T
  for first in range(0, w.shape[1], block):
    last = min(first + block, w.shape[1])
    errors = np.zeros((len(w), last - first))
    scores = w[:, first:last] ** 2 / np.diag(upper)[first:last] ** 2
    goes = scores <= np.sort(scores.ravel())[round(scores.size * (1 - density)) - 1]
    for j in range(first, last):
      kept = np.where(goes[:, j - first], 0, w[:, j])
      errors[:, j - first] = (w[:, j] - kept) / upper[j, j]
      w[:, j] = kept
      w[:, j + 1 : last] -= np.outer(errors[:, j - first], upper[j, j + 1 : last])
    w[:, last:] -= errors @ upper[first:last, last:]
  return w.T


@pytest.mark.parametrize("block", [8, 10, 32])
def test_sparsegpt_is_the_algorithm_written_out(block):
  """Also where the last block is shorter, or longer than the map."""
  x, weight = example()
  made, scores = sparsegpt(weight, moments(x), density=0.5, block=block)
  np.testing.assert_allclose(made, written_out(weight, x, 0.5, block), rtol=1e-2, atol=1e-3)
  assert int((made != 0).sum()) == 120 and scores.shape == weight.shape


def test_sparsegpt_errs_less_than_wanda_than_magnitude():
  x, weight = example(32, 24)
  seen = moments(x)
  error = lambda w: float(jnp.square(x @ (w - weight)).sum())
  masked = lambda scores: jnp.where(keep(scores, 0.5, per="output"), weight, 0)
  best = error(sparsegpt(weight, seen, density=0.5)[0])
  assert best < 0.7 * error(masked(wanda(weight, seen))) < 0.7 * error(masked(jnp.abs(weight)))


def test_a_dead_input_goes_first():
  x, weight = example()
  made, _ = sparsegpt(weight, moments(x.at[..., 3].set(0)), density=0.9)
  assert float(jnp.abs(made[3]).max()) == 0 and bool(jnp.isfinite(made).all())


@pytest.mark.parametrize("how", pruning.METHODS)
def test_every_map_is_at_the_density(model, how):
  found = prune(model, TOKENS, how, density=0.4, batch=8)
  before, after = maps.named(model.blocks), maps.named(found.model.blocks)
  for name, one in after.items():
    weight, mask = np.asarray(one.weight[...]), found.masks[name]
    # Whole blocks, outputs or maps are at the density to one weight.
    assert abs(mask.mean() - 0.4) < 0.02 and ((weight != 0) == mask).all()
    assert (mask.sum(axis=(1, 2)) == mask[0].sum()).all() and found.scores[name].shape == mask.shape
    same = weight[mask] == np.asarray(before[name].weight[...])[mask]
    assert same.mean() < 0.5 if how == "sparsegpt" else same.all()
  if how == "wanda":
    assert (found.masks["q"].sum(axis=1) == round(0.4 * 32)).all()


def test_at_full_density_it_is_the_model(model):
  for how in ("wanda", "sparsegpt"):
    found = prune(model, TOKENS, how, density=1.0)
    np.testing.assert_allclose(found.model(TOKENS[:2]), model(TOKENS[:2]), atol=1e-5)
    np.testing.assert_allclose(stored_sparse(found.model)(TOKENS[:2]), model(TOKENS[:2]), atol=1e-5)


def test_a_folder_has_the_bytes_that_are_counted(model, tmp_path):
  """A bit a weight and the values that stay."""
  small = prune(model, TOKENS, "wanda", density=0.3).model
  sparse = stored_sparse(small)
  np.testing.assert_allclose(jax.jit(sparse)(TOKENS[:2]), small(TOKENS[:2]), atol=1e-5)
  dense = maps.bytes_of(maps.named(small.blocks))
  assert 0.3 < maps.bytes_of(maps.named(sparse.blocks)) / dense < 0.3 + 1 / 32 + 0.02
  hub.save(sparse, tmp_path)
  again = hub.load(tmp_path, dtype="float32")
  np.testing.assert_allclose(again(TOKENS[:2]), small(TOKENS[:2]), atol=1e-5)
  size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
  assert 0 < size - maps.bytes_of(sparse) < 10_000
  assert packed_maps.sparse(jnp.zeros((2, 3, 5))).shape == (2, 3, 5)


def test_wrong_input_is_one_line(model):
  with pytest.raises(InputError, match="density is 40; it is the share"):
    prune(model, TOKENS, density=40)
  with pytest.raises(InputError, match="a method of pruning is 'wander'"):
    prune(model, TOKENS, "wander", density=0.4)
  with pytest.raises(InputError, match="leave per out"):
    prune(model, TOKENS, "sparsegpt", density=0.4, per="output")
  with pytest.raises(InputError, match="per is 'row'"):
    keep(np.ones((2, 2)), 0.5, per="row")
  with pytest.raises(InputError, match="a score is NaN"):
    keep(np.full((2, 2), np.nan), 0.5)
  with pytest.raises(InputError, match="m=4 must divide inputs=6"):
    keep_n_of_m(np.ones((6, 2)), 2, 4)
  with pytest.raises(InputError, match="q is a Sparse"):
    prune(stored_sparse(model), TOKENS, density=0.5)
