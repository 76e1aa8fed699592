"""All systems on simulated chips: rates that they sustain, what each part of Nexus does, what its model misses."""

import functools
import itertools
from collections.abc import Callable

import jax
import numpy as np

from experiments.nexus import chips, systems, workloads
from experiments.nexus.systems import Setting, World
from jaxlab.serving import metrics, nexus, simulator
from jaxlab.serving.cost import Work
from jaxlab.serving.nexus import DECODE, PREFILL, Load, Settings
from jaxlab.serving.simulator import Found

KEPT = (
  "ttft_mean", "ttft_p50", "ttft_p95", "tbt_mean", "tbt_p50", "tbt_p95", "tbt_p99", "latency_p50", "latency_p95",
  "delay_mean",
)  # fmt: skip


def a_world(config, chip: str, workload: str, found: dict, **options) -> World:
  network = chips.NETWORKS[workloads.NETWORK[workload]]
  measured = found.get("calibrate")
  return systems.world(config, chip, network, workloads.mean_prompt(workload), measured, **options)


def run(config, world: World, workload: str, system: str, load: float, how: Setting, *, seed: int) -> Found:
  """One system at a load (0: all requests wait from the beginning)."""
  s = config.simulate
  asked = workloads.requests(workload, rate=load * world.alone, count=s.requests, seed=seed)
  options = systems.build(system, world, config, how)
  return simulator.simulate(asked, segments=world.truth, chip=world.chip, noise=s.noise, seed=seed, **options)


