"""Figures of the BOWS experiment."""

from pathlib import Path

import numpy as np

from experiments import figures
from jaxlab.tensors import bows_data as data


def draw_synthetic(matrices: list, workdir: Path) -> str:
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
  leave_room(left)
  left.legend(fontsize=8, loc="upper right")
  right.legend(fontsize=8, loc="upper left")
  return figures.save(figure, workdir, "interference")


def leave_room(axis, share: float = 0.3) -> None:
  """Room for a legend above the data."""
  low, high = axis.get_ylim()
  axis.set_ylim(low, high + share * (high - low))


def draw_mechanism(mechanism: dict, workdir: Path) -> str:
  figure, (left, right) = figures.subplots(2)
  for label, density in mechanism["density"].items():
    left.stairs(density, mechanism["bins"], fill=True, alpha=0.6, label=label)
  left.axvline(mechanism["alone"], color="black", ls="--", lw=1, label="word alone")
  left.axvline(0, color="black", lw=0.8)
  left.set(xlabel="pre-activation p_v", ylabel="density")
  left.set_title(f'"{mechanism["word"]}", m = {mechanism["latent"]}')
  left.legend(fontsize=8)
  for i, (name, related, tower) in enumerate(mechanism["towers"]):
    right.bar(
      np.arange(len(tower)) + 0.27 * i - 0.27, list(tower.values()), 0.25, label=f'"{name}": {", ".join(related)}'
    )
  right.set_xticks(range(len(tower)), list(tower))
  right.axhline(0, color="black", lw=0.8)
  right.set(ylabel="contribution to p_v", title="What a pre-activation is made of")
  leave_room(right, 0.45)
  right.legend(fontsize=8, title="word: its 4 related words", title_fontsize=8, loc="upper right")
  return figures.save(figure, workdir, "mechanism")


def draw_cycle(cycle: dict, ring: list, workdir: Path) -> str:
  ring = np.asarray(ring)
  figure, (left, right) = figures.subplots(2)
  for name, row in cycle["models"].items():
    left.plot(range(1, 7), np.mean(row["lags"], axis=0), "o-", label=f"columns, {name}")
  left.plot(range(1, 7), cycle["data_lags"], "k:", label="indicators in the text")
  left.set(xlabel="calendar lag", ylabel="mean cosine / correlation", title="Months")
  leave_room(left)
  left.legend(fontsize=8, loc="upper right", ncols=2)
  closed = np.concatenate([ring, ring[:1]])
  right.plot(*closed.T, "-", color="0.8", lw=1)
  right.scatter(*ring.T, c=np.arange(12), cmap="twilight", edgecolors="0.4", linewidths=0.6)
  for name, point in zip(data.MONTHS, ring, strict=True):
    right.annotate(name[:3], point, fontsize=8, xytext=(3, 3), textcoords="offset points")
  right.set(title=f"Plane of the columns, wd 1, ring score {cycle['models']['wd1']['ring'][0]}", xticks=[], yticks=[])
  return figures.save(figure, workdir, "months")
