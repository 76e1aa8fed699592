"""Round to nearest, NF4, GPTQ and SpQR: the grid, the error, the loop against one written out in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxlab.core.checks import InputError
from jaxlab.models import hub, maps
from jaxlab.models.map_forms import Affine
from jaxlab.models.packed_maps import (
  NORMAL_LEVELS,
  NormalFloat,
  WithOutliers,
  pack_shared,
  unpack_maxima,
  unpack_shared,
)
from jaxlab.training import lora
from jaxlab.weights import lord
from jaxlab.weights.calibration import moments, with_maps
from jaxlab.weights.quantise import awq, clipped, gptq, nf4, quantise, rtn, spqr
from tests.common import configs, random_model, random_tokens

TOKENS = random_tokens(16, 24)


def example(inputs=32, outputs=12, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(1, 500, inputs)) @ (rng.normal(size=(inputs, inputs)) * np.exp(-np.arange(inputs) / 8))
  return jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)


@pytest.mark.parametrize("bits, group", [(2, 8), (3, 16), (4, 32), (8, 32)])
def test_nearest_is_within_half_a_step_of_every_weight(bits, group):
  _, weight = example()
  one = rtn(weight, bits=bits, group=group)
  step = np.repeat(np.asarray(one.scale[...], np.float32), group, axis=0)
  # The grid's ends are moved by the rounding of its zero, half a step at most.
  assert np.all(np.abs(one.weight() - weight) <= 1.01 * step)
  assert np.mean(np.abs(one.weight() - weight) <= 0.501 * step) > 0.9
  assert maps.bytes_of(one) == bits * 32 * 12 // 8 + 3 * (32 // group) * 12
  np.testing.assert_allclose(one(jnp.eye(32)), one.weight(), rtol=1e-5)


def numpy_gptq(weight, second, bits, group):
  """The published loop, column by column on (outputs, inputs), in the order of activations on static grids."""
  order = np.argsort(-np.diag(second), kind="stable")
  w = np.array(weight, np.float64).T
  part = w.reshape(len(w), -1, group)
  low, high = np.minimum(part.min(axis=2), 0), np.maximum(part.max(axis=2), 0)
  scales = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
  zeros = np.clip(np.round(-low / scales), 0, 2**bits - 1)
  w, h = w[:, order], 2 * np.array(second, np.float64)[np.ix_(order, order)]
  h += 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
  spread = np.linalg.cholesky(np.linalg.inv(h)).T
  out = np.zeros_like(w)
  for j in range(w.shape[1]):
    scale, zero = scales[:, order[j] // group], zeros[:, order[j] // group]
    code = np.clip(np.round(w[:, j] / scale) + zero, 0, 2**bits - 1)
    out[:, order[j]] = scale * (code - zero)
    w[:, j + 1 :] -= np.outer((w[:, j] - out[:, order[j]]) / spread[j, j], spread[j, j + 1 :])
  return out.T


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_the_published_loop(bits):
  x, weight = example()
  seen = moments(x)
  found = gptq(weight, seen, bits=bits, group=16).weight()
  expected = numpy_gptq(weight, seen.second, bits, 16)
  # A weight half way between two codes may fall to either in another precision, and others follow it.
  assert np.mean(np.abs(found - expected) < 1e-3) > 0.98
  loss = lambda w: float(((x @ w - x @ weight) ** 2).sum())
  np.testing.assert_allclose(loss(found), loss(jnp.asarray(expected, jnp.float32)), rtol=0.05)
  assert loss(found) < 0.7 * loss(rtn(weight, bits=bits, group=16).weight())


def planted(inputs=32, outputs=12, seed=0):
  """(x, weight, places): one far outlier in every sixth group of 16; inputs that vary together, by unequal amounts."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(1, 2000, inputs)) @ (np.eye(inputs) + 0.3 * rng.normal(size=(inputs, inputs)) / inputs**0.5)
  x = x * np.exp(0.4 * rng.normal(size=inputs))
  groups = rng.choice(inputs // 16 * outputs, inputs // 16 * outputs // 6, replace=False)
  where = (groups // outputs * 16 + rng.integers(0, 16, len(groups))) * outputs + groups % outputs
  weight = rng.normal(size=inputs * outputs)
  weight[where] = 12 * rng.choice([-1.0, 1.0], len(where)) + rng.normal(size=len(where))
  return jnp.asarray(x, jnp.float32), jnp.asarray(weight.reshape(inputs, outputs), jnp.float32), where


def numpy_shared(numbers):
  """3 bits of what 16 numbers one after the other span."""
  flat, made = numbers.ravel(), []
  for begin in range(0, flat.size, 16):
    part = flat[begin : begin + 16]
    low = np.float64(np.float16(part.min()))
    step = np.float64(np.float16((part.max() - low) / 7))
    made.append(low + step * np.clip(np.round((part - low) / (step or 1)), 0, 7))
  return np.concatenate(made).reshape(numbers.shape)


def numpy_spqr(weight, second, bits, group, count):
  """(weights given back, the flat places of outliers), weight by weight."""
  w, top = np.array(weight, np.float64), 2**bits - 1
  inputs, outputs = w.shape
  order = np.argsort(-np.diag(second), kind="stable")
  h = 2 * np.array(second, np.float64)
  h += 0.01 * np.mean(np.diag(h)) * np.eye(inputs)
  inverse = np.linalg.inv(h)
  ends = lambda part: (min(0, part.min()), max(0, part.max()))
  cost = np.zeros(w.shape)
  for i in range(inputs):
    begin = i // group * group
    for o in range(outputs):
      low, high = ends(np.delete(w[begin : begin + group, o], i - begin))
      scale = np.float64(np.float16((high - low) / top))
      zero = np.clip(np.round(-low / scale), 0, top)
      near = scale * (np.clip(np.round(w[i, o] / scale) + zero, 0, top) - zero)
      cost[i, o] = (w[i, o] - near) ** 2 / (2 * inverse[i, i])
  places = np.argsort(-cost.ravel())[:count]
  kept = np.isin(np.arange(w.size), places).reshape(w.shape)
  parts = np.where(kept, 0, w).reshape(-1, group, outputs)
  low, high = np.minimum(parts.min(axis=1), 0), np.maximum(parts.max(axis=1), 0)
  scales = numpy_shared(((high - low) / top).astype(np.float16).astype(np.float64))
  zeros = numpy_shared(np.clip(np.round(-low / scales), 0, top))
  spread, out = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T, np.zeros_like(w)
  for turn, i in enumerate(order):
    scale, zero = scales[i // group], zeros[i // group]
    near = scale * (np.clip(np.round(w[i] / scale + zero), 0, top) - zero)
    out[i] = np.where(kept[i], w[i].astype(np.float16), near)
    w[order[turn + 1 :]] -= np.outer(spread[turn, turn + 1 :], (w[i] - out[i]) / spread[turn, turn])
  return out, places


@pytest.mark.parametrize("bits", [2, 3])
def test_spqr_is_the_loop_with_outliers_and_numbers_that_share_steps(bits):
  x, weight, where = planted()
  seen = moments(x)
  one = spqr(weight, seen, bits=bits, group=16, outliers=12 / weight.size)
  expected, places = numpy_spqr(weight, seen.second, bits, 16, 12)
  rows = np.repeat(np.arange(32), one.counts[...])
  assert set(rows * 12 + np.asarray(one.outputs[...])) == set(places) and set(where) <= set(places)
  assert np.mean(np.abs(one.weight() - expected) < 1e-2) > 0.95  # as of GPTQ's loop above
  loss = lambda w: float(((x @ w - x @ weight) ** 2).sum())
  np.testing.assert_allclose(loss(one.weight()), loss(jnp.asarray(expected, jnp.float32)), rtol=0.1)


def test_spqr_without_outliers_on_steps_that_are_exact_is_gptq():
  """Groups of one smallest and one largest weight have one scale and one zero: nothing is lost in their 3 bits."""
  x, weight = example()
  grouped = jnp.clip(weight, -1.4, 1.4).reshape(2, 16, 12).at[:, 0].set(-1.5).at[:, 1].set(1.5)
  weight, seen = grouped.reshape(32, 12), moments(x)
  how = dict(bits=4, group=16)
  np.testing.assert_allclose(
    spqr(weight, seen, outliers=0, **how).weight(), gptq(weight, seen, **how).weight(), atol=1e-6
  )


def test_outliers_are_held_as_they_are_and_counted():
  """Inputs that do not vary together spread no error: an outlier is its weight in 16 bits."""
  x, weight, where = planted()
  seen = moments(x)
  alone = dataclasses.replace(seen, mean=0 * seen.mean, scatter=jnp.diag(jnp.diagonal(seen.scatter)))
  one = spqr(weight, alone, bits=3, group=16, outliers=len(where) / weight.size)
  narrow = np.asarray(weight).ravel()[where].astype(np.float16)
  np.testing.assert_array_equal(np.asarray(one.weight()).ravel()[where], narrow.astype(np.float32))
  # Codes; 24 scales and as many zeros in two sixteens each, of 6 bytes and two 16-bit numbers; 4 outliers; counts.
  assert len(where) == 4 and maps.bytes_of(one) == 3 * 32 * 12 // 8 + 2 * 2 * (6 + 4) + 4 * (2 + 2) + 32 * 2
  np.testing.assert_allclose(one(jnp.eye(32)), one.weight(), rtol=1e-6)


def test_few_outliers_are_worth_more_than_bits():
  """Of a weight with planted outliers SpQR in 3 bits takes fewer bytes than GPTQ in 3 of as small groups, or in 4 of
  larger ones, and errs less."""
  x, weight, where = planted(256, 96)
  seen = moments(x)
  small = spqr(weight, seen, bits=3, group=16, outliers=len(where) / weight.size)
  loss = lambda one: float(((x @ one.weight() - x @ weight) ** 2).sum())
  for bits, group in ((3, 16), (4, 64)):
    rival = gptq(weight, seen, bits=bits, group=group)
    assert maps.bytes_of(small) < maps.bytes_of(rival) and loss(small) < 0.5 * loss(rival)


def test_numbers_that_share_a_step_are_within_half_of_it():
  numbers = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (3, 11)), jnp.float32)
  codes, ends = pack_shared(numbers)
  assert codes.shape == (6, 3) and ends.shape == (2, 3)
  assert np.abs(unpack_shared(codes, ends, 3, 11) - numbers).max() <= 0.5 * float(ends[1].max()) + 2e-3
  np.testing.assert_array_equal(unpack_shared(*pack_shared(jnp.full((2, 5), 0.25)), 2, 5), 0.25)


def saved(small, folder):
  """The network again from its folder, whose bytes are those that are counted."""
  hub.save(small, folder)
  again = hub.load(folder)
  np.testing.assert_array_equal(again(TOKENS), small(TOKENS))
  taken = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
              for file in folder.glob("*.safetensors"))  # fmt: skip
  assert taken == maps.bytes_of(small) == maps.bytes_of(again)
  return again


