"""The engine: requests come and go, every step is a batch of what the policy chose.

  engine = Engine(hub.load("smollm2", dtype="bfloat16"), pages=4096)
  engine.add(Request("a", prompt, tokens=64))
  while engine.busy:
    for event in engine.step():
      print(event.id, event.token)

Which tokens a request gets depends on nothing but itself: neither on the policy nor on what is served beside it, up to
the rounding of products of other shapes.
"""

import concurrent.futures
import itertools
import math
import time
from collections import deque
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlab.core.checks import require, require_choice, require_counts
from jaxlab.models import inference, paged, tensor_parallel
from jaxlab.models.compaction import Compaction
from jaxlab.models.generate import power_of_two
from jaxlab.models.transformer import Transformer
from jaxlab.serving import batch, policies
from jaxlab.serving.batch import Shape
from jaxlab.serving.pages import Pages
from jaxlab.serving.requests import Event, Request, Served


class Engine:
  """Serves one network; not for several threads at once.

  Args:
    model: or a network taken apart. Models that smear need every token's predecessor and are refused.
    pages: of the cache, all layers'; page: tokens of one.
    length: prompt and new tokens of a request at most; None: the model's context, or the cache where that is smaller.
    rows: sequences that run at most; budget: tokens of a step at most; chunks: prompts that are read at once.
    part: tokens of a prompt that one row of a program reads; a chunk takes as many rows as it needs.
    steps: tokens that are made in one call where nobody reads or waits.
    policy: a name of `policies.POLICIES` or a function of that kind.
    prefix: pages of prompts are shared with later prompts that begin alike.
    method: one that makes the cache of a sequence smaller once its prompt has been read and while tokens are made: what
      it is as `decode` of `paged.decoder`. Nobody shares what it made.
    salt: as in `Pages`.
    clock: seconds; a test's may stand still.
    mesh: devices that share the heads and neurons of every layer, along `tensor` (`models.tensor_parallel`).

  Raises:
    InputError: sizes out of range, no room for a single page a row, a method without a form in pages, or a model that
      cannot be served, or not by these devices or this method.
  """

  def __init__(
    self,
    model: Transformer | inference.Network,
    *,
    pages: int = 1024,
    page: int = 16,
    length: int | None = None,
    rows: int = 32,
    budget: int = 256,
    chunks: int = 4,
    part: int = 32,
    steps: int = 8,
    policy: str | Callable = "sarathi",
    prefix: bool = True,
    method: paged.Method = paged.DENSE,
    salt: str = "",
    clock: Callable[[], float] = time.monotonic,
    mesh: Mesh | None = None,
  ):
    require_counts(rows=rows, budget=budget, chunks=chunks, part=part, steps=steps)
    require(budget > rows, f"budget is {budget}; it must have room for a token of each of the {rows} rows and one more")
    if isinstance(policy, str):
      require_choice("policy", policy, policies.POLICIES)
    require(mesh is None or isinstance(model, Transformer), "devices share a model; give it as hub.load returns it")
    if mesh:
      self.network = tensor_parallel.split(model, mesh)
    else:
      self.network = jax.jit(inference.take_apart)(model) if isinstance(model, Transformer) else model
    c = self.network.model.config
    require(not c.smear, "models that smear embeddings cannot be served yet; use jaxlab.generate")
    self._compactor = method.in_pages
    require(
      method == paged.DENSE or self._compactor,
      "this method, with these options, keeps what pages of one table cannot hold; use jaxlab.generate",
    )
    self.pages = Pages(pages, page, salt=salt, index=prefix)
    self._watermark = max(1, pages // 100)
    room = (pages - 1 - self._watermark) * page
    self.length = min(c.context if length is None else length, room)
    require(self.length >= 2, f"{pages} pages of {page} tokens have no room for a request; raise pages")
    require(
      not self._compactor or all(window is None or window >= self.length for window in c.windows),
      "layers of this model look back a window, in which entries would have to keep their places; take no method",
    )
    self.policy = policies.POLICIES[policy] if isinstance(policy, str) else policy
    self.rows, self.budget, self.chunks, self.steps, self.clock = rows, budget, chunks, steps, clock
    self.part = min(part, budget - rows)
    self.waiting: deque[Served] = deque()
    self.running: list[Served] = []
    self.ended: list[Served] = []  # since `take_ended`
    self.counters = dict(steps=0, tokens=0, padding=0, preempted=0, reused=0, compacted=0, programs=0)
    self._of_id: dict[str, Served] = {}
    self._added = 0
    self._table = -(-self.length // page)
    self.mesh = mesh
    self._pools = batch.empty_pools(self.network, pages, page, mesh, sized=self._compactor is not None)
    self._leaves = jax.tree.leaves(self.network)
    self._programs: dict[Shape | tuple[int, int], Callable] = {}
    self._memory: dict = {}  # the policy's

  @property
  def busy(self) -> bool:
    """Whether somebody is served or waits."""
    return bool(self.running or self.waiting)

  def check(self, request: Request) -> None:
    """Raises InputError for token ids that the model lacks, and for more tokens than there is room for."""
    vocab = self.network.model.config.vocab_size
    low, high = min(request.prompt), max(request.prompt)
    require(low >= 0 and high < vocab, f"the prompt has ids {low}..{high}, the model 0..{vocab - 1}")
    wanted = len(request.prompt) + request.tokens
    require(
      wanted <= self.length,
      f"the prompt has {len(request.prompt)} tokens and {request.tokens} new ones are wanted; there is room for "
      f"{self.length} in all",
    )

  def add(self, request: Request) -> None:
    """Lets a request wait.

    Raises:
      InputError: an id that is served already, and what `check` finds.
    """
    require(request.id not in self._of_id, f"a request named {request.id!r:.80} is served already")
    self.check(request)
    last = len(request.prompt) + request.tokens - 1  # tokens that are ever computed
    plan = self._compactor.plan(len(request.prompt)) if self._compactor else ()
    compactions = tuple(itertools.takewhile(lambda c: c.at < last, plan))
    served = Served(request, list(request.prompt), order=self._added, compactions=compactions)
    self._added += 1
    self._of_id[request.id] = served
    self.waiting.append(served)

  def abort(self, id: str, finish: str = "abort") -> bool:
    """Ends a request; its pages are free at once. False: it is not served (any more).

    Args:
      finish: what `Served.finish` says of it.
    """
    served = self._of_id.get(id)
    if served is None:
      return False
    self._end(served, finish)
    return True

  def take_ended(self) -> list[Served]:
    """Those that ended since the last call, for metrics."""
    ended, self.ended = self.ended, []
    return ended

  def warm_up(self, *, score: bool = False) -> int:
    """Compiles the programs that can be needed, and returns how many there are: later steps compile nothing."""
    shapes = [*self._shapes(score), *self._compactions()]
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
      list(threads.map(self._compiled, shapes))
    for shape in shapes:
      self._program(shape)
    return len(self._programs)

  def step(self) -> list[Event]:
    """Runs one step and returns the new tokens, none where nothing can run."""
    now = self.clock()
    view = policies.View(
      self.running,
      self.waiting,
      self.pages,
      self.rows,
      self.budget,
      self.chunks,
      self.part,
      self._watermark,
      self.counters["steps"],
      now,
      self._memory,
    )
    self._compact(view)
    waiting = set(self.waiting)
    plan = self.policy(view)
    policies.check(plan, view)
    self.counters["preempted"] += len(plan.preempt)
    self.counters["reused"] += sum(s.computed for s in self.running if s in waiting)
    if not plan.decode and not plan.chunks:
      return []
    for served in (*plan.decode, *(s for s, _ in plan.chunks)):
      served.scheduled = now if math.isnan(served.scheduled) else served.scheduled
    steps = self._steps(view, plan)
    return self._run(plan, steps)

  def _steps(self, view: policies.View, plan: policies.Plan) -> int:
    """Several tokens at once where nobody reads or waits, no cache is to become smaller on the way, and the pages are
    there."""
    near = min((s.limit - s.computed for s in plan.decode), default=0)
    if plan.chunks or self.waiting or self.steps == 1 or near < self.steps:
      return 1
    longest = max(s.request.tokens - s.made for s in plan.decode)
    steps = self.steps if longest > 1 else 1
    ahead = lambda s: min(len(s.tokens) + steps - 1, len(s.request.prompt) + s.request.tokens)
    return steps if all([view.hold(s, ahead(s)) for s in plan.decode]) else 1

  def _compact(self, view: policies.View) -> None:
    """Makes the caches smaller that are due; where pages are missing the sequence that came last gives its own up."""
    size = self.pages.size
    for served in list(self.running):
      while served.computed == served.limit:
        due = served.compactions[served.compacted]
        stay = due.first // size  # pages before it, whoever holds them too
        wanted = -(-served.most(max(served.reserved, served.computed + 1), done=1) // size)
        fresh = self.pages.exchange(served.pages[stay:], wanted - stay)
        if fresh is None:
          view.preempt(self.running[-1])
          self.counters["preempted"] += 1
          continue
        width = self._width(due, served.computed - served.gone)
        table, target = np.zeros((2, width), np.int32)
        old, new = served.pages[stay:][:width], fresh[:width]
        table[: len(old)], target[: len(new)] = old, new
        numbers = np.array([due.first - stay * size, due.count, due.kept], np.int32)
        program = self._program((due.room, width))
        self._pools = tuple(program(layer, table, target, numbers) for layer in self._pools)
        served.pages[stay:] = fresh
        served.gone += due.count - due.kept
        served.compacted += 1
        self.counters["compacted"] += 1

  def _run(self, plan: policies.Plan, steps: int) -> list[Event]:
    score = any(s.request.score and not s.made for s, _ in plan.chunks)
    pieces = [
      (served, first, min(self.part, count - first))
      for served, count in plan.chunks
      for first in range(0, count, self.part)
    ]
    shape = self._fitting(len(plan.decode), len(pieces), steps, score)
    decoding, decode = batch.blank(shape.decode, 1, self._table)
    reading, chunks = batch.blank(shape.chunks, max(shape.length, 1), self._table)
    for i, served in enumerate(plan.decode):
      self._fill(decode, i, served, 0, 1)
    for i, piece in enumerate(pieces):
      self._fill(chunks, i, *piece)
    self._pools, drawn, scores = self._program(shape)(self._leaves, self._pools, decoding, reading)
    drawn, scores = jax.device_get((drawn, scores))
    drawn = batch.drawn_of(drawn)
    now, events = self.clock(), []
    useful = len(plan.decode) * shape.steps + sum(count for _, count in plan.chunks)
    self.counters["steps"] += 1
    self.counters["tokens"] += useful
    self.counters["padding"] += shape.decode * shape.steps + shape.chunks * shape.length - useful
    for i, served in enumerate(plan.decode):
      events += self._made(served, [a[i] for a in drawn], now)
    for i, (served, _, count) in enumerate(pieces):
      if score and served.request.score and not served.made:
        served.scores += zip(*(a[i, :count].tolist() for a in scores), strict=True)
      served.computed += count
      if served.pending == 0:
        events += self._made(served, [a[shape.decode + i] for a in drawn], now, computed=0)
    for served, _ in plan.chunks:
      self._publish(served)
    return events

  def _fill(self, rows: batch.Rows, i: int, served: Served, skip: int, count: int) -> None:
    """Row i of the arrays: `count` pending tokens after the first `skip`."""
    first, sampling = served.computed + skip, served.request.sampling
    rows.tokens[i, :count] = served.tokens[first : first + count]
    after = served.tokens[first + 1 : first + count + 1]
    rows.targets[i, : len(after)] = after
    rows.start[i], rows.count[i], rows.gone[i] = first, count, served.gone
    rows.table[i, : len(served.pages)] = served.pages
    rows.temperature[i] = sampling.temperature
    rows.top_p[i] = 1 if sampling.top_p is None else sampling.top_p
    rows.min_p[i] = 0 if sampling.min_p is None else sampling.min_p
    rows.top_k[i] = 0 if sampling.top_k is None else min(sampling.top_k, 2**31 - 1)
    rows.seed[i] = np.uint32(sampling.seed % 2**32).astype(np.int32)
    rows.number[i] = served.made

  def _made(self, served: Served, drawn, now: float, *, computed: int = 1) -> list[Event]:
    """Takes the tokens of one sequence, up to its end; a step that decoded worked out each one's predecessor."""
    events, request = [], served.request
    for token, logprob, *best in zip(*(a.tolist() for a in drawn), strict=True):
      served.computed += computed
      served.tokens.append(token)
      served.times.append(now)
      finish = "stop" if token in request.stop else "length" if served.made >= request.tokens else None
      scores = tuple(served.scores[: len(request.prompt) - 1]) if request.score and served.made == 1 else ()
      events.append(Event(request.id, token, logprob, tuple(best), finish, scores))
      if finish:
        self._publish(served)
        self._end(served, finish)
        return events
    self._publish(served)
    return events

  def _publish(self, served: Served) -> None:
    full = served.computed // self.pages.size
    if full > served.published and not served.compacted:
      self.pages.publish(served.tokens[: full * self.pages.size], served.pages, served.published)
      served.published = full

  def _end(self, served: Served, finish: str) -> None:
    served.finish = finish
    self.pages.release(served.pages)
    served.pages = []
    (self.running if served in self.running else self.waiting).remove(served)
    del self._of_id[served.request.id]
    self.ended.append(served)

  def _width(self, due: Compaction, entries: int) -> int:
    """Pages that a compaction of a sequence of so many entries reads, those before it left out; few different ones."""
    return power_of_two(-(-entries // self.pages.size) - due.first // self.pages.size, 1)

  def _program(self, shape: Shape | tuple[int, int]) -> Callable:
    if shape not in self._programs:
      self._programs[shape] = self._compiled(shape)
      self.counters["programs"] += 1
    return self._programs[shape]

  def _compiled(self, shape: Shape | tuple[int, int]) -> Callable:
    """A step of this shape, or a compaction of this room in so many pages."""
    if not isinstance(shape, Shape):
      (room, width), layer = shape, jax.tree.map(batch.shaped, self._pools[0])
      return batch.compiled_compaction(layer, width, room, self._compactor.compact, self.mesh)
    return batch.compiled(self.network, self._pools, self._table, shape, self.mesh)

  def _fitting(self, decode: int, pieces: int, steps: int, score: bool) -> Shape:
    """The smallest program that the step fits into."""
    rows = power_of_two(self.rows, 4)
    if not pieces:
      return Shape(min(power_of_two(max(decode, 1), 4), rows), 0, 0, steps)
    # Few programs: rows that decode beside a chunk are none or all there can be.
    most = (self.budget - self.rows * bool(decode)) // self.part
    grain = max(1, power_of_two(pieces, 1) // 8)
    return Shape(rows if decode else 0, min(-(-pieces // grain) * grain, most), self.part, 1, score)

  def _shapes(self, score: bool) -> set[Shape]:
    decoding = {self._fitting(rows, 0, n, False) for rows in range(1, self.rows + 1) for n in (1, self.steps)}
    most = lambda decode: (self.budget - self.rows * decode) // self.part
    reading = {
      self._fitting(decode, pieces, 1, scored)
      for decode in (0, 1)
      for pieces in range(1, most(decode) + 1)
      for scored in {False, score}
    }
    return decoding | reading

  def _compactions(self) -> set[tuple[int, int]]:
    """The rooms and widths that there can be."""
    found = set()
    for prompt in range(1, self.length if self._compactor else 1):
      gone = 0
      for due in itertools.takewhile(lambda c: c.at < self.length - 1, self._compactor.plan(prompt)):
        found.add((due.room, self._width(due, due.at - gone)))
        gone += due.count - due.kept
    return found
