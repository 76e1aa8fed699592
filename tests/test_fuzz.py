"""Every reader of foreign bytes on damaged files: a result or an InputError of one line, soon and in little memory.

A valid small file of each format is truncated, bit-flipped, spliced, re-encoded, or has a number blown up, as bytes or,
where it is compressed, inside. Case `i` of a format is always the same file.
"""

import contextlib
import functools
import gzip
import io
import json
import lzma
import re
import resource
import signal
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configs import bows as bows_config
from configs import funbat as funbat_config
from experiments import funbat
from experiments.anncur.data import PARTS_OF_SPEECH, wordnet_pairs
from experiments.bows import cities as bows_cities
from jaxlab.core.checks import InputError
from jaxlab.core.foreign import read_npz
from jaxlab.data import corpora, tokenizer, tokens
from jaxlab.graphs.common import read_edge_list
from jaxlab.graphs.weighted_trees import tree_from_wordnet
from jaxlab.models import hub
from tests.data.test_tokenizer import byte_level, sentencepiece, unigram
from tests.models import test_gguf

TEXT = "The cat sat on the mat, the dog dug 1234 holes. Und über allem: Ruhe.\n"
SECONDS = 20  # a hang, not a measurement: a case takes milliseconds
MEMORY = 2**29  # address space a case may add: bombs may grow to 64 MiB, and are then in memory as bytes and as text
FIXTURES = Path(__file__).parent / "fixtures"
COMPRESSORS = {".gz": gzip.compress, ".xz": lzma.compress}


# Valid files: the bytes of one that is then damaged.


def jsonl() -> bytes:
  records = [{"text": TEXT * 3, "id": 7}, {"meta": {"a": [1, None]}, "text": "\ud83d\ude00 \\ud83d\\u00e9"}]
  return "\n".join(json.dumps(record) for record in records * 4).encode()


def parquet(compression: str = "snappy", dictionary: bool = True) -> bytes:
  table = pyarrow.table({"id": list(range(40)), "text": [TEXT * (i % 5) for i in range(40)]})
  file = io.BytesIO()
  options = dict(compression=compression, use_dictionary=dictionary, row_group_size=15, data_page_size=200)
  pyarrow.parquet.write_table(table, file, **options)
  return file.getvalue()


def edges() -> bytes:
  pairs = np.random.default_rng(0).integers(0, 50, (60, 2))
  return b"# nodes 50\n" + b"\n".join(f"{u} {v} 0.5".encode() for u, v in pairs)


NOUNS = "".join(
  f'{i:08d} 03 n 01 word{i} 0 001 @ {max(1, i // 2):08d} n 0000 | a gloss; "the word{i} stands here"\n'
  if i > 1
  else "00000001 03 n 01 word1 0 000 | the root\n"
  for i in range(1, 30)
)
INDEX = "".join(f"word{i} n 1 1 @ 1 0 {i:08d}\n" for i in range(1, 30))


def arrays() -> dict[str, np.ndarray]:
  random = np.random.default_rng(0)
  made = {f"ndims/{k}": np.int64(n) for k, n in enumerate((5, 6, 7))}
  for fold in range(2):
    for part, size in (("tr", 20), ("te", 8)):
      made[f"data/{fold}/{part}_ind"] = random.integers(0, (5, 6, 7), (size, 3)).astype(np.int16)
      made[f"data/{fold}/{part}_y"] = random.normal(60, 9, size)
  return made


def npz(save) -> bytes:
  file = io.BytesIO()
  save(file, **arrays())
  return file.getvalue()


def cities() -> bytes:
  random = np.random.default_rng(0)
  return "\n".join(f"{a:.3f},{b:.3f},{60_000 + i}" for i, (a, b) in enumerate(random.normal(0, 20, (40, 2)))).encode()


# Readers: what a person's file goes through.


def read_documents(file: Path) -> None:
  for key, text in corpora.read_file(file.name, file):
    (key + text).encode()


def read_tokenizer(file: Path) -> None:
  bpe = tokenizer.load(file)
  documents = corpora.Documents([{"text": TEXT}, {"text": "<s> 日本\x00"}], "text", file.name)
  ids = tokens.tokenize(documents, bpe, bos=0, cache=file.parent / "cache").ids
  assert ids.max() <= tokenizer.largest_id(bpe)
  tokenizer.token_bytes(bpe)[ids].sum()


