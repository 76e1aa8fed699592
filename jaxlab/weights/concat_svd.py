r"""Concatenated-matrix SVD: which matrices may share one truncated basis (Shamrai 2026, arXiv 2601.11626).

Matrices A_k (m x n_k) side by side, M = [A_1 .. A_K], at rank r lose

  e = sqrt(1 - sum_{i <= r} sigma_i(M)^2 / |M|_F^2),   |M|_F^2 = sum_k |A_k|_F^2.

A lower bound of the sum bounds e from above without an SVD of M; groups grow while that bound is at most eps. Three:

  "max_norm"    the energy of those first matrices that have at most r columns together: norms alone
  "residuals"   the r largest squared singular values among those of the same first matrices, then of
                (I - Q Q^T) A_k: Q the basis so far
  "approximate" a truncated SVD of M M^T kept up to date; it forgets only what is positive, so it is a bound, too

Only sums of squares are bounded by the second, not single singular values.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import InputError, require, require_choice, require_counts
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import Linear
from jaxlab.models.map_forms import SharedBasis
from jaxlab.weights.calibration import require_transformer, with_maps

WRITE = ("o", "mlp.down")  # maps whose outputs, not inputs, are of the residual stream
METHODS = ("max_norm", "residuals", "approximate")
EXACT = "exact"  # groups by their true error, from M M^T: what the bounds are measured against
ORDERS = ("norm", "residual")
_TINY = 1e-12  # eigenvalues and directions below this share of the largest are none


class Tracked(NamedTuple):
  """M M^T ~ Q diag(values) Q^T; directions that are not there are zero columns. energy: |M|_F^2."""

  basis: Float[Array, "m kept"]
  values: Float[Array, "kept"]
  energy: Float[Array, ""]


def track(state: Tracked, block: Float[Array, "m n"]) -> Tracked:
  """The state with one more matrix: an SVD of what was kept beside it, cut to as many directions.

  Of the compressed matrix [Q diag(sqrt values), A] itself, not of its Gram matrix, which would square what is small.
  """
  kept = state.values.shape[0]
  known = state.basis * jnp.sqrt(state.values)
  left, values, _ = jnp.linalg.svd(jnp.concatenate([known, block], axis=1), full_matrices=False)
  size = min(kept, len(values))
  some = values[:size] > _TINY * values[0]
  fill = lambda a: jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, kept - size)])
  basis = fill(jnp.where(some, left[:, :size], 0))
  return Tracked(basis, fill(jnp.where(some, values[:size] ** 2, 0)), state.energy + (block**2).sum())


def tracked(blocks: Sequence[Array], *, rank: int, oversampling: int = 5) -> Tracked:
  """Of matrices one after the other."""
  m = blocks[0].shape[0]
  kept = min(rank + oversampling, m)
  dtype = blocks[0].dtype
  state = Tracked(jnp.zeros((m, kept), dtype), jnp.zeros(kept, dtype), jnp.zeros((), dtype))
  for block in blocks:
    state = _track(state, block)
  return state


_track = jax.jit(track)


def merge(one: Tracked, other: Tracked) -> Tracked:
  """The state of both states' matrices together, to be made in any order, as a tree: what was forgotten stays so."""
  grown = track(one, other.basis * jnp.sqrt(other.values))
  return grown._replace(energy=one.energy + other.energy)


class Residual(NamedTuple):
  """A growing basis (m, m), filled from the left, and the r largest singular values of what each matrix added."""

  basis: Float[Array, "m m"]
  filled: Int[Array, ""]
  values: Float[Array, "r"]
  energy: Float[Array, ""]


