"""How Newton's iteration over depth converges in a trained network, by surrogate: the exact Jacobian is the oracle."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments import figures
from experiments.results import Claim
from experiments.text import Text
from jaxlab.core.checks import require
from jaxlab.data import packing
from jaxlab.depth import snlp
from jaxlab.models import Transformer
from jaxlab.models.attention import dot_product_attention

# Flash attention has no forward derivative, which the exact Jacobian takes.
_ATTENTION = functools.partial(dot_product_attention, flash=False)


def measure(config, text: Text, models: dict[str, Transformer], console) -> dict:
  """{model: {surrogate: {"residuals": ||r|| before every step, "errors": of the last state after 0, 1, .. steps}}}.

  Both over the norm of the sequential states, which solve the system; r as in `newton.solve`.
  """
  c, e = config.convergence, config.eval
  require(c.iterations >= 2, f"convergence.iterations is {c.iterations}; two steps or more show how it converges")
  rows = packing.evaluation_batches(text.split(e.split), row=e.length, batch=c.rows, limit=c.rows * e.length)
  tokens = jnp.asarray(rows[0]["inputs"])
  norm = lambda a: float(jnp.linalg.norm(a.astype(jnp.float32)))

  @jax.jit
  def sequential(model):
    h0, states, side = model.trace(tokens, attention=_ATTENTION)
    start = model.depth - c.layers
    return (states[start - 1] if start else h0), states[start:], side

  @functools.partial(jax.jit, static_argnames="surrogate")
  def step(model, h, side, z, surrogate):
    options = dict(layers=c.layers, iterations=1, surrogate=surrogate, attention=_ATTENTION, key=jax.random.key(0))
    solution = snlp.solve(model, h, side, initial=z, **options)
    return solution.trace[1:], solution.residuals[0]

  result = {name: {} for name in models}
  for name, model in models.items():
    h, exact, side = sequential(model)
    for surrogate in console.track(f"following Newton's iteration, {name}", c.surrogates):
      z = jnp.broadcast_to(h, exact.shape)
      errors, residuals = [norm(z[-1] - exact[-1])], []
      for _ in range(c.iterations):
        z, residual = step(model, h, side, z, surrogate)
        errors.append(norm(z[-1] - exact[-1]))
        residuals.append(float(residual))
      result[name][surrogate] = {
        "residuals": [r / norm(exact) for r in residuals],
        "errors": [e / norm(exact[-1]) for e in errors],
      }
  return result


def claims(measured: dict) -> list[Claim]:
  """The closer A is to the Jacobian, the smaller the error: full Newton ahead of A = I, A = 0 (Jacobi) behind it."""
  made = []
  for surrogate, better, words in (
    ("exact", "lower", "the exact Jacobian"),
    ("jacobi", "higher", "no Jacobian (A = 0)"),
  ):
    # Two layers are exact after two steps.
    ratios = {
      name: found[surrogate]["errors"][2] / max(found["identity"]["errors"][2], 1e-9)
      for name, found in measured.items()
    }
    ours = (max if better == "lower" else min)(ratios.values())
    made.append(
      Claim(
        f"Error after two Newton steps with {words} over that with A = I, worst model", "ratio", better,
        ours=ours, threshold=1.0, baseline="A = I",
        note=", ".join(f"{name} {value:.2g}" for name, value in ratios.items()),
      )
    )  # fmt: skip
  return made


def draw(measured: dict, workdir: Path) -> dict[str, str]:
  figure, axes = figures.subplots(len(measured), squeeze=False, sharey=True)
  for axis, (name, found) in zip(axes[0], measured.items(), strict=True):
    for surrogate, rows in found.items():
      axis.plot(range(len(rows["errors"])), rows["errors"], "o-", label=f"A: {surrogate}")
    axis.set(title=f"{name} model", xlabel="Newton steps", yscale="log")
    axis.set_xticks(range(len(rows["errors"])))
    axis.legend()
  axes[0][0].set_ylabel("||z - h|| / ||h|| of the last state")
  return {figures.save(figure, workdir, "convergence"): "Error of the last state after each Newton step, by surrogate"}
