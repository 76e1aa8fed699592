"""ANNCUR: a cross-encoder trained on real text, its score matrix, and who finds its neighbours at equal cost."""

from pathlib import Path

from experiments.anncur import domain, errors, recall, speed, training
from experiments.anncur import encoders as scorers
from experiments.results import Claim
from jaxlab.core.checks import require


def measure(config, workdir: Path, cache: Path, console) -> dict:
  check_config(config)
  d = domain.load(config, cache)
  console.say(
    f"{config.data.name}: {len(d.items)} items searched, {len(d.train)} queries and {len(d.pool)} items to train on"
  )
  encoders, seconds = training.train_encoders(config, d, console)
  encoders = {name: scorers.cast(encoder, config.dtype) for name, encoder in encoders.items()}
  quality = {head: training.measure_quality(encoders[head], d, config) for head in training.HEADS}
  scores, item_scores, rate = training.score(config, d, encoders, console)
  retrievers, seconds = training.make_retrievers(config, d, encoders, scores["emb"], seconds, rate, console)
  return {
    "quality": quality,
    "pairs_per_second": rate,
    "seconds": seconds,
    **recall.measure(config, d, scores, item_scores, retrievers, console),
    "errors": errors.measure_errors(config, scores),
    "spectrum": {head: errors.measure_spectrum(scores[head]) for head in training.HEADS},
    "cost": speed.measure(config, d.searched, d.test[:1], encoders, console),
  }


def check_config(config) -> None:
  s, d = config.search, config.domain
  require(s.budget in s.budgets, f"search.budget={s.budget} must be one of search.budgets {tuple(s.budgets)}")
  require(set(s.claimed) <= set(s.ks) and 1 in s.ks, f"search.claimed {tuple(s.claimed)} and 1 must be in search.ks")
  require(
    max(s.ks) <= min(s.budgets) <= max(s.budgets) < d.size,
    f"search.budgets {tuple(s.budgets)} must lie between the largest k, {max(s.ks)}, and domain.size={d.size}",
  )
  require(
    min(s.budgets) * min(s.shares) >= s.rounds,
    f"search.rounds={s.rounds} exceeds the anchors of the smallest budget; lower it",
  )
  require(
    config.errors.seeds >= 1 and s.seeds >= 1 and all(0 < share < 1 for share in s.shares),
    "search.shares must lie between 0 and 1, seeds must be at least 1",
  )
  require(
    max(config.errors.anchors) <= d.size and d.anchor_queries in config.errors.anchors,
    f"errors.anchors must hold domain.anchor_queries={d.anchor_queries} and not exceed domain.size={d.size}",
  )


def claims(config, metrics: dict) -> list[Claim]:
  return recall.claims(config, metrics) + errors.claims(config, metrics) + speed.claims(config, metrics)


def finding(config, metrics: dict) -> str:
  s, table = config.search, metrics["recall"]
  k = s.claimed[-1]
  at = lambda name: table[name][f"k={k}"][f"C={s.budget}"]
  best = max((name for name in recall.RIVALS if name in table), key=at)
  last = list(metrics["cost"].values())[-1]
  return (
    f"With {s.budget} calls of the scorer for {config.domain.size} items ANNCUR finds {at('ANNCUR'):.0%} and ADACUR "
    f"{at('ADACUR'):.0%} of the {k} nearest, the best rival ({best}) {at(best):.0%}, a dual encoder "
    f"{at('DE_base'):.0%}; "
    f"{last['all items by f / ANNCUR'][0]:.2g}x as fast as scoring all of {list(metrics['cost'])[-1]}."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  drawn = recall.draw(config, metrics["recall"], workdir) | errors.draw(config, metrics, workdir)
  return drawn | speed.draw(metrics["cost"], workdir)
