"""Maps of a model that share a basis of the residual stream, at a promised error: numbers stored, perplexity."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compressing import Subject, perplexity, row, sizes, stored
from jaxlab.models import Transformer, maps
from jaxlab.models.layers import Linear
from jaxlab.weights import concat_svd, svd
from jaxlab.weights.calibration import with_maps

_WRITE = ("o", "mlp.down")  # maps whose outputs, not inputs, are of the residual stream


def layers(config, subject: Subject) -> dict:
  """Rows of sharing at every pair of rank and error, and of SVD and SVD-LLM of each map alone at as many numbers.

  A row of "shared" has {groups, shared: matrices with a common basis, ratio: numbers of the maps over those stored,
  worst: true error of a group} besides; "budget" is the promised error.
  """
  of = sizes(config.layers, subject)
  model = subject.model
  dense = {name: np.asarray(maps.named(model.blocks)[name].weight[...]) for name in of.types}
  width = model.config.width
  blocks = {(name, i): _upright(name, w) for name, weight in dense.items() for i, w in enumerate(weight)}
  rows = [row(subject, "dense", 1, model)]
  how = dict(names=of.types, batch=sizes(config.text, subject).batch)
  full = {one.__name__: svd.decompose(model, subject.calibration, one, **how) for one in (svd.plain_svd, svd.svd_llm)}
  size, total = maps.bytes_of(stored(model)), sum(a.size for a in dense.values())
  with jax.default_device(jax.devices("cpu")[0]):  # SVDs of tall matrices are the host's work
    made = {eps: concat_svd.cluster(list(blocks.values()), rank=int(share * width), eps=eps) for share, eps in of.pairs}
  for eps, clusters in made.items():
    numbers = sum(one.numbers for one in clusters)
    shared = [one for one in clusters if one.basis is not None]
    rows.append(
      dict(subject=subject.name, method="shared", budget=eps, bytes=size - 2 * (total - numbers))
      | dict(share=numbers / total, groups=len(clusters), shared=sum(len(one.members) for one in shared))
      | dict(ratio=total / numbers, worst=max((one.bound for one in shared), default=0.0))
      | dict(perplexity=perplexity(subject, stored(_replaced(model, dense, blocks, clusters))))
    )
    if shared:
      for name, factors in full.items():
        rows.append(row(subject, name, eps, svd.truncate(model, factors, budget=min(0.99, numbers / total))))
  return {"rows": rows, "matrices": len(blocks)}


def _upright(name: str, weight: np.ndarray) -> np.ndarray:
  """(width, n): rows are the residual stream's."""
  return weight.T if name in _WRITE else weight


def _replaced(model: Transformer, dense, blocks, clusters) -> Transformer:
  """The model with every matrix as its group gives it back."""
  places, weights = list(blocks), {name: weight.copy() for name, weight in dense.items()}
  for one in clusters:
    for place, member in enumerate(one.members):
      name, layer = places[member]
      weights[name][layer] = _upright(name, np.asarray(one.matrix(place)))
  axes = {name: one.weight.axes for name, one in maps.named(model.blocks).items()}
  return with_maps(model, {name: Linear(jnp.asarray(weight), axes[name]) for name, weight in weights.items()})
