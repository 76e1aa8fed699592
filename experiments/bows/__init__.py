"""BOWS: superposition of real words and of synthetic circles; interference, R2, cycles, clusters, value coding."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import results
from experiments.bows import claims as claims
from experiments.bows import figures as pictures
from experiments.bows import value_coding
from experiments.overlap import overlapped
from experiments.results import Report
from jaxlab.core.checks import require, require_choice
from jaxlab.core.foreign import foreign, lines
from jaxlab.data import corpora
from jaxlab.tensors import bows
from jaxlab.tensors import bows_data as data

DECAYS = (0.0, 1.0, 6.0)
VARIANT = ("output", "loss", "hidden", "tied")
# Synthetic models beside the tied one with ReLU output and linear latent, all with decay 1.
BASELINES = {"untied": dict(tied=False), "BCE": dict(loss="bce"), "ReLU latent": dict(hidden="relu")}


def run(config, workdir: Path, cache: Path, console) -> Report:
  check_config(config)
  cities = load_cities(config)
  words, rows = load_text(config, cache)
  console.say(f"{config.data.name}: {len(rows)} rows, {len(words)} words")
  part = functools.partial(results.part, workdir)
  synthetic, grams = part("synthetic", lambda: measure_synthetic(config, console))
  text, mechanism = measure_text(config, words, rows, workdir, console)
  cycle, ring = part("cycle", lambda: measure_cycle(config, words, rows, console))
  coding = part("value_coding", lambda: measure_value_coding(config, cities))
  metrics = dict(synthetic=synthetic, text=text, cycle=cycle, value_coding=coding)
  files = {
    pictures.draw_synthetic(grams, workdir): "Covariance of circular features, and the Gram matrices of W / ||W||",
    pictures.draw_interference(text, workdir): "Interference of present and absent words; R2 of windows and of single "
    "words",
    pictures.draw_mechanism(mechanism, workdir): "One word's pre-activation, and what three words' are made of",
  }
  if ring is not None:
    files[pictures.draw_cycle(cycle, ring, workdir)] = "Months: cosine by calendar lag, and the plane of their columns"
  return Report(metrics, claims.make_claims(config, metrics), files)


def check_config(config) -> None:
  for m in (*config.train.latents, config.train.cycle_latent):
    require(m >= 1, f"latent is {m}; it must be at least 1")
  require(1.0 in config.train.weight_decays, "train.weight_decays must hold 1.0, the decay of the mechanism")


def load_text(config, cache: Path) -> tuple[dict[str, int], list[list[int]]]:
  """The vocabulary and the paragraphs' word sets; months, numerals and the like are forced in where they occur."""
  d = config.data
  documents = corpora.documents(d.name, split=d.split, cache=cache, path=d.path)
  texts: list[str] = []
  for i in range(len(documents)):
    texts += data.paragraphs(documents[i])
    if len(texts) >= d.rows:
      break
  texts = texts[: d.rows]
  seen = {t for row in texts for t in data.tokens(row)}
  forced = [w for w in (*data.WEEKDAYS, *data.MONTHS, *data.PLANETS, *data.ROMAN) if w in seen]
  words = data.vocabulary(texts, size=d.vocabulary, seed=42, forced=forced, share=1.0 if len(texts) < 1e5 else 0.2)
  return words, data.encode_rows(texts, words)


