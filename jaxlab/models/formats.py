"""Checkpoint formats: which tensor of a file is which parameter.

Known are the Hugging Face architectures in `TABLES`, karpathy/nanochat's own names (`KARPATHY`), and `OWN`, the name
under which models are saved that none of the others can hold.
"""

from collections.abc import Mapping

import numpy as np

from jaxlab.core.checks import require
from jaxlab.models.config import TransformerConfig

# Parameter -> (tensor name, transposed). Linear weights are (inputs, outputs) here and (outputs, inputs) in the files.
_ATTENTION = {
  "embedding": ("model.embed_tokens.weight", False),
  "head.weight": ("lm_head.weight", True),
  "norm.gain": ("model.norm.weight", False),
  "blocks.attention_norm.gain": ("model.layers.{layer}.input_layernorm.weight", False),
  "blocks.mlp_norm.gain": ("model.layers.{layer}.post_attention_layernorm.weight", False),
  "blocks.q_norm.gain": ("model.layers.{layer}.self_attn.q_norm.weight", False),
  "blocks.k_norm.gain": ("model.layers.{layer}.self_attn.k_norm.weight", False),
} | {f"blocks.{name}.weight": (f"model.layers.{{layer}}.self_attn.{name}_proj.weight", True) for name in "qkvo"}
_SWIGLU = _ATTENTION | {
  f"blocks.mlp.{name}.weight": (f"model.layers.{{layer}}.mlp.{name}_proj.weight", True)
  for name in ("gate", "up", "down")
}
_MOE = (
  _ATTENTION
  | {"blocks.mlp.router.weight": ("model.layers.{layer}.mlp.gate.weight", True)}
  | {
    f"blocks.mlp.{name}": (f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}_proj.weight", True)
    for name in ("gate", "up", "down")
  }
)
_RELU2 = _ATTENTION | {
  "blocks.mlp.up.weight": ("model.layers.{layer}.mlp.fc1.weight", True),
  "blocks.mlp.down.weight": ("model.layers.{layer}.mlp.fc2.weight", True),
}
KARPATHY = {
  "embedding": ("transformer.wte.weight", False),
  "head.weight": ("lm_head.weight", True),
  "blocks.q.weight": ("transformer.h.{layer}.attn.c_q.weight", True),
  "blocks.k.weight": ("transformer.h.{layer}.attn.c_k.weight", True),
  "blocks.v.weight": ("transformer.h.{layer}.attn.c_v.weight", True),
  "blocks.o.weight": ("transformer.h.{layer}.attn.c_proj.weight", True),
  "blocks.value_gate": ("transformer.h.{value_layer}.attn.ve_gate.weight", True),
  "blocks.mlp.up.weight": ("transformer.h.{layer}.mlp.c_fc.weight", True),
  "blocks.mlp.down.weight": ("transformer.h.{layer}.mlp.c_proj.weight", True),
  "value_embeddings": ("value_embeds.{value_layer}.weight", False),
  "blocks.residual_lambda": ("resid_lambdas", False),
  "blocks.x0_lambda": ("x0_lambdas", False),
  "smear_gate": ("smear_gate.weight", True),
  "smear_lambda": ("smear_lambda", False),
  "backout_lambda": ("backout_lambda", False),
}
TABLES = {
  "LlamaForCausalLM": _SWIGLU,
  "Qwen3ForCausalLM": _SWIGLU,
  "Qwen3MoeForCausalLM": _MOE,
  "NanoChatForCausalLM": _RELU2,
}
OWN = "JaxlabTransformer"


def karpathy_config(raw: Mapping, tensors: dict[str, np.ndarray]) -> TransformerConfig:
  """The config of a nanochat checkpoint from its `model_config`; fills in the tensors that older ones lack."""
  for name in ("n_layer", "n_embd", "n_head", "vocab_size", "sequence_len"):
    require(type(raw.get(name)) is int, f"model_config.{name} is {raw.get(name)!r}; it must be a whole number")
  depth, width, heads = raw["n_layer"], raw["n_embd"], raw["n_head"]
  defaults = {
    "resid_lambdas": np.ones(depth, np.float32),
    "x0_lambdas": np.zeros(depth, np.float32),
    "smear_gate.weight": np.zeros((1, 24), np.float32),
    "smear_lambda": np.zeros(1, np.float32),
    "backout_lambda": np.zeros(1, np.float32),
  }
  for name, value in defaults.items():
    tensors.setdefault(name, value)
  return TransformerConfig(
    vocab_size=raw["vocab_size"],
    depth=depth,
    width=width,
    q_heads=heads,
    kv_heads=raw.get("n_kv_head", heads),
    head_dim=width // heads,
    mlp_width=4 * width,
    context=raw["sequence_len"],
    mlp="relu2",
    norm_gain=False,
    norm_eps=1.1920929e-07,
    rope_theta=100000.0,
    rope_direction=-1,
    qk_norm="after_rope",
    qk_scale=1.2,
    window_pattern=raw.get("window_pattern", "L"),
    embed_norm=True,
    value_embeddings=any(name.startswith("value_embeds.") for name in tensors),
    residual_lambdas=True,
    smear=True,
    backout=True,
    logit_softcap=15.0,
  )
