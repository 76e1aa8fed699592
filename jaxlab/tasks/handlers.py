"""Handlers of decomposed prompting: functions, BM25 retrieval, prompted models, and a journal that resumes.

  handlers = {
    "decompose": prompted_decomposer(generate, examples),      # a model that continues programs
    "qa": prompted(generate, qa_examples),                     # a model that answers
    "retrieve": retriever(titles, paragraphs, top=2),
    "calculate": function(arithmetic),
  }
  handlers = {name: recorded(handler, name, "calls.jsonl") for name, handler in handlers.items()}

`generate(prompts)` is any model: for each prompt one or several (text, mean negative log-probability of its tokens).
"""

import ast
import contextlib
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import bm25s

from jaxlab.core.checks import InputError, require, require_counts
from jaxlab.core.foreign import foreign
from jaxlab.tasks import programs
from jaxlab.tasks.decomposed_prompting import Answer, Decomposer, Failure, Leaf, Level, Proposal, Question

Generate = Callable[[Sequence[str]], Sequence[Sequence[tuple[str, float]]]]
# What one question's own text can lead to: numbers of too many digits, lists too deep. (An InputError is a ValueError.)
_FAULTS = (ValueError, LookupError, ArithmeticError, RecursionError)
_OPERATORS = {
  ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_PARAGRAPH = re.compile(r"PARA_(\d+) ")


def function(answer: Callable[[str], programs.Json]) -> Leaf:
  """A leaf that computes: a ValueError, LookupError, ArithmeticError or RecursionError fails that question alone."""

  def ask(questions):
    return [_tried(answer, question.text) for question in questions]

  return ask


def _tried(answer, text):
  try:
    return Answer(answer(text))
  except _FAULTS as error:
    return Failure(f"{error!s:.200}" or type(error).__name__)


def policy(lines: Callable[[Level], str | Sequence[Proposal]], *, most_steps: int = 10) -> Decomposer:
  """A decomposer whose next line is computed, or whose candidates are; what is raised as in `function` ends that state
  alone."""

  def propose(level):
    try:
      found = lines(level)
    except _FAULTS as error:
      return Failure(f"{error!s:.200}" or type(error).__name__)
    return [Proposal(found)] if isinstance(found, str) else found

  return Decomposer(lambda levels: [propose(level) for level in levels], most_steps)


def extract(pattern: str, text: str) -> str:
  """What the one group of a pattern matches, the last time: an answer that a decomposer has written into its question.

  Raises:
    InputError: it matches nowhere, or has another number of groups.
  """
  compiled = re.compile(pattern)
  require(compiled.groups == 1, f"pattern {pattern!r:.60} has {compiled.groups} groups; give it one")
  found = compiled.findall(text)
  require(bool(found), f"{text!r:.60} has nothing that {pattern!r:.60} matches")
  return found[-1]


def arithmetic(text: str) -> int | float:
  """The value of numbers, + - * / // % and parentheses.

  Raises:
    InputError: anything else in it. ZeroDivisionError, OverflowError: no value.
  """
  try:
    tree = ast.parse(text.strip(), mode="eval")
  except (SyntaxError, RecursionError, MemoryError, ValueError):
    raise InputError(f"{text!r:.60} is no arithmetic; use numbers, + - * / // % and parentheses") from None
  return _value(tree.body, text)


def _value(node, text):
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    return node.value
  operation = _OPERATORS.get(type(getattr(node, "op", None)))
  require(operation is not None, f"{text!r:.60} is no arithmetic; use numbers, + - * / // % and parentheses")
  operands = (node.operand,) if isinstance(node, ast.UnaryOp) else (node.left, node.right)
  return operation(*(_value(operand, text) for operand in operands))


def retriever(
  titles: Sequence[str], paragraphs: Sequence[str], *, top: int = 2, k1: float = 1.2, b: float = 0.75
) -> Leaf:
  """A leaf that answers {"titles": [...], "paragraphs": [...]}: the `top` paragraphs by BM25, the best first.

  Raises:
    InputError: no paragraph, as many titles as paragraphs are missing, or top beyond them.
  """
  require(len(titles) == len(paragraphs), f"{len(titles)} titles for {len(paragraphs)} paragraphs; give one each")
  require(1 <= top <= len(paragraphs), f"top is {top}; it must lie in 1..{len(paragraphs)}, the paragraphs there are")
  words = lambda texts: [re.findall(r"\w+", text.lower()) for text in texts]
  index = bm25s.BM25(k1=k1, b=b, method="lucene")
  texts = [f"{title} {paragraph}" for title, paragraph in zip(titles, paragraphs, strict=True)]
  index.index(words(texts), show_progress=False)

  def ask(questions):
    found, _ = index.retrieve(words([question.text for question in questions]), k=top, show_progress=False)
    return [Answer({"titles": [titles[i] for i in row], "paragraphs": [paragraphs[i] for i in row]}) for row in found]

  return ask


def prompted(generate: Generate, prompt: str = "", *, pattern: str | None = None, text_only: bool = False) -> Leaf:
  """A leaf that asks a model: the prompt, the paragraphs, "Q: question" and "A:"; the first line is the answer.

  Args:
    pattern: the answer is what its group matches.
    text_only: the answer is a string as it stands. Otherwise a line that is JSON is read as such: "3" becomes a number.
  """

  def ask(questions):
    texts = [_prompt(prompt, question) for question in questions]
    return [_answer(candidates, pattern, text_only) for candidates in generate(texts)]

  return ask


def _prompt(prompt, question: Question):
  text, context = question
  if named := _PARAGRAPH.match(text):
    at = int(named[1])
    text, context = text[named.end() :], context[at - 1 : at]
  return "\n\n".join(filter(None, (prompt.rstrip(), *context, f"Q: {text}\nA:")))


def _answer(candidates, pattern, text_only):
  if not candidates:
    return Failure("the model gave no answer")
  text, cost = candidates[0]
  line = _first_line(text)
  if pattern:
    try:
      line = extract(pattern, line)
    except InputError as error:
      return Failure(str(error))
  if not text_only:
    with contextlib.suppress(InputError):  # what is no JSON is a string
      line = programs.parse_json(line)
  return Answer(line, cost)


def _first_line(text):
  return text.strip().partition("\n")[0].strip()


def prompted_decomposer(generate: Generate, prompt: str = "", *, most_steps: int = 10) -> Decomposer:
  """A decomposer that asks a model to continue a program: the prompt, the level so far, "QS:"; first lines count."""

  def propose(levels):
    found = generate(["\n\n".join(filter(None, (prompt.rstrip(), level.prompt()))) for level in levels])
    return [[Proposal(_first_line(text), cost) for text, cost in row] for row in found]

  return Decomposer(propose, most_steps)


def recorded(handler: Leaf | Decomposer, name: str, path: str | Path, *, part: int = 64) -> Leaf | Decomposer:
  """The same handler, each of its answers written to a file of JSON lines as it comes, and never asked for twice.

  What an interrupted search had been told is told again at once, so that the same search goes on where it stopped.
  Failures are not kept. Several handlers may share a file; a last line that was cut off is dropped.

  Args:
    part: questions that are asked at once; their answers are in the file before the next ones are asked.

  Raises:
    InputError: the file holds something else, or part is below 1.
  """
  require_counts(part=part)
  decomposes = isinstance(handler, Decomposer)
  key = lambda asked: [name, *(asked.as_json().values() if isinstance(asked, Level) else ()), *_context(asked)]
  read = (lambda row: [Proposal(*p) for p in row]) if decomposes else (lambda row: Answer(*row))
  journal = _Journal(path, name, read)
  ask = handler.propose if decomposes else handler

  def remembered(requests):
    names = [programs.dumps(key(request)) for request in requests]
    new = list({k: request for k, request in zip(names, requests, strict=True) if k not in journal.known}.items())
    failed = {}
    for at in range(0, len(new), part):
      keys, asked = zip(*new[at : at + part], strict=True)
      for k, value in zip(keys, ask(list(asked)), strict=True):
        if isinstance(value, Failure):
          failed[k] = value
        else:
          journal.write(k, value)
    return [failed[k] if k in failed else journal.known[k] for k in names]

  return Decomposer(remembered, handler.most_steps) if decomposes else remembered


def recorded_generate(generate: Generate, name: str, path: str | Path, *, part: int = 64) -> Generate:
  """The same model, each answer written as it comes, as by `recorded`: for what asks a model itself, as
  `maker_general.ballots`. A prompt that is asked again has another answer, which is told again in the same order.

  Raises:
    InputError: as `recorded`.
  """
  require_counts(part=part)
  journal = _Journal(path, name, lambda rows: [tuple(row) for row in rows])
  asked: Counter[str] = Counter()

  def remembered(prompts):
    keys = []
    for prompt in prompts:
      keys.append(programs.dumps([name, prompt, asked[prompt]]))
      asked[prompt] += 1
    new = [(k, prompt) for k, prompt in zip(keys, prompts, strict=True) if k not in journal.known]
    for at in range(0, len(new), part):
      some = new[at : at + part]
      rows = generate([prompt for _, prompt in some])
      require(len(rows) == len(some), f"the model answered {len(rows)} of {len(some)} prompts")
      for (k, _), row in zip(some, rows, strict=True):
        journal.write(k, list(row))
    return [journal.known[k] for k in keys]

  return remembered


class _Journal:
  """A file of lines [[name, ...], value], those of one name by their first halves."""

  def __init__(self, path: str | Path, name: str, read: Callable):
    self.path = Path(path)
    self.known = {programs.dumps(asked): read(value) for asked, value in _lines(self.path) if asked[0] == name}

  def write(self, key: str, value) -> None:
    """ASCII: a model may write what ends a line elsewhere, or half a character."""
    with self.path.open("a", encoding="ascii") as file:
      file.write(f"{json.dumps([json.loads(key), value])}\n")
    self.known[key] = value


def _context(asked):
  return [list(asked.context)] if isinstance(asked, Level) else [asked.text, list(asked.context)]


def _lines(path: Path) -> list:
  if not path.is_file():
    return []
  with foreign(path, "expected lines [[handler, ...], answer] of an earlier run"):
    text = path.read_text("utf-8")
    whole, _, rest = text.rpartition("\n")
    if rest:
      path.write_text(f"{whole}\n" if whole else "", "utf-8")
    rows = [json.loads(line) for line in whole.split("\n")] if whole else []
    require(all(len(row) == 2 and isinstance(row[0], list) and row[0] for row in rows), f"{path} is no journal")
  return rows
