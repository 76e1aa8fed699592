"""BOWS: superposition of real words and of synthetic circles; interference, R2, cycles, clusters, value coding."""

import functools
from pathlib import Path

from experiments import results
from experiments.bows import cities, months, synthetic, words
from experiments.results import Claim
from jaxlab.core.checks import require
from jaxlab.data import corpora
from jaxlab.tensors import bows_data as data


def measure(config, workdir: Path, cache: Path, console) -> dict:
  check_config(config)
  places = cities.load(config)
  vocabulary, rows = load_text(config, cache)
  console.say(f"{config.data.name}: {len(rows)} rows, {len(vocabulary)} words")
  part = functools.partial(results.part, workdir)
  return dict(
    synthetic=part("synthetic", lambda: synthetic.measure(config, console)),
    text=words.measure(config, vocabulary, rows, workdir, console),
    cycle=part("cycle", lambda: months.measure(config, vocabulary, rows, console)),
    value_coding=part("value_coding", lambda: cities.measure(config, places)),
  )


def check_config(config) -> None:
  for m in (*config.train.latents, config.train.cycle_latent):
    require(m >= 1, f"latent is {m}; it must be at least 1")
  require(1.0 in config.train.weight_decays, "train.weight_decays must hold 1.0, the decay of the months")


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


def claims(config, metrics: dict) -> list[Claim]:
  made = words.claims(config, metrics["text"]) + months.claims(config, metrics["cycle"])
  return made + synthetic.claims(metrics["synthetic"]["structures"]) + cities.claims(metrics["value_coding"])


def finding(config, metrics: dict) -> str:
  interference, over_control, _, gap, *_ = (claim.ours for claim in words.claims(config, metrics["text"]))
  return (
    f"Present words receive {interference:.2f} more interference than absent ones, {over_control:.2g}x what shuffled "
    f"text gives; at the worst latent size held-out windows are reconstructed {gap:+.2f} better in R2 than single "
    "words (the paper: better, without a figure)."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  drawn = words.draw(metrics["text"], workdir)
  drawn |= months.draw(metrics["cycle"], workdir) if "plane" in metrics["cycle"] else {}
  return drawn | (synthetic.draw(metrics["synthetic"]["grams"], workdir) if metrics["synthetic"]["grams"] else {})
