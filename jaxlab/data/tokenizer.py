"""Byte-level BPE, trained with the `tokenizers` library: GPT-4's split pattern with digits in groups of one or two,
nanochat's nine special tokens as the last ids."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxlab.core.checks import InputError, require
from jaxlab.core.files import write_text
from jaxlab.core.foreign import foreign, read_text

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
_LARGEST_ID = 2**24
# Parts of a tokenizer that neither drop nor change a character, but for canonical composition (NFC) and " " as "▁".
_KEEPING = {"Sequence", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts", "Replace", "NFC"}
_SPACE = "▁"
_NEVER = -1e6  # log probability
_UNCOUNTED = "bits per byte cannot be counted by token; compare perplexities of this tokenizer alone"


def train(texts: Sequence[str], vocab_size: int) -> Tokenizer:
  """Trains a tokenizer of exactly `vocab_size` entries (specials included) when the text has that many merges.

  As with `load`, "<|bos|>" in a text is text.

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
  tokenizer.encode_special_tokens = True
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


def load(path: str | os.PathLike, *, prompts: bool = False) -> Tokenizer:
  """Reads tokenizer.json (a file, or the folder that holds one) as a tokenizer of text.

  A whole text is encoded, never cut or padded, and nothing but the text: no space is put before it (SentencePiece's
  dummy prefix), and the name of a special token in it, "<s>" say, is the characters it is written with.

  Args:
    prompts: special tokens are recognised and the prefix stays, as a chat template and its model expect them.

  Raises:
    InputError: there is none, it is damaged, or its ids are out of all proportion.
  """
  file = Path(path)
  file = file / "tokenizer.json" if file.is_dir() else file
  require(file.is_file(), f"no tokenizer at {file}; put the checkpoint's tokenizer.json there")
  with foreign(file, "put the checkpoint's own tokenizer.json there"):
    tokenizer = Tokenizer.from_str(read_text(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    largest = largest_id(tokenizer)
    require(0 <= largest < _LARGEST_ID, f"{file} has ids up to {largest}, hardly a vocabulary; fetch it again")
    return tokenizer if prompts else of_text(tokenizer)


def of_text(tokenizer: Tokenizer) -> Tokenizer:
  """A tokenizer of prompts as one of text; `load` says what that is. The one given may be changed."""
  parts = json.loads(tokenizer.to_str())
  if _prefixes(parts) or parts["model"]["type"] == "Unigram":
    parts = {name: _without_prefix(part) for name, part in parts.items()}
    tokenizer = Tokenizer.from_str(json.dumps(_without_special_pieces(parts)))
  tokenizer.encode_special_tokens = True
  return tokenizer


def largest_id(tokenizer: Tokenizer) -> int:
  """Ids may have gaps: the number of entries says less. -1 without any."""
  return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def require_fits(tokenizer: Tokenizer, vocab_size: int, where: str | os.PathLike) -> None:
  """Raises InputError unless a model with `vocab_size` embeddings, at `where`, has one for every id.

  An index past the end of an array is no error under jit: the last embedding would stand for all such tokens.
  """
  largest = largest_id(tokenizer)
  require(
    largest < vocab_size,
    f"the tokenizer of {where} has ids up to {largest}, its model {vocab_size} embeddings; use the model's tokenizer",
  )


def bos_id(tokenizer: Tokenizer) -> int:
  """The id that starts a document: <|bos|>, or its name in Llama and Qwen vocabularies."""
  for name in (BOS, "<|begin_of_text|>", "<s>", "<|endoftext|>"):
    if (token := tokenizer.token_to_id(name)) is not None:
      return token
  raise InputError("the tokenizer has no token that starts a document (<|bos|>, <|begin_of_text|>, <s>, <|endoftext|>)")


def ids_of(tokenizer: Tokenizer, marks: str) -> tuple[int, ...]:
  """Ids of the tokens that are made of these characters alone, spaces beside them aside: separators, say ",.;:?!\n"."""
  vocabulary = tokenizer.get_vocab(with_added_tokens=False).values()
  texts = ((i, tokenizer.decode([i]).strip(" ")) for i in sorted(vocabulary))
  return tuple(i for i, text in texts if text and set(text) <= set(marks))


def token_bytes(tokenizer: Tokenizer, *, complete: bool = True) -> np.ndarray:
  """UTF-8 bytes of text each id stands for, int32[largest id + 1]; special tokens and unused ids count 0.

  For what `load` and `train` give, the sizes of a text's ids sum to the bytes of the text. Two things are counted as
  the tokenizer sees them: text it composes (Qwen's NFC) in its composed form, and a literal "▁" (U+2581) under
  SentencePiece as the space it cannot be told from.

  Byte-level vocabularies (GPT-2, Llama 3, Qwen) write a byte as a character, SentencePiece (Llama 2, Gemma) a space as
  "▁" and a byte it has no piece for as "<0x0A>".

  Args:
    complete: the tokenizer must have a token for every byte. Without one (SmolLM2) it drops what it does not know, and
      sizes sum to the bytes of the text that its ids decode to.

  Raises:
    InputError: the tokenizer drops or changes characters (WordPiece, NFKC, lower case, an unknown token), so that bytes
      cannot be counted by token.
  """
  parts = json.loads(tokenizer.to_str())
  vocabulary, model = tokenizer.get_vocab(with_added_tokens=False), parts["model"]
  require(not _prefixes(parts), "the tokenizer puts a space before a text; read it by tokenizer.load")
  steps = [*_steps(parts["normalizer"]), *_steps(parts["pre_tokenizer"])]
  changing = next((step["type"] for step in steps if not _keeps(step)), None)
  affixes = any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
  if model["type"] not in ("BPE", "Unigram"):
    changing = f"{model['type']} model"
  elif affixes:
    changing = "word affix"
  require(changing is None, f"its {changing} changes text, so {_UNCOUNTED}")
  byte_level = any(step["type"] == "ByteLevel" for step in steps)
  alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
  require(
    (byte_level or bool(model.get("byte_fallback"))) and (not complete or vocabulary.keys() >= set(alphabet)),
    f"it has no token for every byte and drops what it does not know, so {_UNCOUNTED}",
  )
  spaces = any(step["type"] in ("Metaspace", "Replace") for step in steps)
  sizes = np.zeros(largest_id(tokenizer) + 1, np.int32)
  for token, index in vocabulary.items():
    if byte_level:
      sizes[index] = len(token)  # one character of the byte alphabet is one byte
    else:
      sizes[index] = 1 if token in alphabet else len((token.replace(_SPACE, " ") if spaces else token).encode())
  for index, token in tokenizer.get_added_tokens_decoder().items():
    require(
      token.special or not (token.lstrip or token.rstrip),
      f"its token {token.content!r} takes the space around it, so {_UNCOUNTED}",
    )
    sizes[index] = 0 if token.special else len(token.content.encode())
  return sizes


def _steps(part: dict | None) -> list[dict]:
  """A normalizer or pre-tokenizer as the list of its steps."""
  if part is None:
    return []
  inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
  return [part] if part["type"] != "Sequence" else [step for one in inner for step in _steps(one)]


def _keeps(step: dict) -> bool:
  """Whether every character of a text comes through, a space perhaps as "▁"."""
  if step["type"] == "Replace":
    return step["pattern"] == {"String": " "} and step["content"] == _SPACE
  if step["type"] == "Metaspace":
    return step["replacement"] == _SPACE
  return step["type"] in _KEEPING and step.get("behavior") != "Removed"


def _without_special_pieces(parts: dict) -> dict:
  """A unigram model knows special tokens as pieces too, at probability 1; far below all others none is ever chosen."""
  if parts["model"]["type"] != "Unigram":
    return parts
  special = {token["content"] for token in parts["added_tokens"] if token["special"]}
  pieces = [[piece, _NEVER if piece in special else score] for piece, score in parts["model"]["vocab"]]
  return parts | {"model": parts["model"] | {"vocab": pieces}}


def _prefixes(parts: dict) -> bool:
  """Whether the tokenizer puts a space before a text."""
  return any(_without_prefix(parts[name]) != parts[name] for name in ("normalizer", "pre_tokenizer"))


def _without_prefix(part):
  """A part of tokenizer.json that adds no space at the start of a text (a decoder: removes none); None if none is left.

  Other things than parts stay as they are.
  """
  if not isinstance(part, dict):
    return part
  strips = part.get("type") == "Strip" and part.get("content") == " " and part.get("start")
  if part.get("type") == "Prepend" or strips:
    return None
  changes = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
  part = part | changes.get(part.get("type"), {})
  for name in ("normalizers", "pretokenizers", "decoders"):
    if name in part:
      part[name] = [kept for one in part[name] if (kept := _without_prefix(one)) is not None]
  return part


def _excerpts(texts):
  """The head of every document, 10,000 characters (nanochat's limit) or more where documents are few."""
  limit = max(10_000, _TRAINING_CHARACTERS // len(texts))
  for text in texts:
    yield text[:limit]
