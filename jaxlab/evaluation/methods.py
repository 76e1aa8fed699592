"""Every method that yields a network, an attention function or a cache, by the name a command line gives it.

  network, logits, decoder = subject(model, "snlp", layers=8, iterations=4)
  network, _, decoder = subject(model, "compact_attention", decode="chelsea", keep=0.25)

One that changes weights is `lambda model, **options: plain(changed(model, **options))`, one that is an `AttentionFn`
`plain(model, attention)`.
"""

import ast
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.attention import chunkllm, dhsa, selection
from jaxlab.attention.chunkllm_chunks import ChunkAdapters
from jaxlab.attention.compact_attention import compact, quoka
from jaxlab.attention.dhsa_blocks import top_blocks
from jaxlab.attention.dhsa_boundaries import BoundaryPredictor, evenly
from jaxlab.attention.seer_gate import SeerGate
from jaxlab.cache import eviction
from jaxlab.cache.chelsea import chelsea
from jaxlab.core import mesh as meshes
from jaxlab.core import modules
from jaxlab.core.checks import require, require_choice
from jaxlab.depth import snlp_inference, snlp_suffix
from jaxlab.models import Transformer, TransformerConfig, inference, paged, paged_sharded
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.generate import Decoder


class Subject(NamedTuple):
  """A model under a method: what evaluation and generation need.

  Attributes:
    network: a pytree, the first argument of the functions.
    logits: (network, int32[batch, time]) -> float32[batch, time, vocab], uncached; None where only the decoder knows
      what the method does (`long_context.continuation_scores`).
    decoder: cached generation (`jaxlab.models.generate`).
  """

  network: object
  logits: Callable | None
  decoder: Decoder


def plain(model: Transformer, attention: AttentionFn = dot_product_attention) -> Subject:
  """The model as it is, under an attention function."""
  logits = lambda network, tokens: inference.step(network, tokens, attention=attention)[0]
  functions = (functools.partial(f, attention=attention) for f in (inference.prefill, inference.step))
  decoder = Decoder() if attention is dot_product_attention else Decoder(*functions)
  return Subject(inference.take_apart(model), logits, decoder)


def snlp(
  model: Transformer,
  *,
  layers: int,
  iterations: int = 1,
  chunk: int | None = None,
  groups: int = 1,
  tail: int = 0,
  surrogate: str = "identity",
  initial: str = "h0",
  damping: float = 0.0,
) -> Subject:
  """The last `layers` layers but for `tail` ones solved in `iterations` steps, all at once or in `groups` parts.

  As `jaxlab.depth.snlp`; with `chunk`, the last layers fused in wide ones.
  """
  if chunk is None:
    suffix = snlp_suffix.parts(model, layers, groups=groups, tail=tail)
  else:
    suffix = snlp_suffix.fuse(model, layers, chunk=chunk)
  options = dict(iterations=iterations, surrogate=surrogate, initial=initial, damping=damping)
  logits = lambda network, tokens: snlp_inference.step(network, tokens, **options)[0]
  return Subject(snlp_inference.split(model, suffix), logits, snlp_inference.decoder(**options))


def chunk_llm(model: Transformer, *, adapters: str, prefill_chunk: int = 256, page: int = 64, **options) -> Subject:
  """`jaxlab.attention.chunkllm.chunkllm` and its options, with the adapters in a file that its experiment left."""
  made = modules.load(adapters, functools.partial(ChunkAdapters, model.config, jax.random.key(0)))
  network = inference.take_apart(model)
  decoder = chunkllm.decoder(chunk=prefill_chunk, page=page, **options)
  return Subject(chunkllm.Adapted(network.model, network.blocks, made), None, decoder)


def over_sequence(model: Transformer, *, devices: int, prefill_chunk: int = 4096, page: int = 64) -> Subject:
  """Dense attention, prompts shared out over several devices (`jaxlab.models.paged_sharded`), each with the weights.

  Raises:
    InputError: more devices than there are, or a chunk that page x devices does not divide.
  """
  found = jax.devices()
  require(1 <= devices <= len(found), f"devices is {devices}; this machine has {len(found)}")
  mesh = meshes.make_mesh({paged_sharded.AXIS: devices}, found[:devices])
  network = jax.device_put(inference.take_apart(model), NamedSharding(mesh, PartitionSpec()))
  return Subject(network, None, paged_sharded.decoder(mesh, chunk=prefill_chunk, page=page))


METHODS = {"snlp": snlp, "chunkllm": chunk_llm, "sequence": over_sequence}
_PASSED_ON = {chunk_llm: chunkllm.chunkllm}  # whose options a method's **options are


def _dhsa(
  config: TransformerConfig, *, predictor: str = "", size: int = 32, budget: int = 2048, block: int = 128
) -> paged.Method:
  """Boundaries by the predictor in a file that its experiment left, or chunks of `size` tokens each."""
  if not predictor:
    return dhsa.dhsa(evenly(size), budget=budget, block=block)
  made = modules.load(predictor, functools.partial(BoundaryPredictor, config, jax.random.key(0)))
  return dhsa.dhsa(made.score, budget=budget, block=block)


