"""How SNLP's experiments write a setting: "n24 K2 F2 streams batch_fwd".

n layers in parallel, K Newton steps, F layers fused into one wide layer (left out: plain layers), G groups solved one
after the other (1), T layers in sequence behind them (0), surrogate (identity) and start (h0).
"""

import functools

import jax

from jaxlab.core.checks import require
from jaxlab.depth import snlp, snlp_suffix
from jaxlab.models.attention import dot_product_attention

PLAIN, REGULARISED = "plain", "regularised"  # the two models of a run
_LETTERS = {"n": "layers", "K": "iterations", "F": "chunk", "G": "groups", "T": "tail"}


def parse(text: str) -> dict:
  """{"layers", "iterations", "chunk" (0: not fused), "groups", "tail", "surrogate", "initial"}."""
  setting = dict(chunk=0, groups=1, tail=0, surrogate="identity", initial="h0")
  for word in text.split():
    if word[0] in _LETTERS and word[1:].isdigit():
      setting[_LETTERS[word[0]]] = int(word[1:])
    elif word in snlp.SURROGATES or word in snlp.INITIAL:
      setting["surrogate" if word in snlp.SURROGATES else "initial"] = word
    else:
      require(False, f"SNLP setting {text!r}: {word!r} is neither like n8, K2, F2, G4, T2 nor a surrogate nor a start")
  require({"layers", "iterations"} <= setting.keys(), f"SNLP setting {text!r} must name n and K, as in 'n24 K2'")
  return setting


def is_idn(s: dict) -> bool:
  """The paper's plain form: unfused layers, A = I, from h0."""
  return (s["chunk"], s["groups"], s["tail"], s["surrogate"], s["initial"]) == (0, 1, 0, "identity", "h0")


def refit(text: str, before: int, after: int) -> str | None:
  """The setting on the same share of a network of `after` instead of `before` layers; None if its parts do not fit."""
  s = parse(text)
  if before == after:
    return text
  n = min(max(1, round(s["layers"] * after / before)), after)
  if n % max(s["chunk"], 1) or n % s["groups"]:
    return None
  new = {"n": n, "K": min(s["iterations"], n), "T": min(max(1, round(s["tail"] * after / before)), after - n)}
  return " ".join(
    f"{word[0]}{new[word[0]]}" if word[0] in new and word[1:].isdigit() else word for word in text.split()
  )


def refit_config(config, depth: int):
  """A copy of an SNLP config whose settings fit a given model of `depth` layers."""
  config = config.copy_and_resolve_references()
  before = config.shape.depth
  many = lambda texts: tuple(dict.fromkeys(new for text in texts if (new := refit(text, before, depth))))
  for name in ("settings", "sliced", "cached"):
    config.snlp[name] = many(config.snlp[name])
  config.speculation.settings = many(config.speculation.settings)
  config.convergence.layers = max(1, round(config.convergence.layers * depth / before))
  config.reg.layers = tuple(dict.fromkeys(max(1, round(n * depth / before)) for n in config.reg.layers))
  config.bench.shown = many(config.bench.shown)
  config.bench.cases = [case | {"settings": many(case["settings"])} for case in config.bench.cases]
  claims = [c | {"setting": refit(c["setting"], before, depth)} for c in config.bench.claims]
  config.bench.claims = [c for c in claims if c["setting"]]
  return config


def solved_layers(model, setting: dict):
  """What `snlp_inference.split` takes as a parsed setting's layers."""
  if setting["chunk"]:
    return snlp_suffix.fuse(model, setting["layers"], chunk=setting["chunk"])
  return snlp_suffix.parts(model, setting["layers"], groups=setting["groups"], tail=setting["tail"])


def forward(text: str):
  """`(model, tokens) -> (final state, backout state)` of the uncached network at a setting."""
  s = parse(text)
  options = {name: s[name] for name in ("iterations", "groups", "tail", "surrogate", "initial")}

  def hidden(model, tokens):
    layers = solved_layers(model, s) if s["chunk"] else s["layers"]
    if s["surrogate"] == "diagonal":  # by a forward derivative
      attention = functools.partial(dot_product_attention, flash=False)
      return snlp.hidden(model, tokens, layers=layers, attention=attention, key=jax.random.key(0), **options)
    return snlp.hidden(model, tokens, layers=layers, **options)

  return hidden
