"""Gradients that are worked out chunk by chunk, on 1, 2, 4 .. devices: ChunkFlow's of sequences of any lengths, shared
out by cost, and SeCO's of long rows. The global batch is the same, whatever the number of devices."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments import timing
from experiments.chunkflow import arms, speed
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require_divides
from jaxlab.kernels import chunk_attention
from jaxlab.models import Transformer
from jaxlab.models.config import TransformerConfig, qwen3
from jaxlab.sequence import chunkflow, seco
from jaxlab.training import loop
from jaxlab.training.loop import GradientFn

METHODS = {"chunkflow": "ChunkFlow", "seco": "SeCO"}


def measure(spec, devices: list[int], console) -> dict[str, dict]:
  """{method: {number of devices: `compared`}}; of ChunkFlow also "balance", the cost of the rank that has most over the
  mean."""
  config = qwen3(**spec.shape.to_dict(), context=max(spec.chunkflow.longest, spec.seco.length))
  model = jax.jit(lambda key: loop.cast(Transformer(config, key), spec.dtype))(jax.random.key(0))
  result = {}
  for name, prepare in (("chunkflow", _chunkflow), ("seco", _seco)):
    console.say(f"gradients by {METHODS[name]}")
    gradient_fn, batches, more = prepare(spec, config, devices)
    result[name] = compared(gradient_fn, model, batches, spec.repetitions)
    for n, row in result[name].items():
      row |= more.get(n, {})
      told = f"{n} devices {row['tokens_per_second']:.4g} tokens/s, {row['bytes'] / 1e6:.4g} MB on each"
      console.say(f"{told}, {row['difference']:.2g} from one device's")
  return result


def _chunkflow(spec, config: TransformerConfig, devices: list[int]) -> tuple[GradientFn, dict, dict]:
  """(gradient, {number of devices: the batch}, {number of devices: its balance})."""
  s, cost = spec.chunkflow, operations(config, spec.dtype)
  sizes = speed.lengths(s.batch, s.longest, s.seed)
  ids = np.random.default_rng(0).integers(0, config.vocab_size, int(sizes.sum()) + 1)
  sequences, plan = speed.sequences(ids, sizes), chunkflow.pack(sizes, s.chunk)
  share = lambda n: chunkflow.materialize(plan, sequences, keep=s.keep, ranks=n, cost=cost)
  levels = {f"{n}": {"balance": balance(plan, n, s.keep, cost)} for n in devices}
  return chunkflow.gradient(), {n: share(n) for n in devices}, levels


def _seco(spec, config: TransformerConfig, devices: list[int]) -> tuple[GradientFn, dict, dict]:
  """As `_chunkflow`; rows of one length need no sharing out."""
  s = spec.seco
  require_divides("devices", devices[-1], "seco.rows", s.rows)
  ids = np.random.default_rng(1).integers(0, config.vocab_size, (s.rows, s.length + 1)).astype(np.int32)
  batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
  return seco.gradient(chunk=s.chunk), dict.fromkeys(devices, batch), {}


def operations(config: TransformerConfig, dtype: str) -> chunkflow.Cost:
  """Floating-point operations of a chunk's forward: matrix products, and scores and sums of values for every pair."""
  head = jax.ShapeDtypeStruct((config.head_dim,), dtype)
  return chunkflow.Cost(
    token=2.0 * config.matmul_parameters,
    pair=4.0 * config.depth * config.q_heads * config.head_dim,
    masked=not chunk_attention.preferred(head, head, None),
  )


def balance(plan: chunkflow.Plan, ranks: int, keep: int, cost: chunkflow.Cost) -> float:
  """The cost of the rank that has most, over the mean; 1 is even."""
  of_group = cost.groups(plan, keep)
  shares = chunkflow.balance(plan, ranks, keep=keep, cost=cost)
  return max(sum(of_group[g] for g in share) for share in shares) * ranks / sum(of_group)


def compared(gradient_fn: GradientFn, model: Transformer, batches: dict, repetitions: int) -> dict[str, dict]:
  """{number of devices: {"tokens_per_second", "milliseconds", "bytes" of a device, "difference"}}.

  The difference is that of the gradient from the first's: the norm over this one's norm, of the parameter where it is
  largest.
  """
  made = {f"{n}": _steady(gradient_fn, model, batch, n) for n, batch in batches.items()}
  timing.compile_all(made)
  # Copies: the arrays are donated to the next call. This call is the warm-up too.
  gradients = {n: [np.array(a, np.float32) for a in jax.tree.leaves(run())] for n, run in made.items()}
  times = timing.compare(made, repetitions=repetitions, warmup=0)
  tokens = {f"{n}": int((batch["targets"] >= 0).sum()) for n, batch in batches.items()}
  first, milliseconds = gradients[next(iter(made))], times.summary()
  return {
    n: {
      "tokens_per_second": tokens[n] / times.median(n),
      "milliseconds": milliseconds[n],
      "bytes": sum(run.memory().values()),
      "difference": max(map(arms.difference, gradients[n], first)),
    }
    for n, run in made.items()
  }


def _steady(gradient_fn: GradientFn, model: Transformer, batch: dict, devices: int) -> timing.Steady:
  mesh = meshes.make_mesh({"data": devices}, jax.devices()[:devices])
  placed = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
  return timing.Steady(
    functools.partial(_gradient, gradient_fn, mesh), placed, jax.device_put(batch, meshes.batch_sharding(mesh))
  )


def _gradient(gradient_fn: GradientFn, mesh, model: Transformer, batch: dict):
  """Whole on every device."""
  with meshes.using(mesh):
    return jax.tree.map(meshes.constrain, gradient_fn(model, batch, 0, None)[1])


def efficiency(rows: dict[str, dict], devices: str) -> float:
  """Tokens a second of so many devices, over as many times one device's."""
  return rows[devices]["tokens_per_second"] / int(devices) / rows["1"]["tokens_per_second"]


def difference(found: dict[str, dict]) -> float:
  """The largest of both methods and all numbers of devices."""
  return max(row["difference"] for rows in found.values() for row in rows.values())
