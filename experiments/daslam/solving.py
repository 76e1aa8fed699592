"""Episodes as arrays: a solver, what it is asked, and what that is worth."""

import functools

import jax
import jax.numpy as jnp

from experiments.daslam import chain
from experiments.daslam.chain import Problem, Text
from jaxlab.models.generate import generate
from jaxlab.tasks import daslam

CONDITIONS = ("attempt", "gold", "none")


def solve(solver, prompt: Text, key=None, temperature: float = 0.0) -> Text:
  """The solver's lines, without its END."""
  new = generate(
    solver, prompt.tokens, jnp.maximum(prompt.length, 1), tokens=chain.REASONING, key=key, temperature=temperature
  )
  names, _ = chain.read_lines(new)
  return Text(new[:, : 4 * chain.LINES], 4 * (names >= 0).sum(axis=1).astype(jnp.int32))


def asked(p: Problem, history: Text, name) -> Text:
  return chain.join(history, p.statements, chain.query(name), room=chain.HISTORY + chain.QUESTION)


def nothing(batch: int) -> Text:
  return Text(jnp.zeros((batch, chain.HISTORY), jnp.int32), jnp.zeros(batch, jnp.int32))


def wanted(p: Problem):
  """(name, value) of what is asked in the end."""
  last = p.depth - 1
  return chain.at(p.names, last), chain.at(p.values, last)


def seen(p: Problem, attempt: Text, condition: str) -> Text:
  """What the decomposer reads: the question, and the solver's attempt, the gold lines, or nothing."""
  name, _ = wanted(p)
  mask = jnp.arange(chain.LONGEST) < p.depth[:, None]
  text = {
    "attempt": lambda: attempt,
    "gold": lambda: chain.lines(p.names, p.values, mask),
    "none": lambda: Text(attempt.tokens * 0, attempt.length * 0),
  }[condition]()
  width = 4 * (chain.LONGEST if condition == "gold" else chain.LINES)
  question = chain.marked(chain.join(p.statements, chain.query(name), room=chain.QUESTION), chain.SEPARATOR)
  return chain.marked(chain.join(question, text, room=chain.QUESTION + 1 + width), chain.SEPARATOR)


def follow(solver, p: Problem, names, count, *, append_history: bool = True):
  """(final lines, {turns' names and values stated}, tokens the solver wrote): phases 3 and 4."""
  batch = len(count)

  def turn(history, own):
    name, here = own
    prompt = asked(p, history if append_history else nothing(batch), jnp.maximum(name, 0))
    text = solve(solver, prompt)
    text = Text(text.tokens, jnp.where(here, text.length, 0))
    more = chain.join(history, text, room=chain.HISTORY)
    return more, (*chain.stated(jnp.where(text.length[:, None] > 0, text.tokens, 0)), text.length)

  steps = jnp.arange(chain.SUBQUESTIONS)[:, None] < count
  history, (stated, values, lengths) = jax.lax.scan(turn, nothing(batch), (names.T, steps))
  final = solve(solver, asked(p, history, wanted(p)[0]))
  return final, (stated.T, values.T), lengths.sum(axis=0) + final.length


def right(p: Problem, text: Text):
  name, value = chain.stated(jnp.where(text.length[:, None] > 0, text.tokens, 0))
  gold_name, gold_value = wanted(p)
  return (name == gold_name) & (value == gold_value)


