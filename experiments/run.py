"""The one entry: python -m experiments.run --config=configs/<paper>.py:<scale> --workdir=DIR [--config.field=value]

Writes results.json, report.md, figures and checkpoints into DIR; the same command again resumes. Mistakes in the
config, the data or a checkpoint end in one line and exit status 2.
"""

import importlib
import json
import os
import re
import runpy
import sys
import time
import traceback
from pathlib import Path

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from configs.scales import SCALES
from experiments import overrides
from jaxlab.core.checks import InputError, require, require_choice

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/<paper>.py:<scale>", lock_config=True)
_DISTRIBUTED = flags.DEFINE_string(
  "distributed", None, "join the other hosts: auto (Slurm, MPI, TPU pods) or ADDRESS:PORT/COUNT/INDEX"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "where results, figures and checkpoints go")


def main(argv: list[str]) -> int:
  """Parses the command line, runs the experiment, prints its claims. Returns the exit status."""
  try:
    config, workdir = _parse(argv)
    _run(config, workdir, " ".join(["python -m experiments.run", *argv[1:]]))
    return 0
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    if error.errno is None:
      raise
    print(
      f"error: {error.strerror}: {error.filename or _WORKDIR.value}; free some space or mend the path", file=sys.stderr
    )
    return 2
  except KeyboardInterrupt:
    print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
    return 130


def _parse(argv: list[str]) -> tuple[ml_collections.ConfigDict, Path]:
  try:
    rest = flags.FLAGS(argv)
    require(len(rest) == 1, f"unexpected argument {' '.join(rest[1:])}; options start with --")
    require(_CONFIG.value is not None, "give --config=configs/<paper>.py:<scale>")
    config = _CONFIG.value
    flag = flags.FLAGS["config"]
    get_config = runpy.run_path(config_flags.get_config_filename(flag).split(":")[0])["get_config"]
    overrides.check(config_flags.get_override_values(flag), [get_config(scale) for scale in SCALES])
    require_choice("config.scale", config.scale, SCALES)
  except InputError:
    raise
  except (flags.Error, AttributeError, LookupError, TypeError, ValueError, OSError, ImportError) as error:
    raise InputError(_one_line(error)) from None
  require(bool(_WORKDIR.value), "give --workdir=DIR, where the results go")
  return config, Path(_WORKDIR.value)


def _one_line(error: Exception) -> str:
  """The cause alone: an error inside a config file comes with its whole traceback as text."""
  text = str(error)
  if missing := re.match(r"\W*'(\w+)\W*'", text):  # quoted once or twice, with or without a proposal
    near = re.search(r'Did you mean "\w+"', text)
    return f"the config has no field {missing[1]!r}; {near[0] + '?' if near else 'see the fields in the config file'}"
  text = text.replace("FATAL Flags parsing error:", "").strip()
  if "InputError: " in text:  # a config file's own refusal, which says it all
    return text.split("InputError: ")[-1]
  cause = text.splitlines()[-1].strip() if "Traceback" in text else " ".join(text.split())
  where = f"{text.split(': Error')[0]}: " if "Traceback" in text else ""
  return f"{where}{cause[:300]}; see the fields in the config file"


def _run(config, workdir: Path, command: str) -> None:
  # Imported late: a mistake on the command line is told at once, not after jax has started.
  import jax

  from experiments import results
  from experiments.console import Console
  from jaxlab.core.command import cache_folder
  from jaxlab.training.loop import Interrupted

  if _DISTRIBUTED.value:
    _join(_DISTRIBUTED.value)
  cache = cache_folder()
  # orbax logs the traceback of a failed save that also reaches `main` as an error of one line.
  logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = _quiet_about_closed_loops
  first = jax.process_index() == 0
  if first:
    _same_config(config, workdir)
  console = Console(quiet=not first)
  console.say(f"{config.paper} ({config.scale}) on {jax.device_count()} x {results.device_kind()}, into {workdir}")
  experiment = importlib.import_module(f"experiments.{config.experiment}")
  start = time.perf_counter()
  try:
    report = results.evaluate(experiment, config, workdir, cache, console)
  except Interrupted as interrupted:
    console.say(str(interrupted))
    raise KeyboardInterrupt from None
  if first:
    written = results.write(report, config, workdir, time.perf_counter() - start, command)
    console.claims(written)
    for file in ("results.json", "report.md", *report.figures):
      console.say(f"  {workdir / file}")
  if _DISTRIBUTED.value:
    jax.distributed.shutdown()  # waits for the others: one whose coordinator is gone aborts


def _quiet_about_closed_loops(unraisable) -> None:
  """A save that fails closes its asyncio loop while other writes are under way. Their threads, which find it closed,
  print a traceback each; what matters is the first failure, which reaches `main`."""
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _join(how: str) -> None:
  """jax.distributed.initialize by the flag."""
  import jax

  if how == "auto":
    jax.distributed.initialize()
    return
  parts = how.split("/")
  require(
    len(parts) == 3 and ":" in parts[0] and parts[1].isdigit() and parts[2].isdigit(),
    f"--distributed is {how!r}; it must be auto or ADDRESS:PORT/COUNT/INDEX",
  )
  jax.distributed.initialize(parts[0], num_processes=int(parts[1]), process_id=int(parts[2]))


def _same_config(config, workdir: Path) -> None:
  """Writes config.json, or refuses a folder that holds a run of another config.

  Devices may be others, and so may the parts and the subjects they are of: what a part is called says which it is.
  """
  from jaxlab.core.files import write_text
  from jaxlab.core.foreign import foreign

  mine = json.loads(config.to_json_best_effort())
  file = workdir / "config.json"
  if file.exists():
    with foreign(f"{file} is damaged", "remove it if its checkpoints belong to this config"):
      a, b = _flatten(json.loads(file.read_text())), _flatten(mine)
    names = {name for name in a.keys() | b.keys() if not name.startswith("mesh.")}
    names = {name for name in names if name.split(".")[-1] not in ("parts", "subjects")}
    changed = sorted(name for name in names if a.get(name) != b.get(name))
    require(
      not changed,
      f"{workdir} holds a run of another config ({changed[0]} was {a.get(changed[0])}, is {b.get(changed[0])}); "
      "use another --workdir"
      if changed
      else "",
    )
  workdir.mkdir(parents=True, exist_ok=True)
  write_text(file, json.dumps(mine, indent=1))


def _flatten(tree: dict, prefix: str = "") -> dict:
  flat = {}
  for name, value in tree.items():
    flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
  return flat


if __name__ == "__main__":
  try:
    status = main(sys.argv)
  except Exception:
    traceback.print_exc()
    status = 1
  # Threads of data loaders and checkpointers must not hold a finished process.
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)
