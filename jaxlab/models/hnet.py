"""H-Net: a network over bytes that learns where to cut them, and runs its large part on the pieces alone.

  hnet(x, s) = main(x) in the innermost stage, else
    h = encoder(x);   (p, b) = route(h);   x' = h where b = 1
    y = decoder(ste(c) up(smooth(hnet(x', s + 1), p)) + W h)

`chunking` has what stands between the stages. A layout names the layers of every stage: "m4 [T22] m4" is four Mamba-2
layers, 22 of a transformer on the chunks, four Mamba-2 layers; brackets nest, and one without brackets ("T8", "m16") is
an ordinary network of such layers. m, t: Mamba-2 and attention alone; M, T: with a SwiGLU.

  model = HNet(HNetConfig("m4 [T22] m4", widths=(1024, 1536)), key)
  logits = model(tokens)                                              # bytes, 254 begins a document
  out = generate(model, tokens, tokens=64, decoder=DECODER)

Where rows are cut is data, shapes are not: `capacities` says how many chunks a row has room for, by stage.
Reference: Hwang, Wang and Gu 2025, arXiv 2507.07955; the layers, their order and initialisation are those of its code.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require
from jaxlab.models import chunking
from jaxlab.models.attention import AttentionFn, dot_product_attention, masked_attention
from jaxlab.models.chunking import Chunker, Chunks
from jaxlab.models.generate import Decoder
from jaxlab.models.hnet_config import HNetConfig, stage_of
from jaxlab.models.hnet_layers import SPREAD, Side, Stack, of_rows, rotations, with_room
from jaxlab.models.layers import Linear, lookup, wide


class StageState(NamedTuple):
  """What decoding keeps of one stage and those in it.

  length: positions read; encoder, decoder: memories of the layers (of the main network and () in the innermost);
  last: h of the position before; smoothed: s of the chunk that is read now.
  """

  length: Int[Array, "batch"]
  encoder: tuple
  decoder: tuple
  last: Float[Array, "batch width"] | None
  smoothed: Float[Array, "batch width"] | None
  inner: "StageState | None"


class How(NamedTuple):
  """How a forward pass is run, the same in all stages."""

  capacities: tuple[int, ...] | None = None
  attention: AttentionFn = dot_product_attention
  remat: str = "none"
  unroll: int = 1
  keep: bool = False


class Stage(nnx.Module):
  """Stage `index` and those in it: (batch, time, width of the stage around) -> the same."""

  def __init__(self, config: HNetConfig, index: int, key: jax.Array):
    keys = jax.random.split(key, 4)
    runs = config.stages[index]
    before = config.widths[max(index - 1, 0)]
    wider = config.widths[index] - before
    self.config, self.index = config, index
    self.pad = nnx.Param(jnp.zeros(wider), axes=(None,)) if wider else None
    self.encoder = Stack(config, index, runs[0], keys[0])
    outer = len(runs) == 2
    self.decoder = Stack(config, index, runs[1], keys[1]) if outer else None
    self.chunker = Chunker(config.widths[index], config.routing, keys[2]) if outer else None
    self.inner = Stage(config, index + 1, keys[3]) if outer else None

  def __call__(self, x, lengths, starts, given, how: How):
    """(output, chunks of this stage and those in it, their `StageState` or None).

    Args:
      lengths: int (batch,) or None; starts: bool (batch, time) or None, where documents begin.
      given: bool (batch, time), cuts in the place of the router's, or None.
    """
    c, (batch, time), dtype = self.config, x.shape[:2], x.dtype
    attention = how.attention
    if starts is not None:
      attend = lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
      attention = masked_attention(attend, jnp.cumsum(starts, axis=1))
    side = Side(dtype, *rotations(c, self.index, jnp.arange(time), dtype), attention, lengths, starts, keep=how.keep)
    run = dict(remat=how.remat, unroll=how.unroll)
    h, encoder = self.encoder(self.enter(x), side, **run)
    length = jnp.full(batch, time, jnp.int32) if lengths is None else lengths
    if self.inner is None:
      return h[..., : x.shape[-1]], (), StageState(length, encoder, (), None, None, None) if how.keep else None

    before = jnp.concatenate([jnp.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    first = (jnp.arange(time) == 0) | (False if starts is None else starts)
    p = self.chunker.probability(h, before) if given is None else wide(given.astype(dtype))
    valid = jnp.arange(time) < length[:, None]
    capacity = None if how.capacities is None else min(how.capacities[self.index], time)
    chunks = chunking.chunks_of(jnp.where(first, 1.0, p), valid, capacity)
    place = chunking.places(chunks, capacity or time)
    begins = None if starts is None else jnp.take_along_axis(starts, place, axis=1)
    z, inside, inner = self.inner(chunking.take(h, place), chunks.count, begins, None, how)

    s = wide(z)
    if c.smoothing:
      s = chunking.smooth(z, jnp.take_along_axis(chunks.probability, place, axis=1), begins)
    confidence = chunks.confidence
    if c.straight_through:
      confidence = chunking.straight_through(confidence)
    y = confidence[..., None] * chunking.take(s, chunks.index) + self.chunker.around(h)
    out, decoder = self.decoder(y.astype(dtype), side, **run)
    state = None
    if how.keep:
      at = lambda a, i: chunking.take(a, i[:, None])[:, 0]
      state = StageState(length, encoder, decoder, at(h, length - 1), at(s, chunks.count - 1), inner)
    return out[..., : x.shape[-1]], (chunks, *inside), state

  def step(self, x: Float[Array, "batch 1 width"], state: StageState, active: Bool[Array, "batch"], given=None):
    """One more position of the rows that are `active`: (output, state); the output of the others means nothing."""
    c, dtype = self.config, x.dtype
    turned = rotations(c, self.index, state.length[:, None], dtype)
    side = Side(dtype, *turned, dot_product_attention, state.length, active=active)
    length = state.length + active
    h, encoder = self.encoder.step(self.enter(x), state.encoder, side)
    if self.inner is None:
      return h[..., : x.shape[-1]], state._replace(length=length, encoder=encoder)
    now = h[:, 0]
    p = self.chunker.probability(now, state.last) if given is None else wide(given.astype(dtype))
    p = jnp.where(state.length == 0, 1.0, p)
    cut = (p > 0.5) & active
    z, inner = self.inner.step(h, state.inner, cut)
    z, keep = wide(z[:, 0]), chunking.clipped(p)[:, None]
    smoothed = of_rows(cut, keep * z + (1 - keep) * state.smoothed if c.smoothing else z, state.smoothed)
    weight = 1.0 if c.straight_through else jnp.maximum(p, 1 - p)[:, None]
    y = (weight * smoothed + self.chunker.around(now)).astype(dtype)[:, None]
    out, decoder = self.decoder.step(y, state.decoder, side)
    last = of_rows(active, now, state.last)
    return out[..., : x.shape[-1]], StageState(length, encoder, decoder, last, smoothed, inner)

  def enter(self, x):
    """x in this stage's width: behind the vector of the stage around stands `pad`, at all positions alike."""
    if self.pad is None:
      return x
    pad = self.pad[...].astype(x.dtype)
    return jnp.concatenate([x, jnp.broadcast_to(pad, (*x.shape[:-1], len(pad)))], axis=-1)

  def empty(self, batch: int, capacity: int, dtype) -> StageState:
    """The state before the first position, with room for `capacity`."""
    c, width = self.config, self.config.widths[self.index]
    of = lambda stack: stack.empty(c, self.index, batch, capacity, dtype)
    length, encoder = jnp.zeros(batch, jnp.int32), of(self.encoder)
    if self.inner is None:
      return StageState(length, encoder, (), None, None, None)
    last = jnp.zeros((batch, width), dtype)
    return StageState(length, encoder, of(self.decoder), last, wide(last), self.inner.empty(batch, capacity, dtype))

  def with_room(self, state: StageState, capacity: int) -> StageState:
    """The state after a prompt with room for `capacity` positions."""
    state = state._replace(encoder=with_room(self.encoder, state.encoder, capacity))
    if self.inner is None:
      return state
    inner = self.inner.with_room(state.inner, capacity)
    return state._replace(decoder=with_room(self.decoder, state.decoder, capacity), inner=inner)


