"""ChunkFlow: every token in one chunk, Algorithm 2's order, and the gradient of sequences fed one by one."""

import dataclasses
import functools
import itertools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError
from jaxlab.data.packing import split_row
from jaxlab.sequence import chunkflow
from jaxlab.sequence import chunkflow_pipeline as pipeline
from jaxlab.training import loop, lora, losses
from jaxlab.training.metrics import read_metrics
from tests.common import configs, own_losses, plain_attention, random_model, shape_of
from tests.cudnn import cudnn_by_definition

CONFIG = dataclasses.replace(configs()["qwen3"], depth=2)
C = 8
LENGTHS = (1, C - 1, C, C + 1, 5 * C + 3, 3, 2, 2 * C)
LISTS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def texts(lengths=LENGTHS, seed=0):
  """Sequences of these lengths; where there is room the first targets, a prompt's, are not counted."""
  rng, rows = np.random.default_rng(seed), []
  for length in lengths:
    row = split_row(rng.integers(0, 64, length + 1).astype(np.int32))
    row["targets"] = row["targets"].copy()
    row["targets"][: length // 4] = -1
    rows.append(row)
  return rows


def precise(q, k, v, *, mask):
  """Attention in float64: the library's takes its softmax in float32."""
  q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
  score = jnp.einsum("btgrd,bsgd->bgrts", q, k) / math.sqrt(q.shape[-1])
  weight = jax.nn.softmax(jnp.where(mask[:, :, None], score, -jnp.inf), axis=-1)
  return jnp.einsum("bgrts,bsgd->btgrd", weight, v).reshape(*q.shape[:2], -1, q.shape[-1])


def flat(tree):
  return np.concatenate([np.asarray(a).ravel() for a in jax.tree.leaves(tree)])


def loss_of(model, rows, attention=plain_attention, token_losses=losses.token_losses):
  """Each sequence by itself, padded to the longest; the sum over all targets that count, over their number."""
  longest = max(len(row["inputs"]) for row in rows)
  pad = lambda a, value: jnp.pad(a, (0, longest - len(a)), constant_values=value)[None]
  inputs = jnp.stack([pad(row["inputs"], 0) for row in rows])
  targets = jnp.stack([pad(row["targets"], -1) for row in rows])
  each = lambda row: token_losses(model, model.hidden(row[0], attention=attention), row[1])
  alone = lambda row: jnp.where(row[1] >= 0, each(row), 0).sum()
  return jax.lax.map(alone, (inputs, targets)).sum() / (targets >= 0).sum()


def exact(model, rows, **how):
  loss, gradient = jax.jit(jax.value_and_grad(lambda model: loss_of(model, rows, **how)))(model)
  return float(loss), flat(gradient)


@functools.cache
def compiled(**how):
  """The gradient under these options as one function, whose programs serve all batches of a shape."""
  run = chunkflow.gradient(attend=precise, **how)
  return jax.jit(lambda model, batch: run(model, batch, 0, None))


def by_chunks(model, rows, chunk, keep, ranks=1, **how):
  plan = chunkflow.pack([len(row["inputs"]) for row in rows], chunk)
  batch = chunkflow.materialize(plan, rows, keep=keep, ranks=ranks)
  (loss, extra), gradient = compiled(**how)(model, batch)
  assert extra["tokens"] == sum((row["targets"] >= 0).sum() for row in rows)
  return float(loss), flat(gradient)


def close(found, expected, tolerance=1e-10):
  assert found[0] == pytest.approx(expected[0], rel=1e-12)
  assert np.abs(found[1] - expected[1]).max() < tolerance * np.abs(expected[1]).max()


@pytest.fixture
def double():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def known():
  with jax.enable_x64(True):
    model, rows = random_model(CONFIG, dtype="float64"), texts()
    yield model, rows, exact(model, rows)


@pytest.mark.parametrize(("chunk", "keep", "ranks"), [(C, 1, 1), (C, 2, 1), (16, 3, 1), (16, 1, 3), (64, 1, 1)])
def test_the_gradient_is_that_of_sequences_fed_one_by_one(double, known, chunk, keep, ranks):
  """Whatever is kept, also all of it: lengths of 1, C - 1, C, C + 1 and 5 C + 3 among them; in one chunk each; of
  three ranks on one device, the sum over all tokens."""
  model, rows, expected = known
  close(by_chunks(model, rows, chunk, keep, ranks), expected)


def test_by_calls_of_cudnn_the_gradient_is_the_same(double, known, monkeypatch):
  """By their definition, in float64, packed chunks among them."""
  cudnn_by_definition(monkeypatch)
  model, rows, (loss, expected) = known
  batch = chunkflow.materialize(chunkflow.pack(LENGTHS, C), rows, keep=2)
  run = jax.jit(lambda model, batch: chunkflow.gradient()(model, batch, 0, None))
  (found, _), gradient = run(model, batch)
  close((float(found), flat(gradient)), (loss, expected))


@pytest.mark.parametrize("name", ["mhc", "qwen3_moe"])
def test_any_transformer_that_does_not_smear(double, name):
  """With short windows, value embeddings, streams and experts too."""
  config = configs()[name]
  windows = dict(window_pattern="SL") if name == "mhc" else {}
  config = dataclasses.replace(config, depth=2, smear=False, **windows)
  model, rows = random_model(config, dtype="float64"), texts((3, 5, 19))
  close(by_chunks(model, rows, C, 1, remat="full" if config.experts else "none"), exact(model, rows))


def test_a_loss_of_ones_own_is_a_mean_over_tokens(double, known):
  """Of shared chunks and of cut sequences; what it says of tokens that do not count is left out."""
  model, rows, plain = known
  expected = exact(model, rows, token_losses=own_losses)
  assert expected[0] > plain[0] + 0.1
  close(by_chunks(model, rows, C, 2, token_losses=own_losses), expected)


def test_without_any_of_its_parts_the_gradient_is_another(double, known):
  """Segments, or the order in which chunks send back, which one transcription of Algorithm 2 has ascending; positions
  moved by 5 change nothing, as all is relative."""
  model, rows, (_, expected) = known
  batch = chunkflow.materialize(chunkflow.pack(LENGTHS, C), rows, keep=2)
  run = compiled()
  error = lambda **new: np.linalg.norm(flat(run(model, batch | new)[1]) - expected) / np.linalg.norm(expected)
  ascending = batch["program"].copy()
  again = np.flatnonzero(ascending[0, :, 0] == chunkflow._AGAIN)
  ascending[0, again] = ascending[0, again[::-1]]
  assert len(again) == 4 and error() < 1e-11 and error(positions=batch["positions"] + 5) < 1e-11
  assert error(program=ascending) > 1e-4 and error(segments=np.zeros_like(batch["segments"])) > 1e-4


def test_adapters_alone_are_trained(double, known):
  model, rows, _ = known
  adapters = lora.init(model, jax.random.key(1), rank=2, where=lambda name: name in ("blocks.q", "blocks.v"))
  adapters = dataclasses.replace(adapters, b=jax.tree.map(lambda b: b + 0.1, adapters.b))
  merged = lambda adapters, model: lora.merge(model, adapters)
  expected = jax.jit(jax.grad(lambda a: loss_of(merged(a, model), rows)))(adapters)
  batch = chunkflow.materialize(chunkflow.pack(LENGTHS, C), rows)
  run = chunkflow.gradient(attend=precise, model_of=merged)
  _, ours = jax.jit(lambda adapters: run(adapters, batch, 0, None, model))(adapters)
  assert jax.tree.structure(ours) == jax.tree.structure(adapters)
  assert np.linalg.norm(flat(ours) - flat(expected)) < 1e-10 * np.linalg.norm(flat(expected))


@given(LISTS, st.integers(1, 25))
@example([1], 25)
@example([60], 25)
@example([25, 26, 24, 1], 25)
@example([1, 25, 7, 7, 12], 25)  # all short
@example([60, 26, 50, 51], 25)  # all cut
@example([5, 1, 2], 1)
def test_every_token_is_in_one_chunk_and_none_is_too_large(lengths, chunk):
  plan = chunkflow.pack(lengths, chunk)
  seen = {i: [] for i in range(len(lengths))}
  for group in plan.groups:
    for pieces in group:
      assert 0 < sum(stop - start for _, start, stop in pieces) <= chunk
      for i, start, stop in pieces:
        seen[i] += range(start, stop)
    cut = len(group) > 1
    assert not cut or len({pieces[0].sequence for pieces in group}) == len({len(pieces) for pieces in group}) == 1
    assert cut == (lengths[group[0][0].sequence] > chunk)  # only what must be is cut, into as few as there can be
    assert not cut or len(group) == -(-lengths[group[0][0].sequence] // chunk)
  assert all(seen[i] == list(range(length)) for i, length in enumerate(lengths))
  assert plan == chunkflow.pack(lengths, chunk)


def test_short_sequences_need_few_chunks():
  """11/9 of the fewest and one at most, against every way there is, for up to eight of them."""

  def fewest(left, rooms):
    if not left:
      return len(rooms)
    ways = [
      fewest(left[1:], (*rooms[:b], room - left[0], *rooms[b + 1 :])) for b, room in enumerate(rooms) if room >= left[0]
    ]
    return min([*ways, fewest(left[1:], (*rooms, 10 - left[0]))])

  rng = np.random.default_rng(0)
  for count in [*range(1, 9)] * 5:
    sizes = rng.integers(1, 11, count).tolist()
    best = fewest(sizes, ())
    assert best <= len(chunkflow.pack(sizes, 10).groups) <= 11 * best / 9 + 1


def test_the_papers_illustration():
  """16 sequences: three chunks of short ones, and one sequence in four."""
  plan = chunkflow.pack([30, *[2] * 12, 1, 1, 1], 9)
  assert [len(group) for group in plan.groups] == [4, 1, 1, 1]
  assert [sum(p.stop - p.start for p in group[0]) for group in plan.groups[1:]] == [9, 9, 9]


@pytest.mark.parametrize("chunks", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("keep", [1, 2, 3, 12, 13])
def test_a_schedule_is_algorithm_2(chunks, keep):
  """Every chunk forward once or twice and backward once, descending; no more than K keep their activations."""
  steps, live, known = chunkflow.schedule(chunks, keep), set(), set()
  for what, i in steps:
    if what in ("drop", "keep"):
      assert known == set(range(i))  # forward ascends, all before it cached
      known.add(i)
    if what in ("keep", "again"):
      live.add(i)
    assert len(live) <= keep
    if what in ("backward", "again"):
      live.remove(i)
  of = lambda *names: [i for what, i in steps if what in names]
  assert of("backward", "again") == list(range(chunks))[::-1] and not live
  assert sorted(of("drop")) == sorted(of("again")) == list(range(max(0, chunks - keep)))


@given(LISTS, st.integers(3, 25), st.integers(1, 4), st.integers(1, 4))
def test_a_batch_holds_every_token_once_and_few_shapes(lengths, chunk, keep, ranks):
  rows = texts(lengths)
  batch = chunkflow.materialize(chunkflow.pack(lengths, chunk), rows, keep=keep, ranks=ranks)
  used = batch["segments"].reshape(ranks, -1) >= 0
  assert used.sum() == sum(lengths) and (batch["targets"][~used] == -1).all()
  whole = lambda name: sorted(np.concatenate([row[name] for row in rows]).tolist())
  assert sorted(batch["positions"].reshape(ranks, -1)[used]) == sorted(t for length in lengths for t in range(length))
  assert all(sorted(batch[name][used].tolist()) == whole(name) for name in ("inputs", "targets"))
  done = [i for own in batch["program"] for line in own for i in line[2:] if line[0] != chunkflow._FORWARD and i >= 0]
  assert len(done) == sum(-(-length // chunk) for length in lengths if length > chunk) + sum(
    len(group) == 1 for group in chunkflow.pack(lengths, chunk).groups
  )
  allowed = {1, *(m << e for e in range(12) for m in (2, 3))}
  assert {batch["segments"].shape[1], batch["program"].shape[1]} <= allowed
  assert batch["cache"].shape[1] >= min(max(lengths), chunk)


@given(LISTS, st.integers(1, 5))
def test_ranks_are_balanced(lengths, ranks):
  """Every group on one rank, and no rank has more than the mean and a group (LPT)."""
  plan = chunkflow.pack(lengths, 10)
  shares = chunkflow.balance(plan, ranks, keep=2)
  assert sorted(g for share in shares for g in share) == list(range(len(plan.groups)))
  work = chunkflow.Cost().groups(plan, 2)
  assert max(sum(work[g] for g in share) for share in shares) <= sum(work) / ranks + max(work)


def test_costs_count_what_the_schedule_does():
  """A forward meets the keys of 1, 2, 4, ... chunks, a backward costs two, and attention once more where it is cut."""
  cost = chunkflow.Cost(call=5, token=2, pair=1)
  forward, backward = cost.passes(3, 6)
  assert forward == [5 + 6 + 9 * rung for rung in (1, 2, 4, 4, 8, 8)] and cost.passes(3, 1) == ([20], [40])
  assert backward == [2 * one + 9 * rung for one, rung in zip(forward, (1, 2, 4, 4, 8, 8), strict=True)]
  for chunks, keep in itertools.product((1, 3, 5), (1, 2, 7)):
    forward, backward = cost.passes(3, chunks)
    price = {"drop": (1, 0), "keep": (1, 0), "backward": (0, 1), "again": (1, 1)}
    done = [(i, price[what]) for what, i in chunkflow.schedule(chunks, keep)]
    assert cost.group(3, chunks, keep) == sum(f * forward[i] + b * backward[i] for i, (f, b) in done)
    assert chunkflow.Cost().group(3, chunks, keep) <= 4 / 3 * chunkflow.Cost().group(3, chunks, chunks)


def test_without_a_mask_a_sequence_costs_the_pairs_it_has():
  """However it is cut: half of its square, once forwards."""
  cost = chunkflow.Cost(pair=1, masked=False)._replace(token=0.0)
  for chunks in (1, 3, 8):
    forward, backward = cost.passes(5, chunks)
    assert sum(forward) == (5 * chunks) ** 2 / 2 and backward == [2 * one for one in forward]


def test_attention_is_run_on_the_pairs_that_its_cost_counts():
  """Counted as it runs, backwards twice: sequences in 6, 2 and 1 chunks need 21 + 3 + 1 blocks a forward, the prefixes
  have 27 + 3 + 1, and the whole cache for all that are cut would be 64 + 1."""
  pairs = []
  count = lambda q, k, times: jax.debug.callback(lambda: pairs.append(times * q.shape[1] * k.shape[1]))

  def run(q, k, v, mask):
    count(q, k, 1)
    return q

  def pull(given, out):
    count(*given[:2], 2)
    return *given, None

  attend = jax.custom_vjp(run)
  attend.defvjp(lambda *given: (run(*given), given[:3]), pull)
  model, lengths = random_model(dataclasses.replace(CONFIG, depth=1)), (6 * C, 2 * C - 1, C)
  plan = chunkflow.pack(lengths, C)
  batch = chunkflow.materialize(plan, texts(lengths), keep=2)
  found = jax.jit(lambda model: chunkflow.gradient(attend=lambda *a, mask: attend(*a, mask))(model, batch, 0, None))(
    model
  )
  jax.block_until_ready(found)
  jax.effects_barrier()
  cost = chunkflow.Cost(0.0, 0.0, 1.0)
  assert sum(pairs) == sum(cost.groups(plan, keep=2)) and max(pairs) == 2 * 8 * C * C
  assert [sum(cost.passes(C, chunks)[0]) / C**2 for chunks in (6, 2, 1)] == [27, 3, 1]


@pytest.mark.parametrize(
  ("groups", "keep", "makespan", "bubble"),
  [
    ([[2]] * 4, 1, 42, 0.4286),  # equal lengths
    ([[4], [1], [2], [1]], 1, 56, 0.5714),  # sequences of 4, 1, 2, 1 as they are
    ([[4], [4]], 1, 60, 0.6),  # chunks of 4
    ([[2, 2], [2], [2]], 1, 46, 0.4783),  # chunks of 2; the paper draws 54.1 %
    ([[2, 2], [2], [2]], 2, 42, 0.4286),  # the paper draws 47.8 %
  ],
)
def test_the_papers_pipelines_of_four_stages(groups, keep, makespan, bubble):
  trace = pipeline.simulate(groups, stages=4, keep=keep)
  assert trace.makespan == makespan and trace.bubble == pytest.approx(bubble, abs=5e-5)


GROUPS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5), min_size=1, max_size=6)


@given(GROUPS, st.integers(1, 4), st.integers(1, 3))
def test_a_pipeline_keeps_to_what_depends_on_what(groups, stages, keep):
  """And to its budget, and to the longest chain of dependent work; all is done once."""
  trace = pipeline.simulate(groups, stages=stages, keep=keep)
  times = [time for group in groups for time in group]
  place = [(i, len(group)) for group in groups for i in range(len(group))]
  at = {(task.what, task.stage, task.chunk): task for task in trace.tasks}
  assert len(at) == len(trace.tasks) == 2 * stages * len(times)
  for (what, stage, i), task in at.items():
    again = place[i][0] < place[i][1] - keep
    assert task.end - task.start == times[i] * (1 if what == "forward" else 2 + again)
    after = [at["forward", stage, i]] if what == "backward" else []
    if what == "forward":
      after += [at["forward", stage - 1, i]] if stage else []
      after += [at["forward", stage, i - 1]] if place[i][0] else []
    else:
      after += [at["backward", stage + 1, i]] if stage + 1 < stages else []
      after += [at["backward", stage, i + 1]] if place[i][0] + 1 < place[i][1] else []
    assert all(task.start >= other.end for other in after)
  for stage in range(stages):
    mine = sorted((task.start, task.end) for task in trace.tasks if task.stage == stage)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(mine))
    kept = [i for i in range(len(times)) if place[i][0] >= place[i][1] - keep]
    spans = [(at["forward", stage, i].start, at["backward", stage, i].end) for i in kept]
    assert all(sum(a <= t < b for a, b in spans) <= stages - 1 - stage + keep for t, _ in spans)
  path = max(sum(group) * 3 + (stages - 1) * 3 * min(group) for group in groups)
  assert trace.makespan >= max(path, trace.useful) and 0 <= trace.bubble < 1


def test_one_stage_never_waits():
  trace = pipeline.simulate([[1, 1, 1], [1]], stages=1, keep=3)
  assert trace.bubble == pytest.approx(0) and trace.busy == pytest.approx(trace.makespan)


def test_the_best_sizes_are_chosen():
  """One stage: K = 1 and the largest chunk that fits, where every call has its cost. Four: chunks that are neither too
  few nor too small, and all that is said of them agrees with the simulation."""
  lengths = [4000, 900, 500, *[60] * 60, *[10] * 200]
  how = dict(chunks=[256, 512, 1024, 2048], keeps=[1, 2, 4], cost=chunkflow.Cost(call=200.0, pair=1e-4))
  memory = pipeline.Memory(fixed=1000.0, activation=1.0, cached=0.01)
  best = pipeline.choose(lengths, memory=memory, limit=3000, **how)
  assert {(c.chunk, c.keep) for c in best} == {(256, 1), (256, 2), (256, 4), (512, 1), (512, 2), (1024, 1)}
  assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(best))
  found = pipeline.choose(lengths, memory=memory, limit=1e9, stages=4, **how)
  plan = chunkflow.pack(lengths, found[0].chunk)
  forward, backward = zip(*(how["cost"].passes(plan.chunk, len(group)) for group in plan.groups), strict=True)
  trace = pipeline.simulate(forward, stages=4, keep=found[0].keep, backward=backward)
  assert found[0].seconds == trace.makespan and found[0].bubble == pytest.approx(trace.bubble)
  assert len(found) == 12 and found[0].chunk not in (256, 2048)
  two = pipeline.choose(lengths, memory=memory, limit=1e9, stages=4, ranks=2, **how)
  assert two[0].seconds < found[0].seconds


