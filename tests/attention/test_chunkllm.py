import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.attention import chunkllm_training as training
from jaxlab.attention.chunkllm import chunkllm, retention
from jaxlab.attention.chunkllm_chunks import ChunkAdapters, best_chunks, chunk_ends, chunk_ids, chunk_table, pick_chunks
from jaxlab.core.checks import InputError
from jaxlab.models import generate, inference, paged
from jaxlab.models.layers import apply_rope, rope_table
from tests.common import configs, random_model, random_tokens

CONFIG = dataclasses.replace(configs()["qwen3"], depth=2)
LENGTHS, TIME, STEPS, CAPACITY, PAGE = np.array([27, 14]), 27, 16, 48, 4
# No token twice: to the first layer chunks that end with the same one would be equal but for rounding.
TOKENS = np.stack([np.random.default_rng(seed).permutation(64)[: TIME + STEPS] for seed in range(2)])
SMALL = dict(sink=2, local=5, min_chunk=2, max_chunk=6, keep=0.4)


@functools.cache
def network():
  return jax.jit(inference.take_apart)(random_model(CONFIG))


@functools.cache
def adapters(stands="last", reads="unrotated"):
  made = ChunkAdapters(CONFIG, jax.random.key(1), hidden=16, size=8, stands=stands, reads=reads)
  made.q2[...], made.k2[...] = 50 * made.q2[...], 50 * made.k2[...]
  made.b[...] = made.b[...] - 0.1
  return made


@functools.cache
def read(stands="last", reads="unrotated", **options):
  """(compiled step of (token, state), logits after the prompts, state); adapters are arguments of the programs."""
  method = lambda adapters: chunkllm(adapters, **SMALL | options)
  sizes = dict(capacity=CAPACITY, chunk=8, page=PAGE)
  prefill = lambda adapters, net: paged.prefill(net, TOKENS[:, :TIME], LENGTHS, **sizes, method=method(adapters))
  step = jax.jit(lambda adapters, net, *args: paged.step(net, *args, method=method(adapters)))
  return functools.partial(step, adapters(stands, reads), network()), *jax.jit(prefill)(
    adapters(stands, reads), network()
  )


@functools.cache
def decode(**options):
  """(logits (batch, steps, vocab) of the tokens after the prompts, states before the first, ..., after the last)."""
  step, _, state = read(**options)
  logits, states = [], [state]
  for made in range(STEPS):
    found, state = step(TOKENS[:, TIME + made, None], state)
    logits.append(found[:, 0])
    states.append(state)
  return np.stack(logits, 1), states


def whole_rows():
  """The tokens of every row without the padding between prompt and continuation: (batch, capacity)."""
  rows = [np.concatenate([TOKENS[b, :n], TOKENS[b, TIME:]]) for b, n in enumerate(LENGTHS)]
  return np.stack([np.pad(row, (0, CAPACITY - len(row))) for row in rows])


