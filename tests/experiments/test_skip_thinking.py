"""The experiment of skip-thinking: its questions, what its rivals count, and a run with students that learn nothing."""

import itertools

import numpy as np
import pytest

from configs import skip_thinking as config_file
from experiments.skip_thinking import diagnostics, left_out, tasks, training
from jaxlab.core.checks import InputError
from jaxlab.sequence import skip_thinking as st
from tests.common import run_and_continue


@pytest.fixture
def config():
  return config_file.get_config("test")


@pytest.mark.parametrize("task", tasks.TASKS)
def test_answers_follow_from_the_sentences_that_reason(task):
  words, _ = tasks.vocabulary(4)
  for one in tasks.stories(task, 50, filler=0.6, items=(2, 6), seed=3):
    reasoned = [unit.text for unit in one.units if unit.kind == tasks.REASON]
    last = {
      "letters": lambda: " ".join(text.split()[-2] for text in reasoned),  # noqa: B023
      "coin": lambda: "yes" if reasoned[-1].split()[-2] == "heads" else "no",  # noqa: B023
      "swaps": lambda: reasoned[-1].partition(f"{one.question.split()[-3]} has the ")[2].split()[0],  # noqa: B023
      "sums": lambda: " ".join(itertools.takewhile(str.isdigit, reasoned[-1].split()[-2::-1]))[::-1],  # noqa: B023
      "dates": lambda: None,
    }[task]()
    assert last in (None, one.answer)
    assert tasks.sample(one, words).answer and all(tasks.sample(one, words).units)
  reasons = np.concatenate([tasks.reasons(one) for one in tasks.stories(task, 200, filler=0.6, items=(4, 6), seed=1)])
  assert 0.35 < reasons.mean() < 0.45


def test_dates_are_the_calendars():
  import datetime

  for one in tasks.stories("dates", 100, filler=0.6, items=(2, 6), seed=0):
    text = one.question.split()
    digits = lambda part: int("".join(part))
    day, later = digits(text[2 : text.index(".") - 1]), digits(text[text.index("is", 3) + 1 : -3])
    start = datetime.datetime.strptime(f"{day} {text[text.index('.') - 1]} 2023", "%d %B %Y")
    end = start + datetime.timedelta(days=later)
    assert one.answer == f"{tasks.digits(end.day)} {end.strftime('%B').lower()}"


def test_no_question_is_in_two_folds(config):
  made, _, vocabulary = training.folds(config, 0)
  asked = [tuple(one.question) for fold in made.values() for one in fold.samples]
  assert len(asked) == len(set(asked)) == 2 * (20 + 20 + 4)
  assert max(max(map(max, one.units)) for fold in made.values() for one in fold.samples) < vocabulary
  other, *_ = training.folds(config, 1)
  assert other["test"].samples == made["test"].samples and other["first"].samples != made["first"].samples


def test_a_random_stretch_is_its_share_of_what_counts():
  targets = np.where(np.arange(24) % 4 > 0, 7, -1).reshape(2, 12)
  batch = {"inputs": np.arange(24).reshape(2, 12), "targets": targets}
  out = training.window(batch, 3, 0)["targets"]
  assert ((out >= 0).sum(axis=1) == 3).all() and (out[out >= 0] == targets[out >= 0]).all()


def test_a_random_stretch_has_every_place_alike():
  """The first and the last too: a stretch that reaches the end goes on at the start."""
  batch = {"inputs": np.zeros((2, 12), int), "targets": np.where(np.arange(24) % 12 > 2, 7, -1).reshape(2, 12)}
  drawn = np.array([training.window(batch, 3, seed)["targets"] >= 0 for seed in range(3000)])
  assert not drawn[..., :3].any() and (drawn.sum(axis=-1) == 3).all()
  np.testing.assert_allclose(drawn[..., 3:].mean(axis=0), 1 / 3, atol=0.04)
  begins = drawn[..., 3:] & ~np.roll(drawn[..., 3:], 1, axis=-1)
  assert (begins.sum(axis=-1) == 1).all()  # one stretch, around the end


