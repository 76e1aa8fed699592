"""Dataset Decomposition: what sequences of one document and of many lengths cost, and what a decoder learns of them.

A module here is a part of the run.
"""

import functools
import math
from pathlib import Path

from experiments import results
from experiments.dataset_decomposition import data, drawing, speed, training
from experiments.dataset_decomposition.training import BEST_FIT, CONCAT, GROW, MASKED, UNIFORM
from experiments.results import Claim
from jaxlab.core.checks import require
from jaxlab.core.files import write_text
from jaxlab.models import hub
from jaxlab.sequence import dataset_decomposition as dd

MOST = 8.0  # times the longest run's time, as far as a line through the last two is followed
SPLITS = ("validation", "test")


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Every arm at every learning rate on the first share of the documents, then on the others at its best."""
  missing = sorted({CONCAT, MASKED, BEST_FIT, UNIFORM, GROW} - set(config.arms))
  require(not missing, f"config.arms lacks {', '.join(missing)}, which the claims are about; name them and others")
  texts = functools.cache(lambda: data.texts(config, cache))
  vocabulary = functools.cache(lambda: texts()["data"].bpe.get_vocab_size())

  @functools.cache
  def pool(share: float):
    if share == 1:
      return data.documents(data.source(texts(), "train"), config.law, config.tokens, config.seed)
    return data.first(pool(1), share)

  @functools.cache
  def chapters() -> dict:
    return {name: data.held_out(data.source(texts(), name), 2**config.high, config.eval.chapters) for name in SPLITS}

  def corpus() -> dict:
    console.say("cutting documents")
    buckets = dd.decompose(pool(1), low=config.low, high=config.high, seed=config.seed)
    return data.statistics(pool(1), buckets, 2**config.high)

  def run(arm: str, share: float, rate: float, seed: int) -> dict:
    name = run_name(arm, share, rate, seed)
    how = dict(vocab_size=vocabulary(), rate=rate, seed=seed, workdir=workdir / "runs" / name, console=console)
    model, steps = training.trained(config, arm, pool(share), **how)
    if (arm, share, seed) == (GROW, 1, config.seeds[0]):
      hub.save(model, workdir / "decoder")
      write_text(workdir / "decoder" / "tokenizer.json", texts()["data"].bpe.to_str())
    found = {
      split: training.by_position(model, rows, edges(config), config.eval.batch) for split, rows in chapters().items()
    }
    return {"steps": steps} | found

  def kept(arm: str, share: float, rate: float, seed: int) -> dict:
    name = run_name(arm, share, rate, seed)
    return results.part(workdir, f"runs.{name}", lambda: run(arm, share, rate, seed))

  def timed() -> dict:
    console.say("timing training steps")
    return speed.measure(config, vocabulary())

  metrics = {"speed": results.part(workdir, "speed", timed), "corpus": results.part(workdir, "corpus", corpus)}
  metrics["runs"] = {}
  shares, rates, seeds = config.shares, config.train.rates, config.seeds
  for arm in config.arms:
    wanted = [(shares[0], rate, seeds[0]) for rate in rates]
    metrics["runs"] |= {run_name(arm, *one): kept(arm, *one) for one in wanted}
    rate = best_rate(config, metrics, arm)
    wanted = [(share, rate, seeds[0]) for share in (shares[1:] if arm in (CONCAT, GROW) else shares[-1:])]
    wanted += [(shares[-1], rate, seed) for seed in seeds[1:]]
    metrics["runs"] |= {run_name(arm, *one): kept(arm, *one) for one in wanted}
  return metrics


def run_name(arm: str, share: float, rate: float, seed: int) -> str:
  """Of a training run: no dot, which would part metrics."""
  return f"{arm}_{100 * share:.0f}_rate_{1e6 * rate:.0f}_seed_{seed}"


def edges(config) -> list[int]:
  """Ends of the groups of positions that losses are told for."""
  return [2 ** (config.high - i) for i in (5, 3, 1, 0)]


def best_rate(config, metrics: dict, arm: str) -> float:
  """By the validation loss on the first share of the documents."""
  loss = lambda rate: metrics["runs"][run_name(arm, config.shares[0], rate, config.seeds[0])]["validation"]["mean"]
  return min(config.train.rates, key=loss)


def runs_of(config, metrics: dict, arm: str, share: float) -> list[dict]:
  """Those at the arm's best rate, a seed each."""
  names = [run_name(arm, share, best_rate(config, metrics, arm), seed) for seed in config.seeds]
  return [metrics["runs"][name] for name in names if name in metrics["runs"]]


