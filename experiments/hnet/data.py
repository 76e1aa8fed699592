"""What the networks read: the same text as bytes or as BPE tokens, held-out text, and text with mistakes in it."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxlab.core.checks import require_divides
from jaxlab.data import byte_level, corpora, packing, tokenizer
from jaxlab.data.corpora import Documents
from jaxlab.data.tokens import Tokens

PERTURBATIONS = ("upper case", "random case", "letters dropped", "letters repeated")
_SHARE = 0.1  # of the letters, dropped or repeated
_MARGIN = 0.8  # pieces of held-out text fit a row with letters repeated


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """The texts of config.data, as bytes and as tokens of a vocabulary trained on them."""

  config: object
  cache: Path

  def documents(self, split: str) -> Documents:
    name = "local_text" if self.config.data.path else self.config.data.name
    return corpora.documents(name, split=split, cache=self.cache, path=self.config.data.path)

  @functools.cached_property
  def texts(self) -> list[str]:
    documents = self.documents("train")
    return [documents[i] for i in range(min(len(documents), self.config.data.documents))]

  @functools.cached_property
  def bpe(self) -> Tokenizer:
    key = self.documents("train").key + f" {len(self.texts)}"
    size = self.config.shapes.bpe.vocab_size
    return tokenizer.trained(self.texts, key=key, vocab_size=size, cache=self.cache)

  @functools.cache  # noqa: B019 (one instance a run)
  def tokens(self, bpe: bool) -> Tokens:
    return self.encoded(self.texts, bpe)

  @functools.cached_property
  def bytes_a_token(self) -> float:
    """Of the vocabulary, on text it was trained on."""
    return len(self.tokens(False).ids) / len(self.tokens(True).ids)

  def sizes(self, bpe: bool) -> np.ndarray:
    """Bytes each id stands for."""
    if bpe:
      return tokenizer.token_bytes(self.bpe)
    return np.where(np.arange(byte_level.VOCABULARY) < byte_level.BOS, 1, 0).astype(np.int32)

  def length(self, bpe: bool) -> int:
    """Ids of a row, of as many bytes for all."""
    length = self.config.train.length
    return round(length / self.bytes_a_token) if bpe else length

  def batches(self, bpe: bool):
    """Of this host."""
    c, index, count = self.config, jax.process_index(), jax.process_count()
    require_divides("hosts", count, "config.train.batch", c.train.batch)
    rows = packing.training_rows(self.tokens(bpe), row=self.length(bpe), seed=c.seed, shard=(index, count))
    return packing.batches(rows, c.train.batch // count)

  @functools.cached_property
  def held_out(self) -> list[str]:
    """Pieces of the held-out documents, as many of each, that fit a row."""
    e = self.config.eval
    documents = self.documents(e.split)
    size = round(_MARGIN * self.config.train.length)
    each = max(1, e.bytes // size // len(documents))
    pieces = []
    for document in documents:
      starts = np.linspace(0, max(len(document) - size, 0), each + 2).astype(int)[1:-1]
      pieces += [cut(document[start : start + size], size) for start in starts]
    return pieces[: max(1, e.bytes // size)]

  def evaluation(self, texts: list[str], bpe: bool) -> list[packing.Batch]:
    return packing.evaluation_batches(
      self.encoded(texts, bpe), row=self.config.train.length, batch=self.config.eval.batch
    )

  def encoded(self, texts: list[str], bpe: bool) -> Tokens:
    """Texts as a corpus; BPE on all cores."""
    if not bpe:
      return byte_level.tokens_of(texts)
    parts = [part.ids for part in self.bpe.encode_batch_fast(texts, add_special_tokens=False)]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return Tokens(np.concatenate(parts).astype(np.int32), offsets, tokenizer.bos_id(self.bpe))


def cut(text: str, size: int) -> str:
  """The head of a text that has at most so many bytes."""
  return text.encode()[:size].decode(errors="ignore")


def perturbed(text: str, how: str, random: np.random.Generator) -> str:
  """A text in capitals, in capitals at random, or with a tenth of its letters dropped or written twice."""
  if how == "upper case":
    return text.upper()
  if how == "random case":
    upper = random.random(len(text)) < 0.5
    return "".join(c.upper() if up else c.lower() for c, up in zip(text, upper, strict=True))
  times = np.where(random.random(len(text)) < _SHARE, 0 if how == "letters dropped" else 2, 1)
  return "".join(c * n for c, n in zip(text, times, strict=True))
