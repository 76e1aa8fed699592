import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxlab.core.checks import InputError
from jaxlab.models import Mamba2, Mamba2Config
from jaxlab.models.mamba2 import run_blocks, segment_sums, ssd, ssd_step
from jaxlab.training import losses, optimizers
from jaxlab.training.loop import cast
from tests.common import random_model, random_tokens

CONFIG = Mamba2Config(vocab_size=64, depth=2, width=16, head_dim=8, state=6, chunk=4)
TOKENS = random_tokens(2, 11)
TIME, HEADS, SIZE, STATE = 13, 3, 4, 5


@pytest.fixture(scope="module")
def model():
  return random_model(CONFIG)


@pytest.fixture(scope="module")
def logits(model):
  return jax.jit(lambda model: model(TOKENS))(model)


def inputs(seed=0):
  """(x, dt, a, b, c, initial state) in NumPy's float64."""
  random = np.random.default_rng(seed)
  x, b, c = (random.normal(size=(2, TIME, *rest)) for rest in ((HEADS, SIZE), (STATE,), (STATE,)))
  dt, a = random.uniform(0.01, 1, (2, TIME, HEADS)), -random.uniform(0.5, 4, HEADS)
  return x, dt, a, b, c, random.normal(size=(2, HEADS, SIZE, STATE))


def by_scan(x, dt, a, b, c, initial):
  """The recurrence as it is defined, a token at a time and written out without `ssd_step`."""

  def one(state, parts):
    x, dt, b, c = parts
    state = jnp.exp(dt * a)[..., None, None] * state + jnp.einsum("bh,bhp,bn->bhpn", dt, x, b)
    return state, jnp.einsum("bhpn,bn->bhp", state, c)

  state, y = jax.lax.scan(one, initial, tuple(jnp.moveaxis(v, 1, 0) for v in (x, dt, b, c)))
  return jnp.moveaxis(y, 0, 1), state


def test_chunks_scan_and_steps_are_one_recurrence():
  """Chunks that divide, that do not, of one token and longer than the row; from a state and from zero.

  In float64, and in float32 to its digits.
  """
  with jax.enable_x64(True):
    *given, initial = map(jnp.asarray, inputs())
    expected, last = jax.jit(by_scan)(*given, initial)
    for chunk in (1, 4, 13, 64):
      y, state = ssd(*given, chunk=chunk, initial=initial)
      np.testing.assert_allclose(y, expected, atol=1e-12)
      np.testing.assert_allclose(state, last, atol=1e-12)
    np.testing.assert_allclose(ssd(*given, chunk=4)[0], by_scan(*given, 0 * initial)[0], atol=1e-12)
    x, dt, a, b, c = given
    state = initial
    for t in range(TIME):
      y, state = ssd_step(state, x[:, t], dt[:, t], a, b[:, t], c[:, t])
      np.testing.assert_allclose(y, expected[:, t], atol=1e-12)
    half, middle = ssd(*(v if v.ndim == 1 else v[:, :6] for v in given), chunk=4, initial=initial)
    rest, _ = ssd(*(v if v.ndim == 1 else v[:, 6:] for v in given), chunk=4, initial=middle)
    np.testing.assert_allclose(jnp.concatenate([half, rest], axis=1), expected, atol=1e-12)
  y, state = jax.jit(lambda *given: ssd(*given[:5], chunk=4, initial=given[5]))(*(np.float32(v) for v in inputs()))
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("begins", [(0, 5), (3, 4, 8), (12,)], ids=str)
def test_documents_in_a_row_are_as_if_they_were_alone(begins):
  """States and convolutions; where documents begin inside chunks, at their ends, and two in one; float64."""
  with jax.enable_x64(True):
    *given, initial = map(jnp.asarray, inputs())
    resets = jnp.zeros((2, TIME), bool).at[:, jnp.array(begins)].set(True)
    y, state = ssd(*given, chunk=4, initial=initial, resets=resets)
    r = Mamba2(CONFIG, jax.random.key(0)).blocks.recurrence
    r = jax.tree.map(lambda a: a[0], r)
    u = jnp.asarray(np.random.default_rng(1).normal(size=(2, TIME, r.conv.shape[1])))
    convolved = r.convolve(u, resets=resets)
    for first, last in zip((0, *begins), (*begins, TIME), strict=True):
      part = [v if v.ndim == 1 else v[:, first:last] for v in given]
      start = initial if first == 0 and 0 not in begins else None
      if first < last:
        alone, end = ssd(*part, chunk=4, initial=start)
        np.testing.assert_allclose(y[:, first:last], alone, atol=1e-12)
        np.testing.assert_allclose(convolved[:, first:last], r.convolve(u[:, first:last]), atol=1e-12)
    np.testing.assert_allclose(state, end, atol=1e-12)


