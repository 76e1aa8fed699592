"""TNT: what a memory costs that trains in large chunks, what it learns, what its parts and its second stage are worth.

A module here is a part of the run.
"""

import functools
from pathlib import Path

from experiments import results
from experiments.results import Claim
from experiments.text import load_text
from experiments.tnt import arms, recall, speed, stages
from experiments.tnt.arms import ABLATIONS, ARMS, ATTENTION, COARSE, COUNTS, MAMBA, SMALL, TITANS, TNT, TTT, WITHOUT
from experiments.tnt.drawing import pictures
from experiments.tnt.recall import DEEP, LINEAR, PROJECTED
from experiments.tnt.stages import CONTROL, TUNED, WHOLE
from jaxlab.core.checks import require


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts; every network is one, trained and judged once in a workdir."""
  unknown = {*config.parts} - {"arms", "ablations", "stages", "speed", "recall"}
  require(not unknown, f"config.parts has {sorted(unknown)}; there are arms, ablations, stages, speed and recall")
  text = load_text(config, cache)
  lab = arms.Lab(config, text, workdir, console)
  each = lambda part, names, measure: {
    name: results.part(workdir, f"{part}.{name}", functools.partial(measure, name)) for name in names
  }
  metrics = {}
  if {"arms", "ablations", "stages"} & {*config.parts}:
    metrics["arms"] = each("arms", ARMS, lambda name: lab.measured(name, config.seeds))
  if "ablations" in config.parts:
    rate = metrics["arms"][TNT]["rate"]
    metrics["ablations"] = each("ablations", ABLATIONS, lambda name: lab.at_rate(name, rate, config.seeds))
  if "stages" in config.parts:
    rates = {name: row["rate"] for name, row in metrics["arms"].items()}
    stage = lambda: stages.measure(lab, rates, config.seeds[0])
    metrics["stages"] = results.part(workdir, "stages", stage)
  if "speed" in config.parts:
    metrics["speed"] = results.part(workdir, "speed", lambda: speed.measure(config, lab.vocabulary))
  if "recall" in config.parts:
    metrics["recall"] = each("recall", recall.NAMES, lambda name: recall.measure(config, name))
  return metrics


def claims(config, metrics: dict) -> list[Claim]:
  made = []
  if "speed" in metrics:
    made += speed_claims(config, metrics["speed"])
  if "arms" in metrics:
    made += arm_claims(config, metrics["arms"])
  if "ablations" in metrics:
    made += ablation_claims(metrics["arms"], metrics["ablations"])
  if "stages" in metrics:
    made += stage_claims(config, metrics["arms"], metrics["stages"], metrics.get("speed"))
  if "recall" in metrics:
    made.append(recall_claim(config, metrics["recall"]))
  return made


def speed_claims(config, found: dict) -> list[Claim]:
  longest, ms = f"{max(config.speed.lengths)}", found["milliseconds"]
  listed = "; ".join(
    f"{name} " + ", ".join(f"{row['median']:.3g}" for row in rows.values()) for name, rows in ms.items()
  )
  rival, ratio, spread = speed.like_for_like(found)
  gates = f"; {rival} have no momentum and no forgetting, as TNT; over Titans with both {found['over'][TNT][0]:.3g}"
  slopes = {name: speed.exponent(rows) for name, rows in ms.items()}
  attention = ms[speed.TRANSFORMER][longest]["median"]
  large = ms[speed.LARGE][longest]["median"]
  same = ", ".join(f"{chunk}: {faster:.2f}" for chunk, (faster, _) in found.get("same", {}).items())
  return [
    Claim(
      "Speed of a training step of TNT over Titans in the same chunks, at the longest rows", "x", "higher", ours=ratio,
      threshold=3.0, paper=5.1, spread=tuple(spread), baseline=f"{rival} {ms[rival][longest]['median']:.4g} ms",
      note=f"rows of {longest} tokens, {config.speed.tokens} tokens a step, chunks of {config.chunks.titans}, shards "
      f"of {config.speed.shard}, a global memory in chunks of {config.speed.whole}; ms a step at rows of "
      f"{', '.join(map(str, config.speed.lengths))}: {listed}" + gates * (rival != TITANS)
      + f"; speed over Titans by chunk {same}" * bool(same),
    ),
    Claim(
      "Exponent of the length in the time of a row, TNT", "", "lower", ours=slopes[TNT], threshold=1.1, paper=1.0,
      baseline=f"Titans {slopes[TITANS]:.3g}, Transformer {slopes[speed.TRANSFORMER]:.3g}",
      note=f"in chunks of {config.speed.large} {slopes[speed.LARGE]:.3g}",
    ),
    Claim(
      "Speed of a training step of TNT in larger chunks over a Transformer, at the longest rows", "x", "higher",
      ours=attention / large, threshold=1.0, paper=1.3, baseline=f"Transformer {attention:.4g} ms",
      note=f"chunks of {config.speed.large}; the paper's are of 128, at rows of 32 K; attention is cuDNN's on a GPU, "
      "XLA's on a CPU",
    ),
  ]  # fmt: skip


def arm_claims(config, found: dict) -> list[Claim]:
  loss = {name: row["loss"] for name, row in found.items()}
  t, c = config.train, config.chunks
  listed = ", ".join(f"{name} {value:.4f}" for name, value in loss.items())
  rates = ", ".join(f"{name} {row['rate']:g}" for name, row in found.items())
  sizes = [row["parameters"] for row in found.values()]
  attention, others = min(ATTENTION, key=loss.get), min((COARSE, *TTT, MAMBA), key=loss.get)
  return [
    Claim(
      "Loss of TNT over Titans at equal parameters and tokens", "nats", "lower", ours=loss[TNT] - loss[TITANS],
      threshold=0.0, paper=-0.052, baseline=loss[TITANS],
      note=f"{t.steps} steps of {t.batch} x {t.length} tokens, {min(sizes) / 1e6:.3g} to {max(sizes) / 1e6:.3g} M "
      f"parameters, local chunks of {', '.join(map(str, c.local))}, seeds: {len(config.seeds)}; {listed}; rates "
      f"chosen: {rates}",
    ),
    Claim(
      "Loss of TNT over the best Transformer", "nats", "lower", ours=loss[TNT] - loss[attention], threshold=0.061,
      paper=0.061, baseline=f"{attention} {loss[attention]:.4f}",
    ),
    Claim(
      "Loss of TNT over the best other recurrence", "nats", "lower", ours=loss[TNT] - loss[others], threshold=0.0,
      baseline=f"{others} {loss[others]:.4f}", note="Titans in large chunks, TTT-Linear, TTT-MLP, Mamba-2",
    ),
  ]  # fmt: skip


def ablation_claims(found: dict, ablations: dict) -> list[Claim]:
  full = found[TNT]["loss"]
  added = {part: ablations[f"without {part}"]["loss"] - full for part in WITHOUT}
  least = min(("global memory", "projection"), key=added.get)
  many = {count: ablations[name]["loss"] for name, count in COUNTS.items()} | {2: full}
  return [
    Claim(
      "Loss added without the global memory or without the projection of queries, the lesser", "nats", "higher",
      ours=added[least], threshold=0.01, paper=0.045, baseline=full,
      note=", ".join(f"without {part} {more:+.4f}" for part, more in added.items())
      + "; paper, in chunks of 8: global memory 0.196, projection 0.045",
    ),
    Claim(
      "Loss of four local memories over one", "nats", "lower", ours=many[4] - many[1], threshold=0.0, paper=-0.041,
      baseline=many[1], note="; ".join(f"{count}: {many[count]:.4f}" for count in sorted(many)),
    ),
  ]  # fmt: skip


def stage_claims(config, found: dict, row: dict, timed: dict | None) -> list[Claim]:
  c, t = config.chunks, config.train
  tuned, control = row[TUNED]["loss"], min(row["untuned"], row[CONTROL]["loss"])
  small = found[SMALL]["losses"][0]
  every = f"; stage 2 of all parameters {row[WHOLE]['loss']:.4f} and {row[WHOLE]['old']:.4f}" if WHOLE in row else ""
  share = (1 / timed["small"][0] + row["steps"] / t.steps) if timed else None
  own = {TITANS: c.titans, COARSE: c.coarse, "stage 1": c.local[0], TUNED: c.small[0]}
  best = {name: min(curve, key=curve.get) for name, curve in row["curves"].items()}
  # What a model loses at the chunks it was trained with, over the best of all: 0 where the curve is lowest there.
  lost = {
    name: curve[f"{own[name]}"] - curve[best[name]] for name, curve in row["curves"].items() if f"{own[name]}" in curve
  }
  worst = max(lost, key=lost.get)
  chunks = lambda many: "{" + ", ".join(map(str, many)) + "}"
  return [
    Claim(
      "Loss that stage 2 saves at small chunks over the better of its controls", "nats", "higher",
      ours=control - tuned, threshold=0.0, baseline=control,
      note=f"at {chunks(c.small)} and at {chunks(c.local)}: {row['steps']} steps at {chunks(c.small)}, rate "
      f"{row[TUNED]['rate']:g}, {tuned:.4f} and {row[TUNED]['old']:.4f}; as stage 1 left it {row['untuned']:.4f} and "
      f"{row['old']:.4f}; as many steps at {chunks(c.local)} {row[CONTROL]['loss']:.4f} and {row[CONTROL]['old']:.4f}"
      + every,
    ),
    Claim(
      "Loss of stage 1 then 2 over training at small chunks from the start", "nats", "lower", ours=tuned - small,
      threshold=0.0, baseline=small, note=f"in {share:.3g} of its time" if timed else "",
    ),
    Claim(
      "Loss at the chunks a model was trained with over that at the best, worst model", "nats", "lower",
      ours=lost[worst], threshold=0.005, paper=0.0, baseline=f"{worst}, best at {best[worst]}",
      note="; ".join(
        f"{name}, trained at {own[name]}: " + ", ".join(f"{n} {loss:.4f}" for n, loss in curve.items())
        for name, curve in row["curves"].items()
      ),
    ),
  ]  # fmt: skip


def recall_claim(config, found: dict) -> Claim:
  mean = lambda name: sum(found[name]["accuracy"]) / len(found[name]["accuracy"])
  best = {form: max((form, form + PROJECTED), key=mean) for form in (LINEAR, DEEP)}
  say = lambda row: "/".join(f"{100 * share:.3g}" for share in row["accuracy"])
  return Claim(
    "Pairs that a memory of two layers recalls over those of a linear one, each at its best", "%", "higher",
    ours=100 * (mean(best[DEEP]) - mean(best[LINEAR])), threshold=0.0, baseline=100 * mean(best[LINEAR]),
    note=f"{config.recall.pairs} pairs, {config.recall.head_dim} channels a head; % right, a seed each: "
    + "; ".join(f"{name} {say(row)}" for name, row in found.items()),
  )  # fmt: skip


def finding(config, metrics: dict) -> str:
  parts = []
  if "speed" in metrics:
    rival, ratio, _ = speed.like_for_like(metrics["speed"])
    slope = speed.exponent(metrics["speed"]["milliseconds"][TNT])
    parts.append(
      f"a training step at rows of {max(config.speed.lengths)} is {ratio:.2f}x as fast as {rival}' in the same chunks "
      f"(paper 5.1x) and its time grows as length^{slope:.2f}"
    )
  if "arms" in metrics:
    loss = {name: row["loss"] for name, row in metrics["arms"].items()}
    attention = min(ATTENTION, key=loss.get)
    parts.append(
      f"the loss after as many tokens is {loss[TNT] - loss[TITANS]:+.3f} nats from Titans' (paper -0.052) and "
      f"{loss[TNT] - loss[attention]:+.3f} from the best Transformer's (paper +0.061)"
    )
  if "stages" in metrics:
    row = metrics["stages"]
    parts.append(
      f"stage 2 changes the loss at small chunks by {row[TUNED]['loss'] - row['untuned']:+.4f} in {row['steps']} steps"
    )
  if not parts:
    return f"{claims(config, metrics)[0].name}: {results.number(claims(config, metrics)[0].ours)}."
  return "TNT: " + "; ".join(parts) + "."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  return pictures(config, metrics, workdir)
