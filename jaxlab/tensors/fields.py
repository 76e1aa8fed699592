"""Row spaces over GF(p), GF(2) in packed words, and the reals, by one primitive: elimination over some of the columns.

A space is a matrix whose rows span it, padded with zero rows; shapes are static, ranks are arrays, everything vmaps.
  p = prime <= 32749   int32 entries in 0..p-1, exact
  p = 2147483647       the same in int64 (needs jax_enable_x64): a random field so large that it stands for Q
  packed GF(2)         p = 2 and dtype uint32: 32 columns a word, elimination by XOR; masks are words too
  p = 0                float64 reals (need jax_enable_x64); below `TOLERANCE` of its row a number is zero, see `gap`

  reduced = fields.eliminate(m, p)                      # the reduced row echelon form, unique for a space
  reduced = fields.eliminate(m, p, mask)                # pivots in these columns alone
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxlab.core.checks import require

TOLERANCE = 1e-9
LARGE = 2147483647
_SMALL = 32749


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
    InputError: p is neither 0 nor a supported prime, entries are NaN, infinite or (finite field) not integers, or the
      rows are not a matrix.
  """
  check_field(p)
  rows = np.atleast_2d(np.asarray(rows))
  require(rows.ndim == 2, f"rows have shape {rows.shape}; a space is given by a matrix")
  require(bool(np.isfinite(rows).all()), "rows hold NaN or infinite entries; a space needs finite numbers")
  if p == 0:
    return jnp.asarray(rows, jnp.asarray(0.0).dtype)
  require(bool((rows == np.round(rows)).all()), f"rows hold fractions; a space over GF({p}) needs integers")
  values = np.mod(rows.astype(np.int64), p)
  if pack:
    require(p == 2, f"only GF(2) spaces pack into words, not GF({p})")
    return pack_bits(values)
  return jnp.asarray(values, dtype_of(p))


def check_field(p: int) -> None:
  """Raises InputError unless p is 0 (the reals) or a prime this arithmetic is exact for."""
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
  bits = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 32)]).reshape(*bits.shape[:-1], -1, 32)
  return jnp.asarray((bits.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32))


def unpack_bits(words, columns: int | None = None) -> np.ndarray:
  """The inverse of `pack_bits`; `columns` cuts the padding off."""
  words = np.asarray(words)
  bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
  return bits.reshape(*words.shape[:-1], -1)[..., :columns].astype(np.int32)


@functools.partial(jax.jit, static_argnames="p")  # traced once a shape, however often it is called
def eliminate(m: Shaped[Array, "m n"], p: int, mask: Shaped[Array, "n"] | None = None, *, after=0) -> Reduced:
  """Gauss-Jordan elimination that takes pivots in the columns of `mask` (None: all), left to right.

  Args:
    after: rows above this index already carry pivots of an earlier call; they are reduced along, not chosen.

  Returns:
    The reduced rows, this call's pivot columns, and the rank including the earlier one.

  Raises:
    InputError: floats where p is a prime or integers where it is 0, floats of 32 bits, or packed words for p other
      than 2.
  """
  _check_dtype(m, p)
  if m.dtype == jnp.uint32:
    return _eliminate_words(m, mask, after)
  rows, columns = m.shape
  if columns == 0:
    return Reduced(m, jnp.zeros(0, bool), jnp.asarray(after, jnp.int32))
  mask = jnp.ones(columns, bool) if mask is None else mask
  inverse = _inverse(p)
  index, place = jnp.arange(rows), jnp.arange(columns)

  def step(j, carry):
    a, pivots, rank = carry
    column = jax.lax.dynamic_index_in_dim(a, j, 1, keepdims=False)
    open_rows = (index >= rank) & mask[j]
    if p == 0:
      size = jnp.where(open_rows, jnp.abs(column), -1.0)
      chosen = jnp.argmax(size)
      found = size[chosen] > TOLERANCE
    else:
      open_rows = open_rows & (column != 0)
      chosen, found = jnp.argmax(open_rows), open_rows.any()
    at = jnp.minimum(rank, rows - 1)
    row = a[chosen]
    pivot_row = _mod(row * inverse(row[j]), p)
    a = jnp.where((index == chosen)[:, None], a[at], a)  # the swap: the pivot row itself goes to `at`
    factor = jnp.where(index == at, 0, jax.lax.dynamic_index_in_dim(a, j, 1, keepdims=False))
    # One remainder, of a nonnegative number: a + (p - f) r stays below 2^31 (2^63) for the fields allowed.
    new = a + (p - factor)[:, None] * pivot_row
    if p:
      new = jax.lax.rem(new, jnp.asarray(p, m.dtype))
    else:
      # Rounding must leave no dust where the exact answer is zero: neither in this column nor in a vanished row.
      new = jnp.where((jnp.abs(new) > TOLERANCE) & (place != j), new, 0)
      pivot_row = jnp.where(place == j, 1, pivot_row)
    new = jnp.where((index == at)[:, None], pivot_row, new)
    a = jnp.where(found, new, carry[0])
    return a, pivots | (place == j) & found, rank + found

  start = (m, jnp.zeros(columns, bool), jnp.asarray(after, jnp.int32))
  return Reduced(*jax.lax.fori_loop(0, columns, step, start))


