"""BOWS: superposition of real words and of synthetic circles; interference, R2, cycles, clusters, value coding."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import bows_claims as claims
from experiments import bows_figures as pictures
from experiments.results import Report
from jaxlab.core.checks import InputError, require, require_choice
from jaxlab.data import corpora
from jaxlab.tensors import bows, value_coding
from jaxlab.tensors import bows_data as data

DECAYS = (0.0, 1.0, 6.0)


def run(config, workdir: Path, cache: Path, console) -> Report:
  check_config(config)
  cities = load_cities(config)
  words, rows = load_text(config, cache)
  console.say(f"{config.data.name}: {len(rows)} rows, {len(words)} words")
  synthetic, grams = measure_synthetic(config, console)
  text, models, windows = measure_text(config, words, rows, console)
  cycle, ring = measure_cycle(config, words, rows, console)
  coding = measure_value_coding(config, cities)
  metrics = dict(synthetic=synthetic, text=text, cycle=cycle, value_coding=coding)
  interference = pictures.draw_interference(text, workdir)
  mechanism = pictures.draw_mechanism(models, windows, words, workdir)
  files = {
    pictures.draw_synthetic(grams, workdir): "Covariance of circular features, and the Gram matrices of W / ||W||",
    interference: "Interference of present and absent words; R2 of windows and of single words",
    mechanism: "One word's pre-activation, and what three words' are made of",
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
  jax.jit, static_argnames=("features", "latent", "steps", "batch", "rate", "seeds", "output", "clip", "every", "bound")
)
def train_grid(
  bits, decays, *, features, latent, steps, batch, rate, seeds, output="relu", clip=None, every=1, bound=None
):
  """Trained parameters and last losses for every (decay, seed), in one compiled scan."""

  def one(decay, seed):
    params = bows.init_params(jax.random.key(seed), features=features, latent=latent, bound=bound)
    options = dict(clip=clip, schedule_every=every, output=output, seed=seed)
    return bows.train(
      params, bits, features=features, steps=steps, batch=batch, rate=rate, weight_decay=decay, **options
    )

  return jax.vmap(lambda decay: jax.vmap(lambda seed: one(decay, seed))(jnp.arange(seeds)))(decays)


def pick(params: dict, *index) -> dict:
  return jax.tree.map(lambda a: a[index], params)


def measure_synthetic(config, console) -> tuple[dict, dict]:
  """Algorithm B on every structure: losses and correlation of Gram and covariance, by latent and decay."""
  s = config.synthetic
  result, grams = {}, {}
  x = {name: data.synthetic(name)[:8000] for name in data.STRUCTURES}
  # A second shuffle tells what the first one's sampling noise is.
  x["shuffled"], again = (np.random.default_rng(seed).permuted(x["circular"], axis=0) for seed in (0, 1))
  for name in console.track("synthetic", list(x)):
    bits = jnp.asarray(np.packbits(x[name], axis=1))
    dense = jnp.asarray(x[name], jnp.float32)
    covariance = jnp.cov(dense.T, bias=True)
    optimum = bows.pca(dense)
    steps = s.epochs * (len(x[name]) // 256)
    train = functools.partial(
      train_grid,
      features=12,
      steps=steps,
      batch=256,
      rate=1e-2,
      seeds=s.seeds,
      clip=1.0,
      every=len(x[name]) // 256,
      bound=12**-0.5,
    )
    rows = {}
    for m in s.latents if name == "circular" else s.latents[1:2]:
      models = {"linear": (train(bits, jnp.zeros(1), latent=m, output="linear")[0], "linear", (0.0,))}
      models["ReLU"] = (train(bits, jnp.array(DECAYS), latent=m)[0], "relu", DECAYS)
      row = {"pca": float(optimum.loss(m))}
      for kind, (params, output, decays) in models.items():
        for i, decay in enumerate(decays):
          each = [pick(params, i, seed) for seed in range(s.seeds)]
          g = [bows.gram(p) for p in each]
          key = f"{kind} wd{decay:g}"
          row[key] = dict(
            mse=float(np.mean([bows.loss_function(p, dense, output=output) for p in each])),
            correlation=float(np.mean([bows.offdiagonal_correlation(a, covariance) for a in g])),
            ring=float(np.mean([bows.ring_score(p["W"]) for p in each])),
          )
          if name == "shuffled":
            other = jnp.cov(jnp.asarray(again.T, jnp.float32), bias=True)
            row[key]["other_shuffle"] = float(np.mean([bows.offdiagonal_correlation(a, other) for a in g]))
          if name == "circular":
            grams[key, m] = np.asarray(g[0] / jnp.sum(each[0]["W"] ** 2))
            grams["covariance"] = np.asarray(covariance)
      rows[f"m{m}"] = row
    result[name] = rows
  return result, grams


def scalars(statistics: dict) -> dict:
  return {name: float(value) for name, value in statistics.items() if np.ndim(value) == 0}


def measure_text(config, words: dict, rows: list, console) -> tuple[dict, dict, dict]:
  """Algorithm A on windows of a few rows: in sample, held out, and on column-shuffled data with the same marginals."""
  d, t = config.data, config.train
  features = len(words)
  packed = data.pack_rows(rows, features)
  train_at, held_at = data.block_split(len(rows), group=d.group, block=d.block)
  windows = {"train": data.or_rows(packed, train_at, d.group), "held_out": data.or_rows(packed, held_at, d.group)}
  shuffled = {name: data.shuffle_columns(bits, features, i) for i, (name, bits) in enumerate(windows.items())}
  dense = np.unpackbits(windows["held_out"], axis=1, count=features).astype(np.float32)
  with np.errstate(invalid="ignore", divide="ignore"):
    correlation = np.nan_to_num(np.corrcoef(dense.T))
  result = {
    "windows": {name: len(bits) for name, bits in windows.items()},
    "active_words": float(np.unpackbits(windows["train"], axis=1, count=features).sum(1).mean()),
    "latents": {},
  }
  options = dict(features=features, steps=t.steps, batch=t.batch, rate=t.rate, seeds=t.seeds)
  decays, main = np.array(t.weight_decays), list(t.weight_decays).index(1.0)
  models = {}
  for m in console.track("words", list(t.latents)):
    grid, _ = train_grid(jnp.asarray(windows["train"]), jnp.asarray(decays), latent=m, **options)
    control, _ = train_grid(jnp.asarray(shuffled["train"]), jnp.ones(1), latent=m, **options)
    models[m] = pick(grid, main, 0)
    per_seed = []
    for seed in range(t.seeds):
      params = pick(grid, main, seed)
      inside, outside = (
        bows.evaluate(params, windows["train"], features),
        bows.evaluate(params, windows["held_out"], features),
      )
      alone = np.asarray(bows.one_hot_r2(params))
      per_seed.append(
        {
          "train": scalars(inside),
          "held_out": scalars(outside),
          "shuffled_held_out": scalars(bows.evaluate(pick(control, 0, seed), shuffled["held_out"], features)),
          "one_hot_r2": float(np.mean(alone)),
          "gap": {"train": context_gap(inside, alone), "held_out": context_gap(outside, alone)},
        }
      )
    result["latents"][f"{m}"] = average(per_seed) | {
      "geometry": {
        f"wd{decay:g}": float(np.mean([relative_offdiagonal(pick(grid, i, seed)) for seed in range(t.seeds)]))
        for i, decay in enumerate(decays)
      },
      "clusters": {
        "natural": cluster_correlation(models[m], correlation),
        "shuffled": cluster_correlation(pick(control, 0, 0), correlation),
      },
    }
  return result, models, windows | {"correlation": correlation}


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


def measure_cycle(config, words: dict, rows: list, console) -> tuple[dict, np.ndarray | None]:
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
  return result, np.asarray(bows.plane(columns.T)[0])


def load_cities(config) -> np.ndarray:
  """(latitude, longitude, population) of cities above 50,000 people; generated ones fill a box the size of the US."""
  c = config.cities
  require_choice("config.cities.name", c.name, ("generated", "csv"))
  if c.name == "csv":
    require(
      Path(c.path).is_file(), f"no file {c.path!r}; give --config.cities.path, lines of latitude,longitude,population"
    )
    try:
      table = np.loadtxt(c.path, delimiter=",", ndmin=2)
    except ValueError as error:
      raise InputError(f"{c.path}: {error}; every line is latitude,longitude,population") from None
    require(table.shape[1] == 3, f"{c.path} has {table.shape[1]} columns; every line is latitude,longitude,population")
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
