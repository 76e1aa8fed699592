"""Corpora as tensorflow_datasets builders, read without TensorFlow (array_record files, `as_data_source`).

`stdlib_code` is there on every machine with Python: the standard library's own sources. `local_text` reads the user's
files. Any other name is a public tfds set with a text feature.
"""

import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from jaxlab.core.checks import require, require_choice
from jaxlab.core.foreign import expanded_bytes, foreign, lines, read_bytes, read_text

SPLITS = ("train", "validation", "test")
_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
_COMPRESSED = (".xz", ".gz")
_TYPES = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
_BUFFER = 2**16  # bytes of a parquet column read at a time
_ROWS = 64  # of a parquet file at a time


@dataclasses.dataclass(frozen=True)
class Documents(Sequence):
  """The documents of one split, as str; `key` changes with their content and names caches made from them."""

  source: Sequence
  feature: str
  key: str

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> str:
    if not 0 <= index < len(self):
      raise IndexError(index)
    with foreign("the prepared corpus", "remove it from the cache to make it anew", place=lambda: f"document {index}"):
      text = self.source[index][self.feature]
      return text.decode("utf-8") if isinstance(text, bytes) else text


def documents(name: str, *, split: str, cache: str | os.PathLike, path: str = "") -> Documents:
  """One split of a corpus, prepared under `cache` on first use.

  Args:
    name: "stdlib_code", "local_text" (with `path`), or a tfds name such as "wiki40b/en" or "c4".
    split: "train", "validation" or "test". Local files whose names start with train, val or test are those splits;
      otherwise, and for stdlib_code, a hash of each document's name sends 90 % / 5 % / 5 % there.
    path: a file, a folder or a glob (`**` is any depth; hidden files have to be named) of txt, md, rst, py, jsonl
      (field "text") or parquet (column "text") files, each also as .xz or .gz.

  Raises:
    InputError: no such data, an empty split, bytes that are not UTF-8, a record whose text is missing or no string.
  """
  require_choice("data split", split, SPLITS)
  if name == "stdlib_code":
    files = _stdlib_files()
    builder = StdlibCode(files, cache)
  elif name == "local_text":
    builder = LocalText(_local_files(path), cache)
  else:
    builder = public(name, cache)
  if not builder.data_path.exists():
    _prepare(builder, f"{name} {path}".strip())
  names = builder.info.splits
  require(
    split in names,
    f"{name} {path} has no document for the split {split!r}, only for {', '.join(names)}; give more files",
  )
  texts = [k for k, f in builder.info.features.items() if isinstance(f, tfds.features.Text)]
  require(bool(texts), f"dataset {name} has no text feature; it has {', '.join(builder.info.features)}")
  feature = "text" if "text" in texts else texts[0]
  key = getattr(builder, "content", builder.info.full_name) + split
  return Documents(builder.as_data_source(split=split), feature, key)


class _Texts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Documents with a name and a text, from files; one prepared copy per content."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, files: dict[str, Path], cache):
    self.files = files
    self.content = _content_hash(files)
    super().__init__(data_dir=str(Path(cache) / "corpora" / self.content), file_format="array_record")

  def _info(self):
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"name": text, "text": text}))

  def _split_generators(self, download_manager):
    # tfds knows no empty split; one that has no first document is left out.
    found = [split for split in SPLITS if next(self._generate_examples(split), None)]
    require(bool(found), f"{', '.join(self.files)}: every document is empty; give files with text in them")
    return {split: self._generate_examples(split) for split in found}

  def _generate_examples(self, split):
    named = all(_named_split(name) for name in self.files)
    for name, file in self.files.items():
      if named and _named_split(name) != split:
        continue
      for key, text in read_file(name, file):
        if text.strip() and (named or _hashed_split(key) == split):
          yield key, {"name": key, "text": text}


class StdlibCode(_Texts, skip_registration=True):
  """The Python standard library: real code with English documentation, wherever Python is."""


class LocalText(_Texts, skip_registration=True):
  """The user's own text files."""


def public(name: str, cache: str | os.PathLike, *, prepared: bool = False) -> tfds.core.DatasetBuilder:
  """A public tfds set under `cache`, downloaded where `prepared` asks for it.

  Raises:
    InputError: no such set, no network, no room.
  """
  with foreign(f"unknown dataset {name!r}", "use a tfds name, or local files by path"):
    builder = tfds.builder(name, data_dir=str(Path(cache) / "tfds"), file_format="array_record")
  if prepared and not builder.data_path.exists():
    _prepare(builder, name)
  return builder


def _prepare(builder, what: str) -> None:
  # tfds draws its own progress bars on stdout and stderr.
  quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
  with foreign(f"could not prepare {what}", "free some disk space or check the network"), quiet[0], quiet[1]:
    tfds.disable_progress_bar()
    try:
      builder.download_and_prepare()
    except Exception:
      if not builder.data_path.exists():  # or else another process was quicker
        raise
      builder.info.read_from_directory(builder.data_path)


