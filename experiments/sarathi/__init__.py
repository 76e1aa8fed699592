"""Sarathi: what chunks of prompts beside decoding rows save, on one engine under several policies, and in a pipeline.

Parts: `profile` times steps of chosen sizes, `serve` requests that all wait and requests that arrive at random,
`bubbles` sends the policies' micro-batches through stages that cost what was measured.
"""

import functools
from pathlib import Path

import jax

from experiments import results
from experiments.long_context import given, subject_names
from experiments.results import Claim
from experiments.sarathi.bubbles import bubbles
from experiments.sarathi.drawing import draw
from experiments.sarathi.profile import marginal, profile
from experiments.sarathi.serve import (
  ORCA,
  OURS,
  QUANTILES,
  SEVERAL,
  TURNS,
  at_balance,
  balance,
  budgets,
  gains,
  online,
  throughput,
)
from jaxlab.models import Transformer, hub, inference
from jaxlab.models.config import qwen3
from jaxlab.models.inference import Network

__all__ = ["claims", "draw", "finding", "measure"]

RANDOM = "random"  # weights of config.shape


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """{model: {part: what was measured}}."""
  del cache
  metrics_, parts = {}, dict(profile=profile, throughput=throughput, budgets=budgets, online=online, bubbles=bubbles)
  for name, source in zip(subject_names(config), given(config), strict=True):
    read = functools.cache(functools.partial(_network, config, source))
    metrics_[name] = found = {}
    for part, function in parts.items():

      def run(part=part, function=function, found=found, name=name, read=read):
        console.say(f"{part} of {name}")
        return function(config, read, found, console)

      found[part] = results.part(workdir, f"{part}.{name}", run)
  return metrics_


def _network(config, name: str) -> Network:
  take = jax.jit(inference.take_apart)
  if name != RANDOM:
    return take(hub.load(name.removeprefix("hf:"), dtype=config.dtype))
  made = lambda: Transformer(qwen3(**config.shape), jax.random.key(config.seed))
  return take(jax.jit(lambda: jax.tree.map(lambda a: a.astype(config.dtype), made()))())


