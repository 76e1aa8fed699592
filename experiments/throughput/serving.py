"""The engine beside transformers at several batches, and its steps on a large network beside what the card can do."""

import functools
import time

import jax
import numpy as np

from experiments import timing
from experiments.results import Claim
from experiments.throughput.decoding import STATIC, of_transformers
from jaxlab.core.checks import require
from jaxlab.models import Transformer, hub, inference
from jaxlab.models.config import qwen3
from jaxlab.models.inference import Network
from jaxlab.serving import batch
from jaxlab.serving.batch import Shape
from jaxlab.serving.engine import Engine
from jaxlab.serving.requests import Request
from jaxlab.training.metrics import peak_flops

ENGINE = "engine"
_DECODE, _PREFILL, _HOST = 0.6, 0.45, 0.1  # of copy bandwidth, of the peak, of a step


def measure(spec, console) -> dict:
  """{"served": {batch: tokens a second and the ratio to transformers}, "large": its decoding and reading steps}."""
  return {
    "served": {f"{size}": served(spec, size, console) for size in spec.batches},
    "large": large(spec, console),
  }


def served(spec, size: int, console) -> dict:
  """`size` requests at once, greedy, prefill included.

  Returns:
    {"rates": {contestant: tokens/s}, "times": milliseconds of all, and with transformers "ratio": [median, p10, p90]}.
  """
  model = hub.load(spec.model, dtype=spec.dtype)
  prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, (size, spec.prompt)).astype(np.int32)
  longest = spec.prompt + spec.tokens
  server = Engine(
    model, rows=size, chunks=size, budget=size + spec.budget, part=spec.part, steps=spec.steps, page=spec.page,
    pages=2 + int(1.02 * size * -(-longest // spec.page)), length=longest, prefix=False,
  )  # fmt: skip
  contestants = {ENGINE: functools.partial(_answered, server, prompts, spec.tokens)}
  if spec.transformers:
    contestants[STATIC] = of_transformers(model, prompts, spec.tokens)[STATIC]
  times = timing.compare(contestants, repetitions=spec.repetitions, warmup=2)
  rates = {name: size * spec.tokens / times.median(name) for name in contestants}
  console.say(f"{size} served at once, tokens/s: {rates}")
  found = {"rates": rates, "times": times.summary()}
  if spec.transformers:
    median, spread = times.speedup(ENGINE, STATIC)
    found["ratio"] = [median, *spread]
  return found


def _answered(server: Engine, prompts: np.ndarray, tokens: int) -> int:
  """Tokens made for all of them."""
  for i, prompt in enumerate(prompts.tolist()):
    server.add(Request(f"{i}", prompt, tokens))
  while server.busy:
    server.step()
  return sum(s.made for s in server.take_ended())


def large(spec, console) -> dict:
  """Random weights: {"decode", "read": seconds of a step on the device, and its share of what copying its bytes and of
  what its products take; "host": the share of the engine's decoding step that is not the device's}."""
  s, shape = spec.large, qwen3(**spec.large.shape)
  made = lambda: Transformer(shape, jax.random.key(0))
  network = jax.jit(lambda: inference.take_apart(jax.tree.map(lambda a: a.astype(spec.dtype), made())))()
  decode = step_seconds(network, Shape(s.rows, 0, 0), s.context, s)
  read = step_seconds(network, Shape(0, s.read // s.part, s.part), 0, s)
  engine = engine_seconds(network, s)
  size = network.model.dtype.itemsize
  keys = 2 * s.rows * (s.context + 1) * shape.depth * shape.kv_heads * shape.head_dim
  floor = size * (shape.matmul_parameters + keys) / timing.copy_bandwidth(repetitions=s.repetitions)
  head = shape.width * shape.vocab_size  # of the last token alone
  attention = 4 * shape.depth * shape.q_heads * shape.head_dim * s.read * (s.read + 1) / 2
  products = 2 * s.read * (shape.matmul_parameters - head) + 2 * head + attention
  peak = peak_flops()
  found = {
    "decode": {"seconds": decode, "share": floor / decode},
    "read": {"seconds": read, "share": products / read / peak if peak else None},
    "host": {"seconds": engine, "share": 1 - decode / engine},
  }
  console.say(f"large: {found}")
  return found


def step_seconds(network: Network, shape: Shape, start: int, spec) -> float:
  """Of a step on the device: many in a row, waited for at the end. Rows that read are one prompt's."""
  rows = shape.decode or 1
  table = -(-(start + 1 + shape.chunks * shape.length) // spec.page)
  pools = batch.empty_pools(network, 1 + table * rows, spec.page)
  program = batch.compiled(network, pools, table, shape)
  kinds = []
  for count, length in ((shape.decode, 1), (shape.chunks, max(shape.length, 1))):
    packed, made = batch.blank(count, length, table)
    for i in range(count):
      made.start[i], made.count[i] = start + i * shape.length, length
      made.table[i] = 1 + np.arange(table) + (table * i if shape.decode else 0)
    kinds.append(packed)
  leaves, seconds = jax.tree.leaves(network), []
  for _ in range(spec.repetitions + 1):
    begun = time.perf_counter()
    for _ in range(spec.in_a_row):
      pools, drawn, _ = program(leaves, pools, *kinds)
    jax.block_until_ready(drawn)
    seconds.append((time.perf_counter() - begun) / spec.in_a_row)
  return float(np.median(seconds[1:]))


def engine_seconds(network: Network, spec) -> float:
  """Median of the engine's steps in which all rows decode one token."""
  steps = spec.repetitions * spec.in_a_row
  # Who is read first makes a token in every step in which others are read, and must not have ended when all are.
  tokens = steps + 4 + spec.rows * -(-spec.context // spec.read)
  longest = spec.context + tokens
  server = Engine(
    network, rows=spec.rows, chunks=spec.rows, budget=spec.rows + spec.read, part=spec.part, steps=1, page=spec.page,
    pages=2 + int(1.02 * spec.rows * -(-longest // spec.page)), length=longest, prefix=False,
  )  # fmt: skip
  rng = np.random.default_rng(0)
  for i in range(spec.rows):
    server.add(Request(f"{i}", rng.integers(0, network.model.config.vocab_size, spec.context).tolist(), tokens))
  while server.waiting or any(s.pending > 1 for s in server.running):
    server.step()
  server.step()  # compiles what follows
  seconds = []
  while len(server.running) == spec.rows and len(seconds) < steps:
    begun = time.perf_counter()
    server.step()
    seconds.append(time.perf_counter() - begun)
  require(len(seconds) == steps, f"{len(seconds)} steps of {steps} were made by all rows; a request ended too soon")
  return float(np.median(seconds))


def claims(found: dict, spec) -> list[Claim]:
  made = []
  ratios = {size: row["ratio"][0] / goal for (size, row), goal in zip(found["served"].items(), spec.goals, strict=True)
            if "ratio" in row}  # fmt: skip
  if ratios:
    worst, told = min(ratios, key=ratios.get), []
    for (size, row), goal in zip(found["served"].items(), spec.goals, strict=True):
      told.append(f"{size} at once {row['rates'][ENGINE]:.0f} and {row['rates'][STATIC]:.0f}, goal {goal} x")
    made.append(
      Claim(
        f"Tokens a second of the engine on {spec.model} over transformers' compiled static cache, over the goal, worst "
        "batch", "x", "higher", ours=ratios[worst], threshold=1.0,
        baseline=f"{found['served'][worst]['rates'][STATIC]:.0f} tokens/s, batch {worst}",
        note=f"{'; '.join(told)}; prompts of {spec.prompt}, {spec.tokens} new tokens, greedy, {spec.dtype}",
      )
    )  # fmt: skip
  steps, s = found["large"], spec.large
  kind = f"{s.rows} rows of {s.context} tokens"
  if steps["read"]["share"] is None:  # tiny shapes on a processor without a known peak: nothing to claim
    return made
  return [
    *made,
    Claim(
      f"Share of copy bandwidth at which a large network's decoding step reads weights and keys, {kind}", "", "higher",
      ours=steps["decode"]["share"], threshold=_DECODE, note=f"{1e3 * steps['decode']['seconds']:.3g} ms",
    ),
    Claim(
      f"Share of the card's bf16 peak at which it reads {s.read} tokens of a prompt", "", "higher",
      ours=steps["read"]["share"], threshold=_PREFILL, note=f"{1e3 * steps['read']['seconds']:.3g} ms",
    ),
    Claim(
      "Share of the engine's decoding step in which the device waits for the host", "", "lower",
      ours=steps["host"]["share"], threshold=_HOST, note=f"{1e3 * steps['host']['seconds']:.3g} ms a step, {kind}",
    ),
  ]  # fmt: skip
