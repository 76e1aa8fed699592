"""SliceGPT (Ashkboos et al. 2024): the residual stream rotated to its principal directions, the smallest deleted.

Deleting directions in rotated coordinates is projecting onto the others in the original ones: the norm keeps the
width it divides by, gains are part of the maps. So the network is judged as projections between its branches, and
counted as the smaller matrices that they stand for: every map has `kept` in the place of the width, and the rotation
from one branch's directions to the next's has kept^2 numbers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.models import Transformer
from jaxlab.models.config import TransformerConfig
from jaxlab.models.layers import rms_norm
from jaxlab.weights import calibration
from jaxlab.weights.structured import dense_parameters


def kept_at(config: TransformerConfig, budget: float) -> int:
  """Directions that are kept at a share of the blocks' parameters: (n / d) k + 2 L k^2 = budget n, n of all blocks."""
  whole = dense_parameters(config)
  rotations, maps = 2 * config.depth, whole / config.width
  return int((math.sqrt(maps**2 + 4 * rotations * budget * whole) - maps) / (2 * rotations))


def parameters(config: TransformerConfig, kept: int) -> int:
  """Of the blocks, rotations included."""
  return dense_parameters(config) // config.width * kept + 2 * config.depth * kept**2


def directions(model: Transformer, tokens, kept: int, *, batch: int = 8):
  """((layers, 2, width, kept) the principal directions of what each branch reads, normalised, of the states that the
  slices before it give; (width, kept) those that the head reads)."""
  outer, parts = calibration.opened(model, tokens, batch=batch)
  states = [calibration.embed(outer, part)[0] for part in parts]
  sides = lambda part: calibration.embed(outer, part)[1]
  found = []
  for block, kind in calibration.layers(model):
    first = _principal(states, model.config.norm_eps, kept)
    states = [_attention(block, x, sides(part), first, **kind) for x, part in zip(states, parts, strict=True)]
    second = _principal(states, model.config.norm_eps, kept)
    states = [_mlp(block, x, second) for x in states]
    found.append(jnp.stack([first, second]))
  return jnp.stack(found), _principal(states, model.config.norm_eps, kept)


def _principal(states, eps: float, kept: int) -> Float[Array, "width kept"]:
  seen = functools.reduce(calibration.merge, (_moments(x, eps) for x in states))
  return jnp.linalg.eigh(seen.second)[1][:, ::-1][:, :kept]


@functools.partial(jax.jit, static_argnames="eps")
def _moments(x, eps):
  return calibration.moments(rms_norm(x, eps))


def _cut(x, basis):
  return (x @ basis) @ basis.T


@functools.partial(jax.jit, static_argnames=("window", "row"))
def _attention(block, x, side, basis, *, window, row):
  inner, attended = calibration.attend(block, _cut(x, basis), side, window=window, row=row)
  return inner + block.o(attended.reshape(*attended.shape[:-2], -1))


@jax.jit
def _mlp(block, x, basis):
  x = _cut(x, basis)
  return x + block.mlp(block.mlp_norm(x))


@jax.jit
def hidden(model: Transformer, bases, last, tokens):
  """(final state, None) of a model sliced to such directions; zeros in the place of those that are not kept make one
  program of all sizes."""
  x, side, _ = model.embed(tokens)

  def layer(x, parts):
    block, (first, second) = parts
    return _mlp(block, _attention(block, x, side, first, window=None, row=None), second), None

  x, _ = jax.lax.scan(layer, x, (model.blocks, bases))
  return _cut(x, last), None


def filled(found, width: int):
  """Directions with zeros in the place of those that are not kept."""
  return tuple(jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])]) for a in found)
