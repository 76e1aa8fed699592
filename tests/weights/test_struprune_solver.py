"""The solver of STRUPRUNE: ADMM beside every support there is, exact updates beside grids, allocation beside others."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxlab.core.checks import InputError
from jaxlab.models.config import TransformerConfig
from jaxlab.weights import struprune_solver as solver
from jaxlab.weights.structured import Groups, Least, costs, counts, parameters
from jaxlab.weights.struprune_allocation import softmax, threshold

CONFIG = TransformerConfig(
  vocab_size=64, depth=3, width=16, q_heads=8, kv_heads=4, head_dim=4, mlp_width=10, tied_embeddings=True
)
NONE = Least(0, 0)


def problem(seed: int, *, uneven: float = 0.0, groups=8, size=2, outputs=5):
  """(A, C, W0) of correlated inputs whose outputs another map gave."""
  rng = np.random.default_rng(seed)
  n = groups * size
  x = rng.normal(size=(200, n)) @ (np.eye(n) + 0.6 * rng.normal(size=(n, n)))
  weight = rng.normal(size=(n, outputs)) * np.repeat(np.exp(uneven * rng.normal(size=groups)), size)[:, None]
  y = x @ weight + rng.normal(size=(200, outputs))
  x, y, weight = (jnp.asarray(a, jnp.float32) for a in (x, y, weight))
  return (*solver.ridged(x.T @ x / 200, x.T @ y / 200, weight, 1e-2), weight)


@pytest.mark.parametrize(("uneven", "most"), [(1.0, 16), (0.0, 12)])
def test_admm_is_no_worse_than_one_step_and_mostly_the_best_support_there_is(uneven, most):
  """Of groups that matter alike, many supports are as good as the best: it is found less often."""
  size, groups, keep = 2, 8, 4
  choices = np.array([np.isin(np.arange(groups), c) for c in itertools.combinations(range(groups), keep)])

  @jax.jit
  def losses(gram, cross, weight):
    after = lambda mask: solver.loss(gram, cross, solver.least_squares(gram, cross, jnp.repeat(mask, size)))
    once = solver.largest(solver.energies(jnp.diagonal(gram), weight, size), keep)
    plain = solver.loss(gram, cross, jnp.where(jnp.repeat(once, size)[:, None], weight, 0))
    found = solver.admm(gram, cross, weight, keep, size=size)
    return found.sum(), after(found), after(once), plain, jax.lax.map(after, jnp.asarray(choices))

  best, apart = np.zeros(2), np.zeros(2)
  for seed in range(20):
    made = problem(seed, uneven=uneven, groups=groups, size=size)
    count, ours, once, plain, every = losses(*made)
    slack = 1e-4 * abs(float(plain))
    assert count == keep and every.min() - slack <= ours <= once + slack and once <= plain + slack
    best += [float(found) <= float(every.min()) + slack for found in (ours, once)]
    apart += [float(found - every.min()) / abs(float(every.min())) for found in (ours, once)]
  assert best[0] >= most and apart[0] < 0.5 * apart[1], (best, apart)


def test_least_squares_on_all_inputs_gives_the_weights_that_made_the_outputs():
  rng = np.random.default_rng(0)
  x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((100, 6), (6, 3)))
  gram, cross = solver.ridged(x.T @ x / 100, x.T @ x @ weight / 100, weight, 0.5)
  np.testing.assert_allclose(solver.least_squares(gram, cross, jnp.ones(6, bool)), weight, atol=1e-5)


def test_the_loss_that_obs_tells_of_a_group_is_what_leaving_it_out_adds():
  gram, _, weight = problem(0)
  cross = gram @ weight  # W is the best there is
  found = solver.obs(gram, weight, 2)
  full = solver.loss(gram, cross, weight)
  for group in range(8):
    keep = jnp.arange(16) // 2 != group
    left = solver.loss(gram, cross, solver.least_squares(gram, cross, keep)) - full
    np.testing.assert_allclose(found[group], left, rtol=2e-3)


def test_steps_of_pre_activations_are_the_best_of_a_grid():
  rng = np.random.default_rng(0)
  p, m, gate = (jnp.asarray(2 * rng.normal(size=300), jnp.float32) for _ in range(3))
  p = p.at[:20].set(0)
  weights = dict(alpha=0.3, gamma=0.7)
  grid = jnp.linspace(-12, 12, 4801)[:, None]
  relu = jax.nn.relu
  silu = jax.nn.silu
  cases = [
    (solver.relu_step(p, m, **weights), lambda z: 0.7 * (p - relu(z)) ** 2 + 0.3 * (z - m) ** 2),
    (solver.relu2_step(p, m, **weights), lambda z: 0.7 * (p - relu(z) ** 2) ** 2 + 0.3 * (z - m) ** 2),
    (solver.up_step(p, gate, m, **weights), lambda z: 0.7 * (p - silu(gate) * z) ** 2 + 0.3 * (z - m) ** 2),
  ]
  for z, f in cases:
    assert float((f(z) - f(grid).min(axis=0)).max()) < 1e-4
  f = lambda z: 0.7 * (p - silu(z) * m) ** 2 + 0.3 * (z - gate) ** 2
  z = solver.gate_step(p, p, m, gate, **weights)
  assert float((f(z) - jnp.minimum(f(p), f(gate))).max()) <= 0
  assert float(jnp.mean(f(z) < f(grid).min(axis=0) + 1e-2)) > 0.8


def test_the_step_of_activations_has_no_slope_left():
  rng = np.random.default_rng(0)
  phi, y, down, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((30, 8), (30, 5), (8, 5), (5,)))
  f = lambda p: 0.2 * ((p - phi) ** 2).sum() + 0.5 * ((p @ down + bias - y) ** 2).sum()
  p = solver.activation_step(phi, y, down, bias, beta=0.5, gamma=0.2)
  np.testing.assert_allclose(jax.grad(f)(p), 0, atol=1e-4)


@pytest.mark.parametrize("kind", ["relu", "relu2", "swiglu"])
def test_every_update_of_the_split_lowers_its_loss(kind):
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, up, gate, down = make(60, 6), make(6, 8) / 2, make(6, 8) / 2, make(8, 6)
  y = make(60, 6)
  gate = gate if kind == "swiglu" else None
  phi = lambda z: solver._phi(kind, *z)
  weights = dict(alpha=0.3, gamma=0.7)

  def J(up, gate, z, p, down):
    parts = [((x @ w - a) ** 2).sum() for w, a in ((up, z[0]), (gate, z[1])) if w is not None]
    return 0.3 * sum(parts) + 0.7 * ((p - phi(z)) ** 2).sum() + 0.5 * ((p @ down - y) ** 2).sum()

  z = make(60, 8), None if gate is None else make(60, 8)
  p, values = make(60, 8), []
  solve = lambda a, b: jnp.linalg.lstsq(a, b)[0]
  for _ in range(3):
    values.append(J(up, gate, z, p, down))
    up, gate = solve(x, z[0]), None if gate is None else solve(x, z[1])
    values.append(J(up, gate, z, p, down))
    down = solve(p, y)
    values.append(J(up, gate, z, p, down))
    p = solver.activation_step(phi(z), y, down, 0.0, beta=0.5, gamma=0.7)
    values.append(J(up, gate, z, p, down))
    if gate is None:
      z = (solver.relu_step if kind == "relu" else solver.relu2_step)(p, x @ up, **weights), None
    else:
      new = solver.up_step(p, z[1], x @ up, **weights)
      z = new, solver.gate_step(p, z[1], new, x @ gate, **weights)
  assert np.all(np.diff(np.array(values)) <= 1e-4 * values[0]) and values[-1] < 0.5 * values[0]


def test_what_another_mlp_gave_is_found_again():
  """With all neurons kept and the MLP's own outputs nothing changes."""
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, mlp = make(80, 6), solver.Mlp(make(6, 8) / 2, make(6, 8) / 2, make(8, 6))
  y = mlp.hidden(x, "swiglu") @ mlp.down
  (first, keep), (last, _) = solver.sparsellm(x, y, mlp, 8, kind="swiglu", ridge=1e-2, split=solver.Split(outer=2))
  assert keep.all()
  for one in (first, last):
    np.testing.assert_allclose(one.hidden(x, "swiglu") @ one.down, y, atol=2e-2)


