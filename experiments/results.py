"""What an experiment hands back, results.json, and parts of a run that are measured once.

An experiment is a module `experiments.<paper>` of four functions:

  measure(config, workdir, cache, console) -> metrics     runs what the config asks for; parts of it are kept on disk
  claims(config, metrics) -> [Claim, ...]                 at most 12 plain sentences; the first is the headline
  finding(config, metrics) -> str                         one computed sentence, our number beside the paper's
  draw(config, metrics, workdir) -> {file: caption}       the figures

The last three are functions of JSON: what is published can be checked against its own metrics. `UNDEFINED`, patterns of
metrics that may be NaN or infinite, is optional.
"""

import dataclasses
import fnmatch
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jaxlab.core.checks import require, require_choice
from jaxlab.core.files import write_files, write_text
from jaxlab.core.foreign import foreign

MOST_CLAIMS = 12
PART = ".part.json"
_DIVERGED = "no result is written: see why it diverged, or lower the learning rate, and take another --workdir"


@dataclasses.dataclass(frozen=True)
class Claim:
  """One checked statement; `holds` follows from `ours` and `threshold` and is never given.

  Attributes:
    better: "higher" (holds if ours >= threshold) or "lower" (ours <= threshold).
    paper: the published figure, or None where there is none.
    baseline: the figure of the baseline, or the words that say what it is.
    spread: (p10, p90) of a measured figure.
  """

  name: str
  unit: str
  better: str
  ours: float
  threshold: float
  paper: float | None = None
  baseline: float | str | None = None
  spread: tuple[float, float] | None = None
  note: str = ""

  def __post_init__(self):
    require_choice("Claim.better", self.better, ("higher", "lower"))

  @property
  def holds(self) -> bool:
    return bool(self.ours >= self.threshold if self.better == "higher" else self.ours <= self.threshold)

  def as_dict(self) -> dict:
    return {k: v for k, v in dataclasses.asdict(self).items() if v is not None} | {"holds": self.holds}


@dataclasses.dataclass
class Report:
  """Metrics (nested, JSON), claims, the headline first, and figures as {file name: caption} in the workdir.

  `undefined` names metrics ("distortion.*") for which NaN or infinity is no fault: a slope of one point, say.

  Raises:
    InputError: no claim, more than MOST_CLAIMS, or two of one name.
  """

  metrics: dict
  claims: list[Claim]
  finding: str
  figures: dict[str, str] = dataclasses.field(default_factory=dict)
  undefined: tuple[str, ...] = ()

  def __post_init__(self):
    names = [claim.name for claim in self.claims]
    require(1 <= len(names) <= MOST_CLAIMS, f"{len(names)} claims; a run makes 1 to {MOST_CLAIMS}")
    require(len(set(names)) == len(names), f"two claims of one name: {max(names, key=names.count)}")


def evaluate(experiment, config, workdir: Path, cache: Path, console) -> Report:
  """Runs an experiment (see the module's first lines)."""
  metrics = experiment.measure(config, workdir, cache, console)
  figures = experiment.draw(config, metrics, workdir)
  made, found = experiment.claims(config, metrics), experiment.finding(config, metrics)
  return Report(metrics, made, found, figures, getattr(experiment, "UNDEFINED", ()))


def write(report: Report, config, workdir: Path, seconds: float, command: str) -> dict:
  """Writes results.json and report.md into the workdir and returns the former.

  Where parts of the run were kept, commit, device, versions and seconds are theirs: this process may only read them.

  Raises:
    InputError: a metric or a claim is NaN or infinite (`require_finite`); nothing is written.
  """
  require_finite(report)
  files = {file.name.removesuffix(PART): file for file in sorted(workdir.glob(f"*{PART}"))}
  origins = {name: _without(json.loads(file.read_text()), "result") for name, file in files.items()}
  parts = list(origins.values())
  several = lambda name, own: ", ".join(dict.fromkeys(part[name] for part in parts)) or own
  results = {
    "paper": config.paper,
    "scale": config.scale,
    "name": f"x{jax.device_count()}" if config.get("per_machine") else config.scale,
    "command": command,
    "git": several("git", _git()),
    "device": several("device", _devices()),
    "versions": {
      name: ", ".join(dict.fromkeys(part["versions"][name] for part in parts)) or own
      for name, own in _versions().items()
    },
    "seconds": round(sum(part["seconds"] for part in parts) or seconds, 1),
    "config": json.loads(config.to_json_best_effort()),
    "parts": origins,
    "finding": report.finding,
    "headline": report.claims[0].name,
    "claims": [finite(claim.as_dict()) for claim in report.claims],
    "metrics": finite(report.metrics),
    "figures": report.figures,
  }
  write_text(workdir / "results.json", json.dumps(results, indent=1))
  write_text(workdir / "report.md", markdown(results))
  return results


def require_finite(report: Report) -> None:
  """Raises InputError naming the first metric or claim that is NaN or infinite, but for those of `report.undefined`."""
  for name, value in _numbers(report.metrics):
    expected = any(fnmatch.fnmatchcase(name, pattern) for pattern in report.undefined)
    require(math.isfinite(value) or expected, f"metric {name} is {value}; {_DIVERGED}")
  for claim in report.claims:
    for field, value in _numbers(dataclasses.asdict(claim)):
      require(math.isfinite(value), f"claim {claim.name!r}: {field} is {value}; {_DIVERGED}")


