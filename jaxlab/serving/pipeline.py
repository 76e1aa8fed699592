"""Micro-batches in a pipeline of stages: what a policy would send through it, and how long the stages stand idle.

parts = microbatches(policies.sarathi, requests, slots=8, rows=27, budget=256)
seconds = jnp.array([[cost(part.work) / 8] * 8 for part in parts])
times = stage_times(seconds, jnp.array([part.slot for part in parts]))
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_counts
from jaxlab.serving import policies
from jaxlab.serving.cost import Work
from jaxlab.serving.pages import Pages
from jaxlab.serving.requests import Request, Served


class Microbatch(NamedTuple):
  """slot: of the ring it belongs to; requests: their places in the list; work: what it costs."""

  slot: int
  requests: tuple[int, ...]
  work: Work


def microbatches(
  policy: Callable[[policies.View], policies.Plan],
  requests: Sequence[Request],
  *,
  slots: int,
  rows: int,
  budget: int,
  chunks: int = 1,
  part: int = 1,
) -> list[Microbatch]:
  """Those of requests that all wait from the beginning, in the order in which they enter the pipeline.

  `slots` sets of requests are in flight, a micro-batch each: a set is scheduled again when its last micro-batch has
  left. A request stays in its set; memory is for `rows` of them in each.

  Args:
    rows, budget, chunks, part: as of an `Engine`.

  Raises:
    InputError: sizes that are no counts, or as `policies.check`.
  """
  require_counts(slots=slots, rows=rows, budget=budget, chunks=chunks, part=part)
  require(budget > rows, f"budget is {budget}; it must have room for a token of each of the {rows} rows and one more")
  waiting = deque(Served(request, list(request.prompt), order=i) for i, request in enumerate(requests))
  longest = max(len(request.prompt) + request.tokens for request in requests) + 1
  ring = [([], Pages(rows + 1, longest, index=False), {}) for _ in range(slots)]
  steps, found = [0] * slots, []
  while waiting or any(running for running, *_ in ring):
    for slot, (running, pages, memory) in enumerate(ring):
      part_ = min(part, budget - rows)
      view = policies.View(running, waiting, pages, rows, budget, chunks, part_, 0, steps[slot], memory=memory)
      plan = policy(view)
      policies.check(plan, view)
      if not plan.decode and not plan.chunks:
        continue
      steps[slot] += 1
      found.append(_ran(slot, plan, running, pages, part))
  return found


def _ran(slot: int, plan: policies.Plan, running: list[Served], pages: Pages, part: int) -> Microbatch:
  """The micro-batch of a plan; its sequences have the tokens it makes."""
  members = (*plan.decode, *(s for s, _ in plan.chunks))
  found = Microbatch(slot, tuple(s.order for s in members), plan.work(part))
  advance(plan, running, pages)
  return found


def advance(plan: policies.Plan, running: list[Served], pages: Pages) -> list[Served]:
  """Gives the sequences of a plan what it works out, without a model: token 0. Returns those that got a token; who has
  all that were asked for leaves `running` and its pages."""
  made = []
  for sequence, count in (*((s, 1) for s in plan.decode), *plan.chunks):
    sequence.computed += count
    if sequence.pending == 0:
      sequence.tokens.append(0)
      made.append(sequence)
      if sequence.made >= sequence.request.tokens:
        running.remove(sequence)
        pages.release(sequence.pages)
  return made


class Times(NamedTuple):
  """start, end: seconds, (micro-batches, stages); idle: how long a stage waited before it, 0 before its first."""

  start: Float[Array, "batches stages"]
  end: Float[Array, "batches stages"]
  idle: Float[Array, "batches stages"]


@jax.jit
def stage_times(
  seconds: Float[Array, "batches stages"], slot: Int[Array, "batches"], link: float | Float[Array, ""] = 0.0
) -> Times:
  """When every stage works on every micro-batch.

  start[m, s] = max(end[m, s - 1] + link, end[m - 1, s]); the first stage waits for the last micro-batch of the same
  slot to have left the last stage. idle[m, s] = start[m, s] - end[m - 1, s].

  Args:
    slot: below the number of stages or micro-batches; link: seconds from one stage to the next.
  """
  batches, stages = seconds.shape

  def one(carry, row):
    stage_end, slot_end, first = carry
    cost, mine = row
    ready, starts, ends = slot_end[mine], [], []
    for s in range(stages):
      starts.append(jnp.maximum(ready, stage_end[s]))
      ends.append(starts[-1] + cost[s])
      ready = ends[-1] + link
    start, end = jnp.stack(starts), jnp.stack(ends)
    idle = jnp.where(first, 0, start - stage_end)
    return (end, slot_end.at[mine].set(end[-1]), jnp.bool_(False)), Times(start, end, idle)

  zeros = jnp.zeros((stages,), seconds.dtype)
  empty = (zeros, jnp.zeros((max(batches, stages),), seconds.dtype), jnp.bool_(True))
  return jax.lax.scan(one, empty, (seconds, slot))[1]


def idle_by_request(parts: Sequence[Microbatch], times: Times) -> Float[np.ndarray, "requests"]:
  """Seconds that stages stood idle before micro-batches of each request, summed over both."""
  found = np.zeros(1 + max(max(p.requests) for p in parts))
  for p, idle in zip(parts, np.asarray(times.idle).sum(axis=1), strict=True):
    found[list(p.requests)] += idle
  return found
