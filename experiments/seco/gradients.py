"""How near SpaCO's estimates are to the gradient: of one draw, and of the mean of many."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.long_finetuning import backpropagation
from jaxlab.core.checks import require_choice
from jaxlab.core.precision import exactly
from jaxlab.models import Transformer
from jaxlab.sequence import seco

LIMITS = {"1": 1.0, "2": 2.0, "none": None}  # of the compensation


def limited(text: str) -> float | None:
  """A limit by its name."""
  require_choice("the largest compensation", text, LIMITS)
  return LIMITS[text]


@exactly
def measure(config, model: Transformer, batch: dict) -> dict:
  """{"seco": error, cosine; "t of k, cap": {cosine: mean over the draws, of_mean: of their mean, length: of it}}.

  error: norm of the difference to the exact gradient over its norm; length: norm over the exact one's.
  """
  g, identity = config.gradients, lambda model: model
  run = lambda gradient_fn: jax.jit(lambda model, key: flat(gradient_fn(model, batch, 0, key)[1]))
  exact = run(backpropagation(identity, remat="full"))(model, jax.random.key(0))
  size, norm = g.chunk, jnp.linalg.norm
  count = -(-batch["inputs"].shape[1] // size)
  cosine = lambda a: float(a @ exact / jnp.maximum(norm(a) * norm(exact), 1e-30))
  whole = run(seco.gradient(chunk=size))(model, jax.random.key(0))
  found = {"seco": dict(error=float(norm(whole - exact) / norm(exact)), cosine=cosine(whole))}
  for visited in g.visited:
    for limit in config.limits:
      how = dict(chunk=size, visited=visited, cap=limited(limit))
      estimate, total, each = run(seco.gradient(**how)), jnp.zeros_like(exact), []
      for draw in range(g.draws):
        one = estimate(model, jax.random.key(draw))
        each.append(cosine(one))
        total = total + one / g.draws
      found[f"{visited} of {count}, {limit}"] = dict(
        cosine=float(np.mean(each)), of_mean=cosine(total), length=float(norm(total) / norm(exact))
      )
  return found


def flat(tree) -> jax.Array:
  return jnp.concatenate([jnp.ravel(a).astype(jnp.float32) for a in jax.tree.leaves(tree)])
