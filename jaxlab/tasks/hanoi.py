"""The Towers of Hanoi as 2^n - 1 dependent steps: states, the rule of a step, and both as tokens of a small model.

Disks 1 (the smallest) .. n start on peg 0. The rule: if the last move was not disk 1's, move disk 1 one peg on
(0 -> 1 -> 2 -> 0), otherwise make the only legal move of another disk. The tower ends on peg 2 if n is even, on peg 1
if it is odd. A step sees the disk of the last move (0: none) and the state; it answers a move and the next state:

  P <disk|none> S <disks of peg 0, bottom first> | <peg 1> | <peg 2> ?  M <disk> <from> <to> N <peg 0> | <1> | <2> .

Turning the pegs, and giving the disks other names in the same order, changes nothing about the rule: `Names` are drawn
for a question and taken back from its answer, so that the samples of one step err independently.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from jaxlab.core.checks import require, require_choice

PAD, LAST, NONE, STATE, BAR, ASK, MOVE, NEXT, STOP = range(9)
PEG = 9
DISK = PEG + 2  # plus the name of a disk, 1 or more
RENAMED = ("nothing", "pegs", "pegs and disks")
_MULTIPLIERS = (2654435761, 2246822519)  # of the two fingerprints


class State(NamedTuple):
  """Where the disks are, and which one was moved last.

  pegs: 0..2, or 3 where there is no such disk; place: disks under it in its peg's list; last: a disk, or 0.
  """

  pegs: Int[Array, "*batch n"]
  place: Int[Array, "*batch n"]
  last: Int[Array, "*batch"]


class Names(NamedTuple):
  """Peg p is called (p + turn) mod 3 and disk d disks[d - 1]; disk names ascend, disk 1 is called 1."""

  turn: Int[Array, "*batch"]
  disks: Int[Array, "*batch n"]


class Answer(NamedTuple):
  """What a sample says, its names taken back. Nothing but the format was looked at.

  move: (disk, from, to); flagged: not in the format, or longer than allowed; length: tokens up to the full stop, or of
  the whole sample if it has none.
  """

  move: Int[Array, "batch 3"]
  pegs: Int[Array, "batch n"]
  place: Int[Array, "batch n"]
  flagged: Bool[Array, "batch"]
  length: Int[Array, "batch"]


def vocabulary(names: int) -> int:
  """Tokens there are, with disk names 1 .. `names`."""
  return DISK + names + 1


def state_before(step: Int[Array, "*batch"], disks: int, present: Int[Array, "*batch"] | None = None) -> State:
  """The state before step 0, 1, ...: disk d has moved (step + 2^(d-1)) >> d times, odd disks one peg on, others back.

  Args:
    step: up to 2^n - 1, before which the tower has moved.
    disks: n, at most 30, so that int32 holds it all.
    present: how many of them there are, the smallest ones; all by default.

  Raises:
    InputError: disks out of range, or steps, unless a transformation hides them.
  """
  require(1 <= disks <= 30, f"disks is {disks}; it must lie in 1..30")
  if not isinstance(step, jax.core.Tracer):
    known = np.asarray(step)
    low, high = known.min(initial=0), known.max(initial=0)
    require(low >= 0 and high < 2**disks, f"steps are {low}..{high}; {disks} disks have 0..{2**disks - 1}")
    step = jnp.asarray(step)
  disk = jnp.arange(1, disks + 1)
  moves = (step[..., None] + (1 << (disk - 1))) >> disk
  pegs = jnp.where(disk % 2 == 1, moves, -moves) % 3
  if present is not None:
    pegs = jnp.where(disk <= present[..., None], pegs, 3)
  zeros = jax.lax.population_count((step & -step) - 1)  # at the end of the binary number: what step - 1 moved
  return State(pegs, places(pegs), jnp.where(step > 0, zeros + 1, 0))


def places(pegs: Int[Array, "*batch n"]) -> Int[Array, "*batch n"]:
  """How many larger disks are on a disk's peg: its place in a list of the peg, bottom first."""
  same = pegs[..., :, None] == pegs[..., None, :]
  return jnp.triu(same, k=1).sum(axis=-1)