def test_a_row_leaves_the_state_of_its_own_length(model):
  """What is past a row's end is read by nobody: not by the state, nor by the next token's convolution."""
  block = jax.tree.map(lambda a: a[0], model.blocks)
  _, u, dt = block.project(model.embed(TOKENS))
  lengths = jnp.array([2, 9])
  y, kept = block.recurrence.read(u, dt, lengths=lengths)
  for row, length in enumerate(lengths.tolist()):
    part = slice(row, row + 1), slice(length)
    alone, state = block.recurrence.read(u[part], dt[part])
    np.testing.assert_allclose(y[part], alone, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[row], b[0], rtol=1e-5, atol=1e-5), kept, state)  # noqa: B023


def test_gradients_are_those_of_finite_differences():
  with jax.enable_x64(True):
    given = tuple(v[:1, :5] if v.ndim > 2 and v.shape[1] == TIME else v[:1] if v.ndim > 1 else v for v in inputs())
    forward = jax.jit(lambda *v: ssd(*v[:5], chunk=3, initial=v[5]))
    check_grads(forward, given, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_segment_sums_keep_small_values_after_large_ones():
  """In float32 a difference of running sums would give 0 for what comes after 1e8."""
  sums = segment_sums(jnp.array([1e8, 0.5, 0.25]))
  np.testing.assert_array_equal(sums, [[0, -np.inf, -np.inf], [0.5, 0, -np.inf], [0.75, 0.25, 0]])


def test_no_token_sees_a_later_one(model, logits):
  changed = jax.jit(lambda model, tokens: model(tokens))(model, TOKENS.at[:, 6].add(1) % 64)
  np.testing.assert_array_equal(changed[:, :6], logits[:, :6])
  # The convolution alone reaches four tokens; the state carries the change on to the last.
  assert all(float(jnp.abs(changed[:, t] - logits[:, t]).max()) > 1e-5 for t in range(6, 11))


def test_decoding_token_by_token_gives_the_same_logits(model, logits):
  step, state = jax.jit(lambda model, tokens, state: model.step(tokens, state)), model.empty_state(2)
  for t in range(TOKENS.shape[1]):
    out, state = step(model, TOKENS[:, t], state)
    np.testing.assert_allclose(out, logits[:, t], rtol=1e-4, atol=1e-4)


def test_the_block_is_that_of_the_paper(model):
  """NumPy, one row: gate before the norm, convolution over x, B and C, softplus after the bias, A a head."""
  block, x = (
    jax.tree.map(lambda a: np.asarray(a[1], np.float64), model.blocks),
    np.random.default_rng(0).normal(size=(7, 16)),
  )
  r = block.recurrence
  value = lambda parameter: np.asarray(parameter[...])
  norm = lambda v, gain: v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-5) * value(gain)
  silu = lambda v: v / (1 + np.exp(-v))
  z, u, dt = np.split(norm(x, block.norm.gain) @ value(block.inputs.weight), [32, 76], axis=1)
  padded = np.concatenate([np.zeros((3, 44)), u])
  u = silu(sum(value(r.conv)[k] * padded[k : k + 7] for k in range(4)) + value(r.conv_bias))
  v, b, c = u[:, :32].reshape(7, 4, 8), u[:, 32:38], u[:, 38:]
  dt = np.log1p(np.exp(dt + value(r.dt_bias)))
  state, y = np.zeros((4, 8, 6)), []
  for t in range(7):
    decay = np.exp(-np.exp(value(r.a_log)) * dt[t])
    state = decay[:, None, None] * state + (dt[t][:, None] * v[t])[..., None] * b[t]
    y.append(state @ c[t] + value(r.skip)[:, None] * v[t])
  expected = x + norm(np.reshape(y, (7, 32)) * silu(z), block.gated_norm.gain) @ value(block.out.weight)
  actual = jax.tree.map(lambda a: a[1], model.blocks)(jnp.asarray(x[None], jnp.float32))
  np.testing.assert_allclose(actual[0], expected, rtol=1e-3, atol=1e-4)


