"""SeCO is the gradient; SpaCO's mean is what its chains say, by every choice of chunks there is."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError
from jaxlab.models.attention import masked_attention
from jaxlab.sequence import chunkflow, common, seco
from jaxlab.training import loop, lora, losses
from jaxlab.training.metrics import read_metrics
from tests.common import configs, own_losses, random_model, shape_of
from tests.cudnn import cudnn_by_definition

TIME = 48
CONFIG = dataclasses.replace(configs()["qwen3"], depth=3)


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


def text(rows=2, time=TIME, seed=0):
  ids = np.random.default_rng(seed).integers(0, 64, (rows, time + 1)).astype(np.int32)
  targets = ids[:, 1:].copy()
  targets[0, -5:] = -1
  return {"inputs": ids[:, :-1], "targets": targets}


def model_of(config=CONFIG):
  return random_model(config, dtype="float64")


def flat(tree):
  return np.concatenate([np.asarray(a).ravel() for a in jax.tree.leaves(tree)])


def masked(q, k, v, *, mask):
  """Attention in float64: the library's takes its softmax in float32."""
  q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
  score = jnp.einsum("btgrd,bsgd->bgrts", q, k) / math.sqrt(q.shape[-1])
  weight = jax.nn.softmax(jnp.where(mask[:, :, None], score, -jnp.inf), axis=-1)
  return jnp.einsum("bgrts,bsgd->btgrd", weight, v).reshape(*q.shape[:2], -1, q.shape[-1])


precise = masked_attention(masked)


def loss_of(model, batch, token_losses=losses.token_losses):
  per_token = token_losses(model, model.hidden(batch["inputs"], attention=precise), batch["targets"])
  return losses.mean_loss(per_token, batch["targets"])


value_and_grad = jax.jit(jax.value_and_grad(loss_of))


def exact(model, batch):
  value, gradient = value_and_grad(model, batch)
  return float(value), flat(gradient)


def by_chunks(model, batch, key=None, **how):
  run = jax.jit(lambda model, key: seco.gradient(**how, attention=precise)(model, batch, 0, key))
  (loss, _), gradient = run(model, jax.random.key(0) if key is None else key)
  return float(loss), flat(gradient)


def close(a, b, tolerance=1e-11):
  assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("chunk", [1, 7, 16, TIME])
def test_seco_is_the_gradient(chunk):
  """Also where chunks do not divide the sequence, and in one."""
  model, batch = model_of(), text()
  loss, gradient = exact(model, batch)
  found, ours = by_chunks(model, batch, chunk=chunk)
  assert found == pytest.approx(loss, rel=1e-12)
  close(ours, gradient)


def test_a_row_of_one_token_in_a_chunk_that_is_longer():
  model, batch = model_of(dataclasses.replace(CONFIG, depth=1)), text(time=1)
  loss, gradient = exact(model, batch)
  found, ours = by_chunks(model, batch, chunk=4)
  assert found == pytest.approx(loss, rel=1e-12) and loss > 1
  close(ours, gradient)


def test_by_calls_of_cudnn_the_gradient_is_the_same(monkeypatch):
  """By their definition, in float64."""
  cudnn_by_definition(monkeypatch)
  model, batch = model_of(), text()
  run = jax.jit(lambda model: seco.gradient(chunk=16)(model, batch, 0, jax.random.key(0)))
  close(flat(run(model)[1]), exact(model, batch)[1])


@pytest.mark.parametrize("name", ["llama", "nanochat_plain", "mhc", "qwen3_moe"])
def test_any_transformer_that_does_not_smear(name):
  config = dataclasses.replace(configs()[name], depth=2)
  config = dataclasses.replace(config, smear=False) if config.smear else config
  model, batch = model_of(config), text()
  close(by_chunks(model, batch, chunk=20, remat="full")[1], exact(model, batch)[1], 1e-10)


