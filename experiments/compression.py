"""What experiments that compress weights share: models and their text, perplexity at a number of bytes, a folder."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import figures, results, timing
from experiments.long_context import given, opened, subject_names
from experiments.results import Claim
from experiments.text import save_vocabulary
from jaxlab.core.checks import require
from jaxlab.data import packing
from jaxlab.models import Transformer, generate, hub, maps
from jaxlab.models.layers import Linear
from jaxlab.training import losses
from jaxlab.weights.bitstack import bytes_in_use
from jaxlab.weights.calibration import with_maps

COMPRESSED = "compressed"  # the part that a user's model goes through, and its folder


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model in float32 and three texts: to calibrate on, to choose by, and, of another split, to be judged on.

  calibration: int32 (rows, time); selection: (rows, time + 1); batches: of `packing.evaluation_batches`.
  """

  name: str
  folder: Path
  model: Transformer
  calibration: np.ndarray
  selection: np.ndarray
  batches: list


def subjects(config, cache: Path) -> dict[str, Callable[[], Subject]]:
  """{name: reads it, once} of config.subjects, or of config.model alone: hub names, or hf:DIR.

  config.text: rows, time and batch of calibration; chosen: rows to choose by; judged: tokens to be judged on; data has
  the splits `calibration` and `test`.
  """
  read = lambda name: functools.cache(functools.partial(_subject, config, name, cache))
  return dict(zip(subject_names(config), map(read, given(config)), strict=True))


def _subject(config, name: str, cache: Path) -> Subject:
  name, folder, text = opened(config, name, cache)
  size = config.text.base if name == "base" else config.text.others
  tokens, count = text.split(config.data.calibration), size.rows + size.chosen
  held, wanted = len(tokens.ids), count * (size.time + 1)
  require(held >= wanted, f"the split {config.data.calibration} has {held} tokens, {wanted} are needed; give more text")
  # From BOS on, as a model reads: the first token's states are far from all others'.
  rows = itertools.islice(packing.training_rows(tokens, row=size.time, seed=config.seed), count)
  rows = np.stack([np.asarray(one, np.int32) for one in rows])
  how = dict(row=size.time, batch=size.batch, limit=size.judged)
  batches = packing.evaluation_batches(text.split(config.data.test), **how)
  return Subject(name, folder, hub.load(folder, dtype="float32"), rows[: size.rows, :-1], rows[size.rows :], batches)


def stored(model, dtype="bfloat16"):
  """As a file holds it: float32 parameters in `dtype`; codes, scales and sign blocks keep their own."""
  return jax.tree.map(lambda a: a.astype(dtype) if a.dtype == jnp.float32 else a, model)


class _Affine(nnx.Module):
  """y = x W + b."""

  def __init__(self, weight, bias):
    self.weight, self.bias = nnx.Param(weight), nnx.Param(bias)

  def __call__(self, x):
    return x @ self.weight[...] + self.bias[...]


def _matrix(one: nnx.Module) -> np.ndarray:
  """W of a stacked map without its bias, float32, made on the host where a program for every rank would be compiled."""
  wide = lambda a: np.asarray(a[...], np.float32)
  if isinstance(one, Linear):
    return wide(one.weight)
  if isinstance(one, maps.Factored):
    return wide(one.down) @ wide(one.up)
  if isinstance(one, maps.Product):
    return _matrix(one.down) @ _matrix(one.up)
  if isinstance(one, maps.Quantised):
    return np.asarray(jax.jit(maps.Quantised.weight)(one))
  return np.swapaxes(np.asarray(_stacks(one)), 1, 2) / wide(one.scale)[:, :, None]


_stacks = jax.jit(jax.vmap(maps.SignStack.weight))


def restored(model: Transformer) -> Transformer:
  """The same function with every map as one float32 matrix and a bias: one program judges all methods."""
  forms = {}
  for name, one in maps.named(model.blocks).items():
    weight, bias = _matrix(one), getattr(one, "bias", None)
    forms[name] = _Affine(weight, np.zeros_like(weight[:, 0]) if bias is None else np.asarray(bias[...], np.float32))
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), with_maps(model, forms))


_judge = losses.evaluator(jax.jit(lambda model, tokens: model.hidden(tokens)))


def perplexity(subject: Subject, model: Transformer) -> float:
  """On the text that nothing was chosen by, of a model of any forms."""
  return _judge(restored(model), subject.batches)["perplexity"]


def selection_loss(subject: Subject) -> Callable[[Transformer], jax.Array]:
  """Mean loss of a model on the rows to choose by; may be traced."""
  inputs, targets = subject.selection[:, :-1], jnp.asarray(subject.selection[:, 1:])
  return lambda model: losses.mean_loss(losses.token_losses(model, model.hidden(inputs), targets), targets)


