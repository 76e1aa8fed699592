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


def asked(p: Problem, name, history: Text | None = None) -> Text:
  """What the solver reads: lines it was told, the statements, a query."""
  parts = ([] if history is None else [history]) + [p.statements, chain.query(name)]
  return chain.join(*parts, room=sum(part.tokens.shape[1] for part in parts))


def nothing(batch: int, room: int) -> Text:
  return Text(jnp.zeros((batch, room), jnp.int32), jnp.zeros(batch, jnp.int32))


def tokens_of(text: Text):
  """Its tokens, 0 behind the end."""
  return jnp.where(jnp.arange(text.tokens.shape[1]) < text.length[:, None], text.tokens, 0)


def wanted(p: Problem):
  """(name, value) of what is asked in the end."""
  last = p.depth - 1
  return chain.at(p.names, last), chain.at(p.values, last)


def seen(p: Problem, attempt: Text, condition: int | jax.Array) -> Text:
  """What the decomposer reads: the question, and by its place in CONDITIONS the solver's attempt, the gold lines, or
  nothing; one program serves them all."""
  name, _ = wanted(p)
  gold = chain.lines(p.names, p.values, chain.needed(p))
  wide = lambda text: jnp.pad(text.tokens, ((0, 0), (0, gold.tokens.shape[1] - text.tokens.shape[1])))
  tokens = jnp.stack([wide(attempt), gold.tokens, gold.tokens * 0])[condition]
  text = Text(tokens, jnp.stack([attempt.length, gold.length, gold.length * 0])[condition])
  question = chain.marked(asked(p, name), chain.SEPARATOR)
  room = question.tokens.shape[1] + text.tokens.shape[1]
  return chain.marked(chain.join(question, text, room=room), chain.SEPARATOR)


def follow(solver, p: Problem, names, count, *, append_history: bool = True):
  """(final lines, what was written to each sub-question (batch, turns, tokens), tokens the solver wrote): phases 3
  and 4."""
  longest = p.names.shape[1]

  def turn(history, own):
    name, here = own
    text = solve(solver, asked(p, jnp.maximum(name, 0), history if append_history else None))
    text = Text(text.tokens, jnp.where(here, text.length, 0))
    return chain.join(history, text, room=history.tokens.shape[1]), (tokens_of(text), text.length)

  steps = jnp.arange(names.shape[1])[:, None] < count
  begin = nothing(len(count), 4 * (longest + chain.LINES))
  history, (texts, lengths) = jax.lax.scan(turn, begin, (names.T, steps))
  final = solve(solver, asked(p, wanted(p)[0], history))
  return final, texts.swapaxes(0, 1), lengths.sum(axis=0) + final.length


def right(p: Problem, text: Text):
  name, value = chain.stated(tokens_of(text))
  gold_name, gold_value = wanted(p)
  return (name == gold_name) & (value == gold_value)


