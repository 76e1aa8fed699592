"""config.json to TransformerConfig and back, for the architectures of `formats.TABLES` and the own one.

Every field that changes the function is read, with the default of transformers' configuration classes (5.x), or
refused by name. Nothing is ignored that is not listed here as harmless.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping

from jaxlab.core.checks import InputError, plain, require, require_choice, require_divides
from jaxlab.models.config import Experts, RopeScaling, TransformerConfig
from jaxlab.models.formats import OWN, TABLES
from jaxlab.models.hnet_config import HNetConfig
from jaxlab.models.mamba2 import Mamba2Config

# Fields that change no logits: of training, of generation, of the tokenizer, of the file itself.
_HARMLESS = """
  architectures model_type transformers_version dtype torch_dtype use_cache pad_token_id bos_token_id eos_token_id
  initializer_range attention_dropout output_attentions output_hidden_states output_router_logits return_dict
  router_aux_loss_coef id2label label2id num_labels problem_type _name_or_path name_or_path _commit_hash
  pretraining_tp max_length min_length do_sample early_stopping num_beams num_beam_groups temperature top_k top_p
  typical_p repetition_penalty length_penalty no_repeat_ngram_size num_return_sequences tokenizer_class
  sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id task_specific_params
  _attn_implementation_autoset unsloth_version unsloth_fixed transformers.js_config is_llama_config
