"""Methods that read or keep less of a long prompt, side by side: answers, losses by position, bytes, attention kept."""

import functools
from pathlib import Path

from experiments.contexts.drawing import answers, positions
from experiments.contexts.readers import CHELSEA, CHUNKLLM, COMPACT, DENSE, DHSA, EVICTING, TITLES
from experiments.contexts.reading import questions_of, text_of
from experiments.long_context import by_model, parse, subject_names, subjects, table
from experiments.report import rounded
from experiments.results import Claim, part

QUESTIONS, TEXT = "questions", "text"
OURS = (COMPACT, DHSA, CHUNKLLM, CHELSEA)


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """{part: {model: what it measured}}, each kept in the workdir as soon as it is measured."""
  called = subject_names(config)
  every = functools.cache(lambda: dict(zip(called, subjects(config, cache), strict=True)))

  def asked(name: str) -> list[dict]:
    console.say(f"asking {name}")
    rows = questions_of(config, every()[name])
    console.say(table(rows, ("decoder", "task", "length", "share", "low", "high")))
    return rows

  def read(name: str) -> dict:
    console.say(f"texts of {name}")
    found = text_of(config, every()[name])
    console.say(table(found["losses"], ("decoder", "position", "loss", "difference", "error")))
    return found

  kept = lambda kind, run: lambda name: part(workdir, f"{kind}.{name}", functools.partial(run, name))
  answering = [name for name in called if config.model or name in config.questions.subjects]
  measures = {QUESTIONS: (kept(QUESTIONS, asked), answering), TEXT: (kept(TEXT, read), called)}
  return rounded(by_model(config, workdir, called, measures, {}))


def kind_of(name: str) -> str:
  return name if name == DENSE else parse(name)[0]


def mean_shares(rows: list[dict]) -> dict[str, float]:
  """{decoder: answers right in %, mean over tasks and lengths}."""
  names = dict.fromkeys(row["decoder"] for row in rows)
  of = lambda name: [100 * row["share"] for row in rows if row["decoder"] == name]
  return {name: sum(of(name)) / len(of(name)) for name in names}


def claims(config, metrics: dict) -> list[Claim]:
  made = question_claims(metrics[QUESTIONS]) if metrics.get(QUESTIONS) else []
  return made + (text_claims(metrics[TEXT]) if metrics.get(TEXT) else [])


def question_claims(found: dict) -> list[Claim]:
  """A claim for each of the four methods, its worst model; and Chelsea beside the best cache that evicts."""
  shares = {model: mean_shares(rows) for model, rows in found.items()}
  count = next(iter(found.values()))[0]["count"]
  said = "; ".join(f"{m}: " + ", ".join(f"{n} {s:.3g} %" for n, s in of.items()) for m, of in shares.items())
  made = []
  for kind in OURS:
    lost = {m: of[DENSE] - s for m, of in shares.items() for name, s in of.items() if kind_of(name) == kind}
    if lost:
      worst = max(lost, key=lost.get)
      made.append(
        Claim(
          f"Points by which {TITLES[kind]} answers fewer questions than dense attention, mean of tasks, worst model",
          "points", "lower", ours=lost[worst], threshold=2.0, baseline=f"{worst}, dense {shares[worst][DENSE]:.3g} %",
          note=said + f"; {count} questions a cell" if not made else "",
        )
      )  # fmt: skip
  ahead = {}
  for model, of in shares.items():
    mine, rivals = ([s for name, s in of.items() if kind_of(name) in kinds] for kinds in ((CHELSEA,), EVICTING))
    if mine and rivals:
      ahead[model] = min(mine) - max(rivals)
  if ahead:
    made.append(
      Claim(
        "Points of Chelsea over the best cache that evicts, question unseen, worst model", "points", "higher",
        ours=min(ahead.values()), threshold=0.0, baseline=", ".join(EVICTING),
      )
    )  # fmt: skip
  return made


def text_claims(found: dict) -> list[Claim]:
  """Of the four methods: losses at the last position, how they grow towards it, bytes; of all, attention kept."""
  last, growth, lines = {}, {}, []
  for model, of in found.items():
    rows = [row for row in of["losses"] if kind_of(row["decoder"]) in OURS]
    near, far = (pick(row["position"] for row in rows) for pick in (min, max))
    at = lambda place, rows=rows: {row["decoder"]: row for row in rows if row["position"] == place}
    for name, row in at(far).items():
      last[f"{model}, {name}"] = row["difference"]
      growth[f"{model}, {name}"] = row["difference"] - at(near)[name]["difference"]
      lines.append(f"{model}, {name} {row['difference']:+.4f} ({row['error']:.2g})")
  held = {f"{m}, {n}": size / of["bytes"][DENSE] for m, of in found.items() for n, size in of["bytes"].items()}
  merged = {name: share for name, share in held.items() if kind_of(name.split(", ")[1]) == CHELSEA}
  kept = {f"{m}, {n}": k for m, of in found.items() for n, k in of["kept"].items()}
  made = []
  if last:
    made += [
      Claim(
        "Nats that a token at the last position costs more than densely, worst of the four methods", "nats", "lower",
        ours=max(last.values()), threshold=0.02, baseline="dense attention",
        note=", ".join(lines) + "; standard errors in brackets",
      ),
      Claim(
        "Nats by which that is more than at the first position, worst of the four methods", "nats", "lower",
        ours=max(growth.values()), threshold=0.01, note=", ".join(f"{n} {g:+.4f}" for n, g in growth.items()),
      ),
    ]  # fmt: skip
  if merged:
    made.append(
      Claim(
        "Bytes that Chelsea holds behind the longest prompt over those of a dense cache, worst model", "", "lower",
        ours=max(merged.values()), threshold=0.5, baseline="dense 1",
        note=", ".join(f"{name} {share:.3g}" for name, share in held.items()),
      )
    )  # fmt: skip
  if kept:
    gain = {name: k["recall"] / k["share"] for name, k in kept.items()}
    worst = min(gain, key=gain.get)
    made.append(
      Claim(
        "Share of the attention to the prompt that the tokens kept or read hold, over their own share, worst method",
        "x", "higher", ours=gain[worst], threshold=1.0, baseline="tokens taken by chance 1",
        note=", ".join(f"{n} {k['recall']:.3g} of {k['share']:.3g}" for n, k in kept.items()),
      )
    )  # fmt: skip
  return made


def finding(config, metrics: dict) -> str:
  said = []
  for model, rows in metrics.get(QUESTIONS, {}).items():
    shares = mean_shares(rows)
    listed = ", ".join(f"{TITLES[kind_of(n)]} {s:.3g}" for n, s in shares.items() if kind_of(n) in OURS)
    said.append(f"{model} answers {shares[DENSE]:.3g} % of five tasks' questions densely, under {listed}")
  for model, of in metrics.get(TEXT, {}).items():
    far = max(row["position"] for row in of["losses"])
    rows = [row for row in of["losses"] if row["position"] == far and kind_of(row["decoder"]) in OURS]
    listed = ", ".join(f"{TITLES[kind_of(row['decoder'])]} {row['difference']:+.3f}" for row in rows)
    said.append(f"behind {far} tokens {model} loses in nats: {listed}")
  text = "; ".join(said)
  return f"{text[0].upper()}{text[1:]}."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  figures = answers(metrics[QUESTIONS], workdir) if metrics.get(QUESTIONS) else {}
  return figures | (positions(metrics[TEXT], workdir) if metrics.get(TEXT) else {})