def test_factors_in_spqr_are_a_folder_of_the_bytes_that_are_counted(tmp_path):
  model = random_model(dataclasses.replace(configs()["llama"], depth=2))
  thin = lord.truncate(model, lord.decompose(model, TOKENS, batch=16), {"mlp.up": 8})
  small = quantise(thin, TOKENS, spqr, bits=3, group=8, batch=16)
  assert all(isinstance(one, WithOutliers) for one in maps.parts(small.blocks).values())
  saved(small, tmp_path)


@pytest.mark.parametrize(
  "how, message",
  [
    (dict(outliers=1.5), "outliers is 1.5; it must be a share"),
    (dict(group=1), "group is 1; a weight is held against the others"),
  ],
)
def test_spqr_refuses_in_one_line(how, message):
  x, weight = example()
  with pytest.raises(InputError, match=message):
    spqr(weight, moments(x), bits=3, **how)


def test_an_input_that_is_never_used_costs_nothing():
  x, weight = example()
  x = x.at[..., 5].set(0)
  one = gptq(weight, moments(x), bits=3, group=16)
  assert np.all(np.isfinite(one.weight())) and np.all(np.asarray(one.weight()[5]) == 0)
  assert np.all(np.isfinite(spqr(weight, moments(x), bits=3, group=16).weight()))


