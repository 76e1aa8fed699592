"""The published programs for letters and lists by symbolic decomposers, the leaves they call, and questions."""

import json
import re
from pathlib import Path

import numpy as np

from jaxlab.core.checks import require
from jaxlab.core.foreign import foreign, read_text
from jaxlab.tasks import handlers
from jaxlab.tasks.decomposed_prompting import Decomposer, Leaf
from jaxlab.tasks.programs import END

DELIMITERS = {"a space": " ", "a comma": ",", "a semi-colon": ";", "nothing": ""}
HELD_OUT = "a semi-colon"  # no training example has it
SEEN = tuple(name for name in DELIMITERS if name != HELD_OUT)
BASE = 4  # lists with fewer items are reversed at once


def quoted(text: str) -> list[str]:
  """What stands between double quotes."""
  return re.findall(r'"([^"]*)"', text)


def reverse_question(items: list[str]) -> str:
  return f'Reverse the sequence "{", ".join(items)}".'


def letters_question(words: list[str], position: int | str, how: str) -> str:
  """The letters at a position, 1 the first, or "last"."""
  place = "the last letters" if position == "last" else f"the letters at position {position}"
  return f'Take {place} of the words in "{" ".join(words)}" and concatenate them using {how}.'


def read_letters(question: str) -> tuple[str, str, str]:
  """(the place of a letter, the words, the delimiter's name) of such a question."""
  match = re.fullmatch(r'Take (.*) of the words in "(.*)" and concatenate them using (.*)\.', question)
  require(match is not None, f"{question!r:.80} is no question about letters")
  place = "the last letter" if "last" in match[1] else f"the letter at position {match[1].split()[-1]}"
  return place, match[2], match[3]


def _letter_cat(level):
  """Split the words, the letter at the position of each, merge them."""
  place, words, how = read_letters(level.question)
  return [
    f'[split] What are the words in "{words}"?',
    f'(project_values) [str_position] What is {place} of "#1"?',
    f"[merge] Concatenate #2 using {how}.",
    END,
  ][len(level.steps)]


def _str_position(level):
  """Decomposed once more: the letters with their positions, then the one that is wanted."""
  place, word = re.fullmatch(r'What is the (.*) of "(.*)"\?', level.question).groups()
  return [
    f'[letters] What are the letters and their positions in "{word}"?',
    f"[arr_position] What is the {place} in #1?",
    END,
  ][len(level.steps)]


def _reverse(level):
  """Halves with numbers, without them, each reversed by this very program, joined; short lists are a leaf's."""
  items = quoted(level.question)[-1].split(", ")
  half = len(items) // 2
  numbered = [f"{i + 1}. {item}" for i, item in enumerate(items)]
  part = lambda some: f'[extract] The items are {" ".join(numbered)}. The half is "{", ".join(some)}".'
  if len(items) < BASE:
    return [part(numbered), f'[cot] Reverse the sequence "{", ".join(items)}".', END][len(level.steps)]
  return [
    part(numbered[:half]),
    part(numbered[half:]),
    "[remove_numbers] Remove the numbers from #1.",
    "[remove_numbers] Remove the numbers from #2.",
    "[reverse] Reverse the sequence #3.",
    "[reverse] Reverse the sequence #4.",
    "[join] #6 #5",
    END,
  ][len(level.steps)]


def decomposers() -> dict[str, Decomposer]:
  return {
    "letter_cat": handlers.policy(_letter_cat),
    "str_position": handlers.policy(_str_position),
    "reverse": handlers.policy(_reverse),
  }


def symbolic_leaves() -> dict[str, Leaf]:
  """Every leaf as a function."""
  answers = {
    "split": lambda text: quoted(text)[-1].split(),
    "letters": lambda text: [[c, i + 1] for i, c in enumerate(quoted(text)[-1])],
    "arr_position": _at_position,
    "merge": _merge,
    "extract": extract,
    "cot": lambda text: ", ".join(quoted(text)[-1].split(", ")[::-1]),
    "remove_numbers": lambda text: re.sub(r"\d+\. ", "", quoted(text)[-1]),
    "join": lambda text: ", ".join(quoted(text)),
  }
  return {name: handlers.function(answer) for name, answer in answers.items()}


def extract(text: str) -> str:
  """What the decomposer has worked out in its question."""
  return handlers.extract(r'"([^"]*)"', text)


def _at_position(text):
  pairs = json.loads(text[text.index("[") : text.rindex("]") + 1])
  return pairs[-1][0] if "last" in text else {p: c for c, p in pairs}[int(re.search(r"position (\d+)", text)[1])]


def _merge(text):
  words, how = read_merge(text)
  return DELIMITERS[how].join(words)


def read_merge(text: str) -> tuple[list[str], str]:
  """(letters, the delimiter's name) of a question to [merge]."""
  words, how = re.fullmatch(r"Concatenate (\[.*\]) using (.*)\.", text).groups()
  return json.loads(words), how


def model_calls(n: int) -> int:
  """L(n), extraction not counted: below 4 items 3 generations and the base case; else 8, 3 leaves, and both halves."""
  return 4 if n < BASE else 11 + model_calls(n // 2) + model_calls(n - n // 2)


def generated(
  rng: np.random.Generator, kind: str, size: int, count: int, words: list[str], delimiters: tuple[str, ...] = SEEN
) -> list[tuple[str, str]]:
  """(question, answer): `kind` "reverse" with `size` items, or "letters" with as many words, at any position."""
  found = []
  for _ in range(count):
    chosen = [str(word) for word in rng.choice(words, size, replace=len(words) < size)]
    if kind == "reverse":
      found.append((reverse_question(chosen), ", ".join(chosen[::-1])))
      continue
    how = str(rng.choice(delimiters))
    position = int(rng.integers(1, min(map(len, chosen)) + 1)) if rng.random() < 0.8 else "last"
    letters = [word[-1] if position == "last" else word[position - 1] for word in chosen]
    found.append((letters_question(chosen, position, how), DELIMITERS[how].join(letters)))
  return found


def given(file: Path) -> list[tuple[str, str]]:
  """(question, answer) of a test set: {group: {"qa_pairs": [{"question", "answer": {"spans": [text]}}]}} as JSON.

  Raises:
    InputError: another file.
  """
  with foreign(file, "expected groups of qa_pairs with a question and an answer's spans"):
    groups = json.loads(read_text(file)).values()
    return [(pair["question"], ", ".join(pair["answer"]["spans"])) for g in groups for pair in g["qa_pairs"]]
