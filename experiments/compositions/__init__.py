"""Methods that compress weights, alone and one behind the other, each also under SNLP: bytes and perplexity."""

from pathlib import Path

import numpy as np

from experiments import results
from experiments.compositions.chains import KINDS, Maker, steps_of
from experiments.compositions.solved import solved_perplexity
from experiments.compressing import row, sizes, stored, subjects
from experiments.compressing_drawing import draw_frontier
from experiments.results import Claim

DENSE = "dense"
_GPTQ, _LORD = "gptq", "lord"


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """{model: rows of `compressing.row` with `snlp`, the perplexity under SNLP, besides}, the dense model's first."""
  found = {}
  for name, read in subjects(config, cache).items():

    def run(read=read):
      subject, rows = read(), []
      options = sizes(config.snlp, subject).to_dict()
      made = Maker(config, subject)
      for steps in [(), *map(steps_of, sizes(config.chains, subject))]:
        small = made(steps)
        text = " + ".join(f"{method} {amount:g}" for method, amount in steps) or DENSE
        kept = row(subject, text, steps[-1][1] if steps else 1, small)
        rows.append(kept | {"snlp": solved_perplexity(subject, stored(small), options)})
        console.say(
          f"  {text}: {kept['share']:.3f} of the blocks' bytes, perplexity {kept['perplexity']:.4g}, "
          f"under SNLP {rows[-1]['snlp']:.4g}"
        )
      return rows

    console.say(f"chains of {name}")
    found[name] = results.part(workdir, f"chains.{name}", run)
  return found


def claims(config, metrics: dict) -> list[Claim]:
  """Each the worst or best of all models, beside single methods of as many bytes, between two of them in proportion."""
  return [
    claim
    for claim in (
      _against(metrics, "Perplexity of LoRD, then GPTQ over GPTQ alone at as many bytes", (_LORD, _GPTQ), _GPTQ),
      _against(metrics, "Perplexity of STRUPRUNE in even layers, then GPTQ over GPTQ alone at as many bytes",
               ("even", _GPTQ), _GPTQ),
      _against(metrics, "Perplexity of STRUPRUNE, then LoRD over LoRD alone at as many bytes", ("struprune", _LORD),
               _LORD),
      _few_bits(metrics),
      _under_snlp(metrics),
    )
    if claim
  ]  # fmt: skip


def kinds(text: str) -> tuple[str, ...]:
  """The methods of a chain."""
  return () if text == DENSE else tuple(method for method, _ in steps_of(text))


def alone_at(rows: list[dict], method: str, size: float) -> float | None:
  """Perplexity of one method, or of the dense model, at so many bytes: its logarithm in a straight line between two."""
  points = sorted((row["bytes"], row["perplexity"]) for row in rows if kinds(row["method"]) in ((), (method,)))
  if len(points) < 2 or not points[0][0] <= size <= points[-1][0]:
    return None
  at, of = np.array(points).T
  return float(np.exp(np.interp(size, at, np.log(of))))


def _against(metrics: dict, name: str, chain: tuple[str, ...], method: str) -> Claim | None:
  ratios = {
    f"{model}, {row['method']}": row["perplexity"] / alone
    for model, rows in metrics.items()
    for row in rows
    if kinds(row["method"]) == chain and (alone := alone_at(rows, method, row["bytes"])) is not None
  }
  if not ratios:
    return None
  best = min(ratios, key=ratios.get)
  return Claim(
    f"{name}, best case", "ratio", "lower", ours=ratios[best], threshold=1.0, baseline=f"{method} alone, interpolated",
    note=", ".join(f"{case} {ratio:.3g}" for case, ratio in ratios.items()),
  )  # fmt: skip


def _few_bits(metrics: dict) -> Claim | None:
  """What a quantiser multiplies perplexity by behind another method, over what it does to the dense model."""
  found = {}
  for model, rows in metrics.items():
    of = {row["method"]: row["perplexity"] for row in rows}
    for text, value in of.items():
      first, _, last = text.rpartition(" + ")
      if first in of and last in of and kinds(last) == (_GPTQ,):
        found[f"{model}, {text}"] = value / of[first] / (of[last] / of[DENSE])
  if not found:
    return None
  return Claim(
    "What few bits multiply a compressed model's perplexity by over what they do to the dense model's, worst case",
    "ratio", "lower", ours=max(found.values()), threshold=1.05,
    note=", ".join(f"{case} {ratio:.4g}" for case, ratio in found.items()),
  )  # fmt: skip


def _under_snlp(metrics: dict) -> Claim:
  found = {}
  for model, rows in metrics.items():
    dense = rows[0]["snlp"] / rows[0]["perplexity"]
    found |= {f"{model}, {row['method']}": row["snlp"] / row["perplexity"] / dense for row in rows[1:]}
  worst = max(found, key=found.get)
  said = ", ".join(f"{model} {rows[0]['snlp'] / rows[0]['perplexity']:.4g}" for model, rows in metrics.items())
  return Claim(
    "What SNLP multiplies a compressed model's perplexity by over what it multiplies the dense model's by, worst chain",
    "ratio", "lower", ours=found[worst], threshold=1.05, baseline=f"dense: {said}",
    note=f"{worst}; least {min(found.values()):.4g}; {sum(ratio <= 1 for ratio in found.values())} of {len(found)} "
    "chains lose no more than the dense model",
  )  # fmt: skip


def finding(config, metrics: dict) -> str:
  texts = []
  for model, rows in metrics.items():
    dense = rows[0]
    good = [row for row in rows[1:] if row["perplexity"] <= 1.1 * dense["perplexity"]]
    if good:
      least = min(good, key=lambda row: row["bytes"])
      texts.append(
        f"{model} in {least['bytes'] / 1e6:.3g} of {dense['bytes'] / 1e6:.3g} MB at {least['perplexity']:.4g} "
        f"({dense['perplexity']:.4g}) by {least['method']}"
      )
    else:
      texts.append(f"{model}: none")
  worst = _under_snlp(metrics).ours
  return (
    f"Smallest within a tenth more perplexity: {'; '.join(texts)}. Under SNLP a compressed model loses at worst "
    f"{worst:.3g} times what the dense one does."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  named = lambda row: row | {"method": " + ".join(KINDS[kind] for kind in kinds(row["method"])) or DENSE}
  rows = [named(row) for rows in metrics.values() for row in rows]
  return {draw_frontier(rows, workdir, {}): "Perplexity on held-out text against the bytes of the whole model"}
