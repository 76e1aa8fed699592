"""A long prompt read, and a token decoded behind it, over a `sequence` axis beside one device's paged cache."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments import timing
from jaxlab.core import mesh as meshes
from jaxlab.models import Transformer, inference, paged, paged_sharded
from jaxlab.models.config import qwen3
from jaxlab.models.generate import Decoder
from jaxlab.training import loop


def measure(spec, devices: list[int], console) -> dict[str, dict]:
  """{tokens of the prompt: {number of devices: `compared`}}."""
  config = qwen3(**spec.shape.to_dict(), context=max(spec.prompts) + spec.room)
  make = lambda key: inference.take_apart(loop.cast(Transformer(config, key), spec.dtype))
  network = jax.jit(make)(jax.random.key(0))
  result = {}
  for tokens in spec.prompts:
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (spec.rows, tokens)).astype(np.int32)
    result[f"{tokens}"] = compared(spec, network, ids, devices)
    told = (
      f"{n}: {row['prefill']['median']:.4g} ms, {row['bytes'] / 1e6:.4g} MB" for n, row in result[f"{tokens}"].items()
    )
    console.say(f"a prompt of {tokens} on {', '.join(told)}")
  return result


def decoder(spec, mesh) -> Decoder:
  """Of a mesh; of one device, the one to beat."""
  how = dict(chunk=spec.chunk, page=spec.page)
  return paged.decoder(**how) if mesh.size == 1 else paged_sharded.decoder(mesh, **how)


def compared(spec, network, ids, devices: list[int]) -> dict[str, dict]:
  """{number of devices: {"prefill" and "decode": milliseconds, "bytes" of a device while it reads the prompt, "error":
  the largest distance of logits from one device's, over the largest of these}}."""
  readers, steppers, logits = {}, {}, {}
  for n in devices:
    mesh = meshes.make_mesh({"sequence": n}, jax.devices()[:n])
    how = decoder(spec, mesh)
    placed = jax.device_put(network, NamedSharding(mesh, PartitionSpec()))
    # Traced once, for the state that steps go on from and for the clock.
    prefill = jax.jit(functools.partial(how.prefill, capacity=ids.shape[1] + spec.room))
    read, state = prefill(placed, ids)
    readers[f"{n}"] = timing.Steady(lambda network, ids, prefill=prefill: prefill(network, ids)[0], placed, ids)
    steppers[f"{n}"] = timing.Steady(how.step, placed, ids[:, :1], carry=state)
    # A copy: the array is donated to the next call.
    logits[f"{n}"] = np.concatenate([np.asarray(read), np.array(steppers[f"{n}"]())], axis=1)
  prefills = timing.compare(readers, repetitions=spec.repetitions, warmup=1).summary()
  inner = (spec.room - 4) // (spec.repetitions + 1)
  steps = timing.compare(steppers, repetitions=spec.repetitions, warmup=3, inner=inner).summary()
  one = logits[f"{devices[0]}"]
  return {
    name: {
      "prefill": prefills[name],
      "decode": steps[name],
      "bytes": sum(readers[name].memory().values()),
      "error": float(np.abs(logits[name] - one).max() / np.abs(one).max()),
    }
    for name in logits
  }


def speedup(rows: dict[str, dict], name: str, kind: str) -> float:
  """How many times as fast as one device."""
  return rows["1"][kind]["median"] / rows[name][kind]["median"]


def grown(found: dict[str, dict], name: str) -> float:
  """Bytes of a device for each token that the longest prompt has more than the shortest."""
  short, long = min(found, key=int), max(found, key=int)
  return (found[long][name]["bytes"] - found[short][name]["bytes"]) / (int(long) - int(short))
