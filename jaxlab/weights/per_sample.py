r"""Gradients of one linear map, sample by sample, from what it reads and what its outputs' gradients are.

Of y_t = W^T x_t and the loss of sample b,  d loss_b / d W_ij = sum_t x_bti g_btj,  g = d loss_b / d y: a chosen entry
is a sum of products of two columns, and no gradient of the whole W is ever held for a sample.

  network = Language(mean over a row of the next token's loss)         or Tensors(losses) for any function of matrices
  pairs = network.observe(params, name, batch);  pairs.mean();  pairs.at(index)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_choice
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import Linear
from jaxlab.training.losses import token_losses

_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
  """What a map W (inputs, outputs) read in a batch and the gradient of each sample's loss to what it gave.

  inputs: (batch, time, inputs); slopes: (batch, time, outputs); losses: (batch,) of the samples. All float32: products
  of small gradients vanish in fewer bits.
  """

  inputs: Float[Array, "batch time inputs"]
  slopes: Float[Array, "batch time outputs"]
  losses: Float[Array, "batch"]

  def mean(self) -> Float[Array, "inputs outputs"]:
    """The gradient of the mean loss."""
    return _product("bti,bto->io", self.inputs, self.slopes) / len(self.losses)

  def at(self, index: Int[Array, "n"]) -> Float[Array, "batch n"]:
    """Each sample's gradient at those entries of W, row after row; memory for one sample's products at a time."""
    rows, columns = jnp.divmod(index, self.slopes.shape[-1])
    one = lambda pair: _product("ti,ti->i", pair[0][:, rows], pair[1][:, columns])
    return jax.lax.map(one, (self.inputs, self.slopes))


class Network(Protocol):
  """What a method that prunes by gradients asks of a network; `Language` and `Tensors` are two."""

  def names(self, params) -> tuple[str, ...]:
    """Of its linear maps."""

  def get(self, params, name: str) -> Float[Array, "inputs outputs"]:
    """One map's matrix."""

  def put(self, params, name: str, weight: Float[Array, "inputs outputs"]):
    """The parameters with another matrix; the old ones may be overwritten."""

  def observe(self, params, name: str, batch) -> Pairs:
    """Of one map."""

  def loss(self, params, batch) -> Float[Array, ""]:
    """The mean of the samples' losses."""


Dense = Callable[[str, Float[Array, "batch *time inputs"]], Float[Array, "batch *time outputs"]]


@dataclasses.dataclass(frozen=True)
class Tensors:
  """A network whose parameters are matrices by name: a dict {name: (inputs, outputs)}.

  losses(dense, batch) -> (batch,), the loss of every sample, where dense(name, x) is x times the matrix of that name
  and x has the samples as its first axis. Each name is used once.
  """

  losses: Callable[[Dense, object], Float[Array, "batch"]]

  def names(self, params: Mapping[str, Array]) -> tuple[str, ...]:
    return tuple(params)

  def get(self, params, name):
    return params[name]

  def put(self, params, name, weight):
    return {**params, name: weight}

  @functools.partial(jax.jit, static_argnums=(0, 2))
  def observe(self, params, name: str, batch) -> Pairs:
    """As `Network.observe`.

    Raises:
      InputError: no such map, or one that is not used exactly once.
    """
    require_choice("a map", name, params)
    seen = []

    def run(probe):
      def dense(other, x):
        y = x @ params[other]
        if other != name:
          return y
        seen.append(x)
        return y if probe is None else y + probe

      losses = self.losses(dense, batch)
      return losses.sum(), (seen[-1] if seen else None, losses)

    jax.eval_shape(lambda: run(None)[0])
    require(len(seen) == 1, f"the map {name} is used {len(seen)} times in `losses`; it must be once")
    shape = (*seen[0].shape[:-1], params[name].shape[1])
    slopes, (x, losses) = jax.grad(run, has_aux=True)(jnp.zeros(shape, params[name].dtype))
    flat = lambda a: a.astype(jnp.float32).reshape(len(losses), -1, a.shape[-1])
    return Pairs(flat(x), flat(slopes), losses)

  @functools.partial(jax.jit, static_argnums=0)
  def loss(self, params, batch):
    return self.losses(lambda name, x: x @ params[name], batch).mean()


