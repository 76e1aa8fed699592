import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.models import inference
from jaxlab.models.config import TransformerConfig, nanochat
from jaxlab.serving import cache_craft, partial_prefill
from jaxlab.serving.cache_blend import blend_share
from jaxlab.serving.cache_craft import as_cached, craft, everything, same_prefix, serve
from jaxlab.serving.cache_craft_scores import (
  context_impact,
  disorder,
  focused,
  prefix_overlap,
  preload_depth,
  recompute_share,
  smallest_alpha,
  top_tokens,
)
from jaxlab.serving.cache_craft_store import ChunkStore
from tests.common import SHAPE, random_model

KINDS = {
  "llama": TransformerConfig(**SHAPE | dict(depth=3, width=64), context=128),
  "nanochat": dataclasses.replace(
    nanochat(depth=3, aspect_ratio=16, head_dim=16, vocab_size=64, context=128),
    smear=False,
    layer_windows=(20, None, None),
  ),
}
KINDS["apart"] = TransformerConfig(**SHAPE | dict(depth=3), context=128, layer_windows=(0, 0, 0))
SYSTEM, QUESTION = [3, 5], [7, 1, 4]
CLOSE = dict(rtol=1e-5, atol=1e-5)


@functools.cache
def network(kind: str = "llama"):
  return jax.jit(inference.take_apart)(random_model(KINDS[kind]))


@functools.cache
def chunks(count: int = 3, size: int = 8):
  return [row.tolist() for row in np.random.default_rng(1).integers(0, 64, (count, size))]


@functools.cache
def whole(kind: str, tokens: tuple[int, ...]):
  """(logits of all tokens, keys before rotation, values) as an ordinary prefill gives them."""
  net = network(kind)
  logits, state = inference.step(net, jnp.array([tokens]), inference.empty_state(net, batch=1, capacity=64))
  turn = partial_prefill.rope_table(net.model.config, jnp.arange(64), jnp.float32)
  back = jnp.stack([partial_prefill.apply_rope(k, turn[0], -turn[1]) for k, _ in state.pairs])
  return logits[0], back[:, 0], jnp.stack([v for _, v in state.pairs])[:, 0]


prefill = jax.jit(partial_prefill.partial_prefill, static_argnames="count")


def rows_of(tokens, positions, kind="llama", capacity=64, cached=None, groups=None, read=(0,)):
  net = network(kind)
  c = net.model.config
  if cached is None:
    cached = partial_prefill.empty(c, batch=1, capacity=capacity, layers=3, dtype=jnp.float32)
  groups = np.zeros(capacity, np.int32) if groups is None else groups
  tokens, positions = np.array([tokens]), np.array([positions])
  return prefill(net, tokens, positions, cached, groups[None], count=2, read=np.array([read]))


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_in_any_order_and_padding_are_an_ordinary_prefill(kind):
  tokens = np.random.default_rng(0).integers(0, 64, 30)
  order = np.random.default_rng(2).permutation(36)
  place = np.where(order < 30, order, -1)
  logits, cached, seen = rows_of(tokens[np.maximum(place, 0)], place, kind, read=range(36))
  expected, keys, values = whole(kind, tuple(tokens.tolist()))
  np.testing.assert_allclose(logits[0][place >= 0], expected[place[place >= 0]], **CLOSE)
  np.testing.assert_allclose(cached.keys[:, 0, :30], keys[:, :30], **CLOSE)
  np.testing.assert_allclose(cached.values[:, 0, :30], values[:, :30], **CLOSE)
  # Attention is conserved row by row, and what rows give is what positions get.
  np.testing.assert_allclose(np.asarray(seen.mass).sum(axis=-1)[:, 0, place >= 0], 1, rtol=1e-5)
  np.testing.assert_allclose(np.asarray(seen.received).sum(), 3 * 30, rtol=1e-5)


