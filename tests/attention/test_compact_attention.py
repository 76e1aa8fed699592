import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.attention.compact_attention import (
  SUMMARIES,
  attend_blocks,
  attend_union,
  block_union,
  compact,
  density,
  page_table,
  quoka,
)
from jaxlab.attention.dhsa_blocks import top_blocks
from jaxlab.attention.seer_gate import SeerGate, seer
from jaxlab.attention.selection import (
  block_means,
  flash_prefill,
  flex_prefill,
  minference,
  minference_patterns,
  x_attention,
)
from jaxlab.core.checks import InputError
from jaxlab.models import generate, inference, paged
from tests.common import configs, random_model, random_tokens

B, HEADS, KV, SIZE, CHUNK, BLOCK, CAPACITY = 2, 4, 2, 16, 16, 4, 48
TILES, BLOCKS, GROUP = CHUNK // BLOCK, CAPACITY // BLOCK, HEADS // KV
REAL = (CHUNK, 10)  # queries of the two rows that count, where the second one ends in the chunk
BY_HEAD = ("a_shape", "blocks", "vertical_slash", "a_shape")
SELECTORS = {
  "flash_prefill": functools.partial(flash_prefill, alpha=0.3, sink=1, window=1),
  "x_attention": functools.partial(x_attention, stride=2, threshold=0.5),
  "minference": functools.partial(minference, vertical=2, slash=2, last=8, sink=1),
  "flex_prefill": functools.partial(flex_prefill, gamma=0.4, budget=BLOCK),
  "minference by head": functools.partial(
    minference, vertical=2, slash=2, last=8, sink=1, first=2, local=3, blocks=2, patterns=BY_HEAD
  ),
}
ALL = {
  "flash_prefill": functools.partial(flash_prefill, alpha=0.0),
  "x_attention": functools.partial(x_attention, stride=2, threshold=1.0),
  "minference": functools.partial(minference, vertical=CAPACITY),
  "flex_prefill": functools.partial(flex_prefill, budget=CAPACITY),
  "minference by head": functools.partial(
    minference, vertical=CAPACITY, first=CAPACITY, local=CAPACITY, blocks=BLOCKS, patterns=BY_HEAD
  ),
}


def problem(seed=0, past=16):
  """Queries of a chunk and a cache in permuted pages, poisoned past the chunk; keys by row for the selectors."""
  keys = jax.random.split(jax.random.key(seed), 4)
  q = jax.random.normal(keys[0], (B, CHUNK, HEADS, SIZE))
  k, v = (jax.random.normal(key, (B, KV, CAPACITY, SIZE)) for key in keys[1:3])
  k = k + 2 * jax.random.normal(keys[3], (B, KV, CAPACITY, 1))  # so that blocks differ
  table = jax.random.permutation(keys[3], B * BLOCKS).reshape(B, BLOCKS)
  stale = jnp.arange(CAPACITY)[:, None] >= past + CHUNK

  def pool(a):
    pages = jnp.moveaxis(jnp.where(stale, jnp.nan, a).reshape(B, KV, BLOCKS, BLOCK, SIZE), 1, 0)
    return jnp.zeros((KV, B * BLOCKS, BLOCK, SIZE)).at[:, table].set(pages)

  view = paged.View(0, None, pool(k), pool(v), table, jnp.int32(past), jnp.full(B, past + CHUNK), q)
  return q, jnp.where(stale, jnp.nan, k), k, v, view


def select(name, q, k, past, options=SELECTORS, real=None):
  keys = block_means(k, BLOCK) if name == "flash_prefill" else k
  real = None if real is None else jnp.array(real)
  return options[name](jnp.moveaxis(q, 2, 1), keys, past=past, block=BLOCK, real=real)


def tiles_that_count():
  """(row, head, block of queries) of all blocks with a query that counts."""
  return [(b, h, i) for b, h, i in np.ndindex(B, HEADS, TILES) if i * BLOCK < REAL[b]]


