"""The stacks of an H-Net as networks of their own, for `layer_geometry`: its blocks have several widths and lengths.

A stack is the encoder or the decoder of a stage, or the innermost one's main network: blocks of one width, which read
the stage's positions. Those of an inner stage are where the stage around was cut, each the byte that it stands at.

  networks = stacks(model, tokens)               # {"encoder 0": ..., "main 1": ..., "decoder 0": ...}
  x, y = layer_geometry.collect(networks["main 1"], tokens)

Rows have different numbers of chunks, arrays do not: of every row the first `length` positions are measured, as many as
the row with the fewest has. Nothing before them reads those that are left out.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.depth.layer_geometry_streams import streams_of_attention, streams_of_states
from jaxlab.models import chunking
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.config import TransformerConfig
from jaxlab.models.hnet import HNet, Stage
from jaxlab.models.hnet_layers import Layer, Side, Stack, rotations
from jaxlab.models.layers import wide
from jaxlab.models.mamba2 import Mamba2Block, MixFn, Recurrence


@functools.partial(jax.tree_util.register_dataclass, data_fields=["model"], meta_fields=["index", "part", "length"])
@dataclasses.dataclass(frozen=True)
class StackNetwork:
  """One stack of an H-Net, which stands in the whole one.

  Attributes:
    index: its stage.
    part: "encoder", "main" or "decoder".
    length: positions of every row that are measured.
  """

  model: HNet
  index: int
  part: str
  length: int

  @property
  def stack(self) -> Stack:
    stage = self.model.stage
    for _ in range(self.index):
      stage = stage.inner
    return stage.decoder if self.part == "decoder" else stage.encoder

  @property
  def config(self) -> TransformerConfig:
    """The shape of the stage's attention layers, which has its width."""
    return self.model.config.transformer(self.index)

  @property
  def depth(self) -> int:
    return sum(map(_count, self.stack.runs))

  def trace(self, tokens: Int[Array, "batch time"], attention: AttentionFn = dot_product_attention):
    """(input (batch, length, width), outputs of the blocks (L, batch, length, width), what frozen blocks read)."""
    way = _Way(self, Recurrence.__call__, attention)
    way.through(tokens)
    h0, trace = way.seen
    cos, sin = rotations(self.model.config, self.index, jnp.arange(self.length), h0.dtype)
    return h0[:, : self.length], trace[:, :, : self.length], Side(h0.dtype, cos, sin, attention, None)

  def frozen(self, state: Float[Array, "batch length width"], side: Side, *, layers: int):
    """Outputs (layers, batch, length, width) of the last blocks, each of the same input."""
    outputs = [jax.vmap(lambda block: _apply(block, state, side, Recurrence.__call__))(run) for run in self.stack.runs]
    return jnp.concatenate(outputs)[-layers:]

  def ids(self, tokens: Int[Array, "batch time"]) -> Int[Array, "batch length"]:
    """The bytes that the positions stand at."""
    way = _Way(self, Recurrence.__call__, dot_product_attention)
    way.through(tokens)
    return jnp.take_along_axis(tokens, way.bytes_at, axis=1)

  def logits_of_streams(
    self, tokens: Int[Array, "batch time"], rewrite: Callable[[Array, Array], Array], attention: AttentionFn
  ) -> Float[Array, "three_batch length vocab"]:
    """What the whole network predicts behind the byte of every position, in three copies of the rows.

    Args:
      rewrite: (layer, outputs (3 batch, length, width)) -> what is passed on in their place.
    """

    def padded(layer, state):
      return state.at[:, : self.length].set(rewrite(layer, state[:, : self.length]))

    way = _Way(self, streams_of_states, streams_of_attention(attention), copies=3, rewrite=padded)
    out = way.through(tokens)
    return self.model.logits(chunking.take(out, jnp.tile(way.bytes_at, (3, 1))))


def stacks(model: HNet, *rows: Int[Array, "_ _"]) -> dict[str, StackNetwork]:
  """{"encoder 0", ..., "main S", ..., "decoder 0": the stack}, in the order in which they are run.

  Args:
    rows: all tokens that will be measured, int (batch, time) of any sizes; not traced, as what each row has in every
      stage is counted.

  Raises:
    InputError: another kind of model, or no rows.
  """
  require(isinstance(model, HNet), f"stacks are of an HNet, not of a {type(model).__name__}; measure it as it is")
  require(len(rows) > 0, "there are no rows; give the tokens that will be measured")
  chunked = jax.jit(lambda model, tokens: [chunks.count.min() for chunks in model.chunked(tokens)[1]])
  counts = [[tokens.shape[1], *map(int, chunked(jax.tree.map(wide, model), tokens))] for tokens in rows]
  lengths = list(map(min, zip(*counts, strict=True)))
  return {name: StackNetwork(model, index, part, lengths[index]) for name, index, part in names(model.config.stages)}