def row(config, world: World, workload: str, system: str, load: float, how: Setting, *, seeds, **named) -> dict:
  """What is kept of the runs with all seeds: of requests after the first tenth, pooled; and the splits."""
  ended, changes, spans = [], [], []
  for seed in seeds:
    found = run(config, world, workload, system, load, how, seed=seed)
    changes.append(len(found.splits) - 1 if found.splits else 0)
    spans.append(max(s.times[-1] for s in found.ended))
    ended += [s for s in found.ended if s.order >= config.simulate.requests // 10 or not load]
  summary = metrics.summary(ended)
  percent = [percent for _, percent in found.splits]
  return named | dict(
    system=system, load=load, rate=load * world.alone, makespan=float(np.mean(spans)), switches=float(np.mean(changes)),
    split=float(np.median(percent)) if percent else -1.0, **{name: summary[name] for name in KEPT},
  )  # fmt: skip


def tuned(config, world: World, workload: str, names, console) -> dict[str, dict]:
  """{system: its best setting}: what sustains most, on a seed of its own; of equals the one with the least P95s."""
  s, found = config.simulate, {}
  for system in (name for name in s.tuned if name in names):
    rest = [dict()]
    if system == "fastserve":
      rest = [dict(quantum=quantum) for quantum in s.quanta]
    elif system == "nexus":
      rest = [dict(gamma=gamma) for gamma in s.gammas]
    scores = {}
    for budget in s.budgets:
      for others in rest:
        how = dict(budget=budget, **others)
        rows = [
          row(config, world, workload, system, load, Setting(**how), seeds=[config.seed + 1000])
          for load in s.tuning_loads
        ]
        scores[tuple(how.items())] = sustained(rows, system, limit_of(world.name, workload))
    found[system] = dict(max(scores, key=scores.__getitem__))
    console.say(
      f"  {system}: {found[system]}, {max(scores.values()):.3g} of the load 1 (worst {min(scores.values()):.3g})"
    )
  return found


def setting(found: dict, system: str, **others) -> Setting:
  """The tuned setting of a system, or that of the one it is a variant of."""
  like = system if system in found else "vllm" if system in systems.MONOLITHIC else "nexus"
  return Setting(**found[like] | others)


def sweep(config, found: dict, console, *, chip: str, workload: str) -> dict:
  """{settings, rows}: every system at every load, and with all requests waiting."""
  s = config.simulate
  world = a_world(config, chip, workload, found)
  console.say(
    f"  load 1 is {world.alone:.3g} requests a second, {world.server.pages * s.page} tokens fit into the cache"
  )
  main = (chip, workload) == (s.chips[0], s.workloads[0])
  systems_, seeds = (s.systems, s.seeds) if main else (s.few, s.seeds_more)
  settings, rows = tuned(config, world, workload, systems_, console), []
  for system in systems_:
    for load in (*s.loads, 0.0):
      how = setting(settings, system)
      rows.append(row(config, world, workload, system, load, how, seeds=range(config.seed, config.seed + seeds)))
    console.say(f"  {system}: {sustained(rows, system, limit_of(chip, workload)):.3g} of the load 1")
  return dict(settings=settings, rows=rows, alone=world.alone)


def ablation(config, found: dict, console, *, chip: str, workload: str = "mixed") -> dict:
  """{rows}: which of order and split does what; other splits; other searches, hysteresis, models of memory, ages."""
  s = config.simulate
  world = a_world(config, chip, workload, found)
  tuned_ = found[f"sweep.{chip}.{workload}"]["settings"]
  seeds = range(config.seed, config.seed + s.seeds_more)
  arms: dict[str, tuple[str, dict]] = {name: (name, {}) for name in s.arms}
  arms |= {
    "brute": ("nexus", dict(search=systems.brute)),
    "delta 0": ("nexus", dict(settings=Settings(delta=0))),
    "no contention": ("nexus", dict(settings=Settings(contention=False))),
    "window": ("nexus", dict(settings=Settings(window=True))),
    "band": ("nexus", dict(settings=Settings(band=0.02))),
    "steps of 5": ("nexus", dict(settings=Settings(step=5))),
  } | {f"gamma {gamma:g}": ("nexus", dict(gamma=gamma)) for gamma in s.gammas_shown}
  rows = []
  for arm, (system, others) in arms.items():
    rows.append(
      row(config, world, workload, system, s.arms_load, setting(tuned_, system, **others), seeds=seeds, arm=arm)
    )
    r = rows[-1]
    console.say(f"  {arm}: first {r['ttft_mean']:.3g} s, between {r['tbt_mean']:.3g} s, {r['switches']:.0f} switches")
  better = a_world(config, chip, workload, found, memory=True)
  how = setting(tuned_, "nexus")
  rows.append(row(config, better, workload, "nexus", s.arms_load, how, seeds=seeds, arm="memory by share"))
  slower = a_world(config, chip, workload, found, mixed=s.mixed)
  for load in s.loads:
    rows.append(row(config, slower, workload, "vllm", load, setting(tuned_, "vllm"), seeds=seeds, arm="slow mixed"))
  return dict(rows=rows)


def predictor(config, found: dict, console, *, chip: str, workload: str = "mixed") -> dict:
  """{arm: {prefill, decode: mean error of the steps of one run as a share, bias}}: of the controller's model."""
  world = a_world(config, chip, workload, found)
  how = setting(found[f"sweep.{chip}.{workload}"]["settings"], "nexus")
  steps = run(config, world, workload, "nexus", config.simulate.arms_load, how, seed=config.seed).steps
  kinds = {
    "beside": [step for step in steps if step.beside is not None],
    "alone": [step for step in steps if step.beside is None],
  }
  better = a_world(config, chip, workload, found, memory=True)
  made: dict = dict(curves=_curves(world, better))
  for kind, arm, believes, settings in (
    ("alone", "alone", world, Settings()),
    ("beside", "beside", world, Settings()),
    ("beside", "no contention", world, Settings(contention=False)),
    ("beside", "window", world, Settings(window=True)),
    ("beside", "memory by share", better, Settings()),
    ("beside", "memory by share, no contention", better, Settings(contention=False)),
  ):
    made[arm] = {}
    for phase, name in ((PREFILL, "prefill"), (DECODE, "decode")):
      mine = [step for step in kinds[kind] if step.lane == phase]
      if mine:
        off = predicted(believes, mine, phase, settings) / np.array([step.seconds for step in mine]) - 1
        made[arm][name] = dict(error=float(np.abs(off).mean()), bias=float(off.mean()), steps=len(mine))
        console.say(f"  {arm}, {name}: off by {np.abs(off).mean():.1%} (bias {off.mean():+.1%}) in {len(mine)} steps")
  return made


def _curves(world: World, better: World) -> dict:
  """{phase: {percent, truth, paper, memory}}: seconds of one step of a phase by itself, over its share."""
  percent, made = np.arange(10, 101, 5), {}
  for phase, name, work in (
    (PREFILL, "prefill", Work.of(rows=1024, chunks=[(3072, 1024)])),
    (DECODE, "decode", Work.of(rows=32, contexts=[2000] * 32)),
  ):
    loads = [Load.of(world.network, **{name: work})] * len(percent)
    seconds = lambda w, phase=phase, loads=loads: _seconds(phase, percent, loads, w, Settings()).tolist()
    truth = [sum(simulator.alone(world.chip, world.truth(work), int(p))) for p in percent]
    made[name] = dict(percent=percent.tolist(), truth=truth, paper=seconds(world), memory=seconds(better))
  return made


def predicted(world: World, steps: list[simulator.Step], phase: int, settings: Settings) -> np.ndarray:
  """Seconds that the controller's model gives for steps of a phase."""

  def load(step):
    both = (step.work, step.beside) if phase == PREFILL else (step.beside, step.work)
    return Load.of(world.network, **{k: w for k, w in zip(("prefill", "decode"), both, strict=True) if w is not None})

  return _seconds(phase, np.array([step.percent for step in steps]), [load(step) for step in steps], world, settings)


_BLOCK = 64  # loads of one call: another number would be another program


def _seconds(phase: int, percent: np.ndarray, loads: list[Load], world: World, settings: Settings) -> np.ndarray:
  found = []
  for first in range(0, len(loads), _BLOCK):
    some, at = loads[first : first + _BLOCK], percent[first : first + _BLOCK]
    missing = _BLOCK - len(some)
    stacked = jax.tree.map(lambda *values: np.stack(values), *some, *[some[-1]] * missing)
    made = _many()(phase, np.pad(at, (0, missing), mode="edge"), stacked, world.machine, settings)
    found.append(np.asarray(made)[: len(some)])
  return np.concatenate(found)


@functools.cache
def _many() -> Callable:
  return jax.jit(jax.vmap(nexus.seconds_of, (None, 0, 0, None, None)))


def limit_of(chip: str, workload: str) -> float:
  """Seconds a token that 95 % of the requests have to keep to."""
  return chips.limit(chip, chips.NETWORKS[workloads.NETWORK[workload]])


def sustained(rows: list[dict], system: str, limit: float, arm: str | None = None) -> float:
  """The load up to which P95 of seconds a token keeps to the limit, between the measured ones in proportion to its
  logarithm; the largest measured one where it always does, the least times limit over latency where it never does."""
  mine = sorted(
    (r["load"], r["latency_p95"]) for r in rows if r["system"] == system and r["load"] and r.get("arm") == arm
  )
  if mine[0][1] > limit:
    return mine[0][0] * limit / mine[0][1]
  for (low, below), (high, above) in itertools.pairwise(mine):
    if above > limit:
      return low + (high - low) * float(np.log(limit / below) / np.log(above / below))
  return mine[-1][0]