def rewards(p: Problem, names, count, stated, attempt: Text, final: Text, modulus: int) -> dict:
  """The five of `daslam`, normalised, in the paper's forms; an operator is that of the step asked for."""
  steps = jnp.arange(chain.LONGEST) < p.depth[:, None]
  hot = lambda names, mask: (jax.nn.one_hot(names - chain.FIRST_NAME, chain.NAMES) * mask[..., None]).any(axis=1)
  valid = jnp.arange(chain.SUBQUESTIONS) < count[:, None]
  given = hot(p.names, steps)
  operators = jnp.where(steps & (p.operators >= 0), p.operators, -1)
  order = jnp.argsort(operators < 0, axis=1, stable=True)
  gold = jnp.take_along_axis(operators, order, axis=1)
  is_step = names[:, :, None] == jnp.where(steps, p.names, -2)[:, None, :]
  ours = jnp.where(is_step, operators[:, None, :], -1).max(axis=2)
  ours = jnp.take_along_axis(ours, jnp.argsort(ours < 0, axis=1, stable=True), axis=1)
  line = lambda names, values: jnp.concatenate(
    [jax.nn.one_hot(names - chain.FIRST_NAME, chain.NAMES), jax.nn.one_hot(values, modulus)], axis=-1
  )
  lines_of = lambda text: line(*chain.read_lines(jnp.where(text.length[:, None] > 0, text.tokens, 0)))
  # The solver writes two lines at most: the gold ones it can come near to are the last.
  last = jnp.maximum(p.depth[:, None] - chain.LINES + jnp.arange(chain.LINES), 0)
  near = line(jnp.take_along_axis(p.names, last, axis=1), jnp.take_along_axis(p.values, last, axis=1))
  both = jnp.ones(last.shape, bool) & (jnp.arange(chain.LINES) < p.depth[:, None])
  return {
    "coverage": daslam.entity_coverage(hot(names, valid), given, normalised=True),
    "consistency": daslam.named_answers(names, stated, valid, normalised=True),
    "order": daslam.order_of_operations(gold, ours, normalised=True),
    "proximity": daslam.proximity(near, lines_of(attempt), lines_of(final), both, form="paper", normalised=True),
    "correct": right(p, final).astype(jnp.float32),
  }


@functools.partial(jax.jit, static_argnames=("count", "modulus", "condition", "least", "append_history"))
def evaluated(
  solver,
  decomposer,
  key,
  *,
  count: int,
  modulus: int,
  depth: int,
  condition: str,
  least: int,
  append_history: bool = True,
) -> dict:
  """{"right", "first": shares; "tokens" the solver wrote, "asked": sub-questions}, greedily; a decomposer that is None
  asks for every step in order."""
  p = chain.problems(key, count, modulus, depth, depth)
  attempt = solve(solver, asked(p, nothing(count), wanted(p)[0]))
  if decomposer is None:
    text = chain.gold(p).tokens
  else:
    prompt = seen(p, attempt, condition)
    text = generate(decomposer, prompt.tokens, prompt.length, tokens=chain.ASKED)
  names, turns = chain.parse(text, least)
  final, _, tokens = follow(solver, p, names, turns, append_history=append_history)
  return {
    "right": right(p, final).mean(),
    "first": right(p, attempt).mean(),
    "tokens": (tokens + attempt.length).mean(),
    "asked": turns.mean(),
  }


@functools.partial(jax.jit, static_argnames=("count", "modulus"))
def voted(solver, key, *, count: int, modulus: int, depth: int, samples: int) -> dict:
  """Self-consistency: the answer most of `samples` attempts at temperature 0.9 give."""
  keys = jax.random.split(key, 2)
  p = chain.problems(keys[0], count, modulus, depth, depth)
  prompt = asked(p, nothing(count), wanted(p)[0])

  def one(i, carry):
    votes, lengths = carry
    text = solve(solver, prompt, jax.random.fold_in(keys[1], i), 0.9)
    name, value = chain.stated(jnp.where(text.length[:, None] > 0, text.tokens, 0))
    counts = (name == wanted(p)[0]) & (value >= 0)
    return votes + jax.nn.one_hot(jnp.where(counts, value, -1), modulus), lengths + text.length

  none = jnp.zeros((count, modulus)), jnp.zeros(count, jnp.int32)
  votes, lengths = jax.lax.fori_loop(0, samples, one, none)
  best = jnp.where(votes.max(axis=1) > 0, votes.argmax(axis=1), -1)
  return {"right": (best == wanted(p)[1]).mean(), "tokens": lengths.mean()}