def read_wordnet(file: Path) -> None:
  """`file` is data.noun or index.noun; the other files are whole."""
  for part in PARTS_OF_SPEECH:
    for kind, content in (("data", NOUNS), ("index", INDEX)):
      if not (other := file.parent / f"{kind}.{part}").exists():
        other.write_text(content)
  wordnet_pairs(file.parent)


def read_folds(file: Path) -> None:
  config = funbat_config.get_config("test")
  config.data.update(name="npz", paths=(str(file),))
  read_npz(file)
  funbat.load_folds(config)


def read_cities(file: Path) -> None:
  config = bows_config.get_config("test")
  config.cities.update(name="csv", path=str(file))
  bows_cities.load(config)


def read_checkpoint(fixture: str):
  """`file` is one file of a checkpoint whose others are whole."""

  def read(file: Path) -> None:
    for other in (FIXTURES / fixture).iterdir():
      if other.suffix in (".json", ".safetensors") and not (file.parent / other.name).exists():
        (file.parent / other.name).symlink_to(other)
    hub.load(file.parent)

  return read


def read_gguf(file: Path) -> None:
  hub.load(file)
  hub.load_vocabulary(file)


def read_vocabulary(file: Path) -> None:
  if not (file.parent / "tokenizer.json").exists():
    (file.parent / "tokenizer.json").write_text(byte_level("prefix").to_str())
  hub.load_vocabulary(file.parent).tokenizer.encode(TEXT)


def gguf_file() -> bytes:
  with tempfile.TemporaryDirectory() as folder:
    return test_gguf.write(Path(folder) / "model.gguf").read_bytes()


ROLES = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "x"}]}


# File name: (its valid bytes, the reader).
FORMATS = {
  "a.txt": (lambda: (TEXT * 9).encode(), read_documents),
  "a.md": (lambda: (TEXT * 9).encode("utf-8-sig"), read_documents),
  "a.jsonl": (jsonl, read_documents),
  "a.parquet": (parquet, read_documents),
  "plain.parquet": (lambda: parquet("zstd", dictionary=False), read_documents),
  "byte_level.json": (lambda: byte_level("prefix").to_str().encode(), read_tokenizer),
  "unigram.json": (lambda: unigram().to_str().encode(), read_tokenizer),
  "sentencepiece.json": (lambda: sentencepiece("normalizer").to_str().encode(), read_tokenizer),
  "edges.txt": (edges, read_edge_list),
  "data.noun": (NOUNS.encode, tree_from_wordnet),
  "pairs/data.noun": (NOUNS.encode, read_wordnet),
  "pairs/index.noun": (INDEX.encode, read_wordnet),
  "a.npz": (lambda: npz(np.savez), read_folds),
  "compressed.npz": (lambda: npz(np.savez_compressed), read_folds),
  "cities.csv": (cities, read_cities),
  "model.gguf": (gguf_file, read_gguf),
  "vocabulary/tokenizer_config.json": (lambda: json.dumps(ROLES).encode(), read_vocabulary),
  "generation/generation_config.json": (lambda: b'{"bos_token_id": 0, "eos_token_id": [1, 2]}', read_vocabulary),
}
for fixture, file in (
  ("llama", "model.safetensors"), ("qwen3", "model.safetensors.index.json"), ("llama3", "config.json"),
  ("qwen3", "config.json"), ("qwen3_moe", "config.json"), ("nanochat", "config.json"),
):  # fmt: skip
  content = functools.partial((FIXTURES / fixture / file).read_bytes)
  FORMATS[f"{fixture}.{file.split('.')[0]}/{file}"] = (content, read_checkpoint(fixture))
for name in ("a.txt", "a.md", "a.jsonl", "a.parquet", "edges.txt"):
  FORMATS |= {name + suffix: FORMATS[name] for suffix in COMPRESSORS}


# Damage.


def truncated(content: bytes, random) -> bytes:
  return content[: random.integers(len(content) + 1)]


def flipped(content: bytes, random) -> bytes:
  bits = np.unpackbits(np.frombuffer(content, np.uint8))
  bits[random.integers(len(bits), size=random.integers(1, 9))] ^= 1
  return np.packbits(bits).tobytes()


def spliced(content: bytes, random) -> bytes:
  """A piece cut out, moved or repeated."""
  a, b, c, d = np.sort(random.integers(len(content) + 1, size=4))
  pieces = content[:a], content[a:b], content[b:c], content[c:d], content[d:]
  order = ((0, 4), (0, 3, 2, 1, 4), (0, 1, 1, 2, 3, 4), (0, 1, 2, 4), (4, 0))[random.integers(5)]
  return b"".join(pieces[i] for i in order)


