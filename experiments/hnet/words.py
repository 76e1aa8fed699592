"""Words of a small lexicon with nothing between them: are they found without a delimiter?"""

import functools

import jax
import numpy as np
import optax

from experiments.hnet.arms import fresh, tuples
from jaxlab.models import HNetConfig
from jaxlab.sequence import hnet


def measure(config) -> dict:
  """One stage trained on the stream: {nats (first, last), share, size (bytes a word), f1, chance}.

  f1 is of cuts against first letters, or against second ones where that is more: a cut may follow what tells it.
  """
  w = config.words
  shape = HNetConfig(**tuples(w.shape), **config.mixer)
  model, optimizer = fresh(shape, config.seed), hnet.optimizer(shape, w.rate, steps=w.steps)
  loss = hnet.loss_of(shape, w.length, slack=None)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(model, state, batch):
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(model, batch, 0, None)
    updates, state = optimizer.update(grads, state, model)
    return optax.apply_updates(model, updates), state, metrics

  state, nats = optimizer.init(model), []
  random = np.random.default_rng(config.seed)
  lexicon = words(w.lexicon, random)
  for _ in range(w.steps):
    ids, _ = stream(lexicon, w.batch, w.length + 1, random)
    model, state, metrics = step(model, state, {"inputs": ids[:, :-1], "targets": ids[:, 1:]})
    nats.append(float(metrics["nats"]))
  ids, begins = stream(lexicon, w.held, w.length, random)
  cut = np.asarray(jax.jit(lambda model, ids: model.chunked(ids)[1][0].cut)(model, ids))
  guess = random.random(cut.shape) < cut.mean()
  scores = [f1(np.roll(cut, -late, axis=1)[:, 1:-1], begins[:, 1:-1]) for late in (0, 1)]
  return {
    "nats": [nats[0], nats[-1]],
    "share": float(metrics["share_0"]),
    "size": float(1 / begins[:, 1:].mean()),
    "f1": max(scores),
    "chance": f1(guess[:, 1:-1], begins[:, 1:-1]),
  }


def words(count: int, random: np.random.Generator) -> list[np.ndarray]:
  """Words of 3 to 8 small letters."""
  return [random.integers(97, 123, random.integers(3, 9)) for _ in range(count)]


def stream(lexicon, rows: int, time: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """(int32 ids, bool, where words begin), each (rows, time)."""
  ids, begins = np.zeros((rows, time), np.int32), np.zeros((rows, time), bool)
  for row in range(rows):
    filled = 0
    while filled < time:
      word = lexicon[random.integers(len(lexicon))]
      begins[row, filled] = True
      ids[row, filled : filled + len(word)] = word[: time - filled]
      filled += len(word)
  return ids, begins


def f1(found: np.ndarray, true: np.ndarray) -> float:
  return float(2 * (found & true).sum() / max(found.sum() + true.sum(), 1))
