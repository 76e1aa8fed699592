"""iCBS: the quadratic of a block, which weights are in it, what never moves, losses that fall by what is predicted."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import maps
from jaxlab.weights import icbs, pruning, qcbo
from jaxlab.weights.icbs import Plan, Settings, build_block, build_dense, plan, schedule, select, start
from jaxlab.weights.per_sample import Language, Tensors, by_layer
from tests.common import configs, random_model, random_tokens

QUICK = dict(solver="sa+swap", restarts=2)
ALL_FREE = dict(fix_prune=0, fix_keep=0, tabu=0)
EXACT = dict(hessian="exact", gradient=1.0, ridge=0.0) | ALL_FREE


@pytest.mark.parametrize("seed", range(2))
def test_the_quadratic_is_the_loss_of_the_step(seed):
  """const + x^T Q x = a g.step + step^T H step / 2 + lam |step|^2, of low rank as dense, for any x and any mask."""
  rng = np.random.default_rng(seed)
  n, samples, a, lam = 9, 5, 0.75, 0.03
  with jax.enable_x64(True):
    w0, g = jnp.asarray(rng.normal(size=n)), jnp.asarray(rng.normal(size=(samples, n)))
    change = -w0 * (rng.random(n) < 0.5)
    hessian, mean = g.T @ g / samples, g.mean(axis=0)
    low, constant = build_block(w0, change, g, gradient=a, ridge=lam)
    dense, same = build_dense(w0, change, hessian, mean, gradient=a, ridge=lam)
    np.testing.assert_allclose(low.dense(), dense.q, atol=1e-12)
    np.testing.assert_allclose(constant, same, atol=1e-12)
    alone, third = icbs.build_diagonal(w0, change, g, gradient=a, ridge=lam)
    diagonal, fourth = build_dense(w0, change, jnp.diag(jnp.diagonal(hessian)), mean, gradient=a, ridge=lam)
    np.testing.assert_allclose(alone.dense(), diagonal.q, atol=1e-12)
    np.testing.assert_allclose(third, fourth, atol=1e-12)
    for _ in range(5):
      x = jnp.asarray(rng.random(n) < 0.5)
      step = -(change + w0 * x)
      expected = a * mean @ step + step @ hessian @ step / 2 + lam * step @ step
      np.testing.assert_allclose(constant + low.energy(x), expected, atol=1e-10)
    # No change costs nothing.
    np.testing.assert_allclose(constant + low.energy(change != 0), 0, atol=1e-10)


@pytest.mark.parametrize("hessian", ["per_sample", "diagonal"])
def test_a_block_is_decided_by_the_least_energy_of_all_choices(hessian):
  """12 weights of which 6 are pruned, five samples: all 924 masks tried."""
  build = {"per_sample": build_block, "diagonal": icbs.build_diagonal}[hessian]
  settings, made, changed = Settings(hessian=hessian), Plan(6, 6, 0), 0
  for seed in range(10):
    rng = np.random.default_rng(seed)
    w0, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (12, (5, 12)))
    problem, constant = build(w0, jnp.where(jnp.arange(12) < 6, -w0, 0), g)
    x, energy = icbs.decide(problem, jax.random.key(seed), plan=made, s=settings)
    ones, least = qcbo.exhaustive(problem, 6)
    np.testing.assert_array_equal(x, ones)
    np.testing.assert_allclose(energy, least, rtol=1e-4, atol=1e-5)
    changed += least + constant < -1e-3
  assert changed >= 8  # mostly another mask than the one before


def regression(weights, features):
  """(network, params, batch) of y = x W against its own outputs."""
  params = {"w": jnp.asarray(weights, jnp.float32)}
  x = jnp.asarray(features, jnp.float32)
  target = x @ params["w"]
  return Tensors(lambda dense, batch: jnp.square(dense("w", batch[0]) - batch[1]).sum(axis=-1)), params, (x, target)


def test_in_a_quadratic_world_the_prediction_is_the_loss_and_the_mask_the_best():
  rng = np.random.default_rng(1)
  features = rng.normal(size=(30, 10)) @ rng.normal(size=(10, 10))
  network, params, batch = regression(rng.normal(size=(10, 1)), features)
  settings = Settings(block=10, epochs=1, steps=2, **EXACT, **QUICK)
  scores = {"w": pruning.magnitude(params["w"])}
  found = icbs.prune(network, params, scores, itertools.repeat(batch), density=0.5, settings=settings, measured=True)
  for step in found.steps:
    np.testing.assert_allclose(step["after"] - step["before"], step["predicted"], rtol=0, atol=1e-5)

  def loss(ones):
    kept = params["w"] * np.isin(np.arange(10), ones)[:, None]
    return float(network.loss({"w": jnp.asarray(kept, jnp.float32)}, batch))

  best = min(itertools.combinations(range(10), 5), key=loss)
  np.testing.assert_array_equal(np.flatnonzero(found.masks["w"]), best)
  assert found.steps[0]["predicted"] < -0.1 and found.steps[1]["swapped"] == 0 and found.covered == [1.0]
  assert set(best) != set(np.argsort(-np.abs(params["w"][:, 0]))[:5])


def test_a_pair_that_cancels_goes_together_but_not_by_the_released_cutoff():
  """Two equal inputs with opposite weights: either alone is missed, both are not."""
  x = np.random.default_rng(0).normal(size=(40, 4))
  x[:, 1] = x[:, 0]
  network, params, batch = regression([[2.0], [-2.0], [0.8], [0.7]], x)
  scores = {"w": pruning.magnitude(params["w"])}
  kept = {}
  for released in (False, True):
    settings = Settings(block=4, epochs=1, steps=1, released_cutoff=released, **EXACT, **QUICK)
    found = icbs.prune(network, params, scores, itertools.repeat(batch), density=0.5, settings=settings)
    kept[released] = np.flatnonzero(found.masks["w"]).tolist()
  assert kept[False] == [2, 3] and kept[True] != [2, 3]


def example(seed=0, samples=12):
  """A small network with inputs that are alike, its batches endless."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"first": draw(12, 16) / 3, "second": draw(16, 4) / 4}

  def losses(dense, batch):
    logits = dense("second", jax.nn.relu(dense("first", batch[0])))
    return -jnp.take_along_axis(jax.nn.log_softmax(4 * logits), batch[1][:, None], axis=1)[:, 0]

  network = Tensors(losses)
  mix = draw(12, 12)

  def batches(params=params):
    while True:
      x = draw(samples, 12) @ mix
      yield x, jnp.argmax(jax.nn.relu(x @ params["first"]) @ params["second"], axis=1)

  return network, params, batches()


