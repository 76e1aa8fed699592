r"""STRUPRUNE within one layer: which groups of inputs a map keeps, by ADMM, and an MLP split at its activations.

A map y = W^T x on a text of T tokens is known by A = mean x x^T and C = mean x y^T; its loss is 1/2 tr W^T A W -
tr W^T C, up to a constant. Groups are equal numbers of inputs side by side.

  W <- (A + rho I)^-1 (C + rho (Z - U)),   Z <- the k groups of W + U with the largest energy,   U <- U + W - Z

An MLP's pre-activations z and activations p are variables of their own (SparseLLM, Bai et al. 2024):

  J = alpha |x W1 - z|^2 + gamma |p - phi(z)|^2 + beta |p W2 + b - y|^2
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require

_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_NEWTON = 4  # damped steps for a gate's pre-activation
_ROOT = 16  # Newton steps from above to the largest root of a cubic


class Admm(NamedTuple):
  """Stages of iterations with one penalty, whose inverse is made once a stage; the first penalty, of the mean diagonal
  of A; its growth a stage; a stage ends where |W - Z| < tolerance |W|."""

  stages: int = 3
  iterations: int = 10
  rho: float = 0.1
  growth: float = 2.6
  tolerance: float = 1e-3


def ridged(gram: Float[Array, "n n"], cross: Float[Array, "n m"], weight: Float[Array, "n m"], ridge):
  """(A, C) of the loss plus ridge / 2 times the mean diagonal of A times |W - weight|^2: towards what was trained."""
  level = ridge * jnp.trace(gram) / len(gram)
  return gram + level * jnp.eye(len(gram), dtype=gram.dtype), cross + level * weight


def loss(gram: Float[Array, "n n"], cross: Float[Array, "n m"], weight: Float[Array, "n m"]) -> Float[Array, ""]:
  """1/2 tr W^T A W - tr W^T C."""
  return 0.5 * (weight * _product(gram, weight)).sum() - (weight * cross).sum()


def least_squares(gram: Float[Array, "n n"], cross: Float[Array, "n m"], keep: Bool[Array, "n"]) -> Float[Array, "n m"]:
  """The W of the least loss whose rows are zero where `keep` is not: A_SS^-1 C_S."""
  own = jnp.where(keep[:, None] & keep, gram, jnp.eye(len(gram), dtype=gram.dtype))
  return cho_solve(cho_factor(own), jnp.where(keep[:, None], cross, 0))


def inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
  """Of a positive definite matrix."""
  return cho_solve(cho_factor(matrix), jnp.eye(len(matrix), dtype=matrix.dtype))


def energies(diagonal: Float[Array, "n"], weight: Float[Array, "n m"], size: int) -> Float[Array, "groups"]:
  """1/2 sum over a group's inputs of A_cc |W_c|^2."""
  return 0.5 * (diagonal * jnp.square(weight).sum(axis=1)).reshape(-1, size).sum(axis=1)


def obs(gram: Float[Array, "n n"], weight: Float[Array, "n m"], size: int) -> Float[Array, "groups"]:
  """1/2 tr W_g^T [(A^-1)_gg]^-1 W_g: the least loss that leaving a group out adds when the others make up for it."""
  groups = len(gram) // size
  own = inverse(gram).reshape(groups, size, groups, size)[jnp.arange(groups), :, jnp.arange(groups)]
  rows = weight.reshape(groups, size, -1)
  return 0.5 * (rows * jnp.linalg.solve(own, rows)).sum(axis=(1, 2))


def largest(found: Float[Array, "groups"], count: Int[Array, ""] | int) -> Bool[Array, "groups"]:
  """Exactly the `count` largest; the first ones of equals."""
  order = jnp.argsort(-found, stable=True)
  return jnp.argsort(order) < count


