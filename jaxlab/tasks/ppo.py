"""Proximal policy optimisation of a language model on rewards at the end of what it writes (Schulman et al. 2017,
arXiv 1707.06347), as language models are tuned by it: a penalty of every token's KL towards where it began, a value
head on the same network, advantages whitened over what was written, and an adaptive weight of the penalty (Ziegler et
al. 2019, arXiv 1909.08593).

  rewards = token_rewards(logp, reference, mask, beta, reward)
  advantages, returns = gae(rewards, values, mask)
  actor, state, report = improve(actor, state, rollout, optimizer, epochs=4, minibatches=8)
  beta = adapted(beta, kl(logp, reference, mask), episodes, target=4.0)

Masks mark what was written: the prompt, and what follows the end, count nowhere.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_counts, require_divides
from jaxlab.models import LanguageModel
from jaxlab.training.losses import token_losses


class Actor(nnx.Module):
  """A language model with a value head, V(state) = h w + b, which begins at 0."""

  def __init__(self, model: LanguageModel):
    self.model = model
    self.value = nnx.Param(jnp.zeros(model.config.width + 1))


class Rollout(NamedTuple):
  """Episodes, a row each: tokens, prompt and what was written; the rest at the position before each token. mask: what
  was written, and counts."""

  tokens: Int[Array, "batch time"]
  mask: Bool[Array, "batch before"]
  logp: Float[Array, "batch before"]
  values: Float[Array, "batch before"]
  advantages: Float[Array, "batch before"]
  returns: Float[Array, "batch before"]


def scores(
  actor: Actor, tokens: Int[Array, "batch time"]
) -> tuple[Float[Array, "batch before"], Float[Array, "batch before"]]:
  """(log p(token t + 1 | tokens to t), V of the state at t), float32, for t = 0 .. time - 2."""
  hidden = actor.model.hidden(tokens[:, :-1])
  logp = -token_losses(actor.model, hidden, tokens[:, 1:])
  head = actor.value[...].astype(jnp.float32)
  return logp, hidden[0].astype(jnp.float32) @ head[:-1] + head[-1]


def written(
  prompts: Int[Array, "batch prompt"], lengths: Int[Array, "batch"], new: Int[Array, "batch new"], end: int
) -> tuple[Int[Array, "batch time"], Bool[Array, "batch before"]]:
  """(tokens, mask) of prompts with what follows each of them directly, up to and with `end`; 0 behind it."""
  room = prompts.shape[1]
  own = jnp.cumsum(new == end, axis=1) - (new == end) == 0
  column = jnp.arange(room + new.shape[1])
  at = column - lengths[:, None]
  inside = (at >= 0) & (at < new.shape[1])
  place = jnp.clip(at, 0, new.shape[1] - 1)
  mask = inside & jnp.take_along_axis(own, place, axis=1)
  wide = jnp.pad(prompts, ((0, 0), (0, new.shape[1])))
  tokens = jnp.where(mask, jnp.take_along_axis(new, place, axis=1), jnp.where(at < 0, wide, 0))
  return tokens, mask[:, 1:]


def token_rewards(
  logp: Float[Array, "batch time"],
  reference: Float[Array, "batch time"],
  mask: Bool[Array, "batch time"],
  beta: float | Array,
  reward: Float[Array, "batch"],
) -> Float[Array, "batch time"]:
  """-beta (log pi - log pi_ref) of every token written, and the episode's reward on the last."""
  last = mask & (jnp.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True))
  return jnp.where(mask, -beta * (logp - reference), 0.0) + jnp.where(last, reward[:, None], 0.0)


def gae(
  rewards: Float[Array, "batch time"],
  values: Float[Array, "batch time"],
  mask: Bool[Array, "batch time"],
  *,
  gamma: float = 1.0,
  decay: float = 0.95,
) -> tuple[Float[Array, "batch time"], Float[Array, "batch time"]]:
  """(advantages, returns = advantages + values), 0 outside the mask, which is one stretch of each row.

  delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma decay A_{t+1}; V and A are 0 behind the stretch.
  """
  values = jnp.where(mask, values, 0.0)
  following = jnp.concatenate([values[:, 1:], jnp.zeros_like(values[:, :1])], axis=1)
  delta = jnp.where(mask, rewards + gamma * following - values, 0.0)
  factor = jnp.where(mask, gamma * decay, 0.0)

  def join(later, earlier):
    return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

  _, advantages = jax.lax.associative_scan(join, (factor, delta), axis=1, reverse=True)
  return advantages, jnp.where(mask, advantages + values, 0.0)


