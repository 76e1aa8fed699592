"""Mixtures whose experts have unequal widths, in tiles of hidden neurons.

An expert of n hidden neurons is ceil(n / tile) tiles of as many (the last filled with zeros). Experts stand in order of
width, the widest first, so that those that have a j-th tile are the first m_j, and their assignments the first rows:
level j is one ragged product of m_j groups. Parameters and arithmetic are those of the tiles.

A mixture stacked over layers holds, at each level, as many experts as the layer that has most; `of_layer` is one layer
without what it lacks, and what `inference.take_apart` and the files of `hub` hold.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.models.layers import Linear, MoE, Routing, mixed, route


class TiledExperts(nnx.Module):
  """In the place of `layers.MoE`: the same function with each expert at a width of its own.

  gates, ups: a level each, (*stack, m_j, width, tile); downs: (*stack, m_j, tile, width); widths: int32 (*stack,
  experts), descending; counts: for each layer the m_j of its own; skip_empty: no token goes to an expert of width 0.
  """

  kind = "tiled_experts"

  def __init__(
    self,
    router: Linear,
    gates: Sequence[Array],
    ups: Sequence[Array],
    downs: Sequence[Array],
    widths: Int[Array, "*stack experts"],
    *,
    active: int,
    normalize: bool,
    counts: tuple[tuple[int, ...], ...],
    skip_empty: bool = False,
  ):
    self.active, self.normalize, self.counts, self.skip_empty = active, normalize, counts, skip_empty
    self.router = router
    levels = lambda arrays, axes: nnx.List([nnx.Param(a, axes=axes) for a in arrays])
    self.gates = levels(gates, ("expert", "embed", None))
    self.ups = levels(ups, ("expert", "embed", None))
    self.downs = levels(downs, ("expert", None, "embed"))
    self.widths = nnx.Param(widths, axes=(None,))

  def route(self, tokens: Float[Array, "tokens width"]) -> Routing:
    logits = self.router(tokens)
    if self.skip_empty:
      logits = jnp.where(self.widths[...] > 0, logits, jnp.finfo(logits.dtype).min)
    return route(logits, active=self.active, normalize=self.normalize)

  def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    tokens = x.reshape(-1, x.shape[-1])
    routing = self.route(tokens)
    rows, out, row = jnp.take(tokens, routing.token, axis=0), 0, jnp.arange(len(routing.token))[:, None]
    for level, (gate, up, down) in enumerate(zip(self.gates, self.ups, self.downs, strict=True)):
      groups, _, tile = gate.shape
      have = self.widths[...][:groups] > level * tile
      sizes = jnp.where(have, routing.sizes[:groups], 0)
      matmul = lambda a, w, sizes=sizes: jax.lax.ragged_dot(a, w[...].astype(x.dtype), sizes)
      part = matmul(jax.nn.silu(matmul(rows, gate)) * matmul(rows, up), down)
      out = out + jnp.where(row < sizes.sum(), part, 0)  # a kernel need not write rows past the last group
    return mixed(tokens, out + jnp.zeros_like(rows), routing).reshape(x.shape)

  def of_layer(self, layer: int) -> "TiledExperts":
    """That layer alone, given without a leading axis, with the tiles it has."""
    cut = lambda levels: [one[...][:count] for one, count in zip(levels, self.counts[layer], strict=True) if count]
    parts = (cut(levels) for levels in (self.gates, self.ups, self.downs))
    how = dict(active=self.active, normalize=self.normalize, skip_empty=self.skip_empty)
    own = tuple(count for count in self.counts[layer] if count)
    return TiledExperts(self.router, *parts, self.widths[...], counts=(own,), **how)

  @property
  def spec(self) -> dict:
    """What `hub` needs to read them: `empty`'s arguments."""
    tile = self.gates[0].shape[-1] if self.gates else 1
    return {"tile": tile, "counts": [list(own) for own in self.counts], "skip_empty": self.skip_empty}

  @classmethod
  def empty(cls, like: MoE, *, tile: int, counts, skip_empty: bool) -> "TiledExperts":
    """Of zeros, in the place of stacked experts.

    Raises:
      InputError: a tile below 1, counts that are not for every layer as many levels of at most all experts, or a level
        that no layer has.
    """
    layers, experts, width, _ = like.gate.shape
    whole = lambda value, low, high: type(value) is int and low <= value <= high
    nested = isinstance(counts, list | tuple) and all(isinstance(own, list | tuple) for own in counts)
    right = whole(tile, 1, 2**31) and type(skip_empty) is bool and nested and len(counts) == layers
    right = right and len({len(own) for own in counts}) == 1
    right = right and all(whole(count, 0, experts) for own in counts for count in own)
    right = right and all(max(level) for level in zip(*counts, strict=True))
    said = f"counts must be {layers} lists of equal length of 0..{experts}, no level without a tile, tile 1 or more"
    require(right, f"compression.mlp: {said}")
    most = [max(level) for level in zip(*counts, strict=True)]
    zeros = lambda *shape: jnp.zeros((layers, *shape), like.gate.dtype)
    wide, tall = [zeros(m, width, tile) for m in most], [zeros(m, tile, width) for m in most]
    how = dict(active=like.active, normalize=like.normalize, skip_empty=skip_empty)
    widths, own = jnp.zeros((layers, experts), jnp.int32), tuple(map(tuple, counts))
    return cls(like.router, wide, [*map(jnp.copy, wide)], tall, widths, counts=own, **how)

  @property
  def stored_sizes(self) -> dict[str, list[int]]:
    """{parameter of stacked experts: leading size of every layer's own part}, what files hold of it."""
    levels = lambda name: {f"{name}.{j}": [own[j] for own in self.counts] for j in range(len(self.gates))}
    return {} if len(self.counts) == 1 else levels("gates") | levels("ups") | levels("downs")


