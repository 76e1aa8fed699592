"""The figures."""

from pathlib import Path

from experiments import figures
from experiments.cache_craft.methods import FULL, NAIVE, OURS

_BEST = "as cached, best variant"
_STYLES = {  # of what is a point: the same in every figure
  _BEST: ("v", "C2"),
  "random": ("^", "C3"),
  "most attended": ("D", "C4"),
  "first tokens": ("<", "C5"),
  "tokens stop early": (">", "C6"),
  "new chunks count": ("p", "C7"),
}


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  """{file: caption}."""
  files = {}
  for model, found in metrics.get("facts", {}).items():
    figure, (left, right) = figures.subplots(2)
    _curves(left, found["rows"], "right", 100)
    left.set(xlabel="moved tokens computed again, %", ylabel="answers right, %", ylim=(0, 104))
    left.legend(fontsize=7, loc="lower right")
    right.plot(found["deviation"]["cfo"], found["deviation"]["off"], ".", ms=4)
    right.set(xlabel="CFO, alpha 1", ylabel="distance of cached values, relative")
    files[figures.save(figure, workdir, "facts")] = (
      f"{model}: questions about facts, most of them cut in two; dotted: full prefill. Right: every cached variant of "
      "every chunk of a prompt."
    )
  if "passages" in metrics:
    figure, axes = figures.subplots(len(metrics["passages"]), squeeze=False)
    for axis, (model, found) in zip(axes[0], metrics["passages"].items(), strict=True):
      _curves(axis, found["rows"], "kl", 1)
      axis.set(
        title=model, xlabel="moved tokens computed again, %", ylabel="KL of the answer's tokens, nats", ylim=(0, None)
      )
      axis.legend(fontsize=7)
    files[figures.save(figure, workdir, "passages")] = "Real passages: divergence of predictions from a full prefill's"
  for model, found in metrics.get("trace", {}).items():
    figure, axis = figures.subplots(width=1.3)
    layers = found["layers"]
    axis.barh([*layers][::-1], [100 * share for share in layers.values()][::-1], color="C0")
    for i, name in enumerate([*layers][::-1]):
      if name in found["ours"]:
        axis.text(100 * layers[name] + 1, i, f"{100 * found['ours'][name]['right']:.0f} % right", va="center", size=8)
    axis.set(xlabel="token-layers computed, % of full prefills")
    files[figures.save(figure, workdir, "trace")] = f"{model}: requests one after the other, chunks by Zipf's law"
  return files


def _curves(axis, rows: list[dict], value: str, factor: float) -> None:
  """Cache-Craft over its alphas from nothing computed again on, CacheBlend over its shares, the others as points."""
  family = lambda kind: sorted(
    (100 * row["share"], factor * row[value]) for row in rows if row["method"].partition(" ")[0] == kind
  )
  by_name = {row["method"]: (100 * row["share"], factor * row[value]) for row in rows}
  axis.plot(*zip(by_name[_BEST], *family(OURS), strict=True), "o-", label=OURS)  # alpha 0 is the best variant
  if len(family("CacheBlend")) > 0:
    axis.plot(*zip(*family("CacheBlend"), strict=True), "s-", label="CacheBlend")
  for name, (marker, colour) in _STYLES.items():
    if name in by_name:
      axis.plot(*by_name[name], marker, color=colour, label=name)
  axis.plot(*by_name[NAIVE], "x", color="k", label=NAIVE)
  if value == "right":
    axis.axhline(factor * next(row[value] for row in rows if row["method"] == FULL), color="grey", ls=":")
