"""SSumM's partition as a list of blocks: costs, proposals and merges of all groups at once (see `ssumm`).

A round costs one binary search for every block, in the row of the neighbour on its cycle, and one sort of the blocks.
Only rows of supernodes that still take part need be in the list: `extract` makes a smaller state of them, in which
the others are mere targets, and `absorb` puts its merges back.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.graphs.common import Graph, require_graph, sorted_pairs

ERRORS = ("re1", "re2")
GRANULE = 512


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Supernodes by a representative node, blocks by (source, target) in both directions, a block inside A once.

  Attributes:
    labels: representative of the supernode of every node.
    size: |A| at its representative, 0 elsewhere.
    source, target: ends of the blocks, sorted; places past the last block hold `nodes`.
    count: E of the block.
    keep: whether the superedge is kept.
    supernodes, w_max: |S| and the largest count a merge ever made (a block inside A counts twice).
    vertices: |V| of the graph.
    rows: the first so many nodes have all their blocks in the list, the others none (all have, unless extracted).
    elsewhere: kept superedges that are not in the list (0 unless extracted).
    nodes: static: the number of nodes here.
    error, drop: static: "re1" keeps no superedge with sigma < 1/2; `drop=False` keeps every one (an ablation).
  """

  labels: Int[Array, "nodes"]
  size: Int[Array, "nodes"]
  source: Int[Array, "blocks"]
  target: Int[Array, "blocks"]
  count: Int[Array, "blocks"]
  keep: Bool[Array, "blocks"]
  supernodes: Int[Array, ""]
  w_max: Int[Array, ""]
  vertices: Int[Array, ""]
  rows: Int[Array, ""]
  elsewhere: Int[Array, ""]
  nodes: int = dataclasses.field(metadata=dict(static=True))
  error: str = dataclasses.field(metadata=dict(static=True))
  drop: bool = dataclasses.field(metadata=dict(static=True))


def initial_state(graph: Graph, *, error: str = "re1", drop: bool = True) -> State:
  """Singletons; every edge a kept superedge.

  Raises:
    InputError: an unknown error, or as `check_graph`.
  """
  require_choice("error", error, ERRORS)
  check_graph(graph)
  both = sorted_pairs(*graph.arcs(), graph.nodes)
  # Few distinct lengths, few shapes to compile.
  empty = -len(both[0]) % GRANULE
  source, target = (jnp.asarray(np.pad(x, (0, empty), constant_values=graph.nodes), jnp.int32) for x in both)
  used = source < graph.nodes
  ids = jnp.arange(graph.nodes, dtype=jnp.int32)
  total = jnp.int32(graph.nodes)
  return State(
    ids, jnp.ones_like(ids), source, target, used.astype(jnp.int32), used, supernodes=total, w_max=jnp.int32(1),
    vertices=total, rows=total, elsewhere=jnp.int32(0), nodes=graph.nodes, error=error, drop=drop,
  )  # fmt: skip


def check_graph(graph: Graph) -> None:
  """Raises InputError for what is no `Graph`, is directed or has no edge."""
  require_graph(graph)
  require(not graph.directed, "SSumM summarises undirected graphs; load the graph with directed=False")
  require(len(graph.edges) > 0, "SSumM needs a graph with at least one edge")


def superedges(state: State) -> Int[Array, ""]:
  """|P|, each pair once."""
  listed = state.keep & (state.source <= state.target) & (state.source < state.nodes)
  return state.elsewhere + jnp.sum(listed, dtype=jnp.int32)


def state_bits(state: State) -> Float[Array, ""]:
  """Size of the summary as it stands."""
  return state.vertices * jnp.log2(state.supernodes.astype(float)) + superedges(state) * superedge_bits(state)


def superedge_bits(state: State) -> Float[Array, ""]:
  """C_e = 2 log2|S| + log2 w_max."""
  return 2 * jnp.log2(state.supernodes.astype(float)) + jnp.log2(state.w_max.astype(float))


def pairs_between(a: Array, b: Array, inside: Array) -> Float[Array, "..."]:
  """Pi of blocks with supernodes of sizes a and b (a = b if `inside` one supernode)."""
  a, b = a.astype(float), b.astype(float)
  return jnp.where(inside, a * (a - 1) / 2, a * b)