def names(stages) -> list[tuple[str, int, str]]:
  """(name, stage, part) of every stack, by `HNetConfig.stages`."""
  last = len(stages) - 1
  parts = [*((i, "encoder") for i in range(last)), (last, "main"), *((i, "decoder") for i in reversed(range(last)))]
  return [(f"{part} {index}", index, part) for index, part in parts]


class _Way:
  """A pass through the whole network that looks at one stack, in one copy of the rows or in three.

  `seen`: (input, outputs of the blocks) of the stack; `bytes_at`: where in the row its positions stand. Rows are cut
  where the clean copy is cut, whatever is written: a cut elsewhere would leave no positions to compare.
  """

  def __init__(
    self, network: StackNetwork, mix: MixFn, attention: AttentionFn, copies: int = 1, rewrite: Callable | None = None
  ):
    self.network, self.mix, self.attention, self.copies, self.rewrite = network, mix, attention, copies, rewrite
    self.seen = self.bytes_at = None

  def through(self, tokens: Int[Array, "batch time"]) -> Float[Array, "copies_batch time width"]:
    x = self.network.model.embed(tokens)
    here = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return self._stage(self.network.model.stage, jnp.tile(x, (self.copies, 1, 1)), here)

  def _stage(self, stage: Stage, x, bytes_at):
    """`Stage.__call__`, in copies."""
    c, time = stage.config, x.shape[1]
    side = Side(x.dtype, *rotations(c, stage.index, jnp.arange(time), x.dtype), self.attention, None)
    run = lambda stack, part, x: self._stack(stack, (stage.index, part), x, side, bytes_at)
    if stage.inner is None:
      return run(stage.encoder, "main", stage.enter(x))[..., : x.shape[-1]]

    h = run(stage.encoder, "encoder", stage.enter(x))
    p = jnp.where(jnp.arange(time) == 0, 1.0, stage.chunker.probability(h, self._before(h)))
    chunks = chunking.chunks_of(p[: len(bytes_at)], jnp.ones(bytes_at.shape, bool))
    tiled = lambda a: jnp.tile(a, (self.copies, 1))
    place, cut = chunking.places(chunks, time), tiled(chunks.cut)
    inside = self._stage(stage.inner, chunking.take(h, tiled(place)), jnp.take_along_axis(bytes_at, place, axis=1))
    s = wide(inside)
    if c.smoothing:
      s = self._smooth(s, jnp.take_along_axis(p, tiled(place), axis=1))
    read = chunking.take(s, tiled(chunks.index))
    if self.copies == 3:  # a byte of the middle copy that begins no chunk reads one that was begun before: a clean one
      clean, own, changed = jnp.split(read, 3)
      read = jnp.concatenate([clean, jnp.where(chunks.cut[..., None], own, clean), changed])
    weight = 1.0 if c.straight_through else jnp.where(cut, p, 1 - p)[..., None]
    y = weight * read + stage.chunker.around(h)
    return run(stage.decoder, "decoder", y.astype(x.dtype))[..., : x.shape[-1]]

  def _before(self, h):
    """Vectors of the positions before: the middle copy has the clean ones there."""
    before = jnp.concatenate([jnp.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    if self.copies == 1:
      return before
    clean, _, changed = jnp.split(before, 3)
    return jnp.concatenate([clean, clean, changed])

  def _smooth(self, z, p):
    s = chunking.smooth(z, p)
    if self.copies == 1:
      return s
    clean, _, changed = jnp.split(s, 3)
    share = chunking.clipped(jnp.split(p, 3)[1])[..., None]
    before = jnp.concatenate([jnp.zeros_like(clean[:, :1]), clean[:, :-1]], axis=1)
    return jnp.concatenate([clean, share * jnp.split(z, 3)[1] + (1 - share) * before, changed])

  def _stack(self, stack: Stack, name: tuple[int, str], x, side: Side, bytes_at):
    """`Stack.__call__`; in the stack that is looked at, outputs are kept, or others are passed on."""
    here = name == (self.network.index, self.network.part)
    rewrite = self.rewrite if here else None
    first, outputs = 0, []
    start = x = wide(x)

    def one(x, parts):
      layer, block = parts
      x = _apply(block, x, side, self.mix)
      x = x if rewrite is None else rewrite(layer, x)
      return x, x if here else None

    for run in stack.runs:
      x, trace = jax.lax.scan(one, x, (first + jnp.arange(_count(run)), run))
      first += _count(run)
      outputs.append(trace)
    if here:
      self.seen, self.bytes_at = (start, jnp.concatenate(outputs)), bytes_at[:, : self.network.length]
    return stack.norm(x).astype(side.dtype)


def _apply(block: Layer, x, side: Side, mix: MixFn):
  """`Layer.__call__` with another mixing of the tokens."""
  if not isinstance(block.mixer, Mamba2Block):
    return block(x, side)[0]
  z, u, dt = block.mixer.project(x.astype(side.dtype))
  return block.feed(block.mixer.finish(x, mix(block.mixer.recurrence, u, dt), z), side)


def _count(run: Layer) -> int:
  return len(jax.tree.leaves(run)[0])
