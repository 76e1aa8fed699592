import itertools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.models import TransformerConfig
from jaxlab.sequence import skip_thinking
from jaxlab.sequence.skip_thinking import Sample, Tags, average_chunks, encode
from jaxlab.training import loop, losses
from tests.common import SHAPE, random_model

CHUNKS, WORDS = 3, 40
TAGS = Tags(WORDS, tuple(range(WORDS + 1, WORDS + 1 + CHUNKS)), WORDS + 4, WORDS + 5)
LENGTH = 40
CONFIG = TransformerConfig(**SHAPE | dict(depth=1, vocab_size=WORDS + 6))


def sample(rng, units: int) -> Sample:
  some = lambda low, high: rng.integers(0, WORDS, rng.integers(low, high + 1)).tolist()
  return Sample(some(0, 4), [some(1, 3) for _ in range(units)], some(1, 2))


def make(count=6, seed=0, units=(1, 7)):
  rng = np.random.default_rng(seed)
  samples = [sample(rng, int(rng.integers(*units))) for _ in range(count)]
  return samples, [average_chunks(len(s.units), CHUNKS) for s in samples]


@pytest.fixture(scope="module")
def model():
  return random_model(CONFIG)


def test_a_sentence_or_a_line_is_a_unit():
  assert skip_thinking.split_units(" It costs 3.5 pounds. Is it dear?\nNo!  So we buy\n ") == [
    "It costs 3.5 pounds.", "Is it dear?", "No!", "So we buy",
  ]  # fmt: skip
  assert skip_thinking.split_units("  ") == []


@pytest.mark.parametrize("chunks", range(1, 9))
def test_average_chunks_cover_all_units_in_sizes_that_differ_by_one_at_most(chunks):
  for units in range(61):
    cuts = average_chunks(units, chunks)
    sizes = np.diff(cuts)
    assert len(cuts) == chunks + 1 and cuts[0] == 0 and cuts[-1] == units and sizes.min() >= 0
    if units >= chunks:
      assert sizes.max() - sizes.min() <= 1
      assert cuts[1:-1] == tuple(int(m * units / chunks + 0.5) for m in range(1, chunks))
    else:
      assert sizes.tolist() == [1] * units + [0] * (chunks - units)


def test_a_row_reads_as_the_sheet_writes_it():
  one = Sample([7, 8], [[1], [2, 3], [4]], [9])
  rows = encode([one], [(0, 1, 1, 3)], TAGS, length=12)  # the second chunk is empty: no tag, no sample
  q, (s1, s2, s3), ans, end = TAGS
  assert rows.tokens[0].tolist() == [q, 7, 8, s1, 1, s3, 2, 3, 4, ans, 9, end] and s2 not in rows.tokens
  assert rows.stages[0].tolist() == [0, 0, 0, 1, 1, 1, 3, 3, 3, 3, 4, 4]
  short = encode([one], [(0, 1, 1, 3)], TAGS, length=12, kept=[(3,)])
  assert short.tokens[0].tolist() == [q, 7, 8, s3, 2, 3, 4, ans, 9, end, end, end]
  assert short.stages[0].tolist() == [0, 0, 0, 3, 3, 3, 3, 3, 4, 4, -1, -1]
  none = encode([one], [(0, 1, 1, 3)], TAGS, length=7, kept=[()])
  assert none.tokens[0].tolist() == [q, 7, 8, ans, 9, end, end] and none.stages[0].tolist() == [0, 0, 0, 4, 4, 4, -1]