@pytest.mark.parametrize(("rows", "capacity"), [(30, 64), (64, 64), (48, 96)])
def test_padding_of_any_size_is_an_ordinary_prefill(rows, capacity):
  tokens = np.random.default_rng(0).integers(0, 64, 30)
  place = np.pad(np.random.default_rng(3).permutation(30), (0, rows - 30), constant_values=-1)
  logits, cached, _ = rows_of(np.where(place < 0, 9, tokens[place]), place, capacity=capacity, read=range(30))
  expected, keys, values = whole("llama", tuple(tokens.tolist()))
  np.testing.assert_allclose(logits[0], expected[place[:30]], **CLOSE)
  np.testing.assert_allclose(cached.keys[:, 0, :30], keys[:, :30], **CLOSE)
  np.testing.assert_allclose(cached.values[:, 0, :30], values[:, :30], **CLOSE)


@given(st.integers(0, 10_000))
def test_no_row_sees_past_its_own_position(seed):
  """A later token that changes changes no earlier row, though rows stand in another order and others are cached."""
  tokens = np.random.default_rng(0).integers(0, 64, 30)
  _, cached, _ = rows_of(tokens, np.arange(30))
  rows = np.random.default_rng(seed).permutation(30)[:6]
  rows[4], at = -1, np.sort(rows[:4])[2]  # two rows before it at least
  before = rows_of(tokens[rows], rows, cached=cached, read=range(6))[0][0]
  changed = tokens.copy()
  changed[at] = (tokens[at] + 1) % 64
  after = rows_of(changed[rows], rows, cached=cached, read=range(6))[0][0]
  same = (rows < at) & (rows >= 0)
  np.testing.assert_array_equal(before[same], after[same])
  assert all(np.abs(before - after)[rows >= at].max(axis=1) > 1e-3)
  np.testing.assert_allclose(before[same], whole("llama", tuple(tokens.tolist()))[0][rows[same]], **CLOSE)


def test_a_chunk_alone_is_the_same_wherever_it_lies():
  tokens = np.random.default_rng(0).integers(0, 64, 12)
  made = []
  for at in (0, 37):
    groups = np.full(64, -1, np.int32)
    groups[at : at + 12] = 0
    logits, cached, _ = rows_of(tokens, np.arange(at, at + 12), groups=groups, read=range(12))
    made.append((logits, cached.keys[:, :, at : at + 12], cached.values[:, :, at : at + 12]))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *made)


def test_attention_to_groups_is_that_of_the_whole_matrix():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(1, 10, heads, 4)), jnp.float32) for heads in (4, 2, 2))
  groups = np.repeat([0, 1, 2], [3, 4, 3])
  place = np.arange(10)
  out, seen = partial_prefill.attend_at(q, k, v, place[None], groups[None], count=3)
  score = np.einsum("thd,shd->hts", q[0], np.repeat(k[0], 2, axis=1)) / 2
  weight = np.exp(score) * (place <= place[:, None])
  weight /= weight.sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(out[0], np.einsum("hts,shd->thd", weight, np.repeat(v[0], 2, axis=1)), **CLOSE)
  mean = weight.mean(axis=0)
  np.testing.assert_allclose(seen.mass[0, 0], np.add.reduceat(mean, [0, 3, 7], axis=1), **CLOSE)
  np.testing.assert_allclose(seen.received[0], mean.sum(axis=0), **CLOSE)


def served_twice(choose, order=(2, 0, 1), **how):
  """What comes of a prompt whose chunks were seen once, in another order."""
  store = ChunkStore(SYSTEM, **how)
  serve(network(), store, chunks(), QUESTION)
  return serve(network(), store, [chunks()[i] for i in order], QUESTION, choose=choose, read=3, keep=False), store


@pytest.mark.parametrize("choose", [craft(1e6, penalise_new=True), everything], ids=["craft", "everything"])
def test_with_all_computed_again_it_is_the_full_prefill(choose):
  found, _ = served_twice(choose)
  expected, keys, values = whole("llama", tuple(found.plan.tokens.tolist()))
  n = len(found.plan.tokens)
  np.testing.assert_allclose(found.logits, expected[-3:], **CLOSE)
  np.testing.assert_allclose(found.cached[0].keys[:, 0, :n], keys[:, :n], **CLOSE)
  np.testing.assert_allclose(found.cached[0].values[:, 0, :n], values[:, :n], **CLOSE)


