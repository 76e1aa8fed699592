"""Training the networks that are compared, on given text and on text the model writes itself, and saving one."""

import functools
from pathlib import Path

import grain
import jax
import numpy as np

from experiments.snlp.settings import parse
from experiments.snlp.training import training_loss
from experiments.text import Text, save_vocabulary
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require, require_choice
from jaxlab.core.files import write_files, write_text
from jaxlab.data import packing
from jaxlab.depth import snlp_adapt
from jaxlab.models import Transformer, hub
from jaxlab.training import loop
from jaxlab.training.optimizers import adam

DISTILLED, REGULARISED, CONTINUED = "distilled", "regularised", "continued"
METHODS = (DISTILLED, REGULARISED, CONTINUED)
OPTIONS = ("layers", "iterations", "groups", "tail", "surrogate", "initial")  # of a setting, for `snlp.hidden`


def adapted(config, method: str, text: Text, original: Transformer, workdir: Path, console) -> Transformer:
  """The network that a method makes of the original, in its dtype; resumes from `workdir`/method."""
  require_choice("a method", method, METHODS)
  t = config.train
  settings = [parse(setting) for setting in config.settings]
  start = original.depth - max(s["layers"] + s["tail"] for s in settings)
  teacher = loop.cast(original, t.dtype)
  shape = dict(start=start, rank=config.rank, key=jax.random.key(config.seed))
  trained = snlp_adapt.trainable(original, config.parameters, **shape)
  loss = method_loss(config, method, settings, None if config.parameters == "all" else start)

  def of_parameters(trained, batch, step, key, teacher):
    return loss(snlp_adapt.assembled(teacher, trained), batch, step, key, teacher)

  data = packing.batches(training_rows(config, text, teacher, workdir, console), t.batch // jax.process_count())
  with console.training(method) as progress:
    trained = loop.train(
      trained,
      data,
      of_parameters,
      adam(t.rate, steps=t.steps, warmup=t.warmup),
      steps=t.steps,
      workdir=workdir / method,
      seed=config.seed,
      accumulate=t.accumulate,
      compute_dtype=t.dtype,
      checkpoint_every=t.checkpoint_every,
      mesh=meshes.make_mesh(config.mesh.to_dict()),
      frozen=teacher,
      progress=progress,
    )
  return jax.jit(snlp_adapt.assembled)(original, trained)


def method_loss(config, method: str, settings: list[dict], shared: int | None):
  """`(model, batch, step, key, teacher) -> (loss, metrics)`."""
  if method == DISTILLED:
    chosen = [{name: s[name] for name in OPTIONS} for s in settings]
    distil = functools.partial(
      snlp_adapt.distillation,
      settings=chosen,
      shared=shared,
      sequential_weight=config.sequential_weight,
      sequential_every=config.sequential_every,
      remat=config.train.remat,
    )
    read = functools.partial(snlp_adapt.shuffled, share=config.shuffled)
    return lambda model, batch, step, key, teacher: distil(model, teacher, read(batch["inputs"], key))
  plain = training_loss(config, config.reg if method == REGULARISED else None)
  return lambda model, batch, step, key, teacher: plain(model, batch, step, key)


def training_rows(config, text: Text, model: Transformer, workdir: Path, console) -> grain.IterDataset:
  """Rows of the given text, of another text, and rows that the model writes itself, by their shares.

  Raises:
    InputError: shares that are none, or less text than one batch takes.
  """
  own, more = config.own.share, config.more.share
  require(
    own >= 0 and more >= 0 and own + more <= 1,
    f"own.share is {own}, more.share {more}; they are shares of the rows, the rest of which is the given text",
  )
  kinds = []
  if own + more < 1:
    kinds.append((1 - own - more, _enough(config, text)))
  if more > 0:
    kinds.append((more, _enough(config, Text(config.more, text.bpe, text.cache))))
  if own > 0:
    written = grain.MapDataset.source(own_rows(config, text, model, workdir, console))
    alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    kinds.append((own, written.seed(config.seed).shuffle().repeat().to_iter_dataset(alone)))
  shares, rows = zip(*kinds, strict=True)
  return grain.IterDataset.mix(rows, shares)


def _enough(config, text: Text) -> grain.IterDataset:
  t = config.train
  held, wanted = len(text.split("train").ids), t.batch * t.length
  where = text.data.path or text.data.name
  require(held >= wanted, f"{where} has {held} tokens to train on, one batch {wanted}; give more, or lower train.batch")
  return text.rows(t.length, seed=config.seed)


def own_rows(config, text: Text, model: Transformer, workdir: Path, console) -> np.ndarray:
  """The rows that the model writes, kept in the workdir: a resumed run reads the same."""
  own, file = config.own, workdir / "own.npy"
  if not file.exists():
    console.say(f"writing {own.rows} rows of {config.train.length} tokens")
    shape = dict(rows=own.rows, length=config.train.length, batch=own.batch, temperature=own.temperature)
    made = snlp_adapt.own_text(model, jax.random.key(config.seed), bos=text.split("validation").bos, **shape)
    write_files(workdir, {file.name: lambda stream: np.save(stream, made)})
  return np.load(file)


def save(config, model: Transformer, folder: Path) -> None:
  """The network in `save_dtype` with its vocabulary, as a folder that `hub.load` and transformers read."""
  hub.save(jax.tree.map(lambda a: a.astype(config.save_dtype), model), folder)
  save_vocabulary(config.model.removeprefix("hf:"), folder)
  write_text(folder / "training_config.json", config.to_json_best_effort(indent=1))