def test_random_cuts_leave_no_chunk_empty_where_there_are_units_enough():
  """Of 6 units in 4 chunks there are 10, all as likely."""
  one = lambda units: st.Sample([1], [[2]] * units, [3])
  fold = training.Fold([one(6)] * 3000 + [one(4), one(2), one(0)], [], [])
  *many, four, two, none = training.random_cuts(fold, 4, 0)
  kinds, counts = np.unique(many, axis=0, return_counts=True)
  assert len(kinds) == 10 and (np.diff(kinds) > 0).all() and (kinds[:, [0, -1]] == [0, 6]).all()
  np.testing.assert_allclose(counts / 3000, 0.1, atol=0.03)
  assert (four, two, none) == ((0, 1, 2, 3, 4), (0, 1, 2, 2, 2), (0, 0, 0, 0, 0))
  assert training.random_cuts(fold, 1, 0)[0] == (0, 6)


def test_rivals_leave_out_as_much(config):
  made, tags, _ = training.folds(config, 0)
  fold = made["second"]
  cuts = fold.cuts(config.chunks)
  kept = [(1,), (2, 3)] + [(1, 2, 3, 4)] * (len(cuts) - 2)
  other = training.shuffled(kept, cuts, 0)
  assert sum(map(len, other)) == sum(map(len, kept)) and other != kept
  st.encode(fold.samples, cuts, tags, length=config.length, kept=other)
  samples, own, _ = training.shortened(fold, config.chunks, 0.5)
  size = lambda one: sum(map(len, one.units))
  assert all(size(a) == size(b) - round(size(b) / 2) for a, b in zip(samples, fold.samples, strict=True))
  assert all(c[-1] == len(one.units) for c, one in zip(own, samples, strict=True))
  assert not any(one.units for one in training.shortened(fold, config.chunks, 1.0)[0])


def test_what_is_left_out_is_counted_by_kind(config):
  made, _, _ = training.folds(config, 0)
  fold = made["second"]
  cuts = fold.cuts(config.chunks)
  nothing = left_out(config, {"cuts": cuts, "kept": [range(1, 5)] * len(cuts)}, 0)
  everything = left_out(config, {"cuts": cuts, "kept": [()] * len(cuts)}, 0)
  assert all(share == 0 for row in nothing.values() for share in row.values())
  assert all(share == 1 for row in everything.values() for share in row.values())


def test_words_that_reason_are_where_they_are(config):
  made, tags, _ = training.folds(config, 0)
  fold = made["first"]
  cuts = fold.cuts(config.chunks)
  rows = st.encode(fold.samples, cuts, tags, length=config.length)
  mask = diagnostics.reasoning(fold, cuts, rows)
  for i in (0, 25):
    units = zip(fold.samples[i].units, fold.reasons[i], strict=True)
    assert rows.tokens[i][mask[i]].tolist() == [token for unit, reasons in units if reasons for token in unit]


def test_everything_is_measured_once(config, tmp_path, monkeypatch):
  def fitted(config, model, data, **how):
    how["workdir"].mkdir(exist_ok=True)
    assert (next(iter(data))["targets"] >= 0).any()
    return model

  monkeypatch.setattr(training, "fitted", fitted)
  parts = ("tuned", "training.answers", "training.labelled", "speed", "diagnosed")
  report = run_and_continue("skip_thinking", tmp_path, monkeypatch, *parts, config=config)
  assert len(report.claims) == 12 and set(report.metrics["base"]) == set(training.BASE)
  found = report.metrics["diagnostics"]
  assert all(0 < row["share"] < 1 and 0 < row["gradient"] < 2 for row in found.values())


def test_an_unknown_task_is_said(config, tmp_path):
  from experiments import skip_thinking

  config.tasks = ("coin", "chess")
  with pytest.raises(InputError, match=r"chess.*letters"):
    skip_thinking.measure(config, tmp_path, tmp_path, None)
