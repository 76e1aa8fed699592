r"""Deep memory: a recurrence whose state is the weights of a small network f(W, .), written by gradient descent.

A token's key and value are written by a step on l(W) = ||f(W, k) - v||^2 and its query is read by f(W_t, q). With
forgetting alpha, momentum eta and step size theta (Titans, arXiv 2501.00663)

  S_t = eta_t S_{t-1} - theta_t grad l(M; k_t, v_t),     W_t = (1 - alpha_t) W_{t-1} + S_t,     o_t = f(W_t, q_t),

where M are the weights at the start of the token's chunk, so that a chunk's gradients are taken at once; chunks of one
token are gradient descent token by token. With alpha = eta = 0 it is TTT's rule (arXiv 2407.04620).

A layer's gradient is the product of its input x_i and a cotangent g_i, so all W_t of a chunk are read without being
made (the dual form): with X the inputs of keys, G the cotangents and Y the inputs of queries, a layer gives

  Z = beta o (Y M) + e o (Y S) - (E o (Y X')) G,     W_t = beta_t M + e_t S - sum_i E[t, i] x_i g_i'.

Functions are for one head and one row; `jax.vmap` makes more of them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_choice, require_counts, require_divides
from jaxlab.core.recurrence import linear_recurrence
from jaxlab.models.layers import wide
from jaxlab.models.mamba2 import segment_sums

READS = ("token", "chunk")


class Memory(NamedTuple):
  """Fast weights of f: products with gelu between them, one product is the linear memory.

  Attributes:
    weights: (inputs, outputs) each; one more row than inputs is a bias.
    momentum: S, like the weights; None: the rule has none.
    norm: (gain, bias), each (size,), of f(x) = x + LN(products of x) as in TTT; None: f is the products. Not written.
  """

  weights: tuple[Float[Array, "inputs outputs"], ...]
  momentum: tuple[Float[Array, "inputs outputs"], ...] | None = None
  norm: tuple[Float[Array, "size"], Float[Array, "size"]] | None = None


class Gates(NamedTuple):
  """By token: theta, 1 - alpha (None: nothing is forgotten) and eta (None: no momentum)."""

  step: Float[Array, "time"]
  keep: Float[Array, "time"] | None = None
  momentum: Float[Array, "time"] | None = None


def squared_error(prediction: Float[Array, "time size"], v: Float[Array, "time size"]) -> Float[Array, ""]:
  """sum_t ||f(k_t) - v_t||^2; with `Memory.norm` the same as LN against v - k."""
  return jnp.square(prediction - v).sum()


Loss = Callable[[Array, Array], Array]  # (predictions, values) -> the sum of the tokens' losses


def read(memory: Memory, x: Float[Array, "time size"]) -> Float[Array, "time size"]:
  """f(W, x), the same weights for every token."""
  return _network(memory, x, lambda n, y: y @ memory.weights[n])


def scan(
  memory: Memory,
  q: Float[Array, "time size"],
  k: Float[Array, "time size"],
  v: Float[Array, "time size"],
  gates: Gates,
  *,
  chunk: int,
  reads: str = "token",
  pace: Float[Array, "chunk"] | None = None,
  clip: float | None = None,
  loss: Loss = squared_error,
) -> tuple[Memory, Float[Array, "time size"]]:
  """(memory after the last token, o_1 .. o_T), chunk by chunk in the dual form, in float32 or better.

  Work O(T (chunk + size) size), with gates O(T chunk^2) more, and T / chunk steps one after the other. The backward
  pass keeps the memory of about 2 sqrt(T / chunk) chunks and computes the rest again.

  Args:
    reads: "token": f(W_t, q_t), with what the chunk wrote up to and including t; "chunk": f(M, q_t), before it wrote.
    pace: c_t >= 0; o_t is read from M + c_t (W_t - M) and the next chunk starts from the last of these, as in TTT.
    clip: largest Frobenius norm of a matrix's change from chunk to chunk; what is read inside a chunk stays as it is.
    loss: l; what it says of a token must not depend on the others.

  Raises:
    InputError: a chunk below 1 or one that does not divide T, sizes that disagree, an unknown `reads`, momentum in one
      of memory and gates only.
  """
  _check(memory, q, k, v, gates, chunk, reads, pace)
  chunks = len(q) // chunk
  dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((memory, q, k, v, gates)))
  memory = jax.tree.map(lambda a: a.astype(dtype), memory)
  *parts, gates = jax.tree.map(lambda a: a.astype(dtype).reshape(chunks, chunk, *a.shape[1:]), (q, k, v, gates))
  # What gates alone decide is worked out for all chunks at once: a chunk waits for the one before, and does little.
  inside, ends = jax.vmap(_end_alone if reads == "chunk" else _coefficients)(gates)

  def one(memory, parts):
    q, k, v, inside, end = parts
    inputs, cotangents = _gradients(memory, k, v, loss)
    out = read(memory, q) if inside is None else _dual(memory, q, inputs, cotangents, inside, pace)
    return _written(memory, inputs, cotangents, end, pace, clip), out

  group = max(n for n in range(1, math.isqrt(chunks) + 1) if chunks % n == 0)
  parts = jax.tree.map(lambda a: a.reshape(group, chunks // group, *a.shape[1:]), (*parts, inside, ends))
  inner = jax.checkpoint(lambda memory, parts: jax.lax.scan(one, memory, parts), prevent_cse=False)
  memory, out = jax.lax.scan(inner, memory, parts)
  return memory, out.reshape(q.shape)


class Effect(NamedTuple):
  """What a write did: ||W' - W|| and ||W'|| over all matrices, l of the tokens written before it and after."""

  change: Float[Array, ""]
  size: Float[Array, ""]
  before: Float[Array, ""]
  after: Float[Array, ""]


def effect(
  old: Memory, new: Memory, k: Float[Array, "time size"], v: Float[Array, "time size"], *, loss: Loss = squared_error
) -> Effect:
  """Of the write of k and v that made `new` of `old`: where steps are too large, l rises and W runs away."""
  old, new, k, v = jax.tree.map(wide, (old, new, k, v))
  norm = lambda weights: jnp.sqrt(sum(jnp.square(w).sum() for w in weights))
  change = jax.tree.map(jnp.subtract, new.weights, old.weights)
  return Effect(norm(change), norm(new.weights), loss(read(old, k), v), loss(read(new, k), v))


class Running(NamedTuple):
  """A memory between two tokens: at the start of the chunk, and as its tokens have written it since."""

  start: Memory
  now: Memory


def step(
  running: Running,
  q: Float[Array, "size"],
  k: Float[Array, "size"],
  v: Float[Array, "size"],
  gates: Gates,
  position: Int[Array, ""] | int,
  *,
  chunk: int,
  reads: str = "token",
  pace: Float[Array, "chunk"] | None = None,
  clip: float | None = None,
  loss: Loss = squared_error,
) -> tuple[Running, Float[Array, "size"]]:
  """(memory with one more token, o_t): `scan` a token at a time; `gates` are scalars, `position` counts from 0."""
  require_counts(chunk=chunk)
  require_choice("reads", reads, READS)
  q, k, v, gates = jax.tree.map(lambda a: wide(a)[None], (q, k, v, gates))
  at = position % chunk
  first = lambda new, old: jax.tree.map(lambda a, b: jnp.where(at == 0, a, b), new, old)
  ended = tuple(map(lambda a, b: _carried(a, b, pace, clip), running.start.weights, running.now.weights))
  start = first(running.now._replace(weights=ended), running.start)
  now = first(start, running.now)
  inputs, cotangents = _gradients(start, k, v, loss)
  keep = 1.0 if gates.keep is None else gates.keep
  push = 0.0 if gates.momentum is None else gates.momentum
  now = _written(now, inputs, cotangents, (keep, push, gates.step, push, gates.step), None, None)
  if reads == "chunk":
    return Running(start, now), read(start, q)[0]
  share = 1.0 if pace is None else pace[at]
  weights = jax.tree.map(lambda a, b: a + share * (b - a), start.weights, now.weights)
  return Running(start, now), read(now._replace(weights=weights), q)[0]


def _network(memory: Memory, x, product: Callable):
  """f(x) with `product(n, y)` in the place of the n-th product."""
  y = x
  for n, weight in enumerate(memory.weights):
    y = jax.nn.gelu(y) if n else y
    y = jnp.concatenate([y, jnp.ones_like(y[:, :1])], axis=1) if len(weight) == y.shape[1] + 1 else y
    y = product(n, y)
  if memory.norm is None:
    return y
  gain, bias = memory.norm
  y = y - y.mean(axis=-1, keepdims=True)
  return x + gain * y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6) + bias


def _gradients(memory: Memory, k, v, loss: Loss):
  """(inputs X_n, cotangents G_n) of every product: the gradient of token i is the outer product of their rows i."""

  def shifted(shifts):
    inputs = []

    def product(n, y):
      inputs.append(y)
      return y @ memory.weights[n] + shifts[n]

    return loss(_network(memory, k, product), v), inputs

  zeros = [jnp.zeros((len(k), weight.shape[1]), weight.dtype) for weight in memory.weights]
  cotangents, inputs = jax.grad(shifted, has_aux=True)(zeros)
  return inputs, cotangents


def _dual(memory: Memory, q, inputs, cotangents, coefficients, pace):
  """f(W_t, q_t) of a chunk's tokens by products alone; the coefficients are the first of `_coefficients`."""
  stay, push, source = coefficients
  if pace is not None:
    stay, push, source = 1 + pace * (stay - 1), pace * push, pace[:, None] * source

  def product(n, y):
    z = stay[:, None] * (y @ memory.weights[n]) - (source * (y @ inputs[n].T)) @ cotangents[n]
    return z if memory.momentum is None else z + push[:, None] * (y @ memory.momentum[n])

  return _network(memory, q, product)


