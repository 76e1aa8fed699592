import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import anncur as config_file
from configs.scales import SCALES
from experiments import anncur as experiment
from experiments.anncur import baselines, recall, training
from experiments.anncur import data as anncur_data
from experiments.anncur import encoders as anncur_encoders
from jaxlab.core.checks import InputError
from jaxlab.data import tokenizer
from jaxlab.models import TransformerConfig
from jaxlab.tensors import anncur
from tests.common import Whole, run_and_continue

# In tests that check numbers; `anncur` itself looks at the values it is given too.
compiled = Whole(anncur, "cur_index", "cur_scores", "draw_anchors", "evaluate", "recall", "regularised_pinv", "top_k")
EXACT = dict(method="rcond", strength=1e-10)
KEY = jax.random.key(0)


def low_rank(queries, items, rank, noise=0.0, seed=0, decay=0.0):
  random = np.random.default_rng(seed)
  scale = (1 + np.arange(rank)) ** -decay
  m = (random.normal(size=(queries, rank)) * scale) @ random.normal(size=(rank, items)) / rank**0.5
  return jnp.asarray(m + noise * random.normal(size=m.shape))


def scorer(m):
  return lambda q, i: m[q, i]


@functools.partial(jax.jit, static_argnames=("rounds", "retrieve", "k", "strength"))
def adacur(m, queries, r_anc, first, key=None, **options):
  return anncur.adacur(scorer(m), queries, r_anc, first, key=key, **options)


def relative_error(a, b):
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("k_i, k_q", [(4, 4), (4, 30), (25, 7), (25, 30)])
def test_a_matrix_of_the_rank_of_its_block_is_reproduced(k_i, k_q):
  """anncur.md 7(a)1: rank(M) <= min(k_i, k_q) and a block of that rank; recall is 1 with k_r = k."""
  with jax.enable_x64(True):
    m = low_rank(60, 200, rank=4)
    index = compiled.cur_index(m[:k_q], compiled.draw_anchors(KEY, 200, k_i), **EXACT)
    np.testing.assert_allclose(compiled.cur_scores(m[:, index.anchors], index.embeddings), m, atol=1e-8)
    found = anncur.search(scorer(m), jnp.arange(30, 60), index, retrieve=10, k=10, pool_anchors=False)
    assert np.all(compiled.recall(found.items, compiled.top_k(m[30:], 10)[1]) == 1)


def test_anchor_rows_and_anchor_columns_are_exact():
  """anncur.md 7(a)2: anchor queries' rows at full row rank (k_i >= k_q), anchor items' columns at full column rank."""
  with jax.enable_x64(True):
    m = low_rank(40, 100, rank=40, noise=0.3)
    for k_q, k_i in ((10, 20), (20, 10)):
      anchors = compiled.draw_anchors(KEY, 100, k_i)
      s = compiled.cur_scores(m[:, anchors], compiled.cur_index(m[:k_q], anchors, **EXACT).embeddings)
      rows, columns = np.abs(s - m)[:k_q].max(), np.abs(s - m)[:, anchors].max()
      assert (rows < 1e-9) == (k_i >= k_q) and (columns < 1e-9) == (k_i <= k_q)


@given(st.integers(0, 10_000), st.sampled_from([True, False]))
def test_retrieving_every_item_is_exact_whatever_the_index(seed, pool):
  """anncur.md 7(a)3: k_r = n has recall 1; here the embeddings are noise."""
  m = low_rank(4, 30, rank=30, seed=seed)
  index = anncur.Index(jnp.array([3, 8, 20]), jnp.zeros((3, 2)), jax.random.normal(jax.random.key(seed), (3, 30)))
  found = anncur.search(scorer(m), jnp.arange(4), index, retrieve=27 if pool else 30, k=7, pool_anchors=pool)
  values, items = compiled.top_k(m, 7)
  assert np.array_equal(found.items, items) and np.allclose(found.scores, values)


class Counter:
  """A scorer that keeps every pair it is asked for."""

  def __init__(self, m):
    self.m, self.pairs = np.asarray(m), []

  def __call__(self, q, i):
    q, i = np.broadcast_arrays(q, i)
    self.pairs += list(zip(q.ravel().tolist(), i.ravel().tolist(), strict=True))
    return jnp.asarray(self.m[q, i])


@pytest.mark.parametrize("pool", [True, False])
def test_calls_are_the_anchors_and_the_retrieved_that_are_none(pool):
  """anncur.md 7(a)4: f is asked for k_i + |retrieved minus anchors| different items of a query."""
  f = Counter(low_rank(6, 50, rank=5, noise=0.2))
  index = compiled.cur_index(jnp.asarray(f.m[:3]), jnp.arange(0, 40, 4))
  found = anncur.search(f, jnp.arange(3, 6), index, retrieve=12, k=5, pool_anchors=pool)
  for row, query in enumerate(range(3, 6)):
    assert len({i for q, i in f.pairs if q == query}) == int(found.calls[row])
  assert np.all(found.calls == 22) if pool else np.all(found.calls < 22)
  assert len(f.pairs) == 3 * 22


