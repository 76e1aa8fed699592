"""SNLP's suffix over devices: n layers on a `layer` mesh axis, the correction a prefix sum across it.

Every device holds n / P layers of the suffix with their keys and values, and evaluates those alone. With the identity
surrogate a step needs of the other devices only the sums of their increments g_j = f_j(z_j) - z_j:

  z_{j+1} = h_S + sum over earlier devices of their sums + sum over this device's layers up to j,

one all-gather of P states an iteration. Prefix and head run on every device. `step_seconds` says when that pays.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_divides
from jaxlab.depth.snlp_inference import Network, State, prefix_states
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.block import attend_layers, evaluate_blocks, layer_values
from jaxlab.models.layers import wide

AXIS = "layer"
_SPLIT, _WHOLE = PartitionSpec(AXIS), PartitionSpec()


def step(
  network: Network,
  tokens: Int[Array, "batch time"],
  state: State | None = None,
  *,
  mesh: Mesh,
  iterations: int = 1,
  attention: AttentionFn = dot_product_attention,
) -> tuple[Float[Array, "batch time vocab"], State | None]:
  """`snlp_inference.step` from h0 with the identity surrogate and the last iteration's keys, the suffix over `layer`.

  `place` puts network and state where this wants them. Windows may differ from layer to layer, but must repeat from
  device to device: every device runs the same program.

  Raises:
    InputError: a mesh without the axis, a suffix it does not divide or a fused one, window patterns that differ between
      devices.
  """
  require(AXIS in mesh.axis_names, f"the mesh has axes {mesh.axis_names}; it needs one named {AXIS!r}")
  require(iterations >= 1, f"iterations is {iterations}; at least one Newton step is needed")
  plain = len(network.parts) == 1 and not network.fused
  require(plain, "split the model with one plain suffix: fused layers are one device's, and parts come one by one")
  suffix, c = network.parts[0], network.model.config
  devices = mesh.shape[AXIS]
  require_divides(f"devices on {AXIS!r}", devices, "layers (n_par)", suffix.layers)
  local = suffix.layers // devices
  windows = [c.windows[i : i + local] for i in range(suffix.start, suffix.stop, local)]
  # Caches are kept by kind of window, whether it is felt or not.
  windows = _common_windows(windows, tokens.shape[1] if state is None else None)
  middle = c.depth // 2 - suffix.start  # the suffix's layer whose output the head subtracts

  def on_each(network, tokens, state):
    x, backout, side, state = prefix_states(network, tokens, state, attention)
    device = jax.lax.axis_index(AXIS)
    mine = lambda a: jax.lax.dynamic_slice_in_dim(a, device * local, local)
    blocks, pairs = network.parts[0].blocks, None if state is None else state.pairs[0]
    values = jax.tree.map(mine, layer_values(c, side, suffix.start, suffix.stop))
    mixing = jax.tree.map(lambda m: mine(m[suffix.start : suffix.stop]), side.mixing)

    def attend(q, k, v):
      nonlocal pairs
      if pairs is None:
        return attend_layers(q, k, v, windows=windows, attention=attention, start=side.start)
      how = dict(windows=windows, start=side.start, attention=attention)
      attended, pairs = blocks.steps.attend_cached(q, k, v, pairs, **how)
      return attended

    z = jnp.broadcast_to(x, (local, *x.shape))
    for _ in range(iterations):
      outputs, _, _ = evaluate_blocks(blocks, z, side, values=values, mixing=mixing, attend=attend)
      sums = jnp.cumsum(wide(outputs) - wide(z), axis=0)
      # Up to the middle layer: all of an earlier device's sums, none of a later one's.
      here = middle - device * local
      until = jnp.where(here < 0, 0.0, sums[jnp.clip(here, 0, local - 1)])
      sent = jnp.stack([sums[-1], until]) if c.backout and middle >= 0 else sums[-1:]
      received = jax.lax.all_gather(sent, AXIS)  # (devices, 1 or 2, batch, time, *state)
      before = (jnp.arange(devices) < device).astype(sums.dtype)
      first = wide(x) + jnp.tensordot(before, received[:, 0], axes=1, precision="highest")
      z = jnp.concatenate([first[None], first + sums[:-1]]).astype(x.dtype)
    total = (wide(x) + received.sum(axis=0)).astype(x.dtype)
    if c.backout and middle >= 0:
      backout = total[1]
    if state is not None:
      state = dataclasses.replace(
        state, pairs=(pairs,), traces=((first + sums)[:, :, -1:].astype(state.traces[0].dtype),)
      )
    return network.model.logits(total[0], backout), state

  where = _specs(network), _specs(state)
  run = jax.shard_map(
    on_each, mesh=mesh, in_specs=(where[0], _WHOLE, where[1]), out_specs=(_WHOLE, where[1]), check_vma=False
  )
  return run(network, tokens, state)


def place(tree: Network | State, mesh: Mesh) -> Network | State:
  """The tree where `step` wants it: each device has its layers of the suffix, and a copy of everything else.

  Raises:
    InputError: a suffix that the mesh does not divide.
  """
  layers = tree.parts[0].layers if isinstance(tree, Network) else len(tree.traces[0])
  require_divides(f"devices on {AXIS!r}", mesh.shape[AXIS], "layers (n_par)", layers)
  return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, _specs(tree))


def _specs(tree: Network | State | None):
  """PartitionSpecs in the structure of a network or a state."""
  if tree is None:
    return None
  whole = jax.tree.map(lambda _: _WHOLE, tree)
  split = lambda part: jax.tree.map(lambda _: _SPLIT, part)
  if isinstance(tree, State):
    return dataclasses.replace(whole, pairs=split(tree.pairs), traces=split(tree.traces))
  part = dataclasses.replace(whole.parts[0], blocks=split(tree.parts[0].blocks))
  return dataclasses.replace(whole, parts=(part,))


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
  state_bytes: int,
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


def _common_windows(windows: list[tuple], time: int | None) -> tuple:
  """The windows of one device; those that no position of `time` feels count as none."""
  felt = [tuple(None if w is None or (time and w >= time) else w for w in part) for part in windows]
  require(
    all(part == felt[0] for part in felt),
    "window patterns differ from device to device; use layers and devices that split the pattern evenly",
  )
  return felt[0]
