"""The engine itself, reading and decoding in one batch or in turns, and what the simulator says of the same requests.

Its clock is a real one, or ("counted") one that moves on by what each step would take on the first simulated chip.
"""

import functools
import time
from collections.abc import Callable

import jax
import numpy as np

from experiments.nexus import chips, simulate, workloads
from experiments.nexus.systems import World
from jaxlab.core.checks import require
from jaxlab.models import Transformer, inference
from jaxlab.models.config import qwen3
from jaxlab.models.inference import Network
from jaxlab.serving import cost, metrics, policies, simulator, traces
from jaxlab.serving.cost import StepCost, Work
from jaxlab.serving.engine import Engine
from jaxlab.serving.policies import Plan, View
from jaxlab.serving.requests import Request, Served
from jaxlab.serving.simulator import Lane, Segment, Server

KEPT = ("ttft_mean", "ttft_p95", "tbt_mean", "tbt_p95", "tbt_p99", "latency_p95")
MIXED, SHORTEST, TURNS = "sarathi", "spf", "nexus_time"
WORKLOAD = "mixed"


class Watch:
  """A clock, and a policy that notes the work and the seconds of the engine's steps.

  Args:
    cost: seconds that the clock moves on for a step's work; None: time itself does.
  """

  def __init__(self, part: int, cost: Callable[[Work], float] | None):
    self.part, self.cost, self.now, self.steps = part, cost, 0.0, []
    self._work: tuple[Work, float] | None = None

  def clock(self) -> float:
    return time.perf_counter() if self.cost is None else self.now

  def wait(self, seconds: float) -> None:
    """Nobody is served."""
    self._work = None
    if self.cost is None:
      time.sleep(seconds)
    else:
      self.now += seconds

  def watched(self, policy: Callable[[View], Plan]) -> Callable[[View], Plan]:
    def plans(view: View) -> Plan:
      if self._work:
        self.steps.append((self._work[0], view.now - self._work[1]))
      plan = policy(view)
      self._work = (plan.work(self.part), view.now) if plan.decode or plan.chunks else None
      if self.cost is not None and self._work:
        self.now += self.cost(self._work[0])
      return plan

    return plans


def engine(config, found: dict, console) -> dict:
  """{fit: what the cost of a step misses, share, capacity: requests a second, rows of each load and policy: as measured
  and as simulated, same: share of requests whose tokens are those of the mixed batches, repeated}."""
  e = config.engine
  network = _network(config)
  world = simulate.a_world(config, config.simulate.chips[0], WORKLOAD, found) if e.clock == "counted" else None
  counted = world and (lambda work: sum(simulator.alone(world.chip, world.truth(work), 100)))
  asked = functools.partial(workloads.requests, WORKLOAD, count=e.requests, vocab=e.shape.vocab_size, divide=e.divide)
  ended, steps = serve(config, network, policies.sarathi, asked(rate=0, seed=config.seed + 1), counted)
  capacity = len(ended) / max(s.times[-1] for s in ended)
  works, seconds = zip(*steps, strict=True)
  fitted = cost.fit(works, seconds, tile=config.simulate.tile)
  share = _best_share(config, fitted, asked(rate=max(e.loads) * capacity, seed=config.seed + 2))
  console.say(f"  {capacity:.3g} requests a second at once; reading gets {share:.0%} of the time in turns")
  turns = functools.partial(policies.nexus_time, share=_switched(share, e.decode_first), cost=fitted)
  rows, tokens = [], {}
  for load in e.loads:
    requests = asked(rate=load * capacity, seed=config.seed)
    for name, policy in ((MIXED, policies.sarathi), (SHORTEST, policies.spf), (TURNS, turns)):
      ended, _ = serve(config, network, policy, requests, counted)
      tokens[load, name] = {s.request.id: s.tokens for s in ended}
      rows.append(
        dict(
          load=load, policy=name, **_kept(ended), simulated=_kept(simulated(config, policy, requests, fitted, world))
        )
      )
      r = rows[-1]
      console.say(
        f"  load {load}, {name}: first {r['ttft_mean']:.3g} s (simulated {r['simulated']['ttft_mean']:.3g}), between "
        f"{r['tbt_mean']:.3g} s ({r['simulated']['tbt_mean']:.3g}), p95 {r['tbt_p95']:.3g} s"
      )
  same = np.mean([made == tokens[load, MIXED][id] for (load, _), of in tokens.items() for id, made in of.items()])
  return dict(
    fit=cost.error(fitted, works, seconds), weights=fitted.weights.tolist(), share=share, capacity=capacity, rows=rows,
    same=float(same), repeated=_repeated(config, world, turns) if world else {},
  )  # fmt: skip


