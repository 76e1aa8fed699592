"""What removing one atomic expert really adds to the loss, beside what the scores say."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from experiments.compressing import Subject
from experiments.heapr import baselines
from jaxlab.models import Transformer
from jaxlab.training.losses import token_losses
from jaxlab.weights import heapr


def measure(config, subject: Subject) -> dict:
  """{added: losses in nats that random single removals add to the calibration's first rows, sorted; correlation:
  {score: Spearman's with them, of the mean over an expert's tokens and of the sum ("... by use")}, predicted: of
  HEAPr's sums}."""
  r, model = config.removals, subject.model
  rows = subject.calibration[: r.rows]
  found = heapr.statistics(model, rows, batch=len(rows))
  rng = np.random.default_rng(config.seed)
  shape = found.energy.shape
  used = np.flatnonzero(np.repeat(np.asarray(found.count) > 0, shape[-1]))
  picked = rng.choice(used, min(r.count, len(used)), replace=False)
  places = np.stack(np.unravel_index(picked, shape), axis=-1)
  base = _losses(model, rows)
  added = np.array([float(_added(model, rows, base, jnp.asarray(place))) for place in places])
  ways = baselines.variants(found, model.blocks.mlp, config.seed)
  scores = {"heapr": heapr.scores(found)} | {
    name: next(iter(ways[name].values()))[0] for name in ("fisher", "identity")
  }
  scores |= {name: next(iter(ways[name].values()))[0] for name in ("magnitude", "wanda")}
  times = np.asarray(found.count)[..., None]
  for name in ("heapr", "fisher", "identity"):
    scores[f"{name} by use"] = np.asarray(scores[name]) * times
  at = lambda a: np.asarray(a)[tuple(places.T)]
  order = np.argsort(added)
  return {
    "added": added[order].tolist(),
    "predicted": at(scores["heapr by use"])[order].tolist(),
    "correlation": {name: float(spearmanr(at(score), added)[0]) for name, score in scores.items()},
    "magnitudes": {name: float(spearmanr(at(score), np.abs(added))[0]) for name, score in scores.items()},
  }


@jax.jit
def _losses(model: Transformer, rows):
  return token_losses(model, model.hidden(rows[:, :-1]), rows[:, 1:])


@jax.jit
def _added(model: Transformer, rows, base, place):
  """The sum over tokens of the difference, which is far smaller than the losses."""
  layer, expert, neuron = place
  less = jax.tree.map(lambda a: a, model)
  less.blocks = jax.tree.map(lambda a: a, model.blocks)
  less.blocks.mlp.down[...] = less.blocks.mlp.down[...].at[layer, expert, neuron].set(0)
  return (_losses(less, rows) - base).sum()
