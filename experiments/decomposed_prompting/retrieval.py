"""Two-hop questions over many one-sentence documents: what BM25 finds by the whole question, and hop by hop."""

import re
import string

import numpy as np

from jaxlab.tasks import handlers
from jaxlab.tasks.decomposed_prompting import Answer, Failure, Question, solve
from jaxlab.tasks.programs import END

TOP = 2  # documents a search returns


def world(rng: np.random.Generator, documents: int):
  """(titles, sentences, questions as (question, answer, the two titles that support it)).

  Films have a director, directors a birthplace: one sentence each, in two wordings. The birthplace's sentence shares no
  word of its own with the question, which names the film alone.
  """
  half = documents // 2
  letters = list(string.ascii_lowercase)
  names = list(dict.fromkeys("".join(rng.choice(letters, 7)).capitalize() for _ in range(5 * half)))
  films, people, places = names[:half], names[half : 2 * half], names[2 * half : 2 * half + half // 10 + 1]
  directors = rng.permutation(half)
  born = rng.integers(0, len(places), half)
  titles, sentences = [], []
  for film, director in zip(films, directors, strict=True):
    titles.append(film)
    one = f"{people[director]} directed the film {film}."
    sentences.append(str(rng.choice([one, f"The director of the film {film} was {people[director]}."])))
  for person, place in zip(people, born, strict=True):
    titles.append(person)
    one = f"{person} was born in the town of {places[place]}."
    sentences.append(str(rng.choice([one, f"The town where {person} was born is {places[place]}."])))
  questions = [
    (f"In which town was the director of the film {film} born?", places[born[d]], {film, people[d]})
    for film, d in zip(films, directors, strict=True)
  ]
  return titles, sentences, questions


def _decompose(level):
  film = re.search(r"film (\w+)", level.question)
  return [
    f"[retrieve] Who directed the film {film[1]}?",
    "[read] #1 director",
    "[retrieve] Where was #2 born?",
    "[read] #3 birthplace",
    END,
  ][len(level.steps)]


def _read(question):
  """The name that the best sentence for this relation gives; a reader of such sentences, not a model."""
  relation = question.split()[-1]
  wanted = {
    "director": r"(\w+) directed the film \w+\.|director of the film \w+ was (\w+)\.",
    "birthplace": r"born in the town of (\w+)\.|was born is (\w+)\.",
  }[relation]
  found = re.search(wanted, question)
  return Answer(found[1] or found[2]) if found else Failure("no sentence says it")


def measure(config) -> dict:
  """Share of questions both of whose documents are found, and share answered rightly, by the way of retrieving."""
  c = config.retrieval
  rng = np.random.default_rng(config.seed)
  titles, sentences, questions = world(rng, c.documents)
  asked = [questions[i] for i in rng.choice(len(questions), min(c.questions, len(questions)), replace=False)]
  once = handlers.retriever(titles, sentences, top=2 * TOP)  # as many documents as two hops may give
  hop = handlers.retriever(titles, sentences, top=TOP)
  library = {
    "decompose": handlers.policy(_decompose),
    "retrieve": hop,
    "read": lambda questions: [_read(question.text) for question in questions],
  }
  outcomes = solve([question for question, *_ in asked], "decompose", library)
  seen = [
    {title for step in outcome.trace.steps if isinstance(step.answer, dict) for title in step.answer["titles"]}
    for outcome in outcomes
  ]
  whole = [set(found.value["titles"]) for found in once([Question(question) for question, *_ in asked])]
  support = [titles for *_, titles in asked]
  share = lambda found: float(np.mean([wanted <= each for wanted, each in zip(support, found, strict=True)]))
  right = float(np.mean([outcome.answer == answer for outcome, (_, answer, _) in zip(outcomes, asked, strict=True)]))
  sizes = {"documents": len(titles), "questions": len(asked)}
  return sizes | {"hop by hop": share(seen), "at once": share(whole), "answered": right}
