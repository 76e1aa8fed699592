"""What operators reach on a share of a GPU's processors: kernels with a program a processor, of which only some work.

Programs beyond `active` leave at once, so that their processors stand idle: a share that JAX has no name for. A product
is tiles that the active programs take in turn, reading is a sum of stretches of a large array.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from experiments import timing
from experiments.nexus.chips import NETWORKS, SHARES

_STEP = 64  # of the inner dimension


def product(x, w, active, *, programs: int, tile: int, interpret: bool = False):
  """x w, by the first `active` of `programs` programs.

  Args:
    x, w: of multiples of `tile` rows and columns, and of 64 (or the tile, if smaller) in between; active: int32[1].
  """
  (rows, inner), columns = x.shape, w.shape[1]
  step, across = min(_STEP, tile), columns // tile

  def kernel(x, w, active, out):
    me, among = pl.program_id(0), active[0]

    def one(i, carry):
      at = me + i * among
      row, column = jax.lax.div(at, across) * tile, jax.lax.rem(at, across) * tile

      def add(k, total):
        k = k * step
        return total + triton.dot(x[pl.ds(row, tile), pl.ds(k, step)], w[pl.ds(k, step), pl.ds(column, tile)])

      total = jax.lax.fori_loop(0, inner // step, add, jnp.zeros((tile, tile), jnp.float32))
      out[pl.ds(row, tile), pl.ds(column, tile)] = total.astype(out.dtype)
      return carry

    jax.lax.fori_loop(0, _turns(me, among, rows // tile * across), one, 0)

  return _call(kernel, (x, w, active), jax.ShapeDtypeStruct((rows, columns), x.dtype), programs, 8, interpret)


def read(x, active, *, programs: int, size: int, interpret: bool = False):
  """Sums of a vector's stretches of `size` numbers, one a program; zeros of programs that do nothing."""

  def kernel(x, active, out):
    me, among = pl.program_id(0), active[0]
    add = lambda i, total: total + x[pl.ds((me + i * among) * size, size)].astype(jnp.float32)
    turns = _turns(me, among, x.shape[0] // size)
    out[me] = jnp.sum(jax.lax.fori_loop(0, turns, add, jnp.zeros((size,), jnp.float32)))

  return _call(kernel, (x, active), jax.ShapeDtypeStruct((programs,), jnp.float32), programs, 16, interpret)


def _turns(me, among, count: int):
  """How many of `count` pieces the program takes: none where it is not active."""
  return jnp.where(me < among, jax.lax.div(jnp.maximum(count - me, 0) + among - 1, among), 0)


def _call(kernel, arguments, out, programs: int, warps: int, interpret: bool):
  whole = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    kernel, grid=(programs,), in_specs=[whole] * len(arguments), out_specs=whole, out_shape=out,
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=3), interpret=interpret,
  )(*arguments)  # fmt: skip


def calibrate(config, console) -> dict:
  """{peak, bandwidth, shares, compute: {operator: curve}, memory: curve, processors, times}."""
  c, shape, key = config.calibrate, NETWORKS[config.calibrate.network], jax.random.key(config.seed)
  interpret = jax.default_backend() != "gpu"
  programs = c.processors or jax.devices()[0].core_count
  active = [max(1, round(share * programs)) for share in SHARES]
  down = lambda size: max(c.tile, size // c.divide // c.tile * c.tile)
  q, kv = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
  sizes = {
    "qkv": (shape.width, q + 2 * kv),
    "out": (q, shape.width),
    "up": (shape.width, 2 * shape.mlp_width),
    "down": (shape.mlp_width, shape.width),
  }
  normal = lambda *size: jax.random.normal(key, size, jnp.bfloat16)
  contestants, flops = {}, {}
  for name, (inner, columns) in sizes.items():
    x, w = normal(down(c.rows), down(inner)), normal(down(inner), down(columns))
    run = jax.jit(functools.partial(product, programs=programs, tile=c.tile, interpret=interpret))
    flops[name] = 2 * x.shape[0] * x.shape[1] * w.shape[1]
    for count in active:
      contestants[f"{name}.{count}"] = functools.partial(run, x, w, jnp.array([count], jnp.int32))
    contestants[f"{name}.whole"] = functools.partial(jax.jit(jnp.matmul), x, w)
  large = normal(down(8192), down(8192))
  contestants["peak"] = functools.partial(jax.jit(jnp.matmul), large, large)
  stream = jnp.ones((max(c.bytes // 2 // c.size, 1) * c.size,), jnp.bfloat16)
  run = jax.jit(functools.partial(read, programs=programs, size=c.size, interpret=interpret))
  for count in active:
    contestants[f"read.{count}"] = functools.partial(run, stream, jnp.array([count], jnp.int32))
  contestants["sum"] = functools.partial(jax.jit(lambda a: a.sum(dtype=jnp.float32)), stream)
  heads, keys = (normal(1, down(c.rows), h, shape.head_dim) for h in (shape.q_heads, shape.kv_heads))
  attend = functools.partial(
    jax.nn.dot_product_attention, is_causal=True, implementation=None if interpret else "cudnn"
  )
  contestants["attention"] = functools.partial(jax.jit(attend), heads, keys, keys)
  times = timing.compare(contestants, repetitions=c.repetitions, warmup=1, inner=c.inner)
  seconds = {name: times.median(name) for name in contestants}
  # The host needs longer to launch the narrow ones than the chip to run them, which an engine's step does not wait for.
  for name in ("attention", *(f"{name}.whole" for name in sizes)):
    seconds[name] = timing.device_seconds(contestants[name]) or seconds[name]
  peak = 2 * large.shape[0] ** 3 / seconds["peak"]
  # On all processors the best kernel counts; with fewer its gain is taken to be that of the kernels here.
  scaled = lambda whole, curve: [whole * value / max(curve) for value in curve]
  compute = {
    name: scaled(flops[name] / seconds[f"{name}.whole"] / peak, [1 / seconds[f"{name}.{count}"] for count in active])
    for name in sizes
  }
  drawn = [stream.nbytes / seconds[f"read.{count}"] for count in active]
  bandwidth = max(*drawn, stream.nbytes / seconds["sum"])
  compute["head"] = compute["up"]
  # Attention gains from processors as the widest product does.
  whole = 2 * 2 * shape.q_heads * shape.head_dim * heads.shape[1] ** 2 / 2 / seconds["attention"] / peak
  compute["chunk_attention"] = scaled(whole, compute["up"])
  compute["row_attention"] = compute["chunk_attention"]  # reads much more than it works out
  console.say(f"  {peak:.3g} operations and {bandwidth:.3g} bytes a second, {programs} processors")
  for name, curve in compute.items():
    console.say(f"  {name}: {', '.join(f'{value:.2f}' for value in curve)}")
  memory = [value / bandwidth for value in drawn]
  console.say(f"  memory: {', '.join(f'{value:.2f}' for value in memory)}")
  return dict(
    peak=peak, bandwidth=bandwidth, shares=list(SHARES), compute=compute, memory=memory, processors=programs,
    seconds=seconds,
  )  # fmt: skip
