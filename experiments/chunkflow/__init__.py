"""ChunkFlow: one chunk's memory for sequences of any lengths, beside padding, packing and whole sequences.

With config.model one checkpoint is fine-tuned on whole documents, and nothing else. A module here is a part of the run:
`arms` has the ways to a global batch's gradient, `speed` times them and follows their losses, `pipeline` lets stages
wait for each other in simulated time.
"""

import functools
import itertools
from pathlib import Path

import jax
import numpy as np

from experiments import figures, long_finetuning, results, timing
from experiments.chunkflow import pipeline, speed
from experiments.chunkflow.arms import ARMS
from experiments.report import rounded
from experiments.results import Claim
from experiments.text import Text, load_text
from jaxlab.data import packing
from jaxlab.sequence import chunkflow

TUNED = long_finetuning.TUNED
EXACT = tuple(name for name in ARMS if name not in ("one", "apart"))


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Runs all parts; what the workdir holds is not measured again."""
  part = functools.partial(results.part, workdir)
  if config.model:
    gradient_of = lambda model_of: chunkflow.gradient(remat=config.tuning.remat, model_of=model_of)
    how = (config, gradient_of, workdir, cache, console, documents)
    return {TUNED: part(TUNED, lambda: long_finetuning.measure(*how))}
  tokens = load_text(config, cache).split("train")
  ids, vocabulary = tokens.ids, config.data.vocab_size
  found = {"agreement": part("agreement", lambda: speed.agreement(config, ids, vocabulary)), "speed": {}}
  for longest in config.longest:
    run = lambda size=longest: speed.measure(config, ids, vocabulary, size, contestants(config), console)
    found["speed"][f"{longest}"] = part(f"speed.{longest}", run)
  found["growth"] = part("growth", lambda: speed.growth(config, vocabulary))
  curves = ("one", "chunkflow", "apart")
  found["curves"] = {
    n: part(f"curves.{n}", lambda n=n: speed.curve(config, ids, vocabulary, n, console)) for n in curves
  }
  found["fit"] = part("fit", lambda: pipeline.fitted(config, vocabulary))
  found["example"], found["pipeline"] = pipeline.example(), pipeline.simulated(config, found["fit"])
  return rounded(found)


def documents(text: Text, t, seed: int):
  """Batches of whole documents; those beyond t.length are cut into pieces of it, each behind a BOS."""
  tokens = text.split("train")
  pieces = zip(*packing.cut(tokens, t.length), strict=True)
  row = lambda start, size: np.concatenate([[tokens.bos], tokens.ids[start : start + size]]).astype(np.int32)
  rows = [packing.split_row(row(start, size)) for start, size in pieces]
  return chunkflow.batches(rows, batch=t.batch, chunk=t.chunk, keep=t.keep, ranks=jax.device_count(), seed=seed)


def contestants(config) -> dict[str, dict]:
  """{label, which the arm begins: how}: ChunkFlow at every (C, K); rivals with and without running layers again, those
  that share out tokens at every C."""
  sizes = sorted({chunk for chunk, _ in config.settings})
  made = {f"one {remat}": dict(chunk=config.chunk, remat=remat) for remat in config.remats}
  for name, chunk, remat in itertools.product(("sorted", "packed"), sizes, config.shared_remats):
    made[f"{name} {chunk} {remat}"] = dict(chunk=chunk, remat=remat)
  made |= {f"window {remat}": dict(chunk=config.chunk, remat=remat) for remat in config.windows}
  return made | {f"chunkflow {c} {k}": dict(chunk=c, keep=k) for c, k in config.settings}


def fastest(rows: dict, name: str) -> tuple[str, dict]:
  """(label, row) of an arm's best setting."""
  own = {label: row for label, row in rows.items() if label.split()[0] == name}
  label = max(own, key=lambda label: own[label]["tokens"])
  return label, own[label]


