"""Rivals of STRUPRUNE that look at gradients of the whole network, and groups left out by weights or by chance."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compressing import Subject, sizes
from jaxlab.models import Transformer, maps
from jaxlab.training.losses import mean_loss, token_losses
from jaxlab.weights import structured, struprune
from jaxlab.weights.structured import Groups


@functools.partial(jax.jit, static_argnames="config")
def _slopes(blocks, model: Transformer, row, *, config):
  """|g w| of every number in the blocks' maps for one row of text."""

  def loss(blocks):
    changed = maps.with_blocks(model, blocks)
    inputs, targets = row[None, :-1], row[None, 1:]
    return mean_loss(token_losses(changed, changed.hidden(inputs), targets), targets)

  slopes = maps.named(jax.grad(loss)(blocks))
  products = {name: one.weight[...] * slopes[name].weight[...] for name, one in maps.named(blocks).items()}
  return _by_group({name: jnp.abs(a) for name, a in products.items()}, config), _by_group(products, config)


def _by_group(products: Mapping, config) -> Groups:
  heads = lambda a: a.reshape(len(a), config.kv_heads, -1).sum(axis=-1)
  inputs = {name: products[name].sum(axis=2 if name in structured.ENDS else 1) for name in products}
  neurons = [a for name, a in inputs.items() if name.startswith("mlp.")]
  return Groups(sum(heads(inputs[name]) for name in ("q", "k", "v", "o")), sum(neurons))


def taylor(model: Transformer, rows) -> dict[str, Groups]:
  """What leaving a group out costs by the gradients of rows of text, one row at a time.

  Returns:
    {"element": sum of |g w| over a group's numbers (LLM-Pruner); "group": mean over rows of |sum of g w|; "fisher": of
    its square}.
  """
  total = None
  for row in rows:
    element, group = _slopes(model.blocks, model, jnp.asarray(row), config=model.config)
    new = {"element": element, "group": jax.tree.map(jnp.abs, group), "fisher": jax.tree.map(jnp.square, group)}
    total = new if total is None else jax.tree.map(jnp.add, total, new)
  return jax.tree.map(lambda a: np.asarray(a) / len(rows), total)


def makers(config, subject: Subject, loss: Callable) -> dict[str, Callable[[float], Transformer]]:
  """{method: share of the blocks' parameters -> the pruned model}.

  Args:
    loss: of a model, to choose a rival's own settings by.
  """
  model, text, batch = subject.model, subject.calibration, sizes(config.text, subject).batch
  c = model.config
  whole = structured.dense_parameters(c)
  evaluate = jax.jit(lambda keep: loss(structured.masked(model, keep)))
  found = functools.cache(lambda: taylor(model, subject.calibration[: config.gradient_rows]))
  how = dict(batch=batch)

  def best(keeps: list[Groups]) -> Groups:
    return min(keeps, key=lambda keep: float(evaluate(keep)))

  @functools.cache
  def oracle_keep(budget: float) -> Groups:
    """One order over the whole network by gradients, of three ways to sum them the one of the least loss."""
    head, neuron = structured.costs(c)
    ranks = [Groups(one.heads / head, one.neurons / neuron) for one in found().values()]
    return best([structured.in_order(rank, c, numbers=budget * whole) for rank in ranks])

  def llm_pruner(budget: float) -> Transformer:
    """One share for the layers in the middle; those that are spared at the ends are as many as have the least loss."""
    score, keeps = found()["element"], []
    for first, last in config.spared:
      first, last = (round(share * c.depth) for share in (first, last))
      inner = slice(first, c.depth - last)
      share = 1 - (1 - budget) * c.depth / (c.depth - first - last)
      keep = Groups(np.ones((c.depth, c.kv_heads), bool), np.ones((c.depth, c.mlp_width), bool))
      middle = dataclasses.replace(c, depth=c.depth - first - last, layer_windows=None)
      if share < structured.least_share(middle, structured.ONE):
        continue
      part = structured.uniform(jax.tree.map(lambda a, inner=inner: a[inner], score), middle, budget=share)
      keep.heads[inner], keep.neurons[inner] = part.heads, part.neurons
      keeps.append(keep)
    return structured.sliced(model, best(keeps))

  def oracle_rebuilt(budget: float) -> Transformer:
    """As many groups a layer as the oracle keeps, chosen and fitted as STRUPRUNE's, biases within the budget."""
    keep = oracle_keep(budget - 2 * c.depth * c.width / whole)
    counts = keep.heads.sum(axis=1), keep.neurons.sum(axis=1)
    return struprune.rebuild(model, text, *counts, options=options(config), **how)

  def chance(budget: float) -> Transformer:
    rng = np.random.default_rng(config.seed)
    score = Groups(rng.random((c.depth, c.kv_heads)), rng.random((c.depth, c.mlp_width)))
    return structured.sliced(model, structured.uniform(score, c, budget=budget))

  def magnitude(budget: float) -> Transformer:
    score = structured.scores(model, text[:batch], structured.magnitude, batch=batch)
    return structured.sliced(model, structured.uniform(score, c, budget=budget))

  return {
    "oracle": lambda budget: structured.sliced(model, oracle_keep(budget)),
    "oracle+rebuilt": oracle_rebuilt,
    "llm_pruner": llm_pruner,
    "wanda_sp": lambda budget: structured.wanda_sp(model, text, budget=budget, **how),
    "flap": lambda budget: structured.flap(model, text, budget=budget, **how),
    "magnitude": magnitude,
    "random": chance,
  }


def options(config) -> struprune.Options:
  """Those of the config."""
  s = config.solver
  admm = struprune.Admm(stages=s.stages, iterations=s.iterations)
  return struprune.Options(admm=admm, split=struprune.Split(outer=s.outer))
