"""Whole heads and neurons taken out of a network: their scores, which are kept, and the smaller network.

  found = scores(model, tokens, wanda)                                   # Groups: a number for every group
  keep = uniform(found, model.config, budget=0.8)                        # Groups: a truth value for every group
  small = sliced(model, keep)

A group is what goes as a whole: a key-value head with the queries that read it, or a neuron of the MLP. Layers may end
at different sizes: stacked they are filled with zeros, which `generate` and a saved folder leave out.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.models import Transformer, maps
from jaxlab.models.block import Block
from jaxlab.models.config import TransformerConfig
from jaxlab.models.layers import Linear
from jaxlab.weights.calibration import Moments, layer_by_layer

ENDS = ("o", "mlp.down")  # the maps that read a group's outputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
  """A score of every group, or whether it is kept. heads: (layers, kv_heads); neurons: (layers, mlp_width)."""

  heads: Array
  neurons: Array


def costs(config: TransformerConfig) -> tuple[int, int]:
  """Parameters of a group of heads and of a neuron."""
  heads = config.width * config.head_dim * (2 * config.q_heads // config.kv_heads + 2)
  return heads, config.width * (3 if config.mlp == "swiglu" else 2)


def parameters(keep: Groups, config: TransformerConfig) -> int:
  """Of the blocks' maps with what is kept."""
  head, neuron = costs(config)
  return int(np.sum(np.asarray(keep.heads))) * head + int(np.sum(np.asarray(keep.neurons))) * neuron


def require_prunable(model: Transformer) -> None:
  """Raises InputError for a model whose heads and neurons are more than rows and columns of plain matrices."""
  c = model.config
  require(not (c.experts or c.hyper), "pruning is of dense blocks, without experts and hyper-connections")
  require(not c.value_embeddings, "pruning is of models without value embeddings, whose heads have tables of their own")
  require(maps.all_plain(model.blocks), "pruning is of plain matrices; prune first, then give maps another form")
  require(not c.ragged, "this model was pruned before to layers of unequal sizes; prune the original one")


def wanda(weight: Float[Array, "inputs outputs"], x: Moments) -> Float[Array, "inputs"]:
  """|W_cr| sqrt(mean x_c^2), its mean over outputs r (Wanda-sp, An et al. 2024)."""
  return jnp.abs(weight).mean(axis=1) * jnp.sqrt(jnp.diagonal(x.second))


def energy(weight: Float[Array, "inputs outputs"], x: Moments) -> Float[Array, "inputs"]:
  """mean x_c^2 sum_r W_cr^2: the squared error of the outputs where c is left out and inputs are uncorrelated."""
  return jnp.square(weight).sum(axis=1) * jnp.diagonal(x.second)


def fluctuation(weight: Float[Array, "inputs outputs"], x: Moments) -> Float[Array, "inputs"]:
  """var x_c sum_r W_cr^2: `energy` where the mean of what is left out stays as a bias (FLAP's WIFV, An et al. 2024)."""
  return jnp.square(weight).sum(axis=1) * jnp.diagonal(x.covariance)


def magnitude(weight: Float[Array, "inputs outputs"], x: Moments) -> Float[Array, "inputs"]:
  """The norm of the weights that read c."""
  return jnp.linalg.norm(weight, axis=1)


def by_group(found: Float[Array, "inputs"], groups: int) -> Float[Array, "groups"]:
  """Sums over the channels of a group."""
  return found.reshape(groups, -1).sum(axis=1)


def scores(model: Transformer, tokens: Int[Array, "rows time"], how: Callable, *, batch: int = 8) -> Groups:
  """Of every group by `how` (weight, moments of what it reads) -> a number for every input, summed over a group's.

  One pass over the calibration text, one layer at a time.
  """
  require_prunable(model)
  made, found = jax.jit(how), {name: [] for name in ENDS}

  def visit(layer, block, inputs):
    one = maps.named(block)
    for name in ENDS:
      found[name].append(made(one[name].weight[...].astype(jnp.float32), inputs[name]))
    return {}

  layer_by_layer(model, tokens, visit, batch=batch)
  return grouped(*(np.stack(found[name]) for name in ENDS), model.config)


def grouped(heads, neurons, config: TransformerConfig) -> Groups:
  """Numbers for every input of o and of down, (layers, inputs), as sums over groups."""
  return Groups(np.asarray(heads).reshape(len(heads), config.kv_heads, -1).sum(axis=-1), np.asarray(neurons))


def normalised(found: Groups) -> Groups:
  """Scores over the mean of those of their kind and layer, so that layers compare."""
  return jax.tree.map(lambda a: a / a.mean(axis=1, keepdims=True), found)


def standardised(found: Groups) -> Groups:
  """(score - mean) / standard deviation within kind and layer (FLAP)."""
  return jax.tree.map(lambda a: (a - a.mean(axis=1, keepdims=True)) / a.std(axis=1, keepdims=True, ddof=1), found)


def top(found: Array, count) -> np.ndarray:
  """Whether each of the last axis' numbers is among its `count` largest; the first ones of equals."""
  order = np.argsort(-np.asarray(found), axis=-1, kind="stable")
  return np.argsort(order, axis=-1, kind="stable") < np.asarray(count)[..., None]


