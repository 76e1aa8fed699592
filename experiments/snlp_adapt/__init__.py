"""Adapting a pretrained checkpoint to SNLP: what minutes of training buy, and what they cost.

The original is distilled through the solver (`jaxlab.depth.snlp_adapt`) and compared with itself untouched, with the
paper's regulariser in continued training and with that training alone. A module here is a part of the run.
"""

import functools
import math
from pathlib import Path

import jax

from experiments import results, timing
from experiments.results import Claim
from experiments.snlp import speculation, speed
from experiments.snlp.settings import parse, refit
from experiments.snlp_adapt import adapting, choices, quality
from experiments.snlp_adapt.adapting import CONTINUED, DISTILLED, REGULARISED
from experiments.snlp_adapt.drawing import frontier
from experiments.snlp_adapt.quality import SEQUENTIAL
from experiments.text import Text, load_text
from jaxlab.core.checks import require
from jaxlab.models import hub
from jaxlab.training import loop

UNTOUCHED = "untouched"
GIVEN, UNSEEN = "given", "unseen"
SPEED, SPECULATION, CHOICES = "speed", "speculation", "choices"


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Adapts config.model by every method of config.methods and measures; what this workdir holds is not done again."""
  folder = hub.find(config.model.removeprefix("hf:"))
  depth = hub.read_config(folder)[0].depth
  config = fitted(config, depth)
  require(DISTILLED in config.methods, f"methods are {config.methods}; what is measured is {DISTILLED!r}")
  if CHOICES in config.parts:
    choices.available()

  @functools.cache
  def texts() -> dict[str, Text]:
    return {name: load_text(part, cache, given=folder) for name, part in named_texts(config).items()}

  original = functools.cache(lambda: hub.load(folder, dtype="float32"))

  @functools.cache
  def network(name: str):
    if name == UNTOUCHED:
      model = original()
    else:
      model = adapting.adapted(config, name, texts()[GIVEN], original(), workdir, console)
    if name == DISTILLED:
      adapting.save(config, model, workdir / "adapted")
    # Trained on all devices, measured on one.
    return jax.device_put(loop.cast(model, config.train.dtype), jax.devices()[0])

  @functools.cache
  def perplexities():
    splits = {GIVEN: config.eval.split, UNSEEN: config.unseen.split}
    return quality.evaluators(config, network(UNTOUCHED), texts(), splits)

  def quality_of(name: str) -> dict:
    model, found = network(name), {}
    console.say(f"measuring {name}")
    if name in (UNTOUCHED, DISTILLED):
      found["recall"] = quality.recall(config, model, texts()[GIVEN])
    if name == DISTILLED:
      found["decoded"] = quality.decoded(config, model, texts()[GIVEN])
    return found | {"perplexity": perplexities()(model)}

  def speed_of() -> dict:
    console.say("timing decoding steps")
    case = dict(config.bench, settings=config.measured)
    return speed.measure_case(network(DISTILLED), case, config.bench.repetitions, timing.copy_bandwidth(repetitions=3))

  def speculation_of() -> dict:
    models = {name: network(name) for name in (UNTOUCHED, DISTILLED)}
    return speculation.measure(config, texts()[GIVEN], models, console)

  def choices_of() -> dict:
    network(DISTILLED)
    console.say("multiple choice through the harness")
    networks = {UNTOUCHED: str(folder), DISTILLED: str(workdir / "adapted")}
    return choices.measure(config, texts()[GIVEN], networks, workdir / CHOICES)

  quality_part = lambda name: results.part(workdir, f"quality.{name}", functools.partial(quality_of, name))
  first = quality_part(DISTILLED)
  measures = {SPEED: speed_of, SPECULATION: speculation_of, CHOICES: choices_of}
  metrics = {name: results.part(workdir, name, measures[name]) for name in config.parts}
  others = [name for name in (UNTOUCHED, *config.methods) if name != DISTILLED]
  measured = {name: quality_part(name) for name in others}
  return metrics | {"depth": depth, "quality": {UNTOUCHED: measured[UNTOUCHED], DISTILLED: first} | measured}


def fitted(config, depth: int):
  """The config with its settings on the same shares of a model of `depth` layers; a text with a path is a local one."""
  config = config.copy_and_resolve_references()
  for text in (config.data, config.unseen, config.more):
    text.name = "local_text" if text.path else text.name
  many = lambda texts: tuple(dict.fromkeys(new for text in texts if (new := refit(text, config.depth, depth))))
  config.settings, config.measured = many(config.settings), many(config.measured)
  config.speculation.settings = many(config.speculation.settings)
  config.reg.layers = tuple(dict.fromkeys(parse(setting)["layers"] for setting in config.settings))
  return config


def named_texts(config) -> dict:
  """{"given": a config with the training text as its data, "unseen": one with the other}."""

  def of(data):
    part = config.copy_and_resolve_references()
    part.data = data
    return part

  return {GIVEN: of(config.data), UNSEEN: of(config.unseen)}


def added(metrics: dict, name: str, text: str, setting: str) -> float:
  """Perplexity of a network at a setting over that of the untouched one in sequence, in %."""
  at = lambda name, setting: metrics["quality"][name]["perplexity"][text][setting]
  return 100 * (at(name, setting) / at(UNTOUCHED, SEQUENTIAL) - 1)


def claims(config, metrics: dict) -> list[Claim]:
  config = fitted(config, metrics["depth"])
  main, measured = config.settings[0], metrics["quality"]
  where = {GIVEN: "held-out text of the kind given", UNSEEN: "a text the adaptation never saw"}
  perplexity = lambda name, text, setting: f"{measured[name]['perplexity'][text][setting]:.4g}"
  made = [
    Claim(
      f"Perplexity with {words(metrics, main)} over the untouched network's in sequence, on {where[text]}", "%",
      "lower", ours=added(metrics, DISTILLED, text, main), threshold=5.0,
      baseline=f"not adapted {added(metrics, UNTOUCHED, text, main):.3g} %",
      note=f"{main}: {perplexity(DISTILLED, text, main)}, untouched {perplexity(UNTOUCHED, text, SEQUENTIAL)}",
    )
    for text in (GIVEN, UNSEEN)
  ]  # fmt: skip
  both = lambda name, setting: ", ".join(f"{text} {added(metrics, name, text, setting):+.3g} %" for text in where)
  worst = lambda name, setting: max(added(metrics, name, text, setting) for text in where)
  made.append(
    Claim(
      "Perplexity that adapting adds to the network run in sequence, worst text", "%", "lower",
      ours=worst(DISTILLED, SEQUENTIAL), threshold=2.0, baseline="the untouched network",
      note=both(DISTILLED, SEQUENTIAL),
    )
  )  # fmt: skip
  others = [setting for setting in config.measured if setting != main]
  if others:
    least = min(others, key=lambda setting: worst(DISTILLED, setting))
    made.append(
      Claim(
        "Perplexity over the untouched network's at other settings, worst text of the best of them", "%", "lower",
        ours=worst(DISTILLED, least), threshold=5.0, baseline=f"not adapted {worst(UNTOUCHED, least):.3g} %",
        note="; ".join(f"{setting}: {both(DISTILLED, setting)}" for setting in others),
      )
    )  # fmt: skip
  return made + rival_claims(config, metrics) + decoding_claims(config, metrics)


def words(metrics: dict, setting: str) -> str:
  """A setting as words."""
  s = parse(setting)
  n, g, k, tail = (s[name] for name in ("layers", "groups", "iterations", "tail"))
  at_once = f"{n} of {metrics['depth']} layers solved" + (f" in {g} groups" if g > 1 else "")
  steps = f" by {k} Newton step{'s' * (k > 1)}" + (" each" if g > 1 else "")
  return at_once + steps + (f" before the last {tail}" if tail else "")


def rival_claims(config, metrics: dict) -> list[Claim]:
  """Against continued training, with and without the paper's regulariser."""
  main, measured, made = config.settings[0], metrics["quality"], []
  for name, says in ((REGULARISED, "with the paper's regulariser"), (CONTINUED, "on the text alone")):
    if name in measured:
      at = lambda who, text: measured[who]["perplexity"][text][main]
      ratios = {text: at(DISTILLED, text) / at(name, text) for text in (GIVEN, UNSEEN)}
      made.append(
        Claim(
          f"Perplexity layer-parallel over that after continued training {says}, worst text", "ratio", "lower",
          ours=max(ratios.values()), threshold=1.0,
          baseline="; ".join(
            f"{text} {added(metrics, name, text, main):+.3g} %, in sequence "
            f"{added(metrics, name, text, SEQUENTIAL):+.3g} %" for text in ratios
          ),
          note=f"{config.train.steps} steps each, at one learning rate; "
          + ", ".join(f"{text} {ratio:.3g}" for text, ratio in ratios.items()),
        )
      )  # fmt: skip
  return made


