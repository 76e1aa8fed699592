"""Which requests take part in the next step. A policy is a function: (View) -> Plan.

engine = Engine(model, policy=sarathi)          # or a function of your own
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

from jaxlab.core.checks import require
from jaxlab.serving.cost import Work
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

  def work(self, part: int) -> Work:
    """What it costs; chunks are read in parts of so many tokens."""
    chunks = [(s.computed + count, count) for s, count in self.chunks]
    rows = len(self.decode) + sum(-(-count // part) * part for _, count in chunks)
    return Work.of(rows=rows, chunks=chunks, contexts=[len(s.tokens) for s in self.decode])


@dataclasses.dataclass(frozen=True)
class View:
  """What a policy sees, and may act on by `hold`, `admit` and `preempt` alone.

  Attributes:
    running: in the order of their arrival; waiting: those that were preempted first, then by arrival.
    rows: sequences that may run at most; budget: tokens of a step at most; chunks: sequences that may read at once.
    part: chunks take room in multiples of so many tokens. step: how many steps have run.
    now: seconds on the engine's clock; memory: what the policy keeps from step to step.
  """

  running: list[Served]
  waiting: deque[Served]
  pages: Pages
  rows: int
  budget: int
  chunks: int
  part: int
  watermark: int
  step: int = 0
  now: float = 0.0
  memory: dict = dataclasses.field(default_factory=dict)

  def room(self, plan: Plan) -> int:
    """Tokens that one more chunk may have: the budget is that of the program, where all rows decode or none."""
    parts = (self.budget - self.rows * bool(plan.decode)) // self.part
    return self.part * (parts - sum(-(-count // self.part) for _, count in plan.chunks))

  def hold(self, sequence: Served, tokens: int) -> bool:
    """Sees to it that the sequence has pages for its first `tokens` positions; False where there are not enough."""
    missing = -(-(tokens - sequence.gone) // self.pages.size) - len(sequence.pages)
    if missing <= 0:
      return True
    pages = self.pages.take(missing)
    if pages is None:
      return False
    sequence.pages.extend(pages)
    return True

  def admit(self, sequence: Served | None = None, *, whole: bool = False) -> Served | None:
    """The first of those waiting, or the one that is given, running now: with pages for all its tokens and one more
    (whole: for the longest answer), what is known of them already in place; or None, where they do not fit beside the
    watermark or all rows are taken."""
    if not self.waiting or len(self.running) >= self.rows:
      return None
    sequence = self.waiting[0] if sequence is None else sequence
    # Scores are of every prompt token: such a request computes all of it.
    known = [] if sequence.request.score else self.pages.match(sequence.tokens[: sequence.limit])
    longest = len(sequence.request.prompt) + sequence.request.tokens if whole else len(sequence.tokens) + 1
    needed = -(-sequence.most(longest) // self.pages.size) - len(known)
    if self.pages.free - needed < self.watermark:
      self.pages.release(known)
      return None
    sequence.pages, sequence.reserved = known + self.pages.take(needed), longest
    sequence.computed, sequence.published = len(known) * self.pages.size, len(known)
    self.waiting.remove(sequence)
    self.running.append(sequence)
    self.running.sort(key=lambda s: s.order)
    return sequence

  def preempt(self, sequence: Served) -> None:
    """Takes the pages back; the sequence waits in front, its tokens so far a prompt."""
    self.pages.release(sequence.reset())
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
  count = min(sequence.readable, view.room(plan))
  if count < 1 or len(plan.chunks) >= view.chunks:
    return False
  plan.chunks.append((sequence, count))
  return True


def _reading(view: View, plan: Plan) -> list[Served]:
  return [s for s in view.running if s.pending > 1 and s not in plan.preempt]


def _read(view: View, plan: Plan) -> None:
  """Chunks of those that read, then of those waiting, as far as there is room."""
  for sequence in _reading(view, plan):
    _chunk(view, plan, sequence)
  while len(plan.chunks) < view.chunks and view.room(plan) > 0 and (sequence := view.admit()) is not None:
    _chunk(view, plan, sequence)


def sarathi(view: View) -> Plan:
  """Sarathi (arXiv 2308.16369): all that decode, then prompts in chunks, up to the budget.

  One prompt at a time (chunks=1) is the paper's decode-maximal batch, several are Sarathi-Serve's.
  """
  plan = Plan()
  _decodes(view, plan)
  if plan.preempt:  # nobody new takes the pages that were missing
    for sequence in _reading(view, plan):
      _chunk(view, plan, sequence)
  else:
    _read(view, plan)
  return plan


def prefill_first(view: View) -> Plan:
  """vLLM's first policy: prompts before everything, and no token while one is read."""
  plan = Plan()
  _read(view, plan)
  if not plan.chunks:
    _decodes(view, plan)
  return plan


def alternating(view: View) -> Plan:
  """Chunks without mixing: a step that reads, then one that decodes."""
  plan = Plan()
  if view.step % 2 == 0:
    _read(view, plan)
  if not plan.chunks:
    _decodes(view, plan)
  if not plan.decode and not plan.chunks and not plan.preempt:
    _read(view, plan)
  return plan


