"""Linear recurrences h_t = A_t h_{t-1} + b_t, solved for all t at once.

The operator (A2, b2) o (A1, b1) = (A2 A1, A2 b1 + b2) is associative, so a scan over it has depth O(log T)
(Blelloch, "Prefix sums and their applications", 1990). Everything here is differentiable in both arguments.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxlab.core.checks import require

# Up to this many steps a prefix sum is written as a chain: XLA makes one elementwise kernel of it, where a scan
# would pass over memory log2(T) times.
_CHAIN = 64


def linear_recurrence(
  transition: float | Float[Array, "steps ..."],
  increment: PyTree[Float[Array, "..."]],
  *,
  axis: int = 0,
  reverse: bool = False,
) -> PyTree[Float[Array, "..."]]:
  """Solves e_t = a_t * e_{t-1} + b_t (e_{-1} = 0) for elementwise a_t: identity, scalar or diagonal transitions.

  Runs in float32 (float64 when given float64) whatever the input dtype: a bfloat16 running sum over 24 layers
  loses two digits. Work O(T), depth O(log T).

  Args:
    transition: a_t. A Python number holds for every step (1.0 is a prefix sum, 0.0 returns `increment`); an array
      has the steps on `axis` and broadcasts against every leaf of `increment` (trailing axes may be left out).
    increment: b_t; any pytree of arrays that share the length of `axis`.
    axis: the recurrence axis.
    reverse: solve e_t = a_t * e_{t+1} + b_t instead.

  Returns:
    e_t with the structure, shapes and dtypes of `increment`.

  Raises:
    InputError: the lengths along `axis` disagree.
  """
  return jax.tree.map(lambda b: _elementwise(transition, b, axis=axis, reverse=reverse), increment)


def matrix_recurrence(
  transition: Float[Array, "steps #*batch state state"],
  increment: Float[Array, "steps #*batch state columns"],
  *,
  reverse: bool = False,
) -> Float[Array, "steps *_batch state columns"]:
  """Solves E_t = A_t E_{t-1} + B_t (E_{-1} = 0) for small dense A_t by an associative scan over axis 0.

  Work O(T log T state^3), depth O(log T), in float32 or better. Batch axes of `transition` broadcast (use size 1).

  Raises:
    InputError: ranks differ, or the steps or the state sizes disagree.
  """
  steps, state = increment.shape[0], increment.shape[-2]
  require(
    transition.ndim == increment.ndim and transition.shape[0] == steps and transition.shape[-2:] == (state, state),
    f"transition {transition.shape} does not fit increment {increment.shape}; "
    f"expected (steps={steps}, *batch, {state}, {state}) with as many axes as the increment",
  )
  dtype = _accumulator(increment.dtype)

  def combine(first, second):
    (a1, b1), (a2, b2) = first, second
    return a2 @ a1, a2 @ b1 + b2

  # Matrix products on accelerators default to fewer bits than the accumulator has.
  with jax.default_matmul_precision("highest"):
    pair = (transition.astype(dtype), increment.astype(dtype))
    return jax.lax.associative_scan(combine, pair, reverse=reverse)[1].astype(increment.dtype)


def transfer_tensor(transition: Float[Array, "steps state state"]) -> Float[Array, "steps steps state state"]:
  """T[j, i] = A_j A_{j-1} ... A_{i+1} (T[j, j] = I, zero above): E_j = sum_{i <= j} T[j, i] B_i.

  Turns a recurrence whose matrices do not depend on the data into one matrix product, precomputed once.
  """
  steps, state, _ = transition.shape

  def column(i):
    start = jnp.where(jnp.arange(steps)[:, None, None] == i, jnp.eye(state, dtype=transition.dtype), 0)
    return matrix_recurrence(jnp.where(jnp.arange(steps)[:, None, None] > i, transition, 0), start)

  return jnp.moveaxis(jax.vmap(column)(jnp.arange(steps)), 0, 1)


def transfer(
  tensor: Float[Array, "rows steps state state"], increment: Float[Array, "steps *batch state columns"]
) -> Float[Array, "rows *batch state columns"]:
  """E_j for the rows j of `transfer_tensor` that `tensor` holds, in float32 or better: one matrix product."""
  dtype = _accumulator(increment.dtype)
  tensor, wide = tensor.astype(dtype), increment.astype(dtype)
  return jnp.einsum("jisu,i...ud->j...sd", tensor, wide, precision="highest").astype(increment.dtype)


def doubling_scan(combine: Callable, elements: PyTree[Array], *, reverse: bool = False) -> PyTree[Array]:
  """`jax.lax.associative_scan` over axis 0 by recursive doubling: round i combines steps 2^i apart, all at once.

  Work O(T log T) instead of O(T), half the depth, and one `combine` in the program whatever T: it compiles in a
  fraction of the time, and runs faster wherever a round does not fill the device.

  Args:
    combine: associative, (earlier, later) -> joined, and with `reverse` (later, earlier); must accept any pair of
      elements, as the wrapped-around ones are combined and then dropped.

  Reference: Hillis & Steele, "Data parallel algorithms", 1986.
  """
  if reverse:
    flip = lambda tree: jax.tree.map(lambda a: jnp.flip(a, 0), tree)
    return flip(doubling_scan(combine, flip(elements)))
  steps = len(jax.tree.leaves(elements)[0])

  def round_(i, elements):
    distance = jnp.left_shift(1, i)
    joined = combine(jax.tree.map(lambda a: jnp.roll(a, distance, 0), elements), elements)
    far = jnp.arange(steps) >= distance
    keep = lambda new, old: jnp.where(far.reshape(-1, *[1] * (old.ndim - 1)), new, old)
    return jax.tree.map(keep, joined, elements)

  return jax.lax.fori_loop(0, (steps - 1).bit_length(), round_, elements)


def _elementwise(transition, increment, *, axis, reverse):
  dtype = _accumulator(increment.dtype)
  b = jnp.moveaxis(increment, axis, 0).astype(dtype)
  if isinstance(transition, int | float):
    if transition == 0:
      return increment
    if transition == 1:
      return jnp.moveaxis(_prefix_sum(b, reverse), 0, axis).astype(increment.dtype)
    a = jnp.full(b.shape[:1], transition, dtype)
  else:
    a = jnp.moveaxis(transition, axis if transition.ndim > 1 else 0, 0).astype(dtype)
  require(
    a.shape[0] == b.shape[0],
    f"transition has {a.shape[0]} steps, increment {b.shape[0]} along axis {axis}; they must agree",
  )
  a = jnp.broadcast_to(a.reshape(a.shape + (1,) * (b.ndim - a.ndim)), b.shape)
  combine = lambda first, second: (second[0] * first[0], second[0] * first[1] + second[1])
  solution = jax.lax.associative_scan(combine, (a, b), reverse=reverse)[1]
  return jnp.moveaxis(solution, 0, axis).astype(increment.dtype)


def _prefix_sum(b, reverse):
  if b.shape[0] > _CHAIN:
    return jax.lax.associative_scan(jnp.add, b, reverse=reverse)
  rows = list(b)[::-1] if reverse else list(b)
  for i in range(1, len(rows)):
    rows[i] = rows[i - 1] + rows[i]
  return jnp.stack(rows[::-1] if reverse else rows)


def _accumulator(dtype):
  return jnp.promote_types(dtype, jnp.float32)
