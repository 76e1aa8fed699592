"""Requests that wait for the same bytes of cache: how many run at once, how fast and how well they are answered."""

import numpy as np

from experiments.chelsea import decoders
from experiments.chelsea.decoders import DENSE
from experiments.long_context import Subject
from jaxlab.cache.chelsea import chelsea
from jaxlab.cache.eviction import keydiff
from jaxlab.evaluation.long_context import Question, question
from jaxlab.models import paged
from jaxlab.serving import metrics, traces
from jaxlab.serving.engine import Engine
from jaxlab.serving.policies import sarathi
from jaxlab.serving.requests import Request, Served

CHELSEA, KEYDIFF = "Chelsea", "keydiff"


def serving_of(config, subject: Subject) -> dict[str, dict]:
  """{cache: {pages, most and mean sequences at once, rates: tokens made a second, of every repetition, preempted,
  compacted, right: share of answers}}, of the same questions, all of which wait from the beginning."""
  s, m = config.serving, config.method
  asked = [question(s.task, subject.tokens, subject.tokenizer, length=s.length, seed=i) for i in range(s.requests)]
  requests = [Request(f"{i}", q.prompt.tolist(), s.answer) for i, q in enumerate(asked)]
  entry = decoders.entry_bytes(subject)
  whole = s.sequences * -(-(s.length + s.answer) // s.page) + 2  # page 0, and one that admission leaves
  fewer = whole * entry // (entry + 4)  # their entries have sizes
  share = decoders.entries(m, config.keep, s.length) / s.length
  caches = {DENSE: paged.DENSE, CHELSEA: chelsea(keep=config.keep, **m.to_dict()), KEYDIFF: keydiff(keep=share)}
  engines, seen = {}, {name: [] for name in caches}

  def watched(name: str):
    def policy(view):
      plan = sarathi(view)
      seen[name].append(len(view.running))
      return plan

    return policy

  for name, method in caches.items():
    engines[name] = Engine(
      subject.network, pages=whole if method is paged.DENSE else fewer, page=s.page, length=s.length + s.answer,
      rows=s.rows, budget=s.budget, chunks=s.chunks, part=s.part, prefix=False, method=method, policy=watched(name),
    )  # fmt: skip
  found = {name: {"rates": []} for name in caches}
  for repetition in range(1 + s.repetitions):  # the first compiles
    for name, engine in engines.items():
      seen[name].clear()
      engine.counters.update(preempted=0, compacted=0)
      ended = traces.replay(engine, requests)
      if repetition:
        found[name]["rates"].append(metrics.summary(ended)["output_rate"])
      found[name] |= dict(
        pages=len(engine.pages.holders), most=max(seen[name]), mean=float(np.mean(seen[name])),
        preempted=engine.counters["preempted"], compacted=engine.counters["compacted"],
        right=_right(subject, asked, ended),
      )  # fmt: skip
  return found


def _right(subject: Subject, asked: list[Question], ended: list[Served]) -> float:
  """The share of answers that were given where they were due."""
  tokens = {served.request.id: served.tokens[len(served.request.prompt) :] for served in ended}
  shares = []
  for i, q in enumerate(asked):
    text = subject.tokenizer.decode(tokens[f"{i}"][: q.tokens])
    shares.append(np.mean([answer in text for answer in q.answers]))
  return float(np.mean(shares))