def test_stages_share_full_thinkings_tokens_out_and_their_sums_are_its_sum(model):
  samples, cuts = make()
  rows = encode(samples, cuts, TAGS, length=LENGTH)
  whole = skip_thinking.counted(rows)
  parts = [skip_thinking.counted(rows, stage) for stage in range(1, CHUNKS + 2)]
  np.testing.assert_array_equal(sum((part["targets"] >= 0).astype(int) for part in parts), whole["targets"] >= 0)
  after = (rows.stages >= 0)[:, 1:] & (np.cumsum(np.isin(rows.tokens, TAGS.stages), axis=1) > 0)[:, 1:]
  np.testing.assert_array_equal(whole["targets"] >= 0, after)
  loss = jax.jit(lambda batch: losses.language_model_loss(model, batch)[0])
  sums = [float(loss(part)) * (part["targets"] >= 0).sum() for part in parts]
  assert sum(sums) == pytest.approx(float(loss(whole)) * (whole["targets"] >= 0).sum(), rel=1e-5)
  assert all(part["inputs"] is not None and (part["inputs"] == whole["inputs"]).all() for part in parts)


def test_batches_count_one_stage_at_a_time_and_resume():
  samples, cuts = make(units=(3, 6))
  rows = encode(samples, cuts, TAGS, length=LENGTH)
  stage_of = lambda batch: {tuple(target[target >= 0].tolist()) for target in batch["targets"]}
  of = [
    {tuple(t[t >= 0].tolist()) for t in skip_thinking.counted(rows, stage)["targets"]} for stage in range(1, CHUNKS + 2)
  ]
  iterator = iter(skip_thinking.batches(rows, batch=2))
  drawn = [next(iterator) for _ in range(6)]
  assert all(stage_of(batch) <= of[i % 4] for i, batch in enumerate(drawn))
  seen = np.concatenate([batch["inputs"] for batch in drawn[:3]])
  assert {tuple(row) for row in seen.tolist()} == {tuple(row) for row in rows.tokens[:, :-1].tolist()}
  state = iterator.get_state()
  rest = [next(iterator)["targets"] for _ in range(3)]
  again = iter(skip_thinking.batches(rows, batch=2))
  again.set_state(state)
  np.testing.assert_array_equal(rest, [next(again)["targets"] for _ in range(3)])
  assert next(iter(skip_thinking.batches(rows, batch=1)))["inputs"].shape == (1, LENGTH - 1)
  whole = next(iter(skip_thinking.batches(rows, batch=6, stages="all")))
  assert (whole["targets"] >= 0).sum() == (skip_thinking.counted(rows)["targets"] >= 0).sum()
  random = iter(skip_thinking.batches(rows, batch=2, stages="random", seed=3))
  turns = {
    next(i for i, texts in enumerate(of) if drawn <= texts) for drawn in (stage_of(next(random)) for _ in range(30))
  }
  assert turns == set(range(4))


def test_stages_that_no_sample_has_are_never_a_turn():
  samples, cuts = make(units=(1, 2))
  rows = encode(samples, cuts, TAGS, length=LENGTH)
  iterator = iter(skip_thinking.batches(rows, batch=2))
  assert all((next(iterator)["targets"] >= 0).sum() > 0 for _ in range(4))


def planted(table):
  """Mean losses of chunks m and m + 1 by their spans."""
  return lambda candidates: np.array([[table(*own[m - 1 : m + 1]), table(*own[m : m + 2])] for _, m, own in candidates])


def test_the_search_finds_a_planted_cut_and_keeps_what_is_not_better_by_the_threshold():
  best = (0, 2, 5, 6)
  spans = set(itertools.pairwise(best))
  table = lambda start, stop: 1.0 if (start, stop) in spans else 2.0 - 0.5 * (stop == 2 or start == 2)
  start = average_chunks(6, 3)
  assert skip_thinking.search(planted(table), [start], threshold=0.0) == [(0, 2, 5, 6)]
  assert skip_thinking.search(planted(table), [start], threshold=np.inf) == [start]
  flat = lambda start, stop: 1.0 + 0.001 * start
  assert skip_thinking.search(planted(flat), [start]) == [start]


