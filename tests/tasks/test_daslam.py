"""DaSLaM: sub-questions read from any text, the four phases, and rewards on cases worked out by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.tasks import daslam

QUESTION = "d = c * 2. b = 3. c = b + 4. e = 9. What is d?"
STATEMENT, FACT = re.compile(r"(\w) = (\w) ([+*]) (\w)\."), re.compile(r"(\w) = (\d+)\.")


def symbolic(prompts):
  """A solver that computes one step, from facts and from what it has been told: all else it gets wrong."""
  out = []
  for prompt in prompts:
    known = {name: int(value) for name, value in FACT.findall(prompt)} | {
      name: int(value) for name, value in re.findall(r"\[\[Answer: (\w) is (\d+)\]\]", prompt)
    }
    wanted = re.findall(r"What is (\w)\?", prompt)[-1]
    value = known.get(wanted)
    for name, left, sign, right in STATEMENT.findall(prompt):
      number = lambda part: int(part) if part.isdigit() else known.get(part)  # noqa: B023
      if name == wanted and None not in (number(left), number(right)):
        value = number(left) + number(right) if sign == "+" else number(left) * number(right)
    out.append(f"We look at {wanted}. [[Answer: {wanted} is {value}]]")
  return out


def oracle(pairs):
  """Asks for what the question rests on, what is needed first first."""
  return ["What is b? What is c? What is d?" for _ in pairs]


def test_with_the_right_questions_an_exact_solver_is_right():
  questions = [QUESTION, QUESTION.replace("b = 3", "b = 5")]
  episodes = daslam.coordinate(questions, symbolic, oracle)
  assert [e.first for e in episodes] == ["d is None"] * 2
  assert [e.answer for e in episodes] == ["d is 14", "d is 18"]
  assert episodes[0].subquestions == ("What is b?", "What is c?", "What is d?")
  assert [daslam.answer_of(text) for text in episodes[0].reasonings] == ["b is 3", "c is 7", "d is 14"]


def test_without_their_history_sub_questions_are_asked_alone_and_told_at_the_end():
  seen = []

  def solver(prompts):
    seen.append(list(prompts))
    return symbolic(prompts)

  (episode,) = daslam.coordinate([QUESTION], solver, oracle, append_history=False, prompt="Solve.\n")
  premises = "d = c * 2. b = 3. c = b + 4. e = 9."
  assert seen[0] == [f"Solve.\n{QUESTION}\n"] and seen[2] == [f"Solve.\n{premises} What is c?\n"]
  assert seen[4][0].startswith("Solve.\nWhat is b?\nWe look at b.") and seen[4][0].endswith(f"{QUESTION}\n")
  assert daslam.answer_of(episode.reasonings[2]) == "d is None" and episode.answer == "d is 14"


def test_the_decomposer_reads_the_attempt_and_rows_of_other_numbers_of_questions_stay_apart():
  read = []

  def ask(pairs):
    read.extend(pairs)
    return ["What is b? What is c? What is d?", "What is b? What is d?"]

  both = daslam.coordinate([QUESTION, QUESTION], symbolic, ask)
  assert [question for question, _ in read] == [QUESTION] * 2 and "[[Answer: d is None]]" in read[0][1]
  assert both[0].answer == "d is 14" and both[1].subquestions == () and both[1].answer == "d is None"
  two = daslam.coordinate([QUESTION], symbolic, lambda pairs: ["What is b? What is d?"], least=2)[0]
  assert two.subquestions == ("What is b?", "What is d?")


@pytest.mark.parametrize(
  ("text", "premises"),
  [
    ("Tom has 3. Ann has 4. How many have they?", "Tom has 3. Ann has 4."),
    ("How many?", ""),
    ("Tom has 3. How many? Say so. Why?", "Tom has 3. How many? Say so."),
    ("Tom has 3. Nothing is asked", "Tom has 3."),
  ],
)
def test_premises_are_all_but_the_last_question(text, premises):
  assert daslam.context(text) == premises


def test_the_answer_is_the_last_one_marked():
  assert daslam.answer_of("[[Answer: 3]] no, [[Answer: 4 ### because]] that.") == "4"
  assert daslam.answer_of("[[Answer: 3") is None and daslam.answer_of("3") is None


def test_any_text_is_read():
  rng = np.random.default_rng(0)
  for _ in range(10_000):
    text = "".join(rng.choice(list("ab ?.\n[]"), rng.integers(0, 30)))
    found = daslam.parse_subquestions(text)
    assert found == () or 3 <= len(found) <= 8
    assert all(part.endswith("?") and len(part) > 1 and part.count("?") == 1 for part in found)
  assert daslam.parse_subquestions("a? b?") == () and daslam.parse_subquestions("a? b?", least=1) == ("a?", "b?")
  assert daslam.parse_subquestions("a?" * 20, most=5) == ("a?",) * 5


def multi_hot(*rows):
  return jnp.array([[i in row for i in range(8)] for row in rows])


def test_coverage_by_hand():
  given_nouns = multi_hot({0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1}, set())
  asked = multi_hot({0, 1, 2, 3}, {0, 1, 2, 5}, {4, 5, 6, 7}, {1})
  assert daslam.entity_coverage(asked, given_nouns).tolist() == [1, 0.5, -2, 1]
  assert daslam.entity_coverage(asked, given_nouns, form="paper").tolist() == [1, 0.75, 0, 1]
  assert daslam.entity_coverage(asked, given_nouns, normalised=True).tolist() == [1, 0.5, -1, 1]


def test_the_order_of_operations_is_the_texts():
  plus, times = 0, 1
  gold = jnp.array([[plus, times, -1], [plus, times, -1], [plus, times, -1], [plus, times, plus]])
  ours = jnp.array([[plus, times, -1], [times, plus, -1], [plus, -1, -1], [plus, times, plus]])
  assert daslam.order_of_operations(gold, ours).tolist() == [1, -1, 0.5, 1.5]
  assert daslam.order_of_operations(gold, ours, normalised=True).tolist() == [1, -1, 0.5, 1]


def test_proximity_and_consistency_by_hand():
  e = jnp.eye(2)
  gold = jnp.stack([e, e])  # two lines of each of two episodes
  before = jnp.stack([jnp.stack([e[1], e[0] + e[1]]), e])
  after = jnp.stack([e, jnp.stack([e[0], e[0]])])
  valid = jnp.array([[True, True], [True, True]])
  half = 0.5**0.5
  np.testing.assert_allclose(daslam.proximity(gold, before, after, valid), [0.5 * (0 + half), -1.5 - 1.5], rtol=1e-5)
  np.testing.assert_allclose(daslam.proximity(gold, before, after, valid, form="paper"), [2.0, 0 - 2.0], rtol=1e-5)
  one = jnp.array([[True, False], [True, False]])
  np.testing.assert_allclose(daslam.proximity(gold, before, after, one, form="paper"), [1.0, 0.0], rtol=1e-5)
  np.testing.assert_allclose(daslam.answer_consistency(gold, before, valid), [0.25 * half, 0.5], rtol=1e-5)
  np.testing.assert_allclose(daslam.answer_consistency(gold, before, valid, normalised=True), [half / 2, 1], rtol=1e-5)
  assert daslam.answer_consistency(gold, before, valid & False).tolist() == [0, 0]
  asked, stated = jnp.array([[3, 4], [3, 4]]), jnp.array([[3, 5], [3, 4]])
  assert daslam.named_answers(asked, stated, valid).tolist() == [1, 2]
  assert daslam.named_answers(asked, stated, valid, normalised=True).tolist() == [0.5, 1]
  assert daslam.correctness(jnp.array([3, 4]), jnp.array([3, 5])).tolist() == [1, 0]


@given(st.integers(0, 2**31))
def test_normalised_rewards_are_at_most_one(seed):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
  valid, operators = jnp.asarray(rng.random((3, 4)) < 0.6), lambda: jnp.asarray(rng.integers(-1, 3, (3, 4)))
  nouns = lambda: jnp.asarray(rng.random((3, 6)) < 0.4)
  rows = [
    *(daslam.entity_coverage(nouns(), nouns(), form=form, normalised=True) for form in daslam.FORMS),
    *(
      daslam.proximity(draw(3, 4, 2), draw(3, 4, 2), draw(3, 4, 2), valid, form=form, normalised=True)
      for form in daslam.FORMS
    ),
    daslam.answer_consistency(draw(3, 4, 2), draw(3, 4, 2), valid, normalised=True),
    daslam.named_answers(operators(), operators(), valid, normalised=True),
    daslam.order_of_operations(operators(), operators(), normalised=True),
  ]
  assert all(bool((jnp.abs(row) <= 1 + 1e-6).all()) and row.shape == (3,) for row in rows)
  assert jax.tree.all(jax.tree.map(lambda row: bool(jnp.isfinite(row).all()), rows))


def test_what_is_wrong_is_said_in_one_line():
  wrong = (
    (lambda: daslam.coordinate([], symbolic, oracle), "every question"),
    (lambda: daslam.coordinate([" "], symbolic, oracle), "every question"),
    (lambda: daslam.coordinate([QUESTION], lambda prompts: [], oracle), "solver gave 0 texts for 1"),
    (lambda: daslam.coordinate([QUESTION], lambda prompts: [None], oracle), "solver gave 0 texts for 1"),
    (lambda: daslam.coordinate([QUESTION], symbolic, lambda pairs: ["a", "b"]), "decomposer gave 2 texts for 1"),
    (lambda: daslam.parse_subquestions("a?", least=0), "least"),
    (lambda: daslam.proximity(*(jnp.zeros((1, 1, 1)),) * 3, jnp.ones((1, 1), bool), form="x"), "form"),
  )
  for call, message in wrong:
    with pytest.raises(InputError, match=message):
      call()