def test_adacur_spends_its_budget_on_different_items():
  """Rounds of 3 anchors and 5 retrieved: 11 calls a query, no item twice, and the best of those 11 come back."""
  f = Counter(low_rank(8, 40, rank=6, noise=0.2))
  with jax.disable_jit():
    found = anncur.adacur(
      f, jnp.arange(4, 8), jnp.asarray(f.m[:4]), jnp.tile(jnp.array([[0, 5, 9]]), (4, 1)), rounds=2, retrieve=5, k=11
    )
  assert len(f.pairs) == len(set(f.pairs)) == 4 * 11 and np.all(found.calls == 11)
  for row, query in enumerate(range(4, 8)):
    assert {i for q, i in f.pairs if q == query} == set(found.items[row].tolist())
    assert np.array_equal(np.sort(f.m[query, found.items[row]])[::-1], found.scores[row])


class Foreign:
  """An array of another package: all that is known of it is that NumPy takes it."""

  def __init__(self, values):
    self.values = values

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.values, dtype)


@pytest.mark.parametrize("form", [np.asarray, np.ndarray.tolist, Foreign])
def test_a_scorer_may_be_anything_that_returns_numbers(form):
  m = np.random.default_rng(0).normal(size=(30, 6)) @ np.random.default_rng(1).normal(size=(6, 40))
  m = m.astype(np.float32)
  remote = lambda q, i: form(m[np.asarray(q), np.asarray(i)])  # it cannot be traced
  first = jnp.tile(jnp.array([3, 9, 17]), (10, 1))
  options = dict(rounds=3, retrieve=5, k=5)
  table, queries = anncur.score_matrix(remote, np.arange(20), np.arange(40)), np.arange(20, 30)
  assert (table == jnp.asarray(m[:20])).all()
  index = anncur.cur_index(table, first[0])
  calls = (
    lambda f: anncur.adacur(f, queries, table, first, **options),
    lambda f: anncur.search(f, queries, index, retrieve=5, k=5),
    lambda f: anncur.rerank(f, queries, jnp.asarray(m[20:]), retrieve=5, k=5),
  )
  for call in calls:
    assert (call(remote).items == call(scorer(jnp.asarray(m))).items).all()


def test_one_round_of_adacur_is_anncur():
  """anncur.md 7(a)5: the same anchors, the same regularisation; k_i below and above k_q, and anchors of their own."""
  with jax.enable_x64(True):
    m = low_rank(50, 120, rank=12, noise=0.1)
    for k_i in (6, 35):
      anchors = compiled.draw_anchors(KEY, 120, k_i)
      index = compiled.cur_index(m[:20], anchors)
      options = dict(retrieve=30, k=30 + k_i)
      a = jax.jit(lambda q, index, o=options: anncur.search(scorer(m), q, index, **o))(jnp.arange(20, 50), index)
      first = jnp.tile(anchors, (30, 1))
      b = adacur(m, jnp.arange(20, 50), m[:20], first, rounds=1, **options)
      assert np.array_equal(a.items, b.items) and np.array_equal(a.calls, b.calls)


def test_later_rounds_are_cur_on_the_anchors_so_far():
  """Every round against a pseudo-inverse written out, strength -> 0; the drawn variant takes other items."""
  with jax.enable_x64(True):
    m = np.asarray(low_rank(30, 80, rank=10, noise=0.1))
    first = jnp.tile(jnp.array([[2, 40]]), (3, 1))
    given = jnp.asarray(m), jnp.arange(27, 30), jnp.asarray(m[:27]), first
    found = adacur(*given, rounds=4, retrieve=6, k=14, strength=1e-9)
    for row, q in enumerate(range(27, 30)):
      chosen = [2, 40]
      for size in (2, 2, 2, 6):
        s = m[q, chosen] @ np.linalg.pinv(m[:27][:, chosen]) @ m[:27]
        s[chosen] = -np.inf
        chosen += np.argsort(-s)[:size].tolist()
      assert set(chosen) == set(found.items[row].tolist())
    drawn = adacur(*given, KEY, rounds=4, retrieve=6, k=14)
    assert not np.array_equal(np.sort(drawn.items), np.sort(found.items))


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_recall_against_sets(seed, k):
  """anncur.md 7(a)6."""
  random = np.random.default_rng(seed)
  a, b = (np.stack([random.permutation(12)[:k] for _ in range(5)]) for _ in range(2))
  expected = [len(set(x) & set(y)) / k for x, y in zip(a.tolist(), b.tolist(), strict=True)]
  assert np.allclose(compiled.recall(jnp.asarray(a), jnp.asarray(b)), expected)


