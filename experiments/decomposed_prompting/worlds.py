"""Questions of several hops over generated worlds: a handler for each hop, one for two hops, a chain of thought, or the
answer at once.

A world has entities and eight relations, each a function of entities; every row of training and every test question
has a world of its own, of which it is told some facts. A fact or a hop of a question names its relation by one of two
words. Certain pairs of relations follow each other in no training question and in every compositional one.

A prompt is "<facts> <tag> <relations, the last hop first> <entity> >", a fact "<entity> <relation> <entity>"; names are
spelt, other words are tokens. All models but the one that answers at once quote the facts they use, then "=" and the
answer: a handler learns a hop from the same text as a chain does.
"""

import itertools
import random
import re
from pathlib import Path

import numpy as np

from experiments.decomposed_prompting import learned
from jaxlab.core.checks import require
from jaxlab.tasks import handlers
from jaxlab.tasks.answers import exact_match
from jaxlab.tasks.decomposed_prompting import Answer, Decomposer, Failure, Leaf, Question, solve
from jaxlab.tasks.programs import END

# By leaf of the fine program: relations, two words each.
LEAVES = {
  "family_qa": (("mother", "mum"), ("child", "kid"), ("spouse", "partner")),
  "school_qa": (("teacher", "tutor"), ("pupil", "student"), ("friend", "pal")),
  "work_qa": (("boss", "chief"), ("doctor", "physician")),
}
RELATIONS = [words for relations in LEAVES.values() for words in relations]
RELATION_OF = {word: number for number, words in enumerate(RELATIONS) for word in words}
LEAF_OF = {word: leaf for leaf, relations in LEAVES.items() for words in relations for word in words}
HOPS = 4  # of the longest question
# By arm: the hops of its training questions, at most. All have one model of one size.
ARMS = {"fine": 1, "coarse": 2, "chain": HOPS, "direct": HOPS}
LABELS = {
  "fine": "a handler a hop",
  "coarse": "a handler for two hops",
  "chain": "a chain of thought",
  "direct": "the answer at once",
}
SPLITS = ("iid", "compositional")
SHIFTS = (2, 5)  # relation r is never followed by r + 2 or r + 5 in training: 16 of 64 pairs
_STOP = "."
_LETTERS = "bcdfghjklmnpqrstvwxyz"  # without vowels a name is no article, which exact match drops
TOKENS = [">", "=", _STOP, "qa", *LEAVES, *RELATION_OF, *_LETTERS]
_ID = {token: number for number, token in enumerate(TOKENS)}


def held_out(relations) -> bool:
  """Whether two relations that training never has next to each other follow each other."""
  return any((after - before) % len(RELATIONS) in SHIFTS for before, after in itertools.pairwise(relations))


def entities(config) -> list[str]:
  """Names of config.worlds.letters letters."""
  names = ["".join(letters) for letters in itertools.product(_LETTERS, repeat=config.worlds.letters)]
  require(
    2 <= config.worlds.entities <= len(names),
    f"worlds.entities is {config.worlds.entities}; it must lie in 2..{len(names)}, the names there are",
  )
  return random.Random(config.seed).sample(names, config.worlds.entities)


class World:
  """Which entity stands in a relation to another: drawn when first asked."""

  def __init__(self, rng: random.Random, names: list[str]):
    self.rng, self.names, self._known = rng, names, {}

  def object(self, subject: str, relation: int) -> str:
    if (subject, relation) not in self._known:
      self._known[subject, relation] = self.rng.choice(self.names)
    return self._known[subject, relation]

  def facts(self, walk: list[int], size: int) -> tuple[str, list[tuple[str, int, str]]]:
    """(where the walk starts, facts in any order): the walk's, and others of its entities and of its relations."""
    rng, start = self.rng, self.rng.choice(self.names)
    keys, subject = {}, start
    for relation in walk:
      keys[subject, relation] = None
      subject = self.object(subject, relation)
    path = list(keys)
    while len(keys) < size:
      subject, relation = rng.choice(path)
      near = (subject, rng.randrange(len(RELATIONS))), (rng.choice(self.names), relation)
      keys[rng.choice(near)] = None
    told = [(subject, relation, self.object(subject, relation)) for subject, relation in keys]
    return start, rng.sample(told, len(told))


