"""Mamba-2: a selective state-space network whose recurrence is computed in matrix products (Dao and Gu 2024).

Every head h keeps a state S (head_dim x state) that decays and is written at each token,

  S_t = exp(dt_t A_h) S_{t-1} + dt_t x_t B_t',     y_t = S_t C_t,

with dt_t, x_t, B_t, C_t functions of the token. `ssd` computes all y_t in chunks: products inside a chunk, an
associative scan over chunks. `ssd_step` is one token. `Mamba2` is a language model of such blocks, stacked with a
leading layer axis. Reference: arXiv 2405.21060.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require, require_choice, require_counts, require_divides
from jaxlab.core.recurrence import linear_recurrence
from jaxlab.models.layers import Linear, RMSNorm, lookup, rms_norm, wide

_STEP_SIZES = (1e-3, 0.1)  # range of dt at the start
_DECAYS = (1.0, 16.0)  # range of -A at the start


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
  """Shape of a Mamba-2 language model.

  Attributes:
    state: columns of a head's state, the length of B_t and C_t, which all heads share.
    taps: width of the causal convolution over x, B and C.
    expansion: the recurrence is this many times as wide as the residual stream.
    chunk: tokens that `ssd` treats by one matrix product.
  """

  vocab_size: int
  depth: int
  width: int
  head_dim: int = 64
  state: int = 128
  taps: int = 4
  expansion: int = 2
  chunk: int = 64
  norm_eps: float = 1e-5

  def __post_init__(self):
    counts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "norm_eps"}
    require_counts(**{f"model.{name}": value for name, value in counts.items()})
    require_divides("model.head_dim", self.head_dim, "model.expansion x width", self.inner)

  @property
  def inner(self) -> int:
    """Channels of the recurrence."""
    return self.expansion * self.width

  @property
  def heads(self) -> int:
    return self.inner // self.head_dim

  @property
  def tied_embeddings(self) -> bool:
    return False

  @property
  def matmul_parameters(self) -> int:
    """Parameters that multiply activations once a token: the block matrices and the head."""
    block = self.width * (3 * self.inner + 2 * self.state + self.heads)
    return self.depth * block + self.width * self.vocab_size

  def flops_per_token(self, length: int) -> int:
    """Training FLOPs a token (forward and backward): 6 N plus the products of `ssd` at its chunk size."""
    keys = min(length, self.chunk)
    mixing = 2 * keys * (self.state + self.inner) + 4 * self.inner * self.state
    return 6 * self.matmul_parameters + 3 * self.depth * mixing


def ssd(
  x: Float[Array, "batch time heads head_dim"],
  dt: Float[Array, "batch time heads"],
  a: Float[Array, "heads"],
  b: Float[Array, "batch time state"],
  c: Float[Array, "batch time state"],
  *,
  chunk: int = 64,
  initial: Float[Array, "batch heads head_dim state"] | None = None,
  resets: Bool[Array, "batch time"] | None = None,
) -> tuple[Float[Array, "batch time heads head_dim"], Float[Array, "batch heads head_dim state"]]:
  """(y, S_T) of S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_t', y_t = S_t c_t, in float32 or better.

  Chunks of Q tokens: inside one y = ((C B') o decay) (dt x) with the decay between two tokens of it; its last state
  follows from those of the chunks before by a linear recurrence over T / Q chunks, and is read by C. Work
  O(T (Q + head_dim) state), depth O(log T).

  Args:
    a: negative, one a head.
    chunk: Q; rows that it does not divide are filled up with tokens of dt = 0, which change nothing.
    initial: S_0; None: zeros.
    resets: tokens that begin a document: they read no state of the tokens before.

  Raises:
    InputError: a chunk below 1, no token, or arguments that disagree in their sizes.
  """
  batch, time, heads, _ = x.shape
  require_counts(chunk=chunk)
  sizes = f"x {x.shape}, dt {dt.shape}, a {a.shape}, b {b.shape}, c {c.shape}"
  require(
    dt.shape == (batch, time, heads) and a.shape == (heads,) and b.shape == c.shape and b.shape[:2] == (batch, time),
    f"{sizes} disagree; expected (batch, time, heads, head_dim), (batch, time, heads), (heads,) and twice "
    "(batch, time, state)",
  )
  require(time > 0, f"rows have no token (x {x.shape}); give at least one")
  x, dt, a, b, c = map(wide, (x, dt, a, b, c))
  chunk = min(chunk, time)
  fill = lambda v: jnp.pad(v, [(0, 0), (0, -time % chunk)] + [(0, 0)] * (v.ndim - 2))
  cut = lambda v: fill(v).reshape(batch, -1, chunk, *v.shape[2:])  # (batch, chunks, chunk, ...)
  written, b, c = cut(dt[..., None] * x), cut(b), cut(c)
  log_decay = jnp.moveaxis(cut(dt * a), -1, -2)  # (batch, chunks, heads, chunk)
  since_start = jnp.cumsum(log_decay, axis=-1)
  # Scores of a pair of tokens are shared by the heads, decays are not.
  scores = jnp.einsum("bkin,bkjn->bkij", c, b)[:, :, None] * jnp.exp(segment_sums(log_decay))
  to_end = jnp.exp(since_start[..., -1:] - since_start)
  whole = jnp.exp(since_start[..., -1])  # (batch, chunks, heads)
  from_start = jnp.exp(since_start)
  if resets is not None:  # as masks: decays of zero would be infinite logarithms
    begun = jnp.cumsum(cut(resets), axis=-1)[:, :, None]  # documents begun in the chunk: (batch, chunks, 1, chunk)
    scores = jnp.where(begun[..., None] == begun[..., None, :], scores, 0.0)
    to_end = jnp.where(begun == begun[..., -1:], to_end, 0.0)
    whole = jnp.where(begun[..., -1] == 0, whole, 0.0)
    from_start = jnp.where(begun == 0, from_start, 0.0)
  inside = jnp.einsum("bkhij,bkjhp->bkihp", scores, written)
  added = jnp.einsum("bkhj,bkjhp,bkjn->bkhpn", to_end, written, b)
  first = jnp.zeros_like(added[:, 0]) if initial is None else wide(initial)
  added = added.at[:, 0].add(whole[:, 0, :, None, None] * first)
  ends = linear_recurrence(whole[..., None, None], added, axis=1)
  before = jnp.concatenate([first[:, None], ends[:, :-1]], axis=1)
  read = jnp.einsum("bkin,bkhpn->bkihp", c, before) * jnp.moveaxis(from_start, -1, -2)[..., None]
  return (inside + read).reshape(batch, -1, *x.shape[2:])[:, :time], ends[:, -1]


def segment_sums(values: Float[Array, "*batch n"]) -> Float[Array, "*batch n n"]:
  """s[i, j] = values[j + 1] + ... + values[i], 0 on the diagonal, -inf above it.

  A sum of its own for every j, all in one product: differences of one running sum would lose what small values add to a
  large sum.
  """
  n = values.shape[-1]
  upto = jnp.tril(jnp.ones((n, n), values.dtype))
  after = jnp.where(upto - jnp.eye(n) > 0, values[..., None], 0.0)  # [k, j]: values[k] where k > j
  sums = jnp.einsum("ik,...kj->...ij", upto, after, precision="highest")
  return jnp.where(upto > 0, sums, -jnp.inf)


def ssd_step(
  state: Float[Array, "batch heads head_dim state"],
  x: Float[Array, "batch heads head_dim"],
  dt: Float[Array, "batch heads"],
  a: Float[Array, "heads"],
  b: Float[Array, "batch state"],
  c: Float[Array, "batch state"],
) -> tuple[Float[Array, "batch heads head_dim"], Float[Array, "batch heads head_dim state"]]:
  """(y_t, S_t) from S_{t-1}: one token of `ssd`."""
  x, dt, a, b, c = map(wide, (x, dt, a, b, c))
  written = (dt[..., None] * x)[..., None] * b[:, None, None]
  state = jnp.exp(dt * a)[..., None, None] * state + written
  return jnp.einsum("bhpn,bn->bhp", state, c), state


class Recurrence(nnx.Module):
  """What stands between a block's products: convolution, step sizes, `ssd` and the skip y + D x.

  Its parameters stay in float32, and belong to no matrix: an optimizer for matrices leaves them to another.
  """

  def __init__(self, config: Mamba2Config, key: jax.Array):
    c, keys = config, jax.random.split(key, 3)
    channels, bound = c.inner + 2 * c.state, c.taps**-0.5
    log_range = jnp.log(jnp.array(_STEP_SIZES))
    dt = jnp.exp(jax.random.uniform(keys[1], (c.heads,), minval=log_range[0], maxval=log_range[1]))
    self.config = c
    conv = jax.random.uniform(keys[0], (c.taps, channels), minval=-bound, maxval=bound)
    self.conv = nnx.Param(conv, axes=(None, None))
    self.conv_bias = nnx.Param(jnp.zeros(channels), axes=(None,))
    self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)), axes=(None,))  # softplus^-1(dt)
    a = jax.random.uniform(keys[2], (c.heads,), minval=_DECAYS[0], maxval=_DECAYS[1])
    self.a_log = nnx.Param(jnp.log(a), axes=(None,))
    self.skip = nnx.Param(jnp.ones(c.heads), axes=(None,))

  @property
  def a(self) -> Float[Array, "heads"]:
    return -jnp.exp(self.a_log[...])

  def convolve(
    self, u: Float[Array, "batch time channels"], before=None, resets: Bool[Array, "batch time"] | None = None
  ) -> Float[Array, "batch time channels"]:
    """sum_k w_k u_{t - taps + 1 + k} + bias, channel by channel; `before`: the taps - 1 inputs before, or zeros.

    Past a token of `resets` nothing before it is read.
    """
    taps, time = self.config.taps, u.shape[1]
    before = jnp.zeros_like(u[:, :1]).repeat(taps - 1, axis=1) if before is None else before
    padded = wide(jnp.concatenate([before.astype(u.dtype), u], axis=1))
    read = [padded[:, k : k + time] for k in range(taps)]
    if resets is not None:
      begun = jnp.pad(jnp.cumsum(resets, axis=1), ((0, 0), (taps - 1, 0)))
      same = (begun[:, k : k + time] == begun[:, taps - 1 :] for k in range(taps))
      read = [jnp.where(mask[..., None], part, 0.0) for mask, part in zip(same, read, strict=True)]
    return sum(self.conv[...][k] * part for k, part in enumerate(read)) + self.conv_bias[...]

  def split(self, u: Float[Array, "*batch channels"], dt: Float[Array, "*batch heads"]):
    """(x in heads, dt, B, C) from what the convolution gives and the raw step sizes."""
    c = self.config
    x, b, read = jnp.split(jax.nn.silu(u), [c.inner, c.inner + c.state], axis=-1)
    return x.reshape(*x.shape[:-1], c.heads, c.head_dim), jax.nn.softplus(wide(dt) + self.dt_bias[...]), b, read

  def output(self, y, x) -> Float[Array, "*batch inner"]:
    """y + D x, the heads side by side."""
    y = y + self.skip[...][:, None] * x
    return y.reshape(*y.shape[:-2], -1)

  def __call__(self, u: Float[Array, "batch time channels"], dt: Float[Array, "batch time heads"]):
    """Mixes a row's tokens: (batch, time, inner) from the projections before the convolution."""
    return self.read(u, dt)[0]

  def read(
    self, u, dt, *, lengths: Int[Array, "batch"] | None = None, resets: Bool[Array, "batch time"] | None = None
  ) -> tuple[Float[Array, "batch time inner"], tuple[Array, Array]]:
    """(`__call__`, (S, the convolution's last inputs) after it).

    Args:
      lengths: tokens of every row; what a row has past them changes no state. None: all.
      resets: tokens that begin a document, which read nothing before them.
    """
    c = self.config
    x, dt, b, read = self.split(self.convolve(u, resets=resets), dt)
    if lengths is not None:  # a token of dt = 0 leaves the state as it is
      dt = jnp.where(jnp.arange(u.shape[1])[:, None] < lengths[:, None, None], dt, 0.0)
    y, state = ssd(x, dt, self.a, b, read, chunk=c.chunk, resets=resets)
    end = jnp.full(len(u), u.shape[1]) if lengths is None else lengths
    padded = jnp.pad(u, ((0, 0), (c.taps - 1, 0), (0, 0)))
    last = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, c.taps - 1))(padded, end)
    return self.output(y, x), (state, last)

  def step(
    self, u: Float[Array, "batch 1 channels"], dt: Float[Array, "batch 1 heads"], state: tuple[Array, Array]
  ) -> tuple[Float[Array, "batch 1 inner"], tuple[Array, Array]]:
    """One token of `read`."""
    ssm, conv = state
    parts = self.split(self.convolve(u, conv), dt)
    x, dt, b, c = (a[:, 0] for a in parts)
    y, ssm = ssd_step(ssm, x, dt, self.a, b, c)
    return self.output(y, x)[:, None], (ssm, jnp.concatenate([conv, u.astype(conv.dtype)], axis=1)[:, 1:])


