"""Claims of the BOWS experiment."""

import numpy as np

from experiments.results import Claim

# Off-diagonal correlation of Gram and covariance, circular data, ReLU, by (latent, decay): the sheet's anchors.
ANCHORS = {
  (4, 0.0): 0.652,
  (4, 1.0): 0.808,
  (4, 6.0): 0.986,
  (6, 0.0): 0.482,
  (6, 1.0): 0.587,
  (6, 6.0): 0.994,
  (8, 0.0): 0.345,
  (8, 1.0): 0.440,
  (8, 6.0): 0.998,
}


OTHERS = ("untied", "BCE", "ReLU latent", "random W")  # synthetic models that are not the paper's


def rising(values) -> float:
  """Share of neighbouring values that rise."""
  return float(np.mean(np.diff(values) > 0))


def make_claims(config, metrics: dict) -> list[Claim]:
  return [
    *text_claims(config, metrics["text"]),
    *cycle_claims(config, metrics["cycle"]),
    *synthetic_claims(metrics["synthetic"]),
    value_claim(metrics["value_coding"]),
  ]


def text_claims(config, text: dict) -> list[Claim]:
  """(i) interference and (ii) the R2 gap, both held out; (iv) geometry against decay and size; clusters."""
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
  strength = f"{config.train.steps} steps at {config.train.rate:g}"
  claims = [
    Claim(
      "held-out interference, present minus absent words, least over m/d <= 0.1",
      "",
      "higher",
      ours=min(natural.values()),
      threshold=0.05,
      baseline=f"column-shuffled {max(control.values()):.3f}",
      note=f"{listed(natural)}; column-shuffled {listed(control)}",
    ),
    Claim(
      "the same over its value on column-shuffled data, least over m/d <= 0.1",
      "x",
      "higher",
      ours=natural[worst] / max(abs(control[worst]), 1e-9),
      threshold=5.0,
      note=f"least at m = {worst}; the control keeps the marginals, so what frequent words are fed remains in it. "
      f"The difference taken word by word: {listed(within)}; column-shuffled {listed(chance)}",
    ),
    Claim(
      "held-out interference, present minus absent words, falls with m: share of steps",
      "",
      "higher",
      ours=rising([-v for v in order]),
      threshold=1.0,
      note=", ".join(f"{v:.3f}" for v in order)
      + "; word by word "
      + ", ".join(f"{v:.3f}" for v in within.values())
      + f". {strength}",
    ),
  ]
  for m, row in latents.items():
    held, inside = row["gap"]["held_out"], row["gap"]["train"]
    claims += [
      Claim(
        f"mean held-out R2 of windows minus of single words, m = {m}",
        "",
        "higher",
        ours=held["mean"],
        threshold=0.0,
        note=f"held out {row['held_out']['mean_r2']:.2f}, {row['held_out']['frequency_weighted_r2']:.2f} by frequency; "
        f"one word {row['one_hot_r2']:.2f}; in sample {row['train']['mean_r2']:.2f}, a gap of {inside['mean']:.3f}",
      ),
      Claim(
        f"Spearman of that gap with the interference a word receives, m = {m}",
        "",
        "higher",
        ours=held["spearman"],
        threshold=0.3,
        note=f"{held['words']:.0f} words; in sample {inside['spearman']:.2f}",
      ),
    ]
  with_decay = [rising(list(row["geometry"].values())) for row in latents.values()]
  table = "; ".join(
    f"m = {m}: " + ", ".join(f"{v:.3f} at {wd}" for wd, v in row["geometry"].items()) for m, row in latents.items()
  )
  falling = [
    rising([-row["geometry"][f"wd{decay:g}"] for row in latents.values()]) for decay in config.train.weight_decays
  ]
  claims += [
    Claim(
      "||G - diag G|| / tr G rises with weight decay: share of steps",
      "",
      "higher",
      ours=float(np.mean(with_decay)),
      threshold=1.0,
      note=f"{table}. {strength}",
    ),
    Claim(
      "||G - diag G|| / tr G falls with m: share of steps", "", "higher", ours=float(np.mean(falling)), threshold=1.0
    ),
  ]
  m, row = list(latents.items())[-1]
  contrast = lambda c: c["within"] - c["between"]
  claims.append(
    Claim(
      f"clusters of columns: held-out word correlation within minus between, m = {m}",
      "",
      "higher",
      ours=contrast(row["clusters"]["natural"]),
      threshold=5 * abs(contrast(row["clusters"]["shuffled"])),
      baseline=contrast(row["clusters"]["shuffled"]),
      note="baseline: clusters of a model trained on column-shuffled windows; holds if 5 times that, as for (i). Both "
      f"clusterings are k-means of {m}-dimensional columns; at the smallest m the difference is "
      f"{contrast(next(iter(latents.values()))['clusters']['natural']):.4f}",
    )
  )
  return claims


