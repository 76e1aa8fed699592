"""The networks that operators are put into: functions of `Layers` and an input that give (logits, hidden states).

All products inside blocks are binary, 1 x 1 ones of shortcuts among them; first and last ones, norms and embeddings
stay in full precision.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlab.core.checks import require, require_choice
from jaxlab.weights.bibench import hard_tanh, rprelu
from jaxlab.weights.bibench_layers import Layers


def resnet(layers: Layers, x, *, width: int, blocks: int, classes: int, every: bool = False):
  """CIFAR's ResNet of 6 `blocks` + 2 layers; `every` convolution has a shortcut, as in Bi-Real nets."""
  x = hard_tanh(layers.norm("stem.norm", layers.conv("stem", x, width, binary=False)))
  for stage in range(3):
    for block in range(blocks):
      name, outputs = f"{stage}.{block}", width * 2**stage
      stride = 2 if stage and not block else 1
      y = layers.norm(f"{name}.norm1", layers.conv(f"{name}.conv1", x, outputs, stride=stride))
      if stride > 1:
        x = layers.norm(f"{name}.down.norm", layers.conv(f"{name}.down", x, outputs, size=1, stride=2))
      z = hard_tanh(y + x if every else y)
      y = layers.norm(f"{name}.norm2", layers.conv(f"{name}.conv2", z, outputs))
      x = hard_tanh(y + (z if every else x))
  return layers.dense("head", x.mean(axis=(1, 2)), classes, binary=False), ()


def vgg_small(layers: Layers, x, *, width: int, blocks: int, classes: int):
  """Pairs of convolutions of 1, 2, 4 times `width` (three, as published), each with a pool of 2 x 2 behind."""
  for i in range(2 * blocks):
    x = layers.conv(f"conv{i}", x, 2 ** (i // 2) * width, binary=i > 0)
    x = hard_tanh(layers.norm(f"norm{i}", pooled(x, jax.lax.max, -jnp.inf) if i % 2 else x))
  return layers.dense("head", x.reshape(len(x), -1), classes, binary=False), ()


def reactnet(layers: Layers, x, *, width: int, classes: int, **_):
  """MobileNet-like (width 32: 32-64-128x2-256x2-512x6-1024x2): a 3 x 3 and a 1 x 1 convolution with a shortcut each,
  RPReLU behind; twice the channels are two 1 x 1 convolutions side by side; a stride pools the shortcut."""
  x = layers.norm("stem.norm", layers.conv("stem", x, width, binary=False))
  plan = [(2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *[(16, 1)] * 5, (32, 2), (32, 1)]
  for i, (factor, stride) in enumerate(plan):
    stride = stride if min(x.shape[1:3]) > 2 else 1
    y = layers.norm(f"{i}.norm1", layers.conv(f"{i}.conv1", x, x.shape[-1], stride=stride))
    y = _rprelu(layers, f"{i}.act1", y + (pooled(x, jax.lax.add, 0.0) / 4 if stride > 1 else x))
    each = [layers.norm(f"{i}.norm2{j}", layers.conv(f"{i}.conv2{j}", y, y.shape[-1], size=1)) + y
            for j in range(factor * width // y.shape[-1])]  # fmt: skip
    x = _rprelu(layers, f"{i}.act2", jnp.concatenate(each, axis=-1))
  return layers.dense("head", x.mean(axis=(1, 2)), classes, binary=False), ()


def _rprelu(layers: Layers, name: str, x):
  size = x.shape[-1]
  of = lambda part, value: layers.array(name, part, lambda key: jnp.full(size, value))
  return rprelu(x, of("slope", 0.25), of("before", 0.0), of("behind", 0.0))


def pooled(x, how: Callable, start):
  """2 x 2 places into one; a last odd row or column is left out."""
  return jax.lax.reduce_window(x, start, how, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def pointnet(layers: Layers, x, *, width: int, classes: int, align: bool = False, **_):
  """PointNet of points (batch, points, 3): maps of each, a maximum over all, maps of that.

  Points are the rows of an image one column wide, so that a cloud is a sample. A maximum of many is rarely negative: it
  is normalised, or all its signs were +1. align: a T-net turns the points first.
  """
  x = x[:, :, None]
  if align:
    turn = _points(layers, "turn", x, (width, 2 * width))
    turn = layers.dense("turn.out", turn, 9, binary=False).reshape(-1, 3, 3) * 0.1 + jnp.eye(3)
    x = jnp.einsum("bpqi,bij->bpqj", x, turn)
  h = _points(layers, "points", x, (width, width, 2 * width, 4 * width))
  h = hard_tanh(layers.norm("middle.norm", layers.dense("middle", h, 2 * width, bias=False)))
  return layers.dense("head", h, classes, binary=False), ()


def _points(layers: Layers, name: str, x, widths):
  for i, outputs in enumerate(widths):
    x = layers.norm(f"{name}.norm{i}", layers.conv(f"{name}{i}", hard_tanh(x), outputs, size=1, binary=i > 0))
  return hard_tanh(layers.norm(f"{name}.norm", x.max(axis=(1, 2))))


def transformer(layers: Layers, ids, *, vocabulary: int, width: int, depth: int, heads: int, classes: int):
  """BERT of token ids (batch, time): norms behind sums, gelu, the mean of the last states; all six maps are binary.

  The hidden states of every block are what a student's are compared with.
  """
  batch, time = ids.shape
  normal = lambda *shape: lambda key: 0.1 * jax.random.normal(key, shape)
  x = layers.array("embedding", "tokens", normal(vocabulary, width))[ids]
  x = layers.layer_norm("embedding.norm", x + layers.array("embedding", "places", normal(time, width)))
  split = lambda y: y.reshape(batch, time, heads, width // heads)
  hidden = []
  for i in range(depth):
    q, k, v = (split(layers.dense(f"{i}.{part}", x, width)) for part in "qkv")
    layers.product(f"{i}.attention", 2 * time * time * width)
    mixed = jax.nn.dot_product_attention(q, k, v).reshape(batch, time, width)
    x = layers.layer_norm(f"{i}.norm1", x + layers.dense(f"{i}.o", mixed, width))
    inner = jax.nn.gelu(layers.dense(f"{i}.up", x, 4 * width))
    x = layers.layer_norm(f"{i}.norm2", x + layers.dense(f"{i}.down", inner, width))
    hidden.append(x)
  return layers.dense("head", x.mean(axis=1), classes, binary=False), tuple(hidden)


PICTURES = dict(resnet=resnet, bireal=functools.partial(resnet, every=True), vgg=vgg_small, reactnet=reactnet)
CLOUDS = dict(pointnet=pointnet, aligned=functools.partial(pointnet, align=True))


def of_pictures(name: str, *, width: int, blocks: int, classes: int):
  """The network of that name, given its sizes."""
  require_choice("config.pictures.network", name, PICTURES)
  return functools.partial(PICTURES[name], width=width, blocks=blocks, classes=classes)


def of_clouds(name: str, *, width: int, classes: int):
  require_choice("config.clouds.network", name, CLOUDS)
  return functools.partial(CLOUDS[name], width=width, classes=classes)


def of_text(*, vocabulary: int, width: int, depth: int, heads: int, classes: int):
  require(width % heads == 0, f"text.heads={heads} must divide text.width={width}")
  sizes = dict(vocabulary=vocabulary, width=width, depth=depth, heads=heads, classes=classes)
  return functools.partial(transformer, **sizes)