def gate(config, found: dict, console) -> dict:
  """{"rows": mixed batches at every load, as simulated on the chip that was calibrated}: the engine's network, and the
  host's time of every other simulation. `engine` measured the same requests."""
  e, s = config.engine, config.simulate
  chip = chips.chip("measured", found["calibrate"])
  truth = simulator.steps_of(chip, qwen3(**e.shape), groups=s.groups, tile=s.tile)
  asked = functools.partial(workloads.requests, WORKLOAD, count=e.requests, vocab=e.shape.vocab_size, divide=e.divide)
  server, rows = _server(config)._replace(overhead=s.overhead), []
  for load in e.loads:
    requests = asked(rate=load * found["engine"]["capacity"], seed=config.seed)
    ended = simulator.simulate(requests, [Lane(policies.sarathi)], truth, server=server, chip=chip).ended
    rows.append(dict(load=load, **_kept(ended)))
    console.say(f"  load {load}: first {rows[-1]['ttft_mean']:.3g} s, between {rows[-1]['tbt_mean']:.3g} s")
  return {"rows": rows}


def _repeated(config, world: World, turns) -> dict[str, list[float]]:
  """{policy: mixed batches over it, for every seed}, at the highest load: of shortest first the mean seconds to the
  first token, of turns the 95th percentile between tokens."""
  e, made = config.engine, {SHORTEST: [], TURNS: []}
  for seed in range(config.seed, config.seed + e.seeds):
    asked = functools.partial(workloads.requests, WORKLOAD, count=e.seeds_requests, divide=e.divide)
    serve_ = lambda policy, requests: metrics.summary(simulated(config, policy, requests, None, world))
    capacity = e.seeds_requests / serve_(policies.sarathi, asked(rate=0, seed=seed + 1))["makespan"]
    requests = asked(rate=max(e.loads) * capacity, seed=seed)
    mixed = serve_(policies.sarathi, requests)
    made[SHORTEST].append(mixed["ttft_mean"] / serve_(policies.spf, requests)["ttft_mean"])
    made[TURNS].append(mixed["tbt_p95"] / serve_(turns, requests)["tbt_p95"])
  return made


def serve(config, network: Network, policy, requests: list[Request], counted: Callable[[Work], float] | None):
  """(who was served, (work, seconds) of every step) by an engine that has compiled all it needs."""
  e = config.engine
  watch = Watch(e.part, counted)
  server = Engine(
    network, pages=e.pages, page=e.page, rows=e.rows, budget=e.budget, chunks=e.rows, part=e.part, steps=1,
    policy=watch.watched(policy), prefix=False, clock=watch.clock, length=_longest(config),
  )  # fmt: skip
  server.warm_up()
  ended = traces.replay(server, requests, wait=watch.wait)
  require(len(ended) == len(requests), "a request was lost")
  return ended, watch.steps


def simulated(
  config, policy, requests: list[Request], fitted: StepCost | None, world: World | None = None
) -> list[Served]:
  """The same requests in the simulator, whose steps cost what was fitted, or what they do on a chip."""
  steps = world.truth if world else lambda work: [Segment(None, fitted(work))]
  return simulator.simulate(requests, [Lane(policy)], steps, server=_server(config), chip=world and world.chip).ended


def _server(config) -> Server:
  """As the engine's."""
  e = config.engine
  return Server(pages=e.pages, page=e.page, rows=e.rows, budget=e.budget, chunks=e.rows, part=e.part)


def _kept(ended: list[Served]) -> dict:
  made = metrics.summary(ended)
  return {name: made[name] for name in KEPT}


def _switched(share: float, decode_first: float) -> Callable[[View], float]:
  """The paper's change of mode: at 70 % of the cache in use decoding gets more."""
  used = lambda view: view.pages.held / (len(view.pages.holders) - 1)
  return lambda view: share if used(view) < 0.7 else min(share, decode_first)


def _best_share(config, fitted: StepCost, requests: list[Request]) -> float:
  """By the 95th percentile of seconds a token, in the simulator."""
  e = config.engine

  def late(share):
    policy = functools.partial(policies.nexus_time, share=_switched(share, e.decode_first), cost=fitted)
    return metrics.summary(simulated(config, policy, requests, fitted))["latency_p95"]

  return min(e.shares, key=late)


def _longest(config) -> int:
  """Tokens of a request at most."""
  most = lambda tables: max(tables[kind].points()[-1][1] for kind in workloads.PARTS[WORKLOAD])
  return int((most(workloads.PROMPTS) + most(workloads.ANSWERS)) / config.engine.divide) + 4


def _network(config) -> Network:
  e = config.engine
  made = lambda: Transformer(qwen3(**e.shape), jax.random.key(config.seed))
  return jax.jit(inference.take_apart)(jax.jit(lambda: jax.tree.map(lambda a: a.astype(e.dtype), made()))())
