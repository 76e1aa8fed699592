import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.attention import dhsa as module
from jaxlab.attention import dhsa_boundaries, dhsa_encoders
from jaxlab.attention.dhsa import attention_mass, block_sparse, chunk_means, chunk_scores, dhsa, sliding_window
from jaxlab.attention.dhsa_boundaries import (
  BoundaryPredictor,
  agreement,
  attention_ratio,
  boundary_loss,
  evenly,
  focal_loss,
  randomly,
  scored,
  select_boundaries,
)
from jaxlab.core.checks import InputError
from jaxlab.models import generate, inference, paged
from tests.common import configs, plain_attention, random_model, random_tokens

TIME, BLOCK, HEADS, KV, SIZE, INSTRUCTION = 256, 32, 4, 2, 16, 20
LENGTHS = np.array([256, 201])
PIECES = dict(block=BLOCK, beta=1, local=BLOCK, sink=16, instruction=INSTRUCTION, groups=3, theta=0.0)
CONFIG = dataclasses.replace(configs()["qwen3"], depth=2)
boundaries_of = jax.jit(select_boundaries, static_argnames=("most", "apart", "instruction"))
ratio = jax.jit(attention_ratio, static_argnames=("window", "half", "block"))
scores_of = jax.jit(chunk_scores, static_argnames="pooling")
select_keys = jax.jit(module.select_keys, static_argnames=("budget", "local", "sink"))


def arrays(time=TIME, seed=0):
  """Queries, keys and values of two rows; keys have topics of uneven lengths."""
  keys = jax.random.split(jax.random.key(seed), 4)
  shape = lambda heads: (2, time, heads, SIZE)
  q, k, v = (jax.random.normal(key, shape(n)) for key, n in zip(keys, (HEADS, KV, KV), strict=False))
  topic = jnp.cumsum(jax.random.bernoulli(keys[3], 0.06, (time,)))
  return q, k + 1.5 * jax.random.normal(keys[3], (time, SIZE))[topic][:, None], v


def view(q, k, lengths=LENGTHS, window=None):
  """What a method sees of a whole prompt; the pools serve decoding alone."""
  return paged.View(0, window, None, None, jnp.zeros((2, 1), int), jnp.int32(0), jnp.asarray(lengths), None)


@functools.partial(jax.jit, static_argnames=("method", "window"))
def attend(method, q, k, v, lengths, window=None):
  memory = method.empty(CONFIG, batch=2, capacity=q.shape[1], page=1, dtype=q.dtype)
  return method.attend(q, k, v, view(q, k, lengths, window), memory)[0]


def attention(q, k, window=None):
  """The head-averaged weights (batch, time, time), from the definition."""
  at = np.arange(q.shape[1])
  see = (at <= at[:, None]) & (at >= at[:, None] - (window or len(at)))
  score = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, HEADS // KV, axis=2)).astype(np.float64) / SIZE**0.5
  weight = np.where(see, np.exp(score), 0)
  return (weight / weight.sum(axis=-1, keepdims=True)).mean(axis=1)


@pytest.mark.parametrize("window", [None, 9])
def test_rho_is_its_double_loop(window):
  """Rows r > i + w within the row's length, the next `window` alone where there is one."""
  time, lengths, w = 48, np.array([48, 37]), 4
  q, k, _ = arrays(time)
  rho = ratio(q, k, lengths, window=window, block=20)
  weight = attention(q, k, window)
  for b, length in enumerate(lengths):
    for i in range(time):
      expected = 0.0
      if 2 * w - 1 <= i < length - 2 * w:
        rows = range(i + w + 1, min(length, i + w + 1 + (window or length)))
        past, following = np.zeros(2)
        for r in rows:
          past += weight[b, r, i - w + 1 : i + 1].sum()
          following += weight[b, r, i + 1 : i + w + 1].sum()
        expected = (max(past, following) + 1e-6) / (min(past, following) + 1e-6)
      np.testing.assert_allclose(rho[b, i], expected, rtol=1e-4)


