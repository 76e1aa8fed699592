"""What a method loses and saves: questions, losses by position, bytes, and the attention that what it keeps holds."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.contexts.readers import DENSE, DROPPING, decoders
from experiments.long_context import Subject, accuracy, documents, padded, paired, parse, sizes_of
from experiments.overlap import overlapped
from jaxlab.attention.chunkllm import Chunks
from jaxlab.cache import eviction
from jaxlab.evaluation.long_context import cache_bytes, continuation_scores, late
from jaxlab.models import paged
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.generate import Decoder
from jaxlab.models.inference import run_layers

_WATCHED = 16  # tokens behind a prompt whose attention is looked at


def questions_of(config, subject: Subject) -> list[dict]:
  """Rows of `long_context.accuracy`; a cache drops entries before the last `late` tokens, the question among them."""
  asked, rows = config.questions, []
  for length in sizes_of(asked.lengths, subject.name):
    compared = decoders(config, subject.network.model.config, length)
    waits = lambda name: asked.late and name != DENSE and parse(name)[0] in DROPPING
    compared = {name: late(one, asked.late) if waits(name) else one for name, one in compared.items()}
    sizes = dict(tasks=asked.tasks, lengths=(length,), count=asked.count, batch=asked.batch)
    rows += accuracy(subject, compared, ml_collections.ConfigDict(sizes))
  return rows


def text_of(config, subject: Subject) -> dict:
  """{"losses": rows of `losses_of`, "bytes": {decoder: what it holds of the longest prompt, one row},
  "kept": {decoder: {share, recall}} of `kept_of`}."""
  read = sizes_of(config.text, subject.name)
  rows = documents(subject.tokens, read.documents, max(read.positions) + read.rest, seed=config.seed)
  compared = decoders(config, subject.network.model.config, max(read.positions))
  return {
    "losses": losses_of(subject, compared, rows, read),
    "bytes": {name: bytes_of(subject.network, one, max(read.positions), read.rest) for name, one in compared.items()},
    "kept": kept_of(subject, compared, rows[: read.batch], max(read.positions)),
  }


def losses_of(subject: Subject, compared: dict[str, Decoder], rows: np.ndarray, read) -> list[dict]:
  """Losses of the `rest` tokens behind the first `position` ones of every row, in a program for all positions.

  Returns:
    A row a decoder and position: {subject, decoder, position, loss in nats, difference to the first decoder's, its
    standard error, paired over the documents, count}.
  """
  longest = max(read.positions)

  def behind(decoder: Decoder, position: int) -> np.ndarray:
    found = []
    for i in range(0, len(rows), read.batch):
      part = padded(rows[i : i + read.batch], read.batch)
      prompts = jnp.where(jnp.arange(longest) < position, part[:, :longest], 0)
      lengths, following = jnp.full(len(part), position), part[:, position : position + read.rest]
      scores, _ = continuation_scores(subject.network, prompts, lengths, following, decoder=decoder)
      found.append(-np.asarray(scores).mean(axis=1))
    return np.concatenate(found)[: len(rows)]

  every = lambda decoder: [behind(decoder, position) for position in read.positions]
  made, first = [], None
  for name, found in zip(compared, overlapped(every, compared.values()), strict=True):
    first = first or found
    for position, mine, dense in zip(read.positions, found, first, strict=True):
      row = dict(subject=subject.name, decoder=name, position=position, loss=float(mine.mean()), count=len(rows))
      made.append(row | paired(mine, dense))
  return made


def bytes_of(network, decoder: Decoder, prompt: int, rest: int) -> int:
  """Bytes of the state behind one prompt, with room for `rest` tokens; nothing is run."""
  prefill = functools.partial(decoder.prefill, capacity=prompt + rest)
  return cache_bytes(jax.eval_shape(prefill, network, jax.ShapeDtypeStruct((1, prompt), jnp.int32))[1])


def kept_of(subject: Subject, compared: dict[str, Decoder], rows: np.ndarray, prompt: int) -> dict[str, dict]:
  """{decoder: {share: of the prompt's tokens that a head keeps, or reads next; recall: of the attention that the tokens
  behind the prompt pay to it under dense attention, what those hold}}, means over rows, layers and heads.

  Of decoders whose state says which tokens those are: centroids are none, and what a prompt's reading left out is kept.
  """
  mass = np.asarray(attention_to_prompt(subject.network, rows[:, : prompt + _WATCHED], prompt=prompt))

  def one(decoder: Decoder) -> dict | None:
    prefill = jax.jit(functools.partial(decoder.prefill, capacity=prompt + _WATCHED))
    if not tells(jax.eval_shape(prefill, subject.network, rows[:, :prompt])[1].memory):
      return None
    held = held_of(prefill(subject.network, rows[:, :prompt])[1], prompt)
    return {"share": float(held.mean()), "recall": float(np.where(held, mass, 0).sum(axis=-1).mean())}

  found = zip(compared, overlapped(one, compared.values()), strict=True)
  return {name: kept for name, kept in found if kept}


def tells(memory) -> bool:
  """Whether what a method keeps of its own says which tokens are read."""
  layers = memory if isinstance(memory, tuple) else ()
  return isinstance(memory, Chunks) or any(isinstance(layer, eviction.Layer) for layer in layers)


def held_of(state: paged.State, prompt: int) -> np.ndarray:
  """bool[layers, batch, kv_heads or 1, prompt]: the tokens of the prompt that are kept, or are read next."""
  if isinstance(state.memory, Chunks):
    table, used = (np.asarray(a) for a in (state.memory.table, state.memory.used))
    position, real = table[:, :, None], (np.arange(table.shape[2]) < used[..., None])[:, :, None]
  else:
    position = np.stack([layer.position for layer in state.memory])
    real = np.stack([layer.entries.size for layer in state.memory]) > 0
  held = np.zeros((*position.shape[:3], prompt + 1), bool)
  np.put_along_axis(held, np.where(real, np.minimum(position, prompt), prompt), True, axis=3)
  return held[..., :prompt]


@functools.partial(jax.jit, static_argnames="prompt")
def attention_to_prompt(network, rows, *, prompt: int):
  """float32[layers, batch, kv_heads, prompt]: dense attention of the tokens behind the prompt, mean over them and the
  query heads of a group, to each of its tokens, as a share of what they pay to all of these."""
  x, side, _ = network.model.embed(jnp.asarray(rows))
  found = []

  def attend(layer, _, x, q, k, v, window):
    last, place = q[:, prompt:], jnp.arange(k.shape[1])
    grouped = last.reshape(*last.shape[:2], k.shape[2], -1, last.shape[3]).astype(jnp.float32)
    score = jnp.einsum("btgrd,bsgd->bgrts", grouped, k.astype(jnp.float32)) / k.shape[3] ** 0.5
    query = prompt + jnp.arange(last.shape[1])[:, None]
    see = (place <= query) & (place >= query - (k.shape[1] if window is None else window))
    weight = jax.nn.softmax(jnp.where(see, score, -jnp.inf), axis=-1)[..., :prompt].mean(axis=(2, 3))
    found.append(weight / jnp.maximum(weight.sum(axis=-1, keepdims=True), 1e-30))
    return dot_product_attention(q, k, v, window=window, start=0)

  run_layers(network, x, side, attend)
  return jnp.stack(found)