def random_groups(seed: int, depth=3) -> Groups:
  rng = np.random.default_rng(seed)
  return Groups(rng.random((depth, 4)), rng.random((depth, 10)))


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_rule_is_the_knapsack(seed):
  """Of equal costs it is the best choice there is; of two costs no choice that costs as much is better."""
  # One head costs as much as one neuron where a head is 3 width: not so here, so heads alone, then both.
  config = dataclasses.replace(CONFIG, depth=1)
  energy = random_groups(seed, depth=1)
  head, neuron = costs(config)
  free = Groups(np.zeros((1, 4)), energy.neurons)
  keep = threshold(free, config, numbers=4 * neuron, least=NONE)
  best = max(sum(c) for c in itertools.combinations(energy.neurons[0], 4))
  np.testing.assert_allclose(energy.neurons[keep.neurons].sum(), best)
  numbers = 2.5 * head + 3 * neuron
  keep = threshold(energy, config, numbers=numbers, least=NONE)
  used = parameters(keep, config)
  assert numbers - min(head, neuron) < used <= numbers or keep.neurons.all()
  ratios = np.concatenate([(energy.heads / head).ravel(), (energy.neurons / neuron).ravel()])
  taken = np.concatenate([keep.heads.ravel(), keep.neurons.ravel()])
  price = np.concatenate([np.full(4, head), np.full(10, neuron)])
  order = np.argsort(-ratios)
  fits = np.cumsum(price[order]) <= numbers
  every = (np.arange(2**14)[:, None] >> np.arange(14)) & 1
  gain, cost = every @ (ratios * price), every @ price
  first = price[order][: fits.argmin()].sum()
  assert gain[cost <= first].max() - 1e-9 <= (ratios * price)[taken].sum() <= gain[cost <= numbers].max() + 1e-9
  assert taken[order][: fits.argmin()].all()  # every group before the first that does not fit