def cycle_claims(config, cycle: dict) -> list[Claim]:
  """(iii) the ring of months and (iv) its cosine against decay; nothing where the text has no months."""
  if "models" not in cycle:
    return []
  m, lags = config.train.cycle_latent, np.array(cycle["models"]["wd1"]["lags"])
  rings = cycle["models"]["wd1"]["ring"]
  first = [float(np.mean(row["lags"], axis=0)[0]) for row in cycle["models"].values()]
  described = ", ".join(f"{v:.3f}" for v in lags.mean(axis=0))
  return [
    Claim(
      f"months, m = {m}: seeds whose cosine falls over lags 1, 2, 3",
      "share",
      "higher",
      ours=float(np.mean((lags[:, 0] > lags[:, 1]) & (lags[:, 1] > lags[:, 2]))),
      threshold=1.0,
      note=f"cosine at lags 1-6: {described}; in the data {', '.join(f'{v:.3f}' for v in cycle['data_lags'])}",
    ),
    Claim(
      f"months, m = {m}: cosine at lag 1 over the mean of lags 4-6, least seed",
      "x",
      "higher",
      ours=float((lags[:, 0] / lags[:, 3:].mean(axis=1)).min()),
      threshold=1.5,
    ),
    Claim(
      f"months, m = {m}: seeds with a ring score of 5 or more",
      "share",
      "higher",
      ours=float(np.mean(np.array(rings) >= 5)),
      threshold=2 / 3,
      baseline="2.2 neighbours by chance",
      note=f"ring scores {rings}; of the text's own correlations in three dimensions {cycle['spectral_ring']}",
    ),
    Claim(
      "months: cosine at lag 1 rises with weight decay: share of steps",
      "",
      "higher",
      ours=rising(first),
      threshold=1.0,
      note=", ".join(f"{v:.3f} at {wd}" for wd, v in zip(cycle["models"], first, strict=True)),
    ),
  ]


def synthetic_claims(synthetic: dict) -> list[Claim]:
  """(v) the table on circular data."""
  circular = synthetic["circular"]
  linear = {m: row["linear wd0"]["mse"] / row["pca"] for m, row in circular.items() if m != "m4"}
  found = {
    key: circular[f"m{key[0]}"][f"ReLU wd{key[1]:g}"]["correlation"] for key in ANCHORS if f"m{key[0]}" in circular
  }
  listed = ", ".join(f"m {m} wd {wd:g}: {v:.3f}" for (m, wd), v in found.items())
  ordered = [
    rising([row[f"ReLU wd{wd:g}"]["correlation"] for wd in (0.0, 1.0, 6.0)]) for m, row in circular.items() if m != "m2"
  ]
  others = {n: row["ReLU wd1"]["correlation"] for n, rows in synthetic.items() for row in [rows.get("m4", {})] if row}
  first = circular["m2"]
  baselines = {key: row for rows in circular.values() for key, row in rows.items() if key.split(" wd")[0] in OTHERS}
  return [
    Claim(
      "circular: linear autoencoder's loss over the PCA optimum, worst of m = 2, 6, 8",
      "x",
      "lower",
      ours=max(linear.values()),
      threshold=1.05,
    ),
    Claim(
      "circular, m = 2: ReLU loss over the PCA optimum",
      "x",
      "lower",
      ours=first["ReLU wd0"]["mse"] / first["pca"],
      threshold=1.0,
    ),
    Claim(
      "circular: correlation of Gram and covariance, largest distance from the reference table",
      "",
      "lower",
      ours=max(abs(v - ANCHORS[key]) for key, v in found.items()),
      threshold=0.1,
      note=listed + "; baselines, m 4: " + ", ".join(f"{k} {row['correlation']:.3f}" for k, row in baselines.items()),
    ),
    Claim(
      "circular: that correlation rises with weight decay, m > 2: share of steps",
      "",
      "higher",
      ours=float(np.mean(ordered)),
      threshold=1.0,
    ),
    Claim(
      "column-shuffled circle, m = 4: |that correlation|",
      "",
      "lower",
      ours=abs(others["shuffled"]),
      threshold=0.5 * abs(others["circular"]),
      baseline=others["circular"],
      note="against the samples' own covariance, holds below half of the circle's; "
      + ", ".join(f"{n} {v:.2f}" for n, v in others.items())
      + ". Against the covariance of another shuffle of the same samples, whose sampling noise is its own: "
      f"{synthetic['shuffled']['m4']['ReLU wd1']['other_shuffle']:.2f}",
    ),
    Claim(
      "column-shuffled circle, m = 4, wd 1: ring score, mean of the seeds",
      "of 12",
      "lower",
      ours=synthetic["shuffled"]["m4"]["ReLU wd1"]["ring"],
      threshold=6.0,
      baseline=circular["m4"]["ReLU wd1"]["ring"],
      note="chance is 2.2; baseline: the circle itself",
    ),
  ]


def value_claim(coding: dict) -> Claim:
  a = coding["ablated"]
  return Claim(
    "value coding: accuracy by the probe's plane alone minus without it",
    "",
    "higher",
    ours=a["keep"] - a["remove"],
    threshold=0.0,
    baseline=coding["accuracy"],
    note=f"{coding['cities']} cities; accuracy {coding['accuracy']:.2f}, alone {a['keep']:.2f}, without "
    f"{a['remove']:.2f}, renormalised {a['renormalise']:.2f}; probe R2 of latitude and longitude on unseen cities "
    + ", ".join(f"{v:.2f}" for v in coding["probe_r2"]),
  )
