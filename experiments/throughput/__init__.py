"""How fast the foundation is: training MFU, and the sequential step against torch.compile on the same card."""

import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.ticker
import numpy as np

from experiments import figures, results, timing
from experiments.results import Claim
from experiments.snlp.speed import random_model
from experiments.throughput import decoding as generation
from experiments.throughput import serving
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require_choice
from jaxlab.depth import snlp_inference, snlp_suffix
from jaxlab.models import Transformer, formats, hub
from jaxlab.models.config import nanochat
from jaxlab.training import loop, losses
from jaxlab.training.metrics import peak_flops
from jaxlab.training.optimizers import muon_adamw

# Two honest times of a step: waited for one by one, which adds the wait of the host to each, and issued in a row.
WAYS = {"waited": "each call waited for", "in_a_row": "20 calls in a row"}
_ROW = 20


def measure(config, workdir: Path, cache: Path, console) -> dict:
  part = functools.partial(results.part, workdir)
  s = config.step
  training = {}
  for name in config.shapes:
    require_choice("an entry of config.shapes", name, config.training.keys())
    training[name] = part(f"training_{name}", lambda case=config.training[name]: train_speed(case.to_dict()))
    console.say(f"training {name}: {training[name]}")
  model = random_model(s.shape.to_dict(), s.dtype)
  forward = part("forward", lambda: forward_speed(model, s, console))
  bandwidth = functools.cache(lambda: timing.copy_bandwidth(repetitions=min(s.repetitions, 10)))
  decode = {
    name: part(f"decode {name}", lambda case=case: decode_speed(case.to_dict(), s.repetitions, bandwidth()))
    for name, case in config.decode.items()
  }
  generated = part("decoding", lambda: generation.measure(config.decoding))
  console.say(f"decoding, tokens/s: {generated['rates']}")
  timed = {"training": training, "forward": forward["jax"], "decode": decode, "torch": forward["torch"]}
  return timed | {"decoding": generated, "serving": part("serving", lambda: serving.measure(config.serving, console))}


def claims(config, metrics: dict) -> list[Claim]:
  made = []
  for name, result in metrics["training"].items():
    if result["mfu"] and name in config.claimed:
      made.append(
        Claim(
          f"Share of the card's bf16 peak that training reaches, {name}", "", "higher", ours=result["mfu"],
          threshold=0.4, baseline="bf16 peak of the card",
        )
      )  # fmt: skip
  for way, how in WAYS.items():
    if metrics["torch"]:
      ratio = {tokens: over_torch(metrics, tokens, way) for tokens in metrics["torch"]}
      worst = min(ratio, key=ratio.get)
      made.append(
        Claim(
          f"How many times as fast as torch.compile a forward is, {how}, worst length", "x", "higher",
          ours=ratio[worst], threshold=1.0, baseline=f"torch {metrics['torch'][worst][way]['median']:.3f} ms",
          note=", ".join(f"{tokens[1:]} tokens {r:.2f} x" for tokens, r in ratio.items())
          + "; reduce-overhead, both warm on the same card, one after the other",
        )
      )  # fmt: skip
  for name, r in metrics["decode"].items():
    made.append(
      Claim(
        f"How many times as long as reading its weights and keys a decoding step takes, {name}", "x", "lower",
        ours=r["ratio"], threshold=config.decode[name].threshold,
        baseline=f"{r['floor_ms']:.3f} ms at copy bandwidth", note=f"{r['milliseconds']['median']:.3f} ms a step",
      )
    )  # fmt: skip
  if "decoding" in metrics:
    made += generation.claims(metrics["decoding"], config.decoding)
  if "serving" in metrics:
    made += serving.claims(metrics["serving"], config.serving)
  return made


def over_torch(metrics: dict, tokens: str, way: str) -> float:
  best = min(kind[way]["median"] for kind in metrics["forward"][tokens].values())
  return metrics["torch"][tokens][way]["median"] / best


