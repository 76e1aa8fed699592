r"""LoRD block after block: later blocks are decomposed behind those that are of low rank already, as LLM-ROM does
(Chavan et al. 2023, arXiv 2312.07046).

A map's inputs are x' where the dense network's are x; its targets stay y = W^T x. With C' the covariance of x' and X
that of x' with x, both centred,

  A = W + (C' + l I)^-1 (X - C') W,   l = 1e-3 of the mean of C's diagonal
  y ~ E_r E_r^T A^T (x' - mean x') + mean y,   E the principal directions of A^T x'

the affine map of rank r with the least squared error against y, but for l, which draws it towards W where x' varies
little. With x' = x it is LoRD's. (LLM-ROM takes A = W and the mean of W^T x': it follows the thinner network's outputs,
not the dense one's.)

  ranks = lord.uniform(lord.decompose(model, tokens), budget=0.8)
  small = lord.truncate(model, decompose(model, tokens, ranks), ranks)
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlab.core.checks import require_choice
from jaxlab.models import Transformer, maps
from jaxlab.models.block import Block, Side
from jaxlab.weights.calibration import SHARED, Moments, embed, layers, merge, moments, opened, read
from jaxlab.weights.lord import Basis, basis, require_enough, require_finite, thinner

_SHRINK = 1e-3  # of the mean variance of the inputs


def decompose(
  model: Transformer, tokens: Int[Array, "rows time"], ranks: Mapping[str, int], *, batch: int = 8
) -> dict[str, Basis]:
  """The bases of the maps in `ranks`, stacked over layers, for `lord.truncate` at these ranks; those of the first block
  are LoRD's. Every block is run on the dense network's inputs and on those behind thinner blocks.

  Args:
    ranks: by map, in all layers, of `lord.uniform` or `lord.choose`.

  Raises:
    InputError: a map that the model does not have; as `lord.decompose` and `lord.thinner`.
  """
  require_enough(model, tokens)
  for name in ranks:
    require_choice("a map", name, maps.named(model.blocks))
  outer, parts = opened(model, tokens, batch=batch)
  dense = [embed(outer, part)[0] for part in parts]
  behind, found = dense, []
  for block, kind in layers(model):
    sides = [embed(outer, part)[1] for part in parts]
    seen = [_both(block, *given, **kind) for given in zip(dense, behind, sides, strict=True)]
    total = functools.reduce(_merge, (of_batch for _, of_batch in seen))
    dense, own = [y for y, _ in seen], {}
    for name in ranks:
      one = maps.named(block)[name]
      made = _fit(one.weight[...], total[SHARED.get(name, name)])
      require_finite(name, len(found), made)
      bias = getattr(one, "bias", None)
      own[name] = made if bias is None else dataclasses.replace(made, bias=made.bias + bias[...])
    thin = maps.replaced(block, thinner(own, ranks, dtype=model.dtype))
    behind = [_forward(thin, x, side, **kind) for x, side in zip(behind, sides, strict=True)]
    found.append(own)
  return maps.stack(found)


_merge = jax.jit(lambda a, b: {name: merge(a[name], b[name]) for name in a})


@functools.partial(jax.jit, static_argnames=("window", "row"))
def _both(block: Block, x, behind, side: Side, *, window, row):
  """(the block's output for x, {map: Moments of its inputs behind thinner blocks, beside those for x})."""
  how = dict(window=window, row=row)
  (y, dense), (_, thin) = (read(block, given, side, **how) for given in (x, behind))
  return y, {name: moments(jnp.concatenate([thin[name], dense[name]], axis=-1)) for name in dense}


@functools.partial(jax.jit, static_argnames=("window", "row"))
def _forward(block: Block, x, side: Side, *, window, row):
  return read(block, x, side, window=window, row=row)[0]


@jax.jit
def _fit(weight, both: Moments) -> Basis:
  """The basis of one map from `_both`; its bias is what the means of the two inputs differ by, as outputs."""
  size = len(weight)
  weight = weight.astype(both.mean.dtype)
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  cut = lambda a: a[:size]
  seen = Moments(both.tokens, both.rows, cut(both.mean), both.scatter[:size, :size], cut(both.absolute), cut(both.norm))
  cross = both.scatter[:size, size:] / both.tokens
  own = seen.covariance
  spread, axes = jnp.linalg.eigh(own)
  # What rounding takes of the largest variance is no variance.
  floor = _SHRINK * spread.mean() + size * jnp.finfo(spread.dtype).eps * spread[-1]
  moved = product(axes.T, product(cross - own, weight)) / (jnp.maximum(spread, 0) + floor)[:, None]
  made = basis(weight + product(axes, moved), seen)
  return dataclasses.replace(made, bias=product(both.mean[size:], weight) - made.mean)
