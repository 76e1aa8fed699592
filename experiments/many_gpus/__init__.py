"""What several devices of one host buy: training by data, fsdp and tensor, SNLP's suffix over a `layer` axis, prompts
over a `sequence` axis, requests served over a `tensor` axis, gradients of long sequences chunk by chunk over `data`.

One run measures 1, 2, 4 .. devices of its machine. On CPUs the devices are simulated: what is sent and that results
agree can be seen there, not what it costs.
"""

import dataclasses
import functools
from pathlib import Path

import jax

from experiments import figures, results
from experiments.many_gpus import chunked, prompts, serving, suffix, training
from experiments.results import Claim
from jaxlab.core.checks import require

_FLOORS = {"data": 0.90, "fsdp": 0.85, "tensor": 0.70}
_PROMPT_FLOOR = 0.7
_CHUNKED_FLOOR = 0.85
_MOST_SENT = 4.0  # weights gathered for both passes, gradients summed, Muon's exchange


def measure(config, workdir: Path, cache: Path, console) -> dict:
  devices = [n for n in config.devices if n <= jax.device_count()]
  require(devices[-1:] > [1], "one device cannot be split; take several GPUs, or JAX_NUM_CPU_DEVICES=4 on a CPU")
  require(
    devices[0] == 1, f"config.devices is {config.devices}; it must begin with 1, which the others are compared to"
  )
  part = functools.partial(results.part, workdir)
  metrics = {"devices": devices[-1], "training": {}}
  for name in config.shapes:
    case = config.training[name].to_dict()
    console.say(f"training {name}")
    run = lambda case=case: training.measure(case, devices, console)
    metrics["training"][name] = part(f"training.{name}", run)
  metrics["suffix"] = part("suffix", lambda: suffix.measure(config.suffix, devices, console))
  metrics["prompts"] = part("prompts", lambda: prompts.measure(config.prompts, devices, console))
  metrics["serving"] = part("serving", lambda: serving.measure(config.serving, devices, console))
  metrics["chunked"] = part("chunked", lambda: chunked.measure(config.chunked, devices, console))
  metrics["fit"] = suffix.fit(metrics["suffix"]["decode"], config.suffix)
  return metrics


