"""Maps of a model that share a basis of the residual stream, at a promised error: numbers stored, perplexity."""

import jax

from experiments.compressing import Subject, row, sizes
from jaxlab.models import Transformer, maps
from jaxlab.weights import concat_svd, svd


def layers(config, subject: Subject) -> dict:
  """Rows of sharing at every pair of rank and error, and of SVD and SVD-LLM of each map alone at as many numbers.

  A row of "shared" has {groups, shared: matrices with a common basis, ratio: numbers of the maps over those stored,
  worst: true error of a group} besides; "budget" is the promised error.
  """
  of = sizes(config.layers, subject)
  model = subject.model
  found = maps.named(model.blocks)
  total = sum(found[name].weight.size for name in of.types)
  rows = [row(subject, "dense", 1, model)]
  how = dict(names=of.types, batch=sizes(config.text, subject).batch)
  full = {one.__name__: svd.decompose(model, subject.calibration, one, **how) for one in (svd.plain_svd, svd.svd_llm)}
  for share, eps in of.pairs:
    made, clusters = shared(config, subject, share, eps)
    numbers = sum(one.numbers for one in clusters)
    together = [one for one in clusters if one.basis is not None]
    rows.append(
      row(subject, "shared", eps, made)
      | dict(share=numbers / total, groups=len(clusters), shared=sum(len(one.members) for one in together))
      | dict(ratio=total / numbers, worst=max((one.bound for one in together), default=0.0))
    )
    if together:
      for name, factors in full.items():
        rows.append(row(subject, name, eps, svd.truncate(model, factors, budget=min(0.99, numbers / total))))
  return {"rows": rows, "matrices": sum(len(found[name].weight) for name in of.types)}


def shared(config, subject: Subject, share: float, eps: float) -> tuple[Transformer, list[concat_svd.Cluster]]:
  """(the model, its groups) at bases of a share of the residual stream's width."""
  rank = max(1, int(share * subject.model.config.width))
  with jax.default_device(jax.devices("cpu")[0]):  # SVDs of tall matrices are the host's work
    return concat_svd.compress(subject.model, rank=rank, eps=eps, names=sizes(config.layers, subject).types)