@pytest.mark.parametrize("choose", [craft(), same_prefix, as_cached], ids=["craft", "prefix", "as cached"])
def test_the_same_prompt_again_is_read_from_the_cache(choose):
  found, store = served_twice(choose, (0, 1, 2))
  np.testing.assert_allclose(found.logits, whole("llama", tuple(found.plan.tokens.tolist()))[0][-3:], **CLOSE)
  first = serve(network(), ChunkStore(SYSTEM), chunks(), QUESTION)
  for ours, theirs in zip(found.cached[0], first.cached[0], strict=True):
    np.testing.assert_array_equal(ours[:, 0, :26], theirs[:, 0, :26])  # what made them, to the bit
  assert found.plan.computed.sum() == len(QUESTION) and all(found.plan.exact) and len(store) == 3


def test_chunks_that_attend_to_none_before_are_reused_exactly():
  """A model whose tokens see themselves alone: a = 0, CCI = 0.5, and nothing depends on what stands before."""
  store, net = ChunkStore(SYSTEM), network("apart")
  serve(net, store, chunks(), QUESTION)
  records = [store.of(store.name(chunk))[0].record for chunk in chunks()]
  assert all(record.score.max() == 0 and record.share([b"new"], alpha=2) in (0, 1) for record in records[1:])
  assert context_impact(records[2].attention, records[2].sizes, layers=3) == 0.5
  found = serve(net, store, chunks()[::-1], QUESTION, choose=as_cached, read=3)
  np.testing.assert_allclose(found.logits, whole("apart", tuple(found.plan.tokens.tolist()))[0][-3:], **CLOSE)


def test_what_is_stored_of_a_repaired_chunk_is_new_where_it_was_computed_and_old_elsewhere():
  store = ChunkStore(SYSTEM)
  serve(network(), store, chunks(), QUESTION)
  a, b, c = map(store.name, chunks())
  pick = lambda wanted: as_cached(wanted)._replace(again=np.array([1, 5]), share=0.5)
  serve(network(), store, [chunks()[i] for i in (1, 0, 2)], QUESTION, choose=pick)
  old, new = (v.record for v in store.of(c))
  assert (old.prefix, new.prefix, new.repairs, new.exact) == ((a, b), (b, a), 1, False)
  rest = [i for i in range(8) if i not in (1, 5)]
  np.testing.assert_array_equal(new.attention[rest], old.attention[rest][:, [0, 2, 1]])
  assert np.abs(new.attention[[1, 5]] - old.attention[[1, 5]][:, [0, 2, 1]]).max() > 1e-3
  never = serve(network(), store, [chunks()[i] for i in (1, 2)], QUESTION, choose=craft(repairs=1), keep=False)
  assert never.plan.choices[1].variant.record is old  # the repaired one fits better, but was repaired


def test_every_question_token_is_computed_and_nothing_else_of_what_is_reused():
  """One forced token, as the public code of CacheBlend has it, would leave the question's others to the cache."""
  found, store = served_twice(as_cached)
  assert found.plan.computed.tolist() == [False] * 26 + [True] * 3
  blended = blend_share(network(), store, chunks()[::-1], QUESTION, share=0.0, choose=as_cached, read=3)
  assert blended.plan.computed.tolist() == [False] * 26 + [True] * 3 and blended.token_layers == 2 * 29 + 3


def test_parts_computed_again_bring_the_answer_closer():
  """Not what the method promises of every token, but of these shares."""
  expected = whole("llama", tuple(served_twice(everything)[0].plan.tokens.tolist()))[0][-1]
  off = [
    float(jnp.abs(served_twice(craft(alpha, penalise_new=True))[0].logits[-1] - expected).max())
    for alpha in (0, 1.0, 10)
  ]
  assert off[0] > 2 * off[1] > 0 and off[2] < 1e-4


