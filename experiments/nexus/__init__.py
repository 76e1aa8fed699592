"""Nexus: prefill and decode side by side on shares of one GPU, against one batch of both, and two GPUs.

Parts: `calibrate` measures a chip, `engine` serves requests in one batch or in turns and is predicted by the simulator,
`sweep` finds the rates that systems sustain on simulated chips, `ablation` takes Nexus apart, `predictor` compares the
controller's model with what the simulated chip does.
"""

from pathlib import Path

import numpy as np

from experiments import results
from experiments.nexus.calibrate import calibrate
from experiments.nexus.chips import title
from experiments.nexus.drawing import draw
from experiments.nexus.engine import MIXED, SHORTEST, TURNS, engine, gate
from experiments.nexus.simulate import ablation, limit_of, predictor, sustained, sweep
from experiments.results import Claim

MONOLITHIC = ("vllm", "sglang")
_OTHERS = {"spf": "shortest first in one batch", "fastserve": "FastServe", "reactive": "a split by feedback"}

__all__ = ["claims", "draw", "finding", "measure"]


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """{part: what was measured}; of a chip "sweep.<chip>.<workload>", "ablation.<chip>", "predictor.<chip>"."""
  del cache
  s, found, parts = config.simulate, {}, {}
  if "measured" in s.chips:
    parts["calibrate"] = lambda: calibrate(config, console)
  parts["engine"] = lambda: engine(config, found, console)
  if config.engine.clock == "wall":
    parts["gate"] = lambda: gate(config, found, console)
  for chip in s.chips:
    for workload in s.workloads if chip == s.chips[0] else s.workloads[:1]:
      where = dict(chip=chip, workload=workload)
      parts[f"sweep.{chip}.{workload}"] = lambda where=where: sweep(config, found, console, **where)
  parts[f"ablation.{s.chips[0]}"] = lambda: ablation(config, found, console, chip=s.chips[0])
  parts[f"predictor.{s.chips[0]}"] = lambda: predictor(config, found, console, chip=s.chips[0])
  for name, part in parts.items():

    def run(name=name, part=part):
      console.say(name)
      return part()

    found[name] = results.part(workdir, name, run)
  return found


def gain(found: dict, chip: str, workload: str, over: tuple[str, ...], system: str = "nexus") -> float:
  """Rate that a system sustains over the best of others'."""
  rows = found[f"sweep.{chip}.{workload}"]["rows"]
  at = lambda name: sustained(rows, name, limit_of(chip, workload))
  return at(system) / max(map(at, over))


def arms(config, found: dict) -> dict[str, dict]:
  """Of the ablation, by name; a system at several loads left out."""
  return {
    row["arm"]: row for row in found[f"ablation.{config.simulate.chips[0]}"]["rows"] if row["arm"] != "slow mixed"
  }


def directions(config, found: dict) -> dict[str, bool]:
  """What the paper's ablation says: does it come out?"""
  arm = arms(config, found)
  ratio = lambda mine, other, of: arm[mine][of] / arm[other][of]
  return {
    "a dynamic split alone: less between tokens": ratio("fcfs_dynamic", "fcfs_static", "tbt_mean") < 1,
    "a dynamic split alone: later first tokens": ratio("fcfs_dynamic", "fcfs_static", "ttft_mean") > 1,
    "shortest first alone: sooner first tokens": ratio("static_50", "fcfs_static", "ttft_mean") < 1,
    "both, over shortest first: sooner first tokens": ratio("nexus", "static_50", "ttft_mean") < 1,
    "both, over shortest first: less between tokens": ratio("nexus", "static_50", "tbt_mean") < 1,
  }


def missed(found: dict, *, calibrated: bool = True) -> float:
  """Of the engine's mean times with mixed batches, the worst error of the simulator, as a share: of the chip as it was
  calibrated where the engine's clock is a real one, or of a cost that is fitted to the engine's own steps."""
  rows = [row for row in found["engine"]["rows"] if row["policy"] == MIXED]
  gated = calibrated and "gate" in found
  said = found["gate"]["rows"] if gated else [row["simulated"] for row in rows]
  pairs = [(row[of], one[of]) for row, one in zip(rows, said, strict=True) for of in ("ttft_mean", "tbt_mean")]
  return max(abs(simulated / measured - 1) for measured, simulated in pairs)


