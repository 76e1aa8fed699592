"""Text into prompts and tokens back into text while they are made."""

import codecs
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from jaxlab.core.checks import InputError, require
from jaxlab.core.foreign import foreign
from jaxlab.data import byte_level
from jaxlab.data.tokenizer import BOS
from jaxlab.models.vocabulary import Vocabulary

BYTES = "surrogateescape"  # how text stands for bytes that are no UTF-8, as in the arguments of a command
_UNFINISHED = "\ufffd"  # what a decoder puts in the place of bytes that are no character yet
# Byte-level vocabularies write printable bytes as themselves, the others as characters from 256 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in _PRINTABLE)}


def render_chat(
  vocabulary: Vocabulary, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
) -> str:
  """The prompt the checkpoint's chat template makes of messages {"role": ..., "content": ...}.

  Templates are code of strangers: they run in Jinja's sandbox, with the names that transformers gives them.

  Raises:
    InputError: there is no template, or it refuses the messages.
  """
  require(vocabulary.chat_template is not None, "the checkpoint has no chat template; use plain text (--raw)")
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )

  def refuse(message):
    raise jinja2.TemplateError(message)

  name = lambda token: "" if token is None else vocabulary.tokenizer.id_to_token(token)
  environment.globals["raise_exception"] = refuse
  names = dict(bos_token=name(vocabulary.bos), eos_token=name(next(iter(vocabulary.eos), None)))
  with foreign("the chat template", "change the messages, or use plain text (--raw)"):
    template = environment.from_string(vocabulary.chat_template)
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)


def chat_prompt(vocabulary: Vocabulary, text: str) -> list[int]:
  """Tokens that ask for the answer to a user's message. The template writes the special tokens, all of them."""
  rendered = render_chat(vocabulary, [{"role": "user", "content": text}])
  return vocabulary.tokenizer.encode(rendered, add_special_tokens=False).ids


def raw_prompt(vocabulary: Vocabulary, text: str) -> list[int]:
  """Tokens of a text to continue, begun as the tokenizer begins texts, and by <|bos|> where the vocabulary has it.

  Raises:
    InputError: an empty text under a vocabulary that begins texts with nothing.
  """
  ids = vocabulary.tokenizer.encode(text).ids
  begin = vocabulary.tokenizer.token_to_id(BOS)
  if begin is not None and ids[:1] != [begin]:
    ids = [begin, *ids]
  require(bool(ids), "the prompt is empty; give some text to continue")
  return ids


def byte_prompt(text: str) -> list[int]:
  """The byte that begins a document and those of the text; bytes of a command line that are no UTF-8 come through."""
  return [byte_level.BOS, *text.encode(errors=BYTES)]


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
  """The UTF-8 bytes that a token stands for, of part of a character too."""
  text, name = tokenizer.decode([token], skip_special_tokens=False), tokenizer.id_to_token(token) or ""
  if _UNFINISHED not in text:
    return text.encode()
  if re.fullmatch("<0x[0-9A-F]{2}>", name):
    return bytes.fromhex(name[3:5])
  return bytes(map(_BYTE_OF.get, name)) if _BYTE_OF.keys() >= set(name) else text.encode()


class Pieces:
  """The text of tokens as they come, in pieces of whole characters; special tokens have none, unless `special`."""

  def __init__(self, tokenizer: Tokenizer, *, special: bool = False):
    self._decode = functools.partial(tokenizer.decode, skip_special_tokens=not special)
    self._pending: list[int] = []
    self._before: list[int] = []  # the last piece's: some decoders treat the first token of a text in another way

  def push(self, token: int) -> str | None:
    """The piece that this token completes, or None while bytes are missing."""
    self._pending.append(token)
    text = self._decode(self._before + self._pending)
    if text.endswith(_UNFINISHED):
      return None
    return self._take(text)

  def end(self) -> str:
    """What is left."""
    return self._take(self._decode(self._before + self._pending)) if self._pending else ""

  def _take(self, text: str) -> str:
    known = self._decode(self._before)
    self._before, self._pending = self._pending, []
    return text[len(known) :]


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
  """`Pieces` of an iterable."""
  pieces = Pieces(tokenizer)
  for token in tokens:
    if (piece := pieces.push(token)) is not None:
      yield piece
  if piece := pieces.end():
    yield piece


def byte_pieces(tokens: Iterable[int]) -> Iterator[str]:
  """Bytes as text in pieces of whole characters, without those that begin and end documents.

  What is no UTF-8 stays as it is: the pieces, encoded with errors=BYTES, are the bytes again.
  """
  decoder = codecs.getincrementaldecoder("utf-8")(BYTES)
  for token in tokens:
    if token < byte_level.BOS and (piece := decoder.decode(bytes([token]))):
      yield piece
  if piece := decoder.decode(b"", final=True):
    yield piece


class Until:
  """The text before the stop string that is complete first, in pieces; what may begin one is held back.

  `found` says whether one was met: nothing comes after it.
  """

  def __init__(self, stop: Sequence[str]):
    self._stop, self._held, self.found = stop, "", False

  def push(self, piece: str) -> str:
    if self.found:
      return ""
    held = self._held + piece
    found = [(at + len(text), at) for text in self._stop if (at := held.find(text)) >= 0]
    if found:
      self.found = True
      return held[: min(found)[1]]
    sizes = lambda text: range(min(len(text) - 1, len(held)), 0, -1)
    beginnings = (n for text in self._stop for n in sizes(text) if held.endswith(text[:n]))
    size = len(held) - max(beginnings, default=0)
    self._held = held[size:]
    return held[:size]

  def end(self) -> str:
    """What was held back, where no stop string came."""
    return "" if self.found else self._held


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
  """`Until` of an iterable, which is read no further than to the stop string."""
  text = Until(stop)
  for piece in pieces:
    yield text.push(piece)
    if text.found:
      return
  yield text.end()


def require_stops(stop: Sequence[str]) -> None:
  """Raises InputError for an empty stop string, which every text begins with."""
  if "" in stop:
    raise InputError("a stop string is empty; give at least one character")