def losses_of(config, metrics: dict, arm: str, share: float = 1.0) -> dict:
  """{"mean", "positions"} of the test chapters, mean over the seeds."""
  found = [run["test"] for run in runs_of(config, metrics, arm, share)]
  mean = lambda values: sum(values) / len(values)
  positions = [mean(values) for values in zip(*(one["positions"] for one in found), strict=True)]
  return {"mean": mean([one["mean"] for one in found]), "positions": positions}


def seconds_of(config, metrics: dict, arm: str, share: float = 1.0) -> float:
  """Of a whole run: its steps of each kind times what one takes."""
  ms = metrics["speed"]["milliseconds"]
  return (
    sum(count * ms[kind]["median"] for kind, count in runs_of(config, metrics, arm, share)[0]["steps"].items()) / 1e3
  )


def time_to(target: float, seconds: list[float], losses: list[float]) -> float:
  """When a loss is reached, on the line through two runs of logarithm of seconds and loss.

  The first run's seconds where that has it already; beyond the last run at most MOST times its seconds.
  """
  if losses[0] <= target:
    return seconds[0]
  after = next((i for i in range(1, len(losses)) if losses[i] <= target), len(losses) - 1)
  fall = losses[after - 1] - losses[after]
  if fall <= 0:
    return MOST * seconds[-1]
  exponent = (losses[after - 1] - target) / fall * math.log(seconds[after] / seconds[after - 1])
  return min(seconds[after - 1] * math.exp(min(exponent, 50.0)), MOST * seconds[-1])


def share_of_time(config, metrics: dict) -> float:
  """Of concat-and-chunk's training time, after which Grow-P2 has its final loss."""
  target, all_of = losses_of(config, metrics, CONCAT)["mean"], config.shares
  seconds = [seconds_of(config, metrics, GROW, share) for share in all_of]
  losses = [losses_of(config, metrics, GROW, share)["mean"] for share in all_of]
  return time_to(target, seconds, losses) / seconds_of(config, metrics, CONCAT)


def claims(config, metrics: dict) -> list[Claim]:
  longest = 2**config.high
  loss = {arm: losses_of(config, metrics, arm) for arm in config.arms}
  listed = ", ".join(f"{arm} {found['mean']:.4g}" for arm, found in loss.items())
  rates = ", ".join(f"{arm} {best_rate(config, metrics, arm):g}" for arm in config.arms)
  by_share = lambda arm: ", ".join(
    f"{losses_of(config, metrics, arm, share)['mean']:.4g} of {share:.0%}" for share in config.shares
  )
  seeds = lambda arm: ", ".join(f"{run['test']['mean']:.4g}" for run in runs_of(config, metrics, arm, 1.0))
  each = "; ".join(f"{arm} {seeds(arm)}" for arm in config.arms)
  over = [a - b for a, b in zip(loss[GROW]["positions"], loss[CONCAT]["positions"], strict=True)]
  groups = ["-".join(map(str, ends)) for ends in zip([0, *edges(config)], edges(config), strict=False)]
  return [
    Claim(
      "Share of concat-and-chunk's training time after which Grow-P2 has its final loss", "", "lower",
      ours=share_of_time(config, metrics), threshold=0.67, paper=1 / 6,
      baseline=f"rows of {longest}, {seconds_of(config, metrics, CONCAT):.3g} s",
      note=f"whole runs on shares of the documents, each with its own schedule: Grow-P2 {by_share(GROW)}, "
      f"concat {by_share(CONCAT)}; learning rates chosen alike: {rates}",
    ),
    *cost_claims(config, metrics),
    Claim(
      "Loss over concat-and-chunk's after as many tokens, worst group of positions", "nats", "lower",
      ours=max(over), threshold=0.0, baseline=f"{loss[CONCAT]['mean']:.4g} over all",
      note="; ".join(f"{group}: {value:+.3g}" for group, value in zip(groups, over, strict=True))
      + f"; all positions, a seed each: {each}",
    ),
    *(
      Claim(
        f"Loss over that of {says}", "nats", "lower", ours=loss[GROW]["mean"] - loss[arm]["mean"], threshold=0.0,
        baseline=loss[arm]["mean"], note=listed,
      )
      for arm, says in ((MASKED, "concat-and-chunk under a document mask"), (BEST_FIT, "best-fit packing under one"))
    ),
    Claim(
      f"Loss over that in random order at positions {groups[-1]}", "nats", "lower",
      ours=loss[GROW]["positions"][-1] - loss[UNIFORM]["positions"][-1], threshold=0.0,
      baseline=loss[UNIFORM]["positions"][-1],
      note="the same sequences, uniform odds of the buckets" + few_batches(config, metrics),
    ),
    context_claim(metrics["corpus"]),
  ]  # fmt: skip


