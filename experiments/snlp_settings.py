"""How SNLP's experiments write a setting: "n24 K2 F2 streams batch_fwd".

n layers in parallel, K Newton steps, F layers fused into one wide layer (left out: plain layers), G groups solved one
after the other (1), surrogate (identity) and start (h0).
"""

import jax

from jaxlab.core.checks import require
from jaxlab.depth import snlp, snlp_suffix

_LETTERS = {"n": "layers", "K": "iterations", "F": "chunk", "G": "groups"}


def parse(text: str) -> dict:
  """{"layers", "iterations", "chunk" (0: not fused), "groups", "surrogate", "initial"}."""
  setting = dict(chunk=0, groups=1, surrogate="identity", initial="h0")
  for word in text.split():
    if word[0] in _LETTERS and word[1:].isdigit():
      setting[_LETTERS[word[0]]] = int(word[1:])
    elif word in snlp.SURROGATES or word in snlp.INITIAL:
      setting["surrogate" if word in snlp.SURROGATES else "initial"] = word
    else:
      require(False, f"SNLP setting {text!r}: {word!r} is neither like n8, K2, F2, G4 nor a surrogate nor a start")
  require({"layers", "iterations"} <= setting.keys(), f"SNLP setting {text!r} must name n and K, as in 'n24 K2'")
  return setting


def forward(text: str):
  """`(model, tokens) -> (final state, backout state)` of the uncached network at a setting."""
  s = parse(text)
  options = {name: s[name] for name in ("iterations", "groups", "surrogate", "initial")}

  def hidden(model, tokens):
    layers = snlp_suffix.fuse(model, s["layers"], chunk=s["chunk"]) if s["chunk"] else s["layers"]
    key = jax.random.key(0) if s["surrogate"] == "diagonal" else None
    return snlp.hidden(model, tokens, layers=layers, key=key, **options)

  return hidden
