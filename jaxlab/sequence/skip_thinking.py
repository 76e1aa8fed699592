r"""Skip-Thinking: rationales in chunks, one chunk's loss at a time, and chunks that a student may leave out (2025,
"Skip-Thinking: Chunk-wise Chain-of-Thought Distillation", arXiv 2505.18642).

A sample is a question, a rationale in units (sentences, steps) and an answer. Cuts 0 = c_0 <= .. <= c_M = n group the n
units into M chunks, r_m = units c_{m-1} + 1 .. c_m, and a sample is read as

  <q> q <s1> r_1 <s2> r_2 .. <sM> r_M <ans> a <eos>

All ways of training see this one sequence; they differ in which tokens count. Full thinking counts all after q.
Chunk-wise training counts one stage an iteration, the same of all rows: L_m is the mean over the tokens of chunk m and
the tag that ends it (stage 1 has <s1> too, which no other has), stage M + 1 the answer's. Sum_m |stage m| L_m is full
thinking's sum. `search` moves cuts to where the student finds both sides easier; `keep` finds the chunks a student's
right answers need, and `encode(kept=...)` makes the samples that leave out the others, tags counted: after r_i may
follow any later <s_j> or <ans>.

  rows = encode(samples, [average_chunks(len(s.units), 4) for s in samples], tags, length=256)
  model = train(model, batches(rows, batch=32), loss_fn, optimizer, ...)                           chunk-wise
  model = train(model, batches(rows, batch=32, stages="all"), loss_fn, optimizer, ...)             full thinking
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from jaxlab.core.checks import require, require_choice, require_counts
from jaxlab.data import packing
from jaxlab.data.packing import Batch
from jaxlab.models import LanguageModel
from jaxlab.models.generate import complete
from jaxlab.models.inference import take_apart
from jaxlab.training.losses import token_losses

STAGES = ("cycle", "random", "all")
SCORES: dict[str, Callable] = {
  "mean_of_means": lambda parts: parts.sum(axis=-1),
  "max": lambda parts: parts.max(axis=-1),
}
PROBES = ("rollout", "teacher_rest", "answer_now")

Cuts = tuple[int, ...]  # c_0 .. c_M


class Sample(NamedTuple):
  """Token ids, without tags."""

  question: Sequence[int]
  units: Sequence[Sequence[int]]
  answer: Sequence[int]


class Tags(NamedTuple):
  """Ids of special tokens: <q>, <s1> .. <sM>, <ans>, <eos>."""

  question: int
  stages: tuple[int, ...]
  answer: int
  end: int


class Rows(NamedTuple):
  """tokens: int32 (samples, length), <eos> from each end on; stages: int8 of the same shape, 0 for <q> q, m for chunk m
  and the tag after it, M + 1 for answer and <eos>, -1 for padding."""

  tokens: np.ndarray
  stages: np.ndarray

  def take(self, rows) -> "Rows":
    return Rows(self.tokens[rows], self.stages[rows])


class Thought(NamedTuple):
  """What a student wrote: ((stage, its tokens), ..) in its order; the answer's tokens, None where it gave none."""

  chunks: tuple[tuple[int, tuple[int, ...]], ...]
  answer: tuple[int, ...] | None


def split_units(rationale: str) -> list[str]:
  """Sentences, and lines: what ends in . ! or ? before a space, or in a line break."""
  return [unit for unit in re.split(r"(?<=[.!?])\s+|\s*\n\s*", rationale.strip()) if unit]


