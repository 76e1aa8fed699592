"""The network in batches of fixed shapes is the one whose rows are cut where they are cut, forwards and in steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import HNet, HNetConfig, Mamba2, Mamba2Config, generate, hub
from jaxlab.models.chunking import chunks_of, smooth
from jaxlab.models.generate import complete
from jaxlab.models.hnet import DECODER, How
from jaxlab.models.hnet_layers import Side, rotations
from jaxlab.training import optimizers
from jaxlab.training.loop import cast
from tests.common import plain_attention, random_model, random_tokens

SHAPE = dict(vocab_size=64, head_dim=8, state=4, chunk=4)
CONFIG = HNetConfig("m1 [t1 [T2] M1] m1", (16, 16, 24), (0, 20, 24), (0, 2, 3), (0, 3, None), (3.0, 3.0), **SHAPE)
SMALL = HNetConfig("m1 [T1] m1", (16, 16), (0, 20), (0, 2), ratios=(3.0,), **SHAPE)
ROWS, TIME = 3, 14
TOKENS = np.asarray(random_tokens(ROWS, TIME))
EXACT = dict(rtol=1e-4, atol=1e-4)

compiled = jax.jit(lambda model, tokens, **options: model.chunked(tokens, **options), static_argnames="capacities")
forward = lambda *args, **options: jax.tree.map(np.asarray, compiled(*args, **options))
logits_of = jax.jit(lambda model, x: model.logits(x))
empty_state = jax.jit(lambda model: model.empty_state(ROWS, TIME))
step = jax.jit(lambda model, tokens, state, given=None: model.step(tokens, state, boundaries=given))
prefill = jax.jit(lambda model, tokens, lengths: model.prefill(tokens, lengths, capacity=TIME + 4))


@pytest.fixture(scope="module")
def model():
  return random_model(CONFIG)


@pytest.fixture(scope="module")
def small():
  return random_model(SMALL)


@pytest.fixture(scope="module")
def whole(model):
  """(final states, chunks, logits)."""
  x, chunks = forward(model, TOKENS)
  return x, chunks, np.asarray(logits_of(model, x))


def test_the_rows_are_cut_each_elsewhere(whole):
  """What follows would show nothing if all were cut alike, everywhere or nowhere."""
  _, (outer, inner), _ = whole
  assert len({tuple(row) for row in np.asarray(outer.cut).tolist()}) == ROWS
  assert 0.2 < float(outer.cut.mean()) < 0.9 and float(inner.count.max()) > 2
  assert (inner.count < outer.count).any() and bool(outer.cut[:, 0].all())


def by_definition(stage, x):
  """A stage for one row in NumPy: ragged, with loops; the layers' stacks are as they are."""
  c, (time, width) = stage.config, x.shape

  @jax.jit
  def layers(stack, x):
    side = Side(jnp.float32, *rotations(c, stage.index, jnp.arange(time), jnp.float32), plain_attention, None)
    return stack(x, side)[0]

  run = lambda stack, x: np.asarray(layers(stack, x[None]))[0]
  pad = [] if stage.pad is None else [np.tile(stage.pad[...], (time, 1))]
  h = run(stage.encoder, np.concatenate([x, *pad], axis=-1))
  if stage.inner is None:
    return h[:, :width]
  chunker = jax.tree.map(np.asarray, stage.chunker)
  q, k = h[:-1] @ chunker.q[...], h[1:] @ chunker.k[...]
  cosine = (q * k).sum(-1) / np.linalg.norm(q, axis=-1) / np.linalg.norm(k, axis=-1)
  p = np.concatenate([[1.0], (1 - cosine) / 2])
  cut = np.flatnonzero(p > 0.5).tolist()
  z, s, out = by_definition(stage.inner, h[cut]), 0.0, []
  for t in range(time):
    if t in cut:
      share = np.clip(p[t], 1e-4, 1 - 1e-4)
      s = share * z[cut.index(t)] + (1 - share) * s
    out.append(s + h[t] @ chunker.residual[...] + chunker.bias[...])
  return run(stage.decoder, np.stack(out).astype(np.float32))[:, :width]


def test_a_batch_is_its_rows_by_definition(model, whole):
  actual = by_definition(model.stage, np.asarray(model.embed(jnp.asarray(TOKENS[1:2]))[0]))
  np.testing.assert_allclose(whole[0][1], actual, **EXACT)