def test_the_search_is_greedy_two_cuts_that_must_move_together_stay():
  """From (0, 2, 4, 6) every single move costs, and both together would gain: the authors' local optimum."""
  good = {(0, 1), (1, 3), (3, 6)}
  table = lambda start, stop: 0.0 if (start, stop) in good else 1.0 + (stop - start != 2)
  start = (0, 2, 4, 6)
  assert skip_thinking.search(planted(table), [start], threshold=0.0) == [start]
  whole = lambda cuts: sum(table(*span) for span in itertools.pairwise(cuts))
  assert whole((0, 1, 3, 6)) < whole(start)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0, 1))
def test_no_accepted_move_raises_the_score_of_its_pair(seed, units, threshold):
  chunks = 4
  value = lambda i, start, stop: np.random.default_rng([seed, i, start, stop]).random()
  scorer = lambda candidates: np.array(
    [[value(i, *own[m - 1 : m + 1]), value(i, *own[m : m + 2])] for i, m, own in candidates]
  )
  before = [average_chunks(n, chunks) for n in units]
  after = skip_thinking.search(scorer, before, threshold=threshold)
  for i, (old, new) in enumerate(zip(before, after, strict=True)):
    state = list(old)
    for m in range(1, chunks):  # replay: cuts move in order, each against its pair as it then is
      pair = lambda cut: value(i, state[m - 1], cut) + value(i, cut, state[m + 1])  # noqa: B023
      if new[m] != state[m]:
        options = [pair(cut) for cut in range(state[m - 1] + 1, state[m + 1])]
        assert pair(new[m]) < pair(state[m]) - threshold and pair(new[m]) == min(options)
        state[m] = new[m]
    assert new[0] == 0 and new[-1] == units[i] and list(new) == sorted(new)


def test_a_students_scores_are_its_losses_of_the_words_alone(model):
  samples, cuts = make(count=3, units=(4, 6))
  candidates = [(i, m, own) for i, own in enumerate(cuts) for m in (1, 2)]
  ours = skip_thinking.student_scores(model, samples, TAGS, length=LENGTH, batch=4)(candidates)
  for (i, m, own), values in zip(candidates, ours, strict=True):
    rows = encode([samples[i]], [own], TAGS, length=LENGTH)
    logits = jax.nn.log_softmax(np.asarray(model(rows.tokens)), axis=-1)[0]
    for side, value in enumerate(values):
      words = [t for t in range(LENGTH) if rows.stages[0, t] == m + side and rows.tokens[0, t] < WORDS]
      assert value == pytest.approx(-np.mean([logits[t - 1, rows.tokens[0, t]] for t in words]), rel=1e-4)
  moved = skip_thinking.search(
    skip_thinking.student_scores(model, samples, TAGS, length=LENGTH, batch=4), cuts, threshold=0.0
  )
  assert [own[-1] for own in moved] == [own[-1] for own in cuts]


def stub(needs, samples):
  """A student that writes the teacher's chunks from where it is, and answers right where `needs(all of it)`."""
  of = {tuple(skip_thinking.prompt(s, TAGS)): s for s in samples}

  def respond(prompts):
    out = []
    for text in prompts:
      one = of[tuple(itertools.takewhile(lambda t: t not in {*TAGS.stages, TAGS.answer}, text))]
      written = []
      if text[-1] in TAGS.stages:
        first = TAGS.stages.index(text[-1])
        written = [*one.units[first], *(t for m in range(first + 1, CHUNKS) for t in (TAGS.stages[m], *one.units[m]))]
        written.append(TAGS.answer)
      out.append([*written, *(one.answer if needs([*text, *written]) else [WORDS - 1] * 3), TAGS.end])
    return out

  return respond


