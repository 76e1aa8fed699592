"""Rows of tokens for training and evaluation, as resumable grain datasets.

Training rows are packed as nanochat does ("BOS best-fit"): every row starts with BOS and has no padding. Documents
longer than a row are cut into pieces first, each starting with BOS; nanochat, whose documents are web pages, crops them
instead and would lose all but the first page of a book.
"""

import bisect
import json
import math

import grain
import numpy as np

from jaxlab.core.checks import require, require_counts
from jaxlab.data.tokens import Tokens

Batch = dict[str, np.ndarray]  # inputs, targets: int32 (batch, time); target -1 is not counted
_EPOCHS = 2**31  # without end; what grain takes for that is too many for it where a batch has one index


def index_batches(count: int, batch: int, *, seed: int) -> grain.MapDataset:
  """Endless batches of `batch` of the indices below `count`, shuffled anew each epoch."""
  return grain.MapDataset.range(count).seed(seed).shuffle().repeat(_EPOCHS).batch(batch)


def training_rows(
  tokens: Tokens, *, row: int, seed: int, buffer: int = 1000, shard: tuple[int, int] = (0, 1)
) -> grain.IterDataset:
  """Endless rows of `row` + 1 tokens (int32), shuffled anew each epoch.

  Args:
    buffer: pieces to choose from while filling a row.
    shard: (index, count) of this host; hosts draw disjoint pieces.

  Raises:
    InputError: row or buffer < 1, or fewer pieces than hosts.
  """
  require_counts(row=row, buffer=buffer)
  index, count = shard
  starts, lengths = cut(tokens, row)
  mine = np.arange(index, len(starts), count)
  require(len(mine) > 0, f"the corpus has {len(starts)} pieces, too few for {count} hosts; use a larger one")
  # An index costs less than handing it over from a thread.
  alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  pieces = grain.MapDataset.source(mine).seed(seed).shuffle().repeat().to_iter_dataset(alone)
  return _BestFit(pieces, tokens, starts, lengths, row + 1, min(buffer, len(mine)))


def cut(tokens: Tokens, row: int) -> tuple[np.ndarray, np.ndarray]:
  """(starts, lengths) of pieces of at most `row` tokens that cover every document."""
  starts, lengths = [], []
  for begin, end in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
    first = np.arange(begin, end, row)
    starts.append(first)
    lengths.append(np.minimum(row, end - first))
  return np.concatenate(starts), np.concatenate(lengths)


class _BestFit(grain.IterDataset):
  def __init__(self, parent, tokens, starts, lengths, row, buffer):
    super().__init__(parent)
    self.tokens, self.starts, self.lengths, self.row, self.buffer = tokens, starts, lengths, row, buffer

  def __iter__(self):
    return _BestFitIterator(self, self._parent.__iter__())


class _BestFitIterator(grain.DatasetIterator):
  """Takes the largest buffered piece that still fits (BOS included); when none does, crops the shortest to fill.

  The earliest of equal ones.
  """

  def __init__(self, dataset: _BestFit, parent):
    super().__init__()
    self._dataset, self._source = dataset, parent
    self._buffer: list[tuple[int, int, int]] = []  # (size, arrival, piece), in order
    self._arrivals = 0

  def __next__(self):
    d = self._dataset
    row, filled = np.empty(d.row, np.int32), 0
    while filled < d.row:
      while len(self._buffer) < d.buffer:
        self._add(int(next(self._source)))
      space = d.row - filled
      largest = bisect.bisect_right(self._buffer, (space, math.inf)) - 1
      choice = bisect.bisect_left(self._buffer, self._buffer[largest][:1]) if largest >= 0 else 0
      size, _, piece = self._buffer.pop(choice)
      size = min(size, space)
      row[filled] = d.tokens.bos
      row[filled + 1 : filled + size] = d.tokens.ids[d.starts[piece] : d.starts[piece] + size - 1]
      filled += size
    return row

  def _add(self, piece: int):
    bisect.insort(self._buffer, (int(self._dataset.lengths[piece]) + 1, self._arrivals, piece))
    self._arrivals += 1

  def get_state(self):
    pieces = [piece for _, _, piece in sorted(self._buffer, key=lambda entry: entry[1])]
    return {"source": self._source.get_state(), "buffer": json.dumps(pieces)}

  def set_state(self, state):
    self._source.set_state(state["source"])
    self._buffer = []
    for piece in json.loads(state["buffer"]):
      self._add(piece)


def mixture(rows: grain.IterDataset, others: grain.IterDataset, share: float) -> grain.IterDataset:
  """Rows of both, `share` of them from `others`, in a fixed order."""
  require(0 <= share < 1, f"the share of a mixture is {share}; it must lie in [0, 1)")
  return rows if share == 0 else grain.IterDataset.mix([rows, others], [1 - share, share])


def split_row(row: np.ndarray) -> Batch:
  """Inputs and next-token targets of a row of T + 1 tokens."""
  return {"inputs": row[:-1], "targets": row[1:]}


def batches(rows: grain.IterDataset, batch: int) -> grain.IterDataset:
  """Batches of rows, made ahead of time on a thread; `iter(...)` has get_state / set_state."""
  require_counts(batch=batch)
  dataset = rows.map(split_row).batch(batch, drop_remainder=True)
  return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4)


def evaluation_batches(tokens: Tokens, *, row: int, batch: int, limit: int | None = None) -> list[Batch]:
  """Every token of a split once: documents cut into pieces of `row` tokens, each predicted from BOS on.

  Targets past a piece's end are -1. `limit` stops after about that many tokens.
  """
  require_counts(row=row, batch=batch, limit=1 if limit is None else limit)
  starts, lengths = cut(tokens, row)
  if limit is not None:
    count = max(batch, limit // row)
    order = np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)
    starts, lengths = starts[order], lengths[order]
  rows = []
  for start, length in zip(starts, lengths, strict=True):
    inputs, targets = np.full(row, tokens.bos, np.int32), np.full(row, -1, np.int32)
    piece = tokens.ids[start : start + length]
    inputs[1 : len(piece)], targets[: len(piece)] = piece[: len(piece) - 1], piece
    rows.append((inputs, targets))
  return _stack(rows, batch, row)


def mid_document_batches(tokens: Tokens, *, row: int, batch: int, limit: int) -> list[Batch]:
  """Consecutive slices of the flat stream without BOS at their start, the context of SNLP's first evaluation."""
  require_counts(row=row, batch=batch)
  count = min(limit, len(tokens.ids) - 1) // row
  require(count > 0, f"the split has {len(tokens.ids)} tokens; slices of {row} need more")
  rows = [tokens.ids[i * row : i * row + row + 1].astype(np.int32) for i in range(count)]
  return _stack([(r[:-1], r[1:]) for r in rows if len(r) == row + 1], batch, row)


def _stack(rows, batch, row):
  blank = (np.zeros(row, np.int32), np.full(row, -1, np.int32))
  rows = rows + [blank] * (-len(rows) % batch)
  return [
    {"inputs": np.stack([r[0] for r in rows[i : i + batch]]), "targets": np.stack([r[1] for r in rows[i : i + batch]])}
    for i in range(0, len(rows), batch)
  ]
