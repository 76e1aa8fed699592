"""Requests served by the engine whose heads and neurons several devices share, beside one device's."""

import time

import jax
import numpy as np

from jaxlab.core import mesh as meshes
from jaxlab.models import Transformer
from jaxlab.models.config import qwen3
from jaxlab.serving.engine import Engine
from jaxlab.serving.requests import Request
from jaxlab.training import loop


def measure(spec, devices: list[int], console) -> dict[str, dict]:
  """{number of devices: {"tokens_per_second": median, "seconds": of every repetition, "same": the share of tokens that
  are one device's}}, prompts read and answers made."""
  config = qwen3(**spec.shape.to_dict(), context=spec.prompt + spec.tokens)
  model = jax.jit(lambda key: loop.cast(Transformer(config, key), spec.dtype))(jax.random.key(0))
  engines = {f"{n}": _engine(spec, model, n) for n in devices}
  prompts = np.random.default_rng(0).integers(0, config.vocab_size, (spec.rows, spec.prompt)).tolist()
  made, seconds = {name: served(engine, prompts, spec.tokens)[0] for name, engine in engines.items()}, {}
  for _ in range(spec.repetitions):
    for name, engine in engines.items():
      seconds.setdefault(name, []).append(served(engine, prompts, spec.tokens)[1])
  one = np.array(made[f"{devices[0]}"])
  result = {
    name: {
      "tokens_per_second": one.size / float(np.median(times)),
      "seconds": times,
      "same": float((np.array(made[name]) == one).mean()),
    }
    for name, times in seconds.items()
  }
  console.say(", ".join(f"{n} devices {row['tokens_per_second']:.4g} tokens/s" for n, row in result.items()))
  return result


def _engine(spec, model: Transformer, devices: int) -> Engine:
  mesh = meshes.make_mesh({"tensor": devices}, jax.devices()[:devices]) if devices > 1 else None
  pages = spec.rows * (-(-(spec.prompt + spec.tokens) // spec.page) + 1) + 16
  how = dict(pages=pages, page=spec.page, rows=spec.rows, budget=spec.budget, part=spec.part, prefix=False)
  return Engine(model, **how, mesh=mesh)


def served(engine: Engine, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], float]:
  """(the tokens of every prompt, seconds)."""
  made = [[] for _ in prompts]
  begin = time.perf_counter()
  for i, prompt in enumerate(prompts):
    engine.add(Request(f"{i}", prompt, tokens))
  while engine.busy:
    for event in engine.step():
      made[int(event.id)].append(event.token)
  return made, time.perf_counter() - begin
