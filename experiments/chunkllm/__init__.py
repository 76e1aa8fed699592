"""ChunkLLM: what a model loses that reads the sentences its trained adapters choose, and how much faster it decodes.

A module here is a part of the run.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from experiments import results
from experiments.chunkllm import quality, speed, training
from experiments.chunkllm.decoders import CHANCE, DENSE, EVERY, FIXED, TRUE, WINDOW, named
from experiments.chunkllm.drawing import pictures
from experiments.long_context import by_model, documents, sizes_of, subject_names, subjects
from experiments.results import Claim
from jaxlab.attention.chunkllm import Adapted
from jaxlab.attention.chunkllm_chunks import ChunkAdapters
from jaxlab.core import modules
from jaxlab.data import tokenizer

ADAPTERS, LOSSES, QUESTIONS, CONSISTENCY, SPEED = "adapters", "losses", "questions", "consistency", "speed"


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts, all of the first model before the next one's; none is measured again in this workdir."""
  called = subject_names(config)
  every = functools.cache(lambda: dict(zip(called, subjects(config, cache), strict=True)))

  def label(name, rows):
    bpe = every()[name].tokenizer
    bytes_of = tokenizer.token_bytes(bpe, complete=False)
    return jax.numpy.stack([training.sentence_tokens(row, bpe, bytes_of) for row in rows])

  def untrained(name):
    shape = config.adapters.to_dict()
    return ChunkAdapters(every()[name].network.model.config, jax.random.key(config.seed), **shape)

  @functools.cache
  def subject(name):
    """With its adapters trained."""
    one = every()[name]
    adapters = training.trained(config, name, untrained(name), workdir, cache, console)
    modules.save(workdir / f"adapters.{name}.npz", adapters, config.adapters.to_dict())  # for `methods.subject`
    network = Adapted(one.network.model, one.network.blocks, jax.device_put(adapters, jax.devices()[0]))
    return dataclasses.replace(one, network=network)

  def kept(part, name, run):
    def told():
      console.say(f"{part} of {name}")
      return run()

    return results.part(workdir, f"{part}.{name}", told)

  @functools.cache
  def adapters_of(name):
    def run():
      one = subject(name)
      size = sizes_of(config.train, name)
      rows = documents(one.tokens, 2 * size.batch, size.length, seed=config.seed + 3)
      return training.quality(config, one.network, untrained(name), rows, label(name, rows))

    return kept(ADAPTERS, name, run)

  @functools.cache
  def losses_of(name):
    return kept(LOSSES, name, lambda: quality.losses_of(config, subject(name), adapters_of(name)["mean"]))

  def questions_of(name):
    share = next(row["read"] for row in losses_of(name) if row["decoder"] == named(config.keep))
    run = lambda: quality.questions_of(config, subject(name), adapters_of(name)["mean"], share)
    return kept(QUESTIONS, name, run)

  def consistency_of(name):
    return kept(
      CONSISTENCY, name, lambda: quality.consistency_of(config, every()[name], functools.partial(label, name))
    )

  asked = [name for name in called if config.model or name in config.questions.subjects]
  measures = {
    ADAPTERS: (adapters_of, called),
    LOSSES: (losses_of, called),
    QUESTIONS: (questions_of, asked),
    CONSISTENCY: (consistency_of, called),
  }
  return by_model(config, workdir, called, measures, {SPEED: lambda: speed.measure(config, console)})


def claims(config, metrics: dict) -> list[Claim]:
  made = question_claims(config, metrics) if QUESTIONS in metrics else []
  made += loss_claims(config, metrics[LOSSES]) if LOSSES in metrics else []
  made += adapter_claims(metrics[ADAPTERS]) if ADAPTERS in metrics else []
  made += consistency_claims(metrics[CONSISTENCY]) if CONSISTENCY in metrics else []
  return made + (speed_claims(metrics[SPEED]) if SPEED in metrics else [])


def mean_shares(metrics: dict) -> dict[str, float]:
  """{decoder: answers right in %, mean over the cells}."""
  rows = [row for rows in metrics[QUESTIONS].values() for row in rows]
  names = dict.fromkeys(row["decoder"] for row in rows)
  mean = lambda shares: 100 * sum(shares) / len(shares)
  return {name: mean([row["share"] for row in rows if row["decoder"] == name]) for name in names}


