"""ASVD's search: losses of one map alone, the cut against all cuts, ranks of every layer in memory and in a folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import generate, hub, maps
from jaxlab.models.layers import Linear
from jaxlab.weights import svd
from jaxlab.weights.calibration import with_maps
from jaxlab.weights.svd_search import search, sensitivity, truncate_each
from tests.common import configs, random_model, random_tokens

TOKENS = random_tokens(16, 24)


@pytest.fixture(scope="module")
def made():
  model = random_model(dataclasses.replace(configs()["qwen3"], depth=2))
  return model, svd.decompose(model, TOKENS, svd.asvd, batch=16)


def loss_of(model):
  logp = jax.nn.log_softmax(model(TOKENS[:, :-1]))
  return -jnp.take_along_axis(logp, TOKENS[:, 1:, None], axis=-1).mean()


def product(model, full, ratios):
  """The model with the matrices that the factors of those ratios multiply to."""
  forms = {}
  for name, own in ratios.items():
    weight = np.array(maps.named(model.blocks)[name].weight[...])
    inputs, outputs = weight.shape[1:]
    for layer, ratio in enumerate(own):
      if ratio < 1:
        rank = int(ratio * inputs * outputs / (inputs + outputs))
        weight[layer] = np.asarray(full[name].down[layer, :, :rank]) @ np.asarray(full[name].up[layer, :rank])
    forms[name] = Linear(jnp.asarray(weight), (None, None))
  return with_maps(model, forms)


def test_a_trial_is_the_loss_with_one_map_of_one_layer_at_its_ratio(made):
  model, full = made
  found = sensitivity(model, {name: full[name] for name in ("k", "mlp.down")}, loss_of, ratios=(0.4, 0.8))
  assert len(found) == 2 * 2 * 2
  for name, layer, ratio in (("k", 1, 0.4), ("mlp.down", 0, 0.8)):
    ratios = {name: [ratio if i == layer else 1 for i in range(2)]}
    np.testing.assert_allclose(found[name, layer, ratio], loss_of(product(model, full, ratios)), rtol=1e-5)


@pytest.mark.parametrize("budget", [0.45, 0.7, 0.9, 1.0])
def test_the_cut_is_the_best_of_all_cuts(made, budget):
  """Of all that keep the parameters within the budget it gives up the most trials of the largest loss."""
  _, full = made
  rng = np.random.default_rng(0)
  losses = {(name, layer, ratio): float(rng.normal()) for name in full for layer in (0, 1) for ratio in (0.4, 0.6, 0.9)}
  worst_first = sorted(losses, key=losses.get, reverse=True)
  total = sum(one.shape[0] * one.shape[1] * one.shape[2] for one in full.values())
  best = None
  for cut in range(len(worst_first) + 1):
    kept = worst_first[cut:]
    own = {name: [min([1.0, *(r for n, i, r in kept if (n, i) == (name, layer))]) for layer in (0, 1)] for name in full}
    size = 0
    for name, ratios in own.items():
      _, n, m = full[name].shape
      size += sum(n * m if r == 1 else int(r * n * m / (n + m)) * (n + m) for r in ratios)
    if size <= budget * total:
      best = own
  assert search(full, losses, budget=budget) == best
  assert (budget == 1.0) == all(ratio == 1 for own in best.values() for ratio in own)


def test_layers_of_unequal_ranks_are_the_products_and_a_folder_of_no_zeros(made, tmp_path):
  model, full = made
  ratios = {name: [0.4, 0.9] for name in full} | {"q": [1.0, 0.5], "o": [0.6, 1.0], "v": [1.0, 1.0]}
  small = truncate_each(model, full, ratios)
  logits = small(TOKENS)
  np.testing.assert_allclose(logits, product(model, full, ratios)(TOKENS), rtol=1e-3, atol=1e-3)
  assert isinstance(maps.named(small.blocks)["v"], Linear)
  hub.save(small, tmp_path)
  again = hub.load(tmp_path)
  np.testing.assert_array_equal(again(TOKENS), logits)
  np.testing.assert_array_equal(generate(again, TOKENS[:2], tokens=3), generate(small, TOKENS[:2], tokens=3))
  numbers = 0
  for name, own in ratios.items():
    _, n, m = full[name].shape
    numbers += sum(n * m if r == 1 else int(r * n * m / (n + m)) * (n + m) for r in own)
  groups = 4 * 2 * 6  # the number of its basis, of every layer of six maps
  rest = maps.bytes_of(model) - maps.bytes_of(maps.named(model.blocks))
  taken = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
              for file in tmp_path.glob("*.safetensors"))  # fmt: skip
  assert taken == maps.bytes_of(small) == maps.bytes_of(again) == rest + 4 * numbers + groups


def test_wrong_input_is_one_line(made):
  model, full = made
  losses = {(name, layer, 0.5): 1.0 for name in full for layer in (0, 1)}
  with pytest.raises(InputError, match=r"budget is 0.3; the smallest ratios take 0\.4\d+"):
    search(full, losses, budget=0.3)
  with pytest.raises(InputError, match="budget is 0;"):
    search(full, losses, budget=0)
  with pytest.raises(InputError, match=r"the loss with q, layer 1, at ratio 0\.5 is no number"):
    search(full, losses | {("q", 1, 0.5): float("nan")}, budget=0.7)
  for ratio, message in ((1.0, "a ratio is 1.0"), (0.01, "ratio 0.01 leaves q no rank")):
    with pytest.raises(InputError, match=message):
      sensitivity(model, full, loss_of, ratios=(ratio,))
  with pytest.raises(InputError, match="q is a SharedBasis; only plain maps"):
    truncate_each(truncate_each(model, full, {"q": [0.5, 0.5]}), full, {"q": [0.5, 0.5]})
  spec = {"kind": "shared_basis", "rank": [3], "groups": [1, 0], "writes": False}
  with pytest.raises(InputError, match=r"rank is \[3\]; it must be that of every layer's basis"):
    maps.shaped(model, {"q": spec})
