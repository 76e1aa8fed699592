"""Latency of one token and of a prompt: SNLP's suffix over a `layer` axis beside one device and tensor parallelism."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments import timing
from experiments.snlp.speed import random_model
from jaxlab.core import mesh as meshes
from jaxlab.depth import snlp_inference, snlp_sharded
from jaxlab.models.attention import Cache

SEQUENTIAL = "sequential"
_ROW = 20


def layered(devices: int, iterations: int) -> str:
  return f"layer {devices} K{iterations}"


def tensor(devices: int) -> str:
  return f"tensor {devices}"


def measure(spec, devices: list[int], console) -> dict[str, dict]:
  """{"decode", "prefill"}: {"milliseconds": {contestant: times}, "error": `error`}.

  Contestants: the network in sequence; the last `layers` of it in K steps, on one device by its batched form; plain
  blocks under tensor parallelism.
  """
  model = random_model(spec.shape.to_dict(), spec.dtype)
  prompt = jax.random.randint(jax.random.key(1), (1, spec.tokens), 0, model.config.vocab_size)
  size = (model.depth, 1, spec.context + spec.room, model.config.kv_heads, model.config.head_dim)
  keys, values = (jax.random.normal(jax.random.key(i), size, model.dtype) for i in (2, 3))
  previous = jnp.zeros((1, 1, model.config.width), model.dtype)
  cache = Cache(keys, values, jnp.int32(spec.context), previous)
  result = {}
  for kind, iterations, inputs in (
    ("decode", spec.iterations, (prompt[:, :1], cache)),
    ("prefill", spec.iterations[:1], (prompt, None)),
  ):
    made = contestants(model, spec.layers, iterations, devices, *inputs)
    times, first = timed(made, spec.repetitions)
    console.say(f"{kind}: " + ", ".join(f"{name} {row['median']:.3f} ms" for name, row in times.items()))
    result[kind] = {"milliseconds": times, "error": error(first)}
  return result


def contestants(model, layers: int, iterations, devices: list[int], tokens, cache: Cache | None) -> dict:
  """{name: `timing.Steady`} of steps onto the cache, or of whole forwards without one."""

  def steady(step, tree, state):
    if state is None:
      return timing.Steady(lambda tree, tokens: step(tree, tokens)[0], tree, tokens)
    return timing.Steady(step, tree, tokens, carry=state)

  state_of = lambda network: None if cache is None else snlp_inference.from_cache(network, cache)
  plain, split = snlp_inference.split(model), snlp_inference.split(model, layers)
  made = {SEQUENTIAL: steady(snlp_inference.step, plain, state_of(plain))}
  for n in devices:
    mesh = meshes.make_mesh({"tensor": n}, jax.devices()[:n])
    made[tensor(n)] = steady(
      functools.partial(_tensor_step, mesh), jax.device_put(model, meshes.shardings(model, mesh)), _spread(cache, mesh)
    )
    for k in iterations:
      if n == 1:
        one = functools.partial(snlp_inference.step, iterations=k, cache_kv="last_iteration")
        made[layered(n, k)] = steady(one, split, state_of(split))
        continue
      mesh = jax.make_mesh((n,), (snlp_sharded.AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
      many = functools.partial(snlp_sharded.step, mesh=mesh, iterations=k)
      state = None if cache is None else snlp_sharded.place(state_of(split), mesh)
      made[layered(n, k)] = steady(many, snlp_sharded.place(split, mesh), state)
  return made


def _tensor_step(mesh, model, tokens, cache: Cache | None = None):
  with meshes.using(mesh):
    if cache is None:
      return meshes.constrain(model(tokens, unroll=True)), None
    logits, cache = model.extend(tokens, cache, unroll=True)
    return meshes.constrain(logits), _spread(cache, mesh)


def _spread(cache: Cache | None, mesh):
  """The cache with its heads over `tensor`."""
  heads = meshes.spec((None, None, None, "heads", None), cache.keys.shape, mesh) if cache else None
  where = lambda a: NamedSharding(mesh, heads if a.ndim == 5 else PartitionSpec())
  place = (
    jax.device_put if cache is None or not isinstance(cache.keys, jax.core.Tracer) else jax.lax.with_sharding_constraint
  )
  return jax.tree.map(lambda a: place(a, where(a)), cache)


def timed(made: dict, repetitions: int) -> tuple[dict, dict]:
  """(milliseconds of calls in a row, by contestant; the logits of the first call of each)."""
  timing.compile_all(made)
  first = {name: np.asarray(run(), np.float32) for name, run in made.items()}
  return timing.compare(made, repetitions=repetitions, inner=_ROW).summary(), first


def error(first: dict[str, np.ndarray]) -> float:
  """The largest distance of logits on several devices from those on one, over the largest of these."""
  worst = 0.0
  for name, logits in first.items():
    kind, *rest = name.split()
    one = first[SEQUENTIAL] if kind != "layer" else first[layered(1, int(rest[1][1:]))]
    worst = max(worst, float(np.abs(logits - one).max() / np.abs(one).max()))
  return worst


def fit(result: dict, spec) -> dict:
  """The cost model of decoding, milliseconds, by least squares of relative errors:

    SNLP    t = floor + K n / P b + K m [P > 1]       K iterations over n layers on P devices
    tensor  t = tensor_floor + L / P b + 2 L m [P > 1]

  b: reading a layer's weights, m: a message; each program's floor holds everything that more devices do not change.
  """
  rows = {}
  for name in result["milliseconds"]:
    kind, *rest = name.split()
    if kind != SEQUENTIAL:
      devices, several = int(rest[0]), int(rest[0]) > 1
      k = int(rest[1][1:]) if kind == "layer" else 0
      snlp = (1.0, 0.0, k * spec.layers / devices, k * several)
      rows[name] = snlp if k else (0.0, 1.0, spec.shape.depth / devices, 2 * spec.shape.depth * several)
  a, measured = np.array(list(rows.values())), np.array([result["milliseconds"][name]["median"] for name in rows])
  solution, *_ = np.linalg.lstsq(a / measured[:, None], np.ones(len(rows)), rcond=None)
  predicted = a @ solution
  return {
    **dict(zip(("floor", "tensor_floor", "layer", "message"), solution.tolist(), strict=True)),
    "predicted": dict(zip(rows, predicted.tolist(), strict=True)),
    "worst": float(np.abs(predicted / measured - 1).max()),
  }
