"""What FunBaT is given: observations at real coordinates, in the model's units, and the settings of a fit."""

import dataclasses
from numbers import Integral, Real

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core import kalman
from jaxlab.core.checks import InputError, require, require_choice
from jaxlab.tensors import matern

MODELS = ("tucker", "cp")
INITIAL = ("small", "code")


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that is fixed before the data are seen.

  Attributes:
    rank: R, or one R_k a mode (Tucker).
    model: "tucker" learns the core; "cp" fixes it to the superdiagonal of ones.
    kernel: "matern12", "matern32", or "white" (no smoothing: the discrete Bayesian CP / Tucker model).
    lengthscale, variance: l_k and s2_k, one number or one a mode, in the units of the grids and of the model's y (with
      `observe`: shares of a mode's range, and of the variance of y). Arrays too, inside a transformation that makes
      the Settings: one program then fits all values (`jax.vmap`).
    damping: (d_U, d_tau, d_gamma): weights of the old message to factors, noise and core.
    inner: refresh each mode's messages just before its smoother; False: all messages first, then all smoothers, which
      from some starts ends in a cycle (two modes of the wrong relative sign flip each other at every epoch).
    extra_prior: v of an extra pull N(0, v) on every u^k(t_j), as the authors' code has it (v = 1); None: the model.
    core_variance: v_w; None gives the core no prior, as the authors' code does.
    core_moments: "full" uses E[ww'] in every message, "mean" E[w]E[w]' as the authors' code does.
    update_core: False keeps the initial core of a Tucker model.
    noise: (a0, b0).
    initial: "small" (covariances 0.1 I, E[tau] = 10, core near the superdiagonal) or "code" (I, 1, a uniform core:
      with centred data and s2 = 1 it falls into the fixed point at zero).
    scan: one of `kalman.SCANS`, see `kalman.smooth`.
  """

  rank: int | tuple[int, ...] = 3
  model: str = "tucker"
  kernel: str = "matern12"
  lengthscale: float | tuple[float, ...] = 0.1
  variance: float | tuple[float, ...] = 1.0
  damping: tuple[float, float, float] = (0.3, 0.8, 0.5)
  inner: bool = True
  extra_prior: float | None = None
  core_variance: float | None = 1.0
  core_moments: str = "full"
  update_core: bool = True
  noise: tuple[float, float] = (1.0, 1.0)
  initial: str = "small"
  scan: str = "seq"

  def __post_init__(self):
    require_choice("model", self.model, MODELS)
    require_choice("kernel", self.kernel, matern.KERNELS)
    require_choice("initial", self.initial, INITIAL)
    require_choice("core_moments", self.core_moments, ("full", "mean"))
    require_choice("scan", self.scan, kalman.SCANS)
    for name in ("rank", "lengthscale", "variance", "damping", "noise"):
      value = getattr(self, name)
      if isinstance(value, list) or getattr(value, "ndim", 0) == 1:
        # Tuples of numbers are static arguments, lists and arrays are not.
        traced = isinstance(value, list | jax.core.Tracer)
        object.__setattr__(self, name, tuple(value if traced else value.tolist()))
    for name in ("rank", "lengthscale", "variance"):
      values = getattr(self, name)
      for value in values if isinstance(values, tuple) else (values,):
        real = isinstance(value, jax.Array | Real)
        require(real, f"{name} is {values!r:.60}; give a number, or one for each mode")
        require(isinstance(value, jax.core.Tracer) or value > 0, f"{name} is {values}; it must be positive")
        require(name != "rank" or isinstance(value, Integral), f"rank is {values}; give integers")
    require(self.model == "tucker" or len(set(np.atleast_1d(self.rank))) == 1, "a CP model has one rank for all modes")
    for name, length in (("damping", 3), ("noise", 2)):
      value = getattr(self, name)
      require(isinstance(value, tuple) and len(value) == length, f"{name} is {value!r:.60}; give {length} numbers")
    require(all(0 <= d < 1 for d in self.damping), f"damping is {self.damping}; each must lie in [0, 1)")
    require(min(self.noise) > 0, f"noise is {self.noise}; both must be positive")

  def of_mode(self, name: str, k: int, modes: int):
    """Field `name` of mode k."""
    value = getattr(self, name)
    require(not isinstance(value, tuple) or len(value) == modes, f"{name} is {value}; the data have {modes} modes")
    return value[k] if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class Units:
  """What the model's coordinates and outputs are: (i - origin_k) / span_k and (y - mean) / spread.

  The priors are of processes around zero with a variance of about one, and float32 tells neighbours apart only near
  zero: an output far from zero ends at the fixed point u = 0, and Unix seconds of a minute are one number.
  """

  origin: tuple[float, ...] = ()
  span: tuple[float, ...] = ()
  mean: float = 0.0
  spread: float = 1.0

  def of_mode(self, k: int, points):
    """Points of mode k in the model's units; on the host in float64, unless a transformation traces them."""
    if not self.span:
      return points
    points = points if isinstance(points, jax.core.Tracer) else np.asarray(points, np.float64)
    return (points - self.origin[k]) / self.span[k]


RAW = Units()  # the model's units are the user's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Data:
  """`grids[k]` are the coordinates of mode k, increasing; `index[n, k]` says which one observation n has.

  Grids and y are in the model's units.
  """

  grids: tuple[Float[Array, "J_k"], ...]
  index: Int[Array, "N K"]
  y: Float[Array, "N"]
  units: Units = dataclasses.field(default=RAW, metadata={"static": True})


def observe(coordinates: Float[Array, "N K"], y: Float[Array, "N"], *, units: Units | None = None, dtype=None) -> Data:
  """Data from real coordinates: the grid of a mode is its sorted distinct values (repeated ones are merged).

  Args:
    units: None measures them here: every mode's range becomes [0, 1], y gets mean 0 and deviation 1. `RAW` leaves all.

  Raises:
    InputError: shapes that disagree, no observation, no numbers, or NaN / infinite values.
  """
  coordinates, y = numbers("coordinates", coordinates), numbers("y", y)
  require(
    coordinates.ndim == 2 and y.shape == coordinates.shape[:1] and len(y) > 0,
    f"coordinates {coordinates.shape} and y {y.shape} do not fit; expected (N, K) and (N,) with N >= 1",
  )
  pairs = [np.unique(column, return_inverse=True) for column in coordinates.T]
  index = np.stack([inverse for _, inverse in pairs], 1)
  return on_grids([grid for grid, _ in pairs], index, y, units=units, dtype=dtype)


def on_grids(grids, index: Int[Array, "N K"], y: Float[Array, "N"], *, units: Units | None = None, dtype=None) -> Data:
  """Data on given grids, which may hold coordinates without an observation: folds then share shapes (`jax.vmap`).

  Args:
    units: as in `observe`. Give a test set those of the training set, `data.units`.

  Raises:
    InputError: a grid with NaN, unsorted or duplicate coordinates, or such as `dtype` does not tell apart; an index
      outside it; NaN in y.
  """
  dtype = dtype or jnp.asarray(0.0).dtype
  grids, index, y = (
    tuple(numbers(f"grid {k}", grid) for k, grid in enumerate(grids)),
    np.asarray(index),
    numbers("y", y),
  )
  require(
    index.shape == (len(y), len(grids)) and len(y) > 0,
    f"index has shape {index.shape}; expected (N, K) = {(len(y), len(grids))} with N >= 1",
  )
  require(index.dtype.kind in "iu", f"index holds {index.dtype}; expected integers, places on the grids")
  for k, grid in enumerate(grids):
    require(grid.ndim == 1 and len(grid) > 0, f"grid {k} has shape {grid.shape}; expected one or more coordinates")
    low, high = int(index[:, k].min()), int(index[:, k].max())
    require(low >= 0 and high < len(grid), f"index of mode {k} spans {low}..{high}; its grid has {len(grid)} entries")
  if units is None:
    spans = tuple(float(np.ptp(grid)) or 1.0 for grid in grids)
    constant = y.std() <= 4 * np.finfo(y.dtype).eps * np.abs(y).max()  # the deviation is rounding
    spread = 1.0 if constant else float(y.std())
    units = Units(tuple(float(grid[0]) for grid in grids), spans, float(y.mean()), spread)
  narrow = tuple(np.asarray(units.of_mode(k, grid), dtype) for k, grid in enumerate(grids))
  for k, (wide, grid) in enumerate(zip(grids, narrow, strict=True)):
    place = lambda rises: int(np.argmin([*rises, False])) + 1
    rises, apart = np.diff(wide) > 0, np.diff(grid) > 0
    require(
      bool(rises.all()),
      f"grid {k} is not increasing at position {place(rises)} (a duplicate or unsorted coordinate); merge duplicates "
      "with observe(coordinates, y)",
    )
    require(
      bool(apart.all()),
      f"grid {k} has coordinates that are one number in {np.dtype(dtype).name} (at position {place(apart)}); round "
      "them, or give dtype=float64 with jax_enable_x64" + ("" if units.span else ", or units=None"),
    )
  y = np.asarray((y - units.mean) / units.spread, dtype)
  return Data(tuple(map(jnp.asarray, narrow)), jnp.asarray(index, jnp.int32), jnp.asarray(y), units)


def take(data: Data, at) -> Data:
  """The observations `at` (indices or a mask), on the same grids: training and test sets of one `observe`."""
  return dataclasses.replace(data, index=data.index[at], y=data.y[at])


def require_same_grids(data: Data, test: Data | None) -> None:
  """Raises InputError for a test set that is no `Data`, or whose indices are not places on the training set's grids."""
  if test is None:
    return
  require(isinstance(test, Data), f"the test set is a {type(test).__name__}; make it with observe and take")
  known = lambda grid: not isinstance(grid, jax.core.Tracer)
  same = len(data.grids) == len(test.grids) and data.units == test.units
  for a, b in zip(data.grids, test.grids, strict=False):
    same = same and a.shape == b.shape and not (known(a) and known(b) and np.any(np.asarray(a) != np.asarray(b)))
  require(
    same,
    "the test set lies on other grids, or in other units, than the training set; observe all data once and split them "
    "with take, or predict at the test coordinates",
  )


def numbers(name, values) -> np.ndarray:
  """float64 on the host: coordinates such as Unix seconds do not fit into float32."""
  require(not np.iscomplexobj(values), f"{name} are complex; give real numbers")
  try:
    values = np.asarray(values, np.float64)
  except (TypeError, ValueError) as error:
    raise InputError(f"{name} are no numbers ({error}); give an array of floats, dates as seconds or days") from None
  require(
    bool(np.isfinite(values).all()),
    f"{name} has {int((~np.isfinite(values)).sum())} NaN or infinite values; drop those observations",
  )
  return values
