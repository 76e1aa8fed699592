"""Stage 2, what it is compared with, and losses by the chunk size of the evaluation."""

from experiments.tnt.arms import COARSE, TITANS, TNT, Lab
from jaxlab.sequence.tnt_model import of_local_memories

TUNED, CONTROL, WHOLE = "stage 2", "stage 1, longer", "all parameters in stage 2"


def measure(lab: Lab, rates: dict[str, float], seed: int) -> dict:
  """Stage 1's model goes on at small chunks, or as it was, with the local memories' parameters alone, or with all.

  Args:
    rates: of the arms, found before.

  Returns:
    {stage 2's or a control's name: {rate, loss (of test text at small chunks), old (at those of stage 1)}, "untuned":
    loss of stage 1's model at small chunks, "old": at its own, "steps", "curves": {model: {chunk of the first local
    memory: loss}}}.
  """
  config = lab.config
  c, t, s = config.chunks, config.train, config.second
  small, old, steps = tuple(c.small), tuple(c.local), max(1, round(s.share * t.steps))
  first = lab.arm(TNT, rate=rates[TNT], steps=t.steps, seed=seed)
  local, every = lambda name: float(of_local_memories(name)), lambda name: 1.0
  found, models = {}, {"stage 1": first}
  for name, chunks, factor in ((TUNED, small, local), (CONTROL, old, local), (WHOLE, small, every)):
    runs = {}
    for rate in s.rates:
      folder = f"{name} {rate:g} {steps} {seed}"
      runs[rate] = lab.train(first, folder, rate=rate, steps=steps, seed=seed + 1, chunks=chunks, factor=factor)
    best = min(s.rates, key=lambda rate: lab.loss(runs[rate], "validation", small))
    models[name] = runs[best]
    found[name] = {"rate": best, "loss": lab.loss(runs[best], "test", small), "old": lab.loss(runs[best], "test", old)}
  found |= {"untuned": lab.loss(first, "test", small), "old": lab.loss(first, "test", old), "steps": steps}
  models |= {name: lab.arm(name, rate=rates[name], steps=t.steps, seed=seed) for name in (TITANS, COARSE)}
  found["curves"] = {
    name: {f"{n}": lab.loss(model, "test", chunks) for n, chunks in evaluated(config, name).items()}
    for name, model in models.items()
    if name not in (CONTROL, WHOLE)
  }
  return found


def evaluated(config, name: str) -> dict[int, tuple[int, ...]]:
  """{chunk of the first local memory: chunks of all} at which a model is judged, the others' as many times as large as
  ever; those that are longer than a shard are left out."""
  c, old = config.chunks, tuple(config.chunks.local)
  scaled = lambda chunk: (chunk,) if name in (TITANS, COARSE) else tuple(chunk * n // old[0] for n in old)
  return {n: scaled(n) for n in config.eval.chunks if max(scaled(n)) <= c.shard}
