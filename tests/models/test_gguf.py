"""GGUF files: small ones written here with the package `gguf`, and the real one of `smollm2`."""

import json
import pathlib

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from tokenizers.pre_tokenizers import ByteLevel

from jaxlab.core.checks import InputError
from jaxlab.models import hub

gguf = pytest.importorskip("gguf")

LLAMA = pathlib.Path(__file__).parents[1] / "fixtures" / "llama"
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
INSIDE |= {f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"} | {"self_attn.o_proj": "attn_output"}
INSIDE |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}


def interleave(weight, heads):
  """What llama.cpp does to queries and keys: rows 0, n/2, 1, n/2 + 1, ... of every head."""
  n = weight.shape[0] // heads
  order = np.stack([np.arange(n // 2), np.arange(n // 2) + n // 2], axis=1).reshape(-1)
  return np.concatenate([weight[head * n + order] for head in range(heads)])


def write(file, *, tokenizer=True, tensors=None, arch="llama", **metadata):
  """The checkpoint of `LLAMA` as a GGUF file; metadata and tensors on top, `None` leaves an entry out."""
  raw = json.loads((LLAMA / "config.json").read_text())
  writer = gguf.GGUFWriter(file, arch)
  entries = {
    "llama.block_count": raw["num_hidden_layers"],
    "llama.context_length": raw["max_position_embeddings"],
    "llama.embedding_length": raw["hidden_size"],
    "llama.feed_forward_length": raw["intermediate_size"],
    "llama.attention.head_count": raw["num_attention_heads"],
    "llama.attention.head_count_kv": raw["num_key_value_heads"],
    "llama.attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 8,
    "llama.vocab_size": raw["vocab_size"],
  }
  letters = sorted(ByteLevel.alphabet())[: raw["vocab_size"] - 4]
  if tokenizer:
    entries |= {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.pre": "smollm",
      "tokenizer.ggml.tokens": ["<|start|>", "<|end|>", *letters, "ab", "abc"],
      "tokenizer.ggml.token_type": [3, 3, *[1] * (len(letters) + 2)],
      "tokenizer.ggml.merges": ["a b", "ab c"],
      "tokenizer.ggml.bos_token_id": 0,
      "tokenizer.ggml.eos_token_id": 1,
      "tokenizer.chat_template": "{{ messages }}",
    }
  for name, value in (entries | {k.replace("__", "."): v for k, v in metadata.items()}).items():
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    add |= {bool: writer.add_bool}
    if value is not None:
      add[type(value)](name, value)
  for name, tensor in safetensors.numpy.load_file(LLAMA / "model.safetensors").items():
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
      short = OUTSIDE[stem]
    else:
      _, _, layer, part = stem.split(".", 3)
      short = f"blk.{layer}.{INSIDE[part]}"
    heads = {"attn_q": raw["num_attention_heads"], "attn_k": raw["num_key_value_heads"]}.get(short.split(".")[-1])
    writer.add_tensor(f"{short}.weight", interleave(tensor, heads) if heads else tensor)
  for name, tensor in (tensors or {}).items():
    writer.add_tensor(name, tensor)
  for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    step()
  return file


def test_a_gguf_file_is_the_model_it_was_made_of(tmp_path):
  file = write(tmp_path / "model.gguf")
  expected = hub.load(LLAMA)
  for path in (file, tmp_path):
    model = hub.load(path)
    assert model.config == expected.config
    chex.assert_trees_all_equal(model, expected)
  scaled = hub.load(write(tmp_path / "b.gguf", llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0))
  assert scaled.config.rope_factor == 4.0


def test_the_vocabulary_is_in_the_metadata(tmp_path):
  vocabulary = hub.load_vocabulary(write(tmp_path / "model.gguf"))
  tokenizer = vocabulary.tokenizer
  encoded = tokenizer.encode("<|start|>abc!<|end|>")
  assert encoded.tokens == ["<|start|>", "abc", "!", "<|end|>"] and tokenizer.decode(encoded.ids) == "abc!"
  assert (vocabulary.bos, vocabulary.eos, vocabulary.chat_template) == (0, (1,), "{{ messages }}")
  begins = hub.load_vocabulary(write(tmp_path / "b.gguf", tokenizer__ggml__add_bos_token=True))
  assert begins.tokenizer.encode("ab").tokens == ["<|start|>", "ab"]


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(arch="mamba"), "the architecture in .* is 'mamba'; it must be one of llama"),
    (dict(llama__expert_count=8), "metadata llama.expert_count is not supported"),
    (dict(llama__rope__scaling__type="yarn"), "llama.rope.scaling.type .* is 'yarn'"),
    (dict(llama__rope__dimension_count=4), "llama.rope.dimension_count is 4; only the head size 8"),
    (dict(llama__block_count=None), "lacks the metadata llama.block_count"),
    (dict(llama__block_count="3"), "num_hidden_layers is '3'; it must be a whole number"),
    (dict(llama__block_count=2), "tensors this architecture does not have: model.layers.2"),
    (dict(tensors={"rope_freqs.weight": np.ones(4, np.float32)}), "does not have: rope_freqs.weight"),
  ],
)
def test_other_models_are_refused_in_one_line(tmp_path, options, message):
  file = write(tmp_path / "model.gguf", **options)
  with pytest.raises(InputError, match=message) as error:
    hub.load(file)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(tokenizer__ggml__model="llama"), "tokenizer.ggml.model .* is 'llama'; it must be one of gpt2"),
    (dict(tokenizer__ggml__pre="llama-bpe"), "tokenizer.ggml.pre .* is 'llama-bpe'; it must be one of smollm, gpt-2"),
    (dict(tokenizer__ggml__merges=["a b", "x y z"]), "tokenizer metadata"),
    (dict(tokenizer__ggml__token_type=[1, 2]), "tokenizer metadata"),
    (dict(tokenizer__ggml__bos_token_id=500), "tokenizer.ggml.bos_token_id is 500; the vocabulary has 96"),
    (dict(tokenizer=False), "tokenizer.ggml.model .* is None"),
  ],
)
def test_other_tokenizers_are_refused_in_one_line(tmp_path, options, message):
  file = write(tmp_path / "model.gguf", **options)
  with pytest.raises(InputError, match=message) as error:
    hub.load_vocabulary(file)
  assert "\n" not in str(error.value)


