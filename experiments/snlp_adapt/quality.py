"""Perplexity of every network, in sequence and layer-parallel, and answers to recall questions."""

import functools

import jax

from experiments.base import exact_answers, recall_accuracy
from experiments.overlap import overlapped
from experiments.snlp.quality import cached_loss
from experiments.snlp.settings import forward
from experiments.text import Text
from jaxlab.data import packing
from jaxlab.models import Transformer
from jaxlab.training import losses

SEQUENTIAL = "sequential"


def evaluators(config, model: Transformer, texts: dict[str, Text], splits: dict[str, str]):
  """`model -> {text: {setting: perplexity}}` of networks of this shape; all programs are compiled here."""
  e = config.eval
  how = dict(row=e.length, batch=e.batch, limit=e.tokens)
  batches = {name: packing.evaluation_batches(text.split(splits[name]), **how) for name, text in texts.items()}
  inputs = next(iter(batches.values()))[0]["inputs"]
  settings = (SEQUENTIAL, *config.measured)
  programs = overlapped(lambda setting: jax.jit(hidden(setting)).lower(model, inputs).compile(), settings)
  evaluate = {setting: losses.evaluator(program) for setting, program in zip(settings, programs, strict=True)}

  def perplexities(model: Transformer) -> dict:
    return {
      name: {setting: run(model, rows)["perplexity"] for setting, run in evaluate.items()}
      for name, rows in batches.items()
    }

  return perplexities


def hidden(setting: str):
  """`(model, tokens) -> (final state, backout state)` in sequence or at a setting."""
  return (lambda model, tokens: model.hidden(tokens)) if setting == SEQUENTIAL else forward(setting)


def decoded(config, model: Transformer, text: Text) -> dict:
  """Teacher-forced losses on one batch at the first setting: the cached decoder's by what it keeps, the forwards'."""
  e = config.eval
  rows = packing.evaluation_batches(text.split(e.split), row=e.length, batch=e.batch, limit=e.batch * e.length)
  return cached_loss(model, rows[0], config.settings[0])


def recall(config, model: Transformer, text: Text) -> dict:
  """{task: {setting: share of questions answered right}} in sequence and at the first setting."""
  e = config.eval
  how = dict(length=e.length, count=config.recall.questions, batch_tokens=e.batch * e.length, split=e.split)
  right = lambda setting, task: recall_accuracy(functools.partial(_exact(setting), model), text, task, **how)
  return {
    task: {setting: right(setting, task) for setting in (SEQUENTIAL, config.settings[0])}
    for task in config.recall.tasks
  }


@functools.cache
def _exact(setting: str):
  return jax.jit(functools.partial(exact_answers, hidden(setting)))
