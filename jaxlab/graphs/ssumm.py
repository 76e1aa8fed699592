"""SSumM: lossy graph summaries within a budget of bits (Lee et al., KDD 2020, arXiv 2006.01060).

Nodes merge into supernodes and superedges are dropped, both steered by one description length. A block {A, B} with
E edges, Pi pairs, sigma = E / Pi and H the binary entropy costs

  dense   c_d = C_e + Pi H(sigma),   C_e = 2 log2|S| + log2 w_max     (a superedge and the bits to correct it),
  sparse  c_s = 2 log2|V| E                                          (no superedge, the edges are listed),

and keeps its superedge iff c_d <= c_s (for the error RE1 also sigma >= 1/2). Flags are sticky: a block is decided when
a merge touches it. With Cost(A) the sum over the blocks of A, a pair is worth

  Reduction(A, B) = 1 - Cost(A u B) / (Cost(A) + Cost(B) - cost{A, B}).

T iterations: group supernodes by min-hash shingles; in every group draw pairs and merge while the Reduction reaches
theta = 1 / (1 + t) (0 in the last); stop once Size <= k. Then superedges are dropped by their error until Size <= k.

Here all groups advance together and the state is a list of blocks, so that a round costs two sorts of O(|E|) whatever
the groups are: the supernodes of a group are put on a random cycle, every neighbouring pair is scored, and of a group
the best `share` of pairs that beat both their neighbours on the cycle merge at once (0: the best one, as published).
`ssumm_host` is the sequential algorithm, one group and one merge after the other.

  graph = common.load("edge_list", path="facebook.txt")
  summary = ssumm.summarise(graph, jax.random.key(0), budget=0.2 * graph_bits(graph))
  summary.errors(edges=len(graph.edges)), summary.neighbours(0)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.graphs import summary as summaries
from jaxlab.graphs.common import Graph, sorted_pairs
from jaxlab.graphs.summary import Summary

ERRORS = ("re1", "re2")
GROUPS = ("shingles", "random")
FAIL_RULES = ("code", "paper")
_GRANULE = 512


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
  nodes: int = dataclasses.field(metadata=dict(static=True))
  error: str = dataclasses.field(metadata=dict(static=True))
  drop: bool = dataclasses.field(metadata=dict(static=True))


def initial_state(graph: Graph, *, error: str = "re1", drop: bool = True) -> State:
  """Singletons; every edge a kept superedge.

  Raises:
    InputError: an unknown error, a directed graph, or fewer than two nodes.
  """
  require_choice("error", error, ERRORS)
  require(not graph.directed, "SSumM summarises undirected graphs; load the graph with directed=False")
  require(graph.nodes >= 2 and len(graph.edges) > 0, "SSumM needs a graph with at least one edge")
  both = sorted_pairs(*graph.arcs(), graph.nodes)
  # Few distinct lengths, few shapes to compile.
  empty = -len(both[0]) % _GRANULE
  source, target = (jnp.asarray(np.pad(x, (0, empty), constant_values=graph.nodes), jnp.int32) for x in both)
  used = source < graph.nodes
  ids = jnp.arange(graph.nodes, dtype=jnp.int32)
  return State(
    ids, jnp.ones_like(ids), source, target, used.astype(jnp.int32), used,
    jnp.int32(graph.nodes), jnp.int32(1), graph.nodes, error, drop,
  )  # fmt: skip


def superedges(state: State) -> Int[Array, ""]:
  """|P|, each pair once."""
  return jnp.sum(state.keep & (state.source <= state.target) & (state.source < state.nodes))


def state_bits(state: State) -> Float[Array, ""]:
  """Size of the summary as it stands."""
  return state.nodes * jnp.log2(state.supernodes.astype(float)) + superedges(state) * superedge_bits(state)


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


def decide(state: State, count: Array, pairs: Array) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
  """(cost, keep) of blocks decided now; an empty block costs nothing and is not kept."""
  dense = dense_bits(count, pairs, superedge_bits(state))
  sparse = 2 * jnp.log2(float(state.nodes)) * count
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
  sparse = 2 * jnp.log2(float(state.nodes)) * state.count
  return jnp.where(state.source < state.nodes, jnp.where(state.keep, dense, sparse), 0.0)


def reductions(
  state: State, first: Int[Array, "pairs"], second: Int[Array, "pairs"], slot: Int[Array, "2 nodes"]
) -> Float[Array, "pairs"]:
  """Reduction(A, B) of pairs in which every supernode is at most once `first` and at most once `second`.

  The rows of both ends are written side by side and sorted by (pair, neighbour, end): equal neighbours then lie
  together, and the rank of an entry among its own end's gives its place in the list of blocks, so one array of integers
  is all that is sorted.

  Args:
    first, second: representatives; `nodes` where there is no pair.
    slot: slot[0][A] the pair whose first is A, slot[1][A] whose second is A; the number of pairs where none.

  Returns:
    Reduction; -inf where there is no pair, or neither end has an edge.
  """
  n, count, size = state.nodes, len(first), state.size
  blocks = len(state.source)
  pair_of = slot.at[:, state.source].get(mode="fill", fill_value=count).astype(jnp.int64)
  ends = jnp.arange(2)[:, None]
  key = jnp.sort(((pair_of * n + state.target) * 2 + ends).reshape(-1))
  end = (key % 2).astype(jnp.int32)
  pair, neighbour = (key // 2 // n).astype(jnp.int32), (key // 2 % n).astype(jnp.int32)
  pair = jnp.where(key // 2 >= jnp.int64(count) * n, count, pair)

  start = jnp.searchsorted(state.source, jnp.arange(n + 1, dtype=jnp.int32)).astype(jnp.int32)
  row = lambda ids: start.at[ids].get(mode="clip")
  length = lambda ids: jnp.where(ids < n, row(ids + 1) - row(ids), 0)
  before = jnp.stack([jnp.cumsum(length(ids)) - length(ids) for ids in (first, second)])
  seconds = jnp.cumsum(end) - end
  rank = jnp.where(end == 1, seconds, jnp.arange(2 * blocks, dtype=jnp.int32) - seconds)
  inside = jnp.minimum(pair, count - 1)
  place = jnp.where(end == 1, row(second[inside]), row(first[inside])) + rank - before[end, inside]
  place = jnp.clip(place, 0, blocks - 1)
  real = pair < count
  edges = jnp.where(real, state.count[place], 0)

  same = jnp.concatenate([jnp.array([False]), (pair[1:] == pair[:-1]) & (neighbour[1:] == neighbour[:-1])])
  joined = edges + jnp.where(jnp.roll(same, -1), jnp.roll(edges, -1), 0)
  a, b = first[inside], second[inside]
  within = (neighbour == a) | (neighbour == b)
  pairs = pairs_between(size.at[a].get(mode="clip") + size.at[b].get(mode="clip"), size[neighbour], jnp.bool_(False))
  cost = jnp.where(real & ~same & ~within, decide(state, joined, pairs)[0], 0)
  total = functools.partial(jax.ops.segment_sum, segment_ids=pair, num_segments=count, indices_are_sorted=True)

  # E(A, A) + E(B, B) + E(A, B): the last is in both rows.
  between = jnp.where(end == 1, neighbour == a, neighbour == b)
  own = total(jnp.where(real & within, jnp.where(between, edges / 2, edges), 0.0))
  both = size.at[first].get(mode="clip") + size.at[second].get(mode="clip")
  merged = total(cost) + decide(state, own, pairs_between(both, both, jnp.bool_(True)))[0]
  now = current_costs(state)
  shared = total(jnp.where(real & between & (end == 0), now[place], 0))
  alone = jax.ops.segment_sum(now, state.source, num_segments=n + 1, indices_are_sorted=True)
  apart = alone.at[first].get(mode="clip") + alone.at[second].get(mode="clip") - shared
  return jnp.where((first < n) & (apart > 0), 1 - merged / jnp.where(apart > 0, apart, 1), -jnp.inf)


def merge(state: State, parent: Int[Array, "nodes"]) -> State:
  """Merges every representative A into parent[A] (itself, or one that stays) and decides the blocks this touches.

  Decisions use |S| and w_max from before the merge.
  """
  n = state.nodes
  moved = parent != jnp.arange(n)
  touched = jnp.zeros(n + 1, bool).at[jnp.where(moved, parent, n)].set(True).at[n].set(False)
  size = jax.ops.segment_sum(state.size, parent, num_segments=n)
  to = jnp.concatenate([parent, jnp.array([n], parent.dtype)])
  source, target = to[state.source], to[state.target]
  # An edge between merged ends is listed in both directions; inside a supernode it counts once.
  twice = (source == target) & (state.source > state.target)
  key = source.astype(jnp.int64) * (n + 1) + target
  key, place = _sort_with_places(jnp.where(twice, jnp.int64(n) * (n + 1) + n, key), n)
  count, keep = state.count[place], state.keep[place]
  fresh = jnp.concatenate([jnp.array([True]), key[1:] != key[:-1]])
  segment = jnp.cumsum(fresh) - 1
  total = functools.partial(jax.ops.segment_sum, segment_ids=segment, num_segments=len(key), indices_are_sorted=True)
  key = jax.ops.segment_min(key, segment, num_segments=len(key), indices_are_sorted=True)
  key = jnp.minimum(key, jnp.int64(n) * (n + 1) + n)
  source, target = (key // (n + 1)).astype(jnp.int32), (key % (n + 1)).astype(jnp.int32)
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


def _sort_with_places(key, n):
  """Sorted keys and where they came from; both in one integer if they fit, which sorts several times faster."""
  bits = max(len(key) - 1, 1).bit_length()
  place = jnp.arange(len(key), dtype=jnp.int64)
  if 2 * (n + 1).bit_length() + bits <= 62:
    packed = jnp.sort((key << bits) | place)
    return packed >> bits, (packed & ((1 << bits) - 1)).astype(jnp.int32)
  return jax.lax.sort((key, place.astype(jnp.int32)), num_keys=1)


@jax.jit
def propose(
  state: State, group: Int[Array, "nodes"], key: jax.Array, threshold: float | Array, share: float | Array
) -> tuple[Int[Array, "nodes"], Float[Array, "nodes"], Bool[Array, "nodes"]]:
  """One round in all groups: (parent, Reduction, whether the group of a representative merged anything).

  `group` is the group of every representative, `nodes` for those that take no part. The representatives of a group lie
  on a random cycle; only neighbours are scored, so every supernode is in two pairs and |group| pairs are drawn. Of a
  group's pairs, those merge that reach the threshold, beat both neighbours and are among the best `share` of the group.
  """
  n = state.nodes
  ids = jnp.arange(n, dtype=jnp.int32)
  noise = jax.random.bits(key, (n,), jnp.uint32)
  order = jnp.argsort((group.astype(jnp.int64) << 32) | noise.astype(jnp.int64)).astype(jnp.int32)
  ring = group[order]
  begins = jnp.searchsorted(ring, ring).astype(jnp.int32)
  last = jnp.concatenate([ring[1:] != ring[:-1], jnp.array([True])])
  after = jnp.where(last, begins, ids + 1)
  before = jnp.zeros(n, jnp.int32).at[after].set(ids)
  active = (ring < n) & (after != ids)
  first = jnp.where(active, order, n)
  second = jnp.where(active, order[after], n)
  places = jnp.where(active, ids, n)
  slot = jnp.full((2, n + 1), n, jnp.int32).at[0, first].set(places).at[1, second].set(places)[:, :n]
  value = reductions(state, first, second, slot)
  beats = lambda other: (value > value[other]) | ((value == value[other]) & (ids < other))
  good = active & (value >= threshold) & beats(before) & beats(after)
  # Rank by value in each group: only its best pairs merge, and the best of all always may.
  descending = jnp.lexsort((-value, ring))
  rank = jnp.zeros(n, jnp.int32).at[descending].set(ids) - begins
  members = jnp.bincount(ring, length=n + 1)[ring]
  good &= rank < jnp.maximum(1, share * members)
  parent = ids.at[jnp.where(good, second, n)].set(first, mode="drop")
  score = jnp.full(n, -jnp.inf).at[jnp.where(good, second, n)].set(value, mode="drop")
  any_good = jnp.zeros(n + 1, bool).at[ring].max(good)
  return parent, score, any_good[group] & (group < n)


@functools.partial(jax.jit, static_argnames="count")
def shingles(key: jax.Array, state: State, source: Array, target: Array, *, count: int) -> Int[Array, "count nodes"]:
  """F_m(A) = min over v in A of min(pi_m(v), min over neighbours u of pi_m(u)) at A's representative; fresh pi_m."""

  def one(key):
    rank = jax.random.permutation(key, state.nodes).astype(jnp.int32)
    node = jnp.minimum(rank, jax.ops.segment_min(rank[target], source, num_segments=state.nodes))
    return jax.ops.segment_min(node, state.labels, num_segments=state.nodes)

  return jax.lax.map(one, jax.random.split(key, count))


