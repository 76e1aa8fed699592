"""Requests served by simulated processors: lanes of steps that share a chip's arithmetic and its memory.

What a step does is decided by the engine's own policies, what it costs by a `Chip`: curves of what operators reach on a
share of the processors, and a bandwidth that lanes divide between them. Deterministic: all times are simulated.

  found = simulate(requests, [Lane(policies.sarathi)], steps_of(chip, config), chip=chip, server=Server(pages=9000))
  metrics.summary(found.ended)

Between events a lane's segment (an operator of some layers) goes on at 1 / max(flops / (peak g(r)), bytes / bandwidth),
where the lanes of a chip get max-min fair bandwidths, each at most h(r) of the chip's and no more than it can use.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlab.core.checks import require, require_counts
from jaxlab.models.config import TransformerConfig
from jaxlab.serving.cost import OPERATORS, Work, volumes
from jaxlab.serving.pages import Pages
from jaxlab.serving.pipeline import advance
from jaxlab.serving.policies import Plan, View, check
from jaxlab.serving.requests import Request, Served


class Chip(NamedTuple):
  """What is measured of a chip.

  Attributes:
    peak: operations a second; bandwidth: bytes a second.
    shares: of the processors, ascending to 1, at which the curves are given; linear between them and down to 0.
    compute: {operator: share of the peak that it reaches}; memory: share of the bandwidth that can be drawn.
    mixed: how many times longer than its operators a step takes that both reads and decodes.
  """

  peak: float
  bandwidth: float
  shares: Sequence[float]
  compute: dict[str, Sequence[float]]
  memory: Sequence[float]
  mixed: float = 1.0

  def table(self, operator: str | None) -> list[float]:
    """The curve of an operator, or of memory, at 0 .. 100 percent."""
    curve = self.memory if operator is None else self.compute[operator]
    return np.interp(np.arange(101) / 100, [0.0, *self.shares], [0.0, *curve]).tolist()


class Segment(NamedTuple):
  """A stretch of a step: an operator's place in OPERATORS, its operations and bytes; or None and seconds in `flops`."""

  operator: int | None
  flops: float
  bytes: float = 0.0


def steps_of(chip: Chip, config: TransformerConfig, *, groups: int = 1, tile: int = 64):
  """Work -> the segments of its step: every operator once for each of `groups` groups of layers.

  Args:
    tile: rows of the products' tiles.
  """
  require_counts(groups=groups, tile=tile)

  def segments(work: Work) -> list[Segment]:
    flops, bytes_ = volumes(config, work, tile=tile)
    longer = chip.mixed if work.pairs and work.context else 1.0
    of = lambda i, times: Segment(i, longer * float(flops[i]) * times, longer * float(bytes_[i]) * times)
    *layer, head = np.flatnonzero(bytes_).tolist()
    return [of(i, 1 / groups) for i in layer] * groups + [of(head, 1)]

  return segments


def alone(chip: Chip, segments: Sequence[Segment], percent: int) -> list[float]:
  """Seconds of every segment of a lane that has the chip's memory for itself."""
  tables = [chip.table(name) for name in (*OPERATORS, None)]
  return [1 / _rates(chip, tables, [(segment, percent)])[0] for segment in segments]


def _rates(chip: Chip, tables: list[list[float]], running: Sequence[tuple[Segment, float]]) -> list[float]:
  """Segments a second of lanes of one chip, each with the percent of the processors that it has been given."""
  total = sum(percent for segment, percent in running if segment.operator is not None)
  scale, wanted = min(1.0, 100 / total) if total else 1.0, []
  for i, (segment, percent) in enumerate(running):
    if segment.operator is None:
      continue
    at = max(1, round(percent * scale))
    compute = segment.flops / (chip.peak * tables[segment.operator][at])
    most = tables[-1][at] * chip.bandwidth
    wanted.append((min(most, segment.bytes / compute) if compute > 0 else most, i, compute))
  rates = [0.0 if segment.operator is not None else 1 / segment.flops for segment, _ in running]
  left = chip.bandwidth if wanted else 0.0
  wanted.sort()
  for k, (most, i, compute) in enumerate(wanted):
    got = min(most, left / (len(wanted) - k))
    left -= got
    rates[i] = 1 / max(compute, running[i][0].bytes / got if got else 0.0)
  return rates


