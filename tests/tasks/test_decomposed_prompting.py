"""Programs, operators, the search over them, and the handlers that need no model."""

import functools
import itertools
import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.decomposed_prompting import shapes
from jaxlab.core.checks import InputError
from jaxlab.tasks import answers, handlers, programs
from jaxlab.tasks import decomposed_prompting as decomp
from jaxlab.tasks.decomposed_prompting import Answer, Decomposer, Failure, Limits, Proposal, Question, solve
from jaxlab.tasks.programs import END, apply_sub, collect, expand, parse_step

# --- The programs of the published tasks by symbolic decomposers and leaves.

LETTERS = string.ascii_lowercase
LETTER_CAT = shapes.decomposers() | shapes.symbolic_leaves()
REVERSE = LETTER_CAT


def world(seed):
  """Who directed what, and which awards it won: films, people and awards with several answers each."""
  films = {
    f"film{i}": (f"person{(i * seed) % 3}", [f"award{j}" for j in range(3) if (i + j * seed) % 2]) for i in range(7)
  }

  def directed(text):
    return [film for film, (who, _) in films.items() if who == text.split()[-1].strip("?")]

  return films, {
    "decompose": handlers.policy(
      lambda level: [
        f"[qa] Which films were directed by {level.question.split()[-1]}",
        "(project_values_flat_unique) [qa_award] Which awards did #1 win?",
        END,
      ][len(level.steps)]
    ),
    "qa": handlers.function(directed),
    "qa_award": handlers.function(lambda text: films[text.split()[3]][1]),
  }


def test_letters_are_concatenated_whatever_the_number_of_words_the_position_and_the_delimiter():
  questions, expected = [], []
  for number, place, (how, between) in (
    (3, "the letters at position 3", ("a space", " ")),
    (5, "the letters at position 1", ("a semi-colon", ";")),
    (12, "the last letters", ("nothing", "")),
  ):
    words = [LETTERS[i : i + 4] for i in range(number)]
    questions.append(f'Take {place} of the words in "{" ".join(words)}" and concatenate them using {how}.')
    at = -1 if "last" in place else int(place.split()[-1]) - 1
    expected.append(between.join(word[at] for word in words))
  assert [outcome.answer for outcome in solve(questions, "letter_cat", LETTER_CAT)] == expected


def test_every_position_and_delimiter_of_3_to_12_words_is_right():
  words = ["absolute", "boundary", "creature", "daughter", "economic", "familiar", "guidance", "hospital", "identity"]
  words += ["judgment", "keyboard", "language"]
  delimiters = {"a space": " ", "a comma": ",", "a semi-colon": ";", "nothing": ""}
  questions, expected = [], []
  for number, place, (how, between) in itertools.product((3, 4, 5, 8, 12), (*range(1, 8), -1), delimiters.items()):
    where = "the last letters" if place < 0 else f"the letters at position {place}"
    questions.append(f'Take {where} of the words in "{" ".join(words[:number])}" and concatenate them using {how}.')
    expected.append(between.join(word[place if place < 0 else place - 1] for word in words[:number]))
  assert [outcome.answer for outcome in solve(questions, "letter_cat", LETTER_CAT)] == expected


def depth(trace):
  inside = [call for step in trace.steps for call in step.calls if isinstance(call, decomp.Level)]
  return 1 + max(map(depth, inside)) if inside else 0