def test_a_clipped_grid_errs_less_on_the_outputs_it_is_chosen_by():
  x, weight = example()
  # Inputs that do not vary together: the groups' errors add up.
  x = x * jnp.where(jnp.arange(32) % 2, 1, 0.3)
  seen = moments(x)
  second = np.asarray(seen.second)
  for bits in (2, 3):
    plain, narrow = (how(weight, seen, bits=bits, group=8).weight() - weight for how in (rtn, clipped))
    parts = lambda e: sum(
      np.einsum("io,ij,jo->o", e[i : i + 8], second[i : i + 8, i : i + 8], e[i : i + 8]) for i in range(0, 32, 8)
    )
    assert np.all(parts(narrow) <= parts(plain) * 1.0001) and parts(narrow).sum() < 0.9 * parts(plain).sum()


def test_awq_protects_inputs_that_are_large():
  """One input of the first norm is large: rounding costs less where it is scaled up first."""
  model = random_model(dataclasses.replace(configs()["llama"], depth=2, kv_heads=4))
  for norm in (model.blocks.attention_norm, model.blocks.mlp_norm):
    norm.gain[...] = norm.gain[...].at[:, 3].multiply(30.0)
  logits = model(TOKENS)
  apart = lambda small: float(jnp.abs(small(TOKENS) - logits).mean())
  how = dict(bits=3, group=16, batch=16)
  small, nearest = awq(model, TOKENS, **how), quantise(model, TOKENS, rtn, **how)
  assert apart(small) < 0.8 * apart(nearest)
  assert maps.bytes_of(small) == maps.bytes_of(nearest)  # scales are folded