def decoding_claims(config, metrics: dict) -> list[Claim]:
  main, measured = config.settings[0], metrics["quality"][DISTILLED]
  over = lambda kind: 100 * (math.exp(measured["decoded"][kind] - measured["decoded"]["sequential"]) - 1)
  made = [
    Claim(
      "Perplexity of the cached decoder over that of the adapted network in sequence", "%", "lower",
      ours=over("last_iteration"), threshold=5.0, baseline=f"the uncached forward {over('uncached'):.3g} %",
      note=f"{main}, teacher-forced from an empty cache that keeps the keys of the last step, as the decoder that is "
      f"timed does; with keys from the corrected states {over('recompute'):.3g} %",
    )
  ]  # fmt: skip
  asked = {name: metrics["quality"][name]["recall"] for name in (UNTOUCHED, DISTILLED)}
  for name, right in metrics.get(CHOICES, {}).items():
    asked[name] = asked[name] | {"multiple-choice": right}
  for task, right in asked[DISTILLED].items():
    before = asked[UNTOUCHED][task]
    made.append(
      Claim(
        f"Share of {task.replace('_', ' ')} questions answered right layer-parallel", "", "higher", ours=right[main],
        threshold=before[SEQUENTIAL] - 0.02, baseline=f"untouched, in sequence {before[SEQUENTIAL]:.3g}",
        note=f"adapted, in sequence {right[SEQUENTIAL]:.3g}; untouched, layer-parallel {before[main]:.3g}",
      )
    )  # fmt: skip
  return made + speed_claims(config, metrics, main) + speculation_claims(metrics)


