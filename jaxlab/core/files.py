"""Files that are whole or not there: written under a temporary name, synced, renamed."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO


def write_files(folder: Path, files: Mapping[str, Callable[[IO[bytes]], object]]) -> None:
  """Writes all files under temporary names and syncs them, then renames them in order.

  What can fail (a full disk) fails before the first rename, so what was there stays whole.

  Args:
    folder: exists.
    files: for every name a function that writes the content to an open binary file.
  """
  temporary = {name: folder / f".{name}.{os.getpid()}" for name in files}
  try:
    for name, write in files.items():
      with _named(folder / name), open(temporary[name], "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    for name in files:
      os.replace(temporary[name], folder / name)
  finally:
    for path in temporary.values():
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
  """An error of writing says no name by itself, and that of opening a temporary one."""
  try:
    yield
  except OSError as error:
    error.filename = str(path)
    raise


def write_text(path: Path, text: str) -> None:
  """Writes one text file as UTF-8."""
  write_files(path.parent, {path.name: lambda file: file.write(text.encode())})
