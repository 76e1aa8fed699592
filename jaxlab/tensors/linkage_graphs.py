"""Linking graphs and matroids: what `linkage` does to vector spaces, for cut spaces and for rank functions.

The cut space of a graph is the row space of its incidence matrix. Two graphs that share a subgraph G_P on vertices W
compose to G_SQ: identify along G_P, delete P. If G_P is connected and spans W, V(G_SP) <-> V(G_PQ) = V(G_SQ), so any
spanning tree of G_P will do as P. For parts S, Q of a graph with boundary vertices W

  lambda = |W| + c - c_S - c_Q      (c: components of the edge sets; for a connected graph c = 1),

so that a tree on W (|W| - 1 edges) is the least P exactly when G[S] and G[Q] are connected.
Matroids: M_SP <-> M_PQ = (M_SP v M_PQ) x (S u Q), v the union, with rank r(X) = r_v(X u P) - r_v(P).

  with_s, with_q, excess = split_graph(edges, vertices, part)
  table = link_rank_table(a, b, nS, nP, nQ, p)
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from jaxlab.core.checks import require, require_choice
from jaxlab.tensors import fields, linkage

KINDS = ("cut", "cycle")


def incidence(edges: Int[np.ndarray, "E 2"], vertices: int) -> Int[np.ndarray, "V E"]:
  """+1 at the tail, -1 at the head; a self-loop is a zero column."""
  edges = check_edges(edges, vertices)
  matrix = np.zeros((vertices, len(edges)), np.int32)
  np.add.at(matrix, (edges[:, 0], np.arange(len(edges))), 1)
  np.add.at(matrix, (edges[:, 1], np.arange(len(edges))), -1)
  return matrix


def check_edges(edges, vertices: int) -> Int[np.ndarray, "E 2"]:
  """Edges as an array; raises InputError unless they are pairs of vertices 0..vertices-1."""
  edges = np.asarray(edges)
  require(edges.size == 0 or (edges.ndim == 2 and edges.shape[1] == 2), f"edges {edges.shape} must be pairs (E, 2)")
  edges = edges.reshape(-1, 2)
  require(bool(np.isfinite(edges).all() and (edges == np.round(edges)).all()), "edges hold NaN or fractional vertices")
  edges = edges.astype(int)
  require(
    edges.size == 0 or (edges.min() >= 0 and edges.max() < vertices),
    f"edges name vertices {edges.min(initial=0)}..{edges.max(initial=0)}; the graph has 0..{vertices - 1}",
  )
  return edges


def graph_space(edges: Int[np.ndarray, "E 2"], vertices: int, p: int, *, kind: str = "cut") -> Shaped[Array, "m E"]:
  """The cut space (potential differences) or the cycle space (its complement) over the field."""
  require_choice("kind", kind, KINDS)
  space = linkage.canonical(fields.space(incidence(edges, vertices), p), p)
  return space if kind == "cut" else linkage.perp(space, p)


def components(edges, vertices: int) -> Int[np.ndarray, "V"]:
  """A label per vertex, the least vertex of its component."""
  label = np.arange(vertices)

  def root(v):
    while label[v] != v:
      label[v] = label[label[v]]
      v = label[v]
    return v

  for a, b in np.asarray(edges).reshape(-1, 2):
    a, b = root(a), root(b)
    label[max(a, b)] = min(a, b)
  return np.array([root(v) for v in range(vertices)], int)


def boundary(edges, part: Shaped[np.ndarray, "E"]) -> np.ndarray:
  """W: the vertices that meet edges of S (part true) and of Q."""
  edges, part = np.asarray(edges).reshape(-1, 2), np.asarray(part, bool)
  return np.intersect1d(edges[part], edges[~part])


def graph_connectivity(edges, vertices: int, part: Shaped[np.ndarray, "E"]) -> int:
  """lambda = |W| + c - c_S - c_Q of the cut space, by counting components of edge sets (lone vertices ignored)."""
  edges, part = check_edges(edges, vertices), np.asarray(part, bool)
  pieces = lambda chosen: len(np.unique(components(chosen, vertices)[np.unique(chosen)]))
  return len(boundary(edges, part)) + pieces(edges) - pieces(edges[part]) - pieces(edges[~part])


def split_graph(edges, vertices: int, part: Shaped[np.ndarray, "E"]):
  """Two graphs on the same vertices with the path over W as shared edges, and how many of them are in excess of lambda.

  Returns:
    (edges of S then P, edges of P then Q, the excess |P| - lambda = c_S + c_Q - 1 - c). |P| = |W| - 1 unless W is
    empty; the excess is 0 for a connected graph iff both sides are connected.
  """
  edges, part = check_edges(edges, vertices), np.asarray(part, bool)
  require(len(part) == len(edges), f"part has {len(part)} entries for {len(edges)} edges")
  w = boundary(edges, part)
  path = np.stack([w[:-1], w[1:]], 1).reshape(-1, 2)
  excess = len(path) - graph_connectivity(edges, vertices, part)
  return np.concatenate([edges[part], path]), np.concatenate([path, edges[~part]]), excess


def compose_graphs(with_s, with_q, shared: int, vertices: int):
  """G_SQ: the union along the shared edges (last of the first graph, first of the second), these deleted.

  Raises:
    InputError: the shared edges differ, or do not connect the vertices both graphs use: the link of the cut spaces
      would be larger than the cut space of the composition.
  """
  with_s, with_q = check_edges(with_s, vertices), check_edges(with_q, vertices)
  fewest = min(len(with_s), len(with_q))
  require(0 <= shared <= fewest, f"{shared} shared edges; the smaller graph has {fewest} edges")
  s, p, q = with_s[: len(with_s) - shared], with_q[:shared], with_q[shared:]
  require(np.array_equal(with_s[len(s) :], p), "the two graphs do not share the same edges P, in the same order")
  w = np.union1d(np.intersect1d(with_s, with_q), p)
  pieces = len(np.unique(components(p, vertices)[w.astype(int)])) if len(w) else 0
  require(
    pieces <= 1, f"the shared edges leave the {len(w)} shared vertices in {pieces} pieces; add edges that connect them"
  )
  return np.concatenate([s, q])


def spanning_tree(edges, vertices: int) -> np.ndarray:
  """Mask of the edges of a spanning forest: all of P that a graph composition needs."""
  label, mask = np.arange(vertices), np.zeros(len(edges), bool)
  for i, (a, b) in enumerate(np.asarray(edges)):
    if label[a] != label[b]:
      mask[i] = True
      label[label == label[b]] = label[a]
  return mask


def rank_table(m: Shaped[Array, "m n"], p: int) -> Int[Array, "subsets"]:
  """Ranks of all 2^n column subsets, subset as bit mask: n eliminations' worth of rows in one batch."""
  n = m.shape[1]
  require(n <= 20, f"{n} elements have 2^{n} subsets; a rank table is for up to 20")
  masks = (jnp.arange(2**n)[:, None] >> jnp.arange(n)) & 1 == 1
  one = lambda mask: linkage.rank(fields.keep(m, mask), p)
  return jax.vmap(one)(masks) if n <= 10 else jax.lax.map(one, masks, batch_size=1024)


