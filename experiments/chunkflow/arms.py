"""Ways to the gradient of one global batch of sequences of any lengths: sum of all losses over all tokens that count.

An arm is `prepare(sequences) -> [(kind, arrays), ...]`, micro-steps of a few shapes, and for each kind a compiled
function that adds a micro-step's gradient to a sum. All arms but "apart" have the same gradient to rounding.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import timing
from jaxlab.data.packing import Batch
from jaxlab.sequence import chunkflow, common
from jaxlab.training.losses import token_losses

ARMS = {
  "one": "a sequence a step",
  "sorted": "sequences of like length a step",
  "packed": "short ones packed, long ones whole",
  "window": "all packed to the longest",
  "chunkflow": "ChunkFlow",
  "apart": "chunks without what is before them",
}


class Arm(NamedTuple):
  """prepare: sequences -> micro-steps; add: {kind: (model, (loss, gradient), arrays, total) -> (loss, gradient)}."""

  prepare: Callable[[Sequence[Batch]], list[tuple[str, dict[str, np.ndarray]]]]
  add: dict[str, Callable]


def arm(name: str, *, chunk: int, keep: int = 1, remat: str = "none") -> Arm:
  """One of `ARMS`, each with the quickest attention there is for it."""
  plans = {
    "one": lambda sequences: [("rows", _padded([one])) for one in sequences],
    "sorted": lambda sequences: [("rows", _padded(group)) for group in _alike(sequences, chunk)],
    "packed": lambda sequences: [
      *(("rows", _padded([one])) for one in sequences if _length(one) > chunk),
      *_steps([one for one in sequences if _length(one) <= chunk], chunk, 1),
    ],
    "window": lambda sequences: _steps(sequences, _rung(max(map(_length, sequences))), 1),
    "chunkflow": lambda sequences: _steps(sequences, chunk, keep),
    "apart": lambda sequences: _steps([piece for one in sequences for piece in _pieces(one, chunk)], chunk, 1),
  }
  return Arm(plans[name], _programs(remat))


@functools.cache
def _programs(remat: str) -> dict[str, Callable]:
  """Of every kind of micro-step; arms share what is compiled for a shape."""
  rows = functools.partial(_rows_loss, remat=remat)
  ways = chunkflow.gradient(remat=remat)
  return {"rows": _adds(jax.value_and_grad(rows)), "chunks": _adds(functools.partial(_chunked, ways))}


def gradient(arm: Arm, model, sequences: Sequence[Batch]):
  """(mean loss, gradient) of a global batch."""
  total = sum(int((one["targets"] >= 0).sum()) for one in sequences)
  return run(arm, model, arm.prepare(sequences), total)


def run(arm: Arm, model, steps, total: int):
  sums = jnp.zeros(()), common.zeros(model)
  for kind, arrays in steps:
    sums = arm.add[kind](model, sums, arrays, jnp.float32(total))
  return sums


def _adds(value_and_grad):
  """Sums are donated: a gradient of its own for every micro-step would be another copy of the weights."""

  @functools.partial(jax.jit, donate_argnums=1)
  def add(model, sums, arrays, total):
    loss, more = value_and_grad(model, arrays, total)
    return sums[0] + loss, common.add(sums[1], more)

  return add


def _rows_loss(model, arrays, total, *, remat):
  hidden = model.hidden(arrays["inputs"], remat=remat)
  return token_losses(model, hidden, arrays["targets"]).sum() / total


def _chunked(ways, model, arrays, total):
  """`chunkflow.gradient` divides by this call's own tokens."""
  (loss, aux), more = ways(model, arrays, 0, None)
  share = aux["tokens"] / total
  return loss * share, jax.tree.map(lambda g: g * share.astype(g.dtype), more)


def _length(one: Batch) -> int:
  return len(one["inputs"])


def _rung(length: int) -> int:
  """The next of 128, 192, 256, 384, 512, ...: few shapes, at most half as much again."""
  power = 128
  while power < length:
    power *= 2
  return 3 * power // 4 if power > 128 and length <= 3 * power // 4 else power


def _padded(group: Sequence[Batch]) -> dict[str, np.ndarray]:
  shape = len(group), _rung(max(map(_length, group)))
  arrays = {"inputs": np.zeros(shape, np.int32), "targets": np.full(shape, -1, np.int32)}
  for row, one in enumerate(group):
    for name, array in arrays.items():
      array[row, : _length(one)] = one[name]
  return arrays


def _alike(sequences: Sequence[Batch], tokens: int) -> list[list[Batch]]:
  """By length, as many a step as have `tokens` tokens once padded to a rung, and at least one."""
  by_rung: dict[int, list[Batch]] = {}
  for one in sequences:
    by_rung.setdefault(_rung(_length(one)), []).append(one)
  return [
    own[at : at + max(1, tokens // rung)]
    for rung, own in sorted(by_rung.items())
    for at in range(0, len(own), max(1, tokens // rung))
  ]


def _steps(sequences: Sequence[Batch], chunk: int, keep: int) -> list[tuple[str, dict]]:
  """One micro-step: a whole plan, which a compiled program runs through."""
  if not sequences:
    return []
  plan = chunkflow.pack([_length(one) for one in sequences], chunk)
  return [("chunks", chunkflow.materialize(plan, sequences, keep=keep))]


def _pieces(one: Batch, chunk: int) -> list[Batch]:
  return [{name: array[at : at + chunk] for name, array in one.items()} for at in range(0, _length(one), chunk)]


def difference(ours, theirs) -> float:
  """Norm of the difference of two gradients, over the second's norm."""
  return float(_difference(ours, theirs))


@jax.jit
def _difference(ours, theirs):
  square = lambda tree: sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(tree))
  ours, theirs = jax.tree.map(lambda a: a.astype(jnp.float32), (ours, theirs))
  return jnp.sqrt(square(jax.tree.map(jnp.subtract, ours, theirs)) / square(theirs))


def compiled(arm: Arm, model, steps, known: dict | None = None) -> tuple[Arm, int]:
  """(the arm with programs for the shapes of these micro-steps, temporary bytes of the one that needs most).

  Args:
    known: programs that arms share; this arm's are added. They are compiled next to each other.
  """
  known, sums = {} if known is None else known, jax.eval_shape(lambda: (jnp.zeros(()), common.zeros(model)))
  of = lambda kind, arrays: (arm.add[kind], tuple(a.shape for a in jax.tree.leaves(arrays)))
  wanted = {of(kind, arrays): arrays for kind, arrays in steps}

  def make(shape):
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), wanted[shape])
    return shape[0].lower(model, sums, spec, jnp.float32(0)).compile()

  missing = [shape for shape in wanted if shape not in known]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    known |= dict(zip(missing, pool.map(make, missing), strict=True))
  program = lambda kind: lambda model, sums, arrays, total: known[of(kind, arrays)](model, sums, arrays, total)
  return arm._replace(add={kind: program(kind) for kind in arm.add}), max(
    timing.memory(known[shape])["temporaries"] for shape in wanted
  )
