"""Linking vector spaces over shared coordinates, with the smallest overlap (Narayanan 2024; arXiv 1609.07991).

V_SP is a subspace of F^{S+P}, given by rows over the columns S then P; V_PQ by rows over P then Q. Their link

  V_SP <-> V_PQ = { (f_S, f_Q) : some f_P has (f_S, f_P) in V_SP and (f_P, f_Q) in V_PQ }

is what the outside sees of two parts that share P. V o S restricts to S; V x S keeps the vectors that are 0 outside S.
No description of V_SQ = V_SP <-> V_PQ shares fewer coordinates than the connectivity r(V_SQ o S) - r(V_SQ x S);
`minimise_overlap` reaches it with a subset of the given P, `decompose` from V_SQ alone. Both are polynomial.

  a, b = fields.space(rows_a, 2), fields.space(rows_b, 2)          # p = 0 reals, a prime p, or packed words over GF(2)
  small_a, small_b, kept, size = linkage.minimise_overlap(a, b, nS, nP, nQ, p)
  same = linkage.link(small_a, small_b, nS, nP, nQ, p)             # equals linkage.link(a, b, ...)

Everything is jittable and maps over batches: columns are zeroed, not dropped, and masks say which are meant. Columns
are counted in units of the array: of words where the space is packed (each block then fills whole words).
"""

import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from jaxlab.core.checks import require
from jaxlab.tensors import fields
from jaxlab.tensors.fields import eliminate

Space = Shaped[Array, "m n"]
Mask = Shaped[Array, "n"]


def canonical(m: Space, p: int) -> Space:
  """The reduced row echelon form, on as many rows as columns: equal spaces are equal arrays.

  Over the reals a well conditioned basis; there `fields.projector` is what equal spaces share.
  """
  fields.check_space(m, p)
  if p or not m.size:
    return _square(_reduced(m, p).rows)
  return _square(fields.row_basis(m))


def rank(m: Space, p: int) -> Int[Array, ""]:
  """r(V)."""
  return _reduced(m, p).rank


def restrict(m: Space, mask: Mask, p: int) -> Space:
  """V o mask, with zeros in the other columns."""
  fields.check_space(m, p)
  fields.check_mask(m, mask)
  return canonical(fields.keep(m, mask), p) if p or not m.size else _square(fields.row_basis(m, mask))


def contract(m: Space, mask: Mask, p: int) -> Space:
  """V x mask: the vectors of V that are zero outside the mask."""
  fields.check_space(m, p)
  fields.check_mask(m, mask)
  return canonical(_reduced(m, p, ~mask).rest(), p)


def vsum(a: Space, b: Space, p: int) -> Space:
  """V + W."""
  return canonical(jnp.concatenate([a, b]), p)


def intersect(a: Space, b: Space, p: int) -> Space:
  """V n W, by Zassenhaus: rows (a, a) and (b, 0), the first half eliminated."""
  a, b = canonical(a, p), canonical(b, p)
  stacked = jnp.concatenate([jnp.concatenate([a, a], 1), jnp.concatenate([b, jnp.zeros_like(b)], 1)])
  n = a.shape[1]
  return canonical(eliminate(stacked, p, _blocks(a, (n, True), (n, False))).rest()[:, n:], p)


def perp(m: Space, p: int) -> Space:
  """The orthogonal complement: a free column j of the reduced form gives e_j - sum of R[i, j] e_{pivot of row i}.

  Not for packed spaces.
  """
  require(m.dtype != jnp.uint32, "the complement is not defined on packed words (their padding is part of it); unpack")
  n = m.shape[1]
  fields.check_space(m, p)
  if p == 0:
    return fields.complement(m) if n else jnp.zeros((0, 0), m.dtype)
  reduced = _reduced(m, p)
  rows = jnp.concatenate([reduced.rows, jnp.zeros((n, n), m.dtype)])[:n]
  # Row i of the reduced form moves to its pivot column: a square matrix R with identity at the pivots.
  place = jnp.clip(jnp.cumsum(reduced.pivots) - 1, 0)
  square = jnp.where(reduced.pivots[:, None], rows[place], 0)
  free = jnp.diag(jnp.where(reduced.pivots, 0, 1)).astype(m.dtype)
  return canonical(free + fields.negate(jnp.where(reduced.pivots, 0, square), p).T, p)


