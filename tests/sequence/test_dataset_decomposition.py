"""Dataset Decomposition: what every cut, schedule and batch must be, and one training step a bucket."""

import itertools
import time

import jax
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.data.tokens import Tokens
from jaxlab.sequence import dataset_decomposition as dd
from jaxlab.training import loop, losses
from jaxlab.training.metrics import read_metrics
from tests.common import configs, random_model

BOS = 63


def corpus(lengths, seed=0):
  """Documents of these lengths, in ids below BOS."""
  ids = np.random.default_rng(seed).integers(0, BOS, sum(lengths)).astype(np.uint16)
  return Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), BOS)


def stream(tokens):
  return np.concatenate([[BOS, *tokens.document(i)] for i in range(len(tokens))])


@given(st.integers(0, 100_000), st.integers(0, 8), st.integers(0, 2**31))
@example(1, 0, 0)
@example(2**16, 0, 0)
@example(2**16 + 1, 0, 0)
@example(100_000, 8, 0)
def test_pieces_are_disjoint_and_ordered_and_leave_a_short_rest(length, low, seed):
  for high, rng in ((17, None), (low + 3, np.random.default_rng(seed))):
    pieces, end = dd.cut(length, low, high, rng), 0
    for start, exponent in pieces:
      assert start == end and low <= exponent <= high
      end = start + 2**exponent + 1
    assert end <= length and length - end <= 2**low


def test_without_a_limit_pieces_are_the_greedy_binary_expansion():
  """Each takes the largest power that fits with one token more, which halves what is left."""
  near = [2**i + more for i in range(17) for more in (0, 1, 2, 3)]  # where a logarithm in floating point errs
  for length in [*near[1:], *np.random.default_rng(0).integers(2, 100_001, 200).tolist()]:
    exponents = [piece.exponent for piece in dd.cut(length, 0, 17)]
    assert exponents == sorted(exponents, reverse=True)
    left = length
    for exponent in exponents:
      assert 2**exponent <= left - 1 < 2 ** (exponent + 1)
      left -= 2**exponent + 1
    assert 0 <= left <= 1
    assert max(exponents.count(i) for i in exponents) <= 2  # of 2^i + 1 tokens; twice only as the ones add up


def test_long_documents_give_every_bucket_as_many_tokens():
  """Drawn with P(i) ~ 2^-i, so that pieces times their length are level: a chi-square of the draws."""
  pieces = [p.exponent for p in dd.cut(4_000_000, 4, 8, np.random.default_rng(0))]
  found = np.bincount(pieces, minlength=9)[4:]
  odds = 2.0 ** -np.arange(5)
  expected = odds / odds.sum() * found.sum()
  assert ((found - expected) ** 2 / expected).sum() < 18.5  # 0.1 % of chi-square with 4 degrees of freedom
  mass = found * 2.0 ** np.arange(4, 9)
  assert mass.max() / mass.min() < 1.1


@given(st.lists(st.integers(0, 5000), max_size=20), st.integers(0, 4))
def test_counting_is_cutting(lengths, low):
  cuts = [piece.exponent for length in lengths for piece in dd.cut(length, low, 9)]
  assert dd.count_pieces(np.array(lengths, int), low, 9) == {i: cuts.count(i) for i in range(low, 10)}


def test_counts_of_long_documents_are_level_in_tokens_too():
  drawn = dd.count_pieces(np.full(2000, 3000), 2, 5, np.random.default_rng(0))
  mass = [count * 2**i for i, count in drawn.items()]
  assert max(mass) < 1.1 * min(mass)


def test_sequences_are_those_of_the_documents():
  """Every one inside its document, a BOS only where a document begins; the rest is what is said to be left out."""
  tokens = corpus([40, 0, 1, 7, 133, 16, 2, 64])
  buckets, whole = dd.decompose(tokens, low=2, high=5, seed=3), stream(tokens)
  used = np.zeros(len(whole), int)
  for i, starts in buckets.starts.items():
    for row, start in enumerate(starts):
      np.testing.assert_array_equal(buckets.sequence(i, row), whole[start : start + 2**i + 1])
      assert BOS not in buckets.sequence(i, row)[1:]
      used[start : start + 2**i + 1] += 1
  assert buckets._begins is buckets._begins  # of all documents, so not worked out for every sequence
  assert used.max() == 1 and buckets.left_out == pytest.approx(1 - used.mean()) and buckets.left_out > 0