def naive_boundaries(score, length, most, theta, apart, instruction):
  """Sorted greedy suppression, from the definition; positions are the ends of chunks."""
  start = max(length - instruction, 0)
  accepted = [start - 1]
  for i in np.argsort(-score, kind="stable"):
    if len(accepted) < most and score[i] > theta and i < start and all(abs(i - a) > apart for a in accepted):
      accepted.append(int(i))
  return sorted({0, length, *(i + 1 for i in accepted)})


@pytest.mark.parametrize("slope", [False, True])
def test_boundaries_are_those_of_sorted_greedy_suppression(slope):
  """Of equal scores too, and where every position beats the next."""
  rng, counts = np.random.default_rng(0), set()
  for limit, theta in itertools.product((1, 3, 6, 9), (-3.0, 0.0, 1.5)):
    for length in rng.integers(10, 129, 4).tolist():
      score = np.arange(128, 0, -1) - 60.0 if slope else rng.integers(-8, 8, 128) / 4
      score = score.astype(np.float32)
      bounds = np.asarray(boundaries_of(score, length, most=9, limit=limit, theta=theta, instruction=INSTRUCTION))
      assert bounds.shape == (11,) and (np.diff(bounds) >= 0).all() and (bounds[0], bounds[-1]) == (0, length)
      expected = naive_boundaries(score, length, limit, theta, 8, INSTRUCTION)
      assert sorted(set(bounds.tolist())) == expected
      inner = np.array(expected[1:-1])
      assert len(inner) <= limit and (np.diff(inner) > 8).all() and max(length - INSTRUCTION, 0) in expected
      counts.add((limit, len(inner)))
  assert {(1, 1), (3, 3), (6, 6)} <= counts


def test_without_a_boundary_there_are_the_context_and_the_instruction():
  score = jnp.full(128, -jnp.inf)
  bounds = boundaries_of(score, 100, most=9, instruction=INSTRUCTION)
  assert bounds.tolist() == [0, 80] + [100] * 9
  assert set(boundaries_of(score, 12, most=9, instruction=INSTRUCTION).tolist()) == {0, 12}  # all is instruction
  assert set(boundaries_of(score, 100, most=9, instruction=0).tolist()) == {0, 100}


BOUNDS = np.array([0, 3, 4, 20, 20, 33, 41, 41], np.int32)


@pytest.mark.parametrize("pooling", module.POOLING)
def test_chunks_are_pooled_as_slices_are(pooling):
  """Padding past the last bound counts for nothing, a common offset costs no precision, empty chunks are zeros."""
  x = np.random.default_rng(0).normal(300, 1, (48, SIZE)).astype(np.float32)
  x[41:] = 1e6
  found = chunk_means(jnp.asarray(x), jnp.asarray(BOUNDS), pooling=pooling)
  for n, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
    how = dict(mean=lambda s: s.mean(0), sqrt=lambda s: len(s) ** 0.5 * s.mean(0), max=lambda s: s.max(0))
    expected = how[pooling](x[a:b].astype(np.float64)) if b > a else np.zeros(SIZE)
    np.testing.assert_allclose(found[n], expected, rtol=1e-6)


def test_scores_are_products_of_pooled_means_over_heads():
  q, k, _ = arrays(48)
  edges = np.array([0, 16, 32, 40])
  rows = lambda x, bounds, f: np.stack([f(np.asarray(x[0, a:b]).mean(1)) for a, b in itertools.pairwise(bounds)])
  bounds = np.array([0, 3, 20, 41])
  root = lambda s: len(s) ** 0.5 * s.mean(0)
  found = scores_of(q[0], k[0], jnp.asarray(edges), jnp.asarray(bounds))
  np.testing.assert_allclose(found, rows(q, edges, root) @ rows(k, bounds, root).T, rtol=1e-4, atol=1e-4)
  even = jnp.arange(0, 49, 8)
  order = lambda pooling: np.argsort(-scores_of(q[0], k[0], jnp.asarray(edges), even, pooling=pooling))
  np.testing.assert_array_equal(order("sqrt"), order("mean"))  # chunks of one length
  swapped = scores_of(q[0, :, ::-1], k[0, :, ::-1], jnp.asarray(edges), even)
  np.testing.assert_allclose(swapped, scores_of(q[0], k[0], jnp.asarray(edges), even), rtol=1e-5, atol=1e-5)


