import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec

from jaxlab.core.checks import InputError
from jaxlab.core.mesh import make_mesh
from jaxlab.models import config_json, formats, generate, hub
from jaxlab.models.config import Experts, RopeScaling, TransformerConfig
from tests.common import SHAPE, configs, random_model, random_tokens

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if (path / "expected.npz").exists())
CONFIGS = configs()


@pytest.fixture
def folder(tmp_path):
  """A copy of one sharded checkpoint, to be spoilt."""
  return pathlib.Path(shutil.copytree(FIXTURES / "qwen3", tmp_path / "qwen3"))


@pytest.fixture
def llama(tmp_path):
  """A copy of one checkpoint in one file, to be spoilt."""
  return pathlib.Path(shutil.copytree(FIXTURES / "llama", tmp_path / "llama"))


def edit_config(folder, **changes):
  """`...` removes a field."""
  raw = json.loads((folder / "config.json").read_text()) | changes
  (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def edit_tensors(folder, file="model.safetensors", **changes):
  """Adds or replaces tensors; two underscores stand for a dot."""
  tensors = safetensors.numpy.load_file(folder / file)
  safetensors.numpy.save_file(
    tensors | {name.replace("__", "."): value for name, value in changes.items()}, folder / file
  )


def assert_same(actual, expected):
  assert actual.config == expected.config
  chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name):
  expected = np.load(FIXTURES / name / "expected.npz")
  model = hub.load(FIXTURES / name, dtype="float32")
  np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, expected["tokens"]), expected["logits"], atol=1e-4)
  greedy = generate(model, jnp.asarray(expected["tokens"][:, :5]), tokens=64)
  np.testing.assert_array_equal(greedy, expected["greedy"])


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_models_come_back_bit_for_bit(name, tmp_path):
  for dtype in ("float32", "bfloat16"):
    model = random_model(CONFIGS[name], dtype=dtype)
    hub.save(model, tmp_path)
    loaded = hub.load(tmp_path)
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded, model)


