"""Pallas kernels, each beside its reference: one op a folder, with its implementations, tests and bench.

Installed as `jaxlab.kernels`. An op takes `implementation=` and `interpret=`; None picks what runs best where it is
called, which on anything but a GPU is the reference: XLA's own kernels.
"""

from collections.abc import Callable
from typing import NamedTuple


class Bench(NamedTuple):
  """A case of a kernel's `bench.cases`: what is timed, and the least it can take.

  Attributes:
    rivals: {name: (*arrays, carry) -> (output, carry)}, the kernel and its reference among them; on anything but a GPU
      the kernel runs interpreted.
    arrays, carry: what a rival is given; the carry (a cache, or None) is donated from call to call.
    bytes: read and written once, the floor at the bandwidth of a large copy.
    ours: the kernel's name among the rivals.
  """

  rivals: dict[str, Callable]
  arrays: tuple
  carry: tuple | None
  bytes: int
  ours: str = "triton"
