"""Decomposed prompting: a decomposer writes a program step by step, handlers answer its steps, a search chooses.

Khot et al., ICLR 2023, arXiv 2210.02406. A handler is a leaf (a function, a model with its prompt, a retriever) or a
decomposer, whose question opens a level with another program: a decomposer may call itself. States are partial
programs; the cheapest goes on, its cost the sum of what its generations cost (the mean negative log-probability of
their tokens), first come first served. A generation that is no step, an operator without its list, a handler that
fails: that state is dropped, not the question.

  outcome, = solve(["Reverse a, b, c, d"], "reverse", {"reverse": decomposer, "join": leaf})
  outcome.answer, outcome.trace, outcome.calls

The questions of a batch search side by side: in every round the requests of all of them go to each handler at once, all
calls of a step (one an item) in the same batch. Handlers see strings; `handlers` makes them of functions and of models.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxlab.core.checks import require, require_choice, require_counts
from jaxlab.tasks import programs
from jaxlab.tasks.programs import END, Call, Json, Step


class Question(NamedTuple):
  """What a leaf is asked: a text, and the paragraphs that come with the question."""

  text: str
  context: tuple[str, ...] = ()


class Answer(NamedTuple):
  """A leaf's answer, and what it costs the state (0 or more)."""

  value: Json
  cost: float = 0.0


class Failure(NamedTuple):
  """A leaf could not answer this question, and why: the state that asked is dropped."""

  why: str


class Proposal(NamedTuple):
  """A line that a decomposer may write next, and its cost: the mean negative log-probability of its tokens."""

  line: str
  cost: float = 0.0


@dataclasses.dataclass(frozen=True)
class Done:
  """A finished step: its line, its answer, and its calls, a level or (question, answer) each."""

  line: str
  answer: Json
  calls: tuple = ()

  def as_json(self) -> dict:
    """{"step", "answer", "calls": [a level's trace or {"question", "answer"}]}."""
    told = [c.as_json() if isinstance(c, Level) else {"question": c[0], "answer": c[1]} for c in self.calls]
    return {"step": self.line, "answer": self.answer, "calls": told}


@dataclasses.dataclass(frozen=True)
class Level:
  """One program: whose it is, the question it answers, the paragraphs, and the steps so far."""

  handler: str
  question: str
  context: tuple[str, ...] = ()
  steps: tuple[Done, ...] = ()

  def as_json(self) -> dict:
    """{"handler", "question", "steps"}."""
    return {"handler": self.handler, "question": self.question, "steps": [step.as_json() for step in self.steps]}

  def prompt(self) -> str:
    """The level as a decomposer is shown it: QC, then QS and A of every step, ending in "QS:"."""
    lines = [f"QC: {self.question}"]
    for step in self.steps:
      lines += [f"QS: {step.line}", f"A: {programs.dumps(step.answer)}"]
    return "\n".join([*lines, "QS:"])


Leaf = Callable[[Sequence[Question]], Sequence[Answer | Failure]]


@dataclasses.dataclass(frozen=True)
class Decomposer:
  """`propose(levels)` gives each level's candidates for its next line; none drops the state.

  After `most_steps` steps the level ends by itself, at no cost.
  """

  propose: Callable[[Sequence[Level]], Sequence[Sequence[Proposal]]]
  most_steps: int = 10


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one question may use: levels inside each other, calls of handlers and generations, states."""

  depth: int = 50
  calls: int = 10_000
  states: int = 10_000


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a search found: the answer and the trace of its program, or why there is none and how far the last state got.

  Attributes:
    calls: by handler, generations of decomposers and questions to leaves, of all states that were tried.
    cost: of the state that answered, or of the last one.
  """

  answer: Json
  trace: Level
  calls: dict[str, int]
  cost: float
  why: str = ""


@dataclasses.dataclass(frozen=True)
class _Pending:
  """A step whose calls are being answered."""

  line: str
  step: Step
  calls: tuple[Call, ...]
  answers: tuple[Json, ...] = ()
  told: tuple = ()