def question_claims(config, metrics: dict) -> list[Claim]:
  shares, main = mean_shares(metrics), named(config.keep)
  listed = ", ".join(f"{name} {share:.3g} %" for name, share in shares.items())
  cells = sum(len({(row["task"], row["length"]) for row in rows}) for rows in metrics[QUESTIONS].values())
  return [
    Claim(
      f"Share of dense attention's answers that stay with {config.keep:.0%} of the chunks chosen", "%", "higher",
      ours=100 * shares[main] / max(shares[DENSE], 1e-9), threshold=98.0, paper=98.64,
      baseline=f"sliding window of as many tokens {100 * shares[WINDOW] / max(shares[DENSE], 1e-9):.3g} %",
      note=f"{config.questions.count} questions in each of {cells} cells; right: {listed}",
    ),
    Claim(
      "Answers right over those with fixed chunks of the same mean length", "points", "higher",
      ours=shares[main] - shares[FIXED], threshold=0.0, baseline=f"fixed chunks {shares[FIXED]:.3g} %",
    ),
    Claim(
      "Answers lost by choosing at the ends of chunks alone and not at every token", "points", "lower",
      ours=shares[EVERY] - shares[main], threshold=1.0, baseline=f"at every token {shares[EVERY]:.3g} %",
    ),
  ]  # fmt: skip


def added(rows: list[dict]) -> dict[str, float]:
  """{decoder: loss over that of dense attention, in %}."""
  dense = next(row["loss"] for row in rows if row["decoder"] == DENSE)
  return {row["decoder"]: 100 * row["difference"] / dense for row in rows if row["decoder"] != DENSE}


def loss_claims(config, found: dict) -> list[Claim]:
  by_model, main = {name: added(rows) for name, rows in found.items()}, named(config.keep)
  worst = max(by_model, key=lambda name: by_model[name][main])
  read = {name: next(row["read"] for row in rows if row["decoder"] == main) for name, rows in found.items()}
  listed = lambda name: ", ".join(f"{who} {more:.3g} %" for who, more in by_model[name].items())
  nearer = min(by_model, key=lambda name: by_model[name][WINDOW] - by_model[name][main])
  first = next(iter(by_model))
  made = [
    Claim(
      f"Loss added to text behind a prompt with {config.keep:.0%} of the chunks chosen, worst model", "%", "lower",
      ours=by_model[worst][main], threshold=1.5, baseline=f"sliding window {by_model[worst][WINDOW]:.3g} %",
      note="; ".join(f"{name}: {listed(name)}" for name in by_model),
    ),
    Claim(
      "Share of the tokens so far that a token attends to, largest of the models", "%", "lower",
      ours=100 * max(read.values()), threshold=55.0, paper=48.58, baseline="dense attention 100 %",
      note=", ".join(f"{name} {share:.1%}" for name, share in read.items()) + "; all of them stay in memory",
    ),
    Claim(
      "Loss below that of a sliding window of as many tokens, worst model", "%", "higher",
      ours=by_model[nearer][WINDOW] - by_model[nearer][main], threshold=0.0, baseline="first and last tokens",
    ),
  ]  # fmt: skip
  if CHANCE in by_model[first]:
    # As many chunks are of fewer tokens by chance than by attention, which long ones have more of.
    shares = {row["decoder"]: row["read"] for row in found[first]}
    mine = sorted([(shares[named(keep)], by_model[first][named(keep)]) for keep in config.keeps] + [(1.0, 0.0)])
    as_many = float(np.interp(shares[CHANCE], *zip(*mine, strict=True)))
    made.append(
      Claim(
        "Loss below that with chunks chosen by chance, as many tokens read", "%", "higher",
        ours=by_model[first][CHANCE] - as_many, threshold=0.0,
        baseline=f"by chance {by_model[first][CHANCE]:.3g} % at {shares[CHANCE]:.1%} read",
        note=f"between the shares measured {as_many:.3g} %; at {shares[main]:.1%} read {by_model[first][main]:.3g} %; "
        f"by true attention {by_model[first][TRUE]:.3g} % at {shares[TRUE]:.1%}",
      )
    )  # fmt: skip
  return made


