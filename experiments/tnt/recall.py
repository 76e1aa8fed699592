"""Pairs, then their keys in another order: what does a memory hold?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tnt.arms import Shape, fresh
from jaxlab.models import HNetConfig
from jaxlab.sequence.tnt import MemoryConfig, titans
from jaxlab.sequence.tnt_model import MemoryModelConfig
from jaxlab.training import losses, optimizers

LINEAR, DEEP = "linear", "MLP of 2 layers"
FORMS = {LINEAR: 1, DEEP: 2}
PROJECTED = ", queries projected"
TITANS, MAMBA, TRANSFORMER = "Titans", "Mamba-2", "Transformer"
NAMES = (*FORMS, *(name + PROJECTED for name in FORMS), TITANS, MAMBA, TRANSFORMER)


def shape_of(config, name: str) -> Shape:
  """One layer; two of attention, which finds what is behind a key by a layer that looks back by one."""
  r = config.recall
  vocabulary, sizes = 4 * r.pairs, dict(heads=r.width // r.head_dim, head_dim=r.head_dim)
  model = functools.partial(MemoryModelConfig, vocabulary, 1, 2 * r.width)
  if name in (MAMBA, TRANSFORMER):
    layout = "M1" if name == MAMBA else "T2"
    how = dict(windows=(None,), ratios=(), vocab_size=vocabulary, head_dim=r.head_dim, state=r.head_dim)
    return HNetConfig(layout, (r.width,), (2 * r.width,), (sizes["heads"],), **how)
  if name == TITANS:
    return model(titans(r.width, chunk=r.chunk, expansion=2, **sizes))
  projection = "shard" if name.endswith(PROJECTED) else None
  how = dict(global_chunk=None, local_chunks=(r.chunk,), shard=None, expansion=2, projection=projection)
  return model(MemoryConfig(r.width, layers=FORMS[name.removesuffix(PROJECTED)], **how, **sizes))


def batch(pairs: int, rows: int, key: jax.Array) -> dict:
  """Keys are of the first half of the ids, values of the second; targets are the values of the keys asked for."""
  keys, values, order = jax.random.split(key, 3)
  shuffled = lambda key, n: jax.random.permutation(key, jnp.tile(jnp.arange(n), (rows, 1)), axis=1, independent=True)
  written = shuffled(keys, 2 * pairs)[:, :pairs]
  said = jax.random.randint(values, (rows, pairs), 2 * pairs, 4 * pairs)
  asked = shuffled(order, pairs)
  take = lambda a: jnp.take_along_axis(a, asked, axis=1)
  inputs = jnp.concatenate([jnp.stack([written, said], axis=-1).reshape(rows, -1), take(written)], axis=1)
  targets = jnp.concatenate([jnp.full((rows, 2 * pairs), -1), take(said)], axis=1)
  return {"inputs": inputs.astype(jnp.int32), "targets": targets.astype(jnp.int32)}


def measure(config, name: str) -> dict:
  """Trained at all rates and from all seeds side by side; the rate is chosen on other rows than those it is told of.

  Returns:
    {rate, loss and accuracy (of the values asked for, one a seed)}.
  """
  r, shape = config.recall, shape_of(config, name)

  def run(rate, seed):
    model, optimizer = fresh(shape, seed), optimizers.adam(rate, steps=r.steps, warmup=r.steps // 10)
    starts = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), seed), 3)

    def step(carry, key):
      model, state = carry
      loss = lambda model: losses.language_model_loss(model, batch(r.pairs, r.rows, key))[0]
      updates, state = optimizer.update(jax.grad(loss)(model), state, model)
      return (jax.tree.map(jnp.add, model, updates), state), None

    (model, _), _ = jax.lax.scan(step, (model, optimizer.init(model)), jax.random.split(starts[0], r.steps))
    return jax.lax.map(lambda key: jnp.stack(judged(model, batch(r.pairs, r.held, key))), starts[1:])

  every = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))
  found = np.asarray(
    every(jnp.asarray(r.rates), jnp.arange(r.seeds))
  )  # rates, seeds, (validation, test), (loss, right)
  best = int(np.argmin(np.nan_to_num(found[:, :, 0, 0].mean(axis=1), nan=np.inf)))
  return {
    "rate": r.rates[best],
    "loss": found[best, :, 1, 0].tolist(),
    "accuracy": found[best, :, 1, 1].tolist(),
  }


def judged(model, batch: dict):
  """(mean loss, share of right answers) of the values asked for."""
  targets, log_p = batch["targets"], jax.nn.log_softmax(model.logits(*model.hidden(batch["inputs"])))
  counted = targets >= 0
  chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
  right = (log_p.argmax(axis=-1) == targets) & counted
  return losses.mean_loss(jnp.where(counted, -chosen, 0.0), targets), right.sum() / counted.sum()
