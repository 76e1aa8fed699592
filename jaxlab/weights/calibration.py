"""What a network's linear maps read on a calibration text, one layer in memory at a time.

  maps = layer_by_layer(model, tokens, visit, batch=8)      # visit(layer, block, {map: Moments}) -> {map: another form}
  model = with_maps(model, maps)

Maps that read the same input (q, k and v; gate and up) share its statistics: they are collected once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import InputError, require
from jaxlab.models import Transformer, maps
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.block import Block, Side
from jaxlab.models.layers import Linear
from jaxlab.models.map_forms import Affine

SHARED = {"k": "q", "v": "q", "mlp.gate": "mlp.up"}  # map -> the one whose input it shares


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
  """Statistics of the inputs x of a map, float32, over T tokens in R rows.

  Attributes:
    tokens, rows: T and R. mean: (n,). scatter: (n, n), the sum of (x - mean)(x - mean)^T.
    absolute: (n,), the mean of |x|. norm: (n,), the mean over rows of sqrt(sum_t x_t^2).
  """

  tokens: Float[Array, ""]
  rows: Float[Array, ""]
  mean: Float[Array, "n"]
  scatter: Float[Array, "n n"]
  absolute: Float[Array, "n"]
  norm: Float[Array, "n"]

  @property
  def covariance(self) -> Float[Array, "n n"]:
    """scatter / T."""
    return self.scatter / self.tokens

  @property
  def second(self) -> Float[Array, "n n"]:
    """The mean of x x^T."""
    return self.covariance + jnp.outer(self.mean, self.mean)

  def through(self, weight: Float[Array, "n m"]) -> "Moments":
    """Of x W: absolute and norm from the second moment, as if it were normal and all rows alike."""
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    mean, scatter = product(self.mean, weight), product(weight.T, product(self.scatter, weight))
    power = jnp.maximum(jnp.diagonal(scatter) / self.tokens + mean**2, 0)
    absolute, norm = jnp.sqrt(2 / jnp.pi * power), jnp.sqrt(power * self.tokens / self.rows)
    return Moments(self.tokens, self.rows, mean, scatter, absolute, norm)


def moments(x: Float[Array, "rows time n"]) -> Moments:
  """Of one batch; sums are float32 products of the highest precision."""
  x = x.astype(jnp.float32)
  rows, time, _ = x.shape
  flat = x.reshape(rows * time, -1)
  mean = flat.mean(axis=0)
  centred = flat - mean
  scatter = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)
  norm = jnp.sqrt((x * x).sum(axis=1)).mean(axis=0)
  return Moments(jnp.float32(rows * time), jnp.float32(rows), mean, scatter, jnp.abs(flat).mean(axis=0), norm)


def merge(a: Moments, b: Moments) -> Moments:
  """Of two batches together (Chan, Golub and LeVeque 1979): no difference of large sums."""
  tokens, rows = a.tokens + b.tokens, a.rows + b.rows
  apart = b.mean - a.mean
  share = b.tokens / tokens
  scatter = a.scatter + b.scatter + jnp.outer(apart, apart) * a.tokens * share
  between = lambda x, y, part: x + (y - x) * part
  return Moments(
    tokens,
    rows,
    between(a.mean, b.mean, share),
    scatter,
    between(a.absolute, b.absolute, share),
    between(a.norm, b.norm, b.rows / rows),
  )


def layer_by_layer(
  model: Transformer,
  tokens: Int[Array, "rows time"],
  visit: Callable[[int, Block, Mapping[str, Moments]], Mapping[str, nnx.Module]],
  *,
  batch: int = 8,
  sequential: bool = False,
) -> dict[str, nnx.Module]:
  """{map: its other form, stacked over layers}: `visit` sees one layer, unstacked, and what its maps read.

  Args:
    tokens: calibration text, a multiple of `batch` rows.
    sequential: later layers read what the layers before them give with their other maps, not the original ones.

  Raises:
    InputError: as `opened`.
  """
  outer, parts = opened(model, tokens, batch=batch)
  states = [embed(outer, part)[0] for part in parts]
  found = []
  for block, kind in layers(model):
    total, outputs = None, []
    for part, x in zip(parts, states, strict=True):
      y, new = _observe(block, x, embed(outer, part)[1], **kind)
      total = new if total is None else _merge(total, new)
      outputs.append(y)
    inputs = {name: total[SHARED.get(name, name)] for name in maps.named(block)}
    found.append(dict(visit(len(found), block, inputs)))
    if sequential:
      other = maps.replaced(block, found[-1])
      outputs = [_observe(other, x, embed(outer, p)[1], **kind)[0] for p, x in zip(parts, states, strict=True)]
    states = outputs
  return {name: maps.stack([forms[name] for forms in found]) for name in found[0]}


def opened(model: Transformer, tokens: Int[Array, "rows time"], *, batch: int) -> tuple[Transformer, list[Array]]:
  """(the model without its blocks, batches of the text), both on the device.

  Raises:
    InputError: rows that do not fill batches or hold no token, weights that are not finite (named), a model with
      experts or hyper-connections, or no `Transformer`.
  """
  require_transformer(model)
  rows, c = len(tokens), model.config
  require(np.size(tokens) > 0, f"the calibration text has shape {np.shape(tokens)}; give rows of tokens")
  require(rows >= batch and rows % batch == 0, f"{rows} rows of calibration text; give a multiple of batch={batch}")
  require(not (c.experts or c.hyper), "calibration is of dense blocks, without experts and hyper-connections")
  require_finite(model)
  outer = jax.tree.map(jnp.asarray, maps.with_blocks(model, None))
  return outer, [jnp.asarray(tokens[i : i + batch]) for i in range(0, rows, batch)]


def layers(model: Transformer) -> Iterator[tuple[Block, dict]]:
  """Every layer's block, unstacked, and what `attend` needs to know of it.

  Of a model in host memory (NumPy) one is on the device at a time, if the caller forgets it before the next.
  """
  c = model.config
  kind = lambda i: dict(window=c.windows[i], row=c.value_layers.index(i) if i in c.value_layers else None)
  for layer in range(model.depth):
    yield jax.tree.map(lambda a: jnp.asarray(a[layer]), model.blocks), kind(layer)  # noqa: B023 (used at once)


def with_maps(model: Transformer, forms: Mapping[str, nnx.Module]) -> Transformer:
  """The model with its stacked maps in other forms."""
  return maps.with_blocks(model, maps.replaced(model.blocks, forms))


def require_transformer(model) -> None:
  """Raises InputError for a model that has no attention and MLP to take maps of."""
  require(isinstance(model, Transformer), f"the maps are those of a Transformer; this is a {type(model).__name__}")


def matrix(name: str, one: nnx.Module) -> Array:
  """W of a map that is a matrix, with a bias or without.

  Raises:
    InputError: a map of another form, which a method that takes weights apart cannot start from.
  """
  plain = isinstance(one, Linear | Affine)
  require(plain, f"{name} is a {type(one).__name__}, compressed before; give a model whose maps are plain")
  return one.weight[...]


def require_finite(model: Transformer) -> None:
  """Raises InputError that names the first parameter which holds NaN or infinity."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    check = np if isinstance(leaf, np.ndarray) else jnp
    if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(check.isfinite(leaf).all()):
      name = jax.tree_util.keystr(path, simple=True, separator=".")
      raise InputError(f"{name} holds NaN or infinity; the checkpoint is broken, copy or train it again")


