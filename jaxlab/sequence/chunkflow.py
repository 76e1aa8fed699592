"""ChunkFlow: sequences of any lengths in chunks of one size, with exact gradients ("Efficient Long Context Fine-tuning
with Chunk Flow", 2025, arXiv 2503.02356).

Short sequences share a chunk, which sees no other; a long one is cut into chunks that depend on each other through
keys and values. The chunk, not the longest sequence, sets the memory: of a long sequence's N chunks the last K keep
their activations, and the others run forward a second time.

  data = batches([split_row(ids) for ids in documents], batch=64, chunk=2048)
  train(model, data, None, optimizer, gradient_fn=gradient(), ...)
  train(model, data, None, optimizer, gradient_fn=gradient(token_losses=own), ...)    a loss of one's own

Plans and schedules are plain data, made on the host. A batch holds its schedule as arrays, a program that one compiled
step runs through: other lengths are other data, not another compilation, as long as the shapes are the same.
`chunkflow_pipeline` says how long a pipeline stands idle, and chooses chunk and K.
"""

import dataclasses
import functools
import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require, require_counts
from jaxlab.data import packing
from jaxlab.data.packing import Batch
from jaxlab.kernels import chunk_attention
from jaxlab.models.attention import masked_attention
from jaxlab.models.layers import rope_table
from jaxlab.models.transformer import sequential
from jaxlab.sequence import common
from jaxlab.training import losses
from jaxlab.training.loop import GradientFn

_IDLE, _PACKED, _FORWARD, _KEPT, _AGAIN = range(5)  # what a line of a program does


class Piece(NamedTuple):
  """Tokens start .. stop - 1 of a sequence."""

  sequence: int
  start: int
  stop: int


class Plan(NamedTuple):
  """groups: of chunks that depend on each other, in order, the longest first; a chunk is a tuple of pieces. A group of
  one chunk holds whole sequences, a longer one the pieces of one sequence."""

  chunk: int
  groups: tuple[tuple[tuple[Piece, ...], ...], ...]

  @property
  def capacity(self) -> int:
    """Chunks that the cache has room for: those of the longest group, rounded up to a power of two."""
    return common.rung(max(map(len, self.groups)))


def pack(lengths: Sequence[int], chunk: int) -> Plan:
  """Algorithm 1: sequences longer than a chunk are cut, the others share as few chunks as are found.

  For every number of chunks from ceil(sum / chunk) on: the longest first into the emptiest, which levels them, or
  else the longest first into the first with room, which needs 11/9 of the fewest and 6/9 of a chunk at most.

  Args:
    lengths: tokens of every sequence.

  Raises:
    InputError: a chunk or a sequence of no tokens, or no sequence.
  """
  require_counts(chunk=chunk)
  require(len(lengths) > 0, "there are no sequences to pack; give the length of at least one")
  lengths = [int(length) for length in lengths]
  require(
    min(lengths) >= 1, f"sequence {lengths.index(min(lengths))} has {min(lengths)} tokens; it must have 1 or more"
  )
  order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
  groups = []
  for i in (i for i in order if lengths[i] > chunk):
    cuts = range(0, lengths[i], chunk)
    groups.append(tuple((Piece(i, start, min(start + chunk, lengths[i])),) for start in cuts))
  short = [i for i in order if lengths[i] <= chunk]
  for bins in _bins([lengths[i] for i in short], chunk):
    groups.append((tuple(Piece(short[j], 0, lengths[short[j]]) for j in bins),))
  return Plan(chunk, tuple(groups))


