"""Token generation under one jit: prefill, then a scan of one-token steps over an explicit cache."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.models.transformer import Transformer

COLDEST = 1e-5  # below it sampling is the argmax: float32 logits over it would overflow


def sample(
  logits: Float[Array, "batch vocab"],
  key: jax.Array,
  *,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
) -> Int[Array, "batch"]:
  """Draws a token a row. Temperature 0 is the argmax; top_k keeps the k largest logits, top_p the smallest set of
  tokens whose probability reaches p (at least one).

  Raises:
    InputError: top_k < 1, top_p outside 0 < p <= 1, a temperature that is negative, NaN or infinite.
  """
  require(0 <= temperature < math.inf, f"temperature is {temperature}; it must be 0 (the argmax) or a positive number")
  require(top_k is None or top_k >= 1, f"top_k is {top_k}; keep at least 1 token, or give None for all")
  require(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}; it must lie in 0 < top_p <= 1")
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
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("tokens", "temperature", "top_k", "top_p"))
def generate(
  model: Transformer,
  prompt: Int[Array, "batch time"],
  *,
  tokens: int,
  key: jax.Array | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
) -> Int[Array, "batch tokens"]:
  """Continues each prompt row by `tokens` tokens; deterministic given the key (greedy needs none).

  Raises:
    InputError: an empty prompt, tokens < 1, or sampling without a key.
  """
  require(prompt.ndim == 2 and prompt.shape[1] >= 1, f"prompt has shape {prompt.shape}; expected (batch, time >= 1)")
  require(tokens >= 1, f"tokens is {tokens}; ask for at least 1")
  require(temperature == 0 or key is not None, "sampling at temperature > 0 needs a key: pass jax.random.key(seed)")
  keys = jax.random.split(jax.random.key(0) if key is None else key, tokens)
  draw = functools.partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)
  batch, time = prompt.shape
  logits, cache = model.extend(prompt, model.empty_cache(batch, time + tokens))
  first = draw(logits[:, -1], keys[0])

  def step(carry, key):
    token, cache = carry
    logits, cache = model.extend(token[:, None], cache)
    token = draw(logits[:, -1], key)
    return (token, cache), token

  _, rest = jax.lax.scan(step, (first, cache), keys[1:])
  return jnp.concatenate([first[:, None], rest.T], axis=1)
