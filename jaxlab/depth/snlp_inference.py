"""SNLP where it is used: the network split once into its exact prefix and its solved suffix, with a cache.

  network = split(model, layers=24)                  # or what snlp_suffix makes; layers=0: the plain network
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
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core import newton
from jaxlab.core.checks import require, require_choice
from jaxlab.depth import snlp
from jaxlab.depth.snlp_suffix import Suffix, evaluate, plain
from jaxlab.models import Transformer, inference
from jaxlab.models.attention import (
  AttentionFn,
  Cache,
  dot_product_attention,
  take_layers,
  window_kinds,
  write_tokens,
)
from jaxlab.models.block import Side, for_inference, unstack_layers
from jaxlab.models.generate import Decoder
from jaxlab.models.generate import generate as generate_by
from jaxlab.models.inference import Pair, filled, hidden, last_of, run_layer, take_apart, takes_whole, unfilled

DECODED = ("identity", "jacobi", "damped", "scaled", "streams")
CACHE_KV = ("recompute", "last_iteration")


class StepOptions(TypedDict, total=False):
  """How a suffix is solved in decoding; `step_from` has the defaults and says what they mean."""

  iterations: int
  surrogate: str
  initial: str
  damping: float
  cache_kv: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
  """A model with its layers taken apart: those of `prefix` run in a row, those of a part are solved together."""

  prefix: inference.Network
  parts: tuple[Suffix, ...]

  @property
  def model(self) -> Transformer:
    """The model without its blocks: it embeds and reads out."""
    return self.prefix.model

  @property
  def fused(self) -> bool:
    """Whether layers were fused, which only the solver can run."""
    return any(part.fused for part in self.parts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """The cache: that of the prefix, and every part's keys and values stacked over layers of one window kind.

  `traces` hold z_1 .. z_n of every part at the last position, the start "warm" uses.
  """

  # Any: trees of axes and of shardings have this form too.
  prefix: inference.State | Any
  pairs: tuple[tuple[Pair | Any, ...], ...]
  traces: tuple[Float[Array, "units batch 1 *state"] | Any, ...]

  @property
  def length(self) -> Int[Array, "*batch"]:
    return self.prefix.length


def split(model: Transformer, layers: int | Suffix | tuple[Suffix, ...] = 0) -> Network:
  """The network of `model` with its last layers to be solved: as one suffix, or as the parts of `snlp_suffix.parts`.

  Do it once, outside the compiled step. Slices of stacked weights inside a step would be copied in every call.

  Raises:
    InputError: layers (n_par) outside 0..L.
  """
  if isinstance(layers, int):
    layers = plain(model, layers) if layers else ()
  parts = (layers,) if isinstance(layers, Suffix) else layers
  prefix = take_apart(model, parts[0].start if parts else model.depth)
  steps = lambda part: inference.kernel_steps(part.blocks.config, model.dtype)
  faster = lambda part: dataclasses.replace(part, blocks=for_inference(part.blocks, steps(part)))
  return Network(prefix, tuple(map(faster, parts)))


def empty_state(network: Network, *, batch: int, capacity: int, dtype=None) -> State:
  """A cache with room for `capacity` tokens."""
  c = network.model.config
  dtype = dtype or network.model.dtype
  prefix = inference.empty_state(network.prefix, batch=batch, capacity=capacity, dtype=dtype)
  shape = (batch, capacity, c.kv_heads, c.head_dim)
  pair = lambda index: tuple(jnp.zeros((len(index), *shape), dtype) for _ in range(2))
  pairs = tuple(tuple(pair(index) for index in _kinds(network, part).values()) for part in network.parts)
  streams = (c.hyper.streams,) if c.hyper else ()
  trace = lambda part: jnp.zeros((part.units, batch, 1, *streams, c.width), dtype)
  return State(prefix, pairs, tuple(map(trace, network.parts)))


def filled_to(state: State, length: int) -> State:
  """The state with its first `length` positions taken as filled, whatever lies there: a step at a context, to time."""
  return dataclasses.replace(state, prefix=dataclasses.replace(state.prefix, length=jnp.int32(length)))


def from_cache(network: Network, cache: Cache) -> State:
  """The state that continues a cache which the sequential model filled; its `traces` are zero, a cache has none.

  Raises:
    InputError: a fused suffix, whose keys and values are its own; prefill it with `step`.
  """
  require(not network.fused, "a fused suffix has keys and values of its own; prefill it with `step`")
  stores = (cache.keys, cache.values)
  prefix = tuple(tuple(store[i] for store in stores) for i in range(len(network.prefix.blocks)))
  pair = lambda part, index: tuple(store[part.start + jnp.array(index)] for store in stores)
  pairs = tuple(tuple(pair(part, index) for index in _kinds(network, part).values()) for part in network.parts)
  empty = empty_state(network, batch=cache.keys.shape[1], capacity=1, dtype=cache.keys.dtype)
  return State(inference.State(prefix, cache.length, cache.previous), pairs, empty.traces)


def step(
  network: Network,
  tokens: Int[Array, "batch time"],
  state: State | None = None,
  *,
  attention: AttentionFn = dot_product_attention,
  **options: Unpack[StepOptions],
) -> tuple[Float[Array, "batch time vocab"], State | None]:
  """Logits of the next `time` tokens, and the state with them (None without a state: a whole forward from position 0).

  The options (iterations, surrogate, ...) are those of `step_from`; a network without a suffix takes none.

  Raises:
    InputError: as `step_from`.
  """
  x, backout, side, state = prefix_states(network, tokens, state, attention)
  if not network.parts:
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
  lengths: Int[Array, "batch"] | None = None,
  attention: AttentionFn = dot_product_attention,
) -> tuple[Float[Array, "batch time vocab"], State | None]:
  """The second half of `step`: solves the parts, one after the other, from what `prefix_states` returned.

  Args:
    iterations, surrogate, initial, damping: as `snlp.solve`; initial may be "warm" (time = 1): the last token's trace.
      A part of fewer units than iterations takes as many as it has units: it is exact then.
    cache_kv: "recompute" keys and values from the corrected inputs z_0 .. z_{n-1}; "last_iteration" keeps those of the
      last evaluation, one projection less and slightly stale.
    lengths: of every row, how many of the tokens count; None: all.

  Raises:
    InputError: a surrogate that decoding does not offer, "warm" without a state or for several tokens.
  """
  require_choice("surrogate", surrogate, DECODED)
  require_choice("cache_kv", cache_kv, CACHE_KV)
  warm = initial == "warm"
  require(
    not warm or (state is not None and side.x0.shape[1] == 1), "initial 'warm' needs a state and one token at a time"
  )
  model = network.model
  pairs, traces = [], []
  for i, part in enumerate(network.parts):
    attend, stores = None, None
    if state is not None:
      stores = _Stores(network, part, state.pairs[i], side.start, attention)
      attend = stores.attend
    evaluated = functools.partial(evaluate, model, part, side=side, attention=attention, attend=attend)
    blocks = lambda z, evaluated=evaluated: evaluated(states=z)[0]
    if stores is not None and len(stores.pairs) == 1 and takes_whole(part.blocks, x, attention):
      blocks = functools.partial(stores.whole, part.blocks, side=side)
    trace = snlp.initial_trace(blocks, x, state.traces[i] if warm else initial, part.units)
    by_states = lambda z, evaluated=evaluated: evaluated(states=z)
    chosen = snlp.make_surrogate(model, part, side, surrogate, by_states, damping=damping)
    trace = newton.solve(blocks, trace, iterations=min(iterations, part.units), surrogate=chosen).trace
    if stores is not None:
      if cache_kv == "recompute" and part.units > 1:  # a single unit's input was exact from the start
        stores.write(*evaluate(model, part, trace[:-1], side, attend=lambda q, k, v: jnp.zeros_like(q))[1])
      pairs.append(stores.pairs)
      traces.append(last_of(trace[1:], lengths, axis=2).astype(state.traces[i].dtype))
    if model.config.backout and part.start <= model.depth // 2 < part.stop:
      backout = trace[part.unit_of(model.depth // 2) + 1]
    x = trace[-1]
  if state is not None:
    state = dataclasses.replace(state, pairs=tuple(pairs), traces=tuple(traces))
  return model.logits(x, backout), state


def exact_step(
  network: Network, tokens: Int[Array, "batch time"], state: State, *, attention: AttentionFn = dot_product_attention
) -> tuple[Float[Array, "batch time vocab"], State]:
  """`step` of the sequential network on the same state, for plain parts."""
  x, backout, side, state = prefix_states(network, tokens, state, attention)
  return finish_exactly(network, x, backout, side, state, attention=attention)


def finish_exactly(network: Network, x, backout, side: Side, state: State, *, attention=dot_product_attention):
  """(logits, state): the parts' layers in sequence, from the exact states `x` of their positions."""
  x, backout, state = _parts_exactly(network, x, backout, side, state, None, attention)
  return network.model.logits(x, backout), state