def test_factors_are_quantised_one_behind_the_other():
  model = random_model(dataclasses.replace(configs()["llama"], depth=2))
  small = lord.truncate(model, lord.decompose(model, TOKENS, batch=16), {"mlp.up": 16, "q": 8})
  many, few = (quantise(small, TOKENS, bits=bits, group=8, batch=16) for bits in (8, 3))
  one = maps.named(many.blocks)["mlp.up"]
  assert one.spec["rank"] == 16 and one.spec["down"]["bits"] == 8 and one.spec["bias"]
  apart = lambda one: float(jnp.abs(one(TOKENS) - small(TOKENS)).mean())
  assert apart(many) < 0.2 * apart(few) and maps.bytes_of(few) < maps.bytes_of(many) < maps.bytes_of(small)


def test_a_model_in_many_bits_is_the_model_and_fewer_bits_lose_more():
  model = random_model(dataclasses.replace(configs()["llama"], depth=2))
  logits, last = model(TOKENS), 0.0
  for bits in (8, 3):
    apart = float(jnp.abs(quantise(model, TOKENS, bits=bits, group=16, batch=16)(TOKENS) - logits).mean())
    assert apart > last
    last = apart
    assert bits < 8 or apart < 0.02 * float(jnp.abs(logits).mean()) + 0.02


def test_wrong_input_is_one_line():
  model = random_model(configs()["llama"])
  with pytest.raises(InputError, match=r"bits is 9; it must be 1\.\.8"):
    quantise(model, TOKENS, bits=9)
  with pytest.raises(InputError, match="the inputs of q"):
    quantise(model, TOKENS, bits=4, group=24)


