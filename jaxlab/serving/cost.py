"""What a step of a batch costs: seconds from what it reads and decodes, fitted to measured steps, or the operations and
bytes of each of its operators.

cost = fit(steps, seconds)
cost(Work.of(rows=256, chunks=[(1024, 224)], contexts=[900, 400]))
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls

from jaxlab.core.checks import require, require_counts
from jaxlab.models.config import TransformerConfig


class Work(NamedTuple):
  """A step.

  Attributes:
    rows: tokens that its products are of, padding among them.
    pairs: of queries and keys in its chunks; context: keys that its decoding rows read, in all.
    keys: that its chunks read, each once; drawn: rows whose logits are worked out.
  """

  rows: int
  pairs: float
  context: float
  keys: float = 0
  drawn: int = 0

  @classmethod
  def of(cls, *, rows: int, chunks: Iterable[tuple[int, int]] = (), contexts: Iterable[int] = ()) -> "Work":
    """chunks: (position of the end, tokens) each, so c * end - c^2 / 2 pairs; contexts: of every decoding row."""
    chunks, contexts = list(chunks), list(contexts)
    pairs, keys = sum(count * end - count**2 / 2 for end, count in chunks), sum(end for end, _ in chunks)
    return cls(rows, pairs, sum(contexts), keys, len(chunks) + len(contexts))


OPERATORS = ("qkv", "chunk_attention", "row_attention", "out", "up", "down", "head")  # in the order of a layer


class Volumes(NamedTuple):
  """Floating-point operations and bytes of every operator of `OPERATORS`, of all layers."""

  flops: Float[np.ndarray, "*batch 7"]
  bytes: Float[np.ndarray, "*batch 7"]


def volumes(config: TransformerConfig, work: Work, *, tile: int = 1, size: int = 2) -> Volumes:
  """A product of m rows with a matrix of in x out: 2 m in out operations, in out + m (in + out) numbers.

  Attention: 4 head_dim q_heads operations for every pair of a query and a key; keys and values are read once a chunk,
  and once a row that decodes.

  Args:
    work: of one step, or of many in arrays.
    tile: rows of the products' tiles; size: bytes of a number.

  Raises:
    InputError: layers that differ from each other, experts, or windows.
  """
  c = config
  alike = c.experts is None and c.layer_kv_heads is None and c.layer_mlp_widths is None
  alike = alike and set(c.windows) == {None}
  require(alike, "operators are counted for dense layers that are alike, without windows; give such a config")
  q, kv, gates = c.q_heads * c.head_dim, c.kv_heads * c.head_dim, 2 if c.mlp == "swiglu" else 1
  rows, pairs, context, keys, drawn = (np.asarray(value, float) for value in work)
  tiles = lambda m: np.ceil(m / tile) * tile

  def product(m, width, out):
    return 2 * tiles(m) * width * out, np.where(m > 0, width * out + m * (width + out), 0) * size

  layer = (
    product(rows, c.width, q + 2 * kv),
    (4 * q * pairs, 2 * kv * size * keys),
    (4 * q * context, 2 * kv * size * context),
    product(rows, q, c.width),
    product(rows, c.width, gates * c.mlp_width),
    product(rows, c.mlp_width, c.width),
  )
  all_ = [(c.depth * flops, c.depth * bytes_) for flops, bytes_ in layer] + [product(drawn, c.width, c.vocab_size)]
  return Volumes(*(np.stack(np.broadcast_arrays(*part), axis=-1) for part in zip(*all_, strict=True)))


class StepCost(NamedTuple):
  """seconds = a + b ceil_tile(rows) + c pairs + d context, none of them negative."""

  weights: Float[np.ndarray, "4"]
  tile: int

  def __call__(self, work: Work) -> float:
    return float(_features(work, self.tile) @ self.weights)


def fit(steps: Sequence[Work], seconds: Sequence[float], *, tile: int = 128) -> StepCost:
  """Non-negative least squares of relative errors.

  Args:
    tile: rows of the products' tiles: a product of 129 rows costs as one of 256.

  Raises:
    InputError: fewer steps than weights, or a time that is not positive.
  """
  require_counts(tile=tile)
  require(len(steps) == len(seconds), f"{len(steps)} steps have {len(seconds)} times; give one each")
  require(len(steps) >= 4, f"{len(steps)} steps were measured; at least 4 are needed")
  times = np.asarray(seconds, float)
  require(bool((times > 0).all()), "a step's time is not positive")
  rows = np.stack([_features(work, tile) for work in steps]) / times[:, None]
  scale = np.where(rows.max(axis=0) > 0, rows.max(axis=0), 1)
  weights, _ = nnls(rows / scale, np.ones(len(times)))
  return StepCost(weights / scale, tile)


def error(cost: StepCost, steps: Sequence[Work], seconds: Sequence[float]) -> float:
  """Mean absolute error, as a share of the times."""
  return float(np.mean([abs(cost(work) / t - 1) for work, t in zip(steps, seconds, strict=True)]))


def _features(work: Work, tile: int) -> Float[np.ndarray, "4"]:
  return np.array([1.0, -(-work.rows // tile) * tile, work.pairs, work.context])


def choose_budget(
  cost: Callable[[Work], float], *, prompt: int, answer: int, rows: int, budgets: Sequence[int]
) -> tuple[int, dict[int, float]]:
  """The budget of a step with the fewest seconds a token, and {budget: seconds a token}.

  In a steady state of `rows` requests alike, each needs n = ceil(prompt / (budget - rows + 1)) chunks, and n (rows - 1)
  tokens of others ride along. What is missing to `answer` tokens is made by steps that decode alone, what is too many
  leaves chunks that read alone (Sarathi, section 4.4: the balance is where prompt / answer = chunk / (rows - 1)).

  Raises:
    InputError: a budget without room for a chunk beside the rows that decode.
  """
  require_counts(prompt=prompt, answer=answer, rows=rows)
  require(
    min(budgets) >= rows, f"a budget of {min(budgets)} has no room for a chunk beside {rows - 1} rows that decode"
  )
  middle = prompt + answer // 2

  def seconds(budget: int) -> float:
    chunk = min(budget - rows + 1, prompt)
    chunks = math.ceil(prompt / chunk)
    pairs = [(prompt // 2 + chunk // 2, chunk)]
    mixed = cost(Work.of(rows=budget, chunks=pairs, contexts=[middle] * (rows - 1)))
    alone = cost(Work.of(rows=budget, chunks=pairs))
    decode = cost(Work.of(rows=rows, contexts=[middle] * rows))
    if rows == 1:
      return (chunks * alone + answer * decode) / (prompt + answer)
    ridden = min(chunks * (rows - 1), answer)
    full = ridden / (rows - 1)
    return (full * mixed + (chunks - full) * alone + (answer - ridden) / rows * decode) / (prompt + answer)

  found = {budget: seconds(budget) for budget in budgets}
  return min(found, key=found.__getitem__), found
