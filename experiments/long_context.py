"""What experiments with long contexts share: models they are tried on, questions about prompts, losses behind them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from experiments import figures, results
from experiments.overlap import overlapped
from experiments.text import Text, load_text
from jaxlab.core.checks import InputError, require
from jaxlab.data.tokens import Tokens
from jaxlab.evaluation.long_context import answered, continuation_losses, interval, question
from jaxlab.models import hub, inference
from jaxlab.models.generate import Decoder


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model with its layers taken apart, and held-out text in tokens of its own."""

  name: str
  network: inference.Network
  tokenizer: Tokenizer
  tokens: Tokens


def subjects(config, cache: Path) -> list[Subject]:
  """Those named by config.subjects, or config.model alone where it is given: hub names, or hf:DIR.

  Parameters are of config.dtype; the text is config.data.split of config.data, a local one where it has a path.
  """
  return [_subject(config, name, cache) for name in given(config)]


def subject_names(config) -> list[str]:
  """The names of `subjects(config)`, before any is read."""
  return [_short(name) for name in given(config)]


def parse(text: str) -> tuple[str, float]:
  """A method and its budget, "compact 0.06", as its name and that number.

  Raises:
    InputError: not of that form.
  """
  name, _, value = text.partition(" ")
  try:
    return name, float(value)
  except ValueError:
    raise InputError(f"the method {text!r} is not of the form 'compact 0.06': a name and a number") from None


def by_model(config, workdir, names, measures: Mapping[str, tuple[Callable, list[str]]], alone: Mapping) -> dict:
  """{part: {model: what it measured}} of config.parts, all of the first model before the next one's.

  Args:
    measures: {part: (of a model's name, the names it is for)}; alone: {part: of no model}, kept by `results.part`.
  """
  metrics = {part: {} for part in config.parts}
  for name in names:
    for part in config.parts:
      if part in alone:
        metrics[part] = results.part(workdir, part, alone[part])
      elif name in measures[part][1]:
        metrics[part][name] = measures[part][0](name)
  return metrics


def given(config) -> tuple[str, ...]:
  """The models as they were named: config.model alone, or config.subjects."""
  return (config.model,) if config.model else config.subjects


def opened(config, name: str, cache: Path) -> tuple[str, Path, Text]:
  """(short name, folder, text of config.data in its tokens) of a model; a text with a path is a local one."""
  config = config.copy_and_resolve_references()
  config.data.name = "local_text" if config.data.path else config.data.name
  folder = hub.find(name.removeprefix("hf:"))
  return _short(name), folder, load_text(config, cache, given=folder)


def _short(name: str) -> str:
  return Path(name.removeprefix("hf:")).name


def _subject(config, name: str, cache: Path) -> Subject:
  name, folder, text = opened(config, name, cache)
  network = jax.jit(inference.take_apart)(hub.load(folder, dtype=config.dtype))
  return Subject(name, network, text.bpe, text.split(config.data.split))


def accuracy(subject: Subject, decoders: Mapping[str, Decoder], asked) -> list[dict]:
  """Answers to the same questions by every decoder, which the first one's are compared with.

  Args:
    asked: tasks and lengths of the questions, their count in each cell, batch.

  Returns:
    A row a decoder, task and length: {subject, decoder, task, length, share of answers given, low and high (95 %),
    difference to the first decoder, its standard error, paired over the questions, count}.
  """
  rows = []
  for length in asked.lengths:
    of_task = lambda task, length=length: [
      question(task, subject.tokens, subject.tokenizer, length=length, seed=seed) for seed in range(asked.count)
    ]
    # All tasks at once: they have one shape, and each decoder one program.
    questions = [one for task in asked.tasks for one in of_task(task)]
    answers = lambda decoder, questions=questions: answered(
      subject.network, decoder, subject.tokenizer, questions, batch=asked.batch
    )
    first = None
    for name, found in zip(decoders, overlapped(answers, decoders.values()), strict=True):
      found = found.reshape(len(asked.tasks), asked.count)
      first = found if first is None else first
      for task, shares, before in zip(asked.tasks, found, first, strict=True):
        low, high = interval(shares)
        rows.append(
          dict(subject=subject.name, decoder=name, task=task, length=length, share=float(shares.mean()))
          | dict(low=low, high=high, **paired(shares, before), count=asked.count)
        )
  return rows


