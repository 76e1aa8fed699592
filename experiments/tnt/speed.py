"""Seconds of a training step against the length of its rows, as many tokens in all of them."""

import numpy as np

from experiments import timing
from experiments.tnt.arms import TITANS, TNT, fresh, loss_of, optimizer, shape_of
from jaxlab.core import mesh as meshes
from jaxlab.training import loop

LARGE, TRANSFORMER = "TNT, larger chunks", "Transformer"
NAMES = (TITANS, TNT, LARGE, TRANSFORMER)


def measure(config, vocabulary: int) -> dict:
  """{"milliseconds": {arm: {length: median, p10, p90}}, "over": {arm: [over Titans, [p10, p90]]}, at the longest}.

  Whole steps, optimizer included, in one process and turn by turn. TNT has one local memory, whose chunks are Titans'.
  """
  s, mesh = config.speed, meshes.make_mesh(config.mesh.to_dict())
  rng = np.random.default_rng(0)

  def step(name: str, length: int):
    changed = config.copy_and_resolve_references()
    changed.chunks.local = (s.large if name == LARGE else config.chunks.titans,)
    changed.chunks.shard, changed.chunks.whole = s.shard, s.whole
    shape = shape_of(changed, TNT if name == LARGE else name, vocabulary)
    made = optimizer(1e-3, steps=1000)
    state = loop.initial_state(fresh(shape, 0), made, mesh, 0)
    run = loop.make_step(loss_of(changed), made, meshes.shardings(state, mesh), compute_dtype=config.train.dtype)
    ids = rng.integers(0, vocabulary, (s.tokens // length, length + 1)).astype(np.int32)
    batch = meshes.place_batch({"inputs": ids[:, :-1], "targets": ids[:, 1:]}, mesh)
    return timing.Steady(lambda _, batch, state: run(state, batch)[::-1], (), batch, carry=state)

  found = {name: {} for name in NAMES}
  for length in s.lengths:
    times = timing.compare({name: step(name, length) for name in NAMES}, repetitions=s.repetitions, warmup=1)
    for name, row in times.summary().items():
      found[name][f"{length}"] = row
  over = {name: times.speedup(name, over=TITANS) for name in NAMES}
  return {"milliseconds": found, "over": {name: [ratio, list(spread)] for name, (ratio, spread) in over.items()}}


def exponent(rows: dict[str, dict]) -> float:
  """The log-log slope of a row's seconds over its length: a step has as many tokens, so fewer rows, at every length."""
  return timing.slope([(int(length), row["median"] * int(length)) for length, row in rows.items()])
