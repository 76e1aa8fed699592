"""DHSA without a predictor, the form of its later kernels (arXiv 2510.24606): a share of all blocks for every head.

  method = compact(functools.partial(top_blocks, density=0.125), union=False)
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(method, chunk=8192, page=32))

Selectors as those of `selection`: pages are blocks of keys, `tiles` pages of queries (4 of 32 as published) choose
together, and a head keeps `density` of the blocks up to the chunk's end (its row's, where padding follows), all of them
where fewer lie behind. Beyond the published budget every query sees its own page, or some would see nothing.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.attention.selection import (
  Selection,
  all_if_none,
  block_means,
  blocks_behind,
  grouped_products,
  largest,
  minference,
)
from jaxlab.core.checks import require, require_counts


def top_blocks(
  q: Float[Array, "batch q_heads queries head_dim"],
  means: Float[Array, "batch kv_heads key_blocks head_dim"],
  *,
  past: Int[Array, ""] | int,
  block: int,
  real: Int[Array, "batch"] | None = None,
  density: float = 0.125,
  tiles: int = 4,
  ends: bool = False,
) -> Selection:
  """The blocks whose mean key has the largest product with the mean query; of equal ones the first.

  Args:
    means: `block_means` of the cache; real: as in `selection`.
    ends: the first block and the newest are among them, whatever their scores ("A", for its shape).

  Raises:
    InputError: a density outside 0 < density <= 1, or no tile.
  """
  require_counts(tiles=tiles)
  real = all_if_none(real, q)
  rows, behind = _rows(q, past, means.shape[2], block, real, tiles)
  score = grouped_products(rows, means)
  if ends:
    score = jnp.where((behind == 0) | (jnp.arange(means.shape[2]) == 0), jnp.inf, score)
  kept = _kept(past, block, real, density)
  chosen = largest(jnp.where(behind >= 0, score, -jnp.inf), kept)
  return _completed(_by_page(chosen, q, block, tiles), past, block, real, tiles, kept)


def vertical_slash(q, k, *, past, block: int, real=None, density: float = 0.125, tiles: int = 4) -> Selection:
  """The blocks that columns and diagonals cross: half of `density` of the tokens each, those of the largest attention
  that the last `tiles` pages of queries pay. These see everything ("vs"). `compact_attention.density` says how many
  blocks that makes.
  """
  require_counts(tiles=tiles)
  real = all_if_none(real, q)
  kept = _kept(past, block, real, density)
  half = kept[..., 0] * block // 2
  how = dict(vertical=half, slash=half, last=tiles * block, sink=0)
  chosen = minference(q, k, past=past, block=block, real=real, **how)
  return _completed(chosen, past, block, real, tiles, kept, last=True)


def vertical_slash_means(q, means, *, past, block: int, real=None, density: float = 0.125, tiles: int = 4) -> Selection:
  """`vertical_slash` in whole blocks, from the last pages' mean query and the mean keys ("vsb").

  There is one row of scores: what is large in it is a column and, at its distance from the newest block, a diagonal.
  """
  require_counts(tiles=tiles)
  real = all_if_none(real, q)
  rows, behind = _rows(q, past, means.shape[2], block, real, tiles)
  last = _last_row(block, real, tiles)[:, None, None, None]
  newest = jnp.take_along_axis(behind, last, axis=2)
  score = grouped_products(jnp.take_along_axis(rows, last, axis=2), means)
  kept = _kept(past, block, real, density)
  column = largest(jnp.where(newest >= 0, score, -jnp.inf), (kept + 1) // 2)
  # As far from the last row's newest block.
  source = jnp.arange(means.shape[2]) + newest[..., :1] - behind[..., :1]
  diagonal = jnp.take_along_axis(column, jnp.minimum(source, means.shape[2] - 1), axis=3)
  chosen = _by_page(column | diagonal, q, block, tiles)
  return _completed(chosen, past, block, real, tiles, kept, last=True)


def _rows(q, past, blocks: int, block: int, real, tiles: int):
  """(mean query of every `tiles` pages, how far its newest block is past every block: (batch, 1, rows, blocks))."""
  pages = q.shape[2] // block
  count = -(-pages // tiles)
  padded = jnp.pad(q, ((0, 0), (0, 0), (0, (count * tiles - pages) * block), (0, 0)))
  newest = _ends(past, block, real, tiles, jnp.arange(count)) - 1
  return block_means(padded, tiles * block, real), newest - jnp.arange(blocks)


def _ends(past, block: int, real, tiles: int, row: Int[Array, "rows"]) -> Int[Array, "batch 1 rows 1"]:
  """The blocks up to the end of rows of `tiles` pages, or to what counts of them."""
  pages = -(-real // block)
  return past // block + jnp.minimum((row + 1) * tiles, pages[:, None])[:, None, :, None]


def _last_row(block: int, real, tiles: int) -> Int[Array, "batch"]:
  """The last row of `tiles` pages with a query that counts."""
  return jnp.maximum(real - 1, 0) // (tiles * block)


def _kept(past, block: int, real, density: float) -> Int[Array, "batch 1 1 1"]:
  """Blocks that a row keeps."""
  require(0 < density <= 1, f"density is {density}; it must lie in 0 < density <= 1")
  return jnp.ceil(density * -(-(past + real) // block)).astype(jnp.int32)[:, None, None, None]


def _by_page(chosen, q, block: int, tiles: int):
  """The choice of every `tiles` pages for each of them."""
  return jnp.repeat(chosen, tiles, axis=2)[:, :, : q.shape[2] // block]


def _completed(chosen, past, block: int, real, tiles: int, kept, last: bool = False) -> Selection:
  """With every page's own block, all blocks in rows where no more than `kept` lie behind and, if asked, in the last."""
  behind = blocks_behind(past, *chosen.shape[2:], block)
  row = jnp.arange(chosen.shape[2]) // tiles
  whole = _ends(past, block, real, tiles, row) <= kept
  if last:
    whole |= (row == _last_row(block, real, tiles)[:, None])[:, None, :, None]
  return (chosen | whole | (behind == 0)) & (behind >= 0)
