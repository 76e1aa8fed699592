"""Adapters of low rank beside the maps of pruned networks: what a little tuning gives back."""

from pathlib import Path

import jax

from experiments.compressing import Subject, perplexity, stored
from experiments.long_context import opened
from experiments.lord.tuning import tuned
from experiments.struprune import quality
from jaxlab.data import packing
from jaxlab.training import lora
from jaxlab.weights import structured


def measure(config, subject: Subject, *, cache: Path) -> dict[str, dict]:
  """{method: perplexity {before, after} config.tuning.steps of adapters} at config.budget.

  Layers may differ: while adapters are tuned, what fills them up takes part, as zeros.
  """
  t = config.tuning
  _, _, text = opened(config, str(subject.folder), cache)
  tokens = text.split(config.data.calibration)
  make, found = quality.makers(config, subject), {}
  for name in ("struprune", "llm_pruner"):
    small = make[name](config.budget)
    rows = packing.batches(packing.training_rows(tokens, row=t.length, seed=config.seed + 1), t.batch)
    adapters = tuned(small, iter(rows), t, jax.random.key(config.seed), made=structured.zeroed)
    after = structured.zeroed(lora.merge(small, adapters))
    found[name] = dict(before=perplexity(subject, stored(small)), after=perplexity(subject, stored(after)))
  return found