SHORT = Settings(block=16, epochs=4, steps=5, least=1, **QUICK)


@pytest.fixture(scope="module")
def pruned():
  network, params, batches = example()
  scores = {name: pruning.magnitude(w) for name, w in params.items()}
  masks = []
  watch = lambda epoch, params, covered: masks.append({name: np.asarray(w != 0) for name, w in params.items()})
  found = icbs.prune(network, params, scores, batches, density=0.4, settings=SHORT, measured=True, watch=watch)
  return params, scores, found, masks


def test_densities_stay_and_what_comes_back_is_as_it_was(pruned):
  params, scores, found, masks = pruned
  assert len(found.steps) == 20 and len(masks) == 5 and 0 < found.covered[0] < found.covered[-1] <= 1
  for name, weight in params.items():
    first, last = pruning.keep(scores[name], 0.4), found.masks[name]
    assert first.sum() == last.sum() == round(0.4 * weight.size)
    assert (first != last).any() and all(mask[name].sum() == first.sum() for mask in masks)
    np.testing.assert_array_equal(found.params[name], np.where(last, weight, 0))
    fixed = np.asarray(start(scores[name], first, SHORT).fixed).reshape(weight.shape)
    assert fixed.sum() == int(0.42 * (~first).sum()) + int(0.35 * first.sum())
    np.testing.assert_array_equal(first[fixed], last[fixed])
    lowest = np.sort(np.asarray(scores[name])[~first])[int(0.42 * (~first).sum()) - 1]
    assert (np.asarray(scores[name])[~first & fixed] <= lowest).all()


def test_no_step_predicts_a_loss_and_losses_fall(pruned):
  _, _, found, _ = pruned
  assert all(step["predicted"] <= 1e-5 for step in found.steps)
  assert np.mean([step["after"] - step["before"] for step in found.steps]) < 0


