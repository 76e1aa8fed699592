"""Which requests take part in the next step. A policy is a function: (View) -> Plan.

engine = Engine(model, policy=sarathi)          # or a function of your own
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

from jaxlab.core.checks import require
from jaxlab.serving.pages import Pages
from jaxlab.serving.requests import Served


@dataclasses.dataclass
class Plan:
  """A step.

  Attributes:
    decode: sequences that make one token; chunks: (sequence, how many of its pending tokens are read).
    preempt: sequences that give up their pages, to be computed again.
  """

  decode: list[Served] = dataclasses.field(default_factory=list)
  chunks: list[tuple[Served, int]] = dataclasses.field(default_factory=list)
  preempt: list[Served] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class View:
  """What a policy sees, and may act on by `hold`, `admit` and `preempt` alone.

  Attributes:
    running: in the order of their arrival; waiting: those that were preempted first, then by arrival.
    rows: sequences that may run at most; budget: tokens of a step at most; chunks: sequences that may read at once.
  """

  running: list[Served]
  waiting: deque[Served]
  pages: Pages
  rows: int
  budget: int
  chunks: int
  watermark: int

  def hold(self, sequence: Served, tokens: int) -> bool:
    """Sees to it that the sequence has pages for its first `tokens` positions; False where there are not enough."""
    missing = -(-tokens // self.pages.size) - len(sequence.pages)
    if missing <= 0:
      return True
    pages = self.pages.take(missing)
    if pages is None:
      return False
    sequence.pages.extend(pages)
    return True

  def admit(self) -> Served | None:
    """The first of those waiting, running now: with pages for all its tokens and one more, what is known of them
    already in place; or None, where they do not fit beside the watermark or all rows are taken."""
    if not self.waiting or len(self.running) >= self.rows:
      return None
    sequence = self.waiting[0]
    # Scores are of every prompt token: such a request computes all of it.
    known = [] if sequence.request.score else self.pages.match(sequence.tokens)
    needed = -(-(len(sequence.tokens) + 1) // self.pages.size) - len(known)
    if self.pages.free - needed < self.watermark:
      self.pages.release(known)
      return None
    sequence.pages = known + self.pages.take(needed)
    sequence.computed, sequence.published = len(known) * self.pages.size, len(known)
    self.running.append(self.waiting.popleft())
    self.running.sort(key=lambda s: s.order)
    return sequence

  def preempt(self, sequence: Served) -> None:
    """Takes the pages back; the sequence waits in front, its tokens so far a prompt."""
    self.pages.release(sequence.pages)
    sequence.pages, sequence.computed, sequence.published = [], 0, 0
    self.running.remove(sequence)
    self.waiting.appendleft(sequence)


def _decodes(view: View, plan: Plan) -> None:
  """Every sequence that can make a token does; where pages are missing the one that came last gives its own up."""
  for sequence in list(view.running):
    if sequence.pending != 1 or sequence in plan.preempt:
      continue
    while not view.hold(sequence, len(sequence.tokens)):
      victim = next(s for s in reversed(view.running) if s not in plan.decode)
      view.preempt(victim)
      plan.preempt.append(victim)
      if victim is sequence:
        break
    else:
      plan.decode.append(sequence)


def _chunk(view: View, plan: Plan, sequence: Served) -> bool:
  """Reads as much of a sequence as the budget has left; False where that is nothing."""
  used = len(plan.decode) + sum(count for _, count in plan.chunks)
  count = min(sequence.pending, view.budget - used)
  if count < 1 or len(plan.chunks) >= view.chunks:
    return False
  plan.chunks.append((sequence, count))
  return True


def _reading(view: View, plan: Plan) -> list[Served]:
  return [s for s in view.running if s.pending > 1 and s not in plan.preempt]


def sarathi(view: View) -> Plan:
  """Sarathi (arXiv 2308.16369, as in its successor): all that decode, then prompts in chunks, up to the budget."""
  plan = Plan()
  _decodes(view, plan)
  for sequence in _reading(view, plan):
    if not _chunk(view, plan, sequence):
      return plan
  while (
    not plan.preempt
    and len(plan.chunks) < view.chunks
    and len(plan.decode) + sum(count for _, count in plan.chunks) < view.budget
    and (sequence := view.admit()) is not None
  ):
    _chunk(view, plan, sequence)
  return plan


def prefill_first(view: View) -> Plan:
  """vLLM's first policy: prompts before everything, and no token while one is read."""
  plan = Plan()
  for sequence in _reading(view, plan):
    _chunk(view, plan, sequence)
  while len(plan.chunks) < view.chunks and (sequence := view.admit()) is not None:
    if not _chunk(view, plan, sequence):
      break
  if not plan.chunks:
    _decodes(view, plan)
  return plan


def request_level(view: View) -> Plan:
  """As FasterTransformer: a batch is admitted when the last one has ended, read whole, and decoded to its end."""
  plan = Plan()
  if not view.running:
    while view.admit() is not None:
      pass
  for sequence in _reading(view, plan):
    _chunk(view, plan, sequence)
  if not plan.chunks:
    _decodes(view, plan)
  return plan


POLICIES: dict[str, Callable[[View], Plan]] = {
  "sarathi": sarathi,
  "prefill_first": prefill_first,
  "request_level": request_level,
}


def check(plan: Plan, view: View) -> None:
  """Raises InputError for a plan that no step can run: what a policy of one's own got wrong."""
  members: Sequence[Served] = [*plan.decode, *(s for s, _ in plan.chunks)]
  require(len({id(s) for s in members}) == len(members), "a policy planned a sequence twice in one step")
  require(all(s in view.running for s in members), "a policy planned a sequence that is not running; admit it first")
  require(all(s.pending == 1 for s in plan.decode), "a policy decodes a sequence whose prompt is not read")
  require(
    all(1 <= count <= s.pending for s, count in plan.chunks), "a policy reads more tokens of a sequence than it has"
  )
  require(
    len(plan.chunks) <= view.chunks and sum(count for _, count in plan.chunks) <= view.budget,
    f"a policy reads {len(plan.chunks)} sequences at once, or more than {view.budget} tokens",
  )
