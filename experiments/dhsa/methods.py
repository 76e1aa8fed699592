"""Methods by name and budget."""

import functools
from collections.abc import Callable

import jax

from experiments.long_context import parse
from jaxlab.attention.dhsa import block_sparse, dhsa, sliding_window
from jaxlab.attention.dhsa_boundaries import attention_ratio, evenly, randomly
from jaxlab.cache import eviction
from jaxlab.core.checks import require
from jaxlab.models import paged
from jaxlab.models.generate import power_of_two

DENSE, OURS, BLOCKS = "dense", "dhsa", "blocks"
PROMPT = (OURS, "mean", "max", "oracle", "even", "random", "two_layers", BLOCKS, "block_oracle", "tokens", "window")
CACHES = ("streaming_llm", "h2o", "pyramidkv")  # that read a prompt densely and keep the budget of it
KINDS = (*PROMPT, *CACHES)
_PART = 256  # tokens of a prompt that a cache reads at once: H2O holds their attention to all others


def decoders(methods, config, score: Callable, *, longest: int) -> dict:
  """{"dense", then every one of `methods`: its decoder}, for prompts of up to `longest` tokens, of which budgets are
  shares.

  Args:
    score: the boundaries that are predicted.
  """
  # A prompt is read as one chunk, and padded to a power of two.
  how = dict(chunk=power_of_two(longest, config.page), page=config.page)
  parts = how | dict(chunk=min(_PART, how["chunk"]))

  def made(text: str):
    kind, share = parse(text)
    if kind in CACHES:
      return paged.decoder(_cache(kind, share, config.select), **parts)
    return paged.decoder(_method(kind, share, config.select, score, longest), **how)

  return {DENSE: paged.decoder(**how)} | {text: made(text) for text in methods}


def _cache(kind: str, share: float, s) -> paged.Method:
  options = {"streaming_llm": dict(sink=s.sink), "h2o": {}, "pyramidkv": dict(window=s.observed)}
  return eviction.METHODS[kind](keep=share, **options[kind])


def _method(kind: str, share: float, s, score: Callable, longest: int) -> paged.Method:
  """A kind at a budget: DHSA as published; with other pooling ("mean", "max"); with other boundaries (labels as an
  "oracle", "even", "random"); with the choice of "two_layers" shared; static "blocks", of which an oracle scores those
  of "block_oracle" and "tokens"; a "window" with the first tokens."""
  require(kind in KINDS, f"the method is {kind!r}; it must be one of {', '.join(KINDS)}")
  budget = round(share * longest)
  static = dict(budget=budget, block=s.block, instruction=s.instruction)
  even = s.block // s.beta
  ours = functools.partial(
    dhsa, beta=s.beta, local=s.local, sink=s.sink, apart=s.apart, theta=s.theta, pooling="sqrt", **static
  )
  return {
    OURS: lambda: ours(score),
    "mean": lambda: ours(score, pooling="mean"),
    "max": lambda: ours(score, pooling="max"),
    "two_layers": lambda: ours(score, share_masks=True),
    "oracle": lambda: ours(attention_ratio),
    "even": lambda: ours(evenly(max(even, s.apart + 1))),
    "random": lambda: ours(randomly(jax.random.key(0)), theta=0.0),
    BLOCKS: lambda: block_sparse(**static),
    "block_oracle": lambda: block_sparse(oracle=True, **static),
    "tokens": lambda: block_sparse(oracle=True, size=1, **static),
    "window": lambda: sliding_window(sink=s.sink, **static),
  }[kind]()
