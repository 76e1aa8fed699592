"""How requests were served, by the exact definitions. All times are those at which the host read a token.

a arrival, s first scheduled, t_1 .. t_m its tokens:
time to first token t_1 - a; between tokens t_{i+1} - t_i, pooled over requests; time per output token
(t_m - t_1) / (m - 1), m >= 2; normalised latency (t_m - a) / m; scheduling delay s - a.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from jaxlab.core.checks import require
from jaxlab.serving.requests import Served


def between(served: Served) -> list[float]:
  """The gaps between a request's tokens."""
  return [after - before for before, after in itertools.pairwise(served.times)]


def summary(ended: Sequence[Served]) -> dict[str, float]:
  """{ttft, tbt, tpot, latency, delay: their _mean, _p50, _p95 and _p99; output and total tokens a second of the
  makespan, makespan}.

  Raises:
    InputError: nobody was served.
  """
  done = [s for s in ended if s.times]
  require(bool(done), "no request was served to its first token")
  values = {
    "ttft": [s.times[0] - s.request.arrival for s in done],
    "tbt": [gap for s in done for gap in between(s)],
    "tpot": [(s.times[-1] - s.times[0]) / (s.made - 1) for s in done if s.made > 1],
    "latency": [(s.times[-1] - s.request.arrival) / s.made for s in done],
    "delay": [s.scheduled - s.request.arrival for s in done],
  }
  made = {
    f"{name}_p{share}": float(np.percentile(found, share)) if found else float("nan")
    for name, found in values.items()
    for share in (50, 95, 99)
  }
  made |= {f"{name}_mean": float(np.mean(found)) if found else float("nan") for name, found in values.items()}
  makespan = max(s.times[-1] for s in done) - min(s.request.arrival for s in done)
  tokens = sum(s.made for s in done)
  return made | {
    "output_rate": tokens / makespan,
    "total_rate": (tokens + sum(len(s.request.prompt) for s in done)) / makespan,
    "makespan": makespan,
  }


def goodput(ended: Sequence[Served], *, ttft: float, tbt: float) -> float:
  """Requests a second whose first token came within `ttft`, and 99 % of whose gaps are within `tbt`."""
  within = lambda s: s.times[0] - s.request.arrival <= ttft and np.percentile(between(s) or [0.0], 99) <= tbt
  done = [s for s in ended if s.times]
  makespan = max(s.times[-1] for s in done) - min(s.request.arrival for s in done)
  return sum(map(within, done)) / makespan


def capacity(served_at: Callable[[float], Sequence[Served]], *, tbt: float, low: float, high: float) -> float:
  """The largest rate, to 2 %, at which pooled tbt_p99 stays within `tbt` and the median delay within 2 s, by bisection.

  Args:
    served_at: rate -> who was served at it; low: a rate that is known to do, high: one that is known not to.
  """
  require(0 < low < high, f"low is {low} and high {high}; expected 0 < low < high")
  while high / low > 1.02:
    middle = (low * high) ** 0.5
    found = summary(served_at(middle))
    if found["tbt_p99"] <= tbt and found["delay_p50"] <= 2:
      low = middle
    else:
      high = middle
  return low
