"""The score matrices: how well a CUR factorisation predicts them, and how many dimensions they have."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures
from experiments.anncur import baselines
from experiments.anncur.domain import Domain
from experiments.anncur.training import HEADS, NAMES
from experiments.overlap import overlapped
from experiments.results import Claim
from jaxlab.tensors import anncur


def measure(config, domain: Domain, scores) -> dict:
  spectrum = {head: measure_spectrum(scores[head]) for head in HEADS}
  return {"errors": measure_errors(config, scores), "spectrum": spectrum}


def measure_errors(config, scores) -> dict:
  """Relative error of test queries' predicted scores by k_i: both heads, regularised or not, and the two oracles."""
  cut = config.domain.anchor_queries
  first = cut + config.domain.dev_queries
  ways = {"ridge": dict(strength=config.search.strength), "rcond 0.01": dict(method="rcond", strength=0.01)}
  ways["bare"] = dict(method="rcond", strength=float(np.finfo(np.float32).eps))
  result = {head: {name: {} for name in ways} for head in HEADS}

  @functools.partial(jax.jit, static_argnames="way")
  def error(m, anchors, way):
    def one(chosen):
      index = anncur.cur_index(m[:cut], chosen, **ways[way])
      return relative(anncur.cur_scores(m[first:, chosen], index.embeddings), m[first:])

    return jax.lax.map(one, anchors).mean()

  def of_size(k_i):
    """{(head, way): error} at one number of anchors."""
    keys = [jax.random.key(config.seed + 200 + i) for i in range(config.errors.seeds)]
    drawn = jnp.stack([anncur.draw_anchors(key, config.domain.size, k_i) for key in keys])
    found = {(head, way): error(jnp.asarray(scores[head]), drawn, way) for head in HEADS for way in ways}
    m = jnp.asarray(scores["emb"])
    found["emb", "CUR oracle"] = relative(baselines.cur_oracle(m, jnp.arange(cut), drawn[0])[first:], m[first:])
    if k_i < len(m) - first:
      found["emb", "SVD of the test matrix"] = relative(baselines.truncated_svd(m[first:], k_i), m[first:])
    return found

  for head in HEADS:
    m = jnp.asarray(scores[head])
    result[head]["mean score"] = float(relative(m[:cut].mean(0), m[first:]))
  for k_i, found in zip(config.errors.anchors, overlapped(of_size, config.errors.anchors), strict=True):
    for (head, way), value in found.items():
      result[head].setdefault(way, {})[f"{k_i}"] = float(value)
  return result


@jax.jit
def relative(predicted, exact):
  """||predicted - exact|| / ||exact||."""
  return jnp.linalg.norm(predicted - exact) / jnp.linalg.norm(exact)


