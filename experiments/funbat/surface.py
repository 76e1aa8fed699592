"""A known surface: is it learned from scattered points, and what does the way of interpolating cost?"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures
from experiments.results import Claim
from jaxlab.tensors import funbat, matern
from jaxlab.tensors.funbat import Settings


def points(seed: int):
  """sin(2 pi x)^2 cos(2 pi x) * exp(-2 y) sin(1.5 pi y) on six random 15 x 15 grids; half of them to train."""
  rng = np.random.default_rng(seed)
  grids = [np.stack(np.meshgrid(rng.uniform(size=15), rng.uniform(size=15)), -1).reshape(-1, 2) for _ in range(6)]
  at = rng.permutation(np.concatenate(grids))
  y = factor(0, at[:, 0]) * factor(1, at[:, 1])
  half = len(at) // 2
  return (at[:half], y[:half]), (at[half:], y[half:])


def factor(mode: int, x):
  if mode == 0:
    return np.sin(2 * np.pi * x) ** 2 * np.cos(2 * np.pi * x)
  return np.exp(-2 * x) * np.sin(1.5 * np.pi * x)


def measure(config) -> dict:
  """Errors on unseen points by rule of interpolation, coverage, and the factor functions on a fine grid.

  The authors' settings but for the order: with all messages before all smoothers many starts never converge.
  """
  (at, y), (new, target) = points(config.seed)
  kernel = dict(kernel="matern32", lengthscale=0.1, variance=0.5)
  settings = Settings(rank=1, model="cp", damping=(0.1, 0.2, 0.0), scan=config.funbat.scan, **kernel)
  data = funbat.observe(at, y, units=funbat.RAW)
  fit = jax.jit(lambda key: funbat.fit(data, settings, key, epochs=config.surface.epochs)[0])
  state = fit(jax.random.key(config.seed))
  predict = jax.jit(functools.partial(funbat.predict, settings=settings), static_argnames="rule")
  result = {"std": float(np.std(target))}
  for rule in matern.RULES:
    mean, variance = predict(state, data, jnp.asarray(new, data.y.dtype), rule=rule)
    error = np.asarray(mean) - target
    result[rule] = {
      "rmse": float(np.sqrt(np.mean(error**2))),
      "mae": float(np.mean(np.abs(error))),
      "coverage_95": float(np.mean(np.abs(error) < 1.96 * np.sqrt(np.asarray(variance)))),
    }
  fine, result["curves"] = jnp.linspace(0, 1, 80), []
  factor_at = jax.jit(functools.partial(funbat.factor_at, settings=settings), static_argnames="k")
  for k in range(2):
    mean, cov = factor_at(state, data, fine, k=k)
    truth = factor(k, np.asarray(fine))
    # A factor is known up to a scale, which the other one undoes.
    scale = float(truth @ mean[:, 0] / (mean[:, 0] @ mean[:, 0]))
    curve = (fine, truth, scale * mean[:, 0], abs(scale) * cov[:, 0, 0] ** 0.5)
    result["curves"].append([np.asarray(a).tolist() for a in curve])
  return result


def claims(result: dict) -> list[Claim]:
  return [
    Claim(
      "Error at unseen points of a known surface (root mean square)", "", "lower", ours=result["markov"]["rmse"],
      threshold=0.006, paper=0.004, baseline=result["std"],
      note="paper: the authors' notebook; baseline: the standard deviation. The authors' way to join neighbours gives "
      f"{result['merge']['rmse']:.4f}",
    )
  ]  # fmt: skip


def draw(result: dict, workdir: Path) -> dict[str, str]:
  figure, axes = figures.subplots(2)
  for axis, (x, truth, mean, std), name in zip(axes, result["curves"], ("x", "y"), strict=True):
    mean, std = np.asarray(mean), np.asarray(std)
    axis.plot(x, mean, label="posterior mean")
    axis.fill_between(x, mean - 2 * std, mean + 2 * std, alpha=0.3, lw=0)
    axis.plot(x, truth, "k--", lw=1, label="truth")
    axis.set(xlabel=name, title=f"u({name}), rank 1, Matern-3/2")
  axes[0].legend()
  return {figures.save(figure, workdir, "surface"): "Factor functions of a known surface, two standard deviations"}
