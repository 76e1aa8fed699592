"""How often programs, and models without them, are right, at how many calls."""

import numpy as np

from experiments.decomposed_prompting import shapes
from jaxlab.tasks.answers import f1
from jaxlab.tasks.decomposed_prompting import Answer, solve


class Tally:
  """Counts how often leaves agree with the symbolic ones."""

  def __init__(self):
    self._symbolic, self._counts = shapes.symbolic_leaves(), {}

  def graded(self, leaves: dict) -> dict:
    """The same leaves, each question of theirs also asked of the symbolic one."""
    return {name: self._graded(name, leaf) for name, leaf in leaves.items()}

  def _graded(self, name, leaf):
    def ask(questions):
      found = list(leaf(questions))
      for answer, right in zip(found, self._symbolic[name](questions), strict=True):
        if isinstance(right, Answer):  # what came before may be wrong already, and the question with it
          good = isinstance(answer, Answer) and answer.value == right.value
          count = self._counts.setdefault(name, [0, 0])
          count[0] += good
          count[1] += 1
      return found

    return ask

  def shares(self) -> dict[str, float]:
    return {name: good / asked for name, (good, asked) in sorted(self._counts.items())}


def right(answers, pairs) -> float:
  """Share of answers that are the expected text, letter by letter."""
  return float(np.mean([answer == expected for answer, (_, expected) in zip(answers, pairs, strict=True)]))


def decomposed(pairs, library: dict) -> dict:
  """{"right", "f1", "calls"}: share right, mean F1 of the spans, handlers' calls a question."""
  start = "reverse" if pairs[0][0].startswith("Reverse") else "letter_cat"
  outcomes = solve([question for question, _ in pairs], start, library)
  answers = [outcome.answer if isinstance(outcome.answer, str) else "" for outcome in outcomes]
  spans = lambda text: text.split(", ")
  scores = [f1(spans(answer), spans(expected)) for answer, (_, expected) in zip(answers, pairs, strict=True)]
  calls = [sum(count for name, count in outcome.calls.items() if name != "extract") for outcome in outcomes]
  return {"right": right(answers, pairs), "f1": float(np.mean(scores)), "calls": float(np.mean(calls))}