def connectivity(m: Space, mask: Mask, p: int) -> Int[Array, ""]:
  """lambda = r(V o S) + r(V o Q) - r(V), S the mask and Q the rest: the least |P| of any decomposition."""
  fields.check_space(m, p)
  fields.check_mask(m, mask)
  part = lambda mask: _reduced(m, p, mask).rank
  return part(mask) + part(~mask) - rank(m, p)


def link(a: Space, b: Space, nS: int, nP: int, nQ: int, p: int, *, skewed: bool = False) -> Space:
  """V_SP <-> V_PQ over the columns S then Q: stack [A_P A_S 0; -B_P 0 B_Q] and eliminate P.

  `skewed` matches (f_S, f_P) with (-f_P, f_Q). Packed spaces count nS, nP, nQ in words.

  Raises:
    InputError: the spaces do not have nS + nP and nP + nQ columns.
  """
  _check_columns(a, b, nS, nP, nQ)
  a, b = fields.reduced(a, p), fields.reduced(b, p)
  zeros = lambda x, n: jnp.zeros((x.shape[0], n), x.dtype)
  shared = b[:, :nP] if skewed else fields.negate(b[:, :nP], p)
  stacked = jnp.concatenate(
    [
      jnp.concatenate([a[:, nS:], a[:, :nS], zeros(a, nQ)], 1),
      jnp.concatenate([shared, zeros(b, nS), b[:, nP:]], 1),
    ]
  )
  return canonical(eliminate(stacked, p, _blocks(a, (nP, True), (nS + nQ, False))).rest()[:, nP:], p)


def minimise_overlap(
  a: Space, b: Space, nS: int, nP: int, nQ: int, p: int
) -> tuple[Space, Space, Shaped[Array, "nP"], Int[Array, ""]]:
  """Spaces with the same link that share as few coordinates as any can, a subset P' of the given P.

  1. V1 = V_SP + (0 + C_B), V2 = V_PQ + (C_A + 0), with C the contractions to P: the link stays, both contract to C.
  2. I = V1 o P n V2 o P; V1 and V2 keep the vectors that are in I on P: both now restrict to I.
  3. T_C = pivots of C, extended to pivots T_I of I; P' = T_I - T_C, |P'| = r(I) - r(C) = lambda.
  4. On I the coordinates T_I say all; of a matched pair one can be shifted by C to vanish on T_C. So drop P - T_I and
     contract T_C.

  Returns:
    (V_SP', V_P'Q, mask of P' in P, |P'|), the spaces with zeros in the columns P - P'.
  """
  _check_columns(a, b, nS, nP, nQ)
  on_p = lambda m, first: m[:, nS:] if first else m[:, :nP]
  pad_a = lambda m: jnp.concatenate([jnp.zeros((m.shape[0], nS), m.dtype), m], 1)
  pad_b = lambda m: jnp.concatenate([m, jnp.zeros((m.shape[0], nQ), m.dtype)], 1)
  mask_a = lambda s, mask: jnp.concatenate([_blocks(a, (nS, s)), mask])
  mask_b = lambda q, mask: jnp.concatenate([mask, _blocks(b, (nQ, q))])
  everything = _blocks(a, (nP, True))

  a, b = fields.reduced(a, p), fields.reduced(b, p)
  # Rows that span are enough between the steps: only what is stacked again is brought to few rows by `canonical`.
  contracted_a = on_p(eliminate(a, p, mask_a(True, ~everything)).rest(), True)
  contracted_b = on_p(eliminate(b, p, mask_b(True, ~everything)).rest(), False)
  v1, v2 = vsum(a, pad_a(contracted_b), p), vsum(b, pad_b(contracted_a), p)

  both = intersect(on_p(v1, True), on_p(v2, False), p)
  # The rows of V1 that are in I on P: eliminate P from [V1_P V1_P V1_S; I 0 0], as in `intersect`.
  v1, v2 = _into(v1, both, nS, p, first=True), _into(v2, both, nP, p, first=False)

  pivots_c = eliminate(jnp.concatenate([contracted_a, contracted_b]), p).pivots
  pivots_i = pivots_c | eliminate(eliminate(both, p, pivots_c).rest(), p, ~pivots_c).pivots
  kept = pivots_i & ~pivots_c
  small_a = contract(fields.keep(v1, mask_a(True, pivots_i)), mask_a(True, kept), p)
  small_b = contract(fields.keep(v2, mask_b(True, pivots_i)), mask_b(True, kept), p)
  return small_a, small_b, kept, fields.count(kept)


