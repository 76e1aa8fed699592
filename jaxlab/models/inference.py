"""A network where it is used: its layers apart, in the layout that is fastest for few tokens, with a cache.

  network = take_apart(model)                             # once, outside the compiled step
  logits, _ = step(network, tokens)                       # an uncached forward
  logits, state = prefill(network, prompts, lengths, capacity=1024)
  logits, state = step(network, token, state)

Stacked weights would be sliced, that is copied, in every step. Prompts of different lengths are padded at their ends.
Row b then continues at its own position lengths[b], over the padding's keys, which nothing reads: causal attention
within the prompt looks backwards, and later no further than the row is filled.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.models import maps
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.block import (
  Block,
  Side,
  for_inference,
  layer_slice,
  static_mixing,
  unstack_layers,
)
from jaxlab.models.config import TransformerConfig
from jaxlab.models.experts import TiledExperts
from jaxlab.models.layers import Steps
from jaxlab.models.map_forms import UNEVEN
from jaxlab.models.transformer import Transformer

Pair = tuple[Array, Array]  # keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
  """A model with its layers taken apart: `model` (without blocks) embeds and reads out, `blocks` run in a row."""

  model: Transformer
  blocks: tuple[Block, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The cache: keys (after RoPE and norm) and values of every layer, (batch, capacity, kv_heads, head_dim) each.

  `length` positions are filled, of all rows or of each; what lies past them is never read. `previous` is the last
  token's normalised embedding before smearing (models with `smear`), zeros before the first token.
  """

  # Any: trees of axes and of shardings have this form too.
  pairs: tuple[Pair | Any, ...]
  length: Int[Array, "*batch"] | Any
  previous: Float[Array, "batch 1 width"] | Any | None


def kernel_steps(config: TransformerConfig, dtype) -> Steps:
  """What stands between the products of such blocks, as the kernels of this library."""
  # Imported late: the kernels import their reference functions from this package.
  from jaxlab.kernels import decode_block
  from jaxlab.kernels.decode_attention import decode_attention
  from jaxlab.kernels.residual_norm import residual_norm
  from jaxlab.kernels.rotary_qkv import rotary_qkv

  whole = decode_block.decode_block if decode_block.usable(config, dtype) else None
  return Steps(rotary_qkv, residual_norm, decode_attention, whole)


def take_apart(model: Transformer, layers: int | None = None, *, narrow: bool = False) -> Network:
  """The network of the first `layers` layers of `model`, by default of all.

  Args:
    narrow: layers of a pruned model that have fewer heads or neurons than others lose the zeros they are filled with;
      `step` and `prefill` take them, a method's own states may not.
  """
  layers = model.depth if layers is None else layers
  blocks = ()
  if narrow and model.config.ragged:
    blocks = unstack_layers(model.blocks, model.depth)[:layers]
    blocks = tuple(_alone(maps.narrowed(block, layer)) for layer, block in enumerate(blocks))
  elif layers:
    steps = kernel_steps(model.config, model.dtype)
    blocks = unstack_layers(for_inference(layer_slice(model.blocks, 0, layers), steps), layers)
    blocks = tuple(_of_layer(block, layer) for layer, block in enumerate(blocks))
  rest = jax.tree.map(lambda a: a, model)
  if model.config.hyper and not model.config.hyper.dynamic:
    rest.mixing = static_mixing(model.blocks)
  rest.blocks = None
  return Network(rest, blocks)


def _of_layer(block: Block, layer: int) -> Block:
  """That layer's block without what fills up its experts and stacks."""
  if isinstance(block.mlp, TiledExperts):
    block.mlp = block.mlp.of_layer(layer)
  stacks = {name: one for name, one in maps.parts(block).items() if isinstance(one, UNEVEN)}
  return maps.replaced(block, {name: one.of_layer(layer) for name, one in stacks.items()}) if stacks else block


def _alone(block: Block) -> Block:
  """One block for inference, of a config of its own."""
  steps = kernel_steps(block.config, jax.tree.leaves(block)[0].dtype)
  return unstack_layers(for_inference(jax.tree.map(lambda a: a[None], block), steps), 1)[0]


def empty_state(network: Network, *, batch: int, capacity: int, dtype=None) -> State:
  """A cache with room for `capacity` tokens."""
  c = network.model.config
  dtype = dtype or network.model.dtype
  pair = lambda own: tuple(jnp.zeros((batch, capacity, own.kv_heads, own.head_dim), dtype) for _ in range(2))
  previous = jnp.zeros((batch, 1, c.width), dtype) if c.smear else None
  return State(tuple(pair(block.config) for block in network.blocks), jnp.int32(0), previous)


def step(
  network: Network,
  tokens: Int[Array, "batch time"],
  state: State | None = None,
  *,
  attention: AttentionFn = dot_product_attention,
) -> tuple[Float[Array, "batch time vocab"], State | None]:
  """Logits of the next `time` tokens, and the state with them (None without a state: a whole forward from position 0).

  The caller sees to it that the tokens fit the state's capacity.
  """
  x, backout, _, state = hidden(network, tokens, state, attention=attention)
  return network.model.logits(x, backout), state


