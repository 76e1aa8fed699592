"""The claims of layer geometry, with the thresholds of the paper and of its reproduction plan."""

import numpy as np

from experiments.results import Claim

_SHARE = 2 / 3


def make_claims(models: dict, main: str, untrained: str, cost: dict) -> list[Claim]:
  """(i) state form; (ii) increment form and its nulls; (iii) association; (iv) noise; exactness, doses and cost."""
  trained = [name for name in models if name != untrained]
  claims = []
  for name in trained:
    claims += geometry_claims(name, models, main, untrained)
    claims += harm_claims(name, models[name], main, models.get(untrained))
  sizes = [name for name in trained if name.endswith(" layers")]
  if len(sizes) > 1:
    medians = [float(np.median(correlations(models[name], main))) for name in sizes]
    claims.append(
      Claim(
        f"growth of the median Spearman with model size, least step over {', '.join(sizes)}",
        "",
        "higher",
        ours=float(np.diff(medians).min()),
        threshold=0.0,
        note="medians " + ", ".join(f"{m:.2f}" for m in medians),
      )
    )
  return [*claims, *link_claims(models), *cost_claims(cost)]


def link_claims(models: dict) -> list[Claim]:
  """The link to SNLP: training for IDN shrinks how much the suffix's updates depend on the layers between."""
  claims = []
  for name in models:
    plain = name.removesuffix(", IDN")
    if plain == name:
      continue
    mean = lambda key, name: float(np.mean([row[key] for row in models[name]["suffix"][1:]]))
    claims.append(
      Claim(
        f"{plain}: input dependence ||u - v|| / ||u|| of the last half's updates, trained for IDN over plain",
        "ratio",
        "lower",
        ours=mean("dependence", name) / mean("dependence", plain),
        threshold=1.0,
        baseline=mean("dependence", plain),
        note="v: the update at the suffix's input. cos(u, v) {:.2f}, plain {:.2f}; error of one IDN step, over what "
        "the suffix adds, {:.2f}, plain {:.2f}".format(
          *(mean(key, which) for key in ("cosine", "one_step_error") for which in (name, plain))
        ),
      )
    )
  return claims


def share(layers: list[dict], holds) -> float:
  return float(np.mean([holds(layer) for layer in layers]))


def state_aligned(main: str):
  return lambda layer: layer["classes"][main]["state"]["cos_ut"]["mean"] > 0.95


def separated(layer: dict) -> bool:
  return layer["nulls"]["gap"] > 0.3 and layer["nulls"]["ratio"] > 2


def beyond_nulls(layer: dict) -> bool:
  intervals = ("gap_over_isotropic", "gap_over_orthogonal", "log_ratio_over_isotropic")
  return separated(layer) and all(layer["nulls"][name][0] > 0 for name in intervals)


def geometry_claims(name: str, models: dict, main: str, untrained: str) -> list[Claim]:
  layers = models[name]["layers"]
  base = lambda holds: share(models[untrained]["layers"], holds) if untrained in models else None
  each = lambda key, form="increment": ", ".join(f"{r['classes'][main][form][key]['mean']:.2f}" for r in layers)
  identity = [r["classes"]["identity"]["state"]["cos_ut"]["mean"] for r in layers]
  null = lambda key: ", ".join(f"{r['nulls'][key]:.2f}" for r in layers)
  above = lambda key: sum(r["nulls"][key][0] > 0 for r in layers)
  return [
    Claim(
      f"{name}: layers whose mean cos(y, T(x)) > 0.95, {main}, state form",
      "share",
      "higher",
      ours=share(layers, state_aligned(main)),
      threshold=0.5,
      baseline=base(state_aligned(main)),
      note=f"cosines {each('cos_ut', 'state')}; of the identity map "
      + ", ".join(f"{c:.2f}" for c in identity)
      + "; baseline: the untrained model",
    ),
    Claim(
      f"{name}: layers with cos(u, t) - cos(r, t) > 0.3 and E(u) / E(r) > 2, held out, {main}",
      "share",
      "higher",
      ours=share(layers, separated),
      threshold=_SHARE,
      baseline=base(separated),
      note=f"gaps {null('gap')}; ratios {null('ratio')}; cos(u, t) {each('cos_ut')}; without the mean increment "
      f"{each('cos_ut', 'increment_centred')}; baseline: the untrained model",
    ),
    Claim(
      f"{name}: layers where that also exceeds the isotropic null and the R^2 curve beyond the 95 % interval",
      "share",
      "higher",
      ours=share(layers, beyond_nulls),
      threshold=_SHARE,
      baseline=base(beyond_nulls),
      note=f"of {len(layers)} layers the gap exceeds sqrt(R^2) in {above('gap_over_orthogonal')} and the isotropic "
      f"null in {above('gap_over_isotropic')}, the ratio exceeds the isotropic null in "
      f"{above('log_ratio_over_isotropic')}; sqrt(R^2) {null('gap_orthogonal')}, isotropic gaps "
      f"{null('gap_isotropic')}, isotropic ratios {null('ratio_isotropic')}: where the "
      "null is not exceeded, R^2 alone explains the figure",
    ),
  ]


