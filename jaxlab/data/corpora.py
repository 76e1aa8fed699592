"""Corpora as tensorflow_datasets builders, read without TensorFlow (array_record files, `as_data_source`).

`stdlib_code` is there on every machine with Python: the standard library's own sources. `local_text` reads the user's
files. Any other name is a public tfds set with a text feature.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from jaxlab.core.checks import InputError, require, require_choice

SPLITS = ("train", "validation", "test")
_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")


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
    text = self.source[index][self.feature]
    return text.decode("utf-8") if isinstance(text, bytes) else text


def documents(name: str, *, split: str, cache: str | os.PathLike, path: str = "") -> Documents:
  """One split of a corpus, prepared under `cache` on first use.

  Args:
    name: "stdlib_code", "local_text" (with `path`), or a tfds name such as "wiki40b/en" or "c4".
    split: "train", "validation" or "test". Local files whose names start with train, val or test are those splits;
      otherwise, and for stdlib_code, a hash of each document's name sends 90 % / 5 % / 5 % there.
    path: a file, a folder or a glob of txt, md, rst, py, jsonl (field "text") or parquet (column "text") files, each
      also as .xz or .gz.

  Raises:
    InputError: no such data, an empty split, bytes that are not UTF-8, a record without text.
  """
  require_choice("data split", split, SPLITS)
  if name == "stdlib_code":
    files = _stdlib_files()
    builder = StdlibCode(files, cache)
  elif name == "local_text":
    builder = LocalText(_local_files(path), cache)
  else:
    builder = _public(name, cache)
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
      for key, text in _read(name, file):
        if text.strip() and (named or _hashed_split(key) == split):
          yield key, {"name": key, "text": text}


class StdlibCode(_Texts, skip_registration=True):
  """The Python standard library: real code with English documentation, wherever Python is."""


class LocalText(_Texts, skip_registration=True):
  """The user's own text files."""


def _public(name: str, cache):
  try:
    return tfds.builder(name, data_dir=str(Path(cache) / "tfds"), file_format="array_record")
  except (tfds.core.DatasetNotFoundError, ValueError) as error:
    first = str(error).splitlines()[0]
    raise InputError(f"unknown dataset {name!r} ({first}); use stdlib_code, local_text or a tfds name") from None


def _prepare(builder, what: str) -> None:
  try:
    # tfds draws its own progress bars on stdout and stderr.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      tfds.disable_progress_bar()
      builder.download_and_prepare()
  except InputError:
    raise
  except OSError as error:
    raise InputError(f"could not prepare {what}: {error}; free some disk space or check the network") from None


def _stdlib_files() -> dict[str, Path]:
  root = Path(sysconfig.get_paths()["stdlib"])
  skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
  files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
  return {str(p.relative_to(root)): p for p in files}


def _local_files(path: str) -> dict[str, Path]:
  require(path != "", "data.name is local_text but data.path is empty; give a file, a folder or a glob")
  given = Path(path).expanduser()
  if given.is_dir():
    files = [p for p in given.rglob("*") if p.is_file() and _kind(p) in _SUFFIXES]
  elif given.is_file():
    files = [given]
  else:
    files = [p for p in given.parent.glob(given.name) if p.is_file()] if given.parent.is_dir() else []
  require(bool(files), f"data.path {path} matches no {', '.join(_SUFFIXES)} file (also .xz, .gz)")
  root = Path(os.path.commonpath([p.parent for p in files]))
  return {str(p.relative_to(root)): p for p in sorted(files)}


def _kind(file: Path) -> str:
  return Path(file.stem).suffix if file.suffix in (".xz", ".gz") else file.suffix


def _content_hash(files: dict[str, Path]) -> str:
  digest = hashlib.sha256()
  for name, file in files.items():
    digest.update(f"{name}\0".encode())
    with open(file, "rb") as stream:
      while block := stream.read(2**20):
        digest.update(block)
  return digest.hexdigest()[:16]


def _named_split(name: str) -> str | None:
  prefixes = {"train": "train", "val": "validation", "test": "test"}
  return next((split for prefix, split in prefixes.items() if Path(name).name.startswith(prefix)), None)


def _hashed_split(key: str) -> str:
  bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 20
  return {0: "test", 1: "validation"}.get(bucket, "train")


def _read(name: str, file: Path) -> Iterator[tuple[str, str]]:
  """(key, text) of every document in a file."""
  opener = {".xz": lzma.open, ".gz": gzip.open}.get(file.suffix, open)
  kind = _kind(file)
  try:
    with opener(file, "rb") as stream:
      if kind == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(io.BytesIO(stream.read()))
        require("text" in table.column_names, f"{file} has no column 'text'; it has {', '.join(table.column_names)}")
        for row, text in enumerate(table["text"].to_pylist()):
          yield f"{name}:{row}", text
      elif kind == ".jsonl":
        for row, line in enumerate(stream):
          record = json.loads(line)
          require(
            isinstance(record, dict) and isinstance(record.get("text"), str),
            f"{file}, line {row + 1}, has no string field 'text'",
          )
          yield f"{name}:{row}", record["text"]
      else:
        yield name, stream.read().decode("utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"{file} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t utf-8") from None
  except (json.JSONDecodeError, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
    raise InputError(f"{file} is damaged or not what its name says ({error}); fetch it again") from None
