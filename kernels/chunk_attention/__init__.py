"""Attention of a chunk that a network is trained on: behind what is cached of its sequence, or of several sequences
that share it. Causal, with its derivative, and without a mask where cuDNN can do it: of a mask cuDNN reads every entry,
multiplies what it hides, and writes a derivative of as many numbers.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require, require_choice, warn_once
from jaxlab.kernels import cudnn as library
from jaxlab.kernels.chunk_attention import cudnn

IMPLEMENTATIONS = (None, "reference", "cudnn")


def preferred(q, k, window: int | None) -> bool:
  """Whether `behind` and `packed` take cuDNN by themselves."""
  return library.allowed() and cudnn.supports(q, k, window) and _proved()


@functools.cache
def _proved() -> bool:
  """Whether cuDNN gives the reference's outputs and derivatives on a small problem, tried once a process: JAX promises
  nothing of what is called here, and a wrong derivative would train on without a word.

  In a thread of its own, where no program is being traced. `jax.ensure_compile_time_eval` would not do: within it what
  cuDNN's calls make is constants, and JAX asserts that a call it partitions has none.
  """
  with ThreadPoolExecutor(1) as alone:
    return alone.submit(_agree).result()


def _agree() -> bool:
  rng = np.random.default_rng(0)
  q, k, v, against = (
    jnp.asarray(rng.normal(size=(2, n, heads, 64)), jnp.bfloat16)
    for n, heads in ((128, 2), (512, 1), (512, 1), (128, 2))
  )
  segments = jnp.asarray(np.repeat(np.arange(4), (30, 1, 57, 40))[None].repeat(2, axis=0))

  @functools.partial(jax.jit, static_argnums=0)
  def through(implementation, q, k, v):
    how = dict(implementation=implementation)
    ways = [functools.partial(behind, start=start, **how) for start in (jnp.int32(0), jnp.int32(256))]
    ways.append(lambda q, k, v: packed(q, k[:, :128], v[:, :128], segments, pieces=5, **how))
    results = [jax.vjp(way, q, k, v) for way in ways]
    return [(out, *pull(against)) for out, pull in results]

  try:
    ours, theirs = (jax.tree.leaves(through(name, q, k, v)) for name in ("cudnn", "reference"))
  except Exception as error:  # whatever a new version of a private function says
    warn_once(f"cuDNN's calls fail here ({type(error).__name__}); chunks attend under XLA's mask")
    return False
  wide = lambda a: np.asarray(a, np.float32)
  near = all(np.abs(wide(a) - wide(b)).max() < 2**-5 * np.abs(wide(b)).max() for a, b in zip(ours, theirs, strict=True))
  if not near:
    warn_once("cuDNN's calls give other numbers than the reference here; chunks attend under XLA's mask")
  return near


def behind(q, k, v, *, start, window: int | None = None, implementation: str | None = None):
  """A chunk's attention over a cache that holds what is before it, and its own keys and values at their place.

  With cuDNN two calls, over what is before the chunk by its length and over the chunk causally, put together by their
  log-sum-exp; backwards each has the whole's.

  Args:
    q: (batch, chunk, q_heads, head_dim), at positions start, start + 1, ...; start: int32[] or int, one for all rows.
    k, v: (batch, positions, kv_heads, head_dim); past the chunk they must hold numbers, and are not seen.
    window: positions back that a query sees beside its own; None: all.
    implementation: "reference" (XLA, under a mask) or "cudnn" (16 bits, no window, Hopper or later); None picks.

  Returns:
    like q.

  Raises:
    InputError: an unknown implementation, shapes that do not fit, or a problem that cuDNN cannot take.
  """
  if _checked(q, k, v, window, implementation) == "cudnn":
    return meshes.each_row(cudnn.behind, q, k, v, jnp.asarray(start, jnp.int32))
  query, key = (start + jnp.arange(q.shape[1]))[:, None], jnp.arange(k.shape[1])
  return _masked(q, k, v, ((key <= query) & _within(query, key, window))[None])


def packed(q, k, v, segments, *, pieces: int, window: int | None = None, implementation: str | None = None):
  """Attention within each of the sequences that lie one behind the other in a chunk.

  Args:
    q, k, v: (batch, chunk, heads, head_dim), as many keys as queries.
    segments: int32 (batch, chunk), one number for the tokens of a sequence, another than its neighbours'.
    pieces: how many sequences a row has at most, padding at its end counted as one: cuDNN's memory grows with it, and
      a row that has more comes out as NaN.
    window, implementation: as of `behind`.

  Returns:
    like q.

  Raises:
    InputError: as `behind`.
  """
  require(k.shape[1] == q.shape[1] and segments.shape == q.shape[:2], f"q {q.shape}, k {k.shape} and segments "
    f"{segments.shape} do not fit: expected (batch, chunk, heads, head_dim) twice and (batch, chunk)")  # fmt: skip
  require(pieces >= 1, f"pieces is {pieces}; a chunk has one or more")
  if _checked(q, k, v, window, implementation) == "cudnn":
    out = meshes.each_row(cudnn.packed, q, k, v, lengths(segments, max(pieces, 2)))
    more = (segments[:, 1:] != segments[:, :-1]).sum(axis=1) >= pieces
    return jnp.where(more[:, None, None, None], jnp.nan, out)
  place = jnp.arange(q.shape[1])
  see = (place <= place[:, None]) & _within(place[:, None], place, window)
  return _masked(q, k, v, see & (segments[:, :, None] == segments[:, None]))


def lengths(segments, pieces: int):
  """int32 (batch, pieces): of the runs of one number in every row, in order; -1 where there is none."""
  chunk = segments.shape[1]
  first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  begin = jax.vmap(lambda row: jnp.nonzero(row, size=pieces, fill_value=chunk)[0])(first)
  end = jnp.pad(begin[:, 1:], ((0, 0), (0, 1)), constant_values=chunk)
  return jnp.where(begin < chunk, end - begin, -1).astype(jnp.int32)


def _checked(q, k, v, window, implementation) -> str:
  require_choice("implementation", implementation, IMPLEMENTATIONS)
  fits = k.shape == v.shape and q.ndim == k.ndim == 4 and q.shape[::3] == k.shape[::3] and q.shape[2] % k.shape[2] == 0
  require(fits, f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: expected (batch, chunk, q_heads, head_dim) and "
    "(batch, positions, kv_heads, head_dim) twice, with whole groups of query heads")  # fmt: skip
  if implementation is None:
    return "cudnn" if preferred(q, k, window) else "reference"
  able = implementation == "reference" or cudnn.supports(q, k, window)
  require(able, f"cuDNN {cudnn.NEEDS}; use implementation='reference'")
  return implementation


def _within(query, key, window: int | None):
  return True if window is None else key >= query - window


def _masked(q, k, v, see):
  return jax.nn.dot_product_attention(q, k, v, mask=see[:, None], implementation="xla")
