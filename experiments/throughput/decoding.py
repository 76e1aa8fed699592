"""Tokens a second of generation beside transformers: the same weights, card, process and prompt."""

import functools
import tempfile
from importlib.metadata import version

import jax
import numpy as np

from experiments import timing
from experiments.results import Claim
from jaxlab.models import Transformer, hub, inference
from jaxlab.models.generate import generate, stream

OURS, STREAM = "generate", "stream"
DYNAMIC, STATIC = "transformers, dynamic cache", "transformers, compiled static cache"
_THRESHOLD = 4.5


def measure(spec) -> dict:
  """Greedy generation of batch 1, prefill included, contestants in turn.

  Returns:
    {"rates": {contestant: median tokens/s}, "times": milliseconds a generation, "versions", "equal": {contestant:
    tokens at the beginning that are those of `generate`; in 16 bits two right programs may part}}, and with
    transformers "ratio" {opponent: [median, p10, p90] of how many times faster `generate` is}.
  """
  model = hub.load(spec.model, dtype=spec.dtype)
  prompt = np.random.default_rng(0).integers(3, model.config.vocab_size, (1, spec.prompt)).astype(np.int32)
  contestants, versions = _ours(model, prompt, spec.tokens), {}
  if spec.transformers:
    contestants |= of_transformers(model, prompt, spec.tokens)
    versions = {name: version(name) for name in ("torch", "transformers")}
  outputs = {name: np.ravel(run()) for name, run in contestants.items()}
  times = timing.compare(contestants, repetitions=spec.repetitions, warmup=2)
  equal = {name: int(np.cumprod(tokens == outputs[OURS]).sum()) for name, tokens in outputs.items()}
  rates = {name: spec.tokens / times.median(name) for name in contestants}
  result = {"rates": rates, "times": times.summary(), "equal": equal, "versions": versions}
  if spec.transformers:
    ratio = {name: times.speedup(OURS, name) for name in (DYNAMIC, STATIC)}
    result["ratio"] = {name: [median, *spread] for name, (median, spread) in ratio.items()}
  return result


def claims(result: dict, spec) -> list[Claim]:
  """How many times faster than the compiled static cache, where that was measured."""
  if "ratio" not in result:
    return []
  ratio, low, high = result["ratio"][STATIC]
  rates, versions = result["rates"], result["versions"]
  return [
    Claim(
      f"How many times as fast {spec.model} generates as in transformers with its compiled static cache", "x", "higher",
      ours=ratio, threshold=_THRESHOLD, spread=(low, high),
      baseline=f"transformers {versions['transformers']}, torch {versions['torch']}: {rates[STATIC]:.0f} tokens/s",
      note=f"ours {rates[OURS]:.0f} tokens/s, as a stream {rates[STREAM]:.0f}, transformers with its dynamic cache "
      f"{rates[DYNAMIC]:.0f}; batch 1, prompt {spec.prompt}, {spec.tokens} new tokens, greedy, {spec.dtype}",
    )
  ]  # fmt: skip


def _ours(model: Transformer, prompt: np.ndarray, tokens: int) -> dict:
  network = jax.jit(inference.take_apart)(model)

  def as_stream():
    return [token for (row,) in stream(network, prompt.tolist(), tokens=tokens) for token in row.tokens]

  return {OURS: lambda: generate(network, prompt, tokens=tokens)[0], STREAM: as_stream}


def of_transformers(model: Transformer, prompts: np.ndarray, tokens: int) -> dict:
  """Its generate with either cache, a row a prompt; the static one is compiled as its guide has it (mode
  "reduce-overhead")."""
  import torch
  from transformers import AutoModelForCausalLM, CompileConfig

  device = "cuda" if torch.cuda.is_available() else "cpu"
  with tempfile.TemporaryDirectory() as folder:
    hub.save(model, folder)
    opponent = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, str(model.dtype))).to(device).eval()
  opponent.generation_config.eos_token_id = None  # all the tokens, as ours
  compiled = CompileConfig()
  compiled._compile_all_devices = True  # by itself it compiles on accelerators alone
  ids = torch.from_numpy(prompts).long().to(device)
  how = dict(attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
  caches = {DYNAMIC: {}, STATIC: dict(cache_implementation="static", compile_config=compiled)}

  def run(options: dict):
    with torch.inference_mode():
      return opponent.generate(ids, **how, **options)[:, ids.shape[1] :].cpu().numpy()  # waits for the card

  return {name: functools.partial(run, options) for name, options in caches.items()}