def few_batches(config, metrics: dict) -> str:
  """Which buckets have no batch for every cycle, so that cycles differ in more than their order."""
  steps, cycles = runs_of(config, metrics, GROW, 1.0)[0]["steps"], config.schedule.cycles
  batches = {2**i: steps.get(f"{2**i}", 0) for i in range(config.low, config.high + 1)}
  return "".join(f"; {n} batches of {length} for {cycles} cycles" for length, n in batches.items() if n < cycles)


def cost_claims(config, metrics: dict) -> list[Claim]:
  ms, flops = (metrics["speed"][name] for name in ("milliseconds", "flops"))
  apart = metrics["speed"].get("apart", speed.MASK)
  seconds = {arm: seconds_of(config, metrics, arm) for arm in (CONCAT, MASKED, GROW)}
  steps, longest = runs_of(config, metrics, GROW, 1.0)[0]["steps"], f"{2**config.high}"
  counted = sum(count * flops[kind] for kind, count in steps.items()) / (sum(steps.values()) * flops[longest])
  rate = lambda kind: f"{kind} {config.batch_tokens / ms[kind]['median']:.3g}"
  return [
    Claim(
      "Seconds a token over concat-and-chunk's", "ratio", "lower", ours=seconds[GROW] / seconds[CONCAT], threshold=0.9,
      paper=0.80, baseline=f"rows of {longest}",
      note=f"thousand tokens/s: {', '.join(rate(kind) for kind in ms)}; by FLOPs {counted:.3g}; a small model's "
      "attention is a larger share than the paper's",
    ),
    Claim(
      "Seconds a token over those under a document mask", "ratio", "lower", ours=seconds[GROW] / seconds[MASKED],
      threshold=0.9, baseline=f"rows of {longest} with {apart}",
    ),
  ]  # fmt: skip


def context_claim(corpus: dict) -> Claim:
  context = corpus["context"]
  return Claim(
    "Tokens of its document a token can attend to, over those in masked chunks", "ratio", "higher",
    ours=context["decomposed"] / context["concat_masked"], threshold=1.0, paper=1344 / 930,
    baseline=f"{context['concat_masked']:.4g} tokens; best fit {context['best_fit']:.4g}, "
    f"documents {context['documents']:.4g}",
    note=f"{corpus['documents']} documents of {corpus['average_length']:.4g} tokens on average; "
    f"{corpus['left_out']:.1%} of the tokens are in no sequence: what is shorter than the shortest",
  )  # fmt: skip


def finding(config, metrics: dict) -> str:
  cost = cost_claims(config, metrics)[0].ours
  over = losses_of(config, metrics, GROW)["mean"] - losses_of(config, metrics, CONCAT)["mean"]
  return (
    f"In sequences of one document and {2**config.low} to {2**config.high} tokens a token takes {cost:.2f} of the time "
    f"it takes in chunks of {2**config.high} (paper 0.80), the loss after as many tokens differs by {over:+.3f} nats, "
    f"and the chunks' loss is there after {share_of_time(config, metrics):.2f} of their time (paper 0.17)."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  curves = {
    arm: [
      (seconds_of(config, metrics, arm, share), losses_of(config, metrics, arm, share)["mean"])
      for share in config.shares
      if runs_of(config, metrics, arm, share)
    ]
    for arm in config.arms
  }
  losses = {arm: losses_of(config, metrics, arm)["positions"] for arm in config.arms}
  rates = {kind: config.batch_tokens / t["median"] for kind, t in metrics["speed"]["milliseconds"].items()}
  return drawing.picture(curves, losses, edges(config), rates, workdir)
