"""Perplexity of every network on given and unseen text, in sequence and layer-parallel, and answers to recall questions."""

import functools

import jax

from experiments.base import exact_answers, recall_accuracy
from experiments.snlp.quality import cached_loss
from experiments.snlp.settings import forward
from experiments.text import Text
from jaxlab.data import packing
from jaxlab.models import Transformer
from jaxlab.training import losses

SEQUENTIAL = "sequential"


def measure(config, texts: dict[str, Text], model: Transformer) -> dict:
  """{"perplexity": {text: {setting: its perplexity}}, "cached": {...}, "recall": {task: {setting: share right}}}.

  "cached" is the loss of the cached decoder at the first setting that was trained, on one batch of the given text.
  """
  e = config.eval
  result = {"perplexity": {}, "recall": {}}
  for name, text in texts.items():
    batches = packing.evaluation_batches(text.split(e.split), row=e.length, batch=e.batch, limit=e.tokens)
    result["perplexity"][name] = {
      setting: _evaluator(setting)(model, batches)["perplexity"] for setting in (SEQUENTIAL, *config.measured)
    }
    if "cached" not in result:
      result["cached"] = cached_loss(model, batches[0], config.settings[0])
  for task in config.recall.tasks:
    result["recall"][task] = {
      setting: recall_accuracy(
        functools.partial(_exact(setting), model),
        next(iter(texts.values())),
        task,
        length=e.length,
        count=config.recall.questions,
        batch_tokens=e.batch * e.length,
        split=e.split,
      )
      for setting in (SEQUENTIAL, config.settings[0])
    }
  return result


def hidden(setting: str):
  """`(model, tokens) -> (final state, backout state)` in sequence or at a setting."""
  return (lambda model, tokens: model.hidden(tokens)) if setting == SEQUENTIAL else forward(setting)


@functools.cache
def _evaluator(setting: str):
  return losses.evaluator(jax.jit(hidden(setting)))


@functools.cache
def _exact(setting: str):
  return jax.jit(functools.partial(exact_answers, hidden(setting)))