class Server(NamedTuple):
  """As the engine's arguments of these names; overhead: seconds of the host before every step of a lane."""

  pages: int
  page: int = 16
  rows: int = 256
  budget: int = 2048
  chunks: int = 256
  part: int = 1
  prefix: bool = False
  overhead: float = 0.0


class Lane(NamedTuple):
  """A stream of steps.

  Attributes:
    policy: what its steps are; percent: of its chip's processors, where nobody controls them.
    phase: "prefill" or "decode" of lanes whose shares are controlled.
    chip: lanes of one number share a chip and a cache.
  """

  policy: Callable[[View], Plan]
  percent: int = 100
  phase: str | None = None
  chip: int = 0


class Step(NamedTuple):
  """A step that ended: its lane, when it began on the device, its seconds there, its work, percent at the beginning,
  and the other lane's work at that time."""

  lane: int
  start: float
  seconds: float
  work: Work
  percent: int
  beside: Work | None


class Tick(NamedTuple):
  """What a controller sees when a lane begins a step: the lanes' work, None of an empty one."""

  now: float
  prefill: Work | None
  decode: Work | None
  kv_used: float
  running: Sequence[Served]
  waiting: Sequence[Served]


class Found(NamedTuple):
  """ended: with their times; steps; splits: (time, percent of the prefill) whenever the controller changed it."""

  ended: list[Served]
  steps: list[Step]
  splits: list[tuple[float, int]]


def simulate(
  requests: Sequence[Request],
  lanes: Sequence[Lane],
  segments: Callable[[Work], list[Segment]],
  *,
  server: Server,
  chip: Chip | None = None,
  controller: Callable[[Tick], int] | None = None,
  handoff: Callable[[int], float] | None = None,
  noise: float = 0.0,
  seed: int = 0,
) -> Found:
  """Serves requests until all have ended.

  Lanes on one chip share requests and cache. With lanes on two chips the first reads prompts, and the second, which has
  a cache of its own, decodes.

  Args:
    segments: of a step's work, as `steps_of` gives them; without a chip all have seconds of their own.
    controller: (Tick) -> percent of the prefill's lane. A lane takes its share on when it begins a step; where the
      other is empty it gets all. Lanes that have more than 100 percent together have each less in proportion.
    handoff: tokens -> seconds until their keys and values are on the other chip.
    noise: standard deviation of the logarithm of a step's seconds.

  Raises:
    InputError: a request that does not fit into the cache, or lanes that never serve it.
  """
  return _Simulation(requests, lanes, segments, server, chip, controller, handoff, noise, seed).run()


class _Pool:
  """A cache and who uses it."""

  def __init__(self, server: Server):
    self.pages = Pages(server.pages, server.page, index=server.prefix)
    self.running: list[Served] = []
    self.waiting: deque[Served] = deque()


class _Busy:
  """What a lane is at."""

  def __init__(self, lane: Lane, number: int):
    self.lane, self.number, self.memory = lane, number, {}
    self.plan: Plan | None = None
    self.work: Work | None = None
    self.percent, self.steps = lane.percent, 0
    self.segments: list[Segment] = []
    self.at, self.left, self.start, self.beside = 0, 1.0, 0.0, None

  @property
  def members(self) -> list[Served]:
    return [] if self.plan is None else [*self.plan.decode, *(s for s, _ in self.plan.chunks)]


