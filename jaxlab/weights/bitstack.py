r"""BitStack: a weight as a stack of blocks of about one bit, any number of which is a model (Wang et al. 2024,
arXiv 2410.23918).

  R_0 = W diag(s),  S_i = sign(R_i),  U_i V_i = the first k singular triplets of |R_i|,  R_{i+1} = R_i - S_i * (U_i V_i)

s_c is 1e-3 + the L2 norm of input c over the tokens of a row, averaged over rows, here over its geometric mean, so that
the factors stay in the range of float16. Activations are divided by s where a map is called, which is exact for every
architecture and counted, or, with `folded`, in what comes before where there is something (`folding`), as published.

  stacks = decompose(model, tokens, blocks=8)                          # the model with all blocks
  order = sort_blocks(score_blocks(stacks, loss))                      # once; the next to load comes first
  small = at_budget(stacks, order, budget=bytes)                       # any size, and `with_counts` within it
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_choice, require_counts
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import Linear
from jaxlab.models.map_forms import Factored, Product
from jaxlab.models.packed_maps import SignStack, pack_signs
from jaxlab.weights.calibration import Moments, layer_by_layer, require_transformer, with_maps
from jaxlab.weights.folding import fold, foldable
from jaxlab.weights.svd import triplets

ORDERS = ("average", "greedy", "random")
_FLOOR = 1e-3  # of an input's norm
Place = tuple[str, int]  # a map and its layer
Block = tuple[str, int, int]  # and the number of the block, from 1 on


@functools.partial(jax.jit, static_argnames=("blocks", "rank", "from_stored"))
def absolute_value_decomposition(
  weight: Float[Array, "outputs inputs"], *, blocks: int, rank: int, from_stored: bool = True
) -> tuple[Array, Array, Array, Float[Array, "blocks_plus_1"]]:
  """(signs packed, U, V in float16, squared Frobenius norms of the residuals R_0 .. R_blocks).

  Args:
    from_stored: residuals are of the factors as they are stored, so that the next block takes up their rounding; False
      is the published code's way.
  """

  def one(residual, _):
    left, values, right = triplets(jnp.abs(residual), rank)
    root = jnp.sqrt(values)
    u, v = left * root, root[:, None] * right
    stored = u.astype(jnp.float16), v.astype(jnp.float16)
    u, v = (a.astype(jnp.float32) for a in stored) if from_stored else (u, v)
    after = residual - jnp.where(residual < 0, -1.0, 1.0) * (u @ v)
    return after, (pack_signs(residual), *stored, (residual**2).sum())

  last, (signs, u, v, energy) = jax.lax.scan(one, weight.astype(jnp.float32), length=blocks)
  return signs, u, v, jnp.append(energy, (last**2).sum())


def input_scale(x: Moments) -> Float[Array, "inputs"]:
  """s of the inputs of one map, its geometric mean 1."""
  scale = x.norm + _FLOOR
  return scale / jnp.exp(jnp.log(scale).mean())


def decompose(
  model: Transformer,
  tokens: Int[Array, "rows time"],
  *,
  blocks: int = 16,
  rank: int = 16,
  scaled: bool = True,
  folded: bool = False,
  from_stored: bool = True,
  batch: int = 8,
) -> Transformer:
  """The model with every linear map of its blocks as a stack of all `blocks`, all in use; of a map of low rank both
  factors become one. A map of which one block takes more than all of it in 16 bits stays as it is.

  Args:
    scaled: False takes s = 1 (a comparison); folded: s goes into norms and earlier maps where they take it, which
      rounds it to the model's dtype; from_stored: as `absolute_value_decomposition`.

  Raises:
    InputError: counts below 1, a rank that a map cannot have or that leaves no map to decompose; and as
      `layer_by_layer`.
  """
  require_transformer(model)
  require_counts(blocks=blocks, rank=rank)
  split = {name: _matrices(name, one) for name, one in maps.named(model.blocks).items()}
  least = min(min(matrix.shape[-2:]) for matrices in split.values() for matrix in matrices)
  require(rank <= least, f"rank is {rank}; the smallest map takes 1..{least}")

  large = {name for name, matrices in split.items() if _shrinks(matrices, rank)}
  require(
    bool(large), f"one block of rank {rank} takes more bytes than the map in 16 bits, of every map; lower the rank"
  )

  whole = set()  # maps whose inputs are scaled already
  if folded:
    groups = foldable(model)
    norms = lambda layer, block, inputs: {group[0]: input_scale(inputs[group[0]]) for group in groups}
    model = fold(model, layer_by_layer(model, tokens, norms, batch=batch))
    whole = {name for group in groups for name in group}

  def stack(matrix, x: Moments, plain: bool = False) -> SignStack:
    # The factors are of what is stored: s in float16.
    scale = input_scale(x).astype(jnp.float16) if scaled and not plain else None
    weight = matrix.astype(jnp.float32).T
    weight = weight if scale is None else weight * scale.astype(jnp.float32)
    how = dict(blocks=blocks, rank=rank, from_stored=from_stored)
    return SignStack(*absolute_value_decomposition(weight, **how)[:3], scale, jnp.int32(blocks))

  def other(name: str, one, x: Moments):
    first, *second = _matrices(name, one)
    if not second:
      return stack(first, x, name in whole)
    bias = None if one.bias is None else one.bias[...]
    return Product(stack(first, x), stack(second[0], x.through(first)), bias, rank=first.shape[1])

  def visit(layer, block, inputs):
    return {name: other(name, one, inputs[name]) for name, one in maps.named(block).items() if name in large}

  return with_maps(model, layer_by_layer(model, tokens, visit, batch=batch))


def blocks_to_fill(model: Transformer, *, budget: int, rank: int = 16) -> int:
  """The fewest blocks of every map that take `budget` bytes or more with all else of the model: what to
  `decompose` into for a size that fills its budget.

  Raises:
    InputError: a budget below that of one block; a rank that leaves no map to decompose; a map that is neither plain
      nor of low rank.
  """
  require_transformer(model)
  split = [_matrices(name, one) for name, one in maps.named(model.blocks).items()]
  matrices = [matrix for one in split if _shrinks(one, rank) for matrix in one]
  require(
    bool(matrices), f"one block of rank {rank} takes more bytes than the map in 16 bits, of every map; lower the rank"
  )
  rest, block = maps.bytes_of(model) - maps.bytes_of(matrices), 0
  for matrix in matrices:
    own, beside = _bytes_of_a_stack(matrix, rank)
    block, rest = block + len(matrix) * own, rest + len(matrix) * beside
  require(budget >= rest + block, f"budget is {budget} bytes; one block of every map takes {rest + block}")
  return -(-(budget - rest) // block)


def _bytes_of_a_stack(matrix: Array, rank: int) -> tuple[int, int]:
  """(bytes of one block, those of the scale and the count) of a layer's matrix (*stack, inputs, outputs)."""
  inputs, outputs = matrix.shape[-2:]
  half, whole = (np.dtype(dtype).itemsize for dtype in (np.float16, np.int32))
  return outputs * -(-inputs // 8) + rank * (inputs + outputs) * half, inputs * half + whole


def _shrinks(matrices: Sequence[Array], rank: int) -> bool:
  """Whether one block of the map takes less than the map in 16 bits."""
  dense = sum(matrix.shape[-2] * matrix.shape[-1] for matrix in matrices) * np.dtype(np.float16).itemsize
  return sum(sum(_bytes_of_a_stack(matrix, rank)) for matrix in matrices) < dense


def _matrices(name: str, one) -> tuple[Array, ...]:
  """Of a plain map, or the two of a map of low rank."""
  plain = isinstance(one, Linear | Factored)
  require(plain, f"{name} is a {type(one).__name__}; only plain maps and those of low rank have stacks")
  return (one.weight[...],) if isinstance(one, Linear) else (one.down[...], one.up[...])


def stacks_of(model: Transformer) -> dict[str, SignStack]:
  """The stacks of a decomposed model by their map; of a map of low rank "q.down" and "q.up".

  Raises:
    InputError: a model that has none.
  """
  found = _stacks(model)
  require(bool(found), "this model holds no stacks of blocks; decompose it first")
  return found


def _stacks(model: Transformer) -> dict[str, SignStack]:
  return {name: one for name, one in maps.parts(model.blocks).items() if isinstance(one, SignStack)}


def with_counts(model: Transformer, counts: Mapping[str, Int[Array, "layers"]]) -> Transformer:
  """The model with other numbers of blocks in use, of those it holds; traced counts are allowed."""
  stacks = stacks_of(model)
  new = lambda one, count: SignStack(*_arrays(one), _scale(one), jnp.asarray(count, jnp.int32), one.held)
  return with_maps(model, {name: new(stacks[name], count) for name, count in counts.items()})


def _arrays(one: SignStack) -> tuple[Array, Array, Array]:
  return one.signs[...], one.u[...], one.v[...]


def _scale(one: SignStack) -> Array | None:
  return None if one.scale is None else one.scale[...]


def score_blocks(model: Transformer, loss: Callable[[Transformer], Float[Array, ""]]) -> dict[Block, float]:
  """{block: loss with it added while every stack holds one block less}; the lower, the more it is worth.

  One compiled program; depth x maps x (blocks - 1) evaluations. A loss that is not a number counts as the next level's
  plus the level's largest.

  Args:
    loss: mean negative log-likelihood on text like the calibration's, other rows of it.

  Raises:
    InputError: a loss that is no number at the last level.
  """
  stacks = stacks_of(model)
  blocks = next(iter(stacks.values())).u.shape[-3]
  evaluate = jax.jit(lambda model, counts: loss(with_counts(model, counts)))
  places = [(name, layer) for name, one in stacks.items() for layer in range(one.u.shape[0])]
  scores: dict[Block, float] = {}
  for level in range(blocks - 1, 0, -1):
    base = {name: np.full(one.u.shape[0], level, np.int32) for name, one in stacks.items()}
    found = {}
    for name, layer in places:
      counts = base | {name: np.where(np.arange(len(base[name])) == layer, level + 1, level).astype(np.int32)}
      found[name, layer] = float(evaluate(model, counts))
    scores |= {(*place, level + 1): value for place, value in _filled(found, scores, level, blocks).items()}
  return scores


def _filled(found: Mapping[Place, float], scores: Mapping[Block, float], level: int, blocks: int) -> dict[Place, float]:
  """Losses of a level with a number for each."""
  finite = [value for value in found.values() if not np.isnan(value)]
  if len(finite) == len(found):
    return dict(found)
  name, layer = next(place for place, value in found.items() if np.isnan(value))
  require(
    level < blocks - 1 and bool(finite), f"the loss with {level + 1} blocks of {name}, layer {layer}, is no number"
  )
  return {
    place: scores[*place, level + 2] + max(finite) if np.isnan(value) else value for place, value in found.items()
  }


def sort_blocks(scores: Mapping[Block, float], *, how: str = "average", seed: int = 0) -> list[Block]:
  """Blocks in the order in which they are loaded; the first block of every map is always there and in no order.

  "average": level after level, within a level by score (the published way). "greedy": by score over all levels.
  "random": at random. In each a map's blocks stay in their own order.
  """
  require_choice("how", how, ORDERS)
  if how == "average":
    return sorted(scores, key=lambda block: (block[2], scores[block]))
  if how == "random":
    rank = dict(zip(scores, np.random.default_rng(seed).permutation(len(scores)), strict=True))
  else:
    rank = scores
  # The next block of each map competes; a later one cannot pass it.
  waiting = {place: 2 for place in {block[:2] for block in scores}}
  order = []
  while waiting:
    place = min(waiting, key=lambda place: (rank[*place, waiting[place]], place))
    order.append((*place, waiting[place]))
    waiting[place] += 1
    if (*place, waiting[place]) not in scores:
      del waiting[place]
  return order


def bytes_in_use(model: Transformer) -> int:
  """`maps.bytes_of` without the blocks that are held but not in use, if there are any."""
  spare = lambda one: int(np.sum(_held(one) - np.asarray(one.count[...])))
  return maps.bytes_of(model) - sum(spare(one) * _block_bytes(one) for one in _stacks(model).values())


def _held(one: SignStack) -> np.ndarray:
  """The blocks that each layer has."""
  layers, blocks = one.u.shape[:2]
  return np.array(one.held or (blocks,) * layers)


def _block_bytes(one: SignStack) -> int:
  return maps.bytes_of((one.signs[0, 0], one.u[0, 0], one.v[0, 0]))


def level_order(model: Transformer) -> list[Block]:
  """An order without scores: one more block of every map in turn."""
  stacks = stacks_of(model)
  most = max(one.u.shape[-3] for one in stacks.values())
  return [
    (name, layer, number)
    for number in range(2, most + 1)
    for name, one in stacks.items()
    for layer in range(one.u.shape[0])
    if number <= _held(one)[layer]
  ]


def configurations(model: Transformer, order: Sequence[Block]) -> list[tuple[int, dict[str, np.ndarray]]]:
  """(bytes, blocks in use of every map and layer) after each block of the order, from one block each on.

  Bytes are of everything: what is not decomposed in its own dtype, scales, counts, and the blocks in use.
  """
  stacks = stacks_of(model)
  block = {name: _block_bytes(one) for name, one in stacks.items()}
  counts = {name: np.ones(one.u.shape[0], np.int32) for name, one in stacks.items()}
  size = bytes_in_use(with_counts(model, counts))
  made = [(size, dict(counts))]
  for name, layer, number in order:
    count = counts[name].copy()
    held = _held(stacks[name])[layer]
    require(number <= held, f"block {number} of {name}, layer {layer}, is not there; the model holds {held}")
    require(
      number == count[layer] + 1, f"block {number} of {name}, layer {layer}, comes before block {count[layer] + 1}"
    )
    count[layer] = number
    counts = counts | {name: count}
    size += block[name]
    made.append((size, dict(counts)))
  return made


def at_budget(model: Transformer, order: Sequence[Block], *, budget: int) -> Transformer:
  """The largest configuration of at most `budget` bytes, in use; the blocks that are not are gone.

  Stacked, layers are filled up with zeros to the most blocks that one of them has: no file has those, and a network
  that is taken apart loses them. `with_counts` may shrink it.

  Raises:
    InputError: a budget below the smallest configuration.
  """
  made = configurations(model, order)
  require(budget >= made[0][0], f"budget is {budget} bytes; one block of every map takes {made[0][0]}")
  _, counts = max((one for one in made if one[0] <= budget), key=lambda one: one[0])
  forms = {}
  for name, one in stacks_of(model).items():
    count, most = counts[name], int(counts[name].max())
    there = np.arange(most) < count[:, None]
    cut = [jnp.where(there[..., None, None], a[:, :most], 0) for a in _arrays(one)]
    held = None if there.all() else tuple(map(int, count))
    forms[name] = SignStack(*cut, _scale(one), jnp.asarray(count), held)
  return with_maps(model, forms)


def to_published(one: SignStack) -> list[dict[str, np.ndarray]]:
  """The blocks of one map in the order of bits of the published code: [{sign, u, vt}].

  sign: uint8, all signs row after row as one run of bits, the most significant first; u: (outputs, rank); vt: (rank,
  inputs); both float16.
  """
  outputs, inputs = one.u.shape[-2], one.v.shape[-1]
  bits = np.unpackbits(np.asarray(one.signs[...]), axis=-1, count=inputs)
  flat = np.packbits(bits.reshape(-1, outputs * inputs), axis=-1)
  parts = zip(flat, np.asarray(one.u[...]), np.asarray(one.v[...]), strict=True)
  return [dict(sign=sign, u=u, vt=vt) for sign, u, vt in parts]


def from_published(blocks: Sequence[Mapping[str, np.ndarray]], scale: Array | None = None) -> SignStack:
  """One map of blocks like those of `to_published`, all in use.

  Raises:
    InputError: no block, or signs that are not those of a matrix of u's rows and vt's columns.
  """
  require(len(blocks) > 0, "no block was given; give at least one")
  outputs, inputs = blocks[0]["u"].shape[0], blocks[0]["vt"].shape[1]
  size = -(-outputs * inputs // 8)
  for i, block in enumerate(blocks):
    found = block["sign"].shape
    require(found == (size,), f"the signs of block {i} have shape {found}; a {outputs} x {inputs} map takes ({size},)")
  bits = np.stack([np.unpackbits(block["sign"], count=outputs * inputs) for block in blocks])
  signs = np.packbits(bits.reshape(-1, outputs, inputs), axis=-1)
  u, v = (np.stack([block[name] for block in blocks]).astype(np.float16) for name in ("u", "vt"))
  return SignStack(jnp.asarray(signs), jnp.asarray(u), jnp.asarray(v), scale, jnp.int32(len(blocks)))
