"""Caches that a method makes smaller, in the pages of the engine."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.cache.chelsea import chelsea
from jaxlab.cache.eviction import keydiff, snapkv, streaming_llm
from jaxlab.core.checks import InputError
from jaxlab.core.mesh import make_mesh
from jaxlab.models import generate, inference, paged
from jaxlab.models.compaction import Compaction, Compactor, compact_pages
from jaxlab.models.generate import pad
from jaxlab.serving import batch, policies
from jaxlab.serving.engine import Engine
from jaxlab.serving.requests import Request, Sampling
from tests.common import configs, random_model
from tests.serving.test_engine import SHARED, SMALL, serve

MERGED = chelsea(keep=0.5, chunk=4, sink=2, recent=3, rounds=2)
QUARTER = chelsea(keep=0.25, chunk=4, sink=2, recent=3)
EVICTED = keydiff(keep=0.4), streaming_llm(keep=0.4, slide=False)
FEW = SMALL | dict(pages=14, length=48)  # sequences are computed again
ARRIVALS = (0, 0, 0, 1, 5)


@functools.cache
def network():
  """Two layers: programs hold every layer by itself, and take as long to compile.

  With these parameters `generate` gives the same tokens when all are changed by 3e-7 of their size. With those of seed
  0 it does not, under MERGED: which of two pairs is merged hangs there on rounding, and so on the shapes of a batch.
  """
  return jax.jit(inference.take_apart)(random_model(dataclasses.replace(configs()["qwen3"], depth=2), seed=1))


@functools.cache
def requests():
  """Greedy and sampled ones; answers are so long that caches become smaller while they are made, too."""
  rng = np.random.default_rng(0)
  how = (Sampling(), Sampling(), Sampling(1.0, seed=4), Sampling(), Sampling())
  prompts = [rng.integers(0, 64, size).tolist() for size in (29, 7, 29, 29, 7)]
  prompts[3][:20] = prompts[0][:20]  # a beginning that is shared
  return [Request(f"{i}", prompts[i], 17, how[i]) for i in range(5)]


def ask(method, prompt, tokens, sampling=Sampling()):
  """What `generate` gives for a prompt by itself."""
  decoder = paged.decoder(decode=method, chunk=16, page=4)
  how = dict(temperature=sampling.temperature, key=jax.random.key(sampling.seed))
  return generate(network(), np.array([prompt]), tokens=tokens, decoder=decoder, **how)[0].tolist()


@functools.cache
def offline():
  """{id: tokens} of each request by itself, with MERGED."""
  return {r.id: ask(MERGED, r.prompt, r.tokens, r.sampling) for r in requests()}


@functools.cache
def plain():
  return serve(Engine(network(), **FEW), requests())


def _stirred():
  """Entries that stay as they are, but move into other pages, after the prompt and then after every third token."""

  def plan(prompt):
    yield Compaction(prompt, 0, prompt, prompt, 32)
    for end in itertools.count(prompt + 3, 3):
      yield Compaction(end, 5 if end > 8 else 0, 3, 3, 4)

  return paged.DENSE._replace(in_pages=Compactor(plan, lambda *entries: entries))


STIRRED, WHOLE = _stirred(), chelsea(keep=1.0, chunk=4, sink=2, recent=3)


@pytest.mark.parametrize("policy", policies.POLICIES)
def test_without_a_loss_the_tokens_are_those_of_the_plain_engine(policy):
  """Under every policy, of entries that are moved and of a merging that keeps all."""
  for method in (STIRRED, WHOLE):
    engine = Engine(network(), **FEW | dict(budget=36 if policy == "orca" else 16), policy=policy, method=method)
    assert serve(engine, requests(), ARRIVALS) == plain()
    assert (engine.counters["compacted"] > 20) == (method is STIRRED) and engine.pages.held == 0


def rough(view):
  """Every fifth step the sequence that came last has to be computed again."""
  again = view.running[-1:] if view.step % 5 == 4 else []
  for sequence in again:
    view.preempt(sequence)
  plan = policies.sarathi(view)
  plan.preempt += again
  return plan


@pytest.mark.parametrize("policy", [*policies.POLICIES, rough])
def test_merged_caches_give_the_tokens_that_generate_gives(policy):
  """Each request's by itself; what is preempted is read again up to where it was merged, merged, and then read on."""
  options = FEW | dict(budget=36 if policy == "orca" else 16)
  engine = Engine(network(), **options, policy=policy, method=MERGED)
  assert serve(engine, requests(), ARRIVALS) == offline() != plain()
  assert engine.pages.held == 0 and engine.counters["compacted"] >= 18
  assert policy is not rough or engine.counters["preempted"] > 5