def test_one_pass_gives_the_recall_of_every_search():
  """`evaluate` against rerank and search, pair by pair, ties included (scores are small integers)."""
  m = jnp.round(2 * low_rank(12, 40, rank=6, noise=0.5))
  approximate = m + 3 * jax.random.normal(KEY, m.shape)
  # Ties make the exact top k a matter of order; this breaks them by the item, as top_k does.
  broken = m - 1e-4 * jnp.arange(40)
  f, index = scorer(broken), compiled.cur_index(m[:5], jnp.array([1, 7, 30]))
  s = compiled.cur_scores(broken[:, index.anchors], index.embeddings)
  ks, retrieves, queries = (1, 10), (4, 37), jnp.arange(12)
  plain = compiled.evaluate(m, approximate, ks=ks, retrieves=retrieves)
  pooled = compiled.evaluate(m, s, ks=ks, retrieves=retrieves, anchors=index.anchors)
  for (a, k), (b, r) in itertools.product(enumerate(ks), enumerate(retrieves)):
    exact = compiled.top_k(m, k)[1]
    if k <= r:
      found = anncur.rerank(f, queries, approximate, retrieve=r, k=k)
      assert np.allclose(plain[a, b], compiled.recall(found.items, exact)), (k, r)
    if k <= r + 3:
      found = anncur.search(f, queries, index, retrieve=r, k=k)
      assert np.allclose(pooled[a, b], compiled.recall(found.items, exact)), (k, r)


def test_the_square_block_needs_regularisation():
  """At k_i = k_q a bare inverse fails, ridge and rcond do not, elsewhere all are alike."""
  with jax.enable_x64(True):
    m = low_rank(80, 250, rank=15, noise=0.05)
    r, new = m[:40], m[40:]
    error = {}
    for k_i, (name, how) in itertools.product(
      (20, 40, 200), {"bare": EXACT, "rcond": dict(method="rcond", strength=0.01), "ridge": {}}.items()
    ):
      index = compiled.cur_index(r, compiled.draw_anchors(KEY, 250, k_i), **how)
      error[name, k_i] = relative_error(compiled.cur_scores(new[:, index.anchors], index.embeddings), new)
  assert error["bare", 40] > 5 * max(error["ridge", 40], error["rcond", 40])
  assert error["bare", 40] > 2 * max(error["bare", 20], error["bare", 200])
  assert error["ridge", 200] < error["ridge", 40] < error["ridge", 20] < 0.5


@pytest.mark.parametrize("method", anncur.METHODS)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_the_inverse_is_the_penalised_least_squares_solution(method, shape):
  with jax.enable_x64(True):
    g = np.random.default_rng(0).normal(size=shape)
    u = compiled.regularised_pinv(jnp.asarray(g), method=method, strength=0.1)
    lam = 0.1 * np.linalg.norm(g, 2) ** 2 / min(shape)
    ridge = np.linalg.solve(g.T @ g + lam * np.eye(shape[1]), g.T)
    np.testing.assert_allclose(u, ridge if method == "ridge" else np.linalg.pinv(g, rcond=0.1), atol=1e-12)


@pytest.mark.parametrize("method", anncur.METHODS)
def test_singular_blocks_have_an_inverse(method):
  """A block of zeros predicts zeros; two anchors with equal columns share their weight."""
  zeros = compiled.cur_index(jnp.zeros((4, 9)), jnp.arange(3), method=method)
  assert np.all(zeros.embeddings == 0)
  m = low_rank(6, 20, rank=6).at[:, 1].set(low_rank(6, 20, rank=6)[:, 0])
  index = compiled.cur_index(m, jnp.array([0, 1]), method=method)
  assert np.all(np.isfinite(index.embeddings)) and np.allclose(index.embeddings[0], index.embeddings[1], atol=1e-5)
  zeros, first = jnp.zeros((4, 9)), jnp.array([[0], [3]])
  found = adacur(jnp.ones((2, 9)), jnp.arange(2), zeros, first, rounds=3, retrieve=2, k=5)
  assert all(len(set(row)) == 5 for row in found.items.tolist())


def test_new_items_join_an_index_without_a_new_inverse():
  m = low_rank(40, 60, rank=8, noise=0.1)
  anchors = jnp.arange(0, 45, 3)
  whole = compiled.cur_index(m[:20], anchors)
  grown = anncur.add_items(compiled.cur_index(m[:20, :50], anchors), m[:20, 50:])
  np.testing.assert_allclose(grown.embeddings, whole.embeddings, atol=1e-5)


