"""Requests that all wait, and requests that arrive at random, served under every policy by one engine."""

from collections.abc import Sequence

import numpy as np

from jaxlab.core.checks import require
from jaxlab.models.inference import Network
from jaxlab.serving import metrics, traces
from jaxlab.serving.engine import Engine
from jaxlab.serving.requests import Request, Served

OURS, TURNS, ORCA = "sarathi", "request_level", "orca"
WHOLE = (ORCA, TURNS)  # policies that read prompts whole
QUANTILES = (0, 5, 10, 25, 50, 75, 90, 95, 99, 100)


def requests(rng, prompts: Sequence[int], answers: Sequence[int], arrival: Sequence[float], vocab: int):
  """Random prompts; nothing stops an answer."""
  trace = traces.Trace(np.asarray(arrival, float), np.asarray(prompts), np.asarray(answers))
  return traces.requests_of(trace, rng, vocab_size=vocab)


def served(config, network: Network, policy: str, asked: list[Request]) -> tuple[list[Served], dict]:
  """(who was served, the engine's counters) by an engine that has compiled all it needs."""
  e = config.engine
  length = max(len(r.prompt) + r.tokens for r in asked)
  longest = max(len(r.prompt) for r in asked)
  budget = e.rows + -(-longest // e.part) * e.part if policy in WHOLE else e.budget
  pages = 2 + int(1.02 * e.rows * -(-(length + 1) // e.page)) + e.rows
  engine = Engine(
    network, pages=pages, page=e.page, length=length, rows=e.rows, budget=budget, part=e.part, steps=e.steps,
    chunks=1 if policy in (OURS, ORCA) else e.rows, policy=policy, prefix=False,
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


def online(config, read, found: dict, console) -> list[dict]:
  """{load, policy, latency_p50, ttft_p50, tbt: quantiles, longest gap} of requests that arrive at random.

  A load of 1 asks for the tokens a second that this paper's policy reached where all waited.
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
      ended, _ = served(config, network, policy, asked)
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
  return (e.budget - e.rows) // e.part * e.part / (e.rows - 1)


def gains(found: dict, rival: str) -> dict[tuple[int, float], float]:
  """{(length, ratio): tokens a second over the rival's}."""
  rate = {(row["length"], row["ratio"], row["policy"]): row["rate"] for row in found["throughput"]}
  return {key[:2]: rate[key] / rate[*key[:2], rival] for key in rate if key[2] == OURS}


def at_balance(config, gained: dict) -> float:
  """The least over lengths at the ratio nearest to the balance."""
  near = min({ratio for _, ratio in gained}, key=lambda ratio: abs(np.log(ratio / balance(config))))
  return min(value for (_, ratio), value in gained.items() if ratio == near)
