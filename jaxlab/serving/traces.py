"""Requests as they come: when, how long their prompts are, and how long their answers.

trace = with_arrivals(gamma(rng, rate=2.0, cv=3.0, count=1000), lengths)
replay(engine, requests_of(trace, rng, vocab_size=49152))
"""

import csv
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlab.core.checks import require
from jaxlab.core.foreign import foreign
from jaxlab.serving.engine import Engine
from jaxlab.serving.requests import Request, Served


class Trace(NamedTuple):
  """arrival: seconds from the first on, ascending; prompt, answer: tokens, at least 1."""

  arrival: Float[np.ndarray, "n"]
  prompt: Int[np.ndarray, "n"]
  answer: Int[np.ndarray, "n"]


def poisson(rng: np.random.Generator, *, rate: float, count: int) -> Float[np.ndarray, "count"]:
  """Arrivals at `rate` a second, independent of each other."""
  return gamma(rng, rate=rate, cv=1.0, count=count)


def gamma(rng: np.random.Generator, *, rate: float, cv: float, count: int) -> Float[np.ndarray, "count"]:
  """Gaps of mean 1 / rate whose standard deviation is `cv` times that (shape 1 / cv^2): bursts where cv > 1."""
  require(rate > 0 and cv > 0, f"rate is {rate} and cv {cv}; both must be positive")
  gaps = rng.gamma(1 / cv**2, cv**2 / rate, count)
  return np.cumsum(gaps) - gaps[:1]


def mmpp(
  rng: np.random.Generator, *, rates: tuple[float, float], hold: float, count: int
) -> Float[np.ndarray, "count"]:
  """A Poisson process that changes between two rates after exponential times of mean `hold` seconds."""
  require(min(rates) >= 0 and max(rates) > 0 and hold > 0, f"rates {rates} and hold={hold}; one rate and hold positive")
  found, now, state = [], 0.0, 0
  while len(found) < count:
    end = now + rng.exponential(hold)
    while rates[state] > 0 and len(found) < count:
      now += rng.exponential(1 / rates[state])
      if now > end:  # no memory: what is left of the gap is drawn anew at the other rate
        break
      found.append(now)
    now, state = end, 1 - state
  return np.array(found) - found[0]


def inverse_cdf(
  rng: np.random.Generator, points: Sequence[tuple[float, float]], count: int
) -> Int[np.ndarray, "count"]:
  """Lengths whose distribution is linear between points (share, length): ((0, 1), (0.5, 400), (1, 2000))."""
  share, length = np.array(points, float).T
  require(share[0] == 0 and share[-1] == 1 and (np.diff(share) > 0).all(), "shares must ascend from 0 to 1")
  return np.maximum(1, np.round(np.interp(rng.random(count), share, length))).astype(int)


def zipf(rng: np.random.Generator, *, low: int, high: int, theta: float, count: int) -> Int[np.ndarray, "count"]:
  """Lengths from `low` to `high`, the i-th of them as likely as i^-theta."""
  require(1 <= low <= high, f"low is {low} and high {high}; expected 1 <= low <= high")
  weights = np.arange(1, high - low + 2, dtype=float) ** -theta
  return rng.choice(np.arange(low, high + 1), count, p=weights / weights.sum())


def read(file: Path) -> Trace:
  """A CSV file with a header: a time stamp or seconds, tokens of the prompt, tokens of the answer (Azure's traces).

  Raises:
    InputError: no such file, or a row that is not of that kind.
  """
  rows: list[tuple[float, int, int]] = []
  place = lambda: f"row {len(rows) + 2}"
  with foreign(file, "give rows of a time, prompt tokens and answer tokens", place=place), open(file) as stream:
    for at, prompt, answer in list(csv.reader(stream))[1:]:
      now, before = _seconds(at), rows[-1][0] if rows else -np.inf
      require(now >= before and min(int(prompt), int(answer)) >= 0, f"{file}, {place()}: times descend, or tokens < 0")
      rows.append((now, int(prompt), int(answer)))
  require(bool(rows), f"{file} has no rows")
  at, prompt, answer = map(np.array, zip(*rows, strict=True))
  return Trace(at - at[0], np.maximum(prompt, 1), np.maximum(answer, 1))


def _seconds(text: str) -> float:
  try:
    return float(text)
  except ValueError:
    return datetime.fromisoformat(text[:26]).timestamp()


def requests_of(trace: Trace, rng: np.random.Generator, *, vocab_size: int) -> list[Request]:
  """Prompts of random tokens; nothing stops an answer before its length."""
  rows = zip(*(a.tolist() for a in trace), strict=True)
  return [
    Request(f"{i}", rng.integers(0, vocab_size, prompt).tolist(), answer, arrival=arrival)
    for i, (arrival, prompt, answer) in enumerate(rows)
  ]


def replay(
  engine: Engine, requests: Sequence[Request], *, wait: Callable[[float], object] = time.sleep
) -> list[Served]:
  """Serves requests as they arrive on the engine's clock, from its time now on, until all have ended.

  Args:
    wait: lets so many seconds pass, where nobody is served: a clock of a test moves on.
  """
  start, ended, next_ = engine.clock(), [], 0
  ordered = sorted(requests, key=lambda r: r.arrival)
  while next_ < len(ordered) or engine.busy:
    now = engine.clock() - start
    while next_ < len(ordered) and ordered[next_].arrival <= now:
      engine.add(ordered[next_])
      next_ += 1
    if engine.busy:
      engine.step()
      ended += engine.take_ended()
    else:
      wait(ordered[next_].arrival - now)
  for served in ended:
    served.scheduled -= start
    served.times = [at - start for at in served.times]
  return ended
