"""Bytes that others wrote: whatever their parser raises becomes one InputError."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlab.core.checks import InputError

# Faults of this machine, not of the file: the command line has its own line for them.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_LONGEST = 160  # characters of a foreign message


@contextlib.contextmanager
def foreign(what: str | Path, remedy: str, *, place: Callable[[], str] | None = None) -> Iterator[None]:
  """Turns any failure of a foreign parser inside the block into "what, place: why; remedy", one line.

  Parsers raise more kinds than their documentation names, some of them (a panic of a Rust library) not even an
  Exception. Three pass: an InputError, which already says it better; a full disk or a lack of memory or of file
  handles, which is no fault of the file; and what ends a program (KeyboardInterrupt, SystemExit, a closed generator).

  Args:
    what: the file as it was given.
    remedy: what to do, e.g. "fetch it again".
    place: asked only after a failure: where in the file, e.g. lambda: f"line {number}".

  Raises:
    InputError: the block failed.
  """
  try:
    yield
  except (InputError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except BaseException as error:
    if isinstance(error, OSError) and error.errno in _MACHINE:
      raise
    where = f"{what}, {place()}" if place else f"{what}"
    raise InputError(f"{where}: {reason(error)}; {remedy}") from None


def reason(error: BaseException) -> str:
  """What an error says, on one printable line of at most 160 characters, or its class where it says nothing."""
  text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
  text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
  return text[:_LONGEST].rstrip(" .;") or type(error).__name__
