"""ANNCUR: a cross-encoder trained on real text, its score matrix, and who finds its neighbours at equal cost."""

from pathlib import Path

from experiments import results
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
  found = results.part(workdir, "found", lambda: who_finds(config, d, console))
  # What a query takes does not depend on what the encoders learnt.
  cost = results.part(
    workdir, "cost", lambda: speed.measure(config, d.searched, d.test[:1], training.untrained(config, d), console)
  )
  return found | {"cost": cost}


def who_finds(config, d: domain.Domain, console) -> dict:
  """Encoders and their rivals trained, the neighbours found by each, and the errors of the predicted scores."""
  encoders, seconds = training.train_encoders(config, d, console)
  encoders = {name: scorers.cast(encoder, config.dtype) for name, encoder in encoders.items()}
  quality = {head: training.measure_quality(encoders[head], d, config) for head in training.HEADS}
  scores, item_scores, rate = training.score(config, d, encoders, console)
  retrievers, seconds, students = training.make_retrievers(config, d, encoders, scores["emb"], seconds, rate, console)
  return {
    "quality": quality,
    "pairs_per_second": rate,
    "seconds": seconds,
    "students": students,
    **recall.measure(config, d, scores, item_scores, retrievers, console),
    "errors": errors.measure_errors(config, scores),
    "spectrum": {head: errors.measure_spectrum(scores[head]) for head in training.HEADS},
  }


def check_config(config) -> None:
  s, d = config.search, config.domain
  require(s.budget in s.budgets, f"search.budget={s.budget} must be one of search.budgets {tuple(s.budgets)}")
  require(set(s.claimed) <= set(s.ks) and 1 in s.ks, f"search.claimed {tuple(s.claimed)} and 1 must be in search.ks")
  require(
    min(s.claimed) <= min(s.budgets) and max(s.ks) <= s.budget and max(s.budgets) < d.size,
    f"search.budgets {tuple(s.budgets)} must lie between the least claimed k, {min(s.claimed)}, and "
    f"domain.size={d.size}; search.budget={s.budget} must reach the largest k, {max(s.ks)}",
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
  best, ahead = recall.leads(config, table)
  of = lambda budget: f"{budget} calls ({budget / config.domain.size:.0%})"

  def said(budget):
    k = max(recall.within(s.claimed, budget))
    at = lambda name: table[name][f"k={k}"][f"C={budget}"]
    rival = best[k, budget]
    return f"of the {k} nearest {at('ANNCUR'):.0%}, ADACUR {at('ADACUR'):.0%}, the best rival ({rival}) {at(rival):.0%}"

  behind = sum(value < 0 for value in ahead.values())
  last = list(metrics["cost"].values())[-1]
  return (
    f"With {of(s.budget)} of {config.domain.size} items ANNCUR finds {said(s.budget)}; with {of(min(s.budgets))} "
    f"{said(min(s.budgets))}; behind at {behind} of {len(ahead)} k and budgets; "
    f"{last['all items by f / ANNCUR'][0]:.2g}x as fast as scoring all of {list(metrics['cost'])[-1]}."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  drawn = recall.draw(config, metrics["recall"], workdir) | errors.draw(config, metrics, workdir)
  return drawn | speed.draw(metrics["cost"], workdir)
