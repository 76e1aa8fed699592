"""Full float32 where a result is a difference of large numbers."""

import functools
from collections.abc import Callable

import jax


def exactly(function: Callable) -> Callable:
  """The function with products of float32 matrices in float32: accelerators default to fewer bits."""

  @functools.wraps(function)
  def call(*args, **options):
    with jax.default_matmul_precision("highest"):
      return function(*args, **options)

  return call
