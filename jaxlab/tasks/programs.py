"""The program language of decomposed prompting (Khot et al., ICLR 2023, arXiv 2210.02406): steps, operators, answers.

A program is a list of steps, one a line, that a decomposer writes one after the other, each knowing the answers so far:

  step := "[EOQ]" | "[" handler "] " text | "(" op ") [" handler "] " text | "(" op ") " JSON
  op   := (select | (project | filter)("" | Keys | Values))["(#k)"] ("_" (flat | unique | keys | values))*

`#k` in a text is the answer of the k-th step of the same level, `#C` the list of the context's paragraphs. The last
form of a step is the system's own: the answers of an operator's calls, to be merged. [EOQ] ends a level, whose last
answer is its own.

  step = parse_step('(project_values) [str_position] What is letter 3 of "#1"?')
  calls = expand(step, [["Ada", "Alan"]])        # one call an item: 'What is letter 3 of "Ada"?', ...
  collect(step.op, calls, ["a", "a"])            # ["a", "a"]: the pairs (item, answer) without their items

An answer is JSON. A pair is a list of two.
"""

import dataclasses
import json
import re
from collections.abc import Sequence

from jaxlab.core.checks import InputError, require

Json = None | bool | int | float | str | list | dict
END = "[EOQ]"
SUBS = ("flat", "unique", "keys", "values")
_PARTS = ("", "Keys", "Values")
BASES = ("select", *(base + part for base in ("project", "filter") for part in _PARTS))
_REFERENCE = re.compile(r"#(\d+|C)")
_OP = re.compile(r"([A-Za-z]+)(?:\(#(\d+|C)\))?((?:_[a-z]+)*)")
_STEP = re.compile(r"(?:\((?P<op>[A-Za-z_]+(?:\(#(?:\d+|C)\))?[a-z_]*)\) )?(?:\[(?P<handler>[^\[\]]+)\] )?(?P<text>.*)")
_YES = ("yes", "1", "true")


@dataclasses.dataclass(frozen=True)
class Op:
  """A base operation, the reference that a filter runs over where its text has several, and sub-operations in order."""

  base: str
  over: str | None = None
  subs: tuple[str, ...] = ()

  def __str__(self) -> str:
    return self.base + (f"(#{self.over})" if self.over else "") + "".join(f"_{sub}" for sub in self.subs)


@dataclasses.dataclass(frozen=True)
class Step:
  """A line of a program. No op means select; no handler: the JSON in `text` is merged; neither: the end of a level."""

  text: str
  handler: str | None = None
  op: Op | None = None

  def __str__(self) -> str:
    op = f"({self.op}) " if self.op else ""
    return f"{op}[{self.handler}] {self.text}" if self.handler else op + self.text


@dataclasses.dataclass(frozen=True)
class Call:
  """One question to a handler, and what it is about: the item, and for a pair its other half."""

  text: str
  item: Json = None
  other: Json = None


def parse_step(line: str) -> Step:
  """The step of a line; `str` gives the same line back.

  Raises:
    InputError: the line is none, or its operator is unknown.
  """
  if line == END:
    return Step(END)
  match = _STEP.fullmatch(line)
  op = parse_op(match["op"]) if match and match["op"] else None
  require(
    match is not None and (match["handler"] or op) is not None and bool(match["text"]),
    f"{line!r:.80} is no step; write '[handler] question', '(op) [handler] question' or {END}",
  )
  if match["handler"] is None:
    parse_json(match["text"])
  return Step(match["text"], match["handler"], op)


def parse_op(text: str) -> Op:
  """Raises InputError for an unknown base or sub-operation, or a reference that no filter can run over."""
  match = _OP.fullmatch(text)
  subs = tuple(match[3].split("_")[1:]) if match else ()
  require(
    match is not None and match[1] in BASES and all(sub in SUBS for sub in subs),
    f"unknown operator {text!r:.60}; it is one of {', '.join(BASES)}, then any of {', '.join('_' + s for s in SUBS)}",
  )
  require(
    match[2] is None or match[1].startswith("filter"), f"operator {text!r:.60}: only a filter names what it runs over"
  )
  return Op(match[1], match[2], subs)


def parse_json(text: str) -> Json:
  """Raises InputError where json.loads fails, or the text has NaN or Infinity, which are no JSON."""
  try:
    return json.loads(text, parse_constant=_no_constant)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{text!r:.80} is no JSON ({error})") from None


def dumps(value: Json) -> str:
  """The one way answers are written: as the system's lines have them, letters beyond ASCII as they are."""
  return json.dumps(value, ensure_ascii=False)


def _no_constant(name):
  raise ValueError(f"{name} is no number")