def walks(rng: random.Random, hops: int, compositional: bool) -> list[int]:
  """HOPS relations; the first `hops` have a held-out pair, or none of all has one."""
  while True:
    walk = [rng.randrange(len(RELATIONS)) for _ in range(HOPS)]
    if held_out(walk[:hops]) if compositional else not held_out(walk):
      return walk


def said(rng: random.Random, facts) -> list[str]:
  return [f"{subject} {rng.choice(RELATIONS[relation])} {object_}" for subject, relation, object_ in facts]


def asked(words: list[str], entity: str) -> str:
  """A question; `words` are those of the hops, the first one first."""
  return f"Who is {''.join(f'the {word} of ' for word in reversed(words))}{entity}?"


def read(question: str) -> tuple[list[str], str]:
  """(words of the hops, the first one first, the entity) of a question."""
  match = re.fullmatch(r"Who is ((?:the \w+ of )+)(\S+)\?", question)
  require(match is not None, f"{question!r:.80} is no question about a world")
  return re.findall(r"the (\w+) of", match[1])[::-1], match[2]


def paths(facts, hops: int) -> list[list[tuple[str, int, str]]]:
  """Ways of `hops` facts, each beginning where the one before ends, without held-out pairs."""
  found = [[fact] for fact in facts]
  for _ in range(hops - 1):
    found = [[*path, fact] for path in found for fact in facts if fact[0] == path[-1][2]]
  return [path for path in found if not held_out([relation for _, relation, _ in path])]


def examples(config, arm: str, rng: random.Random):
  """(question, answer) without end, in words: a few questions after the facts that they are about."""
  names = entities(config)
  world = World(rng, names)
  while True:
    _, facts = world.facts(walks(rng, HOPS, compositional=False), config.worlds.facts)
    before = " ".join(said(rng, facts)) + " "
    for _ in range(config.worlds.asked):
      path = rng.choice(paths(facts, rng.randint(1, ARMS[arm])))
      words = [rng.choice(RELATIONS[relation]) for _, relation, _ in path]
      hops = [f"{subject} {word} {object_}" for (subject, _, object_), word in zip(path, words, strict=True)]
      steps = " ".join([*hops, "= "]) if arm != "direct" else ""
      yield before + prompt([], words, path[0][0], arm), f"{steps}{path[-1][2]} {_STOP}"
      before = ""


def prompt(context, words: list[str], entity: str, arm: str) -> str:
  tag = LEAF_OF[words[0]] if arm == "fine" else "qa"
  return " ".join([*context, tag, *reversed(words), entity, ">"])


def tests(config) -> dict[str, list[tuple[Question, str]]]:
  """{"iid 2": pairs, ...} by split and hops."""
  names, found = entities(config), {}
  for split in SPLITS:
    for hops in config.worlds.hops:
      rng = random.Random(f"{config.seed} {split} {hops}")
      found[f"{split} {hops}"] = [_test(rng, names, hops, split, config.worlds.facts) for _ in range(config.eval.count)]
  return found


def _test(rng, names, hops: int, split: str, size: int) -> tuple[Question, str]:
  walk, world = walks(rng, hops, split == "compositional"), World(rng, names)
  start, facts = world.facts(walk, size)
  answer = start
  for relation in walk[:hops]:
    answer = world.object(answer, relation)
  words = [rng.choice(RELATIONS[relation]) for relation in walk[:hops]]
  return Question(asked(words, start), tuple(said(rng, facts))), answer


def decomposer(at_once: int) -> Decomposer:
  """The published shape of program: a step for `at_once` hops, later ones over all answers of the step before."""

  def line(level):
    words, entity = read(level.question)
    done = len(level.steps)
    part = words[done * at_once : (done + 1) * at_once]
    if not part:
      return END
    leaf = f"[{LEAF_OF[part[0]]}]" if at_once == 1 else "[qa]"
    if done == 0:
      return f"(select) {leaf} {asked(part, entity)}"
    return f"(project_values_flat_unique) {leaf} {asked(part, f'#{done}')}"

  return handlers.policy(line)