# mix(recurrence, u, dt) -> (batch, time, inner): how a block's tokens meet. `Recurrence.__call__` is the usual one.
MixFn = Callable[[Recurrence, Array, Array], Array]


class Mamba2Block(nnx.Module):
  """x + W_out norm(mix(x, B, C, dt) o silu(z)), all five from one product of norm(x)."""

  def __init__(self, config: Mamba2Config, key: jax.Array):
    c, keys = config, jax.random.split(key, 3)
    bound = math.sqrt(3 / c.width)
    into = (c.width, 2 * c.inner + 2 * c.state + c.heads)
    self.config = c
    self.norm = RMSNorm(c.width, c.norm_eps, True)
    self.inputs = Linear(jax.random.uniform(keys[0], into, minval=-bound, maxval=bound), ("embed", None))
    self.recurrence = Recurrence(c, keys[1])
    self.gated_norm = RMSNorm(c.inner, c.norm_eps, True)
    out = jax.random.normal(keys[2], (c.inner, c.width)) / math.sqrt(c.inner * 2 * c.depth)
    self.out = Linear(out, (None, "embed"))

  def project(self, x: Float[Array, "*batch width"]) -> tuple[Array, Array, Array]:
    """(gate z, channels x, B and C side by side, raw step sizes)."""
    c = self.config
    return tuple(jnp.split(self.inputs(self.norm(x)), [c.inner, 2 * c.inner + 2 * c.state], axis=-1))

  def finish(self, x, mixed, z) -> Float[Array, "*batch width"]:
    """The gate comes before the norm."""
    return x + self.out(self.gated_norm(mixed * jax.nn.silu(wide(z))).astype(z.dtype))

  def __call__(self, x: Float[Array, "batch time width"], mix: MixFn = Recurrence.__call__):
    z, u, dt = self.project(x)
    return self.finish(x, mix(self.recurrence, u, dt), z)


