"""Figures of the BOWS experiment."""

from pathlib import Path

import numpy as np

from experiments import figures
from jaxlab.tensors import bows
from jaxlab.tensors import bows_data as data


def draw_synthetic(grams: dict, workdir: Path) -> str:
  kinds = ("linear wd0", "ReLU wd0", "ReLU wd1", "ReLU wd6")
  latents = sorted({key[1] for key in grams if key != "covariance"})
  figure, axes = figures.plt.subplots(
    len(kinds), len(latents) + 1, figsize=(1.7 * len(latents) + 1.7, 6.8), layout="constrained"
  )
  off = ~np.eye(12, dtype=bool)
  for level, (row, kind) in enumerate(zip(axes, kinds, strict=True)):
    for axis, name in zip(row, ["covariance", *latents], strict=True):
      matrix = grams["covariance"] if name == "covariance" else grams[kind, name]
      limit = np.abs(matrix[off]).max()
      axis.imshow(np.where(off, matrix, np.nan), cmap="RdBu_r", vmin=-limit, vmax=limit)
      axis.set(xticks=[], yticks=[])
      axis.grid(False)
      if level == 0:
        axis.set_title("covariance" if name == "covariance" else f"m = {name}", fontsize=10)
    row[0].set_ylabel(kind)
  return figures.save(figure, workdir, "synthetic")


def draw_interference(text: dict, workdir: Path) -> str:
  figure, (left, right) = figures.subplots(2)
  latents = [int(m) for m in text["latents"]]
  rows = list(text["latents"].values())
  for kind, label, style in (("held_out", "real windows", "-"), ("shuffled_held_out", "columns shuffled", ":")):
    for group, colour in (("present", "#0072B2"), ("absent", "#D55E00")):
      values = [row[kind][f"interference_{group}"] for row in rows]
      left.plot(latents, values, "o" + style, color=colour, label=f"{label}, {group} words")
  left.axhline(0, color="black", lw=0.8)
  left.set(xlabel="latent size m", ylabel="interference, held out", xscale="log", title="Interference a word receives")
  for kind, label in (("train", "windows, in sample"), ("held_out", "windows, held out")):
    right.plot(latents, [row[kind]["mean_r2"] for row in rows], "o-", label=label)
  right.plot(latents, [row["one_hot_r2"] for row in rows], "o-", label="single words")
  right.set(xlabel="latent size m", ylabel="mean R2 over words", xscale="log", title="Reconstruction")
  for axis in (left, right):
    axis.set_xticks(latents, latents)
    axis.minorticks_off()
    axis.legend(fontsize=8)
  return figures.save(figure, workdir, "interference")


def draw_mechanism(models: dict, windows: dict, words: dict, workdir: Path) -> str:
  """The three words that context helps most, among those in at least 1 % of the windows."""
  names, features = list(words), len(words)
  params = models[sorted(models)[len(models) // 2]]
  statistics = bows.evaluate(params, windows["train"], features)
  x = np.unpackbits(windows["train"], axis=1, count=features)
  gap = statistics["r2"] - np.asarray(bows.one_hot_r2(params))
  common = (x.mean(0) > 0.01) & np.isfinite(gap)
  common = common if common.any() else np.isfinite(gap)
  targets = np.argsort(-np.where(common, gap, -np.inf))[:3]
  figure, (left, right) = figures.subplots(2)
  v = int(targets[0])
  p = np.asarray(x @ np.asarray(params["W"]).T @ np.asarray(params["W"])[:, v] + params["b"][v])
  # The same bins for both, so that the densities compare.
  bins = np.linspace(*np.percentile(p, [0.1, 99.9]), 50)
  for present, label in ((0, "word absent"), (1, "word present")):
    left.hist(p[x[:, v] == present], bins=bins, density=True, alpha=0.6, label=label)
  alone = float(bows.gram_row(params, v)[v] + params["b"][v])
  left.axvline(alone, color="black", ls="--", lw=1, label="word alone")
  left.axvline(0, color="black", lw=0.8)
  left.set(xlabel="pre-activation p_v", ylabel="density", title=f'"{names[v]}", m = {params["W"].shape[0]}')
  left.legend(fontsize=8)
  for i, target in enumerate(targets):
    ranked = [u for u in np.argsort(-windows["correlation"][target]) if u != target]
    middle = np.argsort(np.abs(windows["correlation"][target]))[:4]
    tower = bows.towers(params, int(target), {"4 related": ranked[:4], "4 unrelated": middle.tolist()})
    right.bar(np.arange(len(tower)) + 0.27 * i - 0.27, list(tower.values()), 0.25, label=f'"{names[target]}"')
  right.set_xticks(range(len(tower)), list(tower))
  right.axhline(0, color="black", lw=0.8)
  right.set(ylabel="contribution to p_v", title="What a pre-activation is made of")
  right.legend(fontsize=8)
  return figures.save(figure, workdir, "mechanism")


def draw_cycle(cycle: dict, ring: np.ndarray, workdir: Path) -> str:
  figure, (left, right) = figures.subplots(2)
  for name, row in cycle["models"].items():
    left.plot(range(1, 7), np.mean(row["lags"], axis=0), "o-", label=f"columns, {name}")
  left.plot(range(1, 7), cycle["data_lags"], "k:", label="indicators in the text")
  left.set(xlabel="calendar lag", ylabel="mean cosine / correlation", title="Months")
  left.legend(fontsize=8)
  closed = np.concatenate([ring, ring[:1]])
  right.plot(*closed.T, "-", color="0.8", lw=1)
  right.scatter(*ring.T, c=np.arange(12), cmap="twilight")
  for name, point in zip(data.MONTHS, ring, strict=True):
    right.annotate(name[:3], point, fontsize=8, xytext=(3, 3), textcoords="offset points")
  right.set(title=f"Plane of the columns, wd 1, ring score {cycle['models']['wd1']['ring'][0]}", xticks=[], yticks=[])
  return figures.save(figure, workdir, "months")