def test_a_bfloat16_index_finds_the_same_items():
  m = low_rank(40, 300, rank=8)
  index = compiled.cur_index(m[:20], compiled.draw_anchors(KEY, 300, 20))
  half = index._replace(embeddings=index.embeddings.astype(jnp.bfloat16))
  run = functools.partial(anncur.search, scorer(m), jnp.arange(20, 40), retrieve=30, k=10)
  assert compiled.cur_scores(m[20:, index.anchors], half.embeddings).dtype == jnp.float32
  assert float(compiled.recall(run(half).items, run(index).items).mean()) > 0.99


def test_nan_ranks_last_where_it_is_traced_and_is_named_where_it_is_not():
  m = low_rank(6, 20, rank=3).at[5, 7].set(jnp.nan)
  index = compiled.cur_index(m[:4], jnp.arange(3))
  run = functools.partial(anncur.search, scorer(m), index=index, retrieve=17, k=20)
  found = jax.jit(lambda q: run(queries=q))(jnp.array([5]))
  assert int(found.items[0, -1]) == 7 and np.all(np.isfinite(found.scores[0, :-1]))
  with pytest.raises(InputError, match="scores of the retrieved items holds NaN"):
    run(queries=jnp.array([5]))


SMALL = anncur.Index(jnp.arange(3), jnp.zeros((3, 2)), jnp.ones((3, 10)))
ONES = scorer(jnp.ones((4, 10)))
FIRST = jnp.array([[0, 1]])


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: anncur.draw_anchors(KEY, 5, 6), r"6 anchor items out of 5; choose 1\.\.5"),
    (lambda: anncur.cur_index(jnp.ones((2, 5)), jnp.array([0, 5])), r"one or more of 0\.\.4"),
    (lambda: anncur.cur_index(jnp.ones((2, 5)), jnp.array([], jnp.int32)), "one or more"),
    (lambda: anncur.cur_index(jnp.ones((2, 5)), jnp.array([1, 1])), "anchor twice"),
    (lambda: anncur.cur_index(jnp.ones((2, 5)), jnp.ones(5, bool)), r"one or more of 0\.\.4"),
    (lambda: anncur.cur_index(jnp.ones((2, 5)), [0.5]), r"one or more of 0\.\.4"),
    (lambda: anncur.cur_index(jnp.full((2, 5), jnp.nan), jnp.array([1])), "R_anc holds NaN"),
    (lambda: anncur.regularised_pinv(jnp.ones((2, 2)), method="lasso"), "method is 'lasso'"),
    (lambda: anncur.regularised_pinv(jnp.ones((2, 2)), strength=-1.0), "strength is -1.0"),
    (lambda: anncur.search(ONES, jnp.arange(2), SMALL, retrieve=8, k=1), r"retrieve is 8; it must lie in 1\.\.7"),
    (lambda: anncur.search(ONES, jnp.arange(2), SMALL, retrieve=0, k=1), "retrieve is 0"),
    (lambda: anncur.search(ONES, jnp.arange(2), SMALL, retrieve=2, k=6), "k is 6, but f scores 5 items"),
    (lambda: anncur.search(ONES, jnp.arange(2), SMALL, retrieve=2, k=3, pool_anchors=False), "f scores 2 items"),
    (lambda: anncur.rerank(ONES, jnp.arange(1), jnp.ones((1, 10)), retrieve=3, k=4), "k is 4"),
    (lambda: anncur.score_matrix(scorer(jnp.full((1, 1), jnp.inf)), [0], [0]), "score matrix holds NaN or inf"),
    (lambda: anncur.adacur(ONES, [0], jnp.ones((2, 10)), FIRST, rounds=5, retrieve=1, k=1), "leave none of 10"),
    (lambda: anncur.adacur(ONES, [0], jnp.ones((2, 10)), FIRST, rounds=0, retrieve=1, k=1), "rounds is 0"),
    (lambda: anncur.adacur(ONES, [0], jnp.ones((2, 10)), FIRST, rounds=1, retrieve=1, k=1, strength=0.0), "strength"),
    (
      lambda: anncur.adacur(ONES, [0], jnp.ones((2, 10)), jnp.array([[3, 3]]), rounds=1, retrieve=1, k=1),
      "twice among the first anchors",
    ),
    (
      lambda: anncur.adacur(ONES, [0], jnp.ones((2, 10)), jnp.array([[0, 10]]), rounds=1, retrieve=1, k=1),
      r"first anchors lie in 0\.\.10; items are 0\.\.9",
    ),
    (
      lambda: anncur.adacur(ONES, [0], jnp.ones((2, 10)), FIRST[0], rounds=1, retrieve=1, k=1),
      r"first anchors are int32\[2\]; expected integers \[1, slots\]",
    ),
    (
      lambda: anncur.search(lambda q, i: np.ones((1, 3)), jnp.arange(2), SMALL, retrieve=2, k=1),
      r"scores of the anchor items have shape \(1, 3\); the scorer was asked for \(2, 3\)",
    ),
    (lambda: anncur.evaluate(jnp.ones((1, 5)), jnp.ones((1, 5)), ks=(6,), retrieves=(2,)), "beyond 5 items"),
    (
      lambda: baselines.shared_batches(None, [0], np.ones((1, 9)), steps=1, batch=2, size=5),
      "2 queries share 5 items",
    ),
    (lambda: baselines.truncated_svd(jnp.ones((2, 5)), 3), r"it must lie in 1\.\.2"),
    (lambda: baselines.cluster_anchors(KEY, jnp.ones((4, 2)), 5), "5 clusters of 4"),
    (lambda: baselines.tf_idf_neighbours([["a"]], [["a"]], np.array([0]), count=1), "1 neighbours besides the gold"),
    (lambda: baselines.tf_idf([["a"]], [[]]), "no word to count"),
    (lambda: anncur_data.function_pairs(["not python ("]), "no document holds a Python function"),
    (lambda: anncur_data.sentence_pairs(["Short."]), "no paragraph has 3 sentences"),
    (lambda: anncur_data.wordnet_pairs("/no/where"), "no WordNet file"),
    (lambda: anncur_encoders.Encoder(None, KEY, head="mean", marks=None), "head is 'mean'"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(InputError, match=message):
    make()


# Baselines


def test_truncated_svd_bounds_every_approximation_of_its_rank():
  """Eckart-Young; and the oracle middle factor beats the one that knows R and C alone."""
  with jax.enable_x64(True):
    m = low_rank(50, 90, rank=50, decay=0.7)
    rows, anchors = jnp.arange(20), compiled.draw_anchors(KEY, 90, 12)
    s = np.linalg.svd(m, compute_uv=False)
    best = relative_error(baselines.truncated_svd(m, 12), m)
    assert abs(best - np.linalg.norm(s[12:]) / np.linalg.norm(s)) < 1e-12
    oracle = relative_error(baselines.cur_oracle(m, rows, anchors), m)
    cur = relative_error(
      compiled.cur_scores(m[:, anchors], compiled.cur_index(m[rows], anchors, **EXACT).embeddings), m
    )
    assert best <= oracle <= cur


def test_tf_idf_and_bm25_by_hand():
  items, queries = [["a", "a", "b"], ["b", "c"], ["c", "d"]], [["a", "x"], ["c", "b", "b"]]
  idf = lambda df: 1 + np.log(4 / (1 + df))
  first = np.array([2 * idf(1), idf(2)]) / np.hypot(2 * idf(1), idf(2))
  s = baselines.tf_idf(queries, items)
  assert np.allclose(s[0], [first[0], 0, 0])
  query = np.array([2 * idf(2), idf(2)]) / np.hypot(2, 1) / idf(2)
  assert np.allclose(s[1, 1], query @ np.array([1, 1]) / 2**0.5) and np.isclose(s[1, 0], query[0] * first[1])
  near = baselines.tf_idf_neighbours(queries, items, np.array([1, 1]), count=2)
  assert near.tolist() == [[0, 2], [0, 2]] and s[1, 0] > s[1, 2]
  weight = np.log(1 + 2.5 / 1.5)
  expected = weight * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 3 / (7 / 3)))
  assert np.allclose(baselines.bm25(queries, items)[0], [expected, 0, 0])