def adapter_claims(found: dict) -> list[Claim]:
  worst = min(found, key=lambda name: found[name]["f1"])
  least = min(found, key=lambda name: found[name]["recall"] / found[name]["untrained"])
  return [
    Claim(
      "F1 of the ends of sentences in held-out text, worst model", "", "higher", ours=found[worst]["f1"], threshold=0.9,
      baseline="rules on the text",
      note="; ".join(
        f"{n}: precision {a['precision']:.3g}, found {a['found']:.3g}, {a['mean']:.3g} tokens a sentence"
        for n, a in found.items()
      ),
    ),
    Claim(
      "Recall of the chunks attended to most, over that of untrained adapters, worst model", "ratio", "higher",
      ours=found[least]["recall"] / found[least]["untrained"], threshold=1.5,
      baseline=f"untrained {found[least]['untrained']:.3g}",
      note="; ".join(f"{n}: {a['recall']:.3g}, untrained {a['untrained']:.3g}" for n, a in found.items()),
    ),
  ]  # fmt: skip


def consistency_claims(found: dict) -> list[Claim]:
  ratio = {name: row["within"] / max(row["across"], 1e-9) for name, row in found.items()}
  worst = min(ratio, key=ratio.get)
  return [
    Claim(
      "Overlap of what consecutive tokens attend to within a chunk over that across its end, worst model", "ratio",
      "higher", ours=ratio[worst], threshold=1.0, baseline=f"across {found[worst]['across']:.3g}",
      note="; ".join(f"{name}: {row['within']:.3g} within, {row['across']:.3g} across" for name, row in found.items()),
    )
  ]  # fmt: skip


def speed_claims(found: dict) -> list[Claim]:
  keep, best = max(found["keeps"].items(), key=lambda item: item[1]["speedup"])
  ms = found["milliseconds"]
  rate = lambda name, share: (found["weight_bytes"] + share * found["cache_bytes"]) / ms[name] * 1e-6
  allowed = lambda share: (1 + found["x"]) / (1 + share * found["x"])
  found = found | {"x": found["cache_bytes"] / found["weight_bytes"]}
  reached = {name: row["speedup"] / allowed(row["read"]) for name, row in found["keeps"].items()}
  least = min(reached, key=reached.get)
  return [
    Claim(
      f"How many times as fast a layer decodes a token at {found['context']} tokens", "x", "higher",
      ours=best["speedup"], threshold=4.0, paper=4.48, spread=tuple(best["spread"]),
      baseline=f"{found['best']}, dense, {ms[found['best']]:.3g} ms",
      note=f"{found['rows']} rows, {best['read']:.1%} read, choosing amortised; "
      + ", ".join(f"{name} {t:.3g} ms" for name, t in ms.items())
      + f"; {rate(keep, best['read']):.0f} of the copy's {found['bandwidth'] / 1e9:.0f} GB/s, "
      f"dense {rate(found['best'], 1):.0f}",
    ),
    Claim(
      "Share of the speed-up that the bytes read allow, worst keep", "", "higher", ours=reached[least], threshold=0.8,
      baseline="(1 + x) / (1 + read x), x cache bytes over weight bytes",
      note="; ".join(
        f"keep {name}: {row['speedup']:.3g} x, {row['read']:.1%} read" for name, row in found["keeps"].items()
      ),
    ),
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  said = []
  if QUESTIONS in metrics:
    said.append(f"{question_claims(config, metrics)[0].ours:.3g} % of dense answers stay (paper 98.64 %)")
  if LOSSES in metrics:
    loss, read, *_ = loss_claims(config, metrics[LOSSES])
    said.append(f"{read.ours:.3g} % of the tokens are read (paper 48.58 %) and the loss grows by {loss.ours:.3g} %")
  if SPEED in metrics:
    fastest = speed_claims(metrics[SPEED])[0]
    said.append(f"a layer decodes up to {fastest.ours:.3g}x as fast (paper 4.48x)")
  return f"With {config.keep:.0%} of the chunks chosen: {'; '.join(said)}."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  return pictures(metrics, workdir)