class HNet(nnx.Module):
  """`model(tokens: int32[batch, time]) -> float32[batch, time, vocab]`."""

  def __init__(self, config: HNetConfig, key: jax.Array):
    """Embeddings N(0, 1), maps N(0, 0.02^2), those that end a branch over the root of the branches so far."""
    c, keys = config, jax.random.split(key, 4)
    self.config = c
    self.embedding = nnx.Param(jax.random.normal(keys[0], (c.vocab_size, c.width)), axes=("vocab", "embed"))
    self.stage = _drawn(Stage(c, 0, keys[1]), c, keys[2])
    self.head = Linear(SPREAD * jax.random.normal(keys[3], (c.width, c.vocab_size)), ("embed", "vocab"))

  @property
  def depth(self) -> int:
    return self.config.depth

  @property
  def dtype(self):
    return self.embedding.dtype

  def __call__(self, tokens: Int[Array, "batch time"], **options) -> Float[Array, "batch time vocab"]:
    return self.logits(*self.hidden(tokens, **options))

  def hidden(self, tokens: Int[Array, "batch time"], **options) -> tuple[Array, None]:
    """(final state, None): what `logits` reads, in the form that a Transformer has; options as `chunked`."""
    return self.chunked(tokens, **options)[0], None

  def chunked(
    self,
    tokens: Int[Array, "batch time"],
    *,
    capacities: tuple[int, ...] | None = None,
    lengths: Int[Array, "batch"] | None = None,
    starts: Bool[Array, "batch time"] | None = None,
    boundaries: Bool[Array, "batch time"] | None = None,
    attention: AttentionFn = dot_product_attention,
    remat: str = "none",
    unroll: bool = False,
  ) -> tuple[Float[Array, "batch time width"], tuple[Chunks, ...]]:
    """(final state, where every stage but the innermost was cut).

    Args:
      capacities: chunks that a row has room for, by stage; None: as many as positions: exact, and nothing is saved.
      lengths: tokens of every row; what is past them is never cut. None: all.
      starts: tokens that begin a document: what is before them is not read. `attention` is then a masked one.
      boundaries: where the outermost stage is cut, in the place of its router's choice; the first token always is.
      remat: what the backward pass recomputes of the layers: "none", "dots" (all but products with weights) or "full".

    Raises:
      InputError: rows without a token, capacities that do not fit the stages, or boundaries, starts or lengths that do
        not fit the rows.
    """
    outer = len(self.config.ratios)
    fits = capacities is None or len(capacities) == outer
    require(fits, f"capacities is {capacities}; the model has {outer} stages with chunks")
    require(boundaries is None or outer, "boundaries are given, but the model has no stage with chunks")
    _check_rows(tokens, tokens.shape, starts=starts, boundaries=boundaries)
    _check_rows(tokens, tokens.shape[:1], lengths=lengths)
    how = How(capacities, attention, remat, self.config.depth if unroll else 1)
    x, chunks, _ = self.stage(self.embed(tokens), lengths, starts, boundaries, how)
    return x, chunks

  def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time width"]:
    return meshes.to_rows(lookup(self.embedding[...], tokens))

  def logits(self, x: Float[Array, "batch time width"], _=None) -> Float[Array, "batch time vocab"]:
    """The last stack ends with a norm: there is none here."""
    return wide(self.head(meshes.to_batch(x)))

  def empty_state(self, batch: int, capacity: int) -> StageState:
    """The state before the first of at most `capacity` tokens."""
    return self.stage.empty(batch, capacity + 1, self.dtype)

  def prefill(
    self, tokens: Int[Array, "batch time"], lengths: Int[Array, "batch"] | None = None, *, capacity: int
  ) -> tuple[Float[Array, "batch 1 vocab"], StageState]:
    """(logits after the last token of every row, the state behind it with room for `capacity` tokens in all).

    Args:
      lengths: tokens of every row, at least 1; the rest of a row is padding of any kind. None: all of them.

    Raises:
      InputError: prompts without a token or longer than the capacity, or not one length for each row.
    """
    time = tokens.shape[1]
    _check_rows(tokens, tokens.shape[:1], lengths=lengths)
    require(time <= capacity, f"the prompt has {time} tokens, the capacity is {capacity}; give it room for both")
    lengths = jnp.full(len(tokens), time, jnp.int32) if lengths is None else lengths
    x, _, state = self.stage(self.embed(tokens), lengths, None, None, How(keep=True))
    return self.logits(chunking.take(x, lengths[:, None] - 1)), self.stage.with_room(state, capacity + 1)

  def step(
    self, tokens: Int[Array, "batch"], state: StageState, *, boundaries: Bool[Array, "batch"] | None = None
  ) -> tuple[Float[Array, "batch vocab"], StageState]:
    """Logits after one more token of every row, and the state with it. Inner stages step in the rows that are cut.

    Raises:
      InputError: boundaries that are not one for each row.
    """
    _check_rows(tokens[:, None], tokens.shape, boundaries=boundaries)
    x, state = self.stage.step(self.embed(tokens[:, None]), state, jnp.ones(len(tokens), bool), boundaries)
    return self.logits(x)[:, 0], state


