"""The parts of a block: linear maps, norms, rotary positions, MLPs, experts, hyper-connections."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.attention import attend_cached
from jaxlab.models.config import HyperConnections, RopeScaling, TransformerConfig


@jax.custom_jvp
def lookup(table: Float[Array, "rows width"], ids: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
  """table[ids], NaN where there is no such row; gradients are summed in float32 or better.

  In bfloat16 an id that comes up 1,000 times with a gradient of 1 gets 256 in all, and a GPU takes hundreds of times as
  long where many ids are the same.
  """
  return jnp.take(table, ids, axis=0)


@lookup.defjvp
def _lookup_jvp(primals, tangents):
  (table, ids), (change, _) = primals, tangents
  return lookup(table, ids), jnp.take(wide(change), ids, axis=0).astype(change.dtype)


class Linear(nnx.Module):
  """y = x W, no bias. Weight methods put another module with the same call in its place.

  W: (inputs, outputs), with leading axes where maps are stacked; those are taken apart (scan, vmap) before the call.
  """

  def __init__(self, weight: Float[Array, "*stack inputs outputs"], axes: tuple[str | tuple[str, int] | None, ...]):
    self.weight = nnx.Param(weight, axes=axes)

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    return x @ self.weight[...].astype(x.dtype)


class TransposedLinear(nnx.Module):
  """y = x W^T, W: (*stack, outputs, inputs): the layout in which one token's product reads memory in a row."""

  def __init__(self, linear: Linear):
    self.weight = nnx.Param(jnp.swapaxes(linear.weight[...], -1, -2), axes=linear.weight.axes[::-1])

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    return jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype))


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps), times a gain if the model has gains; reduced in float32."""

  def __init__(self, size: int, eps: float, gain: bool):
    self.eps = eps
    self.gain = nnx.Param(jnp.ones((size,)), axes=(None,)) if gain else None

  def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
    y = rms_norm(x, self.eps)
    return y if self.gain is None else (y * self.gain[...]).astype(x.dtype)


def rms_norm(x: Float[Array, "*batch size"], eps: float) -> Float[Array, "*batch size"]:
  """x / sqrt(mean(x^2) + eps) over the last axis, in float32 or better, in the dtype of x."""
  y = wide(x)
  return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """x in float32, or as it is where it has more bits."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cast(model, dtype):
  """A copy for computing: matrices and tables in `dtype`; vectors, mixing, recurrences, chunking and deep memories as
  they are."""
  kept = ("_mixing", "recurrence", "chunker", "global_memory", "local_memories")

  def one(path, leaf):
    fine = leaf.ndim < 2 or any(part in jax.tree_util.keystr(path) for part in kept)
    return leaf if fine or not jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, model)


def rope_table(config: TransformerConfig, positions: Int[Array, "*batch time"], dtype) -> tuple[Array, Array]:
  """cos and sin of the rotary angles, (*batch, time, head_dim / 2) each; in float32, in float64 for float64."""
  frequency = rope_frequencies(config, jnp.promote_types(dtype, jnp.float32))
  angle = positions.astype(frequency.dtype)[..., None] * frequency
  return jnp.cos(angle).astype(dtype), (config.rope_direction * jnp.sin(angle)).astype(dtype)


def rope_frequencies(config: TransformerConfig, dtype=jnp.float32) -> Float[Array, "half"]:
  """Radians a position of each pair of channels, (head_dim / 2,): theta^(-2 i / head_dim), scaled."""
  half = config.head_dim // 2
  frequency = config.rope_theta ** (-jnp.arange(half, dtype=dtype) / half) / config.rope_factor
  return _llama3_scaling(frequency, config.rope_scaling) if config.rope_scaling else frequency


def _llama3_scaling(frequency, s: RopeScaling):
  wavelength = 2 * math.pi / frequency
  ramp = (s.original_context / wavelength - s.low_frequency) / (s.high_frequency - s.low_frequency)
  ramp = jnp.clip(ramp, 0, 1)
  return frequency * ((1 - ramp) / s.factor + ramp)