def test_caches_that_evict_give_the_tokens_that_generate_gives():
  """The engine is the same: what it knows of a method is when how many entries go."""
  asked = [dataclasses.replace(r, sampling=Sampling()) for r in requests()]
  prompts, lengths = pad([r.prompt for r in asked])
  for method in EVICTED:
    engine = Engine(network(), **FEW, method=method)
    made = serve(engine, asked, ARRIVALS)
    decoder = paged.decoder(decode=method, chunk=16, page=4)
    assert [*made.values()] == generate(network(), prompts, lengths, tokens=17, decoder=decoder).tolist()
    assert engine.counters["compacted"] >= 5


def test_other_ways_of_merging_are_served_too():
  method, r = chelsea(keep=0.25, chunk=8, sink=0, recent=0, size_bias=False), requests()[0]
  assert serve(Engine(network(), **FEW, method=method), [r])[r.id] == ask(method, r.prompt, r.tokens)


def test_pages_that_become_free_are_those_of_who_waits():
  """Two prompts of 17 tokens fill five pages each of 13; merged to 2 + 4 + 3 entries they leave room for a third."""
  asked, most = [Request(f"{i}", [1 + i] * 17, 12) for i in range(3)], {}
  for method in (paged.DENSE, QUARTER):
    engine = Engine(network(), **FEW, method=method)
    for request in asked:
      engine.add(request)
    seen = []
    while engine.busy:
      engine.step()
      seen.append((len(engine.running), engine.pages.held))
      for s in engine.running:
        assert s.gone == (0 if s.computed <= 17 or method is not QUARTER else 8 + 3 * ((s.computed - 18) // 4))
    most[method] = max(seen)[0]
    assert engine.pages.held == 0
  assert most == {paged.DENSE: 2, QUARTER: 3}


def test_what_is_merged_is_not_what_others_share():
  """Pages of a prompt stay as they were read, for who reads along and for who comes later."""
  engine, prompt = Engine(network(), **FEW, method=MERGED), requests()[0].prompt[:21]
  engine.add(Request("first", prompt, 12))
  while not engine.step():
    pass
  shared = engine.running[0].pages[:4]
  read = lambda: [np.asarray(a[:, shared]) for layer in engine._pools for a in layer]
  before, made = read(), []
  engine.add(Request("beside", [*prompt[:19], 5, 6], 12))
  while not made:
    made = [e for e in engine.step() if e.id == "beside"]
    first, beside = engine.running
    assert first.gone > 0 and first.pages[0] not in shared and beside.pages[:4] == shared
    for a, b in zip(before, read(), strict=True):
      np.testing.assert_array_equal(a, b)
  assert engine.counters["reused"] == 16
  while engine.busy:
    engine.step()
  for _ in range(2):
    before = engine.counters["reused"]
    assert serve(engine, [Request("later", prompt, 12)])["later"] == ask(MERGED, prompt, 12)
  assert engine.counters["reused"] == before + 20


def test_where_no_page_is_free_the_sequence_that_came_last_gives_its_own_up():
  """Of two that share pages, and cannot write over them, the first goes on; the other is computed again, the same."""
  engine, prompt = Engine(network(), **FEW, method=MERGED), requests()[0].prompt[:21]
  engine.add(Request("before", prompt, 12))
  while not engine.step():
    pass
  engine.abort("before")
  made = {"first": [], "second": []}
  for name in made:
    engine.add(Request(name, prompt, 12))
  for event in engine.step():
    made[event.id].append(event.token)
  assert engine.pages.held == 7 and all(made.values())
  taken = engine.pages.take(engine.pages.free)
  for step in range(60):
    if step == 5:
      assert engine.counters["preempted"] == 1 and [s.request.id for s in engine.running] == ["first"]
      engine.pages.release(taken)
    for event in engine.step():
      made[event.id].append(event.token)
  assert made == dict.fromkeys(made, ask(MERGED, prompt, 12)) and engine.pages.held == 0


@settings(max_examples=5)
@given(st.integers(0, 10_000))
def test_whoever_leaves_takes_no_page_along(seed):
  """Some are aborted, some preempted, at any time: the others' tokens are their own."""
  rng, engine, asked = np.random.default_rng(seed), Engine(network(), **FEW, method=MERGED), requests()
  arrivals, made, gone = rng.integers(0, 12, len(asked)), {r.id: [] for r in asked}, set()
  for step in range(200):
    for r in (r for r, at in zip(asked, arrivals, strict=True) if at == step):
      engine.add(r)
    if rng.random() < 0.1 and (ids := [s.request.id for s in (*engine.running, *engine.waiting)]):
      id = ids[rng.integers(len(ids))]
      gone.add(id)
      assert engine.abort(id)
    for event in engine.step():
      made[event.id].append(event.token)
    held = [page for s in engine.running for page in s.pages]
    assert engine.pages.holders.sum() == len(held) and engine.pages.free + engine.pages.held == 13
  assert not engine.busy and engine.pages.held == 0
  for r in asked:
    assert made[r.id] == (offline()[r.id][: len(made[r.id])] if r.id in gone else offline()[r.id])


def test_nothing_is_compiled_or_copied_after_the_warm_up():
  """And what lies in the page of padding is never used."""
  engine = Engine(network(), **FEW, method=MERGED)
  engine.warm_up()
  spoilt = lambda a: a.at[:, 0].set(jnp.nan) if a.ndim == 4 else a
  engine._pools = jax.tree.map(spoilt, engine._pools)
  address = [a.unsafe_buffer_pointer() for a in engine._pools[0]]
  programs = engine.counters["programs"]
  assert serve(engine, requests()) == offline()
  assert engine.counters["programs"] == programs
  assert [a.unsafe_buffer_pointer() for a in engine._pools[0]] == address
  layer = jax.tree.map(batch.shaped, engine._pools[0])
  large = jax.tree.map(lambda a: jax.ShapeDtypeStruct((a.shape[0], 4000, *a.shape[2:]), a.dtype), layer)
  memory = batch.compiled_compaction(large, 14, 4, MERGED.in_pages.compact).memory_analysis()
  assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 10


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_entries_move_up_within_and_across_pages(seed):
  """`compact_pages` against a list of entries, for any pages, some of which are written over."""
  rng = np.random.default_rng(seed)
  entries, page, room = int(rng.integers(4, 30)), 4, 8
  first = int(rng.integers(entries))
  count = int(rng.integers(1, 1 + min(room, entries - first)))
  kept = int(rng.integers(count + 1))
  pools = [rng.normal(size=(2, 20, page, *tail)).astype(np.float32) for tail in ((3,), (3,), ())]
  order = rng.permutation(np.arange(1, 20))
  table, target = np.zeros((2, 8), np.int32)
  old, stay = -(-entries // page), first // page
  new = -(-(entries - count + kept) // page)
  table[:old], target[stay:new] = order[:old], rng.permutation(order)[: new - stay]
  found = _halve_first(tuple(pools), table, target, np.array([first, count, kept], np.int32))
  after = np.where(np.arange(8) < stay, table, target)[:new]
  for pool, out in zip(pools, map(np.asarray, found), strict=True):
    row = pool[:, table[:old]].reshape(2, -1, *pool.shape[3:])[:, :entries]
    expected = np.concatenate([row[:, :first], row[:, first : first + kept] / 2, row[:, first + count :]], axis=1)
    kept_before = [p for p in range(1, 20) if p not in target]
    np.testing.assert_array_equal(out[:, kept_before], pool[:, kept_before])
    if not set(after[:stay]) & set(target[stay:new]):
      np.testing.assert_array_equal(out[:, after].reshape(2, -1, *pool.shape[3:])[:, : expected.shape[1]], expected)


@jax.jit
def _halve_first(pools, table, target, numbers):
  return compact_pages(
    pools, table, target, numbers, room=8, how=lambda *entries: jax.tree.map(lambda a: a / 2, entries)
  )


def test_devices_that_share_heads_serve_the_same_tokens():
  few = FEW | dict(rows=2, budget=10, chunks=1, steps=2)
  meshes = None, make_mesh({"tensor": 2}, jax.devices()[:2])
  alone, together = (serve(Engine(random_model(SHARED), **few, mesh=m, method=MERGED), requests()[1:3]) for m in meshes)
  assert together == alone


def test_entries_that_pages_can_hold_are_counted_beforehand():
  """`Served.most` is what a sequence comes to hold: no step needs more."""
  engine = Engine(network(), **FEW, method=MERGED)
  for r in requests():
    engine.add(r)
  most = {s.request.id: s.most(len(s.request.prompt) + s.request.tokens - 1) for s in engine.waiting}
  held = dict.fromkeys(most, 0)
  while engine.busy:
    engine.step()
    for s in engine.running:
      held[s.request.id] = max(held[s.request.id], s.computed - s.gone)
  assert all(held[id] <= most[id] for id in most) and held["0"] == most["0"] == 29


def test_methods_and_models_that_cannot_be_served_are_named():
  for method in (snapkv(), chelsea(skip_layers=(0,)), chelsea(most=64), chelsea(during_prefill=True), streaming_llm()):
    with pytest.raises(InputError, match="keeps what pages of one table cannot hold"):
      Engine(network(), **SMALL, method=method)
  c = configs()["nanochat_plain"]
  windowed = dataclasses.replace(c, smear=False, layer_windows=(8,) * c.depth)
  with pytest.raises(InputError, match="layers of this model look back a window"):
    Engine(random_model(windowed), **SMALL, method=MERGED)

  def greedy(view):
    if view.waiting:
      view.admit()
    return policies.Plan(chunks=[(s, s.pending) for s in view.running])

  engine = Engine(network(), **FEW, policy=greedy, method=MERGED)
  engine.add(Request("a", [1] * 9, 9))
  engine.step()
  (served,) = engine.running
  view = policies.View(engine.running, engine.waiting, engine.pages, 4, 16, 2, 4, 1)
  view.preempt(served)
  with pytest.raises(InputError, match="reads more tokens of a sequence than it has"):
    engine.step()
