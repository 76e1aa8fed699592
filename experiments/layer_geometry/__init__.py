"""Layer geometry: every layer's update in a tokenwise part and the rest, nulls, interventions, and what they cost.

With config.model = "hf:DIR" or a name that the hub knows nothing is trained: only that checkpoint is measured, an H-Net
stack by stack. A module here is a part of the run; every model and every split of the documents is kept once it is
measured.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, results
from experiments.layer_geometry import decomposition, dependence, interventions, speed, subjects
from experiments.layer_geometry.decomposition import CLASSES, MAIN
from experiments.results import Claim
from jaxlab.core.checks import require, require_choice
from jaxlab.depth.layer_geometry_hnet import StackNetwork, stacks
from jaxlab.models import HNet

# The relative errors of a map that learned nothing are all 1, and have no rank correlation.
UNDEFINED = ("models.*.across_layers.*", "models.*.spearman_relative.*")


def measure(config, workdir: Path, cache: Path, console) -> dict:
  for name in config.intervene.classes:
    require_choice("an entry of config.intervene.classes", name, CLASSES)
  require(MAIN in config.intervene.classes, f"config.intervene.classes lacks {MAIN!r}, the class of the claims")
  models = {}
  for name, load in subjects.load(config, workdir, cache, console).items():
    split = lambda seed, name=name, load=load: measure_split(config, *load(), name, seed, console)
    kept = lambda seed: f"{name}.{seed}".replace(" ", "").replace(",", ".")  # noqa: B023 (used at once)
    measured = [results.part(workdir, kept(seed), functools.partial(split, seed)) for seed in range(config.splits)]
    models[name] = jax.tree.map(lambda *values: float(f"{np.mean(values):.4g}"), *measured) | {
      "by_split": {
        "beyond_nulls": [decomposition.share(m, decomposition.beyond_nulls) for m in measured],
        "association": [interventions.median(m) for m in measured],
      }
    }
  console.say("timing")
  timed = {"fits": speed.time_fits, "interventions": speed.time_interventions}
  cost = {name: results.part(workdir, f"speed.{name}", functools.partial(f, config.bench)) for name, f in timed.items()}
  return {"models": models, "speed": cost}


def measure_split(config, model, text, name: str, seed: int, console) -> dict:
  """Everything about one model on one split of the documents, a list over layers each."""
  f, title = config.fit, f"{name}, split {seed}"
  rows = subjects.split_rows(text.split(config.data.split), config, seed)
  if isinstance(model, HNet):  # the name ends with the stack's
    model = stacks(model, *(jnp.asarray(tokens) for tokens, _ in rows.values()))[name.rpartition(", ")[2]]
  traces, ids = decomposition.collect(model, rows)
  tokens, documents = jnp.asarray(rows["evaluation"][0]), np.repeat(rows["evaluation"][1], ids["evaluation"].shape[1])
  console.say(
    f"{title}: {model.depth} layers, {ids['reference'].size} reference and {len(documents)} evaluation tokens"
  )
  mlps = decomposition.fit_mlps(traces["reference"], jax.random.key(config.seed), steps=f.steps, batch=f.batch)
  options = dict(k=f.neighbours, rank=f.rank, ridge=f.ridge, vocab=model.config.vocab_size)
  if jax.default_backend() != "cpu":
    first = decomposition.gather(traces, ids, 0)
    also = functools.partial(interventions.intervene, model, tokens, first[0]["y"], layer=0)
    decomposition.compile_side_by_side(*first, mlps, options, also)
  layers = []
  for layer in console.track(title, range(model.depth)):
    query, reference = decomposition.gather(traces, ids, layer)
    outputs = decomposition.predict(query, reference, decomposition.of_layer(mlps["ours"], layer), **options)
    key = jax.random.fold_in(jax.random.key(config.seed), layer)
    described, noise = decomposition.describe(query, reference, outputs, mlps, layer, key, documents, f, config.seed)
    lens = decomposition.lens(model, tokens, traces["reference"], traces["evaluation"], layer, f.ridge)
    described["prior"]["affine_lens_kl"] = float(lens.mean())
    intervene = functools.partial(interventions.intervene, model, tokens, layer=layer)
    layers.append(described | interventions.describe(config, intervene, query, outputs, noise, documents))
  stacked = jax.tree.map(lambda *values: list(values), *layers)
  return stacked | {
    "parameters": sum(a.size for a in jax.tree.leaves(model.stack if isinstance(model, StackNetwork) else model)),
    "across_layers": {name: interventions.across(row) for name, row in stacked["interventions"].items()},
    "suffix": dependence.measure(model, tokens),
  }


def trained(models: dict) -> dict:
  """The models of the claims: all but the one that was not trained."""
  return {name: model for name, model in models.items() if not name.endswith(subjects.UNTRAINED)}


def claims(config, metrics: dict) -> list[Claim]:
  """The paper's claims and its reproduction's nulls, each as the worst of the trained models."""
  models = metrics["models"]
  untrained = next((m for name, m in models.items() if name.endswith(subjects.UNTRAINED)), None)
  return [
    *decomposition.claims(trained(models), untrained),
    *interventions.claims(trained(models), untrained),
    *dependence.claims(models),
    *speed.claims(metrics["speed"]),
  ]


def finding(config, metrics: dict) -> str:
  models = trained(metrics["models"])
  count = sum(len(m["nulls"]["gap"]) for m in models.values())
  over = lambda holds: sum(round(decomposition.share(m, holds) * len(m["nulls"]["gap"])) for m in models.values())
  medians = [interventions.median(m) for m in models.values()]
  noise = [float(np.median(interventions.over_noise(m))) for m in models.values()]
  between = lambda values: f"{min(values):.2f}" + (f" to {max(values):.2f}" if len(values) > 1 else "")
  others = [interventions.median(m) for name, m in metrics["models"].items() if name not in models]
  untrained = f"; {others[0]:.2f} untrained" if others else ""
  return (
    f"In {over(decomposition.separated)} of {count} layers the update follows what a map of each token by itself "
    f"predicts and what is left does not, in {over(decomposition.beyond_nulls)} by more than R^2 and an isotropic "
    "remainder explain; the size of what is left has a rank correlation with the harm of removing it of "
    f"{between(medians)} (paper 0.7 to 0.95{untrained}), and removing it hurts {between(noise)} times as much as noise "
    "of its size."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  models = metrics["models"]
  return {
    draw_summary(models, workdir): "Alignment of every layer's update with its tokenwise part against what R^2 alone "
    "gives, and rank correlation of the rest's size with the harm of removing it",
    **decomposition.draw(models, workdir),
    **interventions.draw(models, workdir),
    **speed.draw(metrics["speed"], workdir),
  }


def draw_summary(models: dict, workdir: Path) -> str:
  figure, (left, right) = figures.subplots(2)
  for i, (name, model) in enumerate(models.items()):
    style = decomposition.style(i, name)
    left.plot(model["nulls"]["curve"], model["classes"][MAIN]["cos_ut"], **style | {"ls": "none"})
    right.plot(decomposition.depths(model), interventions.correlations(model), label=name, **style)
  left.axline((0, 0), slope=1, color="black", lw=0.8, ls=":")
  left.set(xlabel="what R² alone gives", ylabel="cos(update, tokenwise part)", title="Alignment, a point a layer")
  right.axhline(0.7, color="black", lw=0.8, ls=":")
  right.set(xlabel="layer, as a share of the depth", ylabel="Spearman of ‖r‖ and KL", title="Is the rest what matters?")
  right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
  return figures.save(figure, workdir, "summary")