def expected_depth(n):
  return 0 if n < 4 else 1 + expected_depth(n - n // 2)


def test_reversal_calls_itself_as_often_and_as_deep_as_the_program_says():
  """1 to 64 items: the answer, L(n) model calls (all but the extraction), and the nesting of the recorded trace."""
  lists = [[f"item{LETTERS[i % 26]}{i}x" for i in range(n)] for n in range(1, 65)]
  questions = [f'Reverse the sequence "{", ".join(items)}".' for items in lists]
  for items, outcome in zip(lists, solve(questions, "reverse", REVERSE), strict=True):
    assert outcome.answer == ", ".join(items[::-1])
    assert sum(count for name, count in outcome.calls.items() if name != "extract") == shapes.model_calls(len(items))
    assert depth(outcome.trace) == expected_depth(len(items)) and outcome.cost == 0


@pytest.mark.parametrize("seed", [1, 2])
def test_hops_over_several_answers_are_one_project_values_flat_unique(seed):
  films, library = world(seed)
  for person in ("person0", "person1", "person2"):
    (outcome,) = solve([f"What awards did films win that were directed by {person}"], "decompose", library)
    won = [award for who, awards in films.values() if who == person for award in awards]
    assert outcome.answer == list(dict.fromkeys(won))


# --- The language.

LINES = [
  "[EOQ]",
  "[split] What are the words in \"a b\"?",
  "(select) [split] What  are the words?",
  "(project_values) [str_position] What is the letter at position 3 of \"#1\"?",
  "(project_values_flat_unique) [pos_qa] Who directed #2?",
  "(projectKeys) [qa] #1",
  "(projectValues_keys) [qa] #10 [not a handler] (nor an op)",
  "(filter(#2)) [qa] Is #2 in #1?",
  "(filterValues(#3)_unique) [qa with spaces] #3 > 7",
  "(filterKeys) [qa] \u00fc #1",
  "(project_values) [[\"a\", 1], [\"b\", null]]",
  '(select) {"titles": []}',
]  # fmt: skip


def test_a_step_is_printed_as_it_was_read():
  """200 lines of every form, and the lines of the three programs above."""
  bases = [f"({base}{''.join('_' + s for s in subs)}) [h{i}] text #{i}, {base}" for i in range(1, 10)
           for base in programs.BASES for subs in ((), ("flat",), ("values", "unique"))]  # fmt: skip
  lines = (LINES + bases)[:200]
  assert len(lines) == 200 and [str(parse_step(line)) for line in lines] == lines
  (outcome,) = solve(['Reverse the sequence "a, b, c, d".'], "reverse", REVERSE)
  for step in outcome.trace.steps:
    assert str(parse_step(step.line)) == step.line
  step = parse_step("(filter(#2)_unique) [qa] Is #2 in #1?")
  assert (step.handler, step.text, step.op) == ("qa", "Is #2 in #1?", programs.Op("filter", "2", ("unique",)))


@pytest.mark.parametrize(
  "line, message",
  [
    ("", "is no step"),
    ("What is this?", "is no step"),
    ("[qa]", "is no step"),
    ("[qa]question", "is no step"),
    ("[EOQ] ", "is no step"),
    ("(sort) [qa] #1", r"unknown operator 'sort'; it is one of select, project"),
    ("(project_sort) [qa] #1", "unknown operator 'project_sort'"),
    ("(project(#1)) [qa] #1", "only a filter names"),
    ("(project_values) not json", "is no JSON"),
    ("(select) NaN", "NaN is no number"),
    ("[qa] two\nlines", "is no step"),
  ],
)
def test_a_line_that_is_no_step_is_named(line, message):
  with pytest.raises(InputError, match=message):
    parse_step(line)


def run(line, earlier, answer, context=()):
  step = parse_step(line)
  calls = expand(step, earlier, context)
  return [call.text for call in calls], collect(step.op, calls, [answer(call.text) for call in calls])


def test_operators_put_answers_into_questions_and_collect_what_comes_back():
  upper = str.upper
  assert run("[h] a #1 b #2", ["x", [1, "y"]], upper) == (['a "x" b [1, "y"]'], 'A "X" B [1, "Y"]')
  assert run("(project) [h] q #1", [["a", 3]], upper) == (["q a", "q 3"], [["a", "Q A"], [3, "Q 3"]])
  assert run("(project) [h] #1", ["word"], upper)[1] == [["word", "WORD"]]
  pairs = [["k", "v"], ["l", "w"]]
  assert run("(projectValues) [h] #1", [pairs], upper) == (["v", "w"], [["k", "V"], ["l", "W"]])
  assert run("(projectKeys) [h] #1", [pairs], upper) == (["k", "l"], [["K", "v"], ["L", "w"]])
  is_w = lambda text: "Yes" if text.endswith(("w", "l")) else False
  assert run("(filterValues) [h] #1", [pairs], is_w) == (["v", "w"], [["l", "w"]])
  assert run("(filterKeys_values) [h] #1", [pairs], is_w) == (["k", "l"], ["w"])
  assert run("(filter(#2)) [h] #1 #2", ["x", ["v", "w"]], is_w) == (['"x" v', '"x" w'], ["w"])
  assert run("(project_values) [h] PARA #C", [], lambda text: text[5:], ("p", "q"))[1] == ["PARA_1", "PARA_2"]
  assert run("(project) [h] #1", [[]], upper) == ([], [])
  said = {"a": True, "b": "YES", "c": "1", "d": "True", "e": False, "f": "no", "g": "yes, it is", "h": "0", "i": ""}
  assert run("(filter) [h] #1", [[*said]], said.get)[1] == ["a", "b", "c", "d"]
  tenth = [[str(i)] for i in range(12)]
  assert run("[h] #12 #1", tenth, upper)[0] == ['["11"] ["0"]']


@pytest.mark.parametrize(
  "line, earlier, message",
  [
    ("[h] #2", ["a"], "#2 has no answer; this level has 1 so far"),
    ("[h] #0", ["a"], "#0 has no answer"),
    ("(project) [h] no reference", ["a"], "runs over one answer"),
    ("(project) [h] #1 #2", ["a", "b"], "runs over one answer"),
    ("(filter) [h] #1 #2", ["a", "b"], r"filter\(#2\)"),
    ("(filter(#3)) [h] #1 #2", ["a", "b"], "runs over one answer"),
    ("(project) [h] #1", [3], "runs over a list"),
    ("(project) [h] #1", [[["a", "b"]]], "puts strings into its question"),
    ("(project) [h] #1", [[True]], "puts strings into its question"),
    ("(projectValues) [h] #1", [["ab"]], "needs pairs"),
    ("(filter) [h] #1", [["a"]], "a filter asks yes or no"),
    ("(select_flat) [h] #1", ["a"], "flat needs a list"),
    ("(project_values_keys) [h] #1", [["a"]], "keys needs pairs"),
  ],
)
def test_an_operator_without_what_it_needs_is_named(line, earlier, message):
  with pytest.raises(InputError, match=message):
    run(line, earlier, lambda text: 1)


texts = st.text(st.characters(codec="utf-8"), max_size=5)
nested = st.recursive(texts | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=12)


@given(st.lists(texts, max_size=6), st.data())
def test_project_filter_and_sub_operations_keep_their_algebra(items, data):
  """project's halves give items and answers back; a filter keeps a subset in order."""
  step = parse_step("(project) [h] #1")
  calls = expand(step, [items])
  values = data.draw(st.lists(nested, min_size=len(items), max_size=len(items)))
  pairs = collect(step.op, calls, values)
  assert apply_sub("keys", pairs) == items and apply_sub("values", pairs) == values
  kept = data.draw(st.lists(st.booleans(), min_size=len(items), max_size=len(items)))
  assert collect(programs.Op("filter"), calls, kept) == [item for item, keep in zip(items, kept, strict=True) if keep]


@given(st.lists(nested, max_size=6))
def test_flat_is_idempotent_and_unique_keeps_first_places(value):
  flat = apply_sub("flat", value)
  assert apply_sub("flat", flat) == flat and not any(isinstance(item, list) for item in flat)
  unique = apply_sub("unique", value)
  assert apply_sub("unique", unique) == unique
  names = [json.dumps(item) for item in value]
  assert [json.dumps(item) for item in unique] == sorted(set(names), key=names.index)


# --- The search.


def test_the_search_takes_the_cheapest_program_that_does_not_die():
  """Of two first steps the cheaper fails when it is executed; costs never fall along a path."""
  told = []

  def propose(levels):
    told.extend((len(level.steps), level.prompt()) for level in levels)
    first = [
      Proposal("(project) [up] #1", 0.1),
      Proposal("[up] b", 0.5),
      Proposal("[up] c", 0.7),
      Proposal("nonsense", 0.0),
    ]
    return [first if not level.steps else [Proposal(END, 0.25)] for level in levels]

  library = {"main": Decomposer(propose), "up": lambda asked: [Answer(q.text.upper(), 0.125) for q in asked]}
  (outcome,) = solve(["a?"], "main", library)
  assert outcome.answer == "B" and outcome.cost == pytest.approx(0.875) and outcome.calls == {"main": 3, "up": 2}
  shown = lambda x: (1, f'QC: a?\nQS: [up] {x}\nA: "{x.upper()}"\nQS:')
  assert told == [(0, "QC: a?\nQS:"), shown("b"), shown("c")]  # c at 0.825 goes before the end of b at 0.875
  assert outcome.trace.as_json() == {
    "handler": "main",
    "question": "a?",
    "steps": [{"step": "[up] b", "answer": "B", "calls": [{"question": "b", "answer": "B"}]}],
  }


def test_equal_costs_are_tried_in_the_order_of_the_proposals():
  library = {
    "main": handlers.policy(lambda level: [Proposal(f"[echo] {x}") for x in "abc"] if not level.steps else END),
    "echo": handlers.function(lambda text: text),
  }
  assert solve(["?"], "main", library)[0].answer == "a"


def test_answers_stay_in_their_level():
  """#1 inside a call is the first answer there, not the caller's."""
  library = {
    "outer": handlers.policy(lambda level: ["[say] outside", "[inner] go", END][len(level.steps)]),
    "inner": handlers.policy(lambda level: ["[say] inside", "[say] got #1", END][len(level.steps)]),
    "say": handlers.function(lambda text: text),
  }
  assert solve(["?"], "outer", library)[0].answer == 'got "inside"'


def test_paragraphs_come_along_into_every_level():
  """#C stands for them, and a question about one of them reads that one alone."""
  read = handlers.prompted(lambda prompts: [[(prompt.splitlines()[0], 0.0)] for prompt in prompts])
  library = {
    "outer": handlers.policy(lambda level: ["[inner] go", END][len(level.steps)]),
    "inner": handlers.policy(lambda level: ["(project_values) [read] #C what?", END][len(level.steps)]),
    "read": read,
  }
  (outcome,) = solve([Question("?", ("first", "second"))], "outer", library)
  assert outcome.answer == ["first", "second"]


def test_a_batch_asks_every_handler_once_a_round_for_all_questions():
  sizes = []

  def leaf(asked):
    sizes.append(len(asked))
    return [Answer(question.text[-1]) for question in asked]

  library = {
    "main": handlers.policy(
      lambda level: ["[words] " + level.question, "(project_values) [leaf] of #1", END][len(level.steps)]
    ),
    "words": handlers.function(lambda text: text.split()),
    "leaf": leaf,
  }
  outcomes = solve(["ab cd", "ef", "gh ij kl"], "main", library)
  assert [outcome.answer for outcome in outcomes] == [["b", "d"], ["f"], ["h", "j", "l"]] and sizes == [6]


@pytest.mark.parametrize(
  "line, limits, message",
  [
    ("[main] again", Limits(depth=4), r"limit of 4 levels \(limits.depth\); does \[main\] call itself"),
    ("[main] again", Limits(calls=7), r"limit of 7 calls \(limits.calls\)"),
    ("[leaf] #1", Limits(), "#1 has no answer"),
    ("[nobody] x", Limits(), r"unknown handler \[nobody\]; there are main, leaf"),
    ("what?", Limits(), "is no step"),
    (END, Limits(), "ended without a step"),
    ("[leaf] x", Limits(), r"\[leaf\] failed: no x here"),
    ("[leaf] x", Limits(states=1), r"limit of 1 states \(limits.states\)"),
  ],
)
def test_a_question_without_an_answer_says_why_and_how_far_it_got(line, limits, message):
  library = {"main": handlers.policy(lambda level: line), "leaf": lambda asked: [Failure("no x here") for _ in asked]}
  (outcome,) = solve(["?"], "main", library, limits=limits)
  assert outcome.answer is None and re.search(message, outcome.why) and outcome.trace.handler == "main"
  json.dumps(outcome.trace.as_json())


def test_a_level_ends_by_itself_after_the_most_steps():
  library = {
    "main": handlers.policy(lambda level: f"[n] {len(level.steps)}", most_steps=3),
    "n": handlers.function(int),
  }
  (outcome,) = solve(["?"], "main", library)
  assert outcome.answer == 2 and outcome.calls == {"main": 3, "n": 3}


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: solve(["?"], "leaf", {"leaf": len}), "start is 'leaf'; it must be one of"),
    (
      lambda: solve(["?"], "main", REVERSE | {"main": handlers.policy(lambda _: "")}, limits=Limits(depth=0)),
      "depth is 0",
    ),
    (lambda: solve(["?"], "m", {"m": Decomposer(lambda levels: [])}), "m proposed for 0 of 1 levels"),
    (
      lambda: solve(["?"], "m", {"m": handlers.policy(lambda _: "[x] y"), "x": lambda asked: []}),
      "x gave 0 answers to 1 questions",
    ),
    (lambda: handlers.retriever([], []), "top is 2; it must lie in 1..0"),
    (lambda: handlers.retriever(["a"], []), "1 titles for 0 paragraphs"),
    (lambda: handlers.extract("a", "a"), "has 0 groups"),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(InputError, match=message):
    make()


