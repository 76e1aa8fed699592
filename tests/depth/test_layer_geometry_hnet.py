"""Every stack of an H-Net is measured as a network of its own, and what it predicts is what the whole one does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.depth import layer_geometry as geometry
from jaxlab.depth.layer_geometry_hnet import stacks
from jaxlab.models import HNetConfig, Mamba2, Mamba2Config
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.chunking import places, take
from jaxlab.models.hnet_layers import Side, Stack, rotations
from tests.common import random_model, random_tokens

CONFIG = HNetConfig(
  "m1 [t1 [T2] M1] m1",
  (16, 16, 24),
  (0, 20, 24),
  (0, 2, 3),
  (0, 3, None),
  (3.0, 3.0),
  vocab_size=64,
  head_dim=8,
  state=4,
  chunk=4,
)
MAMBA = Mamba2Config(64, 1, 16, head_dim=8)
SKIP = 1
TOKENS = random_tokens(3, 14)
NAMES = ["encoder 0", "encoder 1", "main 2", "decoder 1", "decoder 0"]


@pytest.fixture(scope="module")
def model():
  return random_model(CONFIG)


@pytest.fixture(scope="module")
def networks(model):
  return stacks(model, TOKENS)


@pytest.fixture(scope="module")
def pairs(networks):
  """{stack: (inputs, outputs of its blocks)}."""
  return jax.jit(lambda all_of: {name: geometry.collect(n, TOKENS, skip=0) for name, n in all_of.items()})(networks)


@pytest.fixture(scope="module")
def chunked(model):
  return jax.jit(lambda model: model.chunked(TOKENS))(model)


def test_stacks_are_the_pieces_of_the_network(model, networks, pairs, chunked):
  """Each reads what the one before wrote: the norm of its last block's output, at the cuts where it is inside."""
  final, (outer, inner) = chunked
  assert list(networks) == NAMES and networks["main 2"].depth == 2
  lengths = [14, int(outer.count.min()), int(inner.count.min())]
  assert [networks[name].length for name in NAMES] == [lengths[i] for i in (0, 1, 2, 1, 0)]
  assert 14 > lengths[1] > lengths[2] > SKIP and outer.count.max() > lengths[1]
  normed = {name: networks[name].stack.norm(y[-1]) for name, (_, y) in pairs.items()}
  same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  same(pairs["encoder 0"][0][0], model.embed(TOKENS))
  same(pairs["encoder 1"][0][0], take(normed["encoder 0"], places(outer, lengths[1])))
  same(pairs["main 2"][0][0, ..., :16], take(normed["encoder 1"], places(inner, lengths[2])))
  pad = model.stage.inner.inner.pad[...]
  same(pairs["main 2"][0][0, ..., 16:], jnp.broadcast_to(pad, (*pairs["main 2"][0].shape[1:3], 8)))
  same(normed["decoder 0"], final)


def through_the_model(network, layer, new, mask):
  """(logits, chunks) of the model's own pass, in which a block's output is `new` at the positions of `mask`."""
  order, calls, call = NAMES.index(f"{network.part} {network.index}"), [], Stack.__call__

  def patched(stack, x, side, **options):
    calls.append(stack)
    if len(calls) - 1 != order:
      return call(stack, x, side, **options)
    blocks = [jax.tree.map(lambda a: a[i], run) for run in stack.runs for i in range(len(jax.tree.leaves(run)[0]))]  # noqa: B023
    for i, block in enumerate(blocks):
      x = block(x, side)[0]
      written = x.at[:, : network.length].set(jnp.where(mask[:, None], new, x[:, : network.length]))
      x = jnp.where(i == layer, written, x)
    return stack.norm(x), ()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Stack, "__call__", patched)
    final, chunks = network.model.chunked(TOKENS)
  return network.model.logits(final), chunks