def test_memory_grows_by_the_cache_alone():
  """From 4 chunks to 32 by at most 6 times a position's keys and values in float32, and a tenth: they are kept and
  summed, both again at branches (jaxlib 0.12 holds one of these less), held by the layers and sent back. The attention
  has no scores; jax's has one layer's, a chunk times the cache."""
  config, chunk = dataclasses.replace(CONFIG, depth=8), 16
  model = random_model(config)

  def attend(q, k, v, *, mask):
    state = jnp.einsum("bshd,bshe->bhde", k, v)
    return jnp.einsum("bthd,bhde->bthe", q, jnp.repeat(state, config.q_heads // config.kv_heads, axis=1))

  def temporaries(length):
    batch = chunkflow.materialize(chunkflow.pack([length], chunk), texts((length,)))
    run = jax.jit(lambda model, batch: chunkflow.gradient(attend=attend)(model, batch, 0, None))
    return run.lower(model, jax.tree.map(jnp.asarray, batch)).compile().memory_analysis().temp_size_in_bytes

  layer = 2 * config.kv_heads * config.head_dim * 4
  grown = temporaries(32 * chunk) - temporaries(4 * chunk)
  assert 2 <= grown / ((32 - 4) * chunk * layer * config.depth) < 6.6


def test_a_run_trains_by_it_on_eight_devices(tmp_path):
  """In three lines; losses, and the model after two steps, are those of plain steps on the sequences one by one."""
  rows, model = texts((3, 30, 5, 1, 17, 8, 9, 2), seed=1), random_model(dataclasses.replace(CONFIG, depth=1))
  data = chunkflow.batches(rows, batch=8, chunk=C, ranks=8)
  how = dict(steps=2, workdir=tmp_path, compute_dtype="float32", mesh=meshes.make_mesh({"data": 4, "fsdp": 2}))
  trained = loop.train(model, data, None, optax.sgd(0.1), gradient_fn=chunkflow.gradient(), **how)
  plain = jax.jit(lambda model: jax.value_and_grad(loss_of)(model, rows))
  down = lambda model, gradient: jax.tree.map(lambda a, g: a - 0.1 * g, model, gradient)
  loss, gradient = plain(model)
  second, more = plain(down(model, gradient))
  moved, expected = (flat(after) - flat(model) for after in (trained, down(down(model, gradient), more)))
  assert np.linalg.norm(moved - expected) < 1e-4 * np.linalg.norm(expected)
  lines = read_metrics(tmp_path)
  np.testing.assert_allclose([line["loss"] for line in lines], [loss, second], rtol=1e-4)
  assert lines[0]["tokens"] == sum((row["targets"] >= 0).sum() for row in rows) and second < loss - 0.1


def test_batches_go_on_where_they_stopped():
  rows = texts((3, 30, 5, 1, 17, 8))
  data = chunkflow.batches(rows, batch=4, chunk=C)
  iterator = iter(data)
  first = [next(iterator) for _ in range(2)]
  state, third = iterator.get_state(), next(iterator)
  again = iter(data)
  again.set_state(state)
  jax.tree.map(np.testing.assert_array_equal, next(again), third)
  assert any((first[0][name].shape != third[name].shape or (first[0][name] != third[name]).any()) for name in third)


def test_few_batches_are_made_ahead():
  """Five are, beside the eight that were taken; grain's own threads would make hundreds while a run compiles."""
  made = []

  class Counted(list):
    def __getitem__(self, i):
      made.append(i)
      return super().__getitem__(i)

  iterator = iter(chunkflow.batches(Counted(texts((3, 5))), batch=2, chunk=C))
  for _ in range(8):
    next(iterator)
  time.sleep(0.3)
  assert 2 * 8 <= len(made) <= 2 * (8 + 5)


def test_a_batch_may_be_one_sequence():
  data = iter(chunkflow.batches(texts((3, 30)), batch=1, chunk=C))
  assert sorted(int((next(data)["segments"] >= 0).sum()) for _ in range(2)) == [3, 30]


def test_bad_input():
  rows, plan = texts((3, 20)), chunkflow.pack([3, 20], C)
  batch = chunkflow.materialize(plan, rows)
  model, run = shape_of(CONFIG), chunkflow.gradient()
  memory, how = pipeline.Memory(0, 1, 1), dict(cost=chunkflow.Cost(), limit=10)
  for call, message in (
    (lambda: chunkflow.pack([3], 0), "chunk is 0"),
    (lambda: chunkflow.pack([], 4), "there are no sequences to pack"),
    (lambda: chunkflow.pack([3, 0], 4), "sequence 1 has 0 tokens"),
    (lambda: chunkflow.schedule(3, 0), "keep is 0"),
    (lambda: chunkflow.balance(plan, 0), "ranks is 0"),
    (lambda: chunkflow.materialize(plan, rows[:1]), "the plan is of 2 sequences, not 1"),
    (lambda: chunkflow.materialize(plan, texts((3, 21))), r"sequence 1 has inputs \(21,\) and targets \(21,\)"),
    (lambda: chunkflow.batches(rows, batch=3, chunk=C), "batch is 3; there are 2 sequences"),
    (lambda: next(iter(chunkflow.batches(rows, batch=2, chunk=32, context=19))), "has 20 tokens, more than .* of 19"),
    (lambda: run(model, {"inputs": 1, "targets": 2}, 0, None), "the batch has inputs, targets; ChunkFlow's are made"),
    (lambda: run(shape_of(configs()["nanochat"]), batch, 0, None), "models that smear embeddings"),
    (
      lambda: run(shape_of(dataclasses.replace(CONFIG, context=2 * C)), batch, 0, None),
      "context of 16 tokens; cut",
    ),
    (lambda: pipeline.simulate([], stages=2), "groups are needed"),
    (lambda: pipeline.simulate([[1], []], stages=2), "groups are needed"),
    (lambda: pipeline.simulate([[1, 0]], stages=2), "seconds of every chunk's forward must be positive"),
    (lambda: pipeline.simulate([[1]], stages=0), "stages is 0"),
    (lambda: pipeline.simulate([[1]], stages=1, backward=0), "backward is 0"),
    (lambda: pipeline.choose([5], chunks=[], keeps=[1], memory=memory, **how), "there is nothing to choose from"),
    (lambda: pipeline.choose([5], chunks=[16], keeps=[1], memory=memory, **how), "nothing fits 10 bytes"),
  ):
    with pytest.raises(InputError, match=message):
      call()
  for shape, ranks in (({"data": 4, "tensor": 2}, 4), ({"tensor": 8}, 1), ({"data": 4, "sequence": 2}, 4)):
    shared = chunkflow.materialize(plan, rows, ranks=ranks)
    with meshes.using(meshes.make_mesh(shape)), pytest.raises(InputError, match="ChunkFlow splits batches alone"):
      run(model, shared, 0, None)