# --- Handlers.


def test_a_prompted_model_reads_its_examples_its_paragraphs_and_the_question():
  asked = []

  def generate(prompts):
    asked.extend(prompts)
    return [[(text, 0.5)] for text in (" 3\nQ: more", '["a"]', "so it is 7.", "none", "Ada")[: len(prompts)]]

  context = ("First.", "Second.")
  typed = handlers.prompted(generate, "Q: 1+1\nA: 2\n")([Question("2+1"), Question("PARA_2 which?", context)])
  assert typed == [Answer(3, 0.5), Answer(["a"], 0.5)]
  assert asked == ["Q: 1+1\nA: 2\n\nQ: 2+1\nA:", "Q: 1+1\nA: 2\n\nSecond.\n\nQ: which?\nA:"]
  assert handlers.prompted(generate, text_only=True)([Question("x", context)]) == [Answer("3", 0.5)]
  assert asked[-1] == "First.\n\nSecond.\n\nQ: x\nA:"
  found = handlers.prompted(generate, pattern=r"it is (\d)")([Question("x")] * 4)
  assert found[2] == Answer(7, 0.5) and isinstance(found[3], Failure)


def test_a_prompted_decomposer_continues_programs():
  """Its candidates are first lines with their costs; the same library of functions answers them."""

  def generate(prompts):
    assert all(prompt.startswith("QC: e\nQS: [EOQ]\n\nQC: ") and prompt.endswith("QS:") for prompt in prompts)
    return [
      [(f" {END}\n", 0.25)] if "A: " in prompt.split("\n\n")[-1] else [(" [up] ab\nA: x", 1.0), (" ?", 0.0)]
      for prompt in prompts
    ]

  main = handlers.prompted_decomposer(generate, "QC: e\nQS: [EOQ]\n")
  (outcome,) = solve(["q"], "main", {"main": main, "up": handlers.function(str.upper)})
  assert outcome.answer == "AB" and outcome.cost == 1.25