def take_step(state: State) -> tuple[Int[Array, "*batch 3"], State]:
  """The move (disk, from, to) by the rule, and the state after it.

  Disk 1 moves too where the rule asks for another one and all others lie under it.

  Raises:
    InputError: no state, as `require_state`.
  """
  require_state(state)
  mine = state.pegs[..., 0]
  first, second = (mine + 1) % 3, (mine + 2) % 3
  tops = top_disks(state.pegs)
  top = lambda peg: jnp.take_along_axis(tops, peg[..., None], axis=-1)[..., 0]
  other, swap = jnp.minimum(top(first), top(second)), top(first) > top(second)
  smallest = (state.last != 1) | (other > state.pegs.shape[-1])
  disk = jnp.where(smallest, 1, other)
  source = jnp.where(smallest, mine, jnp.where(swap, second, first))
  target = jnp.where(smallest | swap, first, second)
  move = jnp.stack([disk, source, target], axis=-1)
  return move, moved(state, move)


def require_state(state: State) -> None:
  """Raises InputError where the arrays are no state: other pegs than 0..3, a disk that is missing below a larger one,
  places that do not follow from the pegs, or a last move of a disk that there is not. Under a transformation, which
  hides the values, nothing is looked at."""
  if any(isinstance(a, jax.core.Tracer) for a in state):
    return
  pegs, last = np.asarray(state.pegs), np.asarray(state.last)
  require(((pegs >= 0) & (pegs <= 3)).all(), f"pegs are {pegs.min()}..{pegs.max()}; they must lie in 0..3")
  there = pegs < 3
  require((there[..., :-1] >= there[..., 1:]).all(), "a disk is missing (peg 3) below a larger one; the largest may be")
  larger = np.triu(pegs[..., :, None] == pegs[..., None, :], k=1).sum(axis=-1)
  require((np.asarray(state.place) == larger).all(), "places do not follow from the pegs; take hanoi.places(pegs)")
  count = there.sum(axis=-1)
  require(((last >= 0) & (last <= count)).all(), f"the last moves are of disks {last.min()}..{last.max()}, not 0..n")


def moved(state: State, move: Int[Array, "*batch 3"]) -> State:
  """The state after a move, whether legal or not."""
  disk, _, target = jnp.moveaxis(move, -1, 0)
  mine = jnp.arange(1, state.pegs.shape[-1] + 1) == disk[..., None]
  pegs = jnp.where(mine, target[..., None], state.pegs)
  return State(pegs, places(pegs), disk)


def top_disks(pegs: Int[Array, "*batch n"]) -> Int[Array, "*batch 3"]:
  """The smallest disk of each peg, n + 1 for an empty one."""
  disks = pegs.shape[-1]
  on = pegs[..., None, :] == jnp.arange(3)[:, None]
  return jnp.where(on, jnp.arange(1, disks + 1), disks + 1).min(axis=-1)


def legal(pegs: Int[Array, "*batch n"], move: Int[Array, "*batch 3"]) -> Bool[Array, "*batch"]:
  """Whether the disk is the top of the peg it leaves and the peg it goes to is another one with no smaller disk."""
  disk, source, target = jnp.moveaxis(move, -1, 0)
  tops = top_disks(pegs)
  top = lambda peg: jnp.take_along_axis(tops, jnp.clip(peg, 0, 2)[..., None], axis=-1)[..., 0]
  inside = (source >= 0) & (source < 3) & (target >= 0) & (target < 3) & (source != target)
  return inside & (disk >= 1) & (top(source) == disk) & (top(target) > disk)


