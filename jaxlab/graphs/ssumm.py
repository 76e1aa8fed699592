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

Here all groups advance together and the state is a list of blocks (`ssumm_blocks`): the supernodes of a group are put
on a random cycle, every neighbouring pair is scored, and of those that beat both their neighbours on the cycle the best
`share` merge at once (0: the best one, as published). Once half of the blocks are of groups that have given up, the
others go on without them. `ssumm_host` is the sequential algorithm, one group and one merge after the other.

  graph = common.load("edge_list", path="facebook.txt")
  summary = ssumm.summarise(graph, jax.random.key(0), budget=0.2 * graph_bits(graph))
  summary.errors(edges=len(graph.edges)), summary.neighbours(0)
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlab.core.checks import require, require_choice, require_key
from jaxlab.graphs import ssumm_blocks
from jaxlab.graphs import summary as summaries
from jaxlab.graphs.common import Graph
from jaxlab.graphs.ssumm_blocks import GRANULE, State, initial_state, merge, propose, state_bits
from jaxlab.graphs.summary import Summary

GROUPS = ("shingles", "random")
FAIL_RULES = ("code", "paper")
_SMALLEST = 2**14  # blocks; to go on with fewer saves less time than another compilation takes


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
    InputError: an unknown option, no key, a directed or empty graph, a budget that is a ratio or too small to reach.
  """
  check_budget(budget)
  require_key(key)
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
    return dataclasses.replace(finish(state, budget, sparsify=drop), names=graph.names)


def check_budget(budget: float) -> None:
  """Raises InputError for a budget that is no number of bits."""
  require(
    budget > 1, f"the budget is {budget:g} bits; for a share of the graph's own size give share * graph_bits(graph)"
  )


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
  # A group that may not fail at all, of two by the code's rule, is not looked at.
  group = jnp.asarray(np.where(limit[group] > 0, group, state.nodes))
  progress = Progress(group, jnp.zeros(state.nodes + 1, jnp.int32), jnp.asarray(limit), jnp.int32(0))
  return _settle(state, progress, key, theta, budget, share)


class Progress(NamedTuple):
  """Of every representative its group (`rows` for none), of every group its failures and how many it may have."""

  group: Int[Array, "rows"]
  fails: Int[Array, "groups"]
  limit: Int[Array, "groups"]
  step: Int[Array, ""]


def _settle(state, progress, key, theta, budget, share):
  """Runs rounds; once few blocks are in rows that still take part, it goes on with these alone."""
  blocks = len(state.source)
  floor = blocks // 4 if blocks >= 2 * _SMALLEST else 0
  while True:
    state, progress, parent, score, met = _merge_rounds(state, progress, key, theta, budget, share, floor)
    if met:
      return _last_merges(state, np.asarray(parent), np.asarray(score), budget)
    rows = len(progress.group)
    active = jnp.zeros(state.nodes, bool).at[:rows].set(progress.group < rows)
    rows, nodes, few = (int(x) for x in ssumm_blocks.sizes(state, active))
    if not rows:
      return state
    room = _SMALLEST
    while room < max(few, 2 * nodes, 4 * rows):
      room *= 4
    if room <= blocks // 2:
      small, ids = ssumm_blocks.extract(state, active, nodes=room // 2, blocks=room)
      small = _settle(small, _narrow(progress, ids, rows=room // 4), key, theta, budget, share)
      return ssumm_blocks.absorb(state, small, ids, active)
    floor //= 2


@functools.partial(jax.jit, static_argnames="rows")
def _narrow(progress, ids, *, rows):
  """Progress of the first `rows` of the extracted nodes `ids`, groups numbered anew."""
  old = progress.group.at[ids[:rows]].get(mode="fill", fill_value=len(progress.group))
  real = old < len(progress.group)
  used = jnp.zeros(len(progress.fails), bool).at[jnp.where(real, old, len(progress.fails))].set(True, mode="drop")
  number = jnp.cumsum(used) - 1
  group = jnp.where(real, number[jnp.minimum(old, len(number) - 1)], rows).astype(jnp.int32)
  of_group = lambda values: (
    jnp.zeros(rows + 1, jnp.int32).at[jnp.where(used, number, rows + 1)].set(values, mode="drop")
  )
  return Progress(group, of_group(progress.fails), of_group(progress.limit), progress.step)


@jax.jit
def _merge_rounds(state, progress, key, theta, budget, share, floor):
  """(state, progress, parent, score, met): met if merging `parent` into that state would meet the budget.

  Ends as well when at most `floor` blocks are in rows that take part; 0: never, supernodes may have no blocks.
  """
  rows = len(progress.group)

  def body(carry):
    state, (group, fails, limit, step), *_ = carry
    parent, score, merged = propose(state, group, jax.random.fold_in(key, step), theta, share)
    successor = merge(state, parent)
    met = state_bits(successor) <= budget
    success = jnp.zeros(rows + 1, bool).at[group].max(merged)
    fails = jnp.where(success, 0, fails + 1)
    group = jnp.where((successor.size[:rows] > 0) & (fails < limit)[group], group, rows)
    group = jnp.where(jnp.bincount(group, length=rows + 1)[group] < 2, rows, group)
    state = jax.tree.map(functools.partial(jnp.where, met), state, successor)
    return state, Progress(group, fails, limit, step + 1), parent, score, met

  def runs(carry):
    state, progress, *_, met = carry
    active = jnp.sum((progress.group < rows).at[state.source].get(mode="fill", fill_value=False))
    return ~met & (progress.group < rows).any() & ((active > floor) | (floor == 0))

  start = state, progress, jnp.arange(rows, dtype=jnp.int32), jnp.zeros(rows), jnp.bool_(False)
  return jax.lax.while_loop(runs, body, start)


def _last_merges(state, parent, score, budget):
  """The fewest of the round's merges, best first, that meet the budget (found by halving)."""
  order = np.argsort(-score, kind="stable")[: int((score > -np.inf).sum())]

  def first(count):
    chosen = np.arange(len(parent), dtype=np.int32)
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
  while used <= blocks // 2 and blocks >= 4 * GRANULE:
    blocks = -(-blocks // (2 * GRANULE)) * GRANULE
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
