"""What a pretrained model of 135 M parameters can do of it: the leaves by a few examples each, and whole questions."""

import jax
import numpy as np

from experiments.decomposed_prompting import evaluation, shapes
from jaxlab.core.checks import InputError
from jaxlab.models import hub
from jaxlab.models.generate import complete
from jaxlab.models.inference import take_apart
from jaxlab.tasks import handlers, programs
from jaxlab.tasks.decomposed_prompting import Answer, Question

# By leaf: questions as the decomposers ask them, whose answers the symbolic leaves give.
EXAMPLES = {
  "cot": ['Reverse the sequence "tea, milk".', 'Reverse the sequence "one, red, sky".', 'Reverse the sequence "map".'],
  "remove_numbers": [f'Remove the numbers from "{text}".' for text in ("1. tea 2. milk", "3. sky, 4. red", "1. map")],
  "join": ['"tea, milk" "one"', '"sky" "red, map"', '"cup, pen" "key, box"'],
  "split": [f'What are the words in "{text}"?' for text in ("Mary Jones", "Ann Lee Smith", "Tom Ford")],
  "letters": [f'What are the letters and their positions in "{text}"?' for text in ("Mary", "Lee", "Tom")],
  "arr_position": [
    f"What is the {place} in {pairs}?"
    for place, pairs in (
      ("letter at position 2", '[["M", 1], ["a", 2], ["r", 3]]'),
      ("last letter", '[["L", 1], ["e", 2], ["e", 3]]'),
      ("letter at position 1", '[["T", 1], ["o", 2], ["m", 3]]'),
    )
  ],
  "merge": [
    'Concatenate ["a", "b"] using a space.',
    'Concatenate ["x", "y", "z"] using a comma.',
    'Concatenate ["m", "n"] using nothing.',
  ],
}
WHOLE = {
  "reverse": [(["tea", "milk", "map"], None), (["one", "red", "sky", "cup"], None), (["pen", "key"], None)],
  "letters": [(["Mary", "Jones"], 2), (["Ann", "Lee", "Smith"], "last"), (["Tom", "Ford"], 1)],
}


def prompt_of(pairs) -> str:
  return "\n\n".join(f"Q: {question}\nA: {answer}" for question, answer in pairs)


def generator(name: str, tokens: int):
  """`generate` for handlers by a checkpoint: greedy, up to the end of the line."""
  model, vocabulary = hub.load(name), hub.load_vocabulary(name)
  network, words = jax.jit(take_apart)(model), vocabulary.tokenizer
  stop = tuple(words.encode("\n").ids)

  def generate(prompts):
    if not prompts:
      return []
    rows = complete(network, [words.encode(prompt).ids for prompt in prompts], tokens=tokens, stop=stop)
    return [[(words.decode(row.tokens), -float(np.mean(row.logprobs)))] for row in rows]

  return generate


def leaves(generate) -> dict:
  """A prompted leaf for each of EXAMPLES; lists are JSON, everything else is text as it stands."""
  symbolic, made = shapes.symbolic_leaves(), {}
  for name, questions in EXAMPLES.items():
    answers = [answer.value for answer in symbolic[name]([Question(question) for question in questions])]
    as_text = [a if isinstance(a, str) else programs.dumps(a) for a in answers]
    is_json = name in ("split", "letters")
    pairs = zip(questions, as_text, strict=True)
    made[name] = handlers.prompted(generate, prompt_of(pairs), text_only=not is_json)
  return made


def direct(generate, kind: str):
  """A leaf that answers whole questions by three examples."""
  pairs = []
  for items, position in WHOLE[kind]:
    if kind == "reverse":
      pairs.append((shapes.reverse_question(items), ", ".join(items[::-1])))
    else:
      letters = [item[-1] if position == "last" else item[position - 1] for item in items]
      pairs.append((shapes.letters_question(items, position, "a space"), " ".join(letters)))
  return handlers.prompted(generate, prompt_of(pairs), text_only=True)


def measure(config, tests: dict, console) -> dict:
  """{"direct", "decomposed": {test: share right}, "leaves": {leaf: share right of what it was asked}, "count"}."""
  p = config.pretrained
  try:
    generate = generator(p.model, p.tokens)
  except InputError as error:
    console.say(f"left out: {error}")
    return {}
  found, tally = {"direct": {}, "decomposed": {}}, evaluation.Tally()
  library = shapes.decomposers() | shapes.symbolic_leaves() | tally.graded(leaves(generate))
  for name, pairs in tests.items():
    kind, pairs = name.split()[0], pairs[: p.count]
    console.say(f"{p.model}: {name}")
    questions = [question for question, _ in pairs]
    answers = [
      answer.value if isinstance(answer, Answer) else None
      for answer in direct(generate, kind)([Question(question) for question in questions])
    ]
    found["direct"][name] = evaluation.right(answers, pairs)
    found["decomposed"][name] = evaluation.decomposed(pairs, library)["right"]
  return found | {"leaves": tally.shares(), "count": p.count}
