"""ANNCUR: a cross-encoder trained on real text, its score matrix, and who finds its neighbours at equal cost."""

from pathlib import Path

from experiments import results
from experiments.anncur import domain, errors, recall, speed, training
from experiments.results import Claim
from jaxlab.core.checks import require


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Encoders and their scores, a student a way of distilling, recall a budget, errors, time: each a part of the run."""
  check_config(config)
  d = domain.load(config, cache)
  console.say(
    f"{config.data.name}: {len(d.items)} items searched, {len(d.train)} queries and {len(d.pool)} items to train on"
  )
  part = lambda name, measure, *given: results.part(workdir, name, lambda: measure(config, d, *given))
  trained = part("encoders", training.train_and_score, workdir, console)
  kept = training.kept(config, d, workdir)
  students = {
    name: part(f"student.{way}", training.distil_and_score, way, kept, workdir, console)
    for way, name in training.STUDENTS.items()
  }
  retrievers = training.retrievers(config, d, kept, workdir)
  found = {
    budget: part(f"recall.{budget}", recall.measure, kept, retrievers, budget) for budget in config.search.budgets
  }
  return {
    **trained,
    "students": students,
    **recall.by_budget(found),
    **part("errors", errors.measure, kept.scores),
    # What a query takes does not depend on what the encoders learnt.
    "cost": part("cost", speed.measure, training.untrained(config, d), console),
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
  shared = config.distil.shared
  require(
    shared.batch <= d.anchor_queries and shared.size <= d.size,
    f"distil.shared has batch={shared.batch} of domain.anchor_queries={d.anchor_queries} and size={shared.size} of "
    f"domain.size={d.size}; lower them",
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
