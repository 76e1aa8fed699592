"""CompactAttention: what a chunk's selection keeps, what answers and losses it costs, and what its execution takes."""

import functools
import math
import statistics
from pathlib import Path

import jax

from experiments import beside, long_context, results
from experiments.compact_attention import choosing, executing
from experiments.compact_attention.choosing import DENSE, QUOKA
from experiments.compact_attention.drawing import accuracies, choices, times
from experiments.compact_attention.executing import COPY, FULL, IN_PLACE, PLANTED, SELECTION, SPARSE, WHOLE
from experiments.long_context import parse
from experiments.report import rounded
from experiments.results import Claim
from jaxlab.attention.seer_gate import SeerGate, gate_loss

EXECUTIONS, CHOICES, UNIONS, ACCURACY, LOSSES = "executions", "choices", "unions", "accuracy", "losses"
OURS, SELECTORS = "compact", ("x_attention", "flex_prefill", "minference", "seer")


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts that config.parts names, each kept in the workdir as soon as it is measured."""
  part = functools.partial(results.part, workdir)

  @functools.cache
  def all_subjects():
    return {subject.name: subject for subject in long_context.subjects(config, cache)}

  def gate(name: str, methods):
    """The gate of a subject, trained or read, where one of the methods needs it."""
    if not any(parse(text)[0] == "seer" for text in methods):
      return None
    subject, train = all_subjects()[name], config.gate
    make = functools.partial(SeerGate, subject.network.model.config, jax.random.key(config.seed))
    loss = functools.partial(gate_loss, block=config.page)
    how = dict(data=config.data, cache=cache, file=workdir / f"gate.{name}.npz", seed=config.seed, console=console)
    return beside.trained(make, loss, subject, train, options=dict(width=train.width), **how)[0]

  def chosen(name: str) -> dict:
    console.say(f"what selectors choose in {name}")
    return choosing.measure(config, all_subjects()[name], gate(name, config.choices.methods))

  def united(name: str) -> dict:
    console.say(f"what unions of chunks and heads read in {name}")
    return choosing.unions(config, all_subjects()[name], gate(name, config.choices.methods[:1]))

  def asked(name: str) -> dict:
    methods = config.accuracy.methods
    found = choosing.decoders(methods, config, gate(name, methods))
    console.say(f"asking {name}")
    rows = long_context.accuracy(all_subjects()[name], found, config.accuracy)
    console.say(long_context.table(rows, ("decoder", "task", "length", "share", "low", "high")))
    return {"rows": rows}

  def read(name: str) -> dict:
    methods = config.losses.methods
    found = choosing.decoders(methods, config, gate(name, methods))
    console.say(f"losses of {name}")
    rows = long_context.losses(all_subjects()[name], found, config.losses, seed=config.seed)
    console.say(long_context.table(rows, ("decoder", "loss", "difference", "error")))
    return {"rows": rows}

  metrics, of = {}, {ACCURACY: asked, LOSSES: read, CHOICES: chosen, UNIONS: united}
  for kind in config.parts:
    if kind == EXECUTIONS:
      run = lambda case: _executed(config, case, all_subjects, console)
      metrics[kind] = {case: part(f"{kind}.{case}", functools.partial(run, case)) for case in _cases(config)}
    else:
      names = [name for name in long_context.subject_names(config) if config.model or name in config[kind].subjects]
      metrics[kind] = {name: part(f"{kind}.{name}", functools.partial(of[kind], name)) for name in names}
  return rounded(metrics)


def _cases(config) -> list[str]:
  """What is timed: lengths of planted problems, and a layer of the first subject."""
  e = config.executions
  first = long_context.subject_names(config)[0]
  return [f"{PLANTED} {length}" for length in e.lengths] + ([f"{first} {e.dumped}"] if e.dumped else [])


def _executed(config, case: str, all_subjects, console) -> dict:
  e = config.executions
  source, length = case.split(" ")
  console.say(f"timing attention of {e.chunk} queries, {case}")
  if source == PLANTED:
    shape = dict(heads=e.heads, kv_heads=e.kv_heads, size=e.size, dtype=e.dtype)
    problem = executing.planted(jax.random.key(config.seed), length=int(length), chunk=e.chunk, block=e.page, **shape)
  else:
    subject = all_subjects()[source]
    problem = executing.dumped(
      subject, length=int(length), chunk=e.chunk, layer=subject.network.model.config.depth // 2
    )
  return {"length": int(length)} | executing.measure(config, problem)


def claims(config, metrics: dict) -> list[Claim]:
  made = execution_claims(config, metrics[EXECUTIONS]) if EXECUTIONS in metrics else []
  made += accuracy_claims(metrics[ACCURACY], metrics.get(CHOICES, {})) if ACCURACY in metrics else []
  made += loss_claims(metrics[LOSSES]) if LOSSES in metrics else []
  made += choice_claims(metrics[CHOICES]) if CHOICES in metrics else []
  made += union_claims(metrics[UNIONS]) if UNIONS in metrics else []
  return made


def longest(cases: dict) -> dict:
  """The planted problem of the longest past."""
  return max((case for name, case in cases.items() if name.startswith(PLANTED)), key=lambda case: case["length"])


def execution_claims(config, cases: dict) -> list[Claim]:
  case = longest(cases)
  e, length = config.executions, case["length"]
  ms = {name: found["median"] for name, found in case["milliseconds"].items()}
  where = f"{e.chunk} queries of {e.heads} heads at {length} positions"
  rate = lambda name: f"{name} {ms[name]:.3g} ms ({case['tflops'][name]:.3g} TFLOP/s)"
  ratio, low, high = case["speedup"][WHOLE]
  read = f"{1 - case['before']:.1%} of the blocks not chosen, {1 - case['after']:.1%} not read"
  return [
    Claim(
      f"How many times as fast as cuDNN's dense attention selection and attention of a chunk are, {where}", "x",
      "higher", ours=ratio, threshold=2.5, paper=2.72, spread=(low, high), baseline=f"dense {ms[DENSE]:.3g} ms",
      note=f"{read}; {rate(WHOLE)}, of it selection {ms[SELECTION]:.3g} ms; peak {case['peak']:.4g} TFLOP/s",
    ),
    Claim(
      f"How many times as fast attention in place is as the same kernel over a full table, {where}", "x", "higher",
      ours=ms[FULL] / ms[IN_PLACE], threshold=2.0, baseline=rate(FULL), note=rate(IN_PLACE),
    ),
    Claim(
      f"The less of: copied over in place, block-sparse over copied, in time, {where}", "x", "higher",
      ours=min(ms[COPY] / ms[IN_PLACE], ms[SPARSE] / ms[COPY]), threshold=1.0, paper=1.3,
      baseline=f"{rate(SPARSE)}, {rate(COPY)}",
      note=f"copied over in place {ms[COPY] / ms[IN_PLACE]:.3g}, block-sparse over copied {ms[SPARSE] / ms[COPY]:.3g}",
    ),
    Claim(
      f"Speed of the kernel over a full table, cuDNN's dense attention being 1, {where}", "x", "higher",
      ours=ms[DENSE] / ms[FULL], threshold=0.85, baseline=rate(DENSE), note=rate(FULL),
    ),
    Claim(
      "Temporary memory of selection and attention over what the chunk's scores would take", "", "lower",
      ours=case["temporaries"] / case["scores"], threshold=0.25, baseline="all scores of the chunk, in 16 bits",
      note=f"{case['temporaries'] / 1e6:.4g} MB, scores {case['scores'] / 1e6:.4g} MB",
    ),
  ]  # fmt: skip


def cells(rows: list[dict], kind: str) -> list[dict]:
  """The rows of one kind of method."""
  return [row for row in rows if row["decoder"].split(" ")[0] == kind]


def accuracy_claims(found: dict, chosen: dict) -> list[Claim]:
  """Of the methods that are named first of their kind: further ones are for the figure."""
  rows = [row for subject in found.values() for row in subject["rows"]]
  ours, rival = (_first_of(rows, kind) for kind in (OURS, QUOKA))
  worst = min(ours, key=lambda row: -abs(row["difference"]))
  count = ours[0]["count"]
  made = [
    Claim(
      "Points by which answers under CompactAttention differ from dense ones, worst cell", "points", "lower",
      ours=100 * abs(worst["difference"]), threshold=2.0, paper=0.48, baseline="dense attention",
      note=f"{_cell(worst)}: {100 * worst['difference']:+.3g} (standard error {100 * worst['error']:.2g}); {count} "
      f"questions a cell; {worst['decoder']}",
    )
  ]  # fmt: skip
  if rival:
    both = list(zip(ours, rival, strict=True))
    gap = lambda pair: pair[0]["share"] - pair[1]["share"]
    least = min(both, key=gap)
    mean = lambda rows: sum(row["share"] for row in rows) / len(rows)
    made.append(
      Claim(
        "Points of CompactAttention's answers over QUOKA's, worst cell", "points", "higher", ours=100 * gap(least),
        threshold=0.0, baseline=f"QUOKA {100 * mean(rival):.3g}, CompactAttention {100 * mean(ours):.3g} on average",
        paper=4.32, note=f"{_cell(least[0])}; {rival[0]['decoder']} of the past, {ours[0]['decoder']}",
      )
    )  # fmt: skip
    by_task = {task: max(gap(pair) for pair in both if pair[0]["task"] == task) for task in _tasks(ours)}
    if "multi_key" in by_task and len(by_task) > 1:
      others = {task: value for task, value in by_task.items() if task != "multi_key"}
      made.append(
        Claim(
          "Points that QUOKA loses to CompactAttention on many keys, over the most it loses on another task", "points",
          "higher", ours=100 * (by_task["multi_key"] - max(others.values())), threshold=0.0,
          note=", ".join(f"{task} {100 * value:.3g}" for task, value in by_task.items()),
        )
      )  # fmt: skip
  return made + selector_claims(found, chosen)


def selector_claims(found: dict, chosen: dict) -> list[Claim]:
  """Ours, as it is named first, against the best of the other selectors, each a mean over the tasks of the longest
  prompts, which are as long as those of part `choices`; none where no model was asked under another selector.

  Args:
    chosen: part `choices`. Of each other kind the method counts whose union reads most nearly as much of the past as
      ours; where that is not known, the one that is named first.
  """
  gaps, notes = [], []
  for subject, measured in found.items():
    longest = max(row["length"] for row in measured["rows"])
    rows = [row for row in measured["rows"] if row["length"] == longest]
    past = {text: row["past"] for text, row in chosen.get(subject, {}).items()}
    named = {kind: list(dict.fromkeys(row["decoder"] for row in cells(rows, kind))) for kind in (OURS, *SELECTORS)}
    ours, *others = named.values()
    if ours and any(others):
      off = lambda text, past=past, ours=ours[0]: (
        abs(past[text] - past[ours]) if {text, ours} <= set(past) else math.inf
      )
      methods = [ours[0], *(min(texts, key=off) for texts in others if texts)]
      shares = [statistics.mean(row["share"] for row in rows if row["decoder"] == text) for text in methods]
      gaps.append(100 * (shares[0] - max(shares[1:])))
      read = [f" ({past[text]:.1%} read)" if text in past else "" for text in methods]
      each = (f"{text} {share:.1%}{of}" for text, share, of in zip(methods, shares, read, strict=True))
      notes.append(f"{subject}, {longest} tokens: {', '.join(each)}")
  return [
    Claim(
      "Points of CompactAttention's answers by FlashPrefill's rule over those by the best other selector, whose union "
      "reads about as much of the past, worst model", "points", "higher", ours=min(gaps), threshold=0.0,
      baseline="the best of XAttention, FlexPrefill, MInference and SeerAttention's gate", note="; ".join(notes),
    )
  ] if gaps else []  # fmt: skip


def _first_of(rows: list[dict], kind: str) -> list[dict]:
  found = cells(rows, kind)
  return [row for row in found if row["decoder"] == found[0]["decoder"]]


def _tasks(rows: list[dict]) -> list[str]:
  return list(dict.fromkeys(row["task"] for row in rows))


def _cell(row: dict) -> str:
  return f"{row['subject']}, {row['task'].replace('_', ' ')}, {row['length']} tokens"


def loss_claims(found: dict) -> list[Claim]:
  rows = [row for subject in found.values() for row in subject["rows"]]
  ours, rival = (_first_of(rows, kind) for kind in (OURS, QUOKA))
  worst = max(ours, key=lambda row: row["difference"])
  shown = lambda row: f"{row['subject']} {row['difference']:+.4f} (standard error {row['error']:.2g})"
  return [
    Claim(
      "Nats that a token behind a prompt costs more under CompactAttention than densely, worst model", "nats", "lower",
      ours=worst["difference"], threshold=0.02,
      baseline="QUOKA " + ", ".join(map(shown, rival)) if rival else "dense attention",
      note=", ".join(map(shown, ours)) + f"; {worst['count']} documents, prompts of {worst['prompt']} tokens",
    )
  ]  # fmt: skip


def choice_claims(found: dict) -> list[Claim]:
  rows = {(subject, text): row for subject, methods in found.items() for text, row in methods.items()}
  ours = [(subject, row) for (subject, text), row in rows.items() if parse(text)[0] == OURS]
  first = {subject: row for subject, row in reversed(ours)}
  growth = {subject: row["after"] / row["before"] for subject, row in first.items()}
  least = min(row["least_gain"] for row in rows.values())
  return [
    Claim(
      "How many times as many blocks the union reads as are chosen, most of the models", "x", "lower",
      ours=max(growth.values()), threshold=3.0, paper=2.92,
      note="; ".join(
        f"{subject}: {row['before']:.1%} to {row['after']:.1%}, {row['mass_before']:.1%} of the attention to "
        f"{row['mass_after']:.1%}"
        for subject, row in first.items()
      )
      + f"; no query's attention gains less than {least:.2g}, all selectors",
    ),
  ]  # fmt: skip


def union_claims(found: dict) -> list[Claim]:
  """Of the union of all heads that share a key head; those of fewer are in the note."""
  growth, notes = [], []
  for subject, measured in found.items():
    rows = sorted(measured["rows"], key=lambda row: (row["chunk"], row["share"]))
    largest = [row for row in rows if row["share"] == rows[-1]["share"]]
    first, last = largest[0], largest[-1]
    growth.append(last["past"] / first["past"])
    each = ", ".join(f"{row['past']:.1%} ({row['chunk']}, {row['share']})" for row in rows)
    notes.append(f"{subject}, {measured['method']}: {each}")
  return [
    Claim(
      f"How many times as much of the past a chunk of {last['chunk']} reads as one of {first['chunk']}, most of the "
      "models", "x", "lower", ours=max(growth), threshold=1.5, baseline=f"chunks of {first['chunk']}",
      note="read by unions of (queries, heads): " + "; ".join(notes),
    )
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  text = []
  if EXECUTIONS in metrics:
    case = longest(metrics[EXECUTIONS])
    ratio = case["speedup"][WHOLE][0]
    text.append(
      f"with {1 - case['after']:.0%} of the blocks unread a chunk of {config.executions.chunk} queries at "
      f"{case['length']} positions is {ratio:.2f}x as fast as dense attention, selection included (the paper's 2.72x)"
    )
  if ACCURACY in metrics:
    rows = [row for subject in metrics[ACCURACY].values() for row in subject["rows"]]
    mean = lambda rows: 100 * sum(row["share"] for row in rows) / len(rows)
    ours, rival = _first_of(rows, OURS), _first_of(rows, QUOKA)
    dense = cells(rows, DENSE)
    chosen = metrics.get(CHOICES, {}).get(ours[0]["subject"], {}).get(ours[0]["decoder"])
    read = f"with {chosen['past']:.0%} of the past read " if chosen else ""
    text.append(
      f"{read}{mean(ours):.1f} % of the questions are answered right ({mean(dense):.1f} % by dense attention"
      + (f", {mean(rival):.1f} % by QUOKA; the paper's 82.3, 82.8 and 78.0)" if rival else ")")
    )
  if not text:
    rows = [row for subject in metrics.get(LOSSES, {}).values() for row in _first_of(subject["rows"], OURS)]
    text = [f"losses behind a prompt grow by {row['difference']:+.4f} nats in {row['subject']}" for row in rows]
  joined = "; ".join(text) or "nothing but selections was measured"
  return f"{joined[0].upper()}{joined[1:]}."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  figures = {}
  if EXECUTIONS in metrics:
    figures |= times(metrics[EXECUTIONS], workdir)
  if CHOICES in metrics:
    figures |= choices(metrics[CHOICES], workdir)
  if ACCURACY in metrics:
    figures |= accuracies(metrics[ACCURACY], metrics.get(CHOICES, {}), workdir)
  return figures
