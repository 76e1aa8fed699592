"""Seconds of a training step against the length of its rows, as many tokens in all of them."""

import numpy as np

from experiments import timing
from experiments.tnt.arms import PLAIN, SMALL, TITANS, TNT, fresh, loss_of, optimizer, shape_of
from jaxlab.core import mesh as meshes
from jaxlab.training import loop

LARGE, TRANSFORMER = "TNT, larger chunks", "Transformer"
NAMES = (TITANS, PLAIN, TNT, LARGE, TRANSFORMER)


def contestants(config) -> dict[str, tuple[str, int]]:
  """{name: (arm, chunk of its one memory)}: those of every run, Titans and TNT at the config's further chunks."""
  s, c = config.speed, config.chunks
  # A Transformer has no chunks, but as many parameters as a TNT that has these.
  same = {arm: (arm, c.titans) for arm in (TITANS, PLAIN, TNT, TRANSFORMER)}
  found = {name: (TNT, s.large) if name == LARGE else same[name] for name in NAMES}
  more = ((TITANS, s.more.titans), (TNT, s.more.tnt))
  return found | {f"{arm}, chunks of {n}": (arm, n) for arm, chunks in more for n in chunks}


def measure(config, vocabulary: int) -> dict:
  """Whole steps, optimizer included, in one process and turn by turn. But in "small", TNT has one local memory.

  Returns:
    {"milliseconds": {contestant: {length: median, p10, p90}}, "small": [time of a step at small chunks over TNT's,
    [p10, p90]], both as they are trained}, and at the longest {"over": {contestant: [speed over Titans', [p10, p90]]},
    "plain": [TNT's speed over plain Titans', [p10, p90]], "same": {chunk: [over Titans' in it, [p10, p90]]}}.
  """
  s, t, entered = config.speed, config.train, contestants(config)
  found = {name: {} for name in entered}
  for length in s.lengths:
    steps = {name: _one_memory(config, *how, vocabulary, length) for name, how in entered.items()}
    times = timing.compare(steps, repetitions=s.repetitions, warmup=1)
    for name, row in times.summary().items():
      found[name][f"{length}"] = row
  over = {name: times.speedup(name, over=TITANS) for name in entered}
  at = {how: name for name, how in entered.items()}
  shared = [n for arm, n in sorted(at) if arm == TNT and (TITANS, n) in at]
  same = {f"{n}": times.speedup(at[TNT, n], over=at[TITANS, n]) for n in shared}
  trained = {name: step(config, name, vocabulary, t.batch, t.length) for name in (TNT, SMALL)}
  small = timing.compare(trained, repetitions=s.repetitions, warmup=1).speedup(TNT, over=SMALL)
  as_lists = lambda ratio, spread: [ratio, list(spread)]
  return {
    "milliseconds": found,
    "over": {name: as_lists(*faster) for name, faster in over.items()},
    "plain": as_lists(*times.speedup(TNT, over=PLAIN)),
    "same": {chunk: as_lists(*faster) for chunk, faster in same.items()},
    "small": as_lists(*small),
  }


def step(config, name: str, vocabulary: int, rows: int, length: int) -> timing.Steady:
  """An arm's training step on random tokens."""
  mesh, made = meshes.make_mesh(config.mesh.to_dict()), optimizer(1e-3, steps=1000)
  state = loop.initial_state(fresh(shape_of(config, name, vocabulary), 0), made, mesh, 0)
  run = loop.make_step(loss_of(config), made, meshes.shardings(state, mesh), compute_dtype=config.train.dtype)
  ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
  batch = meshes.place_batch({"inputs": ids[:, :-1], "targets": ids[:, 1:]}, mesh)
  return timing.Steady(lambda _, batch, state: run(state, batch)[::-1], (), batch, carry=state)


def _one_memory(config, arm: str, chunk: int, vocabulary: int, length: int) -> timing.Steady:
  """The step that is timed against the length; the chunk is that of Titans' memory and of TNT's one local memory."""
  s, changed = config.speed, config.copy_and_resolve_references()
  changed.chunks.local, changed.chunks.titans = (chunk,), chunk
  changed.chunks.shard, changed.chunks.whole = s.shard, s.whole
  return step(changed, arm, vocabulary, s.tokens // length, length)


def like_for_like(found: dict) -> tuple[str, float, list[float]]:
  """(rival, speed of TNT's step over its, [p10, p90]): Titans written by TNT's rule, where that was timed."""
  return (PLAIN, *found["plain"]) if "plain" in found else (TITANS, *found["over"][TNT])


def exponent(rows: dict[str, dict]) -> float:
  """The log-log slope of a row's seconds over its length: a step has as many tokens, so fewer rows, at every length."""
  return timing.slope([(int(length), row["median"] * int(length)) for length, row in rows.items()])
