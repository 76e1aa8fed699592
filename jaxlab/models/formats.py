"""Checkpoint formats: which tensor of a file is which parameter, and config.json to TransformerConfig and back.

Known are the Hugging Face architectures in `TABLES`, karpathy/nanochat's own names (`KARPATHY`), and `OWN`, the name
under which models are saved that none of the others can hold.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxlab.core.checks import require, require_choice
from jaxlab.models.config import Experts, RopeScaling, TransformerConfig

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


def from_hugging_face(raw: dict, arch: str) -> TransformerConfig:
  for option, harmless in [
    ("attention_bias", False),
    ("mlp_bias", False),
    ("use_sliding_window", False),
    ("mlp_only_layers", []),
    ("decoder_sparse_step", 1),
  ]:
    value = raw.get(option) or harmless
    require(value == harmless, f"config.json sets {option}={value}, which is not supported; only {harmless} is")
  rope = (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
  kind = rope.get("rope_type", rope.get("type", "default"))
  require_choice("rope_type in config.json", kind, ("default", "llama3"))
  scaling = None
  if kind == "llama3":
    scaling = RopeScaling(
      factor=rope["factor"],
      low_frequency=rope["low_freq_factor"],
      high_frequency=rope["high_freq_factor"],
      original_context=rope["original_max_position_embeddings"],
    )
  heads = raw["num_attention_heads"]
  shape = dict(
    vocab_size=raw["vocab_size"],
    depth=raw["num_hidden_layers"],
    width=raw["hidden_size"],
    q_heads=heads,
    kv_heads=raw.get("num_key_value_heads") or heads,
    head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
    mlp_width=raw["intermediate_size"],
    context=raw.get("max_position_embeddings", 2048),
    norm_eps=raw.get("rms_norm_eps", 1e-6),
    rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
    rope_scaling=scaling,
    tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
  )
  if arch == "NanoChatForCausalLM":
    return TransformerConfig(
      **shape,
      mlp="relu2",
      norm_gain=False,
      rope_direction=-1,
      qk_norm="after_rope",
      embed_norm=True,
      logit_softcap=raw.get("final_logit_softcapping"),
    )
  experts = None
  if arch == "Qwen3MoeForCausalLM":
    experts = Experts(
      count=raw.get("num_local_experts") or raw["num_experts"],
      active=raw["num_experts_per_tok"],
      width=raw["moe_intermediate_size"],
      normalize=bool(raw.get("norm_topk_prob", False)),
    )
  return TransformerConfig(**shape, qk_norm=None if arch == "LlamaForCausalLM" else "before_rope", experts=experts)


def architecture(c: TransformerConfig) -> str:
  """The Hugging Face architecture that computes exactly this model, or the own one."""
  own = c.value_embeddings or c.residual_lambdas or c.smear or c.backout or c.hyper or "S" in c.window_pattern
  own = own or c.parallel_sublayers
  plain = c.norm_gain and c.mlp == "swiglu" and not c.embed_norm and c.logit_softcap is None and c.rope_direction == 1
  if not own and c.qk_scale == 1.0:
    if plain and c.qk_norm is None and not c.experts:
      return "LlamaForCausalLM"
    if plain and c.qk_norm == "before_rope":
      return "Qwen3MoeForCausalLM" if c.experts else "Qwen3ForCausalLM"
    chat = (c.mlp, c.norm_gain, c.embed_norm, c.rope_direction, c.qk_norm, c.tied_embeddings)
    if chat == ("relu2", False, True, -1, "after_rope", False) and c.head_dim * c.q_heads == c.width and not c.experts:
      return "NanoChatForCausalLM"
  return OWN


def describe(c: TransformerConfig, arch: str) -> dict:
  """config.json."""
  if arch == OWN:
    return {"architectures": [arch], "model_type": "jaxlab", "transformer": dataclasses.asdict(c)}
  rope = {"rope_theta": c.rope_theta, "rope_type": "default"}
  if s := c.rope_scaling:
    rope |= {
      "rope_type": "llama3",
      "factor": s.factor,
      "low_freq_factor": s.low_frequency,
      "high_freq_factor": s.high_frequency,
      "original_max_position_embeddings": s.original_context,
    }
  kinds = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "Qwen3ForCausalLM": {"model_type": "qwen3"},
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe"},
    "NanoChatForCausalLM": {"model_type": "nanochat", "final_logit_softcapping": c.logit_softcap},
  }
  experts = {}
  if c.experts:
    experts = {
      "num_experts": c.experts.count,
      "num_local_experts": c.experts.count,
      "num_experts_per_tok": c.experts.active,
      "moe_intermediate_size": c.experts.width,
      "norm_topk_prob": c.experts.normalize,
    }
  return {
    "architectures": [arch],
    **kinds[arch],
    "vocab_size": c.vocab_size,
    "hidden_size": c.width,
    "intermediate_size": c.mlp_width,
    "num_hidden_layers": c.depth,
    "num_attention_heads": c.q_heads,
    "num_key_value_heads": c.kv_heads,
    "head_dim": c.head_dim,
    "max_position_embeddings": c.context,
    "rms_norm_eps": c.norm_eps,
    "hidden_act": "silu" if c.mlp == "swiglu" else "relu2",
    "rope_parameters": rope,
    "rope_theta": c.rope_theta,
    "tie_word_embeddings": c.tied_embeddings,
    **experts,
  }


def karpathy_config(raw: Mapping, tensors: dict[str, np.ndarray]) -> TransformerConfig:
  """The config of a nanochat checkpoint from its `model_config`; fills in the tensors that older ones lack."""
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
