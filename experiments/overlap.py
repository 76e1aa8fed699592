"""Independent pieces of work side by side."""

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator

import jax

from jaxlab.kernels import cudnn

_THREADS = 8


def overlapped(function: Callable, items: Iterable) -> Iterator:
  """`map(function, items)`; on an accelerator in threads, so that the host's cores compile several pieces at a time.

  On a CPU one after another: it computes with the cores that would compile. Products of cuBLAS must stay out of CUDA
  graphs then (docs/measuring.md, side by side), and paged attention does without cuDNN (`cudnn.left_out`).
  """
  if jax.default_backend() == "cpu":
    yield from map(function, items)
    return
  with cudnn.left_out(), concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    yield from pool.map(function, items)