@functools.partial(
  jax.jit, static_argnames=("features", "latent", "steps", "batch", "rate", "seeds", "clip", "every", "bound", *VARIANT)
)
def train_grid(
  bits, decays, which=None, *, features, latent, steps, batch, rate, seeds, clip=None, every=1, bound=None, tied=True,
  **variant,
):  # fmt: skip
  """Trained parameters and last losses for every (decay, seed), in one compiled scan.

  Args:
    which: with several data sets of one size, `bits` (sets, n, bytes): the one that each decay is for.
    variant: output, loss, latent of `bows.train`, the last as `hidden`.
  """
  options = {("latent" if name == "hidden" else name): value for name, value in variant.items()}

  def one(data, decay, seed):
    params = bows.init_params(jax.random.key(seed), features=features, latent=latent, bound=bound, tied=tied)
    settings = dict(clip=clip, schedule_every=every, seed=seed, **options)
    return bows.train(
      params, data, features=features, steps=steps, batch=batch, rate=rate, weight_decay=decay, **settings
    )

  over_seeds = lambda data, decay: jax.vmap(lambda seed: one(data, decay, seed))(jnp.arange(seeds))
  if which is None:
    return jax.vmap(lambda decay: over_seeds(bits, decay))(decays)
  return jax.vmap(lambda decay, at: over_seeds(bits[at], decay))(decays, which)


def pick(params: dict, *index) -> dict:
  return jax.tree.map(lambda a: a[index], params)


def measure_synthetic(config, console) -> tuple[dict, list]:
  """Algorithm B on every structure: losses and correlation of Gram and covariance, by latent and decay; the Grams."""
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
  return result, grams


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


def scalars(statistics: dict) -> dict:
  return {name: float(value) for name, value in statistics.items() if np.ndim(value) == 0}


def measure_text(config, words: dict, rows: list, workdir: Path, console) -> tuple[dict, dict]:
  """Algorithm A on windows of a few rows, in sample, held out and on column-shuffled data; what three words are."""
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
  return result, next(mechanism for _, mechanism in measured if mechanism)


def measure_latent(config, m: int, features: int, windows, shuffled, correlation) -> tuple[dict, dict]:
  """One latent size: its figures, mean over seeds, and the parameters with decay 1 and the first seed."""
  t, main = config.train, list(config.train.weight_decays).index(1.0)
  options = dict(features=features, steps=t.steps, batch=t.batch, rate=t.rate, seeds=t.seeds)
  sets = jnp.asarray(np.stack([windows["train"], shuffled["train"]]))
  decays, which = jnp.array([*t.weight_decays, 1.0]), jnp.array([*[0] * len(t.weight_decays), 1])
  grid, _ = train_grid(sets, decays, which, latent=m, **options)
  per_seed = []
  for seed in range(t.seeds):
    params = pick(grid, main, seed)
    inside, outside = (bows.evaluate(params, windows[name], features) for name in ("train", "held_out"))
    alone = np.asarray(bows.one_hot_r2(params))
    per_seed.append(
      {
        "train": scalars(inside),
        "held_out": scalars(outside),
        "shuffled_held_out": scalars(bows.evaluate(pick(grid, -1, seed), shuffled["held_out"], features)),
        "one_hot_r2": float(np.mean(alone)),
        "gap": {"train": context_gap(inside, alone), "held_out": context_gap(outside, alone)},
      }
    )
  geometry = {
    f"wd{decay:g}": float(np.mean([relative_offdiagonal(pick(grid, i, seed)) for seed in range(t.seeds)]))
    for i, decay in enumerate(t.weight_decays)
  }
  models = {"natural": pick(grid, main, 0), "shuffled": pick(grid, -1, 0)}
  clusters = {name: cluster_correlation(params, correlation) for name, params in models.items()}
  return average(per_seed) | {"geometry": geometry, "clusters": clusters}, models["natural"]


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


def context_gap(statistics: dict, alone: np.ndarray) -> dict:
  """Mean over words of R2 in windows minus R2 of the word alone, and its Spearman with the interference received."""
  gap = statistics["r2"] - alone
  known = np.isfinite(gap) & np.isfinite(statistics["received"])
  spearman = scipy.stats.spearmanr(gap[known], statistics["received"][known]).statistic
  return {"mean": float(gap[known].mean()), "spearman": float(spearman), "words": int(known.sum())}


def average(trees: list[dict]) -> dict:
  return jax.tree.map(lambda *values: float(np.mean(values)), *trees)


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


