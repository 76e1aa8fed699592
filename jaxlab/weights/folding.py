"""Scales of a map's inputs folded into what comes before it: the same network, W diag(s) reading x / s.

q, k, v     1 / s in the gains of the norm before attention          gate, up    in those of the norm before the MLP
down        1 / s in the outputs of up, which are multiplied in      o           in those of v, where each head has one
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.core.checks import require
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import Linear

INPUTS = (("q", "k", "v"), ("o",), ("mlp.gate", "mlp.up"), ("mlp.down",))  # maps that read the same


def foldable(model: Transformer) -> tuple[tuple[str, ...], ...]:
  """Those groups of `INPUTS` that have something before them which takes 1 / s."""
  c, found = model.config, maps.named(model.blocks)
  own_values = c.q_heads == c.kv_heads and not c.value_embeddings
  takes = {
    ("q", "k", "v"): c.norm_gain and not c.value_embeddings,  # a gate of value embeddings reads the norm, too
    ("o",): own_values,
    ("mlp.gate", "mlp.up"): c.norm_gain,
    ("mlp.down",): c.mlp == "swiglu",
  }
  return tuple(group for group in (tuple(n for n in names if n in found) for names in INPUTS) if takes.get(group))


def fold(model: Transformer, scales: Mapping[str, Float[Array, "layers inputs"]]) -> Transformer:
  """The model with the inputs of those maps divided by s, and the same logits.

  Args:
    scales: s of the first map of every group that is scaled, positive.

  Raises:
    InputError: a map that is the first of no foldable group, or no plain matrix.
  """
  groups = {group[0]: group for group in foldable(model)}
  blocks = jax.tree.map(lambda a: a, model.blocks)
  wrong = [name for name in scales if name not in groups]
  require(not wrong, f"nothing before {', '.join(wrong)} takes its scale; there are {', '.join(groups)}")
  found = maps.named(blocks)
  plain = all(isinstance(one, Linear) for one in found.values())
  require(plain, "scales are folded into plain maps; fold before a map takes another form")
  weights = {name: one.weight[...].astype(jnp.float32) for name, one in found.items()}
  for first, scale in scales.items():
    for name in groups[first]:
      weights[name] = weights[name] * scale[:, :, None]
    if first in ("o", "mlp.down"):
      before = "v" if first == "o" else "mlp.up"
      weights[before] = weights[before] / scale[:, None, :]
    else:
      norm = blocks.attention_norm if first == "q" else blocks.mlp_norm
      norm.gain[...] = (norm.gain[...].astype(jnp.float32) / scale).astype(norm.gain.dtype)
  for name, one in found.items():
    one.weight[...] = weights[name].astype(one.weight.dtype)
  return maps.with_blocks(model, blocks)