@dataclasses.dataclass(frozen=True)
class _State:
  """Open levels, the innermost last, each with the step it waits for; all but the last wait for the level after."""

  levels: tuple[tuple[Level, _Pending | None], ...]
  cost: float = 0.0
  answer: tuple[Json, Level] | None = None


def solve(
  questions: Sequence[str | Question],
  start: str,
  handlers: Mapping[str, Leaf | Decomposer],
  *,
  limits: Limits = Limits(),
) -> list[Outcome]:
  """Answers every question by the decomposer `start`, each by a best-first search of its own, all in lock-step.

  Raises:
    InputError: `start` is no decomposer of `handlers`, limits below 1, a handler that answers more or fewer questions
      than it was asked, or a negative cost.
  """
  require_choice("start", start, [name for name, handler in handlers.items() if isinstance(handler, Decomposer)])
  require_counts(**dataclasses.asdict(limits))
  searches = [_Search(q if isinstance(q, Question) else Question(q), start, handlers, limits) for q in questions]
  while open_ := [(search, *request) for search in searches if (request := search.next()) is not None]:
    for name in dict.fromkeys(name for _, _, name, _ in open_):
      mine = [(search, state, asked) for search, state, wanted, asked in open_ if wanted == name]
      _ask(handlers[name], name, mine)
  return [search.outcome for search in searches]


def _ask(handler, name, requests) -> None:
  """One batch of one handler, its answers handed back to the searches."""
  if isinstance(handler, Decomposer):
    found = handler.propose([level for _, _, level in requests])
    require(len(found) == len(requests), f"{name} proposed for {len(found)} of {len(requests)} levels")
    for (search, state, _), proposals in zip(requests, found, strict=True):
      search.proposed(state, name, proposals)
    return
  flat = [question for _, _, asked in requests for question in asked]
  answers = list(handler(flat))
  require(len(answers) == len(flat), f"{name} gave {len(answers)} answers to {len(flat)} questions")
  for search, state, asked in requests:
    mine, answers = answers[: len(asked)], answers[len(asked) :]
    search.answered(state, name, mine)


