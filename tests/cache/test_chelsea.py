import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.attention.compact_attention import compact
from jaxlab.cache.chelsea import chelsea
from jaxlab.cache.chelsea_merging import compress, error_bound, kept, merge, schedule, soft_match
from jaxlab.cache.entries import PAGE, Entries, attend_entries
from jaxlab.core.checks import InputError
from jaxlab.evaluation.long_context import cache_bytes
from jaxlab.models import generate, inference, paged
from tests.cache.common import assert_rows_are_alone
from tests.common import configs, random_model, random_tokens, whole

D = 8
SMALL = dict(chunk=4, sink=2, recent=3)
attend_entries, compress, merge, soft_match = map(whole, (attend_entries, compress, merge, soft_match))


def entries(seed, n, lead=()):
  keys = jax.random.split(jax.random.key(seed), 2)
  k, v = (jax.random.normal(key, (*lead, n, D)) for key in keys)
  return Entries(k, v, jnp.ones((*lead, n)))


def attend(q, e, **options):
  """One query of one head."""
  lift = jax.tree.map(lambda a: a[None, None], e)
  return attend_entries(q[None, None, None], lift, **options)[0, 0, 0]


def by_loop(k, v, s, removed):
  """One round on one chunk, from the definition."""
  unit = k / np.linalg.norm(k, axis=1, keepdims=True)
  proposals = []
  for a in range(0, len(k), 2):
    alike = [unit[a] @ unit[b] for b in range(1, len(k), 2)]
    proposals.append((-max(alike), a, 2 * int(np.argmax(alike)) + 1))
  accepted = {a: b for _, a, b in sorted(proposals)[:removed]}
  out = []
  for i in range(len(k)):
    if i not in accepted:
      cluster = [i, *(a for a, b in accepted.items() if b == i)]
      weight = s[cluster] / s[cluster].sum()
      out.append((weight @ k[cluster], weight @ v[cluster], s[cluster].sum()))
  return [np.array(a) for a in zip(*out, strict=True)]