def _parts_exactly(network: Network, x, backout, side: Side, state: State, lengths, attention):
  """(output, backout or None, state)."""
  model = network.model
  require(not network.fused, "a fused suffix has no sequential network; split the model with plain layers")
  pairs, traces = [], []
  for part, old, before in zip(network.parts, state.pairs, state.traces, strict=True):
    kinds, trace = list(old), []
    where = {j: (g, row) for g, index in enumerate(_kinds(network, part).values()) for row, j in enumerate(index)}
    for j, block in enumerate(unstack_layers(part.blocks, part.layers)):
      g, row = where[j]

      def attend(q, k, v, window, g=g, row=row, steps=block.steps, kinds=kinds):
        how = dict(windows=(window,), start=side.start, layer=row, attention=attention)
        attended, (kinds[g],) = steps.attend_cached(q[None], k[None], v[None], (kinds[g],), **how)
        return attended[0]

      layer = part.start + j
      x = run_layer(model, block, layer, x, side, attend)
      backout = x if model.config.backout and layer == model.depth // 2 else backout
      trace.append(last_of(x, lengths).astype(before.dtype))
    pairs.append(tuple(kinds))
    traces.append(jnp.stack(trace))
  return x, backout, dataclasses.replace(state, pairs=tuple(pairs), traces=tuple(traces))


