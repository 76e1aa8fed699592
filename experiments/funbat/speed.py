"""Seconds of a smoother by chain length, against each other and a NumPy loop, and of an epoch by observations."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import LogLocator

from experiments import figures, results, timing
from experiments.overlap import overlapped
from experiments.results import Claim, number
from jaxlab.core import kalman
from jaxlab.tensors import funbat, matern
from jaxlab.tensors.funbat import Settings

MANY_STEPS = 1000  # beyond them a parallel scan is to beat the loop where one is chosen, on an accelerator


_chain = jax.jit(
  functools.partial(matern.chain, kernel="matern12", lengthscale=1.0, variance=1.0), static_argnames="rank"
)


def measure(config, workdir: Path) -> dict:
  return {
    "scan_gap": results.part(workdir, "scan_gap", lambda: scan_gap(config.bench.steps[0])),
    "smoother": time_smoothers(config, workdir),
    "epoch": results.part(workdir, "epoch", lambda: time_epochs(config)),
  }


def random_chain(steps: int, rank: int, dtype=np.float32):
  """A Matern-1/2 chain of `rank` components and terms of every rank."""
  rng = np.random.default_rng(steps)
  times = np.cumsum(rng.uniform(0.01, 0.1, steps)).astype(dtype)
  root = rng.normal(size=(steps, rank, rank)).astype(dtype)
  return (
    _chain(jnp.asarray(times), rank=rank),
    jnp.asarray(root @ root.swapaxes(1, 2)),
    jnp.asarray(rng.normal(size=(steps, rank)).astype(dtype)),
  )


def numpy_smoother(chain: kalman.Chain, precision, linear):
  """Kalman filter and RTS smoother as a NumPy loop in information form: the peer."""
  a, q, lam, eta = (np.asarray(x) for x in (chain.transition, chain.noise, precision, linear))
  eye, steps = np.eye(eta.shape[1], dtype=eta.dtype), len(eta)
  mean, cov = np.empty_like(eta), np.empty_like(lam)
  m, p = np.zeros_like(eta[0]), np.zeros_like(lam[0])
  for t in range(steps):
    m, p = a[t] @ m, a[t] @ p @ a[t].T + q[t]
    p = np.linalg.solve(eye + p @ lam[t], p)
    m = m + p @ (eta[t] - lam[t] @ m)
    mean[t], cov[t] = m, p
  for t in range(steps - 2, -1, -1):
    ahead = a[t + 1] @ cov[t] @ a[t + 1].T + q[t + 1]
    gain = np.linalg.solve(ahead, a[t + 1] @ cov[t]).T
    mean[t] = mean[t] + gain @ (mean[t + 1] - a[t + 1] @ mean[t])
    cov[t] = cov[t] + gain @ (cov[t + 1] - ahead) @ gain.T
  return mean, cov


def scan_gap(steps: int) -> float:
  """Largest difference of a parallel scan from the loop in float64."""
  with jax.enable_x64(True):
    problem = random_chain(steps, 3, np.float64)
    smooth = jax.jit(kalman.smooth, static_argnames="scan")
    loop = smooth(*problem, scan="seq")
    difference = lambda scan: jax.tree.map(lambda x, y: jnp.abs(x - y).max(), smooth(*problem, scan=scan), loop)
    return float(max(value for scan in kalman.PARALLEL for value in jax.tree.leaves(difference(scan))))


def time_smoothers(config, workdir: Path) -> dict:
  """{"rows": of every chain length the milliseconds of each smoother and its speed-ups, "slopes": log-log}."""
  b = config.bench
  smooth = {scan: jax.jit(functools.partial(kalman.smooth, scan=scan)) for scan in kalman.SCANS}

  def measure(steps):
    problem = random_chain(steps, b.rank)
    calls = {scan: functools.partial(call, *problem) for scan, call in smooth.items()}
    if steps <= b.numpy_limit:
      calls["numpy"] = functools.partial(numpy_smoother, *jax.tree.map(np.asarray, problem))
    if steps > b.loop_limit:
      calls.pop("seq")
    times = timing.compare(calls, repetitions=int(np.clip(b.loop_steps // steps, 1, b.repetitions)), warmup=1)
    over = lambda peer: {scan: times.speedup(scan, over=peer) for scan in kalman.SCANS if scan in calls}
    speedups = {peer: over(peer) for peer in ("seq", "numpy") if peer in calls}
    return {"steps": steps, "milliseconds": times.summary(), "over": speedups}

  part = lambda steps: f"smoother.{steps}"
  missing = [steps for steps in b.steps if not results.has_part(workdir, part(steps))]
  compile_ = lambda job: smooth[job[0]].lower(*random_chain(job[1], b.rank)).compile()
  scans = lambda steps: kalman.SCANS if steps <= b.loop_limit else kalman.PARALLEL
  list(overlapped(compile_, [(scan, steps) for steps in missing for scan in scans(steps)]))
  rows = [results.part(workdir, part(steps), functools.partial(measure, steps)) for steps in b.steps]
  line = lambda name: [(r["steps"], r["milliseconds"][name]["median"]) for r in rows if name in r["milliseconds"]]
  return {"rows": rows, "slopes": {name: timing.slope(line(name)) for name in (*kalman.SCANS, "numpy")}}


def time_epochs(config) -> dict:
  """Milliseconds of one epoch (Tucker, fixed grids) by number of observations, and the log-log slope."""
  rng, levels = np.random.default_rng(0), (50, 60, 70)
  settings = Settings(rank=config.bench.rank, scan=config.funbat.scan)
  step = jax.jit(lambda state, data: funbat.epoch(state, data, settings))

  @jax.jit
  def start(data):
    return funbat.initial_state(data, settings, jax.random.key(0)), data

  def problem(size):
    index = np.stack([rng.integers(0, n, size) for n in levels], 1)
    return start(funbat.on_grids([np.linspace(0, 10, n) for n in levels], index, rng.normal(size=size)))

  problems = {size: problem(size) for size in config.bench.observations}
  list(overlapped(lambda arguments: step.lower(*arguments).compile(), problems.values()))
  line = []
  for size, arguments in problems.items():
    calls = {"epoch": functools.partial(step, *arguments)}
    line.append((size, timing.compare(calls, repetitions=config.bench.repetitions, warmup=1).median("epoch") * 1e3))
  return {"line": line, "slope": timing.slope(line), "slope_at_the_end": timing.slope(line[-2:])}


def claims(config, cost: dict) -> list[Claim]:
  """Both scans are the loop; it beats NumPy, a parallel scan beats it on long chains; an epoch is linear."""
  rows, scan = cost["smoother"]["rows"], config.funbat.scan
  made = [
    Claim(
      "Largest difference of a parallel Kalman smoother from the loop, double precision", "", "lower",
      ours=cost["scan_gap"], threshold=1e-8, baseline="lax.scan",
    )
  ]  # fmt: skip
  row = [r for r in rows if "numpy" in r["over"]][-1]
  ratio, spread = row["over"]["numpy"][scan]
  made.append(
    Claim(
      f"How many times as fast as a NumPy loop the smoother passes over {row['steps']} coordinates", "x", "higher",
      ours=ratio, threshold=1.0, baseline="NumPy loop", spread=tuple(spread),
      note=f"scan: {scan}; log-log slopes of time against steps: "
      + ", ".join(f"{name} {number(value)}" for name, value in cost["smoother"]["slopes"].items()),
    )
  )  # fmt: skip
  long = [r for r in rows if r["steps"] > MANY_STEPS and "seq" in r["over"]]
  if scan in kalman.PARALLEL and long:
    least = min(long, key=lambda r: r["over"]["seq"][scan][0])
    ratio, spread = least["over"]["seq"][scan]
    made.append(
      Claim(
        f"How many times as fast as lax.scan the parallel smoother is, least of chains over {MANY_STEPS} coordinates",
        "x", "higher", ours=ratio, threshold=1.0, baseline="lax.scan, jitted", spread=tuple(spread),
        note=f"scan: {scan}; "
        + ", ".join(f"{r['steps']} steps {r['over']['seq'][scan][0]:.3g}" for r in rows if "seq" in r["over"]),
      )
    )  # fmt: skip
  sizes, milliseconds = zip(*cost["epoch"]["line"], strict=True)
  if len(sizes) > 1:
    made.append(
      Claim(
        "Exponent of an epoch's time in the number of observations, between the two largest sizes", "", "lower",
        ours=float(cost["epoch"]["slope_at_the_end"]), threshold=1.1, paper=1.0, baseline="linear",
        note=f"{sizes[0]} to {sizes[-1]} observations, rank {config.bench.rank}, {milliseconds[0]:.3g} to "
        f"{milliseconds[-1]:.3g} ms; over all sizes {number(cost['epoch']['slope'])}. Far below 1 it says that few "
        "observations leave the device waiting for launches",
      )
    )  # fmt: skip
  return made


def draw(cost: dict, workdir: Path) -> dict[str, str]:
  figure, axes = figures.subplots(2)
  labels = {"numpy": "NumPy loop", "seq": "lax.scan", "assoc": "associative scan", "doubling": "recursive doubling"}
  rows = cost["smoother"]["rows"]
  for name, label in labels.items():
    line = [(r["steps"], r["milliseconds"][name]["median"] / 1e3) for r in rows if name in r["milliseconds"]]
    axes[0].loglog(*zip(*line, strict=True), "o-", label=label)
  axes[0].set(xlabel="steps J", ylabel="seconds", title="Kalman filter and RTS smoother")
  axes[0].legend()
  size, milliseconds = np.asarray(cost["epoch"]["line"]).T
  axes[1].loglog(size, milliseconds, "o-", label="measured")
  axes[1].loglog(size, milliseconds[-1] * size / size[-1], ":", color="black", label="linear")
  axes[1].set_ylim(milliseconds.min() / 4, milliseconds.max() * 2)
  axes[1].legend(loc="upper left")
  for axis, ticks in ((axes[0], [r["steps"] for r in rows]), (axes[1], size)):
    axis.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
    axis.minorticks_off()
  axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes[1].yaxis.set_major_formatter("{x:g}")
  axes[1].set(
    xlabel="observations N", ylabel="milliseconds", title=f"One epoch, slope {number(cost['epoch']['slope'])}"
  )
  return {figures.save(figure, workdir, "speed"): "Seconds of a smoother by chain length; of an epoch by observations"}