def _written(memory: Memory, inputs, cotangents, coefficients, pace, clip) -> Memory:
  """The memory after these tokens; the coefficients are the second of `_coefficients`."""
  stay, push, source, hold, kick = coefficients
  weights, momentum = [], []
  for n, weight in enumerate(memory.weights):
    end = stay * weight - (source[:, None] * inputs[n]).T @ cotangents[n]
    if memory.momentum is not None:
      end = end + push * memory.momentum[n]
      momentum.append(hold * memory.momentum[n] - (kick[:, None] * inputs[n]).T @ cotangents[n])
    weights.append(_carried(weight, end, pace, clip))
  return Memory(tuple(weights), memory.momentum and tuple(momentum), memory.norm)


def _carried(start, end, pace, clip):
  """What the next chunk starts from."""
  if pace is None and clip is None:
    return end
  change = (1.0 if pace is None else pace[-1]) * (end - start)
  if clip is not None:
    change = change * jnp.minimum(1.0, clip * jax.lax.rsqrt(jnp.square(change).sum() + 1e-12))
  return start + change


def _coefficients(gates: Gates):
  """((beta (C,), e (C,), E (C, C)), (beta_C, e_C, E_C (C,), Pi, P (C,))): what gates decide of a chunk and of its end.

  W_t = beta_t M + e_t S - sum_i E[t, i] grad_i and, at the end, S' = Pi S - sum_i P_i grad_i, with E a product of two
  triangles: E[t, i] = theta_i sum_{s = i..t} prod_{s < j <= t} (1 - alpha_j) prod_{i < j <= s} eta_j.
  """
  chunk, step = len(gates.step), gates.step
  kept = jnp.tri(chunk + 1, dtype=step.dtype) if gates.keep is None else _products(gates.keep)
  if gates.momentum is None:
    stay, source = kept[1:, 0], kept[1:, 1:] * step
    return (stay, jnp.zeros_like(step), source), (stay[-1], 0.0, source[-1], 0.0, step)
  held = _products(gates.momentum)[1:]
  pushed = jnp.matmul(kept[1:, 1:], held, precision="highest")
  stay, push, source = kept[1:, 0], pushed[:, 0], pushed[:, 1:] * step
  return (stay, push, source), (stay[-1], push[-1], source[-1], held[-1, 0], held[-1, 1:] * step)


