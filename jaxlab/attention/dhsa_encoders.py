"""What DHSA's boundary predictor makes of the keys around a position (arXiv 2510.24606): three encoders of windows.

An encoder has `prepare(x)`, of every position once, float32 (..., size) -> (..., prepared), and is called on windows of
what is prepared, (..., two_w, prepared) -> e, (..., two_w, size), with a key where it drops out.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.core.checks import require_divides

_BLOCKS, _DROPOUT = 4, 0.1  # of `WindowStack`
_CONVOLUTIONS, _TAPS = 2, 3  # of `WindowConvolution`: layers, and positions that one looks at


class WindowAttention(nnx.Module):
  """e = LayerNorm(MHA(X, X, X)), without residual or positions: the published one."""

  def __init__(self, size: int, key: jax.Array, *, heads: int):
    require_divides("heads", heads, "the numbers of a position's keys", size)
    keys = jax.random.split(key)
    self.heads = heads
    self.qkv, self.qkv_bias = _normal(keys[0], size, 3 * size), _fill(0.0, 3 * size)
    self.out, self.out_bias = _normal(keys[1], size, size), _fill(0.0, size)
    self.gain, self.shift = _fill(1.0, size), _fill(0.0, size)

  def prepare(self, x):
    return x @ self.qkv[...] + self.qkv_bias[...]

  def __call__(self, windows: Float[Array, "*rows two_w three_C"], key: jax.Array | None = None):
    mixed = _attend(windows, self.heads) @ self.out[...] + self.out_bias[...]
    return _layer_norm(mixed, self.gain[...], self.shift[...])


class WindowStack(nnx.Module):
  """Four blocks x + Dropout(MHA(LayerNorm(x))), then a LayerNorm; a tenth is dropped where a key is given."""

  def __init__(self, size: int, key: jax.Array, *, heads: int):
    require_divides("heads", heads, "the numbers of a position's keys", size)
    keys = jax.random.split(key)
    self.heads = heads
    self.qkv, self.qkv_bias = _normal(keys[0], _BLOCKS, size, 3 * size), _fill(0.0, _BLOCKS, 3 * size)
    self.out, self.out_bias = _normal(keys[1], _BLOCKS, size, size), _fill(0.0, _BLOCKS, size)
    self.gain, self.shift = _fill(1.0, _BLOCKS + 1, size), _fill(0.0, _BLOCKS + 1, size)

  def prepare(self, x):
    return x

  def __call__(self, windows: Float[Array, "*rows two_w C"], key: jax.Array | None = None):
    x = windows
    for i in range(_BLOCKS):
      inner = _layer_norm(x, self.gain[i], self.shift[i]) @ self.qkv[i] + self.qkv_bias[i]
      mixed = _attend(inner, self.heads) @ self.out[i] + self.out_bias[i]
      if key is not None:
        kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - _DROPOUT, mixed.shape)
        mixed = jnp.where(kept, mixed / (1 - _DROPOUT), 0)
      x = x + mixed
    return _layer_norm(x, self.gain[-1], self.shift[-1])


class WindowConvolution(nnx.Module):
  """Two convolutions over three positions each, ReLU after the first, zeros outside the window; then a LayerNorm."""

  def __init__(self, size: int, key: jax.Array, *, heads: int):
    del heads  # of the others
    self.taps, self.bias = _normal(key, _CONVOLUTIONS, _TAPS * size, size), _fill(0.0, _CONVOLUTIONS, size)
    self.gain, self.shift = _fill(1.0, size), _fill(0.0, size)

  def prepare(self, x):
    return x

  def __call__(self, windows: Float[Array, "*rows two_w C"], key: jax.Array | None = None):
    x = windows
    for i in range(_CONVOLUTIONS):
      x = jax.nn.relu(x) if i else x
      padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(_TAPS // 2, _TAPS // 2), (0, 0)])
      near = [padded[..., j : j + x.shape[-2], :] for j in range(_TAPS)]
      x = jnp.concatenate(near, axis=-1) @ self.taps[i] + self.bias[i]
    return _layer_norm(x, self.gain[...], self.shift[...])


ENCODERS = {"attention": WindowAttention, "stack": WindowStack, "convolution": WindowConvolution}


def _attend(windows, heads: int):
  """Attention of every position of a window to all of it, from its q, k and v side by side."""
  split = lambda a: a.reshape(*a.shape[:-1], heads, -1)
  q, k, v = map(split, jnp.split(windows, 3, axis=-1))
  weight = jax.nn.softmax(jnp.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(q.shape[-1]), axis=-1)
  return jnp.einsum("...hqk,...khd->...qhd", weight, v).reshape(*windows.shape[:-1], -1)


def _layer_norm(x, gain, shift):
  return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * gain + shift


def _normal(key, *shape: int):
  """Of variance 1 / inputs, the inputs being the last axis but one."""
  return nnx.Param(jax.random.normal(key, shape) / math.sqrt(shape[-2]), axes=(None,) * len(shape))


def _fill(value: float, *shape: int):
  return nnx.Param(jnp.full(shape, value), axes=(None,) * len(shape))
