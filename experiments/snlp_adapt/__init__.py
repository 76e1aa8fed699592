"""Adapting a pretrained checkpoint to SNLP: what minutes of training buy, and what they cost.

The original is distilled through the solver (`jaxlab.depth.snlp_adapt`) and compared with itself untouched, with the
paper's regulariser in continued training and with that training alone. A module here is a part of the run.
"""

import functools
from pathlib import Path

from experiments import results, timing
from experiments.results import Claim
from experiments.snlp import speculation, speed
from experiments.snlp.settings import parse, refit
from experiments.snlp_adapt import adapting, quality
from experiments.snlp_adapt.adapting import CONTINUED, DISTILLED, REGULARISED
from experiments.snlp_adapt.drawing import frontier
from experiments.snlp_adapt.quality import SEQUENTIAL
from experiments.text import Text, load_text
from jaxlab.core.checks import require
from jaxlab.models import hub
from jaxlab.training import loop

UNTOUCHED = "untouched"
GIVEN, UNSEEN = "given", "unseen"
SPEED, SPECULATION = "speed", "speculation"


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Adapts config.model by every method of config.methods and measures; what this workdir holds is not done again."""
  folder = hub.find(config.model.removeprefix("hf:"))
  config = fitted(config, hub.read_config(folder)[0].depth)
  require(DISTILLED in config.methods, f"methods are {config.methods}; what is measured is {DISTILLED!r}")

  @functools.cache
  def texts() -> dict[str, Text]:
    return {name: load_text(part, cache, given=folder) for name, part in named_texts(config).items()}

  original = functools.cache(lambda: hub.load(folder, dtype="float32"))

  @functools.cache
  def network(name: str):
    if name == UNTOUCHED:
      return loop.cast(original(), config.train.dtype)
    model = adapting.adapted(config, name, texts()[GIVEN], original(), workdir, console)
    if name == DISTILLED:
      adapting.save(config, model, workdir / "adapted")
    return loop.cast(model, config.train.dtype)

  def quality_of(name: str) -> dict:
    model = network(name)
    console.say(f"measuring {name}")
    return quality.measure(config, texts(), model)

  def speed_of() -> dict:
    console.say("timing decoding steps")
    case = dict(config.bench, settings=config.measured)
    return speed.measure_case(network(DISTILLED), case, config.bench.repetitions, timing.copy_bandwidth(repetitions=3))

  def speculation_of() -> dict:
    models = {name: network(name) for name in (UNTOUCHED, DISTILLED)}
    return speculation.measure(config, texts()[GIVEN], models, console)

  made = {DISTILLED: results.part(workdir, DISTILLED, functools.partial(quality_of, DISTILLED))}
  for name in (UNTOUCHED, *config.methods):
    made[name] = results.part(workdir, name, functools.partial(quality_of, name))
  metrics = {"depth": hub.read_config(folder)[0].depth, "quality": made}
  measures = {SPEED: speed_of, SPECULATION: speculation_of}
  return metrics | {name: results.part(workdir, name, measures[name]) for name in config.parts}


def fitted(config, depth: int):
  """The config with its settings on the same shares of a model of `depth` layers."""
  config = config.copy_and_resolve_references()
  many = lambda texts: tuple(dict.fromkeys(new for text in texts if (new := refit(text, config.depth, depth))))
  config.settings, config.measured = many(config.settings), many(config.measured)
  config.speculation.settings = many(config.speculation.settings)
  config.reg.layers = tuple(dict.fromkeys(parse(setting)["layers"] for setting in config.settings))
  return config


def named_texts(config) -> dict:
  """{"given": a config with the training text as its data, "unseen": one with the other}."""

  def of(data):
    part = config.copy_and_resolve_references()
    part.data = data.copy_and_resolve_references()
    part.data.name = "local_text" if data.path else data.name
    return part

  return {GIVEN: of(config.data), UNSEEN: of(config.unseen)}


def added(metrics: dict, name: str, text: str, setting: str) -> float:
  """Perplexity of a network at a setting over that of the untouched one in sequence, in %."""
  at = lambda name, setting: metrics["quality"][name]["perplexity"][text][setting]
  return 100 * (at(name, setting) / at(UNTOUCHED, SEQUENTIAL) - 1)


def claims(config, metrics: dict) -> list[Claim]:
  config = fitted(config, metrics["depth"])
  main = config.settings[0]
  s, measured = parse(main), metrics["quality"]
  words = f"the last {s['layers']} of {metrics['depth']} layers in {s['iterations']} Newton steps"
  where = {GIVEN: "held-out text of the kind given", UNSEEN: "a text the adaptation never saw"}
  made = [
    Claim(
      f"Perplexity of {words} over the untouched network's, on {where[text]}", "%", "lower",
      ours=added(metrics, DISTILLED, text, main), threshold=5.0,
      baseline=f"not adapted {added(metrics, UNTOUCHED, text, main):.3g} %",
      note=f"perplexity {measured[DISTILLED]['perplexity'][text][main]:.4g}; untouched, in sequence "
      f"{measured[UNTOUCHED]['perplexity'][text][SEQUENTIAL]:.4g}; cached decoder's own loss: "
      + ", ".join(f"{name} {value:.4g}" for name, value in measured[DISTILLED]["cached"].items()),
    )
    for text in (GIVEN, UNSEEN)
  ]  # fmt: skip
  worst = lambda setting: max((added(metrics, DISTILLED, text, setting), text) for text in (GIVEN, UNSEEN))
  change, text = worst(SEQUENTIAL)
  made.append(
    Claim(
      "Perplexity that adapting adds to the network run in sequence, worst text", "%", "lower", ours=change,
      threshold=2.0, baseline="the untouched network",
      note=", ".join(f"{text} {added(metrics, DISTILLED, text, SEQUENTIAL):+.3g} %" for text in (GIVEN, UNSEEN)),
    )
  )  # fmt: skip
  others = [setting for setting in config.measured if setting != main]
  if others:
    change, setting = max((worst(setting)[0], setting) for setting in others)
    made.append(
      Claim(
        "Perplexity over the untouched network's at the other numbers of steps, worst number and text", "%", "lower",
        ours=change, threshold=25.0, baseline=f"not adapted {added(metrics, UNTOUCHED, worst(setting)[1], setting):.3g} %",
        note=", ".join(
          f"{setting} {text} {added(metrics, DISTILLED, text, setting):+.3g} %"
          for setting in others for text in (GIVEN, UNSEEN)
        ),
      )
    )  # fmt: skip
  for name, says in ((REGULARISED, "with the paper's regulariser"), (CONTINUED, "on the text alone")):
    if name in measured:
      ratio, text = max(
        (measured[DISTILLED]["perplexity"][text][main] / measured[name]["perplexity"][text][main], text)
        for text in (GIVEN, UNSEEN)
      )
      rival = lambda text, name=name: (
        f"{text} {added(metrics, name, text, main):+.3g} % (in sequence {added(metrics, name, text, SEQUENTIAL):+.3g} %)"
      )
      made.append(
        Claim(
          f"Perplexity layer-parallel over that after as many steps of training {says}, worst text", "ratio", "lower",
          ours=ratio, threshold=1.0, baseline="; ".join(map(rival, (GIVEN, UNSEEN))), note=f"worst on the {text} text",
        )
      )  # fmt: skip
  recall = measured[DISTILLED]["recall"]
  if recall:
    before = {task: measured[UNTOUCHED]["recall"][task][SEQUENTIAL] for task in recall}
    task = min(recall, key=lambda task: recall[task][main] - before[task])
    made.append(
      Claim(
        f"Share of recall answers right with {words}, less the untouched network's in sequence, worst task", "", "higher",
        ours=recall[task][main] - before[task], threshold=-0.02, baseline=before[task],
        note="; ".join(
          f"{task}: {r[main]:.3g}, in sequence {r[SEQUENTIAL]:.3g}, not adapted "
          f"{measured[UNTOUCHED]['recall'][task][main]:.3g}" for task, r in recall.items()
        ),
      )
    )  # fmt: skip
  return made + speed_claims(config, metrics, main) + speculation_claims(metrics)


def speed_claims(config, metrics: dict, main: str) -> list[Claim]:
  if SPEED not in metrics:
    return []
  case = metrics[SPEED]
  measured, rate = case["speedup"][main], tokens_per_second(case)
  return [
    Claim(
      "How many times as fast as in sequence one token is decoded", "x", "higher", ours=measured["ratio"],
      threshold=1.4, spread=(measured["p10"], measured["p90"]),
      baseline=f"compiled sequential step ({case['sequential']})",
      note=f"{main}, context {config.bench.context}, batch 1; tokens/s: "
      + ", ".join(f"{name} {value:.4g}" for name, value in rate.items()),
    )
  ]  # fmt: skip


def tokens_per_second(case: dict) -> dict[str, float]:
  """{"sequential" or setting: decoded tokens a second at batch 1}."""
  times = {SEQUENTIAL: case["milliseconds"][case["sequential"]]} | {s: case["milliseconds"][s] for s in case["speedup"]}
  return {name: 1e3 / t["median"] for name, t in times.items()}


def speculation_claims(metrics: dict) -> list[Claim]:
  if SPECULATION not in metrics:
    return []
  runs = metrics[SPECULATION][DISTILLED]["settings"]
  name, best = max(runs.items(), key=lambda item: item[1]["speedup"])
  untouched = metrics[SPECULATION][UNTOUCHED]["settings"]
  equal = [
    run.get("float32", run["equal_tokens"]) for run in (*runs.values(), *untouched.values()) if "float32" in run
  ] or [run["equal_tokens"] for run in runs.values()]
  return [
    Claim(
      "How many times as fast self-speculation generates as the sequential network", "x", "higher",
      ours=best["speedup"], threshold=1.3, spread=tuple(best["spread"]),
      baseline=f"not adapted {max(run['speedup'] for run in untouched.values()):.3g} x",
      note=f"{name}: {best['acceptance']:.0%} of drafts taken, {best['tokens_per_cycle']:.2f} tokens a cycle; not adapted "
      f"{untouched[name]['acceptance']:.0%}",
    ),
    Claim(
      "Share of speculative tokens that are the sequential ones in float32, worst run", "", "higher",
      ours=min(equal), threshold=1.0, baseline="sequential greedy generation",
    ),
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  config = fitted(config, metrics["depth"])
  main = config.settings[0]
  s = parse(main)
  both = lambda name, setting: " and ".join(f"{added(metrics, name, text, setting):+.3g} %" for text in (GIVEN, UNSEEN))
  text = (
    f"{s['layers']} of {metrics['depth']} layers of a pretrained network in {s['iterations']} steps: perplexity "
    f"{both(DISTILLED, main)} on text of the kind given and on unseen text after {config.train.steps} steps of "
    f"distillation ({both(UNTOUCHED, main)} before; in sequence {both(DISTILLED, SEQUENTIAL)})"
  )
  if SPEED in metrics:
    text += f", decoded {metrics[SPEED]['speedup'][main]['ratio']:.2g}x as fast"
  return text + "."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  perplexities = {name: found["perplexity"] for name, found in metrics["quality"].items()}
  rates = tokens_per_second(metrics[SPEED]) if SPEED in metrics else {SEQUENTIAL: 1.0}
  return frontier(perplexities, rates, workdir)
