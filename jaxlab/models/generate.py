"""Token generation: prefill, then one-token steps over an explicit cache, on the device in stretches.

  tokens = generate(model, prompts, tokens=64)                     # an array of one length; pure, also under jit
  tokens = generate(model, padded, lengths, tokens=64)             # rows of different lengths, padded at their ends
  for stretch in stream(model, [[1, 2, 3], [4, 5]], tokens=256):   # a few tokens at a time, as they are made

Given the key, every row's tokens depend on nothing else: neither on the padding nor on how long a stretch is. Many
calls on one model are cheaper on `network = take_apart(model)`, which all of these take in its place.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxlab.core.checks import require
from jaxlab.models import inference
from jaxlab.models.transformer import Transformer

COLDEST = 1e-5  # below it sampling is the argmax: float32 logits over it would overflow


class Decoder(NamedTuple):
  """How a network is decoded, as `inference` does it: a method with states of its own puts two functions in place.

  prefill(network, prompts, lengths, capacity=) and step(network, token, state): (logits, state) each.
  """

  prefill: Callable = inference.prefill
  step: Callable = inference.step


class Completion(NamedTuple):
  """New tokens of a row, its stop token (if it met one) the last of them, and their log-probabilities.

  The log-probabilities are the model's own: those before temperature, top_k, top_p and min_p.
  """

  tokens: list[int]
  logprobs: list[float]


def sample(
  logits: Float[Array, "batch vocab"],
  key: jax.Array,
  *,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
) -> Int[Array, "batch"]:
  """Draws a token a row. Temperature 0 is the argmax; top_k keeps the k largest logits, top_p the smallest set of
  tokens whose probability reaches p (at least one), min_p those whose probability is at least min_p times the
  likeliest one's (Nguyen et al. 2024, arXiv 2407.01082); each of what the ones before it left.

  Raises:
    InputError: top_k < 1, top_p or min_p outside 0 < p <= 1, a temperature that is negative, NaN or infinite.
  """
  require(0 <= temperature < math.inf, f"temperature is {temperature}; it must be 0 (the argmax) or a positive number")
  require(top_k is None or top_k >= 1, f"top_k is {top_k}; keep at least 1 token, or give None for all")
  require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}; it must lie in 0 < top_p <= 1")
  require(min_p is None or 0 < min_p <= 1, f"min_p is {min_p}; it must lie in 0 < min_p <= 1")
  if temperature < COLDEST:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits.astype(jnp.float32) / temperature
  if top_k is not None:
    kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if top_p is not None:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
    # A token stays while the probability of those before it has not reached p; the first always stays.
    smallest = jnp.min(jnp.where((before < top_p) | (before == 0), ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  if min_p is not None:
    # As a difference of logits: the likeliest one's own is 0, and no rounding leaves it out.
    logits = jnp.where(logits - logits.max(axis=-1, keepdims=True) < math.log(min_p), -jnp.inf, logits)
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def generate(
  model: Transformer | inference.Network | Any,
  prompt: Int[ArrayLike, "batch time"],
  lengths: Int[ArrayLike, "batch"] | None = None,
  *,
  tokens: int,
  key: jax.Array | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  decoder: Decoder = Decoder(),
) -> Int[Array, "batch tokens"]:
  """Continues each prompt row by `tokens` tokens; deterministic given the key (greedy needs none).

  Args:
    lengths: tokens of every row, at least 1; the rest of the row is padding of any kind. None: all of them.
    decoder: for a `model` that a method took apart, in a form of its own.

  Raises:
    InputError: an empty prompt, lengths outside 1..time (where they are known), tokens < 1, or sampling without a key.
  """
  require(prompt.ndim == 2 and prompt.shape[1] >= 1, f"prompt has shape {prompt.shape}; expected (batch, time >= 1)")
  if lengths is not None:
    require(lengths.shape == prompt.shape[:1], f"lengths has shape {lengths.shape}; expected {prompt.shape[:1]}")
    inside = isinstance(lengths, jax.core.Tracer) or bool(((lengths >= 1) & (lengths <= prompt.shape[1])).all())
    require(inside, f"lengths must lie in 1..{prompt.shape[1]}, the prompt's time")
  _check(tokens, key, temperature)
  chosen = _Choice(decoder, prompt.shape[1] + tokens, temperature, top_k, top_p, min_p)
  return _generate(_network(model, decoder), prompt, lengths, _key(key), tokens=tokens, chosen=chosen)


def stream(
  model: Transformer | inference.Network | Any,
  prompts: Sequence[Sequence[int]],
  *,
  tokens: int,
  stop: Sequence[int] = (),
  key: jax.Array | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  decoder: Decoder = Decoder(),
  stretch: int = 8,
) -> Iterator[list[Completion]]:
  """Continues prompts of any lengths, and yields every row's new tokens: the first alone, then `stretch` at a time.

  The next stretch runs while the caller looks at the last. A row that met a stop token has no more tokens; when all
  rows have, or `tokens` are made, the stream ends. Prompts are padded to a power of two, so that few shapes compile.

  Raises:
    InputError: no prompt or an empty one, an id the model lacks, tokens < 1, stretch < 1, or sampling without a key.
  """
  require(
    len(prompts) > 0 and all(len(prompt) > 0 for prompt in prompts),
    "a prompt is empty; give at least one token, such as the one that begins a document",
  )
  require(stretch >= 1, f"stretch is {stretch}; it must be at least 1")
  _check(tokens, key, temperature)
  padded, lengths = pad(prompts)
  require_ids(padded, getattr(model, "model", model).config.vocab_size)
  capacity = padded.shape[1] + power_of_two(tokens + stretch)
  # Flat, as a module takes longer to flatten than its step takes to run.
  leaves, structure = jax.tree.flatten(_network(model, decoder))
  begin, advance = _programs(structure, _Choice(decoder, capacity, temperature, top_k, top_p, min_p), stretch)
  return _stretches(begin, advance, leaves, padded, lengths, _key(key), tokens, frozenset(stop))


def complete(
  model: Transformer | inference.Network | Any, prompts: Sequence[Sequence[int]], **options
) -> list[Completion]:
  """All that `stream`, which says what the options are, yields for every prompt."""
  rows = [Completion([], []) for _ in prompts]
  for new in stream(model, prompts, **options):
    for row, part in zip(rows, new, strict=True):
      row.tokens.extend(part.tokens)
      row.logprobs.extend(part.logprobs)
  return rows


def pad(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """(int32[batch, time], int32[batch]): rows with zeros after them up to a power of two, and their lengths."""
  lengths = np.array([len(row) for row in rows], np.int32)
  padded = np.zeros((len(rows), power_of_two(int(lengths.max()))), np.int32)
  for i, row in enumerate(rows):
    padded[i, : len(row)] = row
  return padded, lengths


def require_ids(tokens: np.ndarray, vocab_size: int) -> None:
  """Raises InputError for ids without an embedding, which would be read as NaN."""
  low, high = int(tokens.min()), int(tokens.max())
  require(
    low >= 0 and high < vocab_size,
    f"the tokens have ids {low}..{high}, the model 0..{vocab_size - 1}; use the tokenizer the model was trained with",
  )


def power_of_two(size: int, least: int = 16) -> int:
  """The smallest power of two that is at least `size` and `least`."""
  return max(least, 1 << (size - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class _Choice:
  """What is compiled into a program of generation."""

  decoder: Decoder
  capacity: int
  temperature: float
  top_k: int | None
  top_p: float | None
  min_p: float | None

  def draw(self, logits: Float[Array, "batch 1 vocab"], key):
    """(tokens, their log-probabilities)."""
    logits = logits[:, 0]
    how = dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
    token = sample(logits, key, **how)
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]


def _begin(network, prompts, lengths, key, chosen: _Choice):
  """((token, state), (token, log-probability)) after the prompt."""
  logits, state = chosen.decoder.prefill(network, prompts, lengths, capacity=chosen.capacity)
  drawn = chosen.draw(logits, jax.random.fold_in(key, 0))
  return (drawn[0], state), drawn


def _advance(network, carry, key, first, steps: int, chosen: _Choice):
  """(carry, (tokens, log-probabilities) (batch, steps) each) of the tokens number first, first + 1, ..."""

  def one(carry, number):
    token, state = carry
    logits, state = chosen.decoder.step(network, token[:, None], state)
    drawn = chosen.draw(logits, jax.random.fold_in(key, number))
    return (drawn[0], state), drawn

  carry, drawn = jax.lax.scan(one, carry, first + jnp.arange(steps))
  return carry, tuple(a.T for a in drawn)


@functools.partial(jax.jit, static_argnames=("tokens", "chosen"))
def _generate(network, prompt, lengths, key, *, tokens: int, chosen: _Choice):
  carry, (first, _) = _begin(network, prompt, lengths, key, chosen)
  _, (rest, _) = _advance(network, carry, key, 1, tokens - 1, chosen)
  return jnp.concatenate([first[:, None], rest], axis=1)


@functools.lru_cache(maxsize=64)
def _programs(structure, chosen: _Choice, stretch: int):
  """`_begin` and `_advance` compiled for the leaves of a network; the carry of the latter is overwritten."""

  def begin(leaves, prompts, lengths, key):
    return _begin(jax.tree.unflatten(structure, leaves), prompts, lengths, key, chosen)

  def advance(leaves, carry, key, first):
    return _advance(jax.tree.unflatten(structure, leaves), carry, key, first, stretch, chosen)

  return jax.jit(begin), jax.jit(advance, donate_argnums=1)


def _stretches(begin, advance, leaves, prompts, lengths, key, tokens: int, stop: frozenset[int]):
  carry, drawn = begin(leaves, prompts, lengths, key)
  made, open_rows = 0, [True] * len(prompts)
  made_rows = jax.tree.map(lambda a: a[:, None], drawn)
  while made < tokens and any(open_rows):
    ready, count = made_rows, min(made_rows[0].shape[1], tokens - made)
    made += count
    if made < tokens:
      carry, made_rows = advance(leaves, carry, key, np.int32(made))
    ids, logprobs = (np.asarray(a)[:, :count].tolist() for a in ready)
    new = []
    for i, row in enumerate(ids):
      end = next((j + 1 for j, token in enumerate(row) if token in stop), None) if open_rows[i] else 0
      open_rows[i] = end is None
      new.append(Completion(row[:end], logprobs[i][:end]))
    yield new


def _network(model, decoder: Decoder):
  if not isinstance(model, Transformer):
    return model
  return _take_apart(model, narrow=decoder == Decoder())  # the states of other decoders are all of one size


_take_apart = jax.jit(inference.take_apart, static_argnames="narrow")


def _key(key):
  return jax.random.key(0) if key is None else key


def _check(tokens: int, key, temperature: float) -> None:
  require(tokens >= 1, f"tokens is {tokens}; ask for at least 1")
  require(temperature == 0 or key is not None, "sampling at temperature > 0 needs a key: pass jax.random.key(seed)")
