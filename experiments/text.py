"""From config.data and config.model to tokens and trained models: what every language-model experiment needs."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import optax
from tokenizers import Tokenizer

from experiments.console import Console
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import InputError
from jaxlab.core.files import write_text
from jaxlab.data import corpora, packing, recall, tokenizer, tokens
from jaxlab.models import LanguageModel, TransformerConfig, hub
from jaxlab.models.config import Experts, HyperConnections, nanochat, qwen3
from jaxlab.training.loop import LossFn, train
from jaxlab.training.optimizers import adam, muon_adamw

PRESETS = {"nanochat": nanochat, "qwen3": qwen3, "transformer": TransformerConfig}


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """A corpus with its tokenizer; splits are tokenized when first asked for."""

  data: dict
  bpe: Tokenizer
  cache: Path

  @functools.cache  # noqa: B019 (one instance a run)
  def split(self, name: str) -> tokens.Tokens:
    documents = load_documents(self.data, name, self.cache)
    return tokens.tokenize(documents, self.bpe, bos=tokenizer.bos_id(self.bpe), cache=self.cache)

  @functools.cached_property
  def token_bytes(self) -> np.ndarray:
    return tokenizer.token_bytes(self.bpe)

  def rows(self, length: int, *, seed: int, recall_share: float = 0.0):
    """Training rows of `length` + 1 tokens, `recall_share` of them generated recall tasks."""
    train = self.split("train")
    shard = (jax.process_index(), jax.process_count())
    text = packing.training_rows(train, row=length, seed=seed, shard=shard)
    if recall_share == 0:
      return text
    tasks = recall.training_rows(train, self.bpe, row=length, seed=seed + 1 + 1000 * shard[0])
    return packing.mixture(text, tasks, recall_share)


def load_documents(data, split: str, cache: Path) -> corpora.Documents:
  return corpora.documents(data.name, split=split, cache=cache, path=data.path)


def load_text(config, cache: Path, given: Path | None = None) -> Text:
  """The corpus of config.data with a tokenizer of its own, or with the one in the folder `given`."""
  if given is not None:
    bpe = tokenizer.of_text(hub.load_vocabulary(given).tokenizer)
    tokenizer.require_fits(bpe, hub.read_config(given)[0].vocab_size, given)
  else:
    documents = load_documents(config.data, "train", cache)
    bpe = tokenizer.trained(documents, key=documents.key, vocab_size=config.data.vocab_size, cache=cache)
  return Text(config.data, bpe, cache)


def save_vocabulary(source: str | os.PathLike, folder: Path) -> None:
  """Writes a checkpoint's tokenizer, special tokens and chat template into a folder that holds its weights changed."""
  given = hub.load_vocabulary(source)
  name = lambda token: None if token is None else given.tokenizer.id_to_token(token)
  described = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": name(given.bos),
    "eos_token": name(next(iter(given.eos), None)),
    "chat_template": given.chat_template,
  }
  write_text(folder / "tokenizer.json", given.tokenizer.to_str())
  described = {key: value for key, value in described.items() if value is not None}
  write_text(folder / "tokenizer_config.json", json.dumps(described, indent=1))


def checkpoint_folder(config) -> Path | None:
  """Where config.model is: "hf:DIR", or a name that `hub.find` knows, such as "smollm2"; None for a preset."""
  return None if config.model in PRESETS else hub.find(config.model.removeprefix("hf:"))


def model_config(config, vocab_size: int, **changes) -> TransformerConfig:
  """config.model and config.shape as a TransformerConfig; `changes` override fields of the shape."""
  shape = config.shape.to_dict() | changes
  for name, kind in (("hyper", HyperConnections), ("experts", Experts)):
    if isinstance(shape.get(name), dict):
      shape[name] = kind(**shape[name])
  try:
    return PRESETS[config.model](vocab_size=vocab_size, **shape)
  except TypeError as error:
    raise InputError(f"config.shape does not fit model {config.model}: {error}") from None


def adam_in_state(rate: float, *, steps: int, warmup: int) -> optax.GradientTransformation:
  """Adam with rate and steps in its state, so that runs of other ones share their compiled programs."""
  return optax.inject_hyperparams(adam, static_args=("warmup", "factor"))(rate, steps=steps, warmup=warmup)


def train_model(
  config,
  text: Text,
  model: LanguageModel,
  loss_fn: LossFn,
  *,
  workdir: Path,
  console: Console,
  title: str,
  phase: str = "train",
) -> LanguageModel:
  """Trains by config[phase]; resumes from `workdir`."""
  t = config[phase]
  rows = text.rows(t.length, seed=config.seed, recall_share=t.recall)
  optimizer = muon_adamw(
    model.config,
    steps=t.steps,
    batch_tokens=t.batch * t.length,
    scale=t.scale,
    warmup=t.warmup,
    warmdown=t.warmdown,
  )
  hosts = jax.process_count()
  with console.training(title) as progress:
    return train(
      model,
      packing.batches(rows, t.batch // hosts),
      loss_fn,
      optimizer,
      steps=t.steps,
      workdir=workdir,
      seed=config.seed,
      accumulate=t.accumulate,
      compute_dtype=t.dtype,
      checkpoint_every=t.checkpoint_every,
      mesh=meshes.make_mesh(config.mesh.to_dict()),
      progress=progress,
    )
