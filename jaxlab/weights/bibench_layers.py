"""A network is one function of `Layers` and its input; an operator is a string, and the same function is initialised,
trained, counted and run on packed bits (`bibench_packed`).

  def network(layers, x):
    x = bibench.hard_tanh(layers.norm("stem.norm", layers.conv("stem", x, 16, binary=False)))
    x = bibench.hard_tanh(layers.norm("norm", layers.conv("body", x, 32, stride=2)))
    return layers.dense("head", x.mean(axis=(1, 2)), 10, binary=False)

  params, stats = init(network, key, images, "recu")
  logits, stats = apply(network, params, stats, images, "recu", at=schedule(epoch, epochs), train=True)
  params = adopted(params, of_fp32)                    # latent weights from a full-precision checkpoint
  savings(network, images, "recu")                     # of parameters and of operations, against the twin

params: {layer: {"kernel", ...}}; stats: {norm: {"mean", "var"}}, running ones, changed by training alone.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.core.checks import require
from jaxlab.weights import bibench
from jaxlab.weights.bibench import ALGORITHMS, FINAL, At
from jaxlab.weights.bibench_metrics import BITS, SPEED, saving

MOMENTUM = 0.9  # of running statistics
_EPS = 1e-5
Network = Callable[["Layers", Array], object]
Params = dict[str, dict[str, Array]]


class Cost(NamedTuple):
  """Of a layer and a sample: numbers that are stored, multiplications, and those of both that stay as they are.

  An operator's own scales are among those; what a reference rounds or a product of numbers with signs stays as it is.
  """

  parameters: int
  left_parameters: int
  operations: int
  left_operations: int


class Layers:
  """What a network function calls; `train` normalises by the batch and gives the operators' training form.

  Attributes:
    params, stats: of every layer by name; where `key` is given those that are called for the first time are made.
    new_stats: running statistics after this batch. costs: {layer: `Cost`}. binary: {product: is it binary}.
  """

  def __init__(self, operator: str, params: Params, stats: Params, *, at: At = FINAL, train: bool = False, key=None):
    self.one = bibench.operator(operator)
    self.operator, self.at, self.train, self.key = operator, at, train, key
    self.params, self.stats, self.new_stats = dict(params), dict(stats), {}
    self.costs: dict[str, Cost] = {}
    self.binary: dict[str, bool] = {}

  def conv(self, name: str, x, outputs: int, *, size: int = 3, stride: int = 1, binary: bool = True):
    """A convolution without a bias, padded: binary by the operator, or in full precision."""
    pixels = tuple(-(-n // stride) for n in x.shape[-3:-1])
    params = self._layer(name, (size, size, x.shape[-1], outputs), binary, pixels=pixels)
    self._count(name, params, x, math.prod(pixels), binary)
    return self._conv(name, x, stride, self.operator if binary else "fp32")

  def dense(self, name: str, x, outputs: int, *, binary: bool = True, bias: bool = True):
    """A dense map of the last axis."""
    params = self._layer(name, (x.shape[-1], outputs), binary, bias=bias)
    self._count(name, params, x, math.prod(x.shape[1:-1]), binary)
    return self._dense(name, x, self.operator if binary else "fp32")

  def norm(self, name: str, x: Float[Array, "*batch channels"]):
    """Batch normalisation over all axes but the last, with gain and offset, in full precision."""
    size = x.shape[-1]
    params = (
      self.array(name, "gain", lambda key: jnp.ones(size)),
      self.array(name, "offset", lambda key: jnp.zeros(size)),
    )
    if self.key is not None and name not in self.stats:
      self.stats[name] = {"mean": jnp.zeros(size), "var": jnp.ones(size)}
    kept = self.stats[name]
    if self.train:
      axes = tuple(range(x.ndim - 1))
      seen = {"mean": x.mean(axis=axes), "var": x.var(axis=axes)}
      self.new_stats[name] = {part: MOMENTUM * kept[part] + (1 - MOMENTUM) * seen[part] for part in seen}
      kept = seen
    gain, offset = params
    return (x - kept["mean"]) * (gain * jax.lax.rsqrt(kept["var"] + _EPS)) + offset

  def layer_norm(self, name: str, x: Float[Array, "*batch channels"]):
    """Over the last axis, with gain and offset."""
    gain = self.array(name, "gain", lambda key: jnp.ones(x.shape[-1]))
    offset = self.array(name, "offset", lambda key: jnp.zeros(x.shape[-1]))
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + _EPS) * gain + offset

  def array(self, layer: str, name: str, make: Callable) -> Array:
    """Any other parameter, made by make(key), in full precision."""
    own = self.params.setdefault(layer, {}) if self.key is not None else self.params[layer]
    if self.key is not None and name not in own:
      own = self.params[layer] = own | {name: make(self._key(f"{layer} {name}"))}
    cost = self.costs.get(layer, Cost(0, 0, 0, 0))
    size = own[name].size
    self.costs[layer] = cost._replace(parameters=cost.parameters + size, left_parameters=cost.left_parameters + size)
    return own[name]

  def product(self, name: str, operations: int) -> None:
    """Counts multiplications of a sample between activations, which stay in full precision."""
    self.costs[name] = Cost(0, 0, operations, operations)

  def _conv(self, name, x, stride, operator):
    return bibench.conv(operator, self.params[name], x, stride=stride, at=self.at, train=self.train)

  def _dense(self, name, x, operator):
    return bibench.dense(operator, self.params[name], x, at=self.at, train=self.train)

  def _key(self, name: str):
    return jax.random.fold_in(self.key, zlib.crc32(name.encode()))

  def _layer(self, name: str, shape, binary: bool, **how):
    require(name not in self.binary, f"two layers are named {name}; give each its own name")
    self.binary[name] = binary
    if self.key is not None and name not in self.params:
      self.params[name] = bibench.init(self.operator if binary else "fp32", self._key(name), shape, **how)
    require(name in self.params, f"no parameters for layer {name}; make them by init with the same network")
    return self.params[name]

  def _count(self, name: str, params, x, places: int, binary: bool) -> None:
    shape = params["kernel"].shape
    weights, outputs = math.prod(shape), shape[-1]
    bias = params["bias"].size if "bias" in params else 0
    operations = weights * places
    if not binary or self.operator not in ALGORITHMS:
      self.costs[name] = Cost(weights + bias, weights + bias, operations, operations)
      return
    pixels = sum(params[part].size for part in ("rows", "columns") if part in params)
    sizes = {"output": outputs, "input": shape[-2], "pixels": pixels}
    moved = {"output": outputs * places, "input": math.prod(x.shape[1:])}
    scales = sum(sizes[kind] for kind in self.one.scales)
    self.costs[name] = Cost(weights + bias, bias + scales, operations, sum(moved[kind] for kind in self.one.scaled))


@functools.partial(jax.jit, static_argnums=(0, 3))
def init(network: Network, key: jax.Array, x, operator: str) -> tuple[Params, Params]:
  """(params, stats) of a network for an input like those it will see; compiled whole, which takes less time."""
  layers = Layers(operator, {}, {}, key=key)
  network(layers, x)
  return layers.params, layers.stats


def apply(network: Network, params: Params, stats: Params, x, operator: str, *, at: At = FINAL, train: bool = False):
  """(what the network returns, running statistics after it)."""
  layers = Layers(operator, params, stats, at=at, train=train)
  found = network(layers, x)
  return found, stats | layers.new_stats


class Outline(NamedTuple):
  """costs: {layer: `Cost`}; binary: {product: is it binary}."""

  costs: dict[str, Cost]
  binary: dict[str, bool]


def outline(network: Network, x, operator: str) -> Outline:
  """What a network is made of, for one sample of a batch like x; nothing is computed."""
  found = Outline({}, {})

  def trace(key, x):
    layers = Layers(operator, {}, {}, key=key)
    network(layers, x)
    found.costs.update(layers.costs)
    found.binary.update(layers.binary)

  jax.eval_shape(trace, jax.random.key(0), x)
  return found


def savings(network: Network, x, operator: str) -> tuple[float, float]:
  """(r_c, r_s) of a network against its full-precision twin (`bibench_metrics.saving`)."""
  all_costs = outline(network, x, operator).costs.values()
  total = Cost(*(sum(part) for part in zip(*all_costs, strict=True)))
  return saving(total.parameters, total.left_parameters, BITS), saving(total.operations, total.left_operations, SPEED)


def adopted(params: Params, given: Params) -> Params:
  """`params` with every array that `given` has by the same layer, name and shape; an operator's own stay."""
  take = lambda layer, name, own: given.get(layer, {}).get(name, own) if layer in given else own
  made = {layer: {name: take(layer, name, own) for name, own in kept.items()} for layer, kept in params.items()}
  wrong = [layer for layer in params if jax.tree.map(jnp.shape, made[layer]) != jax.tree.map(jnp.shape, params[layer])]
  require(
    not wrong, f"layer {wrong[0] if wrong else ''} has other shapes in the checkpoint; give one of the same network"
  )
  return made


def clipped(params: Params, binary: Mapping[str, bool]) -> Params:
  """Latent weights of binary layers in [-1, 1]: beyond it the clip's gradient is 0 and they would never move again."""
  clip = lambda kept: kept | {"kernel": bibench.hard_tanh(kept["kernel"])}
  return {layer: clip(kept) if binary.get(layer) else kept for layer, kept in params.items()}
