"""Chelsea: what a cache loses whose similar keys are merged, beside caches that evict and other ways of merging.

A module here is a part of the run.
"""

import functools
from pathlib import Path

import numpy as np

from experiments import results
from experiments.chelsea import quality, serving, speed
from experiments.chelsea.decoders import DENSE, formula
from experiments.chelsea.drawing import pictures
from experiments.chelsea.quality import SEEN
from experiments.chelsea.serving import CHELSEA
from experiments.long_context import by_model, subject_names, subjects
from experiments.results import Claim

LOSSES, QUESTIONS, MERGINGS, SIMILARITY = "losses", "questions", "mergings", "similarity"
SPEED, SERVING = "speed", "serving"
_TITLES = dict(streaming_llm="StreamingLLM", h2o="H2O", snapkv="SnapKV", keydiff="KeyDiff")


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts, all of the first model before the next one's; none is measured again in this workdir."""
  called = subject_names(config)
  found = functools.cache(lambda: dict(zip(called, subjects(config, cache), strict=True)))
  asked = [name for name in called if config.model or name in config.questions.subjects]

  def kept(part, measure_one):
    def run(name):
      console.say(f"{part} of {name}")
      return measure_one(config, found()[name])

    return lambda name: results.part(workdir, f"{part}.{name}", functools.partial(run, name))

  measures = {
    LOSSES: (kept(LOSSES, quality.losses_of), called),
    QUESTIONS: (kept(QUESTIONS, quality.questions_of), asked),
    MERGINGS: (kept(MERGINGS, quality.mergings_of), called[:1]),
    SIMILARITY: (kept(SIMILARITY, quality.similarity_of), called),
    SERVING: (kept(SERVING, serving.serving_of), asked),
  }
  return by_model(config, workdir, called, measures, {SPEED: lambda: speed.measure(config, console)})


def claims(config, metrics: dict) -> list[Claim]:
  made = loss_claims(config, metrics) if LOSSES in metrics else []
  made += question_claims(config, metrics) if QUESTIONS in metrics else []
  made += merging_claims(metrics[MERGINGS]) if MERGINGS in metrics else []
  made += speed_claims(config, metrics[SPEED]) if SPEED in metrics else []
  return made + (serving_claims(metrics[SERVING]) if SERVING in metrics else [])


def added(rows: list[dict]) -> dict[str, float]:
  """{decoder: loss over that of dense attention, in %}."""
  dense = next(row["loss"] for row in rows if row["decoder"] == DENSE)
  return {row["decoder"]: 100 * row["difference"] / dense for row in rows if row["decoder"] != DENSE}


def loss_claims(config, metrics: dict) -> list[Claim]:
  by_model = {name: added(rows) for name, rows in metrics[LOSSES].items()}
  main = f"Chelsea {config.keep:g}"
  worst = max(by_model, key=lambda name: by_model[name][main])
  listed = lambda name: ", ".join(f"{_TITLES.get(who, who)} {more:.3g} %" for who, more in by_model[name].items())
  rivals = {who: more for who, more in by_model[worst].items() if who in _TITLES}
  best = min(rivals, key=rivals.get)
  held = next(row["entries"] for row in metrics[LOSSES][worst] if row["decoder"] == main)
  return [
    Claim(
      f"Loss added to text behind a prompt whose entries are merged to {config.keep:.0%}, worst model", "%", "lower",
      ours=by_model[worst][main], threshold=3.0,
      baseline=f"{_TITLES[best]} of as many bytes {rivals[best]:.3g} %",
      note=f"with first and recent tokens {held:.0%} of the entries stay; "
      + "; ".join(f"{name}: {listed(name)}" for name in by_model),
    )
  ]  # fmt: skip


def question_claims(config, metrics: dict) -> list[Claim]:
  rows = [row for rows in metrics[QUESTIONS].values() for row in rows]
  cells = sorted({(row["subject"], row["task"], row["length"]) for row in rows})
  at = lambda who, cell: next(
    row["share"] for row in rows if row["decoder"] == who and (row["subject"], row["task"], row["length"]) == cell
  )
  mean = lambda who: 100 * sum(at(who, cell) for cell in cells) / len(cells)
  lost = {cell: 100 * (at(DENSE, cell) - at("Chelsea", cell)) for cell in cells}
  worst = max(lost, key=lost.get)
  best = max(config.rivals, key=mean)
  seen = [f"{name}, {SEEN}" for name in ("Chelsea", "snapkv") if any(r["decoder"] == f"{name}, {SEEN}" for r in rows)]
  shares = ", ".join(f"{_TITLES.get(name, name)} {mean(name):.3g} %" for name in (DENSE, "Chelsea", *config.rivals))
  asked = f"{config.questions.count} questions in each of {len(cells)} cells; the cache shrinks before the question"
  return [
    Claim(
      f"Answers lost when the cache is merged to {config.keep:.0%} before the question, worst cell", "points", "lower",
      ours=lost[worst], threshold=5.0, baseline=f"dense attention {100 * at(DENSE, worst):.3g} % right",
      note=f"{worst[0]}, {worst[1].replace('_', ' ')} at {worst[2]} tokens; {asked}",
    ),
    Claim(
      "Answers right over those of the best rival of as many bytes, mean", "points", "higher",
      ours=mean("Chelsea") - mean(best), threshold=10.0, baseline=f"{_TITLES[best]} {mean(best):.3g} %",
      note=f"{shares}; " + ", ".join(f"{name} {mean(name):.3g} %" for name in seen),
    ),
  ]  # fmt: skip


