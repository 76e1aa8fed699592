"""Dataset Decomposition: a corpus as buckets of sequences of 2^i tokens, each of one document, and batches of as many
tokens from one bucket at a time (Pouransari et al. 2024, arXiv 2405.13226).

  buckets = decompose(tokens, low=5, high=8, seed=0)
  plan = schedule(buckets.counts, curriculum="grow_p2", cycles=8, batch_tokens=4096, seed=0)
  model = train(model, batches(buckets, plan), loss_fn, optimizer, steps=len(plan), workdir=workdir)

No token attends to another document, no mask is needed, and a batch of short sequences costs less attention. Each cycle
runs out of its likelier buckets first: with growing odds for shorter ones the sequences of a cycle grow.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from jaxlab.core.checks import require, require_choice, require_counts
from jaxlab.data.packing import split_row
from jaxlab.data.tokens import Tokens

# Odds of n buckets, the shortest sequences first.
CURRICULA: Mapping[str, Callable[[int], tuple[float, ...]]] = {
  "uniform": lambda n: (1.0,) * n,
  "grow_linear": lambda n: tuple(float(n - i) for i in range(n)),
  "grow_p2": lambda n: tuple(2.0 ** (n - 1 - i) for i in range(n)),
  "grow_p100": lambda n: tuple(100.0 ** (n - 1 - i) for i in range(n)),
  "shrink_p2": lambda n: tuple(2.0**i for i in range(n)),
}


class Piece(NamedTuple):
  """2^exponent + 1 tokens of a document from `start` on: inputs and their next tokens."""

  start: int
  exponent: int


def cut(length: int, low: int, high: int, rng: np.random.Generator | None = None) -> list[Piece]:
  """A document's pieces, largest first, one behind the other without overlap.

  Of `left` tokens the next piece has the largest exponent whose 2^i + 1 tokens are there; beyond `high` one of
  low .. high drawn with probability ~ 2^(high - i), so that long documents give every bucket as many tokens, or `high`
  itself without `rng`. A rest of 2^low tokens or fewer is left out.

  Raises:
    InputError: a negative length, or not 0 <= low <= high.
  """
  require(length >= 0, f"a document has {length} tokens; it must have 0 or more")
  _require_range(low, high)
  pieces, start = [], 0
  while (left := length - start) > 1:
    exponent = (left - 1).bit_length() - 1
    if exponent < low:
      break
    if exponent > high:
      exponent = high if rng is None else int(_drawn(rng, low, high, 1)[0])
    pieces.append(Piece(start, exponent))
    start += 2**exponent + 1
  return pieces


def count_pieces(lengths: np.ndarray, low: int, high: int, rng: np.random.Generator | None = None) -> dict[int, int]:
  """{exponent: pieces} that `cut` makes of documents of these lengths, all at once: statistics without tokens."""
  _require_range(low, high)
  left, counts = np.asarray(lengths, np.int64), np.zeros(high + 1, np.int64)
  while (left := left[left > 2**low]).size:
    exponent = np.frexp((left - 1).astype(np.float64))[1] - 1  # exact below 2^53
    beyond = exponent > high
    exponent[beyond] = high if rng is None else _drawn(rng, low, high, int(beyond.sum()))
    counts += np.bincount(exponent, minlength=high + 1)
    left = left - 2**exponent - 1
  return {i: int(counts[i]) for i in range(low, high + 1)}


def _drawn(rng: np.random.Generator, low: int, high: int, size: int) -> np.ndarray:
  odds = 2.0 ** np.arange(high - low, -1, -1)
  return low + rng.choice(high - low + 1, size, p=odds / odds.sum())


def _require_range(low: int, high: int) -> None:
  require(0 <= low <= high <= 40, f"exponents from {low} to {high} are asked for; 0 <= low <= high <= 40 must hold")


@dataclasses.dataclass(frozen=True)
class Buckets:
  """Where the sequences of a corpus lie.

  Attributes:
    starts: {exponent: int64 (sequences,)}, where each begins in the stream in which every document follows a BOS.
    left_out: share of that stream's tokens that no sequence has.
  """

  tokens: Tokens
  starts: Mapping[int, np.ndarray]
  left_out: float

  @property
  def counts(self) -> dict[int, int]:
    """{exponent: sequences}, empty buckets too."""
    return {i: len(starts) for i, starts in self.starts.items()}

  def sequence(self, exponent: int, i: int) -> np.ndarray:
    """int32 (2^exponent + 1,)."""
    start = int(self.starts[exponent][i])
    document = int(np.searchsorted(self._begins, start, side="right")) - 1
    first, size = start - document - 1, 2**exponent + 1  # document BOS tokens lie before its own
    if start > self._begins[document]:
      return self.tokens.ids[first : first + size].astype(np.int32)
    return np.concatenate([[self.tokens.bos], self.tokens.ids[first + 1 : first + size]]).astype(np.int32)

  @functools.cached_property
  def _begins(self) -> np.ndarray:
    return self.tokens.offsets[:-1] + np.arange(len(self.tokens))


def decompose(tokens: Tokens, *, low: int, high: int, seed: int | None = 0) -> Buckets:
  """The buckets 2^low .. 2^high of a corpus, every document with its BOS.

  Args:
    seed: of the exponents that documents beyond 2^high are cut into; None: always `high`.

  Raises:
    InputError: not 0 <= low <= high, or no document that is long enough.
  """
  _require_range(low, high)
  rng = None if seed is None else np.random.default_rng(seed)
  starts: dict[int, list[int]] = {i: [] for i in range(low, high + 1)}
  lengths = np.diff(tokens.offsets) + 1
  for begin, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
    for start, exponent in cut(int(length), low, high, rng):
      starts[exponent].append(int(begin) + start)
  kept = sum((2**i + 1) * len(of) for i, of in starts.items())
  require(
    kept > 0, f"no document has the {2**low + 1} tokens of the shortest sequence; lower `low`, or give longer text"
  )
  return Buckets(tokens, {i: np.array(of, np.int64) for i, of in starts.items()}, 1 - kept / lengths.sum())


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A whole run as data: step t takes the `place[t]`-th batch of the bucket 2^exponent[t].

  Attributes:
    exponent, place: int32 (steps,); cycle_ends: int32 (cycles,), steps after which a cycle is over.
    order: {exponent: the bucket's sequences in the order they are taken}; unused: {exponent: those that fill no batch}.
  """

  exponent: np.ndarray
  place: np.ndarray
  cycle_ends: np.ndarray
  order: Mapping[int, np.ndarray]
  batch_tokens: int

  def __len__(self) -> int:
    return len(self.exponent)

  @property
  def unused(self) -> dict[int, int]:
    return {i: len(order) % (self.batch_tokens >> i) for i, order in self.order.items()}

  def rows(self, step: int) -> np.ndarray:
    """Which sequences of its bucket a step takes, int64 (batch_tokens / 2^exponent,)."""
    exponent = int(self.exponent[step])
    size = self.batch_tokens >> exponent
    first = int(self.place[step]) * size
    return self.order[exponent][first : first + size]


