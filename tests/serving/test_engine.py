import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.core.mesh import make_mesh
from jaxlab.models import generate, inference
from jaxlab.serving import batch, policies
from jaxlab.serving.batch import sample_rows
from jaxlab.serving.engine import Engine
from jaxlab.serving.requests import Request, Sampling
from tests.common import configs, random_model

SHARED = dataclasses.replace(configs()["qwen3"], depth=2, q_heads=8, kv_heads=2, mlp_width=96)
SMALL = dict(pages=40, page=4, length=48, rows=4, budget=16, chunks=2, part=4, steps=4)


@functools.cache
def network():
  return jax.jit(inference.take_apart)(random_model(configs()["qwen3"]))


@functools.cache
def requests():
  """Greedy and sampled ones, of one token and of many."""
  rng = np.random.default_rng(0)
  how = (Sampling(), Sampling(1.0, seed=3), Sampling(0.7, top_k=5, seed=4), Sampling(1.3, top_p=0.9, min_p=0.1, seed=5))
  prompts = [rng.integers(0, 64, size).tolist() for size in (1, 29, 5, 17, 12, 3, 30, 8)]
  prompts[6][:20] = prompts[1][:20]  # a beginning that is shared
  return [Request(f"{i}", p, int(rng.integers(1, 13)), how[i % 4]) for i, p in enumerate(prompts)]


@functools.cache
def expected():
  made = {}
  for r in requests():
    s = r.sampling
    how = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, key=jax.random.key(s.seed))
    made[r.id] = generate(network(), np.array([r.prompt]), tokens=r.tokens, **how)[0].tolist()
  return made


def serve(engine, asked, arrivals=None):
  """{id: tokens}; request i is added before step arrivals[i]."""
  made, waiting, step = {r.id: [] for r in asked}, list(zip(arrivals or [0] * len(asked), asked, strict=True)), 0
  while waiting or engine.busy:
    for _, request in [w for w in waiting if w[0] <= step]:
      engine.add(request)
    waiting = [w for w in waiting if w[0] > step]
    for event in engine.step():
      made[event.id].append(event.token)
    assert engine.pages.free + engine.pages.held == len(engine.pages.holders) - 1
    step += 1
    assert step < 500
  return made


SIZES = [{}, dict(budget=9, chunks=1, part=5)]
GRID = [size | dict(steps=n, prefix=known) for size in SIZES for n in (1, 4) for known in (True, False)]


@pytest.mark.parametrize("policy", policies.POLICIES)
@pytest.mark.parametrize("options", [*GRID, dict(pages=14, prefix=False)], ids=str)
def test_tokens_do_not_depend_on_the_schedule(policy, options):
  """Those that each request gets by itself, under every policy, in chunks of 16 and of 5, in calls of one token and of
  four, with what is known reused or not, with pages for all and with so few that sequences have to be computed again.
  """
  engine = Engine(network(), **SMALL | options, policy=policy)
  assert serve(engine, requests(), [0, 0, 0, 1, 2, 5, 9, 9]) == expected()
  assert engine.pages.held == 0 and not engine.busy
  if options.get("pages") and policy == "sarathi":
    assert engine.counters["preempted"] > 0
  if options["prefix"] and "part" not in options:
    assert engine.counters["reused"] >= 16  # four pages of the shared beginning, at least


@functools.cache
def twenty():
  """Greedy ones of random lengths."""
  rng = np.random.default_rng(1)
  sizes = zip(rng.integers(1, 31, 20).tolist(), rng.integers(1, 13, 20).tolist(), strict=True)
  return [Request(f"{i}", rng.integers(0, 64, size).tolist(), tokens) for i, (size, tokens) in enumerate(sizes)]


