import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from jaxlab.core.checks import InputError
from jaxlab.models import HNet, HNetConfig, Mamba2, Mamba2Config, Transformer, TransformerConfig, layers
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.block import static_mixing
from jaxlab.models.config import nanochat
from jaxlab.models.layers import sinkhorn
from jaxlab.models.transformer import layer_parallel, sequential
from jaxlab.sequence.tnt import titans
from jaxlab.sequence.tnt_model import MemoryModel, MemoryModelConfig
from tests.common import CLOSE, SHAPE, configs, plain_attention, random_model, random_tokens

CONFIGS = configs()


def numpy_rotation(time, half):
  """RoPE by -theta on the two halves of a (time, 2 * half) array."""
  angle = np.arange(time)[:, None] * 100000.0 ** (-np.arange(half) / half)
  cos, sin = np.cos(angle), np.sin(angle)
  return lambda y: np.concatenate([y[:, :half] * cos + y[:, half:] * sin, y[:, half:] * cos - y[:, :half] * sin], -1)


def numpy_nanochat(model, tokens):
  """Section 3 of the nanochat description, written once more in NumPy, one row and one head at a time."""
  c, p = model.config, jax.tree.map(lambda a: np.asarray(a, np.float64), model)
  get = lambda param: np.asarray(param.get_value())
  norm = lambda x: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1.1920929e-07)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  rows = []
  for row in np.asarray(tokens):
    time = len(row)
    x = norm(get(p.embedding)[row])
    smeared = x.copy()
    for t in range(1, time):
      smeared[t] += get(p.smear_lambda) * sigmoid(x[t, :24] @ get(p.smear_gate)) * x[t - 1]
    x = x0 = smeared
    rotate = numpy_rotation(time, c.head_dim // 2)
    for layer in range(c.depth):
      b = jax.tree.map(lambda a: a[layer], p.blocks)  # noqa: B023
      x = get(b.residual_lambda) * x + get(b.x0_lambda) * x0
      a = norm(x)
      q, k, v = (a @ get(m.weight) for m in (b.q, b.k, b.v))
      if layer % 2 == (c.depth - 1) % 2:
        ve = get(p.value_embeddings)[c.value_layers.index(layer)][row]
        gate = 3 * sigmoid(a[:, :12] @ get(b.value_gate))
        v = v + np.repeat(gate, c.head_dim, axis=-1) * ve
      heads = []
      for h in range(c.q_heads):
        cut = slice(h * c.head_dim, (h + 1) * c.head_dim)
        qh, kh = norm(rotate(q[:, cut])) * 1.2, norm(rotate(k[:, cut])) * 1.2
        score = qh @ kh.T / np.sqrt(c.head_dim)
        i, j = np.arange(time)[:, None], np.arange(time)[None]
        window = c.windows[layer] or time
        score = np.where((j <= i) & (i - j <= window), score, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        heads.append(weight / weight.sum(-1, keepdims=True) @ v[:, cut])
      x = x + np.concatenate(heads, -1) @ get(b.o.weight)
      x = x + np.square(np.maximum(norm(x) @ get(b.mlp.up.weight), 0)) @ get(b.mlp.down.weight)
      if layer == c.depth // 2:
        backout = x
    x = norm(x - get(p.backout_lambda) * backout)
    rows.append(15 * np.tanh(x @ get(p.head.weight) / 15))
  return np.stack(rows)


def test_nanochat_agrees_with_a_numpy_transcription():
  model, tokens = random_model(CONFIGS["nanochat"]), random_tokens(2, 200)
  assert 128 in model.config.windows
  np.testing.assert_allclose(jax.jit(lambda m: m(tokens))(model), numpy_nanochat(model, tokens), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_scan_and_unrolled_agree(name):
  model, tokens = random_model(CONFIGS[name]), random_tokens(2, 17)
  forward = jax.jit(lambda m, unroll: m(tokens, unroll=unroll), static_argnums=1)
  expected = forward(model, True)
  assert expected.dtype == jnp.float32 and expected.shape == (2, 17, 64)
  np.testing.assert_allclose(forward(model, False), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["nanochat_plain", "qwen3_moe"])
def test_rematerialised_gradients_are_the_gradients(name):
  model, tokens = random_model(CONFIGS[name]), random_tokens(2, 17)
  gradient = jax.jit(jax.grad(lambda m, remat: jnp.mean(m(tokens, remat=remat) ** 2)), static_argnums=1)
  plain = gradient(model, "none")
  for remat in ("dots", "full"):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, gradient(model, remat), plain)
  with pytest.raises(InputError, match="remat is 'some'"):
    model(tokens, remat="some")


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decode_equals_the_full_forward(name):
  """After 1, 5 and 130 tokens at once: one cache size and one full forward, as each costs a compilation."""
  model, tokens = random_model(CONFIGS[name]), random_tokens(2, 135)
  expected = jax.jit(lambda m: m(tokens))(model)
  extend = jax.jit(lambda m, t, c: m.extend(t, c))
  for prefill in (1, 5, 130):
    logits, cache = extend(model, tokens[:, :prefill], model.empty_cache(2, 139))
    np.testing.assert_allclose(logits, expected[:, :prefill], rtol=1e-3, atol=1e-3)
    steps = []
    for t in range(prefill, prefill + 3):
      logits, cache = extend(model, tokens[:, t : t + 1], cache)
      steps.append(logits)
    logits, cache = extend(model, tokens[:, prefill + 3 : prefill + 5], cache)
    actual = jnp.concatenate([*steps, logits], axis=1)
    np.testing.assert_allclose(actual, expected[:, prefill : prefill + 5], rtol=1e-3, atol=1e-3)
    assert int(cache.length) == prefill + 5


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_at_once_equal_a_loop_over_layers(name, dtype):
  """mixed windows, value embeddings, experts and streams included; from layers 0, 1 and 3 on."""
  model, tokens = random_model(CONFIGS[name], dtype=dtype), random_tokens(2, 140)
  options = dict(attention=plain_attention)

  @jax.jit
  def both(m):
    x, side, _ = m.embed(tokens)
    states = x + jax.random.normal(jax.random.key(3), (m.depth, *x.shape), dtype)
    actual = [layer_parallel(m, states[start:], side, start=start, **options) for start in (0, 1, 3)]
    loop = [sequential(m, s, side, start=i, stop=i + 1, **options)[0] for i, s in enumerate(states)]
    return actual, jnp.stack(loop)

  actual, expected = both(model)
  for states in actual:
    np.testing.assert_allclose(states, expected[-len(states) :], rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("window", [1, 7, None])
@pytest.mark.parametrize("groups", [1, 4])
def test_attention_sees_window_plus_one_keys(window, groups):
  q = jax.random.normal(jax.random.key(0), (1, 12, 4, 8))
  k, v = (jax.random.normal(jax.random.key(i), (1, 12, 4 // groups, 8)) for i in (1, 2))
  i, j = jnp.arange(12)[:, None], jnp.arange(12)[None]
  mask = (j <= i) & (i - j <= (12 if window is None else window))
  score = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, groups, 2)) / jnp.sqrt(8.0)
  weight = jax.nn.softmax(jnp.where(mask, score, -jnp.inf))
  expected = jnp.einsum("bhqk,bkhd->bqhd", weight, jnp.repeat(v, groups, 2))
  attend = jax.jit(functools.partial(dot_product_attention, window=window))
  np.testing.assert_allclose(attend(q, k, v), expected, rtol=1e-5, atol=1e-5)
  padded = [jnp.pad(a, ((0, 0), (0, 5), (0, 0), (0, 0)), constant_values=1e3) for a in (k, v)]
  for start, time in [(0, 12), (4, 8), (11, 1), (3, 1)]:
    actual = attend(q[:, start : start + time], *padded, start=jnp.int32(start))
    np.testing.assert_allclose(actual, expected[:, start : start + time], rtol=1e-5, atol=1e-5)


def test_windows_and_value_layers_by_depth():
  make = lambda depth, context: nanochat(depth=depth, context=context)
  assert [w for w in make(12, 2048).windows] == [512, 512, 512, None] * 3
  assert make(3, 2048).windows == (512, 512, None)
  assert make(2, 256).windows == (128, None)
  assert [make(d, 2048).value_layers for d in (2, 3)] == [(1,), (0, 2)]
  assert make(32, 2048).value_layers == tuple(range(1, 32, 2))


@pytest.mark.parametrize(
  "depth, aspect, width, blocks, tables",
  [(12, 64, 768, 84.9, 151.0), (20, 64, 1280, 393.2, 419.4), (32, 20, 640, 157.3, 335.5)],
)
def test_parameter_counts_of_the_published_sizes(depth, aspect, width, blocks, tables):
  config = nanochat(depth=depth, aspect_ratio=aspect)
  assert config.width == width
  assert round((config.matmul_parameters - config.width * config.vocab_size) / 1e6, 1) == blocks
  assert round(len(config.value_layers) * config.vocab_size * config.kv_heads * config.head_dim / 1e6, 1) == tables


def test_sinkhorn_is_doubly_stochastic_and_never_expands(dtype):
  mixing = jax.jit(static_mixing)(random_model(CONFIGS["mhc"], dtype=dtype).blocks)[2]
  initial = jax.jit(lambda: sinkhorn(jnp.where(jnp.eye(4, dtype=bool), 0.0, -0.5) / 0.05, 10))()
  np.testing.assert_allclose(jnp.diagonal(initial), 0.99986, atol=1e-5)
  for matrix in [initial, *mixing.reshape(-1, 4, 4)]:
    np.testing.assert_allclose(matrix.sum(0), 1.0, atol=CLOSE[dtype] / 10)
  np.testing.assert_allclose(initial.sum(1), 1.0, atol=1e-3)
  assert np.linalg.norm(np.asarray(initial), 2) <= 1 + 1e-5


def test_mhc_reads_the_published_initial_weights():
  from jaxlab.models import Transformer

  pre, post, _ = jax.jit(lambda key: static_mixing(Transformer(CONFIGS["mhc"], key).blocks))(jax.random.key(0))
  np.testing.assert_allclose(jnp.sort(pre[0, 0])[-2:], [0.175, 0.475], atol=1e-3)
  assert [int(jnp.argmax(pre[layer, s])) for layer in range(3) for s in range(2)] == [0, 1, 2, 3, 0, 1]
  np.testing.assert_allclose(post, 0.25)


def numpy_mixing(mixing, x):
  """(Hpre, Hpost, Hres) of one sublayer at streams x (..., s, width), by the published formulas in NumPy."""
  h, get = mixing.hyper, lambda name: np.asarray(getattr(mixing, name).get_value(), np.float64)
  pre, post, residual = get("pre"), get("post"), get("residual")
  if h.dynamic:
    flat = x.reshape(*x.shape[:-2], -1)
    flat = flat / np.sqrt(np.mean(flat * flat, -1, keepdims=True) + mixing.eps)
    a, b, c = np.split(flat @ get("projection"), [h.streams, 2 * h.streams], axis=-1)
    sigmoid, scale = lambda y: 1 / (1 + np.exp(-y)), get("scale")
    pre, post = sigmoid(scale[0] * a + pre), 2 * sigmoid(scale[1] * b + post)
    residual = np.exp(scale[2] * c.reshape(*c.shape[:-1], h.streams, h.streams) + residual)
  else:
    pre, post = (np.exp(a) / np.exp(a).sum() for a in (pre, post))
    residual = np.exp(residual / h.temperature)
  for _ in range(h.rounds):
    residual = residual / residual.sum(-1, keepdims=True)
    residual = residual / residual.sum(-2, keepdims=True)
  return pre, post, residual


@pytest.mark.parametrize("name", ["mhc", "mhc_dynamic"])
def test_streams_mix_as_published(name):
  """X <- Hres X + Hpost branch(sum_s Hpre X), attention before the MLP; the branches are those of a block without."""
  model, tokens, layer = random_model(CONFIGS[name]), random_tokens(2, 12), 1
  x, side, _ = jax.jit(lambda m: m.embed(tokens))(model)
  x = np.asarray(x + jax.random.normal(jax.random.key(3), x.shape), np.float64)

  def branch(silent):
    """What layer 1 adds to a state of one stream, with one of its two branches silenced."""
    alone = jax.tree.map(lambda a: a, model)
    alone.config = alone.blocks.config = dataclasses.replace(model.config, hyper=None)
    weight = silent(alone.blocks).weight
    weight.set_value(jnp.zeros_like(weight.get_value()))
    plain = dataclasses.replace(side, mixing=None)
    run = jax.jit(lambda u: sequential(alone, u, plain, start=layer, stop=layer + 1)[0] - u)
    return lambda u: np.asarray(run(jnp.asarray(u, jnp.float32)), np.float64)

  block, expected = jax.tree.map(lambda a: a[layer], model.blocks), x
  for mixing, silent in (
    (block.attention_mixing, lambda b: b.mlp.down),
    (block.mlp_mixing, lambda b: b.o),
  ):
    pre, post, residual = numpy_mixing(mixing, expected)
    read = np.einsum("...s,...sd->...d", pre, expected)
    expected = residual @ expected + np.einsum("...s,...d->...sd", post, branch(silent)(read))
  actual = jax.jit(lambda x: sequential(model, x, side, start=layer, stop=layer + 1)[0])(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_edits_reach_only_what_the_window_allows():
  config = nanochat(depth=6, aspect_ratio=8, head_dim=16, vocab_size=64, context=512)
  model, tokens = random_model(config), random_tokens(1, 140)
  x, side, _ = jax.jit(lambda m: m.embed(tokens))(model)
  run = jax.jit(lambda x: sequential(model, x, side, start=0, stop=1)[0])
  base, w, i = run(x), config.windows[0], 135
  edited = lambda position: run(x.at[0, position].add(1.0))
  assert jnp.array_equal(edited(i - w - 1)[0, i], base[0, i])
  assert not jnp.allclose(edited(i - w)[0, i], base[0, i])


@pytest.mark.parametrize(
  "change, message",
  [
    ({"kv_heads": 3}, "kv_heads=3 must divide model.q_heads=4"),
    ({"depth": 0}, "depth is 0"),
    ({"window_pattern": "SX"}, "made of S"),
    ({"mlp": "gelu"}, "must be one of swiglu, relu2"),
    ({"head_dim": 15}, "must divide model.head_dim=15"),
  ],
)
def test_impossible_shapes_are_named(change, message):
  with pytest.raises(InputError, match=message):
    TransformerConfig(**(SHAPE | change))


def test_parallel_sublayers_add_what_each_makes_of_the_same_input():
  model = random_model(nanochat(depth=2, aspect_ratio=16, head_dim=16, vocab_size=64, parallel_sublayers=True))
  states = jax.random.normal(jax.random.key(3), (2, 1, 5, model.config.width))
  parallel = jax.jit(lambda m: layer_parallel(m, states, m.embed(random_tokens(1, 5))[1]))

  def branch(silenced):
    one = jax.tree.map(lambda a: a, model)
    for linear in silenced(one.blocks):
      linear.weight.set_value(jnp.zeros_like(linear.weight[...]))
    return parallel(one)

  both, nothing = branch(lambda b: ()), branch(lambda b: (b.o, b.mlp.down))
  attention, mlp = branch(lambda b: (b.mlp.down,)), branch(lambda b: (b.o,))
  np.testing.assert_allclose(both - nothing, attention - nothing + mlp - nothing, atol=1e-5)
  assert np.abs(mlp - nothing).max() > 0.1


def test_gradients_of_lookups_are_summed_in_float32():
  """In bfloat16 a sum of ones ends at 256. Tangents are rows; an id without a row is NaN."""
  table, ids = jnp.zeros((3, 4), jnp.bfloat16), jnp.asarray([0] * 1000 + [2], jnp.int32)
  run = functools.partial(layers.lookup, ids=ids)
  gradient = jax.grad(lambda table: run(table).astype(jnp.float32).sum())(table)
  np.testing.assert_array_equal(gradient, np.repeat([[1000], [0], [1]], 4, axis=1))
  assert gradient.dtype == jnp.bfloat16
  change = jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4)
  np.testing.assert_array_equal(jax.jvp(run, (table,), (change,))[1], change[ids])
  assert np.isnan(layers.lookup(table, jnp.int32([3]))).all()


def scattered(jaxpr):
  """Shapes and dtypes of all sums by index in a program, those of its parts too."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "scatter-add":
      yield from ((out.aval.shape, out.aval.dtype) for out in eqn.outvars)
    for part in jax_core.jaxprs_in_params(eqn.params):
      yield from scattered(part)


@pytest.mark.parametrize("kind", ["value embeddings", "H-Net", "Mamba-2", "deep memory"])
def test_no_model_sums_gradients_of_embeddings_in_sixteen_bits(kind):
  config = {
    "value embeddings": nanochat(depth=2, aspect_ratio=16, head_dim=16, vocab_size=64, context=512),
    "H-Net": HNetConfig("T1", (16,), (16,), (2,), (None,), (), vocab_size=64, head_dim=8),
    "Mamba-2": Mamba2Config(vocab_size=64, depth=1, width=16, head_dim=8, state=8),
    "deep memory": MemoryModelConfig(64, 1, 16, titans(16, heads=2, head_dim=8, chunk=4)),
  }[kind]
  make = {HNetConfig: HNet, Mamba2Config: Mamba2, MemoryModelConfig: MemoryModel}.get(type(config), Transformer)
  model = jax.eval_shape(lambda: jax.tree.map(lambda a: a.astype(jnp.bfloat16), make(config, jax.random.key(0))))
  tokens = jnp.zeros((2, 8), jnp.int32)
  loss = lambda model: model.hidden(tokens)[0].astype(jnp.float32).sum()
  sums = [dtype for shape, dtype in scattered(jax.make_jaxpr(jax.grad(loss))(model).jaxpr) if 64 in shape]
  assert sums and set(sums) == {jnp.dtype("float32")}
