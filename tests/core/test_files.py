"""Files are whole or not there."""

import pytest

from jaxlab.core.files import write_files, write_text


def test_a_failure_leaves_what_was_there(tmp_path):
  write_text(tmp_path / "a", "old")

  def full(file):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  with pytest.raises(OSError, match="No space") as raised:
    write_files(tmp_path, {"a": lambda file: file.write(b"new"), "b": full})
  assert raised.value.filename == str(tmp_path / "b")
  assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "old"}
  write_files(tmp_path, {"a": lambda file: file.write(b"new"), "b": lambda file: file.write(b"2")})
  assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "new", "b": "2"}