@pytest.mark.parametrize("policy", policies.POLICIES)
def test_twenty_random_requests_get_the_tokens_of_whole_passes_without_a_cache(policy):
  """Every token is the likeliest one behind all before it."""
  arrivals = np.random.default_rng(2).integers(0, 9, 20).tolist()
  made = serve(Engine(network(), **SMALL, policy=policy), twenty(), arrivals)
  texts = [[*r.prompt, *made[r.id]] for r in twenty()]
  padded = jnp.array([text + [0] * (48 - len(text)) for text in texts])
  likeliest = np.asarray(whole_pass(network(), padded)[0].argmax(axis=-1))
  for r, text, best in zip(twenty(), texts, likeliest, strict=True):
    assert made[r.id] == best[len(r.prompt) - 1 : len(text) - 1].tolist() and len(made[r.id]) == r.tokens


whole_pass = jax.jit(inference.step)


@settings(max_examples=6)
@given(st.integers(0, 10_000))
def test_any_order_of_arrivals_and_ends(seed):
  """Some are aborted on the way: the others' tokens are their own, and no page is lost."""
  rng, engine, asked = np.random.default_rng(seed), Engine(network(), **SMALL | dict(pages=20)), requests()
  arrivals, made, gone = rng.integers(0, 12, len(asked)), {r.id: [] for r in asked}, set()
  for step in range(200):
    for r in (r for r, at in zip(asked, arrivals, strict=True) if at == step):
      engine.add(r)
    if rng.random() < 0.1 and (ids := [s.request.id for s in (*engine.running, *engine.waiting)]):
      gone.add(ids[rng.integers(len(ids))])
    for id in gone:
      engine.abort(id)
      assert not engine.abort(id)
    for event in engine.step():
      assert event.id not in gone
      made[event.id].append(event.token)
  assert not engine.busy and engine.pages.held == 0
  for r in asked:
    assert made[r.id] == (expected()[r.id][: len(made[r.id])] if r.id in gone else expected()[r.id])


def test_nobody_reads_what_others_left_in_a_page_and_the_cache_is_not_copied(caplog):
  """Not even what is no number, with a weight of zero. Of 200 requests none has anything compiled, in any step."""
  engine = Engine(network(), **SMALL)
  engine.warm_up()
  engine._pools = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), engine._pools)
  address = engine._pools[0][0].unsafe_buffer_pointer()
  many = [dataclasses.replace(r, id=f"{n} {r.id}") for n in range(25) for r in requests()]
  with jax.log_compiles(), caplog.at_level("WARNING"):
    made = serve(engine, many, [i // 3 for i in range(200)])
  assert all(tokens == expected()[id.split()[1]] for id, tokens in made.items())
  assert not [record.message for record in caplog.records if "ompil" in record.message]
  assert engine._pools[0][0].unsafe_buffer_pointer() == address


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16, 64])
def test_chunks_of_any_size_leave_the_keys_values_and_logits_of_one_pass(chunk):
  """Prompts of 1 to 40 tokens."""
  prompt = np.random.default_rng(0).integers(0, 64, 40).tolist()
  logits, state = inference.prefill(network(), jnp.array([prompt]), capacity=40)
  logp = jax.nn.log_softmax(inference.step(network(), jnp.array([prompt]))[0][0].astype(jnp.float32))
  np.testing.assert_allclose(jax.nn.log_softmax(logits[0, 0].astype(jnp.float32)), logp[-1], rtol=1e-4, atol=1e-4)
  engine = Engine(
    network(), pages=16, page=4, length=48, rows=1, budget=1 + chunk, chunks=1, part=chunk, steps=1, prefix=False
  )
  for size in {1, 2, chunk, chunk + 1, 2 * chunk, 29, 40} & set(range(1, 41)):
    engine.add(Request(f"{size}", prompt[:size], 2))
    steps = 1
    while not (events := engine.step()):
      steps += 1
    served = engine.running[0]
    assert steps == 1 if size == 1 else steps == -(-size // (chunk * max(1, (1 + chunk) // chunk)))
    assert events[0].token == int(logp[size - 1].argmax())
    np.testing.assert_allclose(events[0].logprob, logp[size - 1].max(), rtol=1e-4, atol=1e-4)
    for pools, pair in zip(engine._pools, state.pairs, strict=True):
      for pool, whole in zip(pools, pair, strict=True):
        kept = np.asarray(pool)[:, served.pages].reshape(pool.shape[0], -1, pool.shape[3])[:, :size]
        np.testing.assert_allclose(np.swapaxes(kept, 0, 1), whole[0, :size], rtol=1e-5, atol=1e-5)
    while engine.busy:
      engine.step()


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16, 64])
def test_prompts_of_1_to_40_tokens_have_the_logits_and_pages_of_one_pass_whatever_their_chunks(chunk):
  """Forty prompts side by side, each in as many chunks as it takes; other tokens follow each, which nobody reads."""
  tokens, sizes = np.random.default_rng(0).integers(0, 64, 40), np.arange(1, 41)
  shallow = two_layers()
  logits, pairs = one_pass(shallow, tokens)
  pools, table = batch.empty_pools(shallow, 401, 4), sizes[:, None] * 10 - 9 + np.arange(10)
  for begin in range(0, 40, chunk):
    _, rows = batch.blank(40, chunk, 10)
    place = begin + np.arange(chunk)
    rows.tokens[:] = np.where(place < sizes[:, None], np.resize(tokens, begin + chunk)[begin:], 63)
    rows.start[:], rows.table[:] = begin, table
    found, pools = read_chunk(shallow, pools, rows)
    last = sizes[begin : begin + chunk] - 1  # of those that end in this chunk
    np.testing.assert_allclose(found[last, last - begin], logits[last], rtol=0, atol=1e-5)
  for pool, whole in zip(jax.tree.leaves(pools), jax.tree.leaves(pairs), strict=True):
    kept = np.moveaxis(np.asarray(pool)[:, table].reshape(pool.shape[0], 40, 40, -1), 0, 2)
    for size in sizes:
      np.testing.assert_allclose(kept[size - 1, :size], whole[0, :size], rtol=0, atol=1e-5)


