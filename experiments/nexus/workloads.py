"""Requests with the lengths that the paper states of its data: mean, median, 95th and 99th percentile."""

from typing import NamedTuple

import numpy as np

from jaxlab.core.checks import require_choice
from jaxlab.serving import traces
from jaxlab.serving.requests import Request


class Lengths(NamedTuple):
  mean: float
  p50: float
  p95: float
  p99: float

  def points(self) -> tuple[tuple[float, float], ...]:
    """An inverse distribution, linear between them; the least length is that with which the mean comes out."""
    _, p50, p95, p99 = self
    most = 1.2 * p99
    rest = 0.25 * p50 + 0.225 * (p50 + p95) + 0.02 * (p95 + p99) + 0.005 * (p99 + most)
    least = min(max(4 * (self.mean - rest), 1), p50)
    return (0, least), (0.5, p50), (0.95, p95), (0.99, p99), (1, most)


PROMPTS = {
  "ldc": Lengths(5905, 5461, 9292, 9817),
  "arxiv": Lengths(3832, 3575, 6460, 6894),
  "sharegpt": Lengths(496, 432, 970, 1367),
}
ANSWERS = {
  "ldc": Lengths(180, 159, 339, 454),
  "arxiv": Lengths(200, 181, 357, 443),
  "sharegpt": Lengths(97, 37, 383, 474),
}
PARTS = {"ldc": {"ldc": 1.0}, "arxiv": {"arxiv": 1.0}, "mixed": {"sharegpt": 0.6, "ldc": 0.4}}
NETWORK = {"ldc": "qwen2.5-3b", "arxiv": "qwen2.5-3b", "mixed": "llama3.1-8b"}


def lengths(name: str, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of prompts and of answers."""
  require_choice("config.simulate.workloads", name, PARTS)
  kinds = list(PARTS[name])
  kind = rng.choice(len(kinds), count, p=list(PARTS[name].values()))
  drawn = [[traces.inverse_cdf(rng, table[k].points(), count) for table in (PROMPTS, ANSWERS)] for k in kinds]
  prompts, answers = (np.choose(kind, [one[i] for one in drawn]) for i in (0, 1))
  return prompts, answers


def requests(name: str, *, rate: float, count: int, seed: int, vocab: int = 0, divide: int = 1) -> list[Request]:
  """Poisson arrivals (all at once: rate 0); prompts that share nothing, or with a `vocab` of
  random tokens.

  Args:
    divide: prompts and answers are so many times shorter.
  """
  rng = np.random.default_rng(seed)
  prompts, answers = (np.maximum(1, tokens // divide) for tokens in lengths(name, rng, count))
  at = traces.poisson(rng, rate=rate, count=count) if rate else np.zeros(count)
  if vocab:
    return traces.requests_of(traces.Trace(at, prompts, answers), rng, vocab_size=vocab)
  rows = zip(at.tolist(), prompts.tolist(), answers.tolist(), strict=True)
  return [Request(f"{i}", [i] * prompt, answer, arrival=t) for i, (t, prompt, answer) in enumerate(rows)]


def mean_prompt(name: str) -> float:
  """Tokens."""
  return sum(share * PROMPTS[kind].mean for kind, share in PARTS[name].items())
