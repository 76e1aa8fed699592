"""Timing: compile and warm up outside the clock, alternate contestants in one process, report medians and ratios."""

import concurrent.futures
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
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
  compile_all(contestants)
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


def compile_all(contestants: dict[str, Callable]) -> None:
  """Compiles those that can be, next to each other."""
  ahead = [run.compile for run in contestants.values() if isinstance(run, Steady)]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    list(pool.map(lambda compile_ahead: compile_ahead(), ahead))


class Steady:
  """A contestant that evaluates `function(tree, *args)` on the same buffers in every call.

  The last output is donated to the next call. With outputs at new addresses a CUDA graph is rewritten node by node
  before each launch, which for small kernels takes longer than running them. `tree` is passed as a list of leaves: a
  module takes long to flatten. `compile` may run in a thread beside others; calls may not: two programs at once get
  temporary buffers at new addresses, and a graph with cuBLAS' own kernels in it refuses to be rewritten.
  """

  def __init__(self, function: Callable, tree, *args, carry=None, compiler_options=None):
    """
    Args:
      carry: if given, the function is `(tree, *args, carry) -> (output, carry)` and goes on from its own carry.
      compiler_options: options of XLA by name, for this function alone.
    """
    self._leaves, structure = jax.tree.flatten(tree)
    self._args, self._options, self._compiled = args, compiler_options, None

    def call(leaves, output, carry, *args):
      result = function(jax.tree.unflatten(structure, leaves), *args, *(() if carry is None else (carry,)))
      return (result, None) if carry is None else result

    self._jitted = jax.jit(call, donate_argnums=(1, 2), keep_unused=True)
    output, _ = jax.eval_shape(call, self._leaves, None, carry, *args)
    self._last = (jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), output), jax.tree.map(jnp.copy, carry))

  def compile(self) -> None:
    if self._compiled is None:
      self._compiled = self._jitted.lower(self._leaves, *self._last, *self._args).compile(self._options)

  def memory(self) -> dict[str, int]:
    """As `memory` of what is called."""
    self.compile()
    return memory(self._compiled)

  def flops(self) -> float:
    """Of a call, as XLA counts them."""
    self.compile()
    return self._compiled.cost_analysis()["flops"]

  def __call__(self):
    self.compile()
    self._last = self._compiled(self._leaves, *self._last, *self._args)
    return self._last[0]


def slope(points) -> float:
  """The exponent of a power law through (size, seconds); NaN of a single point."""
  return float(np.polyfit(*np.log(np.asarray(points, float)).T, 1)[0]) if len(points) > 1 else float("nan")


def kernels(run: Callable[[], object], repetitions: int = 3) -> float | None:
  """Kernels and copies a call launches on the GPU, from a profile; None elsewhere."""
  events = _profiled(run, repetitions)
  return None if events is None else len(events) / repetitions


def device_seconds(run: Callable[[], object], repetitions: int = 20) -> float | None:
  """Seconds a call's kernels run on the GPU, gaps between them left out, from a profile; None elsewhere.

  For single kernels of microseconds, whose launch takes longer than they do.
  """
  events = _profiled(run, repetitions)
  return None if events is None else sum(event.duration_ns for event in events) * 1e-9 / repetitions


def _profiled(run: Callable[[], object], repetitions: int) -> list | None:
  """The events on the GPU's streams of several calls."""
  if jax.default_backend() != "gpu":
    return None
  jax.block_until_ready(run())
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(repetitions):
        jax.block_until_ready(run())
    profile = jax.profiler.ProfileData.from_file(str(next(Path(folder).rglob("*.xplane.pb"))))
  streams = (line for plane in profile.planes if "GPU" in plane.name for line in plane.lines if "Stream" in line.name)
  return [event for line in streams for event in line.events]


def copy_bandwidth(size: int = 2**30, repetitions: int = 10) -> float:
  """Bytes a second, read plus written, of a large copy on this device."""
  size = size if jax.default_backend() != "cpu" else size // 16
  source = jnp.arange(size // 4, dtype=jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  return 2 * size / compare({"copy": lambda: copy(source)}, repetitions=repetitions, inner=repetitions).median("copy")


def memory(compiled) -> dict[str, int]:
  """Bytes of arguments, outputs and temporaries of a compiled function."""
  stats = compiled.memory_analysis()
  return {
    "arguments": stats.argument_size_in_bytes,
    "outputs": stats.output_size_in_bytes,
    "temporaries": stats.temp_size_in_bytes,
  }
