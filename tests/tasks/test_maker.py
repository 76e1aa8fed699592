"""The laws of voting, ballots on the device, the Towers of Hanoi, and the recursive form."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.maker import multiplication
from jaxlab.core.checks import InputError
from jaxlab.tasks import hanoi, maker, maker_general

MILLION = 2**20 - 1
KEY = jax.random.key(0)


# --- Laws.


PUBLISHED = {
  0.0018: 3, 0.0022: 3, 0.0040: 4, 0.0358: 6, 0.0393: 6, 0.0569: 6, 0.1839: 12, 0.2342: 15, 0.3571: 29
}  # fmt: skip


@pytest.mark.parametrize("eps, k", PUBLISHED.items())
def test_the_margin_of_a_million_steps_is_the_published_one(eps, k):
  assert maker.k_min(eps, target=0.95, steps=MILLION) == k
  assert maker.success(eps, k, MILLION) >= 0.95 > maker.success(eps, k - 1, MILLION)


def test_success_falls_off_a_cliff_below_the_margin_and_is_certain_without_errors():
  np.testing.assert_allclose([maker.success(0.0022, k, MILLION) for k in (3, 2)], [0.989, 0.006], atol=5e-4)
  assert maker.success(0.0, 1, MILLION) == 1 and maker.k_min(0.0, target=0.95, steps=MILLION) == 1
  assert maker.success(1.0, 3, 5) == 0 and maker.step_success(0.5, 7) == 0.5
  np.testing.assert_allclose(maker.step_success(0.3, 3), 0.7**3 / (0.7**3 + 0.3**3), rtol=1e-12)


def test_steps_that_differ_multiply_and_one_bad_step_is_fatal():
  np.testing.assert_allclose(maker.success_of([0.1] * 20, 3), maker.success(0.1, 3, 20), rtol=1e-9)
  assert maker.success_of([0.01] * 999 + [0.6], 50) < 0.01


def test_agents_of_several_steps_cost_exponentially_more():
  cost = functools.partial(maker.expected_cost, 0.1, target=0.95, steps=2**16)
  one = cost()
  k = maker.k_min(0.1, target=0.95, steps=2**16)
  np.testing.assert_allclose(one, 2**16 * k / 0.8, rtol=1e-12)
  np.testing.assert_allclose(cost(valid=0.5, cost=3.0), 6 * one, rtol=1e-12)
  for m in (2, 4, 8):
    margin = maker.k_min(0.1, target=0.95, steps=2**16, m=m)
    np.testing.assert_allclose(cost(m=m), one * margin / k * 0.9 ** (1 - m))


@pytest.mark.parametrize("eps, k", [(0.3, 3), (0.1, 2), (0.45, 4), (0.5, 2)])
def test_expected_votes_are_those_of_the_exact_chain(eps, k):
  np.testing.assert_allclose(maker.undecided(eps, k, 3000).sum(), maker.expected_votes(eps, k), rtol=1e-9)


def test_what_is_undecided_falls_at_the_rate_of_the_largest_eigenvalue():
  curve = maker.undecided(0.3, 4, 200)
  rate = 2 * math.sqrt(0.3 * 0.7) * math.cos(math.pi / 8)
  np.testing.assert_allclose(curve[200] / curve[198], rate**2, rtol=1e-6)  # leads alternate between odd and even
  np.testing.assert_allclose(curve[:4], 1, rtol=1e-12)
  assert curve[4] < 0.8


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: maker.k_min(0.5, target=0.9, steps=9), "eps is 0.5; voting needs"),
    (lambda: maker.k_min(0.1, target=1.0, steps=9), "target is 1.0"),
    (lambda: maker.success(0.1, 0, 9), "k is 0"),
    (lambda: maker.success(1.1, 1, 9), "eps is 1.1"),
    (lambda: maker.undecided(-0.1, 1, 9), "eps is -0.1"),
    (lambda: maker.expected_cost(0.1, target=0.9, steps=9, valid=0.0), "valid is 0"),
    (lambda: maker.empty_ballot(3, slots=1), "slots is 1"),
    (lambda: decide(0.1, 9, margin=0), "margin is 0"),
    (lambda: decide(0.1, 9, rule="best"), "rule is 'best'"),
    (lambda: decide(0.1, 9, capacity=8), "capacity is 8; it must be at least 9"),
  ],
)
def test_impossible_settings_are_named(call, message):
  with pytest.raises(InputError, match=message):
    call()


# --- Voting on the device, with samplers of a known error rate: (item, 0) is right, (item, i) the i-th wrong answer.


def noisy(context, item, tries, key):
  eps, wrong, flags = context
  keys = jax.random.split(key, 3)
  bad = jax.random.uniform(keys[0], item.shape) < eps
  which = 1 + jax.random.randint(keys[1], item.shape, 0, wrong)
  said = jnp.stack([item, jnp.where(bad, which, 0)], axis=-1).astype(jnp.uint32)
  flagged = jax.random.uniform(keys[2], item.shape) < flags
  return jnp.where(flagged[:, None], jnp.uint32(77), said), flagged  # a flagged vote would be seen


def decide(eps, items, *, wrong=1, flags=0.0, margin=3, width=1024, capacity=20_000, **options):
  """All of one shape, so that one program serves them."""
  context = (jnp.float32(eps), jnp.int32(wrong), jnp.float32(flags))
  options = dict(margin=margin, key=KEY, width=width, capacity=capacity) | options
  return maker.decide(noisy, context, items, **options)


@pytest.fixture(scope="module")
def race():
  return decide(0.3, 200_000, flags=0.1, width=8192, capacity=200_000)


def test_the_race_of_two_answers_follows_the_law(race):
  right = (race.said[:, 1] == 0).mean()
  expected = maker.step_success(0.3, 3)
  assert abs(right - expected) < 4 * math.sqrt(expected * (1 - expected) / 200_000)
  spread = race.votes.std() / math.sqrt(200_000)
  assert abs(race.votes.mean() - maker.expected_votes(0.3, 3)) < 4 * spread
  for votes, left in enumerate(maker.undecided(0.3, 3, 25)):
    assert abs((race.votes > votes).mean() - left) <= 4 * math.sqrt(left * (1 - left) / 200_000)


def test_every_item_is_decided_once_with_its_own_answer_and_flags_never_enter(race):
  np.testing.assert_array_equal(race.said[:, 0], np.arange(200_000))  # 77 would be a flagged vote
  share = race.flagged.sum() / (race.flagged.sum() + race.votes.sum())
  assert abs(share - 0.1) < 4 * math.sqrt(0.09 / race.votes.sum())
  assert race.capped == race.lost == 0
  # What is computed beyond the samples that were drawn is the last stretch's idle rows.
  assert race.samples < 1.1 * (race.votes.sum() + race.flagged.sum())


def test_a_source_that_knows_takes_exactly_k_votes():
  for margin in (1, 4):
    found = decide(0.0, 3000, margin=margin)
    assert (found.votes == margin).all() and (found.said[:, 1] == 0).all()


def test_more_than_one_wrong_answer_only_helps():
  right = [(decide(0.3, 8000, wrong=wrong).said[:, 1] == 0).mean() for wrong in (1, 2, 3)]
  np.testing.assert_allclose(right, [0.927, 0.985, 0.994], atol=0.012)


def test_the_other_rules_count_as_they_say():
  first = decide(0.3, 2000, margin=4, rule="first")
  assert first.votes.min() == 4 and first.votes.max() <= 7
  majority = decide(0.3, 10_000, margin=5, rule="majority")
  assert (majority.votes == 5).all()
  best = sum(math.comb(5, i) * 0.7**i * 0.3 ** (5 - i) for i in (3, 4, 5))
  assert abs((majority.said[:, 1] == 0).mean() - best) < 0.02


def test_a_race_without_an_end_stops_at_the_most_samples_and_is_counted():
  found = decide(0.1, 100, flags=1.0, most=20)
  assert found.capped == 100 and (found.flagged == 20).all() and (found.votes == 0).all()


def counting(flags, item, tries, key):
  """Says which sample of its item it is; the first ones are flagged."""
  return jnp.stack([item, tries], axis=-1).astype(jnp.uint32), tries < flags


def test_every_item_begins_with_a_first_sample_which_alone_may_be_of_temperature_0():
  for flags in (0, 2):
    found = maker.decide(counting, jnp.int32(flags), 90, margin=1, key=KEY, width=16)
    assert (found.said[:, 1] == flags).all() and (found.flagged == flags).all() and (found.votes == 1).all()


def test_results_do_not_depend_on_what_is_kept_for_more_items_or_told_between():
  told = []
  a = decide(0.2, 3000, capacity=3000)
  b = decide(0.2, 3000, stretch=3, progress=told.append)
  np.testing.assert_array_equal(a.votes, b.votes)
  assert told == sorted(told) and told[-1] == 3000 and len(told) >= 4


def reference(answers, k):
  """(the winner, its lead, votes) by the algorithm as it is written down."""
  counts = {}
  for number, answer in enumerate(answers, 1):
    counts[answer] = counts.get(answer, 0) + 1
    if counts[answer] >= k + max((c for a, c in counts.items() if a != answer), default=0):
      return answer, number
  return None, len(answers)


def test_the_ballot_is_the_written_algorithm_and_never_decides_with_a_smaller_lead():
  rng = np.random.default_rng(0)
  answers = rng.integers(0, 5, (64, 60))
  valid = rng.random((64, 60)) < 0.8
  update = jax.jit(maker.add_vote)
  for k in (1, 2, 4):
    ballot, done = maker.empty_ballot(64), {}
    for t in range(60):
      said = jnp.stack([jnp.asarray(answers[:, t])] * 2, axis=-1).astype(jnp.uint32)
      ballot, count, lead = update(ballot, said, jnp.asarray(valid[:, t]))
      for row in range(64):
        if row not in done and lead[row] >= k:
          others = [int((answers[row, : t + 1][valid[row, : t + 1]] == a).sum()) for a in range(5)]
          mine = others.pop(answers[row, t])
          assert valid[row, t] and mine == count[row] and mine - max(others) == lead[row] >= k
          done[row] = (answers[row, t], mine + sum(others))
    for row in range(64):
      expected = reference(answers[row][valid[row]].tolist(), k)
      assert done.get(row, (None, valid[row].sum())) == expected
  assert not ballot.lost.any()


def test_an_answer_without_a_slot_takes_that_of_the_fewest_votes_and_is_counted():
  ballot = maker.empty_ballot(1, slots=2)
  for answer in (1, 1, 2, 3, 3):
    ballot, _, lead = maker.add_vote(ballot, jnp.full((1, 2), answer, jnp.uint32), jnp.array([True]))
  assert int(ballot.lost[0]) == 1 and int(lead[0]) == 0 and set(ballot.said[0, :, 0].tolist()) == {1, 3}
  ballot, *_ = maker.add_vote(ballot, jnp.full((1, 2), 4, jnp.uint32), jnp.array([True]))
  assert int(ballot.lost[0]) == 3 and int(ballot.count.sum() + ballot.lost[0]) == 6  # no vote is forgotten


# --- The Towers of Hanoi.


@pytest.mark.parametrize("disks", [2, 9, 10])
def test_the_closed_form_is_the_run_of_the_rule_and_ends_where_parity_says(disks):
  closed = hanoi.state_before(jnp.arange(2**disks), disks)

  def step(state, _):
    move, after = hanoi.take_step(state)
    return after, (move, after)

  start = jax.tree.map(lambda a: a[0], closed)
  _, (moves, states) = jax.jit(lambda: jax.lax.scan(step, start, length=2**disks - 1))()
  for walked, formula in zip(states, closed, strict=True):
    np.testing.assert_array_equal(walked, formula[1:])
  assert (closed.pegs[0] == 0).all() and closed.last[0] == 0 and hanoi.legal(closed.pegs[:-1], moves).all()
  assert (closed.pegs[-1] == (2 if disks % 2 == 0 else 1)).all()


def test_the_closed_form_is_the_rule_for_every_number_of_disks_up_to_ten():
  """All steps of 1 to 10 disks at once: each state follows from the one before, from all on peg 0 to the parity's."""
  present = np.repeat(np.arange(1, 11), 2 ** np.arange(1, 11))
  step = np.concatenate([np.arange(2**n) for n in range(1, 11)])
  ends, disk = step + 1 == 2**present, np.arange(1, 11)
  state = jax.tree.map(np.asarray, hanoi.state_before(jnp.asarray(step), 10, jnp.asarray(present)))
  move, after = jax.tree.map(np.asarray, jax.jit(lambda *state: hanoi.take_step(hanoi.State(*state)))(*state))
  for walked, formula in zip(after, state, strict=True):
    np.testing.assert_array_equal(walked[:-1][~ends[:-1]], formula[1:][~ends[:-1]])
  assert hanoi.legal(state.pegs, move)[~ends].all()
  there = disk <= present[:, None]
  np.testing.assert_array_equal(state.pegs[step == 0], np.where(there[step == 0], 0, 3))
  goal = np.where(present % 2 == 0, 2, 1)[:, None]
  np.testing.assert_array_equal(state.pegs[ends], np.where(there, goal, 3)[ends])