@pytest.mark.parametrize("probe", skip_thinking.PROBES)
def test_what_is_kept_is_what_the_answer_needs(probe):
  rng = np.random.default_rng(1)
  samples = [Sample([i, *rng.integers(20, WORDS, 2)], [[10], [11], [12]], [13]) for i in range(4)]
  kept = lambda needs, **how: skip_thinking.keep(
    stub(needs, samples), samples, [(0, 1, 2, 3)] * 4, TAGS, probe=probe, **how
  )
  assert kept(lambda text: True) == [()] * 4
  assert kept(lambda text: False) == [(1, 2, 3)] * 4
  assert kept(lambda text: True, protected=(3,)) == [(3,)] * 4
  assert kept(lambda text: text[1] != 2) == [(), (), (1, 2, 3), ()]
  if probe == "answer_now":  # without what comes later: all up to the one that is needed
    assert kept(lambda text: 11 in text) == [(1, 2)] * 4
  else:
    assert kept(lambda text: 11 in text) == [(2,)] * 4
    assert kept(lambda text: 10 in text or 12 in text) == [(3,)] * 4  # the first may go while the last is still there


@given(st.integers(0, 2**32), st.lists(st.booleans(), min_size=CHUNKS, max_size=CHUNKS))
def test_a_row_that_leaves_chunks_out_round_trips_through_the_parser(seed, which):
  one = sample(np.random.default_rng(seed), 5)
  cuts = average_chunks(5, CHUNKS)
  kept = [m for m, here in enumerate(which, 1) if here]
  rows = encode([one], [cuts], TAGS, length=LENGTH, kept=[kept])
  thought = skip_thinking.parse(rows.tokens[0, 1 + len(one.question) :].tolist(), TAGS)
  words = lambda m: tuple(token for unit in one.units[cuts[m - 1] : cuts[m]] for token in unit)
  assert thought.chunks == tuple((m, words(m)) for m in kept) and list(thought.answer) == list(one.answer)
  assert skip_thinking.same_answer(one, thought.answer)


@given(st.lists(st.integers(0, WORDS + 5), max_size=20))
def test_the_parser_takes_anything(tokens):
  thought = skip_thinking.parse(tokens, TAGS)
  assert (thought.answer is None) or TAGS.end in tokens
  assert not skip_thinking.same_answer(Sample([], [], [1]), None)


def test_a_part_of_an_answer_is_another_answer():
  same = lambda answer: skip_thinking.same_answer(Sample([], [], [1, 2]), answer)
  assert same((1, 2)) and not any(map(same, ((1,), (2,), (1, 2, 3), (3, 1, 2), (2, 1), ())))


def test_a_student_stops_at_the_end_and_prompts_of_any_number_are_answered(model):
  samples, _ = make(count=5)
  prompts = [skip_thinking.prompt(s, TAGS) for s in samples]
  out = skip_thinking.student(model, TAGS, tokens=12, batch=2)(prompts)
  assert len(out) == 5
  for written in out:
    assert TAGS.end not in written[:-1] and (len(written) == 12 or written[-1] == TAGS.end)
  alone = skip_thinking.student(model, TAGS, tokens=12, batch=1)([prompts[4]])
  assert alone[0] == out[4]


def test_half_of_what_is_trained_on_keeps_all():
  cuts = [(0, 1, 2, 3)] * 8 + [(0, 1, 1, 1)]
  kept = [(1, 2)] * 6 + [(1, 2, 3)] * 2 + [(1,)]
  rows = skip_thinking.balanced(kept, cuts)
  assert sorted(set(rows.tolist())) == list(range(9)) and len(rows) == 12
  assert sum(row >= 6 for row in rows) == 6
  assert sum(row >= 6 for row in skip_thinking.balanced(kept, cuts, full=0.25)) == 2
  assert skip_thinking.balanced([(1, 2, 3)] * 2, cuts[:2]).tolist() == [0, 1]