def decompose(m: Space, nS: int, p: int) -> tuple[Space, Space, Int[Array, ""]]:
  """V_SQ = V_SP <-> V_PQ with |P| = lambda, the least possible; P are new coordinates.

  With B_S, B_Q bases of V x S and V x Q, completed by rows (s_i | q_i) to one of V:
  V_SP = rows [B_S | 0], [s_i | e_i]; V_PQ = rows [0 | B_Q], [e_i | q_i].

  Returns:
    (V_SP over S then P, V_PQ over P then Q, lambda); P has min(|S|, |Q|) columns, of which the first lambda are used.
  """
  _check_split(m, nS)
  nQ = m.shape[1] - nS
  s = _blocks(m, (nS, True), (nQ, False))
  b_s, b_q = contract(m, s, p), contract(m, ~s, p)
  extra, names, size = _complete(jnp.concatenate([b_s, b_q]), canonical(m, p), min(nS, nQ), p)
  zero = jnp.zeros((len(b_s), min(nS, nQ)), m.dtype)
  v_sp = jnp.block([[b_s[:, :nS], zero], [extra[:, :nS], names]])
  v_pq = jnp.block([[zero, b_q[:, nS:]], [names, extra[:, nS:]]])
  return v_sp, v_pq, size


def decompose_minor(m: Space, nS: int, p: int) -> tuple[Space, Space, Mask]:
  """As `decompose`, with P a copy of a set T of columns of Q and V_SP a minor of V_SQ: no new coordinates.

  T_B = pivots of V x Q, T_B + T = pivots of V o Q with T_B first; V_SP = (V o (S + T_B + T)) x (S + T), T read as P;
  V_PQ = V_SP <-> V_SQ over S, which implicit inversion makes a solution.

  Returns:
    (V_SP over S then a copy of Q that is 0 outside T, V_PQ over that copy then Q, mask of T in Q).
  """
  _check_split(m, nS)
  nQ = m.shape[1] - nS
  s, q = _blocks(m, (nS, True), (nQ, False)), _blocks(m, (nS, False), (nQ, True))
  pivots_b = eliminate(contract(m, q, p), p).pivots
  t = eliminate(eliminate(restrict(m, q, p), p, pivots_b).rest(), p, q & ~pivots_b).pivots
  v_sp = contract(restrict(m, s | pivots_b | t, p), s | t, p)
  swapped = jnp.concatenate([v_sp[:, nS:], v_sp[:, :nS]], 1)
  return v_sp, link(swapped, m, nQ, nS, nQ, p), t[nS:]


def decompose_parts(m: Space, sizes: tuple[int, ...], p: int) -> tuple[list[Space], Space, list[Int[Array, ""]]]:
  """Multiport decomposition: V = (V_{S1,P1} + ... + V_{Sk,Pk}) <-> V_P with every |P_i| = lambda_i least.

  B_i = basis of V x S_i, sigma_i its completion to V o S_i; V_{Si,Pi} = rows [B_i | 0], [sigma_i | I];
  V_P = { (a_1..a_k) : sum of a_ij sigma_ij in V }, the link of { (a, sum a_ij sigma_ij) } with V over all S_i.

  Returns:
    (V_{Si,Pi} over S_i then P_i, V_P over P_1 .. P_k, the lambda_i); P_i has |S_i| columns, the first lambda_i used.
  """
  require(sum(sizes) == m.shape[1] and m.dtype != jnp.uint32, f"parts {sizes} must add up to {m.shape[1]} columns")
  n, start, parts, graph, lambdas = m.shape[1], 0, [], [], []
  for size in sizes:
    mask = _blocks(m, (start, False), (size, True), (n - start - size, False))
    b = contract(m, mask, p)
    sigma, names, count = _complete(b, restrict(m, mask, p), size, p)
    cut = slice(start, start + size)
    parts.append(jnp.block([[b[:, cut], jnp.zeros((n, size), m.dtype)], [sigma[:, cut], names]]))
    graph.append(jnp.concatenate([jnp.pad(names, ((0, 0), (start, n - start - size))), sigma], 1))
    lambdas.append(count)
    start += size
  return parts, link(jnp.concatenate(graph), m, n, n, 0, p), lambdas


