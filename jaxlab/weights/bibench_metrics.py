"""BiBench's six tracks: quadratic means, in percent, of ratios to the full-precision twin.

  learning task   OM = sqrt(mean_t E^2[A_bi / A_fp])                     E a mean over runs or settings
  architecture    the same over E of CNNs, transformers and MLPs
  corruption      sqrt(mean_c E^2[G_fp / G_bi]), G = A_clean - A_corrupt
  training        sqrt((E^2[T_fp / T_bi] + E^2[std(A_fp) / std(A_bi)]) / 2)
  complexity      sqrt((E^2[r_c] + E^2[r_s]) / 2), r_c = P / ((P - P^)/32 + P^), r_s = F / ((F - F^)/64 + F^)
  hardware        sqrt((E^2[T_fp / T_bi] + E^2[S_fp / S_bi]) / 2)

P and F are parameters and operations, P^ and F^ the part of them that stays in full precision.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxlab.core.checks import require

BITS, SPEED = 32, 64  # of a parameter; signs that are multiplied while a number is


def overall(ratios: Iterable[float]) -> float:
  """The quadratic mean, as a ratio: what every track is of the means over its runs.

  Raises:
    InputError: none, or one that is no number.
  """
  found = np.array(list(ratios), float)
  require(
    found.size > 0 and np.isfinite(found).all(), f"ratios {found.tolist()}; give at least one, all of them finite"
  )
  return float(np.sqrt(np.mean(found**2)))


def accuracy(ours: Sequence[float], twin: float) -> float:
  """E[A_bi / A_fp] of the runs of one task.

  Raises:
    InputError: a twin that is never right.
  """
  require(twin > 0, f"the full-precision twin's accuracy is {twin}; a ratio needs one above 0")
  return float(np.mean(ours) / twin)


def robustness(ours: tuple[float, float], twin: tuple[float, float], *, least: float = 0.01) -> float:
  """G_fp / G_bi of one corruption, from (clean, corrupted) accuracies in 0..1.

  A gap below `least` counts as that: of a corruption that changes nothing the ratio of two gaps is noise.
  """
  gap = lambda pair: max(pair[0] - pair[1], least)
  return gap(twin) / gap(ours)


def training(seconds: float | None, twin_seconds: float | None, settings: Sequence[float], twin: Sequence[float]):
  """(T_fp / T_bi or None, std(A_fp) / std(A_bi)) over the settings of the optimiser."""
  require(len(settings) == len(twin) > 1, f"{len(settings)} and {len(twin)} settings; both need the same, two or more")
  time = None if seconds is None else twin_seconds / seconds
  return time, float(np.std(twin) / max(np.std(settings), 1e-9))


def saving(total: float, left: float, factor: float) -> float:
  """total / ((total - left) / factor + left): r_c with factor 32 of parameters, r_s with 64 of operations.

  Raises:
    InputError: nothing, or more left than there is.
  """
  require(0 <= left <= total and total > 0, f"{left} of {total} are left; it must be a part of them")
  return total / ((total - left) / factor + left)