class _Simulation:
  def __init__(self, requests, lanes, segments, server, chip, controller, handoff, noise, seed):
    require(bool(lanes), "there is no lane; give at least one")
    chips = sorted({lane.chip for lane in lanes})
    require(chips in ([0], [0, 1]), f"lanes are on chips {chips}; expected 0, or 0 and 1")
    self.pools, self.server = [_Pool(server) for _ in chips], server
    self.watermark = max(1, server.pages // 100)
    room = (server.pages - 1 - self.watermark) * server.page
    longest = max((len(r.prompt) + r.tokens for r in requests), default=0)
    require(longest <= room, f"a request has {longest} tokens and the cache {room}; give more pages")
    self.lanes = [_Busy(lane, i) for i, lane in enumerate(lanes)]
    self.make, self.chip, self.controller, self.handoff = segments, chip, controller, handoff
    self.noise, self.rng = noise, np.random.default_rng(seed)
    self.tables = [chip.table(name) for name in (*OPERATORS, None)] if chip else []
    self.coming = deque(sorted(enumerate(requests), key=lambda one: (one[1].arrival, one[0])))
    self.moving: list[tuple[float, int, Served]] = []  # between two chips
    self.arrived: deque[Served] = deque()  # on the second chip, without pages there
    self.now, self.ended, self.steps, self.splits = 0.0, [], [], []

  def run(self) -> Found:
    self._begin()
    while True:
      rates = self._all_rates()
      ends = [(busy.left / rate, busy.number) for busy, rate in rates]
      due = [(self.coming[0][1].arrival - self.now, -1)] if self.coming else []
      due += [(self.moving[0][0] - self.now, -2)] if self.moving else []
      if not ends and not due:
        stuck = sum(len(pool.running) + len(pool.waiting) for pool in self.pools) + len(self.arrived)
        require(
          stuck == 0, f"{stuck} requests are never served by these lanes; give them policies that read and decode"
        )
        return Found(self.ended, self.steps, self.splits)
      wait, what = min(ends + due)
      wait = max(wait, 0.0)
      self.now += wait
      for busy, rate in rates:
        busy.left = 0.0 if busy.number == what else max(busy.left - wait * rate, 0.0)
      if what == -1:
        self._arrive()
      elif what == -2:
        self.arrived.append(self._land())
      elif not self._next_segment(self.lanes[what]):
        continue
      self._begin()

  def _all_rates(self) -> list[tuple[_Busy, float]]:
    found = []
    for number in range(len(self.pools)):
      here = [busy for busy in self.lanes if busy.plan is not None and busy.lane.chip == number]
      if here:
        running = [(busy.segments[busy.at], busy.percent) for busy in here]
        found += zip(here, _rates(self.chip, self.tables, running), strict=True)
    return found

  def _arrive(self) -> None:
    order, request = self.coming.popleft()
    self.pools[0].waiting.append(Served(request, list(request.prompt), order=order))

  def _land(self) -> Served:
    """A sequence leaves the first chip's cache."""
    served = heapq.heappop(self.moving)[2]
    self.pools[0].pages.release(served.pages)
    served.pages = []
    return served

  def _next_segment(self, busy: _Busy) -> bool:
    """Whether that was the step's last one."""
    if busy.at == 0 and self.server.overhead:
      busy.start = self.now
    busy.at, busy.left = busy.at + 1, 1.0
    if busy.at < len(busy.segments):
      return False
    self._end(busy)
    return True

  def _end(self, busy: _Busy) -> None:
    pool, plan = self.pools[busy.lane.chip], busy.plan
    if self.server.prefix:
      for served, count in plan.chunks:
        full = (served.computed + count) // pool.pages.size
        pool.pages.publish(served.tokens[: full * pool.pages.size], served.pages, served.published)
        served.published = max(served.published, full)
    members = busy.members
    for served in advance(plan, pool.running, pool.pages):
      served.times.append(self.now)
    for served in members:
      if served.made >= served.request.tokens:
        served.finish, served.pages = "length", []
        self.ended.append(served)
      elif len(self.pools) == 2 and busy.lane.chip == 0 and served.pending == 1:
        pool.running.remove(served)
        seconds = self.handoff(len(served.tokens)) if self.handoff else 0.0
        heapq.heappush(self.moving, (self.now + seconds, served.order, served))
    self.steps.append(Step(busy.number, busy.start, self.now - busy.start, busy.work, busy.percent, busy.beside))
    busy.plan = busy.work = None

  def _begin(self) -> None:
    """Lanes that are idle take on what their policies find."""
    self._admit_arrived()
    started = [busy for busy in self.lanes if busy.plan is None and self._plan(busy)]
    for busy in started:
      self._share(busy)

  def _admit_arrived(self) -> None:
    while self.arrived:
      pool, served = self.pools[1], self.arrived[0]
      needed = -(-(len(served.tokens) + 1) // pool.pages.size)
      if len(pool.running) >= self.server.rows or pool.pages.free - needed < self.watermark:
        return
      self.arrived.popleft()
      served.pages, served.published = pool.pages.take(needed), 0
      pool.running.append(served)
      pool.running.sort(key=lambda s: s.order)

  def _plan(self, busy: _Busy) -> bool:
    """Whether the lane has a step."""
    pool, s = self.pools[busy.lane.chip], self.server
    if not pool.running and not pool.waiting:
      return False
    taken = {member for other in self.lanes if other.lane.chip == busy.lane.chip for member in other.members}
    plan = self._ask(busy, pool, taken)
    while plan.preempt and not plan.decode and not plan.chunks:  # who lost its pages may have made room for others
      plan = self._ask(busy, pool, taken)
    if not plan.decode and not plan.chunks:
      return False
    busy.plan, busy.work, busy.steps = plan, plan.work(s.part), busy.steps + 1
    for served in busy.members:
      served.scheduled = self.now if math.isnan(served.scheduled) else served.scheduled
    factor = math.exp(self.noise * self.rng.standard_normal()) if self.noise else 1.0
    host = [Segment(None, s.overhead)] if s.overhead else []
    device = [Segment(one.operator, factor * one.flops, factor * one.bytes) for one in self.make(busy.work)]
    busy.segments, busy.at, busy.left, busy.start = host + device, 0, 1.0, self.now
    return True

  def _ask(self, busy: _Busy, pool: _Pool, taken: set[Served]) -> Plan:
    """What the lane's policy plans for those that no other lane is at."""
    free, s = [served for served in pool.running if served not in taken], self.server
    view = View(
      free, pool.waiting, pool.pages, s.rows - len(taken), s.budget, s.chunks, s.part, self.watermark, busy.steps,
      self.now, busy.memory,
    )  # fmt: skip
    plan = busy.lane.policy(view)
    check(plan, view)
    pool.running = sorted([*view.running, *taken], key=lambda served: served.order)
    if busy.lane.chip == 1 and pool.waiting:  # whoever lost its pages there is read again
      self.pools[0].waiting.extendleft(reversed(pool.waiting))
      pool.waiting.clear()
    return plan

  def _share(self, busy: _Busy) -> None:
    """The lane's percent from this step on, and what the controller says of the split."""
    others = [other for other in self.lanes if other is not busy and other.lane.chip == busy.lane.chip]
    busy.beside = others[0].work if others else None
    if self.controller is None or busy.lane.phase is None:
      busy.percent = busy.lane.percent
      return
    work = {other.lane.phase: other.work for other in (busy, *others)}
    pool = self.pools[busy.lane.chip]
    used = pool.pages.held / (len(pool.pages.holders) - 1)
    tick = Tick(self.now, work.get("prefill"), work.get("decode"), used, pool.running, pool.waiting)
    prefill = self.controller(tick)
    require(0 < prefill < 100, f"the controller gives the prefill {prefill} percent; expected 0 < percent < 100")
    if not self.splits or self.splits[-1][1] != prefill:
      self.splits.append((self.now, prefill))
    mine = prefill if busy.lane.phase == "prefill" else 100 - prefill
    busy.percent = mine if all(other.work is not None for other in others) else 100