def test_cluster_anchors_are_one_item_of_each_cluster():
  """Four tight bundles of directions: one anchor from each; more clusters than distinct items still give that many."""
  centres = np.eye(4)[np.arange(40) % 4]
  e = jnp.asarray(centres + 0.01 * np.random.default_rng(0).normal(size=centres.shape), jnp.float32)
  chosen = [np.asarray(baselines.cluster_anchors(jax.random.key(seed), e, 4)) for seed in range(9)]
  # k-means may start with two centres in one bundle; it must not always.
  assert any(set((c % 4).tolist()) == {0, 1, 2, 3} for c in chosen) and all(len(set(c.tolist())) == 4 for c in chosen)
  same = baselines.cluster_anchors(KEY, jnp.ones((10, 3)), 6)
  assert len(set(same.tolist())) == 6 and np.all(np.diff(same) > 0)


# Text and encoders


@pytest.fixture(scope="module")
def bpe():
  return tokenizer.train(["the cat sat on the mat, def title(body): return"] * 3, 280)


def test_rows_have_their_marks_and_share_the_room(bpe):
  """[CLS] left [START] mention [END] right [SEP], the context cut evenly; [CLS] title [TITLE] description [SEP]."""
  name = lambda row: [bpe.id_to_token(int(t)) for t in row]
  cls, start, end, title, sep, pad = (getattr(anncur_data, n) for n in ("CLS", "START", "END", "TITLE", "SEP", "PAD"))
  rows = anncur_data.encode_queries(bpe, [("xyz", "k", "uvw"), ("x", "k", "uvwp"), ("", "klmnopqr", "u")], 9)
  assert name(rows[0]) == [cls, "y", "z", start, "k", end, "u", "v", sep]
  assert name(rows[1]) == [cls, "x", start, "k", end, "u", "v", "w", sep]
  assert name(rows[2]) == [cls, start, "k", "l", "m", "n", "o", end, sep]
  items = anncur_data.encode_items(bpe, [("xyzk", "uvw"), ("", "u")], 7)
  assert name(items[0]) == [cls, "x", "y", title, "u", "v", sep]
  assert name(items[1]) == [cls, title, "u", sep, pad, pad, pad]
  for call in (lambda: anncur_data.encode_queries(bpe, [], 4), lambda: anncur_data.encode_items(bpe, [], 3)):
    with pytest.raises(InputError, match="no room"):
      call()