@functools.cache
def two_layers():
  return jax.jit(inference.take_apart)(random_model(dataclasses.replace(configs()["qwen3"], depth=2)))


@jax.jit
def one_pass(network, tokens):
  """(logits of all tokens, keys and values of all layers)."""
  logits, state = inference.step(network, tokens[None], inference.empty_state(network, batch=1, capacity=40))
  return logits[0], state.pairs


@jax.jit
def read_chunk(network, pools, rows):
  """(logits of all tokens of all rows, the pools with what was read)."""
  _, none = batch.blank(0, 1, 10)
  x, backout, pools = batch.forward(network, pools, none, rows)
  return network.model.logits(x, backout).reshape(*rows.tokens.shape, -1), pools


@settings(max_examples=8)
@given(st.integers(0, 10_000), st.sampled_from([1, 3]))
def test_steps_read_few_prompts_keep_to_the_budget_and_stall_nobody(seed, chunks):
  """Whoever can decode does in every step, and one prompt is read beside them, or several."""
  rng, plans = np.random.default_rng(seed), []

  def watched(view):
    ready = [s for s in view.running if s.pending == 1]
    plan = policies.sarathi(view)
    assert plan.decode == ready
    assert len(plan.chunks) <= chunks and len(plan.decode) + sum(count for _, count in plan.chunks) <= view.budget
    plans.append(plan)
    return plan

  engine, asked = Engine(network(), **SMALL | dict(chunks=chunks, prefix=False), policy=watched), requests()
  serve(engine, asked, rng.integers(0, 9, len(asked)).tolist())
  read = {r.id: 0 for r in asked}
  for plan in plans:
    for served, count in plan.chunks:
      read[served.request.id] += count
  assert engine.counters["preempted"] == 0
  # A last token that is left over by itself is read as a row that decodes.
  assert all(len(r.prompt) - 1 <= read[r.id] <= len(r.prompt) for r in asked)