def union_rank_table(first: Int[Array, "subsets"], second: Int[Array, "subsets"]) -> Int[Array, "subsets"]:
  """r(X) = min over Y in X of r1(Y) + r2(Y) + |X - Y| for all X: a minimum over subsets, one pass an element."""
  n = int(first.shape[0]).bit_length() - 1
  size = jax.lax.population_count(jnp.arange(2**n))
  value = (first + second - size).reshape((2,) * n)
  for axis in range(n):
    low, high = jnp.split(value, 2, axis)
    value = jnp.concatenate([low, jnp.minimum(low, high)], axis)
  return value.reshape(-1) + size


def link_rank_table(a, b, nS: int, nP: int, nQ: int, p: int) -> Int[Array, "subsets"]:
  """Ranks of the link M(A) <-> M(B) of column matroids, for all subsets of S u Q (S the low bits)."""
  wide_a = jnp.concatenate([a, jnp.zeros((a.shape[0], nQ), a.dtype)], 1)
  wide_b = jnp.concatenate([jnp.zeros((b.shape[0], nS), b.dtype), b], 1)
  union = union_rank_table(rank_table(wide_a, p), rank_table(wide_b, p))
  subsets = jnp.arange(2 ** (nS + nQ))
  shared = (2**nP - 1) << nS
  at = (subsets & (2**nS - 1)) | ((subsets >> nS) << (nS + nP)) | shared
  return union[at] - union[shared]


def generic_link(a, b, nS: int, nP: int, nQ: int, key: jax.Array, p: int = fields.LARGE):
  """A space whose column matroid is M(A) <-> M(B) with high probability: the link with randomly scaled P columns."""
  fields.check_space(b, p)
  require(p > 1, "a generic link scales by random elements of a finite field; choose a prime p")
  scale = jax.random.randint(key, (nP,), 1, p, b.dtype)
  return linkage.link(a, b.at[:, :nP].set(b[:, :nP] * scale % p), nS, nP, nQ, p)


def matroid_union(elements, first: Callable[[set], bool], second: Callable[[set], bool]) -> tuple[set, set]:
  """A largest set independent in M1 v M2, as (I1, I2), by shortest augmenting paths over independence oracles.

  Placing x in I_i may push y out when I_i - y + x is independent; y then goes to the other side. O(n^3) oracle calls.
  """
  parts, oracle = (set(), set()), (first, second)

  def augment(start):
    queue, parent = [(start, 0), (start, 1)], {(start, 0): None, (start, 1): None}
    for node in queue:
      x, side = node
      if oracle[side](parts[side] | {x}):
        while node is not None:
          x, side = node
          node = parent[node]
          parts[side].add(x)
          if node is not None:
            parts[node[1]].discard(x)
        return
      for y in sorted(parts[side]):
        move = (y, 1 - side)
        if move not in parent and oracle[side](parts[side] - {y} | {x}):
          parent[move] = node
          queue.append(move)

  for element in elements:
    augment(element)
  return parts


def link_rank(subset, shared, first: Callable[[set], bool], second: Callable[[set], bool]) -> int:
  """r(X) of the link by two matroid unions: polynomial where `link_rank_table` is not."""
  size = lambda elements: sum(map(len, matroid_union(elements, first, second)))
  return size([*shared, *subset]) - size(list(shared))


def independent_columns(m, p: int) -> Callable[[set], bool]:
  """The independence oracle of a column matroid."""
  m = np.asarray(m)

  @jax.jit
  def rank_of(mask):
    return linkage.rank(fields.keep(jnp.asarray(m), mask), p)

  def oracle(chosen: set) -> bool:
    mask = np.zeros(m.shape[1], bool)
    mask[list(chosen)] = True
    return int(rank_of(mask)) == len(chosen)

  return oracle


def enumerate_union(elements, first: Callable[[set], bool], second: Callable[[set], bool]) -> int:
  """The rank of M1 v M2 by trying every pair of disjoint sets; an oracle for small cases."""
  best = 0
  for choice in itertools.product(range(3), repeat=len(elements)):
    sides = [{e for e, c in zip(elements, choice, strict=True) if c == side} for side in (1, 2)]
    if len(sides[0]) + len(sides[1]) > best and first(sides[0]) and second(sides[1]):
      best = len(sides[0]) + len(sides[1])
  return best