def test_items_do_not_hold_what_their_queries_quote(tmp_path):
  """Docstrings leave functions, sentences their paragraphs, examples their glosses."""
  code = 'def add(a, b):\n  """Returns the sum of both.\n\n  Not a product."""\n  return a + b\n\ndef bare(): pass\n'
  pairs = anncur_data.function_pairs(["?", code, code])
  assert pairs.queries == [("", "Returns the sum of both.", "")] and pairs.items == [("add", "(a, b) return a + b")]
  assert pairs.worlds == ["1"]
  prose = "It rained on the town all day. Nobody went out to look. The dog slept by the warm fire."
  pairs = anncur_data.sentence_pairs(["# Title\n\n" + prose])
  assert len(pairs.items) == 1 and pairs.queries[0][1] in prose and pairs.queries[0][1] not in pairs.items[0][1]
  for part in anncur_data.PARTS_OF_SPEECH:
    verb = part == "verb"
    line = '00000010 29 v 02 run 0 dash_off 0 000 | move fast; "she ran or was running"; "no such word" \n'
    other = "00000020 29 v 01 run 1 000 | flow; as water does \n"
    (tmp_path / f"data.{part}").write_text("  1 licence\n" + (line + other if verb else ""))
    index = "run v 2 1 @ 2 0 00000010 00000020\ndash_off v 1 0 1 0 00000010\n"
    (tmp_path / f"index.{part}").write_text(index if verb else "")
  pairs = anncur_data.wordnet_pairs(tmp_path)
  assert pairs.items == [("run, dash off", "move fast"), ("run", "flow; as water does")]
  assert pairs.queries == [("she ran or was ", "running", "")] and pairs.candidates == [[0, 1]]
  (tmp_path / "index.verb").write_text("run v 2 1 @ 2 0 00000099\n")
  with pytest.raises(InputError, match="are not WordNet"):
    anncur_data.wordnet_pairs(tmp_path)


@functools.cache
def toy(head, seed=0, depth=2):
  """A tiny encoder over 32 words: ids 0..5 are the marks (CLS START END TITLE SEP PAD)."""
  config = TransformerConfig(
    vocab_size=32, depth=depth, width=32, q_heads=2, kv_heads=2, head_dim=16, mlp_width=64, embed_norm=True,
    qk_norm="before_rope", tied_embeddings=True,
  )  # fmt: skip
  make = lambda key: anncur_encoders.Encoder(config, key, head=head, marks=anncur_encoders.Marks(1, 2, 3, 5))
  return jax.jit(make)(jax.random.key(seed))


def toy_tokens(words=20):
  """Query w is CLS START w END SEP, item w is CLS TITLE w SEP and padding."""
  w = np.arange(words)[:, None] + 6
  one = np.ones_like(w)
  return anncur_encoders.Tokens(
    jnp.asarray(np.concatenate([0 * one, one, w, 2 * one, 4 * one], 1)),
    jnp.asarray(np.concatenate([0 * one, 3 * one, w, 4 * one, 5 * one], 1)),
  )


@pytest.mark.parametrize("head", ["cls", "emb"])
def test_a_score_reads_its_own_pair_and_no_padding(head):
  encoder, tokens = toy(head, depth=1), toy_tokens()
  f = anncur_encoders.cross_scorer(encoder, tokens.queries, tokens.items, tile=7)
  whole = f(jnp.arange(4)[:, None], jnp.arange(5)[None])
  score_pairs = jax.jit(anncur_encoders.score_pairs)
  one = score_pairs(encoder, tokens.queries[2:3], tokens.items[3:4])
  np.testing.assert_allclose(whole[2, 3], one[0], rtol=1e-4, atol=1e-5)
  longer = jnp.pad(tokens.items[3:4], ((0, 0), (0, 6)), constant_values=5)
  padded = score_pairs(encoder, tokens.queries[2:3], longer)
  np.testing.assert_allclose(padded, one, rtol=1e-4, atol=1e-5)
  assert len(np.unique(np.asarray(whole))) == 20  # every query and every item has its say


