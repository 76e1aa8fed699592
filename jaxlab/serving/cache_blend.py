"""CacheBlend: the tokens to compute again are those whose values changed most (arXiv 2405.16444).

Layer 0 computes all tokens, layer 1 all keys and values; there the values are compared with the cached ones, and the
share of the tokens with the largest difference goes on, with all of the question's, over what is cached of the rest.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxlab.core.checks import require
from jaxlab.models.generate import require_ids
from jaxlab.models.inference import Network
from jaxlab.serving import partial_prefill
from jaxlab.serving.cache_craft import Choose, Served, laid, plan
from jaxlab.serving.cache_craft_store import ChunkStore, layers_of


def blend_share(
  network: Network,
  store: ChunkStore,
  chunks: Sequence[Sequence[int]],
  question: Sequence[int],
  *,
  share: float,
  choose: Choose,
  read: int = 1,
  room: int = 0,
  least: int = 64,
) -> Served:
  """`cache_craft.serve` with the tokens chosen by their values; nothing is stored.

  Args:
    share: of the tokens before the question that are computed in all layers.
    choose: the variants to use (what it wants computed again plays no part); chunks without one are computed.
    read, room, least: as in `serve`.

  Raises:
    InputError: a share outside 0 .. 1, fewer than two layers, and what `serve` refuses.
  """
  require(0 <= share <= 1, f"share is {share}; it must lie in 0 .. 1")
  depth = len(network.blocks)
  require(depth >= 2, f"values are compared in the second layer; the model has {depth}")
  partial_prefill.require_movable(network)
  made = plan(store, chunks, question, choose)
  require(1 <= read <= len(question), f"read is {read}; it must lie in 1 .. {len(question)}, the question's tokens")
  require_ids(made.tokens, network.model.config.vocab_size)
  n = len(made.tokens)
  capacity, asked = partial_prefill.room(n + room), len(question)
  missing = (made.groups == 0) & (store.system_parts is None)
  for i, choice in enumerate(made.choices):
    missing |= (made.groups == i + 1) & (choice.variant is None)
  always = missing | (made.groups == len(made.names) + 1)
  chosen = math.ceil(share * (n - asked) - 1e-9)
  size = min(partial_prefill.room(int(always.sum()) + min(chosen, int((~always).sum())), least), capacity)
  positions, tokens = (np.full((1, capacity), fill, np.int32) for fill in (-1, 0))
  groups, forced = np.full((1, capacity), -1, np.int32), np.zeros((1, capacity), bool)
  positions[0, :n], tokens[0, :n], groups[0, :n], forced[0, :n] = np.arange(n), made.tokens, made.groups, always
  stages = enumerate(layers_of(store.stages, depth))
  parts = [laid(network, store, made, stage, capacity, stop - start) for stage, (start, stop) in stages]
  cached = jax.tree.map(lambda *part: jnp.concatenate(part), *parts)
  last = np.arange(n - read, n)[None]
  logits, cached, went = blend(network, tokens, positions, cached, groups, forced, chosen, size=size, read=last)
  computed = np.asarray(went)[0]
  computed = np.isin(np.arange(n), computed[computed >= 0])
  token_layers = 2 * n + int(computed.sum()) * (depth - 2)
  return Served(logits[0], made._replace(computed=computed), (cached,), token_layers, n * depth)


@functools.partial(jax.jit, static_argnames="size", donate_argnames="cached")
def blend(
  network: Network,
  tokens: Int[Array, "batch rows"],
  positions: Int[Array, "batch rows"],
  cached: partial_prefill.Cached,
  groups: Int[Array, "batch capacity"],
  forced: Bool[Array, "batch rows"],
  count: Int[Array, ""] | int,
  *,
  size: int,
  read: Int[Array, "batch read"],
):
  """CacheBlend of a whole prompt.

  Args:
    tokens, positions: of all of the prompt, position p in row p; -1 is padding.
    cached, groups: as in `partial_prefill`.
    forced: rows that go on in any case: the question, and what is not cached.
    count: how many of the others do; size: rows of the pass from layer 1 on, with room for both.
    read: positions whose logits are wanted, among the forced.

  Returns:
    (logits, cached, int32[batch, size]: positions that were computed in all layers, ascending, -1 after them).
  """
  layers = len(network.blocks)
  went = None

  def choose(values, before):
    nonlocal went
    change = jnp.square(values.astype(jnp.float32) - before.astype(jnp.float32)).sum(axis=(2, 3))
    change = jnp.where(forced, jnp.inf, jnp.where(positions < 0, -jnp.inf, change))
    order = jnp.argsort(-change, axis=1, stable=True)[:, :size]
    # As many as wanted, in the order of their positions; what is left of the size is padding.
    goes = jnp.arange(size) < forced.sum(axis=1, keepdims=True) + count
    goes &= jnp.take_along_axis(positions, order, axis=1) >= 0
    order = jnp.sort(jnp.where(goes, order, positions.shape[1]), axis=1)
    went = jnp.where(order < positions.shape[1], order, -1)
    return went

  rows = partial_prefill.begin(network, tokens, positions)
  how = dict(count=1)
  rows, cached, _ = partial_prefill.advance_layer(network, rows, cached, groups, layer=0, at=0, **how)
  rows, cached, _ = partial_prefill.advance_layer(network, rows, cached, groups, layer=1, at=1, choose=choose, **how)
  for layer in range(2, layers):
    rows, cached, _ = partial_prefill.advance_layer(network, rows, cached, groups, layer=layer, at=layer, **how)
  index = jax.vmap(lambda went, read: jnp.searchsorted(jnp.where(went < 0, positions.shape[1], went), read))(went, read)
  return partial_prefill.finish(network, rows, index), cached, went
