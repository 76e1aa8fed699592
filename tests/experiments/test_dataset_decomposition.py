import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import dataset_decomposition as config_file
from experiments.console import Console
from experiments.dataset_decomposition import best_rate, data, few_batches, measure, run_name, time_to, training
from jaxlab.core.checks import InputError
from jaxlab.data import tokenizer
from jaxlab.data.tokens import Tokens
from jaxlab.models import Transformer, hub
from jaxlab.sequence import dataset_decomposition as dd
from jaxlab.training import losses
from tests.common import configs, random_model, random_tokens, run_and_continue
from tests.cudnn import cudnn_by_definition

BOS = 63
law = lambda whole: ConfigDict(dict(mean=20, sigma=1.0, whole=whole))


def corpus(lengths, seed=0):
  """Documents of these lengths, in ids below BOS."""
  ids = np.random.default_rng(seed).integers(0, BOS, sum(lengths)).astype(np.uint16)
  return Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), BOS)


@pytest.fixture
def books(tmp_path):
  """A user's own text, three chapters a book."""
  words, rng = ("the", "cold", "evening", "doctor", "looked", "said"), np.random.default_rng(0)
  folder = tmp_path / "books"
  folder.mkdir()
  for split, count in (("train", 3), ("validation", 1), ("test", 1)):
    text = lambda: "\n\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(25))
    book = "\n\n".join(f"## Chapter {i}\n\n{text()}" for i in range(3))
    for i in range(count):
      (folder / f"{split}-{i}.md").write_text(book)
  return folder


def test_everything_is_measured_once_and_the_decoder_is_an_ordinary_folder(books, tmp_path, monkeypatch):
  config = config_file.get_config("test")
  config.data.path, config.data.vocab_size, config.more.name = str(books), 300, ""
  report = run_and_continue("dataset_decomposition", tmp_path, monkeypatch, "training.trained", config=config)
  runs = report.metrics["runs"]
  assert len(runs) == len(config.arms) and {sum(run["steps"].values()) for run in runs.values()} == {7}
  assert set(report.metrics["speed"]["milliseconds"]) == {"16", "32", "64", "masked"}
  model = hub.load(tmp_path / "decoder")
  assert isinstance(model, Transformer) and model.config.rope_theta == 1e5
  assert hub.load_vocabulary(tmp_path / "decoder").tokenizer.get_vocab_size() == model.config.vocab_size


def test_paragraphs_and_chapters_are_found_in_tokens():
  texts = ["# One\n\nA line.\nOn.\n\nNext.", "Other\n\n\n## Two\n\nLast #3\n"]
  bpe = tokenizer.train(texts, 265)  # bytes alone: an empty line is two tokens
  ids = [bpe.encode(text, add_special_tokens=False).ids for text in texts]
  tokens = Tokens(np.concatenate(ids), np.cumsum([0, *map(len, ids)]), 0)
  whole = "".join(texts)
  at = lambda found: [whole[start : start + 5] for start in found[:-1]]
  found = data.marked(tokens, bpe, False)
  assert at(found.chapters) == ["# One", "Other", "## Tw"] and found.chapters[-1] == len(whole)
  assert [text for text in at(found.breaks) if text.strip()[:1] == text[:1]] == [
    *("# One", "A lin", "Next.", "Other", "## Tw", "Last ")
  ]
  code = data.marked(tokens, bpe, True)
  assert at(code.chapters) == ["# One", "Other"] and "On.\n\n" in at(code.breaks)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(0, 2**31))
def test_documents_are_cut_at_paragraphs_of_one_chapter(paragraphs, seed):
  breaks = np.cumsum([0, *paragraphs])
  chapters = np.union1d(breaks[::4], breaks[-1:])
  source = data.Source(np.arange(breaks[-1]), chapters, breaks, 10**6)
  bounds = data.cut(source, law(0.2), np.random.default_rng(seed))
  assert set(chapters) <= set(bounds) <= set(breaks)
  np.testing.assert_array_equal(data.cut(source, law(1.0), np.random.default_rng(seed)), chapters)
  tokens = data.documents(source, law(0.2), 2 * len(source.ids), seed)
  assert len(tokens.ids) + len(tokens) >= 2 * len(source.ids)
  for i in range(len(tokens)):
    document = tokens.document(i)
    assert document[0] in breaks and document[-1] + 1 in breaks and (np.diff(document) == 1).all()
  half = data.first(tokens, 0.5)
  np.testing.assert_array_equal(half.ids, tokens.ids[: len(half.ids)])
  assert half.offsets[-2] <= len(tokens.ids) / 2 <= half.offsets[-1]


