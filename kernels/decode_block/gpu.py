"""The kernels by Pallas' Triton lowering: five a block, each a product with all that stands before and after it.

Norm, queries, keys and values; attention over stretches of the cache, the new token rotated; the stretches combined,
output product, residual sum; norm, the MLP's first product, activation; its second, residual sum. What is small, a norm
or the combination of stretches, every program works out for itself instead of waiting for a kernel that does it once.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_KEYS = 64  # of a block of the cache, at most
_STRETCHES = 8  # of a head, at most: every program of the next kernel combines them all
_QUERIES = 16  # rows of the smallest matrix product: queries that share a key head are padded to it
_ROWS = 4  # of a weight matrix a program takes
_WARPS = 8
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite, so that the difference of two is no NaN


class Weights(NamedTuple):
  """Of n units, stacked: gains (n, ...) or None, products (n, outputs, inputs), SwiGLU's gate and up in one."""

  norm: jax.Array | None
  qkv: jax.Array
  qk_norm: jax.Array | None
  o: jax.Array
  mlp_norm: jax.Array | None
  up: jax.Array
  down: jax.Array


class Shape(NamedTuple):
  """What is compiled into the kernels; `chunk` layers of the cache make a unit."""

  units: int
  chunk: int
  width: int
  q_heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  capacity: int
  eps: float
  qk_norm: str | None
  qk_scale: float

  @property
  def block(self) -> int:
    return min(_KEYS, 1 << (self.capacity.bit_length() - 1))

  @property
  def stretches(self) -> int:
    return min(pl.next_power_of_2(-(-self.capacity // self.block)), _STRETCHES)


def supports(config, dtype) -> bool:
  """Plain pre-norm blocks of attention and a dense MLP on a residual stream."""
  power = lambda size: size & (size - 1) == 0
  plain = not (config.residual_lambdas or config.value_embeddings or config.hyper or config.experts)
  sizes = power(config.head_dim) and config.head_dim >= 32 and config.width % _ROWS == config.mlp_width % _ROWS == 0
  grouped = config.q_heads // config.kv_heads <= _QUERIES
  return plain and not config.parallel_sublayers and sizes and grouped and jnp.dtype(dtype).itemsize <= 4


def decode_block(weights: Weights, x, keys, values, *, cos, sin, windows, start, shape: Shape, interpret=False):
  """As `jaxlab.kernels.decode_block.decode_block`, on what it takes out of the blocks.

  Args:
    x: (units, width); keys, values: (units * chunk, capacity, kv_heads, head_dim) of a layer's heads.
    windows: int32 of those layers; start: int32[1].
  """
  s, n, dtype = shape, shape.units, x.dtype
  heads = s.q_heads + 2 * s.kv_heads
  given = {name: a for name, a in weights._asdict().items() if a is not None}

  def call(body, name, tasks, outputs, aliases=(), **more):
    """A kernel over tasks of every unit that is given the weights `name` and `more`; the `aliases` are overwritten."""
    operands = {key: given[key] for key in name if key in given} | more
    names = tuple(operands)
    return pl.pallas_call(
      functools.partial(_by_name, body, names, tuple(outputs), s),
      grid=(n, tasks),
      out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs.values()],
      input_output_aliases={names.index(key): tuple(outputs).index(key) for key in aliases},
      compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
      interpret=interpret,
      name=f"decode_block_{body.__name__.strip('_')}",
    )(*operands.values())

  like = lambda *tail: jax.ShapeDtypeStruct((n, *tail), jnp.float32)
  inputs = s.q_heads * s.head_dim
  flat = heads * s.head_dim
  (projected,) = call(_project, ("norm", "qkv"), flat // _ROWS, {"out": jax.ShapeDtypeStruct((n, flat), dtype)}, x=x)
  stored = {"keys": keys, "values": values}
  sums, weights_of, keys, values = call(
    _attend, ("qk_norm",), s.kv_heads * s.stretches,
    {"sums": like(s.stretches, inputs), "weights": like(s.stretches, s.q_heads)} | stored, aliases=tuple(stored),
    heads=projected, cos=cos.reshape(1, -1), sin=sin.reshape(1, -1), windows=windows, start=start, **stored,
  )  # fmt: skip
  out = {"out": jax.ShapeDtypeStruct(x.shape, dtype)}
  (x,) = call(_join, ("o",), s.width // _ROWS, out, sums=sums, weights=weights_of, x=x)
  hidden = {"out": jax.ShapeDtypeStruct((n, s.mlp_width), dtype)}
  (hidden,) = call(_up, ("mlp_norm", "up"), s.mlp_width // _ROWS, hidden, x=x)
  (x,) = call(_down, ("down",), s.width // _ROWS, out, hidden=hidden, x=x)
  return x, keys, values


def _by_name(body, names, outputs, shape, *refs):
  """A kernel on its operands by name; what is overwritten is both operand and output, of which the output counts."""
  body(dict(zip(names, refs, strict=False)) | dict(zip(outputs, refs[len(names) :], strict=True)), shape)


def _mine():
  """(unit, rows of a matrix) of this program."""
  return pl.program_id(0), pl.program_id(1) * _ROWS + jnp.arange(_ROWS)


def _read(ref, *index, size: int):
  """The `size` entries of the last axis at `index`, zeros after them up to a power of two."""
  padded = pl.next_power_of_2(size)
  last = jnp.arange(padded)
  inside = last < size
  if any(jnp.ndim(i) for i in index):
    last = last[None]
    inside = inside[None] & (index[-1] >= 0)
  full = padded == size
  return triton.load(ref.at[(*index, last)], mask=None if full else inside, other=None if full else 0)


def _wide(a):
  return a.astype(jnp.float32)


def _times(matrix, vector):
  """Rows of a matrix (rows, inputs) times a vector in float32.

  The rows are to be read before the vector is worked out: a program is over sooner if memory works meanwhile.
  """
  return jnp.sum(_wide(matrix) * vector[None], axis=1)


def _normed(refs, gain: str, size: int, eps: float):
  """The RMS norm of the state, rounded as the state is."""
  unit = pl.program_id(0)
  x = _wide(_read(refs["x"], unit, size=size))
  gains = _read(refs[gain], unit, size=size) if gain in refs else None
  rounded = lambda a: _wide(a.astype(refs["x"].dtype))
  x = rounded(x * jax.lax.rsqrt(jnp.sum(x * x) / size + eps))
  return x if gains is None else rounded(x * _wide(gains))


def _project(refs, s: Shape):
  """Queries, keys and values before their rotation."""
  unit, rows = _mine()
  matrix = _read(refs["qkv"], unit, rows[:, None], size=s.width)
  y = _times(matrix, _normed(refs, "norm", s.width, s.eps))
  refs["out"][unit, rows] = y.astype(refs["out"].dtype)


def _turned(refs, s: Shape, unit, heads):
  """The two halves of some heads (n, 1), rotated, normalised and scaled as `layers.rotary_qkv` does it: (n, half)."""
  half = s.head_dim // 2
  channel = jnp.arange(half)[None]

  def read(name, unit, heads, first, count):
    at = heads * s.head_dim + first + channel
    inside = (heads < count) & (channel >= 0)
    return triton.load(refs[name].at[unit, at], mask=inside, other=0.0).astype(jnp.float32)

  x1, x2 = (read("heads", unit, heads, first, s.q_heads + 2 * s.kv_heads) for first in (0, half))
  cos, sin = (refs[name][...].astype(jnp.float32) for name in ("cos", "sin"))
  factor = s.qk_scale
  if s.qk_norm:
    # A rotation keeps the length, so that the norm may be taken before it either way; only the gain has its place.
    square = jnp.sum(x1 * x1, axis=1) + jnp.sum(x2 * x2, axis=1)
    factor *= jax.lax.rsqrt(square / s.head_dim + s.eps)[:, None]
  x1, x2 = x1 * factor, x2 * factor

  def gained(pair, place):
    if s.qk_norm != place or "qk_norm" not in refs:
      return pair
    gains = [read("qk_norm", unit, heads, first, s.q_heads + s.kv_heads) for first in (0, half)]
    return [a * gain for a, gain in zip(pair, gains, strict=True)]

  x1, x2 = gained((x1, x2), "before_rope")
  turned = gained((x1 * cos - x2 * sin, x2 * cos + x1 * sin), "after_rope")
  return [a.astype(refs["heads"].dtype) for a in turned]


def _attend(refs, s: Shape):
  """Softmax over one stretch of a head's cache, the new key and value with the first: its average and its weight."""
  group, half, block = s.q_heads // s.kv_heads, s.head_dim // 2, s.block
  dtype = refs["keys"].dtype
  precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
  dot = functools.partial(triton.dot, precision=precision)
  unit, head, stretch = pl.program_id(0), pl.program_id(1) // s.stretches, pl.program_id(1) % s.stretches
  # A unit of several layers has their heads side by side, the cache has the layers apart.
  own = s.kv_heads // s.chunk
  row, kv = unit * s.chunk + head // own, head % own
  length = refs["start"][0]
  low = jnp.maximum(length - refs["windows"][row], 0)
  blocks = (length - low + block - 1) // block
  per = (blocks + s.stretches - 1) // s.stretches
  begin, mine = low + stretch * per * block, stretch == 0
  # The last block of a cache is read from where it fits; what it shares with the block before it is masked.
  place = lambda i: jnp.clip(begin + i * block, 0, s.capacity - block)

  def read(i):
    part = lambda name, first, n: refs[name][row, pl.ds(place(i), block), kv, first : first + n]
    return part("keys", 0, half), part("keys", half, half), part("values", 0, s.head_dim)

  tiles = read(0)
  queries = head * group + jnp.arange(_QUERIES)
  query = _turned(refs, s, unit, queries[:, None])
  new_key = _turned(refs, s, unit, jnp.broadcast_to(s.q_heads + head, (1, 1)))
  flat = (s.q_heads + s.kv_heads + head) * s.head_dim + jnp.arange(s.head_dim)
  new_value = refs["heads"][unit, flat]

  def one(i, carry):
    o, m, l, tiles = carry  # noqa: E741 (the field's name)
    position = place(i) + jnp.arange(block)
    see = (position >= begin + i * block) & (position < length)
    # A cache may hold anything past its length, also what is not a number.
    value = jnp.where(see[:, None], tiles[2], jnp.zeros((), dtype))
    score = [dot(q.astype(dtype), k, trans_b=True) for q, k in zip(query, tiles[:2], strict=True)]
    score = jnp.where(see[None], (score[0] + score[1]) / math.sqrt(s.head_dim), _LOWEST)
    top = jnp.maximum(m, jnp.max(score, axis=1))
    weight = jnp.where(see[None], jnp.exp(score - top[:, None]), 0.0)
    fade = jnp.exp(m - top)
    o = fade[:, None] * o + dot(weight.astype(dtype), value)
    return o, top, fade * l + jnp.sum(weight, axis=1), read(i + 1)

  score = [jnp.sum(_wide(q) * _wide(k), axis=1) for q, k in zip(query, new_key, strict=True)]
  score = (score[0] + score[1]) / math.sqrt(s.head_dim)
  # The first stretch begins with the new token, the others with nothing.
  first = jnp.where(mine, score, _LOWEST)
  counted = jnp.exp(jnp.minimum(first, score) - score)
  steps = jnp.clip((length - begin + block - 1) // block, 0, per)
  sums = counted[:, None] * _wide(new_value)[None], first, counted, tiles
  o, m, l, _ = jax.lax.fori_loop(0, steps, one, sums)  # noqa: E741
  # A stretch without a key ends with the lowest weight there is.
  total = jnp.where(l > 0, l, 1.0)
  present = jnp.arange(_QUERIES) < group
  channel = jnp.arange(s.head_dim)[None]
  at = refs["sums"].at[unit, stretch, queries[:, None] * s.head_dim + channel]
  triton.store(at, o / total[:, None], mask=present[:, None] & (channel >= 0))
  triton.store(refs["weights"].at[unit, stretch, queries], m + jnp.log(total), mask=present)

  @pl.when(mine)
  def _():
    # As `dynamic_update_slice` would: never past the end.
    place = jnp.minimum(length, s.capacity - 1)
    for first, a in zip((0, half), new_key, strict=True):
      refs["keys"][row, pl.ds(place, 1), kv, first : first + half] = a.astype(dtype)
    refs["values"][row, place, kv] = new_value.astype(dtype)


def _add(refs, unit, rows, y):
  """The residual sum of these rows."""
  dtype = refs["out"].dtype
  refs["out"][unit, rows] = refs["x"][unit, rows] + y.astype(dtype)


def _join(refs, s: Shape):
  """The stretches of every head combined, the output product, and the residual sum."""
  unit, rows = _mine()
  inputs = s.q_heads * s.head_dim
  matrix = _read(refs["o"], unit, rows[:, None], size=inputs)
  channel = jnp.arange(pl.next_power_of_2(inputs))
  inside = channel < inputs
  # A head's weight once a channel: so no thread needs what another one holds.
  read = lambda name, i, at: triton.load(refs[name].at[unit, jnp.int32(i), at], mask=inside, other=0.0)
  weights = [read("weights", i, channel // s.head_dim) for i in range(s.stretches)]
  top = functools.reduce(jnp.maximum, weights)
  shares = [jnp.exp(w - top) for w in weights]
  o = functools.reduce(jnp.add, [share * read("sums", i, channel) for i, share in enumerate(shares)])
  o = (o / functools.reduce(jnp.add, shares)).astype(refs["x"].dtype)
  _add(refs, unit, rows, _times(matrix, _wide(o)))


def _up(refs, s: Shape):
  """The MLP's first product, and its activation."""
  unit, rows = _mine()
  dtype = refs["out"].dtype
  gated = refs["up"].shape[1] > s.mlp_width
  firsts = (0, s.mlp_width) if gated else (0,)
  matrices = [_read(refs["up"], unit, (rows + first)[:, None], size=s.width) for first in firsts]
  x = _normed(refs, "mlp_norm", s.width, s.eps)
  a, *up = [_wide(_times(matrix, x).astype(dtype)) for matrix in matrices]
  a = a * jax.nn.sigmoid(a) * up[0] if gated else jnp.square(jnp.maximum(a, 0.0))
  refs["out"][unit, rows] = a.astype(dtype)


def _down(refs, s: Shape):
  """The MLP's second product, and the residual sum."""
  unit, rows = _mine()
  matrix = _read(refs["down"], unit, rows[:, None], size=s.mlp_width)
  _add(refs, unit, rows, _times(matrix, _wide(_read(refs["hidden"], unit, size=s.mlp_width))))
