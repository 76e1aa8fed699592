import errno
import gzip
import io
import lzma
import zipfile

import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.core.foreign import foreign, lines, read_bytes, read_npz, reason


class Panic(BaseException):
  """What a Rust library raises when it panics is no Exception either."""


@pytest.mark.parametrize(
  "error, why",
  [
    (ValueError("bad\r\nbyte\x00 \x1b[31m at 3."), "bad byte [31m at 3"),
    (KeyError("ndims/0"), "'ndims/0'"),
    (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth exceeded"),
    (PermissionError(errno.EACCES, "Permission denied", "/secret"), "Permission denied"),
    (EOFError(), "EOFError"),
    (Panic("index out of range"), "index out of range"),
  ],
)
def test_whatever_a_parser_raises_is_one_line_with_file_place_and_remedy(error, why):
  number = 0
  with pytest.raises(InputError) as raised, foreign("a.jsonl", "mend it", place=lambda: f"line {number}"):
    number = 7
    raise error
  assert str(raised.value) == f"a.jsonl, line 7: {why}; mend it"


@pytest.mark.parametrize(
  "error", [InputError("mine"), MemoryError(), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_what_is_no_fault_of_the_file_passes(error):
  with pytest.raises(type(error)) as raised, foreign("a.jsonl", "mend it"):
    raise error
  assert raised.value is error


def test_a_long_message_is_cut_and_an_input_error_is_always_one_line():
  assert len(reason(ValueError("x" * 1000))) == 160
  assert str(InputError("no file 'a\nb\u2028c'")) == "no file 'a b c'"


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress), ("", bytes)])
def test_members_are_read_one_after_the_other_over_block_borders(tmp_path, suffix, compress):
  """Incompressible and compressible content of several blocks, with padding longer than a block."""
  random = np.random.default_rng(0)
  parts = [random.bytes(3 * 2**20 + 5), bytes(2**21), b"", b"end"]
  file = tmp_path / f"x{suffix}"
  file.write_bytes((bytes(2**20 + 4) if suffix else b"").join(map(compress, parts)))
  assert read_bytes(file) == b"".join(parts)


def test_lines_are_numbered_as_in_the_file(tmp_path):
  (tmp_path / "x").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  \n" + b"4" * 2**21 + b"\nfive\rsix\x0cseven\n\nlast")
  found = dict(lines(tmp_path / "x"))
  assert list(found) == [1, 4, 5, 7] and len(found.pop(4)) == 2**21
  assert found == {1: "one", 5: "five\rsix\x0cseven", 7: "last"}


def test_arrays_are_read_and_no_header_is_believed(tmp_path):
  file = tmp_path / "x.npz"
  arrays = {"a/b": np.arange(6, dtype=np.int16).reshape(2, 3), "c": np.asfortranarray(np.eye(2, 3)), "d": np.array(1.5)}
  for save in (np.savez, np.savez_compressed):
    save(file, **arrays)
    found = read_npz(file)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
      np.testing.assert_array_equal(found[name], array)
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
  for content, message in ((header.getvalue(), "array 'a': .*truncated"), (b"rubbish", "array 'a'.*magic string")):
    with zipfile.ZipFile(file, "w") as archive:
      archive.writestr("a.npy", content)
    with pytest.raises(InputError, match=message):
      read_npz(file)
  np.savez(file, a=np.array([{}], object))
  with pytest.raises(InputError, match="array 'a', holds Python objects"):
    read_npz(file)
  np.savez_compressed(file, a=np.zeros(10**7))
  with pytest.raises(InputError, match="expands to 80000128 bytes"):
    read_npz(file)
