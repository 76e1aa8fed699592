import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.attention.compact_attention import compact
from jaxlab.attention.dhsa_blocks import top_blocks, vertical_slash, vertical_slash_means
from jaxlab.attention.selection import block_means
from jaxlab.core.checks import InputError
from jaxlab.models import generate, inference, paged
from tests.attention.test_compact_attention import (
  BLOCK,
  BLOCKS,
  CHUNK,
  GROUP,
  HEADS,
  REAL,
  TILES,
  B,
  problem,
  tiles_that_count,
  vertical_slash_by_hand,
)
from tests.common import configs, random_model, random_tokens

PATTERNS = {
  "topk": top_blocks,
  "A": functools.partial(top_blocks, ends=True),
  "vs": vertical_slash,
  "vsb": vertical_slash_means,
}


def select(name, q, k, past, density, tiles=2, real=REAL):
  real = jnp.array(real)
  keys = k if name == "vs" else block_means(k, BLOCK, past + real)
  compiled = jax.jit(functools.partial(PATTERNS[name], block=BLOCK, density=density, tiles=tiles))
  return np.asarray(compiled(jnp.moveaxis(q, 2, 1), keys, past=past, real=real))


def expected(name, q, k, past, density, tiles=2):
  """The choice from its definition, of every head and page of queries with one that counts."""
  chosen = np.zeros((B, HEADS, TILES, BLOCKS), bool)
  best = lambda a, count: np.argsort(-np.asarray(a), kind="stable")[:count]
  for b, h, i in tiles_that_count():
    pages, end = -(-REAL[b] // BLOCK), past + REAL[b]
    filled = past // BLOCK + pages
    kept = int(np.ceil(np.float32(density) * filled))
    rows, keys = np.asarray(q[b, : REAL[b], h]), np.asarray(k[b, h // GROUP, :end])
    means = np.array([keys[j : j + BLOCK].mean(axis=0) for j in range(0, end, BLOCK)])
    group = i // tiles
    newest, own = past // BLOCK + min((group + 1) * tiles, pages) - 1, past // BLOCK + i
    mean = lambda group: rows[group * tiles * BLOCK : (group + 1) * tiles * BLOCK].mean(axis=0)  # noqa: B023
    if name in ("topk", "A"):
      score = means[: newest + 1] @ mean(group)
      score[[0, newest] if name == "A" else []] = np.inf
      wanted = set(best(score, kept).tolist())
    elif name == "vsb":
      columns = best(means @ mean((pages - 1) // tiles), (kept + 1) // 2).tolist()
      wanted = {*columns, *(newest - (filled - 1 - j) for j in columns)}
    else:
      last = min(tiles * BLOCK, REAL[b])
      at = end - last + np.arange(last)
      weight, along = vertical_slash_by_hand(rows[-last:], keys, at)
      half = kept * BLOCK // 2
      offsets = {0, *best(along, half).tolist()}
      mine = past + i * BLOCK + np.arange(BLOCK)
      wanted = {int(c) // BLOCK for c in best(weight.sum(axis=0), half)}
      wanted |= {int(t - o) // BLOCK for t in mine for o in offsets if t >= o}
    if newest + 1 <= kept or (name in ("vs", "vsb") and group == (pages - 1) // tiles):
      wanted = set(range(own + 1))
    chosen[b, h, i, [j for j in wanted | {own} if 0 <= j <= own]] = True
  return chosen


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("past", [16, 32])
def test_patterns_are_their_definitions(name, past):
  """Whatever lies past the chunk; pages that no whole number of groups holds; a row that ends in the chunk."""
  q, stale, k, *_ = problem(past=past)
  for tiles in (2, 3):
    chosen, sought = select(name, q, stale, past, 0.25, tiles), expected(name, q, k, past, 0.25, tiles)
    for at in tiles_that_count():
      np.testing.assert_array_equal(chosen[at], sought[at])
    whole = select(name, q, stale, past, 0.25, tiles, real=(CHUNK, CHUNK))
    np.testing.assert_array_equal(whole[0], sought[0])
    causal = np.arange(BLOCKS) <= past // BLOCK + np.arange(TILES)[:, None]
    np.testing.assert_array_equal(select(name, q, stale, past, 1.0, tiles), np.broadcast_to(causal, chosen.shape))
    assert chosen.sum() < B * HEADS * causal.sum()


def test_generation_with_all_blocks_is_the_dense_one_and_with_some_another():
  model = random_model(dataclasses.replace(configs()["qwen3"], depth=2))
  net, prompts = jax.jit(inference.take_apart)(model), random_tokens(2, 21)
  method = lambda density: compact(functools.partial(top_blocks, density=density, ends=True), union=False)
  found = generate(net, prompts, tokens=3, decoder=paged.decoder(method(1.0), chunk=24, page=4))
  np.testing.assert_array_equal(found, generate(net, prompts, tokens=3))
  read = lambda method: jax.jit(functools.partial(paged.prefill, capacity=24, chunk=24, page=4, method=method))
  logits = [read(method)(net, prompts)[0] for method in (method(0.2), paged.DENSE)]
  assert 1e-4 < jnp.abs(logits[0] - logits[1]).max() < 10


def test_a_density_is_a_share():
  q, k, *_ = problem()
  for name in PATTERNS:
    with pytest.raises(InputError, match=r"density is 0; it must lie in 0 < density <= 1"):
      select(name, q, k, 16, 0)