def average_chunks(units: int, chunks: int) -> Cuts:
  """c_m = round(m n / M): sizes that differ by one at most; of fewer units than chunks the last chunks are empty.

  Raises:
    InputError: no chunk, or a negative number of units.
  """
  require_counts(chunks=chunks)
  require(units >= 0, f"a rationale has {units} units; it must have 0 or more")
  if units < chunks:
    return tuple(min(m, units) for m in range(chunks + 1))
  return tuple((2 * m * units + chunks) // (2 * chunks) for m in range(chunks + 1))


def encode(
  samples: Sequence[Sample],
  cuts: Sequence[Cuts],
  tags: Tags,
  *,
  length: int,
  kept: Sequence[Sequence[int]] | None = None,
) -> Rows:
  """Samples as rows of one length. Empty chunks have no tag.

  Args:
    length: tokens of a row; kept: the chunks (1 .. M) a sample has, the others are left out; None: all.

  Raises:
    InputError: cuts or kept chunks that are not a sample's, a tag among its tokens, an empty answer, or a sample longer
      than a row.
  """
  require(len(cuts) == len(samples), f"{len(samples)} samples have {len(cuts)} cuts; each needs its own")
  require(len(samples) > 0, "there is no sample; give at least one")
  if kept is not None:
    require(
      len(kept) == len(samples), f"{len(samples)} samples have {len(kept)} lists of kept chunks; each needs its own"
    )
  tokens = np.full((len(samples), length), tags.end, np.int32)
  stages = np.full((len(samples), length), -1, np.int8)
  for i, (sample, own) in enumerate(zip(samples, cuts, strict=True)):
    _require_sample(i, sample, own, tags)
    chunks = _chunks(sample, own)
    if kept is not None:
      lacking = sorted(set(kept[i]) - set(chunks))
      require(not lacking, f"sample {i} keeps chunks {lacking}; it has {sorted(chunks)}")
      chunks = {m: chunk for m, chunk in chunks.items() if m in set(kept[i])}
    row = [(tags.question, 0), *((token, 0) for token in sample.question)]
    opening = min(chunks, default=len(tags.stages) + 1)
    for m, chunk in chunks.items():
      row += [(tags.stages[m - 1], opening), *((token, m) for token in chunk)]
      opening = m
    last = len(tags.stages) + 1
    row += [(tags.answer, opening), *((token, last) for token in sample.answer), (tags.end, last)]
    require(len(row) <= length, f"sample {i} has {len(row)} tokens; rows have {length}: make them longer")
    tokens[i, : len(row)], stages[i, : len(row)] = zip(*row, strict=True)
  return Rows(tokens, stages)


def _chunks(sample: Sample, cuts: Cuts) -> dict[int, list[int]]:
  """{m: tokens} of the chunks that are not empty."""
  spans = {m: sample.units[start:stop] for m, (start, stop) in enumerate(itertools.pairwise(cuts), 1)}
  return {m: [token for unit in units for token in unit] for m, units in spans.items() if len(units)}


def _require_sample(i: int, sample: Sample, cuts: Cuts, tags: Tags) -> None:
  n, chunks = len(sample.units), len(tags.stages)
  fits = len(cuts) == chunks + 1 and cuts[0] == 0 and cuts[-1] == n and list(cuts) == sorted(cuts)
  require(fits, f"sample {i} has cuts {tuple(cuts)}; {chunks} chunks of its {n} units need 0 <= c_1 <= .. <= c_M = {n}")
  require(len(sample.answer) > 0, f"sample {i} has an empty answer; it must have a token at least")
  require(all(map(len, sample.units)), f"sample {i} has an empty unit; leave it out")
  special = {tags.question, *tags.stages, tags.answer, tags.end}
  inside = special.intersection(itertools.chain(sample.question, sample.answer, *sample.units))
  require(
    not inside, f"sample {i} has the tokens {sorted(inside)}, which are tags; text and tags need ids of their own"
  )


def counted(rows: Rows, stage: int | None = None) -> Batch:
  """{"inputs", "targets"} of int32 (samples, length - 1): targets of one stage, or of all (None); -1 elsewhere."""
  stages = rows.stages[:, 1:]
  count = stages >= 1 if stage is None else stages == stage
  return {"inputs": rows.tokens[:, :-1], "targets": np.where(count, rows.tokens[:, 1:], -1)}


def batches(rows: Rows, *, batch: int, stages: str = "cycle", seed: int = 0) -> grain.IterDataset:
  """Endless batches for `training.loop.train`, shuffled anew each epoch; `iter(...)` has get_state and set_state.

  Args:
    stages: which a batch counts: "cycle" 1, .., M + 1 in turn (those that a sample has), "random" one of them, "all":
      full thinking, and samples that leave chunks out.

  Raises:
    InputError: no row a batch, more than there are, or an unknown word for stages.
  """
  require_choice("stages", stages, STAGES)
  require_counts(batch=batch)
  require(batch <= len(rows.tokens), f"a batch of {batch} is asked of {len(rows.tokens)} samples")
  present = np.unique(rows.stages[rows.stages >= 1])

  def make(index: int, chosen: np.ndarray) -> Batch:
    if stages == "all":
      return counted(rows.take(chosen))
    turn = index if stages == "cycle" else np.random.default_rng([seed, index]).integers(len(present))
    return counted(rows.take(chosen), int(present[turn % len(present)]))

  order = packing.index_batches(len(rows.tokens), batch, seed=seed)
  alone = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return order.map_with_index(make).to_iter_dataset(alone)


# (sample, m, its cuts) of every candidate -> mean losses of chunks m and m + 1, float (candidates, 2).
Scorer = Callable[[Sequence[tuple[int, int, Cuts]]], np.ndarray]


def search(
  scorer: Scorer, cuts: Sequence[Cuts], *, threshold: float = 0.02, score: str = "mean_of_means"
) -> list[Cuts]:
  """Search-based chunking: for m = 1 .. M - 1 in turn, chunks m and m + 1 are cut where

    s(c) = nll(first part | what is before, <s_m>) + nll(second part | what is before, first part, <s_{m+1}>)

  is smallest, means over their tokens, if that is more than `threshold` below where they are cut now. Greedy: it may
  end in a local optimum, as two cuts that would have to move together do not.

  Args:
    scorer: `student_scores(model, ...)`; threshold: tau, in nats a token; score: of `SCORES`, the sum above or the
      larger of the two.

  Raises:
    InputError: a negative threshold, an unknown score, or cuts into different numbers of chunks.
  """
  require_choice("score", score, SCORES)
  require(threshold >= 0, f"threshold is {threshold}; it must be 0 or positive")
  cuts = [tuple(own) for own in cuts]
  lengths = sorted({len(own) for own in cuts})
  require(len(lengths) <= 1, f"cuts have lengths {lengths}; all samples are cut into as many chunks")
  for m in range(1, sum(lengths) - 1):
    candidates = [
      (i, m, (*own[:m], c, *own[m + 1 :]))
      for i, own in enumerate(cuts)
      if own[m - 1] < own[m] < own[m + 1]
      for c in range(own[m - 1] + 1, own[m + 1])
    ]
    if not candidates:
      continue
    values = SCORES[score](np.asarray(scorer(candidates)))
    found: dict[int, dict[int, float]] = {}
    for (i, _, own), value in zip(candidates, values, strict=True):
      found.setdefault(i, {})[own[m]] = float(value)
    for i, options in found.items():
      best = min(options, key=options.get)
      if options[cuts[i][m]] - options[best] > threshold:
        cuts[i] = (*cuts[i][:m], best, *cuts[i][m + 1 :])
  return cuts


def student_scores(
  model: LanguageModel, samples: Sequence[Sample], tags: Tags, *, length: int, batch: int = 64
) -> Scorer:
  """What `search` is given of a student: the losses of a chunk's own tokens, tags not among them.

  Raises:
    InputError: a batch below 1.
  """
  require_counts(batch=batch)
  special = np.array([tags.question, *tags.stages, tags.answer, tags.end])

  def scores(candidates):
    means = np.empty((len(candidates), 2))
    for at in range(0, len(candidates), batch):
      part = candidates[at : at + batch]
      rows = encode([samples[i] for i, _, _ in part], [own for _, _, own in part], tags, length=length)
      filled = np.arange(batch) % len(part)
      losses = np.asarray(_losses(model, counted(rows.take(filled))), np.float64)[: len(part)]
      own = ~np.isin(rows.tokens[:, 1:], special)
      for side in (0, 1):
        here = own & (rows.stages[:, 1:] == np.array([[m + side] for _, m, _ in part]))
        means[at : at + len(part), side] = (losses * here).sum(axis=1) / here.sum(axis=1)
    return means

  return scores


@jax.jit
def _losses(model, batch):
  return token_losses(model, model.hidden(batch["inputs"]), batch["targets"])


# Prompts -> what follows each, its <eos> the last token if it came to one.
Student = Callable[[Sequence[Sequence[int]]], Sequence[Sequence[int]]]


def student(model: LanguageModel, tags: Tags, *, tokens: int, batch: int = 256) -> Student:
  """A model's greedy continuations of at most `tokens` tokens, in batches of one size.

  Raises:
    InputError: tokens or a batch below 1.
  """
  require_counts(tokens=tokens, batch=batch)
  network = jax.jit(take_apart)(model)

  def respond(prompts):
    found = []
    for at in range(0, len(prompts), batch):
      part = list(prompts[at : at + batch])
      full = part + part[-1:] * (batch - len(part))
      found += complete(network, full, tokens=tokens, stop=(tags.end,), stretch=16)[: len(part)]
    return [completion.tokens for completion in found]

  return respond


def parse(tokens: Sequence[int], tags: Tags) -> Thought:
  """What a student wrote after the question; text before the first tag or after the answer's <eos> is no part of it."""
  stage_of = {tag: m for m, tag in enumerate(tags.stages, 1)}
  chunks: list[tuple[int, list[int]]] = []
  answer: list[int] | None = None
  for token in tokens:
    if token == tags.end:
      break
    if token == tags.answer:
      answer = []
    elif answer is not None:
      answer.append(token)
    elif token in stage_of:
      chunks.append((stage_of[token], []))
    elif chunks:
      chunks[-1][1].append(token)
  whole = answer is not None and len(tokens) > 0 and tags.end in tokens
  return Thought(tuple((m, tuple(chunk)) for m, chunk in chunks), tuple(answer) if whole else None)


def prompt(sample: Sample, tags: Tags) -> list[int]:
  """<q> q, after which a student thinks and answers."""
  return [tags.question, *sample.question]


def same_answer(sample: Sample, answer: Sequence[int] | None) -> bool:
  """Token by token."""
  return answer is not None and list(answer) == list(sample.answer)


def keep(
  respond: Student,
  samples: Sequence[Sample],
  cuts: Sequence[Cuts],
  tags: Tags,
  *,
  probe: str = "rollout",
  protected: Sequence[int] = (),
  right: Callable[[Sample, Sequence[int] | None], bool] = same_answer,
) -> list[tuple[int, ...]]:
  """The chunks a student's right answer needs. Chunk by chunk, the first first: it is left out of what was kept so far,
  the student goes on, and the chunk is kept unless the answer is right. Samples that even the whole rationale does not
  help keep all.

  A student that has learned these samples' answers by heart needs nothing: use one that has not seen them (folds).

  Args:
    respond: `student(model, ...)`.
    probe: how the student goes on: "rollout" from the next chunk's tag by itself; "teacher_rest" after the teacher's
      later chunks, with the answer; "answer_now" with the answer.
    protected: chunks that are always kept; right: (sample, answer or None) -> whether it is right.

  Raises:
    InputError: an unknown probe, a protected chunk beyond M, or as `encode`.
  """
  require_choice("probe", probe, PROBES)
  beyond = [m for m in protected if not 1 <= m <= len(tags.stages)]
  require(not beyond, f"chunks {beyond} are protected; there are 1 .. {len(tags.stages)}")
  require(len(cuts) == len(samples), f"{len(samples)} samples have {len(cuts)} cuts; each needs its own")
  for i, (sample, own) in enumerate(zip(samples, cuts, strict=True)):
    _require_sample(i, sample, own, tags)
  chunks = [_chunks(sample, own) for sample, own in zip(samples, cuts, strict=True)]

  def said(i, stages):
    return prompt(samples[i], tags) + [token for m in stages for token in (tags.stages[m - 1], *chunks[i][m])]

  def judge(asked: dict[int, list[int]]) -> dict[int, bool]:
    """By sample, of prompts that end in a tag."""
    written = respond(list(asked.values())) if asked else []
    ends = (start[-1:] + list(more) for start, more in zip(asked.values(), written, strict=True))
    return {i: right(samples[i], parse(end, tags).answer) for i, end in zip(asked, ends, strict=True)}

  helped = judge({i: [*said(i, own), tags.answer] for i, own in enumerate(chunks)})
  kept: list[list[int]] = [[] if helped[i] else list(own) for i, own in enumerate(chunks)]
  for m in range(1, len(tags.stages) + 1):
    here = [i for i, own in enumerate(chunks) if helped[i] and m in own]
    asked = {}
    for i in (i for i in here if m not in protected):
      later = [n for n in chunks[i] if n > m]
      if probe == "rollout":
        asked[i] = [*said(i, kept[i]), tags.stages[later[0] - 1] if later else tags.answer]
      else:
        asked[i] = [*said(i, kept[i] + later * (probe == "teacher_rest")), tags.answer]
    spared = judge(asked)
    for i in here:
      if not spared.get(i, False):
        kept[i].append(m)
  return [tuple(own) for own in kept]


def balanced(kept: Sequence[Sequence[int]], cuts: Sequence[Cuts], *, full: float = 0.5, seed: int = 0) -> np.ndarray:
  """Which samples to train on, int64, some of them several times: `full` of the places are of samples that keep all
  they have, the rest of those that leave something out. Where there is but one kind: all samples once.

  Raises:
    InputError: a share outside [0, 1), no sample, or not one list of kept chunks for each sample's cuts.
  """
  require(0 <= full < 1, f"full is {full}; it must lie in [0, 1)")
  require(len(cuts) > 0, "there is no sample; give at least one")
  require(len(kept) == len(cuts), f"{len(cuts)} samples have {len(kept)} lists of kept chunks; each needs its own")
  all_of = np.array([len(own) == len(set(c)) - 1 for own, c in zip(kept, cuts, strict=True)])
  whole, short = np.flatnonzero(all_of), np.flatnonzero(~all_of)
  if not len(whole) or not len(short):
    return np.arange(len(kept))
  rng = np.random.default_rng(seed)
  wanted = round(len(short) * full / (1 - full))
  times, rest = divmod(wanted, len(whole))
  return np.concatenate([short, np.tile(whole, times), rng.permutation(whole)[:rest]])
