"""DaSLaM's experiment: problems that are right, texts that are read as they were written, and a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.daslam import get_config
from experiments import daslam
from experiments.daslam import chain, solving, training
from jaxlab.core.checks import InputError
from jaxlab.models import Transformer, TransformerConfig
from jaxlab.tasks import ppo
from tests.common import run_and_continue

MODULUS = 7
SIZES = chain.Sizes(MODULUS)
problems = jax.jit(chain.problems, static_argnums=(1, 2, 3, 4))


@pytest.fixture(scope="module")
def problem():
  return problems(jax.random.key(0), 64, SIZES, 1, SIZES.longest)


def worked_out(tokens):
  """{name: value} of all statements, in whatever order."""
  statements, known = np.split(tokens, np.flatnonzero(tokens == chain.STOP) + 1)[:-1], {}
  value = lambda token: token - chain.FIRST_VALUE if token >= chain.FIRST_VALUE else known.get(token)
  for _ in range(len(statements)):
    for s in statements:
      if len(s) == 4:
        known[s[0]] = value(s[2])
      elif None not in (value(s[2]), value(s[4])):
        left, right = int(value(s[2])), int(value(s[4]))
        known[s[0]] = {chain.PLUS: left + right, chain.MINUS: left - right, chain.TIMES: left * right}[s[3]] % MODULUS
  return known


def test_problems_have_the_values_their_statements_give(problem):
  for i in range(64):
    tokens = np.asarray(problem.statements.tokens[i, : problem.statements.length[i]])
    known, depth = worked_out(tokens), int(problem.depth[i])
    names, values = np.asarray(problem.names[i, :depth]), np.asarray(problem.values[i, :depth])
    assert [known[name] for name in names] == values.tolist() and len(set(known)) == len(known)
    assert depth <= (tokens == chain.STOP).sum() <= depth + SIZES.beside


def test_what_solvers_are_taught_follows_from_their_prompts_in_two_lines():
  prompts, answers = jax.jit(chain.solver_rows, static_argnums=(1, 2))(jax.random.key(1), 64, SIZES, SIZES.longest)
  names, values = chain.read_lines(answers.tokens)
  told = 0
  for i in range(64):
    prompt = np.asarray(prompts.tokens[i, : prompts.length[i]])
    assert prompt[-1] == chain.ASK and prompt[-2] == names[i, int(answers.length[i]) // 4 - 1]
    statements = prompt[:-2]
    facts = {}
    while len(statements) > 3 and statements[1] == chain.IS:
      facts[statements[0]] = statements[2] - chain.FIRST_VALUE
      statements = statements[4:]
    known = worked_out(statements)
    assert all(known[name] == value for name, value in facts.items())
    steps = [(int(n), int(v)) for n, v in zip(names[i], values[i], strict=True) if n >= 0]
    assert 1 <= len(steps) <= chain.LINES and all(known[n] == v for n, v in steps)
    told += prompt[-2] in facts
    assert len(steps) == 1 or not facts.keys() & {n for n, _ in steps}
  assert 8 <= told <= 24  # a quarter: a question asked again behind its answer
  row = chain.row(prompts, answers)
  counted = np.asarray(row["targets"])
  assert ((counted >= 0).sum(axis=1) == np.asarray(answers.length)).all()


def test_solvers_begin_with_chains_of_two_steps_and_end_with_all():
  assert [int(training.steps_by(n, 80, SIZES)) for n in (0, 40, 45, 60, 80)] == [2, 2, 4, 8, 8]
  prompts, _ = jax.jit(chain.solver_rows, static_argnums=(1, 2))(jax.random.key(1), 64, SIZES, 2)
  assert (np.asarray(prompts.tokens) == chain.EQUALS).sum(axis=1).max() <= 2 + SIZES.beside


def test_sub_questions_are_read_back_and_noise_is_noise(problem):
  names, count = chain.parse(chain.gold(problem).tokens, 3)
  short = np.asarray(problem.depth) < 3
  np.testing.assert_array_equal(count, np.where(short, 0, problem.depth))
  expected = np.where(np.arange(SIZES.longest) < np.asarray(problem.depth)[:, None], problem.names, -1)
  np.testing.assert_array_equal(np.asarray(names)[~short], expected[~short])
  noisy = chain.noisy(jax.random.key(2), problem)
  other, _ = chain.parse(noisy.tokens, 1)
  changed = (np.asarray(other) != expected).any(axis=1)
  assert 0.4 < changed.mean() < 0.9 and (np.asarray(noisy.length) <= SIZES.asked).all()


def test_any_tokens_are_read():
  text = jax.random.randint(jax.random.key(0), (10_000, SIZES.asked), 0, SIZES.vocabulary)
  names, count = chain.parse(text, 3)
  assert ((count == 0) | (count >= 3)).all() and (count <= SIZES.longest).all()
  inside = (names >= chain.FIRST_NAME) & (names < chain.FIRST_VALUE)
  np.testing.assert_array_equal(inside, jnp.arange(SIZES.longest) < count[:, None])
  lines, values = chain.read_lines(text)
  assert ((lines >= 0) == (values >= 0)).all()


def test_texts_are_joined_and_cut_at_the_room():
  a = chain.Text(jnp.array([[1, 2, 9], [3, 9, 9]]), jnp.array([2, 1]))
  b = chain.Text(jnp.array([[4, 5], [6, 7]]), jnp.array([2, 2]))
  joined = chain.join(a, b, room=3)
  assert joined.tokens.tolist() == [[1, 2, 4], [3, 6, 7]] and joined.length.tolist() == [3, 3]


def exact(prompt, key=None, temperature=0.0):
  """Lines of a solver that knows one step from what is known, and else says nothing."""
  tokens, lengths = np.asarray(prompt.tokens), np.asarray(prompt.length)
  out = np.zeros((len(tokens), 4 * chain.LINES), np.int32)
  for i, length in enumerate(lengths):
    text, facts = tokens[i, : length - 2], {}
    while len(text) > 3 and text[1] == chain.IS:
      facts[text[0]] = text[2] - chain.FIRST_VALUE
      text = text[4:]
    value = lambda token: token - chain.FIRST_VALUE if token >= chain.FIRST_VALUE else facts.get(token)  # noqa: B023
    for s in np.split(text, np.flatnonzero(text == chain.STOP) + 1)[:-1]:
      if s[0] == tokens[i, length - 2]:
        parts = [value(s[2])] if len(s) == 4 else [value(s[2]), value(s[4])]
        if None not in parts:
          left, right = int(parts[0]), int(parts[-1])
          found = {chain.PLUS: left + right, chain.MINUS: left - right, chain.TIMES: left * right}
          out[i, :4] = s[0], chain.IS, (left if len(s) == 4 else found[s[3]] % MODULUS) + chain.FIRST_VALUE, chain.STOP
  return chain.Text(jnp.asarray(out), jnp.asarray(4 * (out[:, 0] > 0), jnp.int32))


def test_with_every_step_asked_in_order_an_exact_solver_is_always_right(problem, monkeypatch):
  monkeypatch.setattr(solving, "solve", lambda solver, prompt, key=None, temperature=0.0: exact(prompt))
  monkeypatch.setattr(jax.lax, "scan", _python_scan)
  names, count = chain.parse(chain.gold(problem).tokens, 1)
  final, texts, tokens = solving.follow(None, problem, names, count)
  assert solving.right(problem, final).all() and (tokens > 0).all()
  terms = solving.rewards(problem, names, count, texts, final, final, MODULUS)
  assert all((np.asarray(terms[name]) == 1).all() for name in ("coverage", "consistency", "correct"))
  steps = np.asarray(problem.operators >= 0) & (np.arange(SIZES.longest) < np.asarray(problem.depth)[:, None])
  np.testing.assert_allclose(terms["order"], steps.any(axis=1))
  retry, *_ = solving.follow(None, problem, names, count * 0)
  assert not solving.right(problem, retry)[np.asarray(problem.depth) > 1].any()


def _python_scan(step, carry, xs):
  out = []
  for i in range(len(jax.tree.leaves(xs)[0])):
    carry, y = step(carry, jax.tree.map(lambda a: a[i], xs))  # noqa: B023
    out.append(y)
  return carry, jax.tree.map(lambda *rows: jnp.stack(rows), *out)


def test_the_code_s_rewards_are_sums_over_operators_in_the_vocabulary_s_order(problem):
  """Order 0.5 a kind of operator, whatever the order they are asked in; answers beside the words they were asked in."""
  none = solving.nothing(64, 4 * chain.LINES)
  names, count = chain.parse(chain.gold(problem).tokens, 1)
  back = jnp.where(names >= 0, jnp.take_along_axis(names, jnp.maximum(count[:, None] - 1 - jnp.arange(8), 0), 1), -1)
  texts = jnp.zeros((64, 8, 4 * chain.LINES), jnp.int32).at[:, 0, 0].set(names[:, 0])
  terms = solving.rewards(problem, back, count, texts, none, none, MODULUS, "code")
  for i in range(64):
    steps = np.asarray(problem.operators[i, 1 : int(problem.depth[i])])
    np.testing.assert_allclose(terms["order"][i], 0.5 * len(set(steps.tolist())))
    words = np.asarray(problem.statements.tokens[i, : problem.statements.length[i]]).tolist()
    words += [int(back[i, 0]), chain.ASK]
    times = np.bincount(words, minlength=SIZES.vocabulary)
    cosine = times[int(names[i, 0])] / np.linalg.norm(times)
    np.testing.assert_allclose(terms["consistency"][i], 0.25 * cosine, rtol=1e-5)
  np.testing.assert_array_equal(terms["coverage"], 1)
  np.testing.assert_allclose(terms["proximity"], -np.minimum(problem.depth, chain.LINES))
  doubled = jnp.concatenate([problem.others[:, :1], names[:, :-1]], axis=1)
  paper = solving.rewards(problem, doubled, count, texts, none, none, MODULUS)
  code = solving.rewards(problem, doubled, count, texts, none, none, MODULUS, "code")
  # The last step is missing and a name from beside the chain is there: the code counts both.
  np.testing.assert_allclose(paper["coverage"], 1 - 1 / problem.depth, rtol=1e-6)
  np.testing.assert_allclose(code["coverage"], 1 - 2 / problem.depth, rtol=1e-6)


def test_sizes_bound_problems_and_no_others_are_taken():
  small = chain.Sizes(5, names=6, longest=4, beside=2)
  p = problems(jax.random.key(3), 256, small, 1, 4)
  assert set(np.unique(p.names)) == set(range(chain.FIRST_NAME, chain.FIRST_NAME + 6)) and p.values.max() == 4
  assert p.statements.length.max() <= small.question - 2 and p.depth.max() == 4
  with pytest.raises(InputError, match="6 names for 7 statements"):
    small._replace(beside=3).check()
  config = get_config("test")
  config.depths.judged = (3, config.problems.longest + 1)
  with pytest.raises(InputError, match=r"more steps than config\.problems\.longest"):
    daslam.parts(config, None, None)


def test_everything_is_measured_once(tmp_path, monkeypatch):
  """By networks as they begin: that they can be taught is the training loop's to show."""

  def fitted(config, t, shape, make, seed, workdir, console, title):
    batch = next(training.Batches(make, seed))
    assert batch["inputs"].shape == batch["targets"].shape and (batch["targets"] >= 0).any(axis=1).all()
    sizes = shape.to_dict() | dict(vocab_size=chain.Sizes(**config.problems).vocabulary, context=256)
    return Transformer(TransformerConfig(**sizes), jax.random.key(seed))

  improve = ppo.improve

  def watched(actor, state, rollout, optimizer, **how):
    """Networks as they begin write nothing that is rewarded: as if what they wrote had been good."""
    return improve(actor, state, rollout._replace(advantages=rollout.mask * 1.0), optimizer, **how)

  def tuned(config, solver, start, *args):
    before = jax.tree.map(np.array, (solver, start))
    made = kept(config, solver, start, *args)
    jax.tree.map(np.testing.assert_array_equal, (solver, start), before)  # frozen, to the bit
    assert any((np.asarray(a) != b).any() for a, b in zip(*map(jax.tree.leaves, (made[0], start)), strict=True))
    return made

  kept = training.tuned
  monkeypatch.setattr(training, "fitted", fitted)
  monkeypatch.setattr(training, "tuned", tuned)
  monkeypatch.setattr(ppo, "improve", watched)
  report = run_and_continue("daslam", tmp_path, monkeypatch, "judged", "votes", "thinned")
  assert len(report.claims) == 12 and set(report.metrics["arms"]) == {*daslam.ARMS}
  assert set(report.metrics["rewards"]) == {*daslam.ARMS} - {"taught"}
  assert {row["samples"] for row in report.metrics["retry"].values()} == {1}
  assert set(report.metrics["rewards"]["ppo"]) >= {"coverage", "correct", "kl", "asked"}
  assert report.metrics["rewards"]["ppo"]["kl"][0] == pytest.approx(0, abs=1e-4)


def test_a_decomposer_reads_the_question_and_what_it_may(problem):
  attempt = chain.cut(chain.lines(problem.names, problem.values, problem.names > 0), 8)
  for condition in solving.CONDITIONS:
    seen = solving.seen(problem, attempt, solving.CONDITIONS.index(condition))
    marks = np.asarray(seen.tokens == chain.SEPARATOR)
    assert (marks.sum(axis=1) == 2).all()
    between = np.asarray(seen.length) - 2 - marks.argmax(axis=1)
    expected = {"attempt": attempt.length, "none": attempt.length * 0, "gold": 4 * problem.depth}[condition]
    np.testing.assert_array_equal(between, expected)