class Mamba2State(NamedTuple):
  """What decoding keeps of the tokens read, by layer: the states S in float32, and the convolution's last inputs."""

  ssm: Float[Array, "layers batch heads head_dim state"]
  conv: Float[Array, "layers batch taps_less_one channels"]


class Mamba2(nnx.Module):
  """`model(tokens: int32[batch, time]) -> float32[batch, time, vocab]`.

  Embeddings are normalised, as in nanochat, so that its optimizer's rates hold here too.
  """

  def __init__(self, config: Mamba2Config, key: jax.Array):
    c, keys = config, jax.random.split(key, 3)
    self.config = c
    self.embedding = nnx.Param(0.8 * jax.random.normal(keys[0], (c.vocab_size, c.width)), axes=("vocab", "embed"))
    self.blocks = jax.vmap(lambda k: Mamba2Block(c, k))(jax.random.split(keys[1], c.depth))
    self.norm = RMSNorm(c.width, c.norm_eps, True)
    self.head = Linear(0.001 * jax.random.normal(keys[2], (c.width, c.vocab_size)), ("embed", "vocab"))

  @property
  def depth(self) -> int:
    return self.config.depth

  @property
  def dtype(self):
    return self.embedding.dtype

  def __call__(self, tokens: Int[Array, "batch time"], *, remat: str = "none") -> Float[Array, "batch time vocab"]:
    return self.logits(*self.hidden(tokens, remat=remat))

  def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time width"]:
    return rms_norm(meshes.to_rows(lookup(self.embedding[...], tokens)), self.config.norm_eps)

  def hidden(self, tokens, *, remat: str = "none", unroll: bool = False) -> tuple[Array, None]:
    """(final state, None): what `logits` reads, in the form that a Transformer has."""
    return run_blocks(self, self.embed(tokens), remat=remat, unroll=unroll)[0], None

  def trace(self, tokens, *, remat: str = "none") -> tuple[Array, Array, None]:
    """(start state h_0, outputs h_1..h_L stacked (L, ...), None): the forward with every layer's output."""
    x = self.embed(tokens)
    return x, run_blocks(self, x, remat=remat)[1], None

  def logits(self, x: Float[Array, "batch time width"], _=None) -> Float[Array, "batch time vocab"]:
    return wide(self.head(meshes.to_batch(self.norm(x))))

  def empty_state(self, batch: int) -> Mamba2State:
    """The state before the first token."""
    c = self.config
    ssm = jnp.zeros((c.depth, batch, c.heads, c.head_dim, c.state))
    return Mamba2State(ssm, jnp.zeros((c.depth, batch, c.taps - 1, c.inner + 2 * c.state), self.dtype))

  def step(self, tokens: Int[Array, "batch"], state: Mamba2State) -> tuple[Float[Array, "batch vocab"], Mamba2State]:
    """Logits after one more token of every row, and the state with it."""

    def one(x, parts):
      block, *state = parts
      z, u, dt = block.project(x)
      mixed, state = block.recurrence.step(u, dt, tuple(state))
      return block.finish(x, mixed, z), state

    x, (ssm, conv) = jax.lax.scan(one, self.embed(tokens[:, None]), (self.blocks, *state))
    return self.logits(x)[:, 0], Mamba2State(ssm, conv)


