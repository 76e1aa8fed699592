"""What a model under a cache or attention method still does with a long context: one harness for all of them.

  rows = [question("multi_key", tokens, tokenizer, length=4096, seed=i) for i in range(200)]
  found = answered(network, decoder, tokenizer, rows, batch=8)     # share of every question's answers that were given
  share, (low, high) = found.mean(), interval(found)

Tasks after RULER (Hsieh et al. 2024, arXiv 2404.06654), in real text: needle, multi_key, variable_tracking (those of
`jaxlab.data.recall`), multi_value (several numbers of one thing) and common_words (the most frequent words of a list).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from jaxlab.core.checks import require, require_choice
from jaxlab.data import recall
from jaxlab.data.tokens import Tokens
from jaxlab.models.generate import Decoder, generate, pad
from jaxlab.models.inference import Network

TASKS = (*recall.TASKS, "multi_value", "common_words")
_VALUES = 3  # that are asked for
_OFTENER = 4  # how much more often a common word stands in the list


class Question(NamedTuple):
  """A prompt of int32 ids that begins with BOS, the answers due after it, and the tokens to give them in."""

  prompt: np.ndarray
  answers: tuple[str, ...]
  tokens: int


def question(task: str, tokens: Tokens, tokenizer: Tokenizer, *, length: int, seed: int) -> Question:
  """One question about a document, which together with its answer is at most `length` tokens long.

  Args:
    tokens: text to hide the facts in.

  Raises:
    InputError: an unknown task, or a length under 160 tokens.
  """
  require_choice("task", task, TASKS)
  rng = np.random.default_rng([seed, length, TASKS.index(task)])
  if task in recall.TASKS:
    made = recall.example(task, tokens, tokenizer, length=length, rng=rng)
    return Question(made.prompt, (tokenizer.decode(made.answer.tolist()).strip(),), len(made.answer))
  require(length >= recall.SHORTEST, f"a document of {length} tokens is too short; use at least {recall.SHORTEST}")
  encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
  if task == "multi_value":
    name, *others = recall.names(1 + (length - recall.SHORTEST) // 256, rng)
    numbers = [str(v) for v in rng.choice(np.arange(10_000, 100_000), _VALUES + len(others), replace=False)]
    says = [f" One of the numbers of the {name} is {v}." for v in numbers[:_VALUES]]
    says += [f" One of the numbers of the {o} is {v}." for o, v in zip(others, numbers[_VALUES:], strict=True)]
    asked, answers = f"\n\nQuestion: The {_VALUES} numbers of the {name} are", tuple(numbers[:_VALUES])
    facts = [encode(says[i]) for i in rng.permutation(len(says))]
  else:
    words = recall.words(4 * _VALUES, rng)
    answers = tuple(words[:_VALUES])
    asked, facts = f"\n\nQuestion: The {_VALUES} most common words of the list are", []
  tail = encode(asked)
  room = len(encode(" " + ", ".join(answers))) + _VALUES
  size = length - 1 - len(tail) - room
  if task == "common_words":
    # As many rounds as fit, each every rare word once and every common one `_OFTENER` times.
    round_ = [encode(f" {word}") for word in [*answers * _OFTENER, *words[_VALUES:]]]
    rounds = size // sum(map(len, round_))
    require(rounds >= 1, f"a list of words does not fit in {length} tokens; use a longer document")
    body = [i for k in rng.permutation(rounds * len(round_)) for i in round_[k % len(round_)]]
  else:
    body = recall.hide(facts, recall.hay(tokens, size - sum(map(len, facts)), rng), rng)
  return Question(np.array([tokens.bos, *body, *tail], np.int32), answers, room)


def answered(
  network: Network, decoder: Decoder, tokenizer: Tokenizer, questions: Sequence[Question], *, batch: int
) -> Float[np.ndarray, "questions"]:
  """The share of every question's answers that greedy generation gives, as text."""
  shares, tokens = [], max((row.tokens for row in questions), default=1)
  for i in range(0, len(questions), batch):
    rows = [*questions[i : i + batch]]
    rows += [rows[-1]] * (batch - len(rows))  # one shape, one program
    prompts, lengths = pad([row.prompt for row in rows])
    made = generate(network, prompts, lengths, tokens=tokens, decoder=decoder)
    for row, ids in zip(rows, np.asarray(made), strict=True):
      text = tokenizer.decode(ids[: row.tokens].tolist())
      shares.append(np.mean([answer in text for answer in row.answers]))
  return np.array(shares[: len(questions)])


