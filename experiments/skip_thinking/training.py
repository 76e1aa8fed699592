"""Students of every arm: how they are trained, and what they then answer.

Until the students that skip, all arms see the same samples ("first") for as many steps; those that skip, and their
rivals, go on from the chunk-wise student on samples that it has not seen ("second").
"""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import optax

from experiments.skip_thinking import tasks
from jaxlab.core.files import write_text
from jaxlab.models import Transformer, TransformerConfig
from jaxlab.models.generate import complete
from jaxlab.models.inference import take_apart
from jaxlab.sequence import skip_thinking as st
from jaxlab.training import losses
from jaxlab.training.loop import train

BASE = {
  "answer": "the answer alone",
  "full": "full thinking",
  "full_small": "full thinking, as many tokens a step",
  "full_window": "full thinking, a random stretch counts",
  "random": "chunk-wise, random cuts",
  "average": "chunk-wise, equal cuts",
  "search": "chunk-wise, searched cuts",
}
AFTER = {
  "whole": "more of the whole rationale",
  "skip": "skip-thinking",
  "skip_random": "as many chunks left out at random",
  "shortest": "the shortest right rationale it wrote",
  "icot": "tokens taken away step by step",
}


@dataclasses.dataclass(frozen=True)
class Fold:
  """Samples of all tasks, with what is known of each."""

  samples: list[st.Sample]
  task: list[str]
  reasons: list[np.ndarray]  # bool (units,)

  def cuts(self, chunks: int) -> list[st.Cuts]:
    return [st.average_chunks(len(one.units), chunks) for one in self.samples]


def folds(config, seed: int) -> tuple[dict[str, Fold], st.Tags, int]:
  """({"first", "second", "test"}, tags, size of the vocabulary); no question is in two folds."""
  words, tags = tasks.vocabulary(config.chunks)
  sizes = {"test": config.count.test, "first": config.count.first, "second": config.count.second}
  made: dict[str, Fold] = {}
  asked: set[str] = set()
  for name, count in sizes.items():
    stories = [
      (task, one)
      for task in config.tasks
      for one in tasks.stories(
        task, count, filler=config.filler, items=config.sizes[task], seed=fold_seed(seed, name), without=asked
      )
    ]
    asked |= {one.question for _, one in stories}
    made[name] = Fold(
      [tasks.sample(one, words) for _, one in stories],
      [task for task, _ in stories],
      [tasks.reasons(one) for _, one in stories],
    )
  return made, tags, tags.end + 1


def fold_seed(seed: int, name: str) -> int:
  """A seed of its own for every fold; of the test, which is the same for all seeds, one alone."""
  return -1 if name == "test" else 2 * seed + (name == "second")