def expand(step: Step, answers: Sequence[Json], context: Sequence[str] = ()) -> list[Call]:
  """The calls that a step makes: one for select, one an item for the others.

  select puts the JSON of answers in the place of references. project and filter run over one reference's list (a bare
  string is a list of one); its items, strings or numbers, are put in as they are. For lists of pairs projectKeys and
  filterKeys take the first half, projectValues and filterValues the second.

  Args:
    answers: of the earlier steps of this level, `#1` first.
    context: paragraphs; "PARA_1", ... stand for them in `#C`.

  Raises:
    InputError: a reference to a step that has no answer yet, or an answer of another type than the operator needs.
  """
  require(step.handler is not None, f"step {str(step)!r:.60} has no handler to call")
  op = step.op or Op("select")
  names = list(dict.fromkeys(_REFERENCE.findall(step.text)))
  known = {name: _answer(name, answers, context) for name in names}
  if op.base == "select":
    return [Call(_replaced(step.text, {name: dumps(value) for name, value in known.items()}))]
  over = op.over or (names[0] if len(names) == 1 else None)
  require(
    over in known and (len(names) == 1 or op.base.startswith("filter")),
    f"{op} runs over one answer; {step.text!r:.60} has {len(names)} (a filter may name it: filter(#2))",
  )
  rest = {name: dumps(value) for name, value in known.items() if name != over}
  items, calls = known[over], []
  items = [items] if isinstance(items, str) else items
  require(isinstance(items, list), f"{op} runs over a list; #{over} is {dumps(items)!s:.60}")
  for item in items:
    place = _place(op.base)
    require(place is None or _is_pair(item), f"{op} needs pairs; #{over} holds {dumps(item)!s:.60}")
    about, other = (item, None) if place is None else (item[place], item[1 - place])
    calls.append(Call(_replaced(step.text, rest | {over: _as_text(about, op, over)}), about, other))
  return calls


def collect(op: Op | None, calls: Sequence[Call], answers: Sequence[Json]) -> Json:
  """The answer of a step from those of its calls, its sub-operations applied.

  select: the answer itself. project: pairs [item, answer]; projectKeys [answer, value], projectValues [key, answer].
  filter: the items (or pairs) whose answer is true: True, or one of "yes", "1", "true" in any case.

  Raises:
    InputError: a filter's answer that is neither a truth value nor a string, or as `apply_sub`.
  """
  require(len(calls) == len(answers), f"{len(answers)} answers to {len(calls)} calls")
  op = op or Op("select")
  place = _place(op.base)
  pair = lambda call, value: [value, call.other] if place == 0 else [call.other, value]
  if op.base == "select":
    result = answers[0]
  elif op.base.startswith("project"):
    plain = lambda call, answer: [call.item, answer] if place is None else pair(call, answer)
    result = [plain(call, answer) for call, answer in zip(calls, answers, strict=True)]
  else:
    kept = [call for call, answer in zip(calls, answers, strict=True) if is_true(answer)]
    result = [call.item if place is None else pair(call, call.item) for call in kept]
  for sub in op.subs:
    result = apply_sub(sub, result)
  return result


def apply_sub(sub: str, value: Json) -> Json:
  """flat: a list without lists in it; unique: the first of equal items; keys, values: a half of each pair.

  Raises:
    InputError: the value is no list, or for keys and values no list of pairs.
  """
  require(sub in SUBS, f"unknown sub-operation {sub!r}; it is one of {', '.join(SUBS)}")
  require(isinstance(value, list), f"{sub} needs a list, not {dumps(value)!s:.60}")
  if sub == "flat":
    return [leaf for item in value for leaf in (apply_sub("flat", item) if isinstance(item, list) else [item])]
  if sub == "unique":
    return list({dumps(item): item for item in value}.values())
  require(all(map(_is_pair, value)), f"{sub} needs pairs, not {dumps(value)!s:.60}")
  return [item[SUBS.index(sub) - 2] for item in value]


def is_true(answer: Json) -> bool:
  """Raises InputError for an answer that is neither a truth value nor a string."""
  require(isinstance(answer, bool | str), f"a filter asks yes or no; the answer was {dumps(answer)!s:.60}")
  return answer if isinstance(answer, bool) else answer.strip().lower() in _YES


def _answer(name, answers, context):
  if name == "C":
    return [f"PARA_{i + 1}" for i in range(len(context))]
  require(1 <= int(name) <= len(answers), f"#{name} has no answer; this level has {len(answers)} so far")
  return answers[int(name) - 1]


def _replaced(text, values):
  return _REFERENCE.sub(lambda match: values[match[1]], text)


def _as_text(item, op, over):
  plain = isinstance(item, str | int | float) and not isinstance(item, bool)
  require(plain, f"{op} puts strings into its question; #{over} holds {dumps(item)!s:.60}")
  return str(item)


def _place(base):
  return 0 if base.endswith("Keys") else 1 if base.endswith("Values") else None


def _is_pair(item):
  return isinstance(item, list) and len(item) == 2