def admm(
  gram: Float[Array, "n n"],
  cross: Float[Array, "n m"],
  weight: Float[Array, "n m"],
  keep: Int[Array, ""] | int,
  *,
  size: int,
  how: Admm = Admm(),
) -> Bool[Array, "groups"]:
  """The groups that are kept, exactly `keep` of them: by ADMM or in one step, whichever has the smaller loss once the
  weights are those of `least_squares`.

  Args:
    gram, cross: A, positive definite (`ridged`), and C; weight: where W starts; size: inputs a group.
  """
  diagonal = jnp.diagonal(gram)
  chosen = lambda w: largest(energies(diagonal, w, size), keep)
  project = lambda w: jnp.where(jnp.repeat(chosen(w), size)[:, None], w, 0)

  def stage(i, carry):
    rho = how.rho * how.growth**i * diagonal
    solve = inverse(gram + jnp.diag(rho))

    def going(state):
      step, w, z, _ = state
      apart = jnp.linalg.norm(w - z) >= how.tolerance * jnp.linalg.norm(w)
      return (step < how.iterations) & ((step == 0) | apart)

    def one(state):
      step, _, z, u = state
      w = _product(solve, cross + rho[:, None] * (z - u))
      z = project(w + u)
      return step + 1, w, z, u + w - z

    _, w, z, u = jax.lax.while_loop(going, one, (jnp.int32(0), *carry))
    return w, z, u / how.growth  # scaled by the next stage's penalty

  _, z, _ = jax.lax.fori_loop(0, how.stages, stage, (weight, project(weight), jnp.zeros_like(weight)))
  # The rows of Z that are zero by themselves count as kept where fewer than `keep` are not.
  found = largest(energies(diagonal, z, size), keep), chosen(weight)
  after = lambda groups: loss(gram, cross, least_squares(gram, cross, jnp.repeat(groups, size)))
  return jnp.where(after(found[0]) <= after(found[1]), *found)


def activation_step(phi, y, down, bias, *, beta: float, gamma: float) -> Float[Array, "tokens neurons"]:
  """The p of the least J: (beta W2 W2^T + gamma I)^-1 (beta W2 (y - b) + gamma phi(z)).

  Args:
    phi: phi(z), (tokens, neurons); y: (tokens, outputs); down: W2, (neurons, outputs).
  """
  matrix = beta * _product(down, down.T) + gamma * jnp.eye(len(down), dtype=down.dtype)
  return (beta * (y - bias) @ down.T + gamma * phi) @ inverse(matrix)


def relu_step(p, m, *, alpha: float, gamma: float):
  """The z of the least gamma (p - relu z)^2 + alpha (z - m)^2, entry by entry."""
  return _better(
    lambda z: gamma * (p - jax.nn.relu(z)) ** 2 + alpha * (z - m) ** 2,
    jnp.maximum((gamma * p + alpha * m) / (alpha + gamma), 0),
    jnp.minimum(m, 0),
  )


def relu2_step(p, m, *, alpha: float, gamma: float):
  """The z of the least gamma (p - relu(z)^2)^2 + alpha (z - m)^2, entry by entry.

  Above zero it is a root of z^3 + a z + b, whose largest is the only minimum there: Newton's method from above, where
  the cubic is convex.
  """
  a, b = (alpha - 2 * gamma * p) / (2 * gamma), -alpha * m / (2 * gamma)
  start = 2 * jnp.maximum(jnp.sqrt(jnp.abs(a)), jnp.cbrt(jnp.abs(b))) + 1e-6
  newton = lambda _, z: z - (z**3 + a * z + b) / jnp.maximum(3 * z**2 + a, 1e-12)
  root = jax.lax.fori_loop(0, _ROOT, newton, start)
  f = lambda z: gamma * (p - jax.nn.relu(z) ** 2) ** 2 + alpha * (z - m) ** 2
  return _better(f, jnp.where(root > 0, root, jnp.minimum(m, 0)), jnp.minimum(m, 0))


def up_step(p, gate, m, *, alpha: float, gamma: float):
  """The u of the least gamma (p - silu(gate) u)^2 + alpha (u - m)^2, entry by entry."""
  s = jax.nn.silu(gate)
  return (gamma * s * p + alpha * m) / (gamma * s**2 + alpha)


def gate_step(p, gate, up, m, *, alpha: float, gamma: float):
  """A z with a smaller gamma (p - silu(z) up)^2 + alpha (z - m)^2 than `gate` and m have: damped Gauss-Newton."""
  f = lambda z: gamma * (p - jax.nn.silu(z) * up) ** 2 + alpha * (z - m) ** 2

  def one(_, state):
    z, damping = state
    s = jax.nn.sigmoid(z)
    slope = (s + z * s * (1 - s)) * up
    left = p - z * s * up
    new = z + (gamma * slope * left - alpha * (z - m)) / (gamma * slope**2 + alpha) * damping
    good = f(new) < f(z)
    return jnp.where(good, new, z), jnp.where(good, damping, damping / 3)

  start = _better(f, gate, m)
  return jax.lax.fori_loop(0, _NEWTON, one, (start, jnp.ones_like(start)))[0]