def test_a_million_steps_stay_within_int32():
  step = jnp.array([0, 1, 2**19, 2**20 - 2, 2**20 - 1])
  pegs = np.asarray(hanoi.state_before(step, 20).pegs)
  for row, i in zip(pegs, step.tolist(), strict=True):
    assert row.tolist() == [(1 if d % 2 else -1) * ((i + 2 ** (d - 1)) >> d) % 3 for d in range(1, 21)]
  assert (pegs[-1] == 2).all() and hanoi.state_before(step[3:4], 20).last.tolist() == [2]
  with pytest.raises(InputError, match="disks is 31"):
    hanoi.state_before(step, 31)


def test_what_is_no_state_is_said():
  start = hanoi.state_before(jnp.array([0]), 3)
  names = hanoi.draw_names(jax.random.key(0), 1, 3, names=3, renamed="nothing")
  lacking = hanoi.state_before(jnp.array([0]), 3, present=jnp.array([2]))
  for call, message in (
    (lambda: hanoi.state_before(100, 3), r"steps are 0\.\.100; 3 disks have 0\.\.7"),
    (lambda: hanoi.state_before(np.array([-5, 2]), 3), r"steps are -5\.\.2"),
    (lambda: hanoi.take_step(start._replace(pegs=jnp.array([[5, 9, -1]]))), r"pegs are -1\.\.9"),
    (lambda: hanoi.take_step(start._replace(pegs=jnp.array([[3, 0, 0]]))), "a disk is missing"),
    (lambda: hanoi.take_step(start._replace(place=jnp.array([[0, 0, 0]]))), "places do not follow"),
    (lambda: hanoi.take_step(start._replace(last=jnp.array([4]))), r"disks 4\.\.4, not 0\.\.n"),
    (lambda: hanoi.encode(lacking, names), "a state lacks a disk"),
  ):
    with pytest.raises(InputError, match=message):
      call()
  hanoi.take_step(lacking)


