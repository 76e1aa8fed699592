"""The experiment of decomposed prompting: its questions, its models' characters, and a run with leaves that know."""

import functools
import importlib
import itertools
import json
import random
import re

import numpy as np
import pytest

from configs import decomposed_prompting as config_file
from experiments import results
from experiments.console import Console
from experiments.decomposed_prompting import evaluation, learned, pretrained, retrieval, shapes, worlds
from jaxlab.core.checks import InputError
from jaxlab.tasks.decomposed_prompting import Answer, Question
from tests.common import run_and_continue


@pytest.fixture
def config():
  return config_file.get_config("test")


def knows(config, kind):
  """An `ask` that answers as the examples of a model do."""

  def one(question):
    tag, rest = question[0], question[1:-1]
    if tag in "RD":
      items = rest.split(",")
      chain = learned._reversal(items, kind == "chain")
      return chain if tag == "D" else ",".join(items[::-1])
    if tag == "C":
      words, position, sign = rest.split("#", 2)
      letters = [word[-1] if position == "l" else word[int(position) - 1] for word in words.split(" ")]
      return ("=" if kind == "chain" else "") + ("" if sign == "#" else sign).join(letters)
    if tag == "A":
      pairs, position = rest.split("#")
      return pairs[-2] if position == "l" else pairs[2 * int(position) - 2]
    if tag == "M":
      letters, sign = rest.split("#", 1)
      return ("" if sign == "#" else sign).join(letters.split(","))
    return {
      "J": lambda: rest.replace("|", ","),
      "N": lambda: rest.translate(str.maketrans("", "", "0123456789")),
      "S": lambda: rest.replace(" ", ","),
      "L": lambda: learned._pairs(rest),
    }[tag]()

  return lambda questions: [one(question) for question in questions]


def knows_worlds(config, network, prompts, *, growth, stop):
  """As `learned.answered` by a model that looks the facts of its prompt up, and nothing else."""
  spelt = config.worlds.letters

  def one(prompt):
    tokens = [worlds.TOKENS[i] for i in prompt]
    at = next(i for i, token in enumerate(tokens) if token in ("qa", *worlds.LEAVES))
    name = lambda i: "".join(tokens[i : i + spelt])
    context = tuple(f"{name(i)} {tokens[i + spelt]} {name(i + spelt + 1)}" for i in range(0, at, 2 * spelt + 1))
    words, entity = tokens[-2 - spelt : at : -1], "".join(tokens[-1 - spelt : -1])
    (found,) = worlds.symbolic([Question(worlds.asked(words, entity), context)])
    return list(worlds.ids(f"= {found.value}"))

  return [one(prompt) for prompt in prompts]


def test_models_that_know_answer_everything_so_the_characters_carry_all_there_is(config, tmp_path, monkeypatch):
  monkeypatch.setattr(learned, "trained", lambda config, kind, seed, workdir, console: knows(config, kind))
  monkeypatch.setattr(learned, "fitted", lambda *arguments: None)
  monkeypatch.setattr(learned, "answered", knows_worlds)
  measures = ("learn", "symbolic", "retrieval.measure", "worlds.measure", "worlds.by_functions")
  report = run_and_continue("decomposed_prompting", tmp_path, monkeypatch, *measures)
  for part in ("learned", "delimiter"):
    for found in report.metrics[part].values():
      assert all(share == 1 for share in found["0"]["right"].values())
  leaves = report.metrics["learned"]["leaves"]["0"]["leaves"]
  assert set(leaves.values()) == {1} and set(report.metrics["learned"]["mixed"]["0"]["leaves"]) < set(leaves)
  assert [claim.holds for claim in report.claims[6:8]] == [True, True]
  assert all(row["right"] == 1 for row in report.metrics["worlds"]["functions"].values())
  for arm in worlds.ARMS:
    found = report.metrics["worlds"][arm]["0"]
    assert set(found["right"]) == {f"{split} {hops}" for split in worlds.SPLITS for hops in (2, 3)}
    assert set(found["right"].values()) == {1}
  # Of 2 and 3 hops: a line a step and the last, and a leaf a step.
  assert [report.metrics["worlds"][arm]["0"]["calls"] for arm in worlds.ARMS] == [6, 4, 1, 1]
  assert report.claims[-2].ours == 0 and report.claims[-1].holds
  assert "letters 2" in report.metrics["delimiter"]["leaves"]["0"]["right"] and len(report.figures) == 2


