import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models import formats, generate, hub
from tests.common import configs, random_model, random_tokens

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if (path / "expected.npz").exists())
CONFIGS = configs()


@pytest.fixture
def folder(tmp_path):
  """A copy of one checkpoint, to be spoilt."""
  return pathlib.Path(shutil.copytree(FIXTURES / "qwen3", tmp_path / "qwen3"))


def edit_config(folder, **changes):
  raw = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(raw | changes))


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


@pytest.mark.parametrize(
  "spoil, message",
  [
    (lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel.*must be one of LlamaForCausalLM"),
    (lambda f: edit_config(f, attention_bias=True), "attention_bias=True, which is not supported"),
    (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), "rope_type.*yarn"),
    (lambda f: edit_config(f, hidden_size=40), "config.json makes it"),
    (lambda f: edit_config(f, num_hidden_layers=4), "lacks tensor model.layers.3"),
    (lambda f: edit_config(f, num_hidden_layers=2), "does not have: model.layers.2"),
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    (lambda f: [p.unlink() for p in f.glob("*.safetensors")], "no .*safetensors file"),
    (lambda f: _truncate(next(f.glob("*00002-of*"))), "damaged or truncated"),
  ],
)
def test_wrong_checkpoints_are_named(folder, spoil, message):
  spoil(folder)
  with pytest.raises(InputError, match=message):
    hub.load(folder)


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
