"""A tokenized corpus: one flat array of ids on disk, memory-mapped, with the offsets of its documents."""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import grain
import numpy as np
from tokenizers import Tokenizer

from jaxlab.core.checks import require
from jaxlab.core.files import write_files
from jaxlab.core.foreign import foreign
from jaxlab.data.corpora import Documents
from jaxlab.data.tokenizer import largest_id

_CHUNK = 256  # documents tokenized at a time, on all cores


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Document i is `ids[offsets[i] : offsets[i + 1]]`, without BOS."""

  ids: np.ndarray
  offsets: np.ndarray
  bos: int

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def document(self, i: int) -> np.ndarray:
    return self.ids[self.offsets[i] : self.offsets[i + 1]]


def tokenize(documents: Documents, tokenizer: Tokenizer, *, bos: int, cache: str | os.PathLike) -> Tokens:
  """Tokenizes a split, or maps the copy kept under `cache` (named by the content of both)."""
  # Whether special tokens are text is no part of a tokenizer's file.
  key = f"{documents.key} {tokenizer.encode_special_tokens} {tokenizer.to_str()}"
  key = hashlib.sha256(key.encode()).hexdigest()[:16]
  folder = Path(cache) / "tokens" / key
  if not (folder / "offsets.npy").exists():
    parts, lengths = [], []
    kind = np.uint16 if largest_id(tokenizer) < 2**16 else np.uint32
    with foreign("the tokenizer", "use the checkpoint's own tokenizer.json", place=lambda: f"document {len(parts)}"):
      for batch in grain.MapDataset.source(documents).batch(_CHUNK, batch_fn=list):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
          parts.append(np.array(encoding.ids, kind))
          lengths.append(len(parts[-1]))
    folder.mkdir(parents=True, exist_ok=True)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    write_files(folder, {"ids.npy": _npy(np.concatenate(parts)), "offsets.npy": _npy(offsets)})
  ids = np.load(folder / "ids.npy", mmap_mode="r")
  require(len(ids) > 0, "the corpus has no token in it; give text")
  return Tokens(ids, np.load(folder / "offsets.npy"), bos)


def _npy(array: np.ndarray) -> Callable[[IO[bytes]], object]:
  """Writes what `np.save` does, which however does not say of a full disk that it is one."""

  def write(file: IO[bytes]) -> None:
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)

  return write