def test_what_was_published_before_there_were_worlds_is_still_told(config, tmp_path, monkeypatch):
  monkeypatch.setattr(learned, "trained", lambda config, kind, seed, workdir, console: knows(config, kind))
  monkeypatch.setattr(learned, "fitted", lambda *arguments: None)
  monkeypatch.setattr(learned, "answered", knows_worlds)
  experiment = importlib.import_module("experiments.decomposed_prompting")
  metrics = experiment.measure(config, tmp_path, tmp_path, Console())
  old = {name: part for name, part in metrics.items() if name not in ("worlds", "delimiter")}
  assert len(experiment.claims(config, old)) == len(experiment.claims(config, metrics)) - 2
  assert "semi-colon" not in repr(experiment.claims(config, old))
  assert "over worlds" not in experiment.finding(config, old)
  assert "semi-colon" in repr(experiment.claims(config, metrics))
  for file in tmp_path.glob(f"*{results.PART}"):  # as a published run is restored
    functools.reduce(dict.__getitem__, file.name.removesuffix(results.PART).split("."), metrics)


def test_examples_are_what_a_model_that_knows_would_say(config):
  rng = random.Random(0)
  vocabulary = learned.words(config, held_out=False)
  for kind in learned.MODELS:
    ask = knows(config, kind)
    for _ in range(200):
      question, answer = learned.example(rng, kind, vocabulary).split(">", 1)
      said = ask([f"{question}>"])[0]
      assert answer.rpartition("=")[2] == f"{said.rpartition('=')[2]}."


def test_words_that_are_held_out_are_in_no_example_and_only_answers_count(config):
  held, free = (set(learned.words(config, held_out=out)) for out in (True, False))
  assert held and free and not held & free
  batch = next(learned.examples(config, "leaves", 0))
  shape = (config.train.batch, config.train.length)
  assert batch["inputs"].shape == batch["targets"].shape == shape
  text = "".join(learned.ALPHABET[i] for i in batch["inputs"][0])
  targets = batch["targets"][0]
  first = text.index(">")
  assert (targets[:first] == -1).all() and targets[first] == batch["inputs"][0][first + 1]
  counted = targets >= 0
  assert not any(counted[i] and text[i] == "." for i in range(len(text)))  # what follows a full stop is a question


def test_the_recursion_as_one_chain():
  assert learned._unrolled(list("abc")) == "c,b,a"
  assert learned._unrolled(list("abcd")) == "a,b|c,d;b,a;d,c;d,c,b,a"


def test_leaves_that_break_off_or_write_nonsense_fail_their_question_alone():
  leaves = learned.leaves(lambda questions: ["", "a1b", "a1b2"])
  found = leaves["letters"]([Question('What are the letters and their positions in "ab"?')] * 3)
  assert [getattr(answer, "why", answer) for answer in found[:2]] == [
    "the model did not come to an end",
    "the model wrote 'a1b'",
  ]
  assert found[2] == Answer([["a", 1], ["b", 2]])


