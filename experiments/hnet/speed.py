"""Seconds of a training step, all arms of bytes in one process."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import timing
from experiments.hnet.arms import arm_of, fresh
from jaxlab.sequence import hnet
from jaxlab.training import loop

NAMES = ("mamba", "transformer", "one", "two")


def measure(config) -> dict:
  """{milliseconds, over (time over isotropic Mamba-2's), spread of it, by arm}: loss and gradient of random bytes."""
  t, batch = config.train, config.speed.batch
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, t.length + 1)), jnp.int32)
  contestants = {}
  for name in NAMES:
    arm = arm_of(config, name)
    loss = hnet.loss_of(arm.config, t.length, slack=t.slack, remat=t.remat)
    model = loop.cast(fresh(arm.config, 0), t.dtype)

    def step(model, inputs, targets, loss=loss):
      return jax.grad(lambda model: loss(model, {"inputs": inputs, "targets": targets}, 0, None)[0])(model)

    contestants[name] = timing.Steady(step, model, ids[:, :-1], ids[:, 1:])
  times = timing.compare(contestants, repetitions=config.speed.repetitions)
  over = {name: times.speedup("mamba", over=name) for name in NAMES}
  return {
    "milliseconds": {name: 1e3 * times.median(name) for name in NAMES},
    "over": {name: ratio for name, (ratio, _) in over.items()},
    "spread": {name: list(spread) for name, (_, spread) in over.items()},
  }
