"""SNLP where it is used: the network split once into its exact prefix and its solved suffix, with a cache (M10, M13).

  network = split(model, layers=24)                  # or a suffix from snlp_suffix.fuse; layers=0: the plain network
  logits, _ = step(network, tokens, iterations=2)    # an uncached forward
  state = prefill(network, prompt, capacity=1024)[1]
  logits, state = step(network, token, state, iterations=2)

A cached step computes the new position's keys and values of all n layers from the current estimates in every iteration,
attends to the cache and to them, corrects, and at the end recomputes keys and values from the corrected inputs, so that
K = n is exactly the sequential network. For 1 < K < n a cached decoder is another approximation than an uncached
forward: it attends to final keys of earlier tokens where the forward attends to keys of the same iteration.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core import newton
from jaxlab.core.checks import require, require_choice
from jaxlab.depth import snlp
from jaxlab.depth.snlp_suffix import Suffix, evaluate, plain
from jaxlab.kernels.decode_attention import decode_attention
from jaxlab.kernels.residual_norm import residual_norm
from jaxlab.kernels.rotary_qkv import rotary_qkv
from jaxlab.models import Transformer
from jaxlab.models.attention import (
  AttentionFn,
  Cache,
  dot_product_attention,
  take_layers,
  window_kinds,
  write_cache,
)
from jaxlab.models.generate import sample
from jaxlab.models.layers import Steps
from jaxlab.models.transformer import (
  Block,
  Side,
  for_inference,
  layer_slice,
  static_mixing,
  unstack_layers,
)

Pair = tuple[Array, Array]  # keys and values
DECODED = ("identity", "jacobi", "damped", "scaled", "streams")
CACHE_KV = ("recompute", "last_iteration")
STEPS = Steps(rotary_qkv, residual_norm, decode_attention)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
  """A model with its layers taken apart: `model` (without blocks) embeds and reads out, `prefix` runs in a row."""

  model: Transformer
  prefix: tuple[Block, ...]
  suffix: Suffix | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The cache: keys and values of every prefix layer, and of the suffix stacked over layers of one window kind.

  `previous` is as in `Cache`. `trace` holds z_1 .. z_n of the last position, the start "warm" uses.
  """

  prefix: tuple[Pair, ...]
  suffix: tuple[Pair, ...]
  length: Int[Array, ""]
  previous: Float[Array, "batch 1 width"] | None
  trace: Float[Array, "units batch 1 *state"] | None


def split(model: Transformer, layers: int | Suffix = 0) -> Network:
  """The network of `model` with its last layers as a suffix. Do it once, outside the compiled step.

  Slices of stacked weights inside a step would be copied in every call.

  Raises:
    InputError: layers (n_par) outside 0..L.
  """
  suffix = plain(model, layers) if isinstance(layers, int) and layers else layers or None
  start = model.depth if suffix is None else suffix.start
  prefix = ()
  if start:
    blocks = for_inference(layer_slice(model.blocks, 0, start), STEPS)
    prefix = tuple(unstack_layers(blocks, start))
  if suffix is not None:
    suffix = dataclasses.replace(suffix, blocks=for_inference(suffix.blocks, STEPS))
  rest = jax.tree.map(lambda a: a, model)
  if model.config.hyper and not model.config.hyper.dynamic:
    rest.mixing = static_mixing(model.blocks)
  rest.blocks = None
  return Network(rest, prefix, suffix)


def empty_state(network: Network, *, batch: int, capacity: int, dtype=None) -> State:
  """A cache with room for `capacity` tokens."""
  c, suffix = network.model.config, network.suffix
  dtype = dtype or network.model.dtype
  pair = lambda *lead: tuple(jnp.zeros((*lead, batch, capacity, c.kv_heads, c.head_dim), dtype) for _ in range(2))
  groups = () if suffix is None else tuple(pair(len(index)) for index in _kinds(network).values())
  streams = (c.hyper.streams,) if c.hyper else ()
  trace = None if suffix is None else jnp.zeros((suffix.units, batch, 1, *streams, c.width), dtype)
  previous = jnp.zeros((batch, 1, c.width), dtype) if c.smear else None
  return State(tuple(pair() for _ in network.prefix), groups, jnp.int32(0), previous, trace)


def from_cache(network: Network, cache: Cache) -> State:
  """The state that continues a cache which the sequential model filled; its `trace` is zero, a cache has none.

  Raises:
    InputError: a fused suffix, whose keys and values are its own; prefill it with `step`.
  """
  suffix = network.suffix
  require(suffix is None or not suffix.fused, "a fused suffix has keys and values of its own; prefill it with `step`")
  pairs = (cache.keys, cache.values)
  prefix = tuple(tuple(store[i] for store in pairs) for i in range(len(network.prefix)))
  start = len(network.prefix)
  groups = tuple(tuple(store[start + jnp.array(index)] for store in pairs) for index in _kinds(network).values())
  empty = empty_state(network, batch=cache.keys.shape[1], capacity=1, dtype=cache.keys.dtype)
  return State(prefix, groups, cache.length, cache.previous, empty.trace)