def test_the_trace_holds_every_layers_output_and_recomputation_changes_nothing(model, logits):
  x, trace, _ = jax.jit(lambda model: model.trace(TOKENS))(model)
  first = jax.tree.map(lambda a: a[0], model.blocks)(x)
  np.testing.assert_allclose(trace[0], first, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(model.logits(trace[-1]), logits, rtol=1e-4, atol=1e-4)
  skipped, _ = run_blocks(model, x, rewrite=lambda layer, y: jnp.where(layer == 1, trace[0], y))
  np.testing.assert_allclose(skipped, trace[0], rtol=1e-5, atol=1e-5)
  batch = {"inputs": TOKENS, "targets": TOKENS}
  gradient = lambda remat: jax.jit(
    jax.grad(lambda model: losses.language_model_loss(model, batch, remat=remat, unroll=remat == "none")[0])
  )(model)
  for a, b in zip(*(jax.tree.leaves(gradient(remat)) for remat in ("none", "dots")), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_it_learns_to_recall_what_lies_behind_the_convolution():
  """A row repeats its first 8 tokens: only the state can say what comes next."""
  config = Mamba2Config(vocab_size=16, depth=2, width=32, head_dim=16, state=16, chunk=8)
  rows = jnp.tile(jax.random.randint(jax.random.key(0), (64, 8), 0, 16), 2)
  batch = {"inputs": rows[:, :-1], "targets": jnp.where(jnp.arange(15) >= 7, rows[:, 1:], -1)}
  steps = 150
  optimizer = optax.adam(1e-2)

  @jax.jit
  def train(model):
    def step(carry, _):
      model, state = carry
      loss, grads = jax.value_and_grad(lambda m: losses.language_model_loss(m, batch)[0])(model)
      updates, state = optimizer.update(grads, state, model)
      return (optax.apply_updates(model, updates), state), loss

    return jax.lax.scan(step, (model, optimizer.init(model)), None, length=steps)[1]

  loss = train(Mamba2(config, jax.random.key(1)))
  assert loss[0] > 2.5 and loss[-1] < 0.3


def test_the_optimizer_and_16_bits_leave_the_recurrence_to_itself(model):
  """Muon is for matrices; decays and step sizes in 16 bits would be wrong by percents."""
  labels = optimizers.labels(model)
  assert {labels.blocks.inputs.weight.get_value(), labels.blocks.out.weight.get_value()} == {"muon"}
  assert set(jax.tree.leaves(labels.blocks.recurrence)) == {"recurrence"}
  assert labels.embedding.get_value() == "embedding" and labels.head.weight.get_value() == "head"
  half = cast(model, "bfloat16")
  assert {a.dtype for a in jax.tree.leaves(half.blocks.recurrence)} == {jnp.dtype("float32")}
  assert half.blocks.inputs.weight.dtype == jnp.bfloat16 and half.hidden(TOKENS)[0].dtype == jnp.bfloat16


def test_it_starts_with_the_papers_step_sizes_and_decays():
  r = Mamba2(Mamba2Config(vocab_size=8, depth=2, width=512, head_dim=16, state=4), jax.random.key(0)).blocks.recurrence
  dt, a = np.asarray(jax.nn.softplus(r.dt_bias[...])), np.exp(np.asarray(r.a_log[...]))
  assert dt.min() > 0.99e-3 and dt.max() < 0.101 and dt.min() < 2e-3 and dt.max() > 0.05
  assert a.min() >= 1 and a.max() <= 16.01 and a.min() < 2.5 and a.max() > 14


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: Mamba2Config(vocab_size=8, depth=1, width=24, head_dim=64), r"head_dim=64 must divide .*=48"),
    (lambda: Mamba2Config(vocab_size=8, depth=0, width=32), "model.depth is 0; it must be at least 1"),
    (lambda: ssd(*inputs()[:5], chunk=0), "chunk is 0; it must be at least 1"),
    (lambda: ssd(*(v[:, :0] if v.ndim > 1 else v for v in inputs()[:5])), "rows have no token"),
    (lambda: ssd(inputs()[0][:, :5], *inputs()[1:5]), "disagree; expected"),
    (lambda: functools.partial(Mamba2(CONFIG, jax.random.key(0)), remat="some")(TOKENS), "remat is 'some'"),
  ],
)
def test_impossible_requests_are_named(call, message):
  with pytest.raises(InputError, match=message):
    call()
