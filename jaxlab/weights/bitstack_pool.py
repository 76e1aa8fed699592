r"""A pool for BitStack's blocks (`bitstack`): a network that grows and shrinks on the device and compiles nothing.

All blocks stay in host memory in the order in which they are loaded. On the device blocks of one shape share arrays of
a capacity that does not change; a table says where each map's blocks lie, a count how many of them are in use.

  shelf = Shelf(stacks, order, capacity=most)                  # bytes of the largest size that will be wanted
  pool = shelf.load(budget)
  tokens = generate(pool.network, prompts, tokens=64)          # or `inference.step`: one program for every size
  pool = shelf.shrink(pool, less)                              # lowers counts
  pool = shelf.grow(pool, more)                                # writes the blocks that come next, and no others

Every size is that of `bitstack.at_budget` at the budget. The pool takes the bytes of its capacity throughout.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from jaxlab.core.checks import require
from jaxlab.models import Transformer, maps
from jaxlab.models.inference import Network, take_apart
from jaxlab.models.packed_maps import SignStack, unpack_signs
from jaxlab.weights.bitstack import Block, at_budget, configurations, stacks_of

_Arrays = tuple[Array, Array, Array]  # signs, U and V, a leading axis of places


class PooledStack(nnx.Module):
  """As `SignStack` of one layer, block i at place table[i] of arrays that other maps share.

  signs: uint8 (places, outputs, ceil(inputs / 8)); u: (places, outputs, rank); v: (places, rank, inputs); scale:
  (inputs,) or None; table: int32 (blocks,); count: int32 (), the blocks in use. Only those are read, in a loop whose
  length is data: it has no gradient in reverse.
  """

  def __init__(self, signs: UInt8[Array, "places outputs bytes"], u, v, scale, table: Int[Array, "blocks"], count):
    self.signs, self.u, self.v = nnx.Param(signs), nnx.Param(u), nnx.Param(v)
    self.scale = None if scale is None else nnx.Param(scale)
    self.table, self.count = nnx.Param(table), nnx.Param(count)

  def weight(self) -> Float[Array, "outputs inputs"]:
    """W in float32, block after block."""
    signs, u, v, table = (one[...] for one in (self.signs, self.u, self.v, self.table))

    def add(i, total):
      packed, left, right = (a[table[i]] for a in (signs, u, v))
      return total + unpack_signs(packed, v.shape[-1]) * (left.astype(jnp.float32) @ right.astype(jnp.float32))

    return jax.lax.fori_loop(0, self.count[...], add, jnp.zeros((u.shape[1], v.shape[-1])))

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    x = x if self.scale is None else x / self.scale[...].astype(x.dtype)
    return x @ self.weight().T.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Pool:
  """A network at a size, as `generate` and `inference` take it.

  budget: bytes that were allowed; size: bytes of the blocks in use and of all else, as `configurations` counts them.
  """

  network: Network
  budget: int
  size: int
  arrays: dict[tuple, _Arrays]


class Shelf:
  """All blocks of a decomposed model in host memory, in the order in which they are loaded.

  Args:
    order: of `sort_blocks` or `level_order`; capacity: the largest budget that will be asked for, in bytes.

  Raises:
    InputError: a model without stacks, an order that `configurations` refuses, a capacity below one block of every map.
  """

  def __init__(self, model: Transformer, order: Sequence[Block], *, capacity: int):
    stacks, made = stacks_of(model), configurations(model, order)
    self._capacity = capacity
    self._made = [one for one in made if one[0] <= capacity]
    require(bool(self._made), f"capacity is {capacity} bytes; one block of every map takes {made[0][0]}")
    self._blocks = {name: [np.asarray(a[...]) for a in (one.signs, one.u, one.v)] for name, one in stacks.items()}
    # Loaded is always a beginning of the order, so that a block's place never changes.
    first = [(name, layer, 1) for name, one in stacks.items() for layer in range(len(one.count[...]))]
    self._order = first + list(order[: len(self._made) - 1])
    self._first = len(first)
    self._table = {name: np.zeros(one.u.shape[:2], np.int32) for name, one in stacks.items()}
    self._places: dict[tuple, int] = {}
    for name, layer, number in self._order:
      shape = self._shape(name)
      self._table[name][layer, number - 1] = self._places.setdefault(shape, 0)
      self._places[shape] += 1
    # What is not in blocks; its stacks, of one block each, give way to the pool's.
    self._rest = take_apart(at_budget(model, (), budget=made[0][0]))

  def load(self, budget: int) -> Pool:
    """The network at the largest size within a budget of bytes.

    Raises:
      InputError: a budget above the capacity or below one block of every map.
    """
    empty = lambda shape, places: tuple(
      jnp.zeros((places, *one), dtype) for one, dtype in zip(shape, (jnp.uint8, jnp.float16, jnp.float16), strict=True)
    )
    self._at(budget)
    return self._moved({shape: empty(shape, places) for shape, places in self._places.items()}, budget, 0)

  def grow(self, pool: Pool, more: int) -> Pool:
    """So many bytes more are allowed. The pool that is given is used up: its arrays are written in place.

    Raises:
      InputError: less than 0 bytes, or a budget above the capacity.
    """
    require(more >= 0, f"more is {more} bytes; it must be 0 or above, or shrink the pool")
    self._at(pool.budget + more)
    return self._moved(dict(pool.arrays), pool.budget + more, self._first + self._at(pool.budget))

  def shrink(self, pool: Pool, less: int) -> Pool:
    """So many bytes less are allowed; `grow` by as many gives the same network again.

    Raises:
      InputError: less than 0 bytes, or a budget below one block of every map.
    """
    require(less >= 0, f"less is {less} bytes; it must be 0 or above, or grow the pool")
    return self._moved(dict(pool.arrays), pool.budget - less, len(self._order))

  def _shape(self, name: str) -> tuple:
    return tuple(a.shape[2:] for a in self._blocks[name])

  def _at(self, budget: int) -> int:
    """How many blocks of the order come within a budget."""
    least = self._made[0][0]
    require(least <= budget, f"budget is {budget} bytes; one block of every map takes {least}")
    require(budget <= self._capacity, f"budget is {budget} bytes; the pool's capacity is {self._capacity}")
    return bisect.bisect_right([size for size, _ in self._made], budget) - 1

  def _moved(self, arrays: dict[tuple, _Arrays], budget: int, start: int) -> Pool:
    """The pool at a budget, the blocks from number `start` of the order on written."""
    at = self._at(budget)
    for name, layer, number in self._order[start : self._first + at]:
      shape, place = self._shape(name), self._table[name][layer, number - 1]
      arrays[shape] = _put(arrays[shape], place, tuple(a[layer, number - 1] for a in self._blocks[name]))
    size, counts = self._made[at]
    blocks = []
    for layer, block in enumerate(self._rest.blocks):
      forms = {}
      for name, one in maps.parts(block).items():
        if isinstance(one, SignStack):
          where = jnp.asarray(self._table[name][layer]), jnp.asarray(counts[name][layer])
          scale = None if one.scale is None else one.scale[...]
          forms[name] = PooledStack(*arrays[self._shape(name)], scale, *where)
      blocks.append(maps.replaced(block, forms))
    return Pool(Network(self._rest.model, tuple(blocks)), budget, size, arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _put(arrays: _Arrays, place: Int[Array, ""], block: _Arrays) -> _Arrays:
  """The arrays with a block at a place, in the memory of those given."""
  return tuple(jax.lax.dynamic_update_index_in_dim(a, b, place, 0) for a, b in zip(arrays, block, strict=True))