COUNTS = {3: 130, 4: 64, 5: 33, 6: 5}


@pytest.mark.parametrize("curriculum", dd.CURRICULA)
@pytest.mark.parametrize("cycles", [1, 3])
def test_every_sequence_comes_once(curriculum, cycles):
  plan = dd.schedule(COUNTS, curriculum=curriculum, cycles=cycles, batch_tokens=64, seed=1)
  seen = {i: [] for i in COUNTS}
  for step in range(len(plan)):
    rows, exponent = plan.rows(step), int(plan.exponent[step])
    assert len(rows) * 2**exponent == 64
    seen[exponent] += rows.tolist()
  for i, rows in seen.items():
    assert len(set(rows)) == len(rows) == COUNTS[i] - plan.unused[i] and plan.unused[i] < 64 >> i
  assert len(plan.cycle_ends) == cycles and plan.cycle_ends[-1] == len(plan)


def test_a_cycle_takes_its_share_of_every_bucket():
  plan = dd.schedule({4: 160, 6: 40}, cycles=4, batch_tokens=64, seed=0)
  for begin, end in itertools.pairwise([0, *plan.cycle_ends]):
    np.testing.assert_array_equal(np.bincount(plan.exponent[begin:end], minlength=7)[[4, 6]], [10, 10])


def test_the_first_draw_follows_the_odds_and_so_does_the_second():
  """As the paper has them, and times a bucket's tokens as the code has them; whatever they sum to, and however little a
  bucket has left."""
  counts, odds = {3: 16, 4: 8, 5: 8}, np.array([4.0, 2.0, 1.0])
  for weighted, weights in ((False, odds), (True, odds * [128, 128, 256])):
    how = dict(curriculum="grow_p2", cycles=1, batch_tokens=64, token_weighted=weighted)
    drawn = np.array([dd.schedule(counts, seed=seed, **how).exponent[:2] - 3 for seed in range(1000)])
    share = weights / weights.sum()
    np.testing.assert_allclose(np.bincount(drawn[:, 0], minlength=3) / len(drawn), share, atol=0.05)
    assert (drawn[:, 0] == drawn[:, 1]).mean() == pytest.approx((share**2).sum(), abs=0.05)  # 2 batches or more each