def dense_bits(count: Array, pairs: Array, superedge: Array) -> Float[Array, "..."]:
  """c_d = C_e + Pi H(E / Pi) = C_e + Pi log2 Pi - E log2 E - (Pi - E) log2(Pi - E)."""
  entropy = lambda x: jax.scipy.special.xlogy(x, x) / jnp.log(2.0)
  count = count.astype(float)
  return superedge + jnp.maximum(entropy(pairs) - entropy(count) - entropy(pairs - count), 0)


def listing_bits(state: State) -> Float[Array, ""]:
  """2 log2|V|, of an edge that is listed."""
  return 2 * jnp.log2(state.vertices.astype(float))


def decide(state: State, count: Array, pairs: Array) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
  """(cost, keep) of blocks decided now; an empty block costs nothing and is not kept."""
  dense = dense_bits(count, pairs, superedge_bits(state))
  sparse = listing_bits(state) * count
  keep = dense <= sparse if state.drop else jnp.full(count.shape, True)
  if state.error == "re1" and state.drop:
    keep &= 2 * count >= pairs
  keep &= count > 0
  return jnp.where(count > 0, jnp.where(keep, dense, sparse), 0.0), keep


def current_costs(state: State) -> Float[Array, "blocks"]:
  """Cost of every block under its present flag."""
  at = lambda ids: state.size.at[ids].get(mode="fill", fill_value=0)
  pairs = pairs_between(at(state.source), at(state.target), state.source == state.target)
  dense = dense_bits(state.count, pairs, superedge_bits(state))
  return jnp.where(state.count > 0, jnp.where(state.keep, dense, listing_bits(state) * state.count), 0.0)


def reductions(state: State, after: Int[Array, "rows"], before: Int[Array, "rows"]) -> Float[Array, "rows"]:
  """Reduction(A, after[A]) for every representative A on a cycle; before[after[A]] = A.

  Every row is in two pairs: as the first of (A, after[A]) and as the second of (before[A], A). A block {A, X} is looked
  up in the row of after[A]; where it is found, the block there is counted with it and not again.

  Args:
    after, before: of the nodes 0 .. rows - 1, which have all blocks; itself for a node in no pair.

  Returns:
    Reduction; -inf for a node in no pair, or where neither end has an edge.
  """
  rows, blocks, size = len(after), len(state.source), state.size
  a = jnp.minimum(state.source, rows - 1)
  x, real = state.target, state.source < rows
  follower, leader = after[a], before[a]
  paired = real & (follower != a)
  start = jnp.searchsorted(state.source, jnp.arange(rows + 1, dtype=jnp.int32)).astype(jnp.int32)

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) // 2
    less = x[middle] < x
    inside = low < high
    return jnp.where(inside & less, middle + 1, low), jnp.where(inside & ~less, middle, high)

  longest = jnp.max(start[1:] - start[:-1]).astype(jnp.uint32)
  end = start[follower + 1]
  place, _ = jax.lax.fori_loop(0, 32 - jax.lax.clz(longest).astype(jnp.int32), halve, (start[follower], end))
  found = paired & (place < end) & (x[jnp.minimum(place, blocks - 1)] == x)
  place = jnp.where(found, place, blocks)
  counted = jnp.zeros(blocks, bool).at[place].set(True, mode="drop")
  joined = state.count + state.count.at[place].get(mode="fill", fill_value=0)

  at = lambda ids: size.at[ids].get(mode="clip")
  outside = lambda count, other: decide(state, count, pairs_between(at(a) + at(other), at(x), jnp.bool_(False)))[0]
  first = jnp.where(paired & (x != a) & (x != follower), outside(joined, follower), 0)
  second = jnp.where(paired & (x != a) & (x != leader) & ~counted, outside(state.count, leader), 0)
  own = jnp.where(real & (x == a), state.count, 0)
  between = paired & (x == follower)
  now = jnp.where(real, current_costs(state), 0)
  columns = (first, second, own, jnp.where(between, state.count, 0), now, jnp.where(between, now, 0))
  total = functools.partial(jax.ops.segment_sum, segment_ids=state.source, num_segments=rows, indices_are_sorted=True)
  first, second, own, between, now, shared = (total(column) for column in columns)

  both = size[:rows] + size[after]
  inside = decide(state, own + own[after] + between, pairs_between(both, both, jnp.bool_(True)))[0]
  merged, apart = first + second[after] + inside, now + now[after] - shared
  paired = (after != jnp.arange(rows)) & (apart > 0)
  return jnp.where(paired, 1 - merged / jnp.where(paired, apart, 1), -jnp.inf)