def test_a_two_layer_cross_encoder_learns_to_match():
  """anncur.md 7(a)7: the query's word is the item's; among 20 items chance is 0.05. A dual encoder learns it too."""
  tokens, words = toy_tokens(), np.arange(20)
  hard = np.stack([np.delete(words, w) for w in words])

  def batches(encoder, epoch):
    random = np.random.default_rng(epoch)
    return anncur_encoders.gold_batches(random, words, words, words, hard, steps=60, batch=16, candidates=4)

  run = functools.partial(anncur_encoders.train, tokens=tokens, make_batches=batches, key=KEY, epochs=1, steps=60)
  encoder, losses = run(toy("emb"), anncur_encoders.cross_loss, rate=1e-2)
  scores = anncur_encoders.cross_scorer(encoder, *tokens, tile=200)(jnp.arange(20)[:, None], jnp.arange(20)[None])
  assert np.mean(np.argmax(scores, 1) == words) > 0.5 and losses[-1] < 0.5 * losses[0]
  dual, _ = run(toy("dual", depth=1), anncur_encoders.dual_loss, rate=1e-2)
  embed = functools.partial(anncur_encoders.dual_embeddings, dual)
  s = embed(tokens.queries, item=False) @ embed(tokens.items, item=True).T
  assert np.mean(np.argmax(s, 1) == words) > 0.9
  mined = anncur_encoders.mine_negatives(dual, tokens, words, words, words, top=6)
  best = [[i for i in np.argsort(-row, kind="stable")[:6] if i != w][:5] for w, row in enumerate(np.asarray(s))]
  assert mined.shape == (20, 5) and [set(row) for row in mined.tolist()] == [set(row) for row in best]


def test_losses_are_the_formulas():
  """Cross-entropy of the positive; copies of the positive are no negatives; MATCH with a one-hot teacher is TRP."""
  encoder, tokens = toy("dual", depth=1), toy_tokens()
  q = anncur_encoders.dual_embeddings(encoder, tokens.queries, item=False)
  s = np.asarray(q @ anncur_encoders.dual_embeddings(encoder, tokens.items, item=True).T, np.float64)
  match_loss = jax.jit(anncur_encoders.match_loss)
  log_softmax = lambda x: x - np.log(np.exp(x).sum())
  batch = {"query": jnp.array([3, 4]), "items": jnp.array([[3, 8], [4, 3]])}
  expected = -np.mean([log_softmax(s[3, [3, 8, 4]])[0], log_softmax(s[4, [4, 3, 8, 3]])[0]])
  assert np.isclose(jax.jit(anncur_encoders.dual_loss)(encoder, tokens, batch, KEY), expected, atol=1e-4)
  teacher = np.array([[1.0, 0.0], [2.0, -1.0]])
  p = np.exp(teacher) / np.exp(teacher).sum(1, keepdims=True)
  rows = [p[row] @ log_softmax(s[q, items]) for row, (q, items) in enumerate(((3, [3, 8]), (4, [4, 3])))]
  batch = {"query": batch["query"], "items": jnp.array([8, 3, 4]), "place": jnp.array([[1, 0], [2, 1]])}
  batch["teacher"] = jnp.asarray(teacher)
  assert np.isclose(match_loss(encoder, tokens, batch, KEY), -np.mean(rows), atol=1e-4)
  batch["teacher"] = jnp.array([[0, -jnp.inf]] * 2)
  expected = -np.mean([log_softmax(s[3, [3, 8]])[0], log_softmax(s[4, [4, 3]])[0]])
  assert np.isclose(match_loss(encoder, tokens, batch, KEY), expected, atol=1e-4)


def test_batches_hold_what_they_say():
  """The positive first and never again; MATCH the teacher's top; TRP one of the top 4 over ranks 5..12."""
  random, gold = np.random.default_rng(0), np.arange(5) * 3
  hard = np.tile(np.array([[1, 2]]), (5, 1))
  b = anncur_encoders.gold_batches(random, np.arange(5), gold, np.arange(15), hard, steps=8, batch=5, candidates=6)
  items = b["items"]
  assert np.array_equal(items[..., 0], gold[b["query"]]) and not np.any(items[..., 1:] == items[..., :1])
  assert all(sorted(row) == list(range(5)) for row in b["query"].tolist()) and np.isin(items[..., 1:3], [1, 2]).all()
  teacher = random.normal(size=(5, 20))
  rank = np.argsort(np.argsort(-teacher, 1), 1)
  match = baselines.match_batches(random, np.arange(5), teacher, steps=4, batch=3, top=6)
  trp = baselines.trp_batches(random, np.arange(5), teacher, steps=4, batch=30)

  def ranks(batch):
    candidates = np.take_along_axis(batch["items"][:, None], batch["place"], -1)
    taught = np.take_along_axis(teacher[batch["query"]], candidates, -1)
    assert batch is trp or np.allclose(batch["teacher"], taught)
    return np.take_along_axis(rank[batch["query"]], candidates, -1)

  assert np.all(ranks(match) == np.arange(6)) and match["items"].shape == (4, 18)
  shared = baselines.shared_batches(random, np.arange(5), teacher, steps=40, batch=3, size=9)
  assert ranks(shared).shape == (40, 3, 9) and set(ranks(shared).ravel().tolist()) == set(range(20))
  assert all(len(set(row)) == len(row) for part in ("query", "items") for row in shared[part].tolist())
  assert set(ranks(trp)[..., 0].ravel().tolist()) == {0, 1, 2, 3} and np.all(ranks(trp)[..., 1:] == np.arange(4, 12))


