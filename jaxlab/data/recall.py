"""Generated recall tasks in real text: facts hidden in a document, questions about them at its end.

needle: one pass key. multi_key: many pass keys, one asked for. variable_tracking: values copied from variable to
variable. After the needle and RULER tests (Kamradt 2023; Hsieh et al. 2024, arXiv 2404.06654).
"""

import dataclasses
import itertools

import grain
import numpy as np
from tokenizers import Tokenizer

from jaxlab.core.checks import require, require_choice
from jaxlab.data.tokens import Tokens

TASKS = ("needle", "multi_key", "variable_tracking")
SHORTEST = 160  # tokens that a document with one fact and one question needs at most

# fmt: off
_ADJECTIVES = (
  "amber", "ancient", "bitter", "bright", "broken", "calm", "clever", "cold", "crimson", "curious", "distant",
  "early", "empty", "faded", "famous", "gentle", "golden", "grey", "happy", "heavy", "hidden", "hollow", "iron",
  "lonely", "narrow", "noble", "patient", "proud", "quiet", "silver", "simple", "tall",
)
_NOUNS = (
  "anchor", "baker", "bridge", "candle", "castle", "doctor", "eagle", "farmer", "forest", "garden", "harbour",
  "hunter", "island", "lantern", "letter", "market", "meadow", "miller", "mirror", "mountain", "painter",
  "river", "sailor", "shepherd", "soldier", "tailor", "teacher", "tower", "valley", "village", "window", "wolf",
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Example:
  """`prompt` starts with BOS and ends where `answer` is due; both int32 ids."""

  prompt: np.ndarray
  answer: np.ndarray


def example(task: str, tokens: Tokens, tokenizer: Tokenizer, *, length: int, rng: np.random.Generator) -> Example:
  """One question about a document of `length` tokens (prompt and answer together) with text of `tokens` as hay.

  Raises:
    InputError: unknown task, or a length under 160 tokens.
  """
  require_choice("recall task", task, TASKS)
  facts = {"needle": 1, "multi_key": 8, "variable_tracking": 3}[task]
  facts = min(facts, _room(length))
  ids, answers = _document(task, tokens, tokenizer, length=length, facts=facts, questions=1, rng=rng)
  start, stop = answers[0]
  return Example(ids[:start], ids[start:stop])


def training_rows(tokens: Tokens, tokenizer: Tokenizer, *, row: int, seed: int) -> grain.IterDataset:
  """Endless rows of `row` + 1 tokens, each filled with documents of log-uniform length and several questions."""
  require(row >= SHORTEST, f"recall rows of {row} tokens are too short; use at least {SHORTEST}")

  def make(_, rng: np.random.Generator) -> np.ndarray:
    parts, left = [], row + 1
    while left > 0:
      if left < SHORTEST:
        length = left
        ids = np.concatenate([[tokens.bos], hay(tokens, length - 1, rng)])
      else:
        length = int(np.exp(rng.uniform(np.log(SHORTEST), np.log(row + 1))))
        length = left if left - length < SHORTEST // 4 or length > left else length
        facts = int(rng.integers(1, min(12, _room(length)) + 1))
        task = TASKS[rng.integers(len(TASKS))]
        questions = int(rng.integers(1, min(facts, 6) + 1))
        ids, _ = _document(task, tokens, tokenizer, length=length, facts=facts, questions=questions, rng=rng)
      parts.append(ids)
      left -= length
    return np.concatenate(parts).astype(np.int32)

  return grain.MapDataset.range(2**31 - 1).seed(seed).random_map(make).to_iter_dataset()


def _room(length: int) -> int:
  """Facts (each with its question) that fit, 64 tokens for both, the rest of the first SHORTEST for hay."""
  require(length >= SHORTEST, f"a recall document of {length} tokens is too short; use at least {SHORTEST}")
  return max(1, (length - 32) // 128)


def _document(task, tokens, tokenizer, *, length, facts, questions, rng):
  """(ids of exactly `length`, [(start, stop) of each answer])."""
  encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
  things = names(facts, rng)
  values = [str(v) for v in rng.integers(10_000, 100_000, size=facts)]
  if task == "variable_tracking":
    says = [f" The value of the {things[0]} is {values[0]}."]
    says += [f" The value of the {b} is that of the {a}." for a, b in itertools.pairwise(things)]
    values, phrase = [values[0]] * facts, " The value of the {} is"
  else:
    says = [f" The pass key of the {n} is {v}." for n, v in zip(things, values, strict=True)]
    phrase = " The pass key of the {} is"
  statements = [encode(text) for text in says]
  asked = rng.choice(facts, size=questions, replace=False)
  tail = [(encode(f"\n\nQuestion:{phrase.format(things[i])}"), encode(f" {values[i]}")) for i in asked]
  used = sum(map(len, statements)) + sum(len(q) + len(a) for q, a in tail)
  ids = [tokens.bos, *hide(statements, hay(tokens, length - 1 - used, rng), rng)]
  answers = []
  for question, answer in tail:
    ids += question
    answers.append((len(ids), len(ids) + len(answer)))
    ids += answer
  return np.array(ids, np.int32), answers


def names(count: int, rng: np.random.Generator) -> list[str]:
  """Different things of two words, at most 1,024."""
  every = len(_ADJECTIVES) * len(_NOUNS)
  require(count <= every, f"{count} names are asked for; there are {every}")
  chosen = rng.choice(every, size=count, replace=False)
  return [f"{_ADJECTIVES[i // len(_NOUNS)]} {_NOUNS[i % len(_NOUNS)]}" for i in chosen]


def words(count: int, rng: np.random.Generator) -> list[str]:
  """Different nouns, at most 32."""
  return [_NOUNS[i] for i in rng.choice(len(_NOUNS), size=count, replace=False)]


def hide(statements: list[list[int]], text: np.ndarray, rng: np.random.Generator) -> list[int]:
  """The ids of the text with the statements, in their order, at random places between them."""
  # Chains of variables are told in order, so that each is known when it is copied.
  places = np.sort(rng.integers(0, len(text) + 1, size=len(statements)))
  ids, previous = [], 0
  for place, statement in zip(places, statements, strict=True):
    ids += [*text[previous:place], *statement]
    previous = place
  return [*ids, *text[previous:]]


def hay(tokens: Tokens, size: int, rng: np.random.Generator) -> np.ndarray:
  """Consecutive text from a random place, repeated from the start where the corpus is shorter."""
  return np.take(tokens.ids, np.arange(size) + rng.integers(len(tokens.ids)), mode="wrap")