def test_adapters_alone_are_trained():
  """Exactly so, and the model stays."""
  model, batch = model_of(), text()
  adapters = lora.init(model, jax.random.key(1), rank=2, where=lambda name: name in ("blocks.q", "blocks.v"))
  adapters = dataclasses.replace(adapters, b=jax.tree.map(lambda b: b + 0.1, adapters.b))
  merged = lambda adapters, model: lora.merge(model, adapters)
  expected = jax.jit(jax.grad(lambda adapters, model: loss_of(merged(adapters, model), batch)))(adapters, model)
  run = seco.gradient(chunk=16, attention=precise, model_of=merged)
  _, ours = jax.jit(lambda adapters, model: run(adapters, batch, 0, jax.random.key(0), model))(adapters, model)
  assert jax.tree.structure(ours) == jax.tree.structure(adapters)
  close(flat(ours), flat(expected))


def test_a_loss_of_ones_own_is_a_mean_over_tokens():
  model, batch = model_of(), text()
  mean = lambda model: loss_of(model, batch, own_losses)
  loss, gradient = jax.jit(jax.value_and_grad(mean))(model)
  found, ours = by_chunks(model, batch, chunk=16, token_losses=own_losses)
  assert found == pytest.approx(float(loss), rel=1e-12)
  close(ours, flat(gradient))


def test_all_chunks_visited_is_seco():
  model, batch = model_of(), text()
  expected = by_chunks(model, batch, chunk=8)[1]
  for how in (dict(cap=None), dict(cap=2.0), dict(sampling="bernoulli")):
    close(by_chunks(model, batch, chunk=8, visited=6, **how)[1], expected, 1e-12)


def test_a_cap_of_zero_truncates():
  """The gradient of chunks whose cache is a constant."""
  model, batch = model_of(dataclasses.replace(CONFIG, depth=1)), text()
  total = (batch["targets"] >= 0).sum()

  def loss(model):
    cache, total_loss = model.empty_cache(2, TIME), 0.0
    for start in range(0, TIME, 24):
      part = batch["inputs"][:, start : start + 24], batch["targets"][:, start : start + 24]
      how = dict(
        model_of=lambda model: model,
        frozen=(),
        share=common.share_of(losses.token_losses, total),
        how=(precise, "none"),
      )
      one, (keys, values) = common.transformer_loss(model, (cache.keys, cache.values), part, start, **how)
      cache = dataclasses.replace(cache, keys=jax.lax.stop_gradient(keys), values=jax.lax.stop_gradient(values))
      total_loss = total_loss + one
    return total_loss

  close(by_chunks(model, batch, chunk=24, visited=2, cap=0.0)[1], flat(jax.jit(jax.grad(loss))(model)), 1e-10)


def pieces(model, batch, k):
  """(a function of (order, active, direct, relay) -> gradient, k chunks)."""
  chunk = TIME // k
  total = (batch["targets"] >= 0).sum()
  split = lambda a: jnp.moveaxis(jnp.asarray(a).reshape(len(a), k, chunk), 1, 0)
  parts = split(batch["inputs"]), split(batch["targets"])
  c = model.config
  empty = jnp.zeros((c.depth, len(batch["inputs"]), TIME, c.kv_heads, c.head_dim))
  how = dict(
    model_of=lambda model: model, frozen=(), share=common.share_of(losses.token_losses, total), how=(precise, "none")
  )
  share = lambda *args: common.transformer_loss(*args, **how)

  @jax.jit
  def run(order, active, direct, relay):
    how = dict(chunk=chunk, order=order, active=active, direct=direct, relay=relay)
    return seco.value_and_grad(share, model, (empty, empty), parts, **how)[1]

  return lambda order, active=None, direct=1.0, relay=1.0: flat(
    run(jnp.asarray(order), jnp.ones(len(order), bool) if active is None else jnp.asarray(active), direct, relay)
  )


def chains(run, k):
  """z_1 .. z_k: all chunks with relays scaled by sigma give sum_p sigma^(p-1) z_p."""
  nodes = np.cos(np.pi * (np.arange(k) + 0.5) / k)  # well-conditioned
  every = np.arange(k)[::-1].copy()
  values = np.stack([run(every, relay=sigma) for sigma in nodes])
  return np.linalg.solve(np.vander(nodes, increasing=True), values)


@pytest.fixture(scope="module")
def six():
  with jax.enable_x64(True):
    model = model_of(dataclasses.replace(CONFIG, depth=2))
    run = pieces(model, text(rows=1), 6)
    yield run, chains(run, 6)


