"""DHSA without a predictor, the form of its later kernels (arXiv 2510.24606): a share of all blocks for every head.

  method = compact(functools.partial(top_blocks, density=0.125), union=False)
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged.decoder(method, chunk=8192, page=32))

Selectors as those of `selection`: pages are blocks of keys, `tiles` pages of queries (4 of 32 as published) choose
together, and a head keeps `density` of the blocks up to the chunk's end, all of them where fewer lie behind. Beyond the
published budget every query sees its own page, or some would see nothing.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.attention.selection import Selection, block_means, blocks_behind, grouped_products, largest, minference
from jaxlab.core.checks import require


def top_blocks(
  q: Float[Array, "batch q_heads queries head_dim"],
  means: Float[Array, "batch kv_heads key_blocks head_dim"],
  *,
  past: Int[Array, ""] | int,
  block: int,
  density: float = 0.125,
  tiles: int = 4,
  ends: bool = False,
) -> Selection:
  """The blocks whose mean key has the largest product with the mean query; of equal ones the first.

  Args:
    means: `block_means` of the cache.
    ends: the first block and the newest are among them, whatever their scores ("A", for its shape).

  Raises:
    InputError: a density outside 0 < density <= 1.
  """
  rows, behind = _rows(q, past, means.shape[2], block, tiles)
  score = grouped_products(rows, means)
  if ends:
    score = jnp.where((behind == 0) | (jnp.arange(means.shape[2]) == 0), jnp.inf, score)
  kept = _kept(q, past, block, density)
  chosen = largest(jnp.where(behind >= 0, score, -jnp.inf), kept)
  return _completed(_by_page(chosen, q, block, tiles), q, past, block, tiles, kept)


def vertical_slash(q, k, *, past, block: int, density: float = 0.125, tiles: int = 4) -> Selection:
  """The blocks that columns and diagonals cross: half of `density` of the tokens each, those of the largest attention
  that the last `tiles` pages of queries pay. These see everything ("vs"). `compact_attention.density` says how many
  blocks that makes.
  """
  kept = _kept(q, past, block, density)
  half = kept * block // 2
  chosen = minference(q, k, past=past, block=block, vertical=half, slash=half, last=tiles * block, sink=0)
  return _completed(chosen, q, past, block, tiles, kept, last=True)


def vertical_slash_means(q, means, *, past, block: int, density: float = 0.125, tiles: int = 4) -> Selection:
  """`vertical_slash` in whole blocks, from the last pages' mean query and the mean keys ("vsb").

  There is one row of scores: what is large in it is a column and, at its distance from the newest block, a diagonal.
  """
  rows, behind = _rows(q, past, means.shape[2], block, tiles)
  score = grouped_products(rows[:, :, -1:], means)
  kept = _kept(q, past, block, density)
  column = largest(jnp.where(behind[-1] >= 0, score, -jnp.inf), (kept + 1) // 2)
  source = jnp.arange(means.shape[2]) + behind[-1, :1] - behind[:, :1]  # as far from the last row's newest block
  diagonal = column[:, :, 0][:, :, jnp.minimum(source, means.shape[2] - 1)]
  chosen = _by_page(column | diagonal, q, block, tiles)
  return _completed(chosen, q, past, block, tiles, kept, last=True)


def _rows(q, past, blocks: int, block: int, tiles: int):
  """(what is proportional to the mean query of every `tiles` pages, how far its newest block is past every block)."""
  pages = q.shape[2] // block
  count = -(-pages // tiles)
  padded = jnp.pad(q, ((0, 0), (0, 0), (0, (count * tiles - pages) * block), (0, 0)))
  newest = past // block + jnp.minimum((jnp.arange(count) + 1) * tiles, pages) - 1
  return block_means(padded, tiles * block), newest[:, None] - jnp.arange(blocks)


def _kept(q, past, block: int, density: float) -> Int[Array, ""]:
  """Blocks that a row keeps."""
  require(0 < density <= 1, f"density is {density}; it must lie in 0 < density <= 1")
  return jnp.ceil(density * ((past + q.shape[2]) // block)).astype(jnp.int32)


def _by_page(chosen, q, block: int, tiles: int):
  """The choice of every `tiles` pages for each of them."""
  return jnp.repeat(chosen, tiles, axis=2)[:, :, : q.shape[2] // block]


def _completed(chosen, q, past, block: int, tiles: int, kept, last: bool = False) -> Selection:
  """With every page's own block, all blocks in rows where no more than `kept` lie behind and, if asked, in the last."""
  pages = q.shape[2] // block
  behind = blocks_behind(past, pages, chosen.shape[3], block)
  row = jnp.arange(pages) // tiles
  whole = past // block + jnp.minimum((row + 1) * tiles, pages) <= kept
  if last:
    whole |= row == row[-1]
  return (chosen | whole[:, None] | (behind == 0)) & (behind >= 0)
