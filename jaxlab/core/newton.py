"""Parallel Newton iteration for the trace of a chain of blocks.

A chain z_{j+1} = f_j(z_j), j = 0..n-1, z_0 given, is the root of G_j(z) = z_{j+1} - f_j(z_j). One Newton step with a
surrogate A_j for the Jacobian df_j/dz_j evaluates every block at once and then solves a linear recurrence over depth:

  r_j = f_j(z_j) - z_{j+1},   e_j = r_j + A_j e_{j-1} (e_{-1} = 0),   z_{j+1} <- z_{j+1} + e_j.

After k steps the first k outputs are exact for any surrogate and any start, so n steps are the chain itself.

A surrogate is a function `(blocks, inputs) -> (outputs, correct)`: it evaluates `outputs[j] = f_j(inputs[j])` and
returns the map r -> e. References: Song et al. 2021 (Jacobi); Lim et al. 2024, "DEER" (exact); Gonzalez et al. 2024,
"quasi-DEER, ELK" (diagonal, damping); arXiv 2605.17842 (identity, streams).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.core.recurrence import linear_recurrence, matrix_recurrence, transfer

Blocks = Callable[[Float[Array, "n *state"]], Float[Array, "n *state"]]
Correct = Callable[[Float[Array, "n *state"]], Float[Array, "n *state"]]
Surrogate = Callable[[Blocks, Float[Array, "n *state"]], tuple[Float[Array, "n *state"], Correct]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
  """`trace[j]` is z_j (`trace[0]` the given start), `residuals[k]` the norm of r before step k, `iterations` those run.

  Entries of `residuals` past `iterations` are NaN.
  """

  trace: Float[Array, "n_plus_1 *state"]
  residuals: Float[Array, "max_iterations"]
  iterations: Int[Array, ""]


def solve(
  blocks: Blocks,
  trace: Float[Array, "n_plus_1 *state"],
  *,
  iterations: int,
  surrogate: Surrogate,
  tolerance: float | None = None,
  remat: bool = False,
) -> Solution:
  """Runs Newton steps from an initial trace.

  Args:
    blocks: evaluates all n blocks, `blocks(z[:-1])[j] = f_j(z_j)`.
    trace: initial guess; `trace[0]` is the exact start and never changes.
    iterations: steps to run; with a tolerance, the most to run.
    surrogate: one of the functions below.
    tolerance: stop once ||r|| <= tolerance * ||z|| (Frobenius, float32). None runs exactly `iterations` steps, unrolled
      and reverse-differentiable; with a tolerance the loop is a `while_loop`, differentiable forward only.
    remat: keep only the iterates for the gradient and evaluate every step once more in the backward pass.

  Raises:
    InputError: iterations < 1, or a trace with no block in it.
  """
  require(iterations >= 1, f"iterations is {iterations}; at least one Newton step is needed")
  require(trace.shape[0] >= 2, f"the trace has {trace.shape[0]} entries; a chain of n blocks has n + 1 (n >= 1)")

  def step(z):
    outputs, correct = surrogate(blocks, z[:-1])
    wide = jnp.promote_types(z.dtype, jnp.float32)
    residual = outputs.astype(wide) - z[1:].astype(wide)
    new = jnp.concatenate([z[:1], (z[1:].astype(wide) + correct(residual)).astype(z.dtype)])
    return new, jnp.linalg.norm(residual.astype(jnp.float32))

  if tolerance is None:
    step = jax.checkpoint(step) if remat else step
    norms = []
    for _ in range(iterations):
      trace, norm = step(trace)
      norms.append(norm)
    return Solution(trace, jnp.stack(norms), jnp.int32(iterations))

  def unfinished(carry):
    z, norms, k = carry
    size = jnp.linalg.norm(z[1:].astype(jnp.float32))
    return (k < iterations) & ((k == 0) | (norms[k - 1] > tolerance * size))

  def body(carry):
    z, norms, k = carry
    z, norm = step(z)
    return z, norms.at[k].set(norm), k + 1

  start = (trace, jnp.full((iterations,), jnp.nan, jnp.float32), jnp.int32(0))
  return Solution(*jax.lax.while_loop(unfinished, body, start))


def jacobi(blocks: Blocks, inputs):
  """A_j = 0: every block on its stale input, no correction."""
  return blocks(inputs), lambda r: r


def identity(blocks: Blocks, inputs):
  """A_j = I: Picard iteration over depth, the Identity Newton (IDN) of SNLP; the correction is a prefix sum."""
  return blocks(inputs), lambda r: linear_recurrence(1.0, r)


def scaled(scale: float | Float[Array, "n"]) -> Surrogate:
  """A_j = scale_j I. `scaled(1 - kappa)` damps the identity (scale-ELK); residual lambdas scale it."""
  return lambda blocks, inputs: (blocks(inputs), lambda r: linear_recurrence(scale, r))


def diagonal(key: jax.Array, *, probes: int = 1, damping: float = 0.0, clip: float | None = None) -> Surrogate:
  """A_j = (1 - damping) diag(J_j), estimated by Hutchinson's E[v * (J v)] over Rademacher v (quasi-DEER).

  Each probe costs one more evaluation of the blocks (forward mode). `clip` bounds |A_j| elementwise.
  """

  def surrogate(blocks, inputs):
    outputs, jvp = jax.linearize(blocks, inputs)
    probe = lambda k: (lambda v: v * jvp(v))(jax.random.rademacher(k, inputs.shape, inputs.dtype))
    estimate = jnp.mean(jax.lax.map(probe, jax.random.split(key, probes)), axis=0)
    estimate = estimate if clip is None else jnp.clip(estimate, -clip, clip)
    return outputs, lambda r: linear_recurrence((1 - damping) * estimate, r)

  return surrogate


def streams(transition: Float[Array, "n *batch s s"] | Callable[[Float[Array, "n *state"]], Array]) -> Surrogate:
  """A_j mixes the stream axis (the last but one of the state): the surrogate of SNLP's HCN.

  `transition` is (n, *batch, s, s), batch axes broadcasting, or a function of the inputs that returns it (dynamic mHC).
  """

  def surrogate(blocks, inputs):
    a = transition(inputs) if callable(transition) else transition
    return blocks(inputs), lambda r: matrix_recurrence(a, r)

  return surrogate


def transferred(tensor: Float[Array, "n n s s"]) -> Surrogate:
  """`streams` with matrices that depend on nothing, as one product: e_j = sum_{i <= j} T[j, i] r_i.

  `tensor` is `recurrence.transfer_tensor` of the matrices.
  """
  return lambda blocks, inputs: (blocks(inputs), functools.partial(transfer, tensor))


def exact(blocks: Blocks, inputs):
  """A_j = J_j, by a chain of n Jacobian-vector products: full Newton. An oracle for tests, not fast."""
  outputs, jvp = jax.linearize(blocks, inputs)

  def correct(r):
    # jvp acts on each j apart, so after step j entry j of e is final.
    body = lambda j, e: e.at[j].set(r[j] + jnp.where(j > 0, jvp(jnp.roll(e, 1, axis=0).astype(inputs.dtype))[j], 0))
    return jax.lax.fori_loop(0, r.shape[0], body, jnp.zeros_like(r))

  return outputs, correct