def step(
  network: Network,
  tokens: Int[Array, "batch time"],
  state: State | None = None,
  *,
  attention: AttentionFn = dot_product_attention,
  **options,
) -> tuple[Float[Array, "batch time vocab"], State | None]:
  """Logits of the next `time` tokens, and the state with them (None without a state: a whole forward from position 0).

  The options (iterations, surrogate, ...) are those of `step_from`; a network without a suffix takes none.

  Raises:
    InputError: as `step_from`.
  """
  x, backout, side, state = prefix_states(network, tokens, state, attention)
  if network.suffix is None:
    require(not options, f"a network without a suffix has no options; leave out {', '.join(options)}")
    return network.model.logits(x, backout), state
  return step_from(network, x, backout, side, state, attention=attention, **options)


def step_from(
  network: Network,
  x,
  backout,
  side: Side,
  state: State | None,
  *,
  iterations: int = 1,
  surrogate: str = "identity",
  initial: str = "h0",
  damping: float = 0.0,
  cache_kv: str = "recompute",
  attention: AttentionFn = dot_product_attention,
) -> tuple[Float[Array, "batch time vocab"], State | None]:
  """The second half of `step`: solves the suffix from what `prefix_states` returned.

  Args:
    iterations, surrogate, initial, damping: as `snlp.solve`; initial may be "warm" (time = 1): the last token's trace.
    cache_kv: "recompute" keys and values from the corrected inputs z_0 .. z_{n-1}; "last_iteration" keeps those of the
      last evaluation, one projection less and slightly stale.

  Raises:
    InputError: a surrogate that decoding does not offer, "warm" without a state or for several tokens.
  """
  require_choice("surrogate", surrogate, DECODED)
  require_choice("cache_kv", cache_kv, CACHE_KV)
  start = initial
  if initial == "warm":
    require(state is not None and side.x0.shape[1] == 1, "initial 'warm' needs a state and one token at a time")
    start = state.trace
  suffix, model = network.suffix, network.model
  attend, stores = None, None
  if state is not None:
    stores = _Stores(network, state.suffix, side.start, attention)
    attend = stores.attend
  evaluated = lambda z: evaluate(model, suffix, z, side, attention=attention, attend=attend)
  blocks = lambda z: evaluated(z)[0]
  trace = snlp.initial_trace(blocks, x, start, suffix.units)
  chosen = snlp.make_surrogate(model, suffix, side, surrogate, evaluated, damping=damping)
  trace = newton.solve(blocks, trace, iterations=iterations, surrogate=chosen).trace
  if stores is not None:
    if cache_kv == "recompute":
      stores.write(*evaluate(model, suffix, trace[:-1], side, attend=lambda q, k, v: jnp.zeros_like(q))[1])
    state = dataclasses.replace(state, suffix=stores.pairs, trace=trace[1:, :, -1:].astype(state.trace.dtype))
  if model.config.backout and model.depth // 2 >= suffix.start:
    backout = trace[suffix.unit_of(model.depth // 2) + 1]
  return model.logits(trace[-1], backout), state


def exact_step(
  network: Network, tokens: Int[Array, "batch time"], state: State, *, attention: AttentionFn = dot_product_attention
) -> tuple[Float[Array, "batch time vocab"], State]:
  """`step` of the sequential network on the same state, for a plain suffix."""
  x, backout, side, state = prefix_states(network, tokens, state, attention)
  return finish_exactly(network, x, backout, side, state, attention=attention)


def finish_exactly(network: Network, x, backout, side: Side, state: State, *, attention=dot_product_attention):
  """(logits, state): the suffix in sequence, from the exact states `x` of its positions."""
  model, suffix = network.model, network.suffix
  if suffix is not None:
    require(not suffix.fused, "a fused suffix has no sequential network; split the model with plain layers")
    groups, trace = list(state.suffix), []
    where = {j: (g, row) for g, index in enumerate(_kinds(network).values()) for row, j in enumerate(index)}
    for j, block in enumerate(unstack_layers(suffix.blocks, suffix.layers)):
      g, row = where[j]

      def attend(q, k, v, window, g=g, row=row, steps=block.steps):
        how = dict(windows=(window,), start=side.start, layer=row, attention=attention)
        attended, (groups[g],) = steps.attend_cached(q[None], k[None], v[None], (groups[g],), **how)
        return attended[0]

      layer = suffix.start + j
      x = _layer(model, block, layer, x, side, attend)
      backout = x if model.config.backout and layer == model.depth // 2 else backout
      trace.append(x[:, -1:].astype(state.trace.dtype))
    state = dataclasses.replace(state, suffix=tuple(groups), trace=jnp.stack(trace))
  return model.logits(x, backout), state


def prefill(network: Network, prompt: Int[Array, "batch time"], *, capacity: int, **options):
  """(logits, state) of a prompt: by the sequential network; for a fused suffix by `step` with `options`."""
  state = empty_state(network, batch=prompt.shape[0], capacity=capacity)
  if network.suffix is not None and network.suffix.fused:
    return step(network, prompt, state, **options)
  return exact_step(network, prompt, state, attention=options.get("attention", dot_product_attention))


def generate(
  network: Network,
  prompt: Int[Array, "batch time"],
  *,
  tokens: int,
  key: jax.Array | None = None,
  temperature: float = 0.0,
  **options,
) -> Int[Array, "batch tokens"]:
  """Continues each prompt row by `tokens` tokens; `options` are those of `step`. Jit it with the options static."""
  require(tokens >= 1, f"tokens is {tokens}; ask for at least 1")
  require(temperature == 0 or key is not None, "sampling at temperature > 0 needs a key: pass jax.random.key(seed)")
  keys = jax.random.split(jax.random.key(0) if key is None else key, tokens)
  draw = functools.partial(sample, temperature=temperature)
  logits, state = prefill(network, prompt, capacity=prompt.shape[1] + tokens, **options)
  first = draw(logits[:, -1], keys[0])

  def one(carry, key):
    token, state = carry
    logits, state = step(network, token[:, None], state, **options)
    token = draw(logits[:, -1], key)
    return (token, state), token

  _, rest = jax.lax.scan(one, (first, state), keys[1:])
  return jnp.concatenate([first[:, None], rest.T], axis=1)


def prefix_states(network: Network, tokens, state: State | None, attention: AttentionFn):
  """(h_S, backout or None, side, state with the new positions in its prefix caches)."""
  model = network.model
  x, side, last = model.embed(tokens, state)
  backout, written = None, []
  for layer, block in enumerate(network.prefix):

    def attend(q, k, v, window, layer=layer, steps=block.steps):
      if state is None:
        return attention(q, k, v, window=window, start=side.start)
      how = dict(windows=(window,), start=side.start, attention=attention)
      stored = tuple(a[None] for a in state.prefix[layer])
      attended, (pair,) = steps.attend_cached(q[None], k[None], v[None], (stored,), **how)
      written.append(tuple(a[0] for a in pair))
      return attended[0]

    x = _layer(model, block, layer, x, side, attend)
    backout = x if model.config.backout and layer == model.depth // 2 else backout
  if state is not None:
    previous = last if model.config.smear else None
    length = state.length + tokens.shape[1]
    state = dataclasses.replace(state, prefix=tuple(written), length=length, previous=previous)
  return x, backout, side, state


def _layer(model: Transformer, block: Block, layer: int, x, side: Side, attend):
  """One exact layer; `attend(q, k, v, window)`."""
  c = model.config
  value = side.values[c.value_layers.index(layer)] if layer in c.value_layers else None
  mixing = None if side.mixing is None else tuple(m[layer] for m in side.mixing)
  inner, mix, q, k, v = block.project(x, side, value, mixing)
  return block.finish(inner, mix, attend(q, k, v, c.windows[layer]), mixing)[0]


class _Stores:
  """The suffix's caches while a step is traced: every iteration overwrites the new positions of the one before.

  Writing each iteration's keys onto the original cache instead would keep a copy of the whole cache alive.
  """

  def __init__(self, network: Network, pairs: tuple[Pair, ...], start, attention: AttentionFn):
    suffix = network.suffix
    self.pairs, self._start = pairs, start
    self._windows = network.model.config.windows[suffix.start : suffix.stop]
    self._attend_cached = functools.partial(suffix.blocks.steps.attend_cached, attention=attention)

  def write(self, k, v):
    write = lambda store, new, index: write_cache(store, take_layers(new, index), (0, 0, self._start))
    kinds = zip(self.pairs, window_kinds(self._windows).values(), strict=True)
    self.pairs = tuple((write(keys, k, index), write(values, v, index)) for (keys, values), index in kinds)

  def attend(self, q, k, v):
    attended, self.pairs = self._attend_cached(q, k, v, self.pairs, windows=self._windows, start=self._start)
    return attended


def _kinds(network: Network) -> dict[int | None, list[int]]:
  suffix = network.suffix
  return {} if suffix is None else window_kinds(network.model.config.windows[suffix.start : suffix.stop])
