"""Training a small module beside a frozen network, for a few minutes: a gate, a predictor, adapters."""

from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np
import optax

from experiments import results
from experiments.long_context import Subject
from experiments.text import Text
from jaxlab.core.checks import require
from jaxlab.data import packing
from jaxlab.training.optimizers import adam

_REPORTED = 20  # losses that are kept of a run


def trained(module, loss: Callable, subject: Subject, train, *, data, cache: Path, file: Path, seed: int, console):
  """(the module after Adam on `loss(module, network, tokens)`, mean losses over the run): kept in `file`, made once.

  Args:
    module: any tree of float32 arrays; the network is a constant of the loss.
    train: split of `data`, steps, batch, length of rows, rate.
    file: ends in .npz.

  Raises:
    InputError: a loss that is no number, a file of another module.
  """
  leaves, structure = jax.tree.flatten(module)
  if not file.exists():
    leaves, losses = _fit(module, loss, subject, train, _rows(subject, train, data, cache, seed), console)
    arrays = {f"{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)} | {"losses": losses}
    results.keep_arrays(file, arrays)
  kept = results.kept_arrays(file, "remove it to train anew")
  losses, made = kept.pop("losses").tolist(), [kept[name] for name in sorted(kept, key=int)]
  same = [a.shape for a in made] == [a.shape for a in leaves]
  require(same, f"{file} holds a module of other shapes; remove it to train anew")
  return jax.tree.unflatten(structure, map(jax.numpy.asarray, made)), losses


def _rows(subject: Subject, train, data, cache: Path, seed: int):
  data = ml_collections.ConfigDict(dict(name="local_text" if data.path else data.name, path=data.path))
  tokens = Text(data, subject.tokenizer, cache).split(train.split)
  return packing.training_rows(tokens, row=train.length - 1, seed=seed)


def _fit(module, loss: Callable, subject: Subject, train, rows, console):
  optimizer = adam(train.rate, steps=train.steps, warmup=max(1, train.steps // 10))

  @jax.jit
  def step(module, state, network, tokens):
    value, slope = jax.value_and_grad(loss)(module, network, tokens)
    updates, state = optimizer.update(slope, state)
    return optax.apply_updates(module, updates), state, value

  state, found, rows = optimizer.init(module), [], iter(rows)
  for _ in console.track("training", range(train.steps)):
    tokens = np.stack([next(rows) for _ in range(train.batch)])
    module, state, value = step(module, state, subject.network, tokens)
    found.append(value)
  found = np.array(found, np.float32)
  require(np.isfinite(found).all(), f"the loss is {found[-1]} after {train.steps} steps; lower the learning rate")
  return jax.tree.leaves(module), [float(part.mean()) for part in np.array_split(found, min(_REPORTED, len(found)))]
