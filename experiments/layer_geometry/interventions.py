"""What taking the rest away does to the prediction: y := T(x), shares of it, and noise of its size."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from experiments import figures
from experiments.layer_geometry.decomposition import MAIN, depths, spread, style, worst
from experiments.layer_geometry.subjects import IDN, MAMBA
from experiments.results import Claim
from jaxlab.depth import layer_geometry as geometry

_intervene = jax.jit(geometry.intervene, static_argnames="skip")


def intervene(model, tokens, written, *, layer: int) -> dict:
  """`geometry.intervene` with the outputs of all kept tokens as rows."""
  return _intervene(model, tokens, written.reshape(len(tokens), -1, written.shape[-1]), layer=layer)


def describe(config, do, query, outputs, noise, documents) -> dict:
  """{"interventions" by class, "doses", "noise"} of one layer; `do(y)` writes y there.

  The main class also has the interval of its rank correlation over documents, and more measures of harm.
  """
  y, by_class = query["y"], {}
  for name in config.intervene.classes:
    kept = ("kl", "spearman") if name != MAIN else ("kl", "flip", "spearman", "spearman_relative", "partial")
    values = jax.device_get(_association(do(outputs[name]), query["x"], y, outputs[name]))
    by_class[name] = {mode: {key: float(np.mean(values[mode][key])) for key in kept} for mode in geometry.MODES}
    by_class[name]["relative_error"] = float(values["relative_error"].mean())
    if name == MAIN:
      error, harm = values["absolute_error"], values["single_token"]["kl"]
      by_class[name]["single_token"] |= correlation_interval(error, harm, documents, config.fit.resamples)
  mean_kl = lambda out: {mode: float(out[mode]["kl"].mean()) for mode in geometry.MODES}
  removed = {f"{dose:g}": mean_kl(do(y - dose * (y - outputs[MAIN]))) for dose in config.intervene.doses}
  return {"interventions": by_class, "doses": removed, "noise": mean_kl(do(y + noise))}


@jax.jit
def _association(out, x, y, outputs) -> dict:
  """Per token errors and harm, and their rank correlations raw and with ||u|| and the entropy of p held fixed."""
  size, error = (jnp.linalg.norm(a, axis=1) for a in (y - x, y - outputs))
  relative = error / jnp.maximum(size, 1e-12)
  values = {"relative_error": relative, "absolute_error": error}
  for mode in geometry.MODES:
    harm = {name: a.reshape(-1) for name, a in out[mode].items()}
    values[mode] = harm | {
      "spearman": geometry.spearman(error, harm["kl"]),
      "spearman_relative": geometry.spearman(relative, harm["kl"]),
      "partial": geometry.partial_spearman(error, harm["kl"], [size, out["entropy"].reshape(-1)]),
    }
  return values


def _spearman(a, b) -> float:
  """On the host: resamples differ in size, and each would be compiled anew. NaN where one of the two is constant."""
  if np.ptp(a) == 0 or np.ptp(b) == 0:
    return float("nan")
  return float(scipy.stats.spearmanr(a, b).statistic)


def correlation_interval(error, harm, documents, resamples: int) -> dict[str, float]:
  """{"low", "high"} of the rank correlation when documents are drawn with replacement."""
  low, high = geometry.document_bootstrap(lambda i: _spearman(error[i], harm[i]), documents, resamples=resamples)
  return {"low": low, "high": high}


def across(row: dict) -> float:
  """Spearman over layers of the mean relative error and the mean single-token KL."""
  return _spearman(row["relative_error"], row["single_token"]["kl"])


def correlations(model: dict, mode: str = "single_token", which: str = "spearman") -> list[float]:
  return model["interventions"][MAIN][mode][which]


def median(model: dict) -> float:
  """Over layers, of one token at a time."""
  return float(np.median(correlations(model)))


def over_noise(model: dict) -> np.ndarray:
  """By layer: KL of removing r over that of equal-norm noise."""
  return np.array(model["doses"]["1"]["single_token"]) / np.array(model["noise"]["single_token"])


def claims(models: dict, untrained: dict | None) -> list[Claim]:
  of = lambda value: {name: float(value(model)) for name, model in models.items()}
  medians, ratios = of(median), of(lambda m: np.median(over_noise(m)))
  least = models[min(medians, key=medians.get)]
  middle = lambda mode, which: worst(of(lambda m: np.median(correlations(m, mode, which))))
  curves = {name: np.mean([d["single_token"] for d in m["doses"].values()], axis=1) for name, m in models.items()}
  exact = lambda m: max(max(m["doses"]["0"][mode]) for mode in geometry.MODES)
  splits = least["by_split"]["association"]
  made = [
    Claim(
      "Rank correlation of the rest's size with the harm of removing it from one token, median of layers, worst model",
      "", "higher", ours=min(medians.values()), threshold=0.5, paper=0.7, spread=spread(splits),
      baseline=median(untrained) if untrained else None,
      note=f"medians {worst(medians)}; best layers {worst(of(lambda m: max(correlations(m))))} (paper up to 0.95); all "
      f"tokens at once {middle('all_tokens', 'spearman')}; with ||u|| and entropy fixed "
      f"{middle('single_token', 'partial')}; baseline: the untrained network",
    ),
    Claim(
      "How many times the harm of noise of the same size removing the rest does, median of layers, worst model", "x",
      "higher", ours=min(ratios.values()), threshold=1.0,
      baseline=float(np.median(over_noise(untrained))) if untrained else None,
      note=f"{worst(ratios)}; noise orthogonal to the tokenwise part; baseline: the untrained network",
    ),
    Claim(
      "Steps at which removing more of the rest does less harm, worst model", "", "lower",
      ours=max(float(np.sum(np.diff(curve) < 0)) for curve in curves.values()), threshold=0.0,
      note=f"mean KL over layers at the shares {', '.join(least['doses'])} of the rest",
    ),
    Claim(
      "Largest mean KL of writing a layer's own output back", "nats", "lower", ours=max(of(exact).values()),
      threshold=1e-5,
    ),
  ]  # fmt: skip
  if untrained:
    trained = {name: value - median(untrained) for name, value in medians.items()}
    made.append(
      Claim(
        "Rank correlation of the rest's size with the harm that training adds to the untrained network's, worst model",
        "", "higher", ours=min(trained.values()), threshold=0.0, baseline=median(untrained), note=worst(trained),
      )
    )  # fmt: skip
  sizes = [name for name in models if " x " in name and not name.startswith(MAMBA) and not name.endswith(IDN)]
  if len(sizes) > 1:
    grown = [medians[name] for name in sizes]
    made.append(
      Claim(
        "Rank correlation of the rest's size with the harm that a larger network adds, least step over the sizes", "",
        "higher", ours=float(np.diff(grown).min()), threshold=0.0,
        note=", ".join(f"{name} {medians[name]:.2f}" for name in sizes),
      )
    )  # fmt: skip
  return made


def draw(models: dict, workdir: Path) -> dict[str, str]:
  figure, (left, right) = figures.subplots(2)
  for i, (name, model) in enumerate(models.items()):
    look = style(i, name)
    left.plot(depths(model), over_noise(model), **look)
    doses = [(float(a), np.mean(d["single_token"])) for a, d in model["doses"].items() if float(a) > 0]
    right.plot(*zip(*doses, strict=True), label=name, **look)
    right.plot(1.05, np.mean(model["noise"]["single_token"]), "x", color=look["color"])
  left.axhline(1, color="black", lw=0.8, ls=":")
  left.set(xlabel="layer, as a share of the depth", ylabel="KL of removing r / KL of noise", yscale="log")
  right.set(xlabel="share of r removed  (x: noise)", ylabel="mean KL (nats), one token", yscale="log")
  right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
  return {
    figures.save(figure, workdir, "harm"): "Harm of removing the rest over that of noise of its size, by depth; harm "
    "against the share that is removed"
  }