def tiled(moe: MoE, keep: np.ndarray, *, tile: int, skip_empty: bool = False) -> TiledExperts:
  """Stacked experts with only the hidden neurons that `keep`, bool (layers, experts, hidden), says.

  The experts are put in order of width, with their router's columns.
  """
  layers, widths = len(keep), keep.sum(axis=-1)
  order = np.argsort(-widths, axis=-1, kind="stable")
  widths = np.take_along_axis(widths, order, axis=-1)
  counts = [[int((own > j * tile).sum()) for j in range(-(-int(widths.max()) // tile))] for own in widths]
  most = [max(level) for level in zip(*counts, strict=True)]
  gate, up, down = (np.asarray(one[...]) for one in (moe.gate, moe.up, moe.down))
  d = gate.shape[2]
  wide, tall = ([np.zeros((layers, m, *shape), gate.dtype) for m in most] for shape in ((d, tile), (tile, d)))
  gates, ups, downs = wide, [a.copy() for a in wide], tall
  for layer in range(layers):
    for place, expert in enumerate(order[layer]):
      kept = np.flatnonzero(keep[layer, expert])
      for level in range(-(-len(kept) // tile)):
        mine = kept[level * tile : (level + 1) * tile]
        gates[level][layer, place, :, : len(mine)] = gate[layer, expert][:, mine]
        ups[level][layer, place, :, : len(mine)] = up[layer, expert][:, mine]
        downs[level][layer, place, : len(mine)] = down[layer, expert][mine]
  router = np.take_along_axis(np.asarray(moe.router.weight[...]), order[:, None, :], axis=-1)
  on_device = lambda arrays: [jnp.asarray(a) for a in arrays]
  how = dict(active=moe.active, normalize=moe.normalize, skip_empty=skip_empty, counts=tuple(map(tuple, counts)))
  router = Linear(jnp.asarray(router), moe.router.weight.axes)
  return TiledExperts(router, *map(on_device, (gates, ups, downs)), jnp.asarray(widths, jnp.int32), **how)
