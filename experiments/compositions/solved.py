"""Perplexity of a compressed model whose last layers are solved together."""

import math

import jax
import jax.numpy as jnp

from experiments.compressing import Subject
from jaxlab.evaluation import methods
from jaxlab.models import Transformer


def solved_perplexity(subject: Subject, model: Transformer, options: dict) -> float:
  """Under SNLP, in float32, of the forms as they are stored; options are `evaluation.methods.snlp`'s."""
  wide = jax.tree.map(lambda a: a.astype("float32") if a.dtype == jnp.bfloat16 else a, model)
  network, logits, _ = methods.subject(wide, "snlp", **options)

  @jax.jit
  def sums(network, inputs, targets):
    logp = jax.nn.log_softmax(logits(network, inputs).astype(jnp.float32), axis=-1)
    of = jnp.take_along_axis(logp, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(targets >= 0, of, 0).sum(), (targets >= 0).sum()

  total = [sums(network, batch["inputs"], batch["targets"]) for batch in subject.batches]
  loss, count = (sum(float(one[i]) for one in total) for i in (0, 1))
  return math.exp(loss / count)
