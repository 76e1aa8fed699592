"""Methods by name, and one behind the other."""

import dataclasses
import importlib

from experiments.compressing import Subject, rivals, sizes
from experiments.icbs import language as icbs
from experiments.long_context import parse
from experiments.lord import quality as lord
from experiments.struprune import quality as pruned
from experiments.struprune.rivals import options
from jaxlab.core.checks import require_choice
from jaxlab.models import Transformer
from jaxlab.weights import bitstack, pruning, struprune
from jaxlab.weights.structured import Least

KINDS = dict(
  rtn="round to nearest", gptq="GPTQ", awq="AWQ", bitstack="BitStack", lord="LoRD", struprune="STRUPRUNE",
  even="STRUPRUNE, even", icbs="iCBS", wanda="Wanda",
)  # fmt: skip
_QUANTISERS = ("rtn", "gptq", "awq")
_PAPERS = dict(lord=lord.chosen, struprune=pruned.chosen, icbs=icbs.chosen)
Steps = tuple[tuple[str, float], ...]


def steps_of(text: str) -> Steps:
  """The methods and budgets of a chain.

  Raises:
    InputError: an unknown method, or no number behind one.
  """
  steps = tuple(parse(one.strip()) for one in text.split("+"))
  for method, _ in steps:
    require_choice("a method of a chain", method, KINDS)
  return steps


class Maker:
  """Models behind chains of methods; what several chains begin with is made once."""

  def __init__(self, config, subject: Subject):
    self._config, self._subject, self._made = config, subject, {(): subject.model}

  def __call__(self, steps: Steps) -> Transformer:
    if steps not in self._made:
      before = dataclasses.replace(self._subject, model=self(steps[:-1]))
      self._made[steps] = _step(self._config, before, *steps[-1])
    return self._made[steps]


def _step(config, subject: Subject, method: str, amount: float) -> Transformer:
  """The model behind one more method, which is calibrated on what the ones before give."""
  model, text, batch = subject.model, subject.calibration, sizes(config.text, subject).batch
  if method in _QUANTISERS:
    return rivals(config, subject)[method](amount)
  if method == "bitstack":
    return bitstack.decompose(model, text, blocks=int(amount), rank=config.block_rank, batch=batch)
  if method == "wanda":
    return pruning.stored_sparse(pruning.prune(model, text, "wanda", density=amount, batch=batch).model)
  paper = importlib.import_module(f"configs.{'struprune' if method == 'even' else method}").get_config(config.scale)
  paper.text.base.update(config.text.base)
  paper.text.others.update(config.text.others)
  paper.budget = amount
  if method != "even":
    return _PAPERS[method](paper, subject)
  how = dict(budget=amount, rule="uniform", least=Least(1, config.group), multiple=config.group)
  kept = struprune.allocate(model.config, struprune.survey(model, text, batch=batch), **how)
  return struprune.rebuild(model, text, *kept, options=options(paper), batch=batch)