def draw_names(key: jax.Array, batch: int, disks: int, *, names: int, renamed: str) -> Names:
  """Names for a batch of questions: `renamed` says of what they are drawn, the rest is called as it is.

  Raises:
    InputError: an unknown `renamed`, or fewer names than disks.
  """
  require_choice("renamed", renamed, RENAMED)
  require(names >= disks, f"names is {names}; {disks} disks need as many")
  turns, chosen = jax.random.split(key)
  turn, called = jnp.zeros(batch, jnp.int32), jnp.broadcast_to(jnp.arange(1, disks + 1), (batch, disks))
  if renamed != "nothing":
    turn = jax.random.randint(turns, (batch,), 0, 3)
  if renamed == "pegs and disks":
    _, rest = jax.lax.top_k(jax.random.uniform(chosen, (batch, names - 1)), disks - 1)
    called = jnp.concatenate([called[:, :1], jnp.sort(rest, axis=1) + 2], axis=1)
  return Names(turn, called)


def encode(state: State, names: Names) -> Int[Array, "batch length"]:
  """The question about a state with all n disks: int32[batch, n + 6].

  Raises:
    InputError: no state, as `require_state`, or one that lacks a disk.
  """
  require_state(state)
  whole = isinstance(state.pegs, jax.core.Tracer) or (np.asarray(state.pegs) < 3).all()
  require(whole, "a state lacks a disk; ask about states of all n")
  batch, disks = state.pegs.shape
  return _question(jnp.zeros((batch, disks + 6), jnp.int32), state, names)[0]


def encode_answered(
  state: State,
  names: Names,
  move: Int[Array, "batch 3"],
  after: State,
  *,
  thought: Int[Array, "batch thought"] | None = None,
) -> tuple[Int[Array, "batch length"], Int[Array, "batch"]]:
  """(question and answer, padded at their ends; where each answer begins).

  Args:
    thought: tokens before the answer's first, padding at their ends left out.
  """
  batch, disks = state.pegs.shape
  longest = 0 if thought is None else thought.shape[1]
  tokens, start = _question(jnp.zeros((batch, 2 * disks + 14 + longest), jnp.int32), state, names)
  at, row = start, jnp.arange(batch)
  if thought is not None:
    where = jnp.where(thought != PAD, start[:, None] + jnp.arange(longest), tokens.shape[1])
    tokens = tokens.at[row[:, None], where].set(thought, mode="drop")
    at = at + (thought != PAD).sum(axis=1)
  disk, source, target = move.T
  peg = lambda p: PEG + (p + names.turn) % 3
  for i, token in enumerate((MOVE, _disk(names, disk), peg(source), peg(target), NEXT)):
    tokens = tokens.at[row, at + i].set(token)
  tokens, end = _lists(tokens, at + 5, after, names)
  return tokens.at[row, end].set(STOP), start


def _question(tokens, state: State, names: Names):
  """(tokens with the question at their start, where it ends)."""
  tokens = tokens.at[:, 0].set(LAST).at[:, 2].set(STATE)
  tokens = tokens.at[:, 1].set(jnp.where(state.last > 0, _disk(names, state.last), NONE))
  tokens, end = _lists(tokens, jnp.full(len(tokens), 3), state, names)
  return tokens.at[jnp.arange(len(tokens)), end].set(ASK), end + 1


def _disk(names: Names, disk):
  return DISK + jnp.take_along_axis(names.disks, jnp.maximum(disk, 1)[:, None] - 1, axis=1)[:, 0]


def _lists(tokens, start, state: State, names: Names):
  """(tokens with the lists of the three pegs from `start` on, where they end)."""
  row, there = jnp.arange(len(tokens)), state.pegs < 3
  pegs = jnp.where(there, (state.pegs + names.turn[:, None]) % 3, 3)
  sizes = (pegs[..., None] == jnp.arange(3)).sum(axis=1)
  before = jnp.cumsum(sizes, axis=1) - sizes  # disks on earlier pegs
  begin = start[:, None] + before + jnp.arange(3)
  where = jnp.take_along_axis(begin, jnp.minimum(pegs, 2), axis=1) + state.place
  tokens = tokens.at[row[:, None], jnp.where(there, where, tokens.shape[1])].set(DISK + names.disks, mode="drop")
  for peg in (0, 1):
    tokens = tokens.at[row, begin[:, peg] + sizes[:, peg]].set(BAR)
  return tokens, begin[:, 2] + sizes[:, 2]