@jax.jit
def add_residual(state: Residual, block: Float[Array, "m n"]) -> Residual:
  """The state with one more matrix; what it adds is projected out of the basis twice."""
  m = state.basis.shape[0]
  out = lambda a: a - state.basis @ (state.basis.T @ a)
  rest = out(out(block))
  left, values, _ = jnp.linalg.svd(rest, full_matrices=False)
  noise = 10 * jnp.finfo(block.dtype).eps * m**0.5 * jnp.linalg.norm(block)
  some = values > noise
  places = jnp.where(some, state.filled + jnp.arange(len(values)), m)  # those past the end are dropped
  # Directions of small values are rounding as much as they are new: without this the basis slowly stops being one.
  left = jnp.linalg.qr(out(jnp.where(some, left, 0)))[0]
  basis = state.basis.at[:, places].set(left, mode="drop")
  best = jax.lax.top_k(jnp.concatenate([state.values, jnp.where(some, values, 0)]), len(state.values))[0]
  return Residual(basis, state.filled + some.sum(), best, state.energy + (block**2).sum())


def residual_state(blocks: Sequence[Array], *, rank: int) -> Residual:
  """Of matrices one after the other."""
  m, dtype = blocks[0].shape[0], blocks[0].dtype
  zeros = lambda *shape: jnp.zeros(shape, dtype)
  state = Residual(zeros(m, m), jnp.int32(0), zeros(rank), zeros())
  for block in blocks:
    state = add_residual(state, block)
  return state


def relative_error(blocks: Sequence[Array], *, rank: int) -> float:
  """e of matrices side by side, by an SVD of all of them in float64."""
  values = np.linalg.svd(np.concatenate([np.asarray(block, np.float64) for block in blocks], axis=1), compute_uv=False)
  energy = (values**2).sum()
  return float((values[rank:] ** 2).sum() / energy) ** 0.5 if energy else 0.0


def bound(blocks: Sequence[Array], *, rank: int, method: str = "approximate", oversampling: int = 5) -> float:
  """The bound of e by one of `METHODS`, never below it; matrices are taken in the order given.

  Worked out in float64: e^2 is a difference of sums, of which float32 has three digits at e = 0.01.

  Raises:
    InputError: an unknown method, a rank below 1, matrices of different heights, or numbers whose squares overflow.
  """
  with jax.enable_x64(True):
    blocks = _checked(blocks, rank, method)
    count = len(blocks)
    if method == "max_norm":
      energies = [float((block**2).sum()) for block in blocks]
      return _error(_seed_energy(blocks, rank), sum(energies), count)
    first = _seed(blocks, range(len(blocks)), rank)
    blocks = [jnp.concatenate(blocks[: len(first)], axis=1), *blocks[len(first) :]]
    if method == "residuals":
      state = residual_state(blocks, rank=rank)
      return _error(float((state.values**2).sum()), float(state.energy), count)
    state = tracked(blocks, rank=rank, oversampling=oversampling)
    return _error(float(state.values[:rank].sum()), float(state.energy), count)


class Cluster(NamedTuple):
  """Matrices that share a basis: their numbers, basis (m, r), r x n_k coefficients of each, and the bound of e.

  A matrix by itself, or a group for which factors would take as many numbers, is stored whole: basis is None and the
  coefficients are the matrices.
  """

  members: tuple[int, ...]
  basis: Array | None
  coefficients: tuple[Array, ...]
  bound: float

  def matrix(self, place: int) -> Array:
    """The matrix at a place among the members, as it is given back."""
    stored = self.coefficients[place]
    return stored if self.basis is None else self.basis @ stored

  @property
  def numbers(self) -> int:
    """That are stored."""
    return sum(a.size for a in self.coefficients) + (0 if self.basis is None else self.basis.size)


def cluster(
  blocks: Sequence[Array],
  *,
  rank: int,
  eps: float,
  method: str = "approximate",
  order: str = "norm",
  patience: int = 10,
  oversampling: int = 5,
) -> list[Cluster]:
  """A partition of matrices into groups whose error at rank r is at most eps, as large as the bound allows.

  A group begins with the largest matrices that have at most r columns together, and takes the others in order until
  the bound exceeds eps: it stops at the first, as published.

  Args:
    method: of `METHODS`, or `EXACT`.
    order: of those that join: "norm", the smallest first, or "residual", those nearest to the first ones' basis first.
    patience: rounds in a row in which nothing joins, after which every matrix left is by itself.

  Returns:
    The groups; bases and coefficients are of the matrices' dtype, float32 at least.

  Raises:
    InputError: as `bound`; an unknown order, or eps below 0.
  """
  require_choice("order", order, ORDERS)
  require_counts(patience=patience)
  require(eps >= 0, f"eps is {eps}; it must be at least 0")
  with jax.enable_x64(True):
    wide = _checked(blocks, rank, method, (*METHODS, EXACT))
    found = _clusters(wide, rank, eps, method, order, patience, oversampling)
    dtype = jnp.promote_types(jnp.asarray(blocks[0]).dtype, jnp.float32)
    narrow = lambda a: None if a is None else a.astype(dtype)
    return [Cluster(c.members, narrow(c.basis), tuple(map(narrow, c.coefficients)), c.bound) for c in found]


