"""Input checks. One line: what is wrong, what was expected, what to do."""

import functools
import warnings
from collections.abc import Collection


class InputError(ValueError):
  """A mistake in what the user gave (config, checkpoint, data). The command line prints it and exits with status 2.

  Its message is one line even where a name or a foreign message in it has line breaks.
  """

  def __init__(self, message: str):
    super().__init__(" ".join(str(message).splitlines()))


def require(condition: object, message: str) -> None:
  """Raises InputError(message) unless `condition` holds. Conditions are static: shapes, config fields, files."""
  if not condition:
    raise InputError(message)


def require_choice(name: str, value: object, choices: Collection) -> None:
  """Raises InputError unless `value` is one of `choices`."""
  require(value in choices, f"{name} is {value!r:.80}; it must be one of {', '.join(map(str, choices))}")


def require_counts(**counts: int) -> None:
  """Raises InputError unless every count is at least 1."""
  for name, count in counts.items():
    require(count >= 1, f"{name} is {count}; it must be at least 1")


def require_none_negative(**numbers):
  """Raises InputError if one of them is negative or no number; traced ones pass."""
  import jax  # late, as below

  for name, number in numbers.items():
    require(isinstance(number, jax.Array) or number >= 0, f"{name} is {number}; it cannot be negative")


def require_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
  """Raises InputError unless `divisor` is positive and divides `value`."""
  require(
    divisor > 0 and value % divisor == 0,
    f"{divisor_name}={divisor} must divide {name}={value}; change one of the two",
  )


def require_key(key: object) -> None:
  """Raises InputError unless `key` is a random key of the new style, traced or not."""
  import jax  # late: a mistake on the command line is told before jax has started

  is_key = isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
  require(is_key, f"key is {key!r:.60}; give jax.random.key(0), or another seed")


def plain(*names: str) -> str:
  """Foreign names as part of a line: the first four, quoted where one is long or has characters that do not print."""
  return ", ".join(name if name.isprintable() and len(name) < 80 else f"{name!r:.80}" for name in names[:4])


@functools.cache
def warn_once(message: str) -> None:
  """Says once in a process what is slower, or takes more memory, than one would expect."""
  warnings.warn(message, stacklevel=3)