def speedup(rows: dict, name: str) -> tuple[float, tuple[float, float]]:
  """Of ChunkFlow over an arm, both at their best: (ratio, its spread)."""
  ours, theirs = fastest(rows, "chunkflow")[0], fastest(rows, name)[0]
  return timing.Times({label: np.array(rows[label]["seconds"]) for label in (ours, theirs)}).speedup(ours, theirs)


def claims(config, metrics: dict) -> list[Claim]:
  if TUNED in metrics:
    return long_finetuning.claims(metrics[TUNED])
  longest = f"{max(config.longest)}"
  rows = metrics["speed"][longest]
  label, ours = fastest(rows, "chunkflow")
  told = ", ".join(f"{name} {row['tokens']:.3g}" for name, row in rows.items())
  memory = ", ".join(f"{name} {row['temporary'] / 1e6:.3g}" for name, row in rows.items())
  least = min((row for name, row in rows.items() if name.split()[0] == "one"), key=lambda row: row["temporary"])
  apart = metrics["curves"]
  away = lambda name: max(abs(a / b - 1) for a, b in zip(apart[name]["loss"], apart["one"]["loss"], strict=True))
  sizes = sorted(map(int, metrics["growth"]["bytes"]))
  grown = [metrics["growth"]["bytes"][f"{size}"] for size in sizes]
  slopes = [(b - a) / (n - m) for a, b, m, n in zip(grown, grown[1:], sizes, sizes[1:], strict=False)]
  half = grown[-2] if len(grown) > 1 else grown[-1]
  beyond = (grown[-1] - half - metrics["growth"]["cached"] * (sizes[-1] - sizes[-2])) / half
  simulated = metrics["pipeline"]
  best = min((row for own in simulated["choices"].values() for row in own), key=lambda row: row["seconds"])
  one_kept = min(
    (row for own in simulated["choices"].values() for row in own if row["keep"] == 1), key=lambda row: row["seconds"]
  )
  example = metrics["example"]
  over = lambda name: dict(zip(("ours", "spread"), speedup(rows, name), strict=True))
  of = lambda name: f"{fastest(rows, name)[0]}, {fastest(rows, name)[1]['tokens']:.3g} tokens/s"
  return [
    Claim(
      "Speed of a global batch over one sequence a step, at the longest", "x", "higher", **over("one"), paper=4.53,
      threshold=1.5, baseline=of("one"), note=f"{label}; longest {longest} tokens; tokens/s: {told}",
    ),
    Claim(
      "Speed over short sequences packed and long ones whole", "x", "higher", **over("packed"), threshold=1.0,
      baseline=of("packed"),
    ),
    Claim(
      "Speed over sequences of like length padded together", "x", "higher", **over("sorted"), threshold=1.0,
      baseline=of("sorted"),
    ),
    Claim(
      "Temporary memory over that of one sequence a step, its layers run again where that needs least", "x", "lower",
      ours=ours["temporary"] / least["temporary"], threshold=1.0, baseline=least["temporary"] / 1e6,
      note=f"MB: {memory}",
    ),
    Claim(
      "Growth of temporary memory when the longest sequence doubles, beyond keys, values and what comes back to them",
      "", "lower", ours=beyond, threshold=0.15, paper=0.05, baseline=half / 1e6,
      note=f"chunks of {config.chunk}; bytes a token more: {', '.join(f'{slope:.4g}' for slope in slopes)}, of which "
      f"{metrics['growth']['cached']} are keys, values and what comes back",
    ),
    Claim(
      "Largest relative difference of a gradient from that of one sequence a step", "", "lower",
      ours=max(metrics["agreement"][name] for name in EXACT), threshold=1e-4,
      note=", ".join(f"{name} {value:.2g}" for name, value in metrics["agreement"].items()),
    ),
    Claim(
      "Largest relative difference of a step's loss from that of one sequence a step", "", "lower",
      ours=away("chunkflow"), threshold=0.005, baseline=apart["one"]["loss"][-1],
      note=f"{len(apart['one']['loss'])} steps; held-out loss {apart['chunkflow']['held_out']:.4g} and "
      f"{apart['one']['held_out']:.4g}",
    ),
    Claim(
      "Held-out loss on long sequences after chunks trained without what is before them, less ChunkFlow's", "nats",
      "higher", ours=apart["apart"]["held_out"] - apart["chunkflow"]["held_out"], threshold=0.0,
      baseline=apart["chunkflow"]["held_out"],
    ),
    Claim(
      "Bubble of the paper's example with K = 2, over the paper's", "x", "lower",
      ours=example["ChunkFlow, K = 2"]["bubble"] / example["ChunkFlow, K = 2"]["paper"], threshold=1.0,
      baseline=example["1F1B, unequal lengths"]["bubble"],
      note=", ".join(f"{name}: {row['bubble']:.4f} (paper {row['paper']:.4f})" for name, row in example.items()),
    ),
    Claim(
      "A global batch in a pipeline of stages, in simulated time: whole sequences over the best chunk and K", "x",
      "higher", ours=simulated["whole"]["seconds"] / best["seconds"], threshold=1.0,
      baseline=simulated["whole"]["bubble"],
      note=f"{config.pipeline.stages} stages; C = {best['chunk']}, K = {best['keep']}, bubble {best['bubble']:.3g} "
      f"(whole {simulated['whole']['bubble']:.3g}); with K = 1 {one_kept['seconds'] / best['seconds']:.3g} times as "
      f"long; costs fitted to {metrics['fit']['error']:.2g}",
    ),
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  if TUNED in metrics:
    return long_finetuning.finding(metrics[TUNED])
  longest = f"{max(config.longest)}"
  rows = metrics["speed"][longest]
  label = fastest(rows, "chunkflow")[0]
  over = lambda name: f"{speedup(rows, name)[0]:.3g}x"
  grown = metrics["growth"]["bytes"]
  sizes = sorted(map(int, grown))
  return (
    f"Sequences of up to {longest} tokens, 90 % of them below a 32nd of that, in chunks of {label.split()[1]}: "
    f"{over('one')} the speed of one sequence a step (paper 4.53x on 7 B at 256 K), {over('packed')} that of packed "
    f"short ones and whole long ones, {over('sorted')} that of sequences sorted by length; temporary memory grows "
    f"{grown[f'{sizes[-1]}'] / grown[f'{sizes[0]}']:.3g}x from {sizes[0]} to {sizes[-1]} tokens; the same gradients to "
    f"{max(metrics['agreement'][name] for name in EXACT):.1g}."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  if TUNED in metrics:
    return {}
  figure, (left, middle, right) = figures.subplots(3)
  for longest, rows in metrics["speed"].items():
    names = [name for name in ARMS if any(label.split()[0] == name for label in rows)]
    best = [fastest(rows, name)[1] for name in names]
    left.plot([row["temporary"] / 1e6 for row in best], [row["tokens"] for row in best], "o", label=f"up to {longest}")
    for name, row in zip(names, best, strict=True):
      left.annotate(
        name, (row["temporary"] / 1e6, row["tokens"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
      )
  left.set(xlabel="temporary memory, MB", ylabel="tokens/s", xlim=(0, None), ylim=(0, None))
  left.legend(fontsize=8)
  for name, row in metrics["curves"].items():
    middle.plot(np.arange(1, len(row["loss"]) + 1), row["loss"], lw=1, label=ARMS[name])
  middle.set(xlabel="step", ylabel="loss, nats")
  middle.legend(fontsize=8)
  sizes = sorted(map(int, metrics["growth"]["bytes"]))
  right.plot(sizes, [metrics["growth"]["bytes"][f"{size}"] / 1e6 for size in sizes], "o-", label="ChunkFlow's step")
  right.plot(sizes, [metrics["growth"]["cached"] * size / 1e6 for size in sizes], "k:", label="keys, values, gradients")
  right.set(xlabel="tokens of the longest sequence", ylabel="temporary memory, MB")
  right.legend(fontsize=8)
  caption = (
    "Left: speed against temporary memory of every way's fastest setting. Middle: losses with the same data. Right: "
    "memory of a chunk's step against the longest sequence"
  )
  return {figures.save(figure, workdir, "chunkflow"): caption}
