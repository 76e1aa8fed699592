"""Samples a second: all steps side by side, and a loop over steps that draws one sample after the other."""

import functools
import time

import jax
import jax.numpy as jnp

from experiments.maker import sampling, voting
from jaxlab.tasks import hanoi, maker


def measure(config, model, margin: int) -> dict:
  """One whole run, compiled before, and `loop_steps` steps of the sequential one."""
  run = functools.partial(voting.run, config, model, margin=margin)
  run(seeds=1, steps=1)
  whole = run(seeds=1)
  steps = config.loop_steps
  chosen = sampling.agent(config, model, **voting.SCHEMES[voting.MAIN], period=voting.steps_of(config))
  sample = sampling.step_sample(config.names, config.disks + 8)
  state = hanoi.state_before(jnp.zeros(1, jnp.int32), config.disks)
  follow = jax.jit(functools.partial(maker.follow, sample, steps=steps, margin=margin))
  jax.block_until_ready(follow(chosen, state, key=jax.random.key(0)))
  start = time.perf_counter()
  found = jax.block_until_ready(follow(chosen, state, key=jax.random.key(1)))
  seconds = time.perf_counter() - start
  drawn = int(found.votes.sum() + found.flagged.sum())
  return {
    "steps": whole["steps"],
    "margin": margin,
    "width": config.width,
    "success": whole["success"],
    "seconds": whole["seconds"],
    "rate": whole["samples"] * whole["steps"] / whole["seconds"],
    "loop_steps": steps,
    "loop_rate": drawn / seconds,
    "loop_seconds": seconds * whole["steps"] / steps,
  }
