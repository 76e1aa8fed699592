"""LoRD: the least error of every rank, the same map as SVD-LLM's without centring, ranks chosen by loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import maps
from jaxlab.models.layers import Linear
from jaxlab.weights import svd
from jaxlab.weights.calibration import Moments, moments
from jaxlab.weights.lord import Basis, basis, choose, decompose, factors, masked, of_factors, sweep, truncate, uniform
from tests.common import configs, random_model, random_tokens

SHAPES = [(24, 32), (24, 24), (32, 24)]
TOKENS = random_tokens(16, 24)


def example(inputs, outputs, *, tokens=400, seed=0):
  """(inputs of unequal variance around a mean, a weight)."""
  rng = np.random.default_rng(seed)
  mix = rng.normal(size=(inputs, inputs)) * np.exp(-np.arange(inputs) / 4)
  x = rng.normal(size=(1, tokens, inputs)) @ mix + rng.normal(size=inputs)
  return jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)


def error(x, weight, one) -> float:
  """The summed squared error of a map's outputs."""
  y = x.reshape(-1, x.shape[-1])
  return float(((one(y) - y @ weight) ** 2).sum())


def in_double(x) -> Moments:
  """What a basis reads of the moments, in float64."""
  flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
  centred = flat - flat.mean(axis=0)
  count = jnp.float64(len(flat))
  absolute = jnp.asarray(np.abs(flat).mean(axis=0))
  return Moments(count, 1.0, jnp.asarray(flat.mean(axis=0)), jnp.asarray(centred.T @ centred), absolute, absolute)


def errors(x, weight, down, up, mean=0.0) -> list[float]:
  """`error` of every rank, in NumPy: nothing is compiled for a rank."""
  x, weight, down, up = (np.asarray(a, np.float64) for a in (x[0], weight, down, up))
  found = []
  for rank in range(1, up.shape[0] + 1):
    u = up[:rank]
    bias = mean - (u @ np.broadcast_to(mean, up.shape[1:])) @ u
    found.append(float(((x @ down[:, :rank] @ u + bias - x @ weight) ** 2).sum()))
  return found


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_what_the_eigenvalues_left_out_say(shape):
  """Of every rank to 1e-5; all of them give the outputs back."""
  x, weight = example(*shape)
  with jax.enable_x64(True):
    found = basis(weight.astype(jnp.float64), in_double(x))
    values, mean = np.asarray(found.eigenvalues), np.asarray(found.mean)
    left = 400 * (values.sum() - np.cumsum(values))
    made = errors(x, weight, found.down, found.up, mean)
    np.testing.assert_allclose(made, left, rtol=1e-5, atol=1e-9 * left[0])
    whole = factors(found, min(shape), dtype=jnp.float64)
    np.testing.assert_allclose(whole(x.astype(jnp.float64)), x.astype(jnp.float64) @ weight, rtol=1e-9, atol=1e-9)
    one = factors(found, 8, dtype=jnp.float64)
    assert one.spec == {"rank": 8, "bias": True}
    np.testing.assert_array_equal(one.down[...], whole.down[..., :8])
    np.testing.assert_allclose(error(x.astype(jnp.float64), weight, one), made[7], rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_clipped_of_the_eigenvalues_is_rounding(shape):
  """Less than 1e-6 of their sum; the basis is orthonormal."""
  x, weight = example(*shape)
  seen = moments(x)
  found = basis(weight, seen)
  power = np.einsum("ij,ik,kj", *(np.asarray(a, np.float64) for a in (weight, seen.covariance, weight)))
  assert float(np.asarray(found.eigenvalues, np.float64).sum() / power - 1) < 1e-6
  np.testing.assert_allclose(found.up @ found.up.T, np.eye(min(shape)), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_centring_it_is_svd_llm(shape):
  with jax.enable_x64(True):
    x, weight = example(*shape)
    weight, seen = weight.astype(jnp.float64), in_double(x)
    down, up = svd.svd_llm(weight, seen)
    found = basis(weight, seen, centre=False)
    for rank in (3, 12):
      np.testing.assert_allclose(found.down[:, :rank] @ found.up[:rank], down[:, :rank] @ up[:rank], atol=1e-8)
    assert float(jnp.abs(found.mean).max()) == 0


def few_tokens(inputs):
  """Three tokens over and over."""
  rng = np.random.default_rng(0)
  return rng.normal(size=(3, inputs))[rng.integers(0, 3, 400)]


def outliers(inputs):
  """Two inputs ten thousand times as large as the others."""
  return np.random.default_rng(0).normal(size=(400, inputs)) * np.where(np.arange(inputs) < 2, 1e4, 1.0)


@pytest.mark.parametrize("drawn", [few_tokens, outliers])
@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])
def test_few_or_unequal_directions_give_finite_maps_of_the_same_outputs(shape, drawn):
  """A covariance without a Cholesky factor, in float32, of more outputs than inputs and of fewer."""
  _, weight = example(*shape)
  x = jnp.asarray(drawn(shape[0])[None], jnp.float32)
  seen, y = moments(x), x @ weight
  close = dict(rtol=0, atol=1e-4 * float(jnp.abs(y).max()))
  found = basis(weight, seen)
  np.testing.assert_allclose(found.up @ found.up.T, np.eye(min(shape)), atol=1e-5)
  np.testing.assert_allclose(factors(found, min(shape), dtype=jnp.float32)(x), y, **close)
  if drawn is few_tokens:  # three points differ from their mean in two directions
    np.testing.assert_allclose(factors(found, 2, dtype=jnp.float32)(x), y, **close)
  down, up = svd.svd_llm(weight, seen)
  assert bool(jnp.isfinite(down).all() & jnp.isfinite(up).all())
  np.testing.assert_allclose((x @ down) @ up, y, **close)


