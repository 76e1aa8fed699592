"""What FunBaT costs: smoothers by chain length against each other and a NumPy loop, epochs by observations."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results, timing
from experiments.overlap import overlapped
from jaxlab.core import kalman
from jaxlab.tensors import funbat, matern
from jaxlab.tensors.funbat import Settings


def random_chain(steps: int, rank: int, dtype=np.float32):
  """A Matern-1/2 chain of `rank` components and terms of every rank."""
  rng = np.random.default_rng(steps)
  times = np.cumsum(rng.uniform(0.01, 0.1, steps)).astype(dtype)
  root = rng.normal(size=(steps, rank, rank)).astype(dtype)
  chain = matern.chain(jnp.asarray(times), kernel="matern12", lengthscale=1.0, variance=1.0, rank=rank)
  return chain, jnp.asarray(root @ root.swapaxes(1, 2)), jnp.asarray(rng.normal(size=(steps, rank)).astype(dtype))


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
