"""Every Pallas kernel against the strongest public one for the same function: the `bench.py` beside each; and the tests
of all kernels as they are, where they need no interpreter."""

import functools
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp

from experiments import figures, results, timing
from experiments.results import Claim
from jaxlab.core.checks import require

_ROOT = Path(__file__).parents[1]


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """{"bandwidth": bytes a second, kernel: {case: {"milliseconds": {rival: ...}, "floor_ms"}}, "suite": of `suite`}."""
  part = functools.partial(results.part, workdir)
  bandwidth = part("bandwidth", timing.copy_bandwidth)
  benches = {
    name: importlib.import_module(f"jaxlab.kernels.{name}.bench").cases(config.tiny) for name in config.kernels
  }
  kernels = {}
  for name, cases in benches.items():
    for case, bench in console.track(name, list(cases.items())):
      measured = part(f"kernels.{name}.{case}", lambda bench=bench: measure_case(bench, config.repetitions, bandwidth))
      kernels.setdefault(name, {})[case] = measured
  tested = {"suite": part("suite", lambda: suite(config.suite))} if config.suite else {}
  return {"bandwidth": bandwidth, "kernels": kernels} | tested


def suite(platforms: str) -> dict:
  """{"passed", "failed", "skipped": counts, "names": of those that fail, "options": PYTEST_ADDOPTS, which may have left
  some out} of tests/kernels in a process of its own on JAX_PLATFORMS=`platforms`: on "cpu" interpreted.

  Raises:
    InputError: tests that do not run at all.
  """
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "suite.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "tests/kernels", f"--junitxml={file}"]
    env = os.environ | {"JAX_PLATFORMS": platforms, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ran = subprocess.run(command, cwd=_ROOT, env=env, capture_output=True, text=True, check=False)
    require(file.exists(), f"the kernels' tests do not run; pip install 'jaxlab[test]' ({ran.stderr.strip()[-200:]})")
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
  have = lambda *kinds: [case.get("name") for case in cases if any(case.find(kind) is not None for kind in kinds)]
  failed, skipped = have("failure", "error"), have("skipped")
  counts = {"passed": len(cases) - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)}
  return counts | {"names": failed, "options": os.environ.get("PYTEST_ADDOPTS", "")}


def measure_case(bench, repetitions: int, bandwidth: float) -> dict:
  """Device time alone: a launch takes longer than these kernels. An interpreter's time is not taken.

  Where the reference does not fit, cuDNN stands in for it.
  """
  oracle = "reference" if "reference" in bench.rivals else "cudnn"
  outputs = [jax.tree.leaves(jax.jit(bench.rivals[n])(*bench.arrays, bench.carry)[0]) for n in (bench.ours, oracle)]
  wide = [[a.astype(jnp.float32) for a in output] for output in outputs]
  apart = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(*wide, strict=True))
  seconds = {name: timing.device_seconds(_steady(f, bench), repetitions) for name, f in bench.rivals.items()}
  milliseconds = {name: 1e3 * s for name, s in seconds.items() if s is not None}
  floor = 1e3 * bench.bytes / bandwidth
  return {"difference": apart, "milliseconds": milliseconds, "floor_ms": floor, "ours": bench.ours}


def _steady(function, bench):
  if bench.carry is None:
    return timing.Steady(lambda arrays: function(*arrays, None)[0], bench.arrays)
  return timing.Steady(lambda arrays, carry: function(*arrays, carry), bench.arrays, carry=bench.carry)


def over_rivals(case: dict) -> float:
  """How many times as fast as the best rival the kernel is; `mosaic_gpu` is another form of it, no rival."""
  others = {name: ms for name, ms in case["milliseconds"].items() if name != "mosaic_gpu"}
  ours = others.pop(case.get("ours", "triton"))
  return min(others.values()) / ours


def claims(config, metrics: dict) -> list[Claim]:
  """Equal to the reference everywhere; faster than anything public where there is a GPU, and not an interpreter."""
  apart = {
    f"{name}, {case}": c["difference"] for name, cases in metrics["kernels"].items() for case, c in cases.items()
  }
  made = []
  for name, cases in metrics["kernels"].items() if _timed(config) else ():
    worst = min(cases, key=lambda case: over_rivals(cases[case]))
    made.append(
      Claim(
        f"How many times as fast as the best public kernel {name} is, worst case", "x", "higher",
        ours=over_rivals(cases[worst]), threshold=1.0, baseline="the faster of XLA's kernels and cuDNN",
        note="; ".join(
          f"{case}: {over_rivals(c):.2f} x, "
          + ", ".join(f"{rival} {ms * 1e3:.3g} us" for rival, ms in c["milliseconds"].items())
          + f", its bytes {c['floor_ms'] * 1e3:.2g} us"
          for case, c in cases.items()
        ),
      )
    )  # fmt: skip
  exact = Claim(
    "Largest difference of a kernel's output from its reference's over the largest output, bfloat16, worst case",
    "", "lower", ours=max(apart.values()), threshold=2**-6, baseline="the reference; a bfloat16 has 8 bits",
    note=f"worst: {max(apart, key=apart.get)}",
  )  # fmt: skip
  if "suite" not in metrics:
    return [*made, exact]
  counts = metrics["suite"]
  tested = Claim(
    "Tests of all kernels that fail on the device, not interpreted",
    "",
    "lower",
    ours=counts["failed"],
    threshold=0,
    note=f"{counts['passed']} pass, {counts['skipped']} are of another device or need the interpreter"
    + "".join(f"; {name} fails" for name in counts.get("names", ()))
    + (f"; run with {counts['options']}" if counts.get("options") else ""),
  )
  return [*made, exact, tested]


def finding(config, metrics: dict) -> str:
  if not _timed(config):
    return "Every kernel gives its reference's output in Pallas' interpreter; their speed needs a GPU."
  parts = []
  for name, cases in metrics["kernels"].items():
    ratios = [over_rivals(case) for case in cases.values()]
    parts.append(f"{name} {min(ratios):.2f} to {max(ratios):.2f}x")
  return f"Speed over the best public kernel for the same function: {', '.join(parts)}."


def _timed(config) -> bool:
  """An interpreter's time says nothing."""
  return config.scale not in ("test", "cpu")


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  what = over_rivals if _timed(config) else lambda case: case["difference"]
  title = (
    "Speed over the best public kernel for the same function" if _timed(config) else "Difference from the reference"
  )
  rows = {f"{name}\n{case}": what(c) for name, cases in metrics["kernels"].items() for case, c in cases.items()}
  figure, axis = figures.subplots(width=1.6, height=max(1.0, 0.09 * len(rows)))
  axis.barh(list(rows), list(rows.values()))
  axis.tick_params(axis="y", labelsize=7)
  axis.set(xlabel=title)
  return {figures.save(figure, workdir, "kernels"): title}
