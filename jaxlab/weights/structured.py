"""Whole heads and neurons taken out of a network: their scores, which are kept, and the smaller network.

  found = scores(model, tokens, wanda)                                   # Groups: a number for every group
  keep = uniform(found, model.config, budget=0.8)                        # Groups: a truth value for every group
  small = sliced(model, keep)

A group is what goes as a whole: a key-value head with the queries that read it, or a neuron of the MLP. Layers may end
at different sizes: stacked they are filled with zeros, which `generate` and a saved folder leave out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.models import Transformer, maps
from jaxlab.models.block import Block
from jaxlab.models.config import TransformerConfig
from jaxlab.models.layers import Linear
from jaxlab.models.map_forms import Affine
from jaxlab.weights.calibration import Moments, layer_by_layer, require_transformer

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


def dense_parameters(config: TransformerConfig) -> int:
  """Of the blocks' maps with all groups."""
  head, neuron = costs(config)
  return config.depth * (config.kv_heads * head + config.mlp_width * neuron)


def require_prunable(model: Transformer) -> None:
  """Raises InputError for a model whose heads and neurons are more than rows and columns of plain matrices."""
  require_transformer(model)
  c = model.config
  require(not (c.experts or c.hyper), "pruning is of dense blocks, without experts and hyper-connections")
  require(not c.value_embeddings, "pruning is of models without value embeddings, whose heads have tables of their own")
  require(not c.ragged, "this model was pruned before to layers of unequal sizes; prune the original one")
  require(maps.all_plain(model.blocks), "pruning is of plain matrices; prune first, then give maps another form")


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
  return jax.tree.map(lambda a: a / np.maximum(a.mean(axis=1, keepdims=True), 1e-30), found)


def standardised(found: Groups) -> Groups:
  """(score - mean) / standard deviation within kind and layer (FLAP)."""
  return jax.tree.map(lambda a: (a - a.mean(axis=1, keepdims=True)) / a.std(axis=1, keepdims=True, ddof=1), found)


def top(found: Array, count) -> np.ndarray:
  """Whether each of the last axis' numbers is among its `count` largest; the first ones of equals."""
  order = np.argsort(-np.asarray(found), axis=-1, kind="stable")
  return np.argsort(order, axis=-1, kind="stable") < np.asarray(count)[..., None]


class Least(NamedTuple):
  """Groups of heads and neurons that every layer keeps."""

  heads: int = 1
  neurons: int = 64


ONE = Least(1, 1)


def least_of(config: TransformerConfig, least: Least) -> tuple[int, int]:
  """No more than there are."""
  return min(least.heads, config.kv_heads), min(least.neurons, config.mlp_width)


def least_share(config: TransformerConfig, least: Least) -> float:
  """What every layer keeps at least, as a share of the blocks' parameters."""
  head, neuron = costs(config)
  heads, neurons = least_of(config, least)
  return config.depth * (heads * head + neurons * neuron) / dense_parameters(config)


def require_room(config: TransformerConfig, numbers: float, least: Least) -> None:
  """Raises InputError where what every layer keeps at least takes more than so many parameters."""
  taken, given = least_share(config, least), numbers / dense_parameters(config)
  said = f"the budget leaves {given:.4g} of the blocks' parameters; what every layer keeps takes"
  require(taken <= given, f"{said} {taken:.4g}, raise it")


def in_order(rank: Groups, config: TransformerConfig, *, numbers: float, least: Least = ONE) -> Groups:
  """The groups of the highest rank that fit into so many parameters, of all layers together, and the least of each.

  Raises:
    InputError: what every layer keeps at least takes more.
  """
  require_room(config, numbers, least)
  parts = [np.asarray(rank.heads, np.float64), np.asarray(rank.neurons, np.float64)]
  forced = [top(a, np.full(len(a), n)) for a, n in zip(parts, least_of(config, least), strict=True)]
  keep = np.concatenate([a.ravel() for a in forced])
  price = np.concatenate([np.full(a.size, c) for a, c in zip(parts, costs(config), strict=True)])
  left = numbers - price[keep].sum()
  for group in np.argsort(-np.concatenate([a.ravel() for a in parts]), kind="stable"):
    if not keep[group] and price[group] <= left:
      keep[group], left = True, left - price[group]
  heads, neurons = np.split(keep, [parts[0].size])
  return Groups(heads.reshape(parts[0].shape), neurons.reshape(parts[1].shape))