def _products(gate: Float[Array, "chunk"]) -> Float[Array, "chunk_and_one chunk_and_one"]:
  """[t, s] = g_{s + 1} ... g_t, 1 on the diagonal and 0 above it; the first row and column are before the first token.

  From sums of logarithms, each pair's own: ratios of running products would be 0 / 0 once a gate has closed, and a scan
  over tokens is a program that grows with the chunk, forwards and backwards.
  """
  logs = jnp.log(jnp.maximum(gate, jnp.finfo(gate.dtype).tiny))  # of a closed gate: so small that products are 0
  return jnp.exp(segment_sums(jnp.pad(logs, (1, 0))))


def _end_alone(gates: Gates):
  """(None, the second of `_coefficients`), in O(C) from the end backwards: chunks read at their start are long."""
  last = jnp.zeros(len(gates.step) + 1, gates.step.dtype).at[-1].set(1.0)
  before = lambda gate: jnp.concatenate([gate, jnp.ones_like(gate[:1])])
  after = lambda gate: linear_recurrence(before(gate), last, reverse=True)  # products of the gates of later tokens
  kept = jnp.ones_like(last) if gates.keep is None else after(gates.keep)
  if gates.momentum is None:
    return None, (kept[0], 0.0, gates.step * kept[1:], 0.0, gates.step)
  pushed = linear_recurrence(before(gates.momentum), kept.at[0].set(0.0), reverse=True)
  held = after(gates.momentum)
  return None, (kept[0], pushed[0], gates.step * pushed[1:], held[0], gates.step * held[1:])


def _check(memory: Memory, q, k, v, gates: Gates, chunk, reads, pace):
  require_counts(chunk=chunk)
  require_choice("reads", reads, READS)
  require(
    q.ndim == 2 and q.shape == k.shape == v.shape and gates.step.shape == q.shape[:1],
    f"q {q.shape}, k {k.shape}, v {v.shape} and gates {gates.step.shape} disagree; expected (time, size) three times "
    "and (time,)",
  )
  require(len(q) > 0, f"there is no token (q {q.shape}); give at least one")
  require_divides("chunk", chunk, "time", len(q))
  rows, columns = memory.weights[0].shape[0], memory.weights[-1].shape[1]
  size = q.shape[1]
  require(
    rows in (size, size + 1) and columns == size,
    f"a memory of {rows} rows and {columns} columns cannot map vectors of {size}; the first matrix needs {size} rows "
    f"(one more for a bias), the last {size} columns",
  )
  require(
    (memory.momentum is None) == (gates.momentum is None),
    "momentum is in one of memory and gates only; give both or neither",
  )
  if pace is not None:
    require(pace.shape == (chunk,), f"pace has shape {pace.shape}; expected one number a token of a chunk, ({chunk},)")
