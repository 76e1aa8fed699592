"""Grids of autoencoders trained in one compiled scan."""

import functools
import itertools

import jax
import jax.numpy as jnp

from jaxlab.tensors import bows

VARIANT = ("output", "loss", "hidden", "tied")


@functools.partial(
  jax.jit, static_argnames=("features", "latent", "steps", "batch", "rate", "seeds", "clip", "every", "bound", *VARIANT)
)
def train_grid(
  bits, decays, which=None, *, features, latent, steps, batch, rate, seeds, clip=None, every=1, bound=None, tied=True,
  **variant,
):  # fmt: skip
  """Trained parameters and last losses for every (decay, seed), in one compiled scan.

  Args:
    which: with several data sets of one size, `bits` (sets, n, bytes): the one that each decay is for.
    variant: output, loss, latent of `bows.train`, the last as `hidden`.
  """
  options = {("latent" if name == "hidden" else name): value for name, value in variant.items()}

  def one(data, decay, seed):
    params = bows.init_params(jax.random.key(seed), features=features, latent=latent, bound=bound, tied=tied)
    settings = dict(clip=clip, schedule_every=every, seed=seed, **options)
    return bows.train(
      params, data, features=features, steps=steps, batch=batch, rate=rate, weight_decay=decay, **settings
    )

  over_seeds = lambda data, decay: jax.vmap(lambda seed: one(data, decay, seed))(jnp.arange(seeds))
  if which is None:
    return jax.vmap(lambda decay: over_seeds(bits, decay))(decays)
  return jax.vmap(lambda decay, at: over_seeds(bits[at], decay))(decays, which)


def pick(params: dict, *index) -> dict:
  return jax.tree.map(lambda a: a[index], params)


def average(trees: list[dict]) -> dict:
  """Means over the trees, number by number."""
  return jax.tree.map(lambda *values: sum(map(float, values)) / len(values), *trees)


def rising(values) -> float:
  """Share of neighbouring values that rise."""
  steps = list(itertools.pairwise(values))
  return sum(b > a for a, b in steps) / max(len(steps), 1)
