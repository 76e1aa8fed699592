"""DHSA: how well boundaries are predicted, what a budget of keys costs in answers and losses, and what it saves."""

import functools
from pathlib import Path

import jax

from experiments import beside, long_context, results
from experiments.dhsa import predicting, prefilling
from experiments.dhsa.drawing import accuracies, prefills
from experiments.dhsa.methods import BLOCKS, CACHES, DENSE, OURS, decoders
from experiments.long_context import parse
from experiments.report import rounded
from experiments.results import Claim
from jaxlab.attention.dhsa_boundaries import BoundaryPredictor, boundary_loss

PREFILL, NETWORK, PREDICTOR, ACCURACY, LOSSES = "prefill", "network", "predictor", "accuracy", "losses"


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts that config.parts names, each kept in the workdir as soon as it is measured."""
  part = functools.partial(results.part, workdir)

  @functools.cache
  def subjects():
    return {subject.name: subject for subject in long_context.subjects(config, cache)}

  @functools.cache
  def predictor(name: str, encoder: str):
    """(the predictor of a subject, its losses in training), trained or read."""
    subject, p = subjects()[name], config.predictor
    make = functools.partial(BoundaryPredictor, subject.network.model.config, jax.random.key(config.seed))
    options = dict(heads=predicting.fitting_heads(subject, p.heads), hidden=p.hidden, encoder=encoder)
    file = workdir / f"predictor.{name}.{encoder}.npz"
    how = dict(data=config.data, cache=cache, file=file, seed=config.seed, console=console)
    return beside.trained(make, boundary_loss, subject, p, options=options, **how)

  def predicted(name: str) -> dict:
    found, encoders = {}, config.predictor.encoders
    for encoder in encoders if name == long_context.subject_names(config)[0] else encoders[:1]:
      console.say(f"boundaries of {name}, encoder {encoder}")
      made, losses = predictor(name, encoder)
      found[encoder] = {"losses": losses} | predicting.measure(config, subjects()[name], made)
    return found

  def named(name: str, methods) -> dict:
    score = predictor(name, config.predictor.encoders[0])[0].score
    return decoders(methods, config, score, longest=max(*config.accuracy.lengths, config.losses.prompt))

  def asked(name: str) -> dict:
    console.say(f"asking {name}")
    rows = long_context.accuracy(subjects()[name], named(name, config.accuracy.methods), config.accuracy)
    console.say(long_context.table(rows, ("decoder", "task", "length", "share", "low", "high")))
    return {"rows": rows}

  def read(name: str) -> dict:
    console.say(f"losses of {name}")
    rows = long_context.losses(subjects()[name], named(name, config.losses.methods), config.losses, seed=config.seed)
    console.say(long_context.table(rows, ("decoder", "loss", "difference", "error")))
    return {"rows": rows}

  def read_prompt() -> dict:
    name = long_context.subject_names(config)[0]
    console.say(f"timing how {name} reads a prompt")
    score = predictor(name, config.predictor.encoders[0])[0].score
    return prefilling.measure_network(config, subjects()[name], score)

  metrics, of = {}, {PREDICTOR: predicted, ACCURACY: asked, LOSSES: read}
  for kind in config.parts:
    if kind == PREFILL:
      metrics[PREFILL] = {
        str(length): part(f"{PREFILL}.{length}", lambda length=length: prefilling.measure(config, length, console))
        for length in config.prefill.lengths
      }
      metrics[NETWORK] = part(NETWORK, read_prompt)
    else:
      names = [name for name in long_context.subject_names(config) if config.model or name in config[kind].subjects]
      metrics[kind] = {name: part(f"{kind}.{name}", functools.partial(of[kind], name)) for name in names}
  return rounded(metrics)


def claims(config, metrics: dict) -> list[Claim]:
  made = accuracy_claims(metrics[ACCURACY]) if ACCURACY in metrics else []
  made += loss_claims(metrics[LOSSES]) if LOSSES in metrics else []
  made += predictor_claims(config, metrics[PREDICTOR]) if PREDICTOR in metrics else []
  made += prefill_claims(config, metrics[PREFILL], metrics[NETWORK]) if PREFILL in metrics else []
  return made


def _means(found: dict) -> dict[str, float]:
  """{method: share of the questions answered, mean over models, tasks and lengths}."""
  shares = {}
  for subject in found.values():
    for row in subject["rows"]:
      shares.setdefault(row["decoder"], []).append(row["share"])
  return {name: sum(of) / len(of) for name, of in shares.items()}


def _of(means: dict, kind: str) -> dict[float, str]:
  """{share of the prompt that is the budget: method} of a kind, the tightest first."""
  return dict(sorted((parse(name)[1], name) for name in means if name != DENSE and parse(name)[0] == kind))


def accuracy_claims(found: dict) -> list[Claim]:
  means = _means(found)
  ours, rival = _of(means, OURS), _of(means, BLOCKS)
  tight, wide = min(ours), max(ours)
  count = next(iter(found.values()))["rows"][0]["count"]
  shown = lambda methods: ", ".join(f"{name} {100 * means[name]:.3g} %" for name in methods)
  made = []
  if tight in rival:
    a, b = means[ours[tight]], means[rival[tight]]
    made.append(
      Claim(
        "Questions answered with DHSA's budget over those with static blocks at the tightest budget, gain", "%",
        "higher", ours=100 * (a - b) / max(b, 1 / count), threshold=6.0, paper=6.0, baseline=f"{100 * b:.3g} %",
        note=f"{shown(means)}; {count} questions a cell; a number is the share of the prompt that a block sees",
      )
    )  # fmt: skip
  made.append(
    Claim(
      "Points by which DHSA answers fewer questions than dense attention at the widest budget", "points", "lower",
      ours=100 * (means[DENSE] - means[ours[wide]]), threshold=2.0, baseline=f"dense {100 * means[DENSE]:.3g} %",
      note=shown(ours.values()),
    )
  )  # fmt: skip
  others = {name: means[name] for name in means if name != DENSE and parse(name)[1] == tight}
  rivals = {name: share for name, share in others.items() if parse(name)[0] not in (OURS, "oracle", *CACHES)}
  best = max(rivals, key=rivals.get)
  made.append(
    Claim(
      "Points of DHSA over the best other way to cut and score chunks, tightest budget", "points", "higher",
      ours=100 * (means[ours[tight]] - means[best]), threshold=0.0, baseline=f"{best} {100 * means[best]:.3g} %",
      note=shown(others),
    )
  )  # fmt: skip
  caches = {name: share for name, share in others.items() if parse(name)[0] in CACHES}
  if caches:
    best = max(caches, key=caches.get)
    made.append(
      Claim(
        "Points of DHSA over the best cache that keeps as many tokens of a prompt it has read densely, tightest budget",
        "points", "higher", ours=100 * (means[ours[tight]] - means[best]), threshold=0.0,
        baseline=f"{best} {100 * means[best]:.3g} %",
        note=f"{shown(caches)}; they save memory behind the prompt and nothing of its reading, DHSA the reverse",
      )
    )  # fmt: skip
  return made


def loss_claims(found: dict) -> list[Claim]:
  worst, lines = -float("inf"), []
  for subject, measured in found.items():
    rows = {row["decoder"]: row for row in measured["rows"]}
    mine = _of(rows, OURS)
    row = rows[mine[max(mine)]]
    worst = max(worst, row["difference"])
    lines.append(
      f"{subject} "
      + ", ".join(f"{name} {r['difference']:+.4f} ({r['error']:.2g})" for name, r in rows.items() if name != DENSE)
    )
  return [
    Claim(
      "Nats that a token behind a prompt costs more with DHSA's widest budget than densely, worst model", "nats",
      "lower", ours=worst, threshold=0.02, baseline="dense attention",
      note="; ".join(lines) + f"; standard errors in brackets, {row['count']} documents",
    )
  ]  # fmt: skip


def predictor_claims(config, found: dict) -> list[Claim]:
  encoder = config.predictor.encoders[0]
  f1 = {name: of[encoder]["f1"] for name, of in found.items()}
  rivals = {name: max(of[encoder]["f1_all"], of[encoder]["f1_random"]) for name, of in found.items()}
  least = min(f1, key=lambda name: f1[name] - rivals[name])
  return [
    Claim(
      "F1 of predicted boundaries on unseen text over that of calling every position one, worst model", "", "higher",
      ours=f1[least] - rivals[least], threshold=0.05, baseline=f"{least} {rivals[least]:.3g}",
      note="; ".join(
        f"{name} {kind}: F1 {of[kind]['f1']:.3g}, overlap of the best {of[kind]['top']:.0f} {of[kind]['overlap']:.3g} "
        f"(at random {of[kind]['overlap_random']:.3g})" for name, of in found.items() for kind in of
      ),
    ),
    Claim(
      "Ends of sections among as many predicted boundaries over those found at random, worst model", "x", "higher",
      ours=min(of[encoder]["sections"] / of[encoder]["sections_random"] for of in found.values()), threshold=1.5,
      note="; ".join(
        f"{name}: {of[encoder]['sections']:.3g}, at random {of[encoder]['sections_random']:.3g}, labels "
        f"{of[encoder]['sections_labels']:.3g}" for name, of in found.items()
      ) + "; rows of pieces of different documents, ends found within 4 tokens",
    ),
  ]  # fmt: skip


def prefill_claims(config, found: dict, network: dict) -> list[Claim]:
  longest = found[str(max(map(int, found)))]
  p, ms = config.prefill, {name: t["median"] for name, t in longest["milliseconds"].items()}
  where = f"{longest['length']} positions, {p.heads} heads of {p.size}, {p.budget} keys a block of {p.block}"
  ratio, low, high = longest["speedup"]["DHSA"]
  made = [
    Claim(
      "How many times as fast as cuDNN's dense attention DHSA's layer is", "x", "higher", ours=ratio, threshold=1.2,
      spread=(low, high), baseline=f"dense {ms['dense']:.4g} ms",
      note=f"{where}; " + ", ".join(f"{name} {value:.4g} ms" for name, value in ms.items()),
    ),
    Claim(
      "How many times as fast a network reads a prompt with DHSA as with the fastest dense attention", "x", "higher",
      ours=network["speedup"]["DHSA"][0], threshold=1.2, spread=tuple(network["speedup"]["DHSA"][1:]), paper=1.2,
      baseline=f"dense {network['milliseconds']['dense']['median']:.4g} ms",
      note=f"{network['length']} tokens; temporaries "
      + ", ".join(f"{name} {size / 1e6:.4g} MB" for name, size in network["temporaries"].items()),
    ),
  ]  # fmt: skip
  both = [case for case in found.values() if "materialised" in case["temporaries"]]
  if both:
    case = max(both, key=lambda case: case["length"])
    memory = {name: size / 1e6 for name, size in case["temporaries"].items()}
    made.append(
      Claim(
        "Temporary memory of DHSA's layer over that of materialised dense attention", "", "lower",
        ours=memory["DHSA"] / memory["materialised"], threshold=0.65, paper=0.65,
        baseline=f"{memory['materialised']:.4g} MB at {case['length']} positions",
        note=", ".join(f"{name} {value:.4g} MB" for name, value in memory.items()),
      )
    )  # fmt: skip
  return made


def finding(config, metrics: dict) -> str:
  text = []
  if ACCURACY in metrics:
    means = _means(metrics[ACCURACY])
    ours, rival = _of(means, OURS), _of(means, BLOCKS)
    tight = min(ours)
    static = f", {100 * means[rival[tight]]:.1f} % with static blocks; the paper gains 6 to 18 % over those"
    text.append(
      f"with {tight:.3g} of the prompt as budget {100 * means[ours[tight]]:.1f} % of the questions are answered "
      f"({100 * means[DENSE]:.1f} % by dense attention{static if tight in rival else ''})"
    )
  if PREFILL in metrics:
    longest = metrics[PREFILL][str(max(map(int, metrics[PREFILL])))]
    text.append(
      f"at {longest['length']} positions the layer takes {1 / longest['speedup']['DHSA'][0]:.2f} of cuDNN's time"
    )
  if not text:
    text = [
      f"boundaries of {name} are predicted with F1 {of[config.predictor.encoders[0]]['f1']:.2f}"
      for name, of in metrics.get(PREDICTOR, {}).items()
    ]
  joined = "; ".join(text) or "only losses were measured"
  return f"{joined[0].upper()}{joined[1:]}."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  figures = {}
  if ACCURACY in metrics:
    figures |= accuracies(metrics[ACCURACY], workdir)
  if PREFILL in metrics:
    figures |= prefills(metrics[PREFILL], workdir)
  return figures