class _Search:
  """Best-first search for one question. `next` says what the cheapest state needs; the answer makes new states."""

  def __init__(self, question, start, handlers, limits):
    self.handlers, self.limits = handlers, limits
    self.calls, self.popped, self.count = {}, 0, itertools.count()
    self.heap, self.outcome = [], None
    self.why, self.last = "", _State(((Level(start, *question), None),))
    self.push(self.last)

  def push(self, state: _State) -> None:
    heapq.heappush(self.heap, (state.cost, next(self.count), state))

  def drop(self, state: _State, why: str) -> None:
    self.why, self.last = why, state

  def next(self):
    """(state, handler, what it is asked) of the cheapest state that needs an answer; None once there is an outcome."""
    while self.outcome is None:
      if not self.heap:
        return self.fail(self.why or "no state is left")
      self.popped += 1
      if self.popped > self.limits.states:
        return self.fail(f"limit of {self.limits.states} states (limits.states); the last: {self.why or 'none failed'}")
      _, _, state = heapq.heappop(self.heap)
      if state.answer is not None:
        value, trace = state.answer
        self.outcome = Outcome(value, trace, self.calls, state.cost)
        return None
      if (request := self.request(state)) is not None:
        name, size = request[0], 1 if isinstance(request[1], Level) else len(request[1])
        if sum(self.calls.values()) + size > self.limits.calls:
          self.drop(state, "")
          return self.fail(f"limit of {self.limits.calls} calls (limits.calls); the program may call itself for ever")
        self.calls[name] = self.calls.get(name, 0) + size
        return state, *request
    return None

  def fail(self, why: str) -> None:
    trace = _trace(self.last)
    self.outcome = Outcome(None, trace, self.calls, self.last.cost, why)

  def request(self, state: _State):
    """(handler, level or questions) that the state waits for; None if it went on, or died, without asking."""
    level, pending = state.levels[-1]
    if pending is None:
      if len(level.steps) < self.handlers[level.handler].most_steps:
        return level.handler, level
      self.close(state)
      return None
    handler = self.handlers.get(pending.step.handler)
    rest = pending.calls[len(pending.answers) :]
    if handler is None:
      self.drop(state, f"unknown handler [{pending.step.handler}]; there are {', '.join(self.handlers)}")
    elif not rest:
      self.finish(state)
    elif not isinstance(handler, Decomposer):
      return pending.step.handler, [Question(call.text, level.context) for call in rest]
    elif len(state.levels) >= self.limits.depth:
      self.drop(
        state, f"limit of {self.limits.depth} levels (limits.depth); does [{pending.step.handler}] call itself?"
      )
    else:
      opened = Level(pending.step.handler, rest[0].text, level.context)
      self.push(dataclasses.replace(state, levels=(*state.levels, (opened, None))))
    return None

  def proposed(self, state: _State, name: str, proposals) -> None:
    """A state for each different line; what a line leads to ends that state alone."""
    if isinstance(proposals, Failure):
      return self.drop(state, f"[{name}] failed: {proposals.why}")
    if not proposals:
      self.drop(state, f"[{name}] proposed nothing")
    seen = {}
    for proposal in proposals:
      seen.setdefault(proposal.line, proposal)
    for line, cost in seen.values():
      grown = dataclasses.replace(state, cost=state.cost + max(cost, 0.0))
      level, _ = state.levels[-1]
      try:
        require(cost >= 0, f"a step's cost is {cost}; it must be 0 or more")
        step = programs.parse_step(line)
        if step.text == END and step.handler is None:
          self.close(grown)
          continue
        pending = _Pending(line, step, tuple(programs.expand(step, [s.answer for s in level.steps], level.context)))
      except (ValueError, RecursionError) as error:  # InputErrors, and numbers or lists that nothing writes out
        self.drop(grown, f"[{name}] wrote {line!r:.80}: {error!s:.200}")
        continue
      self.push(_with_last(grown, level, pending))
    return None

  def answered(self, state: _State, name: str, answers) -> None:
    level, pending = state.levels[-1]
    if failed := [a for a in answers if isinstance(a, Failure)]:
      return self.drop(state, f"[{name}] failed: {failed[0].why}")
    cost = sum(a.cost for a in answers)
    if not cost >= 0:
      return self.drop(state, f"[{name}] gave an answer the cost {cost}; it must be 0 or more")
    values = tuple(a.value for a in answers)
    told = tuple((call.text, value) for call, value in zip(pending.calls[len(pending.answers) :], values, strict=True))
    pending = dataclasses.replace(pending, answers=pending.answers + values, told=pending.told + told)
    self.finish(dataclasses.replace(_with_last(state, level, pending), cost=state.cost + cost))
    return None

  def finish(self, state: _State) -> None:
    """All calls of the last level's step are answered: the step is done."""
    level, pending = state.levels[-1]
    try:
      answer = programs.collect(pending.step.op, pending.calls, pending.answers)
    except (ValueError, RecursionError) as error:
      return self.drop(state, f"{pending.line!r:.80}: {error!s:.200}")
    done = Done(pending.line, answer, pending.told)
    return self.push(_with_last(state, dataclasses.replace(level, steps=(*level.steps, done)), None))

  def close(self, state: _State) -> None:
    """The last level ends: its last answer is that of the call that opened it, or the question's."""
    *outer, (level, _) = state.levels
    if not level.steps:
      return self.drop(state, f"[{level.handler}] ended without a step")
    value = level.steps[-1].answer
    if not outer:
      return self.push(dataclasses.replace(state, answer=(value, level)))
    above, pending = outer[-1]
    pending = dataclasses.replace(pending, answers=(*pending.answers, value), told=(*pending.told, level))
    return self.push(dataclasses.replace(state, levels=(*outer[:-1], (above, pending))))


def _with_last(state: _State, level: Level, pending: _Pending | None) -> _State:
  return dataclasses.replace(state, levels=(*state.levels[:-1], (level, pending)))


def _trace(state: _State) -> Level:
  """The outermost level with what is open inside it as a last step without an answer."""
  inner = None
  for level, pending in reversed(state.levels):
    told = (*(pending.told if pending else ()), *([inner] if inner else []))
    line = pending.line if pending else ""
    inner = dataclasses.replace(level, steps=(*level.steps, Done(line, None, told))) if pending else level
  return inner