def prefill(
  network: Network,
  prompts: Int[Array, "batch time"],
  lengths: Int[Array, "batch"] | None = None,
  *,
  capacity: int,
  attention: AttentionFn = dot_product_attention,
) -> tuple[Float[Array, "batch 1 vocab"], State]:
  """Logits after the last token of every prompt, and the state that continues them.

  Args:
    lengths: tokens of every row, at least 1; the rest of a row is padding of any kind. None: all of them.
    capacity: tokens the state has room for, the prompt's `time` (padding included) among them.
  """
  state = unfilled(empty_state(network, batch=prompts.shape[0], capacity=capacity))
  x, backout, _, state = hidden(network, prompts, state, lengths, attention=attention)
  return last_logits(network, x, backout, lengths), filled(state)


def last_logits(network, x, backout, lengths) -> Float[Array, "batch 1 vocab"]:
  """Logits of every row's last token alone."""
  return network.model.logits(*(None if a is None else last_of(a, lengths) for a in (x, backout)))


def unfilled(state: State) -> State:
  """An empty state that says so while a function is traced: its prompt then attends to itself alone."""
  return dataclasses.replace(state, length=0)


def filled(state: State) -> State:
  """The state with its length as an array again."""
  return dataclasses.replace(state, length=jnp.asarray(state.length, jnp.int32))


def hidden(
  network: Network, tokens, state: State | None, lengths=None, *, attention: AttentionFn
) -> tuple[Array, Array | None, Side, State | None]:
  """(output of the last layer, backout or None, side, state with the new positions in its caches).

  Args:
    lengths: of every row, how many of the tokens count; None: all.
  """
  model = network.model
  x, side, last = model.embed(tokens, state)
  written = []

  def whole(layer, block, x):
    if state is None or not takes_whole(block, x, attention):
      return None
    one = lambda tree: jax.tree.map(lambda a: a[None], tree)
    where = dict(cos=side.cos, sin=side.sin, start=side.start, windows=model.config.windows[layer : layer + 1])
    (x,), pair = block.steps.whole(one(block), x[None], one(state.pairs[layer]), **where)
    written.append(tuple(a[0] for a in pair))
    return x

  def attend(layer, block, x, q, k, v, window):
    if state is None:
      return attention(q, k, v, window=window, start=side.start)
    how = dict(windows=(window,), start=side.start, attention=attention)
    stored = tuple(a[None] for a in state.pairs[layer])
    attended, (pair,) = block.steps.attend_cached(q[None], k[None], v[None], (stored,), **how)
    written.append(tuple(a[0] for a in pair))
    return attended[0]

  x, backout = run_layers(network, x, side, attend, whole)
  if state is not None:
    if lengths is not None:
      last = before_smear(model, last_of(tokens, lengths))
    length = state.length + (tokens.shape[1] if lengths is None else lengths)
    state = State(tuple(written), length, last if model.config.smear else None)
  return x, backout, side, state


def run_layers(network: Network, x, side: Side, attend, whole=lambda layer, block, x: None):
  """(output of the last layer, backout or None).

  Args:
    attend: (layer, block, the layer's input, q, k, v, window) -> attention.
    whole: (layer, block, the layer's input) -> its output, or None where it is to be worked out step by step.
  """
  model, backout = network.model, None
  for layer, block in enumerate(network.blocks):
    given = x
    x = whole(layer, block, given)
    if x is None:
      mine = functools.partial(attend, layer, block, given)
      x = run_layer(model, block, layer, given, side, mine)
    backout = x if model.config.backout and layer == model.depth // 2 else backout
  return x, backout


def takes_whole(block: Block, x, attention: AttentionFn) -> bool:
  """Whether the kernels for one token of one row take this input (..., batch, time, width) of a block or of several."""
  return block.steps.whole is not None and x.shape[-3:-1] == (1, 1) and attention is dot_product_attention


def run_layer(model: Transformer, block: Block, layer: int, x, side: Side, attend):
  """The output of one layer; `attend(q, k, v, window)` is its attention."""
  c = model.config
  value = side.values[c.value_layers.index(layer)] if layer in c.value_layers else None
  mixing = jax.tree.map(lambda m: m[layer], side.mixing)
  inner, mix, q, k, v = block.project(x, side, value, mixing)
  return block.finish(inner, mix, attend(q, k, v, c.windows[layer]), mixing)[0]


def last_of(a: Array, lengths: Int[Array, "batch"] | None, axis: int = 1) -> Array:
  """The last token of every row of (..., batch, time, ...), `time` being `axis`; it stays as an axis of size 1."""
  if lengths is None:
    return jax.lax.slice_in_dim(a, a.shape[axis] - 1, None, axis=axis)
  index = (lengths - 1).reshape([-1 if i == axis - 1 else 1 for i in range(a.ndim)])
  return jnp.take_along_axis(a, index, axis=axis)


def before_smear(model: Transformer, token: Int[Array, "batch 1"]) -> Float[Array, "batch 1 width"] | None:
  """What `State.previous` holds after a token."""
  return model.embed(token)[2] if model.config.smear else None
