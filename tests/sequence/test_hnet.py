"""The loss on how much is cut, rates by stage, capacities and the rules of the baselines are those of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError
from jaxlab.data import byte_level, packing
from jaxlab.models import HNet, HNetConfig, chunking
from jaxlab.sequence import hnet
from jaxlab.training import losses, optimizers
from jaxlab.training.loop import train
from tests.common import own_losses, random_model, random_tokens

CONFIG = HNetConfig("m1 [T1] m1", (16, 24), (0, 20), (0, 2), ratios=(3.0,), head_dim=8, state=4, chunk=4)
TIME = 12
at_spaces = jax.jit(hnet.at_spaces)


@pytest.fixture(scope="module")
def model():
  return random_model(CONFIG)


@pytest.fixture(scope="module")
def batch():
  return {"inputs": random_tokens(2, TIME, 256), "targets": random_tokens(2, TIME, 256, seed=1)}


def test_the_ratio_loss_is_one_at_its_aim_and_its_gradient_is_that_of_g_alone():
  """d/dG = N/(N-1) (N F - 1); F, a count, has none. Numbers by finite differences in float64."""
  with jax.enable_x64(True):
    cut, loss = np.arange(12) % 4 == 0, jax.jit(jax.value_and_grad(hnet.ratio_loss), static_argnums=2)
    aim, _ = loss(np.full((1, 12), 0.25), cut[None], 4.0)
    np.testing.assert_allclose(aim, 1, rtol=1e-12)
    for kept, ratio in ((cut, 6.0), (np.ones(12, bool), 3.0), (np.arange(12) == 0, 6.0)):
      p, f = np.linspace(0.1, 0.9, 12)[None], float(kept.mean())
      above, below = (float(loss(p + change, kept[None], ratio)[0]) for change in (1e-6, -1e-6))
      slope = (above - below) / 2e-6
      np.testing.assert_allclose(slope, ratio / (ratio - 1) * (ratio * f - 1), rtol=1e-6)
      np.testing.assert_allclose(loss(p, kept[None], ratio)[1], slope / 12, rtol=1e-6)


def test_padding_has_no_part_in_it():
  p, cut = np.array([[1.0, 0.2, 0.9, 0.3]], np.float32), np.array([[True, False, True, False]])
  valid = np.array([[True, True, False, False]])
  loss = jax.jit(hnet.ratio_loss, static_argnums=2)
  np.testing.assert_allclose(loss(p, cut, 3.0, valid), loss(p[:, :2], cut[:, :2], 3.0), rtol=1e-6)


def test_rates_of_stages_are_those_of_the_papers_table():
  shape = lambda widths, ratios: HNetConfig(
    {1: "m4 [T22] m4", 2: "m4 [T1m4 [T27] m4T1] m4"}[len(ratios)],
    widths,
    (0, 4096, 5504)[: len(widths)],
    (16, 16, 16)[: len(widths)],
    ratios=ratios,
  )
  np.testing.assert_allclose(hnet.multipliers(shape((1024, 1536), (6.0,))), (2.63, 0.88), atol=0.005)
  np.testing.assert_allclose(hnet.multipliers(shape((1024, 1536, 2048), (3.0, 3.0))), (3.03, 1.43, 0.71), atol=0.006)


def test_a_step_moves_each_stage_by_its_own_rate_and_only_matrices_decay(model):
  """Adam's first update is its rate, whatever the gradient; zero gradients leave the decay alone."""
  factors = (2.0, 0.5)
  made = hnet.optimizer(CONFIG, 1e-2, steps=10, factors=factors, warmup=0.0, weight_decay=0.1)
  update = jax.jit(lambda grads: made.update(grads, made.init(model), model)[0])
  filled = lambda value: jax.tree.map(lambda a: np.full(a.shape, value, a.dtype), model)
  decay, moved = (jax.tree.map(np.asarray, update(filled(value))) for value in (0, 1))
  moved = jax.tree.map(np.subtract, moved, decay)
  inner, outer = moved.stage.inner, moved.stage
  for tree, factor in (
    (inner, 0.5),
    (outer.encoder, 2.0),
    (outer.chunker, 2.0),
    (moved.embedding, 2.0),
    (moved.head, 2),
  ):
    for leaf in jax.tree.leaves(tree):
      np.testing.assert_allclose(leaf, -1e-2 * factor, rtol=1e-3)
  same = lambda a, b, factor: np.testing.assert_allclose(a, -1e-3 * factor * b, rtol=1e-4, atol=1e-9)
  same(decay.stage.chunker.q[...], model.stage.chunker.q[...], 2.0)
  same(decay.stage.inner.encoder.runs[0].mlp.up.weight[...], model.stage.inner.encoder.runs[0].mlp.up.weight[...], 0.5)
  kept = optimizers.by_name(lambda name: name, model)
  still = [name for name, leaf in zip(jax.tree.leaves(kept), jax.tree.leaves(decay), strict=True) if not leaf.any()]
  assert {name.rpartition(".")[2] for name in still} == {"gain", "bias", "conv_bias", "dt_bias", "a_log", "skip", "pad"}


