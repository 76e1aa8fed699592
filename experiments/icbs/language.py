"""What language models lose at a density: iCBS, its parts left out, and one-shot pruning."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from experiments.compressing import Subject, made_rows, perplexity, sizes
from jaxlab.core.checks import require
from jaxlab.models import Transformer
from jaxlab.weights import icbs, pruning
from jaxlab.weights.per_sample import Language, by_layer

# iCBS with one part in another way.
VARIANTS = {
  "icbs": {},
  "icbs_diagonal": dict(hessian="diagonal"),
  "icbs_released": dict(released_cutoff=True),
  "icbs_random": dict(select="random"),
  "icbs_no_gradient": dict(gradient=0.0),
  "icbs_no_tabu": dict(tabu=0.0),
  "icbs_no_fixing": dict(fix_prune=0.0, fix_keep=0.0),
}
_ONE_SHOT = {"wanda": "wanda", "wanda_more": "wanda", "sparsegpt": "sparsegpt", "magnitude": "magnitude",
             "gradient": "gradient", "random": "random"}  # fmt: skip


def batches(rows: np.ndarray, batch: int, seed: int) -> Iterator[jnp.ndarray]:
  """Endless batches of rows, each row once before any comes again."""
  require(len(rows) >= batch, f"{len(rows)} rows of text do not fill a batch of {batch}")
  rng = np.random.default_rng(seed)
  while True:
    order = rng.permutation(len(rows))
    for i in range(0, len(rows) - batch + 1, batch):
      yield jnp.asarray(rows[order[i : i + batch]])


def settings(fields, **changes) -> icbs.Settings:
  """Of a config's fields, those that `icbs.Settings` has."""
  names = {field.name for field in dataclasses.fields(icbs.Settings)}
  return icbs.Settings(**{name: value for name, value in fields.items() if name in names} | changes)


def one_shot(config, subject: Subject, how: str, density: float) -> pruning.Pruned:
  """Calibrated on the first rows, or, as `wanda_more`, on all that iCBS reads."""
  size = sizes(config.text, subject)
  rows = subject.calibration if how == "wanda_more" else subject.calibration[: size.one_shot]
  return pruning.prune(subject.model, rows, _ONE_SHOT[how], density=density, batch=size.batch, seed=config.seed)


def improved(config, subject: Subject, begun: pruning.Pruned, density: float, how: str = "icbs", **more) -> icbs.Found:
  """iCBS from a start on."""
  fields = sizes(config.language, subject)
  return icbs.prune(
    Language(),
    subject.model,
    by_layer(begun.scores),
    batches(subject.calibration, fields.batch, config.seed),
    density=density,
    masks=by_layer(begun.masks),
    settings=settings(fields, **VARIANTS[how]),
    seed=config.seed,
    **more,
  )


def frontier(config, subject: Subject, *, console) -> dict:
  """Rows of `compressing.row` by method and density; of iCBS also perplexities by epoch and every step.

  Returns:
    {"rows", "curves": {density: [{epoch, covered, perplexity}]}, "steps": {density: [[predicted, measured], ...]}}.
  """
  begun = functools.cache(functools.partial(one_shot, config, subject))
  curves, steps = {}, {}

  def watched(density: float) -> Transformer:
    curve = []

    def watch(epoch, params, covered):
      curve.append(dict(epoch=epoch, covered=covered, perplexity=perplexity(subject, params)))
      console.say(f"  icbs {density:g}, epoch {epoch}: perplexity {curve[-1]['perplexity']:.4g}, {covered:.2%} seen")

    found = improved(config, subject, begun("wanda", density), density, measured=True, watch=watch)
    curves[f"{density:g}"] = curve
    steps[f"{density:g}"] = [[one["predicted"], one["after"] - one["before"]] for one in found.steps if "after" in one]
    return found.params

  def made(how: str) -> Callable[[float], Transformer]:
    def make(density):
      if how in _ONE_SHOT:
        model = begun(how, density).model
      elif how == "icbs":
        model = watched(density)
      else:
        model = improved(config, subject, begun("wanda", density), density, how).params
      return pruning.stored_sparse(model)

    return make

  rows = made_rows(
    subject, sizes(config.methods, subject), {how: made(how) for how in (*_ONE_SHOT, *VARIANTS)}, console
  )
  return {"rows": rows, "curves": curves, "steps": steps}


def chosen(config, subject: Subject) -> Transformer:
  """iCBS at the density of config.budget, as it is stored."""
  begun = one_shot(config, subject, "wanda", config.budget)
  return pruning.stored_sparse(improved(config, subject, begun, config.budget).params)


def rank_correlation(pairs: list[list[float]]) -> float:
  """Spearman's, of predicted and measured changes; 0 where one of them never changes."""
  ranks = [np.argsort(np.argsort(one)) for one in np.array(pairs).T]
  found = np.corrcoef(ranks)[0, 1] if len(pairs) > 1 else 0.0
  return 0.0 if math.isnan(found) else float(found)
