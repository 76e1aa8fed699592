"""Synthetic features on a circle and their controls: what W'W owes to the covariance, by latent size and decay."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures
from experiments.bows.training import pick, rising, train_grid
from experiments.overlap import overlapped
from experiments.results import Claim
from jaxlab.tensors import bows
from jaxlab.tensors import bows_data as data

DECAYS = (0.0, 1.0, 6.0)
# Models beside the tied one with ReLU output and linear latent, all with decay 1.
BASELINES = {"untied": dict(tied=False), "BCE": dict(loss="bce"), "ReLU latent": dict(hidden="relu")}
# Off-diagonal correlation of Gram and covariance, circular data, ReLU, by (latent, decay): a reference computed apart.
REFERENCE = {
  (4, 0.0): 0.652, (4, 1.0): 0.808, (4, 6.0): 0.986,
  (6, 0.0): 0.482, (6, 1.0): 0.587, (6, 6.0): 0.994,
  (8, 0.0): 0.345, (8, 1.0): 0.440, (8, 6.0): 0.998,
}  # fmt: skip


def measure(config, console) -> dict:
  """{"structures": losses and correlation of Gram and covariance by latent and decay, "grams": of the circle}."""
  s = config.synthetic
  x = {name: data.synthetic(name)[:8000] for name in data.STRUCTURES}
  # A second shuffle tells what the first one's sampling noise is.
  x["shuffled"], again = (np.random.default_rng(seed).permuted(x["circular"], axis=0) for seed in (0, 1))
  other = jnp.cov(jnp.asarray(again.T, jnp.float32), bias=True)
  jobs = [(name, m) for name in x for m in (s.latents if name == "circular" else s.latents[1:2])]
  measured = overlapped(lambda job: measure_structure(s, *job, x[job[0]], other), jobs)
  result, grams = {}, []
  for (name, m), (row, matrices) in zip(jobs, console.track("synthetic", measured), strict=True):
    result.setdefault(name, {})[f"m{m}"] = row
    grams += matrices
  return {"structures": result, "grams": grams}


def measure_structure(s, name: str, m: int, x, other) -> tuple[dict, list]:
  """One structure and latent size: ({model: figures}, [(model, latent, Gram of W / ||W||)] of the circle)."""
  bits, dense = jnp.asarray(np.packbits(x, axis=1)), jnp.asarray(x, jnp.float32)
  covariance, every = jnp.cov(dense.T, bias=True), len(x) // 256
  options = dict(features=12, steps=s.epochs * every, batch=256, rate=1e-2, seeds=s.seeds)
  train = functools.partial(train_grid, bits, latent=m, clip=1.0, every=every, bound=12**-0.5, **options)
  models = {"linear": (dict(output="linear"), (0.0,)), "ReLU": ({}, DECAYS)}
  if (name, m) == ("circular", s.latents[1]):
    models |= {kind: (variant, (1.0,)) for kind, variant in BASELINES.items()}
  row, grams = {"pca": float(bows.pca(dense).loss(m))}, []
  for kind, (variant, decays) in models.items():
    params, _ = train(jnp.array(decays), **variant)
    forward = {"latent": variant.get("hidden", "linear"), "output": variant.get("output", "relu")}
    for i, decay in enumerate(decays):
      each = [pick(params, i, seed) for seed in range(s.seeds)]
      if kind == "ReLU" and decay == 1.0 and len(models) > 2:
        row["random W"] = figures_of([matched_random(p, seed) for seed, p in enumerate(each)], dense, covariance)
      key = f"{kind} wd{decay:g}"
      row[key] = figures_of(each, dense, covariance, loss=variant.get("loss", "mse"), **forward)
      if name == "shuffled":
        row[key]["other_shuffle"] = float(np.mean([bows.offdiagonal_correlation(bows.gram(p), other) for p in each]))
      if name == "circular" and kind in ("linear", "ReLU"):
        grams.append((key, m, np.asarray(bows.gram(each[0]) / jnp.sum(each[0]["W"] ** 2)).tolist()))
  if name == "circular":
    grams.append(("covariance", 0, np.asarray(covariance).tolist()))
  return row, grams


def figures_of(models: list, x, covariance, *, loss="mse", **forward) -> dict:
  """Means over seeds: loss, correlation of the responses to single features with the covariance, ring score."""
  mean = lambda values: float(np.mean(list(values)))
  response = lambda p: (
    bows.preactivation(p, jnp.eye(x.shape[1]), latent=forward.get("latent", "linear")).T - p["b"][:, None]
  )
  return dict(
    mse=mean(bows.loss_function(p, x, loss="mse_sigmoid" if loss == "bce" else loss, **forward) for p in models),
    correlation=mean(bows.offdiagonal_correlation(response(p), covariance) for p in models),
    ring=mean(bows.ring_score(p["W"]) for p in models),
  )


def matched_random(params: dict, seed: int) -> dict:
  """Columns of the same norms in random directions, and the same biases."""
  w = jax.random.normal(jax.random.key(seed), params["W"].shape)
  return {"W": bows.unit_columns(w) * jnp.linalg.norm(params["W"], axis=0), "b": params["b"]}


def claims(structures: dict) -> list[Claim]:
  circular = structures["circular"]
  found = {
    key: circular[f"m{key[0]}"][f"ReLU wd{key[1]:g}"]["correlation"] for key in REFERENCE if f"m{key[0]}" in circular
  }
  others = {n: row["ReLU wd1"]["correlation"] for n, rows in structures.items() for row in [rows.get("m4", {})] if row}
  first = circular["m2"]
  names = (*BASELINES, "random W")
  beside = {key: row for rows in circular.values() for key, row in rows.items() if key.split(" wd")[0] in names}
  ordered = [
    rising([row[f"ReLU wd{decay:g}"]["correlation"] for decay in DECAYS]) for m, row in circular.items() if m != "m2"
  ]
  linear = max(row["linear wd0"]["mse"] / row["pca"] for m, row in circular.items() if m != "m4")
  show = lambda values: ", ".join(f"{name} {value:.3f}" for name, value in values.items())
  return [
    Claim(
      "Largest distance of the correlation of Gram and covariance on a circle from the reference table", "", "lower",
      ours=max(abs(value - REFERENCE[key]) for key, value in found.items()), threshold=0.1, baseline="the table",
      note=show({f"m {m} decay {decay:g}:": value for (m, decay), value in found.items()})
      + f"; rises with decay in {np.mean(ordered):.0%} of steps; baselines, m 4: "
      + show({key: row["correlation"] for key, row in beside.items()}),
    ),
    Claim(
      "Loss of two latent dimensions with ReLU on a circle over the PCA optimum", "x", "lower",
      ours=first["ReLU wd0"]["mse"] / first["pca"], threshold=1.0, baseline="PCA",
      note=f"the linear autoencoder reaches {linear:.3f} of PCA's loss at worst",
    ),
    Claim(
      "Correlation of Gram and covariance on a column-shuffled circle, over that on the circle", "x", "lower",
      ours=abs(others["shuffled"]) / abs(others["circular"]), threshold=0.5, baseline=others["circular"],
      note=show(others) + ", four dimensions; against the covariance of another shuffle of the same samples, whose "
      f"sampling noise is its own: {structures['shuffled']['m4']['ReLU wd1']['other_shuffle']:.2f}; ring score "
      f"{structures['shuffled']['m4']['ReLU wd1']['ring']:.1f} of 12, circle {circular['m4']['ReLU wd1']['ring']:.1f}, "
      "chance 2.2",
    ),
  ]  # fmt: skip


def draw(matrices: list, workdir: Path) -> dict[str, str]:
  grams = {(kind, m) if m else kind: np.asarray(matrix) for kind, m, matrix in matrices}
  kinds = ("linear wd0", "ReLU wd0", "ReLU wd1", "ReLU wd6")
  latents = sorted({key[1] for key in grams if key != "covariance"})
  size = (1.7 * len(latents) + 1.9, 7.2)
  figure, axes = figures.plt.subplots(len(kinds), len(latents) + 1, figsize=size, layout="constrained")
  off = ~np.eye(12, dtype=bool)
  shown = {(level, column): grams[kind, m] for level, kind in enumerate(kinds) for column, m in enumerate(latents, 1)}
  shown[0, 0] = grams["covariance"]
  for place, axis in np.ndenumerate(axes):
    if place not in shown:
      axis.set_axis_off()
      continue
    matrix = shown[place]
    # Every panel over its largest entry off the diagonal, which is left grey.
    scaled = np.ma.masked_array(matrix / np.abs(matrix[off]).max(), ~off)
    image = axis.imshow(scaled, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set(xticks=[], yticks=[], facecolor="0.75")
    axis.grid(False)
    alike = np.corrcoef(matrix[off], grams["covariance"][off])[0, 1]
    axis.set_xlabel("" if place == (0, 0) else f"correlation {alike:.2f}", fontsize=9)
  for axis, name in zip(axes[0], ("covariance", *(f"m = {m}" for m in latents)), strict=True):
    axis.set_title(name, fontsize=10)
  for axis, kind in zip(axes[:, 1], kinds, strict=True):
    axis.set_ylabel(kind)
  bar = axes[1, 0].inset_axes([0.05, 0.75, 0.9, 0.08])
  figure.colorbar(image, cax=bar, orientation="horizontal", ticks=(-1, 0, 1), label="entry / largest\noff the diagonal")
  caption = "Covariance of circular features, and the Gram matrices of W / ||W||"
  return {figures.save(figure, workdir, "synthetic"): caption}
