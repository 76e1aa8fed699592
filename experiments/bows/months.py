"""The months of a text: do their columns form a ring?"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments import figures
from experiments.bows.training import pick, rising, train_grid
from experiments.results import Claim
from jaxlab.tensors import bows
from jaxlab.tensors import bows_data as data


def measure(config, words: dict, rows: list, console) -> dict:
  """Correlation by lag in windows of 20 rows; cosine by lag, ring score and plane of the models' columns."""
  d, t = config.data, config.train
  counts = {m: sum(words[m] in row for row in rows) if m in words else 0 for m in data.MONTHS}
  if min(counts.values()) < 5:
    console.say("months: some are in fewer than 5 rows of this text; the cycle is not measured")
    return {"rows_with_month": counts}
  features, index = len(words), np.array([words[m] for m in data.MONTHS])
  bits = data.or_rows(data.pack_rows(rows, features), np.arange(len(rows) - d.cycle_group + 1), d.cycle_group)
  options = dict(features=features, steps=t.steps, batch=t.batch, rate=t.rate, seeds=t.cycle_seeds)
  grid, _ = train_grid(jnp.asarray(bits), jnp.asarray(t.weight_decays), latent=t.cycle_latent, **options)
  chosen = np.unpackbits(bits, axis=1, count=features)
  result = {
    "rows_with_month": counts,
    "data_lags": bows.lag_curve(bows.indicator_correlation(chosen, index)).tolist(),
    "one_hot_plane": bows.indicator_plane(chosen, index).tolist(),
    "spectral_ring": bows.ring_score(spectral_columns(bows.indicator_correlation(chosen, index))),
    "models": {},
  }
  roman = [words[w] for w in data.ROMAN if w in words]
  for i, decay in enumerate(t.weight_decays):
    each = [pick(grid, i, seed)["W"] for seed in range(t.cycle_seeds)]
    cosines = [bows.unit_columns(w[:, index]).T @ bows.unit_columns(w[:, index]) for w in each]
    norms = lambda which, each=each: [bows.offdiagonal_norm(bows.gram({"W": w}, np.array(which))) for w in each]
    result["models"][f"wd{decay:g}"] = {
      "lags": [bows.lag_curve(c).tolist() for c in cosines],
      "ring": [bows.ring_score(w[:, index]) for w in each],
      "offdiagonal_months": norms(index),
      "offdiagonal_roman": norms(roman) if len(roman) > 1 else [],
    }
  main = list(t.weight_decays).index(1.0)
  columns = bows.unit_columns(pick(grid, main, 0)["W"][:, index])
  return result | {"plane": np.asarray(bows.plane(columns.T)[0]).tolist()}


def spectral_columns(correlation: np.ndarray, dimensions: int = 3) -> np.ndarray:
  """Columns whose inner products are the correlation's best of rank 3: what co-occurrence alone gives."""
  values, vectors = np.linalg.eigh(correlation)
  return (vectors[:, -dimensions:] * np.sqrt(np.maximum(values[-dimensions:], 0))).T


def claims(config, cycle: dict) -> list[Claim]:
  """Nothing where the text has no months."""
  if "models" not in cycle:
    return []
  lags, rings = np.array(cycle["models"]["wd1"]["lags"]), cycle["models"]["wd1"]["ring"]
  first = [float(np.mean(row["lags"], axis=0)[0]) for row in cycle["models"].values()]
  show = lambda values: ", ".join(f"{v:.3f}" for v in values)
  return [
    Claim(
      "Cosine of neighbouring months over that of months four to six apart, worst seed", "x", "higher",
      ours=float((lags[:, 0] / lags[:, 3:].mean(axis=1)).min()), threshold=1.5, baseline="1: no ring",
      note=f"m = {config.train.cycle_latent}; cosine at lags 1 to 6: {show(lags.mean(axis=0))}; in the text "
      f"{show(cycle['data_lags'])}; ring scores {rings} of 12, chance 2.2, of the text's own correlations "
      f"{cycle['spectral_ring']}; the cosine at lag 1 rises with decay in {rising(first):.0%} of steps",
    )
  ]  # fmt: skip


def draw(cycle: dict, workdir: Path) -> dict[str, str]:
  ring = np.asarray(cycle["plane"])
  figure, (left, right) = figures.subplots(2)
  for name, row in cycle["models"].items():
    left.plot(range(1, 7), np.mean(row["lags"], axis=0), "o-", label=f"columns, {name}")
  left.plot(range(1, 7), cycle["data_lags"], "k:", label="indicators in the text")
  left.set(xlabel="calendar lag", ylabel="mean cosine / correlation", title="Months")
  figures.leave_room(left)
  left.legend(fontsize=8, loc="upper right", ncols=2)
  closed = np.concatenate([ring, ring[:1]])
  right.plot(*closed.T, "-", color="0.8", lw=1)
  right.scatter(*ring.T, c=np.arange(12), cmap="twilight", edgecolors="0.4", linewidths=0.6)
  for name, point in zip(data.MONTHS, ring, strict=True):
    right.annotate(name[:3], point, fontsize=8, xytext=(3, 3), textcoords="offset points")
  right.set(title=f"Plane of the columns, wd 1, ring score {cycle['models']['wd1']['ring'][0]}", xticks=[], yticks=[])
  caption = "Months: cosine by calendar lag, and the plane of their columns"
  return {figures.save(figure, workdir, "months"): caption}