def test_inputs_of_few_directions_give_the_same_outputs_either_way():
  x, weight = example(24, 20)
  x = x.at[..., 12:].set(0)
  seen = moments(x)
  down, up = svd.svd_llm(weight, seen)
  found = basis(weight, seen, centre=False)
  np.testing.assert_allclose(
    (x @ found.down[:, :6]) @ found.up[:6], (x @ down[:, :6]) @ up[:6], atol=1e-4 * float(jnp.abs(x @ weight).max())
  )
  np.testing.assert_allclose((x @ found.down) @ found.up, x @ weight, atol=2e-3)


def test_the_wide_way_is_the_way_through_all_outputs():
  """Of every rank the eigenvalues, directions and maps of the covariance of 40 outputs."""
  x, weight = example(12, 40)
  with jax.enable_x64(True):
    seen, weight = in_double(x), weight.astype(jnp.float64)
    found = basis(weight, seen)
    values, vectors = np.linalg.eigh(np.asarray(weight.T @ seen.covariance @ weight))
  values, vectors = values[::-1][:12], vectors[:, ::-1][:, :12]
  np.testing.assert_allclose(found.eigenvalues, values, rtol=1e-9, atol=1e-12 * values[0])
  for rank in range(1, 13):
    ours, theirs = (e[:, :rank] @ e[:, :rank].T for e in (np.asarray(found.up.T), vectors))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    product = np.asarray(found.down)[:, :rank] @ np.asarray(found.up)[:rank]
    np.testing.assert_allclose(product, np.asarray(weight) @ theirs, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_of_all_maps_of_a_rank_it_has_the_least_error(seed):
  """For every rank centred <= uncentred <= ASVD and SVD."""
  x, weight = example(24, 32, seed=seed)
  with jax.enable_x64(True):
    seen, w = in_double(x), weight.astype(jnp.float64)
    centred, plain = basis(w, seen), basis(w, seen, centre=False)
    best = errors(x, weight, centred.down, centred.up, np.asarray(centred.mean))
    second = errors(x, weight, plain.down, plain.up)
    rivals = [errors(x, weight, *how(w, seen)) for how in (svd.asvd, svd.plain_svd)]
  slack = 1e-9 * best[0]  # all ranks but for rounding: the last one's error is 0
  assert (np.array(best) <= np.array(second) + slack).all()
  assert (np.array(second) <= np.minimum(*rivals) + slack).all()


def test_asvd_is_the_best_of_a_rank_for_inputs_of_unequal_weight():
  """The SVD in NumPy of the weight, its inputs weighed by the root of mean |x|."""
  x, weight = example(24, 32)
  scale = np.abs(np.asarray(x[0], np.float64)).mean(axis=0)[:, None] ** 0.5
  left, values, right = np.linalg.svd(scale * np.asarray(weight, np.float64), full_matrices=False)
  down, up = svd.asvd(weight, moments(x))
  for rank in (4, 24):
    expected = left[:, :rank] * values[:rank] @ right[:rank] / scale
    np.testing.assert_allclose(down[:, :rank] @ up[:rank], expected, atol=1e-3 * np.abs(expected).max())


@pytest.fixture(scope="module")
def made():
  model = random_model(dataclasses.replace(configs()["qwen3"], depth=2))
  return model, decompose(model, TOKENS, batch=16)


def test_ranks_that_are_data_give_the_model_of_those_ranks(made):
  model, bases = made
  ranks = {"q": 10, "mlp.up": 14, "mlp.down": 5}
  none = dict.fromkeys(bases, jnp.int32(0))
  logits = jax.jit(lambda model, bases, ranks: masked(model, bases, ranks)(TOKENS))
  given = none | {name: jnp.int32(rank) for name, rank in ranks.items()}
  close = dict(rtol=0, atol=5e-5)  # of logits up to 2.5
  np.testing.assert_allclose(logits(model, bases, given), truncate(model, bases, ranks)(TOKENS), **close)
  np.testing.assert_allclose(logits(model, bases, none), model(TOKENS), **close)
  assert logits._cache_size() == 1


def test_no_map_grows(made):
  """32 x 64: rank 21 takes fewer numbers than the matrix, 22 takes more; the bias counts."""
  model, bases = made
  shrinks = lambda rank: maps.bytes_of(truncate(model, bases, {"mlp.up": rank})) < maps.bytes_of(model)
  assert shrinks(20) and not shrinks(21)
  assert isinstance(maps.named(truncate(model, bases, {"mlp.up": 21}).blocks)["mlp.up"], Linear)
  assert bases["mlp.up"].cost(20, bias=True) == 20 * 96 + 64 and bases["mlp.up"].cost(30, bias=True) == 32 * 64


def test_ranks_are_chosen_by_loss_until_the_budget_is_met(made):
  model, bases = made
  targets = random_tokens(16, 24, seed=1)

  def loss(model):
    logp = jax.nn.log_softmax(model(TOKENS))
    return -jnp.take_along_axis(logp, targets[..., None], axis=-1).mean()

  found = sweep(model, bases, loss, shares=(0.9, 0.5, 0.2), multiple=2)
  dense, table = found
  np.testing.assert_allclose(dense, loss(model), rtol=1e-5)
  one = truncate(model, bases, {"mlp.down": 4})
  np.testing.assert_allclose(table["mlp.down"][4], loss(one), rtol=1e-4)
  assert choose(bases, found, budget=1.0) == {}
  for budget in (0.9, 0.6):
    ranks = choose(bases, found, budget=budget)
    small = truncate(model, bases, ranks)
    of_maps = lambda model: maps.bytes_of(maps.named(model.blocks))
    assert of_maps(small) <= budget * of_maps(model)
  with pytest.raises(InputError, match=r"budget is 0.01; the smallest ranks of the sweep take 0\.\d+"):
    choose(bases, found, budget=0.01)


def test_a_cheap_map_is_taken_before_a_dear_one():
  """Equal savings: the map whose loss rises least goes first, and its smaller rank only when that is worth it."""
  one = Basis(*(jnp.ones(shape) for shape in ((2, 8, 8), (2, 8, 8), (2, 8), (2, 8))))
  bases = {"q": one, "o": one}
  found = (1.0, {"q": {2: 1.5}, "o": {2: 1.01, 1: 9.0}})
  small = one.cost(2, bias=True) / 64
  pick = functools.partial(choose, bases, found)
  assert pick(budget=(small + 1) / 2) == {"o": 2}
  assert pick(budget=small) == {"o": 2, "q": 2}


def test_a_rival_at_a_budget(made):
  model, _ = made
  full = svd.decompose(model, TOKENS, batch=16)
  small = svd.truncate(model, full, budget=0.5)
  size = maps.bytes_of(maps.named(small.blocks)) / maps.bytes_of(maps.named(model.blocks))
  assert 0.35 < size <= 0.5
  bases = of_factors(full)
  ranks = {name: one.down.shape[-1] for name, one in maps.named(small.blocks).items()}
  np.testing.assert_array_equal(truncate(model, bases, ranks)(TOKENS), small(TOKENS))
  with pytest.raises(InputError, match="leaves q no rank"):
    svd.truncate(model, full, budget=0.01)
  with pytest.raises(InputError, match="budget is 1"):
    svd.truncate(model, full, budget=1.5)


def test_one_share_for_all_maps(made):
  _, bases = made
  ranks = uniform(bases, budget=0.5)
  for name, rank in ranks.items():
    one = bases[name]
    assert one.cost(rank, bias=True) <= 0.5 * one.weights < one.cost(rank + 1, bias=True)
  assert all(rank % 4 == 0 for rank in uniform(bases, budget=0.5, multiple=4).values())
  assert uniform(bases, budget=1) == {}  # at the whole budget no map is thinner
  with pytest.raises(InputError, match="leaves q no rank"):
    uniform(bases, budget=0.05)


def test_what_a_budget_leaves_over_is_given_back():
  """The dear map has to go to 0.25; then the cheap one, taken at its smallest rank before, has room for more."""
  one = Basis(*(jnp.zeros(shape) for shape in ((2, 8, 8), (2, 8, 8), (2, 8), (2, 8))))
  found = (1.0, {"q": {1: 1.01, 2: 1.005}, "o": {1: 3.0}})
  # Without a mean no bias: rank 1 costs 16 of 64.
  assert choose({"q": one, "o": one}, found, budget=0.4) == {"o": 1, "q": 2}
  with pytest.raises(InputError, match="the loss with o at rank 1 is no number"):
    choose({"q": one, "o": one}, (1.0, {"q": {1: 1.0}, "o": {1: float("nan")}}), budget=0.4)


def test_wrong_input_is_one_line(made):
  model, bases = made
  for budget in (0, 1.5):
    for call in (functools.partial(choose, bases, (1.0, {})), functools.partial(uniform, bases)):
      with pytest.raises(InputError, match=f"budget is {budget}; it is a share"):
        call(budget=budget)
  with pytest.raises(InputError, match="has 8 tokens; bases of 32 take 128"):
    decompose(model, TOKENS[:1, :8])
  huge = jax.tree.map(jnp.copy, model)
  huge.blocks.v.weight[...] = huge.blocks.v.weight[...].at[1].multiply(1e30)
  with pytest.raises(InputError, match="the basis of v, layer 1, holds NaN or infinity"):
    decompose(huge, TOKENS, batch=16)
  with pytest.raises(InputError, match=r"rank 33 of q; it must be 1\.\.32"):
    truncate(model, bases, {"q": 33})
  with pytest.raises(InputError, match="a map is 'head'"):
    truncate(model, bases, {"head": 3})