def test_bm25_retrieves_the_paragraphs_that_share_rare_words():
  """The order is that of the formula, idf times saturated counts, by hand."""
  paragraphs = ["a red fox", "a red red dog in a yard", "a blue fox", "a cat"]
  ask = handlers.retriever(["one", "two", "three", "four"], paragraphs, top=3)
  blue, dog = ask([Question("Blue fox?"), Question("the red dog")])
  assert blue.value["titles"][:2] == ["three", "one"] and dog.value["titles"][:2] == ["two", "one"]
  assert blue.value["paragraphs"][0] == "a blue fox"


@pytest.mark.parametrize("text, value", [("2 + 3 * 4", 14), ("-(7 - 2) // 2", -3), ("1e3 / 4", 250.0), ("17 % 5", 2)])
def test_arithmetic_is_computed(text, value):
  assert handlers.arithmetic(text) == value


@pytest.mark.parametrize(
  "text", ["__import__('os')", "a + 1", "2 ** 9 ** 9", "", "(1", "[1]", "True + 1", "1 if 2 else 3", "1/0"]
)
def test_what_is_no_arithmetic_fails_that_question_alone(text):
  good, bad = handlers.function(handlers.arithmetic)([Question("1 + 1"), Question(text)])
  assert good == Answer(2) and isinstance(bad, Failure)