@pytest.mark.parametrize("arm", worlds.ARMS)
def test_answers_over_worlds_follow_from_the_facts_and_held_out_pairs_are_in_no_example(config, arm):
  before, seen = (), set()
  for question, answer in itertools.islice(worlds.examples(config, arm, random.Random(0)), 300):
    *facts, tag = re.split(r" ?(?=\b(?:qa|\w+_qa)\b)", question)
    if facts[0]:
      words = facts[0].split()
      before = tuple(" ".join(words[i : i + 3]) for i in range(0, len(words), 3))
      assert len(set(before)) == len(before) == config.worlds.facts
    tag, *words, entity, end = tag.split()
    words.reverse()
    relations = [worlds.RELATION_OF[word] for word in words]
    assert not worlds.held_out(relations) and len(relations) <= worlds.ARMS[arm] and end == ">"
    assert tag == (worlds.LEAF_OF[words[0]] if arm == "fine" else "qa")
    (found,) = worlds.symbolic([Question(worlds.asked(words, entity), before)])
    *steps, last = answer.removesuffix(" .").split()
    assert found.value == last and bool(steps) == (arm != "direct")
    if steps:
      assert steps[-1] == "=" and steps[1:-1:3] == words and steps[0] == entity and steps[2:-1:3][-1] == last
    seen.update(itertools.pairwise(relations))
  assert arm == "fine" or len(seen) > 40


def test_compositional_questions_always_have_a_held_out_pair(config):
  config.eval.count = 40
  for name, pairs in worlds.tests(config).items():
    split, hops = name.split()
    for question, answer in pairs:
      words, _ = worlds.read(question.text)
      assert worlds.held_out([worlds.RELATION_OF[word] for word in words]) == (split == "compositional")
      assert len(words) == int(hops) and worlds.symbolic([question]) == [Answer(answer)]
  assert sum(worlds.held_out(pair) for pair in itertools.product(range(8), repeat=2)) == 16


def test_a_world_of_more_entities_than_names_is_refused(config):
  config.worlds.entities = 10_000
  with pytest.raises(InputError, match=r"worlds\.entities is 10000; it must lie in 2\.\.21"):
    worlds.tests(config)


def test_given_test_sets_are_read_or_named(tmp_path):
  file = tmp_path / "set.json"
  pair = {"question": 'Reverse the sequence "a, b".', "answer": {"spans": ["b, a"]}}
  file.write_text(json.dumps({"group": {"passage": "", "qa_pairs": [pair]}}))
  assert shapes.given(file) == [('Reverse the sequence "a, b".', "b, a")]
  file.write_text('{"group": 3}')
  with pytest.raises(InputError, match=r"set\.json: .*expected groups of qa_pairs"):
    shapes.given(file)


def test_two_hops_find_what_one_search_cannot(config):
  config.retrieval.documents, config.retrieval.questions = 400, 60
  found = retrieval.measure(config)
  assert found["hop by hop"] > 0.95 > 0.6 > found["at once"] and found["answered"] > 0.95


def test_prompts_of_a_pretrained_model_show_right_answers_and_are_graded():
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return [[('["a", "b"]\nQ:', 0.5)] for _ in prompts]

  tally = evaluation.Tally()
  leaf = tally.graded(pretrained.leaves(generate))["split"]
  questions = [Question(f'What are the words in "{text}"?') for text in ("a b", "c")]
  assert leaf(questions) == [Answer(["a", "b"], 0.5)] * 2 and tally.shares() == {"split": 0.5}
  assert 'A: ["Mary", "Jones"]' in asked[0] and asked[1].endswith('Q: What are the words in "c"?\nA:')
  pretrained.direct(generate, "letters")([Question("?")])
  assert "A: a o\n" in asked[-1] and "A: n e h\n" in asked[-1] and asked[-1].endswith("Q: ?\nA:")


@pytest.mark.slow
def test_the_models_are_trained_and_the_run_resumes(tmp_path, config):
  experiment = importlib.import_module("experiments.decomposed_prompting")
  first, second = (results.evaluate(experiment, config, tmp_path, tmp_path, Console()) for _ in range(2))
  assert first.metrics == second.metrics and np.isfinite([claim.ours for claim in first.claims]).all()
