"""The layers of an H-Net's stages: Mamba-2 or attention, with or without a SwiGLU, in stacks that end with a norm.

The residual stream is in float32; products are in the dtype that comes in.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core import mesh as meshes
from jaxlab.models.attention import AttentionFn, dot_product_attention, write_tokens
from jaxlab.models.config import TransformerConfig
from jaxlab.models.hnet_config import HNetConfig, Runs
from jaxlab.models.layers import MLP, Linear, RMSNorm, apply_rope, rope_table, wide
from jaxlab.models.mamba2 import Mamba2Block, recomputed

SPREAD = 0.02  # of initial weights


class Side(NamedTuple):
  """What a stage's layers read besides their state.

  dtype: of products; lengths: positions of every row, or those read before a step; starts: where documents begin;
  active: rows that a step is for; keep: memories are wanted.
  """

  dtype: Any
  cos: Array
  sin: Array
  attention: AttentionFn
  lengths: Array | None
  starts: Array | None = None
  active: Array | None = None
  keep: bool = False


class AttentionBlock(nnx.Module):
  """x + W_o attention(norm x): half of every head's channels are rotated.

  Gated: x + W_o (attention(norm x) o sigmoid(W_g norm x)).
  """

  def __init__(self, shape: TransformerConfig, key: jax.Array, *, gated: bool = False):
    d, keys = shape.width, jax.random.split(key, 3 if gated else 2)
    heads = ("heads", shape.head_dim)
    self.config = shape
    self.norm = RMSNorm(d, shape.norm_eps, True)
    self.inputs = Linear(SPREAD * jax.random.normal(keys[0], (d, 3 * d)), ("embed", heads))
    self.out = Linear(SPREAD * jax.random.normal(keys[1], (d, d)), (heads, "embed"))
    self.gate = Linear(SPREAD * jax.random.normal(keys[2], (d, d)), ("embed", heads)) if gated else None

  def project(self, x, side: Side):
    """(q, k, v), each (batch, time, heads, head_dim)."""
    heads = self.inputs(self.norm(x.astype(side.dtype)))
    q, k, v = jnp.split(heads.reshape(*heads.shape[:-1], -1, self.config.head_dim), 3, axis=-2)
    return apply_rope(q, side.cos, side.sin), apply_rope(k, side.cos, side.sin), v

  def attend(self, side: Side, q, k, v, start):
    return side.attention(q, k, v, window=self.config.windows[0], start=start)

  def finish(self, x, attended):
    attended = attended.reshape(*attended.shape[:-2], -1)
    if self.gate is not None:
      attended = attended * jax.nn.sigmoid(self.gate(self.norm(x.astype(attended.dtype))))
    return x + self.out(attended)


class Layer(nnx.Module):
  """A Mamba-2 or an attention layer, with or without a SwiGLU behind it."""

  def __init__(self, config: HNetConfig, stage: int, kind: str, key: jax.Array):
    mixing, feeding = jax.random.split(key)
    shape, feeds = config.transformer(stage), kind.isupper()
    attends = lambda: AttentionBlock(shape, mixing, gated=config.gated)
    self.mixer = Mamba2Block(config.mamba(stage), mixing) if kind in "mM" else attends()
    self.mlp_norm = RMSNorm(shape.width, shape.norm_eps, True) if feeds else None
    self.mlp = MLP(shape, feeding) if feeds else None

  def __call__(self, x: Float[Array, "batch time width"], side: Side):
    """(output, what a step needs of the past: a Mamba-2's state, or keys and values; None where it is not kept)."""
    if isinstance(self.mixer, Mamba2Block):
      z, u, dt = self.mixer.project(x.astype(side.dtype))
      mixed, memory = self.mixer.recurrence.read(u, dt, lengths=side.lengths, resets=side.starts)
      x = self.mixer.finish(x, mixed, z)
    else:
      q, *memory = self.mixer.project(x, side)
      x = self.mixer.finish(x, self.mixer.attend(side, q, *memory, 0))
    return self.feed(x, side), tuple(memory) if side.keep else None

  def step(self, x: Float[Array, "batch 1 width"], memory, side: Side):
    """One position of `__call__` behind those of `memory`; rows that are not active keep theirs."""
    if isinstance(self.mixer, Mamba2Block):
      z, u, dt = self.mixer.project(x.astype(side.dtype))
      mixed, new = self.mixer.recurrence.step(u, dt, memory)
      x, memory = self.mixer.finish(x, mixed, z), of_rows(side.active, new, memory)
    else:
      # A row that is not active writes behind what it has read, where nothing looks before it is written again.
      q, *new = self.mixer.project(x, side)
      write = lambda store, a: write_tokens(store[None], a[None], 0, side.lengths)[0]
      memory = tuple(map(write, memory, new))
      x = self.mixer.finish(x, self.mixer.attend(side, q, *memory, side.lengths))
    return self.feed(x, side), memory

  def feed(self, x, side: Side):
    """The SwiGLU's branch, if there is one."""
    return x if self.mlp is None else x + self.mlp(self.mlp_norm(x.astype(side.dtype)))


class Stack(nnx.Module):
  """Runs of equal layers, each with a leading layer axis, and the norm behind them that balances the stages."""

  def __init__(self, config: HNetConfig, stage: int, runs: Runs, key: jax.Array):
    keys = jax.random.split(key, len(runs))
    stacked = lambda kind, count, key: jax.vmap(lambda k: Layer(config, stage, kind, k))(jax.random.split(key, count))
    self.runs = nnx.List([stacked(kind, count, k) for (kind, count), k in zip(runs, keys, strict=True)])
    self.norm = RMSNorm(config.widths[stage], config.norm_eps, True)

  def __call__(self, x, side: Side, *, remat: str = "none", unroll: int = 1):
    """(output, memories of every run)."""
    layer = recomputed(lambda x, layer: meshes.gathered(layer)(x, side), remat)
    x, memories = wide(x), []
    for run in self.runs:
      x, memory = jax.lax.scan(layer, x, run, unroll=unroll)
      memories.append(memory)
    return self.norm(x).astype(side.dtype), tuple(memories)

  def step(self, x, memories, side: Side):
    x, after = wide(x), []
    for run, memory in zip(self.runs, memories, strict=True):
      x, memory = jax.lax.scan(lambda x, parts: parts[0].step(x, parts[1], side), x, (run, memory))
      after.append(memory)
    return self.norm(x).astype(side.dtype), tuple(after)

  def empty(self, config: HNetConfig, stage: int, batch: int, capacity: int, dtype) -> tuple:
    """The memories before the first position."""
    turned = rotations(config, stage, jnp.zeros(1, jnp.int32), dtype)
    side = Side(dtype, *turned, dot_product_attention, None, keep=True)
    x = jax.ShapeDtypeStruct((batch, 1, config.widths[stage]), dtype)
    memories = jax.eval_shape(lambda stack, x: stack(x, side)[1], self, x)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), with_room(self, memories, capacity))