def batches(config, arm: str, rows: st.Rows, seed: int):
  """What an arm's step counts."""
  t = config.train
  if arm in ("random", "average", "search"):
    return st.batches(rows, batch=t.batch, seed=seed)
  size = max(1, t.batch // (config.chunks + 1)) if arm == "full_small" else t.batch
  whole = st.batches(rows, batch=size, stages="all", seed=seed)
  return whole.map(lambda batch: window(batch, config.chunks + 1, seed)) if arm == "full_window" else whole


def window(batch, parts: int, seed: int):
  """Of every row's counted tokens one stretch, 1 / parts of them, which begins at the same share of all rows.

  It goes on at the row's first where it reaches the last, so that all count alike: ends too, without which a student
  never stops.
  """
  at = np.random.default_rng([seed, int(batch["inputs"].sum())]).random()
  targets = np.full_like(batch["targets"], -1)
  for source, out in zip(batch["targets"], targets, strict=True):
    places = np.flatnonzero(source >= 0)
    size = -(-len(places) // parts)
    own = np.roll(places, -int(at * len(places)))[:size]
    out[own] = source[own]
  return batch | {"targets": targets}


def optimizer(rate: float, steps: int):
  schedule = optax.warmup_cosine_decay_schedule(0, rate, max(1, steps // 20), steps)
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))


def fitted(config, model, data, *, steps: int, of: int, rate: float, workdir: Path, seed: int, console, title: str):
  """The model after `steps` of the `of` steps that its learning rate is planned for."""
  with console.training(title) as progress:
    return train(
      model,
      data,
      lambda model, batch, step, key: losses.language_model_loss(model, batch),
      optimizer(rate, of),
      steps=steps,
      workdir=workdir,
      seed=seed,
      compute_dtype=config.dtype,
      checkpoint_every=of,
      progress=progress,
    )


def fresh(config, vocabulary: int, seed: int) -> Transformer:
  shape = config.shape.to_dict() | dict(vocab_size=vocabulary, context=config.length)
  return Transformer(TransformerConfig(**shape), jax.random.key(seed))


def base(config, arm: str, seed: int, rate: float, workdir: Path, console):
  """(the trained student, cuts of the first fold that it ended with)."""
  made, tags, vocabulary = folds(config, seed)
  first, t = made["first"], config.train
  folder = workdir / f"{arm}_{seed}_{rate:g}"
  cuts = random_cuts(first, config.chunks, seed) if arm == "random" else first.cuts(config.chunks)
  model = fresh(config, vocabulary, seed)
  rounds = config.search.rounds + 1 if arm == "search" else 1
  for turn in range(rounds):
    kept = [()] * len(cuts) if arm == "answer" else None
    rows = st.encode(first.samples, cuts, tags, length=config.length, kept=kept)
    model = fitted(
      config, model, batches(config, arm, rows, seed), steps=t.steps * (turn + 1) // rounds, of=t.steps, rate=rate,
      workdir=folder, seed=seed, console=console, title=f"{arm}, seed {seed}",
    )  # fmt: skip
    if turn + 1 < rounds:
      cuts = searched(config, model, first, cuts, tags, folder / f"cuts.{turn}.json")
  return model, cuts


def random_cuts(fold: Fold, chunks: int, seed: int) -> list[st.Cuts]:
  """Any cuts that leave no chunk empty are as likely; of fewer units than chunks the last chunks are empty."""
  rng = np.random.default_rng(seed)

  def cut(units: int) -> st.Cuts:
    if units < chunks:
      return st.average_chunks(units, chunks)
    return (0, *(1 + np.sort(rng.choice(units - 1, chunks - 1, replace=False))).tolist(), units)

  return [cut(len(one.units)) for one in fold.samples]


def searched(config, model, fold: Fold, cuts: list[st.Cuts], tags: st.Tags, file: Path) -> list[st.Cuts]:
  """Cuts after a search by the student as it is, which a run that goes on does not meet again: they are kept."""
  if not file.exists():
    scorer = st.student_scores(model, fold.samples, tags, length=config.length, batch=config.eval.batch)
    found = st.search(scorer, cuts, threshold=config.search.threshold, score=config.search.score)
    write_text(file, json.dumps(found))
  return [tuple(own) for own in json.loads(file.read_text())]


def after(config, arm: str, seed: int, rate: float, start, labels: dict, workdir: Path, console):
  """The chunk-wise student `start` = (model, tags) trained on, on the second fold; labels: {"cuts", "kept"} of it."""
  made, tags, _ = folds(config, seed)
  second, t = made["second"], config.train
  cuts, kept, samples = labels["cuts"], labels["kept"], second.samples
  chosen = np.arange(len(samples))
  if arm == "whole":
    kept = None
  elif arm == "skip":
    chosen = st.balanced(kept, cuts, full=config.full, seed=seed)
  elif arm == "skip_random":
    kept = shuffled(kept, cuts, seed)
    chosen = st.balanced(kept, cuts, full=config.full, seed=seed)
  elif arm == "shortest":
    rows = shortest(config, start, second, tags, cuts, seed)
  model, rounds = start, config.search.rounds + 1 if arm == "icot" else 1
  for turn in range(rounds):
    if arm == "icot":
      samples, cuts, kept = shortened(second, config.chunks, (turn + 1) / rounds)
    if arm != "shortest":
      rows = st.encode(samples, cuts, tags, length=config.length, kept=kept).take(chosen)
    data = st.batches(rows, batch=t.batch, stages="all", seed=seed)
    model = fitted(
      config, model, data, steps=t.more * (turn + 1) // rounds, of=t.more, rate=rate * t.slower,
      workdir=workdir / f"{arm}_{seed}", seed=seed, console=console, title=f"{arm}, seed {seed}",
    )  # fmt: skip
  return model


def shuffled(kept, cuts, seed: int):
  """As many chunks left out in all, of any samples and any places."""
  rng = np.random.default_rng(seed)
  places = [(i, m) for i, own in enumerate(cuts) for m, (a, b) in enumerate(itertools.pairwise(own), 1) if a < b]
  order = rng.permutation(len(places))[: sum(map(len, kept))]
  return [tuple(m for j, m in sorted(places[k] for k in order) if j == i) for i in range(len(kept))]


def shortened(fold: Fold, chunks: int, share: float):
  """The first `share` of every rationale's tokens taken away, and the rest cut anew (implicit chains of thought)."""
  samples = []
  for one in fold.samples:
    drop, units = round(share * sum(map(len, one.units))), []
    for unit in one.units:
      units += [unit[drop:]] if drop < len(unit) else []
      drop = max(0, drop - len(unit))
    samples.append(one._replace(units=units))
  return samples, [st.average_chunks(len(one.units), chunks) for one in samples], None


def shortest(config, model, fold: Fold, tags: st.Tags, cuts, seed: int) -> st.Rows:
  """Of some rationales the student writes at temperature 0.7 the shortest whose answer is right; else the teacher's."""
  rows = st.encode(fold.samples, cuts, tags, length=config.length)
  network, size = jax.jit(take_apart)(model), config.eval.batch
  best = [int((own >= 0).sum()) for own in rows.stages]
  for draw in range(config.draws):
    for at in range(0, len(fold.samples), size):
      part = fold.samples[at : at + size]
      prompts = [st.prompt(one, tags) for one in part] + [[tags.question]] * (size - len(part))
      key = jax.random.fold_in(jax.random.key(seed), draw * len(fold.samples) + at)
      how = dict(tokens=config.eval.tokens, stop=(tags.end,), stretch=16, key=key, temperature=0.7)
      for i, (one, written) in enumerate(zip(part, complete(network, prompts, **how), strict=False), at):
        text = [*st.prompt(one, tags), *written.tokens]
        if len(text) < best[i] and st.same_answer(one, st.parse(written.tokens, tags).answer):
          best[i] = len(text)
          rows.tokens[i], rows.stages[i] = tags.end, -1
          rows.tokens[i, : len(text)] = text
          rows.stages[i, : len(text)] = np.where(np.arange(len(text)) <= len(one.question), 0, 1)
  return rows


def labelled(config, model, seed: int) -> dict:
  """{"cuts", "kept"} of the second fold by a student that has not seen it."""
  made, tags, _ = folds(config, seed)
  second = made["second"]
  scorer = st.student_scores(model, second.samples, tags, length=config.length, batch=config.eval.batch)
  how = dict(threshold=config.search.threshold, score=config.search.score)
  cuts = st.search(scorer, second.cuts(config.chunks), **how)
  respond = st.student(model, tags, tokens=config.eval.tokens, batch=config.eval.batch)
  return {"cuts": cuts, "kept": st.keep(respond, second.samples, cuts, tags, probe=config.probe)}


def answers(config, model, seed: int, *, forced: int | None = None, fold: str = "test") -> dict:
  """{task: {"right", "tokens", "chunks"}}, greedily; forced: the answer is asked for after so many chunks of what the
  student wrote."""
  made, tags, _ = folds(config, seed)
  test = made[fold]
  respond = st.student(model, tags, tokens=config.eval.tokens, batch=config.eval.batch)
  prompts = [st.prompt(one, tags) for one in test.samples]
  written = respond(prompts)
  if forced is not None:
    texts = [st.parse(text, tags).chunks[:forced] for text in written]
    said = [[token for m, chunk in own for token in (tags.stages[m - 1], *chunk)] for own in texts]
    rest = respond([[*p, *own, tags.answer] for p, own in zip(prompts, said, strict=True)])
    written = [[*own, tags.answer, *more] for own, more in zip(said, rest, strict=True)]
  thoughts = [st.parse(text, tags) for text in written]
  right = [st.same_answer(one, thought.answer) for one, thought in zip(test.samples, thoughts, strict=True)]
  found = {}
  for task in config.tasks:
    own = [i for i, name in enumerate(test.task) if name == task]
    average = lambda values: float(np.mean([values[i] for i in own]))  # noqa: B023
    found[task] = {
      "right": average(right),
      "tokens": average([len(text) for text in written]),
      "chunks": average([len(thought.chunks) for thought in thoughts]),
    }
  return found