def test_lengths_are_log_normal():
  source = data.Source(np.arange(400_000), np.array([0, 400_000]), np.arange(400_001), 10**6)
  lengths = np.diff(data.cut(source, law(0.0), np.random.default_rng(0)))
  assert np.mean(lengths) == pytest.approx(20, rel=0.05) and np.std(np.log(lengths)) == pytest.approx(1.0, abs=0.1)


@given(st.lists(st.integers(0, 90), min_size=1, max_size=25))
def test_best_fit_has_every_token_once_and_no_row_too_many(lengths):
  tokens = corpus(lengths)
  rows = data.best_fit(tokens, 31)
  pieces = []
  for row in rows:
    filled = row[row >= 0]
    assert filled[0] == BOS and (row[len(filled) :] == -1).all()
    pieces += [piece.tolist() for piece in np.split(filled, np.flatnonzero(filled == BOS))[1:]]
  document = lambda i, start: [BOS, *tokens.document(i)[start : start + 31]]
  whole = [document(i, start) for i, length in enumerate(lengths) for start in range(0, length, 31)]
  assert sorted(pieces) == sorted(whole)
  sizes = sorted(map(len, whole))
  assert len(rows) <= 11 / 9 * math.ceil(sum(sizes) / 32) + 1 or sizes[-1] > 10  # what decreasing orders promise


def test_the_largest_goes_where_the_least_is_left():
  """Sizes with their BOS: 6, 5, 3, 2 into rows of 8 are 6 + 2 and 5 + 3; first come, first served takes three rows."""
  np.testing.assert_array_equal((data.best_fit(corpus([1, 2, 4, 5]), 7) >= 0).sum(axis=1), [8, 8])


def test_chunks_are_the_stream_of_documents():
  tokens = corpus([5, 0, 9, 30])
  stream = np.concatenate([[BOS, *tokens.document(i)] for i in range(4)])
  np.testing.assert_array_equal(data.chunks(tokens, 6).ravel(), stream[:42])


def test_all_arms_take_as_many_steps_of_as_many_tokens():
  config, tokens = config_file.get_config("test"), corpus([300, 17, 90, 200, 45, 64, 33] * 9)
  counts = set()
  for arm in config.arms:
    rows, steps, most = training.rows_of(config, arm, tokens, 0)
    assert most == 1 if arm in ("uniform", "grow_p2") else 3 <= most <= 2**config.high // 18 + 2
    taken = [batch["inputs"].size for batch, _ in zip(rows, range(sum(steps.values())), strict=False)]
    assert set(taken) == {config.batch_tokens}
    counts.add((sum(steps.values()), len(taken)))
  assert len(counts) == 1
  with pytest.raises(InputError, match="an arm is 'shuffled'"):
    training.rows_of(config, "shuffled", tokens, 0)


def test_hosts_share_the_rows_of_every_arm(monkeypatch):
  config, tokens = config_file.get_config("test"), corpus([300, 17, 90, 200, 45, 64, 33] * 9)
  for arm in (training.CONCAT, training.BEST_FIT, training.GROW):
    whole = [batch["inputs"] for batch in training.rows_of(config, arm, tokens, 0)[0]]
    with monkeypatch.context() as patch:
      patch.setattr(jax, "process_count", lambda: 2)
      for i in range(2):
        patch.setattr(jax, "process_index", lambda i=i: i)
        mine = [batch["inputs"] for batch in training.rows_of(config, arm, tokens, 0)[0]]
        for half, batch in zip(mine, whole, strict=True):
          np.testing.assert_array_equal(half, batch[i::2])
  with pytest.raises(InputError, match="hosts=3 must divide rows of a batch=8"):
    data.batches(np.zeros((9, 3)), 8, 0, shard=(0, 3))