def interval(shares: Sequence[float]) -> tuple[float, float]:
  """95 % interval of a mean of shares between 0 and 1: Wilson's, which holds at 0 and 1 too."""
  require(len(shares) > 0, "no question was asked; give at least one")
  n, mean, z = len(shares), float(np.mean(shares)), 1.959964
  middle, half = mean + z**2 / (2 * n), z * (mean * (1 - mean) / n + z**2 / (4 * n**2)) ** 0.5
  return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def continuation(network: Network, prompts, lengths, following, *, decoder: Decoder, of: Callable):
  """(`of`(log-probabilities, token) of every token that follows a prompt, stacked along axis 1; the decoder's state).

  The tokens are read one by one: what a decoder forgets of a long prompt, or computes differently, shows here at the
  position where it matters.

  Args:
    prompts: (batch, time), padded at their ends to one length; lengths: as `Decoder.prefill`; following: (batch, rest).
  """
  logits, state = decoder.prefill(network, prompts, lengths, capacity=prompts.shape[1] + following.shape[1])
  judge = lambda logits, token: of(jax.nn.log_softmax(logits[:, 0].astype(jnp.float32)), token)

  def one(state, pair):
    token, after = pair
    logits, state = decoder.step(network, token[:, None], state)
    return state, judge(logits, after)

  first = judge(logits, following[:, 0])
  state, rest = jax.lax.scan(one, state, (following[:, :-1].T, following[:, 1:].T))
  whole = lambda a, b: jnp.concatenate([a[:, None], jnp.moveaxis(b, 0, 1)], axis=1)
  return jax.tree.map(whole, first, rest), state


@functools.partial(jax.jit, static_argnames=("decoder",))
def continuation_scores(
  network: Network,
  prompts: Int[Array, "batch time"],
  lengths: Int[Array, "batch"] | None,
  following: Int[Array, "batch rest"],
  *,
  decoder: Decoder,
) -> tuple[Float[Array, "batch rest"], Bool[Array, "batch rest"]]:
  """(log-probabilities of the tokens that follow, whether each is the likeliest), as `continuation`."""

  def judge(logprobs, token):
    return -own_loss(logprobs, token), jnp.argmax(logprobs, axis=-1) == token

  return continuation(network, prompts, lengths, following, decoder=decoder, of=judge)[0]


@functools.partial(jax.jit, static_argnames=("decoder", "prompt"))
def continuation_losses(
  network: Network, tokens: Int[Array, "batch time"], *, prompt: int, decoder: Decoder
) -> Float[Array, "batch rest"]:
  """Cross-entropy in nats of the tokens from `prompt` on, as `continuation`."""
  return continuation(network, tokens[:, :prompt], None, tokens[:, prompt:], decoder=decoder, of=own_loss)[0]


@functools.partial(jax.jit, static_argnames=("decoder", "prompt"))
def continuation_logprobs(
  network: Network, tokens: Int[Array, "batch time"], *, prompt: int, decoder: Decoder
) -> Float[Array, "batch rest vocab"]:
  """The predictions, as log-probabilities, that `continuation_losses` takes the tokens' own of."""
  whole = lambda logprobs, token: logprobs
  return continuation(network, tokens[:, :prompt], None, tokens[:, prompt:], decoder=decoder, of=whole)[0]


def own_loss(logprobs: Float[Array, "batch vocab"], token: Int[Array, "batch"]) -> Float[Array, "batch"]:
  """Cross-entropy of the tokens that came."""
  return -jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]


def late(decoder: Decoder, tokens: int) -> Decoder:
  """A decoder that reads the last `tokens` tokens of every prompt as if they had been generated.

  With the question among them, a method that drops parts of the prompt does so before it knows what will be asked.
  Prompts have to be longer than that.
  """
  return _late(decoder, tokens)


@functools.cache
def _late(decoder: Decoder, tokens: int) -> Decoder:
  def prefill(network, prompts, lengths=None, *, capacity):
    lengths = jnp.full(len(prompts), prompts.shape[1]) if lengths is None else jnp.asarray(lengths)
    begin = lengths - tokens
    logits, state = decoder.prefill(network, prompts, begin, capacity=capacity)

    def one(i, carry):
      token = jnp.take_along_axis(jnp.asarray(prompts), (begin + i)[:, None], axis=1)
      return decoder.step(network, token, carry[1])

    return jax.lax.fori_loop(0, tokens, one, (logits, state))

  return Decoder(prefill, decoder.step)


def cache_bytes(state) -> int:
  """Bytes of everything a decoder's state holds, or would hold if it is a tree of shapes."""
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