@pytest.mark.parametrize(
  ("curriculum", "sign"), [("grow_p2", 1), ("grow_linear", 1), ("grow_p100", 1), ("shrink_p2", -1)]
)
def test_sequences_grow_within_a_cycle(curriculum, sign):
  """Or shrink; under uniform odds neither: the mean exponent of a cycle's last third over that of its first."""

  def drift(curriculum):
    how = dict(cycles=2, batch_tokens=64, token_weighted=False)
    counts = {i: 40 * (64 >> i) for i in (3, 4, 5, 6)}
    plans = [dd.schedule(counts, curriculum=curriculum, seed=seed, **how) for seed in range(20)]
    halves = [part for plan in plans for part in np.split(plan.exponent, plan.cycle_ends[:-1])]
    return np.mean([part[-len(part) // 3 :].mean() - part[: len(part) // 3].mean() for part in halves])

  assert sign * drift(curriculum) > 0.5 and abs(drift("uniform")) < 0.2


def test_a_schedule_is_that_of_its_seed():
  make = lambda seed: dd.schedule(COUNTS, batch_tokens=64, seed=seed)
  a, b, c = make(0), make(0), make(1)
  assert [a.rows(t).tolist() for t in range(len(a))] == [b.rows(t).tolist() for t in range(len(b))]
  assert a.exponent.tolist() != c.exponent.tolist()


def test_batches_go_on_where_they_stopped_and_hosts_share_them():
  tokens = corpus([300, 17, 90, 200, 45])
  buckets = dd.decompose(tokens, low=3, high=5)
  plan = dd.schedule(buckets.counts, cycles=2, batch_tokens=64)
  every = list(dd.batches(buckets, plan))
  assert len(every) == len(plan) and {batch["inputs"].size for batch in every} == {64}
  for step, batch in enumerate(every):
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    for row, inputs in zip(plan.rows(step), batch["inputs"], strict=True):
      np.testing.assert_array_equal(inputs, buckets.sequence(int(plan.exponent[step]), row)[:-1])
  halves = [list(dd.batches(buckets, plan, shard=(i, 2))) for i in (0, 1)]
  for whole, *parts in zip(every, *halves, strict=True):
    for i, part in enumerate(parts):
      np.testing.assert_array_equal(part["inputs"], whole["inputs"][i::2])
  iterator = iter(dd.batches(buckets, plan))
  for _ in range(3):
    next(iterator)
  state, again = iterator.get_state(), iter(dd.batches(buckets, plan))
  again.set_state(state)
  for batch, expected in zip(again, every[3:], strict=True):
    np.testing.assert_array_equal(batch["inputs"], expected["inputs"])


def test_few_batches_are_made_ahead(monkeypatch):
  """Five are, beside the eight that were taken, not hundreds."""
  buckets = dd.decompose(corpus([300, 17, 90, 200, 45]), low=3, high=3)
  plan, made = dd.schedule(buckets.counts, cycles=1, batch_tokens=8), []
  one = buckets.sequence
  monkeypatch.setattr(dd.Buckets, "sequence", lambda self, *args: made.append(args) or one(*args))
  iterator = iter(dd.batches(buckets, plan))
  for _ in range(8):
    next(iterator)
  time.sleep(0.3)
  assert len(plan) > 40 and 8 <= len(made) <= 8 + 5


def test_averages_of_the_papers_natural_mixture():
  """96 G tokens in sequences of 64 to 8192: 482 tokens a sequence, 1018 before a token."""
  sizes = np.repeat(2 ** np.arange(6, 14), np.array([3, 6, 10, 17, 21, 17, 13, 9]) * 2 ** np.arange(7, -1, -1))
  assert round(dd.average_length(sizes)) == 482 and round(dd.average_context(sizes)) == 1018


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30))
def test_averages_are_those_of_their_definitions(lengths):
  attended = [i for length in lengths for i in range(length)]
  assert dd.average_context(lengths) == pytest.approx(np.mean(attended))
  assert dd.average_length(lengths) == pytest.approx(np.mean(lengths))


def test_tokens_see_more_of_their_document_than_in_masked_chunks_where_lengths_have_a_heavy_tail():
  """Sequences of 256 to 8192, and chunks of 8192: of log-normal lengths of mean 600 for a sigma of 2, as short ones go;
  for 1.2 they see less, as the powers of two cut documents that fit a chunk whole."""
  gains = {}
  for sigma in (1.2, 2.0):
    lengths = np.exp(np.random.default_rng(0).normal(np.log(600) - sigma**2 / 2, sigma, 20_000)).astype(int) + 2
    bounds = np.unique(np.concatenate([[0], np.cumsum(lengths), np.arange(0, lengths.sum(), 8192)]))
    counts = dd.count_pieces(lengths, 8, 13)
    pieces = np.repeat(2 ** np.array(list(counts)), list(counts.values()))
    gains[sigma] = dd.average_context(pieces) / dd.average_context(np.diff(bounds))
  assert gains[2.0] > 1 > gains[1.2]


def test_a_run_trains_on_every_bucket_with_a_program_each(tmp_path):
  """In three lines; a batch's loss is that of its sequences fed one by one."""
  tokens = corpus([300, 17, 90, 200, 45])
  buckets = dd.decompose(tokens, low=3, high=5)
  plan = dd.schedule(buckets.counts, cycles=2, batch_tokens=64)
  traced = []

  def loss(model, batch, step, key):
    traced.append(batch["inputs"].shape)
    return losses.language_model_loss(model, batch)

  model = random_model(configs()["llama"])
  how = dict(steps=len(plan), workdir=tmp_path, compute_dtype="float32", checkpoint_every=1000)
  one = jax.devices()[:1]
  loop.train(model, dd.batches(buckets, plan), loss, optax.sgd(0.0), mesh=loop.meshes.make_mesh({}, one), **how)
  assert sorted(traced) == sorted((64 >> i, 2**i) for i in (3, 4, 5))  # once each
  recorded = [line["loss"] for line in read_metrics(tmp_path)]
  alone = jax.jit(lambda inputs, targets: losses.language_model_loss(model, {"inputs": inputs, "targets": targets})[0])
  for step in [int(np.argmax(plan.exponent == i)) for i in (3, 4, 5)]:
    rows = [buckets.sequence(int(plan.exponent[step]), row) for row in plan.rows(step)]
    each = [float(alone(row[None, :-1], row[None, 1:])) for row in rows]
    np.testing.assert_allclose(recorded[step], np.mean(each), rtol=1e-4)


def test_bad_input():
  short = corpus([3, 5])
  for call, message in (
    (lambda: dd.decompose(short, low=4, high=6), "no document has the 17 tokens of the shortest sequence"),
    (lambda: dd.decompose(short, low=3, high=2), "exponents from 3 to 2 are asked for"),
    (lambda: dd.cut(-1, 0, 3), "a document has -1 tokens"),
    (lambda: dd.schedule({}, batch_tokens=8), "there are no buckets"),
    (lambda: dd.schedule(COUNTS, batch_tokens=96), "batch_tokens is 96; it must be a multiple of 64"),
    (lambda: dd.schedule({6: 3}, batch_tokens=256), "no bucket fills a batch of 256 tokens: 3 of 64"),
    (lambda: dd.schedule(COUNTS, batch_tokens=64, curriculum="grow"), "curriculum is 'grow'"),
    (lambda: dd.schedule(COUNTS, batch_tokens=64, curriculum=(1, 2)), "4 buckets need as many positive numbers"),
    (lambda: dd.schedule(COUNTS, batch_tokens=64, curriculum=(1, 2, 0, 1)), "4 buckets need as many positive numbers"),
    (lambda: dd.schedule(COUNTS, batch_tokens=64, curriculum=(1, 2, np.inf, 1)), "as many positive numbers"),
    (lambda: dd.schedule(COUNTS, batch_tokens=64, curriculum=(1, 2, -1, 1)), "as many positive numbers"),
    (lambda: dd.schedule(COUNTS, batch_tokens=64, curriculum=2.0), r"the odds are 2\.0; 4 buckets need"),
    (lambda: dd.schedule(COUNTS | {4: -1}, batch_tokens=64), "none can have fewer than 0"),
    (lambda: dd.schedule(COUNTS, batch_tokens=64, cycles=0), "cycles is 0"),
    (lambda: dd.average_length([]), "no length to average"),
    (lambda: dd.average_context([]), "no token to average over"),
    (lambda: dd.average_context([0, 0]), "no token to average over"),
  ):
    with pytest.raises(InputError, match=message):
      call()
  buckets = dd.decompose(corpus([100]), low=3, high=4)
  with pytest.raises(InputError, match="the schedule is one of other buckets"):
    dd.batches(buckets, dd.schedule(COUNTS, batch_tokens=64))
  plan = dd.schedule(buckets.counts, batch_tokens=32)
  for shard, message in (
    ((0, 8), "8 hosts share batches of 2 rows"),
    ((0, 3), "3 hosts share batches of 2 rows"),
    ((2, 2), r"shard is \(2, 2\)"),
    ((-1, 2), r"shard is \(-1, 2\)"),
    ((0, 0), r"shard is \(0, 0\)"),
  ):
    with pytest.raises(InputError, match=message):
      dd.batches(buckets, plan, shard=shard)
