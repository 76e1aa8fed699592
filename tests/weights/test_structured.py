"""Groups left out: masked, sliced, saved and generated from alike; the rivals' scores written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import generate, hub, inference, maps
from jaxlab.models.map_forms import Affine
from jaxlab.training import lora
from jaxlab.weights import structured
from jaxlab.weights.calibration import layer_by_layer
from jaxlab.weights.structured import Groups
from tests.common import configs, random_model, random_tokens

TOKENS = random_tokens(8, 16)


def small_config(name: str):
  return dataclasses.replace(configs()[name], depth=3, **({"layer_windows": None} if name != "nanochat_plain" else {}))


def random_keep(config, seed: int = 0) -> Groups:
  rng = np.random.default_rng(seed)
  keep = Groups(rng.random((config.depth, config.kv_heads)) < 0.6, rng.random((config.depth, config.mlp_width)) < 0.7)
  keep.heads[:, -1] = True
  return keep


@pytest.fixture(scope="module")
def model():
  return random_model(small_config("qwen3"))


@pytest.fixture(scope="module")
def pair(model):
  """(the pruned network with biases, the same masked)."""
  keep = random_keep(model.config)
  rng = np.random.default_rng(1)
  biases = {name: rng.normal(size=(3, model.config.width)).astype(np.float32) for name in structured.ENDS}
  one = structured.masked(model, keep)
  ends = {name: Affine(maps.named(one.blocks)[name].weight[...], jnp.asarray(b)) for name, b in biases.items()}
  return structured.sliced(model, keep, biases), maps.with_blocks(one, maps.replaced(one.blocks, ends))


@pytest.mark.parametrize("name", ["qwen3", "nanochat_plain"])
def test_masked_is_sliced(name):
  """Groups of queries, gated and squared MLPs; layers of unequal sizes."""
  model = random_model(small_config(name))
  c, keep = model.config, random_keep(model.config)
  small = structured.sliced(model, keep)
  assert small.config.layer_mlp_widths == tuple(keep.neurons.sum(axis=1))
  np.testing.assert_allclose(small(TOKENS), structured.masked(model, keep)(TOKENS), rtol=1e-5, atol=1e-5)
  everything = Groups(np.ones((c.depth, c.kv_heads), bool), np.ones((c.depth, c.mlp_width), bool))
  whole = structured.sliced(model, everything)
  assert whole.config == c
  jax.tree.map(np.testing.assert_array_equal, whole, model)


def test_a_group_of_zeros_is_none(model):
  keep = random_keep(model.config)
  gone = structured.masked(model, keep)
  np.testing.assert_allclose(structured.sliced(gone, keep)(TOKENS), gone(TOKENS), rtol=1e-5, atol=1e-5)


def test_generation_runs_at_the_sizes_of_layers(pair):
  small, masked = pair
  np.testing.assert_array_equal(generate(small, TOKENS[:, :6], tokens=6), generate(masked, TOKENS[:, :6], tokens=6))
  network = inference.take_apart(small, narrow=True)
  state = inference.empty_state(network, batch=1, capacity=8)
  for layer, (block, (keys, _)) in enumerate(zip(network.blocks, state.pairs, strict=True)):
    own = small.config.of_layer(layer)
    assert keys.shape[2] == own.kv_heads and block.mlp.down.shape == (own.mlp_width, 32)
    assert block.qkv.weight.shape == ((own.q_heads + 2 * own.kv_heads) * 16, 32)


def test_a_folder_holds_no_zeros(pair, tmp_path):
  small, _ = pair
  hub.save(small, tmp_path)
  again = hub.load(tmp_path)
  assert again.config == small.config
  jax.tree.map(np.testing.assert_array_equal, again, small)
  counted, written = maps.bytes_of(small), sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
  assert counted < sum(leaf.nbytes for leaf in jax.tree.leaves(small)) and counted <= written < 1.1 * counted


def test_equal_layers_are_a_model_that_others_read(model, tmp_path):
  scores = structured.scores(model, TOKENS, structured.magnitude)
  small = structured.sliced(
    model, Groups(structured.top(scores.heads, [1] * 3), structured.top(scores.neurons, [40] * 3))
  )
  hub.save(small, tmp_path)
  assert '"Qwen3ForCausalLM"' in (tmp_path / "config.json").read_text()
  np.testing.assert_allclose(hub.load(tmp_path)(TOKENS), small(TOKENS), atol=1e-5)


def test_what_is_counted_is_what_is_there(model, pair):
  small, _ = pair
  keep, c = random_keep(model.config), model.config
  part = lambda i: jax.tree.map(lambda a: a[i], model.blocks)
  layers = [structured.slice_block(part(i), keep.heads[i], keep.neurons[i]) for i in range(3)]
  matrices = sum(one.weight.size for layer in layers for one in maps.named(layer).values())
  assert structured.parameters(keep, c) == matrices
  b = model.blocks
  norms = sum(a.size for a in jax.tree.leaves((b.attention_norm, b.mlp_norm, b.q_norm, b.k_norm, model.norm)))
  assert maps.bytes_of(small) == 4 * (matrices + 2 * 3 * 32 + model.embedding.size + norms)
  assert small.config.matmul_parameters == matrices + 64 * 32


def test_scores_are_those_written_out(model):
  """Wanda-sp's, and FLAP's with its variance in two passes, of what each layer reads."""
  seen = []
  layer_by_layer(model, TOKENS, lambda layer, block, inputs: seen.append((block, inputs)) or {})
  wanda = structured.scores(model, TOKENS, structured.wanda)
  flap = structured.scores(model, TOKENS, structured.fluctuation)
  for layer, (block, inputs) in enumerate(seen):
    o, down = np.asarray(block.o.weight[...]), np.asarray(block.mlp.down.weight[...])
    second = np.diagonal(inputs["o"].second)
    np.testing.assert_allclose(
      wanda.heads[layer], (np.abs(o).mean(axis=1) * np.sqrt(second)).reshape(2, -1).sum(axis=1), rtol=1e-4
    )
    var = np.diagonal(inputs["mlp.down"].scatter) / TOKENS.size
    np.testing.assert_allclose(flap.neurons[layer], var * (down**2).sum(axis=1), rtol=1e-4)


def test_biases_give_back_what_is_left_out_on_average(model):
  """FLAP with all but means left out of the MLP: what the first layer adds has the mean it had."""
  small = structured.flap(model, TOKENS, budget=0.7)
  assert structured.dense_parameters(model.config) * 0.7 >= sum(
    structured.parameters(Groups(np.ones((1, one.kv_heads)), np.ones((1, one.mlp_width))), one) + 2 * 32
    for one in map(small.config.of_layer, range(3))
  )
  first, found = [], []
  for one, kept in ((model, first), (small, found)):
    layer_by_layer(one, TOKENS, lambda layer, block, inputs, kept=kept: kept.append((block, inputs)) or {})
  (block, inputs), (other, theirs) = first[0], found[0]
  mean = np.asarray(inputs["o"].mean @ block.o.weight[...])
  np.testing.assert_allclose(theirs["o"].mean @ other.o.weight[...] + other.o.bias[...], mean, rtol=1e-3, atol=1e-4)


def test_wanda_sp_is_of_one_share(model):
  small = structured.wanda_sp(model, TOKENS, budget=0.6)
  _, neurons = structured.counts_at(0.6, model.config)
  assert [small.config.of_layer(i).mlp_width for i in range(3)] == list(neurons)
  keep = structured.uniform(structured.scores(model, TOKENS, structured.wanda), model.config, budget=0.6)
  one = structured.sliced(model, keep)
  # The first layer reads the same, so it is the same; later ones read pruned layers.
  own = lambda m: np.asarray(m.blocks.mlp.up.weight[0][:, : neurons[0]])
  np.testing.assert_array_equal(own(small), own(one))


def test_tuning_leaves_no_trace(pair):
  """Adapters fill nothing up."""
  small, _ = pair
  adapters = lora.init(small, jax.random.key(0), rank=2, where=lambda name: name.startswith("blocks."))
  adapters = dataclasses.replace(adapters, b=jax.tree.map(lambda a: a + 0.1, adapters.b))
  tuned = structured.zeroed(lora.merge(small, adapters))
  widths, up = small.config.layer_mlp_widths, np.asarray(tuned.blocks.mlp.up.weight[...])
  assert all(not up[layer, :, n:].any() and up[layer, :, :n].any() for layer, n in enumerate(widths))


def test_wrong_input_is_one_line(model, pair):
  keep = random_keep(model.config)
  with pytest.raises(InputError, match="pruned before to layers of unequal sizes"):
    structured.sliced(pair[0], keep)
  with pytest.raises(InputError, match="without value embeddings"):
    structured.require_prunable(random_model(configs()["nanochat"]))
  with pytest.raises(InputError, match="dense blocks"):
    structured.require_prunable(random_model(configs()["qwen3_moe"]))
  with pytest.raises(InputError, match="left without heads or neurons"):
    structured.sliced(model, Groups(keep.heads & False, keep.neurons))
  with pytest.raises(InputError, match=r"budget is 1.5; it must lie in 0 < budget <= 1"):
    structured.wanda_sp(model, TOKENS, budget=1.5)
  with pytest.raises(InputError, match=r"what every layer keeps takes 0.\d+, raise it"):
    structured.flap(model, TOKENS, budget=0.01)
  with pytest.raises(InputError, match=r"model.layer_kv_heads is \(1, 3, 1\); it must have 3 sizes of 1..2"):
    dataclasses.replace(model.config, layer_kv_heads=(1, 3, 1))