def claims(config, metrics: dict) -> list[Claim]:
  """Speeds only where the config says that they mean something."""
  made = [*_speeds(metrics)] if config.timed else []
  sends = {
    f"{name}, {label}": training.sent(run)
    for name, runs in metrics["training"].items()
    for label, run in runs.items()
    if label != training.ONE
  }
  spread = {case: times for case, times in sends.items() if ", fsdp" in case}
  if spread and not (config.timed and "serving" in metrics):  # twelve claims are the most
    made.append(
      Claim(
        "Bytes that fsdp sends for a microbatch, over those of the parameters, most of any", "x", "lower",
        ours=max(spread.values()), threshold=_MOST_SENT,
        note=", ".join(f"{case} {times:.2f}" for case, times in sends.items()),
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
  if "prompts" in metrics:
    made.append(_prompt_claim(config, metrics))
  if "serving" in metrics:
    made.append(_serving_claim(config, metrics))
  if "chunked" in metrics:
    made += _chunked_claims(config, metrics)
  error = max(
    *(kind["error"] for kind in metrics["suffix"].values()),
    *(row["error"] for rows in metrics.get("prompts", {}).values() for row in rows.values()),
  )
  made.append(
    Claim(
      "Largest error of logits on several devices, over the largest logit", "", "lower", ours=error,
      threshold=config.tolerance.logits,
    note="SNLP beside its form for one device, tensor parallelism beside sequence"
    + ", prompts beside one device's cache" * ("prompts" in metrics),
    )
  )  # fmt: skip
  return made


def _chunked_claims(config, metrics: dict):
  """Speed, of the method that gains less, where that means something, and gradients."""
  found, most = metrics["chunked"], f"{metrics['devices']}"
  share = {name: chunked.efficiency(rows, most) for name, rows in found.items()}
  least = min(share, key=share.get)
  levels = found["chunkflow"][most]["balance"]
  if config.timed:
    yield Claim(
      f"Speed of a global batch by ChunkFlow and by SeCO over {most} devices, over as many times one device's, the "
      "slower", "", "higher", ours=share[least], threshold=_CHUNKED_FLOOR,
      baseline=f"{chunked.METHODS[least]}: {found[least]['1']['tokens_per_second']:.4g} tokens/s on one device",
      note="; ".join(
        f"{chunked.METHODS[name]} {share[name]:.3g}: "
        + ", ".join(
          f"{n} devices {row['tokens_per_second']:.4g} tokens/s and {row['bytes'] / 1e9:.3g} GB on each"
          for n, row in rows.items()
        )
        for name, rows in found.items()
      )
      + f"; ChunkFlow's costliest rank has {levels:.3g} of the mean",
    )  # fmt: skip
  yield Claim(
    "Largest difference of a parameter's gradient by ChunkFlow or SeCO from one device's, over its norm", "", "lower",
    ours=chunked.difference(found), threshold=config.tolerance.gradients,
    note=", ".join(
      f"{chunked.METHODS[name]} {chunked.difference({name: rows}):.2g}" for name, rows in found.items()
    )
    + f", of the parameter where it is largest, in {config.chunked.dtype}",
  )  # fmt: skip


def _serving_claim(config, metrics: dict) -> Claim:
  """Speed where that means something, or the tokens."""
  rows, most = metrics["serving"], f"{metrics['devices']}"
  speeds = {n: row["tokens_per_second"] for n, row in rows.items()}
  note = ", ".join(f"{n} devices {speeds[n]:.4g} tokens/s, {row['same']:.3g} the same" for n, row in rows.items())
  if config.timed:
    return Claim(
      f"How many times as many tokens a second the engine serves over {most} devices as on one", "x", "higher",
      ours=speeds[most] / speeds["1"], threshold=1.0, baseline=f"{speeds['1']:.4g} tokens/s", note=note,
    )  # fmt: skip
  return Claim(
    f"Share of the tokens that the engine serves over {most} devices which are one device's", "", "higher",
    ours=rows[most]["same"], threshold=1.0, note="greedy, in float32",
  )  # fmt: skip


def _prompt_claim(config, metrics: dict) -> Claim:
  """Of the longest prompt: its speed where that means something, or its memory."""
  most, tokens = f"{metrics['devices']}", max(metrics["prompts"], key=int)
  rows = metrics["prompts"][tokens]
  noted = "devices, time and what each holds: " + "; ".join(
    f"{length} tokens: "
    + ", ".join(
      f"{n} {row['prefill']['median']:.4g} ms and {row['bytes'] / 1e6:.4g} MB, a later token "
      f"{row['decode']['median']:.3g} ms"
      for n, row in found.items()
    )
    for length, found in metrics["prompts"].items()
  )
  if config.timed:
    return Claim(
      f"Speed of reading a prompt of {tokens} tokens shared out over {most} devices, over as many times one device's",
      "", "higher", ours=prompts.speedup(rows, most, "prefill") / int(most), threshold=_PROMPT_FLOOR,
      baseline=f"{rows['1']['prefill']['median']:.4g} ms on one device", note=noted,
    )  # fmt: skip
  return Claim(
    f"Bytes a device needs for each further token of a prompt shared by {most}, over those of one device alone", "",
    "lower", ours=prompts.grown(metrics["prompts"], most) / prompts.grown(metrics["prompts"], "1"),
    threshold=1.2 / int(most), note=noted,
  )  # fmt: skip


def _speeds(metrics: dict):
  most = metrics["devices"]
  for axis, floor in _FLOORS.items():
    at = training.describe(axis, 2 if axis == "tensor" else most)
    shapes = {name: runs for name, runs in metrics["training"].items() if at in runs}
    if not shapes:
      continue
    found = {name: training.efficiency(runs, at) for name, runs in shapes.items()}
    worst = min(found, key=found.get)
    yield Claim(
      f"Training speed of {at} devices, over as many times one device's, slowest shape", "", "higher",
      ours=found[worst], threshold=floor,
      baseline=f"{worst}: {shapes[worst][training.ONE]['tokens_per_second']:.0f} tokens/s on one device",
      note="; ".join(
        f"{name} {found[name]:.3g}: "
        + ", ".join(
          f"{label} {run['tokens_per_second']:.0f} tokens/s, MFU {run['mfu']:.1%}"
          for label, run in runs.items()
          if label == training.ONE or label.startswith(axis)
        )
        for name, runs in shapes.items()
      ),
    )  # fmt: skip
  made = [*_suffix_claims(metrics)]
  if "chunked" in metrics:  # twelve claims are the most
    *gains, model = made
    made = [*map(_lesser, gains[:2], gains[2:]), model]
  yield from made


def _lesser(decode: Claim, prefill: Claim) -> Claim:
  """One claim of two, of what gains less."""
  claim, other = sorted((decode, prefill), key=lambda claim: claim.ours)
  return dataclasses.replace(claim, note="; ".join(filter(None, (claim.note, f"{other.name}: {other.ours:.3g}"))))


def _suffix_claims(metrics: dict):
  """Of one token and of a prompt, SNLP's suffix beside one device and beside no SNLP; and of the cost model."""
  most = metrics["devices"]
  for kind, what in (("decode", "one token is decoded"), ("prefill", "a prompt is read")):
    times = {name: row["median"] for name, row in metrics["suffix"][kind]["milliseconds"].items()}
    many, one = times[suffix.layered(most, 1)], times[suffix.layered(1, 1)]
    note = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    yield Claim(
      f"How many times as fast {what} with SNLP's suffix over {most} devices as on one", "x", "higher",
      ours=one / many, threshold=1.0, baseline=f"batched on one device: {one:.3f} ms", note=note,
    )  # fmt: skip
    exact = {name: ms for name, ms in times.items() if name.split()[0] in (suffix.SEQUENTIAL, "tensor")}
    rival = min(exact, key=exact.get)
    yield Claim(
      f"How many times as fast {what} with SNLP's suffix over {most} devices as without SNLP", "x", "higher",
      ours=exact[rival] / many, threshold=1.0,
      baseline=f"the quickest of sequence on one device and tensor parallelism: {rival}, {exact[rival]:.3f} ms",
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
      f"{_prompt_finding(config, metrics)}"
    )
  shares = ", ".join(f"{axis} {training.efficiency(runs, f'{axis} {most}'):.0%}" for axis in _FLOORS)
  times = metrics["suffix"]["decode"]["milliseconds"]
  gain = times[suffix.layered(1, 1)]["median"] / times[suffix.layered(most, 1)]["median"]
  return (
    f"{most} GPUs train {name} at {shares} of {most} times one GPU's speed; SNLP's suffix over {most} GPUs decodes "
    f"{gain:.2f}x as fast as on one.{_prompt_finding(config, metrics)}"
  )


def _prompt_finding(config, metrics: dict) -> str:
  """A sentence more, where it was measured."""
  if "prompts" not in metrics:
    return ""
  claim, tokens, most = _prompt_claim(config, metrics), max(metrics["prompts"], key=int), metrics["devices"]
  if config.timed:
    return f" A prompt of {tokens} tokens is read {claim.ours * most:.2f}x as fast by {most}."
  return f" A token of a prompt shared by {most} takes {claim.ours:.2f} of the memory on each."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  """What is sent; and speeds where they mean something."""
  drawn = {_draw_sent(metrics["training"], workdir): "Megabytes of all collectives of a training step"}
  if "prompts" in metrics:
    drawn[_draw_prompts(config, metrics["prompts"], workdir)] = "A device's memory while a prompt is read, and the time"
  if config.timed:
    drawn[_draw_speed(metrics["training"], workdir)] = "Training speed for each device, over one device's"
    drawn[_draw_latency(metrics["suffix"], metrics["fit"], workdir)] = "Latency by devices; dotted: the cost model"
  return drawn


def _draw_sent(shapes: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(len(shapes), squeeze=False)
  for axis, (name, runs) in zip(axes[0], shapes.items(), strict=True):
    several = {label: run for label, run in runs.items() if label != training.ONE}
    axis.bar(
      list(several), [sum(row["bytes"] for row in run["collectives"].values()) / 1e6 for run in several.values()]
    )
    axis.set(title=name, ylabel="MB a step")
    axis.tick_params(axis="x", rotation=45)
  return figures.save(figure, workdir, "sent")


def _draw_prompts(config, found: dict, workdir: Path) -> str:
  kinds = {"MB a device": lambda row: row["bytes"] / 1e6}
  if config.timed:
    kinds["ms"] = lambda row: row["prefill"]["median"]
  figure, axes = figures.subplots(len(kinds), squeeze=False)
  for axis, (label, value) in zip(axes[0], kinds.items(), strict=True):
    for tokens, rows in found.items():
      axis.plot([int(n) for n in rows], [value(row) for row in rows.values()], "o-", label=f"{tokens} tokens")
    axis.set(xlabel="devices", ylabel=label, ylim=(0, None), xticks=[int(n) for n in rows])
    axis.legend()
  return figures.save(figure, workdir, "prompts")


def _draw_speed(shapes: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(len(shapes), squeeze=False)
  for axis, (name, runs) in zip(axes[0], shapes.items(), strict=True):
    for kind, floor in _FLOORS.items():
      points = [(run["devices"], training.efficiency(runs, at)) for at, run in runs.items() if at.startswith(kind)]
      if points:
        (line,) = axis.plot(*zip((1, 1.0), *points, strict=True), "o-", label=kind)
        axis.axhline(floor, color=line.get_color(), lw=0.8, ls=":")
    axis.set(title=name, xlabel="devices", ylabel="efficiency", ylim=(0, 1.1))
    axis.legend()
  return figures.save(figure, workdir, "training")


def _draw_latency(kinds: dict, fit: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(len(kinds))
  for axis, (kind, measured) in zip(axes, kinds.items(), strict=True):
    curves = {}
    for name, row in measured["milliseconds"].items():
      split, *rest = name.split()
      if split == suffix.SEQUENTIAL:
        axis.axhline(row["median"], color="black", lw=0.8, label=name)
      else:
        curves.setdefault(" ".join([split, *rest[1:]]), []).append((int(rest[0]), row["median"], name))
    for label, points in curves.items():
      devices, times, names = zip(*points, strict=True)
      (line,) = axis.plot(devices, times, "o-", label=label)
      if kind == "decode":
        axis.plot(devices, [fit["predicted"][name] for name in names], ":", color=line.get_color())
    axis.set(title=kind, xlabel="devices", ylabel="ms", ylim=(0, None))
    axis.legend()
  return figures.save(figure, workdir, "latency")