@jax.jit
def masked_forward(see):
  """(logits, inputs, q and k of every layer) of whole rows; see: (layers, batch, queries, keys)."""
  net, taps, after = network(), [], []
  x, side, _ = net.model.embed(whole_rows())

  def attend(layer, _, x, q, k, v, window):
    taps.append((q, k))
    after.append(x)
    score = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, 2, 2)) / q.shape[-1] ** 0.5
    weight = jax.nn.softmax(jnp.where(see[layer][:, None], score, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weight, jnp.repeat(v, 2, 2))

  x, backout = inference.run_layers(net, x, side, attend)
  return (
    net.model.logits(x, backout),
    jnp.stack(after),
    jnp.stack([q for q, _ in taps]),
    jnp.stack([k for _, k in taps]),
  )


def compressed(content, first, second):
  """An adapter, of one token or chunk."""
  hidden = content.reshape(-1) @ np.asarray(first)
  return hidden / (1 + np.exp(-hidden)) @ np.asarray(second)


def before_rope(heads):
  """(layers, rows, positions, heads, head_dim) at positions 0, 1, ... turned back."""
  cos, sin = rope_table(CONFIG, jnp.arange(heads.shape[2]), jnp.float32)
  return np.asarray(apply_rope(heads, cos, -sin))


def attended_sets(x, q, k, row, *, keep, sink, local, min_chunk, max_chunk, grain, **options):
  """What every token after the prompt attends to, [(layer 0's set, layer 1's), ...], written out from the definitions;
  the chunks, and the keys that stand for them in every layer."""
  stands, reads = options.get("stands", "last"), options.get("reads", "unrotated")
  a, contents = adapters(stands, reads), {"unrotated": [before_rope(heads) for heads in (q, k)], "rotated": [q, k]}
  contents = contents.get(reads) or [x[:, :, :, None]] * 2
  chunks, begin, chosen, made, gone = [], 0, [set(), set()], [], [set(), set()]

  def content(layer, c):
    mine = contents[1][layer, row]
    return np.concatenate([mine[[*c]].mean(0)] * (stands != "last") + [mine[c[-1]]] * (stands != "mean"))

  raw = options.get("choose") == "raw"
  key = lambda layer, c: (
    content(layer, c).reshape(-1) if raw else compressed(content(layer, c), a.k1[layer], a.k2[layer])
  )
  scores = np.asarray(a.ends(jnp.asarray(x[1, row])[None]))[0]
  for t in range(LENGTHS[row] + STEPS):
    if t >= LENGTHS[row]:
      sets = []
      for of_layer in chosen:
        tokens = {j for j in range(t + 1) if j < sink or j > t - local or j >= begin} | of_layer
        sets.append({j for j in range(t + 1) if j // grain in {i // grain for i in tokens}})
      made.append(sets)
    likely = scores[t] > 0 and options.get("threshold") != 1
    ended = (likely and t - begin + 1 >= min_chunk) or t - begin + 1 >= max_chunk
    if ended:
      chunks.append(range(begin, t + 1))
      begin = t + 1
    if not (ended or options.get("every_token") or t == LENGTHS[row] - 1):
      continue
    # Local tokens are those of the moment of choice.
    fixed = {j for j in range(t + 1) if j >= t + 2 - local}
    count, best = min(math.ceil(keep * len(chunks) - 1e-9), options.get("most", 99)), []
    for layer in range(2):
      if options.get("choose") == "oracle":
        weight = np.exp(np.einsum("hd,jhd->hj", q[layer, row, t], np.repeat(k[layer, row, : t + 1], 2, 1)) / 4)
        weight = (weight / weight.sum(1, keepdims=True)).mean(0)
        worth = [weight[[j for j in c if j >= sink]].sum() for c in chunks]
      elif raw:
        mine = contents[0][layer, row, t].reshape(2, 2, -1).sum(1).reshape(-1)
        worth = [mine @ key(layer, c) for c in chunks]
      else:
        mine = compressed(contents[0][layer, row, t], a.q1[layer], a.q2[layer])
        worth = [mine @ key(layer, c) for c in chunks]
      order = sorted(range(len(chunks)), key=lambda c: (c != len(chunks) - 1, -worth[c], -c))
      best.append({*[c for c in order if c not in gone[layer]][:count]})
      if options.get("evict") and t >= LENGTHS[row] - 1:  # the prompt is read whole
        gone[layer] |= {*range(len(chunks))} - best[-1]
    if options.get("cross_layer") == "vote":
      votes = [sum(c in b for b in best) for c in range(len(chunks))]
      best = [set(sorted(range(len(chunks)), key=lambda c: (-votes[c], -c))[:count])] * 2
    if options.get("choose") == "ends":
      chosen = [{c[-1] for c in chunks} | fixed] * 2
    else:
      chosen = [{j for c in b for j in chunks[c]} | fixed for b in best]
  return made, chunks, [[key(layer, c) for c in chunks] for layer in range(2)]


def sets_of(state, row, grain):
  """The positions that the last token attended to or, of the state after a prompt, will."""
  end = int(state.length[row])
  units = [np.asarray(state.memory.table[layer, row, : state.memory.used[layer, row]]) for layer in range(2)]
  return [{j for u in layer.tolist() for j in range(u * grain, u * grain + grain) if j < end} for layer in units]


VARIANTS = {
  "per layer": dict(grain=1),
  "few, in pages": dict(grain=4, most=2, splits=3),
  "vote": dict(grain=1, cross_layer="vote", stands="mean"),
  "evicting, by hidden states": dict(grain=1, evict=True, reads="hidden", stands="both"),
  "after rotation": dict(grain=1, reads="rotated", stands="both"),
  "oracle at every token": dict(grain=2, choose="oracle", every_token=True),
  "raw products, after rotation": dict(grain=1, choose="raw", reads="rotated"),
  "raw products of means": dict(grain=2, choose="raw", stands="mean"),
  "ends alone": dict(grain=1, choose="ends", local=1),
  "fixed": dict(grain=1, threshold=1.0, keep=0.9, most=2, sink=0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_token_attends_to_what_the_definition_says_and_to_nothing_else(name):
  """Sets, logits and the share that is read, of rows of different lengths whose chunks end at different places."""
  options = SMALL | VARIANTS[name]
  logits, states = decode(**VARIANTS[name])
  see = np.broadcast_to(np.tri(CAPACITY, dtype=bool), (2, 2, CAPACITY, CAPACITY)).copy()
  found = [[sets_of(state, row, options["grain"]) for state in states[:-1]] for row in range(2)]
  for row, step, layer in np.ndindex(2, STEPS, 2):
    t = int(LENGTHS[row]) + step
    found[row][step][layer] |= {t}
    see[layer, row, t] = [j in found[row][step][layer] for j in range(CAPACITY)]
  expected, x, q, k = map(np.asarray, masked_forward(see))
  shares, read_whole = [], 0
  for row in range(2):
    sets, chunks, keys = attended_sets(x, q, k, row, **options)
    assert found[row] == sets
    np.testing.assert_allclose(logits[row], expected[row, LENGTHS[row] : LENGTHS[row] + STEPS], rtol=1e-4, atol=1e-4)
    memory = states[-1].memory
    assert memory.count[row] == len(chunks) <= CAPACITY // options["min_chunk"] == memory.keys.shape[2]
    np.testing.assert_allclose(memory.keys[:, row, : len(chunks)], keys, rtol=1e-3, atol=1e-3)
    lengths = {len(c) for c in chunks}
    assert min(lengths) >= 2 and max(lengths) == 6 and (lengths == {6}) == (name == "fixed")
    shares.append([np.mean([len(s) for s in of]) / (LENGTHS[row] + i + 1) for i, of in enumerate(sets)])
    read_whole += sum(len(s) == LENGTHS[row] + i + 1 for i, of in enumerate(sets) for s in of)
  np.testing.assert_allclose(retention(states[-1]), np.mean(shares, axis=1), rtol=1e-5)
  assert np.mean(shares) < 0.95 and read_whole < STEPS


@pytest.mark.parametrize("options", [dict(keep=1.0), dict(threshold=1.0, max_chunk=10**6)])
def test_with_every_chunk_or_only_the_open_one_all_logits_are_the_dense_ones(options):
  logits, states = decode(**options)
  dense = masked_forward(np.broadcast_to(np.tri(CAPACITY, dtype=bool), (2, 2, CAPACITY, CAPACITY)))[0]
  for row, length in enumerate(LENGTHS):
    np.testing.assert_allclose(logits[row], dense[row, length : length + STEPS], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(retention(states[-1]), 1.0, rtol=1e-6)
  assert (np.asarray(states[-1].memory.count) == 0).all() == ("threshold" in options)


def test_while_no_chunk_ends_a_token_reads_the_first_tokens_and_those_since_the_newest_choice():
  """Chunks of 13 tokens: row 0 has two and keeps the newer, from 13 on; row 1 has one, and reads everything."""
  logits, states = decode(threshold=1.0, min_chunk=13, max_chunk=13, grain=1)
  see = np.broadcast_to(np.tri(CAPACITY, dtype=bool), (2, 2, CAPACITY, CAPACITY)).copy()
  see[:, 0, LENGTHS[0] :, SMALL["sink"] : 13] = False
  expected = masked_forward(see)[0]
  before_an_end = 12  # row 0's third chunk ends at 38, row 1's second at 25
  for row, length in enumerate(LENGTHS):
    mine = slice(length, length + before_an_end)
    np.testing.assert_allclose(logits[row, :before_an_end], expected[row, mine], rtol=1e-4, atol=1e-4)
  share = np.mean([(LENGTHS + i + 1 - [11, 0]) / (LENGTHS + i + 1) for i in range(before_an_end)], axis=0)
  np.testing.assert_allclose(retention(states[before_an_end]), share, rtol=1e-5)
  assert np.abs(logits[0, :before_an_end] - decode(keep=1.0)[0][0, :before_an_end]).max() > 1e-2


def prompt_sets(x, q, k, row, *, keep, sink, local, min_chunk, max_chunk):
  """bool[queries, keys] of the second layer, written out from the definition."""
  a, (asked, told) = adapters(), (before_rope(heads)[1, row] for heads in (q, k))
  scores, begin, chunks, chosen, see = np.asarray(a.ends(jnp.asarray(x[1, row])[None]))[0], 0, [], set(), []
  for t in range(LENGTHS[row]):
    see.append([j <= t and (j < sink or j > t - local or j >= begin or j in chosen) for j in range(CAPACITY)])
    if (scores[t] > 0 and t - begin + 1 >= min_chunk) or t - begin + 1 >= max_chunk:
      chunks.append(range(begin, t + 1))
      begin, mine = t + 1, compressed(asked[t], a.q1[1], a.q2[1])
      worth = [mine @ compressed(told[c[-1]], a.k1[1], a.k2[1]) for c in chunks]
      order = sorted(range(len(chunks)), key=lambda c: (c != len(chunks) - 1, -worth[c], -c))
      chosen = {j for c in order[: math.ceil(keep * len(chunks) - 1e-9)] for j in chunks[c]}
  return np.array(see)


@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_a_sparse_prompt_reads_what_the_end_of_the_chunk_before_chose(keep):
  """Of rows of different lengths; the first layer, which says where chunks end, reads everything."""
  options = SMALL | dict(keep=keep)
  method = chunkllm(adapters(), **options, sparse_prefill=True)
  sizes = dict(capacity=CAPACITY, chunk=32, page=PAGE, method=method)
  found, _ = jax.jit(functools.partial(paged.prefill, **sizes))(network(), TOKENS[:, :TIME], LENGTHS)
  see = np.broadcast_to(np.tri(CAPACITY, dtype=bool), (2, 2, CAPACITY, CAPACITY)).copy()
  _, *taps = map(np.asarray, masked_forward(see))  # what the second layer reads does not depend on its sets
  for row, length in enumerate(LENGTHS):
    see[1, row, :length] = prompt_sets(*taps, row, **options)
  assert (see.sum() == 2 * 2 * CAPACITY * (CAPACITY + 1) / 2) == (keep == 1)
  expected = masked_forward(see)[0]
  for row, length in enumerate(LENGTHS):
    np.testing.assert_allclose(found[row, 0], expected[row, length - 1], rtol=1e-4, atol=1e-4)
  with pytest.raises(InputError, match="reads a prompt as one chunk"):
    paged.prefill(network(), TOKENS[:, :TIME], LENGTHS, **sizes | dict(chunk=8))


def test_generation_in_one_scan_is_that_of_single_steps():
  step, logits, state = read(grain=1)
  decoder = paged.decoder(chunkllm(adapters(), **SMALL, grain=1), chunk=8, page=PAGE)
  found = generate(network(), TOKENS[:, :TIME], LENGTHS, tokens=8, decoder=decoder)
  for made in range(8):
    token = jnp.argmax(logits[:, -1], axis=-1)
    np.testing.assert_array_equal(found[:, made], token)
    logits, state = step(token[:, None], state)


def test_random_chunks_differ_from_the_adapters_but_not_in_number():
  _, (*_, mine) = decode(grain=1)
  _, (*_, drawn) = decode(grain=1, choose="random")
  assert sets_of(drawn, 0, 1) != sets_of(mine, 0, 1) and sets_of(drawn, 0, 1)[0] != sets_of(drawn, 0, 1)[1]


def test_layers_with_a_window_keep_to_it():
  config = dataclasses.replace(CONFIG, layer_windows=(5, None))
  net = jax.jit(inference.take_apart)(random_model(config))
  made = ChunkAdapters(config, jax.random.key(1), hidden=16, size=8)
  decoder = paged.decoder(chunkllm(made, **SMALL | dict(keep=1.0)), chunk=8, page=PAGE)
  logits, state = jax.jit(functools.partial(decoder.prefill, capacity=CAPACITY))(net, TOKENS[:, :TIME], LENGTHS)
  step = jax.jit(decoder.step)
  for token in generate(net, TOKENS[:, :TIME], LENGTHS, tokens=4).T:
    np.testing.assert_array_equal(jnp.argmax(logits[:, -1], axis=-1), token)
    logits, state = step(net, token[:, None], state)
  read_of_first = np.mean([6 / (LENGTHS + made) for made in range(1, 5)], axis=0)
  np.testing.assert_allclose(retention(state), (read_of_first + 1) / 2, rtol=1e-5)


def test_what_selection_costs_is_paid_in_one_branch_for_all_rows():
  """No table is made and no adapter but the first layer's runs where no row's chunk ends."""
  step, _, state = read(grain=1)
  jaxpr = jax.make_jaxpr(step)(TOKENS[:, TIME, None], state).jaxpr
  outer = [equation.primitive.name for equation in _equations(jaxpr, into_cond=False)]
  every = [equation.primitive.name for equation in _equations(jaxpr, into_cond=True)]
  assert outer.count("cond") == 1 and not {"cumsum", "top_k"} & set(outer) and {"cumsum", "top_k"} <= set(every)


def _equations(jaxpr, into_cond: bool):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda a: hasattr(a, "eqns")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns") and (into_cond or equation.primitive.name != "cond"):
        yield from _equations(inner, into_cond)


@given(st.integers(0, 9999), st.sampled_from(((1, 1), (2, 5), (3, 3), (4, 99))), st.integers(1, 24))
def test_chunks_end_where_a_loop_over_the_tokens_ends_them(seed, sizes, length):
  wanted = np.random.default_rng(seed).random(24) < 0.3
  expected, begin = [], 0
  for t in range(length):
    if (wanted[t] and t - begin + 1 >= sizes[0]) or t - begin + 1 >= sizes[1]:
      expected.append(t)
      begin = t + 1
  ends, ids, last, count = _chunks(wanted, length, *sizes)
  assert np.flatnonzero(ends).tolist() == expected and len(expected) <= 24 // sizes[0]
  assert int(count) == len(expected) and last.tolist() == expected + [0] * (len(last) - len(expected))
  assert ids.tolist() == [sum(e < t for e in expected) for t in range(24)]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _chunks(wanted, length, least, most):
  ends = chunk_ends(wanted, length, min_chunk=least, max_chunk=most)
  return ends, chunk_ids(ends), *chunk_table(ends, 24 // least)


def test_of_equal_chunks_the_later_is_chosen_and_the_newest_always():
  scores = jnp.array([[[3.0, 1.0, 1.0, 1.0, 0.0, 9.0]]])
  pick = jax.jit(pick_chunks, static_argnames=("keep", "most", "vote"))
  taken = lambda count, **how: np.flatnonzero(pick(scores, jnp.array([count]), **how)[0, 0]).tolist()
  assert taken(5, keep=0.6) == [0, 3, 4] and taken(5, keep=0.2) == [4] and taken(0, keep=0.5) == []
  assert taken(5, keep=1.0) == [0, 1, 2, 3, 4] and taken(5, keep=1.0, most=2) == [0, 4]
  assert best_chunks(jnp.array([1.0, -jnp.inf, 1.0]), jnp.int32(3), 3).tolist() == [True, False, True]
  assert best_chunks(jnp.array([1.0, jnp.nan, 2.0]), jnp.int32(2), 3).tolist() == [False, True, True]
  two = jnp.array([[[3.0, 2.0, 1.0, 0.0]], [[0.0, 2.0, 1.0, 0.0]]])  # 0, 1 and 3; 1, 2 and 3
  voted = pick(two, jnp.array([4]), keep=0.75, vote=True)
  assert voted.tolist() == [[[False, True, True, True]]] * 2  # a tie of 0 and 2


def teacher_by_einsum(q, k, ids, choice, chunks, sink, window):
  time = q.shape[1]
  score = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, 2, axis=2)) / 4
  at = np.arange(time)
  see = (at <= at[:, None]) & (at >= at[:, None] - (window or time))
  score = np.where(see, score, -np.inf)
  weight = np.exp(score - score.max(-1, keepdims=True))
  weight = np.where(at >= sink, weight / weight.sum(-1, keepdims=True), 0).mean(1)
  mass = np.einsum("bqk,bkc->bqc", weight, ids[..., None] == np.arange(chunks))
  return np.where(np.arange(chunks) < choice[..., None], mass, 0)


def choice_by_hand(ends):
  """Of every token the number of chunks to choose from: all that ended by then but the newest, which is read anyway."""
  return np.array([[max(0, sum(row[: t + 1]) - 1) for t in range(len(row))] for row in np.asarray(ends)])


@pytest.mark.parametrize("window", [None, 7])
def test_the_teacher_is_the_attention_to_the_chunks_that_a_token_chooses_from(window):
  keys = jax.random.split(jax.random.key(0), 3)
  q, k = jax.random.normal(keys[0], (2, 24, 4, 16)), jax.random.normal(keys[1], (2, 24, 2, 16))
  ends = jax.random.bernoulli(keys[2], 0.5, (2, 24))
  ids, choice = np.asarray(chunk_ids(ends)), choice_by_hand(ends)
  np.testing.assert_array_equal(training.candidates(ends), choice)
  k = k.at[1, :8].multiply(-1e3)  # rows of almost no attention to their chunks
  teacher = jax.jit(functools.partial(training.teacher_attention, chunks=24, sink=2, block=8, window=window))
  found = np.asarray(teacher(q, k, ids, choice))
  mass = teacher_by_einsum(*map(np.asarray, (q, k)), ids, choice, 24, 2, window)
  total = mass.sum(-1, keepdims=True)
  expected = np.where(total >= 1e-4, mass / np.maximum(total, 1e-4), 0)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  real = expected.sum(-1) > 0
  np.testing.assert_allclose(found.sum(-1)[real], 1.0, rtol=1e-5)
  assert 10 < real.sum() < 46 and (mass.sum(-1)[~real] < 1e-4).all()


def test_the_divergence_is_0_for_the_teacher_itself_and_recall_counts_hits():
  choice = jnp.array([[0, 1, 2, 3, 4]])
  target = jax.random.uniform(jax.random.key(0), (1, 5, 4)) * (jnp.arange(4) < choice[..., None])
  target = target / jnp.maximum(target.sum(-1, keepdims=True), 1e-9)
  loss = jax.jit(jax.value_and_grad(lambda scores: training.distillation_loss(scores, target, choice)))
  value, slope = loss(jnp.log(target + 1e-30))
  np.testing.assert_allclose(value, 0, atol=1e-6)
  np.testing.assert_allclose(slope, 0, atol=1e-6)
  value, slope = loss(jnp.zeros_like(target))
  share = np.asarray(target[0, 1:])
  uniform = [np.sum(row[: i + 1] * np.log(row[: i + 1] * (i + 1))) for i, row in enumerate(share)]
  np.testing.assert_allclose(value, np.mean(uniform), rtol=1e-5)
  assert np.isfinite(slope).all() and np.abs(slope).max() > 1e-3
  of = jax.jit(lambda scores: training.recall(scores, target, choice, 2))
  assert of(target) == 1.0
  assert of(-target) == 0.25  # of three chunks two are chosen, one of them right; of four none


def test_loss_and_recall_leave_out_what_is_always_read_and_slope_as_differences_do():
  """Of a whole model, from its queries and keys: no first token, no open chunk, nor the newest that has ended."""
  net, a, tokens, top = network(), adapters(), whole_rows()[:, :32], 2
  labels = tokens % 5 == 0
  see = np.broadcast_to(np.tri(CAPACITY, dtype=bool), (2, 2, CAPACITY, CAPACITY))
  q, k = (np.asarray(a)[:, :, :32] for a in masked_forward(see)[2:])
  ends = jax.vmap(lambda row: chunk_ends(row, 32, min_chunk=2, max_chunk=6))(labels)
  ids, choice, (asked, told) = np.asarray(chunk_ids(ends)), choice_by_hand(ends), (before_rope(a) for a in (q, k))
  divergence, shares = [], []
  for layer in range(2):
    target = teacher_by_einsum(q[layer], k[layer], ids, choice, 16, 2, None)
    each = []
    for row, t in np.ndindex(2, 32):
      if (number := choice[row, t]) == 0:
        continue
      last = np.flatnonzero(ends[row])[:number]
      mine = compressed(asked[layer, row, t], a.q1[layer], a.q2[layer])
      score = np.array([mine @ compressed(told[layer, row, e], a.k1[layer], a.k2[layer]) for e in last]) / 8**0.5
      true = target[row, t, :number] / target[row, t].sum()
      each.append(true @ (np.log(true) - score + np.log(np.exp(score).sum())))
      if number > top:
        shares.append(len({*np.argsort(-score)[:top]} & {*np.argsort(-true)[:top]}) / top)
    divergence.append(np.mean(each))
  how = dict(sink=2, min_chunk=2, max_chunk=6, top=top, block=32)
  loss = jax.jit(lambda made: training.adapter_loss(made, net, tokens, labels, **how))
  _, parts = loss(a)
  np.testing.assert_allclose(parts.distillation, np.mean(divergence), rtol=1e-3)
  np.testing.assert_allclose(parts.recall, np.mean(shares), rtol=1e-3)
  slope = jax.jit(jax.grad(lambda made: loss(made)[0]))(a)
  moved = lambda step: jax.tree.map(lambda x, d: x + step * d, a, slope)
  steep = sum(float(jnp.square(d).sum()) for d in jax.tree.leaves(slope))
  step = 0.02 / steep
  np.testing.assert_allclose((loss(moved(step))[0] - loss(moved(-step))[0]) / (2 * step), steep, rtol=0.02)


@functools.cache
def separated():
  """Tokens that all differ, so that attention can be learnt by heart, and their labels."""
  tokens = np.random.default_rng(0).permutation(64).reshape(2, 32)
  return tokens, tokens < 12


@pytest.mark.parametrize("shape", [{}, dict(stands="mean"), dict(stands="both", reads="hidden")])
def test_training_moves_the_adapters_alone_and_they_learn_which_chunks_matter(shape):
  net, (tokens, labels) = network(), separated()
  loss = functools.partial(training.adapter_loss, top=2, sink=2, max_chunk=16, min_chunk=2, block=32)
  made = ChunkAdapters(CONFIG, jax.random.key(2), hidden=96, size=32, **shape)
  optimizer = optax.adam(1e-2)

  @jax.jit
  def train(made):
    def one(carry, _):
      made, state = carry
      (_, parts), grads = jax.value_and_grad(loss, has_aux=True)(made, net, tokens, labels)
      updates, state = optimizer.update(grads, state, made)
      return (optax.apply_updates(made, updates), state), parts

    (made, _), parts = jax.lax.scan(one, (made, optimizer.init(made)), length=100)
    return made, parts

  backbone = jax.jit(jax.grad(lambda net: loss(made, net, tokens, labels)[0], allow_int=True))(net)
  assert all(not np.asarray(a).any() for a in jax.tree.leaves(backbone) if a.dtype == jnp.float32)
  made, parts = train(made)
  assert 0 < parts.distillation[-1] < parts.distillation[0] / 10
  assert parts.recall[-1] > 0.9 > parts.recall[0]


def test_the_chunk_adapter_finds_the_separators_of_a_text():
  """4 separators among 28 other tokens, in orders it has not seen; embeddings outweigh a layer, as trained ones do."""
  model = random_model(CONFIG)
  model.embedding[...] = 16 * model.embedding[...]
  net = jax.jit(inference.take_apart)(model)
  first = inference.Network(net.model, net.blocks[:1])

  @jax.jit
  def output(tokens):
    x, side, _ = net.model.embed(tokens)
    attend = lambda layer, block, x, q, k, v, window: inference.dot_product_attention(q, k, v, window=window, start=0)
    return inference.run_layers(first, x, side, attend)[0]

  @jax.jit
  def train(made, x, labels):
    optimizer = optax.adam(0.1)

    def one(carry, _):
      made, state = carry
      grads = jax.grad(lambda made: training.boundary_loss(made.ends(x), labels))(made)
      updates, state = optimizer.update(grads, state, made)
      return (optax.apply_updates(made, updates), state), None

    return jax.lax.scan(one, (made, optimizer.init(made)), length=200)[0][0]

  tokens, unseen = random_tokens(16, 64, vocab=32, seed=2), random_tokens(16, 64, vocab=32, seed=3)
  made = train(ChunkAdapters(CONFIG, jax.random.key(2), hidden=4, size=4), output(tokens), tokens < 4)
  found = np.asarray(made.ends(output(unseen))) > 0
  f1 = 2 * (found & (unseen < 4)).sum() / (found.sum() + (unseen < 4).sum())
  assert f1 > 0.95


def test_labels_weigh_more_where_they_are_rare():
  logits, labels = jnp.array([[0.3, -0.2, 1.0, 0.5]]), jnp.array([[True, False, False, False]])
  each = np.logaddexp(0, np.array([-0.3, -0.2, 1.0, 0.5]))
  np.testing.assert_allclose(training.boundary_loss(logits, labels), each.mean(), rtol=1e-6)
  np.testing.assert_allclose(training.boundary_loss(logits, labels, balance=True), (2 * each[0] + each.sum()) / 4)


TEXT = """Dr. A. Smith paid 3.14 dollars. "Really?" he said. "Yes!" It rained, e.g. on Mr. Lee etc. and us.
See Fig. 2... no

A heading
   \nWait... what? (It was so.) The end"""


def test_sentences_end_neither_at_abbreviations_nor_in_numbers():
  ends = training.sentence_ends(TEXT)
  starts = [0, *(e + 1 for e in ends)]
  found = [TEXT[a : e + 1].strip() for a, e in zip(starts, ends, strict=False)]
  assert found == [
    "Dr. A. Smith paid 3.14 dollars.",
    '"Really?" he said.',
    '"Yes!"',
    "It rained, e.g. on Mr. Lee etc. and us.",
    "See Fig. 2... no",
    "A heading",
    "Wait... what?",
    "(It was so.)",
    "The end",
  ]
  assert training.sentence_ends("") == [] and training.sentence_ends("  \n\n ") == []


def test_a_label_goes_to_the_token_with_the_last_character():
  text = "One two. Three"
  offsets = [(0, 0), (0, 3), (3, 7), (7, 9), (9, 12), (12, 14)]  # the full stop shares its token with a space
  assert training.sentence_labels(text, offsets).tolist() == [False, False, False, True, False, True]
  assert training.separator_labels("a, b", [(0, 1), (1, 2), (2, 4)]).tolist() == [False, True, False]
  assert training.token_labels([1, 9], [(0, 2), (2, 3)]).tolist() == [True, False]
  assert training.sentence_labels("", []).tolist() == []


def test_what_it_cannot_do_is_named():
  for options, message in (
    (dict(keep=0), "keep is 0"),
    (dict(threshold=2), "threshold is 2"),
    (dict(sink=-1), "sink is -1"),
    (dict(local=0), "local is 0"),
    (dict(min_chunk=9, max_chunk=8), "max_chunk is 8"),
    (dict(most=0), "most is 0"),
    (dict(choose="best"), "choose is 'best'"),
    (dict(cross_layer="all"), "cross_layer is 'all'"),
  ):
    with pytest.raises(InputError, match=message):
      chunkllm(adapters(), **options)
  with pytest.raises(InputError, match="evict is for"):
    chunkllm(adapters(), evict=True, cross_layer="vote")
  with pytest.raises(InputError, match="sparse_prefill is for"):
    chunkllm(adapters(), sparse_prefill=True, choose="random")
  with pytest.raises(InputError, match="oracle needs queries"):
    chunkllm(adapters(reads="hidden"), choose="oracle")
  with pytest.raises(InputError, match="have a product of their own"):
    chunkllm(adapters(stands="both"), choose="raw")
  for option in ("stands", "reads"):
    with pytest.raises(InputError, match=f"{option} is 'other'"):
      ChunkAdapters(CONFIG, jax.random.key(0), **{option: "other"})
  start = lambda config, **options: chunkllm(adapters(), **options).empty(
    config, batch=1, capacity=8, page=4, dtype=jnp.float32
  )
  for config, options, message in (
    (CONFIG, dict(grain=3), "grain=3"),
    (dataclasses.replace(CONFIG, depth=1), {}, "one layer"),
    (dataclasses.replace(CONFIG, depth=3), {}, "another model"),
  ):
    with pytest.raises(InputError, match=message):
      start(config, **options)
  step, _, state = read(grain=1)
  with pytest.raises(InputError, match="2 tokens at once"):
    step(TOKENS[:, :2], state)
  tokens, labels = separated()
  for change, message in (
    ((tokens, labels[:, :3]), "labels have shape"),
    ((tokens, labels), "block=128"),
  ):
    with pytest.raises(InputError, match=message):
      training.adapter_loss(adapters(), network(), *change)
  for offsets, message in (([(0, 1, 2)], "shape"), ([(3, 4), (0, 1)], "out of order"), ([(3, 1)], "out of order")):
    with pytest.raises(InputError, match=message):
      training.token_labels([0], offsets)