def test_scores_of_a_prompt_are_the_models_own():
  """In chunks, beside others, and computed although their pages are known."""
  engine, prompt = Engine(network(), **SMALL), requests()[1].prompt
  serve(engine, requests())
  engine.add(dataclasses.replace(requests()[4], id="beside"))
  engine.add(Request("a", prompt, 1, score=True))
  events = [e for _ in range(9) for e in engine.step() if e.id == "a"]
  (event,) = events
  logp = jax.nn.log_softmax(inference.step(network(), jnp.array([prompt]))[0][0].astype(jnp.float32))
  found, best, top = map(np.array, zip(*event.scores, strict=True))
  np.testing.assert_allclose(found, logp[np.arange(len(prompt) - 1), prompt[1:]], rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(best, logp[:-1].argmax(axis=1))
  np.testing.assert_allclose(top, logp[:-1].max(axis=1), rtol=1e-4, atol=1e-4)
  assert event.token == int(logp[-1].argmax()) and event.finish == "length"
  np.testing.assert_allclose(event.logprob, logp[-1].max(), rtol=1e-4, atol=1e-4)


def test_scores_of_a_prompt_that_is_read_again_are_those_of_the_second_time():
  """It gives its pages up when half of it is read, as another sequence decodes on."""
  prompts = np.random.default_rng(3).integers(0, 64, (2, 40))
  expected = jax.nn.log_softmax(inference.step(network(), jnp.asarray(prompts[1:]))[0][0].astype(jnp.float32))
  engine = Engine(network(), **SMALL | dict(page=2, pages=27, length=48, rows=2, budget=12, part=8, chunks=1, steps=1))
  engine.add(Request("first", prompts[0, :6].tolist(), 40))
  while engine.waiting or engine.running[0].pending > 1:
    engine.step()
  engine.add(Request("scored", prompts[1].tolist(), 1, score=True))
  [event] = [e for _ in range(60) for e in engine.step() if e.id == "scored"]
  assert engine.counters["preempted"] > 0
  found = [score for score, *_ in event.scores]
  np.testing.assert_allclose(found, expected[np.arange(39), prompts[1, 1:]], rtol=1e-4, atol=1e-4)


def test_it_stops_at_a_stop_token_and_counts_what_it_did():
  engine, r = Engine(network(), **SMALL, clock=iter(range(99)).__next__), requests()[6]
  r = dataclasses.replace(r, tokens=8, sampling=Sampling())
  asked = serve(Engine(network(), **SMALL), [r])[r.id]
  stop = asked[3]
  first = asked.index(stop)
  engine.add(dataclasses.replace(r, stop=frozenset([stop])))
  events = [e for _ in range(9) for e in engine.step()]
  assert [e.token for e in events] == asked[: first + 1]
  assert [e.finish for e in events] == [None] * first + ["stop"]
  (served,) = engine.take_ended()
  assert engine.take_ended() == [] and served.scheduled == 0 and served.times[0] == 3  # chunks of 16 and 14
  assert engine.counters["tokens"] + engine.counters["padding"] > 0


def test_settings_of_a_row_are_its_own():
  """Each row of a batch as if it were alone, and top_k, top_p and min_p as `generate.sample` has them."""
  logits = jax.random.normal(jax.random.key(0), (5, 40))

  class Rows:
    temperature, top_p = jnp.array([0, 1.0, 0.5, 1, 2]), jnp.array([1, 1, 0.3, 0.9, 1.0])
    min_p = jnp.array([0.5, 0, 0, 0.3, 0.6])
    top_k, seed, number = jnp.array([0, 3, 0, 4, 0]), jnp.array([1, 2, 3, -4, 5]), jnp.array([0, 7, 2, 3, 1])

  token, logprob, best, _ = sample_rows(logits, Rows)
  for i in range(5):
    key = jax.random.fold_in(jax.random.key(int(Rows.seed[i]) % 2**32), int(Rows.number[i]))
    how = dict(temperature=float(Rows.temperature[i]), top_k=int(Rows.top_k[i]) or None, top_p=float(Rows.top_p[i]))
    how["min_p"] = float(Rows.min_p[i]) or None
    assert int(token[i]) == int(generate_sample(logits[i : i + 1], key, **how)[0])
  np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits)[jnp.arange(5), token], rtol=1e-5)
  np.testing.assert_array_equal(best, logits.argmax(axis=1))


