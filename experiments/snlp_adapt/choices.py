"""Multiple choice through the evaluation harness (extra `eval`): which of four continuations is the text's own.

The questions are made of held-out text, so nothing is fetched: a context, the tokens that follow it, and as many tokens
from three other places of the same split. The harness scores every continuation by its log-likelihood.
"""

import importlib
import json
from pathlib import Path

import numpy as np

from experiments.snlp.settings import parse
from experiments.text import Text
from jaxlab.core.checks import require
from jaxlab.core.files import write_text

TASK, WAYS = "continuation", 4


def available() -> None:
  """Raises InputError where the harness is not installed: before an hour of training, not after it."""
  importlib.import_module("jaxlab.evaluation.lm_eval")


def measure(config, text: Text, networks: dict[str, str], folder: Path) -> dict:
  """{network: {setting: share of questions answered right}} of checkpoints by what `hub.load` takes."""
  from lm_eval import simple_evaluate
  from lm_eval.tasks import TaskManager

  from jaxlab.evaluation import lm_eval

  lm_eval.register()
  write_task(text, folder, split=config.eval.split, seed=config.seed, **config.choices)
  main = config.settings[0]
  s = parse(main)
  solved = dict(method="snlp", **{name: s[name] for name in ("layers", "iterations", "groups", "tail")})

  def right(model: str, options: dict) -> float:
    done = simple_evaluate(
      model="jaxlab",
      model_args=dict(model=model, dtype=config.train.dtype) | options,
      tasks=[TASK],
      task_manager=TaskManager(include_path=str(folder), include_defaults=False),
      batch_size=config.eval.batch,
      bootstrap_iters=0,
    )
    return float(done["results"][TASK]["acc,none"])

  return {name: {"sequential": right(model, {}), main: right(model, solved)} for name, model in networks.items()}


def write_task(
  text: Text, folder: Path, *, split: str, seed: int, questions: int, context: int, continuation: int
) -> None:
  """Writes the questions and the harness' description of them into `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  rng, ids = np.random.default_rng(seed), text.split(split).ids
  size = context + continuation
  require(len(ids) > 2 * size, f"the {split} split has {len(ids)} tokens; multiple choice needs more than {2 * size}")
  decode = lambda start, stop: text.bpe.decode(np.asarray(ids[start:stop]).tolist())
  rows = []
  for _ in range(questions):
    at = int(rng.integers(len(ids) - size)) + context
    others = rng.integers(len(ids) - continuation, size=WAYS - 1).tolist()
    choices = [decode(start, start + continuation) for start in (at, *others)]
    rows.append({"question": decode(at - context, at), "choices": choices})
  write_text(folder / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
  source = dict(data_files=str(folder / "questions.jsonl"), cache_dir=str(folder / "cache"))
  described = dict(
    task=TASK,
    dataset_path="json",
    dataset_kwargs=source,
    test_split="train",
    output_type="multiple_choice",
    doc_to_text="{{question}}",
    doc_to_choice="{{choices}}",
    doc_to_target=0,
    target_delimiter="",
  )
  write_text(folder / f"{TASK}.yaml", json.dumps(described))  # JSON is YAML