@given(st.integers(0, 999), st.sampled_from(((2, 1), (6, 0), (16, 5))))
def test_a_round_is_the_published_loop(seed, sizes):
  """One chunk of all entries is bipartite soft matching as token merging has it."""
  (n, removed), e = sizes, entries(seed, sizes[0])
  e = e._replace(size=1.0 + jax.random.randint(jax.random.key(seed), (n,), 0, 4))
  found = merge(e, soft_match(e.keys, e.size, removed), n - removed)
  for a, b in zip(found, by_loop(*map(np.asarray, e), removed), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_matching_is_the_largest_cosine_of_six_by_six():
  """By hand, with ties among partners and among proposals; lengths count for nothing.

        d    e0  e2   d    e2  -e0
   e0   r    1   0    r    0   -1      to the second, with 1
   e2   0    0   1    0    1    0      to the third, with 1
   e1   r    0   0    r    0    0      to the first, with r = sqrt(1/2)
  -e0  -r   -1   0   -r    0    1      to the sixth, with 1
   e1   r    0   0    r    0    0      to the first, with r
   e3   0    0   0    0    0    0      to the first, with 0
  """
  e0, e1, e2, e3 = np.eye(4)
  d = e0 + e1
  keys = np.stack([e0, d, e2, e0, e1, e2, -e0, d, e1, e2, e3, -e0]) * 2.0 ** np.arange(12)[:, None]
  match = lambda removed: soft_match(jnp.asarray(keys, jnp.float32), jnp.ones(12), removed).tolist()
  assert match(1) == [2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
  assert match(4) == [1, 0, 2, 1, 0, 2, 7, 3, 4, 5, 6, 7]
  assert match(6) == [1, 0, 2, 1, 0, 2, 5, 3, 0, 4, 0, 5]


def test_a_round_that_removes_nothing_is_the_identity():
  e = entries(1, 6)._replace(size=jnp.arange(1.0, 7.0))
  for found, expected in zip(merge(e, soft_match(e.keys, e.size, 0), 6), e, strict=True):
    np.testing.assert_array_equal(found, expected)


def test_ties_go_to_the_first():
  keys = jnp.eye(D)[jnp.array([0, 0, 1, 0, 0, 1])]  # 0 likes 1 and 3, 2 likes 5, 4 likes 1 and 3
  assert soft_match(keys, jnp.ones(6), 1).tolist() == [0, 0, 1, 2, 3, 4]
  assert soft_match(keys, jnp.ones(6), 2).tolist() == [0, 0, 3, 1, 2, 3]
  assert soft_match(keys, jnp.ones(6), 3).tolist() == [0, 0, 2, 1, 0, 2]


@pytest.mark.parametrize("n, keep, chunk", [(1, 0.25, 8), (70, 0.2, 8), (61, 0.25, 32), (40, 0.5, 2), (9, 1.0, 4)])
def test_counts_are_exact_and_nothing_is_lost(n, keep, chunk):
  e = entries(n, n)
  out = jax.jit(functools.partial(compress, keep=keep, chunk=chunk))(e)
  assert len(out.size) == kept(n, keep, chunk)
  np.testing.assert_allclose(out.size.sum(), n, rtol=1e-5)
  for before, after in zip(e[:2], out[:2], strict=True):
    np.testing.assert_allclose((out.size[:, None] * after).sum(0), before.sum(0), rtol=1e-5, atol=1e-5)
  if keep == 1:
    np.testing.assert_array_equal(out.keys, e.keys)


@given(st.integers(1, 3000), st.floats(0.05, 1.0), st.integers(2, 130))
def test_as_many_entries_stay_as_rounds_written_out_leave(n, keep, chunk):
  """ceil(log2(1 / keep)) rounds of one ratio q, each of which takes round((1 - q) c) of every whole chunk of c."""
  rounds, left = next(r for r in range(9) if 2**r >= 1 / keep - 1e-9), n
  for _ in range(rounds):
    if (c := min(chunk, left) // 2 * 2) > 0:
      gone = min(round((1 - keep ** (1 / rounds)) * c), c // 2)
      left = sum(len(range(i, min(i + c, left))) - (gone if i + c <= left else 0) for i in range(0, left, c))
  assert kept(n, keep, chunk) == left
  if n % chunk == 0 and chunk % 2 == 0 and rounds == 1:
    assert left == n * (chunk - gone) // chunk


def test_the_schedule_removes_what_is_asked():
  assert schedule(512, 0.25, 128) == [(128, 64), (128, 64)] and kept(512, 0.25, 128) == 128
  assert schedule(128, 0.25, 128) == [(128, 64), (64, 32)] and kept(128, 0.25, 128) == 32
  # 10 chunks of 128 to 75, then 5 and 110 entries beside them, then 3 and 101.
  assert schedule(1280, 0.2, 128) == [(128, 53)] * 3 and kept(1280, 0.2, 128) == 3 * 75 + 101
  assert kept(100, 1.0, 8) == 100 and kept(1, 0.25, 8) == 1
  assert schedule(512, 0.25, 128, 4) == [(128, 37)] * 4 and kept(512, 0.25, 128, 4) == 512 - 37 * (4 + 2 + 2 + 1)


@pytest.mark.parametrize(
  "keep, chunk, rounds, options",
  [
    (0.25, 4, None, {}),
    (0.2, 8, None, dict(rescale=True)),
    (0.4, 5, 3, dict(partition="halves", likeness="neighbours")),
    (0.25, 8, None, dict(partition="random")),
    (0.3, 8, 4, dict(likeness="chance")),
  ],
)
def test_the_first_entries_of_many_places_are_merged_as_if_they_were_alone(keep, chunk, rounds, options):
  """However many empty places follow: every round is that of their own number, on chunks of what is left of them."""
  how, e, counts = dict(keep=keep, chunk=chunk, rounds=rounds, **options), entries(5, 23), (0, 1, 3, 8, 9, 14, 16, 23)

  @jax.jit
  def both(e):
    held = jax.vmap(lambda n: e._replace(size=jnp.where(jnp.arange(23) < n, e.size, 0)))(jnp.array(counts))
    padded = jax.vmap(functools.partial(compress, **how))(held, count=jnp.array(counts))
    return padded, [compress(jax.tree.map(lambda a, n=n: a[:n], e), **how) for n in counts]

  padded, alone = both(e)
  for row, (n, expected) in enumerate(zip(counts, alone, strict=True)):
    left = kept(n, keep, chunk, rounds)
    for a, b in zip(padded, expected, strict=True):
      np.testing.assert_allclose(a[row, :left], b, rtol=1e-5, atol=1e-6)
    assert not padded.size[row, left:].any()


def test_clusters_do_not_cross_chunks_and_chunks_are_independent():
  e = entries(0, 24)
  whole = compress(e, keep=0.5, chunk=8)
  for i in range(3):
    alone = compress(jax.tree.map(lambda a, i=i: a[8 * i : 8 * i + 8], e), keep=0.5, chunk=8)
    for a, b in zip(whole, alone, strict=True):
      np.testing.assert_allclose(a[4 * i : 4 * i + 4], b, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_of_equal_keys_nothing_is_lost_if_centroids_weigh_what_they_stand_for(seed):
  """Runs of one to four equal keys with any values; as many merges as there are such pairs."""
  rng = np.random.default_rng(seed)
  runs = np.repeat(np.arange(16), rng.integers(1, 5, 16))[:24]
  e = entries(seed, 24)._replace(keys=jnp.asarray(rng.normal(size=(16, D)), jnp.float32)[runs])
  alike = [any(runs[a] == runs[b] for b in range(1, 24, 2)) for a in range(0, 24, 2)]
  removed, q = sum(alike), jax.random.normal(jax.random.key(seed + 1), (D,)) * 3
  out = merge(e, soft_match(e.keys, e.size, removed), 24 - removed)
  np.testing.assert_allclose(attend(q, out), attend(q, e), rtol=1e-5, atol=1e-5)
  if removed > 3:
    assert np.abs(attend(q, out, size_bias=False) - attend(q, e)).max() > 1e-4


@given(st.integers(0, 10_000))
def test_the_error_stays_under_its_bound(seed):
  """|o' - o| <= (e^(2 eps) - 1) max |v|, eps the largest change of a logit."""
  e = entries(seed, 16)
  row = soft_match(e.keys, e.size, 6)
  out, q = merge(e, row, 10), jax.random.normal(jax.random.key(seed + 1), (D,))
  eps = np.abs((e.keys - out.keys[row]) @ q).max() / D**0.5
  bound = np.expm1(2 * eps) * np.linalg.norm(e.values, axis=1).max()
  np.testing.assert_allclose(error_bound(q[None], e, out, row), [bound], rtol=1e-4)
  assert np.linalg.norm(attend(q, out) - attend(q, e)) <= bound + 1e-6


def test_no_problem_of_a_thousand_is_over_its_bound():
  def excess(key):
    keys = jax.random.split(key, 3)
    k, v, q = (jax.random.normal(key, shape) for key, shape in zip(keys, ((16, D), (16, D), (D,)), strict=True))
    e = Entries(k, v, jnp.ones(16))
    row = soft_match(e.keys, e.size, 6)
    out = merge(e, row, 10)
    one = lambda e: attend_entries(q[None, None, None], jax.tree.map(lambda a: a[None, None], e))[0, 0, 0]
    return jnp.linalg.norm(one(out) - one(e)) - error_bound(q[None], e, out, row)[0]

  found = jax.jit(jax.vmap(excess))(jax.random.split(jax.random.key(0), 1000))
  assert found.shape == (1000,) and found.max() <= 1e-6


@given(st.integers(0, 999))
def test_rescaled_keys_have_the_mean_length_of_their_tokens(seed):
  """Over several rounds too; directions and values are those of the means."""
  e = entries(seed, 16)
  once = lambda e, n, **how: merge(e, soft_match(e.keys, e.size, n // 2), n // 2, **how)
  row = soft_match(e.keys, e.size, 8)
  plain, scaled = (once(e, 16, rescale=rescale) for rescale in (False, True))
  norm = lambda a: np.linalg.norm(a, axis=1)
  expected = [norm(np.asarray(e.keys))[np.asarray(row) == i].mean() for i in range(8)]
  np.testing.assert_allclose(norm(scaled.keys), expected, rtol=1e-5)
  np.testing.assert_allclose(
    scaled.keys / norm(scaled.keys)[:, None], plain.keys / norm(plain.keys)[:, None], atol=1e-5
  )
  np.testing.assert_array_equal(scaled.values, plain.values)
  twice = once(scaled, 8, rescale=True)
  np.testing.assert_allclose(twice.size @ norm(twice.keys), norm(e.keys).sum(), rtol=1e-5)


def test_alternating_offsets_find_the_neighbours():
  """Of all 70 balanced splits of 8 entries none has likelier partners for those who propose, if likeness falls with
  distance."""
  gain = lambda a, f: sum(max(f(abs(i - j)) for j in range(8) if j not in a) for i in a)
  for f in (lambda d: 1 / d), (lambda d: np.exp(-d)), (lambda d: -d):
    gains = [gain(a, f) for a in itertools.combinations(range(8), 4)]
    best = max(gains)
    assert len(gains) == 70 and sum(np.isclose(g, best, rtol=1e-9) for g in gains) == 26  # alternation is one of them
    np.testing.assert_allclose(gain((0, 2, 4, 6), f), best)
    np.testing.assert_allclose(best, 4 * f(1))
    assert gain((0, 1, 2, 3), f) < best
  near = jnp.cumsum(jax.random.normal(jax.random.key(0), (64, D)), axis=0)  # keys that drift
  e = Entries(near, near, jnp.ones(64))

  def loss(**how):
    row = soft_match(near, e.size, 16, **how)
    assert sorted(set(row.tolist())) == list(range(48))
    return float(jnp.square(near - merge(e, row, 48).keys[row]).sum())

  assert loss() < loss(partition="random") < loss(partition="halves")
  assert loss() < loss(likeness="chance")


def test_neighbours_merge_with_the_one_beside_them():
  """Every even offset has an odd one at its right, all but the first one at its left: the likelier of the two."""
  keys = jnp.asarray(np.random.default_rng(0).normal(size=(8, D)), jnp.float32)
  unit = keys / jnp.linalg.norm(keys, axis=1, keepdims=True)
  row = soft_match(keys, jnp.ones(8), 4, likeness="neighbours")
  expected = [1] + [max((i - 1, i + 1), key=lambda j, i=i: float(unit[i] @ unit[j])) for i in (2, 4, 6)]
  assert [row.tolist()[j] for j in expected] == row.tolist()[0::2]


def test_layers_and_heads_are_independent():
  e = entries(3, 12, lead=(2, 3))
  both = jax.vmap(jax.vmap(functools.partial(compress, keep=0.5, chunk=4)))
  order = jnp.array([2, 0, 1])
  moved = lambda a: a[::-1][:, order]
  for a, b in zip(both(jax.tree.map(moved, e)), both(e), strict=True):
    np.testing.assert_array_equal(a, moved(b))


def test_empty_places_weigh_nothing_and_merge_with_nothing():
  """A place may hold what is not a number where it is merged, any number where it is attended to."""
  e = entries(4, 8)
  holed = lambda a: Entries(*(b.at[4:].set(a) for b in e[:2]), e.size.at[4:].set(0))
  q = jax.random.normal(jax.random.key(9), (D,))
  expected = attend(q, jax.tree.map(lambda a: a[:4], e))
  np.testing.assert_allclose(attend(q, holed(99.0)), expected, rtol=1e-6)
  np.testing.assert_array_equal(attend(q, holed(99.0)), attend(q, holed(-7.0)))  # not even little
  out = compress(holed(jnp.nan), keep=0.75, chunk=8)
  assert out.size.sum() == 4 and np.isfinite(out.keys).all() and np.isfinite(out.values).all()
  np.testing.assert_allclose(attend(q, out), expected, rtol=1e-5)


def test_a_key_that_is_no_number_stays_in_the_answer():
  """Whichever entries it is merged with."""
  e = entries(4, 8)
  for i in range(8):
    out = compress(e._replace(keys=e.keys.at[i, 3].set(jnp.nan)), keep=0.25, chunk=8)
    assert out.size.sum() == 8 and np.isnan(attend(jnp.ones(D), out)).all()


def test_parts_are_attended_to_as_one():
  parts = [entries(i, n, lead=(2, 2)) for i, n in enumerate((1, 5, 3))]
  q, see = jax.random.normal(jax.random.key(9), (2, 3, 4, D)), jax.random.bernoulli(jax.random.key(1), 0.7, (2, 3, 9))
  see = see.at[:, :, 0].set(True)
  whole = jax.tree.map(lambda *a: jnp.concatenate(a, axis=2), *parts)
  np.testing.assert_allclose(
    attend_entries(q, *parts, see=see), attend_entries(q, whole, see=see), rtol=1e-5, atol=1e-6
  )


@functools.cache
def network():
  return jax.jit(inference.take_apart)(random_model(dataclasses.replace(configs()["qwen3"], depth=2)))


def decoder(**options):
  method = chelsea(**SMALL | options)
  return paged.decoder(paged.DENSE if method.pooled else method, decode=method, chunk=8, page=4)


@pytest.mark.parametrize(
  "options",
  [dict(keep=1.0), dict(keep=0.25, skip_layers=(0, 1), rounds=3), dict(keep=1.0, during_prefill=True, chunk=5)],
)
def test_with_everything_kept_generation_is_the_plain_one(options):
  """Rows of different lengths, one shorter than the first tokens; chunks move on while tokens are made."""
  prompts, lengths = random_tokens(3, 21), np.array([21, 1, 12])
  found = generate(network(), prompts, lengths, tokens=12, decoder=decoder(**options))
  np.testing.assert_array_equal(found, generate(network(), prompts, lengths, tokens=12))


def test_entries_grow_by_the_rule_and_first_and_recent_tokens_stay():
  prompts, lengths = random_tokens(2, 21), np.array([21, 10])
  chosen = decoder(keep=0.5)
  dense = paged.prefill(network(), prompts, lengths, capacity=40, chunk=8, page=4)[1]
  _, state = jax.jit(functools.partial(chosen.prefill, capacity=40))(network(), prompts, lengths)
  step = jax.jit(chosen.step)
  for made in range(15):
    for layer, pair in zip(state.memory, dense.pools, strict=True):
      for row, length in enumerate(lengths):
        merged = (length + made - 2 - 3) // 4 * 4
        sizes = [np.asarray(e.size[row]) for e in (layer.sink, layer.body, layer.recent)]
        assert [s.sum(axis=1).tolist() for s in sizes] == [[2, 2], [merged] * 2, [length + made - 2 - merged] * 2]
        assert ((sizes[1] > 0).sum(axis=1) == merged // 2).all()
        if made == 0:
          left = length - 2 - merged
          for i, pool in enumerate(pair):  # keys, then values
            whole = np.asarray(paged.rows(pool, dense.table))[row]
            np.testing.assert_array_equal(layer.sink[i][row], whole[:, :2])
            np.testing.assert_array_equal(layer.recent[i][row][:, :left], whole[:, 2 + merged : length])
    _, state = step(network(), prompts[:, made : made + 1], state)
  assert state.pools == ()


@pytest.mark.parametrize("how", [{}, dict(during_prefill=True)])
def test_a_bounded_cache_halves_itself_and_loses_no_token(how):
  """7 centroids at most where the longer prompt alone makes 8: sizes add up to the tokens merged. A bound that is not
  met changes nothing."""
  prompts, lengths = random_tokens(2, 21), np.array([21, 10])
  bounded, free, wide = (decoder(keep=0.5, **how, **options) for options in (dict(most=7), {}, dict(most=60)))
  run = lambda chosen: jax.jit(functools.partial(chosen.prefill, capacity=60))(network(), prompts, lengths)
  (_, state), (_, other), (_, same) = map(run, (bounded, free, wide))
  steps, halved = [jax.jit(chosen.step) for chosen in (bounded, free, wide)], 0
  for made in range(30):
    for layer in state.memory:
      for row, length in enumerate(lengths):
        merged = (length + made - 2 - 3) // 4 * 4
        sizes = np.asarray(layer.body.size[row])
        assert (sizes.sum(axis=1) == merged).all() and ((sizes > 0).sum(axis=1) <= 7).all()
        assert (np.asarray(layer.used) <= 7).all()
        halved += sizes.max() >= 6
    token = random_tokens(2, 1, seed=made)
    (_, state), (mine, other), (expected, same) = (
      step(network(), token, a) for step, a in zip(steps, (state, other, same), strict=True)
    )
    np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)
  assert halved and state.memory[0].body.size.shape[2] == PAGE


@pytest.mark.parametrize(
  "options", [dict(keep=0.25), dict(keep=0.2, chunk=8), dict(keep=0.33, rounds=3), dict(keep=0.5, most=7)]
)
def test_a_row_among_longer_ones_is_the_row_alone(options):
  """After the prompt, and while its own chunks are merged: its schedule knows nothing of the padding."""
  assert_rows_are_alone(network(), decoder(**options))


@pytest.mark.parametrize("options", [dict(keep=0.5), dict(keep=0.5, size_bias=False)])
def test_centroids_are_read_by_the_kernel_as_by_xla(options):
  """By the kernel's reference: rows of different lengths, one without a centroid, and others that gain some."""
  prompts, lengths, found = random_tokens(3, 21), np.array([21, 3, 10]), []
  for implementation in (None, "reference"):
    chosen = decoder(**options, implementation=implementation)
    _, state = jax.jit(functools.partial(chosen.prefill, capacity=40))(network(), prompts, lengths)
    run = jax.jit(lambda state: jax.lax.scan(lambda s, t: chosen.step(network(), t, s)[::-1], state, inputs))  # noqa: B023
    inputs = jnp.moveaxis(prompts[:, :9, None], 1, 0)
    found.append(run(state)[1])
  np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


def read_in_turn(q, k, v, keep, chunk, sink, recent):
  """Attention of one head's queries while the tokens are read `chunk` at a time, from the definition."""
  scale, out = q.shape[1] ** -0.5, []
  first, body, last = [], Entries(k[:0], v[:0], np.zeros(0)), []
  for begin in range(0, len(q), chunk):
    new = range(begin, min(begin + chunk, len(q)))
    first += [i for i in new if i < sink]
    last += [i for i in new if i >= sink]
    for i in new:
      seen = [j for j in (*first, *last) if j <= i]
      weight = np.concatenate([body.size * np.exp(body.keys @ q[i] * scale), np.exp(k[seen] @ q[i] * scale)])
      out.append(weight / weight.sum() @ np.concatenate([body.values, v[seen]]))
    if len(last) >= recent + chunk:
      old, last = last[:chunk], last[chunk:]
      merged = compress(Entries(jnp.asarray(k[old]), jnp.asarray(v[old]), jnp.ones(chunk)), keep=keep, chunk=chunk)
      body = Entries(*(np.concatenate(pair) for pair in zip(body, merged, strict=True)))
  return np.array(out)


def test_a_prompt_is_merged_while_it_is_read():
  """Rows of 21 and 10 tokens of one layer, in parts of 8 by the decoder and 4 by the method."""
  method = chelsea(keep=0.5, **SMALL, during_prefill=True)
  config = dataclasses.replace(configs()["qwen3"], depth=1)
  sizes = dict(batch=2, capacity=24, page=4, dtype=jnp.float32)
  memory, lengths = method.empty(config, **sizes), jnp.array([21, 10])
  shape = (2, 24, config.kv_heads, config.head_dim)
  q, k, v = (np.asarray(jax.random.normal(jax.random.key(i), shape)) for i in range(3))
  q = np.repeat(q, 2, axis=2)
  found = []
  for begin in range(0, 24, 8):
    view = paged.View(0, None, None, None, None, jnp.int32(begin), lengths, None)
    part = slice(begin, begin + 8)
    out, memory = method.attend(q[:, part], k[:, part], v[:, part], view, memory)
    found.append(out)
  found = np.concatenate(found, axis=1)
  for row, length in enumerate(lengths.tolist()):
    for head in range(4):
      mine = (q[row, :length, head], *(a[row, :length, head // 2] for a in (k, v)))
      np.testing.assert_allclose(found[row, :length, head], read_in_turn(*mine, 0.5, 4, 2, 3), rtol=1e-4, atol=1e-5)
  assert (memory[0].body.size.sum(axis=2) == jnp.array([[16], [4]])).all() and memory[0].filled.tolist() == [3, 4]


def test_a_prompt_merged_while_it_is_read_needs_no_whole_cache():
  network_, options = network(), dict(keep=0.25, **SMALL)
  bytes_of = lambda **more: cache_bytes(
    jax.eval_shape(
      lambda: paged.empty_state(network_, batch=1, capacity=1600, page=4, method=chelsea(**options, **more))
    )
  )
  assert bytes_of(during_prefill=True) < 0.35 * bytes_of()
  found = generate(network_, random_tokens(2, 21), tokens=8, decoder=decoder(keep=0.25, during_prefill=True))
  assert found.shape == (2, 8)


def test_it_takes_over_from_a_sparse_prefill_by_config_alone():
  """Both methods at full budget are the plain model; at less they still run together."""
  prompts = random_tokens(2, 21)
  every = functools.partial(paged.decoder, compact(), chunk=8, page=4)  # two first and four last blocks: all of them
  found = generate(network(), prompts, tokens=8, decoder=every(decode=chelsea(keep=1.0, **SMALL)))
  np.testing.assert_array_equal(found, generate(network(), prompts, tokens=8))
  less = generate(network(), prompts, tokens=8, decoder=every(decode=chelsea(keep=0.25, **SMALL)))
  assert less.shape == found.shape


@given(st.integers(2, 40), st.floats(0.1, 1.0))
def test_every_bound_that_is_taken_leaves_room_for_the_next_chunk(chunk, keep):
  for most in range(1, 200, 7):
    try:
      chelsea(keep=keep, chunk=chunk, most=most)
    except InputError as error:
      assert "half of it and a merged chunk must fit" in str(error)
    else:
      assert kept(most, 0.5, chunk) + kept(chunk, keep, chunk) <= most


def test_what_it_cannot_do_is_named():
  for options, message in (
    (dict(keep=0.0), "keep is 0"),
    (dict(chunk=1), "chunk is 1"),
    (dict(rounds=1), "rounds is 1; to keep 0.25 it takes at least 2"),
    (dict(sink=-1), "sink is -1"),
  ):
    with pytest.raises(InputError, match=message):
      chelsea(**options)
  for option in ("partition", "likeness"):
    with pytest.raises(InputError, match=f"{option} is 'odd'"):
      compress(entries(0, 4), keep=0.5, chunk=4, **{option: "odd"})
  _, state = jax.jit(functools.partial(decoder().prefill, lengths=None, capacity=12))(network(), random_tokens(1, 8))
  with pytest.raises(InputError, match="2 tokens at once"):
    decoder().step(network(), random_tokens(1, 2), state)