def naive_keys(score, bounds, first, end, budget, local, sink):
  """The gather and top_k of every token's score."""
  position = np.arange(bounds[-1])
  of_token = np.asarray(score, np.float64)[np.searchsorted(bounds, position, side="right") - 1]
  of_token[(position < first) | (position >= end)] = -np.inf
  of_token[max(first, end - local) : end] = np.inf
  order = np.argsort(-of_token, kind="stable")[:budget]
  kept = sorted(order[of_token[order] > -np.inf].tolist())
  kept[:sink] = range(first, first + len(kept[:sink]))
  return kept


@pytest.mark.parametrize(("budget", "local", "sink"), [(24, 8, 4), (24, 24, 0), (16, 8, 8), (64, 8, 8)])
def test_the_choice_by_chunks_is_that_of_the_best_tokens(budget, local, sink):
  """Scores with ties, empty chunks, chunks that the block or the window cuts, blocks with less than the budget."""
  rng = np.random.default_rng(0)
  for window in [False, True] * 5:
    bounds = np.sort(np.r_[0, rng.integers(0, 61, 9), 60]).astype(np.int32)
    score = rng.integers(-3, 3, (8, 10)).astype(np.float32)
    end = np.r_[0, 5, np.sort(rng.integers(9, 61, 5)), 60].astype(np.int32)
    first = np.maximum(end - 40, 0) if window else np.zeros_like(end)
    found, counts = map(np.asarray, select_keys(score, bounds, first, end, budget=budget, local=local, sink=sink))
    for m in range(8):
      chosen = found[m, counts[m]]
      assert chosen.tolist() == naive_keys(score[m], bounds, first[m], end[m], budget, local, sink)
      assert counts[m].sum() == min(budget, end[m] - first[m]) and (np.diff(chosen) > 0).all()
      assert set(range(max(first[m], end[m] - local), end[m])) <= set(chosen.tolist())
      assert set(range(first[m], min(end[m], first[m] + sink))) <= set(chosen.tolist())


METHODS = {
  "dhsa": lambda budget: dhsa(attention_ratio, budget=budget, **PIECES),
  "every layer's own": lambda budget: dhsa(randomly(jax.random.key(3)), budget=budget, share=False, **PIECES),
  "window": lambda budget: sliding_window(budget=budget, block=BLOCK, instruction=INSTRUCTION),
  "sink": lambda budget: sliding_window(budget=budget, sink=16, block=BLOCK, instruction=INSTRUCTION),
  "blocks": lambda budget: block_sparse(budget=budget, block=BLOCK, instruction=INSTRUCTION),
  "oracle": lambda budget: block_sparse(budget=budget, oracle=True, size=1, block=BLOCK, instruction=INSTRUCTION),
}


@pytest.mark.parametrize("window", [None, 40])
def test_a_budget_of_all_is_dense_attention(window):
  q, k, v = arrays()
  found = attend(METHODS["dhsa"](TIME), q, k, v, LENGTHS, window)
  expected = plain_attention(q, k, v, window=window)
  for b, length in enumerate(LENGTHS):
    np.testing.assert_allclose(found[b, :length], expected[b, :length], rtol=1e-5, atol=1e-5)
  assert jnp.isfinite(found).all()


