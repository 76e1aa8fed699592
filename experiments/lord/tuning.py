"""QLoRA: adapters of low rank beside maps in NF4 that stay as they are, whole maps and LoRD's: what they give back."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

from experiments.compressing import Subject, perplexity, sizes, stored
from experiments.long_context import opened
from jaxlab.core.checks import require
from jaxlab.data import packing
from jaxlab.models import Transformer, maps
from jaxlab.training import lora
from jaxlab.training.losses import language_model_loss
from jaxlab.training.optimizers import adam
from jaxlab.weights import lord
from jaxlab.weights.quantise import nf4, quantise


def measure(config, subject: Subject, *, bases, table, cache: Path) -> dict[str, dict]:
  """{"dense" or "LoRD", in NF4: {bytes: of what stays, adapters: numbers trained, before, after: perplexity}}."""
  t = config.tuning
  _, _, text = opened(config, str(subject.folder), cache)
  tokens = text.split(config.data.calibration)
  how = dict(bits=4, group=config.group, batch=sizes(config.text, subject).batch)
  thin = lord.truncate(subject.model, bases, lord.choose(bases, table, budget=config.budget))
  found = {}
  for name, model in {"dense": subject.model, "LoRD": thin}.items():
    small = stored(quantise(model, subject.calibration, nf4, **how))
    small = jax.tree.map(lambda a: a.astype("float32") if a.dtype == "bfloat16" else a, small)
    rows = packing.batches(packing.training_rows(tokens, row=t.length, seed=config.seed + 1), t.batch)
    adapters = tuned(small, iter(rows), t, jax.random.key(config.seed))
    found[name] = dict(
      bytes=maps.bytes_of(stored(small)),
      adapters=sum(leaf.size for leaf in jax.tree.leaves((adapters.a, adapters.b))),
      before=perplexity(subject, small),
      after=perplexity(subject, lora.merge(small, adapters)),
    )
  return found


def tuned(model: Transformer, batches, t, key: jax.Array, made: Callable = lambda model: model) -> lora.Lora:
  """Adapters of every map of the blocks after t.steps of Adam.

  Args:
    made: what becomes of the model with its adapters before its loss is taken.

  Raises:
    InputError: a loss that is no number.
  """
  adapters = lora.init(model, key, rank=t.rank, alpha=2 * t.rank, where=lambda name: name.startswith("blocks."))
  optimizer = adam(t.rate, steps=t.steps, warmup=max(1, t.steps // 10))

  @jax.jit
  def step(adapters, state, model, batch):
    loss = lambda adapters: language_model_loss(made(lora.merge(model, adapters)), batch)[0]
    value, slope = jax.value_and_grad(loss)(adapters)
    updates, state = optimizer.update(slope, state)
    return optax.apply_updates(adapters, updates), state, value

  state = optimizer.init(adapters)
  for _ in range(t.steps):
    adapters, state, value = step(adapters, state, model, next(batches))
  require(bool(np.isfinite(value)), f"the loss is {value} after {t.steps} steps; lower tuning.rate")
  return adapters