def measure_spectrum(m) -> dict:
  """Singular values, and the effective rank exp(entropy of s / sum s), of the matrix and of it without column means."""
  result = {}
  for name, part in (("raw", m), ("centred", m - m.mean(0))):
    s = np.linalg.svd(np.asarray(part, np.float64), compute_uv=False)
    p = s[s > 0] / s.sum()
    result[name] = float(np.exp(-np.sum(p * np.log(p))))
    if name == "centred":
      result["singular values"] = (s / s[0])[:: max(1, len(s) // 100)].tolist()
      result["every"] = max(1, len(s) // 100)
  return result


def claims(config, metrics: dict) -> list[Claim]:
  """Is there something to approximate, and how well is it?"""
  quality, errors, spectrum = metrics["quality"], metrics["errors"], metrics["spectrum"]
  cut = config.domain.anchor_queries
  k_i = min(config.errors.anchors, key=lambda a: abs(a - config.search.budget // 2))
  ratio = {head: q["accuracy of 16"] / q["chance"] for head, q in quality.items()}
  worst, other = min(ratio, key=ratio.get), "with another's query"
  lemma = ""
  if "same lemma" in quality["emb"]:
    rows = {NAMES[head]: q["same lemma"] for head, q in quality.items()}
    lemma = "; among the lemma's synsets " + ", ".join(f"{n} {row['accuracy']:.3f}" for n, row in rows.items())
    lemma += ", most frequent sense {most frequent sense:.3f}, chance {chance:.3f}".format(**rows["EMB-CE"])
  bare, ridge = (errors["emb"][way][f"{cut}"] for way in ("bare", "ridge"))
  effective = {head: f"{row['raw']:.1f} ({row['centred']:.1f} without column means)" for head, row in spectrum.items()}
  return [
    Claim(
      "Accuracy of the encoders among the right item and 15 similar ones over chance, worse head", "x", "higher",
      ours=ratio[worst], threshold=2.0, baseline="chance 1/16",
      note=", ".join(
        f"{NAMES[h]} {q['accuracy of 16']:.3f}, {q[other]:.3f} when it reads another query" for h, q in quality.items()
      )
      + lemma,
    ),
    Claim(
      f"Relative error of ANNCUR's scores from {k_i} anchor items with CLS-CE over that with EMB-CE", "x", "higher",
      ours=errors["cls"]["ridge"][f"{k_i}"] / errors["emb"]["ridge"][f"{k_i}"], threshold=1.0,
      baseline=errors["cls"]["ridge"][f"{k_i}"],
      note="effective rank " + ", ".join(f"{NAMES[h]} {text}" for h, text in effective.items())
      + "; the mean score alone leaves "
      + ", ".join(f"{NAMES[h]} {errors[h]['mean score']:.3f}" for h in errors),
    ),
    Claim(
      "Relative error of a bare pseudo-inverse over ridge's, as many anchor items as queries", "x", "higher",
      ours=bare / ridge, threshold=2.0, baseline=bare,
      note=f"{cut} of each, EMB-CE; ridge {ridge:.3f}, rcond 0.01 {errors['emb']['rcond 0.01'][f'{cut}']:.3f}",
    ),
  ]  # fmt: skip


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  drawn = {draw_errors(config, metrics["errors"], workdir): "Error of the predicted scores by anchor items"}
  if "singular values" in metrics["spectrum"]["emb"]:
    caption = "Singular values of the score matrices without column means"
    drawn[draw_spectrum(metrics["spectrum"], workdir)] = caption
  return drawn


def draw_errors(config, errors: dict, workdir: Path) -> str:
  figure, axis = figures.subplots(width=1.5)
  for name, style in (
    ("bare", "x:"), ("rcond 0.01", "d--"), ("ridge", "o-"), ("CUR oracle", "k-."), ("SVD of the test matrix", "k:")
  ):  # fmt: skip
    row = errors["emb"].get(name, {})
    axis.loglog([int(a) for a in row], list(row.values()), style, label=name)
  axis.axhline(errors["emb"]["mean score"], color="0.6", lw=1, label="mean score")
  axis.axvline(config.domain.anchor_queries, color="0.8", lw=1, zorder=0)
  ticks = list(config.errors.anchors)
  axis.set_xticks(ticks, [f"{t}" for t in ticks], rotation=60)
  axis.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1.0], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
  axis.minorticks_off()
  axis.set(xlabel="anchor items $k_i$ (line: $k_i = k_q$)", ylabel="relative error, test queries", title="EMB-CE")
  axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  return figures.save(figure, workdir, "errors")


def draw_spectrum(spectrum: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  for head, label in (("emb", "EMB-CE"), ("cls", "CLS-CE")):
    s = spectrum[head]["singular values"]
    axis.loglog(
      1 + spectrum[head]["every"] * np.arange(len(s)),
      s,
      label=f"{label}, effective rank {spectrum[head]['centred']:.1f}",
    )
  axis.set(xlabel="index", ylabel="singular value / first", title="Score matrices without column means")
  axis.set_ylim(1e-4, 1.5)  # queries that are cut to the same tokens, and the means, leave zeros at the end
  axis.legend(fontsize=8)
  return figures.save(figure, workdir, "spectrum")
