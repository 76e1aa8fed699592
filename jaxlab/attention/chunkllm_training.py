"""Training of ChunkLLM's adapters with the model frozen: labels from text, the teacher's attention by chunks, losses.

  labels = sentence_labels(text, offsets)                                    # on the host, with the tokenizer's offsets
  (loss, parts), grads = jax.value_and_grad(adapter_loss, has_aux=True)(adapters, network, tokens, labels)

The chunk adapter learns the labels; the QK adapters learn, in every layer, how the frozen layer's attention divides
among the chunks that a token would choose from: KL(teacher || adapter), which punishes what is missed. Those are the
chunks that ended, with this token at the latest, but for the newest of them, which decoding always reads, as it does
the open one and the first tokens: to learn them would be learning what is never used.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxlab.attention.chunkllm_chunks import (
  ChunkAdapters,
  best_chunks,
  chunk_ends,
  chunk_ids,
  chunk_mass,
  chunk_means,
  chunk_scores,
  chunk_table,
  require_fit,
)
from jaxlab.core.checks import require, require_counts, require_divides
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.inference import Network, run_layers

_LEAST_MASS = 1e-4  # attention to the chunks to choose from; rows with less say nothing about them
_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s|\Z)|[。！？]+["'”’）」』]*|\S(?=\s*\n\s*\n)|\S(?=\s*\Z)""")
_SPACE = re.compile(r"\s*")
_ABBREVIATION = re.compile(
  r"(?:^|[\s(\[\"'])(?:(?:mr|mrs|ms|dr|prof|st|rev|gen|col|sgt|capt|lt|jr|sr|vs|etc|cf|al|fig|eq|sec|vol|no|pp?|ch|dept"
  r"|approx|inc|ltd|co|corp|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)|[a-z](?:\.[a-z])*)\.$",
  re.IGNORECASE,
)


def sentence_ends(text: str) -> list[int]:
  """Where sentences end: the index of the last character of each, closing quotes and brackets included.

  A sentence ends with . ! ? before white space, with their full-width forms, at a blank line, and with the text; but,
  unless a blank line follows, not before a word in small letters, nor with the full stop of an initial or of a usual
  abbreviation. That of a decimal has no space behind it.
  """
  found = []
  for match in _END.finditer(text):
    space = _SPACE.match(text, match.end())
    inside = space.end() < len(text) and space[0].count("\n") < 2
    short = match[0] == "." and _ABBREVIATION.search(text[max(0, match.start() - 12) : match.end()])
    if not (inside and (short or text[space.end()].islower())):
      found.append(match.end() - 1)
  return found