def with_room(stack: Stack, memories, capacity: int):
  """Memories with room for `capacity` positions where they are keys and values; shapes, or arrays padded with zeros."""

  def grown(a):
    if isinstance(a, jax.ShapeDtypeStruct):
      return a.update(shape=(*a.shape[:2], capacity, *a.shape[3:]))
    return jnp.pad(a, ((0, 0), (0, 0), (0, capacity - a.shape[2]), (0, 0), (0, 0)))

  attends = [isinstance(run.mixer, AttentionBlock) for run in stack.runs]
  return tuple(jax.tree.map(grown, m) if is_cache else m for is_cache, m in zip(attends, memories, strict=True))


def of_rows(rows: Bool[Array, "batch"], new, old):
  """`new` in these rows, `old` in the others."""
  choose = lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a.astype(b.dtype), b)
  return jax.tree.map(choose, new, old)


def rotations(config: HNetConfig, stage: int, positions: Int[Array, "*batch time"], dtype) -> tuple[Array, Array]:
  """(cos, sin) for `apply_rope`: the first half of the pairs turn, the others stay."""
  shape = config.transformer(stage)
  if shape.head_dim % 4:  # of a stage without attention
    return jnp.ones(()), jnp.zeros(())
  half = dataclasses.replace(shape, head_dim=shape.head_dim // 2)
  cos, sin = rope_table(half, positions, dtype)
  return jnp.concatenate([cos, jnp.ones_like(cos)], axis=-1), jnp.concatenate([sin, jnp.zeros_like(sin)], axis=-1)
