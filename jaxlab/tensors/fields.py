"""Row spaces over GF(p), GF(2) in packed words, and the reals, by one primitive: elimination over some of the columns.

A space is a matrix whose rows span it, padded with zero rows; shapes are static, ranks are arrays, everything vmaps.
  p = prime <= 32749   int32 entries in 0..p-1, exact
  p = 2147483647       the same in int64 (needs jax_enable_x64): a random field so large that it stands for Q
  packed GF(2)         p = 2 and dtype uint32: 32 columns a word, elimination by XOR; masks are words too
  p = 0                float64 reals (need jax_enable_x64): ranks by singular values, see `TOLERANCE` and `gap`

  reduced = fields.eliminate(m, p)                      # exact fields: the reduced row echelon form, unique for a space
  reduced = fields.eliminate(m, p, mask)                # pivots in these columns alone
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxlab.core.checks import InputError, require

# Over the reals: singular values below this share of the largest are zero. Units of rows and columns do not matter:
# both are brought to one size first.
TOLERANCE = 1e-11
LARGE = 2147483647
_SMALL = 32749
_BALANCINGS = 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reduced:
  """`rows`, the first `rank` of which carry pivots in the columns of the mask `pivots`; the others are 0 there."""

  rows: Shaped[Array, "m n"]
  pivots: Shaped[Array, "n"]
  rank: Int[Array, ""]

  def rest(self) -> Shaped[Array, "m n"]:
    """The rows without a pivot: the combinations that vanish on the columns that were eliminated."""
    keep = jnp.arange(self.rows.shape[0])[:, None] >= self.rank
    return jnp.where(keep, self.rows, jnp.zeros_like(self.rows))


def space(rows, p: int, *, pack: bool = False) -> Shaped[Array, "m n"]:
  """Rows over the field, checked and brought to its dtype; with `pack` over GF(2) into words.

  Raises:
    InputError: p is neither 0 nor a supported prime, entries are NaN, infinite or (finite field) not integers below
      2^53, or the rows are not a matrix.
  """
  check_field(p)
  try:
    rows = np.atleast_2d(np.asarray(rows))
  except ValueError as error:
    raise InputError(f"rows are no matrix ({error}); give rows of one length") from None
  require(rows.ndim == 2, f"rows have shape {rows.shape}; a space is given by a matrix")
  require(rows.dtype.kind in "biuf", f"rows hold {rows.dtype}; a space needs numbers")
  require(bool(np.isfinite(rows).all()), "rows hold NaN or infinite entries; a space needs finite numbers")
  if p == 0:
    return jnp.asarray(rows, jnp.asarray(0.0).dtype)
  require(
    rows.dtype.kind != "f" or bool((rows == np.round(rows)).all()),
    f"rows hold fractions; a space over GF({p}) needs integers",
  )
  # Larger floats are rounded, and larger integers may not fit into int64.
  require(
    rows.dtype.kind == "b" or bool((np.abs(rows.astype(np.float64)) < 2.0**53).all()),
    f"rows hold integers of 2^53 or more; reduce them modulo {p} first",
  )
  values = np.mod(rows.astype(np.int64), p)
  if pack:
    require(p == 2, f"only GF(2) spaces pack into words, not GF({p})")
    return pack_bits(values)
  return jnp.asarray(values, dtype_of(p))


def check_field(p: int) -> None:
  """Raises InputError unless p is 0 (the reals) or a prime this arithmetic is exact for."""
  whole = isinstance(p, int | np.integer) and not isinstance(p, bool)
  require(whole, f"p is {p!r:.40}; give an integer: a prime, or 0 for the reals")
  if p == 0:
    require(jax.config.jax_enable_x64, "p=0, the reals, needs 64-bit floats to decide ranks; set jax_enable_x64")
    return
  prime = p >= 2 and all(p % d for d in range(2, int(p**0.5) + 1))
  require(prime, f"p is {p}; a finite field GF(p) needs a prime (2, 3, 101, 32749, ...), the reals p=0")
  require(p <= _SMALL or p == LARGE, f"p is {p}; use a prime up to {_SMALL}, or {LARGE}, where products fit")
  require(p != LARGE or jax.config.jax_enable_x64, f"p={LARGE} needs 64-bit integers; set jax_enable_x64")


def dtype_of(p: int):
  return jnp.asarray(0.0).dtype if p == 0 else jnp.int64 if p == LARGE else jnp.int32


def pack_bits(bits) -> Int[Array, "m words"]:
  """0/1 columns into uint32 words, the lowest bit first; the last word is padded with zero columns."""
  bits = np.asarray(bits)
  columns = bits.shape[-1]
  bits = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -columns % 32)])
  bits = bits.reshape(*bits.shape[:-1], -(-columns // 32), 32)
  return jnp.asarray((bits.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32))


def unpack_bits(words, columns: int | None = None) -> np.ndarray:
  """The inverse of `pack_bits`; `columns` cuts the padding off."""
  words = np.asarray(words)
  bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
  return bits.reshape(*words.shape[:-1], 32 * words.shape[-1])[..., :columns].astype(np.int32)


@functools.partial(jax.jit, static_argnames="p")  # traced once a shape, however often it is called
def eliminate(m: Shaped[Array, "m n"], p: int, mask: Shaped[Array, "n"] | None = None) -> Reduced:
  """Gauss-Jordan elimination that takes pivots in the columns of `mask` (None: all), left to right.

  Over the reals the rows are rotated instead (singular value decomposition of the columns of the mask), and the pivots
  are columns as independent as can be had, each the one with the largest part outside the span of those before.

  Raises:
    InputError: as `check_space` and `check_mask`.
  """
  check_space(m, p)
  if mask is not None:
    check_mask(m, mask)
  rows, columns = m.shape
  if not rows or not columns:
    return Reduced(m, jnp.zeros(columns, jnp.uint32 if m.dtype == jnp.uint32 else bool), jnp.int32(0))
  if m.dtype == jnp.uint32:
    return _eliminate_words(m, mask)
  mask = jnp.ones(columns, bool) if mask is None else mask
  return _eliminate_reals(m, mask) if p == 0 else _eliminate_exactly(m, p, mask)


def _eliminate_exactly(m, p, mask):
  rows, columns = m.shape
  inverse = _inverse(p)
  index, place = jnp.arange(rows), jnp.arange(columns)

  def step(j, carry):
    a, pivots, rank = carry
    column = jax.lax.dynamic_index_in_dim(a, j, 1, keepdims=False)
    open_rows = (index >= rank) & mask[j] & (column != 0)
    chosen, found = jnp.argmax(open_rows), open_rows.any()
    at = jnp.minimum(rank, rows - 1)
    row = a[chosen]
    pivot_row = row * inverse(row[j]) % p
    a = jnp.where((index == chosen)[:, None], a[at], a)  # the swap: the pivot row itself goes to `at`
    factor = jnp.where(index == at, 0, jax.lax.dynamic_index_in_dim(a, j, 1, keepdims=False))
    # One remainder, of a nonnegative number: a + (p - f) r stays below 2^31 (2^63) for the fields allowed.
    new = jax.lax.rem(a + (p - factor)[:, None] * pivot_row, jnp.asarray(p, m.dtype))
    a = jnp.where(found, jnp.where((index == at)[:, None], pivot_row, new), carry[0])
    return a, pivots | (place == j) & found, rank + found

  return Reduced(*jax.lax.fori_loop(0, columns, step, (m, jnp.zeros(columns, bool), jnp.int32(0))))


def _eliminate_reals(m, mask):
  """Rows rotated by U' of the masked columns' U S V': those past the rank vanish there. Columns keep their units.

  Rotations of equal singular values are arbitrary and may leave a row tiny. Its entries are then true to the rounding
  of a row of length 1 only, so the rows past the rank are brought to `_echelon` before anyone sizes them anew.
  """
  m, scale, _ = _equilibrated(m)
  u, s, vt = jnp.linalg.svd(jnp.where(mask, m, 0), full_matrices=True)
  significant = s > TOLERANCE * s[0]
  rank = jnp.sum(significant, dtype=jnp.int32)
  rows = u.T @ m
  past = jnp.arange(len(rows))[:, None] >= rank
  _, t, wt = jnp.linalg.svd(jnp.where(past & ~mask, rows, 0), full_matrices=False)
  rest = _echelon(wt, t > TOLERANCE)
  rest = jnp.roll(jnp.pad(rest, ((0, max(len(rows) - len(rest), 0)), (0, 0)))[: len(rows)], rank, axis=0)
  basis = jnp.where(significant[:, None], vt[: len(s)], 0)
  return Reduced(jnp.where(past, rest, rows) * scale, _independent_columns(basis, rank), rank)


def _echelon(vt, significant):
  """Of the orthonormal rows that are significant the combinations with unit vectors in their pivot columns, first.

  Which rows span a space is arbitrary, and rounding decides; these depend on the choice of columns alone. An entry that
  is zero in exact arithmetic is then rounding, and is set to zero: sized again, it would count.
  """
  basis, rank = jnp.where(significant[:, None], vt, 0), jnp.sum(significant)
  pivots = _independent_columns(basis, rank)
  u, s, wt = jnp.linalg.svd(jnp.where(pivots, basis, 0), full_matrices=False)
  kept = jnp.arange(len(s)) < rank
  rows = jnp.matmul(wt.T * jnp.where(kept, 1 / jnp.where(kept, s, 1), 0), u.T @ basis)  # row j belongs to column j
  rows = jnp.where(pivots[:, None] & (jnp.abs(rows) > TOLERANCE), rows, 0)
  # Rows with a pivot move to the front.
  first = (jnp.cumsum(pivots) - 1 == jnp.arange(len(vt))[:, None]) & pivots
  return jnp.matmul(first.astype(rows.dtype), rows)


def _independent_columns(basis, rank):
  """The mask of `rank` columns by Gram-Schmidt with column pivoting; a rank decided before needs no tolerance here."""
  place = jnp.arange(basis.shape[1])

  def step(i, carry):
    left, chosen = carry
    j = jnp.argmax(jnp.where(chosen, -1, jnp.sum(left**2, 0)))
    direction = left[:, j] / jnp.maximum(jnp.linalg.norm(left[:, j]), jnp.finfo(left.dtype).tiny)
    take = i < rank
    return jnp.where(take, left - jnp.outer(direction, direction @ left), left), chosen | (place == j) & take

  return jax.lax.fori_loop(0, min(basis.shape), step, (basis, jnp.zeros(basis.shape[1], bool)))[1]


def _equilibrated(m):
  """Rows and columns of one size: (m, the columns' units, the largest share of a row that is taken as zero).

  The factors are those that bring the nonzero entries closest to 1, by least squares of their logarithms: they, and so
  every rank, are the same whatever units rows and columns came in. Rows then have length 1. A row shorter than the
  rounding of the longest is no row: whoever computed it meant zero.
  """
  unit = lambda size: jnp.where(size > 0, size, 1)
  first = unit(jnp.max(jnp.abs(m), 0, initial=0))
  m = m / first
  length = jnp.linalg.norm(m, axis=1, keepdims=True)
  share = length / unit(jnp.max(length, initial=0))
  dust = share <= max(m.shape) * jnp.finfo(m.dtype).eps
  m = jnp.where(dust, 0, m / unit(length))
  used = m != 0
  logs = jnp.log(jnp.where(used, jnp.abs(m), 1))
  mean = lambda values, axis: jnp.sum(values * used, axis) / jnp.maximum(jnp.sum(used, axis), 1)

  def balance(_, columns):
    rows = mean(logs - columns, 1)
    return mean(logs - rows[:, None], 0)

  columns = jnp.exp(jax.lax.fori_loop(0, _BALANCINGS, balance, jnp.zeros(m.shape[1], m.dtype)))
  m = m / columns
  return m / unit(jnp.linalg.norm(m, axis=1, keepdims=True)), first * columns, jnp.max(share * dust, initial=0)


def _eliminate_words(m, mask):
  rows, words = m.shape
  mask = jnp.full(words, 0xFFFFFFFF, jnp.uint32) if mask is None else mask
  index = jnp.arange(rows)

  def step(j, carry):
    a, pivots, rank = carry
    word, bit = j // 32, (j % 32).astype(jnp.uint32)
    here = lambda x: (x >> bit) & 1
    column = here(jax.lax.dynamic_index_in_dim(a, word, 1, keepdims=False)) == 1
    open_rows = (index >= rank) & column & (here(mask[word]) == 1)
    chosen, found = jnp.argmax(open_rows), open_rows.any()
    at = jnp.minimum(rank, rows - 1)
    row = a[chosen]
    swapped = jnp.where((index == chosen)[:, None], a[at], a)
    column = jnp.where(index == at, False, jnp.where(index == chosen, column[at], column))
    new = jnp.where(column[:, None], swapped ^ row, swapped)
    new = jnp.where((index == at)[:, None], row, new)
    pivots = pivots | jnp.where(jnp.arange(words) == word, found.astype(jnp.uint32) << bit, 0)
    return jnp.where(found, new, a), pivots, rank + found

  return Reduced(*jax.lax.fori_loop(0, 32 * words, step, (m, jnp.zeros(words, jnp.uint32), jnp.int32(0))))


def row_basis(m: Float[Array, "m n"], mask: Shaped[Array, "n"] | None = None) -> Float[Array, "k n"]:
  """Over the reals: independent rows that span the row space, then zeros; with a mask, of m's columns there.

  They are those of a reduced echelon form whose pivots are columns as independent as can be had. A rank in the columns
  of a mask is judged against the whole length of the rows: entries far below it are rounding of the others.
  """
  m, scale, _ = _equilibrated(m)
  _, s, vt = jnp.linalg.svd(m if mask is None else jnp.where(mask, m, 0), full_matrices=False)
  return _echelon(vt, s > TOLERANCE * jnp.max(s, initial=0)) * scale


def complement(m: Float[Array, "m n"]) -> Float[Array, "n n"]:
  """Over the reals: rows that span the vectors orthogonal to all rows, then zeros."""
  m, scale, _ = _equilibrated(m)
  _, s, vt = jnp.linalg.svd(jnp.pad(m, ((0, max(m.shape[1] - m.shape[0], 0)), (0, 0))), full_matrices=False)
  return _echelon(vt, s <= TOLERANCE * jnp.max(s, initial=0)) / scale


def keep(m: Shaped[Array, "m n"], mask: Shaped[Array, "n"]) -> Shaped[Array, "m n"]:
  """The columns of the mask; the others become 0."""
  return m & mask if m.dtype == jnp.uint32 else jnp.where(mask, m, jnp.zeros_like(m))


def count(mask: Shaped[Array, "n"]) -> Int[Array, ""]:
  """Columns in a mask, packed or not."""
  return jnp.sum(jax.lax.population_count(mask) if mask.dtype == jnp.uint32 else mask, dtype=jnp.int32)


def negate(m: Shaped[Array, "m n"], p: int) -> Shaped[Array, "m n"]:
  """-m in the field."""
  return m if m.dtype == jnp.uint32 else -m % p if p else -m


def reduced(m: Shaped[Array, "m n"], p: int) -> Shaped[Array, "m n"]:
  """Integers brought to 0..p-1; words and real numbers are left alone."""
  return m % p if p and m.dtype != jnp.uint32 else m


def projector(m: Float[Array, "m n"]) -> Float[Array, "n n"]:
  """The orthogonal projector on a real row space, unique for it."""
  q, r = jnp.linalg.qr(row_basis(m).T)
  used = jnp.where(jnp.abs(jnp.diag(r)) > 0, q, 0)
  return used @ used.T


def gap(m: Float[Array, "m n"], mask: Shaped[Array, "n"] | None = None) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """How safe a rank over the reals is: shares of the largest singular value, rows and columns of one size.

  Args:
    mask: of the rank in these columns.

  Returns:
    (the least taken as nonzero, infinite for rank 0; the largest taken as zero).
  """
  check_space(m, 0)
  even, _, dust = _equilibrated(m)
  s = jnp.linalg.svd(even if mask is None else jnp.where(mask, even, 0), compute_uv=False)
  share = s / jnp.maximum(jnp.max(s, initial=0), jnp.finfo(s.dtype).tiny)
  nonzero = share > TOLERANCE
  return jnp.min(jnp.where(nonzero, share, jnp.inf), initial=jnp.inf), jnp.max(
    jnp.where(nonzero, 0, share), initial=dust
  )


def check_mask(m: Shaped[Array, "m n"], mask) -> None:
  """Raises InputError unless the mask says of every column whether it is meant: bools, or words where m is packed."""
  dtype = jnp.uint32 if m.dtype == jnp.uint32 else jnp.bool_
  fits = getattr(mask, "dtype", None) == dtype and mask.shape == m.shape[-1:]
  form = f"{mask.dtype}{list(mask.shape)}" if hasattr(mask, "dtype") else f"a {type(mask).__name__}"
  require(fits, f"the mask is {form}; expected an array of {m.shape[-1]} {dtype.dtype.name}, one a column")


def check_space(m, p: int) -> None:
  """Raises InputError unless m is a matrix of the field's dtype.

  Packed words take p = 2, float64 takes p = 0, int32 and int64 a prime, and only int64 takes `LARGE`.
  """
  check_field(p)
  require(hasattr(m, "dtype"), f"a space is a {type(m).__name__}; make it with fields.space(rows, p)")
  exact = m.dtype == jnp.int64 or (m.dtype == jnp.int32 and p != LARGE)
  require(
    p == 2 if m.dtype == jnp.uint32 else m.dtype == jnp.float64 if p == 0 else exact,
    f"a space of {m.dtype} does not go with p={p}; packed words take p=2, float64 takes p=0, int32 a prime up to "
    f"{_SMALL}, int64 also {LARGE}: make it with fields.space(rows, p)",
  )
  require(m.ndim == 2, f"a space has shape {m.shape}; expected a matrix (use jax.vmap over several)")


@functools.cache
def _table(p: int) -> np.ndarray:
  return np.array([pow(i, p - 2, p) if i else 0 for i in range(p)], np.int32)


def _inverse(p: int):
  """a -> a^-1 (0 -> anything): a table for small p, Fermat's power for large."""
  if p <= _SMALL:
    return lambda a: jnp.asarray(_table(p))[a]

  bits = np.array([c == "1" for c in bin(p - 2)[2:]])

  def power(a):
    square = lambda i, r: jnp.where(jnp.asarray(bits)[i], r * r % p * a % p, r * r % p)
    return jax.lax.fori_loop(0, len(bits), square, jnp.ones_like(a))

  return power