def test_weights_wait_before_they_are_in_a_block_again():
  rng = np.random.default_rng(0)
  scores = rng.random((20, 10))
  state = start(scores, pruning.keep(scores, 0.4), Settings())
  p = plan(state, 16, 0.4)
  free = int((~state.fixed).sum())
  assert p == Plan(8, 8, 0.4 * free // 16)
  values, seen = jnp.asarray(rng.random(200), jnp.float32), []
  for step in range(12):
    index = np.asarray(select(values, state, step, plan=p))
    assert not set(index) & set(itertools.chain(*seen[max(0, step - p.reach) :]))
    assert not np.asarray(state.fixed)[index].any() and not np.asarray(state.mask)[index[:8]].any()
    assert np.asarray(state.mask)[index[8:]].all()
    seen.append(index)
    x = jnp.asarray(rng.permutation(16) < 8)
    _, state = icbs._moved(jnp.zeros((20, 10)), state, jnp.asarray(index), x, step)
  assert len(set(itertools.chain(*seen[-2:]))) == 32


def test_a_block_is_of_what_is_missed_most_and_needed_least():
  values = jnp.asarray([5.0, 9, 1, 7, 3, 8, 2, 6])
  mask = np.array([1, 0, 0, 0, 1, 1, 1, 0], bool)
  state = start(values, mask, Settings(**ALL_FREE))
  assert plan(state, 4, 0.0) == Plan(2, 2, 0) and plan(state, 8, 0.4) == Plan(4, 4, 0)
  assert select(values, state, 0, plan=Plan(2, 2, 0)).tolist() == [1, 3, 6, 4]
  # Three kept of eight: the block has more of the pruned ones.
  assert plan(start(values, np.arange(8) < 1, Settings(**ALL_FREE)), 4, 0.0) == Plan(3, 1, 0)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_to_decide_changes_nothing(density):
  network, params, batches = example()
  scores = {name: pruning.magnitude(w) for name, w in params.items()}
  found = icbs.prune(network, params, scores, batches, density=density, settings=Settings(epochs=1, steps=2))
  for name, weight in params.items():
    np.testing.assert_array_equal(found.params[name], density * weight)
  assert all(step["swapped"] == 0 for step in found.steps)


@pytest.mark.parametrize(
  "changes",
  [dict(hessian="mean"), dict(hessian="diagonal"), dict(hessian="exact", block=8), dict(released_cutoff=True)]
  + [dict(select=how) for how in icbs.SELECTIONS[1:]],
  ids=str,
)
def test_every_way_keeps_the_density(changes):
  network, params, batches = example()
  scores = {name: pruning.magnitude(w) for name, w in params.items()}
  settings = dataclasses.replace(SHORT, epochs=1, steps=2, **changes)
  found = icbs.prune(network, params, scores, batches, density=0.4, settings=settings)
  assert all(found.masks[name].sum() == round(0.4 * w.size) for name, w in params.items())


def test_moves_that_make_it_worse_are_taken_back():
  """Blocks chosen at random, of one sample, are often wrong: on the held-out batch the loss never rises."""
  network, params, batches = example(samples=1)
  scores = {name: pruning.magnitude(w) for name, w in params.items()}
  _, _, more = example(seed=1, samples=40)
  held = next(more)
  held = held[0], jnp.argmax(jax.nn.relu(held[0] @ params["first"]) @ params["second"], axis=1)
  settings = dataclasses.replace(SHORT, restore=True, select="random")
  found = icbs.prune(network, params, scores, batches, density=0.4, settings=settings, held=held)
  best, restored = np.inf, 0
  for step in found.steps:
    assert step["restored"] == (step["held"] > best) or best == np.inf
    best, restored = min(best, step["held"]), restored + step["restored"]
  assert 0 < restored < len(found.steps)
  np.testing.assert_allclose(network.loss(found.params, held), best, rtol=1e-6)
  assert all(found.masks[name].sum() == round(0.4 * w.size) for name, w in params.items())


def test_steps_go_by_the_logarithm_of_a_maps_size():
  sizes = {"small": 10, "large": 10_000}
  names = schedule(sizes, Settings(steps=100, least=1), np.random.default_rng(0))
  assert len(names) == 100 and names.count("large") == 80
  assert names != sorted(names)
  assert len(schedule(sizes, Settings(steps=7, least=10), np.random.default_rng(0))) == 7


def test_a_language_model_gets_better_at_its_density():
  model = random_model(dataclasses.replace(configs()["qwen3"], depth=1))
  rows = random_tokens(8, 25)
  begun = pruning.prune(model, rows[:, :-1], "wanda", density=0.4)
  network = Language()
  how = dict(density=0.4, masks=by_layer(begun.masks))
  settings = Settings(block=128, epochs=1, steps=8, least=1, **QUICK)
  found = icbs.prune(network, model, by_layer(begun.scores), itertools.repeat(rows), settings=settings, **how)
  assert float(network.loss(found.params, rows)) < float(network.loss(begun.model, rows)) - 0.05
  for name, one in maps.named(found.params.blocks).items():
    weight = np.asarray(one.weight[...])
    assert ((weight != 0).sum(axis=(1, 2)) == begun.masks[name].sum(axis=(1, 2))).all()
    original = np.asarray(maps.named(model.blocks)[name].weight[...])
    np.testing.assert_array_equal(weight, np.where(weight != 0, original, 0))
  np.testing.assert_array_equal(found.params.embedding[...], model.embedding[...])
  dense = icbs.prune(network, model, by_layer(begun.scores), itertools.repeat(rows), density=1.0, settings=settings)
  np.testing.assert_array_equal(dense.params(rows), model(rows))


def test_ones_own_network_in_three_lines():
  network, weights, batches = example()
  scores = {name: pruning.magnitude(w) for name, w in weights.items()}
  found = icbs.prune(network, weights, scores, batches, density=0.4, settings=SHORT)
  assert set(found.params) == set(weights)


def test_wrong_input_is_one_line():
  network, params, batches = example()
  scores = {name: pruning.magnitude(w) for name, w in params.items()}
  run = lambda scores=scores, batches=batches, **how: icbs.prune(
    network, params, scores, batches, **dict(density=0.4, settings=SHORT) | how
  )
  with pytest.raises(InputError, match="density is 40"):
    run(density=40)
  with pytest.raises(InputError, match="scores of third; the network's maps are first, second"):
    run({"third": jnp.ones((2, 2))})
  with pytest.raises(InputError, match=r"the scores of first have shape \(2, 2\), the map \(12, 16\)"):
    run({"first": jnp.ones((2, 2))}, masks={"first": jnp.ones((12, 16))})
  with pytest.raises(InputError, match="no map has scores"):
    run({})
  with pytest.raises(InputError, match="no batch is left after 1 steps"):
    run(batches=iter([next(batches)]))
  with pytest.raises(InputError, match="the batch of step 1 is empty"):
    run(batches=iter([(jnp.zeros((0, 12)), jnp.zeros(0, int))]))
  with pytest.raises(InputError, match="second holds NaN or infinity"):
    icbs.prune(network, params | {"second": params["second"].at[0, 0].set(jnp.nan)}, scores, batches, density=0.4)
  with pytest.raises(InputError, match="rows have 1 token"):
    Language().loss(random_model(configs()["qwen3"]), random_tokens(2, 1))
  with pytest.raises(InputError, match=r"step 1, map (first|second): loss nan"):
    run(batches=iter([(jnp.full((2, 12), jnp.nan), jnp.zeros(2, int))]))
  with pytest.raises(InputError, match="restore takes a held-out batch"):
    run(settings=dataclasses.replace(SHORT, restore=True))
  for wrong, message in (
    (dict(hessian="fisher"), "hessian is 'fisher'"),
    (dict(select="best"), "select is 'best'"),
    (dict(solver="qpu"), "solver is 'qpu'"),
    (dict(tabu=4), "tabu is 4; it is a share"),
    (dict(block=0), "block is 0"),
    (dict(ridge=-1), "ridge is -1"),
  ):
    with pytest.raises(InputError, match=message):
      Settings(**wrong)
  assert qcbo.SOLVERS == ("sa", "swap", "sa+swap")