def _bins(sizes: list[int], capacity: int) -> list[list[int]]:
  """Places of `sizes`, which descend, in bins."""
  first_fit, room = [], []
  for i, size in enumerate(sizes):
    at = next((b for b, left in enumerate(room) if left >= size), len(room))
    if at == len(room):
      first_fit.append([])
      room.append(capacity)
    first_fit[at].append(i)
    room[at] -= size
  for count in range(-(-sum(sizes) // capacity), len(first_fit) + 1):
    level, loads = share_out(sizes, count)
    if max(loads, default=0) <= capacity:
      return level
  return first_fit


def share_out(sizes: Sequence[float], count: int) -> tuple[list[list[int]], list[float]]:
  """(places of `sizes` in each of `count` bins, loads): the largest first, each into the bin with the least (LPT)."""
  heap, bins = [(0.0, b) for b in range(count)], [[] for _ in range(count)]
  for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
    load, b = heap[0]
    heapq.heapreplace(heap, (load + sizes[i], b))
    bins[b].append(i)
  return bins, [load for load, _ in sorted(heap, key=lambda entry: entry[1])]


def schedule(chunks: int, keep: int) -> list[tuple[str, int]]:
  """Algorithm 2: (what is done, to which chunk) of a group, in order.

    "drop"      forward: keys and values stay, activations go      the first N - K, ascending
    "keep"      forward, activations stay                          the last K, ascending
    "backward"  backward of what was kept                          the last K, descending
    "again"     forward once more, then backward                   the first N - K, descending

  N + max(0, N - K) forwards for N backwards: a third more work at most, where a backward costs two forwards.

  Raises:
    InputError: counts below 1.
  """
  require_counts(chunks=chunks, keep=keep)
  first = max(0, chunks - keep)
  forward = [("keep" if i >= first else "drop", i) for i in range(chunks)]
  return forward + [("backward" if i >= first else "again", i) for i in reversed(range(chunks))]


class Cost(NamedTuple):
  """Seconds, or any unit, of a chunk's forward: call + token * tokens + pair * (pairs of a query and a key it meets).

  Counted is what `gradient` runs. Chunks are padded, so all cost a whole one; a backward costs two forwards. Under a
  mask the queries of one meet the keys of `common.rung` chunks, its own and those before it among them, and where a
  sequence is cut its attention runs forward once more; else they meet what is before them and half of their chunk.

  Attributes:
    masked: by XLA under a mask, or else by `kernels.chunk_attention` without.
  """

  call: float = 0.0
  token: float = 1.0
  pair: float = 0.0
  masked: bool = True

  def attention(self, chunk: int, place: int) -> float:
    """Of the chunk with `place` chunks of its group before it."""
    return self.pair * chunk * chunk * (common.rung(place + 1) if self.masked else place + 0.5)

  def forward(self, chunk: int, place: int) -> float:
    return self.call + self.token * chunk + self.attention(chunk, place)

  def passes(self, chunk: int, chunks: int) -> tuple[list[float], list[float]]:
    """(forward, backward) of every chunk of a group."""
    forward = [self.forward(chunk, place) for place in range(chunks)]
    again = [self.attention(chunk, place) if chunks > 1 and self.masked else 0.0 for place in range(chunks)]
    return forward, [2 * one + more for one, more in zip(forward, again, strict=True)]

  def group(self, chunk: int, chunks: int, keep: int) -> float:
    """Of all that `schedule` has a group do."""
    forward, backward = self.passes(chunk, chunks)
    return sum(forward) + sum(backward) + sum(forward[: max(0, chunks - keep)])

  def groups(self, plan: Plan, keep: int) -> list[float]:
    return [self.group(plan.chunk, len(group), keep) for group in plan.groups]


def balance(plan: Plan, ranks: int, *, keep: int = 1, cost: Cost = Cost()) -> list[list[int]]:
  """Which groups each rank takes: the costliest first, each to the rank with the least; keys and values stay on a rank.

  Raises:
    InputError: counts below 1.
  """
  require_counts(ranks=ranks, keep=keep)
  return share_out(cost.groups(plan, keep), ranks)[0]


def materialize(
  plan: Plan, sequences: Sequence[Batch], *, keep: int = 1, ranks: int = 1, cost: Cost = Cost()
) -> dict[str, np.ndarray]:
  """A plan's chunks and what is done to them, for `gradient`.

  Sizes are rounded up to few different ones (1, 2, 3, 4, 6, 8, 12, ...; the cache's to a power of two), with empty
  chunks and lines that do nothing: each new one is a compilation.

  Args:
    sequences: {"inputs", "targets"} of int32 (length,), as `split_row` makes them; target -1 is not counted.
    keep: K; ranks: devices, or hosts times devices, that share the groups out.

  Returns:
    inputs, targets: int32 (ranks, chunks * chunk); segments, positions: int32 (ranks, chunks, chunk), of a token the
    place of its sequence in the chunk, -1 for padding, and its own in the sequence;
    program: int32 (ranks, lines, 2 + keep): what to do, first position, chunks (-1: none); cache: int8 (ranks,
    positions) and pieces: int8 (ranks, the most in a chunk, padding one of them), of which only the shapes count.

  Raises:
    InputError: sequences that are not the plan's, or sizes below 1.
  """
  shares = balance(plan, ranks, keep=keep, cost=cost)
  _require_same(plan, sequences)
  rows = _round(max(sum(len(plan.groups[g]) for g in share) for share in shares))
  shape = (ranks, rows, plan.chunk)
  arrays = {name: np.full(shape, -1, np.int32) for name in ("inputs", "targets", "segments", "positions")}
  arrays["inputs"][:], arrays["positions"][:] = 0, 0
  programs = []
  for rank, share in enumerate(shares):
    row, lines = 0, []
    for group in (plan.groups[g] for g in share):
      lines += _lines(len(group), row, plan.chunk, keep)
      for pieces in group:
        at = 0
        for segment, (i, start, stop) in enumerate(pieces):
          here = (rank, row, slice(at, at + stop - start))
          for name in ("inputs", "targets"):
            arrays[name][here] = sequences[i][name][start:stop]
          arrays["segments"][here], arrays["positions"][here] = segment, np.arange(start, stop)
          at += stop - start
        row += 1
    programs.append(lines)
  program = np.full((ranks, _round(max(map(len, programs))), 2 + keep), -1, np.int32)
  program[:, :, :2] = _IDLE, 0
  for lines, own in zip(programs, program, strict=True):
    for line, place in zip(lines, own, strict=False):
      place[: len(line)] = line
  most = max(len(pieces) for group in plan.groups for pieces in group)
  shapes = {"cache": plan.chunk * plan.capacity, "pieces": common.rung(most + 1)}
  shapes = {name: np.zeros((ranks, size), np.int8) for name, size in shapes.items()}
  flat = {name: arrays.pop(name).reshape(ranks, -1) for name in ("inputs", "targets")}
  return flat | arrays | {"program": program} | shapes


def _require_same(plan: Plan, sequences: Sequence[Batch]) -> None:
  stops = {}
  for i, _, stop in (piece for group in plan.groups for pieces in group for piece in pieces):
    stops[i] = max(stop, stops.get(i, 0))
  require(len(stops) == len(sequences), f"the plan is of {len(stops)} sequences, not {len(sequences)}; pack these")
  for i, sequence in enumerate(sequences):
    shapes = np.shape(sequence["inputs"]), np.shape(sequence["targets"])
    one = f"sequence {i} has inputs {shapes[0]} and targets {shapes[1]}"
    require(shapes == ((stops[i],),) * 2, f"{one}; the plan has ({stops[i]},) for both: pack these lengths")


def _lines(chunks: int, row: int, chunk: int, keep: int) -> list[tuple[int, ...]]:
  """A group's part of a program; its chunks are rows row, row + 1, ... What is kept is one line, backwards included."""
  if chunks == 1:
    return [(_PACKED, 0, row)]
  steps = schedule(chunks, keep)
  first = max(0, chunks - keep)
  kept = (_KEPT, first * chunk, *(row + i for what, i in steps if what == "keep"))
  forward = [(_FORWARD, i * chunk, row + i) for what, i in steps if what == "drop"]
  again = _KEPT if keep == 1 else _AGAIN
  return [*forward, kept, *((again, i * chunk, row + i) for what, i in steps if what == "again")]


def _round(count: int) -> int:
  """The next of 1, 2, 3, 4, 6, 8, 12, 16, ..."""
  power = 1 << (count - 1).bit_length()
  return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def batches(
  sequences: Sequence[Batch],
  *,
  batch: int,
  chunk: int,
  keep: int = 1,
  ranks: int = 1,
  cost: Cost = Cost(),
  seed: int = 0,
  context: int | None = None,
) -> grain.IterDataset:
  """Endless batches of `batch` sequences for `training.loop.train`, shuffled anew each epoch; `iter(...)` has get_state
  and set_state. One process feeds all devices.

  Args:
    sequences, keep, ranks, cost: as of `materialize`; ranks is the mesh's data x fsdp, or a multiple of it.
    context: of the model; None: only what `gradient` sees of lengths is checked.

  Raises:
    InputError: sizes below 1, fewer sequences than a batch has, or, once it is drawn, a sequence beyond `context`.
  """
  require_counts(batch=batch, chunk=chunk, keep=keep, ranks=ranks)
  require(len(sequences) >= batch, f"batch is {batch}; there are {len(sequences)} sequences, give more or lower it")

  def load(chosen):
    rows = [sequences[int(i)] for i in chosen]
    lengths = [len(row["inputs"]) for row in rows]
    beyond = f"a sequence has {max(lengths)} tokens, more than the model's context of {context}"
    require(context is None or max(lengths) <= context, f"{beyond}; cut it, or give the model a longer context")
    plan = pack(lengths, chunk)
    return materialize(plan, rows, keep=keep, ranks=ranks, cost=cost)

  order = packing.index_batches(len(sequences), batch, seed=seed)
  # Without threads of its own: grain's 16 would make 500 batches ahead, for as long as a run compiles.
  alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return grain.experimental.ThreadPrefetchIterDataset(order.map(load).to_iter_dataset(alone), prefetch_buffer_size=4)


def gradient(
  *,
  attend: Callable | None = None,
  remat: str = "none",
  token_losses: losses.TokenLosses = losses.token_losses,
  model_of: Callable = lambda params, *frozen: params,
) -> GradientFn:
  """The gradient of the mean loss over all tokens that count, for batches of `materialize`, as
  `training.loop.train(gradient_fn=...)` takes it. Chunk, K and the cache's size are those of the batch.

  Each device runs the programs of its ranks by itself, with the whole model; gradients are summed over devices once.

  Args:
    attend: (q, k, v, mask=bool (1, 1, queries, keys)) -> attended, with the shapes of an `AttentionFn`; keys are those
      of the chunk, or where a sequence is cut of 1, 2, 4, ... chunks, its own and those before it among them. None:
      `kernels.chunk_attention`, on a GPU in 16 bits cuDNN's, which needs no mask.
    remat: as of `transformer.sequential`, within a chunk; "dots" and "full" keep a copy of the cache for every layer.
    token_losses: (model, hidden states as `model.logits` reads them, targets) -> a loss for each of the targets, int32
      (rows, tokens); not cross-entropy alone, whatever a token's state and target say.
    model_of: (what is trained, frozen) -> the model, `lambda adapters, model: lora.merge(model, adapters)` for LoRA.

  Raises:
    InputError: a batch that has no program, a model that smears embeddings, whose chunks would need the token before
      them, sequences beyond the model's context (as far as the size of the cache says so: always where the context is
      1, 2, 4, ... chunks; `batches` knows every length), or a mesh that splits more than the batch.
  """

  def run(params, batch, step, key, *frozen):
    del step, key
    require("program" in batch, f"the batch has {', '.join(batch)}; ChunkFlow's are made by chunkflow.materialize")
    config = jax.eval_shape(model_of, params, *frozen).config
    chunk, room = batch["segments"].shape[2], batch["cache"].shape[1]
    common.require_readable(config, room // 2 + 1 if room > chunk else 1)  # the least that a cache so large is made for
    batch = jax.tree.map(jnp.asarray, batch)
    total = jnp.maximum((batch["targets"] >= 0).sum(), 1)
    each = functools.partial(_run, how=(attend, remat), token_losses=token_losses, model_of=model_of)
    mesh, axes = jax.sharding.get_abstract_mesh(), meshes.RULES["batch"]
    devices = meshes.split_over("batch", len(batch["cache"]))
    require(mesh.empty or devices == mesh.size, "ChunkFlow splits batches alone; make the mesh of data and fsdp")
    if devices > 1:
      alone = each
      each = jax.shard_map(
        lambda *args: jax.lax.psum(alone(*args), axes),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(axes), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
      )
    loss, gradient = each(params, frozen, batch, total)
    return (loss, {"tokens": total}), jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)

  return run


def _run(params, frozen, batch, total, *, how, token_losses, model_of):
  """(loss, gradient) of the ranks in `batch`, one program behind the other."""
  attend, remat = how
  (ranks, rows, chunk), program, pieces = batch["segments"].shape, batch["program"], batch["pieces"].shape[1]
  chunks = {
    name: batch[name].reshape(ranks * rows, 1, chunk) for name in ("inputs", "targets", "segments", "positions")
  }
  of_rank = rows * jnp.arange(ranks, dtype=program.dtype)[:, None, None]
  ids = jnp.where(program[..., 2:] < 0, -1, program[..., 2:] + of_rank).reshape(-1, program.shape[2] - 2)
  what, start = (program[..., i].reshape(-1) for i in (0, 1))

  shared = dict(model_of=model_of, frozen=frozen, share=common.share_of(token_losses, total))
  part_of = lambda i: (chunks["inputs"][i], chunks["targets"][i])
  over_cache = common.over_prefix(masked_attention(attend)) if attend else common.over_cache
  own_loss = functools.partial(common.transformer_loss, how=(over_cache, remat), **shared)
  model = jax.eval_shape(model_of, params, *frozen)
  c, wide = model.config, jnp.promote_types(jnp.result_type(float), jnp.float32)
  cache = (jnp.zeros((c.depth, 1, batch["cache"].shape[1], c.kv_heads, c.head_dim), model.dtype),) * 2

  def chunk_loss(params, cache, i, start):
    loss, cache = own_loss(params, cache, part_of(i), start)
    return loss.astype(wide), cache

  def any_loss(params, cache, i, start):
    return jax.lax.cond(
      i >= 0, chunk_loss, lambda params, cache, *_: (jnp.zeros((), wide), cache), params, cache, i, start
    )

  def packed(carry, start, ids):
    loss, cache, (gradient, back) = carry
    part = jax.tree.map(lambda a: a[ids[0]], chunks)
    one, more = jax.value_and_grad(functools.partial(_packed_loss, how=how, pieces=pieces, **shared))(params, part)
    return loss + one.astype(wide), cache, (common.add(gradient, more), back)

  def forward(carry, start, ids):
    # Its loss is that of the second run; the head is not computed here.
    loss, cache, sums = carry
    return loss, own_loss(params, cache, part_of(ids[0]), start)[1], sums

  def kept(carry, start, ids):
    # A group shorter than K leaves places out, at the end; what is sent through one of these comes back as it was.
    loss, cache, sums = carry
    pieces = [(i, start + j * chunk) for j, i in enumerate(ids)]
    loss_of = chunk_loss if len(ids) == 1 else any_loss
    one, cache, sums = common.backward(loss_of, params, cache, sums, pieces, chunk=chunk)
    return loss + one, cache, sums

  def again(carry, start, ids):
    return kept(carry, start, ids[:1])

  def line(carry, at):
    what, start, ids = at
    ways = (lambda carry, *_: carry, packed, forward, kept, *[again] * (ids.size > 1))
    return jax.lax.switch(what, ways, carry, start, ids), None

  carry = jnp.zeros((), wide), cache, (common.zeros(params), common.zeros(cache))
  (loss, _, (gradient, _)), _ = jax.lax.scan(line, carry, (what, start, ids))
  return loss, gradient


def _packed_loss(params, part, *, model_of, frozen, share, how, pieces):
  """The share of a chunk of whole sequences, each at positions from 0 on and blind to the others."""
  attend, remat = how
  model = model_of(params, *frozen)
  x, side, _ = model.embed(part["inputs"])
  cos, sin = rope_table(model.config, part["positions"], side.cos.dtype)
  side = dataclasses.replace(side, cos=cos, sin=sin)

  def among(q, k, v, *, window, start):
    del start
    return chunk_attention.packed(q, k, v, part["segments"], pieces=pieces, window=window)

  attention = masked_attention(attend, part["segments"]) if attend else among
  x, backout, *_ = sequential(model, x, side, attention=attention, remat=remat)
  return share(model, (x, backout), part["targets"])
