"""The figures of the experiment."""

from pathlib import Path

import numpy as np

from experiments import figures
from experiments.chunkllm.decoders import DENSE
from experiments.long_context import draw_answers


def pictures(metrics: dict, workdir: Path) -> dict[str, str]:
  """{file: caption} of what there is."""
  files = {}
  if "losses" in metrics:
    caption = "Loss behind a prompt over dense attention's, by the share of the tokens that is read"
    files[_losses(metrics["losses"], workdir)] = caption
  if "questions" in metrics:
    rows = [row for rows in metrics["questions"].values() for row in rows]
    files[draw_answers(rows, workdir)] = "Answers right, with 95 % intervals"
  if "consistency" in metrics:
    caption = "Overlap of the chunks that consecutive tokens attend to most, layer by layer"
    files[_consistency(metrics["consistency"], workdir)] = caption
  if "speed" in metrics:
    files[_speed(metrics["speed"], workdir)] = "Speed-up of a decoding step by the share of the cache that is read"
  return files


def _losses(found: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(len(found), squeeze=False)
  for axis, (model, rows) in zip(axes[0], found.items(), strict=True):
    dense = next(row["loss"] for row in rows if row["decoder"] == DENSE)
    point = lambda row, dense=dense: (row["read"], 100 * row["difference"] / dense, 100 * row["error"] / dense)
    x, y, error = zip(*sorted(point(row) for row in rows if row["decoder"].startswith("ChunkLLM")), strict=True)
    axis.errorbar(x, y, error, fmt="o-", label="ChunkLLM", capsize=2)
    others = [row for row in rows if row["decoder"] != DENSE and not row["decoder"].startswith("ChunkLLM")]
    for i, row in enumerate(others):
      x, y, error = point(row)
      axis.errorbar([x], [y], [error], fmt="sv^D<P>"[i % 7], color=f"C{1 + i % 5}", label=row["decoder"], capsize=2)
    axis.axhline(0, color="grey", lw=0.8)
    axis.set(title=model, xlabel="share of the tokens that is read", ylabel="loss over dense, %")
    axis.legend(fontsize=8)
  return figures.save(figure, workdir, "losses")


def _consistency(found: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(len(found), squeeze=False, width=0.8)
  for axis, (model, row) in zip(axes[0], found.items(), strict=True):
    for values, label in zip(row["layers"], ("within a chunk", "across its end"), strict=True):
      axis.plot(np.arange(1, len(values) + 1), values, "o-", ms=3, label=label)
    axis.set(title=model, xlabel="layer", ylabel="overlap (Jaccard)", ylim=(0, 1))
    axis.legend(fontsize=8)
  return figures.save(figure, workdir, "consistency")


def _speed(found: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  points = sorted((row["read"], row["speedup"]) for row in found["keeps"].values())
  read, speedup = zip(*points, strict=True)
  x = found["cache_bytes"] / found["weight_bytes"]
  axis.plot([100 * r for r in read], speedup, "o-", label="measured")
  axis.plot([100 * r for r in read], [(1 + x) / (1 + r * x) for r in read], "--", label="what the bytes allow")
  axis.set(xlabel="share of the cache that is read, %", ylabel=f"speed-up over dense ({found['best']})")
  axis.legend(fontsize=8)
  return figures.save(figure, workdir, "speed")