def test_large_checkpoints_are_sharded_and_saving_again_leaves_no_stale_shard(tmp_path, monkeypatch):
  model = random_model(CONFIGS["qwen3"])
  monkeypatch.setattr(hub, "_SHARD_BYTES", 2**16 + 20_000)
  hub.save(model, tmp_path)
  assert len(list(tmp_path.glob("*.safetensors"))) > 3
  jax.tree.map(np.testing.assert_array_equal, hub.load(tmp_path), model)
  monkeypatch.undo()
  hub.save(model, tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_nanochat_tensors_round_trip_and_legacy_ones_are_filled_in():
  model = random_model(CONFIGS["nanochat"])
  tensors = hub.to_tensors(model, formats.KARPATHY)
  assert tensors["transformer.h.1.attn.c_q.weight"].shape == (48, 48)
  assert "value_embeds.1.weight" in tensors and "value_embeds.0.weight" not in tensors
  raw = dict(n_layer=6, n_embd=48, n_head=3, n_kv_head=3, vocab_size=64, sequence_len=512, window_pattern="SSSL")
  config = formats.karpathy_config(raw, tensors)
  assert config == model.config
  back = hub.from_tensors(config, formats.KARPATHY, tensors.__getitem__, tensors)
  tokens = random_tokens(1, 9)
  logits = jax.jit(lambda m: m(tokens))
  np.testing.assert_array_equal(logits(back), logits(model))
  old = {k: v for k, v in tensors.items() if "ve_gate" not in k and "value_embeds" not in k and "lambda" not in k}
  config = formats.karpathy_config(raw | {"window_pattern": "L"}, old)
  legacy = hub.from_tensors(config, formats.KARPATHY, old.__getitem__, old)
  assert not config.value_embeddings and float(legacy.backout_lambda[...]) == 0
  np.testing.assert_array_equal(legacy.blocks.residual_lambda[...], np.ones(6))


def test_names_find_the_folder(tmp_path):
  assert hub.find(FIXTURES / "llama") == FIXTURES / "llama"
  with pytest.raises(InputError, match="no checkpoint 'nowhere'"):
    hub.find("nowhere")


def test_a_repository_is_taken_from_the_cache_when_whole_and_downloaded_otherwise(folder, llama, monkeypatch):
  calls = []

  def snapshot(local_files_only, repo_id, allow_patterns):
    calls.append(local_files_only)
    if repo_id == "some/none":
      raise OSError("offline")
    return str(folder if local_files_only else llama)

  monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
  assert hub.find("some/model") == folder and calls == [True]
  next(folder.glob("*00002-of*")).unlink()
  assert hub.find("some/model") == llama and calls == [True, True, False]
  with pytest.raises(InputError, match="no checkpoint 'some/none'"):
    hub.find("some/none")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_files_beside_the_model_neither_mix_in_nor_block_nor_are_deleted(name, tmp_path):
  """Adapters, averages, optimizer states, consolidated copies, shards of another save: none of them is the model."""
  folder = pathlib.Path(shutil.copytree(FIXTURES / name, tmp_path / name))
  expected = hub.load(folder)
  wrong = {leaf: np.zeros((3, 3), np.float32) for leaf in ("model.norm.weight", "lm_head.weight", "lora_A")}
  others = ["adapter_model", "ema", "consolidated.00", "zzz", "model-00001-of-00099"]
  for other in others:
    safetensors.numpy.save_file(wrong, folder / f"{other}.safetensors")
  (folder / "optimizer.safetensors").write_bytes(b"no safetensors at all")
  assert_same(hub.load(folder), expected)
  hub.save(expected, folder)
  assert_same(hub.load(folder), expected)
  left = {path.stem for path in folder.glob("*.safetensors")}
  assert left == {*others, "optimizer", "model"}


def test_a_damaged_index_names_nothing_to_delete(folder):
  model = hub.load(folder)
  shards = sorted(path.name for path in folder.glob("model-*"))
  (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../precious.safetensors"}}')
  with pytest.raises(InputError, match="weight_map must give every tensor a file of the folder"):
    hub.load(folder)
  hub.save(model, folder)
  assert_same(hub.load(folder), model)
  assert sorted(path.name for path in folder.glob("model-*")) == shards


@pytest.mark.parametrize(
  "spoil, message",
  [
    (lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel.*must be one of LlamaForCausalLM"),
    (lambda f: edit_config(f, architectures="LlamaForCausalLM"), "architectures is 'LlamaForCausalLM'"),
    (lambda f: edit_config(f, model_type="mistral"), "model_type is 'mistral'"),
    (lambda f: edit_config(f, attention_bias=True), "attention_bias is True.*does not support"),
    (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantization_config is .*does not support"),
    (lambda f: edit_config(f, embedding_multiplier=12.0), "embedding_multiplier is 12.0.*does not support"),
    (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
    (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), "rope_type.*yarn"),
    (lambda f: edit_config(f, rope_scaling={"type": "linear"}), "factor is missing"),
    (lambda f: edit_config(f, rope_scaling={"type": "llama3", "factor": 8.0}), "low_freq_factor is missing"),
    (lambda f: edit_config(f, rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    (lambda f: edit_config(f, layer_types=["sliding_attention"] * 3), "use_sliding_window is off"),
    (lambda f: edit_config(f, layer_types=["full_attention"]), "must be 3 times"),
    (lambda f: edit_config(f, hidden_size=40), "config.json makes it"),
    (lambda f: edit_config(f, num_hidden_layers=4, layer_types=...), "lacks tensor model.layers.3"),
    (lambda f: edit_config(f, num_hidden_layers=2, layer_types=...), "does not have: model.layers.2"),
    (lambda f: edit_config(f, tie_word_embeddings=True), "lm_head.weight is not the embedding"),
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    (lambda f: [p.unlink() for p in f.glob("*.safetensors")], "lacks model-00001-of-00006.safetensors, which .* lists"),
    (lambda f: (f / "model.safetensors.index.json").unlink(), "has neither .* nor model.safetensors"),
    (
      lambda f: (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": 300 * "a" + ".safetensors"}})
      ),
      "lacks 'aaa.* which .* lists",
    ),
    (lambda f: edit_tensors(f, "model-00003-of-00006.safetensors", x=np.zeros(1, np.float32)), "disagree about x"),
    (lambda f: _truncate(next(f.glob("*00002-of*"))), "damaged or truncated"),
  ],
)
def test_wrong_checkpoints_are_named(folder, spoil, message):
  spoil(folder)
  with pytest.raises(InputError, match=message) as error:
    hub.load(folder)
  assert "\n" not in str(error.value)


# Their absence shows in a field that has its default from them, their wrong content in a field of it.
_DERIVED = ("rope_parameters", "num_attention_heads", "hidden_size", "num_local_experts")


@pytest.mark.parametrize("wrong", [None, "8", [1], True, -1, 0, float("nan"), 10**400, {"a": 1}, ...])
@pytest.mark.parametrize("name", ["llama3", "qwen3_moe", "nanochat"])
def test_a_field_that_is_null_mistyped_or_missing_is_named(name, wrong):
  """Or it has a default, or changes nothing: no other exception, no number half read."""
  raw = json.loads((FIXTURES / name / "config.json").read_text())
  for field in raw:
    changed = {k: v for k, v in (raw | {field: wrong}).items() if v is not ...}
    try:
      config_json.read(changed, "config.json")
    except InputError as error:
      assert field in str(error) or field in _DERIVED
      assert "\n" not in str(error) and str(error).startswith("config.json: ")
    else:
      numbers = ("rms_norm_eps", "max_position_embeddings", "vocab_size", "hidden_size", "intermediate_size")
      assert wrong in (None, ...) or field not in numbers


def test_fields_left_out_have_the_defaults_of_transformers():
  shape = dict(vocab_size=9, hidden_size=512, intermediate_size=7, num_hidden_layers=2, num_attention_heads=32)
  read = lambda arch, **fields: config_json.read({"architectures": [arch], **shape, **fields}, "config.json")[0]
  llama = read("LlamaForCausalLM")
  assert (llama.kv_heads, llama.head_dim, llama.context) == (32, 16, 2048)
  assert (llama.norm_eps, llama.rope_theta, llama.tied_embeddings) == (1e-6, 10000.0, False)
  qwen = read("Qwen3ForCausalLM")
  assert (qwen.kv_heads, qwen.head_dim, qwen.context, qwen.windows) == (32, 128, 32768, (None, None))
  assert read("Qwen3ForCausalLM", use_sliding_window=True, max_window_layers=1).windows == (None, 4095)
  moe = read("Qwen3MoeForCausalLM")
  assert (moe.kv_heads, moe.head_dim) == (4, 16)
  assert moe.experts == Experts(count=128, active=8, width=768, normalize=False)
  assert read("NanoChatForCausalLM").logit_softcap == 15.0
  assert read("NanoChatForCausalLM", final_logit_softcapping=None).logit_softcap is None
  old = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
  assert read("LlamaForCausalLM", rope_scaling=old).rope_scaling == RopeScaling(8.0, 1.0, 4.0, original_context=2048)
  both = read("LlamaForCausalLM", rope_scaling={"type": "linear", "factor": 2}, rope_parameters={"rope_theta": 5.0})
  assert (both.rope_factor, both.rope_theta) == (2.0, 10000.0)


WINDOWS = (None, 3, None, 3, None, 3)


@pytest.mark.parametrize(
  "changes, arch",
  [
    (dict(rope_factor=4.0), "LlamaForCausalLM"),
    (dict(rope_scaling=RopeScaling(original_context=64)), "LlamaForCausalLM"),
    (dict(rope_scaling=RopeScaling(), rope_factor=2.0), "JaxlabTransformer"),
    (dict(qk_norm="before_rope", layer_windows=WINDOWS), "Qwen3ForCausalLM"),
    (dict(qk_norm="before_rope", layer_windows=(3,) * 6, experts=Experts(4, 2, 24)), "Qwen3MoeForCausalLM"),
    (dict(qk_norm="before_rope", layer_windows=WINDOWS, experts=Experts(4, 2, 24)), "JaxlabTransformer"),
    (dict(qk_norm="before_rope", layer_windows=(*WINDOWS[:5], 9)), "JaxlabTransformer"),
    (dict(layer_windows=WINDOWS), "JaxlabTransformer"),
    (dict(parallel_sublayers=True, hyper=None, rope_scaling=RopeScaling()), "JaxlabTransformer"),
  ],
)
def test_configs_come_back_from_their_description(changes, arch):
  config = TransformerConfig(**SHAPE, **changes)
  assert config_json.architecture(config) == arch
  raw = json.loads(json.dumps(config_json.describe(config, arch)))
  assert config_json.read(raw, "config.json") == (config, arch)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(depth="6"), "transformer.depth is '6'; it must be int"),
    (dict(norm_eps=None), "transformer.norm_eps is None; it must be float"),
    (dict(smear=1), "transformer.smear is 1; it must be bool"),
    (dict(rope_theta=float("nan")), "transformer.rope_theta is nan; it must be finite"),
    (dict(context=2**40), "transformer.context is 1099511627776; it must be finite and smaller"),
    (dict(flux=1), "transformer has flux, which no model here has"),
    (dict(hyper={"streams": "4"}), "transformer.hyper.streams is '4'"),
    (dict(layer_windows=[None, "3"]), "transformer.layer_windows is '3'"),
    (dict(depth=...), "transformer.depth is missing"),
  ],
)
def test_wrong_descriptions_of_own_models_are_named(changes, message):
  raw = config_json.describe(CONFIGS["mhc"], formats.OWN)
  raw["transformer"] = {k: v for k, v in (raw["transformer"] | changes).items() if v is not ...}
  with pytest.raises(InputError, match=message):
    config_json.read(raw, "config.json")


def test_a_tensor_too_many_is_forgiven_where_it_repeats_another(llama, tmp_path):
  tied = pathlib.Path(shutil.copytree(FIXTURES / "qwen3_tied", tmp_path / "tied"))
  expected = hub.load(tied)
  embedding = safetensors.numpy.load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
  edit_tensors(tied, lm_head__weight=embedding)
  assert_same(hub.load(tied), expected)
  edit_tensors(tied, lm_head__weight=embedding + 1e-3)
  with pytest.raises(InputError, match=r"lm_head.weight is not the embedding.*unset it"):
    hub.load(tied)
  # Llama checkpoints of 2023 hold the rotary frequencies, 10000^(-2 i / 8) here.
  expected = hub.load(llama)
  frequencies = (10000.0 ** -(np.arange(4) / 4)).astype(np.float16)
  name = "model__layers__0__self_attn__rotary_emb__inv_freq"
  edit_tensors(llama, **{name: frequencies})
  assert_same(hub.load(llama), expected)
  edit_tensors(llama, **{name: frequencies / 2})
  with pytest.raises(InputError, match=r"rotary_emb.inv_freq holds other frequencies"):
    hub.load(llama)


def test_only_floats_of_one_dtype_are_weights(llama):
  gate = "model__layers__1__mlp__gate_proj__weight"
  weight = safetensors.numpy.load_file(llama / "model.safetensors")[gate.replace("__", ".")]
  edit_tensors(llama, **{gate: weight.astype(np.float16)})
  with pytest.raises(
    InputError, match=r"layers.1.mlp.gate_proj.weight is float16, the layers before float32; pass dtype"
  ):
    hub.load(llama)
  assert hub.load(llama, dtype="float32").dtype == jnp.float32
  edit_tensors(llama, **{gate: np.zeros(weight.shape, np.int8)})
  with pytest.raises(InputError, match="holds int8; only 16, 32 and 64 bit floats"):
    hub.load(llama, dtype="float32")


def test_a_mesh_gets_every_parameter_by_the_rules():
  mesh = make_mesh({"fsdp": 4, "tensor": 2})
  model = hub.load(FIXTURES / "qwen3_moe", mesh=mesh)
  assert model.blocks.q.weight[...].sharding.spec == PartitionSpec("layer", "fsdp", "tensor")
  assert model.blocks.mlp.gate[...].sharding.spec == PartitionSpec("layer", "tensor", "fsdp", None)
  assert_same(model, hub.load(FIXTURES / "qwen3_moe"))


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-100])


def test_a_failed_save_leaves_the_old_checkpoint_whole(folder, monkeypatch):
  before = hub.load(folder)
  replace = random_model(CONFIGS["qwen3"])

  def full(fd):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(InputError, match="No space left on device; free some space"):
    hub.save(replace, folder)
  jax.tree.map(np.testing.assert_array_equal, hub.load(folder), before)
  assert not [path for path in folder.iterdir() if path.name.startswith(".")]
