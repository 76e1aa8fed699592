"""Bits of which k are one: energies, and solvers that find the least one and never a worse one than they were given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.weights import qcbo
from jaxlab.weights.qcbo import Dense, LowRank, anneal, descend, exhaustive, solve

BITS = 10


def random_problem(seed: int, n: int = BITS, rank: int = 4, dtype=jnp.float32) -> LowRank:
  rng = np.random.default_rng(seed)
  return LowRank(jnp.asarray(rng.normal(size=(n, rank)), dtype), jnp.asarray(rng.normal(size=n), dtype))


def indefinite(seed: int, n: int = BITS) -> Dense:
  q = np.random.default_rng(seed).normal(size=(n, n))
  return Dense(jnp.asarray(q + q.T, jnp.float32))


@pytest.mark.parametrize("seed", range(2))
def test_a_swap_changes_the_energy_by_what_is_said(seed):
  with jax.enable_x64(True):
    problem = random_problem(seed, dtype=jnp.float64)
    dense = Dense(problem.dense())
    x = jnp.asarray(np.random.default_rng(seed).permutation(BITS) < 4)
    vector = x.astype(jnp.float64)
    np.testing.assert_allclose(problem.energy(x), vector @ dense.q @ vector, rtol=1e-12)
    np.testing.assert_allclose(problem.diagonal(), jnp.diagonal(dense.q), rtol=1e-12)
    order = jnp.argsort(~x)
    ones, zeros = order[:4], order[4:]

    def swapped(one, i, j):
      after = x.at[i].set(False).at[j].set(True)
      change, state = one.swap(one.state(x), i, j)
      return change, one.energy(after) - one.energy(x), state - one.state(after)

    for one in (problem, dense):
      pairs = jax.vmap(jax.vmap(swapped, (None, None, 0)), (None, 0, None))
      change, difference, apart = jax.jit(pairs)(one, ones, zeros)
      np.testing.assert_allclose(change, difference, atol=1e-12)
      np.testing.assert_allclose(change, qcbo.swaps(one, x, ones, zeros), atol=1e-12)
      np.testing.assert_allclose(apart, 0, atol=1e-12)


def test_solvers_find_the_least_energy():
  """50 problems, of low rank and indefinite, k of 1, 4 and 8: annealing with ten restarts misses none, with one and
  descent after it at most one; every answer has k ones and is no worse than the start."""
  missed = {"one": 0, "ten": 0}
  runs = {
    k: {
      "one": jax.jit(functools.partial(solve, k=k, how="sa+swap", restarts=1)),
      "ten": jax.jit(functools.partial(solve, k=k, how="sa", restarts=10)),
      "swap": jax.jit(functools.partial(solve, k=k, how="swap")),
    }
    for k in (1, 4, 8)
  }
  for seed in range(50):
    k = (1, 4, 8)[seed % 3]
    problem = Dense(random_problem(seed).dense()) if seed % 2 else indefinite(seed)
    _, least = exhaustive(problem, k)
    start = jnp.asarray(np.random.default_rng(seed).permutation(BITS) < k)
    for name, run in runs[k].items():
      x, energy = run(problem, start, jax.random.key(seed))
      assert int(x.sum()) == k and float(energy) <= float(problem.energy(start)) + 1e-4
      if name in missed:
        missed[name] += float(energy) > least + 1e-3
  assert missed["one"] <= 1 and missed["ten"] == 0


@pytest.mark.parametrize("k", [3, 6, 9])
def test_annealing_with_ten_restarts_finds_the_least_energy_of_twelve_bits(k):
  """50 problems for each k. One run alone misses 2, 1 and 0 of them."""
  made = [indefinite(seed, n=12).q if seed % 2 else random_problem(seed, n=12).dense() for seed in range(50)]
  starts = jnp.stack([jnp.asarray(np.random.default_rng(seed).permutation(12) < k) for seed in range(50)])
  run = jax.jit(jax.vmap(lambda q, start, key: solve(Dense(q), start, key, k=k, how="sa", restarts=10)))
  x, energy = run(jnp.stack(made), starts, jax.random.split(jax.random.key(0), 50))
  least = [exhaustive(Dense(q), k)[1] for q in made]
  np.testing.assert_array_equal(x.sum(axis=1), k)
  np.testing.assert_allclose(energy, least, atol=1e-3)


@pytest.mark.parametrize("k", [3, 6, 9])
def test_descent_with_tabu_finds_the_least_energy_of_twelve_bits(k):
  """Of the same 50 problems all but one at most: a local search, which has no restarts."""
  run, missed = jax.jit(functools.partial(descend, k=k, iterations=100, tabu=3)), 0
  for seed in range(50):
    problem = indefinite(seed, n=12) if seed % 2 else Dense(random_problem(seed, n=12).dense())
    start = jnp.asarray(np.random.default_rng(seed).permutation(12) < k)
    x, energy = run(problem, start)
    assert int(x.sum()) == k and float(energy) <= float(problem.energy(start)) + 1e-4
    missed += float(energy) > exhaustive(problem, k)[1] + 1e-3
  assert missed <= 1


def test_low_rank_and_dense_walk_the_same_way():
  """The same random numbers, the same answer, which is the least energy."""
  for n, k in ((12, 6), (2, 1)):
    problem = random_problem(5, n=n)
    start = jnp.arange(n) < k
    x, energy = anneal(problem, start, jax.random.key(1), k=k, restarts=10)
    y, _ = anneal(Dense(problem.dense()), start, jax.random.key(1), k=k, restarts=10)
    np.testing.assert_allclose(energy, exhaustive(problem, k)[1], atol=1e-4)
    np.testing.assert_array_equal(x, y)


def test_tabu_leaves_a_local_minimum():
  found = {}
  for tabu in (0, 3):
    run = jax.jit(functools.partial(descend, k=4, iterations=60, tabu=tabu))
    gaps = []
    for seed in range(20):
      problem = indefinite(seed)
      gaps.append(float(run(problem, jnp.arange(BITS) < 4)[1]) - exhaustive(problem, 4)[1])
    found[tabu] = sum(gap > 1e-3 for gap in gaps)
  assert found[3] < found[0]


def test_nothing_to_decide_changes_nothing():
  problem = random_problem(0)
  for k in (0, BITS):
    x = jnp.arange(BITS) < k
    for how in qcbo.SOLVERS:
      np.testing.assert_array_equal(solve(problem, x, jax.random.key(0), k=k, how=how)[0], x)


def test_the_scale_is_of_entries_that_are_not_zero():
  q = jnp.zeros((4, 4)).at[0, 0].set(-6.0).at[1, 2].set(1.0).at[2, 1].set(1.0)
  np.testing.assert_allclose(qcbo.scale_of(Dense(q)), 3 / 8)
  assert float(qcbo.scale_of(Dense(jnp.zeros((3, 3))))) == 1
  low = random_problem(1)
  np.testing.assert_allclose(low.times(2.5).dense(), 2.5 * low.dense(), rtol=1e-5, atol=1e-5)


def test_the_cutoff_keeps_negative_entries_and_the_released_one_does_not():
  q = jnp.array([[-1.0, 1e-15], [1e-15, 2.0]])
  np.testing.assert_array_equal(qcbo.cut(Dense(q)).q, [[-1, 0], [0, 2]])
  np.testing.assert_array_equal(qcbo.cut(Dense(q), released=True).q, [[0, 0], [0, 2]])


def test_the_penalty_is_the_constraint():
  problem = indefinite(3)
  q, constant = qcbo.qubo(problem.q, 4, 50.0)
  for ones in (3, 4, 6):
    x = jnp.arange(BITS) < ones
    v = x.astype(jnp.float32)
    np.testing.assert_allclose(v @ q @ v + constant, problem.energy(x) + 50 * (ones - 4) ** 2, rtol=1e-5, atol=1e-3)


def test_there_are_121_temperatures():
  betas = qcbo.temperatures()
  assert len(betas) == 121 and betas[0] == np.float32(1e-3) and 90 < betas[-1] <= 100


def test_wrong_input_is_one_line():
  problem = random_problem(0)
  x = jnp.arange(BITS) < 3
  with pytest.raises(InputError, match="solver is 'qpu'; it must be one of sa, swap"):
    solve(problem, x, jax.random.key(0), k=3, how="qpu")
  with pytest.raises(InputError, match="restarts is 0"):
    solve(problem, x, jax.random.key(0), k=3, restarts=0)
  with pytest.raises(InputError, match="betas are"):
    qcbo.temperatures((1.0, 0.5, 1.1))
  with pytest.raises(InputError, match="24 bits are too many"):
    exhaustive(random_problem(0, n=24), 3)