def finding(config, metrics: dict) -> str:
  floor = max(r["ratio"] for r in metrics["decode"].values())
  parts = [f"{name} trains at {r['mfu']:.0%} of the card's peak" for name, r in metrics["training"].items() if r["mfu"]]
  if metrics["torch"]:
    worst = min(over_torch(metrics, tokens, "in_a_row") for tokens in metrics["torch"])
    parts.append(f"forwards in a row are {worst:.2f}x as fast as torch.compile's or faster")
  parts.append(f"a decoding step takes {floor:.2f} times its bytes' time or less")
  if "ratio" in metrics.get("decoding", {}):
    parts.append(
      f"{config.decoding.model} generates {metrics['decoding']['rates'][generation.OURS]:.0f} tokens/s, "
      f"{metrics['decoding']['ratio'][generation.STATIC][0]:.1f}x transformers' compiled static cache"
    )
  text = "; ".join(parts)
  return f"{text[0].upper()}{text[1:]}."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  return {draw_forward(metrics["forward"], metrics["torch"], workdir): "Sequential forward, batch 1"}


def train_speed(case: dict) -> dict:
  """Tokens per second and MFU of the whole training step (optimizer included), after compilation."""
  config = nanochat(**case["shape"])
  mesh = meshes.make_mesh()
  batch, length, steps = case["batch"], case["length"], case["steps"]
  optimizer = muon_adamw(config, steps=1000, batch_tokens=batch * length)
  state = loop.initial_state(Transformer(config, jax.random.key(0)), optimizer, mesh, 0)
  options = {name: case[name] for name in ("remat", "unroll", "keep_logits")}
  loss = lambda m, b, step, key: losses.language_model_loss(m, b, **options)
  step = loop.make_step(loss, optimizer, meshes.shardings(state, mesh), accumulate=case["accumulate"])
  ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length + 1)).astype(np.int32)
  data = jax.device_put({"inputs": ids[:, :-1], "targets": ids[:, 1:]}, meshes.batch_sharding(mesh))
  begin = time.perf_counter()
  compiled = step.lower(state, data).compile()
  compile_seconds = time.perf_counter() - begin
  seconds = []
  for _ in range(steps + 2):
    begin = time.perf_counter()
    state, metrics = compiled(state, data)
    loss_value = float(metrics["loss"])
    seconds.append(time.perf_counter() - begin)
  rate = batch * length / float(np.median(seconds[2:]))
  peak = peak_flops() * mesh.size
  return {
    "tokens_per_second": rate,
    "mfu": config.flops_per_token(length) * rate / peak if peak else 0.0,
    "step_seconds": float(np.median(seconds[2:])),
    "compile_seconds": compile_seconds,
    "loss": loss_value,
    "memory": timing.memory(compiled),
  }


def forward_speed(model: Transformer, step, console) -> dict:
  """{"jax": {"T<tokens>": `step_speed`}, "torch": {"T<tokens>": times}}, of one process on one card."""
  ours = {}
  for length in step.lengths:
    ours[f"T{length}"] = step_speed(model, length, step.compilers.to_dict(), step.repetitions)
    console.say(f"step, {length} tokens: {ours[f'T{length}']}")
  return {"jax": ours, "torch": torch_speed(model, step.lengths, step.repetitions) if step.torch else {}}


