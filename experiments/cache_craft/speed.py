"""Time to the first token of a prompt of chunks, a share of which is computed again, beside a full prefill."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import timing
from jaxlab.models import Transformer, inference
from jaxlab.models.config import qwen3
from jaxlab.serving import partial_prefill
from jaxlab.serving.cache_craft_scores import preload_depth

FULL, TOLD = "full prefill", " with statistics"


def speed(config, console) -> dict:
  """{"cases": [{batch, tokens, milliseconds: by contestant, ratio and spread over the full prefill: by rows computed}],
  "load": milliseconds to copy all chunks' keys and values of a request to the device, "depth": layers, "preload":
  layers to load ahead, by rows}."""
  s = config.speed
  made = lambda: Transformer(qwen3(**config.shape), jax.random.key(config.seed))
  network = jax.jit(lambda: inference.take_apart(jax.tree.map(lambda a: a.astype(s.dtype), made())))()
  cases = [_case(config, network, batch) for batch in console.track("timing", list(s.batches))]
  load = _load(config, network)
  alone = cases[0]["milliseconds"]
  depth = config.shape.depth
  ahead = {name: preload_depth(depth, load / depth, ms / depth) for name, ms in alone.items() if name != FULL}
  return {"cases": cases, "load": load, "depth": depth, "preload": ahead}


def _case(config, network, batch: int) -> dict:
  s, rng = config.speed, np.random.default_rng(config.seed)
  n = 1 + s.chunks * s.size + s.question
  capacity = -(-n // 64) * 64
  tokens = rng.integers(0, config.shape.vocab_size, (batch, n)).astype(np.int32)
  groups = np.full((batch, capacity), -1, np.int32)
  groups[:, :n] = np.minimum((np.arange(n) + s.size - 1) // s.size, s.chunks + 1)
  cached = partial_prefill.empty(
    network.model.config, batch=batch, capacity=capacity, layers=len(network.blocks), dtype=network.model.dtype
  )

  def full(network, tokens):
    return inference.prefill(network, tokens, capacity=capacity)[0]

  def partly(network, tokens, positions, cached, groups, read, told: bool = False):
    prefill = partial_prefill.partial_prefill
    logits, _, seen = prefill(network, tokens, positions, cached, groups, count=s.chunks + 2, read=read)
    return (logits, seen) if told else logits

  runs = {FULL: timing.Steady(full, network, jnp.asarray(tokens))}
  for count in s.rows:
    again = np.sort(rng.permutation(s.chunks * s.size)[: count - s.question]) + 1
    place = np.concatenate([again, np.arange(n - s.question, n)])
    positions = jnp.broadcast_to(jnp.asarray(place, jnp.int32), (batch, count))
    read = jnp.full((batch, 1), count - 1)
    how = (jnp.asarray(tokens[:, place]), positions, cached, jnp.asarray(groups), read)
    runs[f"{count}"] = timing.Steady(partly, network, *how)
    if count == main_rows(config):
      runs[f"{count}{TOLD}"] = timing.Steady(functools.partial(partly, told=True), network, *how)
  times = timing.compare(runs, repetitions=s.repetitions)
  ratio = lambda name: times.speedup(FULL, over=name)
  return {
    "batch": batch,
    "tokens": n,
    "milliseconds": {name: times.median(name) * 1e3 for name in runs},
    "ratio": {name: ratio(name)[0] for name in runs if name != FULL},
    "spread": {name: ratio(name)[1] for name in runs if name != FULL},
  }


def main_rows(config) -> int:
  """The largest number of rows that computes no more again than config.share."""
  return max(
    (rows for rows in config.speed.rows if share_of(config, rows) <= config.share), default=min(config.speed.rows)
  )


def share_of(config, rows: int) -> float:
  """Of the chunks' tokens, computed again in a pass of so many rows."""
  s = config.speed
  return (rows - s.question) / (s.chunks * s.size)


def _load(config, network) -> float:
  """Milliseconds from pinned memory of the host to the device, of one request."""
  s, c = config.speed, network.model.config
  place = lambda kind: jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
  shape = (2, len(network.blocks), s.size, c.kv_heads, c.head_dim)
  chunks = [jax.device_put(jnp.zeros(shape, network.model.dtype), place("pinned_host")) for _ in range(s.chunks)]
  jax.block_until_ready(chunks)
  load, seconds = functools.partial(jax.device_put, chunks, place("device")), []
  for _ in range(s.repetitions + 1):
    start = time.perf_counter()
    jax.block_until_ready(load())
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds[1:])) * 1e3
