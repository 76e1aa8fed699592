r"""TNT: deep memories that train in large chunks and run in small ones (arXiv 2511.07343, no official code).

A layer has one global memory V, written in large chunks through the whole sequence, and N local ones W^(i), written in
small chunks from a learned start to which they return every `shard` tokens, so that all shards run side by side:

  o_t = f(V at the start of the chunk, q_t) + sum_i f(W_t^(i), M_t q_t),     M_t = sum_tau k_tau k_tau'.

M_t brings queries to where the memory was written: the keys since the local memory began. Stage 1 trains with large
local chunks, stage 2 goes on with smaller ones: the same parameters, another `local_chunks`.

  layer = tnt.MemoryLayer(tnt.MemoryConfig(width=512), key)
  y = layer(x)                                            # (batch, time, width), stage 1
  y = layer(x, local_chunks=(2, 4))                       # stage 2; `local_parameters(layer)` is what it trains
  y, state = layer.prefill(prompt)                        # or layer.empty_state(batch)
  y, state = layer.step(x[:, 0], state, local_chunks=(1, 1))

Titans and TTT are this layer with one local memory that never returns: `titans` and `ttt` are their configs.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require, require_choice, require_counts, require_divides
from jaxlab.models.layers import Linear, RMSNorm, apply_rope, wide
from jaxlab.models.mamba2 import ssd
from jaxlab.sequence import deep_memory
from jaxlab.sequence.deep_memory import Gates, Memory, Running

WINDOWS = ("shard", "chunk", None)
_EPS, _THETA = 1e-6, 10_000.0
_KEPT = 4.0  # logit of 1 - alpha at the start


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """Shape of a layer of deep memories. Lengths are tokens.

  Attributes:
    global_chunk: C_G; None: no global memory.
    local_chunks: C_L of each local memory.
    shard: S_L, after which local memories begin anew; None: never.
    layers, expansion: products of f and the width of what is between them, in head_dims.
    taps: width of the causal convolution over q, k and v.
    projection: queries of local memories become M_t q_t, with M_t over the keys of the "shard" (the paper's appendix C)
      or of the local "chunk" (its equation 7) so far; None: they stay queries.
    renormalize: scales M_t q_t to unit length. M_t grows with t, f is not linear.
    momentum, decay: the gates eta and alpha of Titans.
    residual: f(x) = x + LN(products of x), with biases, and steps that shrink with 1 / (place in the chunk), as TTT.
    rotary: queries and keys of local memories turn by their place in the chunk (rotary positions), as TTT's.
    local_step, global_step: the largest step size theta at the start. Gradients of a chunk add up.
    clip: largest Frobenius norm of a matrix's change from chunk to chunk.
  """

  width: int
  heads: int = 8
  head_dim: int = 64
  global_chunk: int | None = 2048
  local_chunks: tuple[int, ...] = (8, 16)
  shard: int | None = 4096
  layers: int = 2
  expansion: int = 4
  taps: int = 4
  projection: str | None = "shard"
  renormalize: bool = True
  momentum: bool = False
  decay: bool = False
  residual: bool = False
  rotary: bool = False
  local_step: float = 0.1
  global_step: float = 0.01
  clip: float | None = 1.0

  def __post_init__(self):
    names = ("width", "heads", "head_dim", "layers", "expansion", "taps")
    require_counts(**{f"memory.{name}": getattr(self, name) for name in names})
    for name in ("global_chunk", "shard"):
      if getattr(self, name) is not None:
        require_counts(**{f"memory.{name}": getattr(self, name)})
    require_choice("memory.projection", self.projection, WINDOWS)
    require(self.local_chunks or self.global_chunk, "a layer without global_chunk and local_chunks remembers nothing")
    _check_chunks(self.local_chunks, self.shard)
    if self.rotary:
      require_divides("2", 2, "memory.head_dim", self.head_dim)
    for name in ("local_step", "global_step"):
      require(getattr(self, name) > 0, f"memory.{name} is {getattr(self, name)}; a largest step is positive")
    require(self.clip is None or self.clip > 0, f"memory.clip is {self.clip}; it must be positive, or None")

  @property
  def inner(self) -> int:
    """Channels of all heads."""
    return self.heads * self.head_dim


def titans(width: int, *, chunk: int = 16, **fields) -> MemoryConfig:
  """One memory with momentum and forgetting over the whole sequence."""
  own = dict(global_chunk=None, local_chunks=(chunk,), shard=None, projection=None, momentum=True, decay=True)
  return MemoryConfig(width, **(own | fields))


def ttt(width: int, *, chunk: int = 16, layers: int = 1, head_dim: int = 64, **fields) -> MemoryConfig:
  """TTT-Linear (one layer) or TTT-MLP (two): the memory of the paper in this layer.

  Its steps are base_lr 1 over head_dim for half of the squared error.
  """
  own = dict(global_chunk=None, local_chunks=(chunk,), shard=None, projection=None, residual=True, clip=None)
  own |= dict(rotary=True, layers=layers, head_dim=head_dim, local_step=0.5 / head_dim)
  return MemoryConfig(width, **(own | fields))


def project_queries(
  q: Float[Array, "batch time heads size"],
  k: Float[Array, "batch time heads size"],
  *,
  window: int,
  renormalize: bool = True,
) -> tuple[Float[Array, "batch time heads size"], Float[Array, "batch heads size size"]]:
  """(M_t q_t, M_T) with M_t the sum of k k' from the last multiple of `window` up to and including t.

  A state-space recurrence without decay whose inputs are its keys, so it runs in chunks of its own, whatever those of
  the memory are, in float32 or better.

  Raises:
    InputError: a window below 1 or one that does not divide the time.
  """
  batch, time, heads, size = q.shape
  require_divides("window", window, "time", time)
  cut = lambda a: jnp.moveaxis(a, 2, 1).reshape(-1, window, size)
  queries, keys = cut(q), cut(k)
  ones = jnp.ones((*keys.shape[:2], 1), keys.dtype)
  out, gram = ssd(keys[:, :, None], ones, jnp.zeros(1, keys.dtype), keys, queries)
  out = jnp.moveaxis(out.reshape(batch, heads, time, size), 1, 2)
  return _unit(out) if renormalize else out, gram.reshape(batch, heads, -1, size, size)[:, :, -1]


def turned(x: Float[Array, "*batch heads size"], place: Int[Array, "*batch"]) -> Float[Array, "*batch heads size"]:
  """Rotary positions: channels (i, i + size / 2) turn by place 10000^(-2 i / size)."""
  half = x.shape[-1] // 2
  angle = place[..., None] * _THETA ** (-jnp.arange(half, dtype=x.dtype) / half)
  return apply_rope(x, jnp.cos(angle), jnp.sin(angle))


class LearnedMemory(nnx.Module):
  """What a memory has of its own: the weights W_init that it begins with, and the gates of its writing."""

  def __init__(self, config: MemoryConfig, chunk: int, largest_step: float, key: jax.Array):
    c, keys = config, jax.random.split(key, config.layers + 1)
    sizes = [c.head_dim, *[c.expansion * c.head_dim] * (c.layers - 1), c.head_dim]
    start = [0.02 * jax.random.normal(keys[n], (c.heads, *sizes[n : n + 2])) for n in range(c.layers)]
    if c.residual:  # with a row of biases
      start = [jnp.pad(w, ((0, 0), (0, 1), (0, 0))) for w in start]
    kinds = 1 + c.decay + c.momentum
    self.config, self.largest_step = c, largest_step
    self.weights = nnx.List([nnx.Param(w, axes=("heads", None, None)) for w in start])
    gates = jax.random.normal(keys[-1], (c.width, kinds * c.heads)) / c.width**0.5
    self.gates = Linear(gates, ("embed", None))
    bias = jnp.zeros((kinds, c.heads))
    self.bias = nnx.Param(bias.at[1].set(_KEPT) if c.decay else bias, axes=(None, None))
    self.log_gain = nnx.Param(jnp.zeros(c.heads), axes=(None,))
    norm = jnp.stack([jnp.ones((c.heads, c.head_dim)), jnp.zeros((c.heads, c.head_dim))])
    self.norm = nnx.Param(norm, axes=(None, "heads", None)) if c.residual else None
    self.pace = nnx.Param(jnp.zeros(chunk), axes=(None,)) if c.residual else None

  def memory(self) -> Memory:
    """Before the first token, with a leading axis of heads."""
    weights = tuple(wide(w[...]) for w in self.weights)
    momentum = tuple(map(jnp.zeros_like, weights)) if self.config.momentum else None
    return Memory(weights, momentum, None if self.norm is None else tuple(self.norm[...]))

  def gates_of(self, x: Float[Array, "*batch width"]) -> Gates:
    """(*batch, heads) each; theta is largest_step exp(log_gain) sigmoid(x w + b), 1 - alpha and eta are sigmoids."""
    raw = wide(self.gates(x))
    raw = raw.reshape(*raw.shape[:-1], *self.bias.shape) + self.bias[...]
    gates = [jax.nn.sigmoid(raw[..., n, :]) for n in range(raw.shape[-2])]
    step = self.largest_step * jnp.exp(self.log_gain[...]) * gates[0]
    keep = gates[1] if self.config.decay else None
    return Gates(step, keep, gates[-1] if self.config.momentum else None)

  def rule(self, chunk: int, reads: str) -> dict:
    """What `deep_memory.scan` and `step` are told."""
    rule = dict(chunk=chunk, reads=reads, clip=self.config.clip)
    if self.pace is not None:
      longest = self.pace.shape[0]
      require(chunk <= longest, f"chunk is {chunk}; a layer with learned paces has {longest} of them at most")
      learned = wide(self.pace[...][:chunk])
      rule["pace"] = jax.nn.relu(1 / jnp.arange(1, chunk + 1, dtype=learned.dtype) + learned)
    return rule


class LayerState(NamedTuple):
  """What decoding keeps: tokens read, the convolution's last inputs, memories with leading axes (batch, heads).

  `gram` is M_t of each local memory, (batch, heads, head_dim, head_dim), or None without projection.
  """

  position: Int[Array, ""]
  conv: Float[Array, "batch taps_less_one channels"]
  whole: Running | None
  local: tuple[Running, ...]
  gram: tuple[Float[Array, "batch heads size size"] | None, ...]


class MemoryLayer(nnx.Module):
  """Mixes tokens, (batch, time, width) -> the same: W_o (norm of o by head, times silu(x W_g)), o as above.

  q, k, v are silu(conv(x W)), q and k of unit length; all memories share them. The norm before and the residual around
  it belong to the block that has the layer.
  """

  def __init__(self, config: MemoryConfig, key: jax.Array):
    c, keys = config, jax.random.split(key, 4 + len(config.local_chunks))
    bound = (3 / c.width) ** 0.5
    self.config = c
    into = jax.random.uniform(keys[0], (c.width, 4 * c.inner), minval=-bound, maxval=bound)
    self.inputs = Linear(into, ("embed", ("heads", c.head_dim)))
    conv = jax.random.uniform(keys[1], (c.taps, 3 * c.inner), minval=-(c.taps**-0.5), maxval=c.taps**-0.5)
    self.conv = nnx.Param(conv, axes=(None, None))
    self.global_memory = None if c.global_chunk is None else LearnedMemory(c, c.global_chunk, c.global_step, keys[2])
    local = zip(c.local_chunks, keys[4:], strict=True)
    self.local_memories = nnx.List([LearnedMemory(c, chunk, c.local_step, key) for chunk, key in local])
    self.norm = RMSNorm(c.head_dim, _EPS, True)
    out = jax.random.normal(keys[3], (c.inner, c.width)) / c.inner**0.5
    self.out = Linear(out, (("heads", c.head_dim), "embed"))

  def __call__(
    self, x: Float[Array, "batch time width"], *, local_chunks: tuple[int, ...] | None = None
  ) -> Float[Array, "batch time width"]:
    """A row shorter than a shard or a global chunk is one; one that is longer is a whole number of them.

    Args:
      local_chunks: in the place of the config's, one for each local memory: the switch of stage 2.

    Raises:
      InputError: chunks that do not divide the shard, as many as there are no memories for, a time that is no whole
        number of shards and of global chunks.
    """
    return self._forward(x, local_chunks)[0]

  def prefill(
    self, x: Float[Array, "batch time width"], *, local_chunks: tuple[int, ...] | None = None
  ) -> tuple[Float[Array, "batch time width"], LayerState]:
    """(`__call__`, the state after it): a prompt in large chunks, after which `step` goes on, in smaller ones if asked.

    Raises:
      InputError: as `__call__`, and where the prompt ends inside a chunk.
    """
    if self.global_memory is not None:
      require_divides("global_chunk", self.config.global_chunk, "time", x.shape[1])
    for chunk in self._chunks(local_chunks):
      require_divides("local_chunk", chunk, "time", x.shape[1])
    return self._forward(x, local_chunks)

  def _forward(self, x, local_chunks):
    c, chunks = self.config, self._chunks(local_chunks)
    u, gate = jnp.split(self.inputs(x), [3 * c.inner], axis=-1)
    before = jnp.zeros_like(u[:, :1]).repeat(c.taps - 1, axis=1)
    total, whole, local, gram = self.recall(x, *self.heads(u, before), chunks)
    conv = jnp.concatenate([before, u], axis=1)[:, x.shape[1] :]
    twice = lambda memory: Running(memory, memory)
    state = LayerState(
      jnp.asarray(x.shape[1], jnp.int32), conv, whole and twice(whole), tuple(map(twice, local)), tuple(gram)
    )
    return self.finish(total, gate, x.dtype), state

  def recall(self, x, q, k, v, chunks: tuple[int, ...]):
    """(o, global memory, local memories, M) after all tokens of (batch, time, heads, head_dim); x decides on the gates.

    o is the sum of what the memories say, in float32 or better.
    """
    c, (batch, time) = self.config, x.shape[:2]
    require(time > 0, f"rows have no token (x {x.shape}); give at least one")
    span, shard = min(c.global_chunk or time, time), min(c.shard or time, time)
    require_divides("global_chunk", span, "time", time)
    require_divides("shard", shard, "time", time)
    whole, total, local, grams = None, 0.0, [], []
    if self.global_memory is not None:
      memorize = _over_heads(deep_memory.scan, self.global_memory.rule(span, "chunk"))
      whole, total = memorize(self.global_memory.memory(), q, k, v, self.global_memory.gates_of(x))
    # Shards are rows of their own, which devices may share out.
    cut = lambda a: meshes.constrain(a.reshape(-1, shard, *a.shape[2:]), "stack")
    last = lambda a: a.reshape(batch, -1, *a.shape[1:])[:, -1]
    for own, chunk in zip(self.local_memories, chunks, strict=True):
      chunk = min(chunk, shard)
      queries, keys, values, gates = jax.tree.map(cut, (q, k, v, own.gates_of(x)))
      gram = None
      if c.rotary:
        queries, keys = (turned(a, jnp.arange(shard) % chunk) for a in (queries, keys))
      if c.projection is not None:
        window = shard if c.projection == "shard" else chunk
        queries, gram = project_queries(queries, keys, window=window, renormalize=c.renormalize)
        gram = last(gram)
      memorize = _over_heads(deep_memory.scan, own.rule(chunk, "token"))
      memory, out = memorize(own.memory(), queries, keys, values, gates)
      total = total + out.reshape(batch, time, c.heads, c.head_dim)
      local.append(jax.tree.map(last, memory))
      grams.append(gram)
    return total, whole, local, grams

  def empty_state(self, batch: int) -> LayerState:
    """The state before the first token of `batch` rows."""
    c = self.config
    rows = lambda own: jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *a.shape)), own.memory())
    running = lambda own: Running(rows(own), rows(own))
    conv = jnp.zeros((batch, c.taps - 1, 3 * c.inner), self.inputs.weight.dtype)
    gram = jnp.zeros((batch, c.heads, c.head_dim, c.head_dim), wide(conv).dtype) if c.projection else None
    whole = None if self.global_memory is None else running(self.global_memory)
    local = tuple(map(running, self.local_memories))
    return LayerState(jnp.zeros((), jnp.int32), conv, whole, local, (gram,) * len(local))

  def step(
    self, x: Float[Array, "batch width"], state: LayerState, *, local_chunks: tuple[int, ...] | None = None
  ) -> tuple[Float[Array, "batch width"], LayerState]:
    """One more token of every row, and the state with it: `__call__` a token at a time. Chunks are those of a run."""
    c, chunks, position = self.config, self._chunks(local_chunks), state.position
    u, gate = jnp.split(self.inputs(x)[:, None], [3 * c.inner], axis=-1)
    q, k, v = (a[:, 0] for a in self.heads(u, state.conv))
    conv = jnp.concatenate([state.conv, u.astype(state.conv.dtype)], axis=1)[:, 1:]
    again = lambda every, new, old: jax.tree.map(lambda a, b: jnp.where(position % every == 0, a, b), new, old)
    whole, total, local, grams = None, 0.0, [], []
    if self.global_memory is not None:
      move = _over_heads(
        functools.partial(deep_memory.step, position=position), self.global_memory.rule(c.global_chunk, "chunk")
      )
      whole, total = move(state.whole, q, k, v, self.global_memory.gates_of(x))
    for own, running, gram, chunk in zip(self.local_memories, state.local, state.gram, chunks, strict=True):
      if c.shard is not None:
        running = again(c.shard, Running(own.memory(), own.memory()), running)
      query, key = (turned(a, position % chunk) for a in (q, k)) if c.rotary else (q, k)
      window = c.shard if c.projection == "shard" else chunk
      if gram is not None:
        gram = gram if window is None else again(window, jnp.zeros_like(gram), gram)
        gram = gram + key[..., :, None] * key[..., None, :]
        query = jnp.einsum("bhij,bhj->bhi", gram, query)
        query = _unit(query) if c.renormalize else query
      move = _over_heads(functools.partial(deep_memory.step, position=position), own.rule(chunk, "token"))
      running, out = move(running, query, key, v, own.gates_of(x))
      total = total + out
      local.append(running)
      grams.append(gram)
    y = self.finish(total[:, None], gate, x.dtype)[:, 0]
    return y, LayerState(position + 1, conv, whole, tuple(local), tuple(grams))

  def _chunks(self, local_chunks) -> tuple[int, ...]:
    if local_chunks is None:
      return self.config.local_chunks
    own, given = len(self.local_memories), len(local_chunks)
    require(given == own, f"local_chunks has {given} lengths; the layer has {own} local memories, one for each")
    _check_chunks(local_chunks, self.config.shard)
    return tuple(local_chunks)

  def heads(self, u: Float[Array, "batch time channels"], before: Float[Array, "batch taps_less_one channels"]):
    """(q, k, v), each (batch, time, heads, head_dim) in float32 or better, from the raw products."""
    c, time = self.config, u.shape[1]
    padded = wide(jnp.concatenate([before.astype(u.dtype), u], axis=1))
    mixed = sum(self.conv[...][n] * padded[:, n : n + time] for n in range(c.taps))
    heads = jax.nn.silu(mixed).reshape(*u.shape[:2], 3, c.heads, c.head_dim)
    return _unit(heads[:, :, 0]), _unit(heads[:, :, 1]), heads[:, :, 2]

  def finish(self, o: Float[Array, "batch time heads size"], gate, dtype) -> Float[Array, "batch time width"]:
    return self.out((self.norm(o).reshape(gate.shape) * jax.nn.silu(wide(gate))).astype(dtype))


def local_parameters(layer: MemoryLayer) -> MemoryLayer:
  """True for what stage 2 trains, a tree like the layer: all but the global memory's own. For `optax.masked`.

  The paper adapts "only the local memory modules"; the projections that feed them count as theirs here.
  """
  own = lambda path, leaf: not any(getattr(key, "key", getattr(key, "name", None)) == "global_memory" for key in path)
  return jax.tree_util.tree_map_with_path(own, layer)


def _over_heads(function, rule: dict):
  """`function` for rows and heads: a sequence's memory has an axis of heads, a token's has axes of rows and heads."""

  def run(memory, q, k, v, gates):
    axis = q.ndim - 3  # heads, once rows are taken apart
    one = jax.vmap(lambda memory, *token: function(memory, *token, **rule), (0, axis, axis, axis, axis), (0, axis))
    return jax.vmap(one, (None if q.ndim == 4 else 0, 0, 0, 0, 0))(memory, q, k, v, gates)

  return run


def _unit(x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
  return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + _EPS)


def _check_chunks(chunks: tuple[int, ...], shard: int | None):
  for chunk in chunks:
    require_counts(local_chunk=chunk)
    if shard is not None:
      require_divides("local_chunk", chunk, "shard", shard)