@pytest.mark.parametrize(
  "lines, why",
  [
    ([[Proposal("[x] y", -1.0)]], "a step's cost is -1.0"),
    ([[Proposal("[x] y", float("nan"))]], "a step's cost is nan"),
    (["[arithmetic] " + "1+" * 600 + "1"], "recursion"),
    (["[arithmetic] " + "*".join(["9" * 4000] * 2), "[x] #1"], "digits"),
    (["(select_flat) [nested] y"], "recursion"),
    ([], "index out of range"),  # of the policy itself
  ],
)
def test_what_one_question_leads_to_ends_that_question_alone(lines, why):
  """The other, beside it, is answered."""
  nested = functools.reduce(lambda inner, _: [inner], range(900), "y")
  of = {"bad": lines, "good": ["[x] y", "[EOQ]"]}
  library = {
    "main": handlers.policy(lambda level: of[level.question][len(level.steps)]),
    "x": handlers.function(lambda text: text),
    "nested": handlers.function(lambda _: [nested]),
    "arithmetic": handlers.function(handlers.arithmetic),
  }
  bad, good = solve(["bad", "good"], "main", library)
  assert good.answer == "y" and bad.answer is None and why in bad.why


def test_a_journal_grows_as_answers_come_whatever_is_in_them(tmp_path):
  """Line separators and half a character among them; a sampled model's answers to one prompt stay apart."""
  file, texts = tmp_path / "calls.jsonl", iter(["a\u2028b", "\ud800", "\x85", "c", "d"])

  def generate(prompts):
    return [[(next(texts), 0.5)] for _ in prompts]

  model = handlers.recorded_generate(generate, "m", file, part=2)
  with pytest.raises((StopIteration, RuntimeError)):
    model(["p", "q", "p", "r", "s", "t"])
  again = handlers.recorded_generate(generate, "m", file, part=2)
  assert [row[0][0] for row in again(["p", "q", "p", "r"])] == ["a\u2028b", "\ud800", "\x85", "c"]
  assert file.read_text().isascii()
  leaf = handlers.recorded(lambda asked: [Answer("x\u2028y") for _ in asked], "leaf", file)
  assert leaf([Question("1")]) == handlers.recorded(len, "leaf", file)([Question("1")]) == [Answer("x\u2028y")]