def _check_rows(tokens, shape: tuple[int, ...], **given) -> None:
  require(tokens.shape[1] > 0, f"rows have no token (tokens {tokens.shape}); give at least one")
  for name, array in given.items():
    if array is not None:
      require(array.shape == shape, f"{name} has shape {array.shape}; tokens of {tokens.shape} need {shape}")


def _drawn(stages: Stage, config: HNetConfig, key: jax.Array) -> Stage:
  """The stages with their maps drawn anew."""
  added = [sum(count * (1 + kind.isupper()) for run in runs for kind, count in run) for runs in config.stages]
  branches = list(itertools.accumulate(added))
  leaves, structure = jax.tree_util.tree_flatten_with_path(stages)
  drawn = []
  for (path, leaf), k in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    owner, _, leaf_name = name.rpartition(".")
    if leaf_name == "weight":
      ends = owner.rpartition(".")[2] in ("out", "down")
      spread = SPREAD / branches[stage_of(name)] ** 0.5 if ends else SPREAD
      leaf = spread * jax.random.normal(k, leaf.shape, leaf.dtype)
    drawn.append(leaf)
  return jax.tree.unflatten(structure, drawn)


def _prefill(model: HNet, prompts, lengths, *, capacity: int):
  return model.prefill(prompts, lengths, capacity=capacity)


def _step(model: HNet, token, state):
  logits, state = model.step(token[:, 0], state)
  return logits[:, None], state


DECODER = Decoder(_prefill, _step)  # of `generate`
