"""Chunks in a pipeline of stages: state-aware 1F1B in simulated time, and the choice of chunk and K by what it costs.

trace = simulate([[2.0, 2.0], [2.0], [2.0]], stages=4, keep=2)
best = choose(lengths, chunks=[2048, 4096], keeps=[1, 2, 4], stages=4, cost=cost, memory=memory, limit=80e9)[0]
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlab.core.checks import require, require_counts
from jaxlab.sequence.chunkflow import Cost, balance, pack


class Task(NamedTuple):
  """What a stage did from start to end: "forward" or "backward", what was run again included, of a chunk."""

  stage: int
  what: str
  chunk: int
  start: float
  end: float


class Trace(NamedTuple):
  """makespan: when the last stage has finished; busy: float (stages,), time at work; useful: forwards and backwards of
  a stage without those run again; tasks: in the order in which they began."""

  makespan: float
  busy: np.ndarray
  useful: float
  tasks: tuple[Task, ...]

  @property
  def bubble(self) -> float:
    """1 - useful / makespan."""
    return 1 - self.useful / self.makespan


def simulate(
  groups: Sequence[Sequence[float]],
  *,
  stages: int,
  keep: int = 1,
  backward: float | Sequence[Sequence[float]] = 2.0,
) -> Trace:
  """State-aware 1F1B: every chunk is a micro-batch, and chunks of one sequence wait for each other.

  Stage s may hold activations of (stages - 1 - s) + K chunks; the first N - K chunks of a group hold none and run
  forward again, on the stage itself, before their backward. A stage that is free takes the oldest backward that is
  ready: its forward done here, its backward done on the next stage, and that of the group's next chunk done here. If
  there is none it takes the next forward, if its input is there and the stage may hold it. Groups of one chunk are
  plain 1F1B with K = 1.

  Args:
    groups: seconds of a stage's forward of every chunk, group by group in the order in which they enter.
    backward: cost of a backward in forwards; or the seconds of every chunk's, as `groups`.

  Raises:
    InputError: counts below 1, no chunks, an empty group, or times that are not positive.
  """
  require_counts(stages=stages, keep=keep)
  require(len(groups) > 0 and all(len(group) > 0 for group in groups), "groups are needed, each of a chunk or more")
  flat = lambda groups: np.array([time for group in groups for time in group], float)
  times = flat(groups)
  require(np.isfinite(times).all() and (times > 0).all(), "the seconds of every chunk's forward must be positive")
  pulls = times * backward if isinstance(backward, int | float) else flat(backward)
  require(
    pulls.shape == times.shape and (pulls > 0).all(),
    f"backward is {backward!r:.60}; it must be a positive number of forwards, or the seconds of every chunk's",
  )
  place = [(i, len(group)) for group in groups for i in range(len(group))]
  drops = np.array([i < count - keep for i, count in place])
  follows = np.array([i + 1 < count for i, count in place])  # another chunk of its group comes behind it
  cost = pulls + times * drops
  count = len(times)
  sent, back = np.zeros((stages + 1, count), bool), np.zeros((stages + 1, count), bool)  # into, and from, a stage: done
  sent[0], back[stages] = True, True
  begun, turn, held, free = np.zeros((stages, count), bool), [0] * stages, [0] * stages, [True] * stages
  now, events, tasks = 0.0, [], []

  def start(stage, what, chunk, seconds):
    free[stage] = False
    tasks.append(Task(stage, what, chunk, now, now + seconds))
    heapq.heappush(events, (now + seconds, stage, what, chunk))

  while True:
    for stage in filter(free.__getitem__, range(stages)):
      later = np.append(back[stage, 1:], True) | ~follows
      ready = np.flatnonzero(sent[stage + 1] & back[stage + 1] & later & ~begun[stage])
      i = turn[stage]
      if len(ready):
        begun[stage, ready[0]] = True
        start(stage, "backward", int(ready[0]), float(cost[ready[0]]))
      elif i < count and sent[stage, i] and (drops[i] or held[stage] < stages - 1 - stage + keep):
        turn[stage] += 1
        held[stage] += not drops[i]
        start(stage, "forward", i, float(times[i]))
    if not events:
      break
    now = events[0][0]
    while events and events[0][0] == now:
      _, stage, what, i = heapq.heappop(events)
      free[stage] = True
      if what == "forward":
        sent[stage + 1, i] = True
      else:
        back[stage, i] = True
        held[stage] -= not drops[i]
  busy = np.zeros(stages)
  for task in tasks:
    busy[task.stage] += task.end - task.start
  return Trace(now, busy, float(times.sum() + pulls.sum()), tuple(tasks))


class Memory(NamedTuple):
  """Bytes of a stage: fixed for weights, gradients and optimizer; of a chunk's token for its activations; of a cached
  token for keys, values and what comes back to them: in float32 6 times its keys and values, by `gradient`."""

  fixed: float
  activation: float
  cached: float

  def peak(self, chunk: int, keep: int, longest: int, stages: int = 1) -> float:
    """On the first stage, which holds the most: (stages - 1 + K) chunks, and the longest sequence where it is cut."""
    cached = -(-longest // chunk) * chunk if longest > chunk else 0
    return self.fixed + (stages - 1 + keep) * chunk * self.activation + cached * self.cached


class Choice(NamedTuple):
  """seconds: of a batch, on the rank that takes longest; bubble: of its stages' time; bytes: of the first stage."""

  chunk: int
  keep: int
  seconds: float
  bubble: float
  bytes: float


def choose(
  lengths: Sequence[int],
  *,
  chunks: Sequence[int],
  keeps: Sequence[int],
  cost: Cost,
  memory: Memory,
  limit: float,
  stages: int = 1,
  ranks: int = 1,
) -> list[Choice]:
  """All pairs of chunk and K that fit, the fastest first; of equal ones the one with less memory.

  Args:
    lengths: of a batch's sequences, or of several batches' together; cost: of a stage; limit: bytes of a device.

  Raises:
    InputError: nothing to choose from, or nothing that fits; and as of `pack` and `simulate`.
  """
  require(len(chunks) > 0 and len(keeps) > 0, "there is nothing to choose from; give sizes of chunks and numbers kept")
  require_counts(stages=stages, ranks=ranks, keep=min(keeps))
  found, least = [], float("inf")
  for chunk in chunks:
    plan = pack(lengths, chunk)
    for keep in keeps:
      size = memory.peak(chunk, keep, int(max(lengths)), stages)
      least = min(least, size)
      if size > limit:
        continue
      shares = [share for share in balance(plan, ranks, keep=keep, cost=cost) if share]
      passes = [cost.passes(chunk, len(group)) for group in plan.groups]
      # A share is in no order: dependent groups enter first, the longest before the others, as the plan has them.
      pairs = [zip(*(passes[g] for g in sorted(share)), strict=True) for share in shares]
      traces = [simulate(forward, stages=stages, keep=keep, backward=backward) for forward, backward in pairs]
      slowest = max(traces, key=lambda trace: trace.makespan)
      bubble = 1 - sum(trace.useful for trace in traces) / ranks / slowest.makespan
      found.append(Choice(chunk, keep, slowest.makespan, bubble, size))
  require(len(found) > 0, f"nothing fits {limit:.3g} bytes; the least needed is {least:.3g}: give smaller chunks")
  return sorted(found, key=lambda choice: (choice.seconds, choice.bytes))
