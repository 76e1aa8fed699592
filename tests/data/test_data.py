import errno
import gzip
import io
import json
import lzma
import resource

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.data import corpora, packing, recall, tokenizer, tokens

TEXT = "The cat sat on the mat, the dog dug 1234 holes. Und über allem: Ruhe.\n"


def parquet(values, name="text"):
  sink = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.table({name: values}), sink)
  return sink.getvalue()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def stdlib(cache):
  """(documents, tokenizer, tokens) of the standard library's validation split."""
  documents = corpora.documents("stdlib_code", split="validation", cache=cache)
  bpe = tokenizer.trained(documents, key=documents.key, vocab_size=512, cache=cache)
  return documents, bpe, tokens.tokenize(documents, bpe, bos=tokenizer.bos_id(bpe), cache=cache)


def fake_tokens(lengths):
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  return tokens.Tokens(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, bos=0)


def test_the_standard_library_splits_by_file(cache):
  parts = {s: corpora.documents("stdlib_code", split=s, cache=cache) for s in corpora.SPLITS}
  assert len(parts["train"]) > 5 * len(parts["test"]) > 0
  assert len({p.key for p in parts.values()}) == 3
  assert "import" in parts["train"][0] + parts["train"][1]


def test_local_files_of_every_kind_are_read(tmp_path, cache):
  record = json.dumps({"text": TEXT}) + "\n"
  (tmp_path / "a.txt").write_text(TEXT)
  (tmp_path / "b.md.gz").write_bytes(gzip.compress(TEXT.encode(), mtime=0))
  (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(record.encode() * 3))
  pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT, TEXT]}), tmp_path / "d.parquet")
  (tmp_path / "ignored.bin").write_bytes(b"\xff")
  assert documents_of(tmp_path, cache) == [TEXT] * 7


def test_files_named_after_splits_are_those_splits(tmp_path, cache):
  for name in ("train-00", "train-01", "val", "test"):
    (tmp_path / f"{name}.txt").write_text(name)
  read = lambda split: sorted(corpora.documents("local_text", split=split, cache=cache, path=str(tmp_path / "*.txt")))
  assert [read(s) for s in corpora.SPLITS] == [["train-00", "train-01"], ["val"], ["test"]]


def test_two_processes_may_prepare_the_same_text(cache, tmp_path, monkeypatch):
  """The slower one finds its place taken when it is done, and reads what lies there."""
  (tmp_path / "train.txt").write_text("once upon a time")
  read = lambda: list(corpora.documents("local_text", split="train", cache=cache, path=str(tmp_path)))
  prepare = corpora.LocalText._split_generators

  def slower(self, *given):
    monkeypatch.setattr(corpora.LocalText, "_split_generators", prepare)
    assert read() == ["once upon a time"]
    return prepare(self, *given)

  monkeypatch.setattr(corpora.LocalText, "_split_generators", slower)
  assert read() == ["once upon a time"]


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("x.txt", b"\xff\xfe\x00", "is not UTF-8 .byte 0.*iconv"),
    ("x.txt", b"  \n", "every document is empty"),
    ("x.jsonl", b'{"body": "no"}\n', "line 1, has no string field 'text'"),
    ("x.jsonl", b'\n{"text": "a"}\r\n\r\n{', r"line 4: Expecting property name .*\(column 2\); every line"),
    ("x.jsonl", b'{"text": null}', "line 1, has no string field 'text' .it is null"),
    ("x.jsonl", b'{"text": ["a"]}', "it is a list"),
    ("x.jsonl", b'{"text": 3}', "it is a number"),
    ("x.jsonl", b'"text"', "it is no object but a string"),
    ("x.jsonl", b"[" * 100_000, "line 1: maximum recursion depth"),
    ("x.jsonl", b'{"text": ' + b"9" * 10_000 + b"}", "line 1: Exceeds the limit"),
    ("x.jsonl", b'{"text": "a"}\n\xff', "is not UTF-8 .line 2, byte 0.*iconv"),
    ("x.txt.xz", b"not xz", "is damaged"),
    ("x.txt.gz", gzip.compress(b"one", mtime=0) + b"rubbish", "is damaged"),
    ("x.txt.xz", lzma.compress(b"one") + b"rubbish", "is damaged"),
    ("x.txt.gz", gzip.compress(b"one", mtime=0)[:-9], "ends inside a compressed stream; it is damaged"),
    ("x.txt.gz", gzip.compress(bytes(2**27), 9, mtime=0), "expands to more than 67108864 bytes"),
    ("x.parquet", b"PAR1", "no parquet file"),
    ("x.parquet", parquet([1, 2]), "column 'text' holds int64, not strings"),
    ("x.parquet", parquet([{"a": "b"}]), "column 'text' holds struct<a: string>, not strings"),
    ("x.parquet", parquet(["a", None]), "row 1 .from 0. of column 'text' is null"),
    ("x.parquet", parquet(["a"], "body"), "has no column 'text'; it has body"),
    ("x.parquet", parquet(["a" * 10**6] * 100), "expands to more than 67108864 characters"),
    ("x.bin", b"", "matches no"),
  ],
)
def test_bad_files_are_named(tmp_path, cache, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError, match=message):
    corpora.documents("local_text", split="train", cache=cache, path=str(tmp_path))
  with pytest.raises(InputError, match=message):  # nothing half-prepared is taken for whole
    corpora.documents("local_text", split="train", cache=cache, path=str(tmp_path))


