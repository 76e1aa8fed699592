"""What linking is measured against: host loops that drop columns as they go, and star-mesh reduction of a network.

small_a, small_b, kept = numpy_minimise(a, b, nS, nP, nQ, p)
small_a, small_b, kept = bitset_minimise(*map(to_bitset, (a, b)), nS, nP, nQ)      # GF(2), a row is one integer
voltages, ports = solve_by_star_mesh(edges, vertices, part, conductance, source)
"""

import numpy as np
from jaxtyping import Float, Int

from jaxlab.core.checks import require
from jaxlab.tensors import linkage_graphs


def numpy_eliminate(m: Int[np.ndarray, "m n"], p: int, order) -> tuple[Int[np.ndarray, "m n"], list[int]]:
  """Gauss-Jordan over GF(p), pivots in the columns of `order`: (rows, those with pivots first; pivot columns)."""
  m, pivots = m.copy(), []
  for j in order:
    rows = np.flatnonzero(m[len(pivots) :, j])
    if not len(rows):
      continue
    at, chosen = len(pivots), rows[0] + len(pivots)
    m[[at, chosen]] = m[[chosen, at]]
    m[at] = m[at] * pow(int(m[at, j]), -1, p) % p
    factor = m[:, j].copy()
    factor[at] = 0
    m = (m - factor[:, None] * m[at]) % p
    pivots.append(j)
    if at + 1 == len(m):
      break
  return m, pivots


def numpy_minimise(a, b, nS: int, nP: int, nQ: int, p: int):
  """The four steps of `linkage.minimise_overlap`, one instance at a time, zero rows and columns P - P' dropped.

  Args:
    a, b: int64 rows over S then P, and P then Q.

  Returns:
    (rows over S then P', rows over P' then Q, P' ascending).
  """

  def vanish(m, columns):
    rows, pivots = numpy_eliminate(m, p, columns)
    rows = rows[len(pivots) :]
    return rows[rows.any(1)]

  on = lambda lo, n: range(lo, lo + n)
  c_a, c_b = vanish(a, on(0, nS))[:, nS:], vanish(b, on(nP, nQ))[:, :nP]
  v1 = np.concatenate([a, np.pad(c_b, ((0, 0), (nS, 0)))])
  v2 = np.concatenate([b, np.pad(c_a, ((0, 0), (0, nQ)))])
  first, second = v1[:, nS:], v2[:, :nP]
  both = vanish(np.block([[first, first], [second, np.zeros_like(second)]]), on(0, nP))[:, nP:]

  def into(v, part):
    return vanish(np.block([[part, v], [both, np.zeros((len(both), v.shape[1]), v.dtype)]]), on(0, nP))[:, nP:]

  v1, v2 = into(v1, first), into(v2, second)
  t_c = numpy_eliminate(np.concatenate([c_a, c_b]), p, range(nP))[1]
  kept = numpy_eliminate(both, p, [*t_c, *(j for j in range(nP) if j not in t_c)])[1][len(t_c) :]
  small_a, small_b = vanish(v1, [nS + j for j in t_c]), vanish(v2, t_c)
  return small_a[:, [*range(nS), *(nS + j for j in kept)]], small_b[:, [*kept, *range(nP, nP + nQ)]], kept


def to_bitset(rows) -> list[int]:
  """0/1 rows as integers, column j in bit j."""
  packed = np.packbits(np.asarray(rows, bool), axis=1, bitorder="little")
  return [int.from_bytes(row.tobytes(), "little") for row in packed]


def bitset_eliminate(rows: list[int], order) -> tuple[list[int], list[int], list[int]]:
  """Gauss-Jordan over GF(2) by XOR of whole rows: (rows with pivots, the nonzero rest, pivot columns)."""
  rows, done, pivots = [r for r in rows if r], [], []
  for j in order:
    bit = 1 << j
    row = next((r for r in rows if r & bit), None)
    if row is None:
      continue
    rows = [new for r in rows if (new := r ^ row if r & bit else r)]  # the pivot row itself becomes 0
    done = [r ^ row if r & bit else r for r in done]
    done.append(row)
    pivots.append(j)
    if not rows:
      break
  return done, rows, pivots