def schedule(
  counts: Mapping[int, int],
  *,
  batch_tokens: int,
  curriculum: str | Sequence[float] = "grow_p2",
  cycles: int = 8,
  token_weighted: bool = True,
  seed: int = 0,
) -> Schedule:
  """Algorithm 1: every bucket's batches in equal parts, one for each cycle; within a cycle each step draws one of the
  buckets that have some left.

    P(i) ~ odds_i, or with `token_weighted` odds_i times the tokens of bucket i, as the authors' code has it

  The probabilities do not follow what is left, but for buckets that are empty. Every sequence comes once, save those
  that fill no batch.

  Args:
    counts: {exponent: sequences}; batch_tokens: of every step, a multiple of the longest sequence.
    curriculum: of `CURRICULA`, or the odds of every bucket, the shortest sequences first.

  Raises:
    InputError: an unknown curriculum, odds that are not one positive number a bucket, cycles < 1, a negative count,
      tokens that are no multiple of the longest sequence, or fewer sequences than a batch of any bucket.
  """
  require_counts(batch_tokens=batch_tokens, cycles=cycles)
  exponents = sorted(counts)
  require(bool(exponents), "there are no buckets; give {exponent: sequences}")
  require(min(counts.values()) >= 0, f"the buckets have {dict(counts)} sequences; none can have fewer than 0")
  longest = 2 ** exponents[-1]
  require(
    batch_tokens % longest == 0, f"batch_tokens is {batch_tokens}; it must be a multiple of {longest}, the longest"
  )
  if isinstance(curriculum, str):
    require_choice("curriculum", curriculum, CURRICULA)
    curriculum = CURRICULA[curriculum](len(exponents))
  odds = np.asarray(curriculum, np.float64)
  fits = odds.shape == (len(exponents),) and np.isfinite(odds).all() and (odds > 0).all()
  require(fits, f"the odds are {odds.tolist()}; {len(exponents)} buckets need as many positive numbers")
  batches_of = np.array([counts[i] // (batch_tokens >> i) for i in exponents])
  listed = ", ".join(f"{counts[i]} of {2**i}" for i in exponents)
  require(batches_of.sum() > 0, f"no bucket fills a batch of {batch_tokens} tokens: {listed}; give more text")
  if token_weighted:
    odds = odds * [counts[i] * 2.0**i for i in exponents]
  rng = np.random.default_rng(seed)
  chosen, ends = [], []
  for cycle in range(cycles):
    left = batches_of * (cycle + 1) // cycles - batches_of * cycle // cycles
    while left.any():
      now = np.where(left > 0, odds, 0)
      bucket = int(rng.choice(len(odds), p=now / now.sum()))
      chosen.append(bucket)
      left[bucket] -= 1
    ends.append(len(chosen))
  bucket = np.array(chosen, np.int64)
  place = np.zeros(len(bucket), np.int32)
  for i in range(len(exponents)):
    place[bucket == i] = np.arange((bucket == i).sum())
  order = {i: rng.permutation(counts[i]) for i in exponents}
  return Schedule(np.array(exponents, np.int32)[bucket], place, np.array(ends, np.int32), order, batch_tokens)


def batches(buckets: Buckets, plan: Schedule, *, shard: tuple[int, int] = (0, 1)) -> grain.IterDataset:
  """The batches of a schedule for `training.loop.train`, {"inputs", "targets"} int32 (rows, 2^i); all hosts have the
  same bucket at a step. `iter(...)` has get_state and set_state.

  Args:
    shard: (index, count) of this host, which takes every count-th row.

  Raises:
    InputError: a schedule of other buckets, a host that there is not, or rows that do not divide over the hosts.
  """
  index, count = shard
  same = {i: len(order) for i, order in plan.order.items()} == buckets.counts
  require(same, "the schedule is one of other buckets; make it of these buckets' counts")
  fewest = plan.batch_tokens >> max(plan.order)
  require(0 <= index < count, f"shard is {shard}; it must be (index, count) of a host, 0 <= index < count")
  require(fewest % count == 0, f"{count} hosts share batches of {fewest} rows; make batch_tokens a multiple of as many")

  def load(step: int) -> dict[str, np.ndarray]:
    exponent = int(plan.exponent[step])
    rows = [split_row(buckets.sequence(exponent, int(row))) for row in plan.rows(step)[index::count]]
    return {name: np.stack([row[name] for row in rows]) for name in ("inputs", "targets")}

  # Without threads of its own: grain's 16 would make 500 batches ahead.
  alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  steps = grain.MapDataset.range(len(plan)).map(load).to_iter_dataset(alone)
  return grain.experimental.ThreadPrefetchIterDataset(steps, prefetch_buffer_size=4)


def average_length(lengths: Sequence[int]) -> float:
  """sum l / N: what a sequence has.

  Raises:
    InputError: no sequence.
  """
  require(len(lengths) > 0, "there is no length to average; give at least one")
  return float(np.mean(lengths))


def average_context(lengths: Sequence[int]) -> float:
  """sum l (l - 1) / 2 over sum l: how many tokens a token can attend to before itself, on average.

  Raises:
    InputError: no token.
  """
  lengths = np.asarray(lengths, np.float64)
  require(lengths.sum() > 0, "there is no token to average over; give a length above 0")
  return float((lengths * (lengths - 1) / 2).sum() / lengths.sum())
