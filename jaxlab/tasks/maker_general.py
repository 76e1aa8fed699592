"""MAKER on tasks that nobody has cut into steps, with agents that are texts: problems split, answer and join by votes.

A problem is split into two and a rule that joins their answers, or called atomic, again and again; every split, answer
and joined answer is one of several proposals, between which votes decide, first to `votes` of them.

  agents = Agents(split, answer, join)            # `split(problems)`, `answer(problems)`, `join(problem, a, b)`
  solved, = solve(["12 * 34"], agents, votes=2, depth=5)
  solved.answer, solved.trace

  ask = ballots(generate, read, margin=3)         # `generate` from jaxlab.tasks.endpoint or any other model
  decided = ask(prompts)                          # each prompt is asked until one answer is 3 ahead

All problems that are open on a level are asked about in one batch.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from jaxlab.core.checks import InputError, require, require_counts
from jaxlab.tasks.handlers import Generate


@dataclasses.dataclass
class Vote:
  """One prompt's votes: by answer, flagged samples, and the answer that won (None: none did before the limit)."""

  counts: Counter = dataclasses.field(default_factory=Counter)
  flagged: int = 0
  answer: str | None = None


def ballots(generate: Generate, read: Callable[[str], str | None], *, margin: int, most: int = 100, ahead: bool = True):
  """`ask(prompts) -> [Vote]`: one sample a prompt and round, all undecided prompts in a batch, until each is decided.

  Args:
    generate: `jaxlab.tasks.endpoint.completions` at a temperature above 0, or any model; the first text counts.
    read: the answer in a text, in one spelling; None is a red flag (not in the format, too long), which is no vote.
    margin: votes ahead of every other answer, or with `ahead` false, votes.
    most: samples a prompt may take; then its vote has no answer.

  Raises:
    InputError: margin or most below 1; and when called, a model that answers more or fewer prompts than it was asked.
  """
  require_counts(margin=margin, most=most)

  def decided(vote, answer):
    others = max((count for other, count in vote.counts.items() if other != answer), default=0)
    return vote.counts[answer] >= margin + (others if ahead else 0)

  def ask(prompts: Sequence[str]) -> list[Vote]:
    votes = [Vote() for _ in prompts]
    open_ = list(range(len(prompts)))
    for _ in range(most):
      if not open_:
        break
      rows = generate([prompts[i] for i in open_])
      require(len(rows) == len(open_), f"the model answered {len(rows)} of {len(open_)} prompts")
      for i, row in zip(open_, rows, strict=True):
        answer = read(row[0][0]) if row else None
        if answer is None:
          votes[i].flagged += 1
          continue
        votes[i].counts[answer] += 1
        if decided(votes[i], answer):
          votes[i].answer = answer
      open_ = [i for i in open_ if votes[i].answer is None]
    return votes

  return ask


@dataclasses.dataclass(frozen=True)
class Agents:
  """What is asked, each for a batch, one proposal a question; called again it may propose something else.

  Attributes:
    split: problems -> (first, second, how to join) each, or None where a problem is atomic.
    answer: problems -> an answer each; None is a red flag.
    join: (how, first answer, second answer) each -> an answer; None is a red flag.
  """

  split: Callable[[Sequence[str]], Sequence[tuple[str, str, str] | None]]
  answer: Callable[[Sequence[str]], Sequence[str | None]]
  join: Callable[[Sequence[tuple[str, str, str]]], Sequence[str | None]]


@dataclasses.dataclass(frozen=True)
class Solved:
  """An answer and how it came about: {"problem", "answer", "votes"[, "how", "parts"]}; samples of all agents."""

  answer: str
  trace: dict
  samples: int


def solve(problems: Sequence[str], agents: Agents, *, votes: int = 2, depth: int = 5) -> list[Solved]:
  """Solves every problem by the recursive form, level by level, all problems side by side.

  A proposal wins with `votes` votes; of 2 votes - 1 with none so often the most frequent one, the earliest of equals.

  Args:
    depth: levels of splits; what is open then is answered as it is.

  Raises:
    InputError: votes or depth below 1, or an agent whose proposals were all flagged.
  """
  require_counts(votes=votes, depth=depth)
  roots = [_Node(problem) for problem in problems]
  open_, leaves = list(roots), []
  for _ in range(depth):
    for node, how in zip(open_, _proposals(agents.split, open_, lambda n: n.problem, votes, "split"), strict=True):
      if how is not None:
        node.how, node.parts = how[2], (_Node(how[0]), _Node(how[1]))
    leaves += [node for node in open_ if not node.parts]
    open_ = [part for node in open_ for part in node.parts]
  leaves += open_
  for node, answer in zip(leaves, _proposals(agents.answer, leaves, lambda n: n.problem, votes, "answer"), strict=True):
    node.answer = answer
  inner = [node for root in roots for node in root.walk() if node.parts]
  while inner:
    ready = [node for node in inner if all(part.answer is not None for part in node.parts)]
    question = lambda n: (n.how, n.parts[0].answer, n.parts[1].answer)
    for node, answer in zip(ready, _proposals(agents.join, ready, question, votes, "join"), strict=True):
      node.answer = answer
    inner = [node for node in inner if node.answer is None]
  return [Solved(root.answer, root.as_json(), sum(node.samples for node in root.walk())) for root in roots]


class _Node:
  def __init__(self, problem):
    self.problem, self.how, self.parts, self.answer, self.samples = problem, None, (), None, 0

  def walk(self):
    yield self
    for part in self.parts:
      yield from part.walk()

  def as_json(self) -> dict:
    told = {"problem": self.problem, "answer": self.answer, "samples": self.samples}
    return told | ({"how": self.how, "parts": [part.as_json() for part in self.parts]} if self.parts else {})


def _proposals(agent, nodes, question, votes, name):
  """The winning proposal for every node: rounds of one proposal each until a node has `votes` equal ones."""
  counts, found = [Counter() for _ in nodes], [None] * len(nodes)
  open_ = list(range(len(nodes)))
  flagged_means_none = name == "split"  # for a split None says that a problem is atomic
  for _ in range(2 * votes - 1):
    if not open_:
      break
    proposals = agent([question(nodes[i]) for i in open_])
    require(len(proposals) == len(open_), f"{name} gave {len(proposals)} proposals for {len(open_)} problems")
    for i, proposal in zip(open_, proposals, strict=True):
      nodes[i].samples += 1
      if proposal is not None or flagged_means_none:
        counts[i][proposal] += 1
    open_ = [i for i in open_ if max(counts[i].values(), default=0) < votes]
  for i, count in enumerate(counts):
    if not count:
      raise InputError(f"{name} proposed nothing usable for {question(nodes[i])!r:.80} in {2 * votes - 1} attempts")
    found[i] = count.most_common(1)[0][0]
  return found