def test_legal_refuses_covered_disks_smaller_ones_and_the_same_peg():
  pegs = jnp.array([[0, 0, 1]] * 6)  # 1 on 2 on peg 0, 3 on peg 1
  move = jnp.array([[1, 0, 1], [1, 0, 2], [2, 0, 2], [3, 1, 0], [1, 0, 0], [3, 1, 2]])
  assert hanoi.legal(pegs, move).tolist() == [True, True, False, False, False, True]


@pytest.fixture(scope="module")
def written():
  """(state, names, the right move, the state after, whole rows, where answers begin) of the 6-disk run."""
  state = hanoi.state_before(jnp.arange(63), 6)
  names = hanoi.draw_names(KEY, 63, 6, names=9, renamed="pegs and disks")
  move, after = hanoi.take_step(state)
  rows, start = hanoi.encode_answered(state, names, move, after)
  return state, names, move, after, rows, start


def test_a_step_is_read_as_it_was_written_whatever_things_are_called(written):
  state, names, move, after, rows, start = written
  np.testing.assert_array_equal(rows[:, : start[0]], hanoi.encode(state, names))
  answer = hanoi.decode(rows[:, start[0] :], names)
  assert not answer.flagged.any() and (answer.length == 14).all()
  for read, expected in ((answer.move, move), (answer.pegs, after.pegs), (answer.place, after.place)):
    np.testing.assert_array_equal(read, expected)
  right = hanoi.right_answer(state)
  np.testing.assert_array_equal(hanoi.fingerprint(answer), hanoi.fingerprint(right))
  assert len(np.unique(hanoi.fingerprint(right), axis=0)) == 63
  assert (
    len(np.unique(names.turn)) == 3 and (jnp.diff(names.disks, axis=1) > 0).all() and (names.disks[:, 0] == 1).all()
  )