def symbolic(questions) -> list[Answer | Failure]:
  """The leaf that looks facts up."""
  return [_looked_up(question) for question in questions]


def _looked_up(question: Question) -> Answer | Failure:
  known = {}
  for fact in question.context:
    subject, word, object_ = fact.split()
    known[subject, RELATION_OF[word]] = object_
  words, entity = read(question.text)
  for word in words:
    if (entity := known.get((entity, RELATION_OF[word]))) is None:
      return Failure("no fact says it")
  return Answer(entity)


def solved(pairs, at_once: int, leaf: Leaf) -> dict:
  """{"right", "calls"} of the program whose leaves are all `leaf`; calls of the decomposer and of leaves a question."""
  library = {"plan": decomposer(at_once), "qa": leaf} | dict.fromkeys(LEAVES, leaf)
  outcomes = solve([question for question, _ in pairs], "plan", library)
  answers = [outcome.answer if isinstance(outcome.answer, list) else [outcome.answer] for outcome in outcomes]
  calls = float(np.mean([sum(outcome.calls.values()) for outcome in outcomes]))
  return {"right": right(answers, pairs), "calls": calls}


def right(answers, pairs) -> float:
  """Exact match of a list of spans with the answer."""
  good = lambda spans, answer: all(isinstance(span, str) for span in spans) and exact_match(spans, [answer])
  return float(np.mean([good(spans, answer) for spans, (_, answer) in zip(answers, pairs, strict=True)]))


def by_functions(config) -> dict[str, dict]:
  """{"fine 2": {"right", "calls"}, ...}: the programs with a leaf that looks facts up, both splits together."""
  found = {}
  for hops in config.worlds.hops:
    pairs = [pair for name, some in tests(config).items() for pair in some if name.endswith(f" {hops}")]
    for arm in ("fine", "coarse"):
      found[f"{arm} {hops}"] = solved(pairs, ARMS[arm], symbolic)
  return found


def ids(text: str) -> tuple[int, ...]:
  """Tokens of a text: a word that is none is spelt."""
  return tuple(_ID[token] for word in text.split() for token in ([word] if word in _ID else word))


class _Reader:
  """A trained model as a leaf, which counts the tokens it reads and writes."""

  def __init__(self, config, arm: str, seed: int, workdir: Path, console):
    self._config, self._arm = config, arm
    self.read = self.written = 0
    stream = lambda rng: ((ids(question), ids(answer)) for question, answer in examples(config, arm, rng))
    data = learned.Examples(config, f"worlds_{arm}", seed, stream)
    self._network = learned.fitted(config, f"worlds_{arm}", seed, data, len(TOKENS), workdir, console)

  def __call__(self, questions) -> list[Answer | Failure]:
    prompts = [ids(prompt(question.context, *read(question.text), self._arm)) for question in questions]
    rows = learned.answered(self._config, self._network, prompts, growth=1, stop=_ID[_STOP])
    self.read += sum(map(len, prompts))
    self.written += sum(len(row) + 1 for row in rows)
    return [_answer("".join(TOKENS[token] for token in row).rpartition("=")[2]) for row in rows]


def _answer(text: str) -> Answer | Failure:
  return Answer(text) if text and set(text) <= set(_LETTERS) else Failure(f"the model wrote {text!r:.40}")


def measure(config, arm: str, seed: int, workdir: Path, console) -> dict:
  """Trains an arm's model: {"right": {test: share}, "calls", "read", "written"}, the last three a question, of which
  tokens that models read and wrote."""
  leaf, made, calls = _Reader(config, arm, seed, workdir, console), {}, []
  for name, pairs in tests(config).items():
    if arm in ("fine", "coarse"):
      found = solved(pairs, ARMS[arm], leaf)
      made[name], count = found["right"], found["calls"]
    else:
      answers = [[answer.value] if isinstance(answer, Answer) else [] for answer in leaf([q for q, _ in pairs])]
      made[name], count = right(answers, pairs), 1.0
    calls.append(count)
    console.say(f"worlds, {arm}, {name}: {made[name]:.0%}")
  total = config.eval.count * len(made)
  return {"right": made, "calls": float(np.mean(calls)), "read": leaf.read / total, "written": leaf.written / total}
