"""A graph summary: supernodes that partition V, weighted superedges between them; its size, errors and queries.

  Ahat(u, v) = w(A, B) / Pi(A, B)  for u in A, v in B, {A, B} kept, u != v;  else 0,
  Pi(A, B) = |A||B| (A != B),  |A|(|A| - 1)/2 (A = B),
  Size = |V| log2|S| + |P| (2 log2|S| + log2 w_max),   Size(G) = 2|E| log2|V|.

Usage:

  summary = Summary(nodes, labels, first, second, weight)
  summary.bits(), summary.errors(edges=len(graph.edges))      # bits; (RE1, RE2)
  names, weights = summary.neighbours("ann")                  # a row of Ahat without expanding the others
  summary.supernodes()                                        # the names in each
"""

import dataclasses
import functools
import math
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.graphs.common import Graph, Named, require_graph


@dataclasses.dataclass(frozen=True)
class Summary(Named):
  """Supernodes and kept superedges.

  Attributes:
    nodes: |V|.
    labels: supernode 0 .. |S| - 1 of every node.
    first, second: the ends A <= B of every kept superedge, each pair once.
    weight: w(A, B), the edges of the graph in the block; one inside A counts once.
    w_max: largest weight charged for; a method may have to charge more than the largest kept one. None: that one.
    names: of the graph's vertices, None where they are the positions 0 .. |V| - 1.
  """

  nodes: int
  labels: Int[np.ndarray, "nodes"]
  first: Int[np.ndarray, "superedges"]
  second: Int[np.ndarray, "superedges"]
  weight: Int[np.ndarray, "superedges"]
  w_max: float | None = None
  names: np.ndarray | None = None

  @functools.cached_property
  def sizes(self) -> Int[np.ndarray, "supernodes"]:
    """|A| of every supernode."""
    return np.bincount(self.labels)

  @functools.cached_property
  def pairs(self) -> Float[np.ndarray, "superedges"]:
    """Pi of every kept superedge."""
    a, b = self.sizes[self.first].astype(float), self.sizes[self.second].astype(float)
    return np.where(self.first == self.second, a * (a - 1) / 2, a * b)

  def bits(self, *, recorded: bool = True) -> float:
    """Size of the summary. `recorded=False` charges log2 of the largest kept weight, never more."""
    own = (self.weight * np.where(self.first == self.second, 2, 1)).max(initial=1)
    return size_bits(self.nodes, len(self.sizes), len(self.weight), self.w_max if recorded and self.w_max else own)

  def errors(self, *, edges: int) -> tuple[float, float]:
    """(RE1, RE2) against the graph of |E| = `edges`, over ordered pairs u != v.

    With sigma = w / Pi, a kept block adds 4 w (1 - sigma) to sum |A - Ahat| and 2 w (1 - sigma) to sum (A - Ahat)^2;
    an edge in no kept block adds 2 to both. RE1 = sum |.| / (n(n-1)), RE2 = sqrt(sum (.)^2) / (n(n-1)): the division is
    outside the root, as published.
    """
    lost = 2.0 * (edges - self.weight.sum())
    block = 2.0 * (self.weight * (1 - self.weight / self.pairs)).sum()
    total = self.nodes * (self.nodes - 1)
    return (lost + 2 * block) / total, math.sqrt(max(lost + block, 0.0)) / total

  @functools.cached_property
  def _rows(self):
    """CSR over supernodes: (offsets, neighbour supernodes, densities), both directions, self-loops once."""
    cross = self.first != self.second
    a = np.concatenate([self.first, self.second[cross]])
    b = np.concatenate([self.second, self.first[cross]])
    density = self.weight / self.pairs
    order = np.argsort(a, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(a, minlength=len(self.sizes)))])
    return offsets, b[order], np.concatenate([density, density[cross]])[order]

  @functools.cached_property
  def _members(self):
    """(offsets, nodes) by supernode."""
    return np.concatenate([[0], np.cumsum(self.sizes)]), np.argsort(self.labels, kind="stable")

  def supernodes(self) -> list[np.ndarray]:
    """The names of the vertices in every supernode, by its number in `first` and `second`."""
    starts, members = self._members
    return np.split(self.named(members), starts[1:-1])

  def neighbours(self, name: Hashable) -> tuple[np.ndarray, Float[np.ndarray, "neighbours"]]:
    """The names of the vertices v with Ahat(u, v) > 0, and these values; cost O(superedges of A + answer).

    Raises:
      InputError: no vertex u of this name.
    """
    node = self.index([name])[0]
    offsets, neighbours, density = self._rows
    starts, members = self._members
    row = slice(offsets[self.labels[node]], offsets[self.labels[node] + 1])
    found = [members[starts[b] : starts[b + 1]] for b in neighbours[row]]
    found = np.concatenate(found) if found else np.zeros(0, np.int64)
    values = np.repeat(density[row], self.sizes[neighbours[row]])
    other = found != node
    found, values = found[other], values[other]
    order = np.argsort(found)
    return self.named(found[order]), values[order]

  def matvec(self, x: Float[Array, "nodes *columns"]) -> Float[Array, "nodes *columns"]:
    """Ahat @ x in O(|V| + |P|): contract through the partition, multiply by the densities, expand.

    Ahat x = Z D Z^T x - diag(D)_A x: u is not its own neighbour, though its block is.
    """
    return _matvec(
      jnp.asarray(self.labels), jnp.asarray(self.first), jnp.asarray(self.second),
      jnp.asarray(self.weight / self.pairs), x, supernodes=len(self.sizes),
    )  # fmt: skip

  def pack(self) -> bytes:
    """The summary without names: |V|, |S|, |P| and w_max, then labels and superedges at their least whole widths."""
    label, weight = _width(len(self.sizes)), _width(int(self.weight.max(initial=1)) + 1)
    header = np.array([self.nodes, len(self.sizes), len(self.weight), weight], np.uint64).tobytes()
    fields = ((self.labels, label), (self.first, label), (self.second, label), (self.weight, weight))
    return header + b"".join(_to_bits(values, width) for values, width in fields)


