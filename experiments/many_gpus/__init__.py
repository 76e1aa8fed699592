"""What several devices of one host buy: training by data, fsdp and tensor, SNLP's suffix over a `layer` axis.

One run measures 1, 2, 4 .. devices of its machine. On CPUs the devices are simulated: what is sent and that results
agree can be seen there, not what it costs.
"""

import functools
from pathlib import Path

import jax

from experiments import figures, results
from experiments.many_gpus import suffix, training
from experiments.results import Claim
from jaxlab.core.checks import require

_FLOORS = {"data": 0.90, "fsdp": 0.85, "tensor": 0.70}
_MOST_SENT = 4.0  # weights gathered for both passes, gradients summed, Muon's exchange


def measure(config, workdir: Path, cache: Path, console) -> dict:
  devices = [n for n in config.devices if n <= jax.device_count()]
  require(devices[-1] > 1, "one device cannot be split; take several GPUs, or JAX_NUM_CPU_DEVICES=4 on a CPU")
  part = functools.partial(results.part, workdir)
  metrics = {"devices": devices[-1], "training": {}}
  for name in config.shapes:
    case = config.training[name].to_dict()
    console.say(f"training {name}")
    run = lambda case=case: training.measure(case, devices, console)
    metrics["training"][name] = part(f"training_{name}", run)
  metrics["suffix"] = part("suffix", lambda: suffix.measure(config.suffix, devices, console))
  metrics["fit"] = suffix.fit(metrics["suffix"]["decode"], config.suffix)
  return metrics


def claims(config, metrics: dict) -> list[Claim]:
  """Speeds only where the config says that they mean something."""
  made = [*_speeds(metrics)] if config.timed else []
  for name, runs in metrics["training"].items():
    spread = {label: training.sent(run) for label, run in runs.items() if label.startswith("fsdp")}
    if spread:
      worst = max(spread, key=spread.get)
      made.append(
        Claim(
          f"Bytes that fsdp sends for a microbatch, over those of the parameters, {name}", "x", "lower",
          ours=spread[worst], threshold=_MOST_SENT,
          note=", ".join(f"{label} {training.sent(run):.2f}" for label, run in runs.items() if label != training.ONE),
        )
      )  # fmt: skip
  apart = {name: training.difference(runs) for name, runs in metrics["training"].items()}
  made.append(
    Claim(
      "Largest difference of a loss of the first steps from one device's", "nats", "lower",
      ours=max(apart.values()), threshold=config.tolerance.loss,
      note=", ".join(f"{name} {value:.1g}" for name, value in apart.items()) + "; the same batch on all",
    )
  )  # fmt: skip
  error = max(kind["error"] for kind in metrics["suffix"].values())
  made.append(
    Claim(
      "Largest error of logits on several devices, over the largest logit", "", "lower", ours=error,
      threshold=config.tolerance.logits, note="SNLP beside its form for one device, tensor parallelism beside sequence",
    )
  )  # fmt: skip
  return made


def _speeds(metrics: dict):
  most = metrics["devices"]
  for name, runs in metrics["training"].items():
    for axis, floor in _FLOORS.items():
      at = training.describe(axis, 2 if axis == "tensor" else most)
      if at in runs:
        yield Claim(
          f"Training speed of {at} devices, over as many times one device's, {name}", "", "higher",
          ours=training.efficiency(runs, at), threshold=floor,
          baseline=f"{runs[training.ONE]['tokens_per_second']:.0f} tokens/s on one device",
          note=", ".join(
            f"{label} {run['tokens_per_second']:.0f} tokens/s, MFU {run['mfu']:.1%}" for label, run in runs.items()
          ),
        )  # fmt: skip
  for kind, what in (("decode", "one token is decoded"), ("prefill", "a prompt is read")):
    times = {name: row["median"] for name, row in metrics["suffix"][kind]["milliseconds"].items()}
    many, one = times[suffix.layered(most, 1)], times[suffix.layered(1, 1)]
    note = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    yield Claim(
      f"How many times as fast {what} with SNLP's suffix over {most} devices as on one", "x", "higher",
      ours=one / many, threshold=1.0, baseline=f"batched on one device: {one:.3f} ms", note=note,
    )  # fmt: skip
    rival = min(times[suffix.tensor(n)] for n in (1, most))
    yield Claim(
      f"How many times as fast {what} with SNLP's suffix over {most} devices as by tensor parallelism", "x", "higher",
      ours=rival / many, threshold=1.0, baseline=f"plain blocks on 1 or {most} devices: {rival:.3f} ms",
    )  # fmt: skip
  fit = metrics["fit"]
  yield Claim(
    "Largest relative error of the cost model of decoding", "", "lower", ours=fit["worst"], threshold=0.15,
    note=f"ms: floor {fit['floor']:.3f}, of tensor parallelism {fit['tensor_floor']:.3f}, a layer "
    f"{1e3 * fit['layer']:.1f} us, a message {1e3 * fit['message']:.1f} us",
  )  # fmt: skip


def finding(config, metrics: dict) -> str:
  most = metrics["devices"]
  name, runs = next(iter(metrics["training"].items()))
  if not config.timed:
    return (
      f"On {most} simulated devices losses stay within {training.difference(runs):.1g} nats of one device's, and fsdp "
      f"sends {training.sent(runs[training.describe('fsdp', most)]):.1f} times the parameters for a microbatch."
    )
  shares = ", ".join(f"{axis} {training.efficiency(runs, f'{axis} {most}'):.0%}" for axis in _FLOORS)
  times = metrics["suffix"]["decode"]["milliseconds"]
  gain = times[suffix.layered(1, 1)]["median"] / times[suffix.layered(most, 1)]["median"]
  return (
    f"{most} GPUs train {name} at {shares} of {most} times one GPU's speed; SNLP's suffix over {most} GPUs decodes "
    f"{gain:.2f}x as fast as on one."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  return {_draw_training(metrics["training"], workdir): "Bytes sent in a step, and tokens a second"}


def _draw_training(shapes: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(2, len(shapes), squeeze=False)
  for (left, right), (name, runs) in zip(axes, shapes.items(), strict=True):
    labels = list(runs)
    left.bar(labels, [run["tokens_per_second"] for run in runs.values()])
    left.set(title=name, ylabel="tokens/s")
    right.bar(labels, [sum(row["bytes"] for row in run["collectives"].values()) / 1e9 for run in runs.values()])
    right.set(title=name, ylabel="GB sent in a step")
    for axis in (left, right):
      axis.tick_params(axis="x", rotation=45)
  return figures.save(figure, workdir, "training")
