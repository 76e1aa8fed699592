import errno

import pytest

from jaxlab.core.checks import InputError
from jaxlab.core.foreign import foreign, reason


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