def _engine_gain(config, found: dict, policy: str, of: str) -> dict:
  """Mixed batches over a policy at the highest load: the median of all seeds and their spread, where there are some."""
  rows = {(row["load"], row["policy"]): row for row in found["engine"]["rows"]}
  load, seeds = max(config.engine.loads), found["engine"]["repeated"].get(policy)
  if not seeds:
    return dict(ours=rows[load, MIXED][of] / rows[load, policy][of])
  return dict(ours=float(np.median(seeds)), spread=tuple(np.percentile(seeds, [10, 90]).tolist()))


def claims(config, metrics_: dict) -> list[Claim]:
  """Chips are simulated; the last three are of the engine."""
  s = config.simulate
  chip, workload = s.chips[0], s.workloads[0]
  limit = limit_of(chip, workload)
  mono = MONOLITHIC
  rows = {(r["system"], r["load"]): r for r in metrics_[f"sweep.{chip}.{workload}"]["rows"]}
  at = lambda of: min(rows[system, s.arms_load][of] for system in mono) / rows["nexus", s.arms_load][of]
  arm, error = arms(config, metrics_), metrics_[f"predictor.{chip}"]["beside"]
  came = directions(config, metrics_)
  loss = arm["nexus"]["latency_p95"] / arm["delta 0"]["latency_p95"] - 1
  off = arm["nexus"]["latency_p95"] / arm["brute"]["latency_p95"] - 1
  counted = config.engine.clock == "counted"
  clock = "a clock that counts what steps take on the simulated chip" if counted else "a real clock"
  runs = clock
  if counted:
    runs += (
      f"; {config.engine.seeds} seeds of {config.engine.seeds_requests} requests in the simulator, which is the same"
    )
  load = f"at {s.arms_load:.0%} of the prompts that the chip could read by itself"
  made = [
    Claim(
      f"Requests a second within {limit:g} s a token (P95), side by side over one batch of both, {workload} requests",
      "ratio", "higher", ours=gain(metrics_, chip, workload, mono), threshold=1.3, paper=1.8,
      baseline="chunked prefills beside decodes, as vLLM or SGLang (the better; emulated)",
      note=f"{title(chip)}, simulated; every system's steps are tuned" + "".join(
        f"; {name} {gain(metrics_, chip, workload, mono, other):.3g}x"
        for other, name in _OTHERS.items()
        if other in s.systems
      ),
    ),
    Claim(
      "Requests a second within the limit, side by side over two GPUs of a phase each", "ratio", "higher",
      ours=gain(metrics_, chip, workload, ("vllm_pd",)), threshold=1.0, paper=1.4,
      baseline="vLLM-P/D on twice the hardware", note=f"{workload}, {title(chip)}",
    ),
    Claim(
      "Mean seconds to the first token, one batch of both over side by side", "ratio", "higher",
      ours=at("ttft_mean"), threshold=2.0, paper=2.0, baseline="as vLLM or SGLang (the better)",
      note=f"{workload}, {load}",
    ),
    Claim(
      "Mean seconds between tokens, one batch of both over side by side", "ratio", "higher",
      ours=at("tbt_mean"), threshold=1.0, paper=1.24, baseline="as vLLM or SGLang (the better)",
      note=f"{workload}, {load}",
    ),
    Claim(
      "Directions of the paper's ablation that come out", "of 5", "higher",
      ours=float(sum(came.values())), threshold=5.0, paper=5.0,
      note="not: " + ("; ".join(name for name, holds in came.items() if not holds) or "none"),
    ),
    Claim(
      "Changes of the split without hysteresis over those with it", "ratio", "higher",
      ours=arm["delta 0"]["switches"] / max(arm["nexus"]["switches"], 1.0), threshold=5.0,
      note=f"P95 of seconds a token {loss:+.1%} with hysteresis; greedy over brute force {off:+.1%}",
    ),
    Claim(
      "What the controller's model misses of steps beside the other phase, the worse phase", "share", "lower",
      ours=max(phase["error"] for phase in error.values()), threshold=0.25,
      note=", ".join(f"{name} {phase['error']:.1%} (bias {phase['bias']:+.1%})" for name, phase in error.items())
      + "; its memory time depends on no share",
    ),
    Claim(
      "What the simulator misses of the engine's mean times with mixed batches", "share", "lower",
      ours=missed(metrics_), threshold=0.15,
      note=f"the engine on {clock}" + ("" if counted else "; the chip as it was calibrated; a cost fitted to the "
      f"engine's own steps misses {missed(metrics_, calibrated=False):.1%}"),
    ),
    Claim(
      "Mean seconds to the first token on the engine, by arrival over shortest first", "ratio", "higher",
      **_engine_gain(config, metrics_, SHORTEST, "ttft_mean"), threshold=1.5,
      baseline="the same mixed batches", note=f"{runs}; load {max(config.engine.loads)}",
    ),
    Claim(
      "95th percentile of seconds between tokens on the engine, mixed batches over turns", "ratio", "higher",
      **_engine_gain(config, metrics_, TURNS, "tbt_p95"), threshold=1.0,
      baseline="chunks beside decodes", note=f"{runs}; reading has {metrics_['engine']['share']:.0%} of the time",
    ),
  ]  # fmt: skip
  if len(s.workloads) > 1:
    made.insert(1, Claim(
      "Requests a second within the limit, side by side over one batch of both, the worst of long prompts", "ratio",
      "higher", ours=min(gain(metrics_, chip, other, mono) for other in s.workloads[1:]), threshold=1.1,
      paper=1.18, baseline="as vLLM or SGLang (the better; emulated)",
      note=", ".join(
        f"{other} {gain(metrics_, chip, other, mono):.3g} within {limit_of(chip, other):.2g} s a token"
        for other in s.workloads[1:]
      ),
    ))  # fmt: skip
  if len(s.chips) > 1:
    made.insert(-5, Claim(
      "Requests a second within the limit, side by side over one batch of both, other chips' worst", "ratio", "higher",
      ours=min(gain(metrics_, other, workload, mono) for other in s.chips[1:]), threshold=1.3,
      baseline="as vLLM or SGLang (the better; emulated)",
      note=", ".join(f"{title(other)}: {limit_of(other, workload):g} s a token" for other in s.chips[1:]),
    ))  # fmt: skip
  return made


