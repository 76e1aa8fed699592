"""Real words: interference of present and absent ones, R2, geometry, clusters, and what a pre-activation is made of."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import figures, results
from experiments.bows.training import average, pick, rising, train_grid
from experiments.overlap import overlapped
from experiments.results import Claim
from jaxlab.tensors import bows
from jaxlab.tensors import bows_data as data


def measure(config, words: dict, rows: list, workdir: Path, console) -> dict:
  """{"windows", "active_words", "latents": figures in sample, held out and of column-shuffled data, "mechanism",
  "geometry"}."""
  d, t, features = config.data, config.train, len(words)

  @functools.cache
  def windows():
    packed = data.pack_rows(rows, features)
    train_at, held_at = data.block_split(len(rows), group=d.group, block=d.block)
    return {"train": data.or_rows(packed, train_at, d.group), "held_out": data.or_rows(packed, held_at, d.group)}

  @functools.cache
  def shuffled():
    """The same marginals, no correlation."""
    return {name: data.shuffle_columns(bits, features, i) for i, (name, bits) in enumerate(windows().items())}

  @functools.cache
  def correlation():
    dense = np.unpackbits(windows()["held_out"], axis=1, count=features).astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
      return np.nan_to_num(np.corrcoef(dense.T))

  def describe():
    active = np.unpackbits(windows()["train"], axis=1, count=features).sum(1).mean()
    return {"windows": {name: len(bits) for name, bits in windows().items()}, "active_words": float(active)}

  def measure(m):
    row, params = measure_latent(config, m, features, windows(), shuffled(), correlation())
    middle = m == sorted(t.latents)[len(t.latents) // 2]
    return row, explain(params, windows()["held_out"], correlation(), words) if middle else None

  result = results.part(workdir, "text", describe)
  if not all(results.has_part(workdir, f"text.{m}") for m in t.latents):
    shuffled(), correlation()  # once, before the threads
  keep = lambda m: results.part(workdir, f"text.{m}", lambda: measure(m))
  measured = list(console.track("words", overlapped(keep, list(t.latents))))
  result["latents"] = {f"{m}": row for m, (row, _) in zip(t.latents, measured, strict=True)}
  strengths = lambda m: measure_geometry(t, m, features, jnp.asarray(windows()["train"]))
  shrink = overlapped(lambda m: results.part(workdir, f"geometry.{m}", lambda: strengths(m)), list(t.latents))
  result["geometry"] = {f"{m}": row for m, row in zip(t.latents, console.track("geometry", shrink), strict=True)}
  return result | {"mechanism": next(mechanism for _, mechanism in measured if mechanism)}


def measure_geometry(t, m: int, features: int, bits) -> dict[str, float]:
  """||G - diag(G)||_F / tr G by nominal weight decay, mean over seeds.

  What decay does grows with rate x decay x steps. A run shorter than the paper's gets that much more decay.
  """
  decays = jnp.array(t.weight_decays) * (t.paper_steps / t.steps)
  grid, _ = train_grid(
    bits, decays, latent=m, features=features, steps=t.steps, batch=t.batch, rate=t.rate, seeds=t.seeds
  )
  mean = lambda i: float(np.mean([relative_offdiagonal(pick(grid, i, seed)) for seed in range(t.seeds)]))
  return {f"wd{decay:g}": mean(i) for i, decay in enumerate(t.weight_decays)}


def measure_latent(config, m: int, features: int, windows, shuffled, correlation) -> tuple[dict, dict]:
  """One latent size: its figures, mean over seeds, and the parameters with decay 1 and the first seed."""
  t = config.train
  options = dict(features=features, steps=t.steps, batch=t.batch, rate=t.rate, seeds=t.seeds)
  sets = jnp.asarray(np.stack([windows["train"], shuffled["train"]]))
  grid, _ = train_grid(sets, jnp.ones(2), jnp.arange(2), latent=m, **options)
  per_seed = []
  for seed in range(t.seeds):
    params = pick(grid, 0, seed)
    inside, outside = (bows.evaluate(params, windows[name], features) for name in ("train", "held_out"))
    alone = np.asarray(bows.one_hot_r2(params))
    per_seed.append(
      {
        "train": scalars(inside),
        "held_out": scalars(outside),
        "shuffled_held_out": scalars(bows.evaluate(pick(grid, 1, seed), shuffled["held_out"], features)),
        "one_hot_r2": float(np.mean(alone)),
        "gap": {"train": context_gap(inside, alone), "held_out": context_gap(outside, alone)},
      }
    )
  models = {"natural": pick(grid, 0, 0), "shuffled": pick(grid, 1, 0)}
  clusters = {name: cluster_correlation(params, correlation) for name, params in models.items()}
  return average(per_seed) | {"clusters": clusters}, models["natural"]


def explain(params: dict, bits, correlation: np.ndarray, words: dict) -> dict:
  """The three words that context helps most, among those in at least 1 % of the held-out windows."""
  names, features = list(words), len(words)
  statistics = bows.evaluate(params, bits, features)
  x = np.unpackbits(bits, axis=1, count=features)
  gap = statistics["r2"] - np.asarray(bows.one_hot_r2(params))
  common = (x.mean(0) > 0.01) & np.isfinite(gap)
  common = common if common.any() else np.isfinite(gap)
  targets = np.argsort(-np.where(common, gap, -np.inf))[:3]
  v, w = int(targets[0]), np.asarray(params["W"])
  p = x @ (w.T @ w[:, v]) + np.asarray(params["b"])[v]
  # The same bins for both, so that the densities compare.
  bins = np.linspace(*np.percentile(p, [0.1, 99.9]), 50)
  density = lambda present: np.histogram(p[x[:, v] == present], bins, density=True)[0].tolist()
  result = {
    "word": names[v],
    "latent": len(w),
    "bins": bins.tolist(),
    "density": {"word absent": density(0), "word present": density(1)},
    "alone": float(bows.gram_row(params, v)[v] + params["b"][v]),
    "towers": [],
  }
  for target in targets:
    ranked = [u for u in np.argsort(-correlation[target]) if u != target]
    middle = np.argsort(np.abs(correlation[target]))[:4]
    tower = bows.towers(params, int(target), {"4 related": ranked[:4], "4 unrelated": middle.tolist()})
    result["towers"].append([names[target], [names[u] for u in ranked[:4]], tower])
  return result


def scalars(statistics: dict) -> dict:
  return {name: float(value) for name, value in statistics.items() if np.ndim(value) == 0}


def context_gap(statistics: dict, alone: np.ndarray) -> dict:
  """Mean over words of R2 in windows minus R2 of the word alone, and its Spearman with the interference received."""
  gap = statistics["r2"] - alone
  known = np.isfinite(gap) & np.isfinite(statistics["received"])
  spearman = scipy.stats.spearmanr(gap[known], statistics["received"][known]).statistic
  return {"mean": float(gap[known].mean()), "spearman": float(spearman), "words": int(known.sum())}


def relative_offdiagonal(params: dict) -> float:
  """||G - diag(G)||_F / tr G."""
  g = bows.gram(params)
  return bows.offdiagonal_norm(g) / float(jnp.trace(g))


def cluster_correlation(params: dict, correlation: np.ndarray, clusters: int = 30) -> dict:
  """Held-out correlation of word pairs in one cluster of columns, and in two."""
  clusters = min(clusters, len(correlation) // 4)
  labels = np.asarray(bows.spherical_clusters(params["W"], jax.random.key(0), clusters=clusters))
  within, between = bows.within_and_between(correlation, labels)
  return {"within": within, "between": between}


def claims(config, text: dict) -> list[Claim]:
  """Interference, what it does to R2, geometry against decay and size, clusters; all held out."""
  latents = text["latents"]
  difference = lambda s: s["interference_present"] - s["interference_absent"]
  small = {m: r for m, r in latents.items() if int(m) / config.data.vocabulary <= 0.1}
  natural = {m: difference(r["held_out"]) for m, r in small.items()}
  control = {m: difference(r["shuffled_held_out"]) for m, r in small.items()}
  listed = lambda values: ", ".join(f"{v:.3f} at m = {m}" for m, v in values.items())
  worst = min(natural, key=lambda m: natural[m] / max(abs(control[m]), 1e-9))
  order = [difference(r["held_out"]) for r in latents.values()]
  within = {m: r["held_out"]["interference_within"] for m, r in latents.items()}
  chance = {m: r["shuffled_held_out"]["interference_within"] for m, r in latents.items()}
  gap = {m: r["gap"]["held_out"]["mean"] for m, r in latents.items()}
  rank = {m: r["gap"]["held_out"]["spearman"] for m, r in latents.items()}
  geometry = text["geometry"]
  falling = [rising([-g[f"wd{decay:g}"] for g in geometry.values()]) for decay in config.train.weight_decays]
  last, row = list(latents.items())[-1]
  contrast = {kind: c["within"] - c["between"] for kind, c in row["clusters"].items()}
  strength = f"{config.train.steps} steps at {config.train.rate:g}"
  return [
    Claim(
      "Interference that present words receive less what absent ones do, held out, worst small latent", "", "higher",
      ours=min(natural.values()), threshold=0.05, baseline=f"column-shuffled text {max(control.values()):.3f}",
      note=f"m / d <= 0.1: {listed(natural)}; column-shuffled {listed(control)}",
    ),
    Claim(
      "How many times that in column-shuffled text the interference of present over absent words is, worst latent",
      "x", "higher", ours=natural[worst] / max(abs(control[worst]), 1e-9), threshold=5.0,
      baseline="column-shuffled text",
      note=f"least at m = {worst}; the control keeps the marginals, so what frequent words are fed remains in it. "
      f"The difference taken word by word: {listed(within)}; column-shuffled {listed(chance)}",
    ),
    Claim(
      "Share of steps to a larger latent at which the interference of present over absent words falls", "", "higher",
      ours=rising([-v for v in order]), threshold=1.0, baseline="all",
      note=", ".join(f"{v:.3f}" for v in order) + f"; {strength}",
    ),
    Claim(
      "R2 of windows less that of single words, held out, worst latent", "", "higher", ours=min(gap.values()),
      threshold=0.0, baseline="single words",
      note="; ".join(
        f"m = {m}: {gap[m]:+.3f}, windows {r['held_out']['mean_r2']:.2f} (in sample {r['train']['mean_r2']:.2f}), one "
        f"word {r['one_hot_r2']:.2f}"
        for m, r in latents.items()
      ),
    ),
    Claim(
      "Rank correlation of what windows add to a word's R2 with the interference it receives, worst latent", "",
      "higher", ours=min(rank.values()), threshold=0.3, baseline="none", note=listed(rank),
    ),
    Claim(
      "Share of steps to a larger weight decay at which the Gram matrix' part off the diagonal grows", "", "higher",
      ours=float(np.mean([rising(list(g.values())) for g in geometry.values()])), threshold=1.0, baseline="all",
      note="||G - diag G|| / tr G; "
      + "; ".join(f"m = {m}: " + ", ".join(f"{v:.3f} at {wd}" for wd, v in g.items()) for m, g in geometry.items())
      + f"; falls with m in {np.mean(falling):.0%} of steps; {strength}, decay times {config.train.paper_steps} / "
      f"{config.train.steps}, so that rate x decay x steps is the paper's",
    ),
    Claim(
      "How many times as large the contrast of correlation within and between clusters is as in column-shuffled text",
      "x", "higher", ours=contrast["natural"] / max(abs(contrast["shuffled"]), 1e-9), threshold=5.0,
      baseline=contrast["shuffled"],
      note=f"held-out correlation of words, k-means of their columns at m = {last}: {contrast['natural']:.4f}",
    ),
  ]  # fmt: skip


def draw(text: dict, workdir: Path) -> dict[str, str]:
  caption = "Interference of present and absent words; R2 of windows and of single words"
  drawn = {draw_interference(text, workdir): caption}
  if "mechanism" in text:
    drawn[draw_mechanism(text["mechanism"], workdir)] = "One word's pre-activation, and what three words' are made of"
  return drawn


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
  figures.leave_room(left)
  left.legend(fontsize=8, loc="upper right")
  right.legend(fontsize=8, loc="upper left")
  return figures.save(figure, workdir, "interference")


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
  figures.leave_room(right, 0.45)
  right.legend(fontsize=8, title="word: its 4 related words", title_fontsize=8, loc="upper right")
  return figures.save(figure, workdir, "mechanism")
