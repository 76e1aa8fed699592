"""Documents as long as a web's, made of long texts, and the rows that the rivals train on."""

import bisect
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from tokenizers import Tokenizer

from experiments.text import Text, load_text
from jaxlab.core.checks import require, require_divides
from jaxlab.data import packing
from jaxlab.data.packing import Batch
from jaxlab.data.tokens import Tokens
from jaxlab.sequence import dataset_decomposition as dd


class Source(NamedTuple):
  """A split's tokens. chapters: where each begins, and the end; breaks: where paragraphs begin, and the end."""

  ids: np.ndarray
  chapters: np.ndarray
  breaks: np.ndarray
  bos: int


def texts(config, cache: Path) -> dict[str, Text]:
  """config.data and, beside a text with a path, config.more, in one vocabulary."""
  config = config.copy_and_resolve_references()
  for data in (config.data, config.more):
    data.name = "local_text" if data.path else data.name
  first = load_text(config, cache)
  both = config.data.path and config.more.name
  return {"data": first} | ({"more": Text(config.more, first.bpe, cache)} if both else {})


def source(found: dict[str, Text], split: str) -> Source:
  """All texts' split, one behind the other."""
  parts = [marked(text.split(split), text.bpe, text.data.name == "stdlib_code") for text in found.values()]
  begins = np.cumsum([0, *(len(part.ids) for part in parts)])[:-1]
  joined = lambda name: np.unique(
    np.concatenate([getattr(part, name) + begin for part, begin in zip(parts, begins, strict=True)])
  )
  return Source(np.concatenate([part.ids for part in parts]), joined("chapters"), joined("breaks"), parts[0].bos)


def marked(tokens: Tokens, bpe: Tokenizer, code: bool) -> Source:
  """Paragraphs begin behind an empty line, chapters with every document and at Markdown's headings; code has no
  headings, and a paragraph of it is a line."""
  texts = [bpe.decode([i]) for i in range(bpe.get_vocab_size())]
  has = lambda condition: np.array([condition(text) for text in texts])[tokens.ids]
  ends, begins = has(lambda text: text.endswith("\n")), has(lambda text: text.startswith("\n"))
  last = has(lambda text: "\n\n" in text)
  last[1:] |= ends[:-1] & begins[1:] & ends[1:]
  starts = np.flatnonzero((last | (ends & code))[:-1]) + 1
  headings = starts[has(lambda text: text.startswith("#") and not code)[starts]]
  chapters = np.union1d(tokens.offsets, headings)
  return Source(np.asarray(tokens.ids), chapters, np.union1d(starts, chapters), tokens.bos)


def cut(source: Source, law, rng: np.random.Generator) -> np.ndarray:
  """Where documents begin, and the end: chapters cut at paragraphs into log-normal lengths, some of them left whole.

  Args:
    law: mean and sigma of the lengths, whole: share of the chapters that stay.
  """
  lengths = rng.lognormal(np.log(law.mean) - law.sigma**2 / 2, law.sigma, 100 + 2 * int(len(source.ids) / law.mean))
  ends = np.cumsum(lengths)
  cuts = source.breaks[np.searchsorted(source.breaks, ends[ends < source.breaks[-1]])]
  whole = rng.random(len(source.chapters)) < law.whole
  chapter = np.searchsorted(source.chapters, cuts, side="right") - 1
  return np.union1d(source.chapters, cuts[~whole[chapter]])


def documents(source: Source, law, count: int, seed: int) -> Tokens:
  """Shuffled documents with `count` tokens, a BOS for each counted; the text is cut anew as often as it takes."""
  rng, starts, lengths, total = np.random.default_rng(seed), [], [], 0
  require(len(source.ids) > 0, "the text has no token")
  while total < count:
    bounds = cut(source, law, rng)
    order = rng.permutation(len(bounds) - 1)
    starts.append(bounds[:-1][order])
    lengths.append(np.diff(bounds)[order])
    total += len(order) + int(lengths[-1].sum())
  starts, lengths = np.concatenate(starts), np.concatenate(lengths)
  enough = int(np.searchsorted(np.cumsum(lengths + 1), count)) + 1
  starts, lengths = starts[:enough], lengths[:enough]
  ids = np.concatenate([source.ids[start : start + length] for start, length in zip(starts, lengths, strict=True)])
  return Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]), source.bos)