def direct_sum(spaces: list[Space], sizes: tuple[int, ...]) -> Space:
  """V_{S1,P1} + ... + V_{Sk,Pk} over S_1 .. S_k, then P_1 .. P_k, with |P_i| = |S_i| = sizes[i]."""
  n, at, rows = sum(sizes), 0, []
  for m, size in zip(spaces, sizes, strict=True):
    place = ((0, 0), (at, n - at - size))
    rows.append(jnp.concatenate([jnp.pad(m[:, :size], place), jnp.pad(m[:, size:], place)], 1))
    at += size
  return jnp.concatenate(rows)


def compact(m: Space, mask: Mask) -> np.ndarray:
  """The columns of a mask and the nonzero rows, on the host."""
  return _rows(np.asarray(m)[:, np.asarray(mask)])


def enumerate_link(a, b, nS: int, nP: int, nQ: int, p: int) -> set[tuple[int, ...]]:
  """All vectors of the link by trying every pair of vectors of the two spaces: the oracle for small cases."""
  vectors = lambda m: {
    tuple(np.asarray(c) @ np.asarray(m) % p) for c in itertools.product(range(p), repeat=np.asarray(m).shape[0])
  }
  by_p = {}
  for v in vectors(b):
    by_p.setdefault(v[:nP], []).append(v[nP:])
  return {tuple(map(int, u[:nS] + w)) for u in vectors(a) for w in by_p.get(u[nS:], [])}


def _reduced(m, p, mask=None):
  """`eliminate` of a space as a caller gives it."""
  fields.check_space(m, p)
  return eliminate(fields.reduced(m, p), p, mask)


def _into(v, space, cut, p, *, first):
  """The vectors of V whose part on P (columns from `cut` on, or up to it) lies in `space`."""
  part = v[:, cut:] if first else v[:, :cut]
  zeros = jnp.zeros((space.shape[0], v.shape[1]), v.dtype)
  stacked = jnp.concatenate([jnp.concatenate([part, v], 1), jnp.concatenate([space, zeros], 1)])
  width = part.shape[1]
  return canonical(eliminate(stacked, p, _blocks(v, (width, True), (v.shape[1], False))).rest()[:, width:], p)


def _complete(some, spanning, width, p):
  """Rows of the basis `spanning` that complete `some` to its row space, a unit vector (of `width`) each, their number.

  Rows that are independent of those before them are the pivot columns of the transpose, once `some` is eliminated.
  """
  stacked = jnp.concatenate([some, spanning]).T
  first = jnp.arange(stacked.shape[1]) < len(some)
  chosen = eliminate(eliminate(stacked, p, first).rest(), p, ~first).pivots[len(some) :]
  names = (jnp.cumsum(chosen)[:, None] - 1 == jnp.arange(width)) & chosen[:, None]
  return jnp.where(chosen[:, None], spanning, 0), names.astype(spanning.dtype), jnp.sum(chosen)


def _blocks(like, *blocks):
  """A mask made of (length, value) blocks in the representation of `like`: bools, or words."""
  packed = like.dtype == jnp.uint32
  fill = lambda n, value: jnp.full(n, 0xFFFFFFFF * value, jnp.uint32) if packed else jnp.full(n, value, bool)
  return jnp.concatenate([fill(n, value) for n, value in blocks])


def _square(rows):
  """As many rows as columns: enough for a reduced matrix, and one shape for all spaces over the same columns."""
  columns = rows.shape[1] * (32 if rows.dtype == jnp.uint32 else 1)
  return jnp.pad(rows, ((0, max(columns - rows.shape[0], 0)), (0, 0)))[:columns]


def _rows(m):
  m = np.asarray(m)
  return m[np.any(m != 0, axis=1)]


def _check_columns(a, b, nS, nP, nQ):
  require(
    min(nS, nP, nQ) >= 0 and a.shape[-1] == nS + nP and b.shape[-1] == nP + nQ and a.dtype == b.dtype,
    f"spaces have {a.shape[-1]} and {b.shape[-1]} columns ({a.dtype}, {b.dtype}); expected |S|+|P|={nS + nP} and "
    f"|P|+|Q|={nP + nQ} of one dtype",
  )


def _check_split(m, nS):
  require(0 <= nS <= m.shape[1], f"nS is {nS}; the space has {m.shape[1]} columns")
  require(m.dtype != jnp.uint32, "a decomposition needs an unpacked space; unpack first")