def uniform(found: Groups, config: TransformerConfig, *, budget: float) -> Groups:
  """The same share of heads and of neurons in every layer, at least one each, by their scores.

  Raises:
    InputError: a budget outside (0, 1].
  """
  require(0 < budget <= 1, f"budget is {budget}; it must lie in 0 < budget <= 1")
  count = lambda a: np.full(len(a), max(1, int(budget * a.shape[1] + 1e-9)))
  return jax.tree.map(lambda a: top(a, count(a)), found)


def masked(model: Transformer, keep: Groups) -> Transformer:
  """The model with what groups give multiplied by `keep`, which may be traced: one program for all choices."""
  c, found = model.config, maps.named(model.blocks)
  rows = (jnp.repeat(jnp.asarray(keep.heads), c.q_heads // c.kv_heads * c.head_dim, axis=1), jnp.asarray(keep.neurons))
  scale = lambda one, a: Linear(one.weight[...] * a[..., None].astype(one.weight.dtype), one.weight.axes)
  ends = {name: scale(found[name], a) for name, a in zip(ENDS, rows, strict=True)}
  return maps.with_blocks(model, maps.replaced(model.blocks, ends))


def sliced(model: Transformer, keep: Groups, biases: Mapping[str, Array] | None = None) -> Transformer:
  """The network of the groups that are kept.

  Args:
    biases: {"o" or "mlp.down": (layers, width)} what is added to their outputs.

  Raises:
    InputError: a layer without heads or neurons, or a model that cannot be pruned.
  """
  require_prunable(model)
  heads, neurons = np.asarray(keep.heads), np.asarray(keep.neurons)
  host = jax.tree.map(np.asarray, model.blocks)
  blocks = []
  for layer in range(model.depth):
    block = slice_block(jax.tree.map(lambda a: a[layer], host), heads[layer], neurons[layer])  # noqa: B023
    for name, bias in (biases or {}).items():
      weight = maps.named(block)[name].weight[...]
      block = maps.replaced(block, {name: maps.Affine(weight, np.asarray(bias[layer], weight.dtype))})
    blocks.append(block)
  return joined(model, blocks)


def slice_block(block: Block, heads, neurons) -> Block:
  """One layer with the heads and neurons of two masks, its arrays on the host.

  Raises:
    InputError: none of them is kept.
  """
  require(heads.any() and neurons.any(), "a layer is left without heads or neurons; keep at least one of each")
  c = block.config
  queries = np.repeat(heads, c.q_heads // c.kv_heads * c.head_dim)
  rows = {"q": queries, "k": np.repeat(heads, c.head_dim), "o": queries}
  rows = {name: rows.get(name, rows["k"]) for name in ("q", "k", "v", "o")}
  made = {}
  for name, one in maps.named(block).items():
    kept = rows.get(name, neurons)
    cut = lambda a, kept=kept, end=name in ENDS: np.asarray(a)[kept] if end else np.asarray(a)[:, kept]
    weight = cut(one.weight[...])
    made[name] = maps.Affine(weight, one.bias[...]) if isinstance(one, maps.Affine) else Linear(weight, one.weight.axes)
  block = maps.replaced(block, made)
  sizes = dict(kv_heads=int(heads.sum()), q_heads=int(heads.sum()) * (c.q_heads // c.kv_heads))
  block.config = dataclasses.replace(c, **sizes, mlp_width=int(neurons.sum()))
  return block


def joined(model: Transformer, blocks: list[Block]) -> Transformer:
  """The model with those layers, stacked: filled with zeros up to the largest where they differ.

  Of a model in host memory it stays there.
  """
  c = model.config
  heads = tuple(block.config.kv_heads for block in blocks)
  neurons = tuple(block.config.mlp_width for block in blocks)
  same = lambda sizes: None if len(set(sizes)) == 1 else sizes
  config = dataclasses.replace(
    c, kv_heads=max(heads), q_heads=max(heads) * (c.q_heads // c.kv_heads), mlp_width=max(neurons),
    layer_kv_heads=same(heads), layer_mlp_widths=same(neurons),
  )  # fmt: skip
  filled = lambda a, shape: np.pad(np.asarray(a), [(0, n - m) for n, m in zip(shape, a.shape, strict=True)])
  leaves, structures = zip(*(jax.tree.flatten(_of(block, config)) for block in blocks), strict=True)
  stacked, place = [], np.asarray if isinstance(jax.tree.leaves(model)[0], np.ndarray) else jnp.asarray
  for parts in zip(*leaves, strict=True):
    shape = np.max([part.shape for part in parts], axis=0) if np.ndim(parts[0]) else ()
    stacked.append(place(np.stack([filled(part, shape) for part in parts])))
  made = maps.with_blocks(model, None)
  made.config, made.blocks = config, jax.tree.unflatten(structures[0], stacked)
  return made


def _of(block: Block, config: TransformerConfig) -> Block:
  block = jax.tree.map(lambda a: a, block)
  block.config = config
  return block
