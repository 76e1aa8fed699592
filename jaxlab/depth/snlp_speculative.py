"""Self-speculative decoding: SNLP drafts, the sequential network verifies, the output is the sequential one's.

A cycle drafts B tokens by layer-parallel steps and checks them with one sequential pass over their positions. Drafter
and verifier share the exact prefix: the states h_S that drafting computed are all the verifier needs, so a check runs
the n suffix layers only, and its exact keys and values replace the drafter's.

  tokens, statistics = speculate(split(model, layers=24), prompt, tokens=256, draft=4)
"""

import dataclasses
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require
from jaxlab.depth.snlp_inference import (
  Network,
  State,
  StepOptions,
  finish_exactly,
  prefill,
  prefix_states,
  step_from,
)
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.inference import before_smear


class Statistics(NamedTuple):
  """Cycles run and drafts accepted in them; of `draft` drafts a cycle."""

  cycles: Int[Array, ""]
  accepted: Int[Array, ""]


def speculate(
  network: Network,
  prompt: Int[Array, "1 time"],
  *,
  tokens: int,
  draft: int,
  key: jax.Array | None = None,
  temperature: float = 0.0,
  attention=dot_product_attention,
  **options: Unpack[StepOptions],
) -> tuple[Int[Array, "1 tokens"], Statistics]:
  """Continues the prompt as the sequential network would: the same greedy tokens, the same distribution when sampling.

  Greedy: drafts are accepted while they are the verifier's argmax, then the verifier's token follows. Sampling: draft d
  is accepted with probability min(1, q(d) / p(d)), p the drafter's distribution and q the verifier's; a rejected one is
  replaced by a draw from max(0, q - p), normalised (Leviathan et al. 2023). When all B are accepted, one of the
  verifier's own follows.

  Args:
    draft: B >= 1, tokens drafted a cycle.
    options: iterations, surrogate, initial, ... of the drafter, as `snlp_inference.step`.

  Raises:
    InputError: more than one row, a fused suffix or none, draft < 1, or sampling without a key.
  """
  require(
    prompt.shape[0] == 1, f"the prompt has {prompt.shape[0]} rows; rows accept differently, so decode one (or vmap)"
  )
  require(bool(network.parts) and not network.fused, "speculation drafts with a plain suffix: split(model, n)")
  require(draft >= 1 and tokens >= 1, f"draft is {draft} and tokens is {tokens}; both must be at least 1")
  require(temperature == 0 or key is not None, "sampling at temperature > 0 needs a key: pass jax.random.key(seed)")
  key = jax.random.key(0) if key is None else key
  drafter = dict(options, attention=attention)
  capacity = prompt.shape[1] + tokens + draft + 1
  logits, state = prefill(network, prompt, capacity=capacity, attention=attention)
  key, use = jax.random.split(key)
  first = _choose(use, _distribution(logits[0, -1], temperature))
  output = jnp.zeros((tokens + draft + 1,), jnp.int32).at[0].set(first)

  def unfinished(carry):
    return carry[1] < tokens

  def cycle(carry):
    output, count, state, key, statistics = carry
    key, draft_key, verify_key = jax.random.split(key, 3)
    last = output[count - 1]
    window, states, guesses, after = _draft(network, last, state, draft_key, draft, temperature, drafter)
    x, backout = states
    # The embeddings once more, for all positions of the check.
    _, side, _ = network.model.embed(window[None], state.prefix)
    logits, verified = finish_exactly(network, x, backout, side, after, attention=attention)
    accepted, new = _verify(verify_key, window[1:], guesses, _distribution(logits[0], temperature))
    emitted = jnp.where(jnp.arange(draft + 1) == accepted, new, jnp.append(window[1:], 0))
    output = jax.lax.dynamic_update_slice(output, emitted, (count,))
    # The cache keeps the last token and the accepted drafts; what lies past `length` is never read.
    length, previous = state.length + accepted + 1, before_smear(network.model, window[accepted][None, None])
    prefix = dataclasses.replace(verified.prefix, length=length, previous=previous)
    state = dataclasses.replace(verified, prefix=prefix)
    statistics = Statistics(statistics.cycles + 1, statistics.accepted + accepted)
    return output, count + accepted + 1, state, key, statistics

  start = (output, jnp.int32(1), state, key, Statistics(jnp.int32(0), jnp.int32(0)))
  output, _, _, _, statistics = jax.lax.while_loop(unfinished, cycle, start)
  return output[None, :tokens], statistics


def _draft(network: Network, last, state: State, key, draft: int, temperature: float, options: dict):
  """(tokens last, d_1 .. d_B; (h_S, backout) of their positions; p of every draft (B, vocab); state after them)."""

  def one(carry, key):
    token, state = carry
    x, backout, side, state = prefix_states(network, token[None, None], state, options["attention"])
    logits, state = step_from(network, x, backout, side, state, **options)
    p = _distribution(logits[0, -1], temperature)
    return (_choose(key, p), state), (token, x, backout, p)

  (final, state), (before, x, backout, p) = jax.lax.scan(one, (last, state), jax.random.split(key, draft))
  # The last draft's own prefix, so that a fully accepted cycle ends with the verifier's token after it.
  x_final, backout_final, _, state = prefix_states(network, final[None, None], state, options["attention"])
  join = lambda many, one: None if one is None else jnp.concatenate([*[many[i] for i in range(draft)], one], axis=1)
  return jnp.append(before, final), (join(x, x_final), join(backout, backout_final)), p, state


def _verify(key, drafts: Int[Array, "B"], p: Float[Array, "B vocab"], q: Float[Array, "B_plus_1 vocab"]):
  """(drafts accepted, the token that follows them)."""
  count = drafts.shape[0]
  accept_key, replace_key = jax.random.split(key)
  at = jnp.arange(count)
  ratio = q[at, drafts] / jnp.maximum(p[at, drafts], jnp.finfo(p.dtype).tiny)
  accept = jax.random.uniform(accept_key, (count,)) < ratio
  accepted = jnp.argmin(jnp.append(accept, False))
  left = jnp.maximum(q - jnp.concatenate([p, jnp.zeros_like(q[:1])]), 0)[accepted]
  # Rounding can leave nothing of a rejected draft's residual; the verifier's own distribution then stands in.
  left = jnp.where(left.sum() > 0, left, q[accepted])
  return accepted, _choose(replace_key, left / left.sum())


def _distribution(logits: Float[Array, "*batch vocab"], temperature: float) -> Float[Array, "*batch vocab"]:
  """softmax(logits / temperature) in float32; all mass on the argmax at temperature 0."""
  if temperature == 0:
    return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
  return jax.nn.softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _choose(key, probability: Float[Array, "vocab"]) -> Int[Array, ""]:
  return jax.random.categorical(key, jnp.log(probability)).astype(jnp.int32)
