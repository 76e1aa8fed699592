"""Small character models trained on generated tasks: one for all leaves, one that answers at once, one that writes all
sub-steps into one chain. All have the same shape, the same number of training tokens and greedy decoding.

An example is "<tag><question>><answer>." in characters; tags are capital letters, one a task.
"""

import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from experiments.decomposed_prompting import shapes
from jaxlab.models import Transformer, TransformerConfig
from jaxlab.models.generate import complete, power_of_two
from jaxlab.models.inference import take_apart
from jaxlab.tasks.decomposed_prompting import Answer, Failure, Leaf
from jaxlab.training import losses
from jaxlab.training.loop import train
from jaxlab.training.optimizers import muon_adamw

ALPHABET = "\0" + string.ascii_lowercase + string.digits + ",|#>;: .=" + "RJNSLAMDC"
_ID = {character: i for i, character in enumerate(ALPHABET)}
STOP = _ID["."]
MODELS = ("leaves", "direct", "chain")
LISTS, WORDS = 6, 3  # longest in training
_SIGNS = {"a space": " ", "a comma": ",", "a semi-colon": ";", "nothing": "#"}


def words(config, *, held_out: bool, seed: int = 0) -> list[str]:
  """Random words of config.words.letters letters; those that are held out are in no training example."""
  rng = np.random.default_rng([seed, 1])
  low, high = config.words.letters
  draw = lambda: "".join(rng.choice(list(string.ascii_lowercase), rng.integers(low, high + 1)))
  made = list(dict.fromkeys(draw() for _ in range(config.words.count)))
  cut = len(made) // 5
  return made[:cut] if held_out else made[cut:]