def falling(n, p):
  return math.prod(n - i for i in range(p))


@pytest.mark.parametrize(("direct", "relay"), [(1.0, 2.0), (2.0, 2.0), (2.0, 1.0), (2.0, 2.5)])
def test_the_mean_over_all_choices_is_that_of_the_chains(six, direct, relay):
  run, z = six
  subsets = list(itertools.combinations(range(6), 3))
  mean = np.mean([run(sorted(s, reverse=True), direct=direct, relay=relay) for s in subsets], axis=0)
  weights = [direct * relay ** (p - 1) * falling(3, p) / falling(6, p) for p in range(1, 7)]
  close(mean, np.tensordot(weights, z, 1), 1e-9)


def test_a_chain_has_at_most_a_chunk_more_than_there_are_layers(six):
  _, z = six
  size = np.linalg.norm(z, axis=1)
  assert (size[:3] > 1e-6).all() and (size[3:] < 1e-10 * size[0]).all()


def test_bernoulli_choices_are_unbiased(six):
  """With s1 = s2 = k / t, over all 2^k masks by their probabilities."""
  run, z = six
  share, every = 0.4, np.arange(6)[::-1].copy()
  mean = 0
  for mask in itertools.product([False, True], repeat=6):
    probability = share ** sum(mask) * (1 - share) ** (6 - sum(mask))
    mean = mean + probability * run(every, active=list(mask), direct=1 / share, relay=1 / share)
  close(mean, z.sum(axis=0), 1e-10)


def test_one_layer_is_unbiased_with_the_better_factor():
  """s1 = k / t and s2 = (k - 1) / (t - 1): a chain has two chunks at most."""
  run = pieces(model_of(dataclasses.replace(CONFIG, depth=1)), text(rows=1), 3)
  subsets = itertools.combinations(range(3), 2)
  mean = np.mean([run(sorted(s, reverse=True), direct=1.5, relay=2.0) for s in subsets], axis=0)
  close(mean, run(np.arange(3)[::-1].copy()), 1e-10)


def test_chunks_must_come_last_first(six):
  run, z = six
  wrong = run(np.arange(6))
  assert np.linalg.norm(wrong - z.sum(axis=0)) > 1e-3 * np.linalg.norm(wrong)


def test_without_relays_it_is_training_with_caches_that_send_nothing_back(six):
  """s2 = 0 and all chunks: the direct terms alone, that is truncated backpropagation."""
  run, z = six
  close(run(np.arange(6)[::-1].copy(), relay=0.0), z[0], 1e-9)


