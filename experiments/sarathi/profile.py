"""How long steps of chosen sizes take, and what a fit to four fifths of them misses of the rest."""

import concurrent.futures
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxlab.models.inference import Network
from jaxlab.serving import batch, cost
from jaxlab.serving.cost import Work


class Point(NamedTuple):
  """A step that is timed: rows that decode, tokens that one chunk reads, keys before both."""

  decode: int
  chunk: int
  context: int

  @property
  def work(self) -> Work:
    chunks = [(self.context + self.chunk, self.chunk)] if self.chunk else []
    return Work.of(rows=self.decode + self.chunk, chunks=chunks, contexts=[self.context + 1] * self.decode)


def points(config) -> dict[str, list[Point]]:
  """By what they are for. Mixed steps have as many tokens as a chunk that fills whole tiles, rows among them."""
  p = config.profile
  beside = {rows: [chunk - rows for chunk in p.chunks] for rows in p.rows}
  lengths = dict.fromkeys((*p.chunks, *(chunk for chunks in beside.values() for chunk in chunks)))
  return {
    "decode": [Point(rows, 0, context) for rows in p.rows for context in p.contexts],
    "prefill": [Point(0, chunk, context) for chunk in lengths for context in (0, *p.contexts)],
    "mixed": [Point(rows, chunk, context) for rows in p.rows for chunk in beside[rows] for context in p.contexts],
    "tile": [Point(0, chunk, 0) for chunk in p.tile],
  }


def profile(config, read: Callable[[], Network], _, console) -> dict:
  """{kind: [{decode, chunk, context, seconds}]}: medians of steps that were run in turn; the fit and what it misses."""
  network, p, e = read(), config.profile, config.engine
  listed = list(dict.fromkeys(point for group in points(config).values() for point in group))
  longest = max(point.context + point.chunk for point in listed) + 1
  table = -(-longest // e.page)
  pools = batch.empty_pools(network, 1 + table * (1 + max(p.rows)), e.page)
  leaves, pages, seconds = jax.tree.leaves(network), 1 + np.arange(table), {point: [] for point in listed}

  def rows_of(count: int, length: int, start: int, first: int):
    packed, rows = batch.blank(count, length, table)
    for i in range(count):
      rows.start[i], rows.count[i], rows.table[i] = start, length, pages + table * (first + i)
    return packed

  shape_of = lambda point: batch.Shape(point.decode, int(point.chunk > 0), point.chunk)
  with concurrent.futures.ThreadPoolExecutor(16) as threads:
    shapes = list(dict.fromkeys(map(shape_of, listed)))
    programs = dict(zip(shapes, threads.map(lambda s: batch.compiled(network, pools, table, s), shapes), strict=True))
  for repetition in range(p.repetitions + 1):  # the first one does not count
    for point in listed:
      shape = shape_of(point)
      chunk = rows_of(shape.chunks, max(point.chunk, 1), point.context, 0)
      decode = rows_of(point.decode, 1, point.context, 1)
      start = time.perf_counter()
      pools, drawn, _ = programs[shape](leaves, pools, decode, chunk)
      jax.device_get(drawn)
      seconds[point] += [time.perf_counter() - start] * bool(repetition)
  middle = {point: statistics.median(values) for point, values in seconds.items()}
  row = lambda point: dict(point._asdict(), seconds=middle[point])
  found = {kind: [row(point) for point in group] for kind, group in points(config).items()}
  order = np.random.default_rng(config.seed).permutation(len(listed))
  held = [listed[i] for i in order[: max(1, len(listed) // 5)]]
  kept = [point for point in listed if point not in held]
  of = lambda group: ([point.work for point in group], [middle[point] for point in group])
  fitted = cost.fit(*of(kept), tile=p.tile_rows)
  console.say(f"  fit misses {cost.error(fitted, *of(held)):.1%} of steps that it has not seen")
  return found | {"weights": fitted.weights.tolist(), "missed": cost.error(fitted, *of(held))}


def marginal(found: dict) -> list[dict]:
  """{decode, chunk, context, ratio: of what a riding token costs to what it costs where rows decode alone}."""
  seconds = {
    (row["decode"], row["chunk"], row["context"]): row["seconds"]
    for kind in ("decode", "prefill", "mixed")
    for row in found[kind]
  }
  rows = []
  for (decode, chunk, context), together in seconds.items():
    if decode and chunk:
      ratio = (together - seconds[0, chunk, context]) / seconds[decode, 0, context]
      rows.append(dict(decode=decode, chunk=chunk, context=context, ratio=ratio))
  return rows