def _better(f, a, b):
  return jnp.where(f(a) < f(b), a, b)


class Mlp(NamedTuple):
  """up: (width, neurons); gate: like it, or None; down: (neurons, width)."""

  up: Array
  gate: Array | None
  down: Array

  def hidden(self, x: Float[Array, "*batch width"], kind: str) -> Float[Array, "*batch neurons"]:
    return _phi(kind, x @ self.up, None if self.gate is None else x @ self.gate)


def _phi(kind: str, up, gate):
  if kind == "swiglu":
    return jax.nn.silu(gate) * up
  return jax.nn.relu(up) if kind == "relu" else jnp.square(jax.nn.relu(up))


class Split(NamedTuple):
  """alpha, gamma, beta: the weights of the three parts of J; outer: rounds over the variables."""

  alpha: float = 0.1
  gamma: float = 0.1
  beta: float = 0.1
  outer: int = 4


def sparsellm(
  x: Float[Array, "tokens width"],
  y: Float[Array, "tokens width"],
  mlp: Mlp,
  keep: Int[Array, ""] | int,
  *,
  kind: str,
  ridge: float,
  split: Split = Split(),
  how: Admm = Admm(),
) -> list[tuple[Mlp, Bool[Array, "neurons"]]]:
  """[(the MLP, which neurons it keeps)] of every round: W1 but in the first, the support and weights of W2, p, z.

  Args:
    x, y: what the MLP reads and is to give; kind: "relu", "relu2" or "swiglu".

  Raises:
    InputError: less than one round.
  """
  require(split.outer >= 1, f"split.outer is {split.outer}; it must be at least 1")
  fit = fitting(x, ridge)
  up, gate, down = mlp
  z = x @ up, None if gate is None else x @ gate
  p, rounds = _phi(kind, *z), []
  for outer in range(split.outer):
    if outer:
      up = fit(z[0], mlp.up)
      gate = None if gate is None else fit(z[1], mlp.gate)
    gram, cross, means = centred(p, y)
    gram, cross = ridged(gram, cross, mlp.down, ridge)
    keeps = admm(gram, cross, down, keep, size=1, how=how)
    down = least_squares(gram, cross, keeps)
    rounds.append((Mlp(up, gate, down), keeps))
    bias = means[1] - means[0] @ down
    p, z = activations(x, y - bias, Mlp(up, gate, down), z, kind=kind, split=split)
  return rounds


def fitting(x: Float[Array, "tokens n"], ridge: float) -> Callable[[Array, Array], Array]:
  """(z, W0) -> the W of the least |x W - z|^2 / T + ridge times the mean diagonal of A times |W - W0|^2."""
  second = _product(x.T, x) / len(x)
  level = ridge * jnp.trace(second) / len(second)
  factor = cho_factor(second + level * jnp.eye(len(second), dtype=second.dtype))
  return lambda z, start: cho_solve(factor, _product(x.T, z) / len(x) + level * start)


def activations(x: Float[Array, "tokens width"], y, mlp: Mlp, z, *, kind: str, split: Split):
  """(p, z) of less J than before: p exactly, then z entry by entry.

  Args:
    y: what the MLP is to give but for its bias; z: (of up, of gate or None).
  """
  weights = dict(alpha=split.alpha, gamma=split.gamma)
  p = activation_step(_phi(kind, *z), y, mlp.down, 0.0, beta=split.beta, gamma=split.gamma)
  m = x @ mlp.up, None if mlp.gate is None else x @ mlp.gate
  if kind == "swiglu":
    new = up_step(p, z[1], m[0], **weights)
    return p, (new, gate_step(p, z[1], new, m[1], **weights))
  return p, ((relu_step if kind == "relu" else relu2_step)(p, m[0], **weights), None)


def centred(x: Float[Array, "tokens n"], y: Float[Array, "tokens m"]):
  """(A, C, (mean x, mean y)) of x and y without their means, which a bias takes care of."""
  means = x.mean(axis=0), y.mean(axis=0)
  left, right = x - means[0], y - means[1]
  return _product(left.T, left) / len(x), _product(left.T, right) / len(x), means