def counts(
  shares, config: TransformerConfig, *, numbers: float, least: Least = ONE, multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
  """(key-value heads, neurons) of every layer: whole ones of the shares that are kept, within so many parameters.

  Args:
    shares: (layers, 2) of the heads and of the neurons; multiple: neurons are a multiple of it where they are not all.

  Rounded down at first; then up where the most was lost, while it fits; what is left over is neurons, by their share.
  """
  require_room(config, numbers, least)
  head, neuron = costs(config)
  full = np.array([config.kv_heads, config.mlp_width])
  floor = np.array(least_of(config, least))
  step = np.array([1, multiple])
  wanted = np.clip(np.asarray(shares) * full, floor, full)
  kept = np.maximum(np.floor(wanted / step + 1e-9).astype(int) * step, floor)
  price = np.array([head, neuron])
  left = numbers - (kept * price).sum()
  while left < 0:  # the least numbers took more than their share: from where the most is
    spare = np.where(kept - step >= floor, kept / full, -1)
    place = np.unravel_index(spare.argmax(), spare.shape)
    kept[place] -= step[place[1]]
    left += price[place[1]] * step[place[1]]
  lost = np.round((wanted - kept) / step, 9)  # equal shares are not told apart by rounding
  for place in zip(*np.unravel_index(np.argsort(-lost, axis=None, kind="stable"), lost.shape), strict=True):
    more = min(step[place[1]], full[place[1]] - kept[place])
    if lost[place] > 1e-9 and more and price[place[1]] * more <= left:
      kept[place] += more
      left -= price[place[1]] * more
  while True:
    room = (kept[:, 1] < full[1]) & (np.minimum(multiple, full[1] - kept[:, 1]) * neuron <= left)
    if not room.any():
      return kept[:, 0], kept[:, 1]
    layer = np.where(room, np.round(wanted[:, 1] - kept[:, 1], 9), -np.inf).argmax()
    more = min(multiple, full[1] - kept[layer, 1])
    kept[layer, 1] += more
    left -= neuron * more


def uniform(found: Groups, config: TransformerConfig, *, budget: float) -> Groups:
  """The same share of heads and of neurons in every layer, as far as whole ones go (`counts`), by their scores.

  Raises:
    InputError: a budget outside (0, 1], or too small for one of each.
  """
  heads, neurons = counts_at(budget, config)
  return Groups(top(found.heads, heads), top(found.neurons, neurons))


def counts_at(budget: float, config: TransformerConfig) -> tuple[np.ndarray, np.ndarray]:
  """`counts` of one share for all layers."""
  require(0 < budget <= 1, f"budget is {budget}; it must lie in 0 < budget <= 1")
  return counts(np.full((config.depth, 2), budget), config, numbers=budget * dense_parameters(config))


def wanda_sp(model: Transformer, tokens: Int[Array, "rows time"], *, budget: float, batch: int = 8) -> Transformer:
  """Wanda-sp (An et al. 2024): `wanda` and one share for all layers, later ones reading what pruned ones give.

  Raises:
    InputError: as `uniform` and `layer_by_layer`.
  """
  require_prunable(model)
  made, c, keeps = jax.jit(wanda), model.config, {name: [] for name in ENDS}
  kept = dict(zip(ENDS, counts_at(budget, c), strict=True))

  def visit(layer, block, inputs):
    found = {}
    for name, groups in zip(ENDS, (c.kv_heads, c.mlp_width), strict=True):
      weight = maps.named(block)[name].weight[...]
      score = by_group(made(weight.astype(jnp.float32), inputs[name]), groups)
      keeps[name].append(top(score, kept[name][layer]))
      mask = jnp.repeat(jnp.asarray(keeps[name][-1]), len(weight) // groups)
      found[name] = Linear(jnp.where(mask[:, None], weight, 0), maps.named(block)[name].weight.axes)
    return found

  layer_by_layer(model, tokens, visit, batch=batch, sequential=True)
  return sliced(model, Groups(*(np.stack(keeps[name]) for name in ENDS)))


def flap(model: Transformer, tokens: Int[Array, "rows time"], *, budget: float, batch: int = 8) -> Transformer:
  """FLAP (An et al. 2024): `fluctuation`, squared for heads, standardised within a layer, one order for all groups, and
  biases for what is left out on average.

  Raises:
    InputError: as `in_order` and `layer_by_layer`.
  """
  require_prunable(model)
  made, c = jax.jit(fluctuation), model.config
  found, means = ({name: [] for name in ENDS} for _ in range(2))

  def visit(layer, block, inputs):
    for name in ENDS:
      weight = maps.named(block)[name].weight[...].astype(jnp.float32)
      found[name].append(made(weight, inputs[name]))
      means[name].append(inputs[name].mean)
    return {}

  layer_by_layer(model, tokens, visit, batch=batch)
  heads, neurons = (np.stack(found[name]).astype(np.float64) for name in ENDS)
  rank = standardised(Groups(heads**2, neurons))
  rank = Groups(rank.heads.reshape(c.depth, c.kv_heads, -1).mean(axis=-1), rank.neurons)
  keep = in_order(rank, c, numbers=budget * dense_parameters(c) - 2 * c.depth * c.width)
  biases = {}
  for name, kept in zip(ENDS, (keep.heads, keep.neurons), strict=True):
    weight, mean = np.asarray(maps.named(model.blocks)[name].weight[...], np.float32), np.stack(means[name])
    left_out = ~np.repeat(kept, weight.shape[1] // kept.shape[1], axis=1)
    biases[name] = np.einsum("lc,lcr->lr", mean * left_out, weight)
  return sliced(model, keep, biases)


def masked(model: Transformer, keep: Groups) -> Transformer:
  """The model with what groups give multiplied by `keep`, which may be traced: one program for all choices.

  Values and the MLP's up are what is multiplied: all that reads them is then as if a group were not there.
  """
  c, found = model.config, maps.named(model.blocks)
  columns = {"v": jnp.repeat(jnp.asarray(keep.heads), c.head_dim, axis=1), "mlp.up": jnp.asarray(keep.neurons)}
  scale = lambda one, a: Linear(one.weight[...] * a[:, None].astype(one.weight.dtype), one.weight.axes)
  return maps.with_blocks(
    model, maps.replaced(model.blocks, {name: scale(found[name], a) for name, a in columns.items()})
  )


def zeroed(model: Transformer) -> Transformer:
  """The model with zeros where layers are filled up, whatever tuning has put there."""
  c = model.config
  if not c.ragged:
    return model
  own = [c.of_layer(layer) for layer in range(c.depth)]
  below = lambda sizes, most: np.arange(most) < np.array(sizes)[:, None]
  heads, neurons = [one.kv_heads for one in own], [one.mlp_width for one in own]
  return masked(model, Groups(below(heads, c.kv_heads), below(neurons, c.mlp_width)))


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
      block = maps.replaced(block, {name: Affine(weight, np.asarray(bias[layer], weight.dtype))})
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
    made[name] = Affine(weight, one.bias[...]) if isinstance(one, Affine) else Linear(weight, one.weight.axes)
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