@pytest.mark.parametrize("name, layer", [("encoder 0", 0), ("main 2", 0), ("decoder 1", 0)])
def test_single_position_interventions_in_one_pass_are_one_forward_each(name, layer, networks, pairs, chunked):
  """The model's own pass with one position replaced, and with all: at the bytes where the positions stand."""
  network, (_, y) = networks[name], pairs[name]
  written = y[layer] + 0.02 * jax.random.normal(jax.random.key(0), y[layer].shape)
  out = jax.jit(functools.partial(geometry.intervene, skip=SKIP))(network, TOKENS, written[:, SKIP:], layer=layer)
  bytes_at = places(chunked[1][0], 14)
  inner = places(chunked[1][1], 14)
  at = [jnp.tile(jnp.arange(14), (3, 1)), bytes_at, jnp.take_along_axis(bytes_at, inner, axis=1)][network.index]
  np.testing.assert_array_equal(
    jax.jit(network.ids)(TOKENS), jnp.take_along_axis(TOKENS, at, axis=1)[:, : network.length]
  )

  @jax.jit
  def brute(network, mask):
    logits, chunks = through_the_model(network, layer, written, mask)
    return take(logits, at[:, : network.length]), [c.cut for c in chunks]

  nowhere = jnp.zeros(network.length, bool)
  clean, cuts = brute(network, nowhere)
  for mode in geometry.MODES:
    for position in range(SKIP, network.length):
      mask = nowhere.at[position].set(True) if mode == "single_token" else ~nowhere.at[:SKIP].set(True)
      changed, kept = brute(network, mask)
      jax.tree.map(np.testing.assert_array_equal, kept, cuts)
      p, q = jax.nn.log_softmax(clean[:, position]), jax.nn.log_softmax(changed[:, position])
      difference = jnp.linalg.norm(clean - changed, axis=-1)[:, position]
      np.testing.assert_allclose(out[mode]["logits"][:, position - SKIP], difference, rtol=1e-3)
      np.testing.assert_allclose(out[mode]["kl"][:, position - SKIP], jnp.sum(jnp.exp(p) * (p - q), axis=-1), atol=1e-6)
      assert float(difference.min()) > 1e-3
  p = jax.nn.log_softmax(clean)[:, SKIP:]
  np.testing.assert_allclose(out["entropy"], -jnp.sum(jnp.exp(p) * p, axis=-1), rtol=1e-4)


def test_frozen_updates_are_the_blocks_on_the_stacks_own_input(networks, pairs):
  (x, y), network = pairs["main 2"], networks["main 2"]
  u, v = jax.jit(lambda n: geometry.frozen_updates(n, TOKENS, layers=2, skip=0))(network)
  np.testing.assert_allclose(u, y - x, atol=1e-5)
  np.testing.assert_allclose(v[0], u[0], atol=1e-5)
  cos, sin = rotations(CONFIG, 2, jnp.arange(network.length), jnp.float32)
  side = Side(jnp.float32, cos, sin, dot_product_attention, None)
  second = jax.jit(lambda run, x: jax.tree.map(lambda a: a[1], run)(x, side)[0])
  np.testing.assert_allclose(v[1], second(network.stack.runs[0], x[0]) - x[0], atol=1e-5)


def test_the_lens_of_a_stack_reads_what_its_last_block_writes(networks, pairs):
  """An affine map of the last block's outputs to themselves is exact; of noise it is not."""
  network, (x, y) = networks["decoder 0"], pairs["decoder 0"]
  lens = jax.jit(lambda n, x, y: geometry.affine_lens(n, (x, y), (x, y), layer=0, ridge=1e-7, tokens=TOKENS))
  exact = float(lens(network, y, y).max())
  assert exact < 1e-3 and float(lens(network, jax.random.normal(jax.random.key(1), y.shape), y).mean()) > 100 * exact
  with pytest.raises(InputError, match="needs the evaluation's tokens"):
    geometry.affine_lens(network, (x, y), (x, y), layer=0)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda model: geometry.collect(model, TOKENS), "several widths; measure its `layer_geometry_hnet.stacks`"),
    (lambda model: stacks(jax.eval_shape(lambda: Mamba2(MAMBA, jax.random.key(0))), TOKENS), "not of a Mamba2"),
    (lambda model: stacks(model), "there are no rows"),
    (lambda model: geometry.collect(stacks(model, TOKENS[:, :5])["main 2"], TOKENS), "positions in stage 2 of which 4"),
  ],
)
def test_impossible_requests_are_named(call, message, model):
  with pytest.raises(InputError, match=message):
    call(model)
