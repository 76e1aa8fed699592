"""The kernel by Pallas' Triton lowering: a program takes one head of a few tokens."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxlab.core.checks import require

_TOKENS = 16  # of a program, at most


def supports(head_dim: int) -> bool:
  """Triton's blocks have powers of two as sides, also the halves that are rotated."""
  return head_dim >= 4 and head_dim & (head_dim - 1) == 0


def rotary_qkv(heads, cos, sin, value, gate, *, q_heads, kv_heads, norm, gain, eps, scale, interpret=False):
  """As `jaxlab.kernels.rotary_qkv.rotary_qkv`; everything between reading and writing is float32."""
  *batch, time, count, size = heads.shape
  require(supports(size), f"head_dim is {size}; the Triton kernel needs a power of two, from 4 on")
  rows = math.prod(batch)
  tokens = math.gcd(time, _TOKENS)
  flat = lambda a, *tail: a.reshape(rows, time, *tail)
  head = lambda first, number: lambda b, t, h: (b, t, jnp.clip(h - first, 0, number - 1), 0)
  block = lambda index: pl.BlockSpec((None, tokens, None, size), index)
  if cos.ndim > 2:  # rows at positions of their own
    cos, sin = (flat(jnp.broadcast_to(a, (*batch, *a.shape[-2:])), size // 2) for a in (cos, sin))
    angle = pl.BlockSpec((None, tokens, size // 2), lambda b, t, h: (b, t, 0))
  else:
    angle = pl.BlockSpec((tokens, size // 2), lambda b, t, h: (t, 0))
  places = [head(0, q_heads), head(q_heads, kv_heads), head(q_heads + kv_heads, kv_heads)]
  operands = {"heads": flat(heads, count, size), "cos": cos, "sin": sin}
  specs = {"heads": block(lambda b, t, h: (b, t, h, 0)), "cos": angle, "sin": angle}
  if gain is not None:
    last = q_heads + kv_heads - 1
    operands["gain"] = jnp.broadcast_to(gain, (last + 1, size))
    specs["gain"] = pl.BlockSpec((None, size), lambda b, t, h: (jnp.minimum(h, last), 0))
  if value is not None:
    operands |= {"value": flat(value, kv_heads, size), "gate": flat(gate, kv_heads)}
    specs["value"] = block(places[2])
    specs["gate"] = pl.BlockSpec((None, tokens, None), lambda b, t, h: places[2](b, t, h)[:3])
  shapes = [jax.ShapeDtypeStruct((rows, time, n, size), heads.dtype) for n in (q_heads, kv_heads, kv_heads)]
  kernel = functools.partial(
    _kernel, names=tuple(operands), q_heads=q_heads, kv_heads=kv_heads, norm=norm, eps=eps, scale=scale
  )
  outputs = pl.pallas_call(
    kernel,
    grid=(rows, time // tokens, count),
    in_specs=list(specs.values()),
    out_specs=[block(place) for place in places],
    out_shape=shapes,
    compiler_params=triton.CompilerParams(num_warps=max(1, min(4, tokens * size // 512)), num_stages=1),
    interpret=interpret,
    name="rotary_qkv",
  )(*operands.values())
  return tuple(a.reshape(*batch, *a.shape[1:]) for a in outputs)


def _kernel(*refs, names, q_heads, kv_heads, norm, eps, scale):
  given, (q, k, v) = dict(zip(names, refs, strict=False)), refs[len(names) :]
  heads = given["heads"]
  size = heads.shape[-1]
  h = pl.program_id(2)
  wide = lambda ref, *index: ref[index].astype(jnp.float32)
  halves = slice(0, size // 2), slice(size // 2, size)
  x1, x2 = (wide(heads, slice(None), half) for half in halves)
  # A rotation keeps the length, so that the norm may be taken before it either way; only the gain has its place.
  square = jnp.sum(x1 * x1, axis=-1) + jnp.sum(x2 * x2, axis=-1)
  factor = scale * (jax.lax.rsqrt(square / size + eps) if norm else jnp.ones_like(square))[:, None]
  x1, x2 = x1 * factor, x2 * factor
  gained = lambda a, half: a * wide(given["gain"], half)[None] if "gain" in given else a
  if norm == "before_rope":
    x1, x2 = (gained(a, half) for a, half in zip((x1, x2), halves, strict=True))
  cos, sin = wide(given["cos"], ...), wide(given["sin"], ...)
  turned = x1 * cos - x2 * sin, x2 * cos + x1 * sin
  if norm == "after_rope":
    turned = [gained(a, half) for a, half in zip(turned, halves, strict=True)]

  def write(ref, values):
    for half, a in zip(halves, values, strict=True):
      ref[:, half] = a.astype(ref.dtype)

  pl.when(h < q_heads)(lambda: write(q, turned))
  pl.when((h >= q_heads) & (h < q_heads + kv_heads))(lambda: write(k, turned))

  @pl.when(h >= q_heads + kv_heads)
  def _():
    own = [wide(heads, slice(None), half) for half in halves]
    if "value" in given:
      gate = wide(given["gate"], ...)[:, None]
      own = [a + gate * wide(given["value"], slice(None), half) for a, half in zip(own, halves, strict=True)]
    write(v, own)
