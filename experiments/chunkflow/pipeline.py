"""Stages that wait for each other, in simulated time at measured costs."""

import functools

import jax
import numpy as np

from experiments import timing
from experiments.chunkflow import arms, speed
from jaxlab.kernels import chunk_attention
from jaxlab.sequence.chunkflow import Cost, pack
from jaxlab.sequence.chunkflow_pipeline import Memory, choose, simulate

# The paper's drawing: four stages, sequences of 1, 1, 2 and 4 units; (groups, K, its bubble).
EXAMPLE = {
  "1F1B, equal lengths": ([[2.0]] * 4, 1, 0.4286),
  "1F1B, unequal lengths": ([[4.0], [1.0], [2.0], [1.0]], 1, 0.5714),
  "ChunkFlow, K = 1": ([[2.0, 2.0], [2.0], [2.0]], 1, 0.541),
  "ChunkFlow, K = 2": ([[2.0, 2.0], [2.0], [2.0]], 2, 0.478),
  "ChunkFlow, chunks too large": ([[4.0], [4.0]], 1, 0.60),
}


def example() -> dict:
  return {
    name: {"bubble": simulate(groups, stages=4, keep=keep).bubble, "paper": paper}
    for name, (groups, keep, paper) in EXAMPLE.items()
  }


def fitted(config, vocabulary: int) -> dict:
  """Seconds of a chunk's forward and backward as call + token * n + pair * n^2, by least squares over chunks of several
  sizes: {"cost": [call, token, pair], "error": largest relative}. Attention is causal: where a kernel skips what comes
  later, half of the n^2 pairs are met, and each costs twice what is found."""
  model, runs = speed.fresh(config, vocabulary), {}
  for size in config.sizes:
    arm = arms.arm("one", chunk=size)
    one = {name: np.zeros(size, np.int32) for name in ("inputs", "targets")}
    steps = [(kind, jax.device_put(arrays)) for kind, arrays in arm.prepare([one])]
    runs[steps[0][1]["inputs"].shape[1]] = functools.partial(arms.run, arm, model, steps, size)
  times = timing.compare(runs, repetitions=config.repetitions, warmup=1)
  points = [(size, times.median(size) / 3) for size in runs]
  sizes, seconds = np.array(points).T
  table = np.stack([np.ones_like(sizes), sizes, sizes**2], axis=1) / seconds[:, None]
  cost, *_ = np.linalg.lstsq(table, np.ones_like(seconds), rcond=None)
  cost = np.maximum(cost, 0.0)
  return {"cost": cost.tolist(), "error": float(np.abs(table @ cost - 1).max()), "points": points}


def simulated(config, fit: dict) -> dict:
  """Seconds of a global batch by stage-wise pipelines at the fitted costs: ChunkFlow's choice, and sequences whole."""
  p = config.pipeline
  head = jax.ShapeDtypeStruct((config.shape.head_dim,), config.dtype)
  call, token, square = (value / p.stages for value in fit["cost"])
  masked = not chunk_attention.preferred(head, head, None)
  cost = Cost(call, token, square if masked else 2 * square, masked)
  sizes = speed.lengths(config.batch, p.longest, config.seed).tolist()
  memory = Memory(0.0, 1.0, 0.0)  # in tokens of activations
  how = dict(cost=cost, memory=memory, limit=float("inf"), stages=p.stages)
  options = choose(sizes, chunks=p.chunks, keeps=p.keeps, **how)
  rows = {f"{limit}": [one._asdict() for one in options if one.chunk * one.keep <= limit] for limit in p.limits}
  whole = [[call + token * n + square * n * n] for n in sorted(sizes, reverse=True)]
  trace = simulate(whole, stages=p.stages)
  packed = [[cost.forward(p.longest, 0)] for _ in pack(sizes, p.longest).groups]
  return {
    "choices": rows,
    "whole": {"seconds": trace.makespan, "bubble": trace.bubble},
    "window": {"seconds": simulate(packed, stages=p.stages).makespan},
  }
