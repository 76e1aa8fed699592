"""Red flags: a model that sometimes rambles before it answers, with and without a limit on the length of a sample."""

from pathlib import Path

import jax
import numpy as np

from experiments.maker import sampling, training, voting
from jaxlab.tasks import maker


def measure(config, workdir: Path, console) -> dict:
  """Trains the rambling model and draws two votes on each of some steps of a run.

  {"flagged", "unflagged"}: with and without the limit the error rate of a vote, the share of steps whose first two
  votes are both wrong, and the share of samples that were no votes.
  """
  f = config.flags
  with config.unlocked():
    trained = config.copy_and_resolve_references()
  trained.train.stages = (f.stage,)
  (model,) = training.stages(trained, workdir, console, rambling=f.rambling)
  short = config.disks + 8 + 3 * training.SHORT
  longest = config.disks + 8 + 3 * training.LONG
  found = {}
  for name, limit in (("flagged", (short + longest) // 2), ("unflagged", longest)):
    chosen = sampling.agent(
      config, model, **voting.SCHEMES["renamed, temperature 1"], period=voting.steps_of(config), longest=limit
    )
    found[name] = pairs(config, chosen, longest)
  return found


def pairs(config, chosen, tokens: int) -> dict:
  """Two votes each on steps of a run."""
  count = config.flags.steps
  sample = sampling.item_sample(config.disks, config.names, tokens)
  right = np.asarray(sampling.right(chosen, items=voting.steps_of(config), disks=config.disks))
  wrong, flagged, votes = [], 0, 0
  for number in range(2):
    found = maker.decide(
      sample,
      chosen,
      count,
      margin=1,
      key=jax.random.key(config.seed + 10 + number),
      width=config.flags.width,
      most=config.most_samples,
    )
    wrong.append((found.said != right[np.arange(count) % len(right)]).any(axis=1))
    flagged, votes = flagged + int(found.flagged.sum()), votes + int(found.votes.sum())
  return {
    "eps": float(np.mean(wrong)),
    "collisions": float((wrong[0] & wrong[1]).mean()),
    "share": flagged / (flagged + votes),
  }