def test_the_levels_of_nf4_are_the_published_quantiles():
  """Eight of the normal's upper half from 0.9677083 on, seven of the lower, 0; the paper's table to seven digits."""
  outer = 0.9677083
  above, below = (scipy.stats.norm.ppf(np.linspace(outer, 0.5, count)[:-1]) for count in (9, 8))
  expected = np.sort(np.concatenate([above, [0], -below])) / above.max()
  np.testing.assert_allclose(NORMAL_LEVELS, expected, atol=1e-6)
  np.testing.assert_allclose(np.asarray(NORMAL_LEVELS)[[0, 1, 6, 8, 14, 15]],
                             [-1, -0.6961928, -0.0910500, 0.0795803, 0.7229568, 1], atol=1e-6)  # fmt: skip


def test_nf4_takes_the_nearest_level_and_two_scales():
  """Of a normal matrix in blocks of 64 it leaves what round to nearest of 4 bits does, in fewer bytes."""
  weight = np.random.default_rng(0).normal(size=(256, 96)).astype(np.float32)
  one = nf4(weight)
  most = np.repeat(unpack_maxima(one.maxima[...], one.scale[...], one.mean[...]), 64, axis=0)
  nearest = np.abs(most[..., None] * np.array(NORMAL_LEVELS, np.float32) - weight[..., None]).min(axis=-1)
  np.testing.assert_allclose(np.abs(one.weight() - weight), nearest, atol=1e-6)
  exact = np.abs(weight.reshape(4, 64, 96)).max(axis=1)
  np.testing.assert_allclose(most[::64], exact, rtol=0.05)  # 8 bits of what the mean leaves
  left = lambda made: float((np.asarray(made.weight() - weight) ** 2).mean())
  np.testing.assert_allclose(left(one), left(rtn(weight, bits=4, group=64)), rtol=0.05)
  assert maps.bytes_of(one) == 256 * 96 // 2 + 4 * 96 + 2 * 2 + 2 < maps.bytes_of(rtn(weight, bits=4, group=64))
  np.testing.assert_allclose(one(jnp.eye(256)), one.weight(), atol=1e-6)
  np.testing.assert_array_equal(nf4(jnp.zeros((64, 3))).weight(), 0)


def test_adapters_beside_nf4_are_qlora(tmp_path):
  """Of plain maps, of one with a bias and of factors: a folder of the bytes that are counted, gradients of adapters."""
  model = random_model(dataclasses.replace(configs()["llama"], depth=2))
  bias = jnp.asarray(np.random.default_rng(0).normal(size=(2, model.blocks.q.weight.shape[-1])), jnp.float32)
  model = with_maps(model, {"q": Affine(model.blocks.q.weight[...], bias)})
  thin = lord.truncate(model, lord.decompose(model, TOKENS, batch=16), {"mlp.up": 8})
  small = quantise(thin, TOKENS, nf4, bits=4, group=8, batch=16)
  forms = maps.parts(small.blocks)
  assert all(isinstance(one, NormalFloat) for one in forms.values()) and forms["q"].bias is not None
  np.testing.assert_array_equal(forms["q"].bias[...], bias)
  assert {"mlp.up.down", "mlp.up.up"} <= set(forms)
  again = saved(small, tmp_path)
  adapters = lora.init(again, jax.random.key(0), rank=2, where=lambda name: name.startswith("blocks."))
  loss = lambda adapters: (lora.merge(again, adapters)(TOKENS) ** 2).mean()
  slope = jax.jit(jax.grad(loss, allow_int=True))(adapters)
  assert all(bool((one != 0).any()) for one in slope.b.values()) and set(slope.b) == {
    f"blocks.{name}" for name in maps.named(again.blocks)
  }


def test_nf4_has_four_bits():
  with pytest.raises(InputError, match="bits is 3; NF4 has 4"):
    quantise(random_model(configs()["llama"]), TOKENS, nf4, bits=3, group=8)