def test_room_for_as_many_chunks_as_there_are_changes_nothing(small):
  """Outputs, and the gradients of all parameters through routing, smoothing and upsampling; nor does recomputation."""
  _, (chunks,) = forward(small, TOKENS)
  fits = int(chunks.count.max())
  assert fits < TIME

  @functools.partial(jax.jit, static_argnames=("capacities", "remat"))
  def gradient(model, capacities, remat):
    loss = lambda model: (model(jnp.asarray(TOKENS), capacities=capacities, remat=remat)[..., :5] ** 2).mean()
    return jax.value_and_grad(loss)(model)

  exact, packed = gradient(small, None, "none"), gradient(small, (fits,), "dots")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), exact, packed)
  assert all(float(jnp.abs(a).max()) > 1e-5 for a in jax.tree.leaves(exact[1].stage.chunker))


def test_too_little_room_demotes_the_last_cuts_and_leaves_what_is_before_them(model, whole):
  x, (outer, inner) = forward(model, TOKENS, capacities=(3, 3))
  exact = whole[1][0]
  assert (outer.count == 3).all() and (inner.valid.sum(axis=1) == 3).all()
  demoted = jax.jit(chunks_of, static_argnums=2)(exact.probability, exact.valid, 3)
  assert (outer.wanted == exact.cut).all() and (outer.cut == demoted.cut).all()
  for row, cuts in enumerate(np.asarray(exact.cut)):
    fourth = int(np.flatnonzero(cuts)[3])
    np.testing.assert_allclose(x[row, :fourth], whole[0][row, :fourth], **EXACT)
    assert np.abs(x[row, fourth:] - whole[0][row, fourth:]).max() > 1e-3


@pytest.mark.parametrize("given", [False, True], ids=["learned", "given"])
def test_no_output_depends_on_a_later_byte(model, given):
  """Bit for bit, wherever the rows are cut."""
  boundaries = np.random.default_rng(3).random(TOKENS.shape) < 0.4 if given else None
  options = dict(boundaries=boundaries) if given else {}
  x, _ = forward(model, TOKENS, **options)
  for t in (1, 6, TIME - 1):
    changed, _ = forward(model, (TOKENS + (np.arange(TIME) == t)) % 64, **options)
    np.testing.assert_array_equal(changed[:, :t], x[:, :t])
    assert np.abs(changed[:, t:] - x[:, t:]).max() > 1e-3


def test_decoding_byte_by_byte_gives_the_same_logits(model, whole):
  """Rows step their inner stages at different times."""
  state = empty_state(model)
  for t in range(TIME):
    logits, state = step(model, TOKENS[:, t], state)
    np.testing.assert_allclose(logits, whole[2][:, t], **EXACT)
  np.testing.assert_array_equal(state.inner.length, whole[1][0].count)
  np.testing.assert_array_equal(state.inner.inner.length, whole[1][1].count)


def test_a_prompt_is_read_at_once_whatever_stands_behind_it(model, whole):
  """Rows of different lengths: the state is that of each row's own last token, and goes on from there."""
  lengths = np.array([5, 1, 12], np.int32)
  padded = np.where(np.arange(TIME) < lengths[:, None], TOKENS, 63).astype(np.int32)
  logits, state = prefill(model, padded, lengths)
  np.testing.assert_allclose(np.asarray(logits)[:, 0], whole[2][np.arange(ROWS), lengths - 1], **EXACT)
  for more in range(2):
    logits, state = step(model, TOKENS[np.arange(ROWS), lengths + more], state)
    np.testing.assert_allclose(logits, whole[2][np.arange(ROWS), lengths + more], **EXACT)


def test_cuts_that_are_given_are_kept_in_steps_too(model):
  given = np.random.default_rng(4).random(TOKENS.shape) < 0.4
  x, (outer, _) = forward(model, TOKENS, boundaries=given)
  assert (outer.cut == (given | (np.arange(TIME) == 0))).all() and set(np.unique(outer.probability)) == {0.0, 1.0}
  expected, state = np.asarray(logits_of(model, x)), empty_state(model)
  for t in range(6):
    logits, state = step(model, TOKENS[:, t], state, given[:, t])
    np.testing.assert_allclose(logits, expected[:, t], **EXACT)