def merging_claims(by_model: dict) -> list[Claim]:
  (found,) = by_model.values()
  kl = {name: row["kl"] for name, row in found.items()}
  said = lambda name: f"{kl[name]:.3g} nats"

  def ratio(name: str, over: str, says: str, threshold: float = 1.0, note: str = "") -> Claim:
    return Claim(says, "ratio", "lower", kl[name] / kl[over], threshold, baseline=said(over), note=note)

  every = ", ".join(f"{name} {said(name)}" for name in kl)
  return [
    ratio("Chelsea", "any half proposes", "KL from dense predictions with alternating over random halves", note=every),
    ratio("any half proposes", "the first half proposes", "KL with random halves over first against second half"),
    ratio("Chelsea", "no chunks", "KL with chunks over matching the whole cache at once", 1.05),
    ratio("Chelsea", "no counts", "KL with centroids that weigh what they stand for over without"),
  ]


def speed_claims(config, found: dict) -> list[Claim]:
  keep = config.speed.keep
  case = max(found["steps"], key=lambda case: case["speedup"])
  reached = {c["context"]: c["speedup"] / formula(c, keep) for c in found["steps"]}
  times, memory = found["merging"]["milliseconds"], found["merging"]["temporaries"]
  name = lambda c: f"{c['rows']} rows of {c['context']}"
  bandwidth = found["bandwidth"] / 1e9
  rate = lambda c: (c["chelsea_bytes"] + c["weight_bytes"]) / c["milliseconds"]["Chelsea"] * 1e-6
  return [
    Claim(
      f"How many times as fast a layer decodes a token with its entries merged to {keep:.0%}", "x", "higher",
      ours=case["speedup"], threshold=3.0, paper=3.19, spread=tuple(case["spread"]),
      baseline=f"{case['best']}, dense, {case['milliseconds'][case['best']]:.3g} ms",
      note=f"{name(case)} tokens, merging amortised; "
      + "; ".join(
        f"{name(c)}: " + ", ".join(f"{who} {ms:.3g} ms" for who, ms in c["milliseconds"].items())
        + f", Chelsea reads {rate(c):.0f} of the copy's {bandwidth:.0f} GB/s" for c in found["steps"]
      ),
    ),
    Claim(
      "Share of the speed-up that the bytes read allow, worst case", "", "higher", ours=min(reached.values()),
      threshold=0.8, baseline="(1 + x) / (1 + keep x), x cache bytes over weight bytes",
      note="; ".join(f"{name(c)}: {formula(c, keep):.3g} x allowed" for c in found["steps"]),
    ),
    Claim(
      "Time to merge a prompt's entries over the time to read it", "%", "lower",
      ours=100 * times["Chelsea"] / times["prefill"], threshold=5.0, baseline=f"prefill {times['prefill']:.3g} ms",
      note=f"one layer, {found['merging']['prompt']} tokens; temporaries {memory['Chelsea'] / 2**20:.3g} MiB",
    ),
    Claim(
      "How many times as long matching takes without chunks", "x", "higher", ours=times["no chunks"] / times["Chelsea"],
      threshold=5.0, baseline=f"with chunks {times['Chelsea']:.3g} ms",
      note=f"temporaries {memory['no chunks'] / 2**20:.3g} MiB",
    ),
  ]  # fmt: skip


def serving_claims(by_model: dict) -> list[Claim]:
  gain = {name: np.array(found[CHELSEA]["rates"]) / found[DENSE]["rates"] for name, found in by_model.items()}
  worst = min(gain, key=lambda name: np.median(gain[name]))
  whole = by_model[worst][DENSE]
  says = lambda found: (
    f"{found['most']} at once ({found['mean']:.3g} on average), {np.median(found['rates']):.3g} tokens/s, "
    f"{found['preempted']} preempted, {100 * found['right']:.3g} % of answers right"
  )
  return [
    Claim(
      "How many times as many tokens a second are served from the same bytes of cache, worst model", "x", "higher",
      ours=float(np.median(gain[worst])), threshold=2.0, paper=4.0,
      spread=tuple(np.percentile(gain[worst], [10, 90]).tolist()),
      baseline=f"whole caches, {np.median(whole['rates']):.3g} tokens/s",
      note="; ".join(f"{worst}, {_TITLES.get(who, who)}: {says(found)}" for who, found in by_model[worst].items()),
    )
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  said = []
  if LOSSES in metrics:
    by_model = {name: added(rows)[f"Chelsea {config.keep:g}"] for name, rows in metrics[LOSSES].items()}
    said.append(f"the loss behind a prompt grows by {' and '.join(f'{v:.3g} % ({k})' for k, v in by_model.items())}")
  if QUESTIONS in metrics:
    lost, won = question_claims(config, metrics)
    said.append(f"{lost.ours:.3g} points of answers are lost at worst, {won.ours:+.3g} against the best rival's")
  if SPEED in metrics:
    said.append(f"a layer decodes {speed_claims(config, metrics[SPEED])[0].ours:.3g}x as fast at a fifth (paper 3.19x)")
  if SERVING in metrics:
    (claim,) = serving_claims(metrics[SERVING])
    said.append(f"from the same bytes {claim.ours:.3g}x as many tokens a second are served (paper up to 4x)")
  return f"Of entries merged to {config.keep:.0%}: {'; '.join(said)}."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  return pictures(config, metrics, _TITLES, workdir)
