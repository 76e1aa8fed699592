"""The systems that are compared: lanes, their policies, and who decides the split."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.nexus import chips
from experiments.nexus.fastserve import skip_join
from jaxlab.core.checks import require_choice
from jaxlab.models.config import TransformerConfig
from jaxlab.serving import nexus, policies, simulator
from jaxlab.serving.cost import OPERATORS, Work, volumes
from jaxlab.serving.nexus import Load, Machine, Sample, Settings, Split
from jaxlab.serving.simulator import Chip, Lane, Segment, Server, Tick


class World(NamedTuple):
  """A chip that serves a network: `truth` gives its steps' segments, `machine` is what the controller believes."""

  name: str
  chip: Chip
  network: TransformerConfig
  truth: Callable[[Work], list[Segment]]
  machine: Machine
  server: Server
  alone: float  # requests a second whose prompts the chip could read if it did nothing else


MONOLITHIC = {"vllm": policies.sarathi, "sglang": policies.sarathi, "spf": policies.spf}
LANES = {  # policy of the prefill's lane, who decides
  "nexus": (policies.shortest_only, "dynamic"),
  "fcfs_dynamic": (policies.read_only, "dynamic"),
  "fcfs_static": (policies.read_only, 50),
  "static_30": (policies.shortest_only, 30),
  "static_50": (policies.shortest_only, 50),
  "static_70": (policies.shortest_only, 70),
  "reactive": (policies.shortest_only, "reactive"),
}
SYSTEMS = (*MONOLITHIC, "fastserve", "vllm_pd", *LANES)


class Setting(NamedTuple):
  """What is tuned of a system, or varied: tokens of a step, tokens that a second of waiting counts for, MLFQ's quantum
  in seconds; how Nexus splits."""

  budget: int = 2048
  gamma: float = 15.0
  quantum: float = 0.5
  settings: Settings = Settings()
  search: Callable = nexus.greedy


def build(name: str, world: World, config, how: Setting) -> dict:
  """Arguments of `simulate` beside requests, segments and chip."""
  require_choice("config.simulate.systems", name, SYSTEMS)
  s = config.simulate
  overhead = s.overhead_sglang if name == "sglang" else s.overhead
  options = dict(server=world.server._replace(budget=how.budget, overhead=overhead, prefix=name == "sglang"))
  ordered = lambda policy: functools.partial(policy, gamma=how.gamma) if policy in _ORDERED else policy
  if name in MONOLITHIC:
    return options | dict(lanes=[Lane(ordered(MONOLITHIC[name]))])
  if name == "fastserve":
    reading = lambda tokens: sum(simulator.alone(world.chip, world.truth(_chunk(tokens, 0)), 100))
    return options | dict(lanes=[Lane(functools.partial(skip_join, quantum=how.quantum, seconds=reading))])
  if name == "vllm_pd":
    bytes_ = chips.bytes_of_a_token(world.network)
    moved = lambda tokens: tokens * bytes_ / chips.facts(world.name).link
    return options | dict(lanes=[Lane(policies.read_only), Lane(policies.decode_only, chip=1)], handoff=moved)
  policy, split = LANES[name]
  lanes = [Lane(ordered(policy), phase="prefill"), Lane(policies.decode_only, phase="decode")]
  return options | dict(lanes=lanes, controller=_controller(split, world, config, how))


_ORDERED = (policies.spf, policies.shortest_only)


def _controller(split, world: World, config, how: Setting) -> Callable[[Tick], int]:
  if split == "dynamic":
    return dynamic(world, how)
  if split == "reactive":
    return reactive(tbt=config.simulate.slo_tbt * chips.limit(world.name, world.network), ttft=config.simulate.slo_ttft)
  return lambda tick: split


def dynamic(world: World, how: Setting) -> Callable[[Tick], int]:
  """Nexus: the split that the model of costs finds at every step of either lane."""
  split = Split()

  def decide(tick: Tick) -> int:
    nonlocal split
    if tick.prefill is not None and tick.decode is not None:
      load = Load.of(world.network, prefill=tick.prefill, decode=tick.decode)
      split = nexus.control(split, load, tick.kv_used, world.machine, how.settings, search=how.search)
    return split.prefill

  return decide


