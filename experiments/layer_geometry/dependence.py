"""The link to SNLP: training for one Newton step shrinks how much the suffix's updates depend on the layers between."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.layer_geometry.subjects import IDN
from experiments.results import Claim
from jaxlab.depth import layer_geometry as geometry


@jax.jit
def _measure(model, tokens) -> dict:
  u, v = geometry.frozen_updates(model, tokens, layers=max(1, model.depth // 2))
  size = lambda a: jnp.linalg.norm(a, axis=-1)
  ratio = lambda a, b: jnp.mean(size(a) / jnp.maximum(size(b), 1e-12), axis=(1, 2))
  sum_u, sum_v = (jnp.cumsum(a, axis=0) for a in (u, v))
  cosine = jnp.sum(u * v, axis=-1) / jnp.maximum(size(u) * size(v), 1e-12)
  return {
    "dependence": ratio(u - v, u),
    "cosine": cosine.mean(axis=(1, 2)),
    "one_step_error": ratio(sum_v - sum_u, sum_u),
  }


def measure(model, tokens) -> dict[str, list[float]]:
  """Of the last half of the layers: the input dependence of every update, its cosine, and one IDN step's error."""
  return {name: np.asarray(values).tolist() for name, values in _measure(model, tokens).items()}


def claims(models: dict) -> list[Claim]:
  made = []
  for name in models:
    if not name.endswith(IDN) or len(models[name]["suffix"]["dependence"]) < 2:  # one layer depends on none between
      continue
    plain = name.removesuffix(IDN)
    mean = lambda key, which: float(np.mean(models[which]["suffix"][key][1:]))
    both = lambda key: f"{mean(key, name):.2f}, plain {mean(key, plain):.2f}"  # noqa: B023 (used at once)
    made.append(
      Claim(
        "How many times as much the last half's updates depend on the layers between, in a network trained for SNLP's "
        "one-step inference", "x", "lower", ours=mean("dependence", name) / mean("dependence", plain), threshold=1.0,
        baseline=mean("dependence", plain),
        note=f"||u - v|| / ||u||, v the update at the suffix's input; cos(u, v) {both('cosine')}; error of one step, "
        f"over what the suffix adds, {both('one_step_error')}",
      )
    )  # fmt: skip
  return made