embed = jax.jit(lambda model, tokens: model.embed(tokens)[:2])
_merge = jax.jit(lambda a, b: {name: merge(a[name], b[name]) for name in a})


def attend(block: Block, x, side: Side, *, window, row):
  """(what the residual sum starts from, attention of every head) of a block's input."""
  inner, _, q, k, v = block.project(x, side, None if row is None else side.values[row], None)
  return inner, dot_product_attention(q, k, v, window=window, start=0)


@functools.partial(jax.jit, static_argnames=("window", "row"))
def _observe(block: Block, x, side: Side, *, window, row):
  """(the block's output, {map: Moments of its input})."""
  y, seen = read(block, x, side, window=window, row=row)
  return y, {name: moments(inputs) for name, inputs in seen.items()}


def read(block: Block, x, side: Side, *, window, row):
  """(the block's output, {map: its input}), of maps that share an input one."""
  seen = {}

  def tap(name, one):
    def call(inputs):
      seen[name] = inputs
      return one(inputs)

    return call

  watched = {name: tap(name, one) for name, one in maps.named(block).items()}
  block = maps.replaced(block, watched)
  inner, attended = attend(block, x, side, window=window, row=row)
  y, _ = block.finish(inner, None, attended, None)
  return y, {name: seen[name] for name in watched if name not in SHARED}


def rows_of(tokens, *, rows: int, time: int, seed: int = 0) -> np.ndarray:
  """`rows` windows of `time` tokens from random places of a text's ids.

  Raises:
    InputError: a text shorter than one window.
  """
  ids = np.asarray(tokens)
  require(len(ids) >= time, f"the calibration text has {len(ids)} tokens; one row takes {time}")
  starts = np.random.default_rng(seed).integers(0, len(ids) - time + 1, rows)
  return np.stack([ids[s : s + time] for s in starts]).astype(np.int32)
