"""The tokenizer of a model with what text generation has to know of it: start and end tokens, the chat template."""

import dataclasses
import os
from pathlib import Path

from tokenizers import Tokenizer

from jaxlab.core.foreign import foreign
from jaxlab.data.tokenizer import BOS, load
from jaxlab.models import gguf
from jaxlab.models.files import find, gguf_file, read_json


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A tokenizer and the roles of its tokens.

  Attributes:
    tokenizer: of prompts (`data.tokenizer.load`): special tokens are recognised, nothing is cut or padded.
    bos: id of the token that starts a text (<|bos|> where the checkpoint names none), or None.
    eos: ids of the tokens that end one; may be empty.
    chat_template: Jinja source that turns messages into a prompt, or None.
  """

  tokenizer: Tokenizer
  bos: int | None
  eos: tuple[int, ...]
  chat_template: str | None


def load_vocabulary(path_or_name: str | os.PathLike) -> Vocabulary:
  """Reads the vocabulary of a checkpoint (see `files.find`).

  A folder has it in tokenizer.json, tokenizer_config.json, generation_config.json, config.json and chat_template.jinja;
  a GGUF file in its metadata.

  Raises:
    InputError: there is no such checkpoint, it has no tokenizer, or one of the files is damaged.
  """
  path = find(path_or_name)
  if (file := gguf_file(path)) is not None:
    return Vocabulary(*gguf.read_vocabulary(file))
  tokenizer = load(path, prompts=True)
  names, generation, model = (
    read_json(path / name) if (path / name).exists() else {}
    for name in ("tokenizer_config.json", "generation_config.json", "config.json")
  )

  def ids(role: str) -> tuple[int, ...]:
    """Those the tokenizer's own name says and those generation.json (else config.json) lists, without repetition."""
    token = names.get(f"{role}_token")
    token = token.get("content") if isinstance(token, dict) else token
    named = tokenizer.token_to_id(token) if isinstance(token, str) else None
    listed = generation.get(f"{role}_token_id", model.get(f"{role}_token_id"))
    listed = listed if isinstance(listed, list) else [listed]
    known = lambda i: type(i) is int and 0 <= i < 2**32 and tokenizer.id_to_token(i) is not None
    found = [i for i in [named, *listed] if known(i)]
    return tuple(dict.fromkeys(found))

  bos = next(iter(ids("bos")), tokenizer.token_to_id(BOS))
  return Vocabulary(tokenizer, bos, ids("eos"), _chat_template(path, names))


def _chat_template(folder: Path, names: dict) -> str | None:
  """chat_template.jinja, or the entry of tokenizer_config.json: a text, or a list of named ones with a "default"."""
  if (file := folder / "chat_template.jinja").exists():
    with foreign(file, "fetch it again"):
      return file.read_text("utf-8")
  template = names.get("chat_template")
  if isinstance(template, list):
    named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    template = named.get("default")
  return template if isinstance(template, str) else None