@pytest.mark.parametrize(("cap", "relay"), [(2.0, 2.0), (None, 3.0), (1.0, 1.0), (8.0, 3.0)])
def test_compensation_is_k_over_t_and_that_of_relays_is_capped(cap, relay, monkeypatch):
  """Two of six chunks: s1 = 3, s2 = 3 or its cap, at the chunks that are drawn."""
  model, batch, key, seen = shape_of(CONFIG), text(), jax.random.key(3), []
  monkeypatch.setattr(seco, "value_and_grad", lambda *args, **how: seen.append(how) or (0.0, args[1]))
  for sampling in seco.SAMPLING:
    seco.gradient(chunk=TIME // 6, visited=2, cap=cap, sampling=sampling)(model, batch, 0, key)
    how, (order, active) = seen.pop(), seco.choose(key, 6, 2, sampling)
    assert (how["direct"], how["relay"]) == (3.0, relay)
    np.testing.assert_array_equal(how["order"], order)
    np.testing.assert_array_equal(how["active"], active)


def test_any_chunk_wise_loss_will_do_and_what_comes_back_is_summed_in_float32():
  """Every one of 400 chunks sends 1 back to all before it, through a cache in 16 bits, where 256 + 1 = 256."""

  def chunk_loss(w, cache, part, start):
    before = jnp.where(jnp.arange(400) < start, cache[0], 0).astype(jnp.float32).sum()
    return before, jax.lax.dynamic_update_slice_in_dim(cache, (w * part)[None, None].astype(cache.dtype), start, 1)

  run = jax.jit(lambda w, cache, parts: seco.value_and_grad(chunk_loss, w, cache, parts, chunk=1, axis=1))
  half, w = jnp.zeros((1, 400), jnp.bfloat16), jnp.float32(1)
  loss, gradient = run(w, half, jnp.ones(400, jnp.float32))
  assert loss == 400 * 399 / 2 and gradient == pytest.approx(400 * 399 / 2, rel=2**-8)


def test_chosen_chunks_are_different_and_descend():
  for seed in range(5):
    order, active = seco.choose(jax.random.key(seed), 10, 4)
    assert active is None and (np.diff(order) < 0).all() and set(np.asarray(order).tolist()) <= set(range(10))
  order, active = seco.choose(jax.random.key(0), 1000, 300, "bernoulli")
  assert len(order) == 1000 and 240 < int(active.sum()) < 360


def test_the_last_chunk_is_visited_where_asked():
  """And the others as often as each other."""
  keys = jax.vmap(jax.random.key)(jnp.arange(200))
  orders = np.asarray(jax.jit(jax.vmap(lambda key: seco.choose(key, 6, 3, last=True)[0]))(keys))
  assert (orders[:, 0] == 5).all() and (np.diff(orders, axis=1) < 0).all()
  assert np.ptp(np.bincount(orders[:, 1:].ravel(), minlength=5)) < 50
  for seed in range(5):
    assert seco.choose(jax.random.key(seed), 6, 1, "bernoulli", last=True)[1][0]
  model, batch = model_of(), text()
  alone = by_chunks(model, batch, chunk=24, visited=1, last=True)[1]
  order = pieces(model, batch, 2)
  close(alone, order([1], direct=2.0), 1e-10)


def test_chunkflow_is_the_same_gradient(six):
  """With K = 1 of one sequence, by a program of its own."""
  run, _ = six
  model, batch = model_of(dataclasses.replace(CONFIG, depth=2)), text(rows=1)
  row = {name: array[0] for name, array in batch.items()}
  made = chunkflow.materialize(chunkflow.pack([TIME], TIME // 6), [row])
  theirs = jax.jit(lambda model: chunkflow.gradient(attend=masked)(model, made, 0, None)[1])(model)
  close(run(np.arange(6)[::-1].copy()), flat(theirs))


def test_nothing_is_sent_to_a_cache_from_the_chunk_on():
  """Exactly: its own entries and the room behind them are written and masked; what is before it gets something."""
  model, batch = model_of(dataclasses.replace(CONFIG, depth=2)), text(rows=1)
  c, start, stop = model.config, 16, 24
  filled = jax.random.normal(jax.random.key(0), (2, c.depth, 1, TIME, c.kv_heads, c.head_dim))
  part = batch["inputs"][:, start:stop], batch["targets"][:, start:stop]
  how = dict(
    model_of=lambda model: model, frozen=(), share=common.share_of(losses.token_losses, 1), how=(precise, "none")
  )
  loss = lambda cache: common.transformer_loss(model, tuple(cache), part, start, **how)[0]
  size = np.abs(jax.jit(jax.grad(loss))(filled)).max(axis=(1, 2, 4, 5))
  assert (size[:, start:] == 0).all() and (size[:, :start] > 1e-9).all()


def test_a_chunk_attends_to_the_shortest_prefix_of_1_2_4_chunks_or_the_whole_cache():
  """By what is traced: six chunks of eight, of which none meets more keys than the prefix that it needs."""
  seen = set()

  def attend(q, k, v, *, window, start):
    seen.add((q.shape[1], k.shape[1]))
    return precise(q, k, v, window=window, start=start)

  gradient = seco.gradient(chunk=8, attention=attend)
  jax.eval_shape(lambda model: gradient(model, text(), 0, None), model_of())
  assert seen == {(8, 8), (8, 16), (8, 32), (8, 48)}


def test_memory_grows_by_the_cache_alone():
  """From 512 to 2048 tokens in chunks of 128, in float32: by 4 times keys and values and 6 times those of a layer. They
  are kept, held by the layers, sent back and summed. The attention has no scores; jax's has those of a chunk."""
  with jax.enable_x64(False):
    c = dataclasses.replace(CONFIG, context=2048)
    model = random_model(c)

    def attend(q, k, v, *, window, start):
      state = jnp.einsum("bshd,bshe->bhde", k, v)
      return jnp.einsum("bthd,bhde->bthe", q, jnp.repeat(state, c.q_heads // c.kv_heads, axis=1))

    def temporaries(time, way):
      batch = jax.tree.map(jnp.asarray, text(rows=1, time=time))
      return jax.jit(way).lower(model, batch).compile().memory_analysis().temp_size_in_bytes

    chunks = lambda model, batch: seco.gradient(chunk=128, attention=attend)(model, batch, 0, jax.random.key(0))
    plain = lambda m, batch: losses.token_losses(m, m.hidden(batch["inputs"], attention=attend), batch["targets"]).sum()
    ours, naive = ([temporaries(time, way) for time in (512, 2048)] for way in (chunks, jax.grad(plain)))
    layer = 2 * c.kv_heads * c.head_dim * 4
    assert ours[1] - ours[0] < (2048 - 512) * layer * (4 * c.depth + 6)
    assert naive[1] > 3.5 * naive[0] and naive[1] > 2 * ours[1]


def test_a_run_trains_by_it_on_eight_devices_too(tmp_path):
  """In three lines: losses and models are those of training by the loss itself; SpaCO's first loss is the same."""
  with jax.enable_x64(False):
    batch = text(rows=8)

    class Same:
      def __iter__(self):
        return self

      def __next__(self):
        return batch

      def get_state(self):
        return {}

    def curve(name, devices, **how):
      workdir = tmp_path / name
      mesh = meshes.make_mesh({"data": devices}, jax.devices()[:devices])
      options = dict(steps=2, workdir=workdir, compute_dtype="float32", mesh=mesh)
      loss = None if how else losses.language_model_loss
      ways = dict(gradient_fn=seco.gradient(**how)) if how else {}
      plain = None if how else lambda model, batch, step, key: loss(model, batch)
      trained = loop.train(random_model(CONFIG), Same(), plain, optax.sgd(0.1), **options, **ways)
      return [line["loss"] for line in read_metrics(workdir)], flat(trained) - flat(random_model(CONFIG))

    expected, moved = curve("loss", 1)
    for name, devices in (("seco", 1), ("eight", 8)):
      found, ours = curve(name, devices, chunk=16)
      np.testing.assert_allclose(found, expected, rtol=1e-4)
      close(ours, moved, 1e-4)
    assert curve("spaco", 1, chunk=8, visited=2)[0][0] == pytest.approx(expected[0], rel=1e-4)


def test_bad_input():
  model, batch = shape_of(CONFIG), text()
  for how, message in (
    (dict(chunk=0), "chunk is 0"),
    (dict(chunk=8, visited=0), "visited is 0"),
    (dict(chunk=8, visited=7), "visited is 7; the sequence has 6 chunks of 8"),
    (dict(chunk=8, visited=2, sampling="gauss"), "sampling is 'gauss'"),
    (dict(chunk=8, visited=2, cap=-1.0), "cap is -1.0"),
  ):
    with pytest.raises(InputError, match=message):
      by_chunks(model, batch, **how)
  with pytest.raises(InputError, match="models that smear embeddings"):
    by_chunks(shape_of(configs()["nanochat"]), batch, chunk=8)
  with pytest.raises(InputError, match="longer than the model's context of 47 tokens; cut them"):
    by_chunks(shape_of(dataclasses.replace(CONFIG, context=TIME - 1)), batch, chunk=8)
  with pytest.raises(InputError, match="the sequences have no tokens"):
    by_chunks(model, text(time=0), chunk=8)
  key = jax.random.key(0)
  for visited, sampling, message in (
    (0, "uniform", "visited is 0; it must be 1 to 4"),
    (9, "bernoulli", "visited is 9; it must be 1 to 4"),
    (2, "gauss", "sampling is 'gauss'"),
  ):
    with pytest.raises(InputError, match=message):
      seco.choose(key, 4, visited, sampling, last=True)
  cache = jnp.zeros((1, 1, 48)), jnp.zeros((1, 1, 47))
  with pytest.raises(InputError, match="the cache has 47 positions; 6 chunks of 8 need 48"):
    seco.value_and_grad(None, model, cache, jnp.zeros((6, 1)), chunk=8)