def apply_rope(x: Float[Array, "*batch time heads head_dim"], cos, sin) -> Float[Array, "*batch time heads head_dim"]:
  """Rotates (x1, x2), the two halves of head_dim, by the table's angles."""
  x1, x2 = jnp.split(x, 2, axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def turn(x, cos, sin, normalise: Callable | None, *, norm: str | None, scale: float):
  """Heads (*batch, time, heads, head_dim) rotated, normalised "before_rope" or "after_rope" or not (None), scaled."""
  x = normalise(x) if norm == "before_rope" else x
  x = apply_rope(x, cos, sin)
  x = normalise(x) if norm == "after_rope" else x
  return x * scale


def rotary_qkv(heads, cos, sin, value=None, gate=None, *, q_heads, kv_heads, norm, gain, eps, scale):
  """Queries, keys and values of one product: q and k rotated, normalised and scaled, v plus its gated value embedding.

  Args:
    heads: (*batch, time, q_heads + 2 kv_heads, head_dim), queries before keys before values.
    cos, sin: (time, head_dim / 2), or (*batch, time, head_dim / 2) where rows are at positions of their own.
    value, gate: (*batch, time, kv_heads, head_dim) and (*batch, time, kv_heads), or None.
    norm: RMS norm over head_dim "before_rope" or "after_rope", or None.
    gain: (q_heads + kv_heads, head_dim) of that norm, or None.
    scale: factor on q and k.

  Returns:
    (q, k, v), each (*batch, time, its heads, head_dim).
  """
  turned, v = jnp.split(heads, [q_heads + kv_heads], axis=-2)
  if value is not None:
    v = v + gate[..., None] * value.astype(v.dtype)

  def normalise(y):
    y = rms_norm(y, eps)
    return y if gain is None else (y * gain).astype(y.dtype)

  q, k = jnp.split(turn(turned, cos, sin, normalise, norm=norm, scale=scale), [q_heads], axis=-2)
  return q, k, v


def residual_norm(x, x0, scale, x0_scale, gain, *, eps: float):
  """(r, RMS norm of r times the gain) of r = scale x + x0_scale x0, both in the dtype of x.

  Args:
    x, x0: (*batch, width); scale, x0_scale: scalars; gain: (width,) or None.
  """
  x = (scale * x + x0_scale * x0).astype(x.dtype)
  y = rms_norm(x, eps)
  return x, y if gain is None else (y * gain).astype(x.dtype)


class Steps(NamedTuple):
  """What a block does between its products, as functions that a faster kernel can replace.

  `whole` is one token through whole blocks side by side (`kernels.decode_block`), or None where no kernel does that.
  """

  rotary_qkv: Callable = rotary_qkv
  residual_norm: Callable = residual_norm
  attend_cached: Callable = attend_cached
  whole: Callable | None = None


class MLP(nnx.Module):
  """SwiGLU: down(silu(gate x) * up x), or squared ReLU: down(relu(up x)^2)."""

  def __init__(self, config: TransformerConfig, key: jax.Array):
    d, f = config.width, config.mlp_width
    k1, k2, k3 = jax.random.split(key, 3)
    swiglu = config.mlp == "swiglu"
    bound = math.sqrt(3 / d) * (1.0 if swiglu else 0.4)
    uniform = lambda k: jax.random.uniform(k, (d, f), minval=-bound, maxval=bound)
    self.gate = Linear(uniform(k1), ("embed", "mlp")) if swiglu else None
    self.up = Linear(uniform(k2), ("embed", "mlp"))
    self.gate_up = nnx.data(None)  # `block.for_inference` puts gate and up side by side here
    down = jax.random.normal(k3, (f, d)) / math.sqrt(f * 2 * config.depth) if swiglu else jnp.zeros((f, d))
    self.down = Linear(down, ("mlp", "embed"))

  def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    if self.gate_up is not None:
      gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
      return self.down(jax.nn.silu(gate) * up)
    if self.gate is None:
      return self.down(jnp.square(jax.nn.relu(self.up(x))))
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Routing(NamedTuple):
  """Which token goes where, its assignments grouped by expert.

  token, weight: (tokens * active,), the row of the token and what its expert's output is multiplied by; sizes:
  int32 (experts,), assignments of each.
  """

  token: Int[Array, "slots"]
  weight: Float[Array, "slots"]
  sizes: Int[Array, "experts"]


def route(logits: Float[Array, "tokens experts"], *, active: int, normalize: bool) -> Routing:
  """The `active` experts of largest softmax of each token, in float32."""
  probability = jax.nn.softmax(wide(logits), axis=-1)
  weight, expert = jax.lax.top_k(probability, active)  # (tokens, active)
  if normalize:
    weight = weight / weight.sum(axis=-1, keepdims=True)
  order = jnp.argsort(expert.reshape(-1))  # assignments grouped by expert
  sizes = jnp.bincount(expert.reshape(-1), length=logits.shape[-1]).astype(jnp.int32)
  return Routing(order // active, jnp.take(weight.reshape(-1), order), sizes)


def mixed(tokens: Float[Array, "tokens width"], out: Float[Array, "slots width"], routing: Routing):
  """The sum of every token's expert outputs by their weights, like `tokens`."""
  out = out * routing.weight[:, None].astype(tokens.dtype)
  return jnp.zeros_like(tokens).at[routing.token].add(out)


class MoE(nnx.Module):
  """Top-k mixture of SwiGLU experts: softmax router in float32, tokens sorted by expert, ragged matrix products."""

  def __init__(self, config: TransformerConfig, key: jax.Array):
    e, d, f = config.experts.count, config.width, config.experts.width
    k1, k2, k3, k4 = jax.random.split(key, 4)
    bound = math.sqrt(3 / d)
    uniform = lambda k, shape: jax.random.uniform(k, shape, minval=-bound, maxval=bound)
    self.active, self.normalize = config.experts.active, config.experts.normalize
    self.router = Linear(uniform(k1, (d, e)), ("embed", None))
    self.gate = nnx.Param(uniform(k2, (e, d, f)), axes=("expert", "embed", None))
    self.up = nnx.Param(uniform(k3, (e, d, f)), axes=("expert", "embed", None))
    down = jax.random.normal(k4, (e, f, d)) / math.sqrt(f * 2 * config.depth)
    self.down = nnx.Param(down, axes=("expert", None, "embed"))

  def route(self, tokens: Float[Array, "tokens width"]) -> Routing:
    return route(self.router(tokens), active=self.active, normalize=self.normalize)

  def hidden(self, tokens: Float[Array, "tokens width"], routing: Routing) -> Float[Array, "slots hidden"]:
    """silu(gate x) * up x of every assignment."""
    rows = jnp.take(tokens, routing.token, axis=0)
    matmul = lambda w: jax.lax.ragged_dot(rows, w[...].astype(rows.dtype), routing.sizes)
    return jax.nn.silu(matmul(self.gate)) * matmul(self.up)

  def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    tokens = x.reshape(-1, x.shape[-1])
    routing = self.route(tokens)
    out = jax.lax.ragged_dot(self.hidden(tokens, routing), self.down[...].astype(x.dtype), routing.sizes)
    return mixed(tokens, out, routing).reshape(x.shape)


class StreamMaps(NamedTuple):
  """How a sublayer with hyper-connections meets the s streams: Hpre reads, Hpost writes, Hres mixes them.

  read, write: (..., s); residual: (..., s, s), doubly stochastic. Leading axes: layers, sublayers or tokens.
  """

  read: Array
  write: Array
  residual: Array


class Mixing(nnx.Module):
  """The logits of one sublayer's hyper-connection.

  Static ones start reading mostly from stream (2 layer + sublayer) mod s, dynamic ones from the mean of the streams.
  """

  def __init__(self, config: TransformerConfig, position: Int[Array, ""]):
    h: HyperConnections = config.hyper
    s = h.streams
    self.hyper, self.eps = h, config.norm_eps
    if h.dynamic:
      self.projection = nnx.Param(jnp.zeros((s * config.width, s * (s + 2))), axes=(None, None))
      self.scale = nnx.Param(jnp.full((3,), 0.01), axes=(None,))
      self.residual = nnx.Param(8.0 * jnp.eye(s), axes=(None, None))
      self.pre = nnx.Param(jnp.full((s,), -math.log(s - 1.0) if s > 1 else 0.0), axes=(None,))
      self.post = nnx.Param(jnp.zeros((s,)), axes=(None,))
    else:
      self.residual = nnx.Param(jnp.where(jnp.eye(s, dtype=bool), 0.0, -0.5), axes=(None, None))
      self.pre = nnx.Param(jnp.where(jnp.arange(s) == position % s, 0.0, -1.0), axes=(None,))
      self.post = nnx.Param(jnp.zeros((s,)), axes=(None,))

  def matrices(self) -> StreamMaps:
    """Of a static hyper-connection: the same for every token."""
    residual = sinkhorn(self.residual[...] / self.hyper.temperature, self.hyper.rounds)
    return StreamMaps(jax.nn.softmax(self.pre[...]), jax.nn.softmax(self.post[...]), residual)

  def dynamic_matrices(self, x: Float[Array, "batch time s width"]) -> StreamMaps:
    """Token by token: (Hpre, Hpost, Hres) = (sigma, 2 sigma, Sinkhorn)(alpha x' phi + b)."""
    s = self.hyper.streams
    flat = wide(rms_norm(x.reshape(*x.shape[:-2], -1), self.eps))
    pre, post, residual = jnp.split(flat @ self.projection[...].astype(flat.dtype), [s, 2 * s], axis=-1)
    scale = self.scale[...]
    residual = (scale[2] * residual).reshape(*residual.shape[:-1], s, s) + self.residual[...]
    pre = jax.nn.sigmoid(scale[0] * pre + self.pre[...])
    post = 2 * jax.nn.sigmoid(scale[1] * post + self.post[...])
    return StreamMaps(pre, post, sinkhorn(residual, self.hyper.rounds))


def sinkhorn(logits: Float[Array, "*batch s s"], rounds: int) -> Float[Array, "*batch s s"]:
  """exp(logits) scaled to doubly stochastic in log space; ends on columns, so those sum to 1 exactly."""
  z = wide(logits)

  def one_round(z, _):
    z = z - jax.nn.logsumexp(z, axis=-1, keepdims=True)
    return z - jax.nn.logsumexp(z, axis=-2, keepdims=True), None

  return jnp.exp(jax.lax.scan(one_round, z, length=rounds)[0])