def allowed(name, q, k, row, budget):
  """The keys of every block of queries, from the definitions, and the block's first query and end."""
  start = LENGTHS[row] - INSTRUCTION
  weight = attention(q, k)[row]
  rho = np.asarray(ratio(q, k, LENGTHS))[row]
  for begin in range(0, start, BLOCK):
    end = min(begin + BLOCK, start)
    if name in ("window", "sink"):
      sink = 16 if name == "sink" else 0
      first = max(sink, end - (budget - sink))
      yield begin, end, [j for j in range(end) if j < sink or j >= first]
      continue
    if name == "oracle":
      mass = weight[begin:end].sum(axis=0)
      mass[end - BLOCK if end > BLOCK else 0 : end], mass[end:] = np.inf, -np.inf
      yield begin, end, np.argsort(-mass, kind="stable")[: min(budget, end)].tolist()
      continue
    if name == "blocks":
      bounds, sink, power = np.r_[np.arange(0, LENGTHS[row], BLOCK), LENGTHS[row]], 0, 0.0
    else:
      limit = LENGTHS[row] // BLOCK
      bounds, sink, power = np.array(naive_boundaries(rho, LENGTHS[row], limit, 0.0, 8, INSTRUCTION)), 16, 0.5
    query = np.asarray(q[row, begin:end], np.float64).mean(axis=(0, 1))
    chunks = [np.asarray(k[row, a:b], np.float64).mean(axis=1) for a, b in itertools.pairwise(bounds)]
    score = [query @ chunk.mean(axis=0) * len(chunk) ** power for chunk in chunks]
    yield begin, end, naive_keys(score, bounds, 0, end, budget, BLOCK, sink)


@pytest.mark.parametrize("name", ["dhsa", "window", "sink", "blocks", "oracle"])
def test_every_method_attends_to_what_its_definition_says_and_the_instruction_to_all(name):
  """Rows of different lengths, whose last blocks are cut short."""
  q, k, v = arrays()
  found = attend(METHODS[name](96), q, k, v, LENGTHS)
  for row, length in enumerate(LENGTHS):
    see = np.tri(TIME, dtype=bool)
    for begin, end, keys in allowed(name, q, k, row, 96):
      see[begin:end] &= np.isin(np.arange(TIME), keys)
    assert see[np.arange(length), np.arange(length)].all()
    score = np.einsum("qhd,khd->hqk", q[row], np.repeat(k[row], 2, axis=1)) / SIZE**0.5
    weight = np.where(see, np.exp(score), 0)
    weight /= weight.sum(axis=-1, keepdims=True)
    expected = np.einsum("hqk,khd->qhd", weight, np.repeat(v[row], 2, axis=1))
    np.testing.assert_allclose(found[row, :length], expected[:length], rtol=1e-4, atol=1e-5)
    dense = plain_attention(q, k, v)[row, :length]
    assert np.abs(found[row, :length] - dense).max() > 1e-2


def test_heads_in_another_order_see_the_same():
  q, k, v = arrays()
  method = METHODS["dhsa"](96)
  flip = lambda a: a[:, :, ::-1]
  found = attend(method, flip(q), flip(k), flip(v), LENGTHS)
  np.testing.assert_allclose(flip(found), attend(method, q, k, v, LENGTHS), rtol=1e-4, atol=1e-5)


def test_heads_in_any_order_choose_the_same_keys():
  """Query heads and key heads each in an order of their own: only their means are scored."""
  q, k, _ = arrays()
  edges, bounds = jnp.arange(0, TIME + 1, BLOCK), jnp.asarray(np.r_[0, 9, 40, 41, 77, 130, 201, TIME])

  def chosen(q, k):
    scores = scores_of(q[0], k[0], edges, bounds)
    return select_keys(scores, bounds, jnp.zeros_like(edges[1:]), edges[1:], budget=96, local=BLOCK, sink=16)

  expected = chosen(q, k)
  for order in [2, 0, 3, 1], [1, 3, 0, 2]:
    for a, b in zip(chosen(q[:, :, jnp.array(order)], k[:, :, ::-1]), expected, strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("window", "sink")])
def test_a_key_that_is_no_number_is_in_every_later_answer(name):
  """Where a budget is spent by scores, which mean nothing then; and in the instruction, which sees every key."""
  q, k, v = arrays()
  found = attend(METHODS[name](96), q, k.at[0, 70, 0, 0].set(jnp.nan), v, LENGTHS)
  assert np.isnan(found[0, 70:, :2]).all() and np.isfinite(found[1, : LENGTHS[1]]).all()