def whiten(x: Float[Array, "batch time"], mask: Bool[Array, "batch time"]) -> Float[Array, "batch time"]:
  """Mean 0 and variance 1 over the mask, 0 outside."""
  count = jnp.maximum(mask.sum(), 1)
  mean = jnp.where(mask, x, 0.0).sum() / count
  variance = jnp.where(mask, (x - mean) ** 2, 0.0).sum() / count
  return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def loss(
  actor: Actor, rollout: Rollout, *, clip: float = 0.2, value_clip: float = 0.2, value_weight: float = 0.1
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Means over the mask of max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = pi / pi_old, and, times value_weight,
  of 0.5 max((V - G)^2, (V_old + clip(V - V_old, +-value_clip) - G)^2)."""
  logp, values = scores(actor, rollout.tokens)
  mask, count = rollout.mask, jnp.maximum(rollout.mask.sum(), 1)
  mean = lambda x: jnp.where(mask, x, 0.0).sum() / count
  ratio = jnp.exp(jnp.where(mask, logp - rollout.logp, 0.0))
  a = rollout.advantages
  policy = mean(jnp.maximum(-a * ratio, -a * jnp.clip(ratio, 1 - clip, 1 + clip)))
  near = rollout.values + jnp.clip(values - rollout.values, -value_clip, value_clip)
  value = 0.5 * mean(jnp.maximum((values - rollout.returns) ** 2, (near - rollout.returns) ** 2))
  clipped = mean((jnp.abs(ratio - 1) > clip).astype(jnp.float32))
  return policy + value_weight * value, {"policy": policy, "value": value, "clipped": clipped}


@functools.partial(jax.jit, static_argnames=("optimizer", "epochs", "minibatches"))
def improve(actor: Actor, state, rollout: Rollout, optimizer, *, key: jax.Array, epochs: int = 4, minibatches: int = 1):
  """(actor, optimizer state, means of what `loss` reports) after `epochs` passes over the episodes, each shuffled and
  in `minibatches` steps.

  Raises:
    InputError: counts below 1, or minibatches that do not divide the episodes.
  """
  require_counts(epochs=epochs, minibatches=minibatches)
  batch = len(rollout.tokens)
  require_divides("minibatches", minibatches, "episodes", batch)
  orders = [jax.random.permutation(k, batch).reshape(minibatches, -1) for k in jax.random.split(key, epochs)]

  def step(carry, rows):
    actor, state = carry
    part = jax.tree.map(lambda a: a[rows], rollout)
    (_, report), gradient = jax.value_and_grad(loss, has_aux=True)(actor, part)
    change, state = optimizer.update(gradient, state, actor)
    return (optax.apply_updates(actor, change), state), report

  (actor, state), reports = jax.lax.scan(step, (actor, state), jnp.concatenate(orders))
  return actor, state, jax.tree.map(jnp.mean, reports)


def kl(
  logp: Float[Array, "batch time"], reference: Float[Array, "batch time"], mask: Bool[Array, "batch time"]
) -> Float[Array, ""]:
  """Mean over episodes of sum_t (log pi - log pi_ref): an estimate of a whole text's divergence, in nats. Episodes
  without a token that counts are none; 0 where all are."""
  total = jnp.where(mask, logp - reference, 0.0).sum()
  return total / jnp.maximum(mask.any(axis=1).sum(), 1)


def adapted(beta, found, episodes: int, *, target: float = 4.0, horizon: float = 10_000.0):
  """beta (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon)."""
  require(target > 0 and horizon > 0, f"target is {target} and horizon {horizon}; both must be positive")
  return beta * (1 + jnp.clip(found / target - 1, -0.2, 0.2) * episodes / horizon)


def last_blocks(actor: Actor, count: int) -> Actor:
  """1 for what is trained, the value head and the last `count` of stacked blocks, 0 for the rest: factors of gradients.

  Raises:
    InputError: fewer than 0 blocks or more than there are.
  """
  depth = actor.model.config.depth
  require(0 <= count <= depth, f"the last {count} blocks are to be trained; the model has {depth}")
  trained = jnp.arange(depth) >= depth - count

  def factor(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if name.startswith("value"):
      return jnp.ones_like(leaf)
    if "blocks." in name:
      return jnp.broadcast_to(trained.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape).astype(leaf.dtype)
    return jnp.zeros_like(leaf)

  return jax.tree_util.tree_map_with_path(factor, actor)


def scaled_by(factors) -> optax.GradientTransformation:
  """Updates times factors of the same structure, as the last of a chain: what has 0 stays bit for bit."""
  return optax.GradientTransformation(
    lambda params: optax.EmptyState(),
    lambda updates, state, params=None: (jax.tree.map(jnp.multiply, updates, factors), state),
  )
