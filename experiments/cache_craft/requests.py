"""Prompts of retrieved chunks: facts that go on in the next chunk, and real passages with questions."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.long_context import Subject
from jaxlab.core.checks import require
from jaxlab.core.foreign import blocks, foreign
from jaxlab.data import recall


class Query(NamedTuple):
  """Chunks in the order of a prompt, the question after them and the answer due, as ids; cut: the fact lies in two."""

  chunks: tuple[np.ndarray, ...]
  question: np.ndarray
  answer: np.ndarray
  cut: bool = False


def chances(count: int, exponent: float) -> np.ndarray:
  """Zipf's law over `count` things: the first is drawn most."""
  weight = np.arange(1, count + 1, dtype=float) ** -exponent
  return weight / weight.sum()


class Facts:
  """A knowledge base of chunks of text with facts, most of which were cut in two where the text was.

  Some chunks end with "The pass key of the amber anchor", others begin with "is 12345.": which key it is depends on the
  chunk before, as that of a sentence which goes on in the next chunk does. A chunk that was cached behind another half
  says that the number is another thing's. The rest say theirs in one sentence.
  """

  def __init__(self, config, subject: Subject):
    self._f, rng = config.facts, np.random.default_rng(config.seed)
    f, self._tokens = config.facts, subject.tokens
    self._encode = lambda text: np.array(subject.tokenizer.encode(text, add_special_tokens=False).ids)
    self.names = recall.names(f.cut + f.whole, rng)
    self.numbers = [str(number) for number in rng.choice(np.arange(10_000, 100_000), f.cut + f.whole, replace=False)]
    self.heads = [self._chunk(f" The pass key of the {name}", rng, 1.0) for name in self.names[: f.cut]]
    self.tails = [self._chunk(f" is {number}.", rng, 0.0) for number in self.numbers[: f.cut]]
    says = [f" The pass key of the {n} is {v}." for n, v in zip(self.names, self.numbers, strict=True)]
    self.whole = [self._chunk(text, rng, rng.random()) for text in says[f.cut :]]

  @property
  def chunks(self) -> int:
    """How many there are."""
    return len(self.heads) + len(self.tails) + len(self.whole)

  def _chunk(self, says: str, rng, place: float) -> np.ndarray:
    """Text of the chunks' size that says it, at a place from 0, its beginning, to 1, its end."""
    fact = self._encode(says)
    require(len(fact) + 2 <= self._f.size, f"a fact has {len(fact)} tokens; raise config.facts.size")
    text = recall.hay(self._tokens, self._f.size - len(fact), rng)
    at = round(place * len(text))
    return np.concatenate([text[:at], fact, text[at:]]).astype(np.int32)

  def query(self, rng: np.random.Generator) -> Query:
    """Two facts that are cut and k - 4 that are not, in a random order, and a question about one of them; which ones is
    drawn by Zipf's law, and which end follows which beginning too."""
    f, n = self._f, self._f.k - 4
    some = lambda of, count: rng.choice(of, size=count, replace=False, p=chances(of, f.zipf))
    heads, tails, others = some(f.cut, 2), some(f.cut, 2), some(f.whole, n)
    units = [(self.heads[i], self.tails[j]) for i, j in zip(heads, tails, strict=True)]
    units += [(self.whole[i],) for i in others]
    cut = rng.random() < f.asked_cut
    name, number = (heads[0], tails[0]) if cut else (f.cut + others[0],) * 2
    chunks = [chunk for i in rng.permutation(len(units)) for chunk in units[i]]
    asked = f"\n\nQuestion: The pass key of the {self.names[name]} is"
    return Query(tuple(chunks), self._encode(asked), self._encode(f" {self.numbers[number]}"), bool(cut))


class Passages:
  """Real text: of every question some passages, and earlier prompts with passages of the same question among others.

  From a file of questions with passages (JSON: [{question, answers, ctxs: [{text}, ...]}, ...], as MuSiQue is prepared
  for CacheBlend), or, without one, stretches of the held-out text, whose question is what follows them.
  """

  def __init__(self, config, subject: Subject):
    self._p = p = config.passages
    encode = lambda text: np.array(subject.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    if p.path:
      self.items = [self._item(encode, row) for row in _questions(Path(p.path))]
    else:
      size, pool = p.size, p.pool
      long = np.flatnonzero(np.diff(subject.tokens.offsets) > (pool + 2) * size)
      require(len(long) > 0, f"no held-out document has {(pool + 2) * size} tokens; give config.passages.path")
      self.items = [self._stretch(subject.tokens.document(i)) for i in np.resize(long, p.queries)]
    self.items = [item for item in self.items if len(item[0]) >= p.k]
    require(len(self.items) > 0, f"no question has {p.k} passages of {p.size} tokens; lower config.passages.size")

  def _item(self, encode, row: dict):
    pieces = [encode(" " + c["text"])[: self._p.size] for c in row["ctxs"][: self._p.pool]]
    asked, answer = f"\n\nQuestion: {row['question']}\nAnswer:", encode(" " + row["answers"][0])
    return [piece for piece in pieces if len(piece) == self._p.size], encode(asked), answer[: self._p.answer]

  def _stretch(self, document):
    size, pool = self._p.size, self._p.pool
    pieces = [np.asarray(document[i * size : (i + 1) * size], np.int32) for i in range(pool)]
    rest = np.asarray(document[pool * size : (pool + 2) * size], np.int32)
    return pieces, rest[:16], rest[16 : 16 + self._p.answer]

  def prompts(self, i: int, rng: np.random.Generator) -> tuple[list[tuple], Query]:
    """(earlier prompts' chunks, the query): all draw from the passages of question i and of the one after it."""
    p = self._p
    mine, asked, answer = self.items[i % len(self.items)]
    others = self.items[(i + 1) % len(self.items)][0]
    draw = lambda pool, count: [pool[j] for j in rng.permutation(len(pool))[:count]]
    wanted = draw(mine, p.k)
    earlier = []
    for _ in range(p.histories):
      again = draw(wanted, p.k - p.strangers)
      earlier.append(tuple(draw([*again, *draw(others, p.strangers)], p.k)))
    return earlier, Query(tuple(wanted), asked, answer)


def _questions(file: Path) -> list[dict]:
  with foreign(file, "give a JSON list of {question, answers, ctxs: [{text}, ...]}"):
    rows = json.loads(b"".join(blocks(file)))
    for row in rows:
      row["question"], row["answers"][0], [c["text"] for c in row["ctxs"]]
  return rows
