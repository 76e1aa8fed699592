"""Exact match and F1 of answers that are one or several spans of text, as the DROP benchmark scores them.

  exact_match(["Ada Lovelace"], ["the ada lovelace."])    # True
  f1(["3.0 apples"], ["3 apples", "pears"])               # 0.5

Dua et al., NAACL 2019, arXiv 1903.00161: spans are compared as bags of normalised tokens, each with at most one of the
other side, in the assignment of the largest sum. Spans with other numbers than the gold span's do not match at all.
"""

import math
import re
import string
from collections.abc import Sequence

import numpy as np
import scipy.optimize

_ARTICLES = ("a", "an", "the")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tokens(span: str) -> tuple[str, ...]:
  """Lower-case words between spaces and hyphens without punctuation and articles; numbers as Python writes floats."""
  words = [_token(word) for word in re.split(r"[\s-]+", span.lower())]
  return tuple(word for word in words if word and word not in _ARTICLES)


def _token(word):
  for text in (word, word.translate(_PUNCTUATION)):
    if (number := _number(text)) is not None:
      return number
  return word.translate(_PUNCTUATION)


def _number(text):
  try:
    value = float(text)
  except ValueError:
    return None
  return str(value) if math.isfinite(value) else None


def exact_match(predicted: Sequence[str], gold: Sequence[str]) -> bool:
  """As many spans, and the same ones once normalised, in any order."""
  return len(predicted) == len(gold) and sorted(map(tokens, predicted)) == sorted(map(tokens, gold))


def f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
  """The F1 of the best assignment of spans to spans, over as many pairs as the longer side has spans."""
  if not predicted or not gold:
    return float(len(predicted) == len(gold))
  bags = [[frozenset(tokens(span)) for span in side] for side in (predicted, gold)]
  table = np.array([[_overlap(p, g) for g in bags[1]] for p in bags[0]])
  rows, columns = scipy.optimize.linear_sum_assignment(table, maximize=True)
  return float(table[rows, columns].sum() / max(table.shape))


def _overlap(predicted, gold):
  numbers = lambda bag: {word for word in bag if _number(word) is not None}
  if numbers(gold) and not numbers(gold) & numbers(predicted):
    return 0.0
  if not predicted or not gold:
    return float(predicted == gold)
  common = len(predicted & gold)
  return 2 * common / (len(predicted) + len(gold))