def run_blocks(
  model: Mamba2,
  x: Float[Array, "batch time width"],
  *,
  mix: MixFn = Recurrence.__call__,
  rewrite: Callable[[Array, Array], Array] | None = None,
  remat: str = "none",
  unroll: bool = False,
) -> tuple[Float[Array, "batch time width"], Float[Array, "layers batch time width"]]:
  """(output, every layer's output): the blocks one after the other.

  Args:
    rewrite: (layer, its output) -> what is passed on in its place.
    remat: what the backward pass recomputes: "none", "dots" (all but products with weights) or "full".
  """

  def one(x, parts):
    layer, block = parts
    x = meshes.constrain(meshes.gathered(block)(x, mix), "rows", "sequence")
    x = x if rewrite is None else rewrite(layer, x)
    return x, x

  layers = (jnp.arange(model.depth), model.blocks)
  return jax.lax.scan(recomputed(one, remat), x, layers, unroll=model.depth if unroll else 1)


def recomputed(layer: Callable, remat: str) -> Callable:
  """A scan's layer whose backward pass recomputes nothing ("none"), all but products with weights ("dots") or all."""
  require_choice("remat", remat, ("none", "dots", "full"))
  if remat == "none":
    return layer
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
  return jax.checkpoint(layer, policy=policy, prevent_cse=False)
