"""Text from a checkpoint: python -m jaxlab.generate --model=smollm2 "Why is the sky blue?"

The text is a message the model answers, by the checkpoint's chat template; with --raw it is continued. An H-Net, which
has no template, continues it byte by byte, and its bytes are printed as they are. Prints as tokens are made, and ends
with their rate on stderr. Mistakes end in one line and exit status 2.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax

from jaxlab.core.checks import InputError, require
from jaxlab.core.command import Parser, cache_folder
from jaxlab.data import byte_level
from jaxlab.evaluation.methods import named, subject
from jaxlab.models import HNet, hnet, hub
from jaxlab.models.generate import Decoder, stream
from jaxlab.models.layers import cast
from jaxlab.models.text import (
  BYTES,
  byte_pieces,
  byte_prompt,
  chat_prompt,
  raw_prompt,
  require_stops,
  text_pieces,
  until,
)
from jaxlab.models.vocabulary import load_vocabulary


def main(arguments: list[str] | None = None) -> int:
  """Parses the command line and prints the text. Returns the exit status."""
  try:
    _run(_parse(arguments))
    return 0
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except BrokenPipeError:  # the reader has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except KeyboardInterrupt:
    print(file=sys.stderr)
    return 130


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = Parser("python -m jaxlab.generate", description=__doc__.partition("\n\n")[2], allow_abbrev=False)
  add = parser.add_argument
  add("text", help="the message, or the text to continue")
  add("--model", default="base", help='"smollm2", "base", a folder, a .gguf file, or owner/name (%(default)s)')
  add("--raw", action="store_true", help="continue the text; no chat template (an H-Net always does)")
  add("--tokens", type=int, default=256, help="at most (%(default)s)")
  add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
  add("--top-k", type=int, help="sample from so many of the likeliest tokens")
  add("--top-p", type=float, help="sample from the likeliest tokens that reach this probability")
  add("--min-p", type=float, help="sample from tokens with at least this share of the likeliest one's probability")
  add("--seed", type=int, default=0, help="of sampling (%(default)s)")
  add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
  add("--method", metavar="NAME,OPTION=VALUE,...", help="run the model by a method: snlp,layers=8,iterations=2")
  add("--dtype", choices=("float32", "bfloat16"), help="of the parameters (bfloat16; on a CPU float32)")
  return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> None:
  cache_folder()
  require_stops(options.stop)
  require(
    options.temperature != 0 or options.top_k is options.top_p is options.min_p is None,
    "--top-k, --top-p and --min-p are of sampling; give a --temperature too",
  )
  dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  setup = (_bytes if hub.kind_of(options.model) is HNet else _tokens)(options, dtype)
  stretches = stream(
    setup.network,
    [setup.prompt],
    tokens=options.tokens,
    stop=setup.stop,
    key=jax.random.key(options.seed),
    temperature=options.temperature,
    top_k=options.top_k,
    top_p=options.top_p,
    min_p=options.min_p,
    decoder=setup.decoder,
  )
  sys.stdout.reconfigure(**setup.printing)
  clock = _Clock()
  for piece in until(setup.pieces(clock.tokens(stretches)), options.stop):
    print(piece, end="", flush=True)
  print(flush=True)
  print(clock.summary(), file=sys.stderr)


class _Setup(NamedTuple):
  """What generation needs of a checkpoint; `pieces` makes text of tokens, `printing` are options of stdout."""

  network: object
  decoder: Decoder
  prompt: list[int]
  stop: tuple[int, ...]
  pieces: Callable[[Iterable[int]], Iterator[str]]
  printing: dict[str, str]


def _tokens(options: argparse.Namespace, dtype: str) -> _Setup:
  """A transformer, perhaps under a method, with its tokenizer."""
  vocabulary = load_vocabulary(options.model)
  prompt = (raw_prompt if options.raw else chat_prompt)(vocabulary, options.text)
  model = hub.load(options.model, dtype=dtype)
  room = model.config.context - len(prompt)
  require(
    room >= options.tokens, f"the prompt leaves room for {max(room, 0)} tokens, not {options.tokens}; set --tokens"
  )
  name, method = named(options.method) if options.method is not None else (None, {})
  network, _, decoder = subject(model, name, **method)
  pieces = functools.partial(text_pieces, vocabulary.tokenizer)
  return _Setup(network, decoder, prompt, vocabulary.eos, pieces, dict(errors="replace"))


def _bytes(options: argparse.Namespace, dtype: str) -> _Setup:
  """An H-Net, which has neither a tokenizer nor an end of its context."""
  require(options.method is None, f"--method is of transformers; {options.model} is an H-Net: leave it out")
  model = hub.load(options.model, dtype="float32", kind=HNet)
  size, expected = model.config.vocab_size, byte_level.VOCABULARY
  require(size == expected, f"{options.model} has a vocabulary of {size}, not the {expected} bytes; generate in Python")
  stop = (byte_level.BOS, byte_level.EOS)
  printing = dict(encoding="utf-8", errors=BYTES)
  return _Setup(cast(model, dtype), hnet.DECODER, byte_prompt(options.text), stop, byte_pieces, printing)


class _Clock:
  """Counts tokens and takes the time from the second stretch on: before it, programs were compiled."""

  def __init__(self):
    self._arrivals: list[tuple[float, int]] = [(time.perf_counter(), 0)]

  def tokens(self, stretches) -> Iterator[int]:
    for (row,) in stretches:
      self._arrivals.append((time.perf_counter(), self._arrivals[-1][1] + len(row.tokens)))
      yield from row.tokens

  def summary(self) -> str:
    (begin, _), *later = self._arrivals
    made = later[-1][1] if later else 0
    first = f"{made} tokens, the first after {later[0][0] - begin:.2f} s" if later else "0 tokens"
    if len(later) < 3:
      return first
    (start, before), (end, _) = later[1], later[-1]
    return f"{first}, {(made - before) / (end - start):.1f} tokens/s"


if __name__ == "__main__":
  sys.exit(main())