def _clusters(blocks, rank, eps, method, order, patience, oversampling) -> list[Cluster]:
  energies = [float((block**2).sum()) for block in blocks]
  left = sorted(range(len(blocks)), key=lambda i: (-energies[i], i))
  found, alone = [], 0
  while left and alone < patience:
    seed = _seed(blocks, left, rank)
    rest = [i for i in left if i not in set(seed)]
    if order == "residual":
      basis = jnp.linalg.qr(jnp.concatenate([blocks[i] for i in seed], axis=1))[0]
      away = {i: float(((blocks[i] - basis @ (basis.T @ blocks[i])) ** 2).sum()) for i in rest}
      rest.sort(key=lambda i: (away[i], i))
    else:
      rest.sort(key=lambda i: (energies[i], i))
    members, certified = _grow(blocks, energies, seed, rest, rank=rank, eps=eps, method=method, more=oversampling)
    found.append(_stored(blocks, members, certified, rank))
    taken = set(members)
    left = [i for i in left if i not in taken]
    alone = alone + 1 if len(members) == len(seed) else 0
  return found + [_stored(blocks, (i,), 0.0, rank) for i in left]


def _grow(blocks, energies, seed, rest, *, rank: int, eps: float, method: str, more: int):
  """(members, the bound of their error): the seed and the longest beginning of the rest that stays within eps."""
  first = [blocks[i] for i in seed]
  energy = sum(energies[i] for i in seed)
  if method == "max_norm":
    update, state = (lambda state, block: state), _seed_energy(first, rank)
    lower = lambda state: state
  elif method == "residuals":
    update, state = add_residual, residual_state([jnp.concatenate(first, axis=1)], rank=rank)
    lower = lambda state: float((state.values**2).sum())
  elif method == EXACT:
    update, state = _add_gram, sum(block @ block.T for block in first)
    lower = lambda state: float(jnp.linalg.eigvalsh(state)[-rank:].sum())
  else:
    update, state = _track, tracked(first, rank=rank, oversampling=more)
    lower = lambda state: float(state.values[:rank].sum())
  members, certified = [*seed], _error(lower(state), energy, len(seed))
  if certified > eps:  # wider than r, and not of rank r
    return (seed[0],), 0.0
  for i in rest:
    state, energy = update(state, blocks[i]), energy + energies[i]
    error = _error(lower(state), energy, len(members) + 1)
    if error > eps:
      break
    members, certified = [*members, i], error
  return tuple(members), certified


_add_gram = jax.jit(lambda gram, block: gram + jnp.matmul(block, block.T, precision=jax.lax.Precision.HIGHEST))


def _seed(blocks, order: Sequence[int], rank: int) -> list[int]:
  """The first of the order and those after it while all have at most r columns together."""
  seed, columns = [order[0]], blocks[order[0]].shape[1]
  for i in order[1:]:
    columns += blocks[i].shape[1]
    if columns > rank:
      break
    seed.append(i)
  return seed


def _seed_energy(blocks, rank: int) -> float:
  """Of the first matrices with at most r columns together; of one that is wider its r largest singular values."""
  if blocks[0].shape[1] > rank:
    return float((jnp.linalg.svd(blocks[0], compute_uv=False)[:rank] ** 2).sum())
  return sum(float((blocks[i] ** 2).sum()) for i in _seed(blocks, range(len(blocks)), rank))