def documents_of(path, cache):
  """All documents of local files, whichever split they fall in."""
  texts = []
  for split in corpora.SPLITS:
    try:
      texts += list(corpora.documents("local_text", split=split, cache=cache, path=str(path)))
    except InputError as error:
      assert "has no document for the split" in str(error)
  return sorted(texts)


def test_what_editors_and_tools_leave_in_files_is_read(tmp_path, cache):
  """A byte order mark, CRLF, blank lines, NUL, several members and padding, half a surrogate pair, capital names."""
  record = lambda text: json.dumps({"text": text}).encode()
  (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + record("a1") + b"\r\n \r\n\r\n" + record("a\x002"))
  (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb")
  for name, compress in (("c.TXT.GZ", gzip.compress), ("d.md.xz", lzma.compress)):
    (tmp_path / name).write_bytes(compress(name.encode()) + bytes(8) + compress(b" twice") + bytes(4))
  (tmp_path / "e.jsonl").write_bytes(record("e\ud800") + b"\n" + record("\U0001f600"))
  expected = ["a1", "a\x002", "b", "c.TXT.GZ twice", "d.md.xz twice", "e\ufffd", "\U0001f600"]
  assert documents_of(tmp_path, cache) == sorted(expected)


def test_globs_are_globs_and_hidden_files_have_to_be_named(tmp_path, cache):
  for name in ("1.txt", "a/2.txt", "a/b/3.txt", "a/.h/4.txt", "a/.5.txt", "x[1]/6.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  read = lambda pattern: [text[-5] for text in documents_of(tmp_path / pattern, cache)]
  assert read("**/*.txt") == read("") == ["1", "2", "3", "6"]
  patterns = ("*.txt", "a/*.txt", "*/*/?.txt", "a/.*", "a/.h", "x[1]")
  assert [read(p) for p in patterns] == [["1"], ["2"], ["3"], ["5"], ["4"], ["6"]]
  for path in (300 * "a", "a\0b", f"~{300 * 'a'}"):  # no path of any file
    with pytest.raises(InputError, match="matches no"):
      corpora.documents("local_text", split="train", cache=cache, path=path)
  with pytest.raises(InputError, match=r"data\.path ~/no/such/\*\*/\*\.md matches no"):
    corpora.documents("local_text", split="train", cache=cache, path="~/no/such/**/*.md")


def test_unknown_names_are_named(cache):
  with pytest.raises(InputError, match="unknown dataset 'no_such_set'"):
    corpora.documents("no_such_set", split="train", cache=cache)
  with pytest.raises(InputError, match="data split is 'dev'"):
    corpora.documents("stdlib_code", split="dev", cache=cache)
  with pytest.raises(InputError, match=r"data\.path is empty"):
    corpora.documents("local_text", split="train", cache=cache)


def test_the_tokenizer_is_lossless_and_counts_bytes(stdlib):
  documents, bpe, ids = stdlib
  assert bpe.get_vocab_size() == 512
  assert [bpe.token_to_id(s) for s in tokenizer.SPECIALS] == list(range(503, 512))
  assert bpe.decode(bpe.encode(TEXT).ids) == TEXT
  sizes = tokenizer.token_bytes(bpe)
  assert sizes[-9:].sum() == 0
  for i in range(5):
    assert sizes[ids.document(i)].sum() == len(documents[i].encode())
  digits = [t for t in bpe.encode("90817263").tokens if t.strip("Ġ")]
  assert max(map(len, digits)) <= 2
  with pytest.raises(InputError, match="vocab_size is 200"):
    tokenizer.train(["x"], 200)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(4, 40), st.integers(1, 8))
def test_rows_start_with_bos_are_full_and_invent_nothing(lengths, row, buffer):
  corpus = fake_tokens(lengths)
  rows = iter(packing.training_rows(corpus, row=row, seed=1, buffer=buffer))
  for _ in range(5):
    ids = next(rows)
    assert ids.shape == (row + 1,) and ids[0] == 0
    # Between two BOS the ids are consecutive: a run of one document.
    for run in np.split(ids, np.flatnonzero(ids == 0))[1:]:
      assert run[0] == 0 and np.all(np.diff(run[1:]) == 1) and run[1:].max(initial=0) <= corpus.ids[-1]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_of_indices_have_no_end_and_each_once_an_epoch(batch):
  order = packing.index_batches(5, batch, seed=3)
  assert len(order) > 1e9
  drawn = np.concatenate([order[i] for i in range(10)])[:10]
  first, second = drawn[:5].tolist(), drawn[5:].tolist()
  assert sorted(first) == sorted(second) == list(range(5)) and first != second


def test_the_largest_piece_that_fits_is_taken():
  corpus = fake_tokens([9, 5, 3, 2])
  first = next(iter(packing.training_rows(corpus, row=15, seed=0, buffer=4)))
  # 10 of 16 for the longest, 6 of 6 for the next.
  assert [len(run) for run in np.split(first, np.flatnonzero(first == 0))[1:]] == [10, 6]


def test_iteration_resumes_exactly_and_hosts_draw_disjoint_pieces(stdlib):
  _, bpe, corpus = stdlib
  make = lambda: iter(
    packing.batches(
      packing.mixture(
        packing.training_rows(corpus, row=200, seed=3), recall.training_rows(corpus, bpe, row=200, seed=4), 0.25
      ),
      4,
    )
  )
  whole = make()
  expected = [next(whole)["inputs"] for _ in range(12)]
  part = make()
  for _ in range(5):
    next(part)
  state = json.loads(json.dumps(part.get_state()))
  resumed = make()
  resumed.set_state(state)
  np.testing.assert_array_equal([next(resumed)["inputs"] for _ in range(7)], expected[5:])
  starts = [packing.cut(corpus, 200)[0]]
  shards = [set(range(i, len(starts[0]), 2)) for i in range(2)]
  assert not shards[0] & shards[1]
  rows = [next(iter(packing.training_rows(corpus, row=200, seed=3, shard=(i, 2)))) for i in range(2)]
  assert not np.array_equal(*rows)


def test_mixture_has_the_asked_share(stdlib):
  _, bpe, corpus = stdlib
  question = bpe.encode("Question:", add_special_tokens=False).ids
  rows = iter(
    packing.mixture(
      packing.training_rows(corpus, row=400, seed=0), recall.training_rows(corpus, bpe, row=400, seed=0), 0.3
    )
  )
  has = lambda row: any(list(row[i : i + len(question)]) == question for i in range(len(row)))
  assert 20 <= sum(has(next(rows)) for _ in range(100)) <= 40


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda t: packing.training_rows(t, row=0, seed=0), "row is 0"),
    (lambda t: packing.training_rows(t, row=4, seed=0, buffer=0), "buffer is 0"),
    (lambda t: packing.batches(packing.training_rows(t, row=4, seed=0), -1), "batch is -1"),
    (lambda t: packing.evaluation_batches(t, row=-2, batch=1), "row is -2"),
    (lambda t: packing.evaluation_batches(t, row=2, batch=1, limit=0), "limit is 0"),
    (lambda t: packing.mid_document_batches(t, row=2, batch=0, limit=9), "batch is 0"),
    (lambda t: packing.mixture(None, None, float("nan")), "share of a mixture is nan"),
  ],
)
def test_counts_and_shares_out_of_range_are_refused(call, message):
  with pytest.raises(InputError, match=message):
    call(fake_tokens([10, 3, 7]))