def token_labels(places: Sequence[int], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
  """bool[tokens]: the tokens that hold the characters at these places.

  Args:
    offsets: (first, past the last) character of every token, in order; empty ones hold none.

  Raises:
    InputError: offsets that are no pairs, or out of order.
  """
  offsets = np.asarray(offsets, int) if len(offsets) else np.zeros((0, 2), int)
  require(offsets.shape[1:] == (2,), f"offsets have shape {offsets.shape}; expected (tokens, 2)")
  inside = (np.diff(offsets, axis=0) >= 0).all() and (offsets[:, 0] <= offsets[:, 1]).all()
  require(bool(inside), "offsets are out of order; give every token's (first, past the last) character")
  labels, places = np.zeros(len(offsets), bool), np.asarray(places, int)
  # Of tokens that share a character, as bytes do, the last one.
  token = np.searchsorted(offsets[:, 0], places, side="right") - 1
  real = (token >= 0) & (places < offsets[token, 1]) if len(offsets) else np.zeros(len(places), bool)
  labels[token[real]] = True
  return labels


def sentence_labels(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
  """bool[tokens]: those that end a sentence (`sentence_ends`, `token_labels`)."""
  return token_labels(sentence_ends(text), offsets)


def separator_labels(text: str, offsets: Sequence[tuple[int, int]], marks: str = ",.;?!\n") -> np.ndarray:
  """bool[tokens]: those that hold one of SepLLM's separators."""
  return token_labels([i for i, character in enumerate(text) if character in marks], offsets)


class Parts(NamedTuple):
  """The losses, and the share of the teacher's `top` chunks that are among the adapters', all float32[]."""

  boundary: Array
  distillation: Array
  recall: Array


def adapter_loss(
  adapters: ChunkAdapters,
  network: Network,
  tokens: Int[Array, "batch time"],
  labels: Bool[Array, "batch time"],
  *,
  weight: float = 1.0,
  balance: bool = False,
  sink: int = 4,
  min_chunk: int = 4,
  max_chunk: int = 128,
  top: int = 8,
  block: int = 128,
) -> tuple[Float[Array, ""], Parts]:
  """(boundary loss + weight * distillation, the parts). The gradient is the adapters' alone.

  Args:
    labels: tokens that end a chunk; chunks are those that decoding would make of them (`chunk_ends`).
    balance: labels that are true weigh min(10, false / true) times as much as the others.
    sink: first tokens, which are always read and count for no chunk.
    top: chunks of the recall.
    block: queries whose attention is held at once, a divisor of time.

  Raises:
    InputError: shapes that do not fit, a block that does not divide the rows, a model of one layer, or another one.
  """
  require(tokens.shape == labels.shape, f"labels have shape {labels.shape}; expected the tokens' {tokens.shape}")
  require_fit(adapters, network.model.config)
  require_counts(top=top, min_chunk=min_chunk)
  require_divides("block", block, "the tokens of a row", tokens.shape[1])
  time = tokens.shape[1]
  chunks = max(1, time // min_chunk)
  ends = jax.vmap(lambda wanted: chunk_ends(wanted, time, min_chunk=min_chunk, max_chunk=max_chunk))(labels)
  ids, (last, _) = chunk_ids(ends), jax.vmap(lambda row: chunk_table(row, chunks))(ends)
  choice = candidates(ends)
  x, side, _ = network.model.embed(tokens)
  boundary, found = [], []

  def attend(layer, _, x, q, k, v, window):
    given, rows, keys = (jax.lax.stop_gradient(a) for a in (x, q, k))
    inputs = adapters.inputs(rows, keys, given)
    if layer == 1:
      boundary.append(boundary_loss(adapters.ends(given), labels, balance=balance))
    target = teacher_attention(rows, keys, ids, choice, chunks=chunks, sink=sink, block=block, window=window)
    queries, content = (adapters.content(a, jnp.arange(time)) for a in inputs)
    means = chunk_means(content, ids, jnp.full(len(ids), time), chunks)
    content = adapters.joined(jnp.take_along_axis(content, last[..., None, None], axis=1), means)
    scores = chunk_scores(adapters.queries(queries, layer), adapters.keys(content, layer))
    found.append((distillation_loss(scores, target, choice), recall(scores, target, choice, top)))
    return dot_product_attention(q, k, v, window=window, start=0)

  run_layers(network, x, side, attend)
  distillation, shares = (jnp.stack(a).mean() for a in zip(*found, strict=True))
  return boundary[0] + weight * distillation, Parts(boundary[0], distillation, shares)


def boundary_loss(logits: Float[Array, "batch time"], labels: Bool[Array, "batch time"], *, balance: bool = False):
  """Mean binary cross-entropy, float32[]; `balance` as in `adapter_loss`."""
  losses = optax.losses.sigmoid_binary_cross_entropy(logits, labels)
  true = labels.sum()
  heavier = jnp.minimum(10, (labels.size - true) / jnp.maximum(true, 1)) if balance else 1
  return (losses * jnp.where(labels, heavier, 1)).mean()


def candidates(ends: Bool[Array, "batch time"]) -> Int[Array, "batch time"]:
  """How many chunks, the oldest, every token would choose from: those that ended before it or with it, less one.

  The newest of them is always read.
  """
  return jnp.maximum(chunk_ids(ends) + ends - 1, 0)


def teacher_attention(q, k, ids, choice, *, chunks: int, sink: int = 4, block: int = 128, window: int | None = None):
  """`chunk_mass` of a whole row's queries to their first `choice` chunks, every query's summing to 1, or 0 where it
  attends to these with less than 1e-4.

  `block` queries at a time, so that no attention map of the whole row is kept.

  Args:
    q, k: (batch, time, heads, head_dim) after RoPE; ids: int32[batch, time], the chunks; choice: int32[batch, time],
      of `candidates`.

  Returns:
    float32[batch, time, chunks].
  """
  batch, time, heads, size = q.shape
  keys = jnp.swapaxes(k, 1, 2)
  blocks = jnp.moveaxis(q.reshape(batch, -1, block, heads, size), 1, 0)
  below = jnp.moveaxis(choice.reshape(batch, -1, block), 1, 0)
  how = dict(chunks=chunks, sink=sink, window=window)
  one = lambda part: chunk_mass(part[0], keys, ids, part[1], start=part[2], **how)
  mass = jax.lax.map(one, (blocks, below, jnp.arange(0, time, block)))
  mass = jnp.moveaxis(mass, 0, 1).reshape(batch, time, chunks)
  total = mass.sum(axis=-1, keepdims=True)
  enough = total >= _LEAST_MASS
  return jnp.where(enough, mass / jnp.where(enough, total, 1), 0)


def distillation_loss(
  scores: Float[Array, "batch time chunks"], target: Float[Array, "batch time chunks"], choice: Int[Array, "batch time"]
) -> Float[Array, ""]:
  """Mean KL(target || softmax of the scores over the first `choice` chunks) of the queries that have a target."""
  before = jnp.arange(scores.shape[2]) < choice[..., None]
  real = target.sum(axis=-1) > 0
  # Rows without a chunk are left finite, as their gradient would be NaN otherwise.
  logits = jnp.where(before, scores, jnp.where(real[..., None], -jnp.inf, 0))
  share = jnp.where(before, jax.nn.log_softmax(logits, axis=-1), 0)
  losses = optax.losses.kl_divergence(share, target)
  return jnp.where(real, losses, 0).sum() / jnp.maximum(real.sum(), 1)


def recall(scores, target, choice, top: int) -> Float[Array, ""]:
  """|best `top` by score and by target| / top, mean over queries with a target and more than `top` chunks to choose
  from (of fewer all are chosen); NaN where there is no such query."""
  before = jnp.arange(scores.shape[2]) < choice[..., None]
  number = jnp.full(choice.shape, top)
  best = [best_chunks(jnp.where(before, a, -jnp.inf), number, top) for a in (scores, target)]
  real = (choice > top) & (target.sum(axis=-1) > 0)
  return jnp.where(real, (best[0] & best[1]).sum(axis=-1) / top, 0).sum() / real.sum()
