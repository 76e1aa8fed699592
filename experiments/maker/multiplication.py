"""Long multiplication by the recursive form, with agents that compute and are made to err at a known rate."""

import math

import numpy as np

from jaxlab.tasks import maker_general


def halved(problem: str) -> tuple[str, str, str] | None:
  """ "a * b" as a times the first half of b's digits, a times the rest, and how many those are; None for one digit."""
  a, b = problem.split(" * ")
  if len(b) == 1:
    return None
  cut = (len(b) + 1) // 2
  return f"{a} * {b[:cut]}", f"{a} * {b[cut:]}", str(len(b) - cut)


def agents(eps: float, rng: np.random.Generator) -> maker_general.Agents:
  """Agents that err with probability eps: a split is left out, an answer is 1 to 9 too large."""
  wrong = lambda: rng.random() < eps
  slip = lambda: int(rng.integers(1, 10)) * wrong()

  def split(problems):
    return [None if wrong() else halved(problem) for problem in problems]

  def answer(problems):
    return [str(product(problem) + slip()) for problem in problems]

  def join(parts):
    return [str(int(a) * 10 ** int(how) + int(b) + slip()) for how, a, b in parts]

  return maker_general.Agents(split, answer, join)


def product(problem: str) -> int:
  return math.prod(map(int, problem.split(" * ")))


def measure(config) -> list[dict]:
  """Share solved and samples a problem, by digits, error rate and votes (0: one agent answers the whole problem)."""
  c, rows = config.multiplication, []
  for digits in c.digits:
    rng = np.random.default_rng([config.seed, digits])
    problems = [f"{a} * {b}" for a, b in rng.integers(10 ** (digits - 1), 10**digits, (c.count, 2))]
    for votes in c.votes:
      found = maker_general.solve(problems, agents(c.eps, rng), votes=votes, depth=c.depth)
      right = [solved.answer == str(product(problem)) for solved, problem in zip(found, problems, strict=True)]
      samples = float(np.mean([solved.samples for solved in found]))
      rows.append({"digits": digits, "votes": votes, "right": float(np.mean(right)), "samples": samples})
  return rows