def test_a_full_disk_under_the_tokens_is_told_with_the_file(stdlib, tmp_path):
  """A limit on the size of files stands for the disk."""
  documents, bpe, _ = stdlib
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with pytest.raises(OSError, match="File too large") as raised:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
      tokens.tokenize(documents, bpe, bos=0, cache=tmp_path)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert raised.value.errno == errno.EFBIG and raised.value.filename.endswith("ids.npy")


def test_evaluation_counts_every_token_once():
  corpus = fake_tokens([10, 3, 7])
  for batch in (1, 4):
    batches = packing.evaluation_batches(corpus, row=4, batch=batch)
    targets = np.concatenate([b["targets"].ravel() for b in batches])
    assert sorted(targets[targets >= 0]) == list(range(1, 21))
    assert all((b["inputs"][b["targets"][:, 0] >= 0, 0] == 0).all() for b in batches)
  first = packing.evaluation_batches(corpus, row=4, batch=1)[0]
  np.testing.assert_array_equal(first["inputs"], [[0, 1, 2, 3]])
  np.testing.assert_array_equal(first["targets"], [[1, 2, 3, 4]])
  slices = packing.mid_document_batches(corpus, row=6, batch=2, limit=100)
  np.testing.assert_array_equal(slices[0]["inputs"], [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
  np.testing.assert_array_equal(slices[0]["targets"] - slices[0]["inputs"], 1)


@pytest.mark.parametrize("task", recall.TASKS)
def test_recall_examples_hold_their_answer(stdlib, task):
  _, bpe, corpus = stdlib
  for seed in range(5):
    made = recall.example(task, corpus, bpe, length=400 + seed, rng=np.random.default_rng(seed))
    assert len(made.prompt) + len(made.answer) == 400 + seed and made.prompt[0] == corpus.bos
    text, answer = bpe.decode(made.prompt), bpe.decode(made.answer)
    name = text.rsplit(" of the ", 1)[1].removesuffix(" is")
    if task == "variable_tracking":
      while f"of the {name} is that of the " in text:
        name = text.split(f"of the {name} is that of the ")[1].split(".")[0]
    assert f" of the {name} is{answer}." in text
  with pytest.raises(InputError, match="too short"):
    recall.example(task, corpus, bpe, length=100, rng=np.random.default_rng(0))
