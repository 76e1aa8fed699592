"""Statistics of what maps read, and models whose maps have other forms: run, generate, saved and loaded again."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.evaluation.methods import subject
from jaxlab.models import Mamba2Config, generate, hub, maps
from jaxlab.models.block import layer_slice
from jaxlab.models.map_forms import Affine
from jaxlab.models.packed_maps import SignStack, pack_codes, unpack_codes
from jaxlab.weights import bitstack, heapr, pruning, struprune, svd
from jaxlab.weights.calibration import Moments, layer_by_layer, merge, moments, rows_of, with_maps
from jaxlab.weights.lord import decompose, factors, masked, truncate
from jaxlab.weights.quantise import awq, quantise, rtn
from tests.common import configs, random_model, random_tokens

TOKENS = random_tokens(16, 24)
MAMBA = Mamba2Config(vocab_size=64, depth=1, width=32, head_dim=16, state=8, chunk=4)


@pytest.fixture(scope="module")
def model():
  return random_model(dataclasses.replace(configs()["qwen3"], depth=4))


@pytest.mark.parametrize("batches", [2, 7])
def test_moments_of_batches_are_those_of_all(batches):
  x = np.random.default_rng(0).normal(3, 1, (14, 5, 4)).astype(np.float32)
  whole, parts = moments(x), [moments(part) for part in np.split(x, batches)]
  total = parts[0]
  for part in parts[1:]:
    total = merge(total, part)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max())
  jax.tree.map(close, whole, total)
  flat = x.reshape(-1, 4).astype(np.float64)
  np.testing.assert_allclose(whole.covariance, np.cov(flat.T, bias=True), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(whole.second, flat.T @ flat / len(flat), rtol=1e-5)
  np.testing.assert_allclose(whole.absolute, np.abs(flat).mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(whole.norm, np.sqrt((x**2).sum(axis=1)).mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "nanochat"])
def test_every_layer_is_seen_with_what_its_maps_read(kind):
  """Against inputs worked out by hand from the trace of the network: of attention and of the MLP."""
  model = random_model(configs()[kind])
  seen = []
  layer_by_layer(model, TOKENS, lambda layer, block, inputs: seen.append(inputs) or {}, batch=4)
  start, trace, side = model.trace(TOKENS)
  assert len(seen) == model.depth
  before = jnp.concatenate([start[None], trace[:-1]])
  for layer in (0, model.depth - 1):
    block = jax.tree.map(lambda a: a[0], layer_slice(model.blocks, layer, layer + 1))
    x = before[layer]
    if model.config.residual_lambdas:
      x = block.residual_lambda[...] * x + block.x0_lambda[...] * side.x0
    a = block.attention_norm(x).reshape(-1, model.config.width)
    np.testing.assert_allclose(seen[layer]["v"].mean, a.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(seen[layer]["q"].second, a.T @ a / len(a), rtol=1e-3, atol=1e-4)
    assert seen[layer]["q"] is seen[layer]["k"] and seen[layer]["mlp.down"].mean.shape == (model.config.mlp_width,)


def test_later_layers_read_what_earlier_ones_give(model):
  """In a sequential pass a map that gives nothing is felt by the next layer, otherwise not."""
  silence = {"o": lambda w: jnp.zeros_like(w), "mlp.down": lambda w: jnp.zeros_like(w)}

  def run(sequential):
    seen = []

    def visit(layer, block, inputs):
      seen.append(inputs["q"].mean)
      plain = maps.named(block)
      return {n: type(plain[n])(f(plain[n].weight[...]), ("embed", "mlp")) for n, f in silence.items()}

    layer_by_layer(model, TOKENS, visit, batch=16, sequential=sequential)
    return seen

  silent, heard = run(True), run(False)
  np.testing.assert_allclose(silent[0], heard[0], atol=1e-6)
  x = model.embed(TOKENS)[0]
  block = jax.tree.map(lambda a: a[0], layer_slice(model.blocks, 1, 2))
  np.testing.assert_allclose(silent[1], block.attention_norm(x).mean(axis=(0, 1)), atol=1e-5)
  assert float(jnp.abs(silent[1] - heard[1]).max()) > 1e-2


def compressed(model, form):
  if form == "factored":
    bases = decompose(model, TOKENS, batch=16)
    return truncate(model, bases, {"q": 8, "mlp.up": 12, "mlp.down": 12})
  if form == "quantised":
    return quantise(model, TOKENS, rtn, bits=3, group=16, batch=16)
  if form == "biased":
    weight = maps.named(model.blocks)["o"].weight[...]
    added = Affine(weight, jnp.full((len(weight), weight.shape[2]), 0.1))
    return quantise(with_maps(model, {"o": added}), TOKENS, rtn, bits=4, group=16, batch=16)
  bases = decompose(model, TOKENS, batch=16)
  return truncate(quantise(model, TOKENS, rtn, bits=4, group=8, batch=16), bases, {"mlp.gate": 12})


@pytest.mark.parametrize("form", ["factored", "quantised", "biased", "both"])
def test_a_compressed_model_generates_and_its_folder_loads_again(model, form, tmp_path):
  small = compressed(model, form)
  logits = small(TOKENS)
  assert float(jnp.abs(logits - model(TOKENS)).max()) > 1e-3
  assert form != "biased" or np.all(maps.named(small.blocks)["o"].bias[...] == jnp.float32(0.1))
  tokens = generate(small, TOKENS[:2], tokens=4)
  expected = TOKENS[:2]
  for _ in range(4):
    expected = jnp.concatenate([expected, jnp.argmax(small(expected)[:, -1:], axis=-1)], axis=1)
  np.testing.assert_array_equal(tokens, expected[:, 24:])
  hub.save(small, tmp_path)
  stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
  assert 0 < stored - maps.bytes_of(small) < 8192  # the header
  again = hub.load(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, small, again)
  np.testing.assert_array_equal(again(TOKENS), logits)
  half = hub.load(tmp_path, dtype="bfloat16")
  assert (
    half.dtype == jnp.bfloat16 and maps.named(half.blocks)["mlp.up"].spec == maps.named(small.blocks)["mlp.up"].spec
  )


def test_a_compressed_model_runs_under_snlp(model):
  small = compressed(model, "factored")
  network, logits, _ = subject(small, "snlp", layers=3, iterations=3, surrogate="jacobi")
  np.testing.assert_allclose(jax.jit(logits)(network, TOKENS), small(TOKENS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_codes_are_packed_without_loss(bits):
  codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 16, 3)).astype(np.uint8)
  packed = pack_codes(codes, bits)
  assert packed.shape == (2, 2 * bits, 3)
  np.testing.assert_array_equal(unpack_codes(packed, bits), codes)


def test_rows_are_windows_of_the_text():
  ids = np.arange(100)
  rows = rows_of(ids, rows=5, time=9)
  np.testing.assert_array_equal(np.diff(rows), 1)
  np.testing.assert_array_equal(rows, rows_of(ids, rows=5, time=9))


def test_wrong_input_is_one_line(model, tmp_path):
  nothing = lambda layer, block, inputs: {}
  with pytest.raises(InputError, match="16 rows of calibration text; give a multiple of batch=5"):
    layer_by_layer(model, TOKENS, nothing, batch=5)
  with pytest.raises(InputError, match="without experts"):
    layer_by_layer(random_model(configs()["qwen3_moe"]), TOKENS, nothing)
  broken = with_maps(model, {})
  broken.norm.gain[...] = jnp.full_like(broken.norm.gain[...], jnp.nan)
  with pytest.raises(InputError, match=r"norm.gain.* holds NaN or infinity"):
    layer_by_layer(broken, TOKENS, nothing)
  with pytest.raises(InputError, match="the calibration text has 3 tokens; one row takes 9"):
    rows_of(np.arange(3), rows=1, time=9)
  with pytest.raises(InputError, match="bits times inputs"):
    pack_codes(np.zeros((3, 2), np.uint8), 3)
  hub.save(compressed(model, "factored"), tmp_path)
  file = tmp_path / "config.json"
  config = json.loads(file.read_text())
  for change, message in (
    ({"mlp.wide": {"kind": "factored"}}, "compression: the map is 'mlp.wide'"),
    ({"q": {"kind": "ternary"}}, "compression.q.kind is 'ternary'; it must be one of factored, quantised"),
    ({"q": {"kind": "factored", "rank": "8"}}, "its sizes must be whole numbers"),
    ({"q": {"kind": "factored", "rank": 8, "bits": 2}}, "compression.q is not a factored map"),
    ([1], "compression is .1.; it must be an object of maps"),
  ):
    file.write_text(json.dumps(config | {"compression": change}))
    with pytest.raises(InputError, match=message):
      hub.load(tmp_path)


STARTS = {
  "lord": functools.partial(decompose, batch=16),
  "svd": functools.partial(svd.decompose, batch=16),
  "gradient": functools.partial(pruning.prune, how="gradient", density=0.5, batch=16),
  "wanda": functools.partial(pruning.prune, density=0.5, batch=16),
  "awq": functools.partial(awq, bits=4, group=8, batch=16),
  "gptq": functools.partial(quantise, bits=4, group=8, batch=16),
  "bitstack": functools.partial(bitstack.decompose, rank=2, batch=16),
  "struprune": functools.partial(struprune.prune, budget=0.7, batch=16),
  "heapr": functools.partial(heapr.statistics, batch=16),
}


@pytest.mark.parametrize("method", STARTS)
def test_what_no_method_starts_from_is_one_line(model, method):
  """A model compressed before, rows without tokens, another kind of network."""
  begin = STARTS[method]
  packed = with_maps(model, {"k": SignStack.empty((4,), 32, 32, blocks=1, rank=1, scaled=True)})
  named = {"struprune": "plain matrices", "heapr": "no experts"}.get(method, "k is a SignStack")
  with pytest.raises(InputError, match=named):
    begin(packed, TOKENS)
  empty = {"lord": "has 0 tokens", "gradient": "rows have 0 tokens"}.get(method, r"text has shape \(16, 0\)")
  if method != "heapr":
    with pytest.raises(InputError, match=empty):
      begin(model, np.zeros((16, 0), np.int32))
  with pytest.raises(InputError, match="the maps are those of a Transformer; this is a Mamba2"):
    begin(random_model(MAMBA), TOKENS)


def test_moments_are_a_tree_of_arrays():
  assert len(jax.tree.leaves(jax.eval_shape(moments, jnp.zeros((1, 2, 3))))) == len(Moments.__dataclass_fields__)


@pytest.mark.parametrize("centre", [True, False])
def test_a_map_of_low_rank_keeps_the_bias_of_the_map(model, centre):
  """At full rank the function is the same: what was pruned before has biases that make up for what is gone."""
  weight = maps.named(model.blocks)["o"].weight[...]
  added = Affine(weight, jax.random.normal(jax.random.key(1), (len(weight), weight.shape[2])))
  biased = with_maps(model, {"o": added})
  one = decompose(biased, TOKENS, batch=16, centre=centre)["o"]
  full = {"o": factors(one, one.up.shape[-2], dtype=jnp.float32)}
  np.testing.assert_allclose(with_maps(model, full)(TOKENS), biased(TOKENS), rtol=1e-4, atol=1e-4)
  ranks = masked(biased, {"o": one}, {"o": jnp.int32(0)})
  np.testing.assert_allclose(ranks(TOKENS), biased(TOKENS), rtol=1e-4, atol=1e-4)
  (bias,) = (form.bias[...] for form in svd.decompose(biased, TOKENS, names=["o"], batch=16).values())
  np.testing.assert_array_equal(bias, added.bias[...])