def row(subject: Subject, method: str, budget: float, model: Transformer) -> dict:
  """{subject, method, budget, bytes, share of the dense blocks' bytes, perplexity} of a model as it is stored."""
  small, size = stored(model), maps.bytes_of(stored(subject.model))
  blocks = maps.bytes_of(stored(maps.named(subject.model.blocks)))
  used = bytes_in_use(small)
  found = dict(subject=subject.name, method=method, budget=budget, bytes=used, share=(used - size + blocks) / blocks)
  return found | {"perplexity": perplexity(subject, small)}


def at(rows: list[dict], method: str, budget: float | None = None) -> dict:
  """The row of a method, or that at a budget."""
  return next(row for row in rows if row["method"] == method and budget in (None, row["budget"]))


def written(config, subject: Subject, model: Transformer, workdir: Path, console) -> dict:
  """Saves a compressed model as workdir/compressed, reads it again, and measures it beside the original.

  Returns:
    {bytes, files, perplexity, tokens_per_second: {"original", "compressed"} each}; files: bytes on disk.
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
  }
  for name in pair:
    console.say(", ".join([name, *(f"{what} {found[what][name]:.5g}" for what in found if what != "files")]))
  console.say(f"written: {folder}; the next command reads it: python -m jaxlab.generate --model={folder} TEXT")
  return found


def written_claims(found: dict, most: float) -> list[Claim]:
  """Of `written`: the folder holds what was counted, and its perplexity."""
  of = lambda what: found[what][COMPRESSED] / found[what]["original"]
  speed = ", ".join(f"{name} {rate:.4g}" for name, rate in found["tokens_per_second"].items())
  return [
    Claim(
      "Perplexity of the folder that was written and read again over the original's", "ratio", "lower",
      ours=of("perplexity"), threshold=most, baseline=f"the original's {found['perplexity']['original']:.4g}",
      note=f"{of('bytes'):.3f} of the bytes; tokens/s of one text: {speed}",
    ),
    Claim(
      "Bytes on disk over those counted", "ratio", "lower",
      ours=found["files"][COMPRESSED] / found["bytes"][COMPRESSED], threshold=1.02,
      baseline=f"{found['bytes'][COMPRESSED]} counted", note="the rest are the files' headers",
    ),
  ]  # fmt: skip


def parts_of(config) -> tuple[str, ...]:
  """config.parts; of a user's model alone the one that compresses it."""
  return (COMPRESSED,) if config.model else config.parts


def measured(config, workdir: Path, measures: Mapping[str, Callable], called: Mapping, console) -> dict:
  """{part: {model: what measures[part](subject) gave}}, all of the first model before the next one's, each once.

  A part is measured of the models that config.of names for it, of the first one where it names none.
  """
  metrics = {part: {} for part in parts_of(config)}
  for i, (name, read) in enumerate(called.items()):
    for part in metrics:
      if name in config.of.get(part, ()) or (part not in config.of and i == 0) or config.model:

        def run(part=part, name=name, read=read):
          console.say(f"{part} of {name}")
          return measures[part](read())

        metrics[part][name] = results.part(workdir, f"{part}.{name}", run)
  return metrics


def draw_frontier(rows: list[dict], workdir: Path, titles: Mapping[str, str], *, name: str = "frontier") -> str:
  """Perplexity against bytes, an axis a model, a line a method; the file's name."""
  models = list(dict.fromkeys(row["subject"] for row in rows))
  figure, axes = figures.subplots(len(models), squeeze=False)
  marks = "os^vDPX*<>"
  for axis, model in zip(axes[0], models, strict=True):
    mine = [row for row in rows if row["subject"] == model]
    methods = [method for method in dict.fromkeys(row["method"] for row in mine) if method != "dense"]
    dense = at(mine, "dense")
    for i, method in enumerate(methods):
      points = sorted((row["bytes"] / 1e6, row["perplexity"]) for row in mine if row["method"] == method)
      axis.plot(*zip(*points, strict=True), marker=marks[i % len(marks)], ms=4, lw=1, label=titles.get(method, method))
    axis.axhline(dense["perplexity"], color="0.4", lw=0.8, ls="--", label=f"dense, {dense['bytes'] / 1e6:.3g} MB")
    high = min(max(row["perplexity"] for row in mine), 8 * dense["perplexity"])
    axis.set(xlabel="MB, all parameters", ylabel="perplexity", yscale="log", title=model)
    axis.set_ylim(0.9 * dense["perplexity"], 1.1 * high)
    axis.yaxis.set_major_formatter("{x:.4g}")
    axis.legend(fontsize=7)
  return figures.save(figure, workdir, name)


def draw_pair(found: dict, workdir: Path) -> str:
  """Perplexity against bytes of the original and of the folder that was written; the file's name."""
  figure, axis = figures.subplots()
  for name in ("original", COMPRESSED):
    axis.plot(found["bytes"][name] / 1e6, found["perplexity"][name], "o", label=name)
  axis.set(xlabel="MB, all parameters", ylabel="perplexity", xlim=(0, 1.1 * found["bytes"]["original"] / 1e6))
  axis.legend()
  return figures.save(figure, workdir, "pair")
