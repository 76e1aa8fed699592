"""H-Net: bits a byte of learned chunks, of chunks by rule, of none, and of a tokenizer, at equal FLOPs a byte.

A module here is a part of the run.
"""

import functools
from pathlib import Path

from experiments import results
from experiments.hnet import arms, speed, words
from experiments.hnet.data import PERTURBATIONS, Corpus
from experiments.hnet.drawing import pictures
from experiments.results import Claim

ARMS, ABLATIONS, WORDS, SPEED = "arms", "ablations", "words", "speed"
FLAT, CHUNKED, LEARNED = ("mamba", "transformer"), ("pool", "space", "one", "two"), ("one", "two")
TITLES = {
  "mamba": "Mamba-2 on bytes", "transformer": "Transformer on bytes", "pool": "every sixth byte", "space": "at spaces",
  "one": "learned, one stage", "two": "learned, two stages", "bpe": "BPE Transformer",
}  # fmt: skip


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts; every network is one, trained and judged once in a workdir."""
  corpus = Corpus(config, cache)
  run = lambda name, **rate: arms.measured(config, corpus, name, workdir=workdir, console=console, **rate)
  each = lambda part, names, measure: {
    name: results.part(workdir, f"{part}.{name}", functools.partial(measure, name)) for name in names
  }
  metrics = {}
  if ARMS in config.parts or ABLATIONS in config.parts:
    metrics[ARMS] = each(ARMS, config.arms, run)
  if ABLATIONS in config.parts:
    rate = metrics[ARMS]["one"]["rate"]
    metrics[ABLATIONS] = each(ABLATIONS, config.ablations, functools.partial(run, rate=rate))
  if WORDS in config.parts:
    metrics[WORDS] = results.part(workdir, WORDS, lambda: words.measure(config))
  if SPEED in config.parts:
    metrics[SPEED] = results.part(workdir, SPEED, lambda: speed.measure(config))
  return metrics


def claims(config, metrics: dict) -> list[Claim]:
  made = []
  if ARMS in metrics:
    made += arm_claims(config, metrics[ARMS]) + chunk_claims(config, metrics[ARMS])
  if ABLATIONS in metrics:
    made.append(ablation_claim(config, metrics[ABLATIONS]))
  if WORDS in metrics:
    made.append(word_claim(metrics[WORDS]))
  if SPEED in metrics:
    made.append(speed_claim(metrics[SPEED]))
  return made


def arm_claims(config, found: dict) -> list[Claim]:
  bits = {name: row["bits"]["clean"] for name, row in found.items()}
  listed = ", ".join(f"{TITLES[name]} {value:.4f}" for name, value in bits.items())
  flops = {name: row["flops"] / found["one"]["flops"] for name, row in found.items()}
  best_flat, worst_chunked = min(FLAT, key=bits.get), max(CHUNKED, key=bits.get)
  best = min(LEARNED, key=bits.get)
  rates = ", ".join(f"{TITLES[name]} {row['rate']:g}" for name, row in found.items())
  return [
    Claim(
      "Bits a byte that one stage of learned chunks saves over Mamba-2 on bytes", "bits", "higher",
      ours=bits["mamba"] - bits["one"], threshold=0.03, paper=0.090, baseline=bits["mamba"],
      note=f"{config.train.steps} steps of {config.train.batch} x {config.train.length} bytes; {listed}; "
      "training FLOPs a byte at the sizes of chunks that came out, over one stage's: "
      + ", ".join(f"{TITLES[name]} {ratio:.3g}" for name, ratio in flops.items()) + f"; rates chosen: {rates}",
    ),
    Claim(
      "Bits a byte that the worst network with chunks saves over the best without", "bits", "higher",
      ours=bits[best_flat] - bits[worst_chunked], threshold=0.03, paper=0.065,
      baseline=f"{TITLES[best_flat]} {bits[best_flat]:.4f}", note=f"worst: {TITLES[worst_chunked]}",
    ),
    Claim(
      "Bits a byte that one learned stage saves over chunks of equal length", "bits", "higher",
      ours=bits["pool"] - bits["one"], threshold=0.02, paper=0.025, baseline=bits["pool"],
    ),
    Claim(
      "Bits a byte of one learned stage over chunks that begin at spaces", "bits", "lower",
      ours=bits["one"] - bits["space"], threshold=0.01, paper=0.0, baseline=bits["space"],
      note=f"cut there, chunks have {found['space']['sizes'][0]:.3g} bytes",
    ),
    Claim(
      "Bits a byte that a second stage saves", "bits", "higher", ours=bits["one"] - bits["two"], threshold=0.0,
      paper=0.012, baseline=bits["one"],
    ),
    Claim(
      "Bits a byte of the best learned chunks over a BPE Transformer's", "bits", "lower",
      ours=bits[best] - bits["bpe"], threshold=0.0, paper=-0.013, baseline=bits["bpe"],
      note=f"{TITLES[best]}; the paper's curves cross after 30 G bytes (two stages) or 100, here there were "
      f"{config.train.steps * config.train.batch * config.train.length / 1e9:.3g}",
    ),
  ]  # fmt: skip


def losses_under(row: dict) -> dict[str, float]:
  """{perturbation: bits a byte over those of the same text unchanged}."""
  return {how: row["bits"][how] / row["bits"]["unchanged"] for how in PERTURBATIONS}


def chunk_claims(config, found: dict) -> list[Claim]:
  off = {}
  for name in LEARNED:
    for stage, (size, ratio) in enumerate(zip(found[name]["sizes"], config.shapes[name]["ratios"], strict=True)):
      off[f"{name} {stage}"] = abs(size / ratio - 1)
  share = lambda name: 100 * found[name]["beside"]
  one, bpe = losses_under(found["one"]), losses_under(found["bpe"])
  worst = max(PERTURBATIONS, key=lambda how: (one[how] - 1) / (bpe[how] - 1))
  say = lambda name: "; ".join(f"{100 * (loss - 1):.3g} % {how}" for how, loss in losses_under(found[name]).items())
  whole = {name: " x ".join(f"{size:.3g}" for size in found[name]["sizes"]) for name in CHUNKED}
  return [
    Claim(
      "Distance of a learned stage's chunks from the length aimed at, worst stage", "", "lower",
      ours=max(off.values()), threshold=0.4, paper=0.2,
      note="positions a chunk: " + ", ".join(f"{TITLES[name]} {size}" for name, size in whole.items())
      + "; cuts that had no room in training's last three quarters, at most "
      + ", ".join(f"{TITLES[name]} {100 * found[name]['overflow']:.2g} %" for name in LEARNED),
    ),
    Claim(
      "Share of one learned stage's cuts at or behind a space-like byte", "%", "higher", ours=share("one"),
      threshold=50.0, baseline=f"of all positions {100 * found['one']['chance']:.3g} %",
      note=f"two stages {share('two'):.3g} %; cut so: {found['one']['sample']}",
    ),
    Claim(
      "Loss of one learned stage in perturbed text over a BPE Transformer's, worst perturbation", "ratio", "lower",
      ours=(one[worst] - 1) / (bpe[worst] - 1), threshold=1.0,
      baseline=f"BPE {say('bpe')}", note=f"{worst}; {say('one')}; Mamba-2 {say('mamba')}",
    ),
  ]  # fmt: skip


def ablation_claim(config, found: dict) -> Claim:
  bits = {name: row["bits"]["clean"] for name, row in found.items()}
  cost = {name: value - bits["none"] for name, value in bits.items() if name != "none"}
  least = min(cost, key=cost.get)
  sizes = ", ".join(f"{name} {row['sizes'][0]:.3g}" for name, row in found.items())
  return Claim(
    "Bits a byte that one stage loses without a part of the method, the least of five parts", "bits", "higher",
    ours=cost[least], threshold=0.0, baseline=bits["none"],
    note=f"{config.ablated_steps} steps; " + ", ".join(f"{name} {more:+.4f}" for name, more in cost.items())
    + f"; positions a chunk: {sizes}",
  )  # fmt: skip


def word_claim(found: dict) -> Claim:
  return Claim(
    "F1 of cuts against words without delimiters, over chance", "", "higher", ours=found["f1"] - found["chance"],
    threshold=0.3, baseline=f"as many cuts by chance {found['chance']:.3g}",
    note=f"words of {found['size']:.3g} letters, {100 * found['share']:.3g} % of the positions cut, cross-entropy "
    f"{found['nats'][0]:.3g} to {found['nats'][1]:.3g} nats",
  )  # fmt: skip


def speed_claim(found: dict) -> Claim:
  slowest = max(LEARNED, key=found["over"].get)
  return Claim(
    "Time of a training step over Mamba-2's on bytes at equal FLOPs, slower of one and two stages", "x", "lower",
    ours=found["over"][slowest], threshold=2.0, paper=2.0, spread=tuple(found["spread"][slowest]),
    baseline=f"{found['milliseconds']['mamba']:.3g} ms",
    note=", ".join(f"{TITLES[name]} {ms:.3g} ms" for name, ms in found["milliseconds"].items()),
  )  # fmt: skip


def finding(config, metrics: dict) -> str:
  if ARMS not in metrics:
    return claims(config, metrics)[0].name + f": {results.number(claims(config, metrics)[0].ours)}."
  bits = {name: row["bits"]["clean"] for name, row in metrics[ARMS].items()}
  return (
    f"Bits a byte at equal FLOPs: {bits['one']:.3f} with one stage of learned chunks and {bits['two']:.3f} with two "
    f"(paper 0.755, 0.743), {bits['pool']:.3f} with chunks of equal length (0.780), {bits['space']:.3f} cut at spaces "
    f"(0.755), {min(bits[name] for name in FLAT):.3f} without chunks (0.845), {bits['bpe']:.3f} with BPE (0.756)."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  return pictures(metrics, TITLES, workdir)
