"""STRUPRUNE: perplexity at equal parameters, what its parts give, what is on the device while it runs, speed.

A module here is a part of the run.
"""

import dataclasses
import functools
from pathlib import Path

from experiments import results
from experiments.compressing import COMPRESSED, at, measured, subjects
from experiments.compressing_drawing import draw_frontier, draw_pair
from experiments.compressing_folder import written, written_claims, written_finding
from experiments.long_context import opened
from experiments.results import Claim
from experiments.struprune import memory, quality, recovery, speed, trained
from experiments.struprune.drawing import draw_sizes
from experiments.timing import slope

FRONTIER, MEMORY, SPEED, TRAINED, RECOVERED = "frontier", "memory", "speed", "trained", "recovered"
TITLES = {
  "struprune": "STRUPRUNE", "threshold": "with the threshold rule", "uniform": "with one share for all layers",
  "obs": "with OBS scores", "one_step": "groups in one step", "one_round": "without rounds over activations",
  "weights_kept": "weights as they were", "no_biases": "without biases", "oracle": "global oracle",
  "oracle+rebuilt": "global oracle's sizes, rebuilt", "wanda_sp": "Wanda-sp", "flap": "FLAP",
  "llm_pruner": "LLM-Pruner", "slicegpt": "SliceGPT", "magnitude": "magnitude", "random": "random",
  "sparsellm": "SparseLLM by weight, no smaller where dense",
}  # fmt: skip
RIVALS = ("oracle", "oracle+rebuilt", "wanda_sp", "flap", "llm_pruner", "slicegpt", "magnitude", "uniform", "threshold")
_DEEP = 0.6  # of the parameters, from which on (40 % removed) it must be below Wanda-sp, magnitude and one share


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts; of config.model alone the one that compresses it to config.budget."""
  alone = lambda name, run: results.part(workdir, name, run)
  metrics = {}
  if not config.model and MEMORY in config.parts:  # first: a device's own peak is that of all that ran before
    metrics[MEMORY] = alone(MEMORY, lambda: {"rows": memory.measure(config)})
  if not config.model and SPEED in config.parts:
    metrics[SPEED] = alone(SPEED, lambda: speed.measure(config))
  called = subjects(config, cache)
  measures = {
    FRONTIER: lambda subject: quality.frontier(config, subject, config.methods, console=console),
    RECOVERED: lambda subject: recovery.measure(config, subject, cache=cache),
    COMPRESSED: lambda subject: written(config, subject, quality.chosen(config, subject), workdir, console),
  }
  wanted = (COMPRESSED,) if config.model else config.parts
  parts = {part: measures[part] for part in wanted if part in measures}
  metrics |= measured(config, workdir, parts, called, console)
  if not config.model and TRAINED in config.parts:
    _, folder, text = opened(config, "base", cache)
    how = dict(text=text, folder=folder, workdir=workdir, console=console)
    fresh = {name: functools.partial(trained.subject, config, name, **how) for name in config.trained.shapes}
    run = lambda subject: quality.frontier(config, subject, config.trained.methods, console=console)
    metrics |= measured(config, workdir, {TRAINED: run}, fresh, console)
  return metrics


def rows_of(metrics: dict) -> dict[str, list[dict]]:
  """{model: its rows}, the networks trained here among them."""
  return {name: found["rows"] for part in (FRONTIER, TRAINED) for name, found in metrics.get(part, {}).items()}


def claims(config, metrics: dict) -> list[Claim]:
  made = []
  if by_model := rows_of(metrics):
    made += [claim for claim in frontier_claims(by_model) if claim]
  if MEMORY in metrics:
    made.append(memory_claim(metrics[MEMORY]["rows"]))
  if RECOVERED in metrics:
    made.append(recovered_claim(*metrics[RECOVERED].values()))
  if SPEED in metrics:
    made.append(speed_claim(config, metrics[SPEED]))
  if COMPRESSED in metrics:
    made += written_claims(*metrics[COMPRESSED].values(), most=2.0)
  return made


def ratios(by_model: dict, over: str, *, most: float = 1.0, method: str = "struprune") -> dict[str, float]:
  """{"model at budget": perplexity over that of the other, at budgets up to `most` where both were measured}."""
  found = {}
  for name, rows in by_model.items():
    other = {row["budget"]: row["perplexity"] for row in rows if row["method"] == over}
    mine = [row for row in rows if row["method"] == method and row["budget"] in other and row["budget"] <= most]
    found |= {f"{name} at {row['budget']:g}": round(row["perplexity"] / other[row["budget"]], 4) for row in mine}
  return found


def worst(name: str, by_model: dict, over: str, threshold: float, *more: str, most: float = 1.0) -> Claim | None:
  """The largest ratio, over that of `over` and of `more`; None where they were never measured together."""
  found = {(who, where): one for who in (over, *more) for where, one in ratios(by_model, who, most=most).items()}
  if not found:
    return None
  who, where = max(found, key=found.get)
  model, budget = where.rsplit(" at ", 1)
  say = lambda method: f"{at(by_model[model], method, float(budget))['perplexity']:.4g}"
  listed = lambda who: ", ".join(f"{where} {ratio:.3g}" for (method, where), ratio in found.items() if method == who)
  every = "; ".join((f"over {TITLES[who]}'s: " if more else "") + listed(who) for who in (over, *more))
  return Claim(
    name, "ratio", "lower", ours=found[who, where], threshold=threshold, baseline=f"{TITLES[who]} {say(who)}",
    note=f"{where} of the blocks' parameters: {say('struprune')}; {every}",
  )  # fmt: skip


def frontier_claims(by_model: dict) -> list[Claim | None]:
  deep = dict(most=_DEEP)
  made = [
    worst("Perplexity over the global oracle's, which has gradients of the whole network, worst case", by_model,
          "oracle", 1.03),
    worst("Perplexity over that of as many groups a layer as the oracle keeps, rebuilt alike", by_model,
          "oracle+rebuilt", 1.03),
    worst("Perplexity over Wanda-sp's with 40 % removed or more, worst case", by_model, "wanda_sp", 1.0, **deep),
    worst("Perplexity over magnitude pruning's with 40 % removed or more, worst case", by_model, "magnitude", 1.0,
          **deep),
    worst("Perplexity over that of one share for all layers with 40 % removed or more, worst case", by_model, "uniform",
          1.0, **deep),
    worst("Perplexity of the softmax rule over the threshold rule's, worst case", by_model, "threshold", 1.02),
    worst("Perplexity over FLAP's, worst case", by_model, "flap", 1.0),
    worst("Perplexity over LLM-Pruner's, untuned, and SliceGPT's, worst case", by_model, "llm_pruner", 1.0, "slicegpt"),
    worst("Perplexity with groups chosen by ADMM over chosen in one step, worst case", by_model, "one_step", 0.9999),
  ]  # fmt: skip
  if made[0] and (found := ratios(by_model, "sparsellm")):
    by_weight = ", ".join(f"{where} {ratio:.3g}" for where, ratio in found.items())
    made[0] = dataclasses.replace(made[0], note=f"{made[0].note}; over that of {TITLES['sparsellm']}: {by_weight}")
  return made


def memory_claim(rows: list[dict]) -> Claim:
  """Of what the device held; its own peak where it tells one."""
  counted = round(slope([(row["depth"], row["live"]) for row in rows]), 6) + 0.0  # no -0
  first, last = rows[0], rows[-1]
  told = "" if last["peak"] is None else (
    f"; the device's own peak {first['peak'] / 1e6:.4g} to {last['peak'] / 1e6:.4g} MB"
  )  # fmt: skip
  return Claim(
    "Exponent of the depth by which what is on the device grows while a network is pruned", "", "lower", ours=counted,
    threshold=0.15, baseline=f"all layers there: {slope([(row['depth'], row['model']) for row in rows]):.3g}",
    note=f"{first['depth']} to {last['depth']} layers: {first['live'] / 1e6:.4g} to {last['live'] / 1e6:.4g} MB when a "
    f"layer is loaded; a layer is {last['block'] / 1e6:.4g} MB, embeddings {last['tables'] / 1e6:.4g}, the model "
    f"{last['model'] / 1e6:.4g}{told}; the paper's O(sqrt N) is O(N / L) where depth grows with the size of a layer",
  )  # fmt: skip


def recovered_claim(found: dict) -> Claim:
  ours, other = found["struprune"], found["llm_pruner"]
  said = ", ".join(f"{TITLES[name]} {one['before']:.4g} to {one['after']:.4g}" for name, one in found.items())
  return Claim(
    "Perplexity after tuning adapters over LLM-Pruner's after as much tuning", "ratio", "lower",
    ours=ours["after"] / other["after"], threshold=1.0, baseline=f"LLM-Pruner {other['after']:.4g}", note=said,
  )  # fmt: skip


def speed_claim(config, found: dict) -> Claim:
  most = max(found["forward"], key=lambda case: case["rows"])
  listed = ", ".join(f"{case['rows']} rows {case['speedup']:.3g} x" for case in found["forward"])
  return Claim(
    f"How many times as fast a text is read at {config.budget:g} of the blocks' parameters", "x", "higher",
    ours=most["speedup"], threshold=1.1, spread=tuple(most["spread"]), baseline=f"dense {most['dense']:.4g} tokens/s",
    note=f"random weights, layers of two sizes, bfloat16; {listed}; a token at a time {found['decode']:.3g} x",
  )  # fmt: skip


def finding(config, metrics: dict) -> str:
  if COMPRESSED in metrics:
    return written_finding(metrics)
  by_model = rows_of(metrics)
  budget = config.budget
  grown = lambda rows, who: 100 * (at(rows, who, budget)["perplexity"] / at(rows, "dense")["perplexity"] - 1)
  losses = " and ".join(f"{grown(rows, 'struprune'):.3g} % ({name})" for name, rows in by_model.items())
  rivals = " and ".join(f"{grown(rows, 'wanda_sp'):.3g} %" for rows in by_model.values())
  head = frontier_claims(by_model)[0]
  text = (
    f"With {budget:.0%} of the blocks' parameters perplexity grows by {losses}, by {rivals} with Wanda-sp, at worst "
    f"{head.ours:.3g} times the global oracle's (paper: it matches)"
  )
  if MEMORY in metrics:
    rows = metrics[MEMORY]["rows"]
    text += (
      f", with {rows[-1]['live'] / rows[-1]['model']:.0%} of a network of {rows[-1]['depth']} layers on the device"
    )
  if SPEED in metrics:
    text += f", and a text is read {speed_claim(config, metrics[SPEED]).ours:.3g}x as fast"
  return text + "."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  by_model = rows_of(metrics)
  if not by_model:
    return draw_pair(metrics, workdir)
  shown = {*RIVALS, "struprune", "sparsellm", "dense"} - {"magnitude"}  # which is beyond all others
  rows = [row for rows in by_model.values() for row in rows if row["method"] in shown]
  return {
    draw_frontier(rows, workdir, TITLES): "Perplexity on held-out text against the bytes of the whole model",
    draw_sizes(config, by_model, workdir): "Heads and neurons that every layer keeps",
  }