def test_generation_goes_on_from_what_was_served():
  store = ChunkStore(SYSTEM, stages=(1,))
  found = serve(network(), store, chunks(), QUESTION, room=4)
  logits, _ = inference.step(network(), jnp.array([[9]]), found.state(network()))
  np.testing.assert_allclose(logits[0, 0], whole("llama", (*found.plan.tokens.tolist(), 9))[0][-1], **CLOSE)


def test_cacheblend_of_everything_is_the_full_prefill_and_it_takes_what_changed_most():
  _, store = served_twice(everything)
  order = chunks()[::-1]
  blended = blend_share(network(), store, order, QUESTION, share=1.0, choose=as_cached, read=3)
  expected, _, values = whole("llama", tuple(blended.plan.tokens.tolist()))
  np.testing.assert_allclose(blended.logits, expected[-3:], **CLOSE)
  some = blend_share(network(), store, order, QUESTION, share=0.2, choose=as_cached)
  made = some.plan
  old = np.concatenate([store.system_parts[0][1][1], *(c.variant.parts[0][1][1] for c in made.choices)])
  changed = np.square(np.asarray(values[1, :26]) - old).sum(axis=(1, 2))
  assert set(np.flatnonzero(made.computed[:26])) == set(np.argsort(-changed, kind="stable")[: math.ceil(0.2 * 26)])


def test_stages_and_early_ends_count_what_they_compute():
  found, _ = served_twice(craft(1.0), stages=(1, 2))
  plain, _ = served_twice(craft(1.0))
  np.testing.assert_allclose(found.logits, plain.logits, **CLOSE)
  store = ChunkStore(SYSTEM, stages=(2,))
  serve(network(), store, chunks(), QUESTION)
  cache_craft.focused, before = lambda looks, final: np.array([True, False, True]), cache_craft.focused
  try:
    early = serve(network(), store, chunks()[::-1], QUESTION, early=True, keep=False)
  finally:
    cache_craft.focused = before
  again = [len(choice.again) for choice in early.plan.choices]
  assert early.dropped == (1,) and early.token_layers == 3 * (3 + sum(again)) - again[1] > 0 < again[1]
  assert early.of == 3 * 29 and float(jnp.abs(early.logits - plain.logits[-1:]).max()) < 2


def test_scores_by_hand():
  a, b, c, d = (bytes([i]) for i in range(4))
  alone = np.array([[2.0], [3.0]])
  assert context_impact(alone, [], layers=3) == 0.5 and recompute_share(alone, [], [], [a, b], layers=3) == 0
  # a = (3 / (2 * 20) + 1 / (2 * 16)) / 2, the chunk of 4 tokens counting as 16; b = 4 / 2^2 / 2
  behind = np.array([[2.0, 1.0, 1.0], [2.0, 2.0, 0.0]])
  ratio = (3 / 40 + 1 / 32) / 1
  assert math.isclose(context_impact(behind, [20, 4], layers=2), 1 / (1 + math.exp(-ratio)))
  assert disorder([a, b, c], [c, b, a]) == 1 and disorder([a, b, c], [a, c, d, b]) == 1 / 3 and disorder([a], [a]) == 0
  assert prefix_overlap([3, 1], [a, b], [b, c]) == 0.25 and prefix_overlap([], [], [a]) == 1
  tenths = [0.1, 0.2, 0.3, 0.7]
  assert prefix_overlap(tenths, [a, b, c, d], [d, c, b, a]) == 1 and prefix_overlap(tenths[::-1], [a, b, c, d], [a]) < 1
  assert prefix_overlap([3, 1], [a, b], []) == 0 and prefix_overlap([3, 1], [a, b], [b, c], penalise_new=True) == 0.125
  share = functools.partial(recompute_share, behind, [a, b], [20, 4], layers=2)
  impact = context_impact(behind, [20, 4], layers=2)
  assert math.isclose(share([c, d], alpha=0.7), 0.7 * impact) and share([c], alpha=9) == 1 and share([a, b]) == 0
  assert math.isclose(share([b, a]), impact) and share([a, b, c]) == 0 < share([a, b, c], penalise_new=True)
  assert top_tokens(np.array([1.0, 5, 5, 0]), 0.5).tolist() == [1, 2] and top_tokens(np.ones(10), 0.3).tolist() == [
    0,
    1,
    2,
  ]