def speed_claims(config, metrics: dict, main: str) -> list[Claim]:
  if SPEED not in metrics:
    return []
  case = metrics[SPEED]
  measured, rates = case["speedup"][main], tokens_per_second(case)
  return [
    Claim(
      "How many times as fast as in sequence one token is decoded", "x", "higher", ours=measured["ratio"],
      threshold=1.4, spread=(measured["p10"], measured["p90"]),
      baseline=f"compiled sequential step ({case['sequential']})",
      note=f"{main}, context {config.bench.context}, batch 1; tokens/s: "
      + ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items()),
    )
  ]  # fmt: skip


def tokens_per_second(case: dict) -> dict[str, float]:
  """{"sequential" or setting: decoded tokens a second at batch 1}."""
  times = {SEQUENTIAL: case["milliseconds"][case["sequential"]]} | {s: case["milliseconds"][s] for s in case["speedup"]}
  return {name: 1e3 / t["median"] for name, t in times.items()}


def speculation_claims(metrics: dict) -> list[Claim]:
  if SPECULATION not in metrics:
    return []
  runs, untouched = (metrics[SPECULATION][name]["settings"] for name in (DISTILLED, UNTOUCHED))
  name, best = max(runs.items(), key=lambda item: item[1]["speedup"])
  equal = [run.get("float32", run["equal_tokens"]) for run in (*runs.values(), *untouched.values())]
  return [
    Claim(
      "How many times as fast self-speculation generates as the sequential network", "x", "higher",
      ours=best["speedup"], threshold=1.3, spread=tuple(best["spread"]),
      baseline=f"not adapted {max(run['speedup'] for run in untouched.values()):.3g} x",
      note=f"{name}: {best['acceptance']:.0%} of drafts taken, {best['tokens_per_cycle']:.2f} tokens a cycle; "
      f"not adapted {untouched[name]['acceptance']:.0%}",
    ),
    Claim(
      "Share of speculative tokens that are the sequential ones in float32, worst run", "", "higher",
      ours=min(equal), threshold=1.0, baseline="sequential greedy generation",
    ),
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  config = fitted(config, metrics["depth"])
  main = config.settings[0]
  both = lambda name, setting: " and ".join(f"{added(metrics, name, text, setting):+.3g} %" for text in (GIVEN, UNSEEN))
  text = (
    f"A pretrained network with {words(metrics, main)}: perplexity {both(DISTILLED, main)} on text of the kind given "
    f"and on unseen text after {config.train.steps} steps of distillation ({both(UNTOUCHED, main)} before; in sequence "
    f"{both(DISTILLED, SEQUENTIAL)})"
  )
  if SPEED in metrics:
    text += f", decoded {metrics[SPEED]['speedup'][main]['ratio']:.2f}x as fast"
  return text + "."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  perplexities = {name: found["perplexity"] for name, found in metrics["quality"].items()}
  rates = tokens_per_second(metrics[SPEED]) if SPEED in metrics else {SEQUENTIAL: 1.0}
  return frontier(perplexities, rates, workdir)
