r"""One-shot pruning: which weights of a linear map stay, by themselves, at a density.

W (inputs, outputs), y = W^T x, x over a calibration text. A score a weight, and the largest stay: of the whole map, of
every output's column or of every input's row (`per`).

  magnitude    |W_ij|
  Wanda        |W_ij| ||x_i||_2                     per output, as published (Sun et al. 2023, arXiv 2306.11695)
  gradient     |W_ij dL/dW_ij|
  SparseGPT    W_ij^2 / [H^-1]_ii^2, block of inputs after block, what stays makes good what goes
               (Frantar and Alistarh 2023, arXiv 2301.00774)

  pruned = prune(model, tokens, "wanda", density=0.5)      # a Transformer; pruned.model has zeros
  mask = keep(magnitude(weight), 0.5)                      # any matrix
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_choice, require_divides
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import Linear
from jaxlab.models.packed_maps import sparse
from jaxlab.training.losses import mean_loss, token_losses
from jaxlab.weights.calibration import Moments, layer_by_layer, require_transformer, with_maps

PER = ("tensor", "output", "input")
METHODS = ("magnitude", "wanda", "sparsegpt", "gradient", "random")
_DAMPING = 0.01  # of the mean of the Hessian's diagonal
_BLOCK = 128  # inputs that SparseGPT takes at a time


def magnitude(weight: Float[Array, "inputs outputs"], x: Moments | None = None) -> Float[Array, "inputs outputs"]:
  return jnp.abs(weight.astype(jnp.float32))


def wanda(weight: Float[Array, "inputs outputs"], x: Moments) -> Float[Array, "inputs outputs"]:
  """|W_ij| sqrt(sum over tokens of x_i^2)."""
  return magnitude(weight) * jnp.sqrt(x.tokens * jnp.diagonal(x.second))[:, None]


def keep(scores: Float[Array, "inputs outputs"], density: float, *, per: str = "tensor") -> Bool[np.ndarray, "i o"]:
  """Where the round(n density) largest scores are, of the n of the map, of each output or of each input.

  Raises:
    InputError: a density outside 0..1, an unknown `per`, scores that are no numbers.
  """
  require_density(density)
  require_choice("per", per, PER)
  scores = np.asarray(scores, np.float32)
  require(not np.isnan(scores).any(), "a score is NaN; look at the weights and the calibration text")
  groups = {"tensor": lambda a: a.reshape(1, -1), "output": lambda a: a.T, "input": lambda a: a}[per](scores)
  count = round(groups.shape[1] * density)
  mask = np.zeros(groups.shape, bool)
  if count:
    np.put_along_axis(mask, np.argpartition(-groups, count - 1, axis=1)[:, :count], True, axis=1)
  return mask.T if per == "output" else mask.reshape(scores.shape)


def keep_n_of_m(scores: Float[Array, "inputs outputs"], n: int, m: int) -> Bool[np.ndarray, "i o"]:
  """Where the n largest scores of every m inputs in a row of an output are (2:4 and the like).

  Raises:
    InputError: n above m, or an m that does not divide the inputs.
  """
  scores = np.asarray(scores, np.float32)
  require_divides("m", m, "inputs", len(scores))
  require(0 <= n <= m, f"n is {n}; it must be 0..{m}")
  grouped = scores.reshape(-1, m, scores.shape[1])
  rank = np.argsort(np.argsort(-grouped, axis=1, kind="stable"), axis=1)
  return (rank < n).reshape(scores.shape)


def require_density(density: float) -> None:
  require(0 <= density <= 1, f"density is {density}; it is the share of weights that stays, 0..1")


@functools.partial(jax.jit, static_argnames=("density", "block", "damping"))
def sparsegpt(
  weight: Float[Array, "inputs outputs"],
  x: Moments,
  *,
  density: float,
  block: int = _BLOCK,
  damping: float = _DAMPING,
) -> tuple[Float[Array, "inputs outputs"], Float[Array, "inputs outputs"]]:
  """(the weights that stay, changed, and zeros; the scores they were chosen by).

  H = 2 mean x x^T, `damping` of its mean diagonal added; U the upper Cholesky factor of its inverse. Of every `block`
  inputs the entries with the smallest W_ij^2 / U_ii^2 go; then input after input what that costs an output is made good
  by the inputs that follow.
  """
  inputs, outputs = weight.shape
  block = min(block, inputs)
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  hessian = 2 * x.second
  dead = jnp.diagonal(hessian) == 0
  hessian = hessian + jnp.diag(dead.astype(hessian.dtype))
  hessian = hessian + damping * jnp.diagonal(hessian).mean() * jnp.eye(inputs, dtype=hessian.dtype)
  root = jnp.linalg.cholesky(hessian)
  inverse = jax.scipy.linalg.cho_solve((root, True), jnp.eye(inputs, dtype=hessian.dtype))
  spread = jnp.linalg.cholesky(inverse).T
  weight = jnp.where(dead[:, None], 0, weight.astype(jnp.float32))

  def one_block(weight, start, size: int):
    part = jax.lax.dynamic_slice_in_dim(weight, start, size)
    rows = jax.lax.dynamic_slice_in_dim(spread, start, size)
    inside = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
    scores = part**2 / jnp.diagonal(inside)[:, None] ** 2
    goes = round(size * outputs * (1 - density))
    lowest = jnp.argsort(scores.ravel())[:goes]
    mask = jnp.ones(scores.size, bool).at[lowest].set(False).reshape(scores.shape)

    def one(j, state):
      part, errors = state
      kept = jnp.where(mask[j], part[j], 0)
      error = (part[j] - kept) / inside[j, j]
      after = jnp.where(jnp.arange(size) > j, inside[j], 0)
      return (part - after[:, None] * error).at[j].set(kept), errors.at[j].set(error)

    part, errors = jax.lax.fori_loop(0, size, one, (part, jnp.zeros_like(part)))
    after = jnp.where(jnp.arange(inputs) >= start + size, rows, 0)
    weight = weight - product(after.T, errors)
    return jax.lax.dynamic_update_slice_in_dim(weight, part, start, axis=0), scores

  whole, left = divmod(inputs, block)
  step = lambda weight, start: one_block(weight, start, block)
  weight, scores = jax.lax.scan(step, weight, block * jnp.arange(whole))
  scores = scores.reshape(whole * block, outputs)
  if left:
    weight, last = one_block(weight, whole * block, left)
    scores = jnp.concatenate([scores, last])
  return weight, scores


class Pruned(NamedTuple):
  """model: maps with zeros; masks: {map: bool (layers, inputs, outputs)}, True stays; scores: like masks, float32."""

  model: Transformer
  masks: Mapping[str, np.ndarray]
  scores: Mapping[str, np.ndarray]


def prune(
  model: Transformer,
  tokens: Int[Array, "rows time"],
  how: str = "wanda",
  *,
  density: float,
  per: str | None = None,
  batch: int = 8,
  seed: int = 0,
) -> Pruned:
  """Every linear map of the blocks at one density, layer after layer: a layer is calibrated behind those pruned before.

  Args:
    how: of `METHODS`. SparseGPT changes what stays, the others do not.
    per: what scores are compared within, of `PER`; Wanda's default is "output", others' "tensor".

  Raises:
    InputError: an unknown method, a density outside 0..1, `per` of SparseGPT, a map that is not plain; and as
      `layer_by_layer`.
  """
  require_choice("a method of pruning", how, METHODS)
  require_density(density)
  require(how != "sparsegpt" or per is None, "SparseGPT compares weights within its own blocks; leave per out")
  per = per or ("output" if how == "wanda" else "tensor")
  _plain(model)
  if how == "gradient":
    slopes = gradient(model, tokens, batch=batch)
  scores, masks = {}, {}

  def one(name: str, layer: int, weight, x: Moments):
    if how == "sparsegpt":
      made, found = sparsegpt(weight, x, density=density)
      return made, found, np.asarray(made != 0)
    if how == "random":
      found = np.random.default_rng((seed, layer, maps.NAMES.index(name))).random(weight.shape, np.float32)
    elif how == "gradient":
      found = jnp.abs(weight * slopes[name][layer])
    else:
      found = {"magnitude": magnitude, "wanda": wanda}[how](weight, x)
    mask = keep(found, density, per=per)
    return jnp.where(mask, weight, 0), found, mask

  def visit(layer, block, inputs):
    forms = {}
    for name, linear in maps.named(block).items():
      made, found, mask = one(name, layer, linear.weight[...], inputs[name])
      forms[name] = Linear(made.astype(linear.weight.dtype), linear.weight.axes)
      scores.setdefault(name, []).append(np.asarray(found, np.float32))
      masks.setdefault(name, []).append(mask)
    return forms

  # Masks that do not look at inputs need one pass only.
  changes = how in ("wanda", "sparsegpt")
  small = with_maps(model, layer_by_layer(model, tokens, visit, batch=batch, sequential=changes))
  stacked = lambda found: {name: np.stack(layers) for name, layers in found.items()}
  return Pruned(small, stacked(masks), stacked(scores))


def gradient(model: Transformer, tokens: Int[Array, "rows time"], *, batch: int = 8) -> dict[str, Array]:
  """{map: the gradient of the next token's mean loss, stacked over layers}.

  Raises:
    InputError: a map that is not plain, or rows of fewer than two tokens.
  """
  plain = _plain(model)
  require(tokens.shape[1] >= 2, f"rows have {tokens.shape[1]} tokens; a token is predicted from those before it")

  @jax.jit
  def slope(weights, model, rows):
    made = {name: Linear(w, plain[name].weight.axes) for name, w in weights.items()}
    one = with_maps(model, made)
    return mean_loss(token_losses(one, one.hidden(rows[:, :-1]), rows[:, 1:]), rows[:, 1:])

  weights = {name: one.weight[...] for name, one in plain.items()}
  add: Callable = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
  total, take = None, jax.jit(jax.grad(slope))
  for i in range(0, len(tokens), batch):
    found = take(weights, model, jnp.asarray(tokens[i : i + batch]))
    total = found if total is None else add(total, found)
  return total


def stored_sparse(model: Transformer) -> Transformer:
  """The same function with every map as a bit a weight and the weights that are not 0: what a file then takes."""
  return with_maps(model, {name: sparse(one.weight[...]) for name, one in _plain(model).items()})


def _plain(model: Transformer) -> dict[str, Linear]:
  """The maps, all of them matrices without a bias."""
  require_transformer(model)
  found = maps.named(model.blocks)
  for name, one in found.items():
    require(isinstance(one, Linear), f"{name} is a {type(one).__name__}; only plain maps are pruned")
  return found