def test_names_are_an_exact_symmetry_of_the_rule(written):
  """The rule for a tower whose pegs are turned makes the same move between the turned pegs."""
  state, names, move, *_ = written
  turned = state._replace(pegs=(state.pegs + names.turn[:, None]) % 3)
  other, _ = hanoi.take_step(turned)
  np.testing.assert_array_equal(other[:, 0], move[:, 0])
  np.testing.assert_array_equal(other[:, 1:], (move[:, 1:] + names.turn[:, None]) % 3)


@pytest.mark.parametrize("spoil", ["disk twice", "no bar", "no stop", "late stop", "no move", "peg for a disk", "no N"])
def test_what_is_not_in_the_format_is_flagged(written, spoil):
  _, names, _, _, rows, start = written
  tokens = np.asarray(rows[:, int(start[0]) :]).copy()
  disks = tokens >= hanoi.DISK
  if spoil == "disk twice":
    for row, is_disk in zip(tokens, disks, strict=True):
      a, b = np.flatnonzero(is_disk[5:])[:2] + 5
      row[a] = row[b]
  else:
    before, after = {
      "no bar": (hanoi.BAR, hanoi.ASK), "no stop": (hanoi.STOP, hanoi.PAD), "late stop": (hanoi.STOP, hanoi.BAR),
      "no move": (hanoi.MOVE, hanoi.PAD), "no N": (hanoi.NEXT, hanoi.BAR), "peg for a disk": (None, None),
    }[spoil]  # fmt: skip
    if before is None:
      tokens[:, 1] = hanoi.PEG
    else:
      tokens[tokens == before] = after
  assert hanoi.decode(jnp.asarray(tokens), names).flagged.all()


