"""What a compiled program sends between devices: every collective of its text, its size, how often it runs."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_BITS |= {f"{sign}{bits}": bits for sign in "su" for bits in (8, 16, 32, 64)}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALL = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(rf"\b({'|'.join(_BITS)})\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=(?:\{([^}]*)\}|(%?[\w.-]+))")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_NOISE = re.compile(r"\{[^}]*\}|/\*.*?\*/|\s")  # layouts and comments inside a type


class Collective(NamedTuple):
  """One instruction: its kind, bytes of its result on a device (all arrays it combines), runs a call, loop depth."""

  kind: str
  bytes: int
  runs: int
  depth: int


def collectives(text: str) -> list[Collective]:
  """The collectives of `compiled.as_text()`, those that move most bytes first.

  A loop whose number of trips the compiler does not know counts as one.
  """
  bodies, entry = _computations(text)
  found = []

  def visit(name: str, runs: int, depth: int):
    for line in bodies.get(name, ()):
      if match := _CALL.search(line):
        found.append(Collective(match[2], _bytes(match[1], match[2], bool(match[3])), runs, depth))
      loop = " while(" in line
      trips = int(known[1]) if loop and (known := _TRIPS.search(line)) else 1
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
  """(lines of every computation by its name, the entry's name)."""
  bodies, name, entry = {}, "", ""
  for line in text.splitlines():
    if match := _HEAD.match(line):
      name = match[1]
      bodies[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif name:
      bodies[name].append(line)
  return bodies, entry


def _bytes(type_: str, kind: str, start: bool) -> int:
  """Of the results: the start of an asynchronous one has (operands, results, ..), but for an all-reduce's own form."""
  type_ = _NOISE.sub("", type_)
  if start and (kind != "all-reduce" or type_.startswith("((")):
    type_ = _elements(type_)[1]
  return sum(math.prod(map(int, filter(None, sizes.split(",")))) * _BITS[t] // 8 for t, sizes in _ARRAY.findall(type_))


def _elements(type_: str) -> list[str]:
  """The elements of a tuple's type, which may be tuples themselves."""
  parts, depth = [""], 0
  for letter in type_[1:-1]:
    depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
    if letter == "," and depth == 0:
      parts.append("")
    else:
      parts[-1] += letter
  return parts
