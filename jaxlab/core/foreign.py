"""Bytes that others wrote: whatever their parser raises becomes one InputError."""

import contextlib
import errno
import io
import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxlab.core.checks import InputError, require

# Faults of this machine, not of the file: the command line has its own line for them.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_LONGEST = 160  # characters of a foreign message
_AGAIN = "it is damaged or not what its name says: fetch it again"
_BLOCK = 2**20
_DICTIONARY = 2**28  # bytes; xz -9 takes 65 MiB


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


def blocks(file: Path) -> Iterator[bytes]:
  """The content of a file in pieces of at most 1 MiB, decompressed if its name ends in .gz or .xz.

  All members of a compressed file count, zero padding between and after them does not. Unlike Python's own readers
  this one takes nothing else behind a member for the end, and stops at a bomb: a compressed file may expand to 64 MiB
  or a hundred times its size, whichever is more.

  Raises:
    InputError: a damaged or truncated member, a dictionary of over 256 MiB, more content than that.
  """
  make = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_DICTIONARY),
  }.get(Path(file).suffix.lower())
  with foreign(file, _AGAIN), open(file, "rb") as stream:
    if make is None:
      yield from iter(lambda: stream.read(_BLOCK), b"")
      return
    most, made = expanded_bytes(os.fstat(stream.fileno()).st_size), 0
    for block in _members(stream, make):
      made += len(block)
      require(made <= most, f"{file} expands to more than {most} bytes, hardly text; decompress it if it is")
      yield block


def expanded_bytes(size: int) -> int:
  """How much a compressed file of `size` bytes may hold before it is taken for a decompression bomb."""
  return max(2**26, 100 * size)


def _members(stream, make) -> Iterator[bytes]:
  """What the members of an open compressed file hold. zlib and lzma keep and name the rest of their input each in
  their own way."""
  waiting = stream.read(_BLOCK)
  while waiting:
    decoder = make()
    while not decoder.eof:
      if isinstance(decoder, lzma.LZMADecompressor):
        block, needs = decoder.decompress(waiting, _BLOCK), decoder.needs_input
        waiting = b""
      else:
        block = decoder.decompress(waiting, _BLOCK)
        waiting = decoder.unconsumed_tail
        needs = not waiting
      if block:
        yield block
      if not decoder.eof and needs:
        waiting = stream.read(_BLOCK)
        if not (waiting or block):
          raise EOFError("it ends inside a compressed stream")
    waiting = (decoder.unused_data or stream.read(_BLOCK)).lstrip(b"\0")
    while not waiting and (more := stream.read(_BLOCK)):
      waiting = more.lstrip(b"\0")


def read_bytes(file: Path) -> bytes:
  """All of `blocks`."""
  return b"".join(blocks(file))


def read_text(file: Path) -> str:
  """The text of a UTF-8 file, without a byte order mark; its line ends stay as they are.

  Raises:
    InputError: as `blocks`, or bytes that are not UTF-8.
  """
  content = read_bytes(file)
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise InputError(_not_utf8(file, f"byte {error.start}")) from None


def lines(file: Path) -> Iterator[tuple[int, str]]:
  """(number from 1, text) of every line that is not blank, without its end, \\n or \\r\\n, and a byte order mark.

  Raises:
    InputError: as `read_text`.
  """
  for number, line in enumerate(_split(blocks(file)), 1):
    try:
      text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
      raise InputError(_not_utf8(file, f"line {number}, byte {error.start}")) from None
    if text.strip():
      yield number, text


def _split(pieces: Iterator[bytes]) -> Iterator[bytes]:
  pending = []
  for piece in pieces:
    first, *rest = piece.split(b"\n")
    pending.append(first)
    for start in rest:
      yield b"".join(pending)
      pending = [start]
  yield b"".join(pending)


def _not_utf8(file: Path, place: str) -> str:
  return f"{file} is not UTF-8 ({place}); convert it, e.g. with iconv -t utf-8"


def read_npz(file: Path) -> dict[str, np.ndarray]:
  """The arrays of an .npz file. A header that declares more than the file holds is refused before it is believed.

  Raises:
    InputError: no zip file, a member that is no array of numbers or text, or is damaged, or a bomb.
  """
  arrays = {}
  with foreign(file, _AGAIN), open(file, "rb") as stream, zipfile.ZipFile(stream) as archive:
    members = archive.infolist()
    whole = os.fstat(stream.fileno()).st_size
    most, size = expanded_bytes(whole), sum(member.file_size for member in members)
    require(max((m.compress_size for m in members), default=0) <= whole, f"{file} is truncated; fetch it again")
    require(size <= most, f"{file} expands to {size} bytes, more than {most}; write it with np.savez")
    for member in members:
      name = member.filename.removesuffix(".npy")
      with foreign(file, _AGAIN, place=lambda name=name: f"array {name!r}"):
        content = io.BytesIO(archive.read(member))
        version = np.lib.format.read_magic(content)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(content)
        require(not dtype.hasobject, f"{file}, array {name!r}, holds Python objects; save numbers")
        # Not `np.prod`, which overflows.
        count, left = math.prod(shape), len(content.getbuffer()) - content.tell()
        require(min(shape, default=0) >= 0 and count * dtype.itemsize == left, f"{file}, array {name!r}: truncated")
        flat = np.frombuffer(content.getbuffer(), dtype, count, content.tell())
        arrays[name] = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
  return arrays
