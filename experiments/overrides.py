"""Checks of what --config.field=value gives, made before anything is imported that takes time.

What a field may hold follows from what it holds at the scales of its config: a count stays a count, a tuple of integers
a tuple of integers. The experiment knows the rest (shapes that must fit, names of methods) and checks it when it runs.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from jaxlab.core.checks import require, require_choice

DTYPES = ("float32", "bfloat16", "float16", "float64")
_GIVEN = ("paper", "experiment", "scale")  # by --config itself
_PARTS = "parts"  # of an experiment: those that some scale names
_SHARES = {"recall", "warmdown", "mixing", "share", "shares", "ratio", "ratios", "side_ratios", "doses", "supernodes"}
_MAY_BE_ZERO = {"warmup"}  # counts that are positive at every scale
_MISSING = object()


def check(overrides: Mapping[str, object], configs: Sequence) -> None:
  """Checks {"train.steps": 5, ...} against the config at every scale.

  Raises:
    InputError: a number that is NaN, infinite or out of the field's range, a share outside 0..1, an unknown dtype or
      part, a tuple that is empty or has members of another type, a field that follows from --config.
  """
  for path, value in overrides.items():
    name = path.split(".")[-1]
    defaults = [found for config in configs if (found := _at(config, path)) is not _MISSING]
    require(path not in _GIVEN, f"config.{path} follows from --config=configs/<paper>.py:<scale>; set it there")
    if any(isinstance(default, tuple) for default in defaults):
      members = [member for default in defaults for member in default]
      require(bool(value) or () in defaults or not members, f"config.{path} is empty; give at least one member")
      for i, member in enumerate(value):
        _check(f"config.{path}[{i}]", name, member, members)
    else:
      _check(f"config.{path}", name, value, defaults)


def _check(path: str, name: str, value, defaults: Sequence) -> None:
  """One value against those that its place holds at the scales."""
  kinds = {type(default) for default in defaults}
  if kinds and not (kinds == {float} and type(value) is int):
    words = " or ".join(sorted(kind.__name__ for kind in kinds))
    require(type(value) in kinds, f"{path} is {value!r}; it must be of type {words}")
  if name == "dtype" or name.endswith("_dtype"):
    require_choice(path, value, DTYPES)
  if name == _PARTS:
    require_choice(path, value, tuple(dict.fromkeys(defaults)))
  if type(value) not in (int, float):
    return
  require(math.isfinite(value), f"{path} is {value}; it must be finite")
  if name in _SHARES:
    require(0 <= value <= 1, f"{path} is {value}; a share lies in 0..1")
  numbers = [default for default in defaults if type(default) in (int, float)]
  least = min(numbers, default=-math.inf)
  if least >= 1 and type(value) is int and name not in _MAY_BE_ZERO:
    require(value >= 1, f"{path} is {value}; it must be at least 1")
  elif least >= 0:
    require(value >= 0, f"{path} is {value}; it must not be negative")
  require(abs(value) < 2**63, f"{path} is {value}; it must fit 64 bits")


def _at(config, path: str):
  """The value at "bench.cases[0].tokens", or _MISSING: a scale need not have every field."""
  for step in _steps(path):
    try:
      config = config[step]
    except (KeyError, IndexError, TypeError):
      return _MISSING
  return config


def _steps(path: str) -> Iterator[str | int]:
  for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
    yield int(index) if index else name
