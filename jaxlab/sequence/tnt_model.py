"""A language model whose layers mix tokens by deep memories (`sequence.tnt`): TNT, Titans or TTT by its config.

  x = x + memory layer(norm x);   x = x + SwiGLU(norm x)         no attention, no positions: a convolution gives order

  config = MemoryModelConfig(vocab_size=8192, depth=6, mlp_width=1024, memory=tnt.MemoryConfig(width=512))
  model = MemoryModel(config, key)
  logits = model(tokens)                                         # rows of whole shards, stage 1
  logits = model(tokens, local_chunks=(2, 4))                    # stage 2; `of_local_memories` names what it trains
  out = generate(model, prompt, tokens=64, decoder=decoder(local_chunks=(1, 1)))

It trains with `training.loop.train` as the other networks do.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require, require_counts
from jaxlab.models.config import TransformerConfig
from jaxlab.models.generate import Decoder
from jaxlab.models.layers import MLP, Linear, RMSNorm, lookup, wide
from jaxlab.models.mamba2 import recomputed
from jaxlab.sequence.tnt import LayerState, MemoryConfig, MemoryLayer

_SPREAD = 0.02  # of the head at the start


@dataclasses.dataclass(frozen=True)
class MemoryModelConfig:
  """Shape of a language model of deep memories; `memory` is that of every layer and has its width."""

  vocab_size: int
  depth: int
  mlp_width: int
  memory: MemoryConfig
  norm_eps: float = 1e-5

  def __post_init__(self):
    require_counts(**{f"model.{name}": getattr(self, name) for name in ("vocab_size", "depth", "mlp_width")})

  @property
  def width(self) -> int:
    return self.memory.width

  @property
  def tied_embeddings(self) -> bool:
    return False

  @property
  def transformer(self) -> TransformerConfig:
    """The shape of the SwiGLUs."""
    sizes = dict(vocab_size=self.vocab_size, depth=self.depth, width=self.width, mlp_width=self.mlp_width)
    return TransformerConfig(**sizes, q_heads=self.memory.heads, kv_heads=self.memory.heads, head_dim=2)

  @property
  def matmul_parameters(self) -> int:
    """Parameters that multiply activations once a token: the block matrices and the head."""
    block = self.width * (5 * self.memory.inner + 3 * self.mlp_width)
    return self.depth * block + self.width * self.vocab_size

  def flops_per_token(self, length: int) -> int:
    """Training FLOPs a token (forward and backward): 6 N plus the memories' products in the dual form.

    Of P fast weights a token takes 8 P: its key forwards and backwards, its write, its query; in a chunk of C a query
    meets C / 2 keys on average. What the backward pass computes again is not counted.
    """
    m = self.memory
    inside = m.expansion * m.head_dim
    sizes = [m.head_dim, *[inside] * (m.layers - 1), m.head_dim]
    weights = sum(a * b for a, b in itertools.pairwise(sizes))
    local = sum(8 * weights + 2 * min(chunk, length) * (sum(sizes[:-1]) + sum(sizes[1:])) for chunk in m.local_chunks)
    whole = 0 if m.global_chunk is None else 8 * weights
    projections = 0 if m.projection is None else 4 * m.head_dim**2 * len(m.local_chunks)
    return 6 * self.matmul_parameters + 3 * self.depth * m.heads * (local + whole + projections)


class Block(nnx.Module):
  """A memory layer and a SwiGLU around a residual stream in float32; products are in the dtype that is asked for."""

  def __init__(self, config: MemoryModelConfig, key: jax.Array, layer: Callable[..., MemoryLayer]):
    c, (mixing, feeding) = config, jax.random.split(key)
    self.mixer_norm = RMSNorm(c.width, c.norm_eps, True)
    self.mixer = layer(c.memory, mixing)
    out = self.mixer.out.weight
    self.mixer.out = Linear(out[...] / math.sqrt(2 * c.depth), out.axes)  # one of so many branches
    self.mlp_norm = RMSNorm(c.width, c.norm_eps, True)
    self.mlp = MLP(c.transformer, feeding)

  def __call__(self, x: Float[Array, "*batch width"], mix: Callable, dtype):
    """(output, state): mix(memory layer, its input) -> (what it says, state)."""
    mixed, state = mix(self.mixer, self.mixer_norm(x.astype(dtype)))
    x = x + mixed
    return x + self.mlp(self.mlp_norm(x.astype(dtype))), state


class MemoryModel(nnx.Module):
  """`model(tokens: int32[batch, time]) -> float32[batch, time, vocab]`."""

  def __init__(self, config: MemoryModelConfig, key: jax.Array, *, layer: Callable[..., MemoryLayer] = MemoryLayer):
    """`layer(config.memory, key)` makes the layer of a block; another has the calls of a `MemoryLayer`."""
    c, keys = config, jax.random.split(key, 3)
    self.config = c
    self.embedding = nnx.Param(jax.random.normal(keys[0], (c.vocab_size, c.width)), axes=("vocab", "embed"))
    self.blocks = jax.vmap(lambda k: Block(c, k, layer))(jax.random.split(keys[1], c.depth))
    self.norm = RMSNorm(c.width, c.norm_eps, True)
    self.head = Linear(_SPREAD * jax.random.normal(keys[2], (c.width, c.vocab_size)), ("embed", "vocab"))

  @property
  def depth(self) -> int:
    return self.config.depth

  @property
  def dtype(self):
    return self.embedding.dtype

  def __call__(self, tokens: Int[Array, "batch time"], **options) -> Float[Array, "batch time vocab"]:
    return self.logits(*self.hidden(tokens, **options))

  def hidden(
    self,
    tokens: Int[Array, "batch time"],
    *,
    local_chunks: tuple[int, ...] | None = None,
    remat: str = "none",
    unroll: bool = False,
  ) -> tuple[Float[Array, "batch time width"], None]:
    """(final state, None): what `logits` reads, in the form that a Transformer has.

    Args:
      local_chunks: in the place of the config's, one for each local memory.
      remat: what the backward pass recomputes of the layers: "none", "dots" (all but products with weights) or "full".

    Raises:
      InputError: as `MemoryLayer.__call__`; rows are whole shards and global chunks, or shorter than one.
    """
    mix = lambda mixer, x, _: (mixer(x, local_chunks=local_chunks), None)
    return self._run(self.embed(tokens), mix, remat=remat, unroll=unroll)[0], None

  def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time width"]:
    return wide(meshes.to_rows(lookup(self.embedding[...], tokens)))

  def logits(self, x: Float[Array, "batch time width"], _=None) -> Float[Array, "batch time vocab"]:
    return wide(self.head(meshes.to_batch(self.norm(x).astype(self.dtype))))

  def _run(self, x, mix: Callable, states=None, *, remat: str = "none", unroll: bool = False):
    """(output, states) of the blocks one after the other; mix(memory layer, input, its state) -> (output, state)."""

    def one(x, parts):
      block, state = parts
      own = lambda mixer, x: mix(mixer, x, state)
      return meshes.gathered(block)(x, own, self.dtype)

    blocks = (self.blocks, states)
    return jax.lax.scan(recomputed(one, remat), x, blocks, unroll=self.depth if unroll else 1)

  def empty_state(self, batch: int) -> LayerState:
    """The state before the first token of `batch` rows, with a leading axis of layers."""
    return jax.vmap(lambda block: block.mixer.empty_state(batch))(self.blocks)

  def prefill(
    self, tokens: Int[Array, "batch time"], *, local_chunks: tuple[int, ...] | None = None
  ) -> tuple[Float[Array, "batch 1 vocab"], LayerState]:
    """(logits after the last token, the state behind it) of a prompt of any length.

    Whole chunks and shards are read at once, what is left of the prompt token by token.

    Raises:
      InputError: an empty prompt, or chunks as in `MemoryLayer.__call__`.
    """
    require(tokens.shape[1] > 0, f"the prompt has no token (tokens {tokens.shape}); give at least one")
    at_once = self._at_once(tokens.shape[1], local_chunks)
    x, state = None, self.empty_state(len(tokens))
    if at_once:
      mix = lambda mixer, x, _: mixer.prefill(x, local_chunks=local_chunks)
      x, state = self._run(self.embed(tokens[:, :at_once]), mix)
      x = x[:, -1]
    x = jnp.zeros((len(tokens), self.config.width), jnp.float32) if x is None else x

    def one(carry, token):
      return self._step(token, carry[1], local_chunks), None

    if at_once < tokens.shape[1]:
      (x, state), _ = jax.lax.scan(one, (x, state), tokens[:, at_once:].T)
    return self.logits(x[:, None]), state

  def step(
    self, tokens: Int[Array, "batch"], state: LayerState, *, local_chunks: tuple[int, ...] | None = None
  ) -> tuple[Float[Array, "batch vocab"], LayerState]:
    """Logits after one more token of every row, and the state with it."""
    x, state = self._step(tokens, state, local_chunks)
    return self.logits(x[:, None])[:, 0], state

  def _step(self, tokens, state, local_chunks):
    mix = lambda mixer, x, state: mixer.step(x, state, local_chunks=local_chunks)
    return self._run(self.embed(tokens[:, None])[:, 0], mix, state)

  def _at_once(self, time: int, local_chunks) -> int:
    """Tokens of a prompt that are whole chunks and, beyond a shard, whole shards."""
    m = self.config.memory
    unit = math.lcm(m.global_chunk or 1, *(m.local_chunks if local_chunks is None else local_chunks))
    if m.shard is not None and time >= m.shard:
      unit = math.lcm(unit, m.shard)
    return time // unit * unit


def of_local_memories(name: str) -> bool:
  """Whether stage 2 trains a parameter, by its dotted name: of a memory layer, but not its global memory's own."""
  parts = name.split(".")
  return "mixer" in parts and "global_memory" not in parts


@functools.cache
def decoder(local_chunks: tuple[int, ...] | None = None) -> Decoder:
  """Of `generate`: prompts in the chunks of the model, new tokens in these (None: the model's, too).

  Raises:
    InputError: prompts of different lengths; their memories would end chunks at different times.
  """

  def prefill(model: MemoryModel, prompts, lengths, *, capacity: int):
    del capacity  # the state has one size
    require(lengths is None, "a memory reads rows of one length; give prompts of one length, and no lengths")
    return model.prefill(prompts)

  def step(model: MemoryModel, token, state):
    logits, state = model.step(token[:, 0], state, local_chunks=local_chunks)
    return logits[:, None], state

  return Decoder(prefill, step)