def test_documents_in_a_row_are_as_if_they_were_alone_and_padding_is_never_cut(model, whole):
  """Convolutions, states, attention, routing and smoothing all begin anew; the second one begins inside a chunk."""
  starts = np.tile(np.isin(np.arange(TIME), (0, 5)), (ROWS, 1))
  lengths = np.array([9, TIME, 4], np.int32)
  x, (outer, inner) = forward(model, TOKENS, starts=starts, lengths=lengths)
  second, _ = forward(model, np.roll(TOKENS, -5, axis=1))
  np.testing.assert_allclose(x[1, :5], whole[0][1, :5], **EXACT)
  np.testing.assert_allclose(x[1, 5:], second[1, :-5], **EXACT)
  np.testing.assert_allclose(x[0, 5:9], second[0, :4], **EXACT)
  assert bool(outer.cut[1, 5]) and not whole[1][0].cut[:, 5].all()
  assert not outer.cut[0, 9:].any() and (outer.valid.sum(axis=1) == lengths).all()
  np.testing.assert_array_equal(inner.valid.sum(axis=1), outer.count)


def test_generation_is_the_argmax_of_the_whole_forward(small):
  made = generate(small, TOKENS[:2, :7], np.array([7, 4]), tokens=4, decoder=DECODER)
  row = np.asarray(TOKENS[1, :4]).tolist()
  for _ in range(4):
    padded = np.tile(np.array([row + [0] * (TIME - len(row))], np.int32), (ROWS, 1))
    row.append(int(np.argmax(logits_of(small, forward(small, padded)[0])[0, len(row) - 1])))
  assert made[1].tolist() == row[4:]
  assert complete(small, [row[:4]], tokens=4, decoder=DECODER)[0].tokens == row[4:]


def test_it_starts_as_the_code_of_the_paper_does():
  """Branches that end in stage s: 0.02 over the root of the branches up to there; the other maps 0.02."""
  config = HNetConfig("m2 [T1 m1 [T3] M1] m2", (64, 64, 128), (0, 64, 128), (1, 4, 4), ratios=(3.0, 3.0), head_dim=32)

  @jax.jit
  def measured():
    """What is looked at, so that no other parameter is drawn."""
    model = HNet(config, jax.random.key(0))
    spread = lambda linear: linear.weight[...].std()
    outer, middle, main = model.stage, model.stage.inner, model.stage.inner.inner
    assert middle.pad is None
    runs = outer.encoder.runs[0], outer.decoder.runs[0], middle.encoder.runs[1], main.encoder.runs[0]
    mixers = [(spread(run.mixer.out), spread(run.mixer.inputs)) for run in runs]
    ends = model.embedding[...].std(), spread(model.head), spread(main.encoder.runs[0].mlp.down)
    return ends, mixers, outer.chunker.q[...], main.pad[...]

  (embedding, head, down), mixers, q, pad = jax.tree.map(np.asarray, measured())
  assert abs(embedding - 1) < 0.05 and abs(head / 0.02 - 1) < 0.05
  for (out, inputs), branches in zip(mixers, (4, 4, 9, 15), strict=True):
    assert abs(out / (0.02 / branches**0.5) - 1) < 0.05
    assert abs(inputs / 0.02 - 1) < 0.05
  assert abs(down / (0.02 / 15**0.5) - 1) < 0.05
  np.testing.assert_array_equal(q, np.eye(64))
  assert pad.shape == (64,) and not pad.any()


def test_a_layout_without_brackets_is_an_ordinary_network():
  config = HNetConfig("m2 T1", (16,), (24,), (2,), (None,), (), **SHAPE)
  model = random_model(config)
  logits = np.asarray(logits_of(model, forward(model, TOKENS)[0]))
  state = empty_state(model)
  for t in range(3):
    out, state = step(model, TOKENS[:, t], state)
    np.testing.assert_allclose(out, logits[:, t], **EXACT)
  assert len(config.stages) == 1 and state.inner is None


