"""Cache-Craft: what is lost where chunks are computed again in part, what that saves, beside other choices of the part.

Parts: `answers` has facts that go on in the next chunk, and real passages; `trace` requests by Zipf's law;
`speed` times to the first token.
"""

import functools
from pathlib import Path

from experiments import results
from experiments.cache_craft.answers import BEST, EARLY, NEW, facts, passages
from experiments.cache_craft.drawing import draw
from experiments.cache_craft.methods import FULL, NAIVE, OURS, ours
from experiments.cache_craft.speed import main_rows, share_of, speed
from experiments.cache_craft.trace import ALL, PREFIX, SET, trace
from experiments.long_context import subject_names, subjects
from experiments.results import Claim

__all__ = ["claims", "draw", "finding", "measure"]


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """{part: {model: what was measured}}; facts and the trace ask the first model, which has to be able to answer."""
  names = subject_names(config)
  found = functools.cache(lambda: dict(zip(names, subjects(config, cache), strict=True)))
  made: dict = {}

  def kept(part: str, name: str, function):
    def run():
      console.say(f"{part} of {name}")
      return function(config, found()[name])

    made.setdefault(part, {})[name] = results.part(workdir, f"{part}.{name}", run)

  for part in config.parts:
    if part == "speed":
      made[part] = results.part(workdir, part, lambda: speed(config, console))
    elif part == "facts":
      kept(part, names[0], lambda c, subject: facts(c, subject, console))
    elif part == "trace":
      kept(part, names[0], lambda c, subject: trace(c, subject, made["facts"][names[0]]["alpha"], console))
    else:
      for name in names:
        kept(part, name, lambda c, subject: passages(c, subject, console))
  return made


def rows_of(found: dict) -> dict[str, dict]:
  """A part's rows by their method."""
  return {row["method"]: row for row in found["rows"]}


def claims(config, metrics: dict) -> list[Claim]:
  """Facts first, then the trace, passages, times."""
  made = fact_claims(config, next(iter(metrics["facts"].values()))) if "facts" in metrics else []
  made += trace_claims(next(iter(metrics["trace"].values()))) if "trace" in metrics else []
  made += passage_claims(metrics["passages"]) if "passages" in metrics else []
  return made + (speed_claims(config, metrics["speed"]) if "speed" in metrics else [])


def fact_claims(config, found: dict) -> list[Claim]:
  rows, alpha = rows_of(found), found["alpha"]
  main, full, naive = rows[ours(alpha)], rows[FULL], rows[NAIVE]
  share = f"{100 * main['share']:.0f} % of moved chunks computed again"
  setting = f"alpha {alpha:g}, {share}, {config.facts.queries} questions"
  ahead = lambda name: rows[name]["lost"] - main["lost"]
  equal = "the same share of every moved chunk"
  return [
    Claim(
      "Points of right answers that Cache-Craft loses to a full prefill, at most 30 % of moved chunks computed again",
      "points", "lower", ours=main["lost"], threshold=2.0, paper=1.0, baseline=100 * full["right"],
      note=f"{setting}; standard error {main['error']:.2g}; the paper's figure is at 30 to 60 %; "
      f"{rows[NEW]['lost']:.1f} where chunks count that a variant never stood behind; the smallest alpha that was good "
      f"enough on other questions, or the largest: {found['enough']:g}",
    ),
    Claim(
      "Points of right answers that are lost where chunks are reused as they were cached", "points", "higher",
      ours=naive["lost"], threshold=15.0, paper=35.0, baseline=100 * full["right"],
      note=f"standard error {naive['error']:.2g}; facts that were cut {naive['cut']:.2f} right; "
      f"with the best of up to {config.variants} variants {100 * rows[BEST]['right']:.0f} % right",
    ),
    Claim(
      "Points of right answers over tokens computed again by chance, or those most attended to (H2O)", "points",
      "higher", ours=min(ahead("random"), ahead("most attended")), threshold=5.0, baseline=equal, note="the better one",
    ),
    Claim(
      "Points of right answers over CacheBlend, as many tokens computed again", "points", "higher",
      ours=ahead("CacheBlend"), threshold=-1.0, baseline="the tokens whose values changed most",
    ),
    Claim(
      "Points of right answers over the first tokens of every chunk computed again (EPIC)", "points", "higher",
      ours=ahead("first tokens"), threshold=0.0, baseline=equal,
      note="what depends on the chunk before stands at a chunk's beginning here",
    ),
    Claim(
      "Points of right answers lost where chunks that a variant never stood behind count in CFO", "points", "lower",
      ours=rows[NEW]["lost"], threshold=2.0, baseline=main["lost"],
      note=f"the same alpha: {100 * rows[NEW]['share']:.0f} % computed again; the published CFO is 0 of a chunk that "
      "was cached as the first of a prompt, whatever stands before it now",
    ),
    Claim(
      "Rank correlation of CFO and how far cached values are from those of a full prefill", "rho", "higher",
      ours=found["deviation"]["spearman"], threshold=0.4,
      note=f"alpha 1; where new chunks count {found['deviation']['penalised']:.2f}",
    ),
    Claim(
      "Points of right answers lost where tokens of unfocused chunks stop early", "points", "lower",
      ours=rows[EARLY]["lost"] - main["lost"], threshold=1.0, baseline="tokens computed again to the end",
      note=f"token-layers {rows[EARLY]['layers']:.3f} of all instead of {main['layers']:.3f}; the question attends "
      "most to the chunk that stands next to it, whatever it asks for",
    ),
  ]  # fmt: skip


