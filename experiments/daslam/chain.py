"""Chained arithmetic as arrays of tokens: statements in any order, of which a question needs some one after the other.

  x = 3 ;   y = x + 5 ;   w = 9 ;   y ?          the solver's lines:  x : 3 ;  y : 8 ;
  x ? y ?                                        the decomposer's sub-questions

Values are residues of a prime; all is made on the device, a row a problem.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxlab.core.checks import require

PAD, END, SEPARATOR, ASK, STOP, IS, EQUALS, PLUS, MINUS, TIMES = range(10)
NAMES = 26
FIRST_NAME, FIRST_VALUE = 10, 10 + NAMES
LINES = 2  # of a solver's reasoning
REASONING = 4 * LINES + 1


class Sizes(NamedTuple):
  """Of problems: values are residues of `modulus`, names the first `names`, a chain has at most `longest` steps, and
  at most `beside` statements stand beside it. In tokens, at most: `question`; `history`, what a solver was told;
  `asked`, sub-questions, of which there are at most `longest`."""

  modulus: int
  names: int = NAMES
  longest: int = 8
  beside: int = 3

  @property
  def question(self) -> int:
    return 6 * (self.longest + self.beside) + 2

  @property
  def history(self) -> int:
    return 4 * (self.longest + LINES)

  @property
  def asked(self) -> int:
    return 2 * self.longest + 1

  @property
  def vocabulary(self) -> int:
    return FIRST_VALUE + self.modulus

  def check(self) -> None:
    most = self.longest + self.beside
    require(
      self.longest >= 2 and most <= self.names <= NAMES,
      f"{self.names} names for {most} statements of chains of {self.longest} steps; take {most} to {NAMES} names, and "
      "2 steps or more",
    )


class Text(NamedTuple):
  """Rows of tokens, and how many of each count; the rest is 0."""

  tokens: Int[Array, "batch time"]
  length: Int[Array, "batch"]


class Problem(NamedTuple):
  """The chain's names, values, operators and second operands, a column a step, of which `depth` are needed; the first
  step has no operator (-1). others: names beside it. statements: without the query, of the name of step depth - 1."""

  statements: Text
  names: Int[Array, "batch steps"]
  values: Int[Array, "batch steps"]
  operators: Int[Array, "batch steps"]
  operands: Int[Array, "batch steps"]
  depth: Int[Array, "batch"]
  others: Int[Array, "batch distractors"]


def join(*parts: Text, room: int) -> Text:
  """Texts one behind the other; what has no room is cut off."""
  batch = len(parts[0].length)
  out, at = jnp.zeros((batch, room), jnp.int32), jnp.zeros(batch, jnp.int32)
  for part in parts:
    column = jnp.arange(part.tokens.shape[1])
    place = jnp.where(column < part.length[:, None], at[:, None] + column, room)
    out = out.at[jnp.arange(batch)[:, None], place].set(part.tokens, mode="drop")
    at = at + part.length
  return Text(out, jnp.minimum(at, room))


def compact(tokens: Int[Array, "batch time"], mask: Bool[Array, "batch time"]) -> Text:
  """The tokens of the mask, moved to the left."""
  order = jnp.argsort(~mask, axis=1, stable=True)
  length = mask.sum(axis=1).astype(jnp.int32)
  moved = jnp.take_along_axis(tokens, order, axis=1)
  return Text(jnp.where(jnp.arange(tokens.shape[1]) < length[:, None], moved, 0), length)


def problems(key: jax.Array, batch: int, sizes: Sizes, least: int | Array, most: int | Array) -> Problem:
  """Chains of `least` .. `most` steps, 0 .. `sizes.beside` statements beside them, in any order."""
  modulus, longest, slots = sizes.modulus, sizes.longest, sizes.longest + sizes.beside
  keys = jax.random.split(key, 9)
  integers = lambda k, shape, low, high: jax.random.randint(k, shape, low, high)
  names = (
    jax.vmap(lambda k: jax.random.permutation(k, sizes.names))(jax.random.split(keys[0], batch))[:, :slots] + FIRST_NAME
  )
  depth = integers(keys[1], (batch,), least, most + 1)
  constants = integers(keys[2], (batch, slots), 0, modulus)
  operators = integers(keys[3], (batch, slots), PLUS, TIMES + 1)
  place = jnp.arange(slots)
  # The second operand is a constant, or three times in ten the name of an earlier step.
  earlier = (jax.random.uniform(keys[4], (batch, slots)) < 0.3) & (place >= 2)
  chosen = (jax.random.uniform(keys[5], (batch, slots)) * jnp.maximum(place - 1, 1)).astype(jnp.int32)
  chosen = jnp.where(place >= longest, chosen % 2, chosen)
  values = [constants[:, 0]]
  rows = jnp.arange(batch)
  for j in range(1, longest):
    right = jnp.where(earlier[:, j], jnp.stack(values, 1)[rows, jnp.minimum(chosen[:, j], j - 1)], constants[:, j])
    values.append(calculate(values[-1], operators[:, j], right, modulus))
  operands = jnp.where(earlier, jnp.take_along_axis(names, chosen, axis=1), constants + FIRST_VALUE)
  # Beside the chain: a constant, or a step from one of the chain's first.
  alone = integers(keys[6], (batch, slots), 0, 2) == 0
  constant = (place == 0) | ((place >= longest) & alone)
  left = jnp.where(place >= longest, names[:, :1], jnp.roll(names, 1, axis=1))
  equals, stop = jnp.full((batch, slots), EQUALS), jnp.full((batch, slots), STOP)
  long = jnp.stack([names, equals, left, operators, operands, stop], axis=-1)
  short = jnp.stack([names, equals, constants + FIRST_VALUE, stop, stop * 0, stop * 0], axis=-1)
  tokens = jnp.where(constant[..., None], short, long)
  count = integers(keys[7], (batch, 1), 0, sizes.beside + 1)
  present = (place < depth[:, None]) | ((place >= longest) & (place < longest + count))
  order = jnp.argsort(jax.random.uniform(keys[8], (batch, slots)), axis=1)
  shuffle = lambda a: jnp.take_along_axis(a, order[..., None] if a.ndim == 3 else order, axis=1)
  mask = shuffle(present)[..., None] & (shuffle(tokens) > 0)
  statements = compact(shuffle(tokens).reshape(batch, -1), mask.reshape(batch, -1))
  steps = slice(0, longest)
  return Problem(
    statements, names[:, steps], jnp.stack(values, 1), jnp.where(constant, -1, operators)[:, steps], operands[:, steps],
    depth, names[:, longest:],
  )  # fmt: skip


def calculate(left, operator, right, modulus: int):
  results = left + right, left - right, left * right
  return jnp.select([operator == PLUS, operator == MINUS], results[:2], results[2]) % modulus


def at(array: Int[Array, "batch steps"], step: Int[Array, "batch"]) -> Int[Array, "batch"]:
  return jnp.take_along_axis(array, step[:, None], axis=1)[:, 0]


def query(name: Int[Array, "batch"]) -> Text:
  return Text(jnp.stack([name, jnp.full_like(name, ASK)], axis=1), jnp.full_like(name, 2))


def lines(names: Int[Array, "batch n"], values: Int[Array, "batch n"], mask: Bool[Array, "batch n"]) -> Text:
  """`name : value ;` where the mask says so."""
  mark = lambda token: jnp.full_like(names, token)
  rows = jnp.stack([names, mark(IS), values + FIRST_VALUE, mark(STOP)], axis=-1)
  return compact(rows.reshape(len(names), -1), jnp.repeat(mask, 4, axis=1))


def cut(text: Text, room: int) -> Text:
  return Text(text.tokens[:, :room], jnp.minimum(text.length, room))


def marked(text: Text, token: int) -> Text:
  """With a token behind it."""
  one = jnp.full((len(text.length), 1), token, jnp.int32)
  return join(text, Text(one, jnp.ones_like(text.length)), room=text.tokens.shape[1] + 1)


def read_lines(text: Int[Array, "batch time"]) -> tuple[Int[Array, "batch lines"], Int[Array, "batch lines"]]:
  """(names, values) of what a solver wrote, up to its first token that is out of place; -1 from there on."""
  rows = text[:, : 4 * LINES].reshape(len(text), LINES, 4)
  name, value = rows[..., 0], rows[..., 2]
  right = (name >= FIRST_NAME) & (name < FIRST_VALUE) & (rows[..., 1] == IS) & (value >= FIRST_VALUE)
  right &= rows[..., 3] == STOP
  right = jnp.cumprod(right, axis=1) > 0
  return jnp.where(right, name, -1), jnp.where(right, value - FIRST_VALUE, -1)


def stated(text: Int[Array, "batch time"]) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
  """(name, value) of the last line."""
  names, values = read_lines(text)
  last = jnp.maximum((names >= 0).sum(axis=1) - 1, 0)
  return at(names, last), at(values, last)


def parse(text: Int[Array, "batch time"], least: int) -> tuple[Int[Array, "batch turns"], Int[Array, "batch"]]:
  """(names asked for, -1 behind the last; how many): of every "?" the token before it, if it is a name. Fewer than
  `least` are none."""
  before = jnp.pad(text[:, :-1], ((0, 0), (1, 0)))
  alive = jnp.cumsum(text == END, axis=1) == 0
  asks = alive & (text == ASK) & (before >= FIRST_NAME) & (before < FIRST_VALUE)
  found, most = compact(before, asks), text.shape[1] // 2
  count = jnp.where(found.length >= least, found.length, 0)
  names = jnp.where(jnp.arange(most) < count[:, None], found.tokens[:, :most], -1)
  return names, count


def solver_rows(key: jax.Array, batch: int, sizes: Sizes, most: int | Array) -> tuple[Text, Text]:
  """(prompt, answer) of questions at most two lines from what is known: facts, statements of up to `most` steps, a
  query, more often of a later step than of the first, which is there to be read.

  Of one in four the answer is among the facts, as when a question is asked again behind its sub-questions' answers.
  """
  keys = jax.random.split(key, 6)
  p = problems(keys[0], batch, sizes, 1, most)
  asked = (jnp.sqrt(jax.random.uniform(keys[1], (batch,))) * p.depth).astype(jnp.int32)
  told = jax.random.uniform(keys[4], (batch,)) < 0.25
  count = jnp.where(told, 1, jnp.minimum(1 + jax.random.randint(keys[2], (batch,), 0, 2), asked + 1))
  step = jnp.arange(sizes.longest)
  own = (step <= asked[:, None]) & (step > (asked - count)[:, None])
  # Of what comes before, what is used is known, and some of the rest.
  used = (p.names[:, None, :] == jnp.where(own, p.operands, -1)[:, :, None]).any(axis=1)
  used |= step == (asked - count)[:, None]
  known = (step <= (asked - count)[:, None]) & (used | (jax.random.uniform(keys[3], own.shape) < 0.7))
  known |= told[:, None] & own
  facts = lines(p.names, p.values, known)
  prompt = join(facts, p.statements, query(at(p.names, asked)), room=4 * sizes.longest + sizes.question)
  return prompt, cut(marked(lines(p.names, p.values, own), END), REASONING)


def row(prompt: Text, answer: Text) -> dict[str, Array]:
  """{"inputs", "targets"}: the answer alone counts."""
  both = join(prompt, answer, room=prompt.tokens.shape[1] + answer.tokens.shape[1])
  here = jnp.arange(both.tokens.shape[1])
  counts = (here >= prompt.length[:, None]) & (here < both.length[:, None])
  return {"inputs": both.tokens[:, :-1], "targets": jnp.where(counts, both.tokens, -1)[:, 1:]}


def needed(p: Problem) -> Bool[Array, "batch steps"]:
  return jnp.arange(p.names.shape[1]) < p.depth[:, None]


def gold(p: Problem) -> Text:
  """Sub-questions for every step in order."""
  return _questions(p.names, needed(p))


def _questions(names, mask) -> Text:
  rows = jnp.stack([names, jnp.full_like(names, ASK)], axis=-1).reshape(len(names), -1)
  return marked(compact(rows, jnp.repeat(mask, 2, axis=1)), END)


def noisy(key: jax.Array, p: Problem) -> Text:
  """`gold` with a step dropped, two swapped, a name beside the chain put in, three times in ten each."""
  keys = jax.random.split(key, 7)
  (batch, longest), rows = p.names.shape, jnp.arange(len(p.depth))
  place = jnp.arange(longest)
  chance = lambda k: jax.random.uniform(k, (batch,)) < 0.3
  step = lambda k: (jax.random.uniform(k, (batch,)) * p.depth).astype(jnp.int32)
  i, j = step(keys[0]), step(keys[1])
  swap = chance(keys[2])
  a, b = at(p.names, i), at(p.names, j)
  names = p.names.at[rows, i].set(jnp.where(swap, b, a)).at[rows, j].set(jnp.where(swap, a, at(p.names, j)))
  mask = needed(p) & ~((place == step(keys[3])[:, None]) & chance(keys[4])[:, None])
  instead = (place == step(keys[5])[:, None]) & (chance(keys[6]) & (p.depth < longest))[:, None]
  # What is put in stands before the step that it is drawn at.
  wide = jnp.stack([jnp.broadcast_to(p.others[:, :1], names.shape), names], axis=-1).reshape(batch, -1)
  return cut(_questions(wide, jnp.stack([instead, mask], axis=-1).reshape(batch, -1)), 2 * longest + 1)