def merge(state: State, parent: Int[Array, "rows"]) -> State:
  """Merges every representative A into parent[A] (itself, or one that stays) and decides the blocks this touches.

  Decisions use |S| and w_max from before the merge.
  """
  n = state.nodes
  parent = jnp.concatenate([parent, jnp.arange(len(parent), n, dtype=parent.dtype)])
  moved = parent != jnp.arange(n)
  touched = jnp.zeros(n + 1, bool).at[jnp.where(moved, parent, n)].set(True).at[n].set(False)
  size = jax.ops.segment_sum(state.size, parent, num_segments=n)
  to = jnp.concatenate([parent, jnp.array([n], parent.dtype)])
  source, target = to[state.source], to[state.target]
  # An edge between merged ends is listed in both directions; inside a supernode it counts once.
  twice = (source == target) & (state.source > state.target)
  source, target, place = _sorted_blocks(jnp.where(twice, n, source), jnp.where(twice, n, target), n)
  count, keep = state.count[place], state.keep[place]
  fresh = (source != jnp.roll(source, 1)) | (target != jnp.roll(target, 1))
  segment = jnp.cumsum(fresh.at[0].set(True)) - 1
  total = functools.partial(jax.ops.segment_sum, segment_ids=segment, num_segments=len(source), indices_are_sorted=True)
  first = lambda ends: jnp.full_like(ends, n).at[segment].min(ends, indices_are_sorted=True)
  source, target = first(source), first(target)
  real = source < n
  count = jnp.where(real, total(count), 0)
  at = lambda ids: size.at[ids].get(mode="clip")
  decided = decide(state, count, pairs_between(at(source), at(target), source == target))[1]
  redo = touched[source] | touched[target]
  keep = jnp.where(redo, decided, total(keep.astype(jnp.int32)) > 0) & real
  largest = jnp.max(jnp.where(redo & real, count * jnp.where(source == target, 2, 1), 0))
  return dataclasses.replace(
    state, labels=parent[state.labels], size=size, source=source, target=target, count=count, keep=keep,
    supernodes=state.supernodes - jnp.sum(moved, dtype=jnp.int32),
    w_max=jnp.maximum(state.w_max, largest.astype(jnp.int32)),
  )  # fmt: skip


