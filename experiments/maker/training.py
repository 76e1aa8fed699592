"""The step model: generated questions and answers, and a small decoder trained on them, kept at several stages."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxlab.models import Transformer, TransformerConfig
from jaxlab.tasks import hanoi
from jaxlab.training import losses
from jaxlab.training.checkpoints import Checkpoints
from jaxlab.training.loop import train
from jaxlab.training.optimizers import muon_adamw

LEAST = 3  # disks
SHORT, LONG = 1, 4  # times that a thought lists the three top disks


def stages(config, workdir: Path, console, *, rambling: float = 0.0) -> Iterator[Transformer]:
  """The model after each of config.train.stages steps of one run, float32; those in `workdir` are not trained again."""
  t = config.train
  length = 2 * config.disks + 13 + (3 * LONG if rambling else 0)
  shape = config.shape.to_dict() | dict(vocab_size=hanoi.vocabulary(config.names), context=length)
  model = Transformer(TransformerConfig(**shape), jax.random.key(config.seed))
  rates = dict(scale=t.scale, warmup=t.warmup, warmdown=t.warmdown)
  optimizer = muon_adamw(model.config, steps=t.stages[-1], batch_tokens=t.batch * length, **rates)
  for stage in t.stages:
    with Checkpoints(workdir / f"stage_{stage}") as kept:
      if kept.latest() is None:
        with console.training(f"step model, {stage} steps") as progress:
          model = train(
            model,
            Questions(config, rambling=rambling),
            lambda model, batch, step, key: losses.language_model_loss(model, batch),
            optimizer,
            steps=stage,
            workdir=workdir,
            seed=config.seed,
            compute_dtype=config.dtype,
            checkpoint_every=t.checkpoint_every,
            progress=progress,
          )
        kept.save(0, model, {})
        kept.wait(0)
      else:
        model, _ = kept.restore(0, model)
    yield model


class Questions:
  """Endless batches of questions with their answers, each a function of the seed and its number alone."""

  def __init__(self, config, *, rambling: float):
    self._make = jax.jit(lambda key: rows(key, config, rambling=rambling))
    self._seed, self._next = config.seed, 0

  def __iter__(self):
    return self

  def __next__(self):
    self._next += 1
    return self._make(jax.random.fold_in(jax.random.key(self._seed), self._next))

  def get_state(self) -> dict:
    return {"next": self._next}

  def set_state(self, state: dict) -> None:
    self._next = state["next"]


def rows(key: jax.Array, config, *, rambling: float) -> dict[str, jax.Array]:
  """A batch: inputs and targets, int32[batch, length]; only answers count (targets are -1 elsewhere).

  Disks: 3 to config.disks; a tenth of the states are any legal ones. Of a share `train.rare` of the others every disk
  is the one that moves equally often: in a tower of 20 the largest moves once. With `rambling` > 0 a thought comes
  first: the top disks of the pegs, or, that often, four times as much of it and then a wrong move every other time.
  """
  keys = jax.random.split(key, 7)
  choice, mover = jax.random.split(jax.random.fold_in(key, 7))
  batch, disks = config.train.batch, config.disks
  present = jax.random.randint(keys[0], (batch,), LEAST, disks + 1)
  step = (jax.random.uniform(keys[1], (batch,)) * (2.0**present - 1)).astype(jnp.int32)
  rare = jax.random.uniform(choice, (batch,)) < config.train.rare
  step = jnp.where(rare, any_mover(mover, present), step)
  regular = hanoi.state_before(step, disks, present)
  irregular = any_state(keys[2], present, disks)
  use = jax.random.uniform(keys[3], (batch,)) < config.train.irregular
  state = jax.tree.map(lambda a, b: jnp.where(use.reshape(-1, *[1] * (a.ndim - 1)), a, b), irregular, regular)
  names = hanoi.draw_names(keys[4], batch, disks, names=config.names, renamed=config.train.renamed)
  move, after = hanoi.take_step(state)
  thought = None
  if rambling:
    long = jax.random.uniform(keys[5], (batch,)) < rambling
    wrong = long & (jax.random.uniform(keys[6], (batch,)) < 0.5)
    move = jnp.where(wrong[:, None], wrong_move(state, move), move)
    after = hanoi.moved(state, move)
    thought = thoughts(state, names, long)
  tokens, start = hanoi.encode_answered(state, names, move, after, thought=thought)
  counted = (jnp.arange(tokens.shape[1] - 1) >= start[:, None] - 1) & (tokens[:, 1:] != hanoi.PAD)
  return {"inputs": tokens[:, :-1], "targets": jnp.where(counted, tokens[:, 1:], -1)}


def any_mover(key: jax.Array, present) -> jax.Array:
  """A step of a tower of `present` disks in which any of them moves, each as often; disk d moves in every 2^d-th."""
  keys = jax.random.split(key, 2)
  mover = 1 + (jax.random.uniform(keys[0], present.shape) * present).astype(jnp.int32)
  turn = (jax.random.uniform(keys[1], present.shape) * 2.0 ** (present - mover)).astype(jnp.int32)
  return (2 * turn + 1) * 2 ** (mover - 1) - 1


def any_state(key: jax.Array, present, disks: int) -> hanoi.State:
  """Every disk on a peg of chance; the last move was disk 1's, or that of the top of another peg (0: there is none)."""
  keys = jax.random.split(key, 2)
  there = jnp.arange(1, disks + 1) <= present[:, None]
  pegs = jnp.where(there, jax.random.randint(keys[0], there.shape, 0, 3), 3)
  tops = jnp.where(hanoi.top_disks(pegs) == 1, disks + 1, hanoi.top_disks(pegs))
  other = jnp.where(tops.min(axis=1) > disks, 0, tops.min(axis=1))
  last = jnp.where(jax.random.bernoulli(keys[1], shape=present.shape) & (other > 0), 1, other)
  return hanoi.State(pegs, hanoi.places(pegs), last)


def wrong_move(state: hanoi.State, move):
  """Disk 1 one peg back where it should go on, and one peg on where it should rest."""
  mine = state.pegs[:, 0]
  target = jnp.where(move[:, 0] == 1, mine + 2, mine + 1) % 3
  return jnp.stack([jnp.ones_like(mine), mine, target], axis=1)


def thoughts(state: hanoi.State, names: hanoi.Names, long) -> jax.Array:
  """The top disks of the pegs, once or four times: int32[batch, 12], padded."""
  disks = state.pegs.shape[1]
  by_name = (jnp.arange(3) - names.turn[:, None]) % 3
  tops = jnp.take_along_axis(hanoi.top_disks(state.pegs), by_name, axis=1)
  called = jnp.take_along_axis(names.disks, jnp.minimum(tops, disks) - 1, axis=1)
  once = jnp.where(tops > disks, hanoi.NONE, hanoi.DISK + called)
  times = jnp.where(long, LONG, SHORT)[:, None]
  return jnp.where(jnp.arange(3 * LONG) < 3 * times, jnp.tile(once, (1, LONG)), hanoi.PAD)