def reencoded(content: bytes, random) -> bytes:
  text = content.decode("latin-1")
  ways = (
    lambda: text.encode("utf-16"),
    lambda: text.encode(),
    lambda: b"\xef\xbb\xbf" + content,
    lambda: content.replace(b"\n", b"\r\n\r\n"),
    lambda: content.replace(b"\n", b"\r"),
    lambda: content.replace(b"\n", b"\0"),
    lambda: content + bytes(int(random.integers(1, 50))),
    lambda: gzip.compress(content),
    lambda: lzma.compress(content),
    lambda: content + content,
    lambda: content.replace(b'"', b"'"),
    lambda: re.sub(rb"\d+", lambda m: b"null", content, count=int(random.integers(1, 5))),
  )
  return ways[random.integers(len(ways))]()


def blown_up(content: bytes, random) -> bytes:
  """A number in the text, or four bytes anywhere, that promise far more than there is."""
  numbers = list(re.finditer(rb"\d+", content))
  if numbers and random.integers(2):
    found = numbers[random.integers(len(numbers))]
    large = (b"-1", b"4294967296", b"99999999999999999999", b"1e400", b"9" * 5000, b"[" * 5000)[random.integers(6)]
    return content[: found.start()] + large + content[found.end() :]
  at = int(random.integers(max(1, len(content) - 4)))
  return content[:at] + (b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", bytes(4))[random.integers(3)] + content[at + 4 :]


DAMAGES = (truncated, flipped, spliced, reencoded, blown_up)


def damaged(name: str, case: int) -> bytes:
  """The bytes of case `case`; of a compressed file either these or the content is damaged."""
  random = np.random.default_rng([*name.encode(), case])
  content, compress = FORMATS[name][0](), COMPRESSORS.get(Path(name).suffix, bytes)
  outside = compress is bytes or random.integers(2)
  content = compress(content) if outside else content
  for _ in range(random.integers(1, 3)):
    content = DAMAGES[random.integers(len(DAMAGES))](content or b"\n", random)
  return content if outside else compress(content)


@contextlib.contextmanager
def bounded():
  """A hang ends in KeyboardInterrupt, which readers let through as they must; memory in MemoryError."""

  def hung(*_):
    raise KeyboardInterrupt(f"no result after {SECONDS} s")

  pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
  limits = resource.getrlimit(resource.RLIMIT_AS)
  before = signal.signal(signal.SIGALRM, hung)
  try:
    if pages is not None:
      resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    yield
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def fuzz(name: str, cases: range, folder: Path) -> dict[str, int]:
  """Reads every case; counts results and refusals. Anything else fails with the case's number."""
  file = folder / name
  file.parent.mkdir(exist_ok=True)
  # The whole file first, unbounded: it starts jax and what else is loaded late.
  content, reader = FORMATS[name]
  file.write_bytes(COMPRESSORS.get(file.suffix, bytes)(content()))
  reader(file)
  counts = {"read": 0, "refused": 0}
  for case in cases:
    file.write_bytes(damaged(name, case))
    try:
      with bounded():
        reader(file)
      counts["read"] += 1
    except InputError as error:
      assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, (name, case, str(error))
      counts["refused"] += 1
    except BaseException as error:
      raise AssertionError(f"{name}, case {case}: {type(error).__name__}: {error}") from error
  return counts


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_give_a_result_or_one_line(name, tmp_path):
  counts = fuzz(name, range(50), tmp_path)
  assert counts["refused"] >= 10 or name in ("a.txt", "a.md")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_files_give_a_result_or_one_line(name, tmp_path):
  fuzz(name, range(50, 1050), tmp_path)


@pytest.mark.parametrize("name, times", [("a.txt", 5), ("a.jsonl", 7), ("edges.txt", 12), ("cities.csv", 11)])
def test_reading_takes_a_few_times_the_file(name, times, tmp_path):
  """Peak of what Python and NumPy allocate, over the bytes of the file; tuples alone would be twenty times them."""
  content, reader = FORMATS[name]
  file = tmp_path / name
  file.write_bytes((content() + b"\n") * (400_000 // len(content())))
  reader(file)
  tracemalloc.start()
  try:
    reader(file)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < times * file.stat().st_size