@functools.partial(jax.jit, static_argnames="supernodes")
def _matvec(labels, first, second, density, x, *, supernodes):
  density = density.astype(x.dtype)
  wide = lambda w, like: w.reshape(w.shape + (1,) * (like.ndim - 1))
  z = jax.ops.segment_sum(x, labels, num_segments=supernodes)
  y = jax.ops.segment_sum(wide(density, z) * z[second], first, num_segments=supernodes)
  across = jnp.where(first == second, 0, density)
  y += jax.ops.segment_sum(wide(across, z) * z[first], second, num_segments=supernodes)
  own = jax.ops.segment_sum(jnp.where(first == second, density, 0), first, num_segments=supernodes)
  return y[labels] - wide(own[labels], x) * x


def unpack(data: bytes) -> Summary:
  """The inverse of `Summary.pack` (w_max becomes the largest kept weight).

  Raises:
    InputError: the data is shorter than its header says.
  """
  require(len(data) >= 32, f"a packed summary starts with 32 bytes; this has {len(data)}")
  nodes, supernodes, superedges, weight = (int(v) for v in np.frombuffer(data[:32], np.uint64))
  label, at, arrays = _width(supernodes), 32, []
  for count, width in ((nodes, label), (superedges, label), (superedges, label), (superedges, weight)):
    length = (count * width + 7) // 8
    require(at + length <= len(data), f"a packed summary of {at + length} bytes or more was cut to {len(data)}")
    arrays.append(_from_bits(data[at : at + length], count, width))
    at += length
  return Summary(nodes, *arrays)


def size_bits(nodes: int, supernodes: int, superedges: int, w_max: float) -> float:
  """Size = |V| log2|S| + |P| (2 log2|S| + log2 w_max)."""
  return nodes * math.log2(supernodes) + superedges * (2 * math.log2(supernodes) + math.log2(w_max))


def graph_bits(graph: Graph) -> float:
  """Size(G) = 2|E| log2|V|. Raises InputError for what is no `Graph`."""
  require_graph(graph)
  return 2 * len(graph.edges) * math.log2(graph.nodes)


def from_labels(graph: Graph, labels: Int[np.ndarray, "nodes"]) -> Summary:
  """The summary of a partition with every non-empty block kept; labels may be any integers.

  Raises:
    InputError: a directed graph, or not one label a node.
  """
  require(not graph.directed, "a summary is of an undirected graph; load it with directed=False")
  require(np.shape(labels) == (graph.nodes,), f"{np.shape(labels)} labels for {graph.nodes} nodes; give one a node")
  labels = np.unique(labels, return_inverse=True)[1].reshape(-1)
  supernodes = int(labels.max()) + 1
  ends = np.sort(labels[graph.edges], axis=1).astype(np.int64)
  keys, weight = np.unique(ends[:, 0] * supernodes + ends[:, 1], return_counts=True)
  return Summary(graph.nodes, labels, keys // supernodes, keys % supernodes, weight, names=graph.names)


def select(summary: Summary, keep: Int[np.ndarray, "superedges"]) -> Summary:
  """Only the chosen superedges; all supernodes left without one become a single supernode."""
  first, second, weight = summary.first[keep], summary.second[keep], summary.weight[keep]
  touched = np.zeros(len(summary.sizes), bool)
  touched[first] = touched[second] = True
  new = np.where(touched, np.cumsum(touched) - 1, touched.sum())
  return dataclasses.replace(summary, labels=new[summary.labels], first=new[first], second=new[second], weight=weight)


def _width(values: int) -> int:
  """Bits of a whole number below `values`."""
  return max(values - 1, 0).bit_length()


def _to_bits(values, width: int) -> bytes:
  shifts = np.arange(width, dtype=np.uint64)
  return np.packbits(((values.astype(np.uint64)[:, None] >> shifts) & np.uint64(1)).astype(np.uint8)).tobytes()


def _from_bits(data: bytes, count: int, width: int):
  if not width:
    return np.zeros(count, np.int64)
  bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width).reshape(count, width)
  return (bits.astype(np.int64) << np.arange(width)).sum(axis=1)