def trace_claims(found: dict) -> list[Claim]:
  layers, mine, new = found["layers"], found["ours"][OURS], found["ours"][NEW]
  saved = lambda name, of: f"{100 * (1 - layers[name] / layers[of]):.0f} %"
  return [
    Claim(
      "Token-layers saved beside caching prefixes, requests by Zipf's law", "share", "higher",
      ours=1 - layers[OURS] / layers[PREFIX], threshold=0.4, paper=0.51, baseline="the longest known prefix of chunks",
      note=f"{saved(OURS, ALL)} beside full prefills (paper 75 %), {saved(OURS, SET)} beside chunks put in order for "
      f"prefixes; chunks found {mine['hits']:.2f}, in a prefix {found['prefix_hits']:.2f}; answers right "
      f"{mine['right']:.2f}; where new chunks count {saved(NEW, PREFIX)} saved, {new['right']:.2f} right",
    ),
  ]  # fmt: skip


def passage_claims(found: dict) -> list[Claim]:
  def worst(rival: str) -> float:
    ratio = lambda one: rows_of(one)[ours(one["alpha"])]["kl"] / max(rows_of(one)[rival]["kl"], 1e-12)
    return max(map(ratio, found.values()))

  def listed(name: str) -> str:
    rows = rows_of(found[name])
    main, new = rows[ours(found[name]["alpha"])], rows.get(NEW)
    more = f", {new['kl']:.3g} with {100 * new['share']:.0f} % where new chunks count" if new else ""
    return f"{name}: KL {rows[NAIVE]['kl']:.3g}, {main['kl']:.3g} with {100 * main['share']:.0f} %{more}"

  return [
    Claim(
      "Divergence of answers from a full prefill on real passages, over that of chunks as cached", "ratio", "lower",
      ours=worst(NAIVE), threshold=0.5, baseline="nothing computed again",
      note=f"worst model; {'; '.join(map(listed, found))}",
    ),
    Claim(
      "Divergence of answers from a full prefill on real passages, over that of tokens by chance", "ratio", "lower",
      ours=worst("random"), threshold=1.0, baseline="the same share of every moved chunk",
      note=f"worst model; over CacheBlend's {worst('CacheBlend'):.2g}; chunks whose CFO is 0 are not mended at all",
    ),
  ]  # fmt: skip


def speed_claims(config, found: dict) -> list[Claim]:
  rows = main_rows(config)
  name, cases = f"{rows}", found["cases"]
  worst = min(cases, key=lambda case: case["ratio"][name])
  times = lambda case: ", ".join(f"{key} {ms:.1f}" for key, ms in case["milliseconds"].items())
  listed = "; ".join(f"batch {case['batch']}: {times(case)}" for case in cases)
  low, high = worst["spread"][name]
  return [
    Claim(
      f"Time to the first token over that of a full prefill, {100 * share_of(config, rows):.0f} % computed again",
      "ratio", "lower", ours=1 / worst["ratio"][name], threshold=0.6, paper=0.5, spread=(1 / high, 1 / low),
      baseline="inference.prefill, cuDNN attention on a GPU",
      note=f"worst batch, {worst['tokens']} tokens; milliseconds by rows computed: {listed}; loading from pinned "
      f"memory {found['load']:.1f}, of {found['depth']} layers {found['preload'][name]} ahead",
    )
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  """Loss, share, savings; of parts that were measured."""
  parts = []
  if "facts" in metrics:
    found = next(iter(metrics["facts"].values()))
    rows = rows_of(found)
    main = rows[ours(found["alpha"])]
    right = lambda name: f"{100 * rows[name]['right']:.0f} %"
    parts.append(
      f"With {100 * main['share']:.0f} % of moved chunks computed again {right(main['method'])} of answers are right "
      f"(full prefill {right(FULL)}, new chunks counted {right(NEW)}, as cached {right(NAIVE)}, as many by chance "
      f"{right('random')}, by CacheBlend {right('CacheBlend')}, the first ones {right('first tokens')})"
    )
  if "trace" in metrics:
    seen = next(iter(metrics["trace"].values()))
    fewer = lambda way, of: f"{100 * (1 - seen['layers'][way] / seen['layers'][of]):.0f} %"
    served = lambda way: f"{100 * seen['ours'][way]['right']:.0f} % right"
    parts.append(
      f"requests by Zipf's law take {fewer(OURS, PREFIX)} fewer token-layers than with cached prefixes, {served(OURS)} "
      f"(new chunks counted {fewer(NEW, PREFIX)}, {served(NEW)}; paper 51 %), and {fewer(OURS, ALL)} fewer than full "
      "prefills (paper 75 %)"
    )
  if "passages" in metrics:
    kept = [rows_of(one)[ours(one["alpha"])]["kl"] / rows_of(one)[NAIVE]["kl"] for one in metrics["passages"].values()]
    parts.append(f"on real passages {100 * min(kept):.0f} to {100 * max(kept):.0f} % of the divergence stays")
  if not parts:
    (claim,) = speed_claims(config, metrics["speed"])
    parts.append(f"The first token comes after {claim.ours:.2f} of a full prefill's time")
  text = "; ".join(parts)
  return f"{text[0].upper()}{text[1:]}."
