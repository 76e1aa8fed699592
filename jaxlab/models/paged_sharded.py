"""A prompt over several devices: its pages, and the work of reading it, shared out along a `sequence` mesh axis.

  mesh = make_mesh({"sequence": 4})
  tokens = generate(network, prompts, lengths, tokens=64, decoder=paged_sharded.decoder(mesh, chunk=4096))

Every device reads its own part of each chunk, and keeps the keys and values of that part. In a layer all devices'
queries go to every device (an all-gather), meet the pages there, and what was found goes back to the query's own
device (an all-to-all), which merges the parts by their log-sum-exp:

  o = sum_d exp(L_d - L) o_d,   L = log sum_d exp(L_d).

What is sent for a chunk does not grow with the context, unlike keys in a ring, and as parts of every chunk lie on every
device, all have as much to do from the first chunk to the last. A later token is computed by all, its keys kept by one,
and its attention merged in the same way. Passing queries: Yang et al. 2024, arXiv 2411.01783.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_counts, require_divides
from jaxlab.models import paged
from jaxlab.models.generate import Decoder
from jaxlab.models.inference import Network

AXIS = "sequence"
_WHOLE = PartitionSpec()
_PLACED = paged.State(pools=PartitionSpec(None, AXIS), table=_WHOLE, length=_WHOLE, memory=_WHOLE, previous=_WHOLE)


@functools.cache
def decoder(mesh: Mesh, *, chunk: int = 4096, page: int = 64) -> Decoder:
  """Dense attention over a paged cache that the devices of a `sequence` axis share (`jaxlab.models.generate`).

  Args:
    chunk: tokens of a prompt that are read at once, by all devices together; a multiple of devices x page.
    page: positions of a page.

  Raises:
    InputError: a mesh without the axis, or sizes that do not divide.
  """
  _devices(mesh, chunk, page)
  return Decoder(functools.partial(prefill, mesh=mesh, chunk=chunk, page=page), functools.partial(step, mesh=mesh))


def prefill(
  network: Network,
  prompts: Int[Array, "batch time"],
  lengths: Int[Array, "batch"] | None = None,
  *,
  mesh: Mesh,
  capacity: int,
  chunk: int = 4096,
  page: int = 64,
) -> tuple[Float[Array, "batch 1 vocab"], paged.State]:
  """`paged.prefill` by all devices of the axis; the state is one of `paged`, its pools split by pages.

  Raises:
    InputError: a prompt longer than the capacity; and what `decoder` raises.
  """
  devices, batch = _devices(mesh, chunk, page), len(prompts)
  prompts, lengths, chunk = paged.in_chunks(prompts, lengths, capacity=capacity, chunk=chunk, unit=page * devices)
  capacity = -(-max(capacity, prompts.shape[1]) // chunk) * chunk
  share = chunk // devices
  table = _table(batch, capacity // page, share // page, devices)

  def on_each(network, prompts, lengths, table):
    state = _mine(paged.empty_state(network, batch=batch, capacity=capacity // devices, page=page), table)
    offset = jax.lax.axis_index(AXIS) * share
    how = dict(chunk=chunk, share=share, offset=offset, method=_READING)
    ends, state = paged.read(network, prompts, lengths, state, **how)
    ends = jax.lax.psum(ends, AXIS)  # a row's last token was read by one of them
    previous = paged.before_smear(network.model, paged.last_of(prompts, lengths))
    state = dataclasses.replace(state, table=table, length=lengths, memory=(), previous=previous)
    return network.model.logits(*ends), state

  run = jax.shard_map(on_each, mesh=mesh, in_specs=_WHOLE, out_specs=(_WHOLE, _PLACED), check_vma=False)
  return run(network, prompts, lengths, table)


def step(
  network: Network, tokens: Int[Array, "batch time"], state: paged.State, *, mesh: Mesh
) -> tuple[Float[Array, "batch time vocab"], paged.State]:
  """`paged.step` on a state of `prefill`: every device computes it, over its own pages."""

  def on_each(network, tokens, state):
    logits, new = paged.step(network, tokens, _mine(state, state.table), method=_GOING_ON)
    return logits, dataclasses.replace(new, table=state.table, memory=())

  specs = dict(in_specs=(_WHOLE, _WHOLE, _PLACED), out_specs=(_WHOLE, _PLACED))
  return jax.shard_map(on_each, mesh=mesh, **specs, check_vma=False)(network, tokens, state)


def _devices(mesh: Mesh, chunk: int, page: int) -> int:
  """How many share a chunk."""
  require(AXIS in mesh.axis_names, f"the mesh has axes {mesh.axis_names}; it needs one named {AXIS!r}")
  require_counts(chunk=chunk, page=page)
  require_divides(f"page x devices on {AXIS!r}", page * mesh.shape[AXIS], "chunk", chunk)
  return mesh.shape[AXIS]


def _table(batch: int, pages: int, share: int, devices: int) -> Int[Array, "batch pages"]:
  """Pages of every row where `share` in a row lie on each device in turn; the pools' parts follow each other."""
  page = jnp.arange(pages, dtype=jnp.int32)
  row = jnp.arange(batch, dtype=jnp.int32)[:, None]
  device, place = page // share % devices, page // (share * devices) * share + page % share
  return (device * batch + row) * (pages // devices) + place


def _mine(state: paged.State, table) -> paged.State:
  """A device's part of a state: pages that lie elsewhere have numbers its pools lack, so that nothing is written there.

  Its memory is (numbers of this device's pages of every row, their positions), for attention.
  """
  batch, count = len(table), state.pools[0][0].shape[1]
  table = table - jax.lax.axis_index(AXIS) * count
  here = (table >= 0) & (table < count)
  own = jnp.argsort(~here, axis=1, stable=True)[:, : count // batch]
  memory = jnp.take_along_axis(table, own, axis=1), own.astype(jnp.int32) * state.page
  return dataclasses.replace(state, table=jnp.where(here, table, count), memory=memory)


def _attend(q, k, v, view: paged.View, memory, *, shared: bool):
  """`paged.Method.attend` on a device.

  Args:
    shared: the new tokens are this device's part of a chunk, and not the same on all.
  """
  devices, start = jax.lax.axis_size(AXIS), view.start
  if shared:
    start -= jax.lax.axis_index(AXIS) * q.shape[1]
    q = jax.lax.all_gather(q, AXIS, axis=1, tiled=True)
  batch, time = q.shape[:2]
  found = _over_own_pages(q, view, *memory, start=start, stretches=devices if shared else time)
  if shared:
    apart = lambda a: a.reshape(batch, devices, -1, *a.shape[2:])
    found = (jax.lax.all_to_all(apart(a), AXIS, split_axis=1, concat_axis=1) for a in found)
  else:
    found = (jax.lax.all_gather(a, AXIS, axis=1) for a in found)
  from jaxlab.kernels.paged_attention import combine  # late, as in `paged.attend_tables`

  return combine(*found)[0], memory


def _over_own_pages(q, view: paged.View, own, places, *, start, stretches: int):
  """(attention over this device's pages, its log-sum-exp: -inf where a query sees none of them).

  Args:
    stretches: parts of the queries, each of which lies on one device: of a part's own pages it has all or none.
  """
  if not paged.kernel_takes(q, view.keys, view.window):
    return paged.attend_pages(q, view.keys, view.values, own, start=start, window=view.window, places=places)
  # The kernel knows pages before the queries, and those that hold them: a call is a stretch.
  page, heads, size = view.keys.shape[2], view.keys.shape[0], q.shape[1] // stretches
  by_head = lambda a: jnp.repeat(a[:, None], heads, axis=1)

  def one(i):
    begin = jnp.broadcast_to(start + i * size, len(q))
    before, all_ = places < (begin // page * page)[:, None], places <= (begin + size - 1)[:, None]
    count = jnp.stack([before.sum(axis=1), all_.sum(axis=1)], axis=1)
    part = jax.lax.slice_in_dim(q, i * size, (i + 1) * size, axis=1)
    return paged.attend_tables(part, view.keys, view.values, by_head(own), by_head(count), begin)

  parts = zip(*map(one, range(stretches)), strict=True)
  return tuple(jnp.concatenate(part, axis=1) for part in parts)


_READING = paged.Method(functools.partial(_attend, shared=True))
_GOING_ON = paged.Method(functools.partial(_attend, shared=False))
