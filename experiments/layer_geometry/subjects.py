"""Which networks are measured, and on which rows of text."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.snlp.training import training_loss
from experiments.text import Text, checkpoint_folder, load_documents, load_text, model_config, train_model
from jaxlab.core.checks import require
from jaxlab.data import byte_level
from jaxlab.data.tokens import Tokens
from jaxlab.depth import layer_geometry_hnet
from jaxlab.models import HNet, LanguageModel, Mamba2, Mamba2Config, Transformer, hub

UNTRAINED = "untrained"
IDN = ", IDN"
MAMBA = "Mamba-2"


@dataclasses.dataclass(frozen=True, eq=False)
class ByteText:
  """A corpus by bytes."""

  data: dict
  cache: Path

  @functools.cache  # noqa: B019 (one instance a run)
  def split(self, name: str) -> Tokens:
    return byte_level.tokens_of(load_documents(self.data, name, self.cache))


Loader = Callable[[], tuple[LanguageModel, Text | ByteText]]


def load(config, workdir: Path, cache: Path, console) -> dict[str, Loader]:
  """{name: a function that gives (model, text in its tokens)}, which trains where there is something to train.

  One checkpoint (an H-Net: each of its stacks), or: transformers of config.sizes, a Mamba-2, the size number
  config.standard once more with SNLP's regulariser and not trained at all, and checkpoints that ship.
  """
  folder = checkpoint_folder(config)
  given = lambda folder: (hub.load(folder, dtype="float32"), load_text(config, cache, given=folder))
  if folder and hub.kind_of(folder) is HNet:
    shape, bytewise = hub.read_config(folder)[0], byte_level.VOCABULARY
    require(
      shape.vocab_size == bytewise, f"{folder} has a vocabulary of {shape.vocab_size}, not the {bytewise} bytes of text"
    )
    loader = functools.cache(lambda: (hub.load(folder, dtype="float32", kind=HNet), ByteText(config.data, cache)))
    return {f"{folder.name}, {stack}": loader for stack, *_ in layer_geometry_hnet.names(shape.stages)}
  if folder:
    return {folder.name: functools.cache(lambda: given(folder))}

  @functools.cache
  def text():
    return load_text(config, cache)

  def transformer(depth: int, width: int):
    changes = dict(context=config.train.length, depth=depth, aspect_ratio=width // depth)
    shape = model_config(config, text().bpe.get_vocab_size(), **changes)
    require(shape.width == width, f"config.sizes has width {width}; heads of {shape.head_dim} make it {shape.width}")
    return Transformer(shape, jax.random.key(config.seed))

  def mamba():
    shape = Mamba2Config(vocab_size=text().bpe.get_vocab_size(), **config.mamba)
    return Mamba2(shape, jax.random.key(config.seed))

  def fitted(name, start, regulariser=None):
    loss = training_loss(config, regulariser)
    model = train_model(config, text(), start(), loss, workdir=workdir / name, console=console, title=name)
    # Off the training mesh: arrays placed differently would compile everything once more.
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), model), text()

  starts = {f"{depth} x {width}": functools.partial(transformer, depth, width) for depth, width in config.sizes}
  standard = list(starts)[config.standard]
  if config.mamba.depth:
    starts[f"{MAMBA} {config.mamba.depth} x {config.mamba.width}"] = mamba
  result = {name: functools.partial(fitted, name, start) for name, start in starts.items()}
  if config.idn.weight:
    result[standard + IDN] = functools.partial(fitted, standard + IDN, starts[standard], config.idn)
  fill = lambda: random_outputs(starts[standard](), jax.random.key(config.seed + 1))
  result[f"{standard}, {UNTRAINED}"] = lambda: (fill(), text())
  result |= {name: functools.partial(given, hub.find(name)) for name in config.checkpoints}
  return {name: functools.cache(loader) for name, loader in result.items()}


def random_outputs(model: LanguageModel, key: jax.Array) -> LanguageModel:
  """Matrices that start at zero drawn at random: with them at zero an untrained nanochat layer does nothing at all."""
  leaves, structure = jax.tree.flatten(model)
  fill = lambda a, k: jax.random.normal(k, a.shape, a.dtype) / a.shape[-2] ** 0.5
  keys = jax.random.split(key, len(leaves))
  fresh = [fill(a, k) if a.ndim == 3 and not a.any() else a for a, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(structure, fresh)


def split_rows(tokens: Tokens, config, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{"reference", "evaluation": (rows of BOS and text, the document of each row)}, no document in both.

  A third of the documents is for evaluation. Every document gives a row in turn, its pieces in random order.
  """
  random, piece = np.random.default_rng(seed), config.data.row - 1
  counts = np.diff(tokens.offsets) // piece
  usable = random.permutation(np.flatnonzero(counts))
  require(
    len(usable) >= 3, f"only {len(usable)} documents have {piece} tokens; give longer ones or lower config.data.row"
  )
  cut = len(usable) // 3
  result = {}
  for part, chosen in (("evaluation", usable[:cut]), ("reference", usable[cut:])):
    pieces = [(turn, d, at) for d in chosen for turn, at in enumerate(random.permutation(counts[d]))]
    pieces = sorted(pieces, key=lambda p: p[0])[: config.data[part]]
    require(
      len(pieces) == config.data[part],
      f"{len(pieces)} rows of {piece} tokens for {part}, config.data.{part} asks for {config.data[part]}; lower it",
    )
    cut_out = lambda d, at: tokens.document(d)[at * piece : (at + 1) * piece]
    rows = [np.concatenate([[tokens.bos], cut_out(d, at)]) for _, d, at in pieces]
    result[part] = np.array(rows, np.int32), np.array([d for _, d, _ in pieces])
  return result