def _eliminate_words(m, mask, after):
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

  start = (m, jnp.zeros(words, jnp.uint32), jnp.asarray(after, jnp.int32))
  return Reduced(*jax.lax.fori_loop(0, 32 * words, step, start))


def normalised(m: Shaped[Array, "m n"], p: int) -> Shaped[Array, "m n"]:
  """Real rows scaled to length 1, so that one tolerance serves all; exact fields are left alone."""
  if p:
    return m
  length = jnp.linalg.norm(m, axis=1, keepdims=True)
  return jnp.where(length > TOLERANCE, m / jnp.where(length > TOLERANCE, length, 1), 0)


def keep(m: Shaped[Array, "m n"], mask: Shaped[Array, "n"]) -> Shaped[Array, "m n"]:
  """The columns of the mask; the others become 0."""
  return m & mask if m.dtype == jnp.uint32 else jnp.where(mask, m, jnp.zeros_like(m))


def count(mask: Shaped[Array, "n"]) -> Int[Array, ""]:
  """Columns in a mask, packed or not."""
  return jnp.sum(jax.lax.population_count(mask) if mask.dtype == jnp.uint32 else mask, dtype=jnp.int32)


def negate(m: Shaped[Array, "m n"], p: int) -> Shaped[Array, "m n"]:
  """-m in the field."""
  return m if m.dtype == jnp.uint32 else _mod(-m, p)


def projector(m: Float[Array, "m n"]) -> Float[Array, "n n"]:
  """The orthogonal projector on a real row space: unique, and better conditioned than the echelon form."""
  _, s, vt = jnp.linalg.svd(normalised(m, 0), full_matrices=False)
  rows = jnp.where((s > TOLERANCE)[:, None], vt, 0)
  return rows.T @ rows


def gap(m: Float[Array, "m n"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """(smallest singular value taken as nonzero, largest taken as zero) of the normalised rows: how safe a rank is."""
  s = jnp.linalg.svd(normalised(m, 0), compute_uv=False)
  return jnp.min(jnp.where(s > TOLERANCE, s, jnp.inf)), jnp.max(jnp.where(s > TOLERANCE, 0, s), initial=0.0)


def _check_dtype(m, p):
  packed, real = m.dtype == jnp.uint32, jnp.issubdtype(m.dtype, jnp.floating)
  require(
    p == 2 if packed else m.dtype == jnp.float64 if p == 0 else not real,
    f"a space of {m.dtype} does not go with p={p}; packed words take p=2, float64 takes p=0, integers a prime",
  )


def _mod(x, p):
  return x % p if p else x


@functools.cache
def _table(p: int) -> np.ndarray:
  return np.array([pow(i, p - 2, p) if i else 0 for i in range(p)], np.int32)


def _inverse(p: int):
  """a -> a^-1 (0 -> anything): a table for small p, Fermat's power for large."""
  if p == 0:
    return lambda a: 1 / jnp.where(a == 0, 1, a)
  if p <= _SMALL:
    return lambda a: jnp.asarray(_table(p))[a]

  bits = np.array([c == "1" for c in bin(p - 2)[2:]])

  def power(a):
    square = lambda i, r: jnp.where(jnp.asarray(bits)[i], r * r % p * a % p, r * r % p)
    return jax.lax.fori_loop(0, len(bits), square, jnp.ones_like(a))

  return power
