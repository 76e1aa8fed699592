"""MAKER: a long task in its smallest steps, each decided by votes until one answer is k ahead; what that costs.

Meyerson et al. 2025, arXiv 2511.09030. A step's samples are right with probability p = 1 - eps, or all give the same
wrong answer: the first to be k votes ahead wins, and that is a gambler's ruin with r = eps / p. A sample that is not in
the format or too long (a red flag) is no vote and is drawn again.

  k = k_min(0.003, target=0.95, steps=2**20 - 1)            # 4 votes ahead, for 95 % without one wrong step
  expected_votes(0.003, k)                                  # 4.02 a step
  found = decide(sample, model, 2**20 - 1, margin=k, key=key, width=65536)

`decide` votes on many independent steps at once. A run from one step to the next would ask about the same states as
long as nothing wrong was decided, so all steps whose inputs are known can be voted on side by side, and the chain of
their answers checked afterwards. `follow` is the run itself, step after step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxlab.core.checks import require, require_choice, require_counts

RULES = ("ahead", "first", "majority")  # ahead by `margin`; first to `margin` votes; most of `margin` votes
_NARROWER = 16  # a pool shrinks to this part of its width once no more rows are busy


def step_success(eps: float, k: int) -> float:
  """1 / (1 + r^k): the probability that a step is decided rightly."""
  return float(np.exp(-_log_odds(eps, k)))


def success(eps: float, k: int, steps: int, *, m: int = 1) -> float:
  """(1 + r^k)^(-steps / m): that all are, by agents of m steps each whose wrong answers differ in one step."""
  require_counts(k=k, steps=steps, m=m)
  return float(np.exp(-steps / m * _log_odds(eps, k)))


def success_of(eps: Float[np.ndarray, "steps"], k: int) -> float:
  """prod_i 1 / (1 + r_i^k): that all are, where steps differ. One eps_i of 1/2 or more is fatal whatever k is."""
  return float(np.exp(-np.sum([_log_odds(value, k) for value in np.asarray(eps, float)])))


def _log_odds(eps, k):
  """log(1 + r^k), with no overflow at eps = 1."""
  require(0 <= eps <= 1, f"eps is {eps}; it must lie in 0..1")
  require_counts(k=k)
  with np.errstate(divide="ignore"):
    return float(np.logaddexp(0.0, k * (np.log(np.float64(eps)) - np.log1p(-np.float64(eps)))))


def k_min(eps: float, *, target: float, steps: int, m: int = 1) -> int:
  """The smallest margin with `success` of `target` or more: ceil(ln(target^(-m / steps) - 1) / ln r).

  The difference is taken by expm1, in float64: at a million steps float32 has no digit of it.

  Raises:
    InputError: eps of 1/2 or more, for which there is none; target outside 0 < target < 1.
  """
  require(0 <= eps < 0.5, f"eps is {eps}; voting needs samples that are right more often than not (eps < 0.5)")
  require(0 < target < 1, f"target is {target}; it must lie between 0 and 1")
  require_counts(steps=steps, m=m)
  if eps == 0:
    return 1
  log_r = np.log(np.float64(eps)) - np.log1p(-np.float64(eps))
  return max(1, int(np.ceil(np.log(np.expm1(-m / steps * np.log(np.float64(target)))) / log_r)))


def expected_votes(eps: float, k: int) -> float:
  """k (2 P - 1) / (2 p - 1) with P = `step_success`: votes until a step is decided; k^2 at eps = 1/2."""
  right = step_success(eps, k)
  return float(k * k if eps == 0.5 else k * (2 * right - 1) / (1 - 2 * eps))


def undecided(eps: float, k: int, votes: int) -> Float[np.ndarray, "votes_1"]:
  """The probability that 0, 1, ..., `votes` votes have not decided a step; their sum is `expected_votes`.

  The exact chain of leads -k + 1 .. k - 1. It falls like (2 sqrt(p eps) cos(pi / (2 k)))^votes.
  """
  require(0 <= eps <= 1, f"eps is {eps}; it must lie in 0..1")
  require_counts(k=k)
  lead = np.zeros(2 * k + 1)  # the ends are the two decisions
  lead[k] = 1.0
  left = [1.0]
  for _ in range(votes):
    inner = lead[1:-1]
    lead = np.zeros_like(lead)
    lead[2:] += (1 - eps) * inner
    lead[:-2] += eps * inner
    lead[0] = lead[-1] = 0.0
    left.append(lead.sum())
  return np.array(left)


def expected_cost(eps: float, *, target: float, steps: int, m: int = 1, valid: float = 1.0, cost: float = 1.0) -> float:
  """cost steps k_min / (valid p^(m-1) (2 p - 1)): of a whole run, for a cost of one step of a sample.

  Of agents of m steps the fraction p^(m-1) of votes counts, the two answers whose race decides; each costs m steps.

  Args:
    valid: the share of samples without a red flag.
  """
  require(0 < valid <= 1, f"valid is {valid}; it must lie in 0 < valid <= 1")
  k, p = k_min(eps, target=target, steps=steps, m=m), 1 - eps
  return float(cost * steps * k / (valid * p ** (m - 1) * (2 * p - 1)))


class Ballot(NamedTuple):
  """Votes on a batch of steps: what was said (64 bits each) and how often; slots with count 0 are empty."""

  said: UInt32[Array, "batch slots 2"]
  count: Int[Array, "batch slots"]
  lost: Int[Array, "batch"]  # votes for answers that were dropped for want of a slot


def empty_ballot(batch: int, slots: int = 8) -> Ballot:
  """No votes yet."""
  require(slots >= 2, f"slots is {slots}; a vote needs at least 2")
  zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
  return Ballot(jnp.zeros((batch, slots, 2), jnp.uint32), zeros((batch, slots)), zeros(batch))


def add_vote(
  ballot: Ballot, said: UInt32[Array, "batch 2"], valid: Bool[Array, "batch"]
) -> tuple[Ballot, Int[Array, "batch"], Int[Array, "batch"]]:
  """(ballot with a vote more a row; that answer's count; its lead over the best other one). No vote: 0 and 0.

  An answer without a free slot takes the place of the one that has fewest votes.
  """
  mine = (ballot.said == said[:, None]).all(axis=-1) & (ballot.count > 0)
  known = mine.any(axis=-1)
  slot = jnp.where(known, jnp.argmax(mine, axis=-1), jnp.argmin(ballot.count, axis=-1))
  here = jnp.arange(ballot.count.shape[1]) == slot[:, None]
  before = jnp.where(here, ballot.count, 0).sum(axis=-1)
  votes = jnp.where(valid, jnp.where(known, before + 1, 1), 0)
  write = here & valid[:, None]
  count = jnp.where(write, votes[:, None], ballot.count)
  lost = ballot.lost + jnp.where(valid & ~known, before, 0)
  lead = votes - jnp.where(here, 0, ballot.count).max(axis=-1)
  grown = Ballot(jnp.where(write[..., None], said[:, None], ballot.said), count, lost)
  return grown, votes, jnp.where(valid, lead, 0)


def winner(ballot: Ballot) -> UInt32[Array, "batch 2"]:
  """The answer with most votes; of equal ones that of the first slot."""
  best = jnp.argmax(ballot.count, axis=-1)
  return jnp.take_along_axis(ballot.said, best[:, None, None], axis=1)[:, 0]


def _is_decided(rule, ballot, votes, lead, margin):
  """By the index of a rule: all of them in one program."""
  return jnp.stack([lead, votes, ballot.count.sum(axis=-1)])[rule] >= margin


class Decided(NamedTuple):
  """What was decided of every item, and at what price (NumPy).

  said: uint32[items, 2]; votes, flagged: int32[items], samples that counted and that did not; capped: items that ended
  at the most samples; lost: votes dropped for want of a slot; samples: rows computed, idle ones included.
  """

  said: np.ndarray
  votes: np.ndarray
  flagged: np.ndarray
  capped: int
  lost: int
  samples: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Pool:
  """Rows, each busy with an item (or idle: -1), and what is known of all items; row `items` takes what is idle."""

  item: Int[Array, "width"]
  tries: Int[Array, "width"]
  ballot: Ballot
  next: Int[Array, ""]
  rounds: Int[Array, ""]
  said: UInt32[Array, "items_1 2"]
  votes: Int[Array, "items_1"]
  flagged: Int[Array, "items_1"]
  capped: Int[Array, ""]
  lost: Int[Array, ""]


Sample = Callable[..., tuple[Array, Array]]


def decide(
  sample: Sample,
  context,
  items: int,
  *,
  margin: int,
  key: jax.Array,
  width: int,
  rule: str = "ahead",
  slots: int = 8,
  most: int = 10_000,
  capacity: int | None = None,
  stretch: int = 64,
  progress: Callable[[int], None] = lambda done: None,
) -> Decided:
  """Votes on items 0 .. `items` - 1 until each is decided, a batch of `width` samples at a time.

  A row that has decided its item takes up the next one at once, so that no sample goes to a decided item and, until the
  items run out, none to nothing; then the rows that are left move into a narrower batch.

  Args:
    sample: `(context, item: int32[width], tries: int32[width], key) -> (said: uint32[width, 2], flagged: bool[width])`,
      pure; a function of its own for every program (it is compiled in). tries: samples of this item so far.
    context: what `sample` reads (a model, temperatures): any tree of arrays.
    margin: votes ahead of every other answer; by the other RULES the votes of the first to have them, or of all.
    most: samples an item may take, flagged ones included; the answer that then leads is taken.
    capacity: items that results are kept for, so that runs of different lengths are one program; `items` by default.
    stretch: rounds between two calls of `progress(items decided)`.

  Raises:
    InputError: an unknown rule, counts below 1, or more items than the capacity.
  """
  require_choice("rule", rule, RULES)
  require_counts(items=items, margin=margin, width=width, most=most, stretch=stretch)
  capacity = items if capacity is None else capacity
  require(items <= capacity, f"capacity is {capacity}; it must be at least {items}, the items")
  pool, samples, narrowed = _start(width, items, slots, capacity), 0, False
  while True:
    before = int(pool.rounds)
    floor = 0 if narrowed else width // _NARROWER
    numbers = (items, RULES.index(rule), margin, most, before + stretch, floor)
    pool = _run(sample, context, pool, key, tuple(map(jnp.int32, numbers)))
    samples += (int(pool.rounds) - before) * len(pool.item)
    busy = int((pool.item >= 0).sum())
    progress(int(pool.next) - busy)
    if int(pool.next) == items and busy == 0:
      break
    if not narrowed and int(pool.next) == items and busy <= floor:
      pool, narrowed = _narrow(pool, floor), True
  said, votes, flagged = (np.asarray(a)[:items] for a in (pool.said, pool.votes, pool.flagged))
  return Decided(said, votes, flagged, int(pool.capped), int(pool.lost), samples)


def _start(width, items, slots, capacity):
  zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
  item = jnp.where(jnp.arange(width) < items, jnp.arange(width), -1)
  results = (jnp.zeros((capacity + 1, 2), jnp.uint32), zeros(capacity + 1), zeros(capacity + 1))
  count = jnp.int32(min(width, items))
  return _Pool(item, zeros(width), empty_ballot(width, slots), count, zeros(()), *results, zeros(()), zeros(()))


def _narrow(pool: _Pool, width: int) -> _Pool:
  rows = jnp.argsort(pool.item < 0, stable=True)[:width]
  take = lambda tree: jax.tree.map(lambda a: a[rows], tree)
  return dataclasses.replace(pool, item=take(pool.item), tries=take(pool.tries), ballot=take(pool.ballot))


@functools.partial(jax.jit, static_argnames="sample", donate_argnames="pool")
def _run(sample, context, pool: _Pool, key, numbers):
  """Rounds until `until`, or no more than `floor` rows are busy and no item waits."""
  items, rule, margin, most, until, floor = numbers

  def unfinished(pool):
    return (pool.rounds < until) & ((pool.next < items) | ((pool.item >= 0).sum() > floor))

  def one(pool):
    busy = pool.item >= 0
    said, flagged = sample(context, jnp.maximum(pool.item, 0), pool.tries, jax.random.fold_in(key, pool.rounds))
    ballot, votes, lead = add_vote(pool.ballot, said, busy & ~flagged)
    tries = pool.tries + busy
    ruled = _is_decided(rule, ballot, votes, lead, margin)
    ended = busy & (ruled | (tries >= most))
    place = jnp.where(ended, pool.item, len(pool.votes) - 1)
    all_votes = ballot.count.sum(axis=-1) + ballot.lost
    new = pool.next + jnp.cumsum(ended) - 1
    item = jnp.where(ended, jnp.where(new < items, new, -1), pool.item)
    fresh = lambda a: jnp.where(ended.reshape(-1, *[1] * (a.ndim - 1)), 0, a).astype(a.dtype)
    return _Pool(
      item,
      fresh(tries),
      jax.tree.map(fresh, ballot),
      jnp.minimum(pool.next + ended.sum(), items),
      pool.rounds + 1,
      pool.said.at[place].set(winner(ballot)),
      pool.votes.at[place].set(all_votes),
      pool.flagged.at[place].set(tries - all_votes),
      pool.capped + (ended & ~ruled).sum(),
      pool.lost + jnp.where(ended, ballot.lost, 0).sum(),
    )

  return jax.lax.while_loop(unfinished, one, pool)


class Followed(NamedTuple):
  """Independent runs from step to step: the last states, and of every step what was decided and its votes."""

  state: object
  said: UInt32[Array, "steps batch 2"]
  votes: Int[Array, "steps batch"]
  flagged: Int[Array, "steps batch"]


def follow(
  sample: Callable,
  context,
  state,
  *,
  steps: int,
  margin: int,
  key: jax.Array,
  slots: int = 8,
  most: int = 10_000,
) -> Followed:
  """The sequential run: every step's input is the state that the vote before it decided, right or wrong.

  Args:
    sample: `(context, state, tries, key) -> (said, flagged, state after it)`, a sample for every row of `state`.
    state: a tree of arrays with a leading axis of independent runs.
    most: samples a step may take; the answer of the last one is taken then.

  Raises:
    InputError: counts below 1.
  """
  require_counts(steps=steps, margin=margin, most=most)
  batch = len(jax.tree.leaves(state)[0])

  def step(state, number):
    def one(carry):
      after, ballot, said, done, tries, votes = carry
      drawn = functools.partial(jax.random.fold_in, jax.random.fold_in(key, number))
      new, flagged, moved = sample(context, state, tries, drawn(tries.max()))
      ballot, _, lead = add_vote(ballot, new, ~done & ~flagged)
      ended = ~done & ((lead >= margin) | (tries + 1 >= most))
      keep = lambda a, b: jnp.where(ended.reshape(-1, *[1] * (a.ndim - 1)), b, a)
      after = jax.tree.map(keep, after, moved)
      votes = votes + (~done & ~flagged)
      return after, ballot, keep(said, new), done | ended, tries + ~done, votes

    zeros = jnp.zeros(batch, jnp.int32)
    start = (state, empty_ballot(batch, slots), jnp.zeros((batch, 2), jnp.uint32), zeros > 0, zeros, zeros)
    after, _, said, _, tries, votes = jax.lax.while_loop(lambda carry: ~carry[3].all(), one, start)
    return after, (said, votes, tries - votes)

  state, found = jax.lax.scan(step, state, jnp.arange(steps))
  return Followed(state, *found)