def example(rng: random.Random, kind: str, vocabulary: list[str]) -> str:
  """One training example of a model."""
  some = lambda low, high: rng.choices(vocabulary, k=rng.randint(low, high))
  if kind != "leaves":
    if rng.random() < 0.5:
      items = some(1, LISTS)
      return _example("D", ",".join(items), _reversal(items, kind == "chain"))
    names = some(1, WORDS)
    return _letters_example(rng, names, kind == "chain")
  task = rng.choice("RJNSLAM")
  if task == "R":
    items = some(1, shapes.BASE - 1)
    return _example("R", ",".join(items), ",".join(items[::-1]))
  if task == "J":
    first, second = some(1, LISTS // 2), some(1, LISTS // 2)
    return _example("J", f"{','.join(first)}|{','.join(second)}", ",".join(first + second))
  if task == "N":
    items, start = some(1, LISTS // 2), rng.randint(1, 32)
    return _example("N", ",".join(f"{start + i}{item}" for i, item in enumerate(items)), ",".join(items))
  if task == "S":
    names = some(1, WORDS)
    return _example("S", " ".join(names), ",".join(names))
  if task == "M":
    letters, how = rng.choices(string.ascii_lowercase, k=rng.randint(1, WORDS)), _how(rng)
    return _example("M", f"{','.join(letters)}#{_SIGNS[how]}", shapes.DELIMITERS[how].join(letters))
  (name,) = some(1, 1)
  pairs = _pairs(name)
  if task == "L":
    return _example("L", name, pairs)
  position = _position(rng, [name])
  return _example("A", f"{pairs}#{position}", _letter(name, position))


def _example(tag: str, question: str, answer: str) -> str:
  return f"{tag}{question}>{answer}."


def _how(rng) -> str:
  return rng.choice(shapes.SEEN)


def _position(rng, names) -> str:
  return "l" if rng.random() < 0.2 else str(rng.randint(1, min(map(len, names))))


def _letter(name: str, position: str) -> str:
  return name[-1] if position == "l" else name[int(position) - 1]


def _pairs(name: str) -> str:
  return "".join(f"{letter}{i + 1}" for i, letter in enumerate(name))


def _letters_example(rng, names, chain: bool) -> str:
  how, position = _how(rng), _position(rng, names)
  letters = [_letter(name, position) for name in names]
  steps = "".join(f"{name}:{_pairs(name)}:{letter};" for name, letter in zip(names, letters, strict=True))
  answer = shapes.DELIMITERS[how].join(letters)
  return _example("C", f"{' '.join(names)}#{position}#{_SIGNS[how]}", (steps + "=" if chain else "") + answer)


def _reversal(items: list[str], chain: bool) -> str:
  return (_unrolled(items) + "=" if chain else "") + ",".join(items[::-1])


def _unrolled(items: list[str]) -> str:
  """The whole recursion: the halves, what becomes of each, and both together."""
  if len(items) < shapes.BASE:
    return ",".join(items[::-1])
  half = len(items) // 2
  first, second = items[:half], items[half:]
  return f"{','.join(first)}|{','.join(second)};{_unrolled(first)};{_unrolled(second)};{','.join(items[::-1])}"


class Examples:
  """Endless batches of rows full of examples one after the other; only answers count.

  `stream(rng)` gives the examples of a row: pairs (ids of the question, ids of the answer).
  """

  def __init__(self, config, kind: str, seed: int, stream: Callable[[random.Random], Iterator]):
    self._config, self._kind, self._seed, self._stream, self._next = config, kind, seed, stream, 0

  def __iter__(self):
    return self

  def __next__(self):
    self._next += 1
    rng = random.Random(f"{self._seed} {self._kind} {self._next}")
    t = self._config.train
    rows = [self._row(rng, t.length + 1) for _ in range(t.batch)]
    inputs, counted = (np.stack(part) for part in zip(*rows, strict=True))
    return {"inputs": inputs[:, :-1], "targets": np.where(counted[:, 1:], inputs[:, 1:], -1)}

  def _row(self, rng, length: int):
    ids, counted, stream = [], [], self._stream(rng)
    while len(ids) < length:
      question, answer = next(stream)
      ids += (*question, *answer)
      counted += [False] * len(question) + [True] * len(answer)
    return np.array(ids[:length], np.int32), np.array(counted[:length])

  def get_state(self) -> dict:
    return {"next": self._next}

  def set_state(self, state: dict) -> None:
    self._next = state["next"]


def examples(config, kind: str, seed: int) -> Examples:
  """What a model of characters is trained on."""
  vocabulary = words(config, held_out=False)

  def stream(rng):
    while True:
      text = example(rng, kind, vocabulary)
      ids, cut = [_ID[character] for character in text], text.index(">") + 1
      yield ids[:cut], ids[cut:]

  return Examples(config, kind, seed, stream)


def fitted(config, kind: str, seed: int, data: Examples, vocab_size: int, workdir: Path, console):
  """A network for `answered`, trained for config.train.steps; a workdir that has it gives it back."""
  t = config.train
  shape = config.shape.to_dict() | dict(vocab_size=vocab_size, context=t.length)
  model = Transformer(TransformerConfig(**shape), jax.random.key(seed))
  tokens = t.batch * t.length
  rates = dict(scale=t.scale, warmup=t.warmup, warmdown=t.warmdown)
  with console.training(f"{kind}, seed {seed}") as progress:
    model = train(
      model,
      data,
      lambda model, batch, step, key: losses.language_model_loss(model, batch),
      muon_adamw(model.config, steps=t.steps, batch_tokens=tokens, **rates),
      steps=t.steps,
      workdir=workdir / f"{kind}_{seed}",
      seed=seed,
      compute_dtype=config.dtype,
      checkpoint_every=t.checkpoint_every,
      progress=progress,
    )
  return jax.jit(take_apart)(model)


def answered(config, network, prompts: list[tuple[int, ...]], *, growth: int, stop: int) -> list[list[int]]:
  """New ids of each prompt up to `stop`; none where it was not met in `growth` times the prompt's padded length.

  Prompts go by length, so that few shapes are compiled: batches of one size, of prompts of one power of two.
  """
  found, size = {}, config.eval.batch
  by_length = {}
  for prompt in dict.fromkeys(prompts):
    by_length.setdefault(power_of_two(len(prompt)), []).append(prompt)
  for length, group in by_length.items():
    limit = min(config.eval.tokens, growth * length)
    for at in range(0, len(group), size):
      part = group[at : at + size]
      padded = part + [part[-1]] * (size - len(part))
      for prompt, row in zip(part, complete(network, padded, tokens=limit, stop=(stop,), stretch=16), strict=False):
        found[prompt] = row.tokens[:-1] if row.tokens[-1] == stop else []
  return [found[prompt] for prompt in prompts]


def trained(config, kind: str, seed: int, workdir: Path, console) -> Callable[[list[str]], list[str]]:
  """`ask(questions) -> answers` of the model of characters `kind`; an answer without an end is empty."""
  network = fitted(config, kind, seed, examples(config, kind, seed), len(ALPHABET), workdir, console)

  def ask(questions: list[str]) -> list[str]:
    prompts = [tuple(_ID.get(character, 0) for character in question) for question in questions]
    rows = answered(config, network, prompts, growth=config.eval.growth[MODELS.index(kind)], stop=STOP)
    return ["".join(ALPHABET[token] for token in row) for row in rows]

  return ask


def leaves(ask) -> dict[str, Leaf]:
  """The leaves of the published programs by the model: questions as characters, answers as the programs want them."""
  listed = lambda text: text.split(",")
  compact = lambda text: text.replace(", ", ",")
  spaced = lambda text: text.replace(",", ", ")

  def numbered(text):
    return compact(shapes.quoted(text)[-1]).replace(". ", "")

  def arranged(text):
    pairs = json.loads(text[text.index("[") : text.rindex("]") + 1])
    place = "l" if "last" in text else text.split("position ")[1].split()[0]
    return "A" + "".join(f"{letter}{position}" for letter, position in pairs) + f"#{place}>"

  def merged(text):
    letters, how = shapes.read_merge(text)
    return f"M{','.join(letters)}#{_SIGNS[how]}>"

  read = {
    "cot": (lambda text: f"R{compact(shapes.quoted(text)[-1])}>", spaced),
    "remove_numbers": (lambda text: f"N{numbered(text)}>", spaced),
    "join": (lambda text: f"J{'|'.join(map(compact, shapes.quoted(text)))}>", spaced),
    "split": (lambda text: f"S{shapes.quoted(text)[-1]}>", listed),
    "letters": (lambda text: f"L{shapes.quoted(text)[-1]}>", _read_pairs),
    "arr_position": (arranged, str),
    "merge": (merged, str),
  }
  return {name: _leaf(ask, *how) for name, how in read.items()}


def _read_pairs(text: str) -> list:
  return [[text[i], int(text[i + 1 :][: _digits(text[i + 1 :])])] for i, c in enumerate(text) if not c.isdigit()]


def _digits(text: str) -> int:
  return next((i for i, c in enumerate(text) if not c.isdigit()), len(text))


def _leaf(ask, write, read) -> Leaf:
  def answer(questions):
    found = ask([write(question.text) for question in questions])
    return [_read(read, text) for text in found]

  return answer


def _read(read, text):
  try:
    return Answer(read(text)) if text else Failure("the model did not come to an end")
  except ValueError:
    return Failure(f"the model wrote {text!r:.40}")


def monolithic(ask, questions: list[str]) -> list[str]:
  """Answers of the models that get the whole question; what follows "=" of a chain."""
  prompts = []
  for question in questions:
    if question.startswith("Reverse"):
      prompts.append(f"D{shapes.quoted(question)[-1].replace(', ', ',')}>")
    else:
      place, names, how = shapes.read_letters(question)
      position = "l" if "last" in place else place.split()[-1]
      prompts.append(f"C{names}#{position}#{_SIGNS[how]}>")
  answers = [text.rpartition("=")[2] for text in ask(prompts)]
  spaced = lambda question, text: text.replace(",", ", ") if question.startswith("Reverse") else text
  return [spaced(question, text) for question, text in zip(questions, answers, strict=True)]