def rewards(p: Problem, names, count, texts, attempt: Text, final: Text, modulus: int, form: str = "paper") -> dict:
  """The five of `daslam`; an operator is that of the step asked for.

  paper  normalised, operators in the order of the steps, answers by the names they state
  code   sums as they are, operators in the order of the vocabulary, answers by their words beside those they were asked
         in, each word a direction of its own
  """
  code, steps = form == "code", chain.needed(p)
  how = dict(normalised=not code)
  hot = lambda names, mask: (jax.nn.one_hot(names - chain.FIRST_NAME, chain.NAMES) * mask[..., None]).any(axis=1)
  valid = jnp.arange(names.shape[1]) < count[:, None]
  operators = jnp.where(steps & (p.operators >= 0), p.operators, -1)
  is_step = names[:, :, None] == jnp.where(steps, p.names, -2)[:, None, :]
  ours = jnp.where(is_step, operators[:, None, :], -1).max(axis=2)
  listed = _vocabulary_order if code else _first
  if code:
    words = lambda tokens: (jax.nn.one_hot(tokens, chain.FIRST_VALUE + modulus) * (tokens > 0)[..., None]).sum(axis=-2)
    query = jax.nn.one_hot(names, chain.FIRST_VALUE + modulus) + jax.nn.one_hot(chain.ASK, chain.FIRST_VALUE + modulus)
    asking = words(tokens_of(p.statements))[:, None] + query
    consistency = daslam.answer_consistency(asking, words(texts), valid)
  else:
    stated, _ = chain.stated(texts.reshape(-1, texts.shape[-1]))
    consistency = daslam.named_answers(names, stated.reshape(names.shape), valid, **how)
  line = lambda names, values: jnp.concatenate(
    [jax.nn.one_hot(names - chain.FIRST_NAME, chain.NAMES), jax.nn.one_hot(values, modulus)], axis=-1
  )
  lines_of = lambda text: line(*chain.read_lines(tokens_of(text)))
  # The solver writes two lines at most: the gold ones it can come near to are the last.
  last = jnp.maximum(p.depth[:, None] - chain.LINES + jnp.arange(chain.LINES), 0)
  near = line(jnp.take_along_axis(p.names, last, axis=1), jnp.take_along_axis(p.values, last, axis=1))
  both = jnp.ones(last.shape, bool) & (jnp.arange(chain.LINES) < p.depth[:, None])
  return {
    "coverage": daslam.entity_coverage(hot(names, valid), hot(p.names, steps), form=form, **how),
    "consistency": consistency,
    "order": daslam.order_of_operations(listed(operators), listed(ours), **how),
    "proximity": daslam.proximity(near, lines_of(attempt), lines_of(final), both, form=form, **how),
    "correct": right(p, final).astype(jnp.float32),
  }


def _first(operators):
  """Those there are, as they stand, before the -1."""
  return jnp.take_along_axis(operators, jnp.argsort(operators < 0, axis=1, stable=True), axis=1)


def _vocabulary_order(operators):
  """Each that is there once, in the order of the tokens."""
  kinds = jnp.arange(chain.PLUS, chain.TIMES + 1)
  return _first(jnp.where((operators[:, :, None] == kinds).any(axis=1), kinds, -1))


@functools.partial(jax.jit, static_argnames=("count", "sizes", "least", "append_history"))
def evaluated(
  solver,
  decomposer,
  key,
  *,
  count: int,
  sizes: chain.Sizes,
  depth: int,
  condition: int,
  least: int,
  append_history: bool = True,
) -> dict:
  """{"right", "first": shares; "tokens" the solver wrote, "asked": sub-questions, "retried": share that had none},
  greedily; a decomposer that is None asks for every step in order."""
  p = chain.problems(key, count, sizes, depth, depth)
  attempt = solve(solver, asked(p, wanted(p)[0]))
  if decomposer is None:
    text = chain.gold(p).tokens
  else:
    prompt = seen(p, attempt, condition)
    text = generate(decomposer, prompt.tokens, prompt.length, tokens=sizes.asked)
  names, turns = chain.parse(text, least)
  final, _, tokens = follow(solver, p, names, turns, append_history=append_history)
  return {
    "right": right(p, final).mean(),
    "first": right(p, attempt).mean(),
    "tokens": (tokens + attempt.length).mean(),
    "asked": turns.mean(),
    "retried": (turns == 0).mean(),
  }


@functools.partial(jax.jit, static_argnames=("count", "sizes"))
def voted(solver, key, *, count: int, sizes: chain.Sizes, depth: int, samples: int) -> dict:
  """Self-consistency: the answer most of `samples` attempts at temperature 0.9 give."""
  keys = jax.random.split(key, 2)
  p = chain.problems(keys[0], count, sizes, depth, depth)
  prompt = asked(p, wanted(p)[0])

  def one(i, carry):
    votes, lengths = carry
    text = solve(solver, prompt, jax.random.fold_in(keys[1], i), 0.9)
    name, value = chain.stated(tokens_of(text))
    counts = (name == wanted(p)[0]) & (value >= 0)
    return votes + jax.nn.one_hot(jnp.where(counts, value, -1), sizes.modulus), lengths + text.length

  none = jnp.zeros((count, sizes.modulus)), jnp.zeros(count, jnp.int32)
  votes, lengths = jax.lax.fori_loop(0, samples, one, none)
  best = jnp.where(votes.max(axis=1) > 0, votes.argmax(axis=1), -1)
  return {"right": (best == wanted(p)[1]).mean(), "tokens": lengths.mean()}
