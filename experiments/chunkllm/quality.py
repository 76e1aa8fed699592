"""What reading fewer chunks loses, and how long a choice of chunks stays right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.chunkllm.decoders import ABLATIONS, DENSE, EVERY, FIXED, compared, holding, named
from experiments.long_context import Subject, accuracy, documents, padded, paired, sizes_of
from experiments.overlap import overlapped
from jaxlab.attention.chunkllm import Chunks, retention
from jaxlab.attention.chunkllm_chunks import best_chunks, chunk_ends, chunk_ids
from jaxlab.attention.chunkllm_training import candidates, teacher_attention
from jaxlab.evaluation.long_context import continuation, own_loss
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.inference import run_layers


def losses_of(config, subject: Subject, mean: float) -> list[dict]:
  """A row a decoder: {subject, decoder, loss behind a prompt, difference to dense, its standard error, count, read:
  share of the tokens so far that a token attends to}."""
  mine = subject.name == "base"
  read = sizes_of(config.losses, subject.name)
  rows = documents(subject.tokens, read.documents, read.prompt + read.rest, seed=config.seed)
  keeps = tuple(map(named, config.keeps if mine else (config.keep,)))
  names = (DENSE, *keeps, *(ABLATIONS if mine else ()))

  def measured(decoder) -> tuple[np.ndarray, float]:
    run = lambda i: _losses(subject.network, padded(rows[i : i + read.batch], read.batch), read.prompt, decoder)
    losses, shares = zip(*map(run, range(0, len(rows), read.batch)), strict=True)
    return np.concatenate(losses)[: len(rows)].mean(axis=1), float(np.mean(shares))

  decoders = compared(config, mean, names)
  found = dict(zip(decoders, overlapped(measured, decoders.values()), strict=True))
  shares = {name: share for name, (_, share) in found.items()}
  # Its entries stay as many while the row grows, and the share that is read is a mean over the rest.
  share = shares[named(config.keep)] * (1 + read.rest / (2 * read.prompt))
  for name, held in holding(config, subject, share).items():
    found[name] = measured(held)[0], shares[named(config.keep)]
  first = found[DENSE][0]
  row = lambda name, losses, share: (
    dict(subject=subject.name, decoder=name, loss=float(losses.mean()), read=share, count=len(rows))
    | paired(losses, first)
  )
  return [row(name, *one) for name, one in found.items()]


@functools.partial(jax.jit, static_argnames=("prompt", "decoder"))
def _losses(network, tokens, prompt: int, decoder):
  losses, state = continuation(network, tokens[:, :prompt], None, tokens[:, prompt:], decoder=decoder, of=own_loss)
  return losses, retention(state) if isinstance(state.memory, Chunks) else jnp.ones(len(tokens))


def questions_of(config, subject: Subject, mean: float, share: float) -> list[dict]:
  """Rows of `long_context.accuracy`.

  Args:
    share: of the tokens that ChunkLLM reads; a sliding window and SepLLM's cache hold as many.
  """
  decoders = compared(config, mean, (DENSE, named(config.keep), FIXED, EVERY))
  return accuracy(subject, decoders | holding(config, subject, share), config.questions)


def consistency_of(config, subject: Subject, label) -> dict:
  """Overlap (Jaccard) of the chunks that consecutive tokens attend to most, by the model's own attention, of those that
  the first of them would choose from.

  Returns:
    {"within": where both lie in one chunk, "across": where a chunk ends between them, "layers": both in every layer}.
  """
  c = config.consistency
  rows = documents(subject.tokens, c.documents, c.length, seed=config.seed + 2)
  found = np.asarray(_overlaps(subject.network, rows, label(rows), config.method.to_dict() | dict(top=c.top)))
  within, across = (found[:, i] / np.maximum(found[:, i + 1], 1) for i in (0, 2))
  return {"within": float(within.mean()), "across": float(across.mean()), "layers": [within.tolist(), across.tolist()]}


def _overlaps(network, rows, labels, how: dict):
  """float32[layers, 4]: sum of overlaps and number of pairs within chunks, and across their ends."""
  time, chunks = rows.shape[1], max(1, rows.shape[1] // how["min_chunk"])

  @jax.jit
  def run(network, rows, labels):
    size = functools.partial(chunk_ends, min_chunk=how["min_chunk"], max_chunk=how["max_chunk"])
    ends = jax.vmap(lambda row: size(row, time))(labels)
    ids, choice = chunk_ids(ends), candidates(ends)[:, :-1]
    x, side, _ = network.model.embed(rows)
    sums = []

    def attend(layer, _, x, q, k, v, window):
      mass = teacher_attention(q, k, ids, ids, chunks=chunks, sink=how["sink"], window=window)
      # Of both the chunks that the first would choose from: one that is always read would be in every overlap.
      before = jnp.arange(chunks) < choice[..., None]
      pair = [jnp.where(before, a, 0) for a in (mass[:, :-1], mass[:, 1:])]
      number = jnp.full(choice.shape, how["top"])
      first, second = (best_chunks(jnp.where(before, a, -jnp.inf), number, how["top"]) for a in pair)
      overlap = (first & second).sum(axis=-1) / jnp.maximum((first | second).sum(axis=-1), 1)
      # With no more chunks than are chosen there is no choice.
      real = (choice > how["top"]) & (pair[0].sum(axis=-1) > 0) & (pair[1].sum(axis=-1) > 0)
      same = ids[:, 1:] == ids[:, :-1]
      sums.extend(
        jnp.where(real & kind, a, 0).sum() for kind in (same, ~same) for a in (overlap, jnp.ones_like(overlap))
      )
      return dot_product_attention(q, k, v, window=window, start=0)

    run_layers(network, x, side, attend)
    return jnp.stack(sums).reshape(-1, 4)

  return run(network, rows, labels)