def test_a_student_trained_on_ones_own_samples_learns_them_chunk_by_chunk(tmp_path):
  samples = [Sample([i], [[10 + i], [20 + i], [30]], [i]) for i in range(8)]
  cuts = [average_chunks(len(s.units), CHUNKS) for s in samples]
  data = skip_thinking.batches(encode(samples, cuts, TAGS, length=16), batch=8)
  trained = loop.train(
    random_model(CONFIG), data,
    lambda model, batch, step, key: losses.language_model_loss(model, batch),
    optax.adam(5e-3), steps=200, workdir=tmp_path, compute_dtype="float32",
  )  # fmt: skip
  respond = skip_thinking.student(trained, TAGS, tokens=16, batch=8)
  written = respond([skip_thinking.prompt(s, TAGS) for s in samples])
  assert all(text.index(TAGS.end) == len(text) - 1 < 15 for text in written)  # it stops there, with room for more
  thoughts = [skip_thinking.parse(text, TAGS) for text in written]
  assert all(skip_thinking.same_answer(s, thought.answer) for s, thought in zip(samples, thoughts, strict=True))
  assert [thought.chunks for thought in thoughts] == [((1, (10 + i,)), (2, (20 + i,)), (3, (30,))) for i in range(8)]


ONE = Sample([1], [[2], [3], [4]], [5])
WRONG = (
  (lambda: average_chunks(3, 0), "chunks"),
  (lambda: average_chunks(-1, 2), "-1 units"),
  (lambda: encode([ONE], [(0, 1, 2, 4)], TAGS, length=20), "cuts"),
  (lambda: encode([ONE], [(0, 2, 1, 3)], TAGS, length=20), "cuts"),
  (lambda: encode([ONE], [], TAGS, length=20), "each needs its own"),
  (lambda: encode([], [], TAGS, length=20), "no sample"),
  (lambda: encode([ONE], [(0, 1, 2, 3)], TAGS, length=5), "make them longer"),
  (lambda: encode([ONE._replace(answer=[])], [(0, 1, 2, 3)], TAGS, length=20), "empty answer"),
  (lambda: encode([ONE._replace(units=[[2], [], [4]])], [(0, 1, 2, 3)], TAGS, length=20), "empty unit"),
  (lambda: encode([ONE._replace(question=[TAGS.end])], [(0, 1, 2, 3)], TAGS, length=20), "ids of their own"),
  (lambda: encode([ONE], [(0, 1, 2, 3)], TAGS, length=20, kept=[(4,)]), "keeps chunks"),
  (lambda: encode([ONE], [(0, 1, 2, 3)], TAGS, length=20, kept=[]), "1 samples have 0 lists of kept chunks"),
  (lambda: skip_thinking.batches(encode([ONE], [(0, 1, 2, 3)], TAGS, length=20), batch=2), "1 samples"),
  (lambda: skip_thinking.batches(encode([ONE], [(0, 1, 2, 3)], TAGS, length=20), batch=1, stages="one"), "stages"),
  (lambda: skip_thinking.search(None, [], threshold=-1), "threshold"),
  (lambda: skip_thinking.search(None, [], score="sum"), "score"),
  (lambda: skip_thinking.search(None, [(0, 1, 3), (0, 1, 2, 3)]), r"cuts have lengths \[3, 4\]"),
  (lambda: skip_thinking.student_scores(None, [ONE], TAGS, length=20, batch=0), "batch is 0; it must"),
  (lambda: skip_thinking.student(None, TAGS, tokens=4, batch=0), "batch is 0; it"),
  (lambda: skip_thinking.student(None, TAGS, tokens=0), "tokens is 0"),
  (lambda: skip_thinking.keep(None, [ONE], [(0, 1, 2, 3)], TAGS, probe="x"), "probe"),
  (lambda: skip_thinking.keep(None, [ONE], [(0, 1, 2, 3)], TAGS, protected=(4,)), "protected"),
  (lambda: skip_thinking.balanced([(1,)], [(0, 1)], full=1.0), "full"),
  (lambda: skip_thinking.balanced([], []), "there is no sample"),
  (lambda: skip_thinking.balanced([(1,)], [(0, 1), (0, 1)]), "2 samples have 1 lists"),
)


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_said_in_one_line(call, message):
  with pytest.raises(InputError, match=message) as error:
    call()
  assert "\n" not in str(error.value)
