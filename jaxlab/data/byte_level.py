"""Bytes as tokens: ids 0..255, of which UTF-8 never uses 254 and 255; they begin and end a document.

Data that is no text may have these two bytes: a network cannot tell them from the marks of documents, and what is
generated ends there.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import ArrayLike, Int

from jaxlab.core.checks import require
from jaxlab.data.tokens import Tokens

BOS, EOS, VOCABULARY = 254, 255, 256


def encode(text: str | bytes) -> np.ndarray:
  """uint8: UTF-8, or the bytes that are given, without BOS and EOS."""
  return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)


def decode(ids: Int[ArrayLike, "time"]) -> bytes:
  """The bytes with these ids; `.decode()` makes text of them, `.decode(errors="replace")` of a text that was cut.

  Raises:
    InputError: ids that are no bytes.
  """
  ids = np.asarray(ids)
  require(
    ids.size == 0 or (ids.min() >= 0 and ids.max() < VOCABULARY),
    "ids of bytes lie in 0..255; the model has another vocabulary, use its tokenizer",
  )
  return ids.astype(np.uint8).tobytes()


def tokens_of(documents: Iterable[str | bytes]) -> Tokens:
  """A corpus by bytes, of text or of any data.

  Raises:
    InputError: no byte in it.
  """
  parts = [encode(text) for text in documents]
  offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
  require(offsets[-1] > 0, "the corpus has no byte in it; give text")
  return Tokens(np.concatenate(parts), offsets, BOS)
