"""Methods by name and number, none of which needs training."""

import functools

import jax

from experiments.long_context import parse
from jaxlab.attention.chunkllm import chunkllm
from jaxlab.attention.chunkllm_chunks import ChunkAdapters
from jaxlab.attention.compact_attention import compact, quoka
from jaxlab.attention.dhsa import dhsa
from jaxlab.attention.dhsa_boundaries import evenly
from jaxlab.attention.selection import flash_prefill
from jaxlab.cache.chelsea import chelsea
from jaxlab.cache.eviction import h2o, snapkv, streaming_llm
from jaxlab.core.checks import require_choice
from jaxlab.models import paged
from jaxlab.models.generate import Decoder, power_of_two

DENSE = "dense"
COMPACT, QUOKA, DHSA, CHUNKLLM, CHELSEA = "compact", "quoka", "dhsa", "chunkllm", "chelsea"
EVICTING = {"snapkv": snapkv, "h2o": h2o, "streaming_llm": streaming_llm}
DROPPING = (CHELSEA, *EVICTING)  # entries, once a prompt is read
KINDS = (COMPACT, QUOKA, DHSA, CHUNKLLM, *DROPPING)
TITLES = {COMPACT: "CompactAttention", QUOKA: "QUOKA", DHSA: "DHSA", CHUNKLLM: "ChunkLLM", CHELSEA: "Chelsea"}


def decoders(config, model, longest: int) -> dict[str, Decoder]:
  """{"dense", then every one of config.methods: its decoder}, for prompts of up to `longest` tokens.

  DHSA's budget is a share of these: of shorter prompts it reads more.

  Args:
    model: the network's `TransformerConfig`.

  Raises:
    InputError: a method that is no name and number, or another name.
  """
  return {DENSE: _paged(config)} | {text: _decoder(*parse(text), config, model, longest) for text in config.methods}


def _paged(config, method: paged.Method = paged.DENSE, **how) -> Decoder:
  return paged.decoder(method, **dict(chunk=config.chunk, page=config.page) | how)


def _decoder(kind: str, value: float, config, model, longest: int) -> Decoder:
  require_choice("the method", kind, KINDS)
  if kind == COMPACT:
    return _paged(config, compact(functools.partial(flash_prefill, alpha=value, **config.compact)))
  if kind == QUOKA:
    return _paged(config, quoka(budget=value))
  if kind == DHSA:
    sizes = config.dhsa.to_dict()
    size = sizes.pop("size")
    even = dict(beta=sizes["block"] // size, apart=size - 1)
    method = dhsa(evenly(size), budget=round(value * longest), **even, **sizes)
    return _paged(config, method, chunk=power_of_two(longest, config.page))  # it reads a prompt as one chunk
  if kind == CHUNKLLM:
    sizes = config.chunkllm.to_dict()
    size = sizes.pop("size")
    # No map of theirs is used: fixed chunks, and the products of queries and keys themselves.
    adapters = ChunkAdapters(model, jax.random.key(0), hidden=1, size=1)
    how = dict(threshold=1.0, min_chunk=size, max_chunk=size, choose="raw", grain=1)
    return _paged(config, chunkllm(adapters, keep=value, **how, **sizes))
  if kind == CHELSEA:
    return _paged(config, decode=chelsea(keep=value, **config.chelsea))
  return _paged(config, EVICTING[kind](keep=value))
