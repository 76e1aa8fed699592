"""DaSLaM: a small model asks the questions that a larger one needs (Juneja et al., EMNLP 2023, "Small Language Models
Fine-tuned to Coordinate Larger Language Models improve Complex Reasoning", arXiv 2310.18338).

  1. the solver tries:                    (r_0, a_0) = solver(prompt; Q)
  2. the decomposer reads that attempt:   q_1 .. q_n = decomposer(Q, r_0)
  3. the solver answers these in turn:    (r_i, a_i) = solver(prompt; q_1 r_1 .. q_{i-1} r_{i-1}; context(Q) q_i)
  4. and Q once more:                     (r, a) = solver(prompt; q_1 r_1 .. q_n r_n; Q)

  solve = lambda prompts: [text for ((text, _),) in endpoint.completions(client, "model", stop=None)(prompts)]
  episodes = coordinate(questions, solve, ask)      # ask: [(question, attempt), ..] -> [a text of sub-questions, ..]

The solver is frozen and only sampled. The decomposer is trained on tuples of question, attempt and sub-questions, then
by PPO (`ppo`) on what becomes of its questions. Its five rewards are here, as functions of arrays, a row an episode;
where the paper and its code differ both forms are given. All may be divided by their number of terms (`normalised`), so
that right answers are not drowned: 1 is then the best and -1 the worst of each.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.core.checks import require, require_choice, require_counts

FORMS = ("paper", "code")
Solver = Callable[[Sequence[str]], Sequence[str]]  # prompts -> what follows each
Decomposer = Callable[[Sequence[tuple[str, str]]], Sequence[str]]  # (question, attempt) -> sub-questions, in a text


class Episode(NamedTuple):
  """attempt, final: what the solver wrote to the question at first and at last; first, answer: the answers in them,
  None where there is none; subquestions and what it wrote to each."""

  question: str
  attempt: str
  first: str | None
  subquestions: tuple[str, ...]
  reasonings: tuple[str, ...]
  final: str
  answer: str | None


def context(question: str) -> str:
  """The premises: what is before the question's last sentence, which ends in its last "?"."""
  before = question.rpartition("?")[0] or question
  premises, dot, _ = before.rpartition(".")
  return premises + dot


def parse_subquestions(text: str, *, least: int = 3, most: int = 8) -> tuple[str, ...]:
  """What ends in "?", at most `most`; none where there are fewer than `least`, and the solver then merely tries again.

  Raises:
    InputError: counts below 1.
  """
  require_counts(least=least, most=most)
  found = [part.strip() for part in text.split("?")[:-1]]
  found = [f"{part}?" for part in found if part]
  return tuple(found[:most]) if len(found) >= least else ()


def answer_of(text: str) -> str | None:
  """What is inside the last [[Answer: ..]], without what follows "###"; None where there is none."""
  _, mark, after = text.rpartition("[[Answer:")
  inside, end, _ = after.partition("]]")
  return inside.partition("###")[0].strip() if mark and end else None


def coordinate(
  questions: Sequence[str],
  solver: Solver,
  decomposer: Decomposer,
  *,
  prompt: str = "",
  append_history: bool = True,
  least: int = 3,
  most: int = 8,
) -> list[Episode]:
  """All four phases of all questions, each phase in as few calls as there are sub-questions in turn.

  Args:
    prompt: examples that stand before every question of the solver.
    append_history: earlier sub-questions and their reasoning stay in the prompt of later ones (the paper's figure);
      else each is asked alone, and all are put before the last question (its code).
    least, most: of `parse_subquestions`.

  Raises:
    InputError: no question, an empty one, or a solver or decomposer that does not answer each of its prompts.
  """
  require(len(questions) > 0 and all(question.strip() for question in questions), "every question needs a text")
  attempts = _asked(solver, [f"{prompt}{question}\n" for question in questions], "solver")
  written = _asked(decomposer, list(zip(questions, attempts, strict=True)), "decomposer")
  planned = [parse_subquestions(text, least=least, most=most) for text in written]
  reasonings: list[list[str]] = [[] for _ in questions]
  told = lambda i: "".join(f"{q}\n{r}\n" for q, r in zip(planned[i], reasonings[i], strict=False))
  for turn in range(max(map(len, planned))):
    rows = [i for i, plan in enumerate(planned) if turn < len(plan)]
    history = lambda i: told(i) if append_history else ""
    prompts = [f"{prompt}{history(i)}{context(questions[i])} {planned[i][turn]}\n" for i in rows]
    for i, text in zip(rows, _asked(solver, prompts, "solver"), strict=True):
      reasonings[i].append(text)
  finals = _asked(solver, [f"{prompt}{told(i)}{question}\n" for i, question in enumerate(questions)], "solver")
  return [
    Episode(question, attempt, answer_of(attempt), plan, tuple(texts), final, answer_of(final))
    for question, attempt, plan, texts, final in zip(questions, attempts, planned, reasonings, finals, strict=True)
  ]