def test_order_and_legality_are_not_looked_at_but_make_another_answer(written):
  state, names, _, after, rows, start = written
  many = int(jnp.argmax((after.pegs == 0).sum(axis=1) >= 2))
  tokens = np.asarray(rows[:, int(start[0]) :])[many].copy()
  at = np.flatnonzero(tokens[5:-1] >= hanoi.DISK) + 5
  same = next((a, b) for a, b in itertools.pairwise(at) if b == a + 1)
  tokens[list(same)] = tokens[list(same[::-1])]
  one = lambda tree: jax.tree.map(lambda a: a[many : many + 1], tree)
  answer = hanoi.decode(jnp.asarray(tokens)[None], one(names))
  assert not answer.flagged.any()
  assert (hanoi.fingerprint(answer) != hanoi.fingerprint(one(hanoi.right_answer(state)))).all()


def test_the_length_is_a_flag_and_a_forgiving_reader_has_none(written):
  state, names, _, _, rows, start = written
  tokens = rows[:, int(start[0]) :]
  assert (
    hanoi.decode(tokens, names, longest=13).flagged.all() and not hanoi.decode(tokens, names, longest=14).flagged.any()
  )
  spoilt = jnp.where(tokens == hanoi.STOP, hanoi.PAD, tokens)
  forgiven = hanoi.repaired(spoilt, names, state)
  assert not forgiven.flagged.any() and (forgiven.pegs < 3).all()


def noisy_step(eps, state, tries, key):
  """The rule, or disk 1 the wrong way with probability eps."""
  move, _ = hanoi.take_step(state)
  bad = jax.random.uniform(key, (len(move),)) < eps
  wrong = jnp.stack([jnp.ones_like(state.last), state.pegs[:, 0], (state.pegs[:, 0] + 2) % 3], axis=1)
  move = jnp.where(bad[:, None], wrong, move)
  after = hanoi.moved(state, move)
  flagged = jnp.zeros(len(move), bool)
  answer = hanoi.Answer(move, after.pegs, after.place, flagged, flagged)
  return hanoi.fingerprint(answer), flagged, after


