"""PowerWalk over a mesh axis: vertices by range, flow and fingerprints with their vertex.

Device i holds the rows of F, S and the out-edges and fingerprints of its range of vertices. A step multiplies locally
into partial sums for all vertices; `psum_scatter` adds them and leaves each device its range. The numbers are those of
one device but for the order of additions. Offline, sources are split: their walks meet no one, and the index is that of
one device to the bit.

  index = build_index(graph, jax.random.key(0), mesh, axis="data", walks=100)
  parts = shard(graph, index, mesh, axis="data")
  estimate = query(sources, parts, mesh, axis="data", steps=2)        # (nodes, queries), sharded by vertex
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require_choice
from jaxlab.graphs import fingerprints
from jaxlab.graphs.fingerprints import (
  RESET,
  Built,
  Index,
  WalkGraph,
  check_graph,
  check_index,
  check_reset,
  check_sources,
  check_whole,
)
from jaxlab.graphs.powerwalk import spmm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
  """Rows of edges and fingerprints by device: (local source, target anywhere, weight), padded with weight 0."""

  edges: tuple[Int[Array, "devices edges"], Int[Array, "devices edges"], Float[Array, "devices edges"]]
  index: tuple[Int[Array, "devices entries"], Int[Array, "devices entries"], Float[Array, "devices entries"]]
  nodes: int = dataclasses.field(metadata=dict(static=True))
  built: Built | None = dataclasses.field(metadata=dict(static=True))


def build_index(graph: WalkGraph, key: jax.Array, mesh: Mesh, *, axis: str, **options) -> Index:
  """`fingerprints.build_index` with the sources split over `axis`: from the same key the same index, bit for bit.

  Every device holds the whole graph and walks from its own block of sources without a collective; the last blocks are
  filled up, so any number of sources will do. Visits are counted on the host, as those of one device are.

  Args:
    options: walks and all others of `fingerprints.build_index`.

  Raises:
    InputError: an axis the mesh has not, or as `fingerprints.build_index`.
  """
  require_choice("axis", axis, mesh.axis_names)
  graph, key = jax.device_put((graph, key), NamedSharding(mesh, PartitionSpec()))
  spread = lambda walk: functools.partial(_by_rows, walk, mesh=mesh, axis=axis)
  return fingerprints.build_index(graph, key, devices=mesh.shape[axis], spread=spread, **options)


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("mesh", "axis", "per_origin", "length", "reset", "restart")
)
def _by_rows(walk, key, graph, rows, origins, *count, mesh, axis, **options):
  """walk(key, graph, rows, origins, *count) with rows and origins split over the axis, its results side by side."""
  whole, split = PartitionSpec(), PartitionSpec(axis)
  specs = whole, whole, split, split, *(whole for _ in count)
  walk = functools.partial(walk, **options)
  run = jax.shard_map(walk, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
  return run(key, graph, rows, origins, *count)


def shard(graph: WalkGraph, index: Index, mesh: Mesh, *, axis: str) -> Parts:
  """Cuts a graph and its index by ranges of vertices and places them.

  Raises:
    InputError: an axis the mesh has not, no graph of `walk_graph`, or an index of another graph.
  """
  require_choice("axis", axis, mesh.axis_names)
  check_graph(graph)
  check_index(index, graph)
  devices = mesh.shape[axis]
  local = -(-graph.nodes // devices)
  weights = 1 / np.asarray(graph.degree)[np.asarray(graph.in_sources)]
  place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(axis)))

  def cut(sources, targets, weights):
    sources, targets, weights = (np.asarray(x) for x in (sources, targets, weights))
    owner = sources // local
    width = max(int(np.bincount(owner, minlength=devices).max()), 1)
    out = np.zeros((devices, width), np.int32), np.full((devices, width), local * devices - 1, np.int32)
    out += (np.zeros((devices, width), np.float32),)
    for d in range(devices):
      mine = owner == d
      for row, values in zip(out, (sources - d * local, targets, weights), strict=True):
        row[d, : mine.sum()] = values[mine]
    return tuple(place(row) for row in out)

  edges = cut(graph.in_sources, graph.in_targets, weights)
  return Parts(edges, cut(index.origins, index.visited, index.values), graph.nodes, index.built)


def query(
  sources: Int[Array, "queries"], parts: Parts, mesh: Mesh, *, axis: str, steps: int, reset: float = RESET
) -> Float[Array, "nodes queries"]:
  """`powerwalk.query` without pruning, sharded by vertex over `axis`.

  Raises:
    InputError: as `powerwalk.query`.
  """
  sources = check_sources(sources, parts)
  check_whole("steps", steps, 0)
  check_reset(parts.built, reset)
  return _query(sources, parts, mesh, axis=axis, steps=steps, reset=reset)


@functools.partial(jax.jit, static_argnames=("mesh", "axis", "steps", "reset"))
def _query(sources, parts, mesh, *, axis, steps, reset):
  devices = mesh.shape[axis]
  local = -(-parts.nodes // devices)
  rows = PartitionSpec(axis)

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), rows, rows), out_specs=rows, check_vma=False)
  def run(sources, edges, index):
    edges, index = jax.tree.map(lambda x: x[0], (edges, index))
    here = sources[None] - jax.lax.axis_index(axis) * local == jnp.arange(local)[:, None]
    flow = here.astype(jnp.float32)

    def spread(entries, flow):
      total = spmm(*entries, flow, nodes=local * devices)
      return jax.lax.psum_scatter(total, axis, scatter_dimension=0, tiled=True)

    body = lambda _, carry: (carry[0] + reset * carry[1], (1 - reset) * spread(edges, carry[1]))
    s, flow = jax.lax.fori_loop(0, steps, body, (jnp.zeros_like(flow), flow))
    return s + spread(index, flow)

  return run(sources, parts.edges, parts.index)[: parts.nodes]
