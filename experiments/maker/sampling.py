"""The step model as a source of votes: batches of samples, what is right, and every step's exact error rate."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlab.models import Transformer, inference
from jaxlab.tasks import hanoi
from jaxlab.training.loop import cast

_MIX = 0x9E3779B1  # multiplier of the fingerprints of an agent's earlier steps


class Agent(NamedTuple):
  """What a sample needs besides its step, as arrays, so that every way to ask is one program.

  first, rest: temperature of an item's first sample and of the others; renamed: an index of hanoi.RENAMED; agent_steps:
  m, steps that one sample takes by itself; period: steps of a run (items past it are further runs); longest: tokens
  allowed; forgiving: answers are repaired instead of flagged.
  """

  network: inference.Network
  first: jax.Array
  rest: jax.Array
  renamed: jax.Array
  agent_steps: jax.Array
  period: jax.Array
  longest: jax.Array
  forgiving: jax.Array


def agent(
  config, model: Transformer, *, first=1.0, rest=1.0, renamed="nothing", m=1, period, longest=None, forgiving=False
):
  """The `Agent` of a model in the computing dtype."""
  network = _take_apart(cast(model, config.dtype))
  longest = config.disks + 8 if longest is None else longest
  numbers = (jnp.float32(first), jnp.float32(rest), jnp.int32(hanoi.RENAMED.index(renamed)))
  return Agent(network, *numbers, *map(jnp.int32, (m, period, longest)), jnp.bool_(forgiving))


_take_apart = jax.jit(inference.take_apart)


def attend(q, k, v, *, window=None, start=0):
  """Attention of one query a row over a few keys, by one product a row for all its heads.

  Queries stand in a matrix that is zero but for each head's own stretch; a product for every row and head would be too
  small to be worth a kernel.
  """
  if q.shape[1] > 1:
    return inference.dot_product_attention(q, k, v, window=window, start=start)
  batch, keys, heads, size = k.shape
  flat = lambda a: a.reshape(batch, keys, heads * size)
  own = jnp.eye(heads, dtype=q.dtype)[:, :, None]
  queries = (q[:, 0, :, None] * own).reshape(batch, heads, heads * size)
  scores = jnp.einsum("bhc,btc->bht", queries, flat(k), preferred_element_type=jnp.float32) * size**-0.5
  weights = jax.nn.softmax(jnp.where(jnp.arange(keys) <= start, scores, -jnp.inf), axis=-1).astype(v.dtype)
  mixed = jnp.einsum("bht,btc->bhc", weights, flat(v)).reshape(batch, heads, heads, size)
  return jnp.einsum("bhhd->bhd", mixed)[:, None]


def generated(network, prompt, key, temperature, *, tokens: int):
  """int32[batch, tokens]: a continuation of each prompt at each row's temperature, 0 the most likely."""

  def draw(logits, number):
    noise = jax.random.gumbel(jax.random.fold_in(key, number), logits[:, 0].shape)
    scaled = logits[:, 0] / jnp.maximum(temperature, 1e-4)[:, None]
    return jnp.argmax(jnp.where(temperature[:, None] > 0, scaled + noise, logits[:, 0]), axis=-1).astype(jnp.int32)

  capacity = -(-(prompt.shape[1] + tokens) // 8) * 8  # what products of 16 bits want
  logits, state = inference.prefill(network, prompt, capacity=capacity)
  first = draw(logits, 0)

  def one(carry, number):
    token, state = carry
    logits, state = inference.step(network, token[:, None], state, attention=attend)
    token = draw(logits, number)
    return (token, state), token

  _, rest = jax.lax.scan(one, (first, state), jnp.arange(1, tokens))
  return jnp.concatenate([first[:, None], rest.T], axis=1)


def names_for(agent: Agent, key, batch: int, disks: int, names: int) -> hanoi.Names:
  """Names as the agent wants them."""
  drawn = hanoi.draw_names(key, batch, disks, names=names, renamed=hanoi.RENAMED[-1])
  plain = jnp.broadcast_to(jnp.arange(1, disks + 1), drawn.disks.shape)
  return hanoi.Names(jnp.where(agent.renamed > 0, drawn.turn, 0), jnp.where(agent.renamed > 1, drawn.disks, plain))


def answers(agent: Agent, state: hanoi.State, tries, key, *, names: int, tokens: int) -> hanoi.Answer:
  """One sample of one step for every row."""
  batch, disks = state.pegs.shape
  keys = jax.random.split(key)
  called = names_for(agent, keys[0], batch, disks, names)
  temperature = jnp.where(tries == 0, agent.first, agent.rest)
  made = generated(agent.network, hanoi.encode(state, called), keys[1], temperature, tokens=tokens)
  read = hanoi.decode(made, called)
  read = read._replace(flagged=read.flagged | (read.length > agent.longest))
  forgiven = hanoi.repaired(made, called, state)
  return jax.tree.map(lambda a, b: jnp.where(agent.forgiving, a, b), forgiven, read)


def chained(agent_steps, state: hanoi.State, answer) -> tuple:
  """(fingerprint of the answers of consecutive steps and the last state, whether any is flagged, that state).

  `answer(state, number)` answers a step; each reads what the one before has written.
  """

  def one(number, carry):
    said, flagged, state = carry
    found = answer(state, number)
    said = said * jnp.uint32(_MIX) + hanoi.fingerprint(found)
    return said, flagged | found.flagged, hanoi.State(found.pegs, found.place, found.move[:, 0])

  batch = len(state.last)
  start = (jnp.zeros((batch, 2), jnp.uint32), jnp.zeros(batch, bool), state)
  return jax.lax.fori_loop(0, agent_steps, one, start)


@functools.cache
def step_sample(names: int, tokens: int):
  """A sampler for `maker.follow`: one for every size of model."""

  def sample(agent: Agent, state: hanoi.State, tries, key):
    ask = lambda state, number: answers(
      agent, state, tries, jax.random.fold_in(key, number), names=names, tokens=tokens
    )
    return chained(agent.agent_steps, state, ask)

  return sample


@functools.cache
def item_sample(disks: int, names: int, tokens: int):
  """A sampler for `maker.decide`: item i is agent step i of a run, or of further runs past the period."""
  ask = step_sample(names, tokens)

  def sample(agent: Agent, item, tries, key):
    said, flagged, _ = ask(agent, state_of(agent, item, disks), tries, key)
    return said, flagged

  return sample


def state_of(agent: Agent, item, disks: int) -> hanoi.State:
  """The state before an item."""
  return hanoi.state_before(item % (agent.period // agent.agent_steps) * agent.agent_steps, disks)


@functools.partial(jax.jit, static_argnames=("items", "disks"))
def right(agent: Agent, *, items: int, disks: int) -> jax.Array:
  """What should be said of items 0 .. `items` - 1: uint32[items, 2]."""
  state = state_of(agent, jnp.arange(items), disks)
  return chained(agent.agent_steps, state, lambda state, number: hanoi.right_answer(state))[0]


@functools.partial(jax.jit, static_argnames=("draws", "disks", "names"))
def error_rates(model: Transformer, agent: Agent, step, present, key, *, draws: int, disks: int, names: int):
  """float32[batch]: the probability that a sample of a step is not the right answer, the mean over draws of names.

  Exact but for that mean: one minus the probability of all tokens of the right answer.

  Args:
    step, present: int32[batch], the step and how many disks there are, of an array for `disks`.
  """
  state = hanoi.state_before(step, disks, present)
  move, after = hanoi.take_step(state)

  def one(total, key):
    called = names_for(agent, key, len(step), disks, names)
    tokens, start = hanoi.encode_answered(state, called, move, after)
    logits = model(tokens[:, :-1]) / jnp.maximum(agent.rest, 1e-4)
    target = tokens[:, 1:]
    logs = jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]
    counted = (jnp.arange(target.shape[1]) >= start[:, None] - 1) & (target != hanoi.PAD)
    return total - jnp.expm1(jnp.where(counted, logs, 0).sum(axis=1)), None

  total, _ = jax.lax.scan(one, jnp.zeros(len(step)), jax.random.split(key, draws))
  return total / draws
