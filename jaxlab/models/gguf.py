"""GGUF files of the llama architecture: their configuration, dequantised tensors and tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` parses and dequantises.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from jaxlab.core.checks import InputError, plain, require, require_choice
from jaxlab.core.foreign import foreign

_REMEDY = "fetch the file again, or convert it with the gguf tools of today"
_CONTROL, _USER_DEFINED = 3, 4  # token types; the others are ordinary entries
_BLOCK = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
# Metadata under "llama." that `read_config` uses, and what it may hold besides without changing the function.
_USED = {
  "block_count",
  "embedding_length",
  "feed_forward_length",
  "attention.head_count",
  "attention.head_count_kv",
  "attention.key_length",
  "attention.value_length",
  "attention.layer_norm_rms_epsilon",
  "context_length",
  "vocab_size",
  "rope.freq_base",
  "rope.dimension_count",
  "rope.scaling.type",
  "rope.scaling.factor",
}


def read(file: Path):
  """(fields, tensors) of a GGUF file: metadata name -> value, tensor name -> the package's lazy tensor.

  Raises:
    InputError: the package is missing, the file is damaged, or its architecture is not llama.
  """
  try:
    import gguf
  except ImportError:
    raise InputError(f"reading {file.name} needs the package gguf; pip install --no-deps gguf") from None
  with foreign(file, _REMEDY):
    reader = gguf.GGUFReader(file)
    fields = {name: _shortest(field.contents()) for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
  architecture = fields.get("general.architecture")
  require_choice(f"the architecture in {file}", architecture, ("llama",))
  return fields, tensors


def _shortest(value):
  """A float32 as the shortest decimal that names it, which is what it was written from: 1e-05, not 9.99999974e-06."""
  return float(str(np.float32(value))) if type(value) is float and float(np.float32(value)) == value else value


def read_config(file: Path, fields: Mapping, tensors: Mapping) -> dict:
  """The config.json that says the same as the metadata.

  Raises:
    InputError: an entry is missing or says something that the Llama architecture here does not have.
  """
  entries = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
  unknown = sorted(f"llama.{name}" for name in set(entries) - _USED)
  require(not unknown, f"{file}: metadata {plain(*unknown)} is not supported; use another checkpoint")

  def entry(name: str, *default):
    require(name in entries or default, f"{file} lacks the metadata llama.{name}; {_REMEDY}")
    return entries.get(name, *default)

  width, heads = entry("embedding_length"), entry("attention.head_count")
  with foreign(file, _REMEDY):
    head_dim = entry("attention.key_length", width // heads)
  for name in ("rope.dimension_count", "attention.value_length"):
    same = entry(name, head_dim) == head_dim
    require(same, f"{file}: llama.{name} is {entries.get(name)!r:.80}; only the head size {head_dim} is supported")
  rope = {"rope_theta": entry("rope.freq_base", 10000.0), "rope_type": "default"}
  if (kind := entry("rope.scaling.type", "none")) != "none":
    require_choice(f"llama.rope.scaling.type in {file}", kind, ("none", "linear"))
    rope |= {"rope_type": "linear", "factor": entry("rope.scaling.factor")}
  return {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": entry("vocab_size", len(fields.get("tokenizer.ggml.tokens", ()))),
    "hidden_size": width,
    "intermediate_size": entry("feed_forward_length"),
    "num_hidden_layers": entry("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": entry("attention.head_count_kv", heads),
    "head_dim": head_dim,
    "max_position_embeddings": entry("context_length"),
    "rms_norm_eps": entry("attention.layer_norm_rms_epsilon"),
    "rope_parameters": rope,
    "tie_word_embeddings": "output.weight" not in tensors,
  }


def names(tensors: Mapping) -> dict[str, str]:
  """Hugging Face name -> GGUF name of every tensor; one without a counterpart keeps its own name."""
  return {_hugging_face_name(name): name for name in tensors}


def _hugging_face_name(name: str) -> str:
  if name in _OUTSIDE:
    return _OUTSIDE[name]
  match name.split("."):
    case ["blk", layer, part, ("weight" | "bias") as kind] if part in _BLOCK:
      return f"model.layers.{layer}.{_BLOCK[part]}.{kind}"
  return name


def dequantise(file: Path, tensor, raw: Mapping) -> np.ndarray:
  """A tensor of `read` in float32, in the orientation and order of Hugging Face's files.

  GGUF interleaves the halves of each query and key head, (o1, o_{n/2+1}, o2, ...): undone here.

  Raises:
    InputError: a quantisation the package cannot undo.
  """
  import gguf

  with foreign(file, "convert it to a quantisation that the package gguf dequantises", place=lambda: tensor.name):
    value = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    for part, heads in (("attn_q", raw["num_attention_heads"]), ("attn_k", raw["num_key_value_heads"])):
      if f".{part}." in tensor.name:
        halves = value.reshape(heads, -1, 2, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
  return value


def read_vocabulary(file: Path) -> tuple[Tokenizer, int | None, tuple[int, ...], str | None]:
  """(tokenizer, id that starts a text, ids that end one, chat template) of the metadata.

  Raises:
    InputError: the tokenizer is not byte-level BPE with a known split of the text into words.
  """
  fields, _ = read(file)
  entry = lambda name, default=None: fields.get(f"tokenizer.ggml.{name}", default)
  require_choice(f"tokenizer.ggml.model in {file}", entry("model"), ("gpt2",))
  require_choice(f"tokenizer.ggml.pre in {file}", entry("pre"), tuple(_SPLITS))
  with foreign(file, _REMEDY, place=lambda: "tokenizer metadata"):
    tokens, kinds = entry("tokens"), entry("token_type")
    merges = [tuple(merge.split(" ")) for merge in entry("merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _SPLITS[entry("pre")]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
      if kind in (_CONTROL, _USER_DEFINED):
        added = AddedToken(token, normalized=False, special=kind == _CONTROL)
        (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    roles = {name: entry(f"{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    for name, index in roles.items():
      known = index is None or (type(index) is int and 0 <= index < len(tokens))
      require(
        known, f"{file}: tokenizer.ggml.{name}_token_id is {index!r:.80}; the vocabulary has {len(tokens)} tokens"
      )
    bos, *ends = roles.values()
    if entry("add_bos_token", False):
      tokenizer.post_processor = processors.TemplateProcessing(f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
  ends = tuple(dict.fromkeys(end for end in ends if end is not None))
  return tokenizer, bos, ends, fields.get("tokenizer.chat_template")


def _byte_level(*before):
  return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])


# tokenizer.ggml.pre -> how text is split before merging; "smollm" has digits one by one.
_SPLITS = {
  "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True)),
  "gpt-2": _byte_level,
}
