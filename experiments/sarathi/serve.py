"""Requests that all wait, and requests that arrive at random, served under every policy by one engine."""

from collections.abc import Sequence

import numpy as np

from jaxlab.core.checks import require
from jaxlab.models.inference import Network
from jaxlab.serving import cost, metrics, traces
from jaxlab.serving.engine import Engine
from jaxlab.serving.requests import Request, Served

OURS, TURNS, ORCA = "sarathi", "request_level", "orca"
SEVERAL = "sarathi, several prompts"  # that one step reads: Sarathi-Serve
WHOLE = (ORCA, TURNS)  # policies that read prompts whole
QUANTILES = (0, 5, 10, 25, 50, 75, 90, 95, 99, 100)


def requests(rng, prompts: Sequence[int], answers: Sequence[int], arrival: Sequence[float], vocab: int):
  """Random prompts; nothing stops an answer."""
  trace = traces.Trace(np.asarray(arrival, float), np.asarray(prompts), np.asarray(answers))
  return traces.requests_of(trace, rng, vocab_size=vocab)


def part_of(config, budget: int) -> int:
  """The longest part, of `engine.part` tokens at most, of which a whole number fills a step beside the rows."""
  room = budget - config.engine.rows
  return max(part for part in range(1, min(room, config.engine.part) + 1) if room % part == 0)


def served(
  config, network: Network, policy: str, asked: list[Request], *, budget: int | None = None, steps: int | None = None
) -> tuple[list[Served], dict]:
  """(who was served, the engine's counters) by an engine that has compiled all it needs.

  Args:
    budget: of a step, None: the config's, and for policies that read prompts whole what the longest needs.
    steps: tokens a call where nobody reads or waits; None: the config's.
  """
  e = config.engine
  length = max(len(r.prompt) + r.tokens for r in asked)
  longest = max(len(r.prompt) for r in asked)
  if policy in WHOLE:
    budget, part = e.rows + -(-longest // e.part) * e.part, e.part
  else:
    budget = budget or e.budget
    part = part_of(config, budget)
  pages = 2 + int(1.02 * e.rows * -(-(length + 1) // e.page)) + e.rows
  engine = Engine(
    network, pages=pages, page=e.page, length=length, rows=e.rows, budget=budget, part=part, steps=steps or e.steps,
    chunks=1 if policy in (OURS, ORCA) else e.rows, policy=OURS if policy == SEVERAL else policy, prefix=False,
  )  # fmt: skip
  engine.warm_up()
  ended = traces.replay(engine, asked)
  require(len(ended) == len(asked), "a request was lost")
  return ended, engine.counters


def throughput(config, read, _, console) -> list[dict]:
  """{length, ratio, policy, rate: tokens a second, padding: share of the rows} of requests that all wait."""
  network, t, rows = read(), config.throughput, []
  for length in t.lengths:
    for ratio in t.ratios:
      prompt = min(length - 1, round(length * ratio / (1 + ratio)))
      rng = np.random.default_rng(config.seed)
      vocab = network.model.config.vocab_size
      count = t.requests
      asked = requests(rng, [prompt] * count, [length - prompt] * count, [0] * count, vocab)
      for policy in t.policies:
        ended, counters = served(config, network, policy, asked)
        rate = metrics.summary(ended)["total_rate"]
        padding = counters["padding"] / (counters["padding"] + counters["tokens"])
        rows.append(dict(length=length, ratio=ratio, policy=policy, rate=rate, padding=padding))
        console.say(f"  {length} tokens, P:D {ratio}, {policy}: {rate:.4g} tokens/s, {padding:.0%} padding")
  return rows


def budgets(config, read, found: dict, console) -> dict:
  """{"rate": {budget: tokens a second of requests that all wait}, "chosen": the budget that the fitted cost finds best}
  at the longest requests and the P:D nearest to the balance."""
  network, e, t = read(), config.engine, config.throughput
  length, ratio = max(t.lengths), nearest(config, t.ratios)
  prompt = min(length - 1, round(length * ratio / (1 + ratio)))
  asked = requests(
    np.random.default_rng(config.seed), [prompt] * t.requests, [length - prompt] * t.requests, [0] * t.requests,
    network.model.config.vocab_size,
  )  # fmt: skip
  fitted = cost.StepCost(np.array(found["profile"]["weights"]), config.profile.tile_rows)
  how = dict(prompt=prompt, answer=length - prompt, rows=e.rows, budgets=tuple(t.budgets))
  chosen, _ = cost.choose_budget(fitted, **how)
  rates = {}
  for budget in t.budgets:
    ended, _ = served(config, network, OURS, asked, budget=budget)
    rates[f"{budget}"] = metrics.summary(ended)["total_rate"]
    console.say(f"  steps of {budget} tokens: {rates[f'{budget}']:.4g} tokens/s" + " (chosen)" * (budget == chosen))
  return {"rate": rates, "chosen": chosen}


def online(config, read, found: dict, console) -> list[dict]:
  """{load, policy, latency_p50, ttft_p50, tbt: quantiles, longest gap} of requests that arrive at random.

  A load of 1 asks for the tokens a second that this paper's policy reached where all waited. Every call makes one
  token of a row: of several, all but the first would come in no time.
  """
  network, o, rows = read(), config.online, []
  capacity = max(row["rate"] for row in found["throughput"] if row["policy"] == OURS)
  vocab = network.model.config.vocab_size
  for load in o.loads:
    rng = np.random.default_rng(config.seed)
    prompts = traces.zipf(rng, low=o.low, high=o.high, theta=0.4, count=o.requests)
    answers = np.maximum(1, prompts // o.ratio)
    arrival = traces.poisson(rng, rate=load * capacity * o.requests / (prompts + answers).sum(), count=o.requests)
    asked = requests(rng, prompts, answers, arrival, vocab)
    for policy in o.policies:
      ended, _ = served(config, network, policy, asked, steps=config.online.steps)
      gaps = [gap for s in ended for gap in metrics.between(s)]
      summary = metrics.summary(ended)
      row = dict(load=load, policy=policy, longest=max(gaps), tbt=np.percentile(gaps, QUANTILES).tolist())
      row |= {name: summary[name] for name in ("latency_p50", "latency_p99", "ttft_p50", "ttft_p99", "tbt_p99")}
      rows.append(row)
      console.say(f"  load {load}, {policy}: p99 between tokens {row['tbt_p99']:.4g} s, first {row['ttft_p50']:.4g} s")
  return rows


def balance(config) -> float:
  """P:D at which as many chunks are read as tokens ride along."""
  e = config.engine
  return (e.budget - e.rows) / (e.rows - 1)


def nearest(config, ratios: Sequence[float]) -> float:
  """The ratio that is nearest to the balance."""
  return min(ratios, key=lambda ratio: abs(np.log(ratio / balance(config))))


def gains(found: dict, rival: str) -> dict[tuple[int, float], float]:
  """{(length, ratio): tokens a second over the rival's}."""
  rate = {(row["length"], row["ratio"], row["policy"]): row["rate"] for row in found["throughput"]}
  return {key[:2]: rate[key] / rate[*key[:2], rival] for key in rate if key[2] == OURS}


def at_balance(config, gained: dict) -> float:
  """The least over lengths at the ratio nearest to the balance."""
  near = nearest(config, sorted({ratio for _, ratio in gained}))
  return min(value for (_, ratio), value in gained.items() if ratio == near)