""".split()  # noqa: SIM905 (as a list it would be fifty lines)
# Fields that change nothing while they hold this.
_NEUTRAL = {"rope_interleaved": False, "is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False}
_NEUTRAL |= {"chunk_size_feed_forward": 0, "tie_encoder_decoder": False, "torchscript": False, "use_bfloat16": False}
_NEUTRAL |= {"pruned_heads": {}, "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
_MODEL_TYPES = {
  "LlamaForCausalLM": "llama",
  "Qwen3ForCausalLM": "qwen3",
  "Qwen3MoeForCausalLM": "qwen3_moe",
  "NanoChatForCausalLM": "nanochat",
}
# Architectures of this library: the field of config.json that holds the config.
_OWN_CONFIGS = {
  OWN: ("transformer", TransformerConfig),
  "JaxlabMamba2": ("mamba2", Mamba2Config),
  "JaxlabHNet": ("hnet", HNetConfig),
}
_REQUIRED = object()  # instead of a default
_TOO_LARGE = 2**31  # no size or count of a model is; XLA's indices end there
_HUGE = 1e300  # an int past the largest float cannot be made one


def read(raw: Mapping, where: str) -> tuple[TransformerConfig | Mamba2Config | HNetConfig, str]:
  """(config, architecture) of the content of a config.json.

  Args:
    where: the file, for messages.

  Raises:
    InputError: a field is missing, null, of another type or out of range, or asks for what no model here computes.
  """
  names = raw.get("architectures")
  one = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
  known = (*TABLES, *_OWN_CONFIGS)
  require(one, f"{where}: architectures is {names!r:.80}; it must be a list with one of {', '.join(known)}")
  arch = names[0]
  require_choice(f"{where}: the architecture", arch, known)
  try:
    if arch in _OWN_CONFIGS:
      field, kind = _OWN_CONFIGS[arch]
      return _dataclass(kind, raw.get(field), field), arch
    return from_hugging_face(raw, arch), arch
  except InputError as error:
    raise InputError(f"{where}: {error}") from None


def from_hugging_face(raw: Mapping, arch: str) -> TransformerConfig:
  """The config of one of the Hugging Face architectures; see `read`."""
  fields = dict(raw)
  take = functools.partial(_take, fields)
  nanochat, qwen, experts = arch == "NanoChatForCausalLM", arch == "Qwen3ForCausalLM", arch == "Qwen3MoeForCausalLM"
  kind = _MODEL_TYPES[arch]
  require(
    fields.get("model_type", kind) == kind, f"model_type is {fields.get('model_type')!r:.80}, which is not {arch}'s"
  )
  depth, width, heads = (take(n, int) for n in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
  context = take("max_position_embeddings", int, 32768 if qwen or experts else 2048)
  # Where transformers has a number of its own for a field left out, null means something else or nothing.
  own_heads = {"Qwen3ForCausalLM": 32, "Qwen3MoeForCausalLM": 4}
  kv_heads = take("num_key_value_heads", int, own_heads.get(arch), null=not experts)
  head_dim = take("head_dim", int, 128 if qwen else None, null=arch == "LlamaForCausalLM")
  kv_heads = heads if kv_heads is None else kv_heads
  require_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
  head_dim = width // heads if head_dim is None else head_dim
  require_divides("2 (rotary halves)", 2, "head_dim", head_dim)
  theta, scaling, factor = _rope(take, context)
  activations = ("relu2",) if nanochat else ("silu", "swish")
  require_choice("hidden_act", take("hidden_act", str, activations[0]), activations)
  config = dict(
    vocab_size=take("vocab_size", int),
    depth=depth,
    width=width,
    q_heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    mlp_width=take("intermediate_size", int, 6144 if experts else _REQUIRED),
    context=context,
    norm_eps=take("rms_norm_eps", float, 1e-6),
    rope_theta=theta,
    rope_scaling=scaling,
    rope_factor=factor,
    tied_embeddings=take("tie_word_embeddings", bool, False),
    layer_windows=_windows(take, depth, arch) if qwen or experts else None,
  )
  if nanochat:
    config |= dict(mlp="relu2", norm_gain=False, rope_direction=-1, qk_norm="after_rope", embed_norm=True)
    config["logit_softcap"] = take("final_logit_softcapping", float, 15.0, null=True)
  if qwen or experts:
    config["qk_norm"] = "before_rope"
  if experts:
    config["experts"] = _experts(take)
  for name, value in fields.items():
    neutral = value is None or name in _HARMLESS or (name in _NEUTRAL and value == _NEUTRAL[name])
    require(neutral, f"{plain(name)} is {value!r:.80}, which {arch} here does not support; use a checkpoint without it")
  return TransformerConfig(**config)


def _take(fields: dict, name: str, kind: type, default=_REQUIRED, *, null: bool = False, least: int = 1):
  """Removes a field and returns it.

  Args:
    kind: int (at least `least`), float (an int too; positive), bool, str, list or dict.
    default: where it is left out.
    null: whether null is allowed; it is always where the default is None.
  """
  value = fields.pop(name, default)
  require(value is not _REQUIRED, f"{name} is missing; add it to config.json as the model was trained")
  if value is None and (null or default is None):
    return None
  kinds = (int, float) if kind is float else (kind,)
  expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, kind.__name__)
  require(type(value) in kinds, f"{name} is {value!r:.80}; it must be {expected}")
  if kind in (int, float):
    fits = least <= value < _TOO_LARGE if kind is int else 0 < value < _HUGE
    expected = f"in {least} .. {_TOO_LARGE - 1}" if kind is int else "positive and finite"
    require(fits, f"{name} is {value!r:.80}; it must be {expected}")
  return float(value) if kind is float else value


def _rope(take, context: int) -> tuple[float, RopeScaling | None, float]:
  """(theta, Llama 3 scaling or None, linear factor) from either spelling.

  `rope_scaling`, the older name, replaces `rope_parameters` where both have content; theta stands inside or beside.
  """
  old, new = take("rope_scaling", dict, None), take("rope_parameters", dict, None)
  original = take("original_max_position_embeddings", int, None)
  outer = take("rope_theta", float, 10000.0)
  rope = dict(old or new or {})
  inner = functools.partial(_take, rope)
  theta = inner("rope_theta", float, outer)
  older = inner("type", str, "default")
  kind = inner("rope_type", str, older)
  require_choice("rope_type", kind, ("default", "linear", "llama3"))
  partial = [fields("partial_rotary_factor", float, 1.0, null=True) for fields in (take, inner)]
  require(set(partial) <= {1.0, None}, f"partial_rotary_factor is {partial}; only 1.0 is supported")
  scaling, factor = None, 1.0
  if kind == "linear":
    factor = inner("factor", float)
  if kind == "llama3":
    scaling = RopeScaling(
      factor=inner("factor", float),
      low_frequency=inner("low_freq_factor", float),
      high_frequency=inner("high_freq_factor", float),
      original_context=original or inner("original_max_position_embeddings", int, context),
    )
    rope.pop("original_max_position_embeddings", None)
    ordered = scaling.low_frequency < scaling.high_frequency
    require(ordered, f"low_freq_factor {scaling.low_frequency} must be below high_freq_factor {scaling.high_frequency}")
  unread = [name for name, value in rope.items() if value is not None]
  require(not unread, f"rope_parameters has {plain(*unread)}, which rope_type {kind!r:.80} does not use; remove it")
  return theta, scaling, factor


def _windows(take, depth: int, arch: str) -> tuple[int | None, ...] | None:
  """A window per layer, or None where all are full; transformers counts the query's own position in the size."""
  use = take("use_sliding_window", bool, False)
  size = take("sliding_window", int, 4096, null=True)
  first = take("max_window_layers", int, 28, null=True, least=0)
  size = size if use else None
  if arch == "Qwen3MoeForCausalLM":  # all layers or none
    return None if size is None else (size - 1,) * depth
  kinds = take("layer_types", list, None)
  if kinds is None and size is None:
    return None
  if kinds is None:
    require(first is not None, "max_window_layers is None; it must be a whole number")
    kinds = ["full_attention" if i < first else "sliding_attention" for i in range(depth)]
  known = len(kinds) == depth and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
  require(known, f"layer_types is {kinds!r:.80}; it must be {depth} times full_attention or sliding_attention")
  sliding = "sliding_attention" in kinds
  require(not sliding or size is not None, "layer_types has sliding_attention, but use_sliding_window is off")
  return tuple(size - 1 if kind == "sliding_attention" else None for kind in kinds) if sliding else None


