"""Questions with the rationales a teacher would write, made by programs: sentences that restate, reason, lead over and
sum up, in several wordings. Which is which is known, so that what a student leaves out can be judged.

A text is words between spaces; numbers are digits and endings letters, a word each.
"""

import random
import string
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxlab.sequence.skip_thinking import Sample, Tags

REASON, FILLER = "reason", "filler"
_PEOPLE = ("anna", "ben", "clara", "dan", "eva", "finn", "gus", "hana", "ivan", "jude", "kira", "leo")
_THINGS = ("ball", "book", "cup", "hat", "key", "lamp", "map", "pen")
_WORDS = (
  *("apple", "brick", "cloud", "drum", "eagle", "fork", "grape", "house", "iron", "jacket", "kite", "lemon"),
  *("moon", "nest", "ocean", "piano", "queen", "river", "stone", "tiger", "urn", "vase", "wolf", "yarn"),
)
_MONTHS = dict(january=31, march=31, april=30, may=31, june=30, july=31, august=31, september=30, october=31)
_AFTER = dict(zip(_MONTHS, ("february", "april", "may", "june", "july", "august", "september", "october", "november")))  # noqa: B905
_TRANSITIONS = ("now we go on .", "this is known now .", "we look at what comes next .", "so far so good .")


class Unit(NamedTuple):
  """kind: `REASON` for a step that the answer rests on, or `FILLER`."""

  kind: str
  text: str


class Story(NamedTuple):
  question: str
  units: tuple[Unit, ...]
  answer: str


def digits(number: int) -> str:
  return " ".join(str(number))


def letters(rng: random.Random, count: int) -> tuple[str, list[str], str, str, str]:
  """The last letters of words."""
  words = rng.sample(_WORDS, count)
  steps = [rng.choice((f"{w} ends in {w[-1]} .", f"the last letter of {w} is {w[-1]} .")) for w in words]
  answer = " ".join(w[-1] for w in words)
  restated = f"the words are {' '.join(words)} ."
  return f"last letters of {' '.join(words)} ?", steps, answer, restated, f"together they are {answer} ."


def coin(rng: random.Random, count: int):
  """A coin that people flip or do not."""
  people, up = rng.sample(_PEOPLE, count), True
  told, steps = [], []
  for person in people:
    flips = rng.random() < 0.5
    up ^= flips
    told.append(f"{person} flips it ." if flips else f"{person} does not flip it .")
    side = "heads" if up else "tails"
    steps.append(rng.choice((f"after {person} it shows {side} .", f"then {person} leaves it at {side} .")))
  question = f"a coin shows heads . {' '.join(told)} does it show heads ?"
  return question, steps, "yes" if up else "no", "the coin shows heads at first .", f"in the end it shows {side} ."


def swaps(rng: random.Random, count: int):
  """Three people with three things, who swap."""
  people, things = rng.sample(_PEOPLE, 3), rng.sample(_THINGS, 3)
  owned = lambda: " , ".join(f"{person} has the {thing}" for person, thing in zip(people, things, strict=True))
  start, told, steps = owned(), [], []
  for _ in range(count):
    a, b = rng.sample(range(3), 2)
    things[a], things[b] = things[b], things[a]
    told.append(f"{people[a]} and {people[b]} swap .")
    steps.append(rng.choice((f"after that {owned()} .", f"now {owned()} .")))
  asked = rng.randrange(3)
  question = f"{start} . {' '.join(told)} what does {people[asked]} have ?"
  summary = f"at last {people[asked]} has the {things[asked]} ."
  return question, steps, things[asked], f"at first {start} .", summary