def prefill(
  network: Network,
  prompts: Int[Array, "batch time"],
  lengths: Int[Array, "batch"] | None = None,
  *,
  capacity: int,
  attention: AttentionFn = dot_product_attention,
  **options: Unpack[StepOptions],
) -> tuple[Float[Array, "batch 1 vocab"], State]:
  """`inference.prefill` by the sequential network; for a fused suffix by its own iterations with `options`."""
  state = empty_state(network, batch=prompts.shape[0], capacity=capacity)
  state = dataclasses.replace(state, prefix=unfilled(state.prefix))
  x, backout, side, state = prefix_states(network, prompts, state, attention, lengths)
  if network.fused:
    logits, state = step_from(network, x, backout, side, state, lengths=lengths, attention=attention, **options)
    logits = last_of(logits, lengths)
  else:
    x, backout, state = _parts_exactly(network, x, backout, side, state, lengths, attention)
    logits = inference.last_logits(network, x, backout, lengths)
  return logits, dataclasses.replace(state, prefix=filled(state.prefix))


@functools.cache
def decoder(**options: Unpack[StepOptions]) -> Decoder:
  """Generation with the options of `step` (`jaxlab.models.generate`)."""
  return Decoder(functools.partial(prefill, **options), functools.partial(step, **options))


def generate(
  network: Network,
  prompt: Int[Array, "batch time"],
  *,
  tokens: int,
  key: jax.Array | None = None,
  temperature: float = 0.0,
  **options: Unpack[StepOptions],
) -> Int[Array, "batch tokens"]:
  """`jaxlab.models.generate` of a split network; `options` are those of `step`."""
  return generate_by(network, prompt, tokens=tokens, key=key, temperature=temperature, decoder=decoder(**options))


def prefix_states(network: Network, tokens, state: State | None, attention: AttentionFn, lengths=None):
  """(h_S, backout or None, side, state with the new positions in its prefix caches)."""
  before = None if state is None else state.prefix
  x, backout, side, after = hidden(network.prefix, tokens, before, lengths, attention=attention)
  return x, backout, side, None if state is None else dataclasses.replace(state, prefix=after)


class _Stores:
  """A part's caches while a step is traced: every iteration overwrites the new positions of the one before.

  Writing each iteration's keys onto the original cache instead would keep a copy of the whole cache alive.
  """

  def __init__(self, network: Network, part: Suffix, pairs: tuple[Pair, ...], start, attention: AttentionFn):
    self.pairs, self._start = pairs, start
    self._windows = network.model.config.windows[part.start : part.stop]
    self._attend_cached = functools.partial(part.blocks.steps.attend_cached, attention=attention)

  def write(self, k, v):
    write = lambda store, new, index: write_tokens(store, take_layers(new, index), 0, self._start)
    kinds = zip(self.pairs, window_kinds(self._windows).values(), strict=True)
    self.pairs = tuple((write(keys, k, index), write(values, v, index)) for (keys, values), index in kinds)

  def whole(self, blocks, z, *, side: Side):
    """Outputs of all units by the kernels for one token."""
    how = dict(cos=side.cos, sin=side.sin, start=self._start, windows=self._windows)
    out, pair = blocks.steps.whole(blocks, z, self.pairs[0], chunk=len(self._windows) // z.shape[0], **how)
    self.pairs = (pair,)
    return out

  def attend(self, q, k, v):
    attended, self.pairs = self._attend_cached(q, k, v, self.pairs, windows=self._windows, start=self._start)
    return attended


def _kinds(network: Network, part: Suffix) -> dict[int | None, list[int]]:
  return window_kinds(network.model.config.windows[part.start : part.stop])