def masked_softmax(q, k, v, see):
  """Attention and its log-sum-exp from the definition, see: (batch, heads, queries, keys)."""
  k, v = (jnp.repeat(jnp.nan_to_num(a), GROUP, axis=1) for a in (k, v))
  score = jnp.where(see, jnp.einsum("bqhd,bhkd->bhqk", q, k) / SIZE**0.5, -jnp.inf)
  out = jnp.einsum("bhqk,bhkd->bqhd", jax.nn.softmax(score, axis=-1), v)
  return out, jnp.moveaxis(jax.nn.logsumexp(score, axis=-1), 1, 2)


def causal(past):
  return jnp.arange(CAPACITY) <= past + jnp.arange(CHUNK)[:, None]


def random_choice(seed, past):
  behind = past // BLOCK + np.arange(TILES)[:, None] - np.arange(BLOCKS)
  drawn = np.random.default_rng(seed).random((B, HEADS, TILES, BLOCKS)) < 0.2
  return jnp.asarray((drawn & (behind >= 0)) | (behind == 0))


@given(st.integers(0, 999), st.sampled_from((0, 4, 16, 32)), st.sampled_from((1, 2)))
def test_tables_cover_what_is_chosen_and_nothing_less_would(seed, past, share):
  chosen = np.asarray(random_choice(seed, past))
  wanted = block_union(chosen, kv_heads=KV, past=past // BLOCK, share=share)
  end = (past + CHUNK) // BLOCK
  table, count = page_table(wanted.reshape(-1, BLOCKS), past // BLOCK, end)
  for row, (b, g) in enumerate(itertools.product(range(B), range(HEADS // share))):
    of_group = chosen[b, g * share : (g + 1) * share].any(axis=(0, 1))
    needed = sorted({*np.flatnonzero(of_group[:end]), *range(past // BLOCK, end)})
    assert table[row, : count[row, 1]].tolist() == needed
    assert count[row, 0] == sum(j < past // BLOCK for j in needed)
    assert set(table[row, count[row, 1] :].tolist()) <= {needed[-1]}


def test_smaller_groups_want_less_and_single_heads_their_own():
  chosen = random_choice(3, 16)
  by_head = block_union(chosen, kv_heads=KV, past=4, share=1)
  of_group = block_union(chosen, kv_heads=KV, past=4)
  np.testing.assert_array_equal(by_head[..., :4], chosen.any(axis=2)[..., :4])
  assert (by_head <= jnp.repeat(of_group, GROUP, axis=1)).all() and (by_head.sum() < GROUP * of_group.sum())
  with pytest.raises(InputError, match="share"):
    block_union(chosen, kv_heads=KV, past=4, share=3)


@pytest.mark.parametrize("share, copy", [(1, False), (2, False), (2, True)])
def test_the_union_is_attended_to_in_place_or_copied(share, copy):
  q, k, _, v, view = problem()
  wanted = block_union(random_choice(1, 16), kv_heads=KV, past=4, share=share)
  see = jnp.repeat(jnp.repeat(wanted, share, axis=1), BLOCK, axis=-1)[:, :, None] & causal(16)
  for found, expected in zip(attend_union(q, view, wanted, copy=copy), masked_softmax(q, k, v, see), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_block_sparse_attention_is_softmax_over_the_choice_which_the_union_contains():
  """The mass that a row captures never falls from the choice to its union."""
  q, k, _, v, view = problem()
  chosen = random_choice(2, 16)
  see = jnp.repeat(jnp.repeat(chosen, BLOCK, axis=-1), BLOCK, axis=-2) & causal(16)
  expected, mass = masked_softmax(q, k, v, see)
  found, captured = attend_blocks(q, view, chosen)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(captured, mass, rtol=1e-5, atol=1e-5)
  _, of_union = attend_union(q, view, block_union(chosen, kv_heads=KV, past=4))
  assert (of_union >= captured - 1e-5).all() and (of_union > captured + 1e-3).any()


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "minference by head"])
def test_no_query_loses_mass_from_the_choice_to_its_tables(name):
  """Exactly, as a sum of more terms that are not negative is no smaller. 8 heads of 2 key heads in groups of 1, 2 and
  4: what a part of a group opens, the whole does."""
  keys = jax.random.split(jax.random.key(0), 3)
  q = 2 * jax.random.normal(keys[0], (B, CHUNK, 8, SIZE))
  k = jax.random.normal(keys[1], (B, KV, CAPACITY, SIZE)) + jax.random.normal(keys[2], (B, KV, CAPACITY, 1))
  chosen = np.asarray(jax.jit(select, static_argnums=(0, 3))(name, q, k, 32))
  score = np.einsum("bqhd,bhkd->bhqk", q, np.repeat(k, 4, axis=1)).astype(np.float64) / SIZE**0.5
  weight = softmax(np.where(causal(32), score, -np.inf))
  expand = lambda blocks: np.repeat(blocks, BLOCK, axis=-1)
  mass = np.where(np.repeat(expand(chosen), BLOCK, axis=2), weight, 0).sum(axis=-1)
  before, sizes = np.zeros((B, 8, BLOCKS), bool), []
  for share in 1, 2, 4:
    wanted = block_union(chosen, kv_heads=KV, past=8, share=share)
    table, count = page_table(wanted.reshape(-1, BLOCKS), 8, 12)
    opened = np.array([np.isin(np.arange(BLOCKS), row[:n]) for row, n in zip(table, count[:, 1], strict=True)])
    opened = np.repeat(opened.reshape(B, -1, BLOCKS), share, axis=1)
    held = np.where(expand(opened)[:, :, None], weight, 0).sum(axis=-1)
    assert (held >= mass).all() and (held > mass).any() and (held <= 1 + 1e-12).all()
    assert (before <= opened).all()
    before, sizes = opened, [*sizes, opened.sum()]
  assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("past", [0, 16, 32])
def test_selectors_look_backwards_alone_and_always_at_the_own_block(name, past):
  q, k, clean, _, _ = problem(past=past)
  chosen = np.asarray(select(name, q, k, past))
  behind = past // BLOCK + np.arange(TILES)[:, None] - np.arange(BLOCKS)
  assert not (chosen & (behind < 0)).any() and chosen[..., behind == 0].all()
  np.testing.assert_array_equal(chosen, select(name, q, clean, past))  # what comes after the chunk changes nothing
  everything = select(name, q, k, past, ALL)
  np.testing.assert_array_equal(everything, np.broadcast_to(behind >= 0, chosen.shape))
  assert past == 0 or chosen.mean() < everything.mean()


def test_flash_prefill_is_its_formula():
  q, _, k, _, _ = problem()
  means = np.asarray(block_means(k, BLOCK))
  chosen = select("flash_prefill", q, k, 16, real=REAL)
  for b, h, i in tiles_that_count():
    mass = np.zeros(BLOCKS)
    for j in range(BLOCKS):
      for t in range(i * BLOCK, min((i + 1) * BLOCK, REAL[b])):
        if 16 + t >= (j + 1) * BLOCK - 1:
          mass[j] += np.exp(np.asarray(q[b, t, h]) @ means[b, h // GROUP, j] / 4)
    score = mass / mass.sum()
    kept = [j <= 4 + i and (score[j] >= 0.3 * score.max() or j < 1 or 4 + i - j < 1) for j in range(BLOCKS)]
    assert chosen[b, h, i].tolist() == kept


def test_a_key_that_is_no_number_is_read():
  """So that it is seen in the answer instead of stepped around."""
  q, k, *_ = problem()
  poisoned = block_means(k, BLOCK).at[:, :, 2].set(jnp.nan)
  chosen = flash_prefill(q, poisoned, past=16, block=BLOCK, alpha=0.3, sink=1, window=1)
  assert chosen[:, :, :, 2].all()


@pytest.mark.parametrize("name", [*(name for name in SELECTORS if "by head" not in name), "seer", "blocks", "quoka"])
def test_whatever_is_chosen_a_key_that_is_no_number_is_in_every_later_answer(name):
  """Of the heads that share it; in the third of the blocks before the chunk."""
  q, _, k, _, view = problem()
  k = k.at[:, 0, 9, 0].set(jnp.nan)
  gate = SeerGate(dataclasses.replace(configs()["qwen3"], depth=1), jax.random.key(1), width=8)
  others = {"seer": gate.selectors(tau=0.2, recent=1)[0], "blocks": functools.partial(top_blocks, density=0.1)}
  how = (SELECTORS | others).get(name)
  summary = SUMMARIES.get(getattr(how, "func", None))
  method = compact(how) if how else quoka(queries=0.4, budget=0.1)

  @jax.jit
  def attend(q, k, keys):
    memory = (summary(k, BLOCK),) if summary else ()
    new = jnp.moveaxis(k[:, :, 16 : 16 + CHUNK], 1, 2)
    return method.attend(q, new, None, view._replace(keys=keys), memory)[0]

  found = attend(q, k, view.keys.at[0, view.table[:, 2], 1, 0].set(jnp.nan))
  assert np.isnan(found[:, :, :GROUP]).all() and np.isfinite(found[:, :, GROUP:]).all()


@pytest.mark.parametrize("union", [True, False])
def test_where_nothing_is_chosen_the_chunk_sees_itself(union):
  """As a union; else every block of queries."""
  q, k, _, v, view = problem()
  nothing = lambda q, keys, *, past, block, real: jnp.zeros((B, HEADS, TILES, BLOCKS), bool)
  attend = jax.jit(lambda q: compact(nothing, union=union).attend(q, q[:, :, ::GROUP], v, view, ())[0])
  at = np.arange(CAPACITY)
  mine = at >= (16 if union else 16 + np.arange(CHUNK)[:, None] // BLOCK * BLOCK)
  expected, _ = masked_softmax(q, k, v, jnp.asarray(mine & causal(16)))
  np.testing.assert_allclose(attend(q), expected, rtol=1e-5, atol=1e-5)


def test_x_attention_is_its_formula():
  q, _, k, _, _ = problem()
  chosen = select("x_attention", q, k, 16, real=REAL)
  for b, h in np.ndindex(B, HEADS):
    rows = np.where(np.arange(CHUNK)[:, None] < REAL[b], q[b, :, h], 0)
    columns = np.where(np.arange(CAPACITY)[:, None] < 16 + REAL[b], k[b, h // GROUP], 0)
    score = np.full((CHUNK // 2, CAPACITY // 2), -np.inf)
    for r, c in np.ndindex(score.shape):
      if 8 + r >= c:
        score[r, c] = sum(rows[2 * r + 1 - s] @ columns[2 * c + s] for s in range(2)) / 8
    weight = np.exp(score - score.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    weight[-(-REAL[b] // 2) :] = 0
    mass = weight.reshape(TILES, 2, BLOCKS, 2).sum(axis=(1, 3))
    for i in range(-(-REAL[b] // BLOCK)):
      forced = [0, 4 + i]
      kept, held = set(forced), mass[i, forced].sum()
      for j in np.argsort(-mass[i]):
        if held < 0.5 * mass[i].sum() and j not in kept:
          kept.add(int(j))
          held += mass[i, j]
      assert set(np.flatnonzero(chosen[b, h, i]).tolist()) == kept


def softmax(a):
  weight = np.exp(a - a.max(axis=-1, keepdims=True))
  return weight / weight.sum(axis=-1, keepdims=True)


def vertical_slash_by_hand(q, k, at):
  """(attention of queries at these positions, its sum along every diagonal)."""
  score = np.asarray(q) @ np.asarray(k).T / 4
  weight = softmax(np.where(np.arange(len(k)) <= at[:, None], score, -np.inf))
  return weight, np.array([sum(weight[t, p - o] for t, p in enumerate(at) if p >= o) for o in range(len(k))])


def test_minference_keeps_the_blocks_its_columns_and_diagonals_cross():
  q, _, k, _, _ = problem()
  chosen = select("minference", q, k, 16, real=REAL)
  for b, h in np.ndindex(B, HEADS):
    at = 16 + REAL[b] - 8 + np.arange(8)
    weight, along = vertical_slash_by_hand(q[b, REAL[b] - 8 : REAL[b], h], k[b, h // GROUP], at)
    columns = {0, *np.argsort(-weight.sum(axis=0))[:2]}
    offsets = {0, *np.argsort(-along)[:2]}
    for i, j in np.ndindex(-(-REAL[b] // BLOCK), BLOCKS):
      pairs = itertools.product(range(16 + i * BLOCK, 16 + (i + 1) * BLOCK), range(j * BLOCK, (j + 1) * BLOCK))
      crossed = any(at - key in offsets for at, key in pairs) or any(c // BLOCK == j for c in columns)
      assert bool(chosen[b, h, i, j]) == (crossed and j <= 4 + i)


def means_by_hand(a, count):
  """Of every block's entries among the first `count`."""
  return np.array([np.asarray(a[j : min(j + BLOCK, count)]).mean(axis=0) for j in range(0, count, BLOCK)])


def test_minference_has_a_pattern_for_every_head():
  """An A of the first 2 tokens and 3 before each query; the 2 blocks of the largest mean product; else as before."""
  q, _, k, _, _ = problem()
  chosen, plain = (np.asarray(select(name, q, k, 16, real=REAL)) for name in ("minference by head", "minference"))
  for b, h in np.ndindex(B, HEADS):
    score = means_by_hand(q[b, :, h], REAL[b]) @ means_by_hand(k[b, h // GROUP], 16 + REAL[b]).T
    for i in range(-(-REAL[b] // BLOCK)):
      own, first = 4 + i, 16 + i * BLOCK
      expected = {
        "vertical_slash": {*np.flatnonzero(plain[b, h, i])},
        "a_shape": {0, *(j // BLOCK for t in range(first, first + BLOCK) for j in range(t - 3, t + 1))},
        "blocks": {own, *np.argsort(-score[i, : own + 1])[:2].tolist()},
      }[BY_HEAD[h]]
      assert {*np.flatnonzero(chosen[b, h, i])} == expected


def test_every_head_gets_the_pattern_that_holds_its_attention():
  """A head that looks at its last tokens, one at a block that differs from block to block, one at two columns that the
  means of their blocks hide."""
  time, block = 32, 4
  q, k = np.zeros((1, 3, time, 33), np.float32), np.zeros((1, 3, time, 33), np.float32)
  near = np.abs(np.arange(time)[:, None] - np.arange(time)) < 3
  q[0, 0, :, :time], k[0, 0, :, :time] = 40.0 * near, np.eye(time)
  for i, j in {4: 2, 5: 0, 6: 1, 7: 3}.items():
    q[0, 1, 4 * i : 4 * i + 4, i], k[0, 1, 4 * j : 4 * j + 4, i] = 60.0, 1.0
  q[0, 2, :, 32], k[0, 2, [5, 13], 32], k[0, 2, [4, 6, 7, 12, 14, 15], 32] = 60.0, 1.0, -1.0
  options = dict(vertical=2, slash=1, last=8, sink=1, first=1, local=4, blocks=1)
  found = minference_patterns(jnp.asarray(q[:, :, 16:]), jnp.asarray(k), block=block, past=16, **options)
  assert found == ("a_shape", "blocks", "vertical_slash")
  with pytest.raises(InputError, match="2 patterns for 3 query heads"):
    minference(jnp.asarray(q), jnp.asarray(k), past=0, block=block, patterns=("blocks",) * 2)
  with pytest.raises(InputError, match="each must be one of vertical_slash"):
    minference(jnp.asarray(q), jnp.asarray(k), past=0, block=block, patterns=("best",) * 3)


def test_flex_prefill_tells_heads_by_how_well_means_predict_them():
  """Keys that are equal within a block are predicted exactly; then the mass that is kept reaches gamma."""
  q, _, k, _, _ = problem(past=32)
  flat = jnp.repeat(block_means(k, BLOCK), BLOCK, axis=2)
  rows = jnp.repeat(jnp.moveaxis(q, 2, 1)[:, :, :1], CHUNK, axis=2)
  how = dict(past=32, block=BLOCK, gamma=0.6, budget=BLOCK)
  aware, not_aware = (flex_prefill(rows, flat, tau=tau, **how) for tau in (0.5, 0.0))
  score = jnp.einsum("bhd,bhjd->bhj", rows[:, :, 0], jnp.repeat(block_means(flat, BLOCK), GROUP, axis=1)) / 4
  behind = 8 + jnp.arange(TILES)[:, None] - jnp.arange(BLOCKS)
  weight = jax.nn.softmax(jnp.where(behind >= 0, score[:, :, None], -jnp.inf), axis=-1) / TILES
  assert (jnp.where(aware, weight, 0).sum(axis=(2, 3)) >= 0.6 - 1e-5).all()
  assert (aware != not_aware).any()


def flex_by_hand(q, k, past, gamma, tau):
  """(whether a head of these queries and keys is query-aware, its choice with a budget of one block)."""
  end, tiles, own = len(k), -(-len(q) // BLOCK), past // BLOCK
  tail = np.asarray(q[-BLOCK:])
  weight, along = vertical_slash_by_hand(tail, k, end - len(tail) + np.arange(len(tail)))
  by_block = lambda a: np.pad(a, (0, CAPACITY - end)).reshape(BLOCKS, BLOCK).sum(axis=1)
  columns, diagonals = weight.sum(axis=0), along
  means = means_by_hand(k, end)
  true, guess = by_block(columns / len(tail))[: len(means)], softmax(means @ tail.mean(axis=0) / 4)
  relative = lambda p: (p * np.log(p / ((true + guess) / 2))).sum()
  aware = np.sqrt((relative(true) + relative(guess)) / 2) < tau

  def heaviest(mass):
    """As many blocks as the fewest tokens that cover gamma fill; for an aware head one."""
    tokens = next(n for n in range(1, end + 1) if np.sort(mass)[-n:].sum() >= gamma * mass.sum())
    return set(np.argsort(-by_block(mass), kind="stable")[: 1 if aware else tokens // BLOCK + 1].tolist())

  across, behind = heaviest(columns), heaviest(diagonals)
  pairs = [(i, j) for i in range(tiles) for j in range(own + i + 1)]
  kept = {(i, j) for i, j in pairs if j in across or own + i - j in behind or j in (0, own + i)}
  if aware:
    score = means_by_hand(q, len(q)) @ means.T / 4
    mass = {(i, j): softmax(score[i, : own + i + 1])[j] / tiles for i, j in pairs}
    held = lambda some: sum(mass[pair] for pair in some)
    sizes = (list(itertools.combinations(pairs, n)) for n in range(1, len(pairs) + 1))
    fewest = next(sets for sets in sizes if any(held(some) >= gamma for some in sets))
    kept |= set(max(fewest, key=held))
  return aware, kept


def test_flex_prefill_is_its_formula_and_no_fewer_blocks_reach_gamma():
  """By all sets of blocks; heads of both kinds, and of the second row's 8 queries 6 that count."""
  q, _, k, _, _ = problem(past=24)
  q = q[:, :8]
  how = dict(past=24, block=BLOCK, gamma=0.6, tau=0.2, budget=BLOCK)
  chosen = np.asarray(flex_prefill(jnp.moveaxis(q, 2, 1), k, real=jnp.array([8, 6]), **how))
  kinds = []
  for b, h in np.ndindex(B, HEADS):
    real = (8, 6)[b]
    aware, kept = flex_by_hand(q[b, :real, h], k[b, h // GROUP, : 24 + real], 24, 0.6, 0.2)
    kinds.append(aware)
    assert {(int(i), int(j)) for i, j in np.argwhere(chosen[b, h])} == kept
  assert 0 < sum(kinds[:HEADS]) < HEADS and 0 < sum(kinds[HEADS:]) < HEADS


def test_quoka_is_its_formula():
  """Of 16 and 10 queries that count, 6 and 4 choose 5 of the 16 past tokens."""
  q, _, k, v, view = problem()
  view = view._replace(lengths=16 + jnp.array(REAL))
  found, _ = quoka(queries=0.4, budget=0.3).attend(q, k[:, :, :CHUNK].swapaxes(1, 2), v, view, ())
  unit = lambda a: np.asarray(a) / np.linalg.norm(a, axis=-1, keepdims=True)
  see = np.zeros((B, HEADS, CHUNK, CAPACITY), bool)
  for b, g in np.ndindex(B, KV):
    picked = []
    for h in range(g * GROUP, (g + 1) * GROUP):
      rows = np.asarray(q[b, : REAL[b], h])
      alike = unit(rows) @ unit(rows.mean(axis=0))
      picked.append(unit(rows)[np.sort(np.argsort(alike)[: (6, 4)[b]])])
    score = (np.mean(picked, axis=0) @ unit(k[b, g, :16]).T).max(axis=0)
    see[b, g * GROUP : (g + 1) * GROUP, :, np.argsort(-score)[:5]] = True
  see |= np.asarray(causal(16)) & (np.arange(CAPACITY) >= 16)
  expected, _ = masked_softmax(q, k, v, jnp.asarray(see))
  for b, real in enumerate(REAL):
    np.testing.assert_allclose(found[b, :real], expected[b, :real], rtol=1e-5, atol=1e-5)
  for wrong in dict(queries=0.0), dict(queries=1.5), dict(budget=-0.1), dict(budget=1.1):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is "):
      quoka(**wrong)


def test_quoka_with_all_queries_and_all_of_the_past_is_dense():
  q, k, _, v, view = problem()
  attend = jax.jit(lambda q: quoka(queries=1.0, budget=1.0).attend(q, q[:, :, ::GROUP], v, view, ())[0])
  expected, _ = masked_softmax(q, k, v, causal(16))
  np.testing.assert_allclose(attend(q), expected, rtol=1e-5, atol=1e-5)


def test_x_attention_at_threshold_1_keeps_all_that_has_mass():
  """However little beside what the rest adds up to in float32: masses down to 1e-29 are there."""
  q, _, k, _, _ = problem()
  kept = x_attention(jnp.moveaxis(15 * q, 2, 1), k, past=16, block=BLOCK, stride=2, threshold=1.0)
  causal_blocks = np.arange(BLOCKS) <= 4 + np.arange(TILES)[:, None]
  np.testing.assert_array_equal(kept, np.broadcast_to(causal_blocks, kept.shape))


@pytest.mark.parametrize("windows", [None, (3, None, 5)])
@pytest.mark.parametrize("method", [*ALL, "quoka"])
def test_at_full_budget_generation_is_the_dense_one(method, windows):
  """Rows of different lengths; chunks that the prompts do not fill; layers that look back a window."""
  if windows and method not in ("flash_prefill", "quoka"):
    pytest.skip("the way of layers with a window is the same for all selectors")
  model = random_model(dataclasses.replace(configs()["qwen3"], depth=3, layer_windows=windows))
  net, prompts, lengths = jax.jit(inference.take_apart)(model), random_tokens(2, 21), np.array([21, 10])
  chosen = quoka(queries=1.0, budget=1.0) if method == "quoka" else compact(ALL[method])
  found = generate(net, prompts, lengths, tokens=3, decoder=paged.decoder(chosen, chunk=8, page=4))
  np.testing.assert_array_equal(found, generate(net, prompts, lengths, tokens=3))


def test_less_than_all_changes_the_answer_and_block_means_are_kept_between_chunks():
  net, prompts = jax.jit(inference.take_apart)(random_model(configs()["qwen3"])), random_tokens(2, 32)
  read = lambda method, chunk: paged.prefill(net, prompts, capacity=32, chunk=chunk, page=4, method=method)
  dense, state = read(paged.DENSE, 8)
  nearest = functools.partial(flash_prefill, alpha=2.0, sink=0, window=1)
  for method in compact(nearest), compact(SELECTORS["x_attention"], union=False), quoka():
    assert 1e-4 < jnp.abs(read(method, 8)[0] - dense).max() < 10
  _, compacted = read(compact(ALL["flash_prefill"]), 8)
  for kept, (keys, _) in zip(compacted.memory, state.pools, strict=True):
    np.testing.assert_allclose(kept, block_means(paged.rows(keys, state.table), 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("union", [True, False])
def test_the_last_blocks_of_a_prompt_see_everything_and_widen_no_union(union):
  """Row 0 ends in this chunk, in its third block; row 1 in a later one."""
  q, _, _, v, view = problem()
  view = view._replace(lengths=jnp.array([16 + 2 * BLOCK + 1, CAPACITY]))
  own = 4 + jnp.arange(TILES)[:, None] == jnp.arange(BLOCKS)
  second = own | ((jnp.arange(TILES)[:, None] == 1) & (jnp.arange(BLOCKS) <= 5))

  def attend(chosen, **how):
    select = lambda q, keys, past, block, real: jnp.broadcast_to(chosen, (B, HEADS, TILES, BLOCKS))
    return compact(select, union=union, **how).attend(q, q[:, :, ::GROUP], v, view, ())[0]

  plain, found, narrow = attend(second), attend(second, last=2), attend(own)
  dense, _ = paged.attend_densely(q, None, None, view, ())
  same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  same(found[1], plain[1])
  same(found[0, BLOCK : 3 * BLOCK], dense[0, BLOCK : 3 * BLOCK])  # after them is padding
  same(found[0, :BLOCK], narrow[0, :BLOCK])  # the second block's choice reaches no other query any more
  assert jnp.abs(narrow[0, BLOCK : 3 * BLOCK] - dense[0, BLOCK : 3 * BLOCK]).max() > 1e-3
  with pytest.raises(InputError, match="last is -1"):
    compact(last=-1)


def test_density_counts_causal_pairs():
  chosen = random_choice(5, 16)
  causal_blocks = np.arange(BLOCKS) <= 4 + np.arange(TILES)[:, None]
  np.testing.assert_allclose(density(chosen, 4), np.asarray(chosen).sum() / (B * HEADS * causal_blocks.sum()))
  np.testing.assert_allclose(density(jnp.ones((B, HEADS, TILES, BLOCKS), bool), 4), 1.0)


@pytest.mark.parametrize(
  "select, wrong",
  [
    (flash_prefill, dict(alpha=-0.1)),
    (flash_prefill, dict(window=-1)),
    (x_attention, dict(stride=3)),
    (x_attention, dict(stride=0)),
    (x_attention, dict(stride=2, threshold=1.1)),
    (minference, dict(vertical=-1)),
    (minference, dict(last=0)),
    (flex_prefill, dict(gamma=0.0)),
    (flex_prefill, dict(budget=-1)),
    (seer, dict(maps=(), theta=1e4, tau=-1.0)),
    (top_blocks, dict(tiles=0)),
  ],
)
def test_wrong_options_are_named(select, wrong):
  q, k, *_ = problem()
  name, value = list(wrong.items())[-1]
  with pytest.raises(InputError, match=f"{name} is {value}"):
    select(jnp.moveaxis(q, 2, 1), k, past=16, block=BLOCK, **wrong)


@pytest.mark.parametrize("call", [x_attention, minference, minference_patterns, flex_prefill])
def test_blocks_divide_queries_and_keys(call):
  q, k, *_ = problem()
  q = jnp.moveaxis(q, 2, 1)
  for arrays, name in ((q[:, :, :14], k), "queries=14"), ((q, k[:, :, :46]), "keys=46"):
    with pytest.raises(InputError, match=f"block=4 must divide {name}"):
      call(*arrays, past=16, block=BLOCK)
  with pytest.raises(InputError, match="block=5 must divide positions=48"):
    block_means(k, 5)


def test_selectors_of_layers_are_counted_and_of_one_kind():
  with pytest.raises(InputError, match="all the same summary"):
    compact((flash_prefill, x_attention))
  with pytest.raises(InputError, match="1 selectors for "):
    compact((x_attention,)).empty(configs()["qwen3"], batch=1, capacity=8, page=4, dtype=jnp.float32)