def _sorted_blocks(source, target, n):
  """Blocks ascending, ends n last, and where they were: in one integer if it fits, which sorts several times faster."""
  span, bits = n + 1, max(len(source) - 1, 1).bit_length()
  key, place = source.astype(jnp.int64) * span + target, jnp.arange(len(source), dtype=jnp.int64)
  if span**2 << bits <= 2**63:
    packed = jnp.sort((key << bits) | place)
    key, place = packed >> bits, (packed & ((1 << bits) - 1)).astype(jnp.int32)
  else:
    key, place = jax.lax.sort((key, place.astype(jnp.int32)), num_keys=1)
  return (key // span).astype(jnp.int32), (key % span).astype(jnp.int32), place


@jax.jit
def propose(
  state: State, group: Int[Array, "rows"], key: jax.Array, threshold: float | Array, share: float | Array
) -> tuple[Int[Array, "rows"], Float[Array, "rows"], Bool[Array, "rows"]]:
  """One round in all groups: (parent, Reduction, whether the group of a representative merged anything).

  `group` is the group of every representative, `rows` for those that take no part. The representatives of a group lie
  on a random cycle; only neighbours are scored, so every supernode is in two pairs and |group| pairs are drawn. Pairs
  that reach the threshold and beat both their neighbours may merge, equal ones by the draw of a number; of these the
  best do, `share` * |group| of them and at least one.
  """
  rows = len(group)
  ids = jnp.arange(rows, dtype=jnp.int32)
  noise, lot = jax.random.bits(key, (2, rows), jnp.uint32)
  order = jnp.argsort((group.astype(jnp.int64) << 32) | noise.astype(jnp.int64)).astype(jnp.int32)
  ring = group[order]
  begins = jnp.searchsorted(ring, ring).astype(jnp.int32)
  last = jnp.concatenate([ring[1:] != ring[:-1], jnp.array([True])])
  follower = jnp.where(ring < rows, order[jnp.where(last, begins, ids + 1)], order)
  after = jnp.zeros_like(ids).at[order].set(follower)
  before = jnp.zeros_like(ids).at[follower].set(order)
  value = reductions(state, after, before)
  beats = lambda other: (value > value[other]) | ((value == value[other]) & (lot > lot[other]))
  good = (value >= threshold) & (after != ids) & beats(before) & beats(after)
  # Rank by value in each group.
  descending = jnp.lexsort((jnp.where(good, -value, jnp.inf), group))
  rank = jnp.zeros(rows, jnp.int32).at[descending].set(ids - begins)
  members = jnp.bincount(group, length=rows + 1)[group]
  good &= rank < jnp.maximum(1, share * members)
  lost = jnp.where(good, after, rows)
  parent = ids.at[lost].set(ids, mode="drop")
  score = jnp.full(rows, -jnp.inf).at[lost].set(value, mode="drop")
  any_good = jnp.zeros(rows + 1, bool).at[group].max(good)
  return parent, score, any_good[group] & (group < rows)


@jax.jit
def sizes(state: State, active: Bool[Array, "nodes"]) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
  """(rows, nodes, blocks) of the state that `extract` makes of the active representatives."""
  rows, seen = _seen(state, active)
  count = functools.partial(jnp.sum, dtype=jnp.int32)
  return count(active), count(active | seen), count(rows)


def _seen(state, active):
  """(blocks in active rows, the nodes that are targets there)."""
  rows = active.at[state.source].get(mode="fill", fill_value=False)
  return rows, jnp.zeros(state.nodes, bool).at[jnp.where(rows, state.target, state.nodes)].set(True, mode="drop")


@functools.partial(jax.jit, static_argnames=("nodes", "blocks"))
def extract(state: State, active: Bool[Array, "all"], *, nodes: int, blocks: int) -> tuple[State, Int[Array, "nodes"]]:
  """(a state of the rows of the active representatives, the node of `state` that each of its nodes is).

  The active come first, then the other targets in their rows; places past them stand for no node, `state.nodes`.
  """
  rows, seen = _seen(state, active)
  others = seen & ~active
  local = jnp.where(active, jnp.cumsum(active) - 1, jnp.sum(active) + jnp.cumsum(others) - 1).astype(jnp.int32)
  local = jnp.where(active | others, local, nodes)
  ids = jnp.full(nodes, state.nodes, jnp.int32).at[local].set(jnp.arange(state.nodes, dtype=jnp.int32), mode="drop")
  chosen = jnp.nonzero(rows, size=blocks, fill_value=len(rows))[0]
  end = lambda ends: local.at[ends.at[chosen].get(mode="fill", fill_value=state.nodes)].get(
    mode="fill", fill_value=nodes
  )
  source, target, place = _sorted_blocks(end(state.source), end(state.target), nodes)
  at = lambda values: values.at[chosen[place]].get(mode="fill", fill_value=0)
  small = dataclasses.replace(
    state, labels=jnp.arange(nodes, dtype=jnp.int32), size=state.size.at[ids].get(mode="fill", fill_value=0),
    source=source, target=target, count=at(state.count), keep=at(state.keep), nodes=nodes,
    rows=jnp.sum(active, dtype=jnp.int32), elsewhere=jnp.int32(0),
  )  # fmt: skip
  return dataclasses.replace(small, elsewhere=superedges(state) - superedges(small)), ids


@jax.jit
def absorb(state: State, small: State, ids: Int[Array, "nodes"], active: Bool[Array, "all"]) -> State:
  """`state` with the merges made in (small, ids), which `extract` took from it."""
  n = state.nodes
  node = jnp.concatenate([ids, jnp.array([n], ids.dtype)])
  parent = jnp.arange(n, dtype=jnp.int32).at[ids].set(node[small.labels], mode="drop")
  source, target = node[small.source], node[small.target]
  is_active = lambda ends: active.at[ends].get(mode="fill", fill_value=False)
  gone = is_active(state.source) | is_active(state.target)
  mirrored = ~is_active(target) & (target < state.rows)
  sources = (jnp.where(gone, n, state.source), source, jnp.where(mirrored, target, n))
  targets = (jnp.where(gone, n, state.target), target, jnp.where(mirrored, source, n))
  source, target, place = _sorted_blocks(jnp.concatenate(sources), jnp.concatenate(targets), n)
  length = len(state.source)
  at = lambda name: jnp.concatenate([getattr(s, name) for s in (state, small, small)])[place[:length]]
  source, target = source[:length], target[:length]
  real = source < n
  return dataclasses.replace(
    state, labels=parent[state.labels], size=state.size.at[ids].set(small.size, mode="drop"),
    source=source, target=target, count=jnp.where(real, at("count"), 0), keep=at("keep") & real,
    supernodes=small.supernodes, w_max=small.w_max,
  )  # fmt: skip
