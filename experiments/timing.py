"""Timing: compile and warm up outside the clock, alternate contestants in one process, report medians and ratios."""

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of every repetition, by contestant; repetition i of all ran next to each other."""

  seconds: dict[str, np.ndarray]

  def median(self, name: str) -> float:
    return float(np.median(self.seconds[name]))

  def speedup(self, name: str, over: str) -> tuple[float, tuple[float, float]]:
    """(ratio of medians, (p10, p90) of the ratios repetition by repetition): how much faster `name` is than `over`."""
    ratios = self.seconds[over] / self.seconds[name]
    low, high = np.percentile(ratios, [10, 90])
    return self.median(over) / self.median(name), (float(low), float(high))

  def summary(self) -> dict:
    """{name: {median, p10, p90}} in milliseconds."""
    row = lambda t: dict(zip(("median", "p10", "p90"), np.percentile(t * 1e3, [50, 10, 90]).tolist(), strict=True))
    return {f"{name}": row(seconds) for name, seconds in self.seconds.items()}


def compare(
  contestants: dict[str, Callable[[], object]], *, repetitions: int, warmup: int = 3, inner: int = 1
) -> Times:
  """Runs A B C A B C ...; each call is waited for.

  Args:
    inner: calls a measurement, issued back to back; the time is per call. Use more than 1 for calls of microseconds.
  """
  for run in contestants.values():
    for _ in range(warmup):
      jax.block_until_ready(run())
  seconds = {name: np.empty(repetitions) for name in contestants}
  for i in range(repetitions):
    for name, run in contestants.items():
      start = time.perf_counter()
      for _ in range(inner):
        result = run()
      jax.block_until_ready(result)
      seconds[name][i] = (time.perf_counter() - start) / inner
  return Times(seconds)


def memory(compiled) -> dict[str, int]:
  """Bytes of arguments, outputs and temporaries of a compiled function."""
  stats = compiled.memory_analysis()
  return {
    "arguments": stats.argument_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
  }