def sums(rng: random.Random, count: int):
  """Additions and subtractions below 100."""
  person, thing, total = rng.choice(_PEOPLE), rng.choice(_THINGS), rng.randint(5, 40)
  start, told, steps = total, [], []
  for _ in range(count):
    more = rng.random() < 0.5 or total < 3
    number = rng.randint(1, min(30, 99 - total)) if more and total < 99 else rng.randint(1, total)
    more = more and total < 99
    new = total + number if more else total - number
    told.append(f"{rng.choice(('buys', 'finds') if more else ('loses', 'sells'))} {digits(number)} .")
    sign = "plus" if more else "minus"
    steps.append(f"{digits(total)} {sign} {digits(number)} {rng.choice(('is', 'makes'))} {digits(new)} .")
    total = new
  question = f"{person} has {digits(start)} {thing} . {person} {f' {person} '.join(told)} how many are there ?"
  return (
    question,
    steps,
    digits(total),
    f"{person} has {digits(start)} {thing} .",
    f"{person} has {digits(total)} now .",
  )


def dates(rng: random.Random, _: int):
  """A date at most 27 days later, in this month or the next."""
  month = rng.choice(tuple(_MONTHS))
  day, later, days = rng.randint(1, _MONTHS[month]), rng.randint(2, 27), _MONTHS[month]
  steps = [f"{digits(day)} plus {digits(later)} is {digits(day + later)} .", f"{month} has {digits(days)} days ."]
  if day + later > days:
    steps.append(f"{digits(day + later)} minus {digits(days)} is {digits(day + later - days)} .")
    answer = f"{digits(day + later - days)} {_AFTER[month]}"
  else:
    answer = f"{digits(day + later)} {month}"
  question = f"today is {digits(day)} {month} . which date is {digits(later)} days later ?"
  return question, steps, answer, f"the day is {digits(day)} {month} .", f"so the date is {answer} ."


# What is asked, of how many words, people or steps; the question, steps, the answer, what restates and what sums up.
TASKS: dict[str, Callable] = {"letters": letters, "coin": coin, "swaps": swaps, "sums": sums, "dates": dates}


def story(rng: random.Random, task: str, filler: float, items: tuple[int, int]) -> Story:
  """A question of items[0] to items[1] words, people or steps, and a rationale of whose sentences about `filler` do not
  reason."""
  question, steps, answer, restated, summary = TASKS[task](rng, rng.randint(*items))
  wanted = round(len(steps) * filler / (1 - filler))
  units = [Unit(FILLER, restated)][:wanted] + [Unit(REASON, step) for step in steps]
  for _ in range(wanted - 2):
    units.insert(rng.randint(1, len(units)), Unit(FILLER, rng.choice(_TRANSITIONS)))
  units += [Unit(FILLER, summary)] * (wanted >= 2)
  return Story(question, tuple(units), answer)


def stories(
  task: str, count: int, *, filler: float, items: tuple[int, int], seed: int, without: set[str] = frozenset()
) -> list[Story]:
  """Different questions, none of those in `without`."""
  rng = random.Random(f"{task} {seed}")
  made: dict[str, Story] = {}
  while len(made) < count:
    one = story(rng, task, filler, items)
    if one.question not in without:
      made.setdefault(one.question, one)
  return list(made.values())


def vocabulary(chunks: int) -> tuple[dict[str, int], Tags]:
  """({word: id}, tags) of everything that can be said."""
  text = " ".join(
    [s for task in TASKS for s in _said(task)] + [*string.ascii_lowercase, *string.digits, *_PEOPLE, *_THINGS, *_WORDS]
  )
  words = {word: i for i, word in enumerate(dict.fromkeys(sorted(text.split())))}
  first = len(words)
  return words, Tags(first, tuple(range(first + 1, first + 1 + chunks)), first + chunks + 1, first + chunks + 2)


def _said(task: str) -> list[str]:
  rng = random.Random(task)
  made = [story(rng, task, 0.6, (3, 4)) for _ in range(400)]
  return [text for one in made for text in (one.question, one.answer, *(unit.text for unit in one.units))]


def sample(one: Story, words: dict[str, int]) -> Sample:
  ids = lambda text: [words[word] for word in text.split()]
  return Sample(ids(one.question), [ids(unit.text) for unit in one.units], ids(one.answer))


def reasons(one: Story) -> np.ndarray:
  """bool (units,): which reason."""
  return np.array([unit.kind == REASON for unit in one.units])