def test_damaged_files_and_folders_of_several_are_refused(tmp_path):
  file = write(tmp_path / "model.gguf")
  whole = file.read_bytes()
  for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
    file.write_bytes(whole[:size])
    with pytest.raises(InputError, match=r"model.gguf") as error:
      hub.load(file)
    assert "\n" not in str(error.value)
  write(tmp_path / "other.gguf")
  with pytest.raises(InputError, match="holds 2 GGUF files; give the path of one"):
    hub.load(tmp_path)


@pytest.mark.smollm2
def test_smollm2_reads_english_and_comes_back_from_a_folder(smollm2, tmp_path):
  model, vocabulary = smollm2
  tokenizer = vocabulary.tokenizer
  assert tokenizer.encode("Hello world 12 <|im_end|>").ids == [19556, 905, 216, 33, 34, 216, 2]
  text = "Once upon a time there was a little girl who lived in a house at the edge of the forest with her grandmother."
  ids = tokenizer.encode(text).ids
  assert tokenizer.decode(ids) == text and (vocabulary.bos, vocabulary.eos) == (1, (2,))
  logits = jax.jit(lambda m, t: m(t))(model, np.array([ids]))[0, :-1]
  loss = -jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), np.array(ids[1:])].mean()
  assert np.exp(loss) < 15, np.exp(loss)  # guessing among 49,152 tokens is 49,152
  hub.save(model, tmp_path)
  loaded = hub.load(tmp_path)
  assert loaded.config == model.config
  chex.assert_trees_all_equal(loaded, model)
