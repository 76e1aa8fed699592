"""Forwards and backwards through `chunk_attention` against the same under a mask, by cuDNN and by XLA."""

import functools

import jax
import jax.numpy as jnp

from jaxlab.kernels import Bench
from jaxlab.kernels.chunk_attention import behind, packed


def cases(tiny: bool = False) -> dict[str, Bench]:
  """12 heads of 64: the last chunk of 32,768 tokens in chunks of 4,096, and such a chunk of eight sequences."""
  chunk, room, heads, size = (32, 128, 2, 16) if tiny else (4096, 32_768, 12, 64)
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, length: jax.random.normal(key, (1, length, heads, size), jnp.bfloat16)
  q, against, k, v = (draw(key, n) for key, n in zip(keys, (chunk, chunk, room, room), strict=True))
  start = jnp.int32(room - chunk)
  segments = (jnp.arange(chunk) * 8 // chunk)[None]
  place = jnp.arange(room)
  before = (place <= start + place[:chunk, None])[None, None]
  same = (segments[:, :, None] == segments[:, None])[:, None] & before[..., room - chunk :]
  behind_it = {
    "cudnn": functools.partial(behind, start=start),
    "reference": functools.partial(behind, start=start, implementation="reference"),
    "cudnn, masked": functools.partial(_masked, mask=before),
  }
  among = {
    "cudnn": functools.partial(packed, segments=segments, pieces=8),
    "reference": functools.partial(packed, segments=segments, pieces=8, implementation="reference"),
    "cudnn, masked": functools.partial(_masked, mask=same),
  }
  return {
    f"{chunk} tokens behind {room - chunk}": _case(behind_it, (q, k, v, against)),
    f"8 sequences in {chunk} tokens": _case(among, (q, k[:, :chunk], v[:, :chunk], against)),
  }


def _case(ways: dict, arrays: tuple) -> Bench:
  def through(attend):
    def run(q, k, v, against, _):
      out, pull = jax.vjp(attend, q, k, v)
      return (out, *pull(against)), None

    return run

  moved = 3 * arrays[0].nbytes + 2 * sum(a.nbytes for a in arrays[1:3]) + arrays[3].nbytes
  return Bench({name: through(attend) for name, attend in ways.items()}, arrays, None, moved, ours="cudnn")


def _masked(q, k, v, *, mask):
  implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
