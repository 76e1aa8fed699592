"""What is on the device at most while a model in host memory is pruned, beside a model that is there as a whole."""

import jax
import numpy as np

from experiments.struprune import rivals
from jaxlab.models import Transformer, maps
from jaxlab.models.config import TransformerConfig
from jaxlab.weights import struprune
from jaxlab.weights.structured import Least


def measure(config) -> list[dict]:
  """[{depth, live: bytes of arrays on the device at most when a layer is loaded, block, tables: of a layer and of what
  is no layer, model: of all, peak: the device's own count or None}] by config.memory.depths."""
  m, rows = config.memory, []
  for depth in m.depths:
    model = host_model(m.shape, depth, config.seed)
    rng = np.random.default_rng(config.seed)
    tokens = rng.integers(0, m.shape.vocab_size, (m.rows, m.time)).astype(np.int32)
    model, seen = watched(model)
    before = _peak()
    small = struprune.prune(
      model, tokens, budget=config.budget, batch=m.batch, least=Least(1, 1), temperature=1.0,
      options=rivals.options(config)._replace(split=struprune.Split(outer=1)),
    )  # fmt: skip
    assert isinstance(small.embedding[...], np.ndarray)
    block = maps.bytes_of(model.blocks) // depth
    tables = maps.bytes_of(model) - block * depth
    peak = _peak()
    rows.append(dict(depth=depth, live=max(seen), block=block, tables=tables, model=maps.bytes_of(model)))
    rows[-1] |= {"peak": peak, "before": before}
  return rows


def host_model(shape, depth: int, seed: int) -> Transformer:
  """Random weights, as NumPy's arrays: no layer was ever on the device."""
  abstract = jax.eval_shape(lambda: Transformer(TransformerConfig(**shape, depth=depth), jax.random.key(0)))
  rng = np.random.default_rng(seed)
  draw = lambda a: (rng.standard_normal(a.shape, np.float32) * np.float32(0.5 / a.shape[-1] ** 0.5)).astype(a.dtype)
  return jax.tree.map(draw, abstract)


class _Watched(np.ndarray):
  """An array that notes what is on the device whenever a part of it is read."""

  seen: list

  def __array_finalize__(self, other):
    self.seen = getattr(other, "seen", None)

  def __getitem__(self, index):
    if self.seen is not None and self.ndim == 3:
      self.seen.append(sum(a.nbytes for a in jax.live_arrays()))
    return np.asarray(self.view(np.ndarray)[index])


def watched(model: Transformer) -> tuple[Transformer, list[int]]:
  """(the model, bytes of live arrays at every time a matrix of a layer was read), without what lived before."""
  seen, start = [], sum(a.nbytes for a in jax.live_arrays())

  class Since(list):
    def append(self, value):
      seen.append(value - start)

  def watch(a):
    view = np.asarray(a).view(_Watched)
    view.seen = Since()
    return view

  return maps.with_blocks(model, jax.tree.map(watch, model.blocks)), seen


def _peak() -> int | None:
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use")
