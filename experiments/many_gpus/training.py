"""The training step by `data`, `fsdp` and `tensor` on 1, 2, 4 .. devices: the same batch, whatever the number."""

import concurrent.futures
import time

import jax
import numpy as np

from experiments import timing
from experiments.many_gpus.collectives import summary
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require_divides
from jaxlab.models import Transformer
from jaxlab.models.config import nanochat
from jaxlab.training import loop, losses
from jaxlab.training.metrics import peak_flops
from jaxlab.training.optimizers import muon_adamw

ONE = "one device"


def describe(axis: str, devices: int) -> str:
  return ONE if devices == 1 else f"{axis} {devices}"


def measure(case: dict, devices: list[int], console) -> dict[str, dict]:
  """{`describe`: `timed`} of one shape; all programs are compiled before the first is timed, next to each other.

  Args:
    case: an entry of config.training. A device has `rows` rows of a microbatch however they are split.
  """
  config = nanochat(**case["shape"])
  model = Transformer(config, jax.random.key(0))
  ids = np.random.default_rng(0).integers(0, config.vocab_size, (case["batch"], case["length"] + 1)).astype(np.int32)
  wanted = {describe(axis, n): (axis, n) for axis in case["axes"] for n in devices}
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    ready = {name: pool.submit(prepare, case, model, ids, *how) for name, how in wanted.items()}
    ready = {name: future.result() for name, future in ready.items()}
  result = {}
  for name, (_, n) in wanted.items():
    result[name] = timed(case, config, n, *ready.pop(name))
    apart = np.abs(np.subtract(result[name]["losses"], result[ONE]["losses"])).max()
    result[name]["difference"] = float(apart)  # of a loss from one device's at the same step, at most; nats
    console.say(f"{name}: {result[name]['tokens_per_second']:.0f} tokens/s, losses {result[name]['losses']}")
  return result


def prepare(case: dict, model: Transformer, ids, axis: str, devices: int):
  """(compiled step, state, batch, seconds of compiling)."""
  begin = time.perf_counter()
  mesh = meshes.make_mesh({axis: devices}, jax.devices()[:devices])
  require_divides("rows x devices", case["rows"] * devices, "batch", case["batch"])
  optimizer = muon_adamw(model.config, steps=1000, batch_tokens=case["batch"] * case["length"])
  state = loop.initial_state(model, optimizer, mesh, 0)
  loss = lambda m, b, step, key: losses.language_model_loss(m, b, remat="dots")
  step = loop.make_step(
    loss, optimizer, meshes.shardings(state, mesh), accumulate=accumulate(case, devices), compute_dtype=case["dtype"]
  )
  batch = jax.device_put({"inputs": ids[:, :-1], "targets": ids[:, 1:]}, meshes.batch_sharding(mesh))
  return step.lower(state, batch).compile(), state, batch, time.perf_counter() - begin


def accumulate(case: dict, devices: int) -> int:
  """Microbatches of a step."""
  return case["batch"] // (case["rows"] * devices)


def timed(case: dict, config, devices: int, compiled, state, batch, compile_seconds: float) -> dict:
  """Rate, share of the peak, losses of the first steps, what is sent in a step, memory."""
  seconds, curve = [], []
  for _ in range(case["steps"] + 2):
    begin = time.perf_counter()
    state, metrics = compiled(state, batch)
    curve.append(float(metrics["loss"]))
    seconds.append(time.perf_counter() - begin)
  rate = case["batch"] * case["length"] / float(np.median(seconds[2:]))
  peak = peak_flops() * devices
  return {
    "devices": devices,
    "tokens_per_second": rate,
    "mfu": config.flops_per_token(case["length"]) * rate / peak if peak else 0.0,
    "step_seconds": float(np.median(seconds[2:])),
    "compile_seconds": compile_seconds,
    "losses": curve,
    "microbatches": accumulate(case, devices),
    "collectives": summary(compiled.as_text()),
    "parameter_bytes": sum(a.size for a in jax.tree.leaves(state.model)) * np.dtype(case["dtype"]).itemsize,
    "memory": timing.memory(compiled),
  }


def efficiency(runs: dict[str, dict], name: str) -> float:
  """Tokens a second for each device, over those of one device."""
  return runs[name]["tokens_per_second"] / runs[name]["devices"] / runs[ONE]["tokens_per_second"]


def difference(runs: dict[str, dict]) -> float:
  """The largest of all runs."""
  return max(run["difference"] for run in runs.values())


def sent(run: dict) -> float:
  """Bytes of a step's collectives, over those of the parameters in the computing dtype and of every microbatch."""
  return sum(row["bytes"] for row in run["collectives"].values()) / run["parameter_bytes"] / run["microbatches"]