def test_key_heads_that_choose_for_themselves_are_as_if_each_was_alone():
  q, k, v = arrays()
  score = lambda *_: attention_ratio(q, k, LENGTHS)
  apart, together = (dhsa(score, budget=96, per_head=per_head, **PIECES) for per_head in (True, False))
  found = attend(apart, q, k, v, LENGTHS)
  for head in range(KV):
    mine, pair = slice(2 * head, 2 * head + 2), [a[:, :, head : head + 1] for a in (k, v)]
    alone = attend(together, q[:, :, mine], *pair, LENGTHS)
    np.testing.assert_allclose(found[:, :, mine], alone, rtol=1e-4, atol=1e-5)
  assert jnp.abs(found - attend(together, q, k, v, LENGTHS)).max() > 1e-2


def test_attention_mass_is_the_attention_of_blocks():
  q, k, _ = arrays(48)
  found = attention_mass(q, k, jnp.array([48, 37]), block=16, size=5)
  weight = attention(q, k)
  weight[1, 37:] = 0
  expected = np.pad(weight.reshape(2, 3, 16, 48).sum(axis=2), ((0, 0), (0, 0), (0, 2))).reshape(2, 3, 10, 5).sum(-1)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@functools.cache
def network():
  """Of a model whose attention is sharp enough to have boundaries."""
  model = random_model(CONFIG)
  model.blocks.q_norm.gain = 5 * model.blocks.q_norm.gain[...]
  return jax.jit(inference.take_apart)(model)


def predictor(**options):
  return BoundaryPredictor(CONFIG, jax.random.key(1), **options)


def test_the_predictor_is_its_formula(monkeypatch):
  """Of the window around one position after another; outside the row there are zeros."""
  monkeypatch.setattr(dhsa_boundaries, "_POSITIONS", 8)
  net, k = predictor(half=3, hidden=8), arrays(20)[1]
  rng, lengths = np.random.default_rng(0), np.array([20, 13])
  net = jax.tree.map(lambda a: np.float32(a + 0.1 * rng.normal(size=a.shape)), net)  # also the biases
  found = jax.jit(BoundaryPredictor.__call__)(net, k, lengths)
  layer_norm = lambda a: (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)
  for b, i in ((0, 0), (0, 9), (0, 19), (1, 11)):
    x = np.where(np.arange(20)[:, None] < lengths[b], np.asarray(k[b]).reshape(20, -1), 0)
    x = np.pad(x, ((2, 3), (0, 0)))[i : i + 6]
    q, key, v = np.split(x @ net.encoder.qkv[...] + net.encoder.qkv_bias[...], 3, axis=-1)
    heads = []
    for h in range(4):
      mine = slice(8 * h, 8 * h + 8)
      weight = np.exp(q[:, mine] @ key[:, mine].T / 8**0.5)
      heads.append(weight / weight.sum(axis=-1, keepdims=True) @ v[:, mine])
    e = layer_norm(np.concatenate(heads, axis=1) @ net.encoder.out[...] + net.encoder.out_bias[...])
    e = e * net.encoder.gain[...] + net.encoder.shift[...]
    left, right = e[:3].mean(0), e[3:].mean(0)
    cosine = left @ right / np.sqrt((left @ left) * (right @ right))
    f = np.concatenate([left, right, np.abs(left - right), left * right, [cosine]])
    hidden = np.maximum(f @ net.w1[...] + net.b1[...], 0)
    np.testing.assert_allclose(found[b, i], (hidden @ net.w2[...] + net.b2[...])[0], rtol=1e-4, atol=1e-4)