def bitset_minimise(a: list[int], b: list[int], nS: int, nP: int, nQ: int):
  """`numpy_minimise` over GF(2) on rows of `to_bitset`: the columns P - P' are zeroed, not dropped."""
  on_p, bits = (1 << nP) - 1, range(nP)
  c_a = [r >> nS for r in bitset_eliminate(a, range(nS))[1]]
  c_b = bitset_eliminate(b, range(nP, nP + nQ))[1]
  v1, v2 = a + [c << nS for c in c_b], b + c_a
  first, second = [r >> nS for r in v1], [r & on_p for r in v2]
  vanish = lambda rows: [r >> nP for r in bitset_eliminate(rows, bits)[1]]
  both = vanish([r | r << nP for r in first] + second)
  v1 = vanish([part | r << nP for part, r in zip(first, v1, strict=True)] + both)
  v2 = vanish([part | r << nP for part, r in zip(second, v2, strict=True)] + both)
  t_c = bitset_eliminate(c_a + c_b, bits)[2]
  kept = bitset_eliminate(both, [*t_c, *(j for j in bits if j not in t_c)])[2][len(t_c) :]
  mask = sum(1 << j for j in kept)
  small_a = [r & (mask << nS | ((1 << nS) - 1)) for r in bitset_eliminate(v1, [nS + j for j in t_c])[1]]
  small_b = [r & (mask | ~on_p) for r in bitset_eliminate(v2, t_c)[1]]
  return small_a, small_b, kept


def galois_minimise(a, b, nS: int, nP: int, nQ: int, field):
  """`numpy_minimise` by the null spaces of the galois package; `field` is galois.GF(p).

  Rows that vanish on some columns are those of its left null space on these columns.
  """
  a, b = field(a), field(b)
  vanish = lambda m, columns: m[:, columns].left_null_space() @ m
  stack = lambda *rows: np.vstack(rows).view(field)
  on = lambda lo, n: np.arange(lo, lo + n)

  def pivots(m, order):
    reduced = m[:, order].row_reduce()
    return [order[int(np.flatnonzero(row)[0])] for row in reduced if row.any()]

  c_a, c_b = vanish(a, on(0, nS))[:, nS:], vanish(b, on(nP, nQ))[:, :nP]
  v1 = stack(a, np.pad(c_b, ((0, 0), (nS, 0))))
  v2 = stack(b, np.pad(c_a, ((0, 0), (0, nQ))))
  first, second = v1[:, nS:], v2[:, :nP]
  both = stack(first, second).left_null_space()[:, : len(first)] @ first
  into = lambda v, part: stack(part, both).left_null_space()[:, : len(v)] @ v
  v1, v2 = into(v1, first), into(v2, second)
  t_c = pivots(stack(c_a, c_b), list(range(nP)))
  kept = pivots(both, [*t_c, *(j for j in range(nP) if j not in t_c)])[len(t_c) :]
  small_a, small_b = vanish(v1, [nS + j for j in t_c]), vanish(v2, t_c)
  return small_a[:, [*range(nS), *(nS + j for j in kept)]], small_b[:, [*kept, *range(nP, nP + nQ)]], kept


def solve_by_star_mesh(
  edges, vertices: int, part, conductance: Float[np.ndarray, "E"], source: Float[np.ndarray, "E"]
) -> tuple[Float[np.ndarray, "E"], int]:
  """Voltages of a resistive network, each half reduced to its boundary by a Schur complement of its Laplacian.

  With incidence N, currents i = G v + j and v = N' u: N G N' u = -N j. Eliminating the inner vertices of a half
  (star-mesh) is exact and leaves the |W| - 1 grounded boundary vertices, be the least interface smaller or not.

  Args:
    conductance, source: G and j in the order of V_SQ: edges of the first half, then of the second.

  Returns:
    (v in that order, |W| - 1).

  Raises:
    InputError: the network is in several pieces, or all in one half.
  """
  part = np.asarray(part, bool)
  ordered = np.concatenate([np.asarray(edges)[part], np.asarray(edges)[~part]])
  n = linkage_graphs.incidence(ordered, vertices).astype(float)
  w = linkage_graphs.boundary(edges, part)
  pieces = len(np.unique(linkage_graphs.components(ordered, vertices)[np.unique(ordered)]))
  require(
    pieces == 1 and len(w) > 0,
    f"the network is in {pieces} pieces and its halves share {len(w)} vertices; give two halves of a connected one",
  )
  potential = np.zeros(vertices)
  system, right, inner = np.zeros((len(w), len(w))), np.zeros(len(w)), []
  for half in (slice(None, int(part.sum())), slice(int(part.sum()), None)):
    cut, g, j = n[:, half], conductance[half], source[half]
    i = np.setdiff1d(np.unique(ordered[half]), w)
    laplacian, load = cut * g @ cut.T, -cut @ j
    to_w = np.linalg.solve(laplacian[np.ix_(i, i)], np.column_stack([laplacian[np.ix_(i, w)], load[i]]))
    system += laplacian[np.ix_(w, w)] - laplacian[np.ix_(w, i)] @ to_w[:, :-1]
    right += load[w] - laplacian[np.ix_(w, i)] @ to_w[:, -1]
    inner.append((i, to_w))
  potential[w[1:]] = np.linalg.solve(system[1:, 1:], right[1:])
  for i, to_w in inner:
    potential[i] = to_w[:, -1] - to_w[:, :-1] @ potential[w]
  return n.T @ potential, len(w) - 1