def claims(config, metrics_: dict) -> list[Claim]:
  """All models together: the worst of them."""
  models = list(metrics_.values())
  worst = lambda of, pick=min: pick(of(found) for found in models)
  balanced = balance(config)
  e, b = config.engine, config.bubbles
  gain = worst(lambda found: at_balance(config, gains(found, TURNS)))
  riding = [row for found in models for row in marginal(found["profile"]) if row["decode"] <= 32]
  largest = max(config.profile.chunks)
  cost_of = max(row["ratio"] for row in riding if row["decode"] + row["chunk"] >= largest)

  def off(found):
    gained = gains(found, TURNS)
    best = max(gained, key=gained.__getitem__)[1]
    return max(best / balanced, balanced / best)

  median = lambda found, name: found["bubbles"][name]["idle"][QUANTILES.index(50)]

  def idle(found, name=ORCA):
    return median(found, name) / max(median(found, OURS), 1e-12)

  span = lambda name: worst(lambda found: found["bubbles"][name]["makespan"] / found["bubbles"][OURS]["makespan"])

  def gap(found, of, ours=OURS):
    rows = {(row["load"], row["policy"]): row for row in found["online"]}
    return max(rows[load, "prefill_first"][of] / rows[load, ours][of] for load in config.online.loads)

  steps = config.online.get("steps", e.steps)
  several = ""
  if SEVERAL in config.online.policies:
    several = f"; several prompts in a step: {worst(lambda found: gap(found, 'tbt_p99', SEVERAL)):.3g}"
  sizes = f"{e.rows} rows, chunks of {e.budget - e.rows}"
  stages = f"{b.stages} stages, {b.requests} requests, {b.rows} rows a micro-batch, steps of {b.budget} tokens"
  made = [
    Claim(
      "Tokens a second over reading and decoding in turn, at the balance of prompts and answers", "ratio", "higher",
      ours=gain, threshold=1.1, paper=1.33, baseline="a batch is read whole, then decoded to its end",
      note=f"{sizes}: P:D {balanced:.3g} is the balance",
    ),
    Claim(
      "Cost of a token that rides beside a chunk over that of rows that decode alone", "ratio", "lower",
      ours=cost_of, threshold=1 / 3, paper=0.1, baseline="the same rows without a chunk",
      note=f"worst of up to 32 rows and all contexts, steps of {largest} tokens",
    ),
    Claim(
      "Tokens a second over whole prompts beside decoding rows (Orca), the worst of all P:D", "ratio", "higher",
      ours=worst(lambda found: min(gains(found, ORCA).values())), threshold=1.0, paper=1.11,
      baseline="iteration-level batches, one whole prompt at a time",
    ),
    Claim(
      "How far the P:D with the largest gain is from the balance", "factor", "lower",
      ours=worst(off, max), threshold=2.0,
    ),
    Claim(
      "Tokens a second over chunks that are read in turn with decoding, at the balance", "ratio", "higher",
      ours=worst(lambda found: at_balance(config, gains(found, "alternating"))), threshold=1.0,
      baseline="the same chunks, never beside rows that decode",
    ),
    Claim(
      "What the cost of a step, fitted to four fifths of the timed steps, misses of the rest", "share", "lower",
      ours=worst(lambda found: found["profile"]["missed"], max), threshold=0.1, paper=0.05,
    ),
    Claim(
      "Median time that stages of a pipeline stand idle for a request, whole prompts over chunks", "ratio", "higher",
      ours=worst(idle), threshold=3.0, paper=6.29, baseline="Orca's micro-batches", note=f"simulated: {stages}",
    ),
    Claim(
      "Time to serve all requests by a pipeline, whole prompts over chunks", "ratio", "higher",
      ours=span(ORCA), threshold=1.3, paper=1.91, baseline="Orca's micro-batches", note="simulated",
    ),
    Claim(
      "Time to serve all requests, copies without a pipeline over the pipeline with chunks", "ratio", "higher",
      ours=span("replicas"), threshold=1.0, paper=1.48,
      baseline=f"{b.stages} copies that hold {b.replica_rows} requests each", note="simulated",
    ),
    Claim(
      "99th percentile of the time between tokens, prompts first (vLLM) over chunks beside them", "ratio", "higher",
      ours=worst(lambda found: gap(found, "tbt_p99")), threshold=1.0,
      baseline="prompts before everything",
      note=f"requests arrive at random; the best load of those measured; tokens of a row in a call: {steps}{several}",
    ),
  ]  # fmt: skip
  if all("budgets" in found for found in models):
    made.append(chosen_claim([found["budgets"] for found in models]))
  return made


def chosen_claim(found: list[dict]) -> Claim:
  """Of all models, the one where the fitted cost chooses worst."""
  share = lambda one: one["rate"][f"{one['chosen']}"] / max(one["rate"].values())
  one = min(found, key=share)
  listed = ", ".join(f"{budget}: {rate:.4g}" for budget, rate in one["rate"].items())
  return Claim(
    "Tokens a second in steps of the size that the fitted cost chooses over the best size", "ratio", "higher",
    ours=share(one), threshold=0.95, baseline="the best of those measured",
    note=f"chosen {one['chosen']}; tokens a second by size {listed}",
  )  # fmt: skip


def finding(config, metrics_: dict) -> str:
  """Gain, marginal cost, idle time."""
  made = {claim.name: claim for claim in claims(config, metrics_)}
  gain, cost_, orca, *_ = made.values()
  idle = next(claim for name, claim in made.items() if name.startswith("Median"))
  return (
    f"Chunks of prompts beside decoding rows serve {gain.ours:.2f}x the tokens a second of reading and decoding in "
    f"turn (paper {gain.paper}x at best) and at least {orca.ours:.2f}x of Orca's; a token that rides along costs "
    f"{cost_.ours:.2f} of one that is decoded alone; in a pipeline stages stand idle {idle.ours:.2g}x as long for a "
    f"request without chunks (paper {idle.paper}x)."
  )