def orca(view: View) -> Plan:
  """Orca (OSDI 2022): all that decode, and whole prompts; who runs has the pages of its longest answer.

  A prompt longer than a step begins in a step of its own and takes several.
  """
  plan = Plan()
  _decodes(view, plan)
  for sequence in _reading(view, plan):  # a long prompt's rest, and what was made before it was preempted
    _chunk(view, plan, sequence)
  while len(plan.chunks) < view.chunks and view.waiting:
    late = view.waiting[0].readable > view.room(plan) and (plan.decode or plan.chunks)
    if late or (sequence := view.admit(whole=True)) is None:
      break
    _chunk(view, plan, sequence)
  return plan


def request_level(view: View) -> Plan:
  """As FasterTransformer: a batch is admitted when the last one has ended, read whole, and decoded to its end."""
  plan = Plan()
  if not view.running:
    while view.admit(whole=True) is not None:
      pass
  for sequence in _reading(view, plan):
    _chunk(view, plan, sequence)
  if not plan.chunks:
    _decodes(view, plan)
  return plan


def read_only(view: View) -> Plan:
  """Chunks of prompts, first come first served: half of an engine whose phases run apart."""
  plan = Plan()
  _read(view, plan)
  return plan


def decode_only(view: View) -> Plan:
  """All that decode: the other half."""
  plan = Plan()
  _decodes(view, plan)
  return plan


def shortest_only(view: View, *, gamma: float = 15.0, fill: bool = True) -> Plan:
  """Prompts with the fewest tokens left first (Nexus' SPF), ascending in  left - gamma (now - arrival).

  They are taken as long as they fit into the step; where the cache is full, those that have pages. The first that does
  not fit is read as far as there is room; without `fill` that is done for one that would not fit alone.

  Args:
    gamma: tokens that a second of waiting counts for; 0 is the order of lengths, a large one that of arrivals.
  """
  plan = Plan()
  _shortest(view, plan, gamma, fill)
  return plan


def _shortest(view: View, plan: Plan, gamma: float, fill: bool) -> None:
  score = lambda s: (s.pending - gamma * (view.now - s.request.arrival), s.order)
  waiting, full = set(view.waiting), False
  for sequence in sorted((*_reading(view, plan), *view.waiting), key=score):
    room = view.room(plan)
    fits = sequence.pending <= room
    if room < 1 or len(plan.chunks) >= view.chunks or not (fits or fill or not plan.chunks):
      return
    if sequence in waiting:
      if full:
        continue
      full = view.admit(sequence) is None
      if full:
        continue  # those that hold pages read on, or nobody would ever give any up
    _chunk(view, plan, sequence)
    if not fits:
      return


def spf(view: View, *, gamma: float = 15.0) -> Plan:
  """As `sarathi`, but for the order of prompts: that of `shortest_only`."""
  plan = Plan()
  _decodes(view, plan)
  if not plan.preempt:
    _shortest(view, plan, gamma, True)
    return plan
  for sequence in _reading(view, plan):
    _chunk(view, plan, sequence)
  return plan


def nexus_time(
  view: View,
  *,
  share: float | Callable[[View], float] = 0.5,
  gamma: float = 15.0,
  cost: Callable[[Work], float] = lambda work: 1.0,
) -> Plan:
  """Nexus (arXiv 2507.06608) in turns instead of side by side: steps that read, shortest prompts first, and steps that
  decode, by stride scheduling: who has had less of its share is next.

  Args:
    share: of the time that reading gets while somebody decodes, between 0 and 1.
    cost: seconds of a step, as `cost.fit` finds them; by default each counts the same.
  """
  had = view.memory.setdefault("had", [0.0, 0.0])  # reading, decoding: seconds over shares
  mine = share(view) if callable(share) else share
  require(0 < mine < 1, f"share is {mine}; it must lie between 0 and 1")
  shares = (mine, 1 - mine)
  lanes = (lambda: shortest_only(view, gamma=gamma), lambda: decode_only(view))
  first = int(had[0] > had[1])
  plan = lanes[first]()
  idle = not (plan.decode or plan.chunks or plan.preempt)
  if idle:
    plan = lanes[1 - first]()
  if plan.decode or plan.chunks:
    ran = int(bool(plan.decode))
    had[ran] += cost(plan.work(view.part)) / shares[ran]
  if idle:
    had[first] = max(had)  # who has nothing to do saves nothing up
  return plan


POLICIES: dict[str, Callable[[View], Plan]] = {
  "sarathi": sarathi,
  "orca": orca,
  "prefill_first": prefill_first,
  "alternating": alternating,
  "request_level": request_level,
  "spf": spf,
  "nexus_time": nexus_time,
}


def check(plan: Plan, view: View) -> None:
  """Raises InputError for a plan that no step can run: what a policy of one's own got wrong."""
  members: Sequence[Served] = [*plan.decode, *(s for s, _ in plan.chunks)]
  require(len(set(members)) == len(members), "a policy planned a sequence twice in one step")
  require(set(members) <= set(view.running), "a policy planned a sequence that is not running; admit it first")
  require(all(s.pending == 1 for s in plan.decode), "a policy decodes a sequence whose prompt is not read")
  require(
    all(1 <= count <= s.readable for s, count in plan.chunks), "a policy reads more tokens of a sequence than it has"
  )
  require(
    len(plan.chunks) <= view.chunks and view.room(plan) >= 0,
    f"a policy reads {len(plan.chunks)} sequences at once, or more than fits into {view.budget} tokens",
  )