def correlations(model: dict, main: str, mode: str = "single_token", which: str = "spearman") -> list[float]:
  return [layer["interventions"][main][mode][which] for layer in model["layers"]]


def harm_claims(name: str, model: dict, main: str, untrained: dict | None) -> list[Claim]:
  layers, single = model["layers"], correlations(model, main)
  show = lambda values: ", ".join(f"{v:.2f}" for v in values)
  noise = [r["doses"]["1"]["single_token"] / r["noise"]["single_token"] for r in layers]
  curve = np.mean([[d["single_token"] for d in r["doses"].values()] for r in layers], axis=0)
  base = correlations(untrained, main) if untrained else None
  return [
    Claim(
      f"{name}: Spearman of ||r|| and the KL of removing it, one token at a time, median over layers",
      "",
      "higher",
      ours=float(np.median(single)),
      threshold=0.5,
      paper=0.7,
      baseline=float(np.median(base)) if base else None,
      note=f"by layer {show(single)}; all tokens at once {show(correlations(model, main, 'all_tokens'))}; with ||u|| "
      f"and entropy fixed {show(correlations(model, main, which='partial'))}; baseline: the untrained model",
    ),
    Claim(
      f"{name}: the same, best layer",
      "",
      "higher",
      ours=max(single),
      threshold=0.7,
      paper=0.95,
      baseline=max(base) if base else None,
    ),
    Claim(
      f"{name}: KL of removing r over that of equal-norm noise orthogonal to t, median over layers",
      "ratio",
      "higher",
      ours=float(np.median(noise)),
      threshold=1.0,
      note=f"by layer {show(noise)}",
    ),
    Claim(
      f"{name}: doses at which the mean KL of removing a share of r falls",
      "",
      "lower",
      ours=float(np.sum(np.diff(curve) < 0)),
      threshold=0.0,
      note="mean KL " + ", ".join(f"{k:.3g}" for k in curve) + f" at {', '.join(layers[0]['doses'])}",
    ),
    Claim(
      f"{name}: largest mean KL of writing a layer's own output back",
      "nats",
      "lower",
      ours=max(r["doses"]["0"][mode] for r in layers for mode in r["doses"]["0"]),
      threshold=1e-5,
    ),
  ]


def cost_claims(cost: dict) -> list[Claim]:
  count, fits = list(cost["fits"].items())[-1]
  length, passes = list(cost["interventions"].items())[-1]
  return [
    Claim(
      f"low-rank fits of {count} tokens, over NumPy with batched LAPACK",
      "x",
      "higher",
      ours=fits["ratio"],
      threshold=1.0,
      spread=tuple(fits["spread"]),
      baseline=f"NumPy, {fits['seconds']['numpy']:.3g} s",
      note=f"largest difference of a value {max(r['difference'] for r in cost['fits'].values()):.2g}",
    ),
    Claim(
      f"all single-token interventions of a row of {length} tokens in one pass, over a forward a position",
      "x",
      "higher",
      ours=passes["ratio"],
      threshold=1.0,
      spread=tuple(passes["spread"]),
      baseline=f"batched forwards, {passes['seconds']['a forward a position']:.3g} s",
      note=f"largest difference of a KL {max(r['difference'] for r in cost['interventions'].values()):.2g} nats",
    ),
  ]