def test_a_gate_of_zeros_halves_what_attention_says():
  """sigmoid(0) = 1/2; with other weights it decides by the token, in steps as in rows."""
  config = HNetConfig("t1", (16,), (0,), (2,), (None,), (), gated=True, **SHAPE)
  model, plain = random_model(config), random_model(dataclasses.replace(config, gated=False))
  logits, state = np.asarray(logits_of(model, forward(model, TOKENS)[0])), empty_state(model)
  for t in range(3):
    one, state = step(model, TOKENS[:, t], state)
    np.testing.assert_allclose(one, logits[:, t], **EXACT)
  closed, mixer = jax.tree.map(lambda a: a, model), plain.stage.encoder.runs[0].mixer
  for name in ("inputs", "norm"):
    setattr(mixer, name, getattr(closed.stage.encoder.runs[0].mixer, name))
  closed.stage.encoder.runs[0].mixer.gate.weight[...] *= 0
  mixer.out.weight[...] = closed.stage.encoder.runs[0].mixer.out.weight[...] / 2
  plain.embedding, plain.stage.encoder.norm = closed.embedding, closed.stage.encoder.norm
  np.testing.assert_allclose(forward(plain, TOKENS)[0], forward(closed, TOKENS)[0], **EXACT)
  assert float(jnp.abs(forward(closed, TOKENS)[0] - forward(model, TOKENS)[0]).max()) > 1e-3


def test_half_of_every_head_is_rotated():
  cos, sin = rotations(dataclasses.replace(CONFIG, heads=(2, 2, 2)), 2, jnp.arange(5), jnp.float32)
  turned = np.arange(5)[:, None] * 10000.0 ** (-np.arange(3) / 3)
  np.testing.assert_allclose(cos, np.concatenate([np.cos(turned), np.ones((5, 3))], axis=1), atol=1e-6)
  np.testing.assert_allclose(sin, np.concatenate([np.sin(turned), np.zeros((5, 3))], axis=1), atol=1e-6)


@pytest.mark.parametrize("option", ["smoothing", "straight_through"])
def test_the_options_of_the_ablations_are_the_formulas(small, option):
  """Without smoothing s = z; without the straight-through estimate y is multiplied by c. In steps too."""
  other = jax.tree.map(lambda a: a, small)
  other.stage.config = dataclasses.replace(SMALL, **{option: False})
  side = Side(jnp.float32, None, None, None, None)
  x, (chunks,) = forward(other, TOKENS)
  cut = np.flatnonzero(chunks.cut[0])

  @jax.jit
  def formulas(model):
    stage = model.stage
    h = stage.encoder(model.embed(jnp.asarray(TOKENS[:1])), side)[0]
    z, *_ = stage.inner(h[:, cut], None, None, None, How())
    if option == "straight_through":
      z = smooth(z, jnp.asarray(chunks.probability[:1, cut]))
    weight = 1.0 if option == "smoothing" else chunks.confidence[0, :, None]
    y = weight * z[0, np.cumsum(chunks.cut[0]) - 1] + stage.chunker.around(h[0])
    return stage.decoder(y[None], side)[0][0]

  np.testing.assert_allclose(x[0], formulas(other), **EXACT)
  logits, state, expected = None, empty_state(other), np.asarray(logits_of(other, x))
  for t in range(4):
    logits, state = step(other, TOKENS[:, t], state)
    np.testing.assert_allclose(logits, expected[:, t], **EXACT)


def test_flops_are_counted_by_the_positions_that_reach_a_layer():
  """By hand, for a Mamba-2 layer around a transformer's on a third of the positions."""
  config = HNetConfig("m1 [T1] m1", (32, 64), (0, 96), (1, 2), ratios=(3.0,), vocab_size=256, head_dim=16, state=8)
  mamba = 32 * (3 * 64 + 2 * 8 + 4) * 6 + 3 * (2 * 64 * (8 + 64) + 4 * 64 * 8)
  transformer = 6 * (4 * 64 * 64 + 3 * 64 * 96) + 12 * 64 * (32 + 0)
  between = 6 * 3 * 32 * 32
  assert config.flops_per_token(96) == pytest.approx(6 * 32 * 256 + 2 * mamba + between + transformer / 3, rel=1e-9)
  assert config.flops_per_token(96, (0.5,)) > config.flops_per_token(96)
  assert config.depth == 3 and config.width == 32


