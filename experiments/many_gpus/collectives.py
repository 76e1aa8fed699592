"""What a compiled program sends between devices: every collective of its text, its size, how often it runs."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BITS = {
  "pred": 8,
  "bf16": 16,
  "f16": 16,
  "f32": 32,
  "f64": 64,
  **{f"{s}{n}": n for s in "su" for n in (8, 16, 32, 64)},
}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALL = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=(?:\{([^}]*)\}|(%?[\w.-]+))")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


class Collective(NamedTuple):
  """One instruction: its kind, bytes of its result on one device (of all arrays it combines), runs a call, loop depth."""

  kind: str
  bytes: int
  runs: int
  depth: int


def collectives(text: str) -> list[Collective]:
  """The collectives of `compiled.as_text()`, those that run most bytes first.

  A loop whose number of trips the compiler does not know counts as one.
  """
  bodies, entry = _computations(text)
  found = []

  def visit(name: str, runs: int, depth: int):
    for line in bodies.get(name, ()):
      if match := _CALL.search(line):
        found.append(Collective(match[2], _bytes(match[1], "-start(" in line), runs, depth))
      loop = " while(" in line
      trips = int(t[1]) if loop and (t := _TRIPS.search(line)) else 1
      for several, one in _CALLED.findall(line):
        for called in (several or one).replace("%", "").split(","):
          visit(called.strip(), runs * trips, depth + loop)

  visit(entry, 1, 0)
  return sorted(found, key=lambda c: -c.bytes * c.runs)


def summary(text: str) -> dict[str, dict[str, int]]:
  """{kind: {"instructions", "runs", "bytes"}} of one call of a compiled program, bytes as in `Collective`."""
  sums = defaultdict(lambda: {"instructions": 0, "runs": 0, "bytes": 0})
  for c in collectives(text):
    row = sums[c.kind]
    row["instructions"] += 1
    row["runs"] += c.runs
    row["bytes"] += c.bytes * c.runs
  return dict(sums)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  bodies, name, entry = {}, "", ""
  for line in text.splitlines():
    if match := _HEAD.match(line):
      name = match[1]
      bodies[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif name:
      bodies[name].append(line)
  return bodies, entry


def _bytes(shapes: str, start: bool) -> int:
  """Of the arrays in an instruction's type; an asynchronous start has (operands, results), of which the latter count."""
  sizes = [
    math.prod(map(int, filter(None, dims.split(",")))) * _BITS[kind] // 8 for kind, dims in _ARRAY.findall(shapes)
  ]
  return sum(sizes[len(sizes) // 2 :] if start and len(sizes) > 1 and shapes.startswith("((") else sizes)
