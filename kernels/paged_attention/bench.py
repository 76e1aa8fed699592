"""`paged_attention` beside XLA and cuDNN: a chunk over a long past, all of it or 30 % of its pages, and one token over
pages and over centroids."""

import functools

import jax
import jax.numpy as jnp

from jaxlab.kernels import Bench
from jaxlab.kernels.paged_attention import mosaic_gpu, paged_attention

LONG = 32768, 65536, 131072  # tokens whose scores the reference does not write out: many times a GPU's memory


def cases(tiny: bool = False) -> dict[str, Bench]:
  """32 over 8 heads of 128, as in Llama 3.1 8B: a chunk of 1,024 tokens, and one token of four rows."""
  if tiny:
    return {"tiny": _case(rows=2, heads=2, size=16, tokens=3, pages=3, page=16)}
  wide = dict(heads=4, size=128)
  chunk = lambda past, share: _case(rows=8, tokens=1024, pages=past // 128, page=128, share=share, **wide)
  return {
    "1024 tokens at 16384": chunk(16384, 1.0),
    **{f"1024 tokens at {past}": chunk(past, 1.0) for past in LONG},
    **{f"1024 tokens at {past}, 30 % of the pages": chunk(past, 0.3) for past in LONG},
    "1 token of 4 rows at 32768": _case(rows=32, tokens=1, pages=512, page=64, **wide),
    "1 token of 4 rows over 32768 centroids": _case(rows=32, tokens=1, pages=512, page=64, sizes=True, **wide),
  }


def _case(
  *, rows: int, heads: int, size: int, tokens: int, pages: int, page: int, sizes: bool = False, share: float = 1.0
) -> Bench:
  """`share` of the pages before the tokens are read."""
  keys, pool = jax.random.split(jax.random.key(0), 5), rows * pages
  draw = lambda i, *shape: jax.random.normal(keys[i], (*shape, size), jnp.bfloat16)
  table = jax.random.permutation(keys[3], pool).reshape(rows, pages).astype(jnp.int32)
  start = jnp.full(rows, pages * page - tokens, jnp.int32)
  past = (pages * page - tokens) // page
  opened = round(share * past)
  read = opened + pages - past
  count = jnp.tile(jnp.array([opened, read], jnp.int32), (rows, 1))
  weights = jax.random.randint(keys[4], (pool, page), 1, 9).astype(jnp.float32) if sizes else None
  arrays = draw(0, rows, tokens * heads), draw(1, pool, page), draw(2, pool, page), table, count, start, weights
  names = ["triton"] if tokens > 1 and pages * page in LONG else ["triton", "reference"]
  if jax.default_backend() == "gpu" and not sizes:
    names.append("cudnn")
  if tokens > 1 and mosaic_gpu.supports(*arrays):
    names.append("mosaic_gpu")
  rivals = {name: functools.partial(_by, name, heads) for name in names}
  return Bench(rivals, arrays, None, 2 * rows * read * page * size * 2)


def _by(implementation: str, heads: int, *arrays):
  *arrays, weights, _ = arrays
  how = dict(implementation=implementation, interpret=jax.default_backend() != "gpu" and implementation == "triton")
  return paged_attention(*arrays, heads=heads, sizes=weights, **how), None
