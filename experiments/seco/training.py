"""Fine-tuning by exact gradients, SeCO, SpaCO and truncated backpropagation, all at the best of the same rates."""

import functools
from pathlib import Path

from experiments.long_finetuning import backpropagation, evaluate, finetuned, held_out, rows, stretched
from experiments.seco.gradients import limited
from experiments.text import Text
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require
from jaxlab.models import Transformer
from jaxlab.sequence import seco

EXACT, SECO, TRUNCATED = "exact", "seco", "truncated"


def spaco(share: int, limit: str) -> str:
  """The name of SpaCO that visits one chunk of `share`."""
  return f"spaco {share} {limit}"


def gradient_of(t, method: str):
  """`model_of -> GradientFn` of a method by its name, on t.length tokens in chunks of t.chunk."""
  if method == EXACT:
    return functools.partial(backpropagation, remat=t.remat)
  how, count = dict(chunk=t.chunk), -(-t.length // t.chunk)
  name, *rest = method.split()
  if name == TRUNCATED:
    how |= dict(visited=count, cap=0.0)
  elif name != SECO:
    known = name == "spaco" and len(rest) == 2 and rest[0].isdigit() and int(rest[0]) >= 1
    require(known, f"the method is {method!r}; it must be exact, seco, truncated or like 'spaco 8 2', t = k / 8, cap 2")
    how |= dict(visited=max(1, count // int(rest[0])), cap=limited(rest[1]))
  return lambda model_of: seco.gradient(**how, model_of=model_of)


def run(config, parameters, method, model: Transformer, text: Text, *, rate, seed, workdir: Path, console) -> dict:
  """{"validation", "test": loss} after fine-tuning; resumes from `workdir`."""
  t = config.tuning.copy_and_resolve_references()
  t.parameters = parameters
  how = dict(rate=rate, seed=seed, mesh=meshes.make_mesh(config.mesh.to_dict()), workdir=workdir)
  model = stretched(model, t.length, t.rope)
  with console.training(workdir.name) as progress:
    made = finetuned(t, model, rows(text, t, seed), gradient_of(t, method), **how, progress=progress)
  return {split: evaluate(made, held_out(text, t, split, t.judged))["loss"] for split in ("validation", "test")}