def test_softmax_is_the_least_free_energy():
  rng = np.random.default_rng(0)
  importance, sizes = rng.random(6), rng.integers(1, 5, 6).astype(float)
  log = lambda p: np.log(np.maximum(p, 1e-300))
  for temperature in (0.05, 0.3, 2.0):
    p = softmax(importance, sizes, sparsity=0.4, temperature=temperature, most=0.9)
    np.testing.assert_allclose((sizes * p).sum(), 0.4 * sizes.sum(), rtol=1e-12)
    f = lambda p, t=temperature: (sizes * (p * importance + t * p * log(p))).sum()
    slope = lambda p, t=temperature: sizes * (importance + t * (log(p) + 1))
    total = {"type": "eq", "fun": lambda p: (sizes * p).sum() - 0.4 * sizes.sum(), "jac": lambda p: sizes}
    found = scipy.optimize.minimize(
      f, np.full(6, 0.4), jac=slope, bounds=[(1e-9, 0.9)] * 6, constraints=total, method="SLSQP",
      options=dict(ftol=1e-16, maxiter=1000),
    )  # fmt: skip
    np.testing.assert_allclose(f(p), found.fun, rtol=1e-9)
    np.testing.assert_allclose(p, found.x, atol=1e-5)


def test_hot_is_uniform_and_cold_fills_the_least_important_first():
  importance, sizes = np.array([3.0, 1.0, 2.0, 4.0]), np.ones(4)
  np.testing.assert_allclose(softmax(importance, sizes, sparsity=0.3, temperature=1e6, most=0.9), 0.3, atol=1e-6)
  cold = softmax(importance, sizes, sparsity=0.5, temperature=1e-6, most=0.9)
  np.testing.assert_allclose(cold, [0.2, 0.9, 0.9, 0], atol=1e-9)
  with pytest.raises(InputError, match=r"sparsity is 0.95; with what layers keep at least it is 0..0.9"):
    softmax(importance, sizes, sparsity=0.95, temperature=1.0, most=0.9)
  with pytest.raises(InputError, match="the temperature is 0"):
    softmax(importance, sizes, sparsity=0.5, temperature=0, most=0.9)


@pytest.mark.parametrize("multiple", [1, 4])
def test_whole_groups_take_no_more_than_the_budget_and_leave_no_neuron_over(multiple):
  head, neuron = costs(CONFIG)
  total = 3 * (4 * head + 10 * neuron)
  rng = np.random.default_rng(0)
  for _ in range(10):
    numbers = rng.uniform(0.45, 1) * total
    heads, neurons = counts(rng.random((3, 2)), CONFIG, numbers=numbers, least=Least(1, 2), multiple=multiple)
    used = heads.sum() * head + neurons.sum() * neuron
    assert used <= numbers and (heads >= 1).all() and (neurons >= 2).all()
    assert numbers - used < multiple * neuron or (neurons == 10).all()
    assert all(n % multiple == 0 or n in (2, 6, 10) for n in neurons)
  assert np.all(np.array(counts(np.ones((3, 2)), CONFIG, numbers=total)) == [[4] * 3, [10] * 3])
  with pytest.raises(InputError, match=r"leaves 0.1 of the blocks' parameters; what every layer keeps takes 0.\d+"):
    counts(np.ones((3, 2)), CONFIG, numbers=0.1 * total)
