"""Random checkpoints of transformers, with fields of config.json set, removed, null or mistyped, against `hub.load`."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.models import hub

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOKENS = np.random.default_rng(0).integers(0, 32, (2, 12))
CLASSES = {
  "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
  "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
  "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
  "nanochat": (transformers.NanoChatConfig, transformers.NanoChatForCausalLM),
}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3["original_max_position_embeddings"] = 8
ROPES = [
  {"rope_type": "default"},
  {"rope_type": "default", "rope_theta": 100.0},
  {"type": "linear", "factor": 2.0},
  {"rope_type": "linear", "factor": 3, "rope_theta": 500.0},
  _LLAMA3,
  _LLAMA3 | {"rope_theta": 100.0},
  {name: value for name, value in _LLAMA3.items() if name != "original_max_position_embeddings"},
]
ODD_ROPES = [
  {"rope_type": "dynamic", "factor": 2.0},
  {"rope_type": "yarn", "factor": 2.0},
  {"rope_type": "linear"},
  {"rope_type": "llama3", "factor": 4.0},
  {"rope_type": "default", "partial_rotary_factor": 0.5},
  {"rope_type": "linear", "factor": "2"},
  {"full_attention": {"rope_type": "default", "rope_theta": 100.0}},
  [],
]
# What may be written over a saved config.json: another function of the same weights, or the same function.
COMMON = {
  "rms_norm_eps": [1e-6, 1e-5, 1e-2],
  "rope_theta": [100, 500.0, 1e6],
  "rope_scaling": ROPES,
  "rope_parameters": ROPES,
  "max_position_embeddings": [16, 4096],
  "tie_word_embeddings": [False, True],
  "attention_dropout": [0.0, 0.1],
  "pretraining_tp": [1, 2],
  "use_cache": [True, False],
  "temperature": [0.5],
}
OWN = {
  "llama": {"hidden_act": ["silu", "swish"], "rope_interleaved": [False]},
  "qwen3": {"hidden_act": ["silu"], "use_sliding_window": [True, False], "sliding_window": [1, 3, 4096, None]}
  | {"max_window_layers": [0, 1, 28]},
  "qwen3_moe": {"norm_topk_prob": [True, False], "num_experts_per_tok": [1, 2, 4], "decoder_sparse_step": [1]}
  | {"use_sliding_window": [True, False], "sliding_window": [1, 3, None], "mlp_only_layers": [[], None]},
  "nanochat": {"hidden_act": ["relu2"], "final_logit_softcapping": [None, 0.5, 15.0, 2.0]},
}
# What asks for another function, or for nothing that makes sense.
ODD = {
  "hidden_act": ["gelu", "relu", "silu", 3],
  "rope_scaling": ODD_ROPES,
  "rope_parameters": ODD_ROPES,
  "partial_rotary_factor": [0.5, 1.0],
  "sliding_window": [3, "3", 0, True],
  "layer_types": [["sliding_attention"], ["full_attention", "sliding_attention"], "full"],
  "final_logit_softcapping": [5.0, 0.0, "15"],
  "attention_bias": [True, 1],
  "mlp_bias": [True],
  "rms_norm_eps": ["1e-6", True, -1.0, float("nan")],
  "rope_theta": ["1e4", 0.0, [1e4]],
  "num_key_value_heads": [1, 2, 3, 2.0, "2"],
  "head_dim": [4, 8, 16, 7, 0, "8"],
  "num_hidden_layers": [1, 4, 0, -1, "2", True],
  "num_attention_heads": [1, 3, 8, 0],
  "vocab_size": [31, 64, 0, None],
  "decoder_sparse_step": [2, 0],
  "mlp_only_layers": [[0], 0],
  "num_experts": [2, 8, 0],
  "num_local_experts": [2, 4],
  "num_experts_per_tok": [0, 5, "2"],
  "tie_word_embeddings": [True, "true", 1],
  "architectures": [[], None, "LlamaForCausalLM", ["LlamaForCausalLM"], ["MistralForCausalLM"]],
  "model_type": ["mistral", "llama"],
  "embedding_multiplier": [12.0],
  "use_qk_norm": [False],
}


def _one_in(count: int):
  """True once in `count` times: inside a range, whose ends are drawn more often."""
  return st.integers(0, count - 1).map(lambda drawn: drawn == count // 2)


@st.composite
def checkpoints(draw):
  """(architecture, options of its config class, changes of config.json: name -> value, or ... to remove it)."""
  kind = draw(st.sampled_from(list(CLASSES)))
  heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2), (4, 1)]))
  options = dict(vocab_size=32, hidden_size=16, intermediate_size=24, max_position_embeddings=64, pad_token_id=None)
  options |= dict(num_hidden_layers=draw(st.integers(1, 3)), num_attention_heads=heads, num_key_value_heads=kv_heads)
  options["tie_word_embeddings"] = draw(st.booleans())
  if kind in ("qwen3", "qwen3_moe") or draw(_one_in(4)):
    options["head_dim"] = 8
  if kind == "qwen3_moe":
    options |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    options["norm_topk_prob"] = draw(st.booleans())
  options["attention_bias"] = draw(_one_in(20))
  changes = {}
  for name, values in (COMMON | OWN[kind]).items():
    if draw(_one_in(5)):
      changes[name] = draw(st.sampled_from(values))
    elif draw(_one_in(12)):
      changes[name] = ...
  if kind in ("qwen3", "qwen3_moe") and draw(_one_in(3)):
    changes |= {"use_sliding_window": True, "sliding_window": draw(st.sampled_from([1, 2, 5, 4096]))}
    if kind == "qwen3":  # the list, or what max_window_layers makes of it
      kinds = st.sampled_from(["full_attention", "sliding_attention"])
      depth = options["num_hidden_layers"]
      changes["max_window_layers"] = draw(st.integers(0, depth))
      changes["layer_types"] = draw(st.just(...) | st.lists(kinds, min_size=depth, max_size=depth))
  if changes.get("tie_word_embeddings", ...) is not ...:  # mostly what the weights were saved with
    changes["tie_word_embeddings"] &= options["tie_word_embeddings"]
  if draw(_one_in(5)):
    name = draw(st.sampled_from(sorted(ODD)))
    changes[name] = draw(st.sampled_from([*ODD[name], None, ...]))
  return kind, options, changes


def compare(folder, kind: str, options: dict, changes: dict, seed: int) -> str:
  """ "equal", "refused" or, where transformers has no answer to compare with, "loaded".

  Raises:
    AssertionError: other logits, weights made up by transformers that were not missed here, or a message of many lines.
  """
  config_class, model_class = CLASSES[kind]
  torch.manual_seed(seed)
  shutil.rmtree(folder, ignore_errors=True)
  theirs = model_class(config_class(**options))
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.uniform_(*((-0.6, 0.6) if parameter.ndim > 1 else (0.5, 1.5)))
  theirs.save_pretrained(folder)
  raw = json.loads((folder / "config.json").read_text())
  for name, value in changes.items():
    raw[name] = value
    if value is ...:
      del raw[name]
  (folder / "config.json").write_text(json.dumps(raw))
  try:
    ours = hub.load(folder, dtype="float32")
  except InputError as error:
    assert "\n" not in str(error) and str(error)
    return "refused"
  try:
    theirs, info = model_class.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    with torch.no_grad():
      expected = theirs.eval()(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
  except Exception:  # a config that transformers has no function for
    return "loaded"
  assert not info["missing_keys"], f"transformers made up {info['missing_keys']}"
  with jax.disable_jit():  # dozens of small operations that all draws share, instead of a program for each
    np.testing.assert_allclose(ours(jnp.asarray(TOKENS)), expected, atol=1e-4, rtol=1e-5)
  return "equal"