def _seer(config: TransformerConfig, *, gate: str = "", tau: float = 5e-4, recent: int = 2) -> tuple:
  """SeerAttention's gate from a file that CompactAttention's experiment left."""
  require(gate, "select=seer needs gate=..., the file of a trained gate")
  made = modules.load(gate, functools.partial(SeerGate, config, jax.random.key(0)))
  return made.selectors(tau=tau, recent=recent)


CACHES = {"chelsea": chelsea, **eviction.METHODS}
PAGED = {
  "dense": lambda: paged.DENSE,
  "compact_attention": compact,
  "quoka": quoka,
  "dhsa": _dhsa,
  "sliding_window": dhsa.sliding_window,
  **CACHES,
}
SELECTORS = {
  "flash_prefill": selection.flash_prefill,
  "x_attention": selection.x_attention,
  "flex_prefill": selection.flex_prefill,
  "minference": selection.minference,
  "top_blocks": top_blocks,
  "seer": _seer,
}
_SIMPLE = (bool, int, float, str)
_OF_A_CHUNK = ("real",)  # what a selector is given beside its options


def over_pages(
  model: Transformer,
  name: str,
  *,
  prefill_chunk: int = 512,
  page: int = 64,
  select: str = "flash_prefill",
  decode=None,
  **options,
) -> Subject:
  """A method of `PAGED` for the prompt and, without `decode`, for what follows.

  Args:
    prefill_chunk, page: the chunk and page of `paged.decoder`; a method that reads a prompt as one chunk gets one of
      the model's context.
    select: one of `SELECTORS`, for compact_attention.
    decode: another one of `PAGED`, for the tokens after the prompt.
    options: each goes to every one of the three that has it.

  Raises:
    InputError: an unknown name or option; and what the methods raise.
  """
  require_choice("select", select, SELECTORS)
  require(decode is None or decode in PAGED, f"decode is {decode!r}; it must be one of {', '.join(PAGED)}")
  parts = {"method": PAGED[name], "decode": PAGED[decode or "dense"]}
  if name == "compact_attention":
    parts["select"] = SELECTORS[select]
  knobs = {part: _knobs(function) for part, function in parts.items()}
  for option in options:
    require_choice(
      f"an option of method {name}",
      option,
      ["prefill_chunk", "page", "select", "decode", *set().union(*knobs.values())],
    )
  given = {part: {k: v for k, v in options.items() if k in known} for part, known in knobs.items()}
  if name == "compact_attention":
    chosen = SELECTORS[select]
    made = _seer(model.config, **given["select"]) if chosen is _seer else functools.partial(chosen, **given["select"])
    given["method"]["select"] = made
  make = lambda name, part: PAGED[name](*[model.config] * (PAGED[name] is _dhsa), **given[part])
  method = make(name, "method")
  chunk = -(-model.config.context // page) * page if method.whole else prefill_chunk
  after = make(decode, "decode") if decode else None
  return Subject(inference.take_apart(model), None, paged.decoder(method, decode=after, chunk=chunk, page=page))


def cache_method(name: str, **options) -> paged.Method:
  """One of `CACHES` with its options, for `serving.Engine`.

  Raises:
    InputError: no such method, no such option, or one of another kind; and what the method itself raises.
  """
  require_choice("method", name, CACHES)
  known = inspect.signature(CACHES[name]).parameters
  for option, value in options.items():
    require_choice(f"an option of method {name}", option, _knobs(CACHES[name]))
    default = known[option].default
    kinds = {type(None): (int, str), float: (float, int)}.get(type(default), type(default))
    require(isinstance(value, kinds), f"method {name} has {option}={value!r:.80}; it must be a value like {default}")
  return CACHES[name](**options)


def named(text: str) -> tuple[str, dict]:
  """("snlp", {"layers": 8}) of "snlp,layers=8", as commands have it."""
  name, *rest = text.split(",")
  options = {}
  for part in rest:
    key, equals, value = part.partition("=")
    require(bool(key and equals and value), f"--method has {part!r}; its options are NAME=VALUE")
    try:
      options[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      options[key] = value
  return name, options


def _knobs(function: Callable) -> list[str]:
  """Names of the options a command line can give."""
  parameters = inspect.signature(function).parameters.values()
  simple = [p.name for p in parameters if p.default is None or isinstance(p.default, _SIMPLE)]
  return [name for name in simple if name not in _OF_A_CHUNK]


def subject(model: Transformer, method: str | None = None, **options) -> Subject:
  """The model under the method of that name with its options; None: as it is.

  Raises:
    InputError: no such method, an option it does not have, or one it needs; and what the method itself raises.
  """
  if method is None:
    require(not options, f"there is no option {', '.join(options)}; options of a method need method=...")
    return plain(model)
  require_choice("method", method, [*METHODS, *PAGED])
  if method in PAGED:
    return over_pages(model, method, **options)
  function = METHODS[method]
  known = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
  more = _knobs(_PASSED_ON[function]) if function in _PASSED_ON else []
  for name in options:
    require_choice(f"an option of method {method}", name, [*(parameter.name for parameter in known), *more])
  for parameter in known:
    needed = parameter.default is inspect.Parameter.empty
    require(not needed or parameter.name in options, f"method {method} needs {parameter.name}=...")
  return function(model, **options)
