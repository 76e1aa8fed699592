"""Chelsea: what a cache loses whose similar keys are merged, beside caches that evict and other ways of merging.

A module here is a part of the run.
"""

import functools
import math
from pathlib import Path

from experiments import figures, results
from experiments.chelsea import decoders, quality, speed
from experiments.chelsea.decoders import DENSE
from experiments.long_context import Subject, subjects
from experiments.results import Claim

LOSSES, QUESTIONS, MERGINGS, SIMILARITY, SPEED = "losses", "questions", "mergings", "similarity", "speed"
_TITLES = dict(streaming_llm="StreamingLLM", h2o="H2O", snapkv="SnapKV", keydiff="KeyDiff")


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts, in that order; what this workdir holds is not measured again."""
  found = functools.cache(lambda: subjects(config, cache))

  def each(measure_one, chosen) -> dict:
    kept = lambda subject: results.part(workdir, f"{measure_one.__name__}.{subject}", functools.partial(run, subject))

    def run(name):
      subject = next(one for one in found() if one.name == name)
      console.say(f"{measure_one.__name__.removesuffix('_of')} of {name}")
      return measure_one(config, subject)

    return {name: kept(name) for name in chosen}

  names = [config.model.rsplit("/", 1)[-1]] if config.model else list(config.subjects)
  first = names[:1]
  asked = [name for name in names if config.model or name in config.questions.subjects]
  measures = {
    LOSSES: lambda: each(quality.losses_of, names),
    QUESTIONS: lambda: each(quality.questions_of, asked),
    MERGINGS: lambda: each(quality.mergings_of, first)[first[0]],
    SIMILARITY: lambda: each(quality.similarity_of, names),
    SPEED: lambda: results.part(workdir, SPEED, lambda: speed.measure(config, console)),
  }
  return {name: measures[name]() for name in config.parts}
