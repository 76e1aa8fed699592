r"""Quadratic problems over bits of which a given number are one, and what solves them.

  minimise E(x) = x^T Q x   over x in {0, 1}^n with sum_i x_i = k

Q is dense, or of low rank beside its diagonal, Q = F F^T / 2 + diag(c), and is then never formed: with r = F^T x a swap
costs O(rank). A swap of i (1 -> 0) and j (0 -> 1) changes E by

  dE = 2 (h_j - h_i) + Q_ii + Q_jj - 2 Q_ij,   h = Q x,
     = r.d + d.d / 2 + c_j - c_i,               d = F_j - F_i

  x, energy = solve(LowRank(factor, linear), start, key, k=k)
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxlab.core.checks import require, require_choice, require_counts

SOLVERS = ("sa", "swap", "sa+swap")
BETAS = (1e-3, 100.0, 1.1)  # the first inverse temperature, the last, and their ratio: 121 of them
_ZERO = 1e-12  # of a scaled Q


class LowRank(NamedTuple):
  """Q = F F^T / 2 + diag(c)."""

  factor: Float[Array, "n rank"]
  linear: Float[Array, "n"]

  def energy(self, x: Bool[Array, "n"]) -> Float[Array, ""]:
    r = self.state(x)
    return r @ r / 2 + jnp.where(x, self.linear, 0).sum()

  def state(self, x):
    """r = F^T x, what a swap reads."""
    return jnp.matmul(x.astype(self.factor.dtype), self.factor, precision=jax.lax.Precision.HIGHEST)

  def swap(self, r, i, j):
    """(dE, the state after) of bit i to 0 and bit j to 1."""
    d = self.factor[j] - self.factor[i]
    return (d * (r + d / 2)).sum() + self.linear[j] - self.linear[i], r + d

  def flips(self, x) -> tuple[Array, Array]:
    """(s, h): bit i alone changes E by h + s where it becomes 1, by h - s where it becomes 0."""
    return self.factor @ self.state(x) + self.linear, (self.factor**2).sum(axis=1) / 2

  def cross(self, ones, zeros):
    """2 Q of those rows and columns: what two flips of a swap give back."""
    return self.factor[ones] @ self.factor[zeros].T

  def dense(self) -> Float[Array, "n n"]:
    product = jnp.matmul(self.factor, self.factor.T, precision=jax.lax.Precision.HIGHEST)
    return product / 2 + jnp.diag(self.linear)

  def diagonal(self) -> Float[Array, "n"]:
    return (self.factor**2).sum(axis=1) / 2 + self.linear

  def times(self, scale) -> "LowRank":
    return LowRank(self.factor * jnp.sqrt(scale), self.linear * scale)


class Dense(NamedTuple):
  """Any symmetric Q."""

  q: Float[Array, "n n"]

  def energy(self, x):
    return jnp.where(x, self.state(x), 0).sum()

  def state(self, x):
    """h = Q x."""
    return jnp.matmul(self.q, x.astype(self.q.dtype), precision=jax.lax.Precision.HIGHEST)

  def swap(self, h, i, j):
    change = 2 * (h[j] - h[i]) + self.q[i, i] + self.q[j, j] - 2 * self.q[i, j]
    return change, h + self.q[j] - self.q[i]

  def flips(self, x):
    return 2 * self.state(x), self.diagonal()

  def cross(self, ones, zeros):
    return 2 * self.q[ones][:, zeros]

  def dense(self):
    return self.q

  def diagonal(self):
    return jnp.diagonal(self.q)

  def times(self, scale) -> "Dense":
    return Dense(self.q * scale)


def swaps(problem, x, ones, zeros) -> Float[Array, "k n_minus_k"]:
  """dE of every swap of one of `ones` with one of `zeros`."""
  slope, half = problem.flips(x)
  return (half - slope)[ones, None] + (half + slope)[zeros] - problem.cross(ones, zeros)


@jax.jit
def scale_of(problem) -> Float[Array, ""]:
  """1 / mean |Q| over the entries that are not 0: what temperatures are made for; 1 where all are."""
  size = jnp.abs(problem.dense())
  some = size > _ZERO * size.max()
  return jnp.where(some.any(), some.sum() / jnp.maximum(size.sum(), jnp.finfo(size.dtype).tiny), 1)


def cut(problem, *, released: bool = False) -> Dense:
  """Q without entries that are nearly 0; `released` as the published code has it: without negative ones too."""
  q = problem.dense()
  return Dense(jnp.where((q if released else jnp.abs(q)) <= _ZERO, 0, q))


def qubo(q: Float[Array, "n n"], k: int, penalty: float) -> tuple[Float[Array, "n n"], float]:
  """(Q', constant): x^T Q' x + constant = x^T Q x + penalty (sum x - k)^2, for solvers without the constraint."""
  n = len(q)
  return q + penalty * (jnp.ones((n, n), q.dtype) - 2 * k * jnp.eye(n, dtype=q.dtype)), penalty * k**2


def exhaustive(problem, k: int) -> tuple[np.ndarray, float]:
  """(x, E) of the minimum, of at most 20 bits, by trying all.

  Raises:
    InputError: more bits.
  """
  q = np.asarray(problem.dense(), np.float64)
  require(len(q) <= 20, f"{len(q)} bits are too many to try all; 20 at most")
  best = min(itertools.combinations(range(len(q)), k), key=lambda ones: q[np.ix_(ones, ones)].sum())
  return np.isin(np.arange(len(q)), best), float(q[np.ix_(best, best)].sum())


def temperatures(betas: tuple[float, float, float] = BETAS) -> np.ndarray:
  """The inverse temperatures, float32.

  Raises:
    InputError: no rising positive sequence.
  """
  first, last, ratio = betas
  require(0 < first <= last and ratio > 1, f"betas are {betas}; give 0 < first <= last and a ratio above 1")
  count = math.floor(math.log(last / first) / math.log(ratio)) + 1
  return (first * ratio ** np.arange(count)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("k", "betas", "restarts"))
def anneal(
  problem: LowRank | Dense,
  start: Bool[Array, "n"],
  key: jax.Array,
  *,
  k: int,
  betas: tuple[float, float, float] = BETAS,
  restarts: int = 1,
) -> tuple[Bool[Array, "n"], Float[Array, ""]]:
  """Simulated annealing by swaps from `start`: (the best x ever seen, its E).

  A sweep a temperature: every i in turn with a random bit of the other value, accepted if dE <= 0 or with probability
  exp(-beta dE); it ends when a sweep changes nothing. Restarts run side by side, with other random numbers.

  The bits lie in one order, ones first: a partner is a random place in the other part, and a swap exchanges two places.
  """
  n = len(start)
  order = jnp.argsort(~start, stable=True)
  index = jnp.arange(n)

  def propose(beta):
    def one(carry, given):
      order, place, state, energy = carry
      i, share, threshold = given
      mine = place[i]
      is_one = mine < k
      theirs = jnp.where(is_one, k + jnp.floor(share * (n - k)), jnp.floor(share * k)).astype(mine.dtype)
      theirs = jnp.clip(theirs, jnp.where(is_one, k, 0), jnp.where(is_one, n, k) - 1)
      j = order[theirs]
      change, moved = problem.swap(state, jnp.where(is_one, i, j), jnp.where(is_one, j, i))
      accept = change * beta <= threshold
      pick = lambda new, old: jnp.where(accept, new, old)
      order = order.at[mine].set(pick(j, i)).at[theirs].set(pick(i, j))
      place = place.at[i].set(pick(theirs, mine)).at[j].set(pick(mine, theirs))
      energy = energy + pick(change, 0)
      return (order, place, pick(moved, state), energy), (energy, pick(j, i))

    return one

  def sweep(carry):
    t, key, order, place, _, best, least = carry
    key, first, second = jax.random.split(key, 3)
    share, threshold = jax.random.uniform(first, (n,)), jax.random.exponential(second, (n,))
    x = place < k
    given = index.astype(order.dtype), share, threshold
    begin = (order, place, problem.state(x), problem.energy(x))  # anew, so that rounding does not add up
    (order, place, _, _), (energies, partners) = jax.lax.scan(propose(schedule[t]), begin, given)
    # The best of the sweep again, from the swaps up to it.
    last = jnp.argmin(energies)
    done = (index <= last) & (partners != index)
    flips = jnp.zeros(n, jnp.int32).at[partners].add(done) + done
    better = energies[last] < least
    best = jnp.where(better, x ^ (flips % 2 == 1), best)
    return t + 1, key, order, place, (partners != index).any(), best, jnp.minimum(energies[last], least)

  def run(key):
    place = jnp.zeros(n, order.dtype).at[order].set(index.astype(order.dtype))
    begin = (0, key, order, place, True, start, problem.energy(start))
    *_, best, _ = jax.lax.while_loop(lambda carry: (carry[0] < len(schedule)) & carry[4], sweep, begin)
    return best, problem.energy(best)

  schedule = jnp.asarray(temperatures(betas))
  if k in (0, n):
    return start, problem.energy(start)
  found, energies = jax.vmap(run)(jax.random.split(key, restarts))
  return found[jnp.argmin(energies)], energies.min()


@functools.partial(jax.jit, static_argnames=("k", "iterations", "tabu"))
def descend(
  problem: LowRank | Dense, start: Bool[Array, "n"], *, k: int, iterations: int = 1000, tabu: int = 0
) -> tuple[Bool[Array, "n"], Float[Array, ""]]:
  """The best of all k (n - k) swaps, again and again: (the best x seen, its E).

  It starts from `start`, or from the k bits that are best one by one beside it where their energy is lower, which saves
  most swaps of a large problem.

  Args:
    tabu: 0 ends where no swap gains; otherwise bits that were swapped stay for as many iterations, unless a swap gives
      the best x so far, and all `iterations` are made.
  """
  n = len(start)
  if k in (0, n):
    return start, problem.energy(start)

  def one(carry):
    t, x, order, energy, last, best, least, _ = carry
    ones, zeros = order[:k], order[k:]
    change = swaps(problem, x, ones, zeros)
    if tabu:
      stays = t - last < tabu
      held = (stays[ones][:, None] | stays[zeros]) & (energy + change >= least)
      change = jnp.where(held, jnp.inf, change)
    i, j = jnp.divmod(jnp.argmin(change), n - k)
    gain = change[i, j]
    # Gains smaller than what rounding makes of them would go round in circles.
    move = jnp.isfinite(gain) if tabu else gain < -1e-6 * jnp.abs(energy)
    order = jnp.where(move, order.at[i].set(zeros[j]).at[k + j].set(ones[i]), order)
    i, j = ones[i], zeros[j]
    x = jnp.where(move, x.at[i].set(False).at[j].set(True), x)
    energy = jnp.where(move, energy + gain, energy)
    last = last.at[jnp.array([i, j])].set(t)
    better = energy < least
    return t + 1, x, order, energy, last, jnp.where(better, x, best), jnp.minimum(energy, least), move

  slope, half = problem.flips(start)
  alone = jnp.zeros(n, bool).at[jax.lax.top_k(jnp.where(start, half - slope, -half - slope), k)[1]].set(True)
  begin = jnp.where(problem.energy(alone) < problem.energy(start), alone, start)
  energy = problem.energy(begin)
  begin = (0, begin, jnp.argsort(~begin), energy, jnp.full(n, -n - tabu - 1), begin, energy, True)
  *_, best, _, _ = jax.lax.while_loop(lambda carry: (carry[0] < iterations) & carry[-1], one, begin)
  return best, problem.energy(best)


def solve(
  problem: LowRank | Dense,
  start: Bool[Array, "n"],
  key: jax.Array,
  *,
  k: int,
  how: str = "sa+swap",
  betas: tuple[float, float, float] = BETAS,
  restarts: int = 10,
  iterations: int = 1000,
) -> tuple[Bool[Array, "n"], Float[Array, ""]]:
  """(x, E), never worse than `start`: annealing, descent by the best swap, or the one after the other.

  Raises:
    InputError: an unknown way, counts below 1, no temperatures.
  """
  require_choice("solver", how, SOLVERS)
  require_counts(restarts=restarts, iterations=iterations)
  x = start
  if "sa" in how:
    run = functools.partial(anneal, k=k, betas=betas, restarts=restarts)
    x = _on_host(run, problem.times(scale_of(problem)), x, key)[0]
  if "swap" in how:
    x, _ = descend(problem, x, k=k, iterations=iterations)
  return x, problem.energy(x)


def _on_host(run, *given):
  """Small steps one after the other are work for a CPU: a loop on an accelerator starts a dozen kernels a proposal."""
  if jax.default_backend() == "cpu":
    return run(*given)
  host = jax.local_devices(backend="cpu")[0]
  return jax.device_put(run(*jax.device_put(given, host)), jax.local_devices()[0])