def test_gradients_reach_the_router_through_smoothing_and_through_confidence(model, batch, monkeypatch):
  """By each alone, and by both as their sum: what is multiplied by 1 forwards can be left out backwards."""

  smooth, straight_through, stop = chunking.smooth, chunking.straight_through, jax.lax.stop_gradient
  ways = {
    "both": {},
    "smoothing": dict(straight_through=lambda c: stop(straight_through(c))),
    "confidence": dict(smooth=lambda z, probability, starts=None: smooth(z, stop(probability), starts)),
  }

  @jax.jit
  def gradients(model):
    found = {}
    for way, changed in ways.items():
      with monkeypatch.context() as patch:
        for name, function in changed.items():
          patch.setattr(chunking, name, function)
        nats = lambda model: losses.language_model_loss(model, batch)[0]
        found[way] = jax.grad(nats)(model).stage.chunker.q[...]
    return found

  found = gradients(model)
  assert all(float(jnp.abs(found[way]).max()) > 1e-6 for way in ways)
  np.testing.assert_allclose(found["smoothing"] + found["confidence"], found["both"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("token_losses", [losses.token_losses, own_losses])
def test_the_loss_is_that_of_the_bytes_and_of_what_is_cut(model, batch, token_losses):
  """Also by a loss of one's own."""
  loss = hnet.loss_of(CONFIG, TIME, slack=None, token_losses=token_losses)

  @jax.jit
  def by_hand(model, batch):
    x, (chunks,) = model.chunked(batch["inputs"])
    nats = losses.mean_loss(token_losses(model, (x, None), batch["targets"]), batch["targets"])
    return nats, hnet.ratio_loss(chunks.probability, chunks.cut, 3.0), chunks

  value, metrics = jax.jit(lambda model, batch: loss(model, batch, 0, None))(model, batch)
  nats, ratio, chunks = by_hand(model, batch)
  np.testing.assert_allclose(value, nats + 0.03 * ratio, rtol=1e-5)
  np.testing.assert_allclose(metrics["share_0"], chunks.cut.mean(), rtol=1e-5)
  assert metrics["overflow_0"] == 0


def test_a_row_of_one_byte_is_a_chunk_whatever_the_byte(model):
  """Also those that no UTF-8 has, and the marks of documents."""
  every = np.arange(256, dtype=np.int32)[:, None]
  both = np.concatenate([every, every[::-1]], axis=1)
  x, (chunks,), longer = jax.jit(lambda model: (*model.chunked(every), model.chunked(both)[0]))(model)
  assert (chunks.count == 1).all() and len(np.unique(np.round(x, 4), axis=0)) == 256
  np.testing.assert_allclose(longer[:, :1], x, rtol=1e-4, atol=1e-4)


def test_the_loss_demotes_and_says_how_much(model):
  """Of 128 cuts the first 64 have room."""
  assert hnet.capacities(CONFIG, 2048) == (1024,) and hnet.capacities(CONFIG, TIME) == (TIME,)
  two = HNetConfig("m1[m1[m1]m1]m1", (8,) * 3, (0,) * 3, (0,) * 3, ratios=(3.0, 3.0), head_dim=8)
  assert hnet.capacities(two, 2048, slack=2.0, multiple=32) == (1376, 480)
  assert hnet.capacities(CONFIG, 256, slack=0.5) == (64,)
  tight = hnet.loss_of(CONFIG, 256, slack=0.5, cutter=hnet.every(2))
  tokens = random_tokens(1, 256, 256)
  _, metrics = jax.jit(lambda model: tight(model, {"inputs": tokens, "targets": tokens}, 0, None))(model)
  assert (metrics["share_0"], metrics["probability_0"], metrics["overflow_0"]) == (64 / 256, 128 / 256, 64 / 128)


@given(arrays(np.uint8, (1, 12)))
def test_spaces_are_those_of_spacebyte(ids):
  like = lambda b: not (chr(b).isalnum() and b < 128) and not 0x80 <= b < 0xC0
  expected = [(like(b) and not (t and like(ids[0, t - 1]))) or b == byte_level.BOS for t, b in enumerate(ids[0])]
  assert at_spaces(ids.astype(np.int32))[0].tolist() == expected


def test_a_sentence_is_cut_at_its_spaces_and_every_third_byte():
  ids = np.asarray(byte_level.encode("A man, old."), np.int32)[None]
  assert np.flatnonzero(at_spaces(ids)[0]).tolist() == [1, 5, 10]
  assert np.flatnonzero(jax.jit(hnet.every(3))(ids)[0]).tolist() == [0, 3, 6, 9]


def test_a_users_own_text_trains_in_three_lines(tmp_path):
  """The share that is cut comes down from where it starts, and the loss falls."""
  small = jax.jit(lambda: HNet(CONFIG, jax.random.key(0)))()
  rows = packing.training_rows(byte_level.tokens_of(["the cat sat on the mat. " * 20] * 3), row=32, seed=0)
  seen, mesh = [], meshes.make_mesh({"data": 1}, jax.devices()[:1])
  loss, made = hnet.loss_of(CONFIG, 32, slack=None), hnet.optimizer(CONFIG, 1e-2, steps=30)
  options = dict(steps=30, workdir=tmp_path, compute_dtype="float32", progress=seen.append, mesh=mesh)
  train(small, packing.batches(rows, 8), loss, made, **options)
  assert seen[-1]["nats"] < seen[0]["nats"] - 1 and seen[-1]["share_0"] < seen[0]["share_0"]


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: hnet.ratio_loss(jnp.ones((1, 2)), jnp.ones((1, 2), bool), 1.0), "ratio is 1.0; chunks have more than 1"),
    (lambda: hnet.optimizer(CONFIG, 1e-3, steps=2, factors=(1.0,)), "2 stages: give one for each"),
    (lambda: hnet.every(0), "size is 0"),
    (lambda: hnet.capacities(CONFIG, TIME, multiple=0), "multiple is 0"),
    (lambda: hnet.capacities(CONFIG, 0), "length is 0"),
    (lambda: hnet.capacities(CONFIG, TIME, slack=0), "slack is 0"),
  ],
)
def test_bad_requests_are_named(call, message):
  with pytest.raises(InputError, match=message):
    call()