def _stored(blocks, members: tuple[int, ...], certified: float, rank: int) -> Cluster:
  m = blocks[0].shape[0]
  parts = [blocks[i] for i in members]
  columns = sum(part.shape[1] for part in parts)
  if len(members) == 1 or rank * (m + columns) >= m * columns:
    return Cluster(members, None, tuple(parts), 0.0)
  basis = jnp.linalg.svd(jnp.concatenate(parts, axis=1), full_matrices=False)[0][:, :rank]
  return Cluster(members, basis, tuple(basis.T @ part for part in parts), certified)


def compression_ratio(blocks: Sequence[Array], clusters: Sequence[Cluster]) -> float:
  """Numbers of the matrices over those stored."""
  return sum(np.size(block) for block in blocks) / sum(one.numbers for one in clusters)


def compress(
  model: Transformer, *, rank: int, eps: float, names: Sequence[str] | None = None, **options
) -> tuple[Transformer, list[Cluster]]:
  """The model with maps that share bases of the residual stream, and the groups of its matrices.

  Rows of every matrix are the residual stream's: of maps that read it their inputs, of "o" and "mlp.down", which write
  it, their outputs. Files hold a basis once, and what shares none whole; a map of which no layer shares stays as it is.

  Args:
    rank: of the bases; eps: the largest relative error of a group; 0: nothing is shared, and nothing changes.
    names: of the maps, all by default; options: of `cluster`.

  Raises:
    InputError: as `cluster`; a map that is not one matrix, layers of unequal sizes, or weights that are no numbers.
  """
  require_transformer(model)
  require(not model.config.ragged, "layers of this model have unequal sizes; share bases before pruning")
  found = maps.named(model.blocks)
  names = tuple(found) if names is None else tuple(names)
  for name in names:
    require_choice("a map", name, found)
    require(isinstance(found[name], Linear), f"the map {name} is compressed already; share bases first")
  dense = {name: np.asarray(found[name].weight[...]) for name in names}
  upright = lambda name, w: w.T if name in WRITE else w
  places = [(name, layer) for name in names for layer in range(len(dense[name]))]
  for name, layer in places:
    require(np.isfinite(dense[name][layer]).all(), f"blocks.{name} of layer {layer} holds NaN or infinity")
  groups = cluster([upright(name, dense[name][layer]) for name, layer in places], rank=rank, eps=eps, **options)
  shared = [one for one in groups if one.basis is not None]
  made: dict[str, dict] = {}
  for number, one in enumerate(shared, 1):
    for member, coefficients in zip(one.members, one.coefficients, strict=True):
      name, layer = places[member]
      made.setdefault(name, {})[layer] = (number, one.basis.T, coefficients)
  forms = {}
  for name, of in made.items():
    rest = {layer: (0, None, upright(name, w)) for layer, w in enumerate(dense[name]) if layer not in of}
    ordered = [(rest | of)[layer] for layer in range(len(dense[name]))]
    forms[name] = SharedBasis.of_layers(ordered, writes=name in WRITE)
  return with_maps(model, forms), groups


def _error(lower: float, energy: float, count: int) -> float:
  """With what rounding may take from it, ten steps of float64 a matrix. No number is no bound: infinity."""
  left = 0.0 if energy == 0 else max(0.0, 1 - lower / energy) + 10 * count * np.finfo(np.float64).eps
  return math.inf if math.isnan(lower) or math.isnan(energy) else left**0.5


def _checked(blocks: Sequence[Array], rank: int, method: str, methods: Sequence[str] = METHODS) -> list[Array]:
  require_choice("method", method, methods)
  require_counts(rank=rank)
  require(len(blocks) > 0, "no matrix was given; give at least one")
  blocks = [jnp.asarray(np.asarray(block), jnp.float64) for block in blocks]
  m = blocks[0].shape[0] if blocks[0].ndim == 2 else -1
  for i, block in enumerate(blocks):
    fits = block.ndim == 2 and block.shape[0] == m and block.shape[1] > 0
    require(fits, f"matrix {i} has shape {block.shape}; all must have the rows of the first, and a column at least")
    if not bool(jnp.isfinite((block**2).sum())):
      raise InputError(f"matrix {i} holds NaN, infinity or numbers whose squares overflow; leave it out or mend it")
  return blocks