def candidate_groups(
  columns: Int[np.ndarray, "hashes alive"], *, max_size: int, rng: np.random.Generator
) -> Int[np.ndarray, "alive"]:
  """Group ids 0.. of supernodes with these shingles.

  Split by the first shingle; a group above `max_size` is split by the next, and in the end cut at random into chunks.
  """
  group = np.unique(columns[0], return_inverse=True)[1].astype(np.int64)
  for column in columns[1:]:
    big = np.bincount(group)[group] > max_size
    if not big.any():
      return group
    span = int(column.max()) + 2
    group = np.unique(group * span + np.where(big, column.astype(np.int64) + 1, 0), return_inverse=True)[1]
  order = np.lexsort((rng.random(len(group)), group))
  rank = np.empty(len(group), np.int64)
  starts = np.concatenate([[0], np.cumsum(np.bincount(group))])[:-1]
  rank[order] = np.arange(len(group)) - starts[group[order]]
  return np.unique(group * (len(group) + 1) + rank // max_size, return_inverse=True)[1]


def fail_limit(size: Int[np.ndarray, "..."], rule: str = "code") -> Int[np.ndarray, "..."]:
  """Rounds without a merge before a group gives up: about log2 log2 |group| in the code, log2 |group| in the paper."""
  length = lambda x: np.ceil(np.log2(np.maximum(x, 0) + 1.0)).astype(np.int64)
  return length(length(size - 1) - 1) if rule == "code" else np.maximum(length(size) - 1, 1)


_merge = jax.jit(merge)
_bits = jax.jit(state_bits)


def summarise(
  graph: Graph,
  key: jax.Array,
  *,
  budget: float,
  error: str = "re1",
  iterations: int = 20,
  hashes: int = 10,
  max_group: int = 500,
  share: float = 0.02,
  groups: str = "shingles",
  fail_rule: str = "code",
  schedule: bool = True,
  drop: bool = True,
) -> Summary:
  """A summary of at most `budget` bits.

  Args:
    budget: k in bits; `ratio * summary.graph_bits(graph)`.
    error: which error to keep low, "re1" or "re2".
    iterations, hashes, max_group: T, shingles to split by, the largest group.
    share: of a group's drawn pairs, the part that may merge in one round: 0 is the best pair only, as published; more
      is faster and greedier (see `propose`).
    groups: "random" ignores the shingles; `schedule=False` sets theta = 0; `drop=False` keeps every superedge while
      merging and drops none later. Three ablations.
    fail_rule: "code" or "paper", see `fail_limit`.

  Raises:
    InputError: an unknown option, a directed or empty graph, or a budget that no number of merges reached.
  """
  require(budget > 0, f"the budget is {budget:.0f} bits; it must be positive")
  require_choice("groups", groups, GROUPS)
  require_choice("fail_rule", fail_rule, FAIL_RULES)
  require(0 <= share <= 1, f"share is {share}; it must lie in 0..1")
  require(
    iterations >= 1 and hashes >= 1 and max_group >= 2,
    f"iterations={iterations}, hashes={hashes}, max_group={max_group}; need at least 1, 1 and 2",
  )
  # Keys of (pair, neighbour) need 64 bits; so do sums of costs.
  with jax.enable_x64(True):
    state = initial_state(graph, error=error, drop=drop)
    ends = state.source, state.target
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    for t in range(1, iterations + 1):
      if float(_bits(state)) <= budget:
        break
      theta = 1 / (1 + t) if schedule and t < iterations else 0.0
      shrunk = _shrink(state)
      group = _grouping(shrunk, jax.random.fold_in(key, t), ends, hashes, max_group, groups, rng)
      state = _rounds(shrunk, group, jax.random.fold_in(key, iterations + t), theta, budget, share, fail_rule)
    return finish(state, budget, sparsify=drop)


def _grouping(state, key, ends, hashes, max_group, groups, rng):
  """The group of every representative, `nodes` for those alone in theirs."""
  alive = np.flatnonzero(np.asarray(state.size))
  columns = np.asarray(shingles(key, state, *ends, count=hashes))[:, alive]
  if groups == "random":
    columns = np.zeros_like(columns)
  found = candidate_groups(columns, max_size=max_group, rng=rng)
  group = np.full(state.nodes, state.nodes, np.int32)
  group[alive] = np.where(np.bincount(found)[found] > 1, found, state.nodes)
  return group


def _rounds(state, group, key, theta, budget, share, fail_rule):
  """Merges in all groups until each has failed as often as it may, or the budget is met."""
  limit = fail_limit(np.bincount(group, minlength=state.nodes + 1), fail_rule).astype(np.int32)
  state, parent, score, met = _merge_rounds(state, group, limit, key, theta, budget, share)
  return _last_merges(state, np.asarray(parent), np.asarray(score), budget) if met else state


@jax.jit
def _merge_rounds(state, group, limit, key, theta, budget, share):
  """(state, parent, score, met): met if merging `parent` into that state would meet the budget."""
  n = state.nodes
  ids = jnp.arange(n, dtype=jnp.int32)

  def body(carry):
    state, group, fails, step, *_ = carry
    parent, score, merged = propose(state, group, jax.random.fold_in(key, step), theta, share)
    successor = merge(state, parent)
    met = state_bits(successor) <= budget
    success = jnp.zeros(n + 1, bool).at[group].max(merged)
    fails = jnp.where(success, 0, fails + 1)
    group = jnp.where((successor.size > 0) & (fails < limit)[group], group, n)
    alone = jnp.bincount(group, length=n + 1)[group] < 2
    state = jax.tree.map(functools.partial(jnp.where, met), state, successor)
    return state, jnp.where(alone, n, group), fails, step + 1, parent, score, met

  start = state, group, jnp.zeros(n + 1, jnp.int32), 0, ids, jnp.zeros(n), jnp.bool_(False)
  state, _, _, _, parent, score, met = jax.lax.while_loop(lambda c: ~c[-1] & (c[1] < n).any(), body, start)
  return state, parent, score, met


def _last_merges(state, parent, score, budget):
  """The fewest of the round's merges, best first, that meet the budget (found by halving)."""
  order = np.argsort(-score, kind="stable")[: int((score > -np.inf).sum())]

  def first(count):
    chosen = np.arange(state.nodes, dtype=np.int32)
    chosen[order[:count]] = parent[order[:count]]
    return _merge(state, jnp.asarray(chosen))

  low, high = 0, len(order)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if float(_bits(first(middle))) <= budget else (middle, high)
  return first(high)


def _shrink(state: State) -> State:
  """Halves the list of blocks while more than half of it is empty: few shapes to compile, less to sort."""
  blocks, used = len(state.source), int(jnp.sum(state.source < state.nodes))
  while used <= blocks // 2 and blocks >= 4 * _GRANULE:
    blocks = -(-blocks // (2 * _GRANULE)) * _GRANULE
  cut = {name: getattr(state, name)[:blocks] for name in ("source", "target", "count", "keep")}
  return dataclasses.replace(state, **cut)


def to_summary(state: State) -> Summary:
  """The kept superedges of a state, with all supernodes that have none made one."""
  source, target, keep = (np.asarray(x) for x in (state.source, state.target, state.keep))
  chosen = keep & (source <= target) & (source < state.nodes)
  representatives, labels = np.unique(np.asarray(state.labels), return_inverse=True)
  position = lambda ids: np.searchsorted(representatives, ids)
  weight = np.asarray(state.count)[chosen].astype(np.int64)
  whole = Summary(
    state.nodes, labels.reshape(-1), position(source[chosen]), position(target[chosen]), weight, float(state.w_max)
  )
  return summaries.select(whole, np.arange(len(weight)))


def finish(state: State, budget: float, *, sparsify: bool = True) -> Summary:
  """Drops the blocks flagged sparse, then superedges by their error until Size <= budget."""
  summary = to_summary(state)
  if summary.bits() > budget and sparsify:
    summary = further_sparsify(summary, budget, error=state.error)
  require(
    summary.bits() <= budget,
    f"the budget of {budget:.0f} bits is infeasible: the {len(summary.sizes)} supernodes need {summary.bits():.0f}; "
    "raise the budget or the iterations",
  )
  return summary


def further_sparsify(summary: Summary, budget: float, *, error: str) -> Summary:
  """Drops the fewest superedges, least harm first, that bring Size under the budget.

  Harm of dropping a block, up to a common factor: (2 sigma - 1) E for RE1, E^2 / Pi for RE2. Supernodes left without a
  superedge become one, which makes |S| and so every superedge cheaper: the number is found by halving.
  """
  weight = summary.weight.astype(float)
  harm = (2 * weight / summary.pairs - 1) * weight if error == "re1" else weight**2 / summary.pairs
  order = np.argsort(harm, kind="stable")
  low, high = -1, len(order)
  while high - low > 1:
    middle = (low + high) // 2
    fits = summaries.select(summary, order[middle:]).bits() <= budget
    low, high = (low, middle) if fits else (middle, high)
  return summaries.select(summary, order[high:])
