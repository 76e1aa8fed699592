"""What the paper argues: words that reason are few in a step's loss, and so is their gradient; minima are sharp."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.skip_thinking.training import Fold
from jaxlab.sequence import skip_thinking as st
from jaxlab.training import losses

RADII = (0.01, 0.02)


def reasoning(fold: Fold, cuts: list[st.Cuts], rows: st.Rows) -> np.ndarray:
  """bool as rows.tokens: those of sentences that reason."""
  mask = np.zeros(rows.tokens.shape, bool)
  for i, (one, own) in enumerate(zip(fold.samples, cuts, strict=True)):
    at, starts = 1 + len(one.question), set(own[:-1])
    for j, unit in enumerate(one.units):
      at += j in starts  # a tag
      mask[i, at : at + len(unit)] = fold.reasons[i][j]
      at += len(unit)
  return mask


def measure(config, model, fold: Fold, cuts, tags: st.Tags, *, staged: bool, seed: int) -> dict:
  """{"share", "gradient", "sharpness": {radius: nats}} of some samples; staged: means over the stages of chunk-wise
  steps."""
  rng = np.random.default_rng(seed)
  chosen = rng.choice(len(fold.samples), min(config.diagnosed, len(fold.samples)), replace=False)
  part = Fold(*([values[i] for i in chosen] for values in (fold.samples, fold.task, fold.reasons)))
  own = [cuts[i] for i in chosen]
  rows = st.encode(part.samples, own, tags, length=config.length)
  core = reasoning(part, own, rows)[:, 1:]
  gradient = jax.jit(jax.grad(summed))
  share, ratio = [], []
  for stage in range(1, config.chunks + 2) if staged else (None,):
    batch = st.counted(rows, stage)
    some = batch | {"targets": np.where(core, batch["targets"], -1)}
    counts = [(b["targets"] >= 0).sum() for b in (some, batch)]
    share.append(counts[0] / max(1, counts[1]))
    norms = [float(optax.tree.norm(gradient(model, b))) for b in (some, batch)]
    ratio.append(norms[0] / norms[1])
  return {
    "share": float(np.mean(share)),
    "gradient": float(np.mean(ratio)),
    "sharpness": {f"{radius:g}": sharpness(model, st.counted(rows), radius, seed) for radius in RADII},
  }


def summed(model, batch):
  return losses.token_losses(model, model.hidden(batch["inputs"]), batch["targets"]).sum()


def sharpness(model, batch, radius: float, seed: int, draws: int = 8) -> float:
  """Mean rise of the loss, in nats a token, under Gaussian noise as long as `radius` times each column of a matrix."""

  @jax.jit
  def moved(key):
    leaves, structure = jax.tree.flatten(model)
    noise = [jax.random.normal(k, a.shape) for k, a in zip(jax.random.split(key, len(leaves)), leaves, strict=True)]
    scaled = [_like(n, a) * radius if a.ndim >= 2 else jnp.zeros_like(a) for n, a in zip(noise, leaves, strict=True)]
    return summed(jax.tree.unflatten(structure, [a + n for a, n in zip(leaves, scaled, strict=True)]), batch)

  still = float(jax.jit(summed)(model, batch))
  rises = [float(moved(key)) - still for key in jax.random.split(jax.random.key(seed), draws)]
  return float(np.mean(rises)) / int((batch["targets"] >= 0).sum())


def _like(noise, array):
  norm = lambda a: jnp.linalg.norm(a, axis=-2, keepdims=True)
  return noise * norm(array) / norm(noise)
