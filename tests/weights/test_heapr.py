"""HEAPr: one pass gives the paper's scores, exact where the loss is a quadratic; all layouts are one function."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlab.core.checks import InputError
from jaxlab.models import Transformer, TransformerConfig, generate, hub, inference, maps
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.config import Experts
from jaxlab.models.layers import MoE
from jaxlab.training.losses import token_losses
from jaxlab.weights import heapr
from tests.common import configs, plain_attention, random_model, random_tokens

SHAPE = dict(depth=2, width=16, q_heads=2, kv_heads=1, head_dim=8, mlp_width=16, vocab_size=32)
CONFIG = TransformerConfig(**SHAPE, qk_norm="before_rope", experts=Experts(count=4, active=2, width=24))
ROWS = random_tokens(4, 9, vocab=32)


@pytest.fixture(scope="module")
def model() -> Transformer:
  return random_model(CONFIG)


@pytest.fixture(scope="module")
def found(model):
  return heapr.statistics(model, ROWS, batch=2, covariance=True)


def dense(model: Transformer, rows, bumps, attention=plain_attention):
  """(summed loss, [(h (tokens, experts, hidden), gates (tokens, experts)) of a layer]) by a loop over experts.

  bumps: (layers, tokens, experts, width), added to every expert's output.
  """
  network, seen = inference.take_apart(model), []

  def call(moe, bump):
    def mlp(a):
      x = a.reshape(-1, a.shape[-1])
      weight, chosen = jax.lax.top_k(jax.nn.softmax(moe.router(x), axis=-1), moe.active)
      weight = weight / weight.sum(axis=-1, keepdims=True)
      gates = jnp.zeros((len(x), len(moe.gate[...]))).at[jnp.arange(len(x))[:, None], chosen].set(weight)
      h = jnp.stack([jax.nn.silu(x @ g) * (x @ u) for g, u in zip(moe.gate[...], moe.up[...], strict=True)], axis=1)
      seen.append((h, gates))
      out = jnp.einsum("tef,efd->ted", h, moe.down[...]) + bump
      return (gates[..., None] * out).sum(axis=1).reshape(a.shape)

    return mlp

  blocks = [jax.tree.map(lambda a: a, block) for block in network.blocks]
  for block, bump in zip(blocks, bumps, strict=True):
    block.mlp = call(block.mlp, bump)
  x, side, _ = model.embed(rows[:, :-1])
  attend = lambda layer, block, x, q, k, v, window: attention(q, k, v, window=window, start=0)
  x, backout = inference.run_layers(inference.Network(network.model, tuple(blocks)), x, side, attend)
  return token_losses(model, (x, backout), rows[:, 1:]).sum(), seen


def no_bumps(rows, dtype="float32"):
  return jnp.zeros((CONFIG.depth, rows[:, 1:].size, CONFIG.experts.count, CONFIG.width), dtype)


@functools.partial(jax.jit, static_argnums=3)
def gradients(model, rows, bumps, attention=plain_attention):
  """(g (layers, tokens, experts, width), seen)."""
  return jax.grad(functools.partial(dense, model, rows, attention=attention), has_aux=True)(bumps)


def test_experts_are_the_loop_over_experts(model):
  """Grouped products, their gradients, and every token at exactly `active` experts."""
  moe = jax.tree.map(lambda a: a[0], model.blocks.mlp)
  x = jax.random.normal(jax.random.key(1), (11, CONFIG.width))

  def loop(moe, x):
    weight, chosen = jax.lax.top_k(jax.nn.softmax(moe.router(x), axis=-1), moe.active)
    weight = weight / weight.sum(axis=-1, keepdims=True)
    y = 0
    for e in range(CONFIG.experts.count):
      out = (jax.nn.silu(x @ moe.gate[...][e]) * (x @ moe.up[...][e])) @ moe.down[...][e]
      y = y + jnp.where(chosen == e, weight, 0).sum(axis=-1, keepdims=True) * out
    return y

  assert moe.route(x).sizes.sum() == 11 * 2
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))
  close(moe(x), loop(moe, x))
  slope = lambda call: jax.jit(jax.grad(lambda moe, x: (call(moe, x) ** 2).sum(), argnums=(0, 1)))(moe, x)
  for ours, right in zip(*(jax.tree.leaves(slope(call)) for call in (MoE.__call__, loop)), strict=True):
    close(ours, right)


def test_one_pass_is_two_passes_is_the_double_loop():
  with jax.enable_x64(True):
    model = random_model(CONFIG, dtype="float64")
    found = heapr.statistics(model, ROWS, batch=2, covariance=True)
    g, seen = gradients(model, ROWS, no_bumps(ROWS, "float64"), dot_product_attention)
    down, count, close = model.blocks.mlp.down[...], found.count[..., None], dict(rtol=1e-6, atol=0)
    curved = heapr.curvature(found.covariance / count[..., None], down)
    np.testing.assert_allclose(heapr.scores(found), heapr.estimated(found.energy, count * curved, found.count), **close)
    for layer, (h, gates) in enumerate(seen):
      for expert in range(CONFIG.experts.count):
        mine = np.flatnonzero(np.asarray(gates[:, expert]))
        assert found.count[layer, expert] == len(mine) > 0
        own, slopes = np.asarray(h[mine, expert]), np.asarray(g[layer, mine, expert])
        fisher = sum(np.outer(one, one) for one in slopes) / len(mine)
        e = own[:, :, None] * np.asarray(down[layer, expert])  # (tokens, hidden, width)
        naive = sum(0.5 * np.einsum("jd,dc,jc->j", one, fisher, one) for one in e) / len(mine)
        mask_fisher = (np.einsum("tjd,td->tj", e, slopes) ** 2).sum(axis=0)
        np.testing.assert_allclose(heapr.scores(found)[layer, expert], naive, **close)
        np.testing.assert_allclose(found.joint[layer, expert], mask_fisher, **close)
        np.testing.assert_allclose(found.peak[layer, expert], np.abs(own).max(axis=0), **close)
        np.testing.assert_allclose(found.weight[layer, expert], gates[:, expert].sum(), **close)


def test_the_tapped_gradient_is_a_finite_difference():
  """Of the loss by one expert's output, before the router's weight."""
  with jax.enable_x64(True):
    model, rows, step = random_model(CONFIG, dtype="float64"), ROWS[:1], 1e-4
    g, seen = gradients(model, rows, no_bumps(rows, "float64"))
    loss = jax.jit(lambda bumps: dense(model, rows, bumps)[0])
    token, expert = 3, int(np.argmax(seen[0][1][3]))
    for channel in (0, 7):
      bump = no_bumps(rows, "float64").at[0, token, expert, channel].set(step)
      slope = (loss(bump) - loss(-bump)) / (2 * step)
      np.testing.assert_allclose(g[0, token, expert, channel], slope, rtol=1e-6, atol=1e-10)


def test_the_score_is_the_loss_where_the_loss_is_a_quadratic():
  """1/2 (y - y*)^T A (y - y*), one expert a token of weight 1, at its minimum: removing j adds the sum of its s_ij."""
  with jax.enable_x64(True):
    config = dataclasses.replace(CONFIG, experts=Experts(count=4, active=1, width=24))
    model = random_model(config, dtype="float64")
    moe = jax.tree.map(lambda a: a[0], model.blocks.mlp)
    moe.down[...] = moe.down[...].at[1, 5].set(0)
    rng = np.random.default_rng(0)
    x, root = jnp.asarray(rng.normal(size=(40, 16))), rng.normal(size=(16, 16))
    a = jnp.asarray(root @ root.T)
    routing = moe.route(x)
    h = moe.hidden(x, routing)
    owner = np.repeat(np.arange(4), routing.sizes)
    energy = jax.ops.segment_sum(h**2, owner, 4)
    count = routing.sizes.astype(float)
    s = heapr.estimated(energy, count[:, None] * heapr.curvature(a, moe.down[...]), count, freq_weight=True)
    assert s[1, 5] == 0
    for expert, neuron in ((0, 0), (2, 23), (3, 11), (1, 5)):
      less = jax.tree.map(lambda leaf: leaf, moe)
      less.down[...] = moe.down[...].at[expert, neuron].set(0)
      off = less(x) - moe(x)
      np.testing.assert_allclose((0.5 * (off @ a) * off).sum(), s[expert, neuron], rtol=1e-10)


def test_dead_neurons_and_unused_experts_go_first(model):
  """At no change of the loss; an expert without tokens scores -1."""
  model = jax.tree.map(jnp.copy, model)
  moe = model.blocks.mlp
  moe.down[...] = moe.down[...].at[0, 1, 5].set(0)
  moe.up[...] = moe.up[...].at[1, 2, :, 7].set(0)
  found = heapr.statistics(model, ROWS, batch=2)
  s = heapr.scores(found)
  assert s[0, 1, 5] == 0 and s[1, 2, 7] == 0 and int((s == 0).sum()) == 2
  keep = heapr.select(s, 2 / s.size)
  assert not keep[0, 1, 5] and not keep[1, 2, 7]
  np.testing.assert_allclose(heapr.masked(model, keep)(ROWS), model(ROWS), atol=1e-6)


def test_experts_that_no_token_went_to_have_no_gradient_and_go_first(model):
  """Of one token, which goes to two of four experts in each layer."""
  rows = ROWS[:1, :2]
  found = heapr.statistics(model, rows, batch=1)
  unused = np.asarray(found.count) == 0
  s = heapr.scores(found)
  assert (unused.sum(axis=-1) == 2).all() and ((s == -1).all(axis=-1) == unused).all()
  assert (heapr.select(s, 0.5).any(axis=-1) == ~unused).all()
  loss = lambda model: token_losses(model, model.hidden(rows[:, :-1]), rows[:, 1:]).sum()
  slope = jax.jit(jax.grad(loss))(model).blocks.mlp
  for one in (slope.gate, slope.up, slope.down):
    assert (jnp.any(one[...] != 0, axis=(2, 3)) == ~unused).all()


def test_atomic_experts_add_up_and_all_of_them_are_the_model(model):
  whole = np.ones(model.blocks.mlp.down.shape[:-1], bool)
  assert heapr.select(np.ones(whole.shape), 0).all()
  for tile in (8, 24):
    np.testing.assert_allclose(heapr.sliced(model, whole, tile=tile)(ROWS), model(ROWS), rtol=0, atol=5e-6)
  for same in (heapr.masked(model, whole), heapr.padded(model, whole)):
    np.testing.assert_array_equal(same(ROWS), model(ROWS))
  half = np.zeros_like(whole)
  half[..., ::2] = True
  x = jax.random.normal(jax.random.key(0), (7, CONFIG.width))
  first = lambda one: jax.tree.map(lambda a: a[0], one.blocks.mlp)(x)
  np.testing.assert_allclose(
    first(heapr.masked(model, half)) + first(heapr.masked(model, ~half)), first(model), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize("pool", heapr.POOLS)
def test_all_layouts_are_one_function(model, found, pool, tmp_path):
  """Masked, sliced in tiles that the widths do not fill, padded; saved, read again, generating."""
  s = heapr.scores(found).at[1, 2].set(-1)  # an expert that ends with nothing
  keep = heapr.select(s, 0.4, pool=pool)
  expected = heapr.masked(model, keep)
  logits = expected(ROWS)
  tiled = heapr.sliced(model, keep, tile=4)
  for small in (tiled, heapr.padded(model, keep, multiple=8)):
    np.testing.assert_allclose(small(ROWS), logits, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(inference.step(inference.take_apart(tiled), ROWS)[0], logits, rtol=1e-4, atol=1e-4)
  hub.save(tiled, tmp_path)
  again = hub.load(tmp_path)
  np.testing.assert_array_equal(again(ROWS), tiled(ROWS))
  files = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
  assert files < maps.bytes_of(model)
  if pool == "model":
    np.testing.assert_array_equal(generate(again, ROWS[:1], tokens=4), generate(expected, ROWS[:1], tokens=4))
  assert hub.load(tmp_path, dtype="bfloat16").blocks.mlp.widths.dtype == jnp.int32


def test_padded_by_expert_is_an_ordinary_mixture(model, found, tmp_path):
  small = heapr.padded(model, heapr.select(heapr.scores(found), 0.5, pool="expert"))
  assert small.config.experts.width == 12
  hub.save(small, tmp_path)
  assert '"Qwen3MoeForCausalLM"' in (tmp_path / "config.json").read_text()
  np.testing.assert_array_equal(hub.load(tmp_path)(ROWS), small(ROWS))


def test_tokens_pass_over_experts_that_have_nothing_left(model):
  """With `skip_empty` the others share the routing, as if the expert had never been there."""
  keep = np.ones(model.blocks.mlp.down.shape[:-1], bool)
  keep[:, 3] = False
  fewer = jax.tree.map(lambda a: a, model)
  moe = fewer.blocks.mlp
  moe.gate, moe.up, moe.down = (nnx.Param(one[...][:, :3], axes=one.axes) for one in (moe.gate, moe.up, moe.down))
  moe.router.weight = nnx.Param(moe.router.weight[...][:, :, :3], axes=moe.router.weight.axes)
  skipping = heapr.sliced(model, keep, tile=24, skip_empty=True)
  np.testing.assert_allclose(skipping(ROWS), fewer(ROWS), rtol=1e-5, atol=1e-5)
  assert float(jnp.abs(heapr.sliced(model, keep, tile=24)(ROWS) - skipping(ROWS)).max()) > 1e-3


@pytest.mark.parametrize(("ratio", "multiple"), [(0.1, 1), (0.25, 1), (0.9, 4), (0.5, 24)])
def test_select_keeps_exactly_the_share(found, ratio, multiple):
  s = heapr.scores(found)
  n = s.size // multiple
  kept = {pool: heapr.select(s, ratio, pool=pool, multiple=multiple) for pool in heapr.POOLS}
  assert kept["model"].sum() == multiple * int(n * (1 - ratio) + 1e-9)
  assert (kept["layer"].sum(axis=(1, 2)) == multiple * int(n / 2 * (1 - ratio) + 1e-9)).all()
  assert len(np.unique(kept["expert"].sum(axis=-1))) == 1
  assert all((keep.sum(axis=-1) % multiple == 0).all() for keep in kept.values())
  total = {pool: float(s[keep].sum()) for pool, keep in kept.items()}
  assert total["model"] >= total["layer"] >= total["expert"]
  if multiple == 1:
    assert s[kept["model"]].min() >= s[~kept["model"]].max()


def test_scores_know_no_batches_and_no_scale(model, found):
  """The same from one batch as from four; c^2 times as large where the loss is c times as large."""
  once = heapr.statistics(model, ROWS, batch=4)
  np.testing.assert_allclose(heapr.scores(once), heapr.scores(found), rtol=1e-5)
  assert found.count.sum() == CONFIG.depth * 2 * ROWS[:, 1:].size
  moe = jax.tree.map(lambda a: a[0], model.blocks.mlp)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape[1:]), dataclasses.replace(found, covariance=None))
  x = jax.random.normal(jax.random.key(0), (9, CONFIG.width))
  of = lambda c: jax.grad(lambda zeros: c * jnp.sin(heapr._Watched(moe, zeros)(x)).sum())(zeros)
  np.testing.assert_allclose(heapr.scores(of(3.0)), 9 * heapr.scores(of(1.0)), rtol=2e-5)
  np.testing.assert_allclose(of(3.0).energy, of(1.0).energy)


def test_weighted_by_frequency_it_is_the_loss_of_the_whole_text(found):
  weighted = heapr.scores(found, freq_weight=True)
  np.testing.assert_allclose(weighted, heapr.scores(found) * found.count[..., None], rtol=1e-6)


def test_ones_own_model_in_three_lines():
  model, rows = random_model(dataclasses.replace(CONFIG, depth=1), dtype="bfloat16"), ROWS
  found = heapr.statistics(model, rows, batch=2)
  small = heapr.sliced(model, heapr.select(heapr.scores(found), 0.5, multiple=8), tile=8)
  assert found.pull.dtype == jnp.float32
  assert generate(small, rows[:2], tokens=3).shape == (2, 3)


def test_a_dense_model_is_a_mixture_of_one_expert():
  model = random_model(TransformerConfig(**SHAPE | {"depth": 1}))
  one = heapr.of_one_expert(model)
  logits = jax.jit(Transformer.__call__)
  np.testing.assert_allclose(logits(one, ROWS), logits(model, ROWS), rtol=1e-5, atol=1e-5)
  keep = heapr.select(heapr.scores(heapr.statistics(one, ROWS, batch=4)), 0.5, multiple=4)
  small = logits(heapr.sliced(one, keep, tile=4), ROWS)
  np.testing.assert_allclose(small, logits(heapr.masked(one, keep), ROWS), rtol=1e-5, atol=1e-5)
  with pytest.raises(InputError, match="SwiGLU"):
    heapr.of_one_expert(random_model(configs()["nanochat"]))


def test_what_cannot_be_pruned_is_refused_in_one_line(model, found):
  s = heapr.scores(found)
  keep = heapr.select(s, 0.5)
  small = heapr.sliced(model, keep, tile=8)
  broken = jax.tree.map(jnp.copy, model)
  broken.blocks.mlp.up[...] = broken.blocks.mlp.up[...].at[0, 0, 0, 0].set(jnp.nan)
  for call, said in (
    (lambda: heapr.statistics(random_model(configs()["qwen3"]), ROWS), "no experts"),
    (lambda: heapr.statistics(small, ROWS), "original model"),
    (lambda: heapr.statistics(model, ROWS, batch=3), "multiple of batch=3"),
    (lambda: heapr.statistics(model, ROWS[:, :1], batch=2), "2 or more"),
    (lambda: heapr.statistics(broken, ROWS, batch=2), "holds NaN"),
    (lambda: heapr.select(s, 1.0), "0 <= ratio < 1"),
    (lambda: heapr.select(s, 0.5, pool="net"), "pool"),
    (lambda: heapr.select(s, 0.5, multiple=7), "multiple"),
    (lambda: heapr.select(s.at[0, 0, 0].set(jnp.nan), 0.5), "NaN"),
    (lambda: heapr.sliced(model, keep[:1], tile=8), "keep must be bool"),
    (lambda: heapr.sliced(model, keep, tile=0), "at least 1"),
    (lambda: heapr.masked(small, keep), "original mixture"),
  ):
    with pytest.raises(InputError, match=said) as refused:
      call()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
  "change", [dict(tile=0), dict(counts=[[9], [1]]), dict(counts=[[1]]), dict(counts=[[0], [0]]), dict(more=1)]
)
def test_a_folder_whose_sizes_make_no_sense_is_refused(change):
  spec = {"mlp": {"kind": "tiled_experts", "tile": 8, "counts": [[4], [2]], "skip_empty": False} | change}
  with pytest.raises(InputError, match=r"compression\.mlp"):
    jax.eval_shape(lambda: maps.shaped(Transformer(CONFIG, jax.random.key(0)), spec))
