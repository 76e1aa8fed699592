"""Nexus (arXiv 2507.06608): prefill and decode side by side on one GPU, each on a share of its processors.

A model of the two phases' seconds, a search for the split that it says is best, and hysteresis. What runs on the split
is not here: `serving.simulator` has two lanes, `policies.nexus_time` takes turns.

  machine = Machine(864e9, prefill=fit_curves(samples), decode=fit_curves(others))
  load = Load.of(config, prefill=work, decode=others_work)
  split = control(Split(), load, kv_used=0.4, machine=machine)        # split.prefill percent of the processors

R_p, R_d are percent, R_p + R_d = 100. r = R / 100.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import least_squares

from jaxlab.core.checks import require
from jaxlab.models.config import TransformerConfig
from jaxlab.serving.cost import OPERATORS, Volumes, Work, volumes

PREFILL, DECODE = 0, 1
_CHUNK, _ROWS = OPERATORS.index("chunk_attention"), OPERATORS.index("row_attention")
_NOTHING = Work(0, 0, 0)


class Curves(NamedTuple):
  """How the operators of a phase gain from processors, one number each.

  Attributes:
    peak: C, operations a second that all processors would do if each did as much as the first ones do.
    knee: R_sat, the share up to which they do; slope: lambda, what a processor beyond it does, as a share.
    reach: the share from which an operator draws the whole bandwidth, in proportion below; 0 as published, where T_mem
      depends on no share.
  """

  peak: Float[Array, "7"]
  knee: Float[Array, "7"]
  slope: Float[Array, "7"]
  reach: Float[Array, "7"] = np.zeros(7)


class Machine(NamedTuple):
  """bandwidth: bytes a second; prefill, decode: the operators of either phase."""

  bandwidth: float
  prefill: Curves
  decode: Curves


class Load(NamedTuple):
  """What the lanes run next: volumes of the operators, zero where a lane is empty."""

  prefill: Volumes
  decode: Volumes

  @classmethod
  def of(cls, config: TransformerConfig, *, prefill: Work = _NOTHING, decode: Work = _NOTHING) -> "Load":
    """Of a chunk, and of rows that decode."""
    return cls(volumes(config, prefill), volumes(config, decode))


class Settings(NamedTuple):
  """Of the controller.

  Attributes:
    alpha: slack of the prefill where decode has the priority; beta: of the decode where the prefill has it. Both are
      of the phase that has NOT the priority, times its seconds on all processors.
    switch: share of the cache in use from which decode has the priority; band: so much below the prefill gets it back.
    delta: a split that differs by no more from the one applied last is not applied.
    guard: percent that a lane has at least; step: splits are multiples of it.
    contention: the reading of keys and values shares the bandwidth with the prefill; window: as in `decode_seconds`.
  """

  alpha: float = 1.3
  beta: float = 1.1
  switch: float = 0.70
  band: float = 0.0
  delta: int = 5
  guard: int = 10
  step: int = 1
  contention: bool = True
  window: bool = False


class Split(NamedTuple):
  """prefill: R_p that the lanes run with; found: R_p at which the next search starts; mode: the phase with priority."""

  prefill: int = 50
  found: int = 50
  mode: int = PREFILL


def compute_seconds(flops, share, peak, knee, slope):
  """T_comp = c / (C r) up to r = R_sat, then c / (C [R_sat + lambda (r - R_sat)])."""
  return flops / (peak * (jnp.minimum(share, knee) + slope * jnp.maximum(share - knee, 0)))


def phase_operators(load: Volumes, share, curves: Curves, bandwidth) -> Float[Array, "7"]:
  """max(T_comp, T_mem) of every operator of a phase that has the memory for itself."""
  compute = compute_seconds(load.flops, share, curves.peak, curves.knee, curves.slope)
  return jnp.maximum(compute, load.bytes / (bandwidth * reached(share, curves)))


def reached(share, curves: Curves) -> Float[Array, "7"]:
  """What share of the bandwidth operators draw from a share of the processors."""
  return jnp.minimum(1, share / jnp.maximum(curves.reach, 1e-6))


def prefill_seconds(load: Load, share, machine: Machine) -> Float[Array, ""]:
  """T_prefill(r): the sum over operators."""
  return phase_operators(load.prefill, share, machine.prefill, machine.bandwidth).sum()


def decode_seconds(
  load: Load, share, machine: Machine, *, prefill_share, contention=True, window=False
) -> Float[Array, ""]:
  """T_decode(r), whose attention reads m_d bytes of keys and values beside a prefill on `prefill_share`.

  P_attn = T_prefill^attn / T_prefill;  bytes of the prefill's attention m_p1, of its products m_p2;
  BW_dec = BW [ P_attn m_d / (m_d + m_p1) + (1 - P_attn) m_d / (m_d + m_p2) ],  T_mem = m_d / BW_dec.

  Args:
    contention: False: BW_dec = BW.
    window: m_d of as many decode steps as fit beside the prefill's step, in the shares.
  """
  alone = phase_operators(load.decode, share, machine.decode, machine.bandwidth)
  prefill = phase_operators(load.prefill, prefill_share, machine.prefill, machine.bandwidth)
  whole = prefill.sum()
  attention = jnp.where(whole > 0, prefill[_CHUNK] / jnp.where(whole > 0, whole, 1), 0)
  read = load.decode.bytes[_ROWS]
  beside, dense = load.prefill.bytes[_CHUNK], load.prefill.bytes.sum() - load.prefill.bytes[_CHUNK]
  steps = jnp.where(window, jnp.maximum(whole / jnp.maximum(alone.sum(), 1e-12), 1), 1)
  ours = jnp.where(read > 0, read * steps, 1)
  part = attention * ours / (ours + beside) + (1 - attention) * ours / (ours + dense)
  memory = read / (machine.bandwidth * reached(share, machine.decode)[_ROWS] * jnp.where(contention, part, 1))
  return alone.sum() - alone[_ROWS] + jnp.maximum(alone[_ROWS], memory)


def seconds_of(phase: int | Int[Array, ""], percent, load: Load, machine: Machine, settings: Settings):
  """Of a step of a phase that has so many percent, the other phase having the rest but at least the guard.

  So also for 100 percent: what the slacks are relative to is the same traffic on all processors.
  """
  share = percent / 100
  other = jnp.maximum(100 - percent, settings.guard) / 100
  how = dict(contention=settings.contention, window=settings.window)
  decode = decode_seconds(load, share, machine, prefill_share=other, **how)
  return jnp.where(phase == PREFILL, prefill_seconds(load, share, machine), decode)


@jax.jit
def greedy_split(load: Load, current, phase, machine: Machine, settings: Settings):
  """Algorithm 1: percent for the phase with priority, from `current` percent on.

  It gives percent up while the other phase exceeds its slack, then takes percent as long as the other does not.

  Returns:
    (R of that phase, how often a cost was evaluated).
  """
  other, slack = 1 - phase, jnp.where(phase == PREFILL, settings.beta, settings.alpha)
  limit = slack * seconds_of(other, 100.0, load, machine, settings)
  fits = lambda mine: seconds_of(other, 100.0 - mine, load, machine, settings) <= limit
  low, high = settings.guard, 100 - settings.guard
  start = jnp.clip(jnp.asarray(current, jnp.int32), low, high)

  def fewer(state):
    mine, _, count = state
    return mine - 1, (mine - 1 <= low) | fits(mine - 1), count + 1

  def more(state):
    mine, _, count = state
    grows = fits(mine + 1)
    return mine + grows, ~grows, count + 1

  first = start, (start <= low) | fits(start), jnp.asarray(2, jnp.int32)
  mine, _, count = jax.lax.while_loop(lambda s: ~s[1], fewer, first)
  mine, _, count = jax.lax.while_loop(lambda s: ~s[1] & (s[0] < high), more, (mine, jnp.bool_(False), count))
  return mine, count


def greedy_search(other: Callable[[int], float], current: int, *, slack: float, guard: int) -> int:
  """As `greedy_split`, for any cost: `other` gives the seconds of the phase without priority on so many percent."""
  limit, mine = slack * other(100), min(max(current, guard), 100 - guard)
  while mine > guard and other(100 - mine) > limit:
    mine -= 1
  while mine < 100 - guard and other(100 - (mine + 1)) <= limit:
    mine += 1
  return mine


@jax.jit
def brute_split(load: Load, phase, machine: Machine, settings: Settings):
  """The best of all splits, the largest of equals; the guard where none keeps the other phase within its slack."""
  percent = jnp.arange(1, 100)
  cost = jax.vmap(lambda phase, percent: seconds_of(phase, percent, load, machine, settings), (None, 0))
  mine, others = cost(phase, percent), cost(1 - phase, 100 - percent)
  slack = jnp.where(phase == PREFILL, settings.beta, settings.alpha)
  allowed = (others <= slack * seconds_of(1 - phase, 100.0, load, machine, settings)) & (percent >= settings.guard)
  objective = jnp.where(allowed & (percent <= 100 - settings.guard), mine, jnp.inf)
  best = percent[::-1][jnp.argmin(objective[::-1])]
  return jnp.where(jnp.isfinite(objective.min()), best, settings.guard)


def greedy(load: Load, current: int, phase: int, machine: Machine, settings: Settings) -> int:
  """`greedy_split` as a `search` of `control`."""
  return int(greedy_split(load, current, phase, machine, settings)[0])


def priority(mode: int, kv_used: float, settings: Settings) -> int:
  """PREFILL below `switch` of the cache in use, else DECODE, which keeps it until `switch - band`."""
  return PREFILL if kv_used < settings.switch - settings.band * (mode == DECODE) else DECODE


def control(
  split: Split,
  load: Load,
  kv_used: float,
  machine: Machine,
  settings: Settings = Settings(),
  *,
  search: Callable[[Load, int, int, Machine, Settings], int] = greedy,
) -> Split:
  """A tick of the controller: the split after it. The lanes take it on at their own next steps.

  Args:
    load: of now; what the slacks are relative to depends on it.
    search: gives the percent of the phase with priority; `brute_split` agrees where costs are monotone.

  Raises:
    InputError: settings out of range.
  """
  _check(settings)
  mode = priority(split.mode, kv_used, settings)
  mine = search(load, split.found if mode == PREFILL else 100 - split.found, mode, machine, settings)
  found = mine if mode == PREFILL else 100 - mine
  if abs(found - split.prefill) <= settings.delta:
    return Split(split.prefill, found, mode)
  rounded = settings.step * round(found / settings.step)
  return Split(min(max(rounded, settings.guard), 100 - settings.guard), found, mode)


@functools.lru_cache(maxsize=64)
def _check(settings: Settings) -> None:
  s = settings
  require(s.alpha >= 1 and s.beta >= 1, f"alpha is {s.alpha} and beta {s.beta}; a slack is at least 1")
  require(0 < s.guard < 50, f"guard is {s.guard}; it must lie between 0 and 50 percent")
  require(0 <= s.delta < 100 and 1 <= s.step <= 50, f"delta is {s.delta} and step {s.step}; expected percent")
  require(0 <= s.band <= s.switch <= 1, f"switch is {s.switch} and band {s.band}; expected 0 <= band <= switch <= 1")


class Sample(NamedTuple):
  """A timed operator: its volume, the share of the processors it ran on, its seconds."""

  flops: float
  bytes: float
  share: float
  seconds: float


def fit_curves(samples: dict[str, list[Sample]], *, peak: float, bandwidth: float, memory: bool = False) -> Curves:
  """C, R_sat and lambda of every operator, each by least squares of relative errors.

  C is no larger than `peak`: small batches do not reach it. An operator without samples gets `peak`, gained linearly.

  Args:
    memory: `Curves.reach` is found too, which is not the paper's.

  Raises:
    InputError: an unknown operator, fewer than three samples of one, or a time or a share out of range.
  """
  unknown = sorted(samples.keys() - set(OPERATORS))
  require(not unknown, f"operators {', '.join(unknown)} are unknown; they are {', '.join(OPERATORS)}")
  rows = [
    _fit_one(name, np.array(samples[name], float), peak, bandwidth, memory)
    if samples.get(name)
    else (peak, 1.0, 1.0, 0.0)
    for name in OPERATORS
  ]
  return Curves(*np.array(rows).T)


def _fit_one(name: str, samples: np.ndarray, peak: float, bandwidth: float, memory: bool) -> np.ndarray:
  require(len(samples) >= 3, f"{name} has {len(samples)} samples; at least 3 are needed")
  flops, bytes_, share, seconds = samples.T
  require(bool((seconds > 0).all()), f"a time of {name} is not positive")
  require(bool(((share > 0) & (share < 1 + 1e-9)).all()), f"a share of {name} is not in 0 < share <= 1")

  def missed(theta):
    efficiency, knee, slope, *reach = theta
    compute = peak * efficiency * (np.minimum(share, knee) + slope * np.maximum(share - knee, 0))
    drawn = bandwidth * (np.minimum(1, share / reach[0]) if reach else 1.0)
    return np.log(np.maximum(flops / compute, bytes_ / drawn) / seconds)

  # The sum of squares has kinks where an operator begins to wait for memory, and valleys beside the best knee.
  starts = [
    (efficiency, knee, slope, *reach)
    for efficiency in (0.9, 0.3)
    for knee in (0.2, 0.45, 0.7)
    for slope in (0.2, 0.7)
    for reach in ([(0.2,), (0.5,)] if memory else [()])
  ]
  bounds = (1e-3, 0.1, 0.0, 1e-3)[: 3 + memory], (1.0, 1.0, 1.0, 1.0)[: 3 + memory]
  best = min((least_squares(missed, start, bounds=bounds) for start in starts), key=lambda found: found.cost).x
  return np.array([peak * best[0], *best[1:], *([] if memory else [0.0])])