@dataclasses.dataclass(frozen=True)
class Language:
  """A `Transformer`: maps are "q.0" .. of every layer, a batch is token ids (batch, time + 1), a sample's loss the mean
  over its tokens.

  One program watches any map of any layer; the gradients of other weights are not made.
  """

  def names(self, params: Transformer) -> tuple[str, ...]:
    found = maps.named(params.blocks)
    for name, one in found.items():
      require(isinstance(one, Linear), f"{name} is a {type(one).__name__}; only plain maps are pruned")
    return tuple(f"{name}.{layer}" for layer in range(params.depth) for name in found)

  def get(self, params, name):
    kind, layer = split(name)
    return maps.named(params.blocks)[kind].weight[layer]

  def put(self, params, name, weight):
    kind, layer = split(name)
    return _put(params, kind, jnp.int32(layer), weight)

  def observe(self, params, name, batch) -> Pairs:
    kind, layer = split(name)
    found = _observe(params, {one: jnp.int32(layer if one == kind else -1) for one in maps.named(params.blocks)}, batch)
    inputs, slopes, losses = found
    return Pairs(inputs[kind], slopes[kind], losses)

  def loss(self, params, batch):
    return _losses(params, batch).mean()


def split(name: str) -> tuple[str, int]:
  """("mlp.up", 3) of "mlp.up.3"."""
  kind, _, layer = name.rpartition(".")
  return kind, int(layer)


def by_layer(stacked: Mapping[str, Array]) -> dict[str, Array]:
  """{"q.0": ...}, as `Language` names maps, of arrays stacked over layers by map."""
  return {f"{kind}.{layer}": one for kind, layers in stacked.items() for layer, one in enumerate(layers)}


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _put(model: Transformer, kind: str, layer, weight) -> Transformer:
  one = maps.named(model.blocks)[kind]
  stacked = one.weight[...]
  stacked = stacked.at[layer].set(weight.astype(stacked.dtype))
  return maps.with_blocks(model, maps.replaced(model.blocks, {kind: Linear(stacked, one.weight.axes)}))


@jax.jit
def _losses(model: Transformer, batch) -> Float[Array, "batch"]:
  require(batch.shape[1] >= 2, f"rows have {batch.shape[1]} token; a token is predicted from those before it")
  targets = batch[:, 1:]
  return token_losses(model, model.hidden(batch[:, :-1]), targets).mean(axis=1)


class _Watched(nnx.Module):
  """A map that leaves what it reads, and the gradient of what it gives, as gradients of `slots` where `on` is 1."""

  def __init__(self, weight, on, slots: Callable):
    self.weight, self.on, self.slots = nnx.data(weight), nnx.data(on), slots

  def __call__(self, x):
    return _watch(x, self.weight.astype(x.dtype), self.on, *self.slots())


@jax.custom_vjp
def _watch(x, weight, on, inputs, slopes):
  return x @ weight


def _watch_forward(x, weight, on, inputs, slopes):
  return x @ weight, (x, weight, on)


def _watch_backward(kept, slope):
  x, weight, on = kept
  # No gradient of the weight: nobody asks for it.
  return slope @ weight.T, jnp.zeros_like(weight), jnp.zeros_like(on), on * x, on * slope


_watch.defvjp(_watch_forward, _watch_backward)


@jax.jit
def _observe(model: Transformer, layers: Mapping[str, Int[Array, ""]], batch: Int[Array, "batch time_plus_1"]):
  """({map: inputs}, {map: slopes}, losses) of the layer of each map; zeros for a layer of -1."""
  plain = maps.named(model.blocks)
  shape = batch.shape[0], batch.shape[1] - 1
  zeros = lambda axis: {name: jnp.zeros((*shape, one.weight.shape[axis]), model.dtype) for name, one in plain.items()}

  def run(inputs, slopes):
    watched = {}
    for name, one in plain.items():
      on = (jnp.arange(model.depth) == layers[name]).astype(model.dtype)
      watched[name] = _Watched(one.weight[...], on, lambda name=name: (inputs[name], slopes[name]))
    found = _losses(maps.with_blocks(model, maps.replaced(model.blocks, watched)), batch)
    return found.sum(), found

  inputs, slopes = (zeros(axis) for axis in (-2, -1))
  (found, grown), losses = jax.grad(run, argnums=(0, 1), has_aux=True)(inputs, slopes)
  wide = lambda tree: {name: a.astype(jnp.float32) for name, a in tree.items()}
  return wide(found), wide(grown), losses