def step_speed(model: Transformer, length: int, compilers: dict, repetitions: int) -> dict:
  """Milliseconds of the uncached forward with head, batch 1, scanned and unrolled, alternating, in both `WAYS`.

  Args:
    compilers: {name: options of XLA}; the unrolled layers are compiled with each.
  """
  tokens = jax.random.randint(jax.random.key(1), (1, length), 0, model.config.vocab_size)
  network = snlp_inference.split(model)
  unrolled = lambda n, t: snlp_inference.step(n, t)[0]
  contestants = {"scan": timing.Steady(lambda m, t: m(t), model, tokens)}
  for name, options in compilers.items():
    contestants[name] = timing.Steady(unrolled, network, tokens, compiler_options=options)
  waited = timing.compare(contestants, repetitions=repetitions, warmup=5).summary()
  in_a_row = timing.compare(contestants, repetitions=max(3, repetitions // _ROW), inner=_ROW).summary()
  return {name: {"waited": waited[name], "in_a_row": in_a_row[name]} for name in contestants}


def decode_speed(case: dict, repetitions: int, bandwidth: float) -> dict:
  """Milliseconds of a cached decode step (donated cache), steps in a row, against reading weights and keys once.

  Args:
    case: {"model": a name or folder, or "shape": of a random one; "dtype", "context": tokens before the step, and for
      SNLP "layers" of its suffix, "chunk" of them fused to one, and "iterations"}.
  """
  model = hub.load(case["model"], dtype=case["dtype"]) if case["model"] else random_model(case["shape"], case["dtype"])
  context, rows = case["context"], max(3, repetitions // _ROW)
  suffix, options = 0, {}
  if case["layers"]:
    suffix = snlp_suffix.fuse(model, case["layers"], chunk=case["chunk"])
    options = dict(iterations=case["iterations"])
  network = snlp_inference.split(model, suffix)
  prompt = jax.random.randint(jax.random.key(1), (1, context), 0, model.config.vocab_size)
  prefill = jax.jit(functools.partial(snlp_inference.prefill, **options), static_argnames="capacity")
  _, state = prefill(network, prompt, capacity=context + (rows + 4) * _ROW)
  one = functools.partial(snlp_inference.step, **options)
  step = timing.Steady(one, network, prompt[:, :1], carry=state)
  times = timing.compare({"step": step}, repetitions=rows, inner=_ROW)
  c = model.config
  keys = sum(min(context, context if window is None else window + 1) for window in c.windows)
  size = (c.matmul_parameters + 2 * keys * c.kv_heads * c.head_dim) * model.dtype.itemsize
  milliseconds, floor = times.summary()["step"], 1e3 * size / bandwidth
  ratio = milliseconds["median"] / floor
  return {"milliseconds": milliseconds, "floor_ms": floor, "ratio": ratio, "finite": bool(jnp.isfinite(step()).all())}


def torch_speed(model: Transformer, lengths, repetitions: int) -> dict:
  """Milliseconds of the same forward under torch.compile(mode="reduce-overhead"), the same weights."""
  import torch

  from experiments.throughput.torch_nanochat import Nanochat

  device = "cuda" if torch.cuda.is_available() else "cpu"
  tensors = hub.to_tensors(model, formats.KARPATHY)
  opponent = Nanochat(model.config, tensors, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
  compiled = torch.compile(opponent, mode="reduce-overhead", fullgraph=True)
  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  result = {}
  for length in lengths:
    tokens = torch.randint(0, model.config.vocab_size, (1, length), device=device)

    def seconds(inner, tokens=tokens):
      wait()
      begin = time.perf_counter()
      for _ in range(inner):
        compiled(tokens)
      wait()
      return (time.perf_counter() - begin) / inner

    with torch.inference_mode():
      seconds(10)
      waited = np.array([seconds(1) for _ in range(repetitions)])
      in_a_row = np.array([seconds(_ROW) for _ in range(max(3, repetitions // _ROW))])
    result[f"T{length}"] = timing.Times({"waited": waited, "in_a_row": in_a_row}).summary()
  return result


def draw_forward(steps: dict, torch_times: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  lengths = [int(name[1:]) for name in steps]
  for kind in next(iter(steps.values())):
    axis.plot(lengths, [r[kind]["in_a_row"]["median"] for r in steps.values()], "o-", label=f"jax, {kind}")
  if torch_times:
    times = [r["in_a_row"]["median"] for r in torch_times.values()]
    axis.plot(lengths, times, "s--", label="torch.compile, reduce-overhead")
  axis.set(
    xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="Sequential forward, batch 1, calls in a row"
  )
  axis.set_xticks(lengths, lengths)
  axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
  axis.yaxis.set_major_formatter("{x:g}")
  axis.minorticks_off()
  axis.legend()
  return figures.save(figure, workdir, "forward")