def decode(tokens: Int[Array, "batch length"], names: Names, *, longest: int | None = None) -> Answer:
  """Reads samples: the last M before the first full stop, three entries, N, and lists that hold every disk once.

  Args:
    longest: tokens a sample may have; longer ones, and those without a full stop, are flagged.
  """
  length = tokens.shape[1]
  disks = names.disks.shape[1]
  stops = tokens == STOP
  end = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1), length)
  position = jnp.arange(length)
  start = jnp.max(jnp.where((tokens == MOVE) & (position < end[:, None]), position, -1), axis=1)
  padded = jnp.pad(tokens, ((0, 0), (0, disks + 8)))
  window = jnp.take_along_axis(padded, jnp.maximum(start, 0)[:, None] + jnp.arange(disks + 8), axis=1)
  disk = (window[:, 1, None] == DISK + names.disks).astype(jnp.int32) @ jnp.arange(1, disks + 1)
  ends = window[:, 2:4] - PEG
  lists = window[:, 5:-1]
  bars = jnp.cumsum(lists == BAR, axis=1)
  here = lists[:, :, None] == DISK + names.disks[:, None, :]  # (batch, entry, disk)
  at = jnp.argmax(here, axis=1)
  peg = jnp.take_along_axis(bars, at, axis=1)
  begin = jnp.stack([jnp.zeros_like(start), *((bars == i).argmax(axis=1) + 1 for i in (1, 2))], axis=1)
  place = at - jnp.take_along_axis(begin, jnp.minimum(peg, 2), axis=1)
  good = (start >= 0) & (disk > 0) & ((ends >= 0) & (ends < 3)).all(axis=1) & (window[:, 4] == NEXT)
  good &= (
    (window[:, -1] == STOP) & (start + disks + 7 == end) & (bars[:, -1] == 2) & (here.sum(axis=1) == 1).all(axis=1)
  )
  size = jnp.minimum(end + 1, length)
  if longest is not None:
    good &= size <= longest
  back = lambda p: (p - names.turn[:, None]) % 3
  move = jnp.concatenate([disk[:, None], back(ends)], axis=1)
  return Answer(move, back(peg), place, ~good, size)


def repaired(tokens: Int[Array, "batch length"], names: Names, state: State) -> Answer:
  """What a forgiving reader makes of samples: what is missing or wrong stays as it was; nothing is flagged.

  Disks keep the first place they are given, those that are given none their peg; lists are put into order.
  """
  read = decode(tokens, names)
  named = (tokens[:, :, None] == DISK + names.disks[:, None, :]).any(axis=1)
  pegs = jnp.where(named & (read.pegs < 3), read.pegs, state.pegs)
  return Answer(read.move, pegs, places(pegs), jnp.zeros_like(read.flagged), read.length)


def fingerprint(answer: Answer) -> UInt32[Array, "batch 2"]:
  """64 bits of the move and the next state as it was written: two polynomials mod 2^32."""
  entries = jnp.concatenate([answer.move, 32 * answer.pegs + answer.place], axis=1).astype(jnp.uint32) + 1
  both = []
  for multiplier in _MULTIPLIERS:
    value = jnp.full(len(entries), multiplier, jnp.uint32)
    for column in entries.T:
      value = (value ^ (value >> 15)) * jnp.uint32(multiplier) + column
    both.append(value)
  return jnp.stack(both, axis=1)


def right_answer(state: State) -> Answer:
  """What the rule says about a state, as an `Answer`."""
  move, after = take_step(state)
  batch = move.shape[0]
  size = jnp.full(batch, state.pegs.shape[1] + 8)
  return Answer(move, after.pegs, after.place, jnp.zeros(batch, bool), size)