def perturbed(net, seed=0):
  """Every parameter random, biases and gates too."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: np.float32(a + 0.1 * rng.normal(size=a.shape)), net)


@pytest.mark.parametrize("encoder", dhsa_boundaries.ENCODERS)
def test_encoders_look_at_the_window_alone(encoder, monkeypatch):
  """A key changes the logits of exactly the positions whose window holds it, however the row is cut into pieces."""
  net, k = perturbed(predictor(half=3, hidden=8, encoder=encoder, gated=True)), arrays(20)[1]
  whole = jax.jit(BoundaryPredictor.__call__)(net, k)
  other = jax.jit(BoundaryPredictor.__call__)(net, k.at[:, 9].multiply(-1))
  changed = np.flatnonzero((jnp.abs(other - whole) > 1e-6).any(axis=0))
  assert changed.tolist() == list(range(6, 12))  # i - w < 9 <= i + w
  monkeypatch.setattr(dhsa_boundaries, "_POSITIONS", 8)
  np.testing.assert_allclose(BoundaryPredictor.__call__(net, k), whole, rtol=1e-4, atol=1e-5)


def test_a_stack_is_its_blocks_and_drops_out_where_a_key_is_given():
  net = perturbed(dhsa_encoders.WindowStack(8, jax.random.key(0), heads=2))
  x = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
  layer_norm = lambda a, i: (
    (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5) * net.gain[i] + net.shift[i]
  )
  expected = x
  for i in range(4):
    q, k, v = np.split(layer_norm(expected, i) @ net.qkv[i] + net.qkv_bias[i], 3, axis=-1)
    heads = [slice(0, 4), slice(4, 8)]
    mixed = [jax.nn.softmax(q[:, h] @ k[:, h].T / 2) @ v[:, h] for h in heads]
    expected = expected + np.concatenate(mixed, axis=-1) @ net.out[i] + net.out_bias[i]
  np.testing.assert_allclose(net(x), layer_norm(expected, 4), rtol=1e-4, atol=1e-5)
  drop = lambda seed: net(x, jax.random.key(seed))
  assert jnp.abs(drop(0) - drop(1)).max() > 1e-2 and (drop(0) == drop(0)).all()


def test_a_convolution_is_its_taps():
  net = perturbed(dhsa_encoders.WindowConvolution(5, jax.random.key(0), heads=1))
  x = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
  for i in range(2):
    x = np.maximum(x, 0) if i else x
    taps, padded = net.taps[i].reshape(3, 5, 5), np.pad(x, ((1, 1), (0, 0)))
    x = sum(padded[j : j + 6] @ taps[j] for j in range(3)) + net.bias[i]
  expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * net.gain[...] + net.shift[...]
  found = net(np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_gate_weighs_the_rows_it_pools():
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 4, 32)), jnp.float32)
  net = predictor(gated=True)
  np.testing.assert_allclose(net._pooled(rows), rows.mean(axis=-2), rtol=1e-5, atol=1e-6)  # before training
  net.gate = 50 * rows[0, 0, 2]
  np.testing.assert_allclose(net._pooled(rows), rows[..., 2, :], rtol=1e-4, atol=1e-4)


def test_the_focal_loss_is_its_formula():
  z, y = np.array([-3.0, 0.5, 2.0, -1.0]), np.array([True, True, False, False])
  p = 1 / (1 + np.exp(-z))
  right = np.where(y, p, 1 - p)
  entropy = -(1.3 * y * np.log(p) + (1 - y) * np.log(1 - p))
  np.testing.assert_allclose(focal_loss(jnp.asarray(z), jnp.asarray(y)), (1 - right) ** 2 * entropy, rtol=1e-5)


def test_the_predictor_learns_a_document_and_the_model_stays():
  """F1 over 0.95 at the threshold of training, on the labels of both layers."""
  net, tokens = network(), random_tokens(1, 96)
  probe = predictor(hidden=64)
  grads = jax.jit(jax.grad(lambda net: boundary_loss(probe, net, tokens), allow_int=True))(net)
  assert all(not np.asarray(a).any() for a in jax.tree.leaves(grads) if a.dtype == jnp.float32)
  optimizer = optax.adam(1e-2)

  @jax.jit
  def train(probe):
    def step(carry, _):
      probe, state = carry
      loss, grads = jax.value_and_grad(boundary_loss)(probe, net, tokens)
      updates, state = optimizer.update(grads, state, probe)
      return (optax.apply_updates(probe, updates), state), loss

    (probe, _), losses = jax.lax.scan(step, (probe, optimizer.init(probe)), None, length=100)
    return probe, losses

  probe, losses = train(probe)
  assert losses[-1] < losses[0] / 20

  @jax.jit
  def agreements(probe):
    found = []

    def attend(layer, block, x, q, k, v, window):
      score = probe.score(q, k)
      found.append((agreement(score[0], attention_ratio(q, k)[0], top=10), jnp.isfinite(score)))
      return plain_attention(q, k, v, window=window)

    x, side, _ = net.model.embed(tokens)
    inference.run_layers(net, x, side, attend)
    return found

  for found, finite in agreements(probe):
    assert found["f1"] > 0.95 and found["overlap"] > 0.5
    np.testing.assert_array_equal(finite, scored(jnp.array([96]), 96))


def test_agreement_counts_labelled_positions_alone():
  rho = jnp.array([0.0, 3.0, 1.0, 2.0, 5.0, 1.5])
  score = jnp.array([9.0, 1.0, 2.0, -1.0, 3.0, -2.0])
  found = agreement(score, rho, top=2)
  expected = dict(precision=2 / 3, recall=2 / 3, f1=2 / 3, overlap=1 / 2)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6)


PROMPT = np.array([90, 37])
SMALL = dict(block=16, local=16, sink=4, beta=2, instruction=8, theta=-1.0)


def test_at_full_budget_generation_is_the_dense_one():
  """Also in layers with windows, and for a row that is shorter than the instruction."""
  config = dataclasses.replace(CONFIG, layer_windows=(24, None))
  net, prompts = jax.jit(inference.take_apart)(random_model(config)), random_tokens(2, 90)
  method = dhsa(predictor(hidden=8).score, budget=90, **SMALL)
  lengths = np.array([90, 5])
  found = generate(net, prompts, lengths, tokens=3, decoder=paged.decoder(method, chunk=96, page=16))
  np.testing.assert_array_equal(found, generate(net, prompts, lengths, tokens=3))


def test_less_than_all_changes_the_answer_and_the_first_layers_boundaries_are_kept():
  net, prompts = network(), random_tokens(2, 90)
  method = dhsa(attention_ratio, budget=24, **SMALL | dict(theta=1.1))
  read = lambda method: jax.jit(functools.partial(paged.prefill, capacity=96, chunk=96, page=16, method=method))
  logits, state = read(method)(net, prompts, PROMPT)
  assert 1e-4 < jnp.abs(logits - read(paged.DENSE)(net, prompts, PROMPT)[0]).max() < 10
  bounds = np.asarray(state.memory)
  assert set(bounds[:, 0]) == {0} and bounds.max(axis=1).tolist() == PROMPT.tolist()
  assert all(length - 8 in row and len(set(row.tolist())) > 3 for row, length in zip(bounds, PROMPT, strict=True))


def test_later_layers_use_the_boundaries_of_the_first_where_they_are_shared():
  (q, k, v), other = arrays(), arrays(seed=1)
  of_first = lambda *_: attention_ratio(q, k, LENGTHS)

  @jax.jit
  def layers(q, k, v, other):
    shared, own, fixed = (
      dhsa(score, budget=96, share=share, **PIECES)
      for score, share in ((attention_ratio, True), (attention_ratio, False), (of_first, False))
    )
    memory = shared.empty(CONFIG, batch=2, capacity=TIME + 40, page=1, dtype=q.dtype)  # room for later tokens
    _, memory = shared.attend(q, k, v, view(q, k), memory)
    second = view(*other[:2])._replace(layer=1)
    return [method.attend(*other, second, memory)[0] for method in (shared, fixed, own)]

  shared, fixed, own = layers(q, k, v, other)
  np.testing.assert_allclose(shared, fixed, rtol=1e-5, atol=1e-5)
  assert jnp.abs(shared - own).max() > 1e-2


def test_the_second_of_two_layers_sees_what_the_first_chose():
  """Layers 0, 2, 3 have no window, 1 and 4 one of 200: pairs are (0, 2) and (1, 4), layer 3 chooses anew."""
  config = dataclasses.replace(CONFIG, depth=5, layer_windows=(None, 200, None, None, 200))
  first, (q, k, v) = arrays(), arrays(seed=1)
  make = lambda **how: dhsa(attention_ratio, budget=96, share=False, per_head=True, **how, **PIECES)

  @jax.jit
  def layers(first, q, k, v):
    shared, own = make(share_masks=True), make()
    memory, found = shared.empty(config, batch=2, capacity=TIME + 40, page=1, dtype=q.dtype), []
    for layer, window in enumerate(config.windows):
      given = first if layer < 2 else (q, k, v)
      at = view(*given[:2], window=window)._replace(layer=layer)
      out, memory = shared.attend(*given, at, memory)
      found.append((out, own.attend(*given, at, ())[0]))
      if layer == 2:
        rows = (module._fold(a, KV) for a in given)
        index, counts = (a[0, :, : TIME // BLOCK, :96] for a in (memory.index, memory.counts))
        expected = module.attend_gathered(*rows, index, counts, block=BLOCK)
        expected = jnp.moveaxis(expected.reshape(2, -1, *expected.shape[1:]), 1, 2).reshape(q.shape)
    return found, expected

  found, expected = layers(first, q, k, v)
  same = [bool((jnp.abs(shared - own) < 1e-5).all()) for shared, own in found]
  assert same == [True, True, False, True, False]
  for row, length in enumerate(LENGTHS):
    before = slice(length - INSTRUCTION)
    np.testing.assert_allclose(found[2][0][row, before], expected[row, before], rtol=1e-4, atol=1e-5)


def test_even_and_random_boundaries():
  _, k, _ = arrays(64)
  ends = lambda score, theta: boundaries_of(score(None, k)[0], 64, most=9, theta=theta, apart=8, instruction=0).tolist()
  assert ends(evenly(16), 1.1)[:5] == [0, 16, 32, 48, 64]
  assert len(set(ends(randomly(jax.random.key(0)), 0.0))) > 3
  assert ends(randomly(jax.random.key(0)), 0.0) != ends(randomly(jax.random.key(1)), 0.0)


def test_what_does_not_fit_is_refused():
  net, prompts = network(), random_tokens(2, 90)
  method = METHODS["dhsa"](96)
  with pytest.raises(InputError, match="one chunk: give decoder a chunk of at least 96"):
    generate(net, prompts, tokens=1, decoder=paged.decoder(method, chunk=32, page=16))
  state = paged.empty_state(net, batch=2, capacity=96, method=method)
  with pytest.raises(InputError, match="call prefill"):
    paged.step(net, prompts, state, method=method)
  for options, message in (
    (dict(budget=100), "local=128 and sink=128 exceed budget=100"),
    (dict(block=256), "would not see themselves"),
    (dict(pooling="median"), "pooling is 'median'"),
    (dict(beta=0), "beta is 0"),
    (dict(groups=0), "groups is 0"),
    (dict(instruction=-1), "instruction -1"),
  ):
    with pytest.raises(InputError, match=message):
      dhsa(evenly(16), **options)
  with pytest.raises(InputError, match="size=5 must divide block=128"):
    block_sparse(size=5)
  with pytest.raises(InputError, match="would not see themselves"):
    sliding_window(budget=100, block=100, sink=1)
  with pytest.raises(InputError, match="most is 0"):
    select_boundaries(jnp.zeros(8), 8, most=0)
  with pytest.raises(InputError, match="negative"):
    select_boundaries(jnp.zeros(8), 8, most=2, apart=-1)
  with pytest.raises(InputError, match="heads=5"):
    predictor(heads=5)
  with pytest.raises(InputError, match="encoder is 'lstm'; it must be one of attention, stack, convolution"):
    predictor(encoder="lstm")
  with pytest.raises(InputError, match="at least 16"):
    boundary_loss(predictor(), net, random_tokens(1, 12))