def finding(config, metrics_: dict) -> str:
  """Rate, first token, between tokens, the model's error."""
  made = claims(config, metrics_)
  of = lambda begin: next(claim for claim in made if claim.name.startswith(begin))
  head, first, between = made[0], of("Mean seconds to the first token, one batch"), of("Mean seconds between")
  chip, workload = config.simulate.chips[0], config.simulate.workloads[0]
  decode = metrics_[f"predictor.{chip}"]["beside"]["decode"]
  gated = of("What the simulator misses")
  valid = "" if gated.holds else f"; beyond {gated.threshold:.0%}, by which the simulator was to be judged"
  alone = ""
  if "spf" in config.simulate.systems:
    alone = f"; shortest prompts first in one batch {gain(metrics_, chip, workload, MONOLITHIC, 'spf'):.2f}x"
  return (
    f"Simulated on {title(chip)}, prefill and decode side by side serve {head.ours:.2f}x the requests a second of one "
    f"batch of both within {limit_of(chip, workload):g} s a token (paper {head.paper}x{alone}), with first tokens "
    f"{first.ours:.2g}x sooner (paper {first.paper:g}x at least) and {between.ours:.2g}x less between tokens (paper "
    f"{between.paper}x); the model that chooses the split is off by {decode['error']:.0%} for decode steps beside a "
    f"prefill, the simulator by {gated.ours:.0%} for the engine{valid}."
  )