def test_alpha_is_the_smallest_that_is_good_enough():
  quality = {0.5: 0.2, 1.0: 0.9, 2.0: 0.95}.get
  assert [smallest_alpha([2.0, 0.5, 1.0], quality, target) for target in (0.1, 0.9, 0.99)] == [0.5, 1.0, 2.0]


def test_the_focus_is_what_stands_before_the_largest_gap_once_it_stays():
  steady = np.array([[5.0, 1.0, 4.0, 0.5]] * 4)
  assert focused(steady).tolist() == [True, False, True, False]
  moving = np.array([[1.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 20.0, 0]])
  assert focused(moving, final=True).tolist() == [False, False, True, False]
  assert focused(moving).all() and focused(steady[:2]).all() and focused(np.ones((5, 1))).all()


@given(st.integers(1, 12), st.floats(0.1, 5), st.floats(0.1, 5))
def test_so_many_layers_are_loaded_ahead_that_none_waits_and_no_more(layers, load, compute):
  """Against a simulation, event by event."""

  def waits(ready):
    now = 0.0
    for layer in range(1, layers + 1):
      there = max(0, layer - ready) * load
      if there > now + 1e-6:
        return True
      now += compute
    return False

  depth = preload_depth(layers, load, compute)
  assert not waits(depth) and waits(depth - 1) and preload_depth(layers, 0, compute) == 0


def test_a_prompt_keeps_its_tokens_in_their_order_whatever_is_stored_of_them():
  """In a store of two chunks, a variant each, which forgets as it goes."""
  store, rng = ChunkStore(SYSTEM, chunks=2, variants=1), np.random.default_rng(0)
  known = chunks(5)
  for choose in (craft(), craft(0.0), as_cached, same_prefix, everything) * 2:
    order = rng.permutation(5)[:3]
    found = serve(network(), store, [known[i] for i in order], QUESTION, choose=choose)
    assert found.plan.tokens.tolist() == [*SYSTEM, *(token for i in order for token in known[i]), *QUESTION]
    assert len(store) <= 2


def test_what_cannot_be_is_refused_in_one_line():
  store, net = ChunkStore(SYSTEM), network()
  for call, words in (
    (lambda: serve(net, store, chunks(), []), "question is empty"),
    (lambda: serve(net, store, [[]], QUESTION), "chunk is empty"),
    (lambda: serve(net, store, [[99]], QUESTION), "ids 1..99"),
    (lambda: serve(net, store, chunks(), QUESTION, read=4), "read is 4"),
    (lambda: serve(net, store, chunks(), QUESTION, early=True), "needs a store with stages"),
    (lambda: craft(-1), "alpha is -1"),
    (lambda: blend_share(net, store, chunks(), QUESTION, share=2, choose=as_cached), "share is 2"),
    (lambda: serve(net, ChunkStore(SYSTEM, stages=(3,)), chunks(), QUESTION), "more than 3 layers"),
    (lambda: partial_prefill.require_movable(smeared()), "smears embeddings"),
  ):
    with pytest.raises(InputError, match=words):
      call()
  assert len(store) == 0


def smeared():
  model = random_model(nanochat(depth=2, aspect_ratio=16, head_dim=16, vocab_size=64, context=64))
  return jax.jit(inference.take_apart)(model)


def test_ones_own_passages_in_three_lines():
  store = ChunkStore([1], chunks=10, variants=2)
  passages = [[10, 11, 12, 13], [20, 21, 22], [30, 31]]
  answers = [
    serve(network(), store, [passages[i] for i in order], [50, 51]) for order in ([0, 1, 2], [2, 0], [0, 1, 2])
  ]
  assert answers[2].token_layers < answers[1].token_layers < answers[0].token_layers