def test_a_student_stops_where_validation_does_and_never_below_its_start(monkeypatch):
  """Rates 1 and 2: the first gains for two rounds, the second never; with no gain at all the start is kept."""
  config = config_file.get_config("test")
  config.distil.update(rates=(1.0, 2.0), patience=2, rounds=9, steps=1)
  monkeypatch.setattr(training.scorers, "train", lambda student, *_, rate, **__: ((*student, rate), None))
  nothing = types.SimpleNamespace(searched=None, anchor=None)

  def distil(values):
    return training.distil(config, nothing, "match", (), None, lambda student: values.get(student, 0.1))

  student, found = distil({(): 0.4, (1.0,): 0.5, (1.0, 1.0): 0.7, (1.0, 1.0, 1.0): 0.6})
  assert student == (1.0, 1.0) and (found["start"], found["best"], found["rate"], found["rounds"]) == (0.4, 0.7, 1.0, 2)
  assert found["reached"] == {"1": {"best": 0.7, "rounds": 4}, "2": {"best": 0.4, "rounds": 2}}
  student, found = distil({(): 0.4})
  assert student == () and found["best"] == 0.4 and found["rounds"] == 0


def test_the_experiment_runs_at_test_scale_and_no_part_of_it_twice(tmp_path, monkeypatch):
  parts = ("training.train_and_score", "training.distil_and_score", "recall.measure", "errors.measure", "speed.measure")
  report = run_and_continue("anncur", tmp_path, monkeypatch, *parts)
  assert len(report.claims) >= 8
  table = report.metrics["recall"]
  assert len(table) == 17 and all(
    0 <= r <= 1 + 1e-6 for row in table.values() for k in row.values() for r in k.values()
  )
  ahead = recall.leads(config_file.get_config("test"), table)[1]
  assert list(ahead) == [(5, 20), (5, 40)] and report.claims[0].ours == min(ahead.values())
  assert all(found["best"] >= found["start"] for found in report.metrics["students"].values())


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_fits_together(scale):
  experiment.check_config(config_file.get_config(scale))


def test_a_share_of_an_error_is_claimed_where_there_is_one():
  """The worst budget's; ANNCUR that misses less than one query of the test leaves nothing to remove a share of."""
  config = config_file.get_config("cpu")
  config.search.budgets = (40, 100)
  table = lambda *errors: {
    name: {"k=1": {f"C={c}": 1 - part * e for part, c, e in zip(parts, (40, 100), errors, strict=True)}}
    for name, parts in (("ANNCUR", (1, 1)), ("ADACUR", (0.5, 0.25)))
  }
  one = 1 / config.domain.test_queries
  shares = lambda *errors: [(c.ours, c.baseline) for c in recall.adaptive_claims(config, table(*errors))]
  assert shares(0.1, one) == [(pytest.approx(0.5), "ANNCUR 0.900")]
  assert shares(0.9 * one, 0.2) == [(pytest.approx(0.75), "ANNCUR 0.800")]
  assert shares(0.0, 0.0) == []


def test_the_recall_of_the_experiment_is_that_of_searching():
  """By CUR and by item-item scores, against `search`."""
  m, anchors = low_rank(12, 40, rank=5, noise=0.3).astype(jnp.float32), jnp.array([[1, 6, 30], [2, 8, 9]])
  exact, queries = m[6:], jnp.arange(6)
  options = dict(ks=(4,), retrieve=7, strength=0.01)
  by_cur = recall.recall_of_anchors(m[:6], exact, anchors, **options)
  by_items = recall.recall_of_anchors(m[:3], exact, anchors[:1], inverse=False, **options)
  best = compiled.top_k(exact, 4)[1]
  for chosen, r in zip(anchors, by_cur, strict=True):
    found = anncur.search(scorer(exact), queries, compiled.cur_index(m[:6], chosen), retrieve=7, k=4)
    assert np.allclose(r[0], compiled.recall(found.items, best))
  index = anncur.Index(anchors[0], jnp.zeros((3, 6)), m[:3])
  found = anncur.search(scorer(exact), queries, index, retrieve=7, k=4)
  assert np.allclose(by_items[0, 0], compiled.recall(found.items, best))