def measure_cycle(config, words: dict, rows: list, console) -> tuple[dict, list | None]:
  """Months in windows of 20 rows: correlation by lag in the data, cosine by lag and ring score in the models."""
  d, t = config.data, config.train
  counts = {m: sum(words[m] in row for row in rows) if m in words else 0 for m in data.MONTHS}
  if min(counts.values()) < 5:
    console.say("months: some are in fewer than 5 rows of this text; the cycle is not measured")
    return {"rows_with_month": counts}, None
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
  return result, np.asarray(bows.plane(columns.T)[0]).tolist()


def spectral_columns(correlation: np.ndarray, dimensions: int = 3) -> np.ndarray:
  """Columns whose inner products are the correlation's best of rank 3: what co-occurrence alone gives."""
  values, vectors = np.linalg.eigh(correlation)
  return (vectors[:, -dimensions:] * np.sqrt(np.maximum(values[-dimensions:], 0))).T


def load_cities(config) -> np.ndarray:
  """(latitude, longitude, population) of cities above 50,000 people; generated ones fill a box the size of the US."""
  c = config.cities
  require_choice("config.cities.name", c.name, ("generated", "csv"))
  if c.name == "csv":
    require(
      Path(c.path).is_file(), f"no file {c.path!r}; give --config.cities.path, lines of latitude,longitude,population"
    )
    with foreign(c.path, "every line is latitude,longitude,population"):
      table = np.loadtxt([line for _, line in lines(Path(c.path))], delimiter=",", ndmin=2)
    require(
      table.shape[1] == 3 and bool(np.isfinite(table).all()),
      f"{c.path} has {table.shape[1]} columns or no finite number in one; every line is latitude,longitude,population",
    )
    table = table[table[:, 2] > 50_000]
    require(len(table) >= 30, f"{c.path} has {len(table)} cities above 50,000 people; at least 30 are needed")
    return table
  random = np.random.default_rng(config.seed)
  n = c.count
  return np.stack([random.uniform(26, 48, n), random.uniform(-122, -70, n), random.pareto(1.1, n) * 5e4 + 5e4], 1)


def measure_value_coding(config, cities: np.ndarray) -> dict:
  """Accuracy of the octant, R2 of the probe on unseen cities, and accuracy with the probe's plane removed or alone."""
  c = config.cities
  random = np.random.default_rng(42)
  n = len(cities)
  first, second = random.integers(0, n, c.pairs), random.integers(0, n - 1, c.pairs)
  second = np.where(second >= first, second + 1, second)
  at = lambda index: jnp.asarray(cities[index, :2].T)
  labels = value_coding.octant(value_coding.bearing(*at(first), *at(second)))
  cut = int(0.8 * c.pairs)
  trained, _ = value_coding.train(
    value_coding.init_params(jax.random.key(42), cities=n),
    *(jnp.asarray(a[:cut]) for a in (first, second, labels)),
    steps=c.steps,
    batch=c.batch,
  )
  held = tuple(jnp.asarray(a[cut:]) for a in (first, second, labels))
  # The probe never sees the largest 20 cities and 30 % of the others.
  unseen = np.zeros(n, bool)
  unseen[np.argsort(-cities[:, 2])[: min(20, n // 4)]] = True
  unseen |= random.random(n) < 0.3
  place = jnp.asarray(cities[:, :2])
  plane, offset = value_coding.ridge(trained["embedding"][~unseen], place[~unseen], alpha=1e-3)
  error = place[unseen] - trained["embedding"][unseen] @ plane - offset
  spread = place[unseen] - place[unseen].mean(axis=0)
  ablated = {
    mode: value_coding.accuracy(
      trained | {"embedding": value_coding.ablate(trained["embedding"], plane, mode=mode)}, *held
    )
    for mode in value_coding.ABLATIONS
  }
  r2 = 1 - jnp.sum(error**2, axis=0) / jnp.sum(spread**2, axis=0)
  return {"cities": n, "accuracy": value_coding.accuracy(trained, *held), "probe_r2": r2.tolist(), "ablated": ablated}