def test_a_search_that_broke_off_goes_on_from_its_journal(tmp_path):
  """Both handlers share a file; the second run asks only what the first had not been told."""
  file, asked = tmp_path / "calls.jsonl", []

  def library(broken):
    def cot(questions):
      asked.append(len(questions))
      if broken and len(asked) > 2:
        raise ConnectionError("the endpoint is gone")
      return REVERSE["cot"](questions)

    return {name: handlers.recorded(cot if name == "cot" else h, name, file) for name, h in REVERSE.items()}

  question = ['Reverse the sequence "a, b, c, d, e, f, g, h".']
  with pytest.raises(ConnectionError):
    solve(question, "reverse", library(True))
  told = len(asked)
  with file.open("a") as end:
    end.write('[["cot", "cut o')
  (outcome,) = solve(question, "reverse", library(False))
  assert outcome.answer == "h, g, f, e, d, c, b, a" and (told, len(asked)) == (3, 5)
  assert solve(question, "reverse", library(True))[0].trace == outcome.trace and len(asked) == 5
  file.write_text("{}\n")
  with pytest.raises(InputError, match=r"calls\.jsonl"):
    library(True)


# --- How answers are scored.


@pytest.mark.parametrize(
  "predicted, gold, exact, score",
  [
    (["Ada Lovelace"], ["the ada lovelace."], True, 1.0),
    (["b", "a dog"], ["Dog", "b"], True, 1.0),
    (["ada"], ["ada lovelace"], False, 2 / 3),
    (["3 apples"], ["3.0 apples"], True, 1.0),
    (["3 apples"], ["4 apples"], False, 0.0),  # other numbers: no match at all
    (["apples"], ["4 apples"], False, 0.0),
    (["4 apples"], ["apples"], False, 2 / 3),
    (["x y", "x"], ["x", "x y"], True, 1.0),
    (["x y", "z"], ["x"], False, 1 / 3),  # the better of the two, over two
    (["p q", "p"], ["p q", "q"], False, 2 / 3),  # crosswise 2 / 3 each, straight 1 and 0
    ([], ["x"], False, 0.0),
    ([], [], True, 1.0),
    (["well-known"], ["well known"], True, 1.0),
  ],
)
def test_answers_are_scored_as_by_hand(predicted, gold, exact, score):
  assert answers.exact_match(predicted, gold) == exact
  assert answers.f1(predicted, gold) == pytest.approx(score)
