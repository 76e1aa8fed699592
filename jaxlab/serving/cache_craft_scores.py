"""How much of a chunk that was cached behind others has to be computed again behind new ones (Cache-Craft).

Plain NumPy on the host: a prompt has a handful of chunks. Equation numbers are those of arXiv 2502.15734.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxlab.core.checks import require

_SHORTEST = 16  # tokens that a chunk before counts as at least: a shorter one's mean weights would say too much


def context_impact(attention: Float[np.ndarray, "tokens groups"], sizes: Sequence[int], *, layers: int) -> float:
  """CCI = 1 / (1 + exp(-a / b)), in 0.5 .. 1 (Eq. 9-11): 0.5 where a chunk attends to none before it.

  a = mean_l sum_j inter^l(C_i, C_j) / (|C_i| |C_j|) and b = mean_l intra^l(C_i) / |C_i|^2 are mean weights.

  Args:
    attention: of every token, summed over layers: to its own chunk, then to every chunk before.
    sizes: tokens of the chunks before.
  """
  inter, own = attention[:, 1:].sum(axis=0), float(attention[:, 0].sum())
  require(own > 0, "a chunk without attention to itself; give attention summed over rows that were computed")
  tokens = len(attention)
  a = sum(mass / (tokens * max(size, _SHORTEST)) for mass, size in zip(inter, sizes, strict=True)) / layers
  b = own / tokens**2 / layers
  return 1 / (1 + math.exp(-min(a / b, 700.0)))


def prefix_overlap(
  inter: Sequence[float], old: Sequence[bytes], new: Sequence[bytes], *, penalise_new: bool = False
) -> float:
  """beta: the share of the attention to old chunks that went to those which are there again (Eq. 6); 1 of none.

  Args:
    inter: attention to every chunk of `old`, summed over layers and tokens.
    penalise_new: times the share of the new chunks that were there before: chunks that were never seen count too.
  """
  total, there = float(np.sum(inter)), set(new)
  # What is missing, not what is there: nothing missing is a beta of 1 whatever the rounding, and a tie stays one.
  missing = sum(float(mass) for mass, name in zip(inter, old, strict=True) if name not in there)
  beta = 1 - missing / total if total > 0 else 1.0
  if penalise_new and there:
    beta *= len(there & set(old)) / len(there)
  return max(beta, 0.0)


def disorder(old: Sequence[bytes], new: Sequence[bytes]) -> float:
  """gamma: the share of pairs of common chunks whose order differs (Eq. 7, Kendall); 0 of fewer than two."""
  place = {name: i for i, name in reversed([*enumerate(new)])}
  common = [place[name] for name in dict.fromkeys(old) if name in place]
  pairs = [*itertools.combinations(common, 2)]
  return sum(a > b for a, b in pairs) / len(pairs) if pairs else 0.0


def recompute_share(
  attention: Float[np.ndarray, "tokens groups"],
  old: Sequence[bytes],
  sizes: Sequence[int],
  new: Sequence[bytes],
  *,
  layers: int,
  alpha: float = 1.0,
  penalise_new: bool = False,
) -> float:
  """CFO = min(1, alpha CCI (1 - beta (1 - gamma))), the share of a chunk to compute again (Eq. 8, 12).

  Args:
    attention, sizes, layers: as `context_impact`; old, new: the chunks before, then and now.
  """
  if tuple(old) == tuple(new):
    return 0.0
  beta = prefix_overlap(attention[:, 1:].sum(axis=0), old, new, penalise_new=penalise_new)
  impact = context_impact(attention, sizes, layers=layers)
  return min(max(alpha * impact * (1 - beta * (1 - disorder(old, new))), 0.0), 1.0)


def top_tokens(score: Float[np.ndarray, "tokens"], share: float) -> Int[np.ndarray, "chosen"]:
  """The ceil(share n) tokens of the largest score, ascending (Eq. 14); of equal ones the first."""
  count = min(len(score), math.ceil(share * len(score) - 1e-9))
  return np.sort(np.argsort(-np.asarray(score), kind="stable")[:count])


def focused(
  attention: Float[np.ndarray, "layers chunks"], *, stable: int = 3, final: bool = False
) -> Bool[np.ndarray, "chunks"]:
  """The chunks that the question attends to, once that is settled; until then, all of them.

  They are those before the largest gap of the attention summed up to a layer, sorted; settled if it is the same set in
  the last `stable` layers.

  Args:
    attention: of all question tokens to every chunk, layer by layer.
    final: no later layer is asked, so it counts as settled.
  """
  layers, chunks = attention.shape
  if chunks < 2 or (layers < stable and not final):
    return np.ones(chunks, bool)
  sets = []
  for summed in np.cumsum(attention, axis=0)[-1 if final else -stable :]:
    order = np.argsort(-summed, kind="stable")
    gap = int(np.argmax(-np.diff(summed[order])))
    sets.append(frozenset(order[: gap + 1].tolist()))
  if len(set(sets)) > 1:
    return np.ones(chunks, bool)
  return np.isin(np.arange(chunks), [*sets[0]])


def preload_depth(layers: int, load: float, compute: float) -> int:
  """How many layers must lie ready when the first is computed so that none waits for its keys and values.

  Layers load one after the other, `load` seconds each, and are computed one after the other, `compute` seconds each:
  layer i is there at (i - L_p) load and wanted at (i - 1) compute, so L_p = max(1, ceil(L - (L - 1) compute / load)).
  """
  require(layers >= 1 and load >= 0 and compute >= 0, "layers must be at least 1 and times not negative")
  if load == 0:
    return 0
  return max(1, math.ceil(layers - (layers - 1) * compute / load - 1e-9))


def smallest_alpha(alphas: Sequence[float], quality: Callable[[float], float], target: float) -> float:
  """The smallest alpha, and so the least computed again, whose quality meets the target; the largest where none does.

  Args:
    quality: of an alpha, on queries that are not those to be reported.
  """
  require(len(alphas) > 0, "no alpha to choose from; give at least one")
  return next((alpha for alpha in sorted(alphas) if quality(alpha) >= target), max(alphas))