def losses(subject: Subject, decoders: Mapping[str, Decoder], read, *, seed: int = 0) -> list[dict]:
  """Losses of the tokens behind prompts of held-out text, read one by one.

  Args:
    read: tokens of the prompt and of the rest, number of documents, batch.

  Returns:
    A row a decoder: {subject, decoder, prompt, loss in nats, difference to the first decoder's, its standard error,
    paired over the documents, count}.
  """
  rows = documents(subject.tokens, read.documents, read.prompt + read.rest, seed=seed)
  batches = [padded(rows[i : i + read.batch], read.batch) for i in range(0, len(rows), read.batch)]

  def behind(decoder: Decoder) -> np.ndarray:
    found = [continuation_losses(subject.network, batch, prompt=read.prompt, decoder=decoder) for batch in batches]
    return np.concatenate(found)[: len(rows)].mean(axis=1)

  made, first = [], None
  for name, found in zip(decoders, overlapped(behind, decoders.values()), strict=True):
    first = found if first is None else first
    made.append(
      dict(subject=subject.name, decoder=name, prompt=read.prompt, loss=float(found.mean()))
      | dict(**paired(found, first), count=len(rows))
    )
  return made


def documents(tokens: Tokens, count: int, length: int, *, seed: int = 0) -> np.ndarray:
  """int32[count, length]: BOS and a piece from a random place of each of the documents that are long enough, one after
  the other; again from the first where there are fewer.

  Raises:
    InputError: no document is long enough.
  """
  rng = np.random.default_rng(seed)
  long = rng.permutation(np.flatnonzero(np.diff(tokens.offsets) >= length - 1))
  require(len(long) > 0, f"no held-out document has {length - 1} tokens; give longer ones, or shorten prompt and rest")
  pieces = []
  for i in np.resize(long, count):
    document = tokens.document(i)
    start = rng.integers(len(document) - length + 2)
    pieces.append([tokens.bos, *document[start : start + length - 1]])
  return np.array(pieces, np.int32)


def padded(rows: np.ndarray, batch: int) -> jnp.ndarray:
  """`batch` rows, the last one repeated: one shape, one program."""
  return jnp.asarray(rows[np.minimum(np.arange(batch), len(rows) - 1)])


def sizes_of(fields, name: str):
  """What a part of the config has for `base`, or for other models."""
  return fields.base if name == "base" else fields.others


def paired(found: np.ndarray, first: np.ndarray) -> dict[str, float]:
  """Mean difference of two measurements of the same things, and its standard error."""
  difference = found - first
  spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
  return {"difference": float(difference.mean()), "error": float(spread / math.sqrt(len(difference)))}


def table(rows: list[dict], columns: tuple[str, ...]) -> str:
  """The rows' columns as text, one below the other."""
  shown = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
  lines = [columns, *([shown(row[column]) for column in columns] for row in rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
  return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def draw_answers(rows: list[dict], workdir: Path, titles: Mapping[str, str] = MappingProxyType({})) -> str:
  """Bars of the rows of `accuracy`, a group a decoder, a colour a cell, with 95 % intervals; the file's name."""
  cell = lambda row: (row["subject"], row["task"], row["length"])
  cells, names = list(dict.fromkeys(map(cell, rows))), list(dict.fromkeys(row["decoder"] for row in rows))
  figure, axis = figures.subplots(width=1.6)
  for i, here in enumerate(cells):
    mine = {row["decoder"]: row for row in rows if cell(row) == here}
    share, low, high = (100 * np.array([mine[name][key] for name in names]) for key in ("share", "low", "high"))
    place = np.arange(len(names)) + 0.8 * (i + 0.5) / len(cells) - 0.4
    error = np.maximum(0, [share - low, high - share])
    label = f"{here[0]}, {here[1].replace('_', ' ')}, {here[2]}"
    axis.bar(place, share, 0.8 / len(cells), yerr=error, label=label, error_kw=dict(lw=0.8))
  axis.set_xticks(np.arange(len(names)), [titles.get(name, name).replace(", ", ",\n") for name in names], size=7)
  axis.set(ylabel="answers right, %", ylim=(0, 105))
  axis.legend(fontsize=8)
  return figures.save(figure, workdir, "questions")
