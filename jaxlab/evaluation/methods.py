"""Every method that yields a network or an attention function, by the name a command line gives it.

  network, logits, decoder = subject(model, "snlp", layers=8, iterations=4)

One that changes weights is `lambda model, **options: plain(changed(model, **options))`, one that is an `AttentionFn`
`plain(model, attention)`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

from jaxlab.core.checks import require, require_choice
from jaxlab.depth import snlp_inference, snlp_suffix
from jaxlab.models import Transformer, inference
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.generate import Decoder


class Subject(NamedTuple):
  """A model under a method: what evaluation and generation need.

  Attributes:
    network: a pytree, the first argument of the functions.
    logits: (network, int32[batch, time]) -> float32[batch, time, vocab], uncached.
    decoder: cached generation (`jaxlab.models.generate`).
  """

  network: object
  logits: Callable
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


METHODS = {"snlp": snlp}


def subject(model: Transformer, method: str | None = None, **options) -> Subject:
  """The model under the method of that name with its options; None: as it is.

  Raises:
    InputError: no such method, an option it does not have, or one it needs; and what the method itself raises.
  """
  if method is None:
    require(not options, f"there is no option {', '.join(options)}; options of a method need method=...")
    return plain(model)
  require_choice("method", method, METHODS)
  function = METHODS[method]
  known = list(inspect.signature(function).parameters.values())[1:]
  for name in options:
    require_choice(f"an option of method {method}", name, [parameter.name for parameter in known])
  for parameter in known:
    needed = parameter.default is inspect.Parameter.empty
    require(not needed or parameter.name in options, f"method {method} needs {parameter.name}=...")
  return function(model, **options)
