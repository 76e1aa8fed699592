"""What experiments that compress weights share: models and their text, perplexity at a number of bytes, a folder."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import results
from experiments.long_context import given, opened, parse, sizes_of, subject_names
from experiments.text import Text
from jaxlab.core.checks import require, require_choice
from jaxlab.data import packing
from jaxlab.models import Transformer, hub, maps
from jaxlab.models.layers import Linear
from jaxlab.models.map_forms import Affine, Factored, Product, SharedBasis
from jaxlab.models.packed_maps import NormalFloat, Quantised, SignStack, Sparse, WithOutliers
from jaxlab.training import losses
from jaxlab.training.lora import Adapted
from jaxlab.weights.bitstack import bytes_in_use
from jaxlab.weights.calibration import with_maps
from jaxlab.weights.quantise import awq, gptq, quantise, rtn

COMPRESSED = "compressed"  # the part that a model of one's own goes through


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
  return subject_of(config, name, folder, hub.load(folder, dtype="float32"), text)


def subject_of(config, name: str, folder: Path, model: Transformer, text: Text) -> Subject:
  """A model, the folder of its tokenizer, and the three texts; sizes are those of config.text.base or others."""
  size = sizes_of(config.text, name)
  tokens, count = text.split(config.data.calibration), size.rows + size.chosen
  held, wanted = len(tokens.ids), count * (size.time + 1)
  require(held >= wanted, f"the split {config.data.calibration} has {held} tokens, {wanted} are needed; give more text")
  # From BOS on, as a model reads: the first token's states are far from all others'.
  rows = itertools.islice(packing.training_rows(tokens, row=size.time, seed=config.seed), count)
  rows = np.stack([np.asarray(one, np.int32) for one in rows])
  how = dict(row=size.time, batch=size.batch, limit=size.judged)
  batches = packing.evaluation_batches(text.split(config.data.test), **how)
  return Subject(name, folder, model, rows[: size.rows, :-1], rows[size.rows :], batches)


def stored(model, dtype="bfloat16"):
  """As a file holds it: float32 parameters in `dtype`; codes, scales and sign blocks keep their own."""
  return jax.tree.map(lambda a: a.astype(dtype) if a.dtype == jnp.float32 else a, model)


def _matrix(one: nnx.Module) -> np.ndarray:
  """W of a stacked map without its bias, float32, made on the host where a program for every rank would be compiled."""
  wide = lambda a: np.asarray(a[...], np.float32)
  if isinstance(one, (Linear, Affine)):
    return wide(one.weight)
  if isinstance(one, Factored):
    return wide(one.down) @ wide(one.up)
  if isinstance(one, Product):
    return _matrix(one.down) @ _matrix(one.up)
  if isinstance(one, Adapted):
    return _matrix(one.inner) + wide(one.a) @ wide(one.b)
  if isinstance(one, Quantised | NormalFloat | WithOutliers | Sparse | SharedBasis):
    return np.asarray(jax.jit(type(one).weight)(one), np.float32)
  weight = np.swapaxes(np.asarray(_stacks(one)), 1, 2)
  return weight if one.scale is None else weight / wide(one.scale)[:, :, None]


_stacks = jax.jit(jax.vmap(SignStack.weight))


def restored(model: Transformer, like: Transformer | None = None) -> Transformer:
  """The same function with every map as one float32 matrix and a bias: one program judges all methods.

  Args:
    like: the original of a pruned model: heads and neurons that are gone are zeros.
  """
  forms = {}
  for name, one in maps.named(model.blocks, Adapted).items():
    weight, bias = _matrix(one), getattr(getattr(one, "inner", one), "bias", None)
    bias = np.zeros_like(weight[:, 0]) if bias is None else np.asarray(bias[...], np.float32)
    if like is not None:
      own = maps.named(like.blocks)[name]
      shape = own.weight.shape if isinstance(own, Linear) else own.shape
      weight = np.pad(weight, [(0, n - m) for n, m in zip(shape, weight.shape, strict=True)])
      bias = np.pad(bias, [(0, 0), (0, shape[2] - bias.shape[1])])
    forms[name] = Affine(weight, bias)
  made = with_maps(model, forms)
  if like is not None:
    made.config = made.blocks.config = like.config
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), made)


_judge = losses.evaluator(jax.jit(lambda model, tokens: model.hidden(tokens)))


def perplexity(subject: Subject, model: Transformer) -> float:
  """On the text that nothing was chosen by, of a model of any forms."""
  return _judge(restored(model, subject.model), subject.batches)["perplexity"]


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


def rivals(config, subject: Subject) -> dict[str, Callable[[int], Transformer]]:
  """{"rtn", "gptq", "awq": bits -> the model in them, in groups of config.group}."""
  how = dict(group=config.group, batch=sizes(config.text, subject).batch)
  made = lambda method: lambda bits: method(subject.model, subject.calibration, bits=int(bits), **how)
  grids = {name: functools.partial(quantise, how=one) for name, one in (("rtn", rtn), ("gptq", gptq))}
  return {name: made(method) for name, method in (grids | {"awq": awq}).items()}


def left_out(original: Transformer, model: Transformer) -> list[str]:
  """Maps that a compressed model holds as they were: in another form they would take as many bytes or more."""
  before = maps.named(original.blocks)
  same = lambda pair: np.array_equal(pair[0], pair[1].astype(pair[0].dtype))
  arrays = lambda one, old: zip(jax.tree.leaves(one), jax.tree.leaves(old), strict=True)
  alike = {name: one for name, one in maps.named(model.blocks).items() if type(one) is type(before[name])}
  return [name for name, one in alike.items() if all(map(same, arrays(one, before[name])))]


def made_rows(subject: Subject, methods: Sequence[str], make: Mapping[str, Callable], console) -> list[dict]:
  """The row of the dense model, then one of every method named with its budget."""
  rows = [row(subject, "dense", 1, subject.model)]
  for text in methods:
    method, budget = parse(text)
    require_choice("a method", method, make)
    model = make[method](budget)
    rows.append(row(subject, method, budget, model))
    kept = ", ".join(left_out(subject.model, model))
    console.say(
      f"  {text}: perplexity {rows[-1]['perplexity']:.4g}, {rows[-1]['share']:.3f} of the blocks' bytes"
      + (f", left as they are: {kept}" if kept else "")
    )
  return rows


def sizes(fields, subject: Subject):
  """As `sizes_of`."""
  return sizes_of(fields, subject.name)


def at(rows: list[dict], method: str, budget: float | None = None) -> dict:
  """The row of a method, or that at a budget."""
  return next(row for row in rows if row["method"] == method and budget in (None, row["budget"]))


def chosen_parts(config, measures: Mapping[str, Callable]) -> dict[str, Callable]:
  """Those of config.parts, in its order; of a model of one's own alone the one that compresses it."""
  return {part: measures[part] for part in ((COMPRESSED,) if config.model else config.parts)}


def measured(config, workdir: Path, parts: Mapping[str, Callable], called: Mapping, console) -> dict:
  """{part: {model: what parts[part](subject) gave}}, all of the first model before the next one's, each once.

  Parts of config.first are measured of the first model alone.
  """
  metrics = {part: {} for part in parts}
  for name, read in called.items():
    for part, found in metrics.items():
      if not (found and part in config.first):

        def run(part=part, name=name, read=read):
          console.say(f"{part} of {name}")
          return parts[part](read())

        found[name] = results.part(workdir, f"{part}.{name}", run)
  return metrics
