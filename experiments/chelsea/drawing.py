"""The figures of the experiment."""

from pathlib import Path

from experiments import figures
from experiments.chelsea.decoders import DENSE
from experiments.chelsea.quality import SEEN
from experiments.long_context import draw_answers


def pictures(config, metrics: dict, titles: dict[str, str], workdir: Path) -> dict[str, str]:
  """{file: caption} of what there is."""
  files = {}
  if "losses" in metrics:
    caption = "Loss behind a prompt over dense attention's, by the share of entries that stay; rivals of as many bytes"
    files[_losses(config, metrics["losses"], titles, workdir)] = caption
  if "questions" in metrics:
    rows = [row for rows in metrics["questions"].values() for row in rows]
    titles = titles | {f"snapkv, {SEEN}": f"SnapKV, {SEEN}"}
    files[draw_answers(rows, workdir, titles)] = "Answers right, with 95 % intervals"
  if "mergings" in metrics:
    caption = "Divergence from dense predictions by the way of merging, with its standard error"
    files[_mergings(metrics["mergings"], workdir)] = caption
  if "similarity" in metrics:
    files[_similarity(metrics["similarity"], workdir)] = "Likeness of two keys of a head by their distance"
  if "speed" in metrics:
    files[_speed(metrics["speed"], workdir)] = "Time of a decoding step through one layer"
  return files


def _losses(config, found: dict, titles, workdir: Path) -> str:
  figure, axes = figures.subplots(len(found), squeeze=False)
  for axis, (model, rows) in zip(axes[0], found.items(), strict=True):
    dense = next(row["loss"] for row in rows if row["decoder"] == DENSE)
    share = lambda row, dense=dense: (row["entries"], 100 * row["difference"] / dense, 100 * row["error"] / dense)
    mine = [share(row) for row in rows if row["decoder"].startswith("Chelsea")]
    x, y, error = zip(*sorted(mine), strict=True)
    axis.errorbar(x, y, error, fmt="o-", label="Chelsea", capsize=2)
    for i, row in enumerate(row for row in rows if row["decoder"] in titles):
      x, y, error = share(row)
      axis.errorbar([x], [y], [error], fmt="sv^D"[i % 4], color=f"C{1 + i}", label=titles[row["decoder"]], capsize=2)
    axis.axhline(0, color="grey", lw=0.8)
    axis.set(title=model, xlabel="share of the entries that stay", ylabel="loss over dense, %")
    axis.legend(fontsize=8)
  return figures.save(figure, workdir, "losses")


def _mergings(by_model: dict, workdir: Path) -> str:
  (found,) = by_model.values()
  figure, axis = figures.subplots(width=1.4)
  names = sorted(found, key=lambda name: -found[name]["kl"])
  kl, error = ([found[name][key] for name in names] for key in ("kl", "error"))
  colours = ["C1" if name == "Chelsea" else "C0" for name in names]
  axis.barh(names, kl, xerr=error, color=colours, error_kw=dict(lw=0.8))
  axis.set(xlabel="KL(dense || merged) of a prediction, nats")
  axis.tick_params(axis="y", labelsize=8)
  return figures.save(figure, workdir, "mergings")


def _similarity(found: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  for i, (model, row) in enumerate(found.items()):
    label = f"{model}: {row['within']:.0%} nearest within a chunk"
    axis.plot(row["distances"], row["cosine"], "o-", ms=3, color=f"C{i}", label=label)
    axis.plot(row["distances"], row["unrotated"], "--", color=f"C{i}", label=f"{model}, before rotation")
  axis.set(xscale="log", xlabel="tokens apart", ylabel="mean cosine of two keys")
  axis.legend(fontsize=7)
  return figures.save(figure, workdir, "similarity")


def _speed(found: dict, workdir: Path) -> str:
  figure, axes = figures.subplots(len(found["steps"]), squeeze=False)
  for axis, case in zip(axes[0], found["steps"], strict=True):
    axis.bar(list(case["milliseconds"]), list(case["milliseconds"].values()))
    axis.set(title=f"{case['rows']} rows of {case['context']} tokens", ylabel="milliseconds a step")
  return figures.save(figure, workdir, "speed")
