"""Queries and items of real text for ANNCUR: functions and their docstrings, sentences and paragraphs, WordNet.

  pairs = function_pairs(documents)                 # docstring -> function, from Python source
  pairs = sentence_pairs(documents)                 # sentence -> the paragraph it was cut out of, from prose
  pairs = wordnet_pairs("/usr/share/wordnet")       # word in an example -> the meaning it has there

A query is (left, mention, right), an item (title, description). What a query quotes is cut out of its item: otherwise
counting shared words would be an oracle.
"""

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from jaxlab.core.checks import require
from jaxlab.core.foreign import foreign, lines
from jaxlab.data import tokenizer

# The roles of the specials that every tokenizer here has.
CLS, START, END, TITLE, SEP, PAD = tokenizer.SPECIALS[:6]
PARTS_OF_SPEECH = ("adj", "noun", "verb", "adv")
_LETTERS = {"adj": "a", "noun": "n", "verb": "v", "adv": "r"}
_WORD = re.compile(r"[a-z]+|\d+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


class Pairs(NamedTuple):
  """Queries with the item each belongs to, and the world of every item; a query searches its item's world.

  `candidates` names for a query the items that its mention alone cannot tell apart, most frequent first (WordNet).
  """

  queries: list[tuple[str, str, str]]
  items: list[tuple[str, str]]
  gold: Int[np.ndarray, "queries"]
  worlds: list[str]
  candidates: list[list[int]] | None = None


def function_pairs(documents: Sequence[str], *, words: int = 4) -> Pairs:
  """Docstrings' first sentences (of `words` words or more, each once), and their functions without docstring.

  The world is the document's number. Documents that are not Python are passed over.

  Raises:
    InputError: no documented function.
  """
  queries, items, worlds, seen = [], [], [], set()
  for number, document in enumerate(documents):
    try:
      tree = ast.parse(document)
    except (SyntaxError, ValueError):
      continue
    for node in ast.walk(tree):
      if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        continue
      text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
      text = _SENTENCE.split(text)[0]
      if len(text.split()) < words or text in seen:
        continue
      seen.add(text)
      body = " ".join(ast.unparse(statement) for statement in node.body[1:])
      queries.append(("", text, ""))
      items.append((node.name, " ".join(f"({ast.unparse(node.args)}) {body}".split())))
      worlds.append(str(number))
  require(bool(items), "no document holds a Python function with a docstring; use data.pairs=sentences for prose")
  return Pairs(queries, items, np.arange(len(items)), worlds)


def sentence_pairs(documents: Sequence[str], *, words: int = 6, sentences: int = 3, seed: int = 0) -> Pairs:
  """One sentence of every paragraph of `sentences` or more, and the paragraph without it (inverse cloze task).

  Raises:
    InputError: no such paragraph.
  """
  random, queries, items, worlds = np.random.default_rng(seed), [], [], []
  for number, document in enumerate(documents):
    for block in re.split(r"\n\s*\n", document):
      parts = _SENTENCE.split(" ".join(block.split()))
      chosen = [i for i, part in enumerate(parts) if len(part.split()) >= words]
      if len(parts) < sentences or not chosen:
        continue
      i = int(random.choice(chosen))
      queries.append(("", parts[i], ""))
      items.append(("", " ".join(parts[:i] + parts[i + 1 :])))
      worlds.append(str(number))
  require(bool(items), f"no paragraph has {sentences} sentences with one of {words} words; give longer text")
  return Pairs(queries, items, np.arange(len(items)), worlds)


def wordnet_pairs(folder: str | Path) -> Pairs:
  """Entity linking in WordNet 3.0: examples with a lemma of their synset marked, against all synsets.

  An item is (lemmas, gloss without examples), its world the part of speech. An example is used where a lemma of its
  synset, with an English ending, stands in it. Candidates are the synsets of that lemma, in the order of their senses.

  Args:
    folder: holds data.{adj,noun,verb,adv} and index.* (Debian package wordnet-base: /usr/share/wordnet).

  Raises:
    InputError: a file is missing or is not WordNet's.
  """
  queries, items, gold, worlds, candidates = [], [], [], [], []
  for part in PARTS_OF_SPEECH:
    data, index = (_lines(Path(folder) / f"{kind}.{part}") for kind in ("data", "index"))
    number = {}
    for line in data:
      number[line.split(" ", 1)[0]] = len(number) + len(items)
    senses = {}
    with foreign(folder, f"data.{part} and index.{part} are not WordNet 3.0's"):
      for line in index:
        lemma, _, _, pointers, *rest = line.split()
        senses[lemma] = [number[offset] for offset in rest[int(pointers) + 2 :]]
      for line in data:
        fields, gloss = line.split(" | ", 1)
        _, _, _, count, *rest = fields.split()
        lemmas = [re.sub(r"\(\w+\)$", "", word) for word in rest[: 2 * int(count, 16) : 2]]
        for example in re.findall(r'"([^"]+)"', gloss):
          for lemma in lemmas:
            if found := _inflected(lemma).search(example):
              queries.append((example[: found.start()], found.group(), example[found.end() :]))
              gold.append(len(items))
              candidates.append(senses[lemma.lower()])
              break
        items.append((", ".join(lemmas).replace("_", " "), re.sub(r'"[^"]*"?', "", gloss).strip(" ;\n")))
        worlds.append(part)
  return Pairs(queries, items, np.array(gold), worlds, candidates)


def _lines(file: Path) -> list[str]:
  require(file.is_file(), f"no WordNet file {file}; give --config.data.path, the folder with data.verb and index.verb")
  return [line for _, line in lines(file) if not line.startswith("  ")]


def _inflected(lemma: str) -> re.Pattern:
  """The lemma with an ending on its first word."""
  first, *rest = lemma.split("_")
  stem, last = re.escape(first), re.escape(first[-1])
  cut = f"|{re.escape(first[:-1])}(?=ed|ing|ies|ied)" if len(first) > 2 else ""
  parts = [f"(?:{stem}{cut}|{stem}{last}(?=ed|ing|er))(?:s|es|ed|d|ing|ies|ied|er|est|n)?", *map(re.escape, rest)]
  return re.compile(r"\b" + r"\s+".join(parts) + r"\b", re.IGNORECASE)


def words(text: str) -> list[str]:
  """Lower-case words and numbers, names in snake_case and camelCase taken apart: what TF-IDF and BM25 count."""
  return _WORD.findall(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())


def encode_queries(
  bpe: Tokenizer, queries: Sequence[tuple[str, str, str]], length: int
) -> Int[np.ndarray, "queries length"]:
  """[CLS] left [START] mention [END] right [SEP], int32, padded; the room is split evenly around the mention.

  What one side leaves unused the other takes. A mention that is too long loses its end.

  Raises:
    InputError: length < 5.
  """
  require(length >= 5, f"queries of {length} tokens have no room for a mention; give at least 5")
  ids = _encode(bpe, [part for query in queries for part in query])
  cls, start, end, sep = (bpe.token_to_id(token) for token in (CLS, START, END, SEP))
  rows = []
  for left, mention, right in zip(ids[::3], ids[1::3], ids[2::3], strict=True):
    mention = mention[: length - 4]
    room = length - 4 - len(mention)
    before = min(len(left), max(room // 2, room - len(right)))
    left, right = left[len(left) - before :], right[: room - before]
    rows.append([cls, *left, start, *mention, end, *right, sep])
  return _padded(bpe, rows, length)


def encode_items(bpe: Tokenizer, items: Sequence[tuple[str, str]], length: int) -> Int[np.ndarray, "items length"]:
  """[CLS] title [TITLE] description [SEP], int32, padded; a title takes at most half the room.

  Raises:
    InputError: length < 4.
  """
  require(length >= 4, f"items of {length} tokens have no room for a description; give at least 4")
  ids = _encode(bpe, [part for item in items for part in item])
  cls, title_end, sep = (bpe.token_to_id(token) for token in (CLS, TITLE, SEP))
  rows = []
  for title, description in zip(ids[::2], ids[1::2], strict=True):
    title = title[: (length - 3) // 2]
    rows.append([cls, *title, title_end, *description[: length - 3 - len(title)], sep])
  return _padded(bpe, rows, length)


def _encode(bpe, texts):
  return [encoding.ids for encoding in bpe.encode_batch_fast(list(texts), add_special_tokens=False)]


def _padded(bpe, rows, length):
  out = np.full((len(rows), length), bpe.token_to_id(PAD), np.int32)
  for row, ids in zip(out, rows, strict=True):
    row[: len(ids)] = ids
  return out