@pytest.mark.parametrize("kind", [HNet, Mamba2])
def test_a_saved_model_comes_back(kind, small, tmp_path):
  saved = small if kind is HNet else random_model(Mamba2Config(64, 2, 16, head_dim=8, state=4))
  hub.save(saved, tmp_path)
  loaded = hub.load(tmp_path, kind=kind)
  assert type(loaded) is kind and loaded.config == saved.config
  jax.tree.map(np.testing.assert_array_equal, saved, loaded)
  with pytest.raises(InputError, match=f"holds a {kind.__name__}, not a Transformer; load it by kind={kind.__name__}"):
    hub.load(tmp_path)
  assert hub.load(tmp_path, kind=kind, dtype="bfloat16").dtype == jnp.bfloat16
  with pytest.raises(InputError, match="has no nanochat layout"):
    hub.save(saved, tmp_path, layout="nanochat")


def test_sixteen_bits_leave_routing_alone(model):
  """Matrices of the layers are cast, what decides on cuts and the residual stream are not."""
  half = cast(model, "bfloat16")
  chunker = half.stage.chunker
  assert {a.dtype for a in jax.tree.leaves(chunker)} == {jnp.dtype("float32")}
  assert half.stage.encoder.runs[0].mixer.inputs.weight.dtype == jnp.bfloat16
  x, chunks = jax.eval_shape(lambda half: half.chunked(jnp.asarray(TOKENS)), half)
  assert x.dtype == jnp.bfloat16 and chunks[0].probability.dtype == jnp.float32
  labels = optimizers.labels(model)
  assert set(jax.tree.leaves(labels.stage.chunker)) == {"gain"} and labels.stage.inner.inner.pad.get_value() == "gain"


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(layout="m4 [T2"), r"model.layout is 'm4 \[T2'; write it as"),
    (dict(layout="x4"), "of m, M, t and T with numbers"),
    (dict(layout="m0"), "write it as"),
    (dict(widths=(16, 16)), "has 3 stages: give 3 entries"),
    (dict(widths=(16, 8, 24)), "at least as wide as the one around it"),
    (dict(ratios=(3.0,)), "give 2 entries"),
    (dict(ratios=(3.0, 1.0)), "chunks have more than 1 position"),
    (dict(heads=(2, 2, 5)), r"model.heads\[2\] x 4=20 must divide"),
    (dict(mlp_widths=(0, 0, 24)), r"model.mlp_widths\[1\] is 0"),
    (dict(windows=(3,)), "model.windows is"),
    (dict(routing="best"), "model.routing is 'best'"),
    (dict(head_dim=7), "head_dim=7 must divide"),
  ],
)
def test_impossible_shapes_are_named(change, message):
  with pytest.raises(InputError, match=message):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda model: model(TOKENS, capacities=(4,)), "the model has 2 stages with chunks"),
    (lambda model: model(TOKENS[:1, :0]), r"rows have no token \(tokens \(1, 0\)\)"),
    (lambda model: model(TOKENS, boundaries=TOKENS[:, 1:] > 3), r"boundaries has shape \(3, 13\); tokens of \(3, 14\)"),
    (lambda model: model(TOKENS, starts=TOKENS[0] > 3), r"starts has shape \(14,\)"),
    (lambda model: model(TOKENS, lengths=jnp.array([3])), r"lengths has shape \(1,\); tokens of \(3, 14\) need \(3,\)"),
    (lambda model: model.prefill(TOKENS, capacity=5), "the prompt has 14 tokens, the capacity is 5"),
    (lambda model: model.prefill(TOKENS[:, :0], capacity=5), "rows have no token"),
    (lambda model: model.step(TOKENS[:, 0], None, boundaries=TOKENS > 3), r"boundaries has shape \(3, 14\)"),
  ],
)
def test_requests_that_do_not_fit_are_named(model, call, message):
  with pytest.raises(InputError, match=message):
    jax.eval_shape(call, model)


def test_a_network_without_chunks_cannot_be_cut():
  flat = HNetConfig("m1", (16,), (0,), (0,), ratios=(), vocab_size=64, head_dim=8)
  with pytest.raises(InputError, match="no stage with chunks"):
    jax.eval_shape(lambda: HNet(flat, jax.random.key(0)))(TOKENS, boundaries=TOKENS > 3)