def _asked(ask, prompts, who: str):
  found = list(ask(prompts))
  texts = [text for text in found if isinstance(text, str)]
  require(
    len(texts) == len(found) == len(prompts),
    f"the {who} gave {len(texts)} texts for {len(prompts)} prompts; one each is needed",
  )
  return found


def entity_coverage(
  asked: Bool[Array, "batch entities"],
  given: Bool[Array, "batch entities"],
  *,
  form: str = "code",
  normalised: bool = False,
) -> Float[Array, "batch"]:
  """R1, of the nouns N in the sub-questions and in the question; 1 where the question has none.

  code   1 - |N(q) xor N(Q)| / |N(Q)|, which punishes what the question does not have, without a bound
  paper  |N(q) and N(Q)| / |N(Q)|
  """
  require_choice("form", form, FORMS)
  count = given.sum(axis=-1)
  both = asked & given if form == "paper" else asked ^ given
  share = both.sum(axis=-1) / jnp.maximum(count, 1)
  reward = jnp.where(count == 0, 1.0, share if form == "paper" else 1 - share)
  return jnp.maximum(reward, -1.0) if normalised else reward


def answer_consistency(
  asked: Float[Array, "batch turns width"],
  answered: Float[Array, "batch turns width"],
  valid: Bool[Array, "batch turns"],
  *,
  normalised: bool = False,
) -> Float[Array, "batch"]:
  """R2 in the code's form: 0.25 sum_i cos(e(context q_i), e(r_i)) of embeddings e; 0 without sub-questions."""
  similar = jnp.where(valid, _cosine(asked, answered), 0.0).sum(axis=-1)
  return similar / jnp.maximum(valid.sum(axis=-1), 1) if normalised else 0.25 * similar


def named_answers(
  asked: Int[Array, "batch turns"],
  stated: Int[Array, "batch turns"],
  valid: Bool[Array, "batch turns"],
  *,
  normalised: bool = False,
) -> Float[Array, "batch"]:
  """R2 in the paper's form: sum_i 1[the entity q_i asks for is the one whose value r_i states]."""
  right = (valid & (asked == stated)).sum(axis=-1)
  return right / jnp.maximum(valid.sum(axis=-1), 1) if normalised else right.astype(jnp.float32)


def order_of_operations(
  gold: Int[Array, "batch operators"], ours: Int[Array, "batch operators"], *, normalised: bool = False
) -> Float[Array, "batch"]:
  """R3: sum_j (0.5 if o_j = o'_j else -0.5) over operators in the order of the text, -1 behind the last, up to the
  shorter's end. The code lists them in the order of a vocabulary, which says nothing about the steps."""
  here = (gold >= 0) & (ours >= 0)
  total = jnp.where(here, jnp.where(gold == ours, 0.5, -0.5), 0.0).sum(axis=-1)
  return 2 * total / jnp.maximum((gold >= 0).sum(axis=-1), 1) if normalised else total


def proximity(
  gold: Float[Array, "batch lines width"],
  before: Float[Array, "batch lines width"],
  after: Float[Array, "batch lines width"],
  valid: Bool[Array, "batch lines"],
  *,
  form: str = "code",
  normalised: bool = False,
) -> Float[Array, "batch"]:
  """R4, of lines of the gold reasoning and of the solver's before and after sub-questions, up to the shortest's end,
  with c_o = cos(gold, before) and c_n = cos(gold, after):

    code   sum_j (0.5 c_o if c_n > c_o else -1 - 0.5 c_o)
    paper  sum_j (c_n if c_n > c_o else -1 - c_o if c_n < c_o else 0)
  """
  require_choice("form", form, FORMS)
  c_o, c_n = _cosine(gold, before), _cosine(gold, after)
  if form == "code":
    each = jnp.where(c_n > c_o, 0.5 * c_o, -1 - 0.5 * c_o)
  else:
    each = jnp.where(c_n > c_o, c_n, jnp.where(c_n < c_o, -1 - c_o, 0.0))
  total = jnp.where(valid, each, 0.0).sum(axis=-1)
  return jnp.clip(total / jnp.maximum(valid.sum(axis=-1), 1), -1.0, 1.0) if normalised else total


def correctness(answer: Int[Array, "batch"], gold: Int[Array, "batch"]) -> Float[Array, "batch"]:
  """R5: 1 where the last answer is right."""
  return (answer == gold).astype(jnp.float32)


def _cosine(a, b):
  """0 where one has no length."""
  norm = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.where(norm > 0, (a * b).sum(axis=-1) / jnp.where(norm > 0, norm, 1.0), 0.0)
