"""Byte-level BPE, trained with the `tokenizers` library: GPT-4's split pattern with digits in groups of one or two,
nanochat's nine special tokens as the last ids."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxlab.core.checks import InputError, require
from jaxlab.core.files import write_text

BOS = "<|bos|>"
SPECIALS = (
  BOS,
  "<|user_start|>",
  "<|user_end|>",
  "<|assistant_start|>",
  "<|assistant_end|>",
  "<|python_start|>",
  "<|python_end|>",
  "<|output_start|>",
  "<|output_end|>",
)
_PATTERN = (
  r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_TRAINING_CHARACTERS = 50_000_000  # in all; more does not change the merges of a small vocabulary


def train(texts: Sequence[str], vocab_size: int) -> Tokenizer:
  """Trains a tokenizer of exactly `vocab_size` entries (specials included) when the text has that many merges.

  Raises:
    InputError: no room for the 256 bytes and the specials.
  """
  smallest = 256 + len(SPECIALS)
  require(vocab_size >= smallest, f"vocab_size is {vocab_size}; bytes and special tokens alone need {smallest}")
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size - len(SPECIALS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_excerpts(texts), trainer)
  tokenizer.add_special_tokens(list(SPECIALS))
  return tokenizer


def trained(texts: Sequence[str], *, key: str, vocab_size: int, cache: str | os.PathLike) -> Tokenizer:
  """`train`, kept under `cache` by the corpus' content key and the size."""
  name = hashlib.sha256(f"{key} {vocab_size} {_PATTERN} {_TRAINING_CHARACTERS}".encode()).hexdigest()[:16]
  file = Path(cache) / "tokenizers" / f"{name}.json"
  if not file.exists():
    tokenizer = train(texts, vocab_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, tokenizer.to_str())
  return load(file)


def load(path: str | os.PathLike) -> Tokenizer:
  """Reads tokenizer.json (a file, or the folder that holds one).

  Raises:
    InputError: there is none.
  """
  file = Path(path)
  file = file / "tokenizer.json" if file.is_dir() else file
  require(file.is_file(), f"no tokenizer at {file}; put the checkpoint's tokenizer.json there")
  return Tokenizer.from_file(str(file))


def bos_id(tokenizer: Tokenizer) -> int:
  """The id that starts a document: <|bos|>, or its name in Llama and Qwen vocabularies."""
  for name in (BOS, "<|begin_of_text|>", "<s>", "<|endoftext|>"):
    if (token := tokenizer.token_to_id(name)) is not None:
      return token
  raise InputError("the tokenizer has no token that starts a document (<|bos|>, <|begin_of_text|>, <s>, <|endoftext|>)")


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
  """UTF-8 bytes each token stands for, int32[vocab]; special tokens count 0. Byte-level vocabularies only."""
  sizes = np.zeros(tokenizer.get_vocab_size(), np.int32)
  specials = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
  for token, index in tokenizer.get_vocab().items():
    sizes[index] = 0 if token in specials else len(token)  # one character of the byte alphabet is one byte
  return sizes


def _excerpts(texts):
  """The head of every document, 10,000 characters (nanochat's limit) or more where documents are few."""
  limit = max(10_000, _TRAINING_CHARACTERS // len(texts))
  for text in texts:
    yield text[:limit]
