"""SNLP: train a model with and without the regulariser, run both layer-parallel, report quality and speed.

With config.model = "hf:DIR" or "smollm2" nothing is trained: the method is run on that checkpoint as it is. A module
here is a part of the run; `config.parts` says which are measured.
"""

import functools
from pathlib import Path

from experiments import results
from experiments.results import Claim
from experiments.snlp import (
  competitors,
  convergence,
  finetuning,
  hyper_connections,
  memory,
  quality,
  speculation,
  speed,
)
from experiments.snlp.settings import PLAIN, REGULARISED, parse, refit_config
from experiments.snlp.training import check_suffixes, save_pair, train_models
from experiments.text import PRESETS, checkpoint_folder, load_text, model_config
from jaxlab.models import hub
from jaxlab.training import loop

TRAINING_PARTS = ("memory", "hcn", "competitors", "finetuning")  # not for a given checkpoint


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Measures the parts of config.parts; a part that this workdir holds already is not measured again."""
  folder = checkpoint_folder(config)
  parts = config.parts
  if folder:
    config = fitted(config, hub.read_config(folder)[0].depth)
    parts = [name for name in parts if name not in TRAINING_PARTS]
  pair = None if folder or not config.pair else hub.find(config.pair)
  for text in (*config.snlp.settings, *config.snlp.cached):
    parse(text)

  @functools.cache
  def prepared():
    text = load_text(config, cache, given=folder or (pair and pair / PLAIN))
    if folder:
      models = {PLAIN: hub.load(folder)}
    elif pair:
      console.say(f"the pair in {pair}; --config.pair= trains one instead")
      models = {name: hub.load(pair / name) for name in (PLAIN, REGULARISED)}
    else:
      shape = model_config(config, text.bpe.get_vocab_size(), context=config.train.length)
      check_suffixes(config, shape.depth)
      models = train_models(config, text, shape, {PLAIN: None, REGULARISED: config.reg}, workdir, console)
      save_pair(config, text, models, workdir / "pair")
    check_suffixes(config, next(iter(models.values())).depth)
    return text, {name: loop.cast(model, config.train.dtype) for name, model in models.items()}

  measures = {
    "quality": lambda: quality.measure(config, *prepared(), console),
    "convergence": lambda: convergence.measure(config, *prepared(), console),
    "speculation": lambda: speculation.measure(config, *prepared(), console),
    "hcn": lambda: hyper_connections.measure(config, workdir, cache, console),
    "competitors": lambda: competitors.measure(config, *prepared(), workdir, console),
    "finetuning": lambda: finetuning.measure(config, *prepared(), workdir, console),
    "memory": lambda: memory.measure(config, load_text(config, cache)),
  }
  metrics = {name: results.part(workdir, name, measures[name]) for name in parts if name != "speed"}
  if "speed" in parts:
    last = lambda: next(reversed(prepared()[1].values()))
    metrics["speed"] = speed.measure(config.bench, last, workdir, console)
    metrics["latency_model"] = speed.latency_fits(metrics["speed"]["cases"])
  return metrics


def fitted(config, depth: int):
  """The config with its settings on the same shares of a given checkpoint's layers."""
  return config if config.model in PRESETS else refit_config(config, depth)


def claims(config, metrics: dict) -> list[Claim]:
  made = []
  if "quality" in metrics:
    made += quality.claims(metrics["quality"])
    made += quality.exactness(metrics["quality"]) if "convergence" in metrics else []
  made += speed_claims(config, metrics)
  parts = dict(
    speculation=speculation, memory=memory, competitors=competitors, hcn=hyper_connections, finetuning=finetuning,
    convergence=convergence,
  )  # fmt: skip
  return made + [claim for name, part in parts.items() if name in metrics for claim in part.claims(metrics[name])]


def speed_claims(config, metrics: dict) -> list[Claim]:
  if "speed" not in metrics:
    return []
  cases = metrics["speed"]["cases"]
  return speed.claims(fitted(config, next(iter(cases.values()))["depth"]).bench, cases)


def finding(config, metrics: dict) -> str:
  if "quality" not in metrics:
    return f"Measured: {', '.join(metrics)}."
  measured = metrics["quality"]
  main, few = quality.main_model(measured), quality.by_steps(measured)
  k = min(few)
  lost = lambda name: f"{quality.lost(measured, name, few[k]):+.3g} %"
  text = (
    f"{parse(few[k])['layers']} of {measured[main]['depth']} layers in one step: perplexity {lost(main)} (paper +17 %"
  )
  text += f"; {lost(PLAIN)} without its training term)" if main != PLAIN else " when trained for it)"
  for claim in speed_claims(config, metrics)[:1]:
    text += f"; {claim.ours:.2g}x the sequential speed (paper 2.58x)"
  return text + "."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  files = {}
  for name, part in dict(quality=quality, convergence=convergence, competitors=competitors).items():
    files |= part.draw(metrics[name], workdir) if name in metrics else {}
  if "speed" in metrics:
    cases = metrics["speed"]["cases"]
    shown = tuple(fitted(config, next(iter(cases.values()))["depth"]).bench.shown)
    files |= speed.draw(metrics["speed"], metrics["latency_model"], shown, workdir)
    files |= speed.frontier(metrics, workdir) if "quality" in metrics else {}
  return files