def first(tokens: Tokens, share: float) -> Tokens:
  """The first documents, `share` of the tokens."""
  count = max(1, int(np.searchsorted(tokens.offsets, share * tokens.offsets[-1])))
  return Tokens(tokens.ids[: tokens.offsets[count]], tokens.offsets[: count + 1], tokens.bos)


def chunks(tokens: Tokens, length: int) -> np.ndarray:
  """Concat-and-chunk: (rows, length + 1) of the stream in which every document follows a BOS."""
  stream = np.insert(tokens.ids, tokens.offsets[:-1], tokens.bos).astype(np.int32)
  return stream[: len(stream) // (length + 1) * (length + 1)].reshape(-1, length + 1)


def best_fit(tokens: Tokens, length: int) -> np.ndarray:
  """Best-fit decreasing (Ding et al. 2024): (rows, length + 1), -1 where a row is not full.

  Documents are cut into pieces that fit, each behind a BOS; the largest first goes where it leaves the least room.
  """
  starts, sizes = packing.cut(tokens, length)
  spaces, by_space, bins = [], [[] for _ in range(length + 2)], []
  for i in np.argsort(-sizes, kind="stable"):
    size = int(sizes[i]) + 1
    at = bisect.bisect_left(spaces, size)
    if at < len(spaces):
      space = spaces[at]
      row = by_space[space].pop()
      if not by_space[space]:
        del spaces[at]
    else:
      space, row = length + 1, len(bins)
      bins.append([])
    bins[row].append(i)
    left = space - size
    if left and not by_space[left]:
      bisect.insort(spaces, left)
    by_space[left].append(row)
  rows = np.full((len(bins), length + 1), -1, np.int32)
  for row, pieces in zip(rows, bins, strict=True):
    filled = 0
    for i in pieces:
      row[filled] = tokens.bos
      row[filled + 1 : filled + 1 + sizes[i]] = tokens.ids[starts[i] : starts[i] + sizes[i]]
      filled += sizes[i] + 1
  return rows


def batches(rows: np.ndarray, batch: int, seed: int, *, shard: tuple[int, int] = (0, 1)) -> grain.IterDataset:
  """Batches of these rows in random order; shard: (index, count) of this host, which takes every count-th row."""
  index, count = shard
  require_divides("hosts", count, "rows of a batch", batch)
  mine = grain.MapDataset.source(rows).seed(seed).shuffle()[index::count]
  return packing.batches(mine.to_iter_dataset(), batch // count)


def most_documents(rows: np.ndarray, bos: int) -> int:
  """In a row of `chunks` or `best_fit`; it may begin within one."""
  return int((rows == bos).sum(axis=1).max()) + 1


def held_out(source: Source, length: int, count: int) -> Batch:
  """Chapters as they are, each from its BOS on and up to `length` tokens: {"inputs", "targets"} int32 (count, length).

  Those taken have half as many at least; targets past the end are -1.
  """
  starts, sizes = source.chapters[:-1], np.diff(source.chapters)
  long = np.flatnonzero(sizes >= length // 2)
  require(len(long) > 0, f"no held-out chapter has {length // 2} tokens; give longer text, or lower high")
  rows = np.full((min(count, len(long)), length + 1), -1, np.int32)
  for row, i in zip(rows, np.linspace(0, len(long) - 1, len(rows)).astype(int), strict=True):
    size = min(length, int(sizes[long[i]]))
    row[0], row[1 : 1 + size] = source.bos, source.ids[starts[long[i]] : starts[long[i]] + size]
  return {"inputs": np.maximum(rows[:, :-1], 0), "targets": rows[:, 1:]}


def statistics(tokens: Tokens, buckets: dd.Buckets, length: int) -> dict:
  """Of the documents, and how many tokens before it a token can attend to in each kind of rows."""
  sizes = np.diff(tokens.offsets) + 1
  stream = np.cumsum(sizes)
  bounds = np.unique(np.concatenate([[0], stream, np.arange(0, stream[-1], length + 1)]))
  counts = buckets.counts
  return dict(
    documents=len(tokens),
    tokens=int(stream[-1]),
    average_length=dd.average_length(sizes),
    left_out=buckets.left_out,
    buckets={f"{2**i}": count for i, count in counts.items()},
    context=dict(
      documents=dd.average_context(sizes),
      concat_masked=dd.average_context(np.diff(bounds)),
      best_fit=dd.average_context(packing.cut(tokens, length)[1] + 1),
      decomposed=dd.average_context(np.repeat(2 ** np.array(list(counts)), list(counts.values()))),
    ),
  )