def _stdlib_files() -> dict[str, Path]:
  root = Path(sysconfig.get_paths()["stdlib"])
  skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
  files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
  return {str(p.relative_to(root)): p for p in files}


def _local_files(path: str) -> dict[str, Path]:
  require(path != "", "data.name is local_text but data.path is empty; give a file, a folder or a glob")
  given = Path(os.path.expanduser(path))
  if os.path.isdir(given):  # False of a name too long for a path, too
    # As in a glob: what is hidden (.git, .ipynb_checkpoints) has to be asked for.
    hidden = lambda p: any(part.startswith(".") for part in p.relative_to(given).parts)
    files = [p for p in given.rglob("*") if _kind(p) in _SUFFIXES and not hidden(p)]
  else:
    files = [given] if os.path.isfile(given) else map(Path, glob.iglob(str(given), recursive=True))
  files = sorted({p for p in files if p.is_file()})
  require(bool(files), f"data.path {path} matches no {', '.join(_SUFFIXES)} file (also .xz, .gz)")
  root = Path(os.path.commonpath([p.parent for p in files]))
  return {str(p.relative_to(root)): p for p in files}


def _kind(file: Path) -> str:
  return (Path(file.stem).suffix if file.suffix.lower() in _COMPRESSED else file.suffix).lower()


def _content_hash(files: dict[str, Path]) -> str:
  digest = hashlib.sha256()
  for name, file in files.items():
    digest.update(f"{name}\0".encode())
    with foreign(file, "make it readable"), open(file, "rb") as stream:
      while block := stream.read(2**20):
        digest.update(block)
  return digest.hexdigest()[:16]


def _named_split(name: str) -> str | None:
  prefixes = {"train": "train", "val": "validation", "test": "test"}
  return next((split for prefix, split in prefixes.items() if Path(name).name.startswith(prefix)), None)


def _hashed_split(key: str) -> str:
  bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 20
  return {0: "test", 1: "validation"}.get(bucket, "train")


def read_file(name: str, file: Path) -> Iterator[tuple[str, str]]:
  """(key, text) of every document in a file of the kinds that `documents` reads; `name` begins the keys.

  Raises:
    InputError: as `documents`.
  """
  kind = _kind(file)
  if kind == ".parquet":
    yield from ((f"{name}:{row}", text) for row, text in enumerate(_parquet(file)))
  elif kind == ".jsonl":
    for number, line in lines(file):
      yield f"{name}:{number - 1}", _record(file, number, line)
  else:
    yield name, read_text(file)


def _record(file: Path, number: int, line: str) -> str:
  """The text of one line of a jsonl file."""
  with foreign(file, "every line is a JSON object; mend or remove it", place=lambda: f"line {number}"):
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:  # whose own words would call this line 1
      raise ValueError(f"{error.msg} (column {error.colno})") from None
    require(
      isinstance(record, dict) and isinstance(record.get("text"), str),
      f"{file}, line {number}, has no string field 'text' ({_found(record)}); mend or remove it",
    )
    return _characters(record["text"])


def _found(record) -> str:
  if not isinstance(record, dict):
    return f"it is no object but {_TYPES.get(type(record), 'an object')}"
  if "text" not in record:
    return f"it has {', '.join(map(repr, list(record)[:5])) or 'no field'}"
  return f"it is {_TYPES.get(type(record['text']), 'an object')}"


def _characters(text: str) -> str:
  """A lone half of a surrogate pair, as JSON can escape it, is no character: U+FFFD stands for it."""
  return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet(file: Path) -> Iterator[str]:
  """Column "text", a few rows at a time; what a dictionary repeats counts as often as it stands there."""
  import pyarrow
  import pyarrow.parquet

  compressed = file.suffix.lower() in _COMPRESSED
  row, made = -1, 0
  with foreign(file, "it is damaged or no parquet file: fetch it again", place=lambda: f"row {row + 1}"):
    source = pyarrow.BufferReader(read_bytes(file)) if compressed else pyarrow.OSFile(str(file))
    with source:
      most = expanded_bytes(source.size())
      schema = pyarrow.parquet.read_schema(source)
      require("text" in schema.names, f"{file} has no column 'text'; it has {', '.join(schema.names[:20])}")
      kind = schema.field("text").type
      kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
      require(
        pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind),
        f"{file}: column 'text' holds {kind}, not strings; convert it",
      )
      table = pyarrow.parquet.ParquetFile(source, read_dictionary=["text"], buffer_size=_BUFFER)
      for batch in table.iter_batches(batch_size=_ROWS, columns=["text"]):
        for value in batch.column(0):
          row += 1
          require(value.is_valid, f"{file}, row {row} (from 0) of column 'text' is null; remove it")
          text = value.as_py()
          made += len(text)
          require(made <= most, f"{file} expands to more than {most} characters, hardly text; write it as jsonl")
          yield text