def test_a_hundred_sequential_runs_of_eight_disks_end_on_the_last_peg():
  start = hanoi.state_before(jnp.zeros(100, jnp.int32), 8)
  k = maker.k_min(0.1, target=0.99, steps=255)
  run = jax.jit(functools.partial(maker.follow, noisy_step, steps=255, margin=k))
  found = run(jnp.float32(0.1), start, key=KEY)
  assert (found.state.pegs == 2).all(axis=1).sum() >= 97
  np.testing.assert_allclose(found.votes.mean(), maker.expected_votes(0.1, k), rtol=0.02)


def test_steps_side_by_side_are_the_sequential_run():
  """The chain of what is decided of all steps at once has no error exactly where the sequential run has none."""
  start = hanoi.state_before(jnp.zeros(40, jnp.int32), 5)
  found = jax.jit(functools.partial(maker.follow, noisy_step, steps=31, margin=2))(jnp.float32(0.15), start, key=KEY)
  right = hanoi.fingerprint(hanoi.right_answer(hanoi.state_before(jnp.arange(31), 5)))
  chained = (found.said == right[:, None]).all(axis=(0, 2))
  np.testing.assert_array_equal(chained, (found.state.pegs == 2 - 5 % 2).all(axis=1))
  assert 0 < chained.sum() < 40


# --- Texts: votes on prompts, and the recursive form on long multiplication.


def test_prompts_are_asked_until_one_answer_is_ahead_and_flags_are_no_votes():
  script = {"a": ["1", "2", "?", "1", "1"], "b": ["5", "5"], "c": ["?"] * 9}
  asked = []

  def generate(prompts):
    asked.append(list(prompts))
    return [[(script[p].pop(0), 0.0)] for p in prompts]

  read = lambda text: text if text.isdigit() else None
  a, b, c = maker_general.ballots(generate, read, margin=2, most=6)(["a", "b", "c"])
  assert (a.answer, dict(a.counts), a.flagged) == ("1", {"1": 3, "2": 1}, 1)
  assert b.answer == "5" and c.answer is None and c.flagged == 6
  assert asked[:3] == [["a", "b", "c"], ["a", "b", "c"], ["a", "c"]]
  script["a"] = ["1", "2", "1"]
  (a,) = maker_general.ballots(generate, read, margin=2, ahead=False)(["a"])
  assert a.answer == "1" and a.counts.total() == 3
  with pytest.raises(InputError, match="answered 0 of 1 prompts"):
    maker_general.ballots(lambda prompts: [], read, margin=1)(["a"])
  with pytest.raises(InputError, match="margin is 0"):
    maker_general.ballots(generate, read, margin=0)


def test_long_multiplication_is_solved_in_parts_and_votes_make_it_right():
  rng = np.random.default_rng(1)
  problems = [f"{a} * {b}" for a, b in rng.integers(10**5, 10**6, (40, 2))]
  products = [str(multiplication.product(problem)) for problem in problems]
  exact = maker_general.solve(problems, multiplication.agents(0.0, np.random.default_rng(0)))
  assert [s.answer for s in exact] == products
  trace = exact[0].trace
  assert trace["parts"][0]["parts"] and trace["problem"] == problems[0] and trace["answer"] == products[0]
  assert exact[0].samples == 2 * (11 + 6 + 5)  # of 6 digits: every problem split or not, leaves answered, joins; 2 each
  json.dumps(trace)
  agents = multiplication.agents(0.1, np.random.default_rng(2))
  once, voted = (maker_general.solve(problems, agents, votes=votes) for votes in (1, 3))
  right = lambda found: np.mean([s.answer == product for s, product in zip(found, products, strict=True)])
  assert right(once) < 0.7 and right(voted) > 0.9


def test_agents_that_say_nothing_usable_are_named():
  agents = multiplication.agents(0.0, np.random.default_rng(0))
  mute = maker_general.Agents(agents.split, lambda problems: [None] * len(problems), agents.join)
  with pytest.raises(InputError, match=r"answer proposed nothing usable for '.*' in 3 attempts"):
    maker_general.solve(["12 * 3"], mute)
  with pytest.raises(InputError, match="depth is 0"):
    maker_general.solve(["1 * 1"], agents, depth=0)