def _numbers(value, name: str = "") -> Iterator[tuple[str, float]]:
  """(dotted name, number) of every number in nested dicts, lists and arrays."""
  if isinstance(value, dict):
    for key, inner in value.items():
      yield from _numbers(inner, f"{name}.{key}" if name else str(key))
  elif isinstance(value, list | tuple):
    for i, inner in enumerate(value):
      yield from _numbers(inner, f"{name}.{i}")
  elif isinstance(value, float | int) or getattr(value, "ndim", None) == 0:
    yield name, float(value)


def markdown(results: dict) -> str:
  """One run: what was found, every claim, its figures."""
  name = results.get("name", results["scale"])  # of the published file
  lines = [
    f"## {results['paper']} at scale {results['scale']}" + (f", {name}" if name != results["scale"] else ""),
    "",
    results["finding"],
    "",
    f"`{results['command']}`",
    "",
    f"{results['device']}, jax {results['versions']['jax']}, {results['seconds']:.0f} s, "
    f"commit {', '.join(commit[:12] for commit in results['git'].split(', '))}",
    "",
    "| claim | paper | baseline | ours | holds |",
    "|---|---|---|---|---|",
  ]
  for c in results["claims"]:
    spread = f" ({number(c['spread'][0])} to {number(c['spread'][1])})" if "spread" in c else ""
    lines.append(
      f"| {cell(c['name'])} | {number(c.get('paper', '-'))} | {cell(c.get('baseline', '-'))} "
      f"| **{number(c['ours'])}** {cell(c['unit'])}{spread} | {verdict(c)} |"
    )
  lines += [""] + [f"- {c['name']}: {c['note']}" for c in results["claims"] if c.get("note")] + [""]
  lines += [f"![{caption}]({file})\n\n{caption}\n" for file, caption in results["figures"].items()]
  return "\n".join(lines)


def verdict(claim: dict) -> str:
  """ "yes" or "NO" with the threshold."""
  sign = ">=" if claim["better"] == "higher" else "<="
  return f"{'yes' if claim['holds'] else 'NO'} ({sign} {number(claim['threshold'])})"


def number(value) -> str:
  """Three or four significant digits; text as it is."""
  return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def cell(value) -> str:
  """A value inside a row of a Markdown table, where a bar would end the cell."""
  return number(value).replace("|", "\\|")


def finite(value):
  """JSON has no NaN or infinity: they become strings, at any depth."""
  if isinstance(value, dict):
    return {str(k): finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [finite(v) for v in value]
  if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
    value = value.item()
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def restored(value):
  """What `finite` was given, but for tuples and keys: NaN and infinities are numbers again."""
  if isinstance(value, dict):
    return {k: restored(v) for k, v in value.items()}
  if isinstance(value, list):
    return [restored(v) for v in value]
  return float(value) if value in ("nan", "inf", "-inf") else value


def has_part(workdir: Path, name: str) -> bool:
  return (workdir / f"{name}{PART}").exists()


def part(workdir: Path, name: str, measure) -> dict:
  """What `measure()` returned when this run's part `name` was measured: kept in the workdir as JSON, measured once."""
  file = workdir / f"{name}{PART}"
  if not has_part(workdir, name):
    start = time.perf_counter()
    origin = {"git": _git(), "device": _devices(), "versions": _versions()}
    kept = {**origin, "result": measure(), "seconds": time.perf_counter() - start}
    write_text(file, json.dumps(finite(kept), indent=1))
  with foreign(file, "remove it to measure this part again"):
    return restored(json.loads(file.read_text())["result"])


def keep_arrays(file: Path, arrays: dict) -> None:
  """Writes {name: array} into `file` (.npz): what a part has besides its JSON."""
  write_files(file.parent, {file.name: lambda stream: np.savez(stream, **arrays)})


def kept_arrays(file: Path, remedy: str) -> dict[str, np.ndarray]:
  """What `keep_arrays` wrote.

  Raises:
    InputError: no such file, or a damaged one; `remedy` says what to do.
  """
  with foreign(file, remedy), np.load(file) as kept:
    return dict(kept)


def _without(tree: dict, name: str) -> dict:
  return {key: value for key, value in tree.items() if key != name}


def _versions() -> dict[str, str]:
  return {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax")} | {"python": sys.version.split()[0]}


def _devices() -> str:
  return f"{jax.device_count()} x {device_kind()}"


def device_kind() -> str:
  kind = jax.devices()[0].device_kind
  return f"CPU ({os.cpu_count()} cores, {platform.machine()})" if kind == "cpu" else kind


def _git() -> str:
  """The commit, "-dirty" with uncommitted changes; GIT_COMMIT says it where the code runs on a copy."""
  if os.environ.get("GIT_COMMIT"):
    return os.environ["GIT_COMMIT"]
  describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
  run = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
  return run.stdout.strip() or "unknown"