def _experts(take) -> Experts:
  count, local = take("num_experts", int, None), take("num_local_experts", int, None)
  require(count is None or local is None or count == local, f"num_experts {count} is not num_local_experts {local}")
  dense = take("mlp_only_layers", list, None)
  require(not dense, f"mlp_only_layers is {dense!r:.80}; only layers of experts are supported")
  step = take("decoder_sparse_step", int, 1)
  require(step == 1, f"decoder_sparse_step is {step}; only 1, experts in every layer, is supported")
  count, active = count or local or 128, take("num_experts_per_tok", int, 8)
  require(active <= count, f"num_experts_per_tok is {active}, but num_experts {count}; it must be at most that")
  return Experts(
    count=count,
    active=active,
    width=take("moe_intermediate_size", int, 768),
    normalize=take("norm_topk_prob", bool, False),
  )


def _dataclass(kind, values, name: str):
  """A dataclass from the JSON of its fields; nested ones and tuples are restored, types checked."""
  require(isinstance(values, dict), f"{name} is {values!r:.80}; it must be an object")
  hints = typing.get_type_hints(kind)
  unknown = [key for key in values if key not in hints]
  require(not unknown, f"{name} has {plain(*unknown)}, which no model here has; load it with a newer version")
  fields = {}
  for field in dataclasses.fields(kind):
    place = f"{name}.{field.name}"
    if field.name in values:
      fields[field.name] = _typed(values[field.name], hints[field.name], place)
    else:
      require(field.default is not dataclasses.MISSING, f"{place} is missing; save the model again")
  return kind(**fields)


def _typed(value, hint, name: str):
  for kind in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
    if kind is type(None) and value is None:
      return None
    if dataclasses.is_dataclass(kind) and value is not None:
      return _dataclass(kind, value, name)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
      return tuple(_typed(item, typing.get_args(kind)[0], name) for item in value)
    if type(value) is kind or (kind is float and type(value) is int):
      limit = {int: _TOO_LARGE, float: _HUGE}.get(type(value))  # NaN is below none
      require(limit is None or abs(value) < limit, f"{name} is {value!r:.80}; it must be finite and smaller")
      return value
  raise InputError(f"{name} is {value!r:.80}; it must be {getattr(hint, '__name__', hint)}")


def architecture(c: TransformerConfig | Mamba2Config | HNetConfig) -> str:
  """The Hugging Face architecture that computes exactly this model, or an own one."""
  if not isinstance(c, TransformerConfig):
    return next(arch for arch, (_, kind) in _OWN_CONFIGS.items() if isinstance(c, kind))
  own = c.value_embeddings or c.residual_lambdas or c.smear or c.backout or c.hyper or c.parallel_sublayers
  own = own or c.ragged or c.qk_scale != 1.0 or "S" in c.window_pattern or (c.rope_scaling and c.rope_factor != 1.0)
  windows = c.windows  # of one size, and in the architectures that have them
  if own or len(set(windows) - {None}) > 1:
    return OWN
  plain = c.norm_gain and c.mlp == "swiglu" and not c.embed_norm and c.logit_softcap is None and c.rope_direction == 1
  if plain and c.qk_norm == "before_rope":
    if not c.experts:
      return "Qwen3ForCausalLM"
    return "Qwen3MoeForCausalLM" if len(set(windows)) == 1 else OWN
  if set(windows) != {None} or c.experts:
    return OWN
  if plain and c.qk_norm is None:
    return "LlamaForCausalLM"
  chat = (c.mlp, c.norm_gain, c.embed_norm, c.rope_direction, c.qk_norm)
  if chat == ("relu2", False, True, -1, "after_rope") and c.head_dim * c.q_heads == c.width:
    return "NanoChatForCausalLM"
  return OWN


def describe(c: TransformerConfig | Mamba2Config | HNetConfig, arch: str) -> dict:
  """config.json."""
  if arch in _OWN_CONFIGS:
    return {"architectures": [arch], "model_type": "jaxlab", _OWN_CONFIGS[arch][0]: dataclasses.asdict(c)}
  rope = {"rope_theta": c.rope_theta, "rope_type": "default"}
  if c.rope_factor != 1.0:
    rope |= {"rope_type": "linear", "factor": c.rope_factor}
  if s := c.rope_scaling:
    rope |= {
      "rope_type": "llama3",
      "factor": s.factor,
      "low_freq_factor": s.low_frequency,
      "high_freq_factor": s.high_frequency,
      "original_max_position_embeddings": s.original_context,
    }
  special = {}
  if arch == "NanoChatForCausalLM":
    special["final_logit_softcapping"] = c.logit_softcap
  if c.experts:
    special |= {
      "num_experts": c.experts.count,
      "num_local_experts": c.experts.count,
      "num_experts_per_tok": c.experts.active,
      "moe_intermediate_size": c.experts.width,
      "norm_topk_prob": c.experts.normalize,
    }
  if sizes := set(c.windows) - {None}:
    special |= {"use_sliding_window": True, "sliding_window": sizes.pop() + 1}
    if arch == "Qwen3ForCausalLM":
      special["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in c.windows]
  return {
    "architectures": [arch],
    "model_type": _MODEL_TYPES[arch],
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
    **special,
  }
