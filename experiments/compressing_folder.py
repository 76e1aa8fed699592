"""A model compressed to a folder: read again, measured beside the original."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import timing
from experiments.compressing import COMPRESSED, Subject, left_out, perplexity, stored
from experiments.results import Claim
from experiments.text import save_vocabulary
from jaxlab.models import Transformer, generate, hub, maps


def written(config, subject: Subject, model: Transformer, workdir: Path, console) -> dict:
  """Saves a compressed model as workdir/compressed, reads it again, and measures it beside the original.

  Returns:
    {bytes, files, perplexity, tokens_per_second: {"original", "compressed"} each; kept}; files: bytes on disk; kept:
    maps that are left as they were.
  """
  folder = workdir / COMPRESSED
  hub.save(stored(model), folder)
  save_vocabulary(subject.folder, folder)
  pair = {"original": stored(subject.model), COMPRESSED: hub.load(folder)}
  prompt = jnp.asarray(subject.selection[:1, : min(32, subject.selection.shape[1])])
  b = config.bench
  dtype = lambda one: jax.tree.map(lambda a: a.astype(b.dtype) if a.dtype == jnp.bfloat16 else a, one)
  run = lambda one: functools.partial(generate, dtype(one), prompt, tokens=b.tokens)
  times = timing.compare({name: run(one) for name, one in pair.items()}, repetitions=b.repetitions, warmup=1)
  size = lambda where: sum(file.stat().st_size for file in where.glob("*.safetensors"))
  found = {
    "bytes": {name: maps.bytes_of(one) for name, one in pair.items()},
    "files": {"original": size(subject.folder), COMPRESSED: size(folder)},
    "perplexity": {name: perplexity(subject, one) for name, one in pair.items()},
    "tokens_per_second": {name: b.tokens / times.median(name) for name in pair},
    "kept": left_out(subject.model, model),
  }
  for name in pair:
    said = ("bytes", "perplexity", "tokens_per_second")
    console.say(", ".join([name, *(f"{what} {found[what][name]:.5g}" for what in said)]))
  if found["kept"]:
    console.say(f"left as they are: {', '.join(found['kept'])}")
  console.say(f"written: {folder}; python -m jaxlab.generate --model={folder} --raw TEXT goes on from a text")
  return found


def written_claims(found: dict, most: float) -> list[Claim]:
  """Of `written`: the folder holds what was counted, and its perplexity."""
  of = lambda what: found[what][COMPRESSED] / found[what]["original"]
  kept = f"; left as they are: {', '.join(found['kept'])}" if found["kept"] else ""
  speed = ", ".join(f"{name} {rate:.4g}" for name, rate in found["tokens_per_second"].items())
  return [
    Claim(
      "Perplexity of the folder that was written and read again over the original's", "ratio", "lower",
      ours=of("perplexity"), threshold=most, baseline=f"the original's {found['perplexity']['original']:.4g}",
      note=f"{of('bytes'):.3f} of the bytes; tokens/s of one text: {speed}{kept}",
    ),
    Claim(
      "Bytes on disk over those counted", "ratio", "lower",
      ours=found["files"][COMPRESSED] / found["bytes"][COMPRESSED], threshold=1.02,
      baseline=f"{found['bytes'][COMPRESSED]} counted", note="the rest are the files' headers",
    ),
  ]  # fmt: skip


def written_finding(metrics: dict) -> str:
  """What became of the one model of the part."""
  ((name, found),) = metrics[COMPRESSED].items()
  before, after = (found["perplexity"][who] for who in ("original", COMPRESSED))
  size = found["bytes"][COMPRESSED] / found["bytes"]["original"]
  return f"{name} in {size:.1%} of its bytes: perplexity {after:.4g}, {before:.4g} before."