def reactive(*, tbt: float, ttft: float, every: float = 1.0, by: int = 5) -> Callable[[Tick], int]:
  """Feedback as semi-PD has it: every second a step towards the lane that violates its limit, decode first.

  Args:
    tbt: seconds between tokens, of the median of who decodes; ttft: seconds that somebody waits for a first token.
  """
  percent, then = 50, 0.0

  def decide(tick: Tick) -> int:
    nonlocal percent, then
    if tick.now - then >= every:
      then = tick.now
      gaps = [s.times[-1] - s.times[-2] for s in tick.running if len(s.times) > 1]
      late = [tick.now - s.request.arrival for s in (*tick.running, *tick.waiting) if not s.times]
      if gaps and np.median(gaps) > tbt:
        percent = max(10, percent - by)
      elif late and max(late) > ttft:
        percent = min(90, percent + by)
    return percent

  return decide


def brute(load: Load, current: int, phase: int, machine: Machine, settings: Settings) -> int:
  """All splits, in the place of the greedy search."""
  return int(nexus.brute_split(load, phase, machine, settings))


def _chunk(tokens: int, before: int) -> Work:
  return Work.of(rows=tokens, chunks=[(before + tokens, tokens)])


_FITTED: dict[str, Machine] = {}  # every part of a run asks for the same, and a fit takes seconds


def fitted(chip: Chip, network: TransformerConfig, truth, rng, *, noise: float, memory: bool) -> Machine:
  """The controller's own model, from timed operators of whole stages at ten shares; `memory` as in `fit_curves`."""
  chunks = [_chunk(tokens, before) for tokens in (256, 1024, 2048) for before in (0, 2048, 8192)]
  rows = [Work.of(rows=n, contexts=[at] * n) for n in (2, 16, 64) for at in (500, 2000, 6000)]
  curves = []
  for stage in (chunks, rows):
    samples: dict[str, list[Sample]] = {}
    for work in stage:
      flops, bytes_ = volumes(network, work)
      for percent in range(10, 101, 10):
        spent = dict.fromkeys(OPERATORS, 0.0)
        for segment, seconds in zip(truth(work), simulator.alone(chip, truth(work), percent), strict=True):
          spent[OPERATORS[segment.operator]] += seconds
        for i, name in enumerate(OPERATORS):
          if spent[name]:
            seconds = spent[name] * float(np.exp(noise * rng.standard_normal()))
            samples.setdefault(name, []).append(Sample(float(flops[i]), float(bytes_[i]), percent / 100, seconds))
    curves.append(nexus.fit_curves(samples, peak=chip.peak, bandwidth=chip.bandwidth, memory=memory))
  return Machine(chip.bandwidth, *curves)


def world(
  config, name: str, network: TransformerConfig, prompt: float, measured: dict | None, *, mixed: float = 1.0,
  memory: bool = False,
) -> World:  # fmt: skip
  """`prompt`: mean tokens, for the load of 1; mixed: as in `Chip`; memory: as in `fitted`."""
  s, chip = config.simulate, chips.chip(name, measured, mixed=mixed)
  truth = simulator.steps_of(chip, network, groups=s.groups, tile=s.tile)
  key = repr((chip._replace(mixed=1.0), network, s.groups, s.tile, s.noise, config.seed, memory))
  if key not in _FITTED:
    _FITTED[key] = fitted(chip, network, truth, np.random.default_rng(config.seed), noise=s.noise, memory=memory)
  machine = _FITTED[key]
  pages = min(chips.cache_pages(name, network, s.page), s.most_pages)
  ends = np.arange(0, prompt, 2048)
  read = sum(sum(simulator.alone(chip, truth(_chunk(int(min(2048, prompt - at)), int(at))), 100)) for at in ends)
  return World(name, chip, network, truth, machine, Server(pages=pages, page=s.page, rows=s.rows), 1 / read)