def test_under_a_document_mask_a_row_has_the_loss_of_its_documents(monkeypatch):
  """Whatever comes before them: rotary positions are relative."""
  config, model = config_file.get_config("test"), random_model(configs()["qwen3"])
  documents = [np.array([BOS, *random_tokens(1, n, seed=n)[0] % BOS]) for n in (11, 4, 7)]
  row = np.concatenate([*documents, [-1] * 5])[None].astype(np.int32)
  batch = {"inputs": jnp.asarray(row[:, :-1]), "targets": jnp.asarray(row[:, 1:])}
  loss = training.loss_of(config, training.MASKED, BOS, data.most_documents(row, BOS))
  packed = jax.jit(loss, static_argnums=(2, 3))(model, batch, None, None)[0]
  cudnn_by_definition(monkeypatch)  # what a GPU takes; of no more documents than there are
  again = jax.jit(lambda *args: loss(*args, None, None)[0])(model, batch)
  assert float(again) == pytest.approx(float(packed), rel=1e-5)
  hidden = jax.jit(lambda model, tokens: losses.token_losses(model, model.hidden(tokens), targets=jnp.asarray(after)))
  total, count = 0.0, row[0, 1:] >= 0
  for i, document in enumerate(documents):
    after = np.array([[*document[1:], BOS if i < 2 else -1]])
    total += float(hidden(model, jnp.asarray(document[None])).sum())
  assert float(packed) == pytest.approx(total / count.sum(), rel=1e-4)
  plain = jax.jit(training.loss_of(config, training.CONCAT, BOS, 1), static_argnums=(2, 3))
  assert abs(float(plain(model, batch | {"inputs": jnp.maximum(batch["inputs"], 0)}, None, None)[0] - packed)) > 1e-3


def test_losses_by_position_are_those_of_the_chapters():
  model = random_model(configs()["qwen3"])
  source = data.Source(np.arange(100) % BOS, np.array([0, 9, 40, 64, 100]), np.arange(101), BOS)
  rows = data.held_out(source, 32, 10)
  assert (rows["targets"] >= 0).sum(axis=1).tolist() == [31, 24, 32]  # not the chapter of nine
  np.testing.assert_array_equal(rows["inputs"][2], [BOS, *source.ids[64:95]])
  found = training.by_position(model, rows, [8, 32], batch=2)
  each = np.asarray(losses.token_losses(model, model.hidden(rows["inputs"]), rows["targets"]))
  assert found["mean"] == pytest.approx(each.sum() / 87, rel=1e-4)
  assert found["positions"] == pytest.approx([each[:, :8].mean(), each[:, 8:].sum() / 63], rel=1e-4)
  with pytest.raises(InputError, match="no held-out chapter has 64 tokens"):
    data.held_out(source, 128, 10)


@given(st.floats(0.2, 3.0), st.floats(1.0, 5.0))
def test_a_loss_that_falls_with_the_logarithm_of_time_is_reached_when_it_says(fall, start):
  loss = lambda seconds: start - fall * math.log(seconds)
  times = [1.0, 2.0, 5.0]
  for seconds in (1.0, 1.5, 4.0, 9.0):
    assert time_to(loss(seconds), times, list(map(loss, times))) == pytest.approx(seconds)
  assert time_to(loss(0.5), times, list(map(loss, times))) == 1.0
  assert time_to(-1e3, times, list(map(loss, times))) == 40.0 == time_to(0.5, times, [1.0, 1.0, 1.0])


def test_the_rate_is_the_best_on_the_validation_split():
  config = config_file.get_config("cpu")
  loss = dict(zip(config.train.rates, (3.0, 2.5, 2.7), strict=True))
  runs = {
    run_name("concat", config.shares[0], rate, 0): {"validation": {"mean": value}} for rate, value in loss.items()
  }
  assert best_rate(config, {"runs": runs}, "concat") == config.train.rates[1]


def test_buckets_that_cannot_be_in_every_cycle_are_named():
  config = config_file.get_config("test")
  config.schedule.cycles, rate = 4, config.train.rates[0]
  run = {"validation": {"mean": 1.0}, "steps": {"16": 9, "32": 3}}
  said = few_batches(config, {"runs": {run_name("grow_p2", 1.0, rate, 0): run}})
  assert said == "; 3 batches of 32 for 4 cycles; 0 batches of 64 for 4 cycles"
  run["steps"] = {"16": 4, "32": 4, "64": 5}
  assert few_batches(config, {"runs": {run_name("grow_p2", 1.0, rate, 0): run}}) == ""


def test_what_the_claims_are_about_must_be_run(tmp_path):
  config = config_file.get_config("test")
  config.arms = ("concat", "grow_p2", "shrink_p2")
  with pytest.raises(InputError, match=r"config\.arms lacks best_fit_masked, concat_masked, uniform"):
    measure(config, tmp_path, tmp_path, Console(quiet=True))


def test_the_statistics_are_those_of_rows_that_can_be_counted():
  tokens = corpus([40, 3, 100, 17])
  found = data.statistics(tokens, dd.decompose(tokens, low=3, high=5, seed=None), 31)
  stream = np.concatenate([[i] * (length + 1) for i, length in enumerate([40, 3, 100, 17])])
  before = [np.sum(stream[t // 32 * 32 : t] == stream[t]) for t in range(len(stream))]
  assert found["context"]["concat_masked"] == pytest.approx(np.mean(before))
  assert found["tokens"] == len(stream) and found["documents"] == 4