def generate_sample(*arguments, **options):
  from jaxlab.models.generate import sample

  return sample(*arguments, **options)


@pytest.mark.parametrize(
  "request_, message",
  [
    (dict(prompt=[1, 64]), r"the prompt has ids 1\.\.64, the model 0\.\.63"),
    (dict(prompt=[]), "the prompt is empty"),
    (dict(tokens=0), "0 new tokens are wanted; ask for at least 1"),
    (dict(prompt=[1] * 40, tokens=9), "40 tokens and 9 new ones are wanted; there is room for 48 in all"),
    (dict(sampling=dict(temperature=-1)), "temperature is -1"),
    (dict(sampling=dict(top_p=0)), "top_p is 0"),
    (dict(sampling=dict(min_p=1.5)), "min_p is 1.5"),
    (dict(sampling=dict(top_k=0)), "top_k is 0"),
    (dict(sampling=dict(seed=0.5)), "seed is 0.5"),
  ],
)
def test_requests_that_cannot_be_served_are_named(request_, message):
  engine = Engine(network(), **SMALL)
  with pytest.raises(InputError, match=message):
    sampling = Sampling(**request_.pop("sampling", {}))
    engine.add(Request(**dict(id="a", prompt=[1], tokens=1, sampling=sampling) | request_))
  assert not engine.busy


def test_engines_and_policies_that_cannot_be_are_named():
  for options, message in (
    (dict(budget=3), "budget is 3; it must have room for a token of each of the 4 rows"),
    (dict(policy="fair"), "policy is 'fair'; it must be one of sarathi"),
    (dict(pages=2), "have no room for a request"),
  ):
    with pytest.raises(InputError, match=message):
      Engine(network(), **SMALL | options)
  with pytest.raises(InputError, match="smear"):
    Engine(random_model(configs()["nanochat"]), **SMALL)
  engine = Engine(network(), **SMALL, policy=lambda view: policies.Plan(decode=[view.waiting[0]]))
  engine.add(requests()[0])
  with pytest.raises(InputError, match="is served already"):
    engine.add(requests()[0])
  with pytest.raises(InputError, match="that is not running; admit it first"):
    engine.step()


def test_eight_devices_that_share_heads_serve_the_same_tokens():
  """As one does; four of them have the same key-value head."""
  sharing = make_mesh({"tensor": 8})
  few = SMALL | dict(length=32, rows=2, budget=10, chunks=1, steps=2)
  engines = [Engine(random_model(SHARED), **few, mesh=mesh) for mesh in (None, sharing)]
  pool = engines[1]._pools[0][0]
  assert pool.sharding.spec[0] == "tensor" and {a.data.shape[0] for a in pool.addressable_shards} == {1}
  alone, together = (serve(engine, requests()[2:6]) for engine in engines)
  assert together == alone


def test_what_devices_cannot_share_is_said():
  for model, options, message in (
    (random_model(SHARED), {"tensor": 3}, "3 devices cannot share 8 heads, 2 key-value heads and 96 neurons evenly"),
    (random_model(configs()["qwen3_moe"]), {"tensor": 2}, "a model with experts"),
    (network(), {"tensor": 2}, "give it as hub.load returns it"),
  ):
    with pytest.raises(InputError, match=message):
      Engine(model, **SMALL, mesh=make_mesh(options, jax.devices()[: options["tensor"]]))
