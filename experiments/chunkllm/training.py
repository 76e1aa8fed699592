"""Training a model's adapters with the model frozen, on text whose sentences are marked."""

import functools
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from experiments.long_context import sizes_of
from experiments.text import load_text
from jaxlab.attention.chunkllm_chunks import ChunkAdapters
from jaxlab.attention.chunkllm_training import adapter_loss, sentence_ends
from jaxlab.core import mesh as meshes
from jaxlab.data import tokenizer
from jaxlab.models import hub, inference
from jaxlab.training import loop
from jaxlab.training.optimizers import adam


def trained(config, name: str, initial: ChunkAdapters, workdir: Path, cache: Path, console) -> ChunkAdapters:
  """The adapters of the model `name`; resumes from `workdir`/adapters.name."""
  sizes, t = sizes_of(config.train, name), config.train
  config = config.copy_and_resolve_references()
  config.data.name = "local_text" if config.data.path else config.data.name
  folder = hub.find((config.model or name).removeprefix("hf:"))
  text = load_text(config, cache, given=folder)
  bytes_of = tokenizer.token_bytes(text.bpe, complete=False)

  def labelled(row: np.ndarray) -> dict[str, np.ndarray]:
    return {"inputs": row[:-1], "labels": sentence_tokens(row[:-1], text.bpe, bytes_of)}

  rows = text.rows(sizes.length, seed=config.seed, recall_share=t.recall).map(labelled)
  data = grain.experimental.ThreadPrefetchIterDataset(
    rows.batch(sizes.batch, drop_remainder=True), prefetch_buffer_size=4
  )
  how = dict(top=t.top, block=t.block) | _chunks(config)

  def loss(adapters, batch, step, key, model):
    network = inference.take_apart(model)
    value, parts = adapter_loss(adapters, network, batch["inputs"], batch["labels"], **how)
    return value, parts._asdict()

  factor = lambda name: t.ends_rate / t.rate if name in ("w", "b") else 1.0
  with console.training(f"adapters of {name}") as progress:
    return loop.train(
      initial,
      data,
      loss,
      adam(t.rate, steps=sizes.steps, warmup=t.warmup, factor=factor),
      steps=sizes.steps,
      workdir=workdir / f"adapters.{name}",
      seed=config.seed,
      compute_dtype="float32",
      checkpoint_every=sizes.steps,
      mesh=meshes.make_mesh(config.mesh.to_dict()),
      frozen=hub.load(folder, dtype=config.dtype),
      progress=progress,
    )


def _chunks(config) -> dict:
  return {name: config.method[name] for name in ("sink", "min_chunk", "max_chunk")}


def sentence_tokens(ids: np.ndarray, bpe: Tokenizer, bytes_of: np.ndarray) -> np.ndarray:
  """bool like ids: the tokens that end a sentence. Where a row is cut no sentence ends.

  Args:
    bytes_of: `data.tokenizer.token_bytes`, of the text that ids decode to.
  """
  text, labels = bpe.decode(ids.tolist()), np.zeros(len(ids), bool)
  last = [len(text[: end + 1].encode()) - 1 for end in sentence_ends(text) if end + 1 < len(text)]
  token = np.searchsorted(np.cumsum(bytes_of[ids]), last, side="right")
  labels[token[token < len(ids)]] = True
  return labels


def quality(config, network, untrained, rows: np.ndarray, labels: np.ndarray) -> dict:
  """Of held-out rows: recall of the teacher's chunks, divergence from it, and how well ends are found.

  Returns:
    {recall, untrained (recall before training), divergence, precision, found (share of the ends), f1, mean (tokens of
    a chunk of the text's own)}.
  """
  how = dict(top=config.train.top, block=config.train.block) | _chunks(config)
  measured = jax.jit(functools.partial(adapter_loss, **how))
  parts, before = (measured(adapters, network, rows, labels)[1] for adapters in (network.adapters, untrained))
  ends = jax.jit(lambda network, rows: network.adapters.ends(first_output(network, rows)))
  guess = np.asarray(ends(network, rows)) > 0
  hits = (guess & labels).sum()
  precision, found = hits / max(guess.sum(), 1), hits / max(labels.sum(), 1)
  return {
    "recall": float(parts.recall),
    "untrained": float(before.recall),
    "divergence": float(parts.distillation),
    "precision": float(precision),
    "found": float(found),
    "f1": float(2 * precision * found / max(precision + found, 1e-9)),
    "mean": float(labels.size / max(labels.sum(), 1)),
  }


def first_output(network, rows):
  """The first layer's output, which the chunk adapter reads."""
  x, side, _ = network.model.embed(jnp.asarray(rows))
  first = inference.Network(network.model, network.blocks[:1])
  attend = lambda layer, block, x, q, k, v, window: inference.dot_product_attention(q, k, v, window=window, start=0)
  return inference.run_layers(first, x, side, attend)[0]
