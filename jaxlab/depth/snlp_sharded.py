"""SNLP's suffix over devices: n layers on a `layer` mesh axis, the correction a prefix sum across it.

Every device evaluates its n / P layers and holds their weights alone. With the identity surrogate a step needs of the
other devices only the sums of their increments g_j = f_j(z_j) - z_j:

  z_{j+1} = h_S + sum over earlier devices of their sums + sum over this device's layers up to j,

one all-gather of P states a step. `step_seconds` says when that pays.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxlab.core.checks import require, require_divides
from jaxlab.depth.snlp_suffix import plain
from jaxlab.models import Transformer
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.layers import wide
from jaxlab.models.transformer import Side, attend_layers, evaluate_blocks, layer_values, sequential

AXIS = "layer"


def hidden(
  model: Transformer,
  tokens: Int[Array, "batch time"],
  *,
  layers: int,
  iterations: int,
  mesh: Mesh,
  attention: AttentionFn = dot_product_attention,
):
  """`snlp.hidden` with the identity surrogate from h0, the suffix over the mesh axis `layer`.

  Windows may differ from layer to layer, but must repeat from device to device: every device runs the same program.

  Raises:
    InputError: a mesh without the axis, layers it does not divide, window patterns that differ between devices.
  """
  require(AXIS in mesh.axis_names, f"the mesh has axes {mesh.axis_names}; it needs one named {AXIS!r}")
  require(iterations >= 1, f"iterations is {iterations}; at least one Newton step is needed")
  suffix, c = plain(model, layers), model.config
  devices = mesh.shape[AXIS]
  require_divides(f"devices on {AXIS!r}", devices, "layers (n_par)", layers)
  local = layers // devices
  windows = [c.windows[suffix.start + i : suffix.start + i + local] for i in range(0, layers, local)]
  windows = _common_windows(windows, tokens.shape[1])
  x, side, _ = model.embed(tokens)
  x, backout, _, _ = sequential(model, x, side, stop=suffix.start, attention=attention)
  values = layer_values(c, side, suffix.start, suffix.stop)
  mixing = jax.tree.map(lambda m: m[suffix.start : suffix.stop], side.mixing)
  shared = Side(side.x0, side.cos, side.sin, side.start, None, None)
  split, whole = PartitionSpec(AXIS), PartitionSpec()

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(split, split, split, whole, whole), out_specs=split, check_vma=False
  )
  def solve(blocks, values, mixing, h, side):
    attend = functools.partial(attend_layers, windows=windows, attention=attention, start=side.start)
    z = jnp.broadcast_to(h, (local + 1, *h.shape))
    for _ in range(iterations):
      outputs, _, _ = evaluate_blocks(blocks, z[:-1], side, values=values, mixing=mixing, attend=attend)
      sums = jnp.cumsum(wide(outputs) - wide(z[:-1]), axis=0)
      all_sums = jax.lax.all_gather(sums[-1], AXIS)  # (devices, batch, time, *state)
      before = jnp.arange(devices) < jax.lax.axis_index(AXIS)
      first = wide(h) + jnp.tensordot(before.astype(sums.dtype), all_sums, axes=1, precision="highest")
      z = jnp.concatenate([first[None], first + sums]).astype(h.dtype)
    return z[1:]

  trace = solve(suffix.blocks, values, mixing, x, shared)
  if c.backout and c.depth // 2 >= suffix.start:
    backout = trace[c.depth // 2 - suffix.start]
  return trace[-1], backout


def place(model: Transformer, mesh: Mesh, *, layers: int) -> Transformer:
  """The model with its parameters where `hidden` wants them: stacked ones over `layer` if the whole depth is solved
  (layers = L), copies on every device otherwise."""
  split = NamedSharding(mesh, PartitionSpec(AXIS))
  whole = NamedSharding(mesh, PartitionSpec())
  stacked = split if layers == model.depth else whole
  placed = jax.tree.map(lambda a: jax.device_put(a, whole), model)
  placed.blocks = jax.tree.map(lambda a: jax.device_put(a, stacked), model.blocks)
  return placed


def step_seconds(
  *,
  depth: int,
  layers: int,
  iterations: int,
  devices: int,
  t_lat: float,
  b: float,
  message: float,
  bandwidth: float,
  state_bytes: float,
) -> float:
  """Time of one step by the latency model: the prefix, then K times a parallel evaluation and a gather.

    t = S (t_lat + b) + K (t_lat + (n / P) b + t_gather),   t_gather = message + P state_bytes / bandwidth  (0 at P = 1)

  More devices pay while K (n - n / P) b > K t_gather: only where a layer's own time b is worth a message. One layer of
  a 0.5 B model reads 10 MB in 2 to 5 us, a message takes 5 to 10 us.

  Args:
    t_lat: latency of one chain of kernels, seconds. b: time to read one layer's weights, seconds.
    message: latency of an all-gather, seconds. bandwidth: of the links, bytes a second.
    state_bytes: size of one layer's output, batch * time * width * itemsize.
  """
  gather = 0.0 if devices == 1 else message + devices * state_bytes / bandwidth
  prefix = (depth - layers) * (t_lat + b)
  return prefix + iterations * (t_lat + layers / devices * b + gather)


def _common_windows(windows: list[tuple], time: int) -> tuple:
  """The windows of one device; those that no position of `time` feels count as none."""
  felt = [tuple(None if w is None or w >= time else w for w in part) for part in windows]
  require(
    all(part == felt[0] for part in felt),
    "window patterns differ from device to device; use layers and devices that split the pattern evenly",
  )
  return felt[0]
